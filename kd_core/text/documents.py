"""Where text comes from: files, the Hugging Face hub, and the text that every Python installation carries.

Everything here yields documents as `(split, text)`, one at a time, so that a source larger than memory is fine. `split` is
"train" or "validation". Equal texts are always on one side:

- files named train*, val*, validation*, dev* and test* are the splits. Test files are never read. Files without such a name
  are training text as soon as some file is named as validation.
- otherwise a hash of the text sends one document in `VALIDATION_ONE_IN` to validation.
- a training document that equals a validation document is left out and counted.
"""

import bz2
import contextlib
import gzip
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import lzma
import os
import platform
import re
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from kd_core.system.files import files_below
from kd_core.system.hub import require_hub
from kd_core.system.splits import VALIDATION_ONE_IN, named_split
from kd_core.system.terminal import one_line

# Suffixes, and those that stand for them.
KINDS = (".txt", ".jsonl", ".json", ".parquet")
SYNONYMS = {".text": ".txt", ".ndjson": ".jsonl", ".jsonlines": ".jsonl", ".pq": ".parquet"}
COMPRESSIONS = (".gz", ".xz", ".bz2", ".zst", ".lz4", ".lzma")
ALLOWED = f"{', '.join(KINDS)} (each also {', '.join(COMPRESSIONS[:-1])} or {COMPRESSIONS[-1]})"


@dataclass
class Documents:
    """A source of documents.

    Iterating reads the source from its beginning, each time in the same order, with all validation documents of named
    validation files before the first training document.
    """

    name: str
    key: str  # identifies the content without reading it: paths, sizes and times, or a hub name
    read: Callable[[], Iterator[tuple[str | None, str]]]  # the split by name, None: the hash decides
    duplicates: int = field(default=0, init=False)  # training documents left out by the newest iteration

    def __iter__(self) -> Iterator[tuple[str, str]]:
        self.duplicates = 0
        held_out: set[int] = set()
        for named, text in self.read():
            digest = text_digest(text)
            split = named or ("train" if digest % VALIDATION_ONE_IN else "validation")
            if split == "validation":
                held_out.add(digest)
            elif digest in held_out:
                self.duplicates += 1
                continue
            yield split, text


def text_digest(text: str) -> int:
    """64 bits that stand for a text, whitespace at its ends ignored; the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.strip().encode(), digest_size=8).digest(), "little")


# -------------------------------------------------------------------------------------------------------------- records


class Fields(NamedTuple):
    """What of a record is a document."""

    columns: tuple[str, ...]  # read of a table
    document: Callable[[Any, str], str]  # from a record and the words for its place; raises ValueError


def record_text(record: Any, place: str) -> str:
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        found = f"only {sorted(record)}" if isinstance(record, dict) and "text" not in record else "not a text"
        raise ValueError(f'--data: {place} needs a field "text" that holds a string; it has {found}')
    return checked_unicode(text, place)


def checked_unicode(text: str, place: str) -> str:
    """`text`, unless it has half of a surrogate pair, which JSON can write and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"--data: {place} has a text that is not valid Unicode ({error.reason}); correct it"
        ) from error
    return text


TEXT = Fields(("text",), record_text)


# --------------------------------------------------------------------------------------------------- files and folders


def local_documents(source: Path, name: str | None = None, fields: Fields = TEXT) -> Documents:
    """Documents of one file, or of all text files below a folder in the order of their names.

    Raises:
        FileNotFoundError: nothing is at `source`.
        ValueError: an unsupported suffix, or a folder without text files; while iterating, a file that cannot be read.
    """
    source = source.expanduser().absolute()
    files = [(split, path) for split, path in find_files(source) if split != "test"]
    if not files:
        raise ValueError(f"--data {source} holds only test splits, which are never trained on; add train files")
    named = any(split == "validation" for split, _ in files)
    if all(split == "validation" for split, _ in files):
        raise ValueError(f"--data {source} holds only validation splits; add train files, or name one file to split it")
    files.sort(key=lambda file: file[0] != "validation")  # stable: validation first, then the order of names
    identity = [(str(path), stat.st_size, stat.st_mtime_ns, split) for split, path in files for stat in [_stat(path)]]

    def read() -> Iterator[tuple[str | None, str]]:
        for split, path in files:
            for text in read_file(path, fields):
                yield (split or "train") if named else None, text

    return Documents(name=name or source.name, key=json.dumps(identity), read=read)


