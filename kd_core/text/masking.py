"""Text for masked-language modelling: a source becomes packed rows of tokens once, and then batches for ever.

    source -> source -> tokens -> rows of [CLS] tokens [SEP], without padding -> cache (memory-mapped)
    (seed, epoch) -> order of rows -> global batch -> this rank's share -> masked micro-batches

Everything below the cache is a pure function: the rows of a global batch follow from the seed and a position, the masks of
a row from the seed, the epoch and the row. So neither the number of ranks nor the micro-batch size changes what a step
learns from, and a resumed run needs its position only.

Shapes: B sequences, T positions, N supervised positions (B times K a sequence), G sequences of a global batch.
"""

import functools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch

from kd_core.cli import check_flag
from kd_core.system.hashing import splitmix64 as _hash
from kd_core.text import c4, documents
from kd_core.text.packing import (
    VALIDATION_ROWS,
    HeldOut,
    Packer,
    Report,
    build_once,
    cache_key,
    cache_root,
    file_digest,
    say,
    write_json,
)
from kd_core.text.tokenizer import load_tokenizer, tokenizer_digest, train_wordpiece

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IGNORE_INDEX = -100
VALIDATION_MASK_SEED = 20221100683  # any constant: validation masks are the same for every run
MIN_SEQ_LEN, MAX_SEQ_LEN = 8, 65_536
C4_SHARDS_AHEAD = 2
TOKENIZER_TRAINING_CHARS = 100_000_000

