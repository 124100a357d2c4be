"""Batches for masked language modelling, from the rows of a corpus.

    (seed, epoch) -> order of rows -> global batch -> this rank's share -> masked micro-batches

All of it is a pure function: the rows of a global batch follow from the seed and a position, the masks of a row from the
seed, the epoch and the row. So neither the number of ranks nor the micro-batch size changes what a step learns from, and a
resumed run needs its position only.

Shapes: B sequences, T positions, N supervised positions (B times K a sequence), G sequences of a global batch.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from kd_core.system.ahead import prefetch
from kd_core.system.hashing import splitmix64 as _hash
from kd_core.system.ranks import rank, world_size
from kd_core.text.corpus import IGNORE_INDEX, Corpus
from kd_core.text.flags import check_mask_fraction
from kd_core.text.order import START, Position, row_order, sample_id, shard_order
from kd_core.training.loop import Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast
VALIDATION_MASK_SEED = 20221100683  # any constant: validation masks are the same for every run
C4_SHARDS_AHEAD = 2


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


def _mask(
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
        input_ids [B, T]; the supervised columns [B, K], ascending; their labels [B, K]; all int64.

    Source: Devlin et al. 2018, section 3.1. There each position is drawn by itself; here their number in a row is fixed.
    """
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
    rows: int  # supervised tokens of this rank
    position: Position  # after this step

    def pin_memory(self) -> "Step":
        return replace(self, micro_batches=[micro.pin_memory() for micro in self.micro_batches])


class MaskedBatches:
    """An iterator over optimizer steps: the next global batch, cut to this rank and into micro-batches.

    A global batch is the next `global_batch_size` rows of the epoch's order, running over the ends of shards and epochs. Rank
    r has its r-th contiguous share. So its content depends on seed and position, not on ranks or micro-batches.

    Args:
        corpus: of `prepare`.
        seed: of order and masks, >= 0.
        global_batch_size: G, rows a step over all ranks; a multiple of `micro_batch_size * world_size`.
        mask_fraction: of the positions of a row, see `_mask`.
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
        check_mask_fraction(mask_fraction, corpus.seq_len)
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
        rows = sum(int((micro.labels != IGNORE_INDEX).sum()) for micro in micro_batches)
        return Step(micro_batches, rows, self.position)

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


def batches(run: Run[Any], corpus: Corpus, **masks: int) -> Iterator[Step]:
    """The run's optimizer steps from where it stands, made ahead in a thread.

    Args:
        masks: `mask_seed` and `mask_patterns` of `MaskedBatches`, where caches have their own.

    Raises:
        ValueError: as `MaskedBatches`.
    """
    cfg = run.cfg
    made = MaskedBatches(
        corpus, seed=cfg.seed, global_batch_size=cfg.global_batch_size, micro_batch_size=cfg.micro_batch_size, rank=rank(),
        world_size=world_size(), mask_fraction=cfg.mask_fraction, position=Position(*(run.position or START)),
        steps=cfg.steps - run.first, **masks,
    )  # fmt: skip
    return prefetch(made, pin_memory=torch.cuda.is_available())


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
    check_mask_fraction(mask_fraction, corpus.seq_len)
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
