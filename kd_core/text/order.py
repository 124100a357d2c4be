"""The order in which a run visits the rows of a corpus: pure functions of the seed and the position."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    pass


# ------------------------------------------------------------------------------------------------------------- batches


class Position(NamedTuple):
    """Where a run stands in its data: the next row is number `row` of the epoch's `shard`-th shard, in the orders below."""

    epoch: int
    shard: int
    row: int


START = Position(0, 0, 0)


def shard_order(seed: int, epoch: int, num_shards: int) -> np.ndarray:
    """The order in which an epoch visits the shards: a permutation, int64 [num_shards]."""
    return np.random.default_rng([seed, epoch]).permutation(num_shards)


def row_order(seed: int, epoch: int, shard: int, num_rows: int) -> np.ndarray:
    """The order in which an epoch visits a shard's rows: a permutation, uint32 [num_rows]."""
    return np.random.default_rng([seed, epoch, shard]).permutation(np.arange(num_rows, dtype=np.uint32))


def sample_id(shard: np.ndarray, row: np.ndarray) -> np.ndarray:
    """One int64 for a row of a shard: the shard in the high half, the row in the low half."""
    return shard.astype(np.int64) << 32 | row.astype(np.int64)
