"""Optimizer steps from the rows of a corpus, whatever a model makes of a row.

    (seed, epoch) -> order of rows -> global batch -> this rank's share -> micro-batches

All of it is a pure function: the rows of a global batch follow from the seed and a position. So neither the number of ranks
nor the micro-batch size changes what a step learns from, and a resumed run needs its position only.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch

from kd_core.system.ahead import prefetch
from kd_core.system.ranks import rank, world_size
from kd_core.text.corpus import IGNORE_INDEX, Corpus
from kd_core.text.order import START, Position, row_order, sample_id, shard_order
from kd_core.training.loop import Run

C4_SHARDS_AHEAD = 2


@dataclass(frozen=True, eq=False)
class Step:
    """What one rank feeds to one optimizer step."""

    micro_batches: list[Any]
    rows: int  # supervised tokens of this rank
    position: Position  # after this step

    def pin_memory(self) -> "Step":
        return replace(self, micro_batches=[micro.pin_memory() for micro in self.micro_batches])


class RowBatches(ABC):
    """An iterator over optimizer steps: the next global batch, cut to this rank and into micro-batches.

    A global batch is the next `global_batch_size` rows of the epoch's order, running over the ends of shards and epochs. Rank
    r has its r-th contiguous share. So its content depends on seed and position, not on ranks or micro-batches.

    Args:
        corpus: of `prepare`.
        seed: of the order, >= 0.
        global_batch_size: G, rows a step over all ranks; a multiple of `micro_batch_size * world_size`.
        position: where to begin; a `Step.position` continues after that step.
        steps: how many steps will be taken; the iterator ends there, and no shard beyond is downloaded. None: no end.

    Raises:
        ValueError: an impossible batch split, or a corpus smaller than one batch; while iterating, a shard that cannot be had.
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
        corpus.check_batch(global_batch_size)
        self.position = position
        self._corpus, self._seed = corpus, seed
        self._global, self._micro, self._rank, self._world_size = global_batch_size, micro_batch_size, rank, world_size
        self._steps_left = steps
        self._order_of = functools.lru_cache(maxsize=2)(self._row_order)

    @abstractmethod
    def _micro_batches(self, rows_BT: np.ndarray, sample_ids_B: np.ndarray, epochs_B: np.ndarray) -> list[Any]:
        """The micro-batches, of `_micro` rows each, of this rank's rows: anything that has `labels`."""

    def __iter__(self) -> Self:
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
        micro_batches = self._micro_batches(tokens_BT, sample_id(shards_B, rows_B), epochs_G[mine])
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


def ahead(run: Run[Any], kind: type[RowBatches], corpus: Corpus, **settings: Any) -> Iterator[Step]:
    """The run's optimizer steps from where it stands, made ahead in a thread.

    Args:
        settings: what `kind` takes besides.

    Raises:
        ValueError: as `kind`.
    """
    cfg = run.cfg
    made = kind(
        corpus, seed=cfg.seed, global_batch_size=cfg.global_batch_size, micro_batch_size=cfg.micro_batch_size, rank=rank(),
        world_size=world_size(), position=Position(*(run.position or START)), steps=cfg.steps - run.first, **settings,
    )  # fmt: skip
    return prefetch(made, pin_memory=torch.cuda.is_available())


def validation_shares(
    corpus: Corpus, *, micro_batch_size: int, rank: int, world_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """This rank's share of the validation rows: their numbers, micro-batch by micro-batch, and which of them count.

    Ranks' shares are disjoint and complete, and every rank has the same number of batches of the same shapes, as sharded
    models need: a rank with a row too few repeats one, which does not count.
    """
    share = -(-len(corpus.validation) // world_size)
    numbers_B = np.arange(rank * share, (rank + 1) * share)
    for start in range(0, share, micro_batch_size):
        numbers = numbers_B[start : start + micro_batch_size]
        present = numbers < len(corpus.validation)
        yield np.where(present, numbers, 0), present
