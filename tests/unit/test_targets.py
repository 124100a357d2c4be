"""Targets: logits in units of their deviation; labels and a generation before, and the share of each; the mean of several teachers."""

import pytest
import torch
import torch.nn.functional as F

from kd_core.losses.divergences import forward_kl
from kd_core.losses.labels import label_loss
from kd_core.losses.targets import alpha_star, alpha_terms, mean_probabilities, standardise

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


# --- born again -------------------------------------------------------------------------------------------------------

LAM = 1.0


@pytest.fixture
def ridge() -> tuple[torch.Tensor, ...]:
    """Kernel ridge regression on a noisy sine, in float64: the kernel, what fits predict there and elsewhere, and the targets."""
    draw = torch.Generator().manual_seed(6)
    x, other = torch.rand(40, generator=draw).double().sort().values, torch.rand(200, generator=draw).double()
    y, y_other = ((6.28 * at).sin() + 0.4 * torch.randn(len(at), generator=draw).double() for at in (x, other))

    def kernel(a: torch.Tensor) -> torch.Tensor:
        return (-80 * (a[:, None] - x) ** 2).exp()

    weights = torch.linalg.inv(kernel(x) + LAM * torch.eye(40).double())
    return kernel(x), kernel(x) @ weights, kernel(other) @ weights, y, y_other


def test_generations_with_a_constant_alpha_end_as_ridge_with_lam_over_alpha_and_without_labels_at_zero(
    ridge: tuple[torch.Tensor, ...],
) -> None:
    kernel, smooth, _, y, _ = ridge

    def generations(alpha: float, count: int) -> torch.Tensor:
        fitted = smooth @ y
        for _ in range(count):
            fitted = smooth @ (alpha * y + (1 - alpha) * fitted)
        return fitted

    for alpha in (0.25, 0.6):
        limit = kernel @ torch.linalg.solve(kernel + LAM / alpha * torch.eye(40).double(), y)
        torch.testing.assert_close(generations(alpha, 400), limit, rtol=0, atol=1e-12)
    assert generations(0, 4000).abs().max() < 1e-3 * generations(0, 1).abs().max()
    assert torch.equal(generations(1, 5), smooth @ y)


def test_alpha_star_of_two_fits_is_the_best_of_a_grid_of_fits(ridge: tuple[torch.Tensor, ...]) -> None:
    _, smooth, predict, y, y_other = ridge
    previous = smooth @ y
    grid = torch.linspace(0, 1, 2001).double()
    fits = torch.stack([predict @ (alpha * y + (1 - alpha) * previous) for alpha in grid], 1)
    best = grid[(fits - y_other[:, None]).square().sum(0).argmin()]
    u, v = predict @ y, predict @ previous
    halves = sum(alpha_terms(u[part], v[part], y_other[part]) for part in (slice(90), slice(90, None)))
    assert 0.02 < best < 0.98
    assert alpha_star(halves) == pytest.approx(float(best), abs=3e-4)
    assert alpha_star(alpha_terms(u, v, 3 * u - 2 * v)) == 1 and alpha_star(alpha_terms(u, v, 3 * v - 2 * u)) == 0
    assert alpha_star(alpha_terms(u, u, y_other)) == 1


def test_two_squared_errors_have_the_gradient_of_one_to_the_mixed_target() -> None:
    """So a generation is a fit to alpha * truth + (1 - alpha) * previous."""
    student, previous = logits(7).requires_grad_(), logits(8).softmax(1)
    labels, alpha = torch.arange(N) % V, 0.3
    truth = F.one_hot(labels, V).float()
    own, other = (label_loss(student, target, kind="brier") for target in (labels, previous))
    p = student.double().softmax(1)
    torch.testing.assert_close(own.double(), (p - truth).square().sum(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        other.double(), V * F.mse_loss(p, previous.double(), reduction="none").mean(1), rtol=1e-5, atol=1e-6
    )
    (ours,) = torch.autograd.grad((alpha * own + (1 - alpha) * other).sum(), student)
    mixed = label_loss(student, alpha * truth + (1 - alpha) * previous, kind="brier")
    (theirs,) = torch.autograd.grad(mixed.sum(), student)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_the_mean_of_probabilities_is_that_of_the_softened_ones_and_no_mean_of_logits(tau: float) -> None:
    teachers = [logits(seed).requires_grad_() for seed in range(3)]
    given = mean_probabilities(teachers, temperature=tau)
    wanted = torch.stack([(one.double() / tau).softmax(1) for one in teachers]).mean(0)
    torch.testing.assert_close((given / tau).softmax(1).double(), wanted, rtol=1e-5, atol=1e-7)
    assert given.dtype == torch.float32 and not given.requires_grad
    of_logits = (sum(one.double() for one in teachers) / 3 / tau).softmax(1)  # type: ignore[union-attr]
    assert (of_logits - wanted).abs().max() > 0.01
    alone = mean_probabilities(teachers[:1], temperature=tau)
    torch.testing.assert_close((alone / tau).softmax(1), (teachers[0] / tau).softmax(1))


def test_one_drawn_teacher_has_in_expectation_the_gradient_of_the_mean() -> None:
    student, teachers = logits(7).requires_grad_(), [logits(seed) for seed in range(4)]

    def gradient(target: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(forward_kl(student, target, temperature=2.0).sum(), student)[0]

    drawn = torch.stack([gradient(one) for one in teachers]).mean(0)
    torch.testing.assert_close(drawn, gradient(mean_probabilities(teachers, temperature=2.0)), rtol=1e-4, atol=1e-6)
    geometric = torch.stack(teachers).mean(0)
    assert (drawn - gradient(geometric)).abs().max() > 0.01
