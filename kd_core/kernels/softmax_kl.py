"""Temperature KL between teacher and student, and label cross-entropy, per row from raw logits.

    p = softmax(teacher_logits / tau_t)    q = softmax(student_logits / tau_s)
    forward:  kd = tau_s * tau_t * sum_j p_j (log p_j - log q_j)     d kd / d student_logits = tau_t (q - p)
    reverse:  kd = tau_s * tau_t * sum_j q_j (log q_j - log p_j)     d kd / d student_logits = tau_t q (log(q / p) - KL)
    label = -log softmax(student_logits)[label]                      d label / d student_logits = softmax - onehot

The factor tau^2 keeps the size of the KD gradient independent of the temperature. Logits are read twice, once for the row
statistics and once for the gradient; nothing of size N x V is stored but the gradient itself.

Shape letters: N rows (supervised tokens or images), V classes or vocabulary; N1 is a column, one number a row.

Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531), section 2. We differ in
that the KL includes the teacher's entropy, so that equal models give zero.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

DIRECTIONS = ("forward", "reverse")
IMPLEMENTATIONS = ("auto", "torch", "reference")

# Exponents are kept in units of log 2: PyTorch's vectorised exp2 was 4 times faster than exp on an AMD EPYC (torch 2.15).
LOG2_E = 1.0 / math.log(2.0)
LN_2 = math.log(2.0)

# A row maximum below this is that of a row of -inf.
MIN_MAX = -1e30

# Size of one of the two or three buffers of a chunk: on a CPU they stay in the cache, on a GPU a chunk fills the device.
CPU_CHUNK_BYTES = 1 << 20
GPU_CHUNK_BYTES = 1 << 26


# ---------------------------------------------------------------------------------------------------------------------
# Reference: the definition, differentiated by autograd
# ---------------------------------------------------------------------------------------------------------------------


def softmax_kl_reference(
    student_logits_NV: torch.Tensor,
    teacher_logits_NV: torch.Tensor | None,
    labels_N: torch.Tensor | None = None,
    *,
    temperature: float | torch.Tensor = 1.0,
    teacher_temperature: float | torch.Tensor | None = None,
    direction: str = "forward",
    ignore_index: int = -100,
    valid_columns: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`softmax_kl` in plain PyTorch, computed and returned in `dtype`; arguments are not checked.

    In float64 it is the truth that every implementation is tested against.
    """
    columns = student_logits_NV.shape[1] if valid_columns is None else valid_columns
    if teacher_temperature is None:
        teacher_temperature = temperature
    student_tau, teacher_tau = (
        tau.to(dtype)[:, None] if isinstance(tau, torch.Tensor) else tau for tau in (temperature, teacher_temperature)
    )
    student = student_logits_NV[:, :columns].to(dtype)
    student_empty_N1 = (student == -math.inf).all(dim=1, keepdim=True)
    student = student.masked_fill(student_empty_N1, 0.0)
    kd_N = label_N = student.new_zeros(student.shape[0])

    if teacher_logits_NV is not None:
        teacher = teacher_logits_NV[:, :columns].to(dtype)
        teacher_empty_N1 = (teacher == -math.inf).all(dim=1, keepdim=True)
        log_p = torch.log_softmax(teacher.masked_fill(teacher_empty_N1, 0.0) / teacher_tau, dim=1)
        log_q = torch.log_softmax(student / student_tau, dim=1)
        if direction == "forward":
            p = log_p.exp()
            kl_NV = p * torch.where(p == 0, 0.0, log_p - log_q)
        else:
            # Where the teacher excludes what the student allows, the KL is infinite and has no derivative: zero by
            # convention.
            infinite_N1 = ((log_p == -math.inf) & (log_q.exp() > 0)).any(dim=1, keepdim=True)
            log_q = torch.where(infinite_N1, log_q.detach(), log_q)
            q = log_q.exp()
            kl_NV = q * torch.where(q == 0, 0.0, log_q - log_p)
        kl_N1 = kl_NV.sum(dim=1, keepdim=True)
        # Rounding may leave a value just below zero; this lifts the value and keeps the gradient.
        kl_N1 = torch.where(kl_N1 < 0, kl_N1 - kl_N1.detach(), kl_N1)
        kl_N1 = kl_N1.masked_fill(student_empty_N1 | teacher_empty_N1, 0.0)
        kd_N = (student_tau * teacher_tau * kl_N1).squeeze(1)

    if labels_N is not None:
        ignored_N = (labels_N == ignore_index) | student_empty_N1.squeeze(1)
        index_N1 = labels_N.masked_fill(ignored_N, 0)[:, None]
        label_N = -torch.log_softmax(student, dim=1).gather(1, index_N1).squeeze(1)
        label_N = label_N.masked_fill(ignored_N, 0.0)
    return kd_N, label_N


