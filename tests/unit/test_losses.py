"""Losses beside the kernels' own, against formulas written out."""

import pytest
import torch

from kd_core.losses import divergences
from kd_core.losses.distillation import Divergence, distillation_sum
from kd_core.text.corpus import IGNORE_INDEX
from kd_core.text.masking import MicroBatch

B, T, V, PADDED = 3, 8, 11, 16


@pytest.fixture
def rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of student and teacher at all positions, and labels at some."""
    torch.manual_seed(0)
    student, teacher = torch.randn(B * T, PADDED), torch.randn(B * T, PADDED)
    labels = torch.full((B * T,), IGNORE_INDEX)
    labels[::4] = torch.randint(V, (B * T // 4,))
    return student, teacher, labels


def test_mse_is_the_mean_over_columns_of_supervised_rows(rows: tuple[torch.Tensor, ...]) -> None:
    student, teacher, labels = rows
    weight = (labels != IGNORE_INDEX).float()
    student.requires_grad_()
    loss, kd_sum, label_sum = distillation_sum(
        student, teacher, labels, divergence="mse", kd_weight=0.7, label_weight=0.3, row_weight_N=weight,
        temperature=2.0, valid_columns=V,
    )  # fmt: skip
    difference = student[::4, :V] - teacher[::4, :V]
    expected = torch.nn.functional.cross_entropy(student[:, :V], labels, ignore_index=IGNORE_INDEX, reduction="sum")
    torch.testing.assert_close(kd_sum, difference.square().sum() / V)
    torch.testing.assert_close(label_sum, expected)
    torch.testing.assert_close(loss, 0.7 * kd_sum + 0.3 * label_sum)
    (gradient,) = torch.autograd.grad(loss, student)
    (wanted,) = torch.autograd.grad(0.7 * difference.square().sum() / V + 0.3 * expected, student)
    torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon", "skew_kl", "total_variation"])
def test_each_divergence_is_that_of_its_name(divergence: Divergence, rows: tuple[torch.Tensor, ...]) -> None:
    student, teacher, labels = rows
    student.requires_grad_()
    options = {"jensen_shannon": {"beta": 0.2}, "skew_kl": {"alpha": 0.2}}.get(divergence, {})
    loss, kd_sum, _ = distillation_sum(
        student, teacher, labels, divergence=divergence, kd_weight=0.7, temperature=2.0, beta=0.2, valid_columns=V
    )
    row_N = getattr(divergences, divergence)(student[:, :V], teacher[:, :V], temperature=2.0, **options)
    torch.testing.assert_close(kd_sum, row_N.sum().detach())
    (gradient,), (wanted,) = (torch.autograd.grad(value, student) for value in (loss, 0.7 * row_N.sum()))
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)


def test_softmax_over_a_sequence_is_the_released_code(rows: tuple[torch.Tensor, ...]) -> None:
    """KLDivLoss(batchmean) of softmaxes along dimension 1 of [B, T, V], student and teacher swapped, times tau squared."""
    student, teacher, labels = rows
    weight = (labels != IGNORE_INDEX).float()
    student.requires_grad_()
    tau = 4.0
    loss, kd_sum, _ = distillation_sum(
        student, teacher, labels, divergence="reverse_kl", kd_weight=0.9, label_weight=0.1, row_weight_N=weight,
        temperature=tau, valid_columns=V, sequence_length=T,
    )  # fmt: skip
    log_q, log_p = (x[:, :V].view(B, T, V).div(tau).log_softmax(1) for x in (student, teacher))
    released = tau**2 * torch.nn.functional.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
    torch.testing.assert_close(kd_sum / weight.sum(), released)
    (gradient,) = torch.autograd.grad(loss / weight.sum(), student)
    labelled = torch.nn.functional.cross_entropy(student[:, :V], labels, ignore_index=IGNORE_INDEX)
    (wanted,) = torch.autograd.grad(0.9 * released + 0.1 * labelled, student)
    torch.testing.assert_close(gradient, wanted)


def test_all_positions_keep_their_labels() -> None:
    ids, keys = torch.arange(12).view(2, 6), torch.zeros(2, dtype=torch.int64)
    micro = MicroBatch(ids, torch.tensor([1, 4, 7]), torch.tensor([5, IGNORE_INDEX, 9]), keys, keys).at_all_positions()
    assert micro.positions.tolist() == list(range(12))
    assert {i: int(label) for i, label in enumerate(micro.labels) if label != IGNORE_INDEX} == {1: 5, 7: 9}
