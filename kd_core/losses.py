"""Losses in plain PyTorch that need no kernel of their own. Shape letters: N rows, V vocabulary."""

from collections.abc import Sequence

import torch
from torch import Tensor


def mean_teacher_logits(teacher_logits_NV: Sequence[Tensor], temperature: float) -> Tensor:
    """Logits of one teacher whose probabilities at `temperature` are the mean of the teachers' probabilities.

    `temperature * log(mean_i softmax(logits_i / temperature))`, so that any divergence at that temperature sees the
    ensemble of Hinton et al. 2015. One teacher is returned as it is.

    Args:
        teacher_logits_NV: float [N, V] each, without padded columns, any float dtype; computed in float32.
        temperature: tau > 0, dimensionless; the one the divergence will divide by.

    Returns:
        [N, V], float32 for several teachers.
    """
    if len(teacher_logits_NV) == 1:
        return teacher_logits_NV[0]
    log_sum_NV: Tensor | None = None
    for logits_NV in teacher_logits_NV:
        log_probs_NV = torch.log_softmax(logits_NV.float() / temperature, -1)
        log_sum_NV = log_probs_NV if log_sum_NV is None else torch.logaddexp(log_sum_NV, log_probs_NV)
    assert log_sum_NV is not None, "an ensemble needs at least one teacher"
    # The missing -log(n) is the same for every column: softmax removes it.
    return log_sum_NV.mul_(temperature)