# ---------------------------------------------------------------------------------------------------------------------
# PyTorch, a few rows at a time
# ---------------------------------------------------------------------------------------------------------------------


class _Options(NamedTuple):
    """Everything of a call but the logits and labels. A temperature is a float, or float32 [N, 1]."""

    student_tau: float | torch.Tensor
    teacher_tau: float | torch.Tensor
    direction: str
    ignore_index: int
    columns: int

    @property
    def one_exponential(self) -> bool:
        """Whether label and KD term need the same softmax of the student."""
        return isinstance(self.student_tau, float) and self.student_tau == 1.0


class _Rows(NamedTuple):
    """What the gradient needs to know of each row, float32 [N, 1]; uninitialised where a side takes no part.

    Sums are of exp2(u), with u = (logits - max) * log2(e) / tau for the student, v the same for the teacher.
    """

    student_max: torch.Tensor
    student_sum: torch.Tensor
    label_sum: torch.Tensor  # the student's sum at temperature 1; the same tensor as student_sum where tau_s is 1
    teacher_max: torch.Tensor
    teacher_sum: torch.Tensor
    difference: torch.Tensor  # forward: mean of v - u under p; reverse: mean of u - v under q


def _chunks(logits_NV: torch.Tensor) -> Iterator[slice]:
    """Slices of rows whose float32 copy fits the chunk size; at least one row each."""
    num_rows, num_columns = logits_NV.shape
    chunk_bytes = CPU_CHUNK_BYTES if logits_NV.device.type == "cpu" else GPU_CHUNK_BYTES
    size = max(1, chunk_bytes // (4 * num_columns))
    return (slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size))


def _buffers(logits_NV: torch.Tensor, count: int) -> list[torch.Tensor]:
    """`count` float32 buffers, each as large as the largest chunk."""
    first = next(_chunks(logits_NV), slice(0, 0))
    return [logits_NV.new_empty((first.stop, logits_NV.shape[1]), dtype=torch.float32) for _ in range(count)]


def _exponents(
    logits: torch.Tensor, max_N1: torch.Tensor, tau: float | torch.Tensor, rows: slice, out: torch.Tensor
) -> torch.Tensor:
    """out = (logits - max) * log2(e) / tau, in float32 whatever the dtype of the logits, which are those of `rows` alone."""
    if isinstance(tau, torch.Tensor):
        return torch.sub(logits, max_N1[rows], out=out).mul_(LOG2_E / tau[rows])
    # One fused multiply-add. The shift is rounded once a row, alike for the row's elements and its sum, so it cancels.
    return torch.add(max_N1[rows] * (-LOG2_E / tau), logits, alpha=LOG2_E / tau, out=out)


