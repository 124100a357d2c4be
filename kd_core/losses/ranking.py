"""Losses on the order in which a teacher ranks classes.

Shape letters: N rows, V columns.
"""

import math

from torch import Tensor


def plackett_luce(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor, labels_N: Tensor, *, teacher_temperature: float = 1.0
) -> Tensor:
    """How unlikely the student finds the ranking "true class, then the others as the teacher orders them": float32 [N], nats.

    With pi that ranking and q = softmax(teacher / teacher_temperature), sum_k q(pi_k) (log sum_{j >= k} exp(s(pi_j)) - s(pi_k)): the
    likelihood of Plackett and Luce, each choice weighted by the teacher's confidence in it. Convex in the student's logits s, which
    no temperature divides, and unmoved by a constant added to them. All weight on the true class is cross-entropy, equal weights ListMLE.

    Args:
        student_logits_NV: finite; any float dtype, computed in float32. Gradients reach them only.
        teacher_logits_NV: may hold -inf, which is ranked last and weighs nothing. Equal ones rank by their column.
        labels_N: int64 classes; none is ignored.

    Source: "Choice-theoretic list-wise knowledge distillation" (PLD), 2025, arXiv 2506.12542.
    """
    teacher_NV = teacher_logits_NV.detach().float()
    first_NV = teacher_NV.scatter(1, labels_N[:, None], math.inf)
    order_NV = first_NV.argsort(dim=1, descending=True, stable=True)
    weights_NV = (teacher_NV / teacher_temperature).softmax(1).gather(1, order_NV)
    ranked_NV = student_logits_NV.float().gather(1, order_NV)
    left_NV = ranked_NV.flip(1).logcumsumexp(1).flip(1)  # of what has not been chosen yet
    return (weights_NV * (left_NV - ranked_NV)).sum(1)
