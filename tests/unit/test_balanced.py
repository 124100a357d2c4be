"""BD-KD: symmetric in its two networks, Jeffreys' divergence at delta 1, and the side that is stressed."""

import pytest
import torch

from kd_core.losses.balanced import bd_kd
from kd_core.losses.divergences import forward_kl, jeffreys, reverse_kl

N, V = 8, 11


def logits(seed: int, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(N, V, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_swapping_the_networks_leaves_the_sum(tau: float) -> None:
    one, other = logits(0), logits(1)
    there = bd_kd(one, other, temperature=tau, delta=3.0)
    torch.testing.assert_close(bd_kd(other, one, temperature=tau, delta=3.0), there, rtol=1e-5, atol=1e-5)


def test_at_delta_1_it_is_jeffreys_and_equal_networks_have_zero_and_no_gradient() -> None:
    student, teacher = logits(2).requires_grad_(), logits(3)
    torch.testing.assert_close(bd_kd(student, teacher, delta=1.0), jeffreys(student, teacher))
    same = bd_kd(student, student.detach().clone(), temperature=2.0)
    assert (same == 0).all()
    (gradient,) = torch.autograd.grad(same.sum(), student)
    assert gradient.abs().max() < 1e-7


@pytest.mark.parametrize(("scale", "stressed"), [(0.3, "reverse"), (9.0, "forward")])
def test_a_student_too_sure_is_spread_and_one_not_sure_enough_sharpened(scale: float, stressed: str) -> None:
    student, teacher = logits(4, scale).requires_grad_(), logits(5)
    forward, reverse = forward_kl(student, teacher, temperature=2.0), reverse_kl(student, teacher, temperature=2.0)
    wanted = forward + reverse + 1.5 * (reverse if stressed == "reverse" else forward)
    given = bd_kd(student, teacher, temperature=2.0, delta=2.5)
    torch.testing.assert_close(given, wanted)
    (ours,) = torch.autograd.grad(given.sum(), student, retain_graph=True)
    (theirs,) = torch.autograd.grad(wanted.sum(), student)
    torch.testing.assert_close(ours, theirs)