def _row_statistics(
    student_NV: torch.Tensor, teacher_NV: torch.Tensor | None, with_labels: bool, options: _Options
) -> _Rows:
    """The first read of the logits: maxima, sums and mean differences."""
    stats = _Rows(*student_NV.new_empty((6, student_NV.shape[0], 1), dtype=torch.float32).unbind())
    if options.one_exponential:
        stats = stats._replace(label_sum=stats.student_sum)
    buffers = _buffers(student_NV, 3)
    for rows in _chunks(student_NV):
        u, v, weight = (buffer[: rows.stop - rows.start] for buffer in buffers)
        student = student_NV[rows]
        # A finite maximum keeps the exponents of a row of -inf from being NaN: they are -inf and the sum is zero.
        stats.student_max[rows] = student.amax(dim=1, keepdim=True).float().clamp(min=MIN_MAX)
        if with_labels and not options.one_exponential:
            _exponents(student, stats.student_max, 1.0, rows, out=weight).exp2_()
            torch.sum(weight, dim=1, keepdim=True, out=stats.label_sum[rows])
        _exponents(student, stats.student_max, options.student_tau, rows, out=u)
        if teacher_NV is None:
            torch.sum(u.exp2_(), dim=1, keepdim=True, out=stats.student_sum[rows])
            continue
        torch.exp2(u, out=weight)
        torch.sum(weight, dim=1, keepdim=True, out=stats.student_sum[rows])
        teacher = teacher_NV[rows]
        stats.teacher_max[rows] = teacher.amax(dim=1, keepdim=True).float().clamp(min=MIN_MAX)
        _exponents(teacher, stats.teacher_max, options.teacher_tau, rows, out=v)
        if options.direction == "forward":
            torch.sub(v, u, out=u)
            torch.exp2(v, out=weight)
            torch.sum(weight, dim=1, keepdim=True, out=stats.teacher_sum[rows])
        else:
            u.sub_(v)
            torch.sum(v.exp2_(), dim=1, keepdim=True, out=stats.teacher_sum[rows])
        # nansum, because a column of weight zero adds zero also where its difference is infinite, or -inf minus -inf.
        # A NaN among the logits is in the sums too and is not lost.
        torch.nansum(u.mul_(weight), dim=1, keepdim=True, out=stats.difference[rows])
    if teacher_NV is not None:
        stats.difference.div_(stats.teacher_sum if options.direction == "forward" else stats.student_sum)
    return stats


def _kd_values(stats: _Rows, options: _Options) -> torch.Tensor:
    """tau_s * tau_t * KL, float32 [N, 1]."""
    log_ratio_N1 = (stats.student_sum / stats.teacher_sum).log2()
    kl_N1 = LN_2 * (stats.difference + (log_ratio_N1 if options.direction == "forward" else -log_ratio_N1))
    # Rounding may leave a value just below zero.
    kl_N1 = kl_N1.clamp(min=0.0).masked_fill((stats.student_sum == 0) | (stats.teacher_sum == 0), 0.0)
    return options.student_tau * options.teacher_tau * kl_N1


def _label_values(student_NV: torch.Tensor, labels_N1: torch.Tensor, stats: _Rows, options: _Options) -> torch.Tensor:
    """Cross-entropy at temperature 1, float32 [N, 1]."""
    ignored_N1 = labels_N1 == options.ignore_index
    label_logits_N1 = student_NV.gather(1, labels_N1.masked_fill(ignored_N1, 0))
    exponents_N1 = torch.empty_like(stats.label_sum)
    _exponents(label_logits_N1, stats.student_max, 1.0, slice(None), out=exponents_N1)
    values_N1 = LN_2 * (stats.label_sum.log2() - exponents_N1)
    return values_N1.masked_fill(ignored_N1 | (stats.label_sum == 0), 0.0)


