"""From texts to packed rows of tokens in files, once for all processes.

`build_once` makes a folder of the cache under a lock; `Packer` streams texts through the Rust tokenizer into a file of rows
that is memory-mapped afterwards; `HeldOut` chooses the validation texts of a stream.
"""

import json
import sys
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import tokenizers
from tqdm import tqdm

from kd_core.system.ahead import prefetch
from kd_core.system.checked import DamagedError, read_json
from kd_core.system.files import cache_key, write_json
from kd_core.system.terminal import say
from kd_core.text import documents
from kd_core.text.causal_tokenizer import before_a_text, vocabulary_size
from kd_core.text.tokenizer import clear_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VALIDATION_ROWS = 1024
# A batch for the Rust tokenizer: enough documents for all cores, little enough text to hold its encodings in memory.
BATCH_DOCUMENTS = 1000
BATCH_CHARS = 4_000_000
MAX_PIECE_CHARS = 100_000


# ------------------------------------------------------------------------------------------------ tokenising, packing


@dataclass(frozen=True, eq=False)
class Packer(ABC):
    """Turns texts into rows of T tokens in a file. What a row is, each kind of model says for itself.

    The tail of a stream of documents that does not fill a row is dropped.
    """

    tokenizer: tokenizers.Tokenizer
    vocab_size: int
    seq_len: int

    @classmethod
    def load(cls, folder: Path) -> "Packer":
        """What `save` wrote."""
        facts = read_json(folder / "packer.json")
        kind = CausalPacker if "eos_id" in facts else MaskedPacker
        with clear_errors(f"packer.json or tokenizer.json in {folder} is damaged", f"remove {folder}"):
            return kind(tokenizer=tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), **facts)

    def save(self, folder: Path) -> None:
        self.tokenizer.save(str(folder / "tokenizer.json"))
        write_json(folder / "packer.json", self._facts())

    def _facts(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "tokenizer"}

    @property
    @abstractmethod
    def identity(self) -> str:
        """A key of all that decides how a text becomes rows."""

    @property
    def shortfall(self) -> str:
        """What is wrong with documents that give no row, and what to do."""
        return f"do not fill one sequence of {self.seq_len} tokens; give more text, or a smaller --seq-len"

    @property
    def dtype(self) -> np.dtype:
        """Of a token's id."""
        return np.dtype(np.uint16 if self.vocab_size < 65_536 else np.uint32)

    @property
    def token_dtype(self) -> np.dtype:
        """Of a token in the file."""
        return self.dtype

    def open(self, path: Path) -> np.ndarray:
        size, row_bytes = path.stat().st_size, self.seq_len * self.token_dtype.itemsize
        if not size or size % row_bytes:
            raise DamagedError(path, f"{size} bytes are no rows of {row_bytes}", f"remove {path.parent}")
        return np.memmap(path, dtype=self.token_dtype, mode="r").reshape(-1, self.seq_len)

    def write(
        self, path: Path, texts: Iterable[str], *, max_rows: int | None = None, report: "Report | None" = None
    ) -> int:
        """Writes the rows of the texts and returns their number; memory does not grow with the texts."""
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        # A text that mentions "[MASK]" must not contain the token.
        self.tokenizer.encode_special_tokens = True
        report = report or Report("", progress=False)
        rest = np.empty(0, self.token_dtype)
        num_rows = 0
        with path.open("wb") as file:
            # The thread reads and parses while Rust encodes.
            for batch in prefetch(_batches(texts)):
                rows, rest = self._rows(batch, rest, report)
                rows = rows if max_rows is None else rows[: max_rows - num_rows]
                rows.tofile(file)
                num_rows += len(rows)
                report.update(documents=len(batch), rows=len(rows))
                if num_rows == max_rows:
                    break
        return num_rows

    @abstractmethod
    def _rows(self, texts: list[str], rest: np.ndarray, report: "Report") -> tuple[np.ndarray, np.ndarray]:
        """The rows [R, T] of a batch of texts after the tokens `rest` of the batches before, and the tokens that are left."""

    def _encode(self, texts: list[str]) -> Iterator[np.ndarray]:
        """The ids of each text, nothing added."""
        pieces = [_pieces(text) for text in texts]
        flat = [piece for document in pieces for piece in document]
        encoded = iter(self.tokenizer.encode_batch_fast(flat, add_special_tokens=False))
        for document in pieces:
            ids = np.concatenate([np.array(next(encoded).ids, np.uint32) for _ in document])
            if (highest := int(ids.max(initial=0))) >= self.vocab_size:
                raise ValueError(f"the tokenizer gives the id {highest}, but has {self.vocab_size} tokens; correct it")
            yield ids.astype(self.dtype)