# -------------------------------------------------------------------------------------------------------------- corpus


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
    validation: np.ndarray  # uint16 or uint32 [R, seq_len], 1 <= R <= VALIDATION_ROWS
    train: Rows

    @property
    def num_shards(self) -> int:
        return self.train.num_shards

    def rows(self, shard: int) -> np.ndarray:
        """A shard's training rows, memory-mapped uint16 or uint32 [rows, seq_len]; of c4, waits until it is tokenised.

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
        return _open_c4(load_tokenizer(tokenizer or c4.DEFAULT_TOKENIZER), seq_len, progress)
    texts = _open_source(source, progress)
    if tokenizer is None:
        loaded = _trained_tokenizer(texts, vocab_size, progress)
    else:
        loaded = load_tokenizer(tokenizer)
    packer = Packer.of(loaded, seq_len)
    folder = cache_root() / f"corpus-{cache_key(texts.key, tokenizer_digest(loaded), seq_len)}"
    build_once(folder, lambda new: _build_corpus(new, texts, packer, progress))
    facts = json.loads((folder / "facts.json").read_text())
    return Corpus(
        name=texts.name,
        fingerprint=facts["fingerprint"],
        tokenizer=loaded,
        seq_len=seq_len,
        validation=packer.open(folder / "validation.bin"),
        train=LocalRows(folder / "train.bin", packer),
    )


def _open_source(source: str | None, progress: bool) -> documents.Documents:
    if source is None or source == "embedded":
        folder = cache_root() / f"embedded-{cache_key(documents.embedded_key())}"
        build_once(folder, lambda new: _build_embedded(new, progress))
        return documents.local_documents(folder / "documents.jsonl", name="embedded")
    path = Path(source).expanduser()
    beside_a_folder = path.parent != Path(".") and path.parent.is_dir()
    if documents.HUB_NAME.fullmatch(source) and not (path.exists() or beside_a_folder or documents.file_kind(path)):
        return documents.hub_documents(source)
    return documents.local_documents(path)


def _open_c4(tokenizer: "PreTrainedTokenizerFast", seq_len: int, progress: bool) -> Corpus:
    """C4 with its validation rows made now, its training shards when they are asked for."""
    packer = Packer.of(tokenizer, seq_len)
    folder = cache_root() / f"c4-{packer.identity}"
    build_once(folder, lambda new: c4.build_validation(new, packer, progress))
    return Corpus(
        name="c4",
        fingerprint=cache_key("c4", packer.identity),
        tokenizer=tokenizer,
        seq_len=seq_len,
        validation=packer.open(folder / "validation.bin"),
        train=c4.Shards(folder, packer, progress),
    )


def _build_embedded(folder: Path, progress: bool) -> None:
    start = time.monotonic()
    count = documents.write_embedded(folder / "documents.jsonl")
    megabytes = (folder / "documents.jsonl").stat().st_size / 1e6
    if progress:
        say(f"collecting embedded text: {count} documents, {megabytes:.1f} MB, {time.monotonic() - start:.1f} s")


def _trained_tokenizer(texts: documents.Documents, vocab_size: int, progress: bool) -> "PreTrainedTokenizerFast":
    folder = cache_root() / f"tokenizer-{cache_key(texts.key, vocab_size)}"

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
        trained = train_wordpiece(sample, vocab_size)
        trained.save(str(new / "tokenizer.json"))
        if progress:
            size, seconds = trained.get_vocab_size(), time.monotonic() - start
            say(f"training a tokenizer on {texts.name}: {size} tokens, {chars / 1e6:.1f} M characters, {seconds:.1f} s")

    build_once(folder, build)
    return load_tokenizer(str(folder / "tokenizer.json"))


def _build_corpus(folder: Path, texts: documents.Documents, packer: "Packer", progress: bool) -> None:
    held_out = HeldOut(packer.seq_len)
    report = Report(f"tokenising {texts.name}", progress)
    rows = packer.write(folder / "train.bin", held_out.divert(texts), report=report)
    if not held_out.count:
        raise ValueError(
            f"--data {texts.name} has no validation document: of {report.documents} documents, a hash takes one in "
            f"{documents.VALIDATION_ONE_IN}; give more documents (blank lines separate them in .txt), or a file named validation*"
        )
    if not rows:
        raise ValueError(
            f"--data {texts.name} has {report.documents} training documents, which do not fill one sequence of "
            f"{packer.seq_len} tokens; give more text, or a smaller --seq-len"
        )
    validation_rows = packer.write(folder / "validation.bin", held_out.texts(), max_rows=VALIDATION_ROWS)
    if not validation_rows:
        raise ValueError(
            f"--data {texts.name} has {held_out.count} validation documents, which do not fill one sequence of "
            f"{packer.seq_len} tokens; give more text, or a smaller --seq-len"
        )
    report.close(f"{validation_rows} validation rows, {texts.duplicates} duplicates of validation documents left out")
    content = file_digest(folder / "train.bin") + file_digest(folder / "validation.bin")
    write_json(folder / "facts.json", {"fingerprint": cache_key(content, packer.identity)})


@dataclass(frozen=True)
class LocalRows:
    """The rows of a source that is tokenised as a whole."""

    path: Path
    packer: "Packer"
    num_shards: int = 1

    def open(self, shard: int) -> np.ndarray:
        assert shard == 0, f"local data is one shard, asked for {shard}"
        return self.packer.open(self.path)

    def request(self, shard: int) -> None:
        """Nothing to do: the rows are there before the corpus is."""


# ------------------------------------------------------------------------------------------------------------- masking


class MaskingVocabulary(NamedTuple):
    mask_id: int
    is_special: np.ndarray  # bool [V]
    ordinary_ids: np.ndarray  # int64 [V minus special tokens]


@functools.lru_cache(maxsize=4)
def masking_vocabulary(tokenizer: "PreTrainedTokenizerFast") -> MaskingVocabulary:
    ids = np.unique(np.fromiter(tokenizer.get_vocab().values(), dtype=np.int64))
    is_special = np.zeros(ids[-1] + 1, dtype=bool)
    is_special[tokenizer.all_special_ids] = True
    return MaskingVocabulary(int(tokenizer.mask_token_id), is_special, ids[~is_special[ids]])


def mask_tokens(
    rows_BT: np.ndarray,
    sample_ids_B: np.ndarray,
    *,
    seed: int,
    epoch: int | np.ndarray,
    fraction: float,
    tokenizer: "PreTrainedTokenizerFast",
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hides tokens for a model to predict; a pure function of (seed, epoch, sample id, position) for each position.

    In each row, the K = round(fraction * T) ordinary positions with the smallest hashes are supervised; of these 80 % become
    [MASK], 10 % a random ordinary token, 10 % stay. A row with fewer ordinary positions is filled up with positions
    whose label is `IGNORE_INDEX`, so that shapes never change.

    Args:
        rows_BT: token ids, any integer type.
        epoch: of all rows, or int [B].

    Returns:
        input_ids int64 [B, T]; positions int64 [N], indices into the B * T positions, ascending; labels int64 [N].

    Source: Devlin et al. 2018, section 3.1. There each position is drawn by itself; here their number in a row is fixed.
    """
    masked = _mask(rows_BT, sample_ids_B, seed=seed, epoch=epoch, fraction=fraction, tokenizer=tokenizer)
    input_ids_BT, columns_BK, labels_BK = masked
    return input_ids_BT, _flat_positions(columns_BK, rows_BT.shape[1]), labels_BK.reshape(-1)


