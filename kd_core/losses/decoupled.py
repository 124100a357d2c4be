"""The KL divergence taken apart: what the teacher says of the true class, and what of the others.

Shape letters: N rows, V columns. y is a row's class, p_T and p_S are the softmax of the logits over tau.
"""

import torch
from torch import Tensor

from kd_core.losses.divergences import forward_kl


def decoupled_kl(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor, labels_N: Tensor, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """The two parts of tau^2 KL(p_T || p_S), each tau^2 times a KL and float32 [N]: the whole is first + (1 - p_T(y)) second.

    The first compares (p(y), 1 - p(y)), the second the distributions over the classes but y, renormalised. Gradients reach
    the student only; equal logits give exactly zero.

    Args:
        labels_N: int64 classes; none is ignored.

    Source: Zhao et al. 2022, "Decoupled Knowledge Distillation", arXiv 2203.08679, equations 5 and 6: TCKD and NCKD.
    """
    of_class = torch.zeros_like(student_logits_NV, dtype=torch.bool).scatter_(1, labels_N[:, None], True)
    binary, others = [], []
    for logits_NV in (student_logits_NV, teacher_logits_NV):
        rest = logits_NV.float()[~of_class].view(len(labels_N), -1)
        # Two logits whose softmax at tau 1 is (p(y), 1 - p(y)) at tau.
        scaled = [logits_NV.float()[of_class] / temperature, (rest / temperature).logsumexp(1)]
        binary.append(torch.stack(scaled, 1))
        others.append(rest)
    return temperature**2 * forward_kl(*binary), forward_kl(*others, temperature=temperature)
