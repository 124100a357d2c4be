"""A corpus: a source becomes packed rows of tokens once, memory-mapped.

source -> tokens -> rows of a `Packer` -> cache
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import tokenizers

from kd_core.system.checked import read_json
from kd_core.system.files import build_once, cache_key, cache_root, file_digest, write_json
from kd_core.system.hub import HUB_NAME
from kd_core.system.ranks import rank
from kd_core.system.splits import VALIDATION_ONE_IN
from kd_core.system.terminal import say
from kd_core.text import c4, documents
from kd_core.text.flags import MAX_SEQ_LEN, MIN_SEQ_LEN, TextFlags
from kd_core.text.packing import VALIDATION_ROWS, HeldOut, MaskedPacker, Packer, Report
from kd_core.text.tokenizer import load_tokenizer, tokenizer_digest, train_wordpiece, unknown_share

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IGNORE_INDEX = -100
CHECKED_ROWS = 10_000  # of the training rows, for tokens that are unknown
WORTH_SAYING = 0.01  # of the tokens unknown
TOKENIZER_TRAINING_CHARS = 100_000_000


class Rows(Protocol):
    """Packed training rows in shards."""

    @property
    def num_shards(self) -> int: ...

    def open(self, shard: int) -> np.ndarray: ...

    def request(self, shard: int) -> None: ...


@dataclass(frozen=True, eq=False)
class Corpus:
    """A tokenised source, opened from the cache; made by `prepare`."""

    name: str
    fingerprint: str  # of the content, the tokenizer and the settings: equal fingerprints give equal batches
    tokenizer: "PreTrainedTokenizerFast"
    seq_len: int
    validation: np.ndarray  # [R, seq_len] of Packer.token_dtype, 1 <= R <= VALIDATION_ROWS
    train: Rows

    @property
    def num_shards(self) -> int:
        return self.train.num_shards

    def rows(self, shard: int) -> np.ndarray:
        """A shard's training rows, memory-mapped [rows, seq_len] of tokens; of c4, waits until it is tokenised.

        Raises:
            ValueError: the shard cannot be downloaded or tokenised, with the worker's own message.
        """
        return self.train.open(shard)

    def request(self, shard: int) -> None:
        """Has a shard made in the background, if it is not there yet; returns at once."""
        self.train.request(shard)

    def check_batch(self, global_batch_size: int) -> None:
        """
        Raises:
            ValueError: the corpus has fewer rows than one global batch.
        """
        if self.num_shards > 1:
            return
        num_rows = len(self.rows(0))
        if num_rows < global_batch_size:
            raise ValueError(
                f"--data {self.name} has {num_rows} training sequences of {self.seq_len} tokens, fewer than one batch; "
                f"--global-batch-size must be at most {num_rows}, got {global_batch_size}, or give more text"
            )


def build(cfg: TextFlags) -> Corpus:
    """The corpus of a run, as its flags say; errors as `prepare`."""
    return prepare(
        cfg.data, tokenizer=cfg.tokenizer, vocab_size=cfg.vocab_size, seq_len=cfg.seq_len, progress=rank() == 0
    )


def prepare(
    source: str | None, *, tokenizer: str | None, vocab_size: int, seq_len: int, progress: bool = False
) -> Corpus:
    """Tokenises and packs a source into the cache, or opens what is there; the same bytes for every caller.

    Any number of processes may call this at once: one works, the others wait. The cache is `$KD_CACHE`, by default
    `~/.cache/kd_recipes`; it can be deleted at any time when no run uses it.

    Args:
        source: a file or folder (see `documents.local_documents`), "c4", "owner/name[:config]" on the hub, or "embedded" or
            None for text that comes with Python.
        tokenizer: what `load_tokenizer` takes; None trains a WordPiece tokenizer on the training documents (c4: BERT's).
        vocab_size: tokens at most, of a tokenizer that is trained here.
        seq_len: T, tokens a row, [CLS] and [SEP] included.
        progress: say what is done, on stderr: a bar on a terminal, a line elsewhere. Only the process that does it speaks.

    Raises:
        FileNotFoundError, ValueError: one line that names the flag and says what to do.
    """
    if not MIN_SEQ_LEN <= seq_len <= MAX_SEQ_LEN:
        raise ValueError(f"--seq-len must be in [{MIN_SEQ_LEN}, {MAX_SEQ_LEN}], got {seq_len}")
    if source == "c4":
        loaded = load_tokenizer(tokenizer or c4.DEFAULT_TOKENIZER)
        return open_c4(loaded, MaskedPacker.of(loaded, seq_len), progress)
    texts = open_source(source, progress)
    if tokenizer is None:
        loaded = load_tokenizer(trained_tokenizer(texts, train_wordpiece, vocab_size, progress))
    else:
        loaded = load_tokenizer(tokenizer)
    packer = MaskedPacker.of(loaded, seq_len)
    key = cache_key(texts.key, tokenizer_digest(loaded), seq_len)
    return open_local(f"corpus-{key}", texts, loaded, packer, progress)


def open_local(
    name: str, texts: documents.Documents, tokenizer: "PreTrainedTokenizerFast", packer: Packer, progress: bool
) -> Corpus:
    """The documents' rows in the folder `name` of the cache, made if they are not there."""
    folder = cache_root() / name
    build_once(folder, lambda new: _build_corpus(new, texts, packer, progress))
    facts = read_json(folder / "facts.json", fingerprint=str)
    corpus = Corpus(
        name=texts.name,
        fingerprint=facts["fingerprint"],
        tokenizer=tokenizer,
        seq_len=packer.seq_len,
        validation=packer.open(folder / "validation.bin"),
        train=LocalRows(folder / "train.bin", packer),
    )
    rows = corpus.rows(0)
    _check_known(corpus, rows[:: -(-len(rows) // CHECKED_ROWS)], progress)
    return corpus


def open_source(source: str | None, progress: bool, fields: documents.Fields = documents.TEXT) -> documents.Documents:
    """What `prepare` calls a source; `fields` are what of its records is a document."""
    if source is None or source == "embedded":
        folder = cache_root() / f"embedded-{cache_key(documents.embedded_key())}"
        build_once(folder, lambda new: _build_embedded(new, progress))
        return documents.local_documents(folder / "documents.jsonl", "embedded", fields)
    path = Path(source).expanduser()
    beside_a_folder = path.parent != Path(".") and path.parent.is_dir()
    if HUB_NAME.fullmatch(source) and not (path.exists() or beside_a_folder or documents.file_kind(path)):
        return documents.hub_documents(source, fields)
    return documents.local_documents(path, fields=fields)


def open_c4(tokenizer: "PreTrainedTokenizerFast", packer: Packer, progress: bool) -> Corpus:
    """C4 with its validation rows made now, its training shards when they are asked for."""
    folder = cache_root() / f"c4-{packer.identity}"
    build_once(folder, lambda new: c4.build_validation(new, packer, progress))
    corpus = Corpus(
        name="c4",
        fingerprint=cache_key("c4", packer.identity),
        tokenizer=tokenizer,
        seq_len=packer.seq_len,
        validation=packer.open(folder / "validation.bin"),
        train=c4.Shards(folder, packer, progress),
    )
    _check_known(corpus, corpus.validation, progress)
    return corpus


def _check_known(corpus: Corpus, rows: np.ndarray, progress: bool) -> None:
    """Raises ValueError when the tokenizer does not know most of the text, and says how much it does not know."""
    shares = []
    for name, part in (("training", rows), ("validation", corpus.validation)):
        ids = part["id"] if part.dtype.names else part  # of causal models, beside their marks
        shares.append(unknown_share(corpus.tokenizer, ids, f"--data {corpus.name}, {name} text"))
    if max(shares) >= WORTH_SAYING and progress:
        say(f"--data {corpus.name}: {max(shares):.1%} of the tokens are unknown to the tokenizer")


def _build_embedded(folder: Path, progress: bool) -> None:
    start = time.monotonic()
    count = documents.write_embedded(folder / "documents.jsonl")
    megabytes = (folder / "documents.jsonl").stat().st_size / 1e6
    if progress:
        say(f"collecting embedded text: {count} documents, {megabytes:.1f} MB, {time.monotonic() - start:.1f} s")


def trained_tokenizer(
    texts: documents.Documents,
    train: Callable[[list[str], int], tokenizers.Tokenizer],
    vocab_size: int,
    progress: bool,
    kind: str = "tokenizer",
) -> str:
    """The path of a tokenizer.json that `train` makes of the training documents, in the cache's folder of its `kind`."""
    folder = cache_root() / f"{kind}-{cache_key(texts.key, vocab_size)}"

    def build(new: Path) -> None:
        start = time.monotonic()
        sample, chars = [], 0
        for split, text in texts:
            if split == "train":
                sample.append(text)
                chars += len(text)
                if chars >= TOKENIZER_TRAINING_CHARS:
                    break
        if not sample:
            raise ValueError(f"--data {texts.name} has no training documents; give more text")
        trained = train(sample, vocab_size)
        trained.save(str(new / "tokenizer.json"))
        if progress:
            size, seconds = trained.get_vocab_size(), time.monotonic() - start
            say(f"training a tokenizer on {texts.name}: {size} tokens, {chars / 1e6:.1f} M characters, {seconds:.1f} s")

    build_once(folder, build)
    return str(folder / "tokenizer.json")


def _build_corpus(folder: Path, texts: documents.Documents, packer: Packer, progress: bool) -> None:
    held_out = HeldOut(packer.seq_len)
    report = Report(f"tokenising {texts.name}", progress)
    rows = packer.write(folder / "train.bin", held_out.divert(texts), report=report)
    if not held_out.count:
        raise ValueError(
            f"--data {texts.name} has no validation document: of {report.documents} documents, a hash takes one in "
            f"{VALIDATION_ONE_IN}; give more documents (blank lines separate them in .txt), or a file named validation*"
        )
    if not rows:
        raise ValueError(f"--data {texts.name} has {report.documents} training documents, which {packer.shortfall}")
    validation_rows = packer.write(folder / "validation.bin", held_out.texts(), max_rows=VALIDATION_ROWS)
    if not validation_rows:
        raise ValueError(f"--data {texts.name} has {held_out.count} validation documents, which {packer.shortfall}")
    report.close(f"{validation_rows} validation rows, {texts.duplicates} duplicates of validation documents left out")
    content = file_digest(folder / "train.bin") + file_digest(folder / "validation.bin")
    write_json(folder / "facts.json", {"fingerprint": cache_key(content, packer.identity)})


@dataclass(frozen=True)
class LocalRows:
    """The rows of a source that is tokenised as a whole."""

    path: Path
    packer: Packer
    num_shards: int = 1

    def open(self, shard: int) -> np.ndarray:
        assert shard == 0, f"local data is one shard, asked for {shard}"
        return self.packer.open(self.path)

    def request(self, shard: int) -> None:
        """Nothing to do: the rows are there before the corpus is."""