def find_files(source: Path) -> list[tuple[str | None, Path]]:
    """The text files at or below `source`, each with the split that its name, or its folder's, says (None: it says none).

    The name of a file that is given by itself decides nothing, except that a test split is refused as training text.
    """
    if source.is_file():
        if file_kind(source) is None:
            raise ValueError(f"--data {source}: unsupported kind of file; allowed are {ALLOWED}")
        return [("test" if named_split(source.name) == "test" else None, source)]
    if not source.is_dir():
        raise FileNotFoundError(
            f"--data {source}: no such file or folder; give a path, 'c4', 'owner/name' on the Hugging Face hub, or "
            "'embedded' for the text that comes with Python"
        )
    listing = files_below(source, file_kind)
    listing.check(f"--data {source}")
    if not listing.names:
        raise ValueError(f"--data {source}: no text files in this folder, {listing}; allowed are {ALLOWED}")
    plain: dict[str, str] = {}
    for name in listing.names:
        if (other := plain.setdefault(_uncompressed(name), name)) != name:
            raise ValueError(f"--data {source} holds the same text twice, {other} and {name}; keep one of them")
    return [(path_split(Path(name)), source / name) for name in listing.names]


def path_split(path: Path) -> str | None:
    """The split named by a file, else by the nearest folder above it."""
    return next((split for part in reversed(path.parts) if (split := named_split(part))), None)


def file_kind(name: str | Path) -> str | None:
    """The suffix that says how to read a file, compression set aside; None when it is no text file."""
    suffix = Path(_uncompressed(str(name))).suffix.lower()
    return SYNONYMS.get(suffix, suffix if suffix in KINDS else None)


def _uncompressed(name: str) -> str:
    return name[: -len(Path(name).suffix)] if name.lower().endswith(COMPRESSIONS) else name


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise ValueError(f"--data: {path} cannot be read ({error.strerror}); repair, replace or remove it") from error


def read_file(path: Path, fields: Fields = TEXT) -> Iterator[str]:
    """The documents of one file, without empty ones.

    Raises:
        ValueError: the file is damaged, not UTF-8, or has a record without document; names the file and the place.
    """
    columns, document = fields
    for record, place in read_records(path, columns):
        text = document(record, place)
        if text.strip():
            yield text


