"""Decoupled KL: its parts make the whole, are zero for equal models, and are the definition in float64."""

import pytest
import torch

from kd_core.losses.decoupled import decoupled_kl
from kd_core.losses.divergences import forward_kl

N, V = 7, 10
LABELS = torch.arange(N) % V


def logits(seed: int) -> torch.Tensor:
    return 3 * torch.randn(N, V, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_the_parts_make_the_whole(tau: float) -> None:
    student, teacher = logits(0), logits(1)
    of_class, of_others = decoupled_kl(student, teacher, LABELS, temperature=tau)
    p_class = (teacher / tau).softmax(-1)[torch.arange(N), LABELS]
    whole = forward_kl(student, teacher, temperature=tau)
    torch.testing.assert_close(of_class + (1 - p_class) * of_others, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_each_part_and_its_gradient_are_the_definition(tau: float) -> None:
    student, teacher = logits(2).requires_grad_(), logits(3)
    p_s, p_t = ((one.double() / tau).softmax(-1) for one in (student, teacher))
    rows = torch.arange(N)
    a, b = p_t[rows, LABELS], p_s[rows, LABELS]
    of_class = tau**2 * (a * (a / b).log() + (1 - a) * ((1 - a) / (1 - b)).log())
    others = torch.ones(N, V, dtype=torch.bool).scatter(1, LABELS[:, None], False)
    q_t, q_s = (p[others].view(N, V - 1) / p[others].view(N, V - 1).sum(1, keepdim=True) for p in (p_t, p_s))
    of_others = tau**2 * (q_t * (q_t / q_s).log()).sum(-1)
    for given, wanted in zip(
        decoupled_kl(student, teacher, LABELS, temperature=tau), (of_class, of_others), strict=True
    ):
        assert given.dtype == torch.float32
        torch.testing.assert_close(given.double(), wanted, rtol=1e-4, atol=1e-6)
        (ours,) = torch.autograd.grad(given.sum(), student, retain_graph=True)
        (theirs,) = torch.autograd.grad(wanted.sum(), student, retain_graph=True)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_equal_models_have_exactly_zero() -> None:
    for part in decoupled_kl(logits(4), logits(4), LABELS, temperature=2.0):
        assert (part == 0).all()
