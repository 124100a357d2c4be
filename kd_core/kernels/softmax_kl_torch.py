"""softmax_kl in PyTorch, a few rows at a time: any device, any float dtype, no compiler.

Two passes over the logits, as in every implementation: `statistics` leaves seven numbers a row, `gradient` needs nothing
else. Only buffers of a few rows are stored besides. Computes in float32, in float64 for float64 logits.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

# Exponents are kept in units of log 2: PyTorch's vectorised exp2 was 4 times faster than exp on an AMD EPYC (torch 2.15).
LOG2_E = 1.0 / math.log(2.0)
LN_2 = math.log(2.0)

# A row maximum below this is that of a row of -inf.
MIN_MAX = -1e30

# Size of one of the two or three buffers of a chunk: on a CPU they stay in the cache, on a GPU a chunk fills the device.
CPU_CHUNK_BYTES = 1 << 20
GPU_CHUNK_BYTES = 1 << 26


class Options(NamedTuple):
    """Everything of a call but logits and labels; a temperature is a float, or float32 [N]."""

    student_tau: float | torch.Tensor
    teacher_tau: float | torch.Tensor
    reverse: bool
    ignore_index: int
    columns: int

    @property
    def one_exponential(self) -> bool:
        """Whether label and KD term need the same softmax of the student."""
        return isinstance(self.student_tau, float) and self.student_tau == 1.0


class Rows(NamedTuple):
    """What is known of each row after the first read, [N] each; undefined where a side takes no part.

    Sums are of exp2(u), with u = (logits - max) * log2(e) / tau for the student, v the same for the teacher.
    """

    student_max: torch.Tensor
    student_sum: torch.Tensor
    label_sum: torch.Tensor  # the student's sum at temperature 1
    teacher_max: torch.Tensor
    teacher_sum: torch.Tensor
    difference: torch.Tensor  # forward: mean of v - u under p; reverse: mean of u - v under q
    label_logit: torch.Tensor  # NaN for a label that is neither a column nor ignore_index

    def column(self) -> "Rows":
        """The same as [N, 1], to go with logits."""
        return Rows(*(row_N[:, None] for row_N in self))


def compute_dtype(logits: torch.Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _column(tau: float | torch.Tensor) -> float | torch.Tensor:
    return tau[:, None] if isinstance(tau, torch.Tensor) else tau


def _chunks(logits_NV: torch.Tensor) -> Iterator[slice]:
    """Slices of rows whose float32 copy fits the chunk size; at least one row each."""
    num_rows, num_columns = logits_NV.shape
    chunk_bytes = CPU_CHUNK_BYTES if logits_NV.device.type == "cpu" else GPU_CHUNK_BYTES
    size = max(1, chunk_bytes // (4 * num_columns))
    return (slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size))


def _buffers(logits_NV: torch.Tensor, count: int) -> list[torch.Tensor]:
    """`count` buffers in the dtype of the computation, each as large as the largest chunk."""
    first = next(_chunks(logits_NV), slice(0, 0))
    shape = first.stop, logits_NV.shape[1]
    return [logits_NV.new_empty(shape, dtype=compute_dtype(logits_NV)) for _ in range(count)]


def _exponents(
    logits: torch.Tensor, max_N1: torch.Tensor, tau: float | torch.Tensor, rows: slice, out: torch.Tensor
) -> torch.Tensor:
    """out = (logits - max) * log2(e) / tau, whatever the dtype of the logits, which are those of `rows` alone."""
    if isinstance(tau, torch.Tensor):
        return torch.sub(logits, max_N1[rows], out=out).mul_(LOG2_E / tau[rows])
    # One fused multiply-add. The shift is rounded once a row, alike for the row's elements and its sum, so it cancels.
    return torch.add(max_N1[rows] * (-LOG2_E / tau), logits, alpha=LOG2_E / tau, out=out)


def statistics(
    student_NV: torch.Tensor, teacher_NV: torch.Tensor | None, labels_N: torch.Tensor | None, options: Options
) -> Rows:
    """The first read of the logits, whose columns are all taken: maxima, sums and mean differences."""
    stats = Rows(*student_NV.new_zeros((7, student_NV.shape[0]), dtype=compute_dtype(student_NV)).unbind())
    if labels_N is not None:
        stats.label_logit.copy_(label_logits(student_NV, labels_N, options.ignore_index))
    if options.one_exponential:
        stats = stats._replace(label_sum=stats.student_sum)
    columns, student_tau, teacher_tau = stats.column(), _column(options.student_tau), _column(options.teacher_tau)
    buffers = _buffers(student_NV, 3)
    for rows in _chunks(student_NV):
        u, v, weight = (buffer[: rows.stop - rows.start] for buffer in buffers)
        student = student_NV[rows]
        # A finite maximum keeps the exponents of a row of -inf from being NaN: they are -inf and the sum is zero.
        columns.student_max[rows] = student.amax(dim=1, keepdim=True).to(u.dtype).clamp(min=MIN_MAX)
        if labels_N is not None and not options.one_exponential:
            _exponents(student, columns.student_max, 1.0, rows, out=weight).exp2_()
            torch.sum(weight, dim=1, keepdim=True, out=columns.label_sum[rows])
        _exponents(student, columns.student_max, student_tau, rows, out=u)
        if teacher_NV is None:
            torch.sum(u.exp2_(), dim=1, keepdim=True, out=columns.student_sum[rows])
            continue
        torch.exp2(u, out=weight)
        torch.sum(weight, dim=1, keepdim=True, out=columns.student_sum[rows])
        teacher = teacher_NV[rows]
        columns.teacher_max[rows] = teacher.amax(dim=1, keepdim=True).to(u.dtype).clamp(min=MIN_MAX)
        _exponents(teacher, columns.teacher_max, teacher_tau, rows, out=v)
        if options.reverse:
            u.sub_(v)
            torch.sum(v.exp2_(), dim=1, keepdim=True, out=columns.teacher_sum[rows])
        else:
            torch.sub(v, u, out=u)
            torch.exp2(v, out=weight)
            torch.sum(weight, dim=1, keepdim=True, out=columns.teacher_sum[rows])
        # nansum, because a column of weight zero adds zero also where its difference is infinite, or -inf minus -inf.
        # A NaN among the logits is in the sums too and is not lost.
        torch.nansum(u.mul_(weight), dim=1, keepdim=True, out=columns.difference[rows])
    if teacher_NV is not None:
        stats.difference.div_(stats.student_sum if options.reverse else stats.teacher_sum)
    return stats


def label_logits(student_NV: torch.Tensor, labels_N: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """[N]: the label's logit, zero where it is ignored, NaN where it is no column."""
    last = student_NV.shape[1] - 1
    logits_N = student_NV.gather(1, labels_N.clamp(0, last)[:, None])[:, 0].to(compute_dtype(student_NV))
    logits_N = logits_N.masked_fill((labels_N < 0) | (labels_N > last), math.nan)
    return logits_N.masked_fill(labels_N == ignore_index, 0.0)


