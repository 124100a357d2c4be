"""The learned ratio: the step ahead is the one that autograd takes, its gradient the finite difference, and the student gets none of it."""

import copy

import pytest
import torch
from torch import nn

from kd_core.losses.divergences import forward_kl
from kd_core.losses.geometry import TrilateralRatio, class_means, class_sums, look_ahead, mixed_gradient
from kd_core.losses.labels import label_loss
from kd_core.losses.targets import confused

N, M, C, D, TAU, LR = 12, 9, 5, 7, 3.0, 0.7


def parts(seed: int = 0) -> tuple[nn.Linear, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(D, C)
    embeddings, others = (torch.randn(rows, D, generator=generator) for rows in (N, M))
    teacher = 3 * torch.randn(N, C, generator=generator)
    labels, other_labels = (torch.randint(C, (rows,), generator=generator) for rows in (N, M))
    return head, embeddings, teacher, labels, others, other_labels


def ahead(alpha: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    head, embeddings, teacher, labels, others, other_labels = parts()
    gradient = mixed_gradient(alpha, head(embeddings), teacher, labels, temperature=TAU)
    return look_ahead(head, embeddings, gradient, others, other_labels, lr=LR)


def test_the_step_ahead_is_a_step_of_sgd_on_the_loss() -> None:
    torch.manual_seed(0)
    head, embeddings, teacher, labels, others, other_labels = parts()
    alpha = torch.rand(N, generator=torch.Generator().manual_seed(4))
    moved = copy.deepcopy(head)
    logits = moved(embeddings)
    kd, label = forward_kl(logits, teacher, temperature=TAU), label_loss(logits, labels)
    (alpha * kd + (1 - alpha) * label).mean().backward()
    torch.optim.SGD(moved.parameters(), lr=LR).step()
    wanted = label_loss(moved(others), other_labels)
    torch.testing.assert_close(ahead(alpha), wanted, rtol=1e-4, atol=1e-5)
    assert (wanted - label_loss(head(others), other_labels)).abs().max() > 0.01


def test_the_hyper_gradient_is_the_finite_difference_and_the_one_through_a_graph() -> None:
    alpha = torch.rand(N, generator=torch.Generator().manual_seed(4)).requires_grad_()
    (given,) = torch.autograd.grad(ahead(alpha).sum(), alpha)
    for row in range(N):
        step = torch.zeros(N).index_fill_(0, torch.tensor([row]), 0.05)
        with torch.no_grad():
            slope = (ahead(alpha + step).sum() - ahead(alpha - step).sum()) / 0.1
        assert float(given[row]) == pytest.approx(float(slope), rel=0.02, abs=2e-4)
    torch.manual_seed(0)
    head, embeddings, teacher, labels, others, other_labels = parts()
    logits = head(embeddings)
    p_t = (teacher / TAU).softmax(1)
    kd = TAU**2 * (p_t * (p_t.log() - (logits / TAU).log_softmax(1))).sum(1)
    loss = (alpha * kd + (1 - alpha) * label_loss(logits, labels)).mean()
    weight, bias = torch.autograd.grad(loss, [head.weight, head.bias], create_graph=True)
    later = nn.functional.linear(others, head.weight.detach() - LR * weight, head.bias.detach() - LR * bias)
    (wanted,) = torch.autograd.grad(label_loss(later, other_labels).sum(), alpha)
    torch.testing.assert_close(given, wanted, rtol=1e-3, atol=1e-5)


def test_only_the_ratios_weights_get_a_gradient() -> None:
    torch.manual_seed(1)
    ratio, head, embeddings, teacher, labels, others, other_labels = TrilateralRatio(C), *parts()
    for one in (embeddings, others, teacher):
        one.requires_grad_()
    student = head(embeddings)
    alpha = ratio(student, teacher, labels)
    assert alpha.shape == (N,) and alpha.dtype == torch.float32 and ((alpha > 0) & (alpha < 1)).all()
    gradient = mixed_gradient(alpha, student, teacher, labels, temperature=TAU)
    look_ahead(head, embeddings, gradient, others, other_labels, lr=LR).sum().backward()
    assert all(one.grad is None for one in (*head.parameters(), embeddings, others, teacher))
    assert all(one.grad is not None and one.grad.abs().sum() > 0 for one in ratio.parameters())


def test_the_state_is_vertices_and_squared_edges() -> None:
    ratio, seen = TrilateralRatio(2), []
    ratio.means_CC.copy_(torch.tensor([[0.9, 0.1], [0.3, 0.7]]))
    ratio.layers[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    ratio(
        torch.tensor([[0.0, 0.0]]),
        torch.tensor([[0.0, 0.0]]).log_softmax(1) + torch.tensor([0.8, 0.2]).log(),
        torch.tensor([1]),
    )
    s, t, g, b = (torch.tensor(one) for one in ([0.5, 0.5], [0.8, 0.2], [0.0, 1.0], [0.3, 0.7]))
    edges = [(b - s) ** 2, (g - s) ** 2, (t - s) ** 2, (t - g) ** 2, (b - g) ** 2]
    torch.testing.assert_close(seen[0], torch.cat([s, t, g, b, *edges])[None])


def test_a_teacher_wrong_on_a_class_gets_less_of_it() -> None:
    """The ratio learns from other rows that this class is better learned from labels: the point of the method."""
    torch.manual_seed(0)
    ratio = TrilateralRatio(3)
    adam = torch.optim.Adam(ratio.parameters(), lr=0.02)
    head = nn.Linear(6, 3)
    centres = 2 * torch.randn(3, 6)

    def drawn(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.randint(3, (count,))
        return centres[labels] + 0.7 * torch.randn(count, 6), labels

    for _ in range(150):
        (embeddings, labels), (others, other_labels) = drawn(64), drawn(64)
        right = 6.0 * nn.functional.one_hot(labels, 3)
        teacher = torch.where((labels == 0)[:, None], right.roll(1, 1), right)
        student = head(embeddings).detach()
        alpha = ratio(student, teacher, labels)
        gradient = mixed_gradient(alpha, student, teacher, labels, temperature=1.0)
        adam.zero_grad()
        look_ahead(head, embeddings, gradient, others, other_labels, lr=1.0).mean().backward()
        adam.step()
    of_class = alpha.detach()
    assert float(of_class[labels == 0].mean()) < 0.5 * float(of_class[labels != 0].mean())


def test_means_by_class_add_up_over_batches() -> None:
    logits = torch.randn(40, C, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % (C - 1)  # one class has no row
    sums = class_sums(logits[:13], labels[:13]) + class_sums(logits[13:], labels[13:])
    means = class_means(sums)
    for number in range(C - 1):
        torch.testing.assert_close(means[number], logits.softmax(1)[labels == number].mean(0))
    torch.testing.assert_close(means[C - 1], torch.full((C,), 1 / C))


def test_a_confused_teacher_takes_the_first_classes_for_the_next() -> None:
    logits = torch.eye(5)
    assert confused(logits, 3).argmax(1).tolist() == [1, 2, 0, 3, 4]
    assert confused(logits, 0) is logits