def read_records(path: Path, columns: Sequence[str]) -> Iterator[tuple[Any, str]]:
    """The records of one file, each with its place; of .txt they have a field "text", of tables `columns`.

    Raises:
        ValueError: the file is damaged or not UTF-8.
    """
    readers = {".txt": read_txt, ".jsonl": read_jsonl, ".json": read_json, ".parquet": read_parquet}
    with opened(path) as stream:
        yield from readers[file_kind(path) or ""](stream, path, columns)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The bytes of a file, decompressed as its suffix says.

    Raises:
        ValueError: it cannot be read, or is damaged.
    """
    try:
        with open_binary(path) as stream:
            yield stream
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise ValueError(f"--data: {path} cannot be read ({reason}); repair, replace or remove it") from error


def open_binary(path: Path) -> Any:
    suffix = path.suffix.lower()
    if suffix in COMPRESSIONS and not path.stat().st_size:
        raise EOFError("empty, which no compressed file is")
    opened: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open, ".lzma": lzma.open, ".bz2": bz2.open}
    if suffix in opened:
        return opened[suffix](path, "rb")
    if suffix in (".zst", ".lz4"):
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression={".zst": "zstd", ".lz4": "lz4"}[suffix]))
    return path.open("rb")


def read_txt(stream: Any, path: Path, columns: Sequence[str]) -> Iterator[tuple[Any, str]]:
    """Documents are separated by blank lines."""
    lines: list[str] = []
    for number, line in utf8_lines(stream, path):
        if line.strip():
            lines.append(line)
        elif lines:
            yield {"text": "".join(lines)}, f"{path}, line {number}"
            lines = []
    yield {"text": "".join(lines)}, str(path)


def read_jsonl(stream: Any, path: Path, columns: Sequence[str]) -> Iterator[tuple[Any, str]]:
    for number, line in utf8_lines(stream, path):
        if line.strip():
            place = f"{path}, line {number}"
            yield parse_json(line, place), place


def read_json(stream: Any, path: Path, columns: Sequence[str]) -> Iterator[tuple[Any, str]]:
    """A list of records, or one record a line."""
    buffered = io.BufferedReader(stream)
    if not buffered.peek(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        yield from read_jsonl(buffered, path, columns)
        return
    content = "".join(line for _, line in utf8_lines(buffered, path))
    for number, record in enumerate(parse_json(content, str(path)), start=1):
        yield record, f"{path}, record {number}"


def read_parquet(stream: Any, path: Path, columns: Sequence[str]) -> Iterator[tuple[Any, str]]:
    import pyarrow
    import pyarrow.parquet

    # Parquet is read from its end; a compressed stream can only be read from its beginning.
    content = stream if path.suffix.lower() in (".parquet", ".pq") else io.BytesIO(stream.read())
    try:
        table = pyarrow.parquet.ParquetFile(content)
        present = table.schema_arrow.names
        found = [column for column in columns if column in present]
        if not found:
            raise ValueError(
                f"--data: {path} has no column {_or(columns)}, only {present}; rename one to {columns[0]!r}"
            )
        number = 0
        for batch in table.iter_batches(batch_size=1000, columns=found):
            try:
                records = batch.to_pylist()
            except (ValueError, OverflowError) as error:  # a string that is not UTF-8, a date beyond Python's
                raise OSError(f"rows from {number + 1} on: {one_line(error)}") from error
            for record in records:
                number += 1
                yield record, f"{path}, row {number}"
    except pyarrow.ArrowException as error:
        if isinstance(error, MemoryError | pyarrow.ArrowCancelled):
            raise
        raise OSError(one_line(error)) from error


def _or(names: Sequence[str]) -> str:
    return " or ".join(map(repr, names))


def utf8_lines(stream: Any, path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines with their line ends, without a byte-order mark."""
    offset = 0
    for number, line in enumerate(stream, start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"--data: {path} is not UTF-8 text at byte {offset + error.start} (line {number}); convert it to UTF-8"
            ) from error
        if "\0" in text:  # UTF-16 without its mark, or blocks that a crash has left unwritten
            raise ValueError(
                f"--data: {path} is not UTF-8 text at byte {offset + line.index(0)} (line {number}), which is NUL; convert or "
                "correct it"
            )
        yield number, text
        offset += len(line)


def parse_json(content: str, place: str) -> Any:
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        where = f"{error.msg} at column {error.colno}" if error.lineno == 1 else f"{error.msg} in line {error.lineno}"
        raise ValueError(f"--data: {place} is not JSON ({where}); correct it or remove the file") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists
        raise ValueError(
            f"--data: {place} cannot be read ({one_line(error)}); correct it or remove the file"
        ) from error


# ------------------------------------------------------------------------------------- text of the Python installation