@dataclass(frozen=True, eq=False)
class MaskedPacker(Packer):
    """Rows of [CLS], T - 2 tokens of the stream of documents, [SEP]; a [SEP] ends each document. There is no padding."""

    cls_id: int
    sep_id: int

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerFast", seq_len: int) -> "MaskedPacker":
        ids = int(tokenizer.cls_token_id), int(tokenizer.sep_token_id)
        return cls(_copy(tokenizer), len(tokenizer), seq_len, *ids)

    @property
    def identity(self) -> str:
        return cache_key(self.tokenizer.to_str(), self.vocab_size, self.cls_id, self.sep_id, self.seq_len)

    def _rows(self, texts: list[str], rest: np.ndarray, report: "Report") -> tuple[np.ndarray, np.ndarray]:
        end = np.array([self.sep_id], self.dtype)
        stream = np.concatenate([rest, *(part for ids in self._encode(texts) for part in (ids, end))])
        body = self.seq_len - 2
        count = len(stream) // body
        rows = np.empty((count, self.seq_len), self.dtype)
        rows[:, 0], rows[:, -1] = self.cls_id, self.sep_id
        rows[:, 1:-1] = stream[: count * body].reshape(count, body)
        return rows, stream[count * body :]


# Marks of a token in a causal row, bits of a uint8.
BEGINS = 1  # a document begins here: positions count from here, and nothing before is seen
LABEL = 2  # is predicted from the token before it, and counts
PADDING = 4


@dataclass(frozen=True, eq=False)
class CausalPacker(Packer):
    """Rows of the stream of documents, each between what the tokenizer puts before a text and EOS; each token with its marks.

    A row that goes on with a document cut in two begins one, as attention cannot reach what is not in the row. The first
    token of a document is no label, since nothing predicts it.

    Attributes:
        prefix: ids before each document: BOS, where the tokenizer begins a text with it.
        pad_id: fills rows that are not packed.
        packing: False: one document a row, padded; of one that is longer, the beginning if `cut`, else nothing.
    """

    prefix: Sequence[int]
    eos_id: int
    pad_id: int
    packing: bool = True
    cut: bool = False

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerFast", seq_len: int, **options: Any) -> Self:
        eos = int(tokenizer.eos_token_id)
        pad = eos if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
        size = vocabulary_size(tokenizer)
        return cls(_copy(tokenizer), size, seq_len, before_a_text(tokenizer), eos, pad, **options)

    @property
    def identity(self) -> str:
        return cache_key(type(self).__name__, self.tokenizer.to_str(), json.dumps(self._facts()))

    @property
    def shortfall(self) -> str:
        return super().shortfall if self.packing else self._too_long

    @property
    def _too_long(self) -> str:
        return f"do not fit into one sequence of {self.seq_len} tokens; give a larger --seq-len, or --on-too-long cut"

    @property
    def token_dtype(self) -> np.dtype:
        return np.dtype([("id", self.dtype), ("marks", np.uint8)])

    def _rows(self, texts: list[str], rest: np.ndarray, report: "Report") -> tuple[np.ndarray, np.ndarray]:
        documents = [self._document(ids) for ids in self._encode(texts)]
        if not self.packing:
            return self._padded(documents, report), rest
        stream = np.concatenate([rest, *documents])
        count = len(stream) // self.seq_len
        rows = stream[: count * self.seq_len].reshape(count, self.seq_len)
        rows["marks"][:, 0] = BEGINS
        return rows, stream[count * self.seq_len :]

    def _document(self, ids: np.ndarray) -> np.ndarray:
        tokens = np.empty(len(self.prefix) + len(ids) + 1, self.token_dtype)
        start = len(self.prefix)
        tokens["id"][:start], tokens["id"][start:-1], tokens["id"][-1] = self.prefix, ids, self.eos_id
        tokens["marks"][:start], tokens["marks"][start:] = 0, LABEL
        tokens["marks"][0] = BEGINS
        return tokens

    def _padded(self, documents: list[np.ndarray], report: "Report") -> np.ndarray:
        """Each document in a row of its own."""
        kept = [tokens[: self.seq_len] for tokens in documents if self.cut or len(tokens) <= self.seq_len]
        too_long = sum(len(tokens) > self.seq_len for tokens in documents)
        report.count(**{"cut" if self.cut else "left_out_as_too_long": too_long})
        rows = np.empty((len(kept), self.seq_len), self.token_dtype)
        rows["id"], rows["marks"] = self.pad_id, PADDING
        for row, tokens in zip(rows, kept, strict=True):
            row[: len(tokens)] = tokens
        return rows


