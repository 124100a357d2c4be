"""softmax_kl and softmax_kl_sum in torch.compile: one graph, the same numbers, refused what cannot be right."""

import pytest
import torch

from kd_core.kernels import softmax_kl as module
from kd_core.kernels.softmax_kl import softmax_kl, softmax_kl_sum
from tests.kernels.test_softmax_kl import make


def per_row(hidden, weight, teacher, labels):
    kd, label = softmax_kl(hidden @ weight, teacher, labels, temperature=2.0)
    return (0.7 * kd + 0.3 * label).sum() / 13


def summed(hidden, weight, teacher, labels):
    logits = hidden @ weight
    loss, kd_sum, label_sum = softmax_kl_sum(logits, teacher, labels, temperature=2.0, kd_weight=0.7, label_weight=0.3)
    return loss / 13 + 0 * (kd_sum + label_sum)


def sliding(hidden, weight, teacher, labels):
    mix = torch.linspace(0.1, 0.9, 13)
    kd, label = softmax_kl(hidden @ weight, teacher, labels, direction="js", beta=0.3, mix=mix)
    return (0.7 * kd + 0.3 * label).sum() / 13


@pytest.mark.parametrize("function", [per_row, summed, sliding])
def test_one_graph_with_the_same_loss_and_gradient(function) -> None:
    _, teacher, labels = make(13, 1000)
    torch.manual_seed(0)
    hidden, weight = torch.randn(13, 8), torch.randn(8, 1000)
    results = []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        for _ in range(2):  # the second call of the compiled one comes from its cache
            leaf = weight.clone().requires_grad_()
            loss = run(hidden, leaf, teacher, labels)
            loss.backward()
            results.append((loss.detach(), leaf.grad))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])


def test_operators_are_registered_correctly() -> None:
    student, teacher, labels = make(13, 1000)
    student.requires_grad_()
    arguments = (student, teacher, labels, None, None, None, 2.0, 2.0, 0.5, "js", 0.3, -100, 900, "torch")
    labels.clamp_(max=899)
    torch.library.opcheck(module._operator, arguments)
    # Without the check of traced outputs: the last one is for the backward pass alone, which works in place.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(module._sum_operator, (*arguments, None, 0.7, 0.3, True), test_utils=tests)