def _student_gradient(
    student_NV: torch.Tensor,
    teacher_NV: torch.Tensor | None,
    labels_N1: torch.Tensor | None,
    stats: _Rows,
    options: _Options,
    kd_upstream_N1: torch.Tensor,
    label_upstream_N1: torch.Tensor,
    grad_NV: torch.Tensor,
) -> None:
    """The second read of the logits; fills grad_NV. Upstream gradients enter in float32, before the store."""
    # Factors of exp2(u), of exp2(v), and of the student's exponentials at temperature 1.
    q_factor = p_factor = label_factor = torch.zeros_like(kd_upstream_N1)
    if teacher_NV is not None:
        empty_N1 = (stats.student_sum == 0) | (stats.teacher_sum == 0)
        kd_upstream_N1 = kd_upstream_N1 * options.teacher_tau
        q_factor = (kd_upstream_N1 / stats.student_sum).masked_fill(empty_N1, 0.0)
        p_factor = (kd_upstream_N1 / stats.teacher_sum).masked_fill(empty_N1, 0.0)
        q_factor.masked_fill_(stats.teacher_sum.isnan(), math.nan)  # reverse: nan_to_num_ below hides it
    if labels_N1 is not None:
        ignored_N1 = labels_N1 == options.ignore_index
        labels_N1 = labels_N1.masked_fill(ignored_N1, 0)
        ignored_N1 = ignored_N1 | (stats.label_sum == 0)
        label_factor = (label_upstream_N1 / stats.label_sum).masked_fill(ignored_N1, 0.0)
        label_upstream_N1 = label_upstream_N1.masked_fill(ignored_N1, 0.0)
    # One multiplication serves both terms where both have the student's softmax as a summand.
    merged = options.one_exponential and (teacher_NV is None or options.direction == "forward")
    if merged:
        q_factor = q_factor + label_factor

    buffers = _buffers(student_NV, 2)
    for rows in _chunks(student_NV):
        grad, other = (buffer[: rows.stop - rows.start] for buffer in buffers)
        if grad_NV.dtype == torch.float32:
            grad = grad_NV[rows]
        student = student_NV[rows]
        _exponents(student, stats.student_max, options.student_tau, rows, out=grad)
        if teacher_NV is None:
            grad.exp2_().mul_(q_factor[rows])
        elif options.direction == "forward":
            grad.exp2_().mul_(q_factor[rows])
            _exponents(teacher_NV[rows], stats.teacher_max, options.teacher_tau, rows, out=other).exp2_()
            grad.addcmul_(other, p_factor[rows], value=-1.0)
        else:
            _exponents(teacher_NV[rows], stats.teacher_max, options.teacher_tau, rows, out=other)
            torch.sub(grad, other, out=other).sub_(stats.difference[rows])
            # Not finite where q is zero or the row's KL is infinite: no gradient from there.
            other.nan_to_num_(0.0, 0.0, 0.0).mul_(LN_2)
            grad.exp2_().mul_(q_factor[rows]).mul_(other)
        if labels_N1 is not None:
            if not merged:
                _exponents(student, stats.student_max, 1.0, rows, out=other).exp2_()
                grad.addcmul_(other, label_factor[rows])
            grad.scatter_add_(1, labels_N1[rows], -label_upstream_N1[rows])
        if grad_NV.dtype != torch.float32:
            grad_NV[rows] = grad


class _SoftmaxKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_logits_NV: torch.Tensor,
        teacher_logits_NV: torch.Tensor | None,
        labels_N: torch.Tensor | None,
        options: _Options,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        student_NV = student_logits_NV[:, : options.columns]
        teacher_NV = None if teacher_logits_NV is None else teacher_logits_NV[:, : options.columns]
        stats = _row_statistics(student_NV, teacher_NV, labels_N is not None, options)
        kd_N1 = torch.zeros_like(stats.student_sum) if teacher_NV is None else _kd_values(stats, options)
        if labels_N is None:
            label_N1 = torch.zeros_like(kd_N1)
        else:
            label_N1 = _label_values(student_NV, labels_N[:, None], stats, options)
        ctx.save_for_backward(student_logits_NV, teacher_logits_NV, labels_N, *stats)
        ctx.options = options
        return kd_N1.squeeze(1), label_N1.squeeze(1)

    @staticmethod
    def backward(ctx: Any, kd_upstream_N: torch.Tensor, label_upstream_N: torch.Tensor) -> tuple[Any, ...]:
        # torch.autograd.function.once_differentiable lets a second derivative pass as zero where the upstream gradient is
        # a constant, as that of a sum is.
        if torch.is_grad_enabled():
            raise RuntimeError("softmax_kl can be differentiated once; for create_graph=True pass impl='reference'")
        student_logits_NV, teacher_logits_NV, labels_N, *stats = ctx.saved_tensors
        columns = ctx.options.columns
        grad_NV = torch.empty(student_logits_NV.shape, dtype=student_logits_NV.dtype, device=student_logits_NV.device)
        grad_NV[:, columns:] = 0.0
        _student_gradient(
            student_logits_NV[:, :columns],
            None if teacher_logits_NV is None else teacher_logits_NV[:, :columns],
            None if labels_N is None else labels_N[:, None],
            _Rows(*stats),
            ctx.options,
            kd_upstream_N[:, None],
            label_upstream_N[:, None],
            grad_NV[:, :columns],
        )
        return grad_NV, None, None, None