# The standard library, and what this project's dependencies bring: prose of many authors, about 15 MB.
EMBEDDED_PACKAGES = ("numpy", "networkx", "matplotlib", "pandas", "torch", "torchvision", "transformers")
TRIPLE_QUOTED = re.compile(r'"""(.*?)"""', re.DOTALL)
BLANK_LINES = re.compile(r"\n\s*\n")
WORDS_AND_SPACES = re.compile(r"[A-Za-z\s.,;]+")
MIN_PARAGRAPH_CHARS = 40
MIN_DOCUMENT_CHARS = 150
# Below this share of letters, spaces and full stops, a paragraph is a table, a signature or code.
MIN_PROSE_SHARE = 0.88


def embedded_key() -> str:
    """Identifies the embedded text without reading it: the versions of Python and of the packages that are installed."""
    return json.dumps([platform.python_version(), [(p, importlib.metadata.version(p)) for p in _installed_packages()]])


def write_embedded(path: Path) -> int:
    """Writes the embedded text as JSON lines and returns the number of documents; about 5 seconds on one core.

    A document is the language reference's page on a topic, or one documentation string without its code, tables and
    paragraphs that an earlier one has. Packages are read as text; nothing is imported or run.
    """
    seen: set[str] = set()
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for raw in _embedded_raw():
            paragraphs = []
            for paragraph in BLANK_LINES.split(raw):
                paragraph = " ".join(paragraph.split())
                if _is_prose(paragraph) and paragraph not in seen:
                    seen.add(paragraph)
                    paragraphs.append(paragraph)
            text = "\n".join(paragraphs)
            if len(text) >= MIN_DOCUMENT_CHARS:
                file.write(json.dumps({"text": text}) + "\n")
                count += 1
    return count


def _embedded_raw() -> Iterator[str]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name]
    roots = [Path(sysconfig.get_path("stdlib"))]
    for package in _installed_packages():
        spec = importlib.util.find_spec(package)  # of a top-level name: finds the folder, imports nothing
        roots += [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).parts
            if not any(part in ("site-packages", "dist-packages") or "test" in part for part in parts):
                # A pattern is ten times as fast as `ast` and also finds torch's documentation of built-in functions.
                yield from TRIPLE_QUOTED.findall(path.read_text(encoding="utf-8", errors="ignore"))


def _installed_packages() -> list[str]:
    return [package for package in EMBEDDED_PACKAGES if importlib.util.find_spec(package)]


def _is_prose(paragraph: str) -> bool:
    if len(paragraph) < MIN_PARAGRAPH_CHARS or ">>>" in paragraph or "```" in paragraph:
        return False
    prose_chars = sum(map(len, WORDS_AND_SPACES.findall(paragraph)))
    return prose_chars >= MIN_PROSE_SHARE * len(paragraph)


def hub_documents(source: str, fields: Fields = TEXT) -> Documents:
    """The column "text", or `fields`, of the hub's data set "owner/name" or "owner/name:config".

    The key is the name alone, so a data set that changes on the hub is read again only into an empty cache.

    Raises:
        ValueError: while iterating, when the data set cannot be had or has no such column.
    """
    name, _, config = source.partition(":")
    columns, document = fields

    def read() -> Iterator[tuple[str | None, str]]:
        import datasets

        require_hub(f"--data {source} is no local path, and the data set of that name")
        try:
            splits = datasets.load_dataset(name, config or None)
        except (OSError, ValueError) as error:
            raise ValueError(f"--data {source} cannot be loaded from the hub ({one_line(error)})") from error
        named = {named_split(split): split for split in reversed(list(splits)) if named_split(split) != "test"}
        for kind in ("validation", "train"):
            if kind in named:
                rows = splits[named[kind]]
                found = [column for column in columns if column in rows.column_names]
                if not found:
                    raise ValueError(
                        f"--data {source} has no column {_or(columns)}, only {rows.column_names}; choose another data set"
                    )
                for number, record in enumerate(rows.select_columns(found)):
                    yield kind if "validation" in named else None, document(record, f"{source}, row {number}")

    return Documents(name=source, key=f"hub:{source}", read=read)
