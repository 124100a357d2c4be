"""Divergences from hidden states: the same as of the logits, in value and gradient, and no logits are held."""

import itertools
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F

from kd_core.kernels.linear_softmax_kl import Side
from kd_core.losses import linear
from kd_core.losses.distillation import Divergence, distillation_sum
from kd_core.losses.linear import LossHead, linear_distillation_sum
from tests.conftest import Largest

N, V, D, E, VALID = 24, 40, 8, 12, 37
METHOD: dict[str, Any] = {
    "kd_weight": 0.7,
    "label_weight": 0.3,
    "temperature": 2.0,
    "beta": 0.3,
    "valid_columns": VALID,
}
DIVERGENCES = get_args(Divergence)


def sides(dtype: torch.dtype = torch.float32, **shape: Any) -> tuple[Side, Side, torch.Tensor]:
    torch.manual_seed(0)
    made = [torch.randn(size, dtype=dtype) for size in ((N, D), (V, D), (V,), (N, E), (V + 8, E))]
    student = Side(*(tensor.requires_grad_() for tensor in made[:3]), shape.get("scale", 1.0), shape.get("cap"))
    return student, Side(*made[3:], None, shape.get("scale", 1.0), shape.get("cap")), torch.randint(VALID, (N,))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("shape", [{}, {"scale": 0.25, "cap": 3.0}], ids=["plain", "scaled and capped"])
def test_it_is_the_sum_of_the_logits(
    divergence: Divergence, shape: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks of few rows, with a padded vocabulary on both sides."""
    monkeypatch.setattr(linear, "CPU_CHUNK_BYTES", 4 * linear.CHUNKED_COPIES * VALID * 5)
    student, teacher, labels = sides(**shape)
    results = []
    for dense in (False, True):
        if dense:
            given = linear.logits(student), linear.logits(teacher), labels
            sums = distillation_sum(*given, divergence=divergence, **METHOD)
        else:
            sums = linear_distillation_sum(student, teacher, labels, divergence=divergence, **METHOD)
        gradients = torch.autograd.grad(sums[0] / N, student[:3])
        results.append([*sums, *gradients])
        assert not sums[1].requires_grad and not sums[2].requires_grad
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
    assert results[0][4][VALID:].abs().max() == 0, "a padded column has a gradient"


@pytest.mark.parametrize("divergence", ["forward_kl", "skew_kl"])
def test_no_rows_have_zero_gradients(divergence: Divergence) -> None:
    student, teacher, labels = sides()
    empty = [side._replace(hidden_ND=side.hidden_ND[:0]) for side in (student, teacher)]
    loss, *_ = linear_distillation_sum(*empty, labels[:0], divergence=divergence, **METHOD)
    assert loss.detach() == 0
    assert all(not gradient.any() for gradient in torch.autograd.grad(loss, student[:3]))


def test_labels_alone_are_cross_entropy() -> None:
    student, _, labels = sides()
    loss, kd_sum, label_sum = linear_distillation_sum(
        student, None, labels, divergence="skew_kl", **METHOD | {"label_weight": 1.0}
    )
    expected = F.cross_entropy(linear.logits(student, VALID), labels, reduction="sum")
    torch.testing.assert_close(torch.stack([loss, label_sum]), expected.expand(2))
    assert kd_sum == 0


@pytest.mark.parametrize("divergence", ["total_variation", "skew_kl"])
def test_the_logits_of_8192_tokens_are_never_held(divergence: Divergence, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's own: tests/kernels/test_linear_softmax_kl_memory.py."""
    monkeypatch.setattr(linear, "CPU_CHUNK_BYTES", 4 << 20)
    rows, columns = 8192, 512
    hidden, weight = torch.randn(rows, D, requires_grad=True), torch.randn(columns, D, requires_grad=True)
    teacher = Side(torch.randn(rows, E), torch.randn(columns, E), None, 1.0, None)
    with Largest() as largest:
        student = Side(hidden, weight, None, 1.0, None)
        loss, *_ = linear_distillation_sum(
            student,
            teacher,
            torch.randint(columns, (rows,)),
            divergence=divergence,
            **METHOD | {"valid_columns": columns},
        )
        loss.backward()
    assert largest.elements * 4 * linear.CHUNKED_COPIES <= 4 << 20


def test_the_head_gives_logits_or_losses() -> None:
    head = torch.nn.Linear(D, V)
    head.__class__ = LossHead
    _, teacher, labels = sides()
    hidden = torch.randn(N, D)
    given = dict(METHOD, divergence="jensen_shannon")
    loss, *_ = head(hidden, teacher, labels, logit_scale=0.5, softcap=4.0, **given)
    logits = 4.0 * torch.tanh(0.5 * head(hidden) / 4.0)
    torch.testing.assert_close(loss, distillation_sum(logits, linear.logits(teacher), labels, **given)[0])


@pytest.mark.parametrize(("tau", "reverse"), [*itertools.product((1.0, 2.0), (False, True))])
def test_kl_is_that_of_deepspeed_and_of_torch(tau: float, reverse: bool) -> None:
    """deepspeed.sequence.vocab_parallel_ops, and with probability targets F.linear_cross_entropy less the teacher's entropy."""
    from deepspeed.sequence.vocab_parallel_ops import vocab_parallel_kl_div

    student, teacher, labels = sides()
    direction: Divergence = "reverse_kl" if reverse else "forward_kl"
    method = METHOD | {"kd_weight": 1.0, "label_weight": 0.0, "temperature": tau}
    _, kd_sum, _ = linear_distillation_sum(student, teacher, labels, divergence=direction, **method)
    logits_s, logits_t = (linear.logits(side, VALID) / tau for side in (student, teacher))
    theirs = vocab_parallel_kl_div(logits_s, logits_t, reverse=reverse)
    torch.testing.assert_close(kd_sum, tau**2 * theirs.sum(), rtol=1e-5, atol=1e-5)
    if not reverse and hasattr(F, "linear_cross_entropy"):
        target = logits_t.softmax(-1)
        entropy = -(target * target.log()).sum()
        soft = F.linear_cross_entropy(  # tau divides the hidden states, and the bias with them
            torch.cat([student.hidden_ND, torch.ones(N, 1)], 1) / tau,
            torch.cat([student.weight_VD, student.bias_V[:, None]], 1)[:VALID],
            target,
            reduction="sum",
        )
        torch.testing.assert_close(kd_sum, tau**2 * (soft - entropy).detach(), rtol=1e-4, atol=1e-4)