def values(
    stats: Rows, labels_N: torch.Tensor | None, with_teacher: bool, options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """kd_N and label_N: tau_s * tau_t * KL, and the cross-entropy at temperature 1."""
    kd_N, label_N = torch.zeros_like(stats.student_sum), torch.zeros_like(stats.student_sum)
    if with_teacher:
        log_ratio_N = (stats.student_sum / stats.teacher_sum).log2()
        kl_N = LN_2 * (stats.difference + (-log_ratio_N if options.reverse else log_ratio_N))
        # Rounding may leave a value just below zero.
        kl_N = kl_N.clamp(min=0.0).masked_fill((stats.student_sum == 0) | (stats.teacher_sum == 0), 0.0)
        kd_N = options.student_tau * options.teacher_tau * kl_N
    if labels_N is not None:
        label_exponent_N = torch.empty_like(stats.label_sum)
        _exponents(stats.label_logit, stats.student_max, 1.0, slice(None), out=label_exponent_N)
        label_N = LN_2 * (stats.label_sum.log2() - label_exponent_N)
        label_N = label_N.masked_fill((labels_N == options.ignore_index) | (stats.label_sum == 0), 0.0)
    return kd_N, label_N


def gradient(
    student_NV: torch.Tensor,
    teacher_NV: torch.Tensor | None,
    labels_N: torch.Tensor | None,
    stats: Rows,
    options: Options,
    kd_upstream_N: torch.Tensor,
    label_upstream_N: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """The second read of the logits; fills `out`. Upstream gradients enter before the rounding to its dtype.

    A label beyond the columns counts as a label whose column lies elsewhere.
    """
    # Factors of exp2(u), of exp2(v), and of the student's exponentials at temperature 1.
    q_factor = p_factor = label_factor = torch.zeros_like(stats.student_sum)
    if teacher_NV is not None:
        empty_N = (stats.student_sum == 0) | (stats.teacher_sum == 0)
        kd_upstream_N = kd_upstream_N * options.teacher_tau
        q_factor = (kd_upstream_N / stats.student_sum).masked_fill(empty_N, 0.0)
        p_factor = (kd_upstream_N / stats.teacher_sum).masked_fill(empty_N, 0.0)
        q_factor.masked_fill_(stats.teacher_sum.isnan(), math.nan)  # reverse: nan_to_num_ below hides it
    if labels_N is not None:
        without_N = (labels_N == options.ignore_index) | (stats.label_sum == 0)
        label_factor = (label_upstream_N / stats.label_sum).masked_fill(without_N, 0.0)
        last = student_NV.shape[1] - 1
        onehot_N1 = -label_upstream_N.masked_fill(without_N | (labels_N < 0) | (labels_N > last), 0.0)[:, None]
        labels_N1 = labels_N.clamp(0, last)[:, None]
    # One multiplication serves both terms where both have the student's softmax as a summand.
    merged = options.one_exponential and (teacher_NV is None or not options.reverse)
    if merged:
        q_factor = q_factor + label_factor
    q_factor, p_factor, label_factor = q_factor[:, None], p_factor[:, None], label_factor[:, None]

    columns, student_tau, teacher_tau = stats.column(), _column(options.student_tau), _column(options.teacher_tau)
    buffers = _buffers(student_NV, 2)
    for rows in _chunks(student_NV):
        grad, other = (buffer[: rows.stop - rows.start] for buffer in buffers)
        if out.dtype == grad.dtype:
            grad = out[rows]
        student = student_NV[rows]
        _exponents(student, columns.student_max, student_tau, rows, out=grad)
        if teacher_NV is None:
            grad.exp2_().mul_(q_factor[rows])
        elif options.reverse:
            _exponents(teacher_NV[rows], columns.teacher_max, teacher_tau, rows, out=other)
            torch.sub(grad, other, out=other).sub_(columns.difference[rows])
            # Not finite where q is zero or the row's KL is infinite: no gradient from there.
            other.nan_to_num_(0.0, 0.0, 0.0).mul_(LN_2)
            grad.exp2_().mul_(q_factor[rows]).mul_(other)
        else:
            grad.exp2_().mul_(q_factor[rows])
            _exponents(teacher_NV[rows], columns.teacher_max, teacher_tau, rows, out=other).exp2_()
            grad.addcmul_(other, p_factor[rows], value=-1.0)
        if labels_N is not None:
            if not merged:
                _exponents(student, columns.student_max, 1.0, rows, out=other).exp2_()
                grad.addcmul_(other, label_factor[rows])
            grad.scatter_add_(1, labels_N1[rows], onehot_N1[rows])
        if grad.dtype != out.dtype:
            out[rows] = grad
    idle_N1 = ((kd_upstream_N == 0) & (label_upstream_N == 0))[:, None]
    if out.is_cuda or idle_N1.any():
        out.masked_fill_(idle_N1, 0.0)  # whatever their logits


def statistics_and_gradient(
    student_NV: torch.Tensor,
    teacher_NV: torch.Tensor | None,
    labels_N: torch.Tensor | None,
    options: Options,
    kd_upstream_N: torch.Tensor,
    label_upstream_N: torch.Tensor,
    out: torch.Tensor,
) -> Rows:
    """Both passes, for upstream gradients that are known before the first."""
    stats = statistics(student_NV, teacher_NV, labels_N, options)
    gradient(student_NV, teacher_NV, labels_N, stats, options, kd_upstream_N, label_upstream_N, out)
    return stats
