"""Temperature KL and label cross-entropy from hidden states and vocabulary heads; the logits are never held.

    student = f_s(student_hidden @ student_weight^T + student_bias), the same for the teacher
    f(z) = softcap * tanh(logit_scale * z / softcap), without a soft cap logit_scale * z
    loss = kd_weight * kd_sum + label_weight * label_sum, as softmax_kl_sum has them of these logits

A chunk of rows at a time: logits of both sides by matmul, their losses and gradient by the passes of softmax_kl_sum, and from
that gradient by matmul the gradients of hidden states, weight and bias, all in the forward pass. What a call holds is a
chunk's logits and gradient, `CPU_CHUNK_BYTES` or `GPU_CHUNK_BYTES`, and the gradients themselves: nothing of size N x V.

Matrices of 16 bits are multiplied as they are and summed to float32 where the device offers that (CUDA). Elsewhere float32
copies of them are multiplied, so that equal models have equal logits.

Shape letters: N rows (supervised tokens), V vocabulary, D the student's width, E the teacher's, C rows of a chunk, M rows
that take part.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from kd_core.kernels import softmax_kl
from kd_core.kernels.softmax_kl_arguments import check_options, check_row_weight, plain_weights, readable
from kd_core.kernels.softmax_kl_torch import compute_dtype

# Of a chunk's logits and gradient together. The head's gradient is read and written once a chunk, which costs less the
# larger the chunks are.
CPU_CHUNK_BYTES = 64 << 20
GPU_CHUNK_BYTES = 2 << 30


# ---------------------------------------------------------------------------------------------------------------------
# Parts of a pass
# ---------------------------------------------------------------------------------------------------------------------


def _part(tensor: torch.Tensor | None, index: slice | torch.Tensor) -> torch.Tensor | None:
    return None if tensor is None else tensor[index]


class Side(NamedTuple):
    """The student or the teacher: hidden states, and the head that makes logits of them."""

    hidden_ND: torch.Tensor
    weight_VD: torch.Tensor
    bias_V: torch.Tensor | None
    logit_scale: float
    softcap: float | None

    def to(self, dtype: torch.dtype) -> "Side":
        return self._replace(hidden_ND=self.hidden_ND.to(dtype), weight_VD=self.weight_VD.to(dtype))

    def first(self, columns: int) -> "Side":
        """With the first columns of the logits alone."""
        return self._replace(weight_VD=self.weight_VD[:columns], bias_V=_part(self.bias_V, slice(columns)))


def _logits_dtype(hidden: torch.Tensor) -> torch.dtype:
    """What matmuls of such hidden states are summed to: float32 or wider where the device offers it."""
    summed = hidden.element_size() > 2 or (hidden.is_cuda and torch.version.hip is None)
    return compute_dtype(hidden) if summed else hidden.dtype


def _summable(side: Side) -> Side:
    """The side, or float32 copies where the device sums matmuls of its dtype to no more."""
    dtype = compute_dtype(side.hidden_ND)
    return side if _logits_dtype(side.hidden_ND) == dtype else side.to(dtype)


def _matmul_(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, alpha: float, beta: float = 0.0) -> None:
    """out = alpha * a @ b + beta * out, rounded to the dtype of `out` alone."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=beta, alpha=alpha, out=out)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)


def _logits(side: Side, hidden_CD: torch.Tensor, out: torch.Tensor) -> None:
    weight_DV = side.weight_VD.t()
    slope = side.logit_scale if side.softcap is None else side.logit_scale / side.softcap
    if side.bias_V is None:
        _matmul_(out, hidden_CD, weight_DV, alpha=slope)
    else:
        _matmul_(out.copy_(side.bias_V), hidden_CD, weight_DV, alpha=slope, beta=slope)
    if side.softcap is not None:
        out.tanh_().mul_(side.softcap)


def _rows_of_weight(
    row_weight_N: torch.Tensor | None, labels_N: torch.Tensor | None, with_teacher: bool, ignore_index: int
) -> torch.Tensor | None:
    """int64 [M], the rows that contribute; None where all do, or where looking would wait for a GPU."""
    taken_N = None if row_weight_N is None else row_weight_N != 0
    if labels_N is not None and not with_teacher:
        labelled_N = labels_N != ignore_index
        taken_N = labelled_N if taken_N is None else taken_N & labelled_N
    if taken_N is None or taken_N.device.type != "cpu" or bool(taken_N.all()):
        return None
    return taken_N.nonzero().squeeze(1)