def _mask(
    rows_BT: np.ndarray,
    sample_ids_B: np.ndarray,
    *,
    seed: int,
    epoch: int | np.ndarray,
    fraction: float,
    tokenizer: "PreTrainedTokenizerFast",
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    vocabulary = masking_vocabulary(tokenizer)
    T = rows_BT.shape[1]
    K = round(fraction * T)
    input_ids_BT = rows_BT.astype(np.int64)

    # The low 16 bits hold the position: hashes never tie, and the smallest ones bring their positions along.
    position_bits = np.uint64(0xFFFF)
    base_B = _hash(_hash(_hash(np.uint64(seed)) ^ np.asarray(epoch, np.uint64)) ^ sample_ids_B.astype(np.uint64))
    hashes_BT = _hash(base_B[:, None] + np.arange(T, dtype=np.uint64))
    order_BT = (hashes_BT & ~position_bits) | np.arange(T, dtype=np.uint64)
    order_BT |= np.where(vocabulary.is_special[rows_BT], ~position_bits, np.uint64(0))
    smallest_BK = np.partition(order_BT, K - 1, axis=1)[:, :K]
    columns_BK = np.sort((smallest_BK & position_bits).astype(np.int64), axis=1)

    originals_BK = np.take_along_axis(input_ids_BT, columns_BK, axis=1)
    supervised_BK = ~vocabulary.is_special[originals_BK]
    labels_BK = np.where(supervised_BK, originals_BK, IGNORE_INDEX)

    draws_BK = _hash(np.take_along_axis(hashes_BT, columns_BK, axis=1))
    tenth_BK = draws_BK % np.uint64(10)
    random_BK = vocabulary.ordinary_ids[
        ((draws_BK >> np.uint64(8)) % np.uint64(len(vocabulary.ordinary_ids))).astype(np.int64)
    ]
    hidden_BK = np.where(tenth_BK < 8, vocabulary.mask_id, np.where(tenth_BK == 8, random_BK, originals_BK))
    np.put_along_axis(input_ids_BT, columns_BK, np.where(supervised_BK, hidden_BK, originals_BK), axis=1)
    return input_ids_BT, columns_BK, labels_BK


def _flat_positions(columns_BK: np.ndarray, T: int) -> np.ndarray:
    return (columns_BK + T * np.arange(len(columns_BK))[:, None]).reshape(-1)


# ------------------------------------------------------------------------------------------------------------- batches


class Position(NamedTuple):
    """Where a run stands in its data: the next row is number `row` of the epoch's `shard`-th shard, in the orders below."""

    epoch: int
    shard: int
    row: int


START = Position(0, 0, 0)


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What one rank feeds to one forward."""

    input_ids: torch.Tensor  # int64 [B, T]
    positions: torch.Tensor  # int64 [N], indices into B * T, ascending
    labels: torch.Tensor  # int64 [N], IGNORE_INDEX where unsupervised
    sample_ids: torch.Tensor  # int64 [B], see `sample_id`
    epochs: torch.Tensor  # int64 [B], of the masks

    @property
    def inputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What a model takes."""
        return self.input_ids, self.positions

    @property
    def keys(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What says which rows these are, and how they are masked."""
        return self.sample_ids, self.epochs

    def at_all_positions(self) -> "MicroBatch":
        """The same with every position of its rows, in their order; the labels of those not supervised are ignored."""
        positions = torch.arange(self.input_ids.numel())
        labels = torch.full_like(positions, IGNORE_INDEX).scatter(0, self.positions, self.labels)
        return replace(self, positions=positions, labels=labels)

    def pin_memory(self) -> "MicroBatch":
        input_ids, positions, labels = (tensor.pin_memory() for tensor in (self.input_ids, self.positions, self.labels))
        return replace(self, input_ids=input_ids, positions=positions, labels=labels)

    def to(self, device: torch.device) -> "MicroBatch":
        """With what models take on `device`, copied while it computes if pinned; keys stay on the host."""
        moved = (tensor.to(device, non_blocking=True) for tensor in (self.input_ids, self.positions, self.labels))
        input_ids, positions, labels = moved
        return replace(self, input_ids=input_ids, positions=positions, labels=labels)


@dataclass(frozen=True, eq=False)
class Step:
    """What one rank feeds to one optimizer step."""

    micro_batches: list[MicroBatch]
    tokens: int  # supervised tokens of this rank
    position: Position  # after this step

    def pin_memory(self) -> "Step":
        return replace(self, micro_batches=[micro.pin_memory() for micro in self.micro_batches])


def shard_order(seed: int, epoch: int, num_shards: int) -> np.ndarray:
    """The order in which an epoch visits the shards: a permutation, int64 [num_shards]."""
    return np.random.default_rng([seed, epoch]).permutation(num_shards)


def row_order(seed: int, epoch: int, shard: int, num_rows: int) -> np.ndarray:
    """The order in which an epoch visits a shard's rows: a permutation, uint32 [num_rows]."""
    return np.random.default_rng([seed, epoch, shard]).permutation(np.arange(num_rows, dtype=np.uint32))


def sample_id(shard: np.ndarray, row: np.ndarray) -> np.ndarray:
    """One int64 for a row of a shard: the shard in the high half, the row in the low half."""
    return shard.astype(np.int64) << 32 | row.astype(np.int64)


class MaskedBatches:
    """An iterator over optimizer steps: the next global batch, cut to this rank and into micro-batches.

    A global batch is the next `global_batch_size` rows of the epoch's order, running over the ends of shards and epochs. Rank
    r has its r-th contiguous share. So its content depends on seed and position, not on ranks or micro-batches.

    Args:
        corpus: of `prepare`.
        seed: of order and masks, >= 0.
        global_batch_size: G, rows a step over all ranks; a multiple of `micro_batch_size * world_size`.
        mask_fraction: of the positions of a row, see `mask_tokens`.
        mask_seed: of the masks; None: `seed`.
        mask_patterns: epoch e has the masks of epoch e mod this; None: new masks in each epoch.
        position: where to begin; a `Step.position` continues after that step.
        steps: how many steps will be taken; the iterator ends there, and no shard beyond is downloaded. None: no end.

    Raises:
        ValueError: an impossible batch split or mask fraction, or a corpus smaller than one batch; while iterating, a shard
            that cannot be had.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        mask_fraction: float,
        mask_seed: int | None = None,
        mask_patterns: int | None = None,
        position: Position = START,
        steps: int | None = None,
    ) -> None:
        if global_batch_size < 1 or micro_batch_size < 1 or global_batch_size % (micro_batch_size * world_size):
            raise ValueError(
                f"--global-batch-size must be a multiple of --micro-batch-size times the number of ranks, got "
                f"{global_batch_size}, {micro_batch_size} and {world_size}"
            )
        if seed < 0:
            raise ValueError(f"--seed must be at least 0, got {seed}")
        _check_mask_fraction(mask_fraction, corpus.seq_len)
        corpus.check_batch(global_batch_size)
        self.position = position
        self._corpus, self._seed, self._mask_fraction = corpus, seed, mask_fraction
        self._mask_seed, self._mask_patterns = seed if mask_seed is None else mask_seed, mask_patterns
        self._global, self._micro, self._rank, self._world_size = global_batch_size, micro_batch_size, rank, world_size
        self._steps_left = steps
        self._order_of = functools.lru_cache(maxsize=2)(self._row_order)

    def __iter__(self) -> "MaskedBatches":
        return self

    def __next__(self) -> Step:
        if self._steps_left == 0:
            raise StopIteration
        epochs_G, shards_G, rows_G = self._take(self._global)
        if self._steps_left is not None:
            self._steps_left -= 1
        share = self._global // self._world_size
        mine = slice(self._rank * share, (self._rank + 1) * share)
        shards_B, rows_B = shards_G[mine], rows_G[mine]
        tokens_BT = np.empty((share, self._corpus.seq_len), self._corpus.validation.dtype)
        for shard in np.unique(shards_B):
            here = shards_B == shard
            tokens_BT[here] = self._corpus.rows(int(shard))[rows_B[here]]
        micro_batches = masked_micro_batches(
            tokens_BT,
            sample_id(shards_B, rows_B),
            micro_batch_size=self._micro,
            seed=self._mask_seed,
            epoch=epochs_G[mine] % self._mask_patterns if self._mask_patterns else epochs_G[mine],
            fraction=self._mask_fraction,
            tokenizer=self._corpus.tokenizer,
        )
        tokens = sum(int((micro.labels != IGNORE_INDEX).sum()) for micro in micro_batches)
        return Step(micro_batches, tokens, self.position)

    def _take(self, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Epoch, shard and row, int64 [count] each, of the next rows; moves the position behind them."""
        pieces = []
        epoch, index, start = self.position
        while count:
            shard = self._shard(epoch, index)
            order = self._order_of(epoch, index)
            rows = order[start : start + count]
            pieces.append(np.stack([np.full(len(rows), epoch), np.full(len(rows), shard), rows.astype(np.int64)]))
            count -= len(rows)
            start += len(rows)
            if start == len(order):
                epoch, index, start = (
                    (epoch, index + 1, 0) if index + 1 < self._corpus.num_shards else (epoch + 1, 0, 0)
                )
        self.position = Position(epoch, index, start)
        epochs, shards, numbers = np.concatenate(pieces, axis=1)
        return epochs, shards, numbers

    def _shard(self, epoch: int, index: int) -> int:
        return int(shard_order(self._seed, epoch, self._corpus.num_shards)[index])

    def _row_order(self, epoch: int, index: int) -> np.ndarray:
        """The order of the epoch's `index`-th shard; on the way, has the next shards made that the run will need."""
        shard = self._shard(epoch, index)
        num_rows = len(self._corpus.rows(shard))
        self._request_after(epoch, index, num_rows)
        return row_order(self._seed, epoch, shard, num_rows)

    def _request_after(self, epoch: int, index: int, num_rows: int) -> None:
        rows_left = None if self._steps_left is None else self._steps_left * self._global
        for ahead in range(1, C4_SHARDS_AHEAD + 1):
            # Shards are about equally long, so `ahead` shards, begun with this one, hold about this many rows.
            if rows_left is not None and rows_left <= ahead * num_rows:
                return
            later_epochs, later_index = divmod(index + ahead, self._corpus.num_shards)
            self._corpus.request(self._shard(epoch + later_epochs, later_index))


def masked_micro_batches(
    tokens_BT: np.ndarray,
    sample_ids_B: np.ndarray,
    *,
    micro_batch_size: int,
    seed: int,
    epoch: int | np.ndarray,
    fraction: float,
    tokenizer: "PreTrainedTokenizerFast",
) -> list[MicroBatch]:
    """Masks rows and cuts them into micro-batches of `micro_batch_size` rows; the last may have fewer."""
    input_ids_BT, columns_BK, labels_BK = _mask(
        tokens_BT, sample_ids_B, seed=seed, epoch=epoch, fraction=fraction, tokenizer=tokenizer
    )
    epochs_B = np.broadcast_to(np.int64(epoch), len(tokens_BT)).copy()
    cuts = [slice(start, start + micro_batch_size) for start in range(0, len(tokens_BT), micro_batch_size)]
    return [
        MicroBatch(
            input_ids=torch.from_numpy(input_ids_BT[cut]),
            positions=torch.from_numpy(_flat_positions(columns_BK[cut], tokens_BT.shape[1])),
            labels=torch.from_numpy(labels_BK[cut].reshape(-1)),
            sample_ids=torch.from_numpy(sample_ids_B[cut]),
            epochs=torch.from_numpy(epochs_B[cut]),
        )
        for cut in cuts
    ]


def validation_batches(
    corpus: Corpus, *, micro_batch_size: int, rank: int, world_size: int, mask_fraction: float = 0.15
) -> Iterator[MicroBatch]:
    """This rank's share of the validation rows, with masks that are the same for every run.

    Ranks' shares are disjoint and complete, and every rank has the same number of batches of the same shapes, as sharded
    models need: a rank with a row too few repeats one with all its labels `IGNORE_INDEX`. A sample id is the row.
    """
    _check_mask_fraction(mask_fraction, corpus.seq_len)
    share = -(-len(corpus.validation) // world_size)
    numbers_B = np.arange(rank * share, (rank + 1) * share)
    for start in range(0, share, micro_batch_size):
        numbers = numbers_B[start : start + micro_batch_size]
        present = numbers < len(corpus.validation)
        numbers = np.where(present, numbers, 0)
        (micro,) = masked_micro_batches(
            corpus.validation[numbers],
            numbers,
            micro_batch_size=micro_batch_size,
            seed=VALIDATION_MASK_SEED,
            epoch=0,
            fraction=mask_fraction,
            tokenizer=corpus.tokenizer,
        )
        micro.labels.view(len(numbers), -1)[torch.from_numpy(~present)] = IGNORE_INDEX
        yield micro


def check_flags(flags: Any) -> None:
    """Raises ValueError when what a recipe's or a cache's flags say of BERT's samples is impossible."""
    check_flag(flags, "seq_len", MIN_SEQ_LEN <= flags.seq_len <= 512, f"between {MIN_SEQ_LEN} and 512")
    _check_mask_fraction(flags.mask_fraction, flags.seq_len)


def _check_mask_fraction(mask_fraction: float, seq_len: int) -> None:
    if not (0 < mask_fraction < 1 and 1 <= round(mask_fraction * seq_len) <= seq_len - 2):
        raise ValueError(
            f"--mask-fraction must be in (0, 1) and select at least one of the {seq_len} positions, got {mask_fraction}"
        )