# ---------------------------------------------------------------------------------------------------------------------
# Public function
# ---------------------------------------------------------------------------------------------------------------------


def _check_temperature(name: str, tau: float | torch.Tensor, num_rows: int) -> None:
    if not isinstance(tau, torch.Tensor):
        if not 0.0 < tau < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {tau}")
        return
    if tau.shape != (num_rows,) or tau.dtype != torch.float32:
        raise ValueError(
            f"{name} must be a float or a float32 tensor of shape ({num_rows},), one per row, "
            f"got {tau.dtype} of shape {tuple(tau.shape)}"
        )
    if tau.requires_grad:
        raise ValueError(f"{name} requires a gradient, but is not differentiated here; detach it")
    if tau.device.type == "cpu" and not ((tau > 0) & (tau < math.inf)).all():
        raise ValueError(f"{name} must be positive and finite in every row, got {tau.min()} to {tau.max()}")


def _check_logits(student: torch.Tensor, teacher: torch.Tensor | None, valid_columns: int | None) -> None:
    if student.ndim != 2 or not student.is_floating_point():
        raise ValueError(
            f"student_logits_NV must be floating-point [N, V], got {student.dtype} of shape {tuple(student.shape)}; "
            "flatten batch and time first"
        )
    if valid_columns is not None and not 1 <= valid_columns <= student.shape[1]:
        raise ValueError(
            f"valid_columns must be in [1, {student.shape[1]}], the student's columns, got {valid_columns}"
        )
    if student.shape[1] == 0:
        raise ValueError(f"student_logits_NV must have at least one column, got shape {tuple(student.shape)}")
    if teacher is None:
        return
    columns = student.shape[1] if valid_columns is None else valid_columns
    if teacher.ndim != 2 or not teacher.is_floating_point() or teacher.shape[0] != student.shape[0]:
        raise ValueError(
            f"teacher_logits_NV must be floating-point [N, V] with the student's N = {student.shape[0]} rows, "
            f"got {teacher.dtype} of shape {tuple(teacher.shape)}"
        )
    if teacher.shape[1] < columns:
        raise ValueError(
            f"teacher_logits_NV has {teacher.shape[1]} columns, but {columns} take part; "
            f"pass valid_columns={teacher.shape[1]} if the student's further columns are padding"
        )
    if teacher.device != student.device:
        raise ValueError(f"teacher_logits_NV is on {teacher.device}, the student's logits on {student.device}")
    if teacher.requires_grad:
        raise ValueError(
            "teacher_logits_NV requires a gradient, but only the student is differentiated; "
            "detach it, or run the teacher under torch.no_grad()"
        )


