"""Forward and reverse KL, the one stressed that corrects the student's confidence.

Shape letters: N rows, V columns.
"""

import torch
from torch import Tensor

from kd_core.losses.divergences import entropy, forward_kl, reverse_kl


def bd_kd(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor, *, temperature: float = 1.0, delta: float = 2.0
) -> Tensor:
    """tau^2 (w_T KL(p_T || p_S) + w_S KL(p_S || p_T)), float32 [N], nats; gradients reach the student only.

    w_T is delta in rows where the teacher is less sure than the student, else 1; w_S delta where the student is less sure, else 1.
    A student too sure is spread over what the teacher holds possible, one not sure enough is sharpened. How sure: the entropy at
    temperature 1. delta 1 is Jeffreys' divergence.

    Source: BD-KD (Amara et al. 2022), arXiv 2212.12965; the rule as in the implementation that ABKD (ICML 2025) compares with.
    """
    with torch.no_grad():
        surer_N = entropy(teacher_logits_NV) - entropy(student_logits_NV)
        teacher_N, student_N = 1 + (delta - 1) * (surer_N > 0), 1 + (delta - 1) * (surer_N < 0)
    pair = student_logits_NV, teacher_logits_NV
    return teacher_N * forward_kl(*pair, temperature=temperature) + student_N * reverse_kl(
        *pair, temperature=temperature
    )
