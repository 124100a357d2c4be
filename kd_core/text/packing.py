"""From texts to packed rows of tokens in files, once for all processes.

`build_once` makes a folder of the cache under a lock; `Packer` streams texts through the Rust tokenizer into a file of rows
that is memory-mapped afterwards; `HeldOut` chooses the validation texts of a stream.
"""

import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tokenizers
from tqdm import tqdm

from kd_core.system.ahead import prefetch
from kd_core.system.files import cache_key, write_json
from kd_core.system.terminal import say
from kd_core.text import documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VALIDATION_ROWS = 1024
# A batch for the Rust tokenizer: enough documents for all cores, little enough text to hold its encodings in memory.
BATCH_DOCUMENTS = 1000
BATCH_CHARS = 4_000_000
MAX_PIECE_CHARS = 100_000


# ------------------------------------------------------------------------------------------------ tokenising, packing


@dataclass(frozen=True, eq=False)
class Packer:
    """Turns texts into rows of [CLS], T - 2 tokens of the stream of documents, [SEP]; a [SEP] ends each document.

    There is no padding; the tail of the stream that does not fill a row is dropped.
    """

    tokenizer: tokenizers.Tokenizer
    vocab_size: int
    cls_id: int
    sep_id: int
    seq_len: int

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerFast", seq_len: int) -> "Packer":
        # A copy, because settings of the tokenizer itself are the caller's.
        backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        return cls(backend, len(tokenizer), int(tokenizer.cls_token_id), int(tokenizer.sep_token_id), seq_len)

    @classmethod
    def load(cls, folder: Path) -> "Packer":
        """What `save` wrote."""
        facts = json.loads((folder / "packer.json").read_text())
        return cls(tokenizer=tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), **facts)

    def save(self, folder: Path) -> None:
        self.tokenizer.save(str(folder / "tokenizer.json"))
        write_json(
            folder / "packer.json",
            {"vocab_size": self.vocab_size, "cls_id": self.cls_id, "sep_id": self.sep_id, "seq_len": self.seq_len},
        )

    @property
    def identity(self) -> str:
        return cache_key(self.tokenizer.to_str(), self.vocab_size, self.cls_id, self.sep_id, self.seq_len)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint16 if self.vocab_size < 65_536 else np.uint32)

    def open(self, path: Path) -> np.ndarray:
        return np.memmap(path, dtype=self.dtype, mode="r").reshape(-1, self.seq_len)

    def write(
        self, path: Path, texts: Iterable[str], *, max_rows: int | None = None, report: "Report | None" = None
    ) -> int:
        """Writes the packed rows of the texts and returns their number; memory does not grow with the texts."""
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        # A text that mentions "[MASK]" must not contain the token.
        self.tokenizer.encode_special_tokens = True
        body = self.seq_len - 2
        rest = np.empty(0, self.dtype)
        num_rows = 0
        with path.open("wb") as file:
            # The thread reads and parses while Rust encodes.
            for batch in prefetch(_batches(texts)):
                stream = np.concatenate([rest, *self._encode(batch)])
                count = len(stream) // body
                if max_rows is not None:
                    count = min(count, max_rows - num_rows)
                rows = np.empty((count, self.seq_len), self.dtype)
                rows[:, 0], rows[:, -1] = self.cls_id, self.sep_id
                rows[:, 1:-1] = stream[: count * body].reshape(count, body)
                rows.tofile(file)
                num_rows, rest = num_rows + count, stream[count * body :]
                if report is not None:
                    report.update(documents=len(batch), rows=count)
                if num_rows == max_rows:
                    break
        return num_rows

    def _encode(self, texts: list[str]) -> Iterator[np.ndarray]:
        pieces = [_pieces(text) for text in texts]
        flat = [piece for document in pieces for piece in document]
        encoded = iter(self.tokenizer.encode_batch_fast(flat, add_special_tokens=False))
        end = np.array([self.sep_id], self.dtype)
        for document in pieces:
            for _ in document:
                yield np.array(next(encoded).ids, self.dtype)
            yield end


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
        self._progress = progress
        self._start = time.monotonic()
        self._bar = tqdm(desc=title, unit=" documents", disable=not (progress and sys.stderr.isatty()), leave=False)

    def update(self, *, documents: int, rows: int) -> None:
        self.documents += documents
        self.rows += rows
        self._bar.set_postfix(rows=self.rows, refresh=False)
        self._bar.update(documents)

    def close(self, remark: str) -> None:
        self._bar.close()
        if self._progress:
            seconds = time.monotonic() - self._start
            say(f"{self.title}: {self.documents} documents, {self.rows} rows, {seconds:.1f} s ({remark})")


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
