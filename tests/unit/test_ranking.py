"""Plackett-Luce: the definition in float64, its special cases, and what it is unmoved by."""

import math

import pytest
import torch
import torch.nn.functional as F

from kd_core.losses.ranking import plackett_luce

N, V = 6, 9
LABELS = torch.arange(N) % V


def logits(seed: int) -> torch.Tensor:
    return 3 * torch.randn(N, V, generator=torch.Generator().manual_seed(seed))


def definition(student: torch.Tensor, teacher: torch.Tensor, tau: float) -> torch.Tensor:
    """One class after the other, in float64."""
    rows = []
    for s, t, label in zip(student.double(), teacher.double(), LABELS.tolist(), strict=True):
        ranking = [label, *(c for c in sorted(range(V), key=lambda c: -t[c].item()) if c != label)]
        q = (t / tau).softmax(0)
        rows.append(sum(q[c] * (s[ranking[k:]].logsumexp(0) - s[c]) for k, c in enumerate(ranking)))
    return torch.stack(rows)


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_value_and_gradient_are_the_definition(tau: float) -> None:
    student, teacher = logits(0).requires_grad_(), logits(1).requires_grad_()
    given = plackett_luce(student, teacher, LABELS, teacher_temperature=tau)
    wanted = definition(student, teacher.detach(), tau)
    assert given.dtype == torch.float32
    torch.testing.assert_close(given.double(), wanted, rtol=1e-5, atol=1e-6)
    (ours,) = torch.autograd.grad(given.sum(), student)
    (theirs,) = torch.autograd.grad(wanted.sum(), student)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert teacher.grad is None


def test_a_teacher_sure_of_the_label_gives_cross_entropy_and_one_that_knows_nothing_list_mle() -> None:
    student = logits(2)
    sure = torch.full((N, V), -math.inf).scatter(1, LABELS[:, None], 0.0)
    torch.testing.assert_close(plackett_luce(student, sure, LABELS), F.cross_entropy(student, LABELS, reduction="none"))
    hot = plackett_luce(student, logits(3), LABELS, teacher_temperature=1e9)
    torch.testing.assert_close(hot.double() * V, definition(student, logits(3), 1e9) * V, rtol=1e-5, atol=1e-5)


def test_it_is_unmoved_by_a_constant_and_convex_between_two_points() -> None:
    one, other, teacher = logits(4), logits(5), logits(6)
    value = plackett_luce(one, teacher, LABELS)
    torch.testing.assert_close(plackett_luce(one + 7, teacher, LABELS), value, rtol=1e-5, atol=1e-5)
    middle = plackett_luce((one + other) / 2, teacher, LABELS)
    assert (middle < (value + plackett_luce(other, teacher, LABELS)) / 2).all()


def test_ties_and_impossible_classes_of_the_teacher_are_finite_and_repeatable() -> None:
    teacher = logits(7).round()
    teacher[:, 3] = -math.inf
    teacher[:, 4] = teacher[:, 5]
    student = logits(8).requires_grad_()
    value = plackett_luce(student, teacher, LABELS)
    torch.testing.assert_close(value.double(), definition(student, teacher, 1.0), rtol=1e-5, atol=1e-6)
    value.sum().backward()
    assert student.grad is not None and student.grad.isfinite().all()
