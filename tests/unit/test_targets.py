"""Targets: logits in units of their deviation."""

import pytest
import torch
import torch.nn.functional as F

from kd_core.losses.divergences import forward_kl
from kd_core.losses.labels import label_loss
from kd_core.losses.targets import standardise

N, V = 6, 9


def logits(seed: int) -> torch.Tensor:
    return 3 * torch.randn(N, V, generator=torch.Generator().manual_seed(seed)) + 1


def test_the_loss_of_mix_kd_and_its_gradient_are_the_definition() -> None:
    """In float64, as the authors' code has it: torch.std in both terms, through which the gradient flows."""
    student, teacher = logits(0).requires_grad_(), logits(1)
    shares = torch.rand(N, V, generator=torch.Generator().manual_seed(2)).softmax(1)
    scaled = standardise(student)
    given = 0.1 * label_loss(scaled, shares) + 0.9 * forward_kl(scaled, standardise(teacher))
    s, t = student.double(), teacher.double()
    log_s = (s / s.std(1, keepdim=True)).log_softmax(1)
    p_t = (t / t.std(1, keepdim=True)).softmax(1)
    wanted = -0.1 * (shares * log_s).sum(1) + 0.9 * (p_t * (p_t.log() - log_s)).sum(1)
    torch.testing.assert_close(given.double(), wanted, rtol=1e-5, atol=1e-6)
    (ours,) = torch.autograd.grad(given.sum(), student)
    (theirs,) = torch.autograd.grad(wanted.sum(), student)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_neither_size_nor_place_of_the_logits_matters() -> None:
    student, teacher = logits(3).requires_grad_(), logits(4)
    value = forward_kl(standardise(student), standardise(teacher))
    torch.testing.assert_close(forward_kl(standardise(50 * student - 7), standardise(teacher)), value)
    torch.testing.assert_close(forward_kl(standardise(student), standardise(0.01 * teacher + 3)), value)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert (gradient * student).sum(1).abs().max() < 1e-5  # along the row itself nothing is to be gained


def test_a_row_without_deviation_is_left_as_it_is_in_value_and_gradient() -> None:
    equal = torch.full((2, 7), 0.1)  # whose mean in float32 is another number
    for row in (equal, torch.zeros(2, 7), torch.full((2, 1), 3.0), torch.tensor([[0.0, 1e-30]])):
        row = row.clone().requires_grad_()
        value = standardise(row)
        assert torch.equal(value, row)
        (gradient,) = torch.autograd.grad(F.cross_entropy(value, torch.zeros(len(row), dtype=torch.long)), row)
        assert gradient.isfinite().all() and gradient.abs().max() <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_computed_in_float32(dtype: torch.dtype) -> None:
    value = standardise(logits(5).to(dtype))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.std(1), torch.ones(N))
    most = standardise(F.one_hot(torch.tensor([0]), 10)).softmax(1).max()
    assert most == pytest.approx(0.7242, abs=1e-4)
