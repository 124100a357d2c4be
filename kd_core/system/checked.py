"""Files that are as they were written, or refused in one line that names them.

JSON that the project reads again is sealed: its entry "seal" is the SHA-256 of all its other entries. What has no seal, as files
of earlier versions, is taken as it stands.
"""

import contextlib
import hashlib
import itertools
import json
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from kd_core.system.terminal import one_line

SEAL = "seal"
BLOCK = 2**24  # bytes that a thread digests at a time


class DamagedError(ValueError):
    """A file is not as it was written; the message names it, and says why and what to do."""

    def __init__(self, file: Path, why: str, remedy: str = "") -> None:
        super().__init__(f"{file} is damaged ({why}); {remedy or 'restore it, or remove it'}")


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """`content` with its seal, in place of the one that it may have."""
    rest = json.loads(json.dumps({name: value for name, value in content.items() if name != SEAL}))
    return rest | {SEAL: _seal(rest)}


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def reading(file: Path, remedy: str = "") -> Iterator[None]:
    """What numpy raises within for a file that is none of its own, or asks for code, is a DamagedError."""
    try:
        yield
    except (ValueError, EOFError, LookupError, zipfile.BadZipFile, zlib.error) as error:
        raise DamagedError(file, one_line(error), remedy) from None


def read_json(file: Path, *, remedy: str = "", **needs: type) -> dict[str, Any]:
    """The object in a JSON file, without its seal.

    Args:
        remedy: what the user can do about a damaged one.
        needs: entries that it must have, and their types.

    Raises:
        DamagedError: no JSON, no object, an entry that is missing or of another type, or a seal that does not hold.
        OSError: the file cannot be read.
    """
    content = _parsed(file, file.read_bytes(), "", remedy)
    if content.pop(SEAL, None) not in (None, _seal(content)):
        remedy = remedy or f'restore it, or remove its entry "{SEAL}" to have it taken as it is'
        raise DamagedError(file, "its entries are not those that were written", remedy)
    for name, kind in needs.items():
        if not isinstance(content.get(name), kind):
            why = f"its {name} is no {kind.__name__}" if name in content else f"it lacks {name}"
            raise DamagedError(file, why, remedy)
    return content


def read_lines(file: Path, *, last: bool = False) -> list[dict[str, Any]]:
    """The objects of a file with one a line; a last line without its end, as of a writer that was killed, is left out.

    Args:
        last: of the last line alone.

    Raises:
        DamagedError: a line is no JSON object.
        OSError: the file cannot be read.
    """
    whole = list(enumerate(file.read_bytes().split(b"\n")[:-1], 1))
    return [_parsed(file, line, f"line {number}: ", "") for number, line in (whole[-1:] if last else whole)]


def _parsed(file: Path, text: bytes, where: str, remedy: str) -> dict[str, Any]:
    try:
        content = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        why = "empty" if not text.strip() else f"no JSON: {error}"
        raise DamagedError(file, where + why, remedy) from None
    if not isinstance(content, dict):
        raise DamagedError(file, f"{where}{type(content).__name__} in place of an object", remedy)
    return content


def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of each file's blocks' SHA-256: all cores share the work, 1 GB/s each where measured."""
    parts = [(name, start) for name in names for start in range(0, max((folder / name).stat().st_size, 1), BLOCK)]

    def of_block(part: tuple[str, int]) -> bytes:
        with (folder / part[0]).open("rb") as file:
            file.seek(part[1])
            return hashlib.sha256(file.read(BLOCK)).digest()

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        made = zip(parts, pool.map(of_block, parts), strict=True)
        return {
            name: hashlib.sha256(b"".join(block for _, block in blocks)).hexdigest()
            for name, blocks in itertools.groupby(made, lambda one: one[0][0])
        }


def check(folder: Path, sums: Mapping[str, str], remedy: str = "") -> None:
    """Raises DamagedError unless the files of `folder` are those that `sums`, of `digests`, were made of."""
    for name in sums:
        if not (folder / name).is_file():
            raise DamagedError(folder / name, "it is gone", remedy)
    for name, found in digests(folder, sums).items():
        if found != sums[name]:
            raise DamagedError(folder / name, "its bytes are not those that were written", remedy)
