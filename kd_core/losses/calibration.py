"""Expected calibration error, from sums that add up over batches and ranks.

Source: Guo et al. 2017, arXiv 1706.04599, with 15 bins of equal width.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

BINS = 15


def calibration_sums(confidence_N: Tensor, hit_N: Tensor) -> Tensor:
    """float32 [2 * BINS]: by bin of the top probability, the sums of that probability, then those of the hits.

    Args:
        confidence_N: float32, the top probability; zero with `hit_N` for a row that does not count.
        hit_N: float32, 1 where the top column is the label's.
    """
    bin_N = (confidence_N * BINS).long().clamp(0, BINS - 1)  # of NaN: any; the sums stay NaN
    bins = torch.zeros(2, BINS, device=confidence_N.device)
    bins.index_add_(1, bin_N, torch.stack([confidence_N, hit_N]))
    return bins.flatten()


def calibration_error(sums: Sequence[float], rows: float) -> float:
    """In [0, 1], from summed `calibration_sums`."""
    return math.fsum(abs(confidence - hits) for confidence, hits in zip(sums[:BINS], sums[BINS:], strict=True)) / rows
