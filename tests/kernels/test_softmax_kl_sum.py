"""softmax_kl_sum: sums of softmax_kl, with the gradient made in the forward pass."""

import math

import pytest
import torch

from kd_core.kernels.softmax_kl import softmax_kl_reference, softmax_kl_sum
from tests.kernels.test_softmax_kl import LABELS, LOGITS, impl, make  # noqa: F401  (impl is a fixture)

WEIGHTS = {"kd_weight": 0.7, "label_weight": 0.3}


def truth(student, teacher, labels, row_weight, kd_weight=0.7, label_weight=0.3, **options):
    student = student.detach().double().requires_grad_()
    kd, label = softmax_kl_reference(student, teacher, labels, **options)
    taken = row_weight != 0
    kd_sum, label_sum = ((row_weight.double() * value)[taken].sum() for value in (kd, label))
    loss = kd_weight * kd_sum + label_weight * label_sum
    (gradient,) = torch.autograd.grad(loss, student)
    return loss.detach(), kd_sum.detach(), label_sum.detach(), gradient


def run(student, *arguments, upstream=1.0, **options):
    student = student.detach().requires_grad_()
    loss, kd_sum, label_sum = softmax_kl_sum(student, *arguments, **options)
    assert not kd_sum.requires_grad and not label_sum.requires_grad
    (upstream * loss).backward()
    return loss.detach(), kd_sum, label_sum, student.grad


def assert_close(got, want, rtol: float = 3e-6) -> None:
    for value, expected in zip(got[:3], want[:3], strict=True):
        assert value.dtype == torch.float32 and value.shape == ()
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
    assert (got[3].double() - want[3]).norm() <= rtol * want[3].norm()


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.3, "per row"])
@pytest.mark.parametrize("upstream", [1.0, 0.5])
def test_equals_the_weighted_sum_of_rows(upstream, temperature, direction, impl) -> None:  # noqa: F811
    student, teacher, labels = make(4, 1003)
    tau = torch.linspace(0.7, 3.0, 4) if temperature == "per row" else temperature
    row_weight = torch.linspace(-1.0, 2.0, 4)
    row_weight[3] = 0.0
    teacher[3, 5] = -math.inf  # reverse: infinite, but of weight zero
    options = {"temperature": tau, "direction": direction}
    got = run(student, teacher, labels, row_weight_N=row_weight, upstream=upstream, impl=impl, **WEIGHTS, **options)
    want = truth(student, teacher, labels, row_weight, **options)
    assert_close(got, (*want[:3], upstream * want[3]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_row_of_weight_zero_takes_no_part(direction, bad, impl) -> None:  # noqa: F811
    """Whatever its logits: in no sum, and its gradient is zero; every second of a longer vector is as good a weight."""
    student, teacher, labels = make(6, 100)
    want = run(student[:5], teacher[:5], labels[:5], impl=impl, direction=direction, **WEIGHTS)
    student[5, 7], teacher[5, 8:10] = bad, bad
    row_weight = torch.tensor([1.0, 9.0] * 5 + [0.0, 9.0])[::2]
    got = run(student, teacher, labels, row_weight_N=row_weight, impl=impl, direction=direction, **WEIGHTS)
    assert (got[3][5] == 0).all()
    for value, expected in zip((*got[:3], got[3][:5]), want, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)


def test_a_term_of_weight_zero_takes_no_part(impl) -> None:  # noqa: F811
    student, teacher, labels = make(3, 100)
    student[0, 5] = -math.inf  # an infinite KL
    loss, kd_sum, label_sum, _ = run(student, teacher, labels, kd_weight=0.0, label_weight=2.0, impl=impl)
    assert kd_sum == math.inf and loss == 2 * label_sum


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_weights_and_beyond_the_columns(dtype, impl) -> None:  # noqa: F811
    student, teacher, labels = make(4, 1000)
    student, teacher, labels = student.to(dtype), teacher.to(dtype), labels.clamp(max=899)
    got = run(student, teacher, labels, valid_columns=900, impl=impl)
    want = truth(student, teacher, labels, torch.ones(4), 1.0, 0.0, valid_columns=900)
    # The interpreter truncates where hardware rounds: up to a whole unit in the last place.
    assert_close(got, want, 3e-6 if dtype == torch.float32 else torch.finfo(dtype).eps)
    assert (got[3][:, 900:] == 0).all()


def test_labels_alone(impl) -> None:  # noqa: F811
    student, _, labels = make(4, 1000)
    got = run(student, None, labels, label_weight=1.0, impl=impl)
    want = torch.nn.functional.cross_entropy(student.double(), labels, reduction="sum")
    torch.testing.assert_close(got[0].double(), want, rtol=1e-6, atol=0)
    assert got[1] == 0


def test_no_rows(impl) -> None:  # noqa: F811
    logits = torch.empty(0, 7)
    assert [x.tolist() for x in run(logits, logits, torch.empty(0, dtype=torch.int64), impl=impl)] == [
        0.0,
        0.0,
        0.0,
        [],
    ]


def test_nothing_is_made_without_gradients() -> None:
    student, teacher, labels = make(4, 1000)
    assert softmax_kl_sum(student.half(), teacher, labels)[0].grad_fn is None
    with torch.no_grad():
        assert softmax_kl_sum(student.half().requires_grad_(), teacher, labels)[0].grad_fn is None


def test_logits_may_change_after_the_forward_pass() -> None:
    """The gradient is there already: in-place uses of the logits, and freeing them, are the caller's again."""
    student, teacher, labels = make(4, 1000)
    want = truth(student, teacher, labels, torch.ones(4), **WEIGHTS)
    leaf = student.requires_grad_()
    logits = leaf * 1.0
    loss, *_ = softmax_kl_sum(logits, teacher, labels, **WEIGHTS)
    logits.data.zero_()
    teacher.zero_()
    loss.backward()
    assert (leaf.grad.double() - want[3]).norm() <= 3e-6 * want[3].norm()


def test_second_backward_and_second_derivative_are_refused() -> None:
    student, teacher, labels = make(3, 7)
    loss, *_ = softmax_kl_sum(student.requires_grad_(), teacher, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="for retain_graph=True use softmax_kl"):
        loss.backward()
    loss, *_ = softmax_kl_sum(student, teacher, labels)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        torch.autograd.grad(loss, student, create_graph=True)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((LOGITS.half().requires_grad_(), LOGITS), {}, "student_logits_NV is float16, whose gradient would underflow"),
        ((LOGITS, LOGITS), {"row_weight_N": torch.ones(2)}, r"row_weight_N must be float32 of shape \(3,\)"),
        ((LOGITS, LOGITS), {"row_weight_N": torch.ones(3).requires_grad_()}, "without a gradient"),
        ((LOGITS, LOGITS, LABELS[:2]), {}, r"labels_N must be int64 of shape \(3,\)"),
    ],
)
def test_errors_name_what_is_wrong(arguments, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        softmax_kl_sum(*arguments, **options)