def _check_labels(labels: torch.Tensor, num_rows: int, columns: int, ignore_index: int) -> None:
    if labels.shape != (num_rows,) or labels.dtype != torch.int64:
        raise ValueError(
            f"labels_N must be int64 of shape ({num_rows},), one per row of logits, "
            f"got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    # On a GPU this would wait for the device; there the gather of the label's logit asserts.
    if labels.device.type == "cpu":
        wrong = labels[((labels < 0) | (labels >= columns)) & (labels != ignore_index)]
        if len(wrong) > 0:
            raise ValueError(
                f"labels_N must be in [0, {columns}) or ignore_index = {ignore_index}, "
                f"got {wrong[0].item()} and {len(wrong) - 1} more outside"
            )


def softmax_kl(
    student_logits_NV: torch.Tensor,
    teacher_logits_NV: torch.Tensor | None,
    labels_N: torch.Tensor | None = None,
    *,
    temperature: float | torch.Tensor = 1.0,
    teacher_temperature: float | torch.Tensor | None = None,
    direction: str = "forward",
    ignore_index: int = -100,
    valid_columns: int | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per row, tau_s * tau_t * KL(teacher || student) and the cross-entropy of the label at temperature 1.

    Differentiable in the student's logits, once (twice with impl="reference"). Weights, masks and the division by a token count are the caller's, on
    [N] vectors; their gradient is applied in float32. Memory beyond the gradient is a few floats a row and three chunks
    of rows.

    A term of probability zero is zero, also where both logits are -inf. A column that the teacher allows and the student
    excludes by -inf makes the value inf with a finite gradient (reverse: the roles are swapped and the row's gradient is
    zero). A row that is -inf throughout, on either side, has value and gradient zero. NaN stays NaN.

    Args:
        student_logits_NV: float [N, V], any float dtype, which is the gradient's too; rows may be strided.
        teacher_logits_NV: float [N, at least the columns that take part], any float dtype; None for labels alone.
        labels_N: int64 [N], in [0, V) or ignore_index; None for the KD term alone.
        temperature: tau > 0, dimensionless; divides both sides' logits. A float, or float32 [N].
        teacher_temperature: the teacher's own tau, where it differs.
        direction: "forward" for KL(teacher || student), "reverse" for KL(student || teacher).
        ignore_index: label of rows without a label term; they keep their KD term.
        valid_columns: columns from here on take part in nothing, on either side; default all of the student's.
        impl: "torch" (rows in chunks), "reference" (plain and slow, float32 or wider), or "auto" for the fastest there is.

    Returns:
        kd_N: float32 [N], nats, never negative, exactly zero for equal logits; zeros without a teacher.
        label_N: float32 [N], nats; zero where the label is ignore_index; zeros without labels.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value, the teacher's logits require a gradient, or
            there is neither a teacher nor labels. Values of labels and temperatures are checked on a CPU only.
    """
    num_rows = student_logits_NV.shape[0] if student_logits_NV.ndim else 0
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
    if teacher_logits_NV is None and labels_N is None:
        raise ValueError(
            "teacher_logits_NV and labels_N are both None, so there is nothing to compute; give one of them"
        )
    _check_logits(student_logits_NV, teacher_logits_NV, valid_columns)
    if teacher_temperature is None:
        teacher_temperature = temperature
    _check_temperature("temperature", temperature, num_rows)
    _check_temperature("teacher_temperature", teacher_temperature, num_rows)
    columns = student_logits_NV.shape[1] if valid_columns is None else valid_columns
    if labels_N is not None:
        _check_labels(labels_N, num_rows, columns, ignore_index)

    if impl == "reference":
        dtype = torch.promote_types(student_logits_NV.dtype, torch.float32)
        kd_N, label_N = softmax_kl_reference(
            student_logits_NV,
            teacher_logits_NV,
            labels_N,
            temperature=temperature,
            teacher_temperature=teacher_temperature,
            direction=direction,
            ignore_index=ignore_index,
            valid_columns=valid_columns,
            dtype=dtype,
        )
        return kd_N.float(), label_N.float()

    if teacher_logits_NV is None:
        temperature = teacher_temperature = 1.0  # the label term's: one exponential does
    student_tau, teacher_tau = (
        tau[:, None] if isinstance(tau, torch.Tensor) else float(tau) for tau in (temperature, teacher_temperature)
    )
    options = _Options(student_tau, teacher_tau, direction, ignore_index, columns)
    return _SoftmaxKL.apply(student_logits_NV, teacher_logits_NV, labels_N, options)
