"""Losses on labels, per row."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor


def label_loss(
    logits_BC: Tensor, targets: Tensor, *, kind: Literal["ce", "bce", "brier"] = "ce", smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy, the sum over classes of binary cross-entropies, or that of the squared errors of probabilities, per image.

    Args:
        logits_BC: any float dtype; computed in float32.
        targets: int64 [B] classes, or float [B, C] shares of classes, as MixUp and CutMix make them, or a teacher's probabilities.
        smoothing: share of the target that is spread evenly over all classes, in [0, 1).

    Returns:
        float32 [B], nats; of brier a number in [0, 2].

    Source: smoothing Szegedy et al. 2015, arXiv 1512.00567; bce as in Wightman et al. 2021, arXiv 2110.00476, summed over
    classes as in Composer; brier: Brier 1950, "Verification of forecasts expressed in terms of probability".
    """
    logits_BC = logits_BC.float()
    if kind == "ce":
        return F.cross_entropy(logits_BC, targets, reduction="none", label_smoothing=smoothing)
    if targets.ndim == 1:
        targets = F.one_hot(targets, logits_BC.shape[1])
    target_BC = targets * (1 - smoothing) + smoothing / logits_BC.shape[1]
    if kind == "brier":
        return (logits_BC.softmax(-1) - target_BC).square().sum(-1)
    return F.binary_cross_entropy_with_logits(logits_BC, target_BC, reduction="none").sum(-1)
