"""Any divergence from hidden states and vocabulary heads, some rows at a time: the logits are never held whole.

What the kernel has goes to `linear_softmax_kl`; for the others the same walk is done here with autograd over the logits of a
chunk: gradients of hidden states, weight and bias are made in the forward pass, those of weight and bias summed in float32.

Shape letters: N rows, V vocabulary, D the student's width, E the teacher's, C rows of a chunk.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_core.kernels.linear_softmax_kl import CPU_CHUNK_BYTES, GPU_CHUNK_BYTES, Side, linear_softmax_kl
from kd_core.losses.distillation import Divergence, distillation_sum, kernel_form

CHUNKED_COPIES = 8  # of a chunk's float32 logits, that a divergence and its gradient hold at a time


def logits(side: Side, columns: int | None = None) -> Tensor:
    """[N, columns] in float32, with the side's logit scale and soft cap."""
    side = side if columns is None else side.first(columns)
    return _shaped(F.linear(side.hidden_ND, side.weight_VD, side.bias_V).float(), side.logit_scale, side.softcap)


def _shaped(raw: Tensor, logit_scale: float, softcap: float | None) -> Tensor:
    raw = raw * logit_scale
    return raw if softcap is None else softcap * torch.tanh(raw / softcap)


def chunk_rows(columns: int, copies: int, on_gpu: bool) -> int:
    """Rows whose float32 logits, held `copies` times, fit what a chunk may take."""
    return max(1, (GPU_CHUNK_BYTES if on_gpu else CPU_CHUNK_BYTES) // (4 * copies * columns))


def linear_distillation_sum(
    student: Side,
    teacher: Side | None,
    labels_N: Tensor,
    *,
    divergence: Divergence,
    kd_weight: float,
    label_weight: float,
    temperature: float,
    beta: float = 0.5,
    valid_columns: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`distillation_sum` of the logits of two heads, which are made and used a chunk of rows at a time.

    Args:
        teacher: without gradients; None for labels alone.

    Returns:
        loss, kd_sum, label_sum, as `softmax_kl_sum`.
    """
    columns = len(student.weight_VD) if valid_columns is None else valid_columns
    form = kernel_form(divergence, beta)
    if teacher is not None and form is None:
        method = dict(kd_weight=kd_weight, label_weight=label_weight, temperature=temperature)
        return _chunked_sum(student, teacher, labels_N, columns, method | {"divergence": divergence, "beta": beta})
    options, times = form or ({}, 1.0)
    theirs = teacher or Side(None, None, None, 1.0, None)  # type: ignore[arg-type]
    loss, kd_sum, label_sum = linear_softmax_kl(
        student.hidden_ND, student.weight_VD, theirs.hidden_ND, theirs.weight_VD, labels_N,
        student_bias_V=student.bias_V, student_logit_scale=student.logit_scale, student_softcap=student.softcap,
        teacher_bias_V=theirs.bias_V, teacher_logit_scale=theirs.logit_scale, teacher_softcap=theirs.softcap,
        kd_weight=kd_weight / times, label_weight=label_weight, temperature=temperature, valid_columns=columns, **options,
    )  # fmt: skip
    return loss, kd_sum / times, label_sum


@torch.compiler.disable  # which would unroll the chunks
def _chunked_sum(student: Side, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    loss, kd_sum, label_sum = _ChunkedSum.apply(*student, *rest)
    return loss, kd_sum.detach(), label_sum.detach()


class _ChunkedSum(torch.autograd.Function):
    """The sums, and their gradient in the student's hidden states, weight and bias, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        logit_scale: float,
        softcap: float | None,
        teacher: Side,
        labels_N: Tensor,
        columns: int,
        method: dict[str, Any],
    ) -> tuple[Tensor, ...]:
        sums = hidden_ND.new_zeros(3, dtype=torch.float32)
        hidden_grad = torch.zeros_like(hidden_ND)
        weight_grad = torch.zeros_like(weight_VD, dtype=torch.float32)
        bias_grad = None if bias_V is None else torch.zeros_like(bias_V, dtype=torch.float32)
        size = chunk_rows(columns, CHUNKED_COPIES, hidden_ND.is_cuda)
        for start in range(0, len(hidden_ND), size):
            index = slice(start, start + size)
            hidden = hidden_ND[index]
            side = Side(hidden, weight_VD, bias_V, 1.0, None).first(columns)
            raw = logits(side).requires_grad_()
            with torch.enable_grad():
                theirs = logits(teacher._replace(hidden_ND=teacher.hidden_ND[index]), columns)
                given = _shaped(raw, logit_scale, softcap), theirs, labels_N[index]
                loss, kd_sum, label_sum = distillation_sum(*given, **method)
                (grad,) = torch.autograd.grad(loss, raw)
            sums += torch.stack([loss.detach(), kd_sum, label_sum])
            narrow = grad.to(weight_VD.dtype)
            hidden_grad[index] = narrow @ side.weight_VD
            weight_grad[:columns] += narrow.t() @ hidden
            if bias_grad is not None:
                bias_grad[:columns] += grad.sum(0)
        ctx.save_for_backward(hidden_grad, weight_grad, bias_grad)
        ctx.dtypes = weight_VD.dtype, None if bias_V is None else bias_V.dtype
        return tuple(sums)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Any, ...]:
        hidden_grad, weight_grad, bias_grad = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        bias = None if bias_grad is None else (upstream * bias_grad).to(bias_dtype)
        return (
            (upstream * hidden_grad).to(hidden_grad.dtype),
            (upstream * weight_grad).to(weight_dtype),
            bias,
            *6 * [None],
        )


class LossHead(nn.Linear):
    """A vocabulary head that gives the logits, or, called with a teacher and labels, what `linear_distillation_sum` returns.

    As the losses are made in the forward pass of the module that owns the weight, ZeRO-3 gathers it for them, and awaits its
    gradient. A head that exists becomes one with `model.lm_head.__class__ = LossHead`.
    """

    def forward(
        self,
        input: Tensor,
        *teacher_and_labels: Any,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        **method: Any,
    ) -> Any:
        """[..., D] -> raw logits [..., V]; or [N, D], a `Side` or None, and labels [N]."""
        if not teacher_and_labels:
            return super().forward(input)
        student = Side(input, self.weight, self.bias, logit_scale, softcap)
        return linear_distillation_sum(student, *teacher_and_labels, **method)
