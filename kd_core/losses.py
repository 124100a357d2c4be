"""Losses in plain PyTorch that need no kernel of their own. Shape letters: N rows, V vocabulary."""

import functools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Ensemble = Literal["probabilities", "logits"]


def mean_teacher_logits(
    teacher_logits_NV: Sequence[Tensor], temperature: float, ensemble: Ensemble = "probabilities"
) -> Tensor:
    """Logits of one teacher that stands for several; one teacher is returned as it is.

    `probabilities`: `temperature * log(mean_i softmax(logits_i / temperature))`, so that any divergence at that
    temperature sees the mean of their probabilities, the ensemble of Hinton et al. 2015. `logits`: the mean of their
    logits, a normalised geometric mean of the probabilities, as in the code that the authors of arXiv 2211.00683
    released.

    Args:
        teacher_logits_NV: float [N, V] each, without padded columns, any float dtype; computed in float32.
        temperature: tau > 0, dimensionless; the one the divergence will divide by.

    Returns:
        [N, V], float32 for several teachers.
    """
    if len(teacher_logits_NV) == 1:
        return teacher_logits_NV[0]
    if ensemble == "logits":
        return functools.reduce(torch.add, (logits_NV.float() for logits_NV in teacher_logits_NV)) / len(
            teacher_logits_NV
        )
    log_probs_NV = (torch.log_softmax(logits_NV.float() / temperature, -1) for logits_NV in teacher_logits_NV)
    # The missing -log(n) is the same for every column: softmax removes it.
    return functools.reduce(torch.logaddexp, log_probs_NV).mul_(temperature)
