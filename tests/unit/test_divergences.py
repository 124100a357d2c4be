"""Divergences per row: the definitions in float64, zero for equal models, gradients, and what they are at the ends."""

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kd_core.losses import divergences as div

N, V = 6, 11


def probabilities(student: Tensor, teacher: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    return (student.double() / tau).softmax(-1), (teacher.double() / tau).softmax(-1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def of_js(p_s: Tensor, p_t: Tensor, beta: float) -> Tensor:
    m = beta * p_t + (1 - beta) * p_s
    return beta * kl(p_t, m) + (1 - beta) * kl(p_s, m)


# The function, its definition by probabilities, and whether tau^2 is inside.
CASES: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor, Tensor], Tensor], bool]] = {
    "forward_kl": (div.forward_kl, lambda s, t: kl(t, s), True),
    "reverse_kl": (div.reverse_kl, lambda s, t: kl(s, t), True),
    "jeffreys": (div.jeffreys, lambda s, t: kl(t, s) + kl(s, t), True),
    "jensen_shannon": (div.jensen_shannon, lambda s, t: of_js(s, t, 0.5), True),
    "jensen_shannon_01": (functools.partial(div.jensen_shannon, beta=0.1), lambda s, t: of_js(s, t, 0.1), True),
    "skew_kl": (functools.partial(div.skew_kl, alpha=0.1), lambda s, t: kl(t, 0.1 * t + 0.9 * s), True),
    "total_variation": (div.total_variation, lambda s, t: (s - t).abs().sum(-1) / 2, False),
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request: pytest.FixtureRequest) -> Any:
    return request.param


def logits(seed: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(N, V, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_each_is_its_definition_in_value_and_gradient(case: Any, tau: float) -> None:
    function, definition, squared = case
    student, teacher = logits(0).requires_grad_(), logits(1).requires_grad_()
    given = function(student, teacher, temperature=tau)
    wanted = definition(*probabilities(student, teacher.detach(), tau)) * (tau**2 if squared else 1)
    assert given.dtype == torch.float32 and given.shape == (N,)
    torch.testing.assert_close(given.double(), wanted, rtol=1e-5, atol=1e-6)
    weight = torch.rand(N)
    (ours,) = torch.autograd.grad((given * weight).sum(), student, retain_graph=True)
    (theirs,) = torch.autograd.grad((wanted * weight).sum(), student)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert torch.autograd.grad(given.sum(), teacher, allow_unused=True) == (None,), "the teacher has a gradient"


def test_equal_models_have_exactly_zero_and_no_gradient(case: Any) -> None:
    function, _, _ = case
    student = logits(2).requires_grad_()
    value = function(student, student.detach().clone(), temperature=2.0)
    assert (value == 0).all()
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert gradient.abs().max() < 1e-6


def test_far_models_are_finite_in_value_and_gradient(case: Any) -> None:
    function, _, _ = case
    student = logits(3, 300.0).requires_grad_()
    value = function(student, logits(4, 300.0))
    assert value.isfinite().all() and (value >= 0).all()
    assert torch.autograd.grad(value.sum(), student)[0].isfinite().all()


def test_bounds_and_symmetry() -> None:
    student, teacher = logits(5, 50.0), logits(6, 50.0)
    assert (div.jensen_shannon(student, teacher) <= math.log(2) + 1e-6).all()
    assert (div.total_variation(student, teacher) <= 1 + 1e-6).all()
    for function in (div.jeffreys, div.jensen_shannon, div.total_variation):
        torch.testing.assert_close(function(student, teacher), function(teacher, student))
    torch.testing.assert_close(div.entropy(torch.zeros(2, V)), torch.full((2,), math.log(V)))
    assert (div.entropy(logits(7), temperature=5.0) > div.entropy(logits(7))).all()


@pytest.mark.parametrize("share", [0.0, 1.0, 2.0])
def test_a_share_at_an_end_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"beta must be a number in \(0, 1\)"):
        div.jensen_shannon(logits(0), logits(1), beta=share)
    with pytest.raises(ValueError, match=r"alpha must be in \(0, 1\)"):
        div.skew_kl(logits(0), logits(1), alpha=share)
