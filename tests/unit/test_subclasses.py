"""Subclasses: their shares add up to the class, they say nothing that logits say, and the rotation spreads the variance evenly."""

from typing import Any

import pytest
import torch

from kd_core.losses.divergences import forward_kl
from kd_core.losses.subclasses import Subclasses, known_targets

N, C, D, S = 400, 3, 12, 4


def rows(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embeddings of unequal variances, their labels, and a head."""
    generator = torch.Generator().manual_seed(seed)
    head = torch.randn(C, D, generator=generator)
    embeddings = torch.randn(N, D, generator=generator) * torch.linspace(0.2, 3, D) + 1
    return embeddings, torch.arange(N) % C, head


def fit(num_subclasses: int = S, seed: int = 1, **how: Any) -> Subclasses:
    return Subclasses.fit(*rows(), num_subclasses, seed=seed, **how)


@pytest.mark.parametrize("directions", ["pca", "random", "kmeans"])
def test_summed_over_subclasses_the_target_is_the_teacher(directions: Any) -> None:
    embeddings, _, head = rows(5)
    logits = embeddings @ head.T
    targets = fit(directions=directions).targets(logits, embeddings, temperature=2.0, beta=0.7)
    assert targets.shape == (N, C * S) and targets.dtype == torch.float32
    summed = targets.unflatten(1, (C, S)).exp().sum(-1)
    torch.testing.assert_close(summed, (logits / 2).softmax(1), rtol=1e-5, atol=1e-6)


def test_with_one_subclass_it_is_plain_distillation() -> None:
    embeddings, _, head = rows(5)
    logits = embeddings @ head.T
    student = torch.randn(N, C, generator=torch.Generator().manual_seed(3)).requires_grad_()
    fitted = fit(1)
    targets = fitted.targets(logits, embeddings, temperature=4.0, beta=0.5 * fitted.deviation)
    given, wanted = (forward_kl(student, target, temperature=4.0) for target in (4.0 * targets, logits))
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("directions", ["pca", "random", "kmeans"])
def test_directions_say_nothing_that_the_logits_say(directions: Any) -> None:
    _, _, head = rows()
    fitted = fit(directions=directions)
    assert torch.einsum("kd,csd->kcs", head, fitted.directions_CSD).abs().max() < 1e-4
    if directions != "kmeans":
        gram = fitted.directions_CSD @ fitted.directions_CSD.transpose(1, 2)
        torch.testing.assert_close(gram, torch.eye(S).expand(C, S, S), rtol=1e-4, atol=1e-5)


def test_the_principal_directions_hold_the_most_variance_and_the_rotation_spreads_it() -> None:
    """Against numpy's singular values of the centred projection; over rotations every subclass has the mean."""
    embeddings, labels, head = (one.double() for one in rows())
    null = torch.linalg.svd(head, full_matrices=True)[2][C:]
    inside = (embeddings @ null.T)[labels == 0]
    values = torch.linalg.svdvals(inside - inside.mean(0))[:S].square() / len(inside)
    variances = []
    for seed in range(60):
        fitted = fit(seed=seed)
        z_NS = fitted._scores(embeddings.float())[labels == 0, 0].double()
        assert z_NS.mean(0).abs().max() < 1e-4
        variances.append(z_NS.var(0, unbiased=False))
        assert float(variances[-1].sum()) == pytest.approx(float(values.sum()), rel=1e-4)
    spread = torch.stack(variances).mean(0)
    torch.testing.assert_close(spread, values.mean().expand(S), rtol=0.25, atol=0)
    assert values.max() > 2 * values.min(), "without the rotation they would differ"


def test_a_small_beta_gives_a_row_to_one_subclass_and_a_large_one_to_all_evenly() -> None:
    embeddings, _, head = rows(5)
    shares = [
        fit().targets(embeddings @ head.T, embeddings, temperature=1.0, beta=beta).unflatten(1, (C, S)).softmax(2)
        for beta in (1e-3, 1.0, 1e4)
    ]
    assert shares[0].amax(2).mean() > 0.99 > shares[1].amax(2).mean()
    torch.testing.assert_close(shares[2], torch.full_like(shares[2], 1 / S), rtol=1e-2, atol=0)


def test_clusters_take_each_row_to_its_nearest_centre() -> None:
    embeddings, labels, head = rows()
    fitted = fit(directions="kmeans")
    hard = fitted.targets(embeddings @ head.T, embeddings, temperature=1.0, beta=1e-4).unflatten(1, (C, S))
    null = torch.linalg.svd(head, full_matrices=True)[2][C:]
    inside, centres = embeddings @ null.T, fitted.directions_CSD @ null.T
    for number in range(C):
        own = inside[labels == number]
        moved = own - own.mean(0)
        nearest = torch.cdist(moved, centres[number]).argmin(1)
        assert torch.equal(hard[labels == number, number].argmax(1), nearest)


def test_the_deviation_is_that_within_the_own_class() -> None:
    embeddings, labels, _ = rows()
    fitted = fit()
    z_NS = fitted._scores(embeddings)[torch.arange(N), labels]
    assert fitted.deviation == pytest.approx(float(z_NS.var(1, unbiased=False).mean().sqrt()), rel=1e-5)


def test_a_state_comes_back_and_a_seed_decides() -> None:
    one, other, back = fit(seed=1), fit(seed=2), Subclasses()
    back.load_state_dict(one.state_dict())
    assert torch.equal(back.directions_CSD, one.directions_CSD) and back.deviation == one.deviation
    assert torch.equal(fit(seed=1).directions_CSD, one.directions_CSD)
    assert not torch.equal(other.directions_CSD, one.directions_CSD)


def test_more_subclasses_than_directions_or_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_subclasses must be in 1 to 9, got 10: 9 directions .* only 133 images"):
        fit(10)
    embeddings, labels, head = rows()
    with pytest.raises(ValueError, match="num_subclasses must be in 1 to 3, got 4"):
        Subclasses.fit(embeddings[:12], labels[:12], head, 4, seed=0)


def test_a_head_that_spans_everything_leaves_the_embeddings_as_they_are() -> None:
    embeddings, labels, _ = rows()
    head = torch.randn(C, 2, generator=torch.Generator().manual_seed(0))
    fitted = Subclasses.fit(embeddings[:, :2], labels, head, 2, seed=0)
    assert fitted.directions_CSD.shape == (C, 2, 2)


def test_an_oracle_knows_the_part_of_the_true_class_and_of_others_nothing() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    labels, parts = torch.tensor([0, 1]), torch.tensor([2, 0])
    given = known_targets(logits, labels, parts, S, temperature=1.0).exp().unflatten(1, (C, S))
    p = logits.softmax(1)
    torch.testing.assert_close(given.sum(-1), p)
    torch.testing.assert_close(given[0, 0], torch.tensor([0, 0, float(p[0, 0]), 0]), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(given[0, 2], (p[0, 2] / S).expand(S))
    torch.testing.assert_close(given[1, 1], torch.tensor([float(p[1, 1]), 0, 0, 0]), rtol=1e-5, atol=1e-9)