def _chunks(num_rows: int, most: int, rows_M: torch.Tensor | None) -> Iterator[slice | torch.Tensor]:
    """Indices of chunks of at most `most` rows, all of one size but for the last, which may lack a few."""
    total = num_rows if rows_M is None else len(rows_M)
    size = math.ceil(total / max(1, math.ceil(total / most)))
    for start in range(0, total, max(1, size)):
        chunk = slice(start, min(start + size, total))
        yield chunk if rows_M is None else rows_M[chunk]


# ---------------------------------------------------------------------------------------------------------------------
# The pass, and autograd
# ---------------------------------------------------------------------------------------------------------------------


def _linear_softmax_kl(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    student_bias: torch.Tensor | None,
    student_logit_scale: float,
    student_softcap: float | None,
    teacher_hidden: torch.Tensor | None,
    teacher_weight: torch.Tensor | None,
    teacher_bias: torch.Tensor | None,
    teacher_logit_scale: float,
    teacher_softcap: float | None,
    labels: torch.Tensor | None,
    student_tau_N: torch.Tensor | None,
    teacher_tau_N: torch.Tensor | None,
    mix_N: torch.Tensor | None,
    student_tau: float,
    teacher_tau: float,
    mix: float,
    direction: str,
    beta: float,
    ignore_index: int,
    columns: int,
    impl: str,
    row_weight: torch.Tensor | None,
    kd_weight: float,
    label_weight: float,
    rows: torch.Tensor | None,
    chunk_rows: int | None,
    with_hidden: bool,
    with_weight: bool,
    with_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """loss, kd_sum, label_sum, and the gradients of hidden states, weight and bias, [0] where none is asked for."""
    dtype, device = compute_dtype(student_hidden), student_hidden.device
    zeros = lambda shape: torch.zeros(shape, dtype=dtype, device=device)
    hidden_grad = zeros(student_hidden.shape if with_hidden else 0)
    weight_grad = zeros(student_weight.shape if with_weight else 0)
    bias_grad = zeros(len(student_weight) if with_bias else 0)

    student = Side(student_hidden, student_weight, student_bias, student_logit_scale, student_softcap)
    student = _summable(student.first(columns))
    dtypes = [dtype]  # of a chunk's buffers: the student's logits, the teacher's, the gradient
    teacher = None
    if teacher_hidden is not None and teacher_weight is not None:
        teacher = Side(teacher_hidden, teacher_weight, teacher_bias, teacher_logit_scale, teacher_softcap)
        teacher = _summable(teacher.first(columns))
        dtypes.append(_logits_dtype(teacher.hidden_ND))
    if with_hidden or with_weight or with_bias:
        dtypes.append(student.hidden_ND.dtype)

    if rows is None:
        rows = _rows_of_weight(row_weight, labels, teacher is not None, ignore_index)
    if chunk_rows is None:
        budget = GPU_CHUNK_BYTES if student_hidden.is_cuda else CPU_CHUNK_BYTES
        chunk_rows = max(1, budget // (columns * sum(dtype.itemsize for dtype in dtypes)))
    kd_sum, label_sum, buffers = zeros(()), zeros(()), None
    for index in _chunks(len(student_hidden), chunk_rows, rows):
        weight_C = _part(row_weight, index)
        # A row of weight zero takes no part, whatever its hidden states: times a gradient of zero NaN is NaN.
        idle_C1 = None if weight_C is None else (weight_C == 0)[:, None]
        hidden, *teacher_hidden_C = (
            side.hidden_ND[index] if idle_C1 is None else side.hidden_ND[index].masked_fill(idle_C1, 0.0)
            for side in (student, teacher)
            if side is not None
        )
        if buffers is None:
            buffers = [torch.empty((len(hidden), columns), dtype=dtype, device=device) for dtype in dtypes]
        logits, *others = (buffer[: len(hidden)] for buffer in buffers)
        _logits(student, hidden, out=logits)
        teacher_logits = None
        if teacher is not None:
            teacher_logits, *others = others
            _logits(teacher, teacher_hidden_C[0], out=teacher_logits)
        grad = others[0] if others else None
        options = softmax_kl.make_options(
            logits, _part(student_tau_N, index), _part(teacher_tau_N, index), _part(mix_N, index), student_tau,
            teacher_tau, mix, direction, beta, ignore_index, columns,
        )  # fmt: skip
        weights = weight_C, kd_weight, label_weight
        given = logits, teacher_logits, _part(labels, index)
        _, kd, label = softmax_kl.weighted_sum(*given, options, impl, *weights, grad)
        kd_sum, label_sum = kd_sum + kd, label_sum + label
        if grad is None:
            continue
        if student.softcap is not None:
            grad.addcmul_(grad, logits.div_(student.softcap).square_(), value=-1.0)  # times 1 - tanh^2
        if with_hidden:
            part = torch.empty_like(hidden, dtype=dtype)
            _matmul_(part, grad, student.weight_VD, alpha=student.logit_scale)
            hidden_grad[index] = part
        if with_weight:
            _matmul_(weight_grad[:columns], grad.t(), hidden, alpha=student.logit_scale, beta=1.0)
        if with_bias:
            bias_grad[:columns].add_(grad.sum(0, dtype=dtype), alpha=student.logit_scale)
    loss = softmax_kl.weighted_loss(kd_weight, kd_sum, label_weight, label_sum)
    return loss, kd_sum, label_sum, hidden_grad, weight_grad, bias_grad


def _linear_softmax_kl_fake(
    student_hidden: torch.Tensor, student_weight: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, ...]:
    with_hidden, with_weight, with_bias = rest[-3:]
    shapes = (
        *((), (), ()),
        student_hidden.shape if with_hidden else (0,),
        student_weight.shape if with_weight else (0,),
        student_weight.shape[:1] if with_bias else (0,),
    )
    return tuple(student_hidden.new_empty(shape, dtype=compute_dtype(student_hidden)) for shape in shapes)


_BACKWARD = "linear_softmax_kl", "pass impl='reference'"


class _LinearSoftmaxKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[torch.Tensor, ...]:
        output = _linear_softmax_kl(*args)
        softmax_kl.save_sum(ctx, args, output)
        return output

    backward = staticmethod(softmax_kl.backward_sum(softmax_kl.scale_, *_BACKWARD))


_operator = torch.library.custom_op("kd_core::linear_softmax_kl", _linear_softmax_kl, mutates_args=())
_operator.register_fake(_linear_softmax_kl_fake)
_operator.register_autograd(
    softmax_kl.backward_sum(softmax_kl.scale_operator, *_BACKWARD), setup_context=softmax_kl.save_sum
)


# ---------------------------------------------------------------------------------------------------------------------
# Public function, and the head as a module
# ---------------------------------------------------------------------------------------------------------------------


def _check_side(name: str, side: Side) -> None:
    hidden, weight, bias = side.hidden_ND, side.weight_VD, side.bias_V
    if hidden.ndim != 2 or not hidden.is_floating_point():
        raise ValueError(
            f"{name}_hidden must be floating-point [N, width], got {hidden.dtype} of shape {tuple(hidden.shape)}; "
            "flatten batch and time first"
        )
    if weight.ndim != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"{name}_weight must be [V, {hidden.shape[1]}], as wide as {name}_hidden, got shape {tuple(weight.shape)}; "
            "a sharded weight has to be gathered first, see LinearSoftmaxKL"
        )
    if weight.dtype != hidden.dtype or weight.device != hidden.device:
        raise ValueError(
            f"{name}_weight is {weight.dtype} on {weight.device}, {name}_hidden {hidden.dtype} on {hidden.device}; "
            "convert one of them, or use torch.autocast"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.device != weight.device):
        raise ValueError(
            f"{name}_bias_V must be of shape ({len(weight)},) on {weight.device}, "
            f"got {tuple(bias.shape)} on {bias.device}; a sharded bias has to be gathered first"
        )
    if not math.isfinite(side.logit_scale) or side.logit_scale == 0:
        raise ValueError(f"{name}_logit_scale must be finite and not zero, got {side.logit_scale}")
    if side.softcap is not None and not 0 < side.softcap < math.inf:
        raise ValueError(f"{name}_softcap must be positive and finite, or None for no cap, got {side.softcap}")


def _check_teacher(teacher: Side, student: Side, columns: int) -> None:
    _check_side("teacher", teacher)
    num_rows, device = len(student.hidden_ND), student.hidden_ND.device
    if len(teacher.hidden_ND) != num_rows or teacher.hidden_ND.device != device:
        raise ValueError(
            f"teacher_hidden_NE must have the student's {num_rows} rows on {device}, "
            f"got {len(teacher.hidden_ND)} on {teacher.hidden_ND.device}"
        )
    if len(teacher.weight_VD) < columns:
        raise ValueError(
            f"teacher_weight_VE has {len(teacher.weight_VD)} rows, but {columns} columns take part; "
            f"pass valid_columns={len(teacher.weight_VD)} if the student's further columns are padding"
        )
    if any(tensor is not None and tensor.requires_grad for tensor in teacher[:3]):
        raise ValueError(
            "the teacher's hidden states, weight or bias require a gradient, but only the student is differentiated; "
            "freeze the teacher, or detach them"
        )


def _check_rows(rows_M: torch.Tensor | None, chunk_rows: int | None, num_rows: int, device: torch.device) -> None:
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
    if rows_M is not None and (rows_M.ndim != 1 or rows_M.dtype != torch.int64 or rows_M.device != device):
        raise ValueError(
            f"rows_M must be int64 [M] on {device}, got {rows_M.dtype} of shape {tuple(rows_M.shape)} on {rows_M.device}"
        )
    if rows_M is not None and readable(rows_M) and len(rows_M) > 0:
        times = torch.bincount(rows_M.clamp(0, num_rows), minlength=num_rows)
        if rows_M.min() < 0 or len(times) > num_rows or times.max() > 1:
            raise ValueError(f"rows_M must be different rows in [0, {num_rows}), got {rows_M.tolist()[:8]}...")


def _reference_logits(side: Side, columns: int) -> torch.Tensor:
    """[N, columns] in float32 or wider, differentiable any number of times."""
    side = side.first(columns)
    dtype = torch.promote_types(side.hidden_ND.dtype, torch.float32)
    logits = torch.nn.functional.linear(
        side.hidden_ND.to(dtype), side.weight_VD.to(dtype), None if side.bias_V is None else side.bias_V.to(dtype)
    )
    logits = side.logit_scale * logits
    return logits if side.softcap is None else side.softcap * torch.tanh(logits / side.softcap)


def linear_softmax_kl(
    student_hidden_ND: torch.Tensor,
    student_weight_VD: torch.Tensor,
    teacher_hidden_NE: torch.Tensor | None,
    teacher_weight_VE: torch.Tensor | None,
    labels_N: torch.Tensor | None = None,
    *,
    student_bias_V: torch.Tensor | None = None,
    teacher_bias_V: torch.Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    temperature: float | torch.Tensor = 1.0,
    teacher_temperature: float | torch.Tensor | None = None,
    kd_weight: float = 1.0,
    label_weight: float = 0.0,
    row_weight_N: torch.Tensor | None = None,
    rows_M: torch.Tensor | None = None,
    direction: str = "forward",
    beta: float | None = None,
    mix: float | torch.Tensor | None = None,
    ignore_index: int = -100,
    valid_columns: int | None = None,
    chunk_rows: int | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`softmax_kl_sum` of the logits of two heads, which are made and used a chunk of rows at a time.

    Differentiable in the student's hidden states, weight and bias, once (any number of times with impl="reference"). The
    gradients are made in the forward pass, in float32 over all chunks, and what needs none costs nothing. The backward
    pass multiplies them by the upstream gradient and rounds them to the dtype of their input.

    Args:
        student_hidden_ND: float [N, D]; not float16 where a gradient is asked for.
        student_weight_VD: [V, D], the head of the student as `nn.Linear` has it, in the dtype of its hidden states; under
            torch.autocast the dtypes may differ.
        teacher_hidden_NE, teacher_weight_VE: [N, E] and [at least the columns that take part, E]; without gradients; None
            both for labels alone.
        student_bias_V, teacher_bias_V: [as long as the weight], any float dtype.
        student_logit_scale, teacher_logit_scale: factors of the logits (Cohere's `logit_scale`).
        student_softcap, teacher_softcap: logits become softcap * tanh(logits / softcap) (Gemma's `final_logit_softcapping`).
        rows_M: int64 [M], distinct rows, which alone take part; default all. On a CPU rows of weight 0 are left out in any
            case, without a teacher ignored ones too. On a GPU finding them would make the host wait, so they cost as much as
            the others unless the caller, who may know them, leaves them out here.
        chunk_rows: rows of a chunk at most; default as many as fit `CPU_CHUNK_BYTES` or `GPU_CHUNK_BYTES`.

    The other arguments and what is returned are those of `softmax_kl_sum`.

    Raises:
        ValueError: as `softmax_kl_sum`, or an argument above does not fit its description.
    """
    if (teacher_hidden_NE is None) != (teacher_weight_VE is None):
        raise ValueError("teacher_hidden_NE and teacher_weight_VE must be given both, or be None both")
    student = Side(student_hidden_ND, student_weight_VD, student_bias_V, float(student_logit_scale), student_softcap)
    teacher = None
    if teacher_hidden_NE is not None and teacher_weight_VE is not None:
        scale = float(teacher_logit_scale)
        teacher = Side(teacher_hidden_NE, teacher_weight_VE, teacher_bias_V, scale, teacher_softcap)
    device = student_hidden_ND.device
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        student, teacher = student.to(dtype), teacher and teacher.to(dtype)
    _check_side("student", student)
    V, num_rows = len(student_weight_VD), len(student_hidden_ND)
    if valid_columns is not None and not 1 <= valid_columns <= V:
        raise ValueError(f"valid_columns must be in [1, {V}], the rows of student_weight_VD, got {valid_columns}")
    columns = V if valid_columns is None else valid_columns
    if teacher is not None:
        _check_teacher(teacher, student, columns)
    _check_rows(rows_M, chunk_rows, num_rows, device)
    check_row_weight(row_weight_N, student.hidden_ND)
    options = check_options(
        student.hidden_ND, teacher and teacher.hidden_ND, labels_N, temperature, teacher_temperature, direction,
        beta, mix, ignore_index, columns, impl,
    )  # fmt: skip
    if impl == "reference":
        if rows_M is not None:
            ones_N = torch.ones(num_rows, device=device) if row_weight_N is None else row_weight_N
            row_weight_N = torch.zeros_like(ones_N).index_copy(0, rows_M, ones_N[rows_M])
        if row_weight_N is not None:
            idle_N1 = (row_weight_N == 0)[:, None]
            student = student._replace(hidden_ND=student.hidden_ND.masked_fill(idle_N1, 0.0))
            teacher = teacher and teacher._replace(hidden_ND=teacher.hidden_ND.masked_fill(idle_N1, 0.0))
        return softmax_kl.softmax_kl_sum(
            _reference_logits(student, columns), teacher and _reference_logits(teacher, columns), labels_N,
            kd_weight=kd_weight, label_weight=label_weight, row_weight_N=row_weight_N, temperature=temperature,
            teacher_temperature=teacher_temperature, direction=direction, beta=beta, mix=mix, ignore_index=ignore_index, impl=impl,
        )  # fmt: skip
    wanted = [torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in student[:3]]
    if any(wanted) and student.hidden_ND.dtype == torch.float16:
        raise ValueError(
            "student_hidden_ND is float16, in which the gradient of the logits would underflow; use bfloat16"
        )
    function = _operator if torch.compiler.is_compiling() else _LinearSoftmaxKL.apply
    with torch.autocast(device.type, enabled=False):
        loss, kd_sum, label_sum, *_ = function(
            *student, *(teacher or (None, None, None, 1.0, None)), labels_N, *options,
            row_weight_N, *plain_weights(kd_weight, label_weight), rows_M, chunk_rows, *wanted,
        )  # fmt: skip
    return loss.float(), kd_sum.detach().float(), label_sum.detach().float()


class LinearSoftmaxKL(nn.Linear):
    """A vocabulary head that gives the logits, or, called with a teacher or labels, what `linear_softmax_kl` returns.

    As the losses are made in the forward pass of the module that owns the weight, ZeRO-3 gathers it for them, and awaits its
    gradient; tied embeddings stay tied. A head that exists becomes one with `model.lm_head.__class__ = LinearSoftmaxKL`. The
    teacher's weight and bias are the caller's to gather where they are sharded too (`deepspeed.zero.GatheredParameters`).
    """

    def forward(self, input: torch.Tensor, *teacher_and_labels: Any, **options: Any) -> Any:
        """Hidden states [..., D] -> logits [..., V]; or [N, D] and the arguments of `linear_softmax_kl` after the weight."""
        if not teacher_and_labels:
            return super().forward(input)
        return linear_softmax_kl(input, self.weight, *teacher_and_labels, student_bias_V=self.bias, **options)