def _copy(tokenizer: "PreTrainedTokenizerFast") -> tokenizers.Tokenizer:
    """Of the tokenizer in Rust, because settings of the tokenizer itself are the caller's."""
    return tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())


def _pieces(text: str) -> list[str]:
    """A long text, cut at spaces, so that all cores work on it and its encoding needs little memory at a time."""
    pieces = []
    start = 0
    while len(text) - start > MAX_PIECE_CHARS:
        cut = text.rfind(" ", start + 1, start + MAX_PIECE_CHARS)
        end = cut if cut != -1 else start + MAX_PIECE_CHARS
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    chars = 0
    for text in texts:
        batch.append(text)
        chars += len(text)
        if len(batch) >= BATCH_DOCUMENTS or chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


class Report:
    """What tokenising says: a bar on a terminal, one line at the end elsewhere, nothing unless asked."""

    def __init__(self, title: str, progress: bool) -> None:
        self.title, self.documents, self.rows = title, 0, 0
        self.counts: Counter[str] = Counter()  # of what else happened, by its name
        self._progress = progress
        self._start = time.monotonic()
        self._bar = tqdm(desc=title, unit=" documents", disable=not (progress and sys.stderr.isatty()), leave=False)

    def update(self, *, documents: int, rows: int) -> None:
        self.documents += documents
        self.rows += rows
        self._bar.set_postfix(rows=self.rows, refresh=False)
        self._bar.update(documents)

    def count(self, **counts: int) -> None:
        self.counts.update(counts)

    def close(self, remark: str) -> None:
        self._bar.close()
        if self._progress:
            seconds = time.monotonic() - self._start
            remarks = [remark, *(f"{count} {name.replace('_', ' ')}" for name, count in self.counts.items() if count)]
            say(f"{self.title}: {self.documents} documents, {self.rows} rows, {seconds:.1f} s ({', '.join(remarks)})")


class HeldOut:
    """Collects the validation documents of a stream: those with the smallest hashes, as much text as can be needed."""

    def __init__(self, seq_len: int) -> None:
        self.count = 0
        self._limit = 32 * VALIDATION_ROWS * seq_len  # characters; a token has fewer than 32
        self._chars = 0
        self._kept: list[tuple[int, str]] = []

    def divert(self, texts: Iterable[tuple[str, str]]) -> Iterator[str]:
        """Yields the training texts and keeps the others."""
        for split, text in texts:
            if split == "train":
                yield text
            else:
                self.count += 1
                self._chars += len(text)
                self._kept.append((documents.text_digest(text), text))
                if self._chars > 2 * self._limit:
                    self._trim()

    def texts(self) -> list[str]:
        """In the order of their hashes, so that a long source is not represented by its beginning."""
        self._trim()
        return [text for _, text in self._kept]

    def _trim(self) -> None:
        self._kept.sort()
        self._chars, kept = 0, []
        for digest, text in self._kept:
            if self._chars < self._limit:
                kept.append((digest, text))
                self._chars += len(text)
        self._kept = kept
