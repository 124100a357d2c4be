"""softmax_kl in PyTorch, a few rows at a time: any device, any float dtype, no compiler.

Passes over the logits are those of every implementation: `statistics` leaves eight numbers a row, `gradient` needs nothing
else. Only buffers of a few rows are stored besides. Computes in float32, in float64 for float64 logits.

The Jensen-Shannon divergence needs both normalisers before it can compare anything, so its statistics go over a row twice,
`sums` and `mixture`, the second time while the row is in the cache. With p, q and m = beta p + (1 - beta) q of a column, and
c = 1 / (beta (1 - beta)),

    s = (p - q) / m        p / m = 1 + (1 - beta) s        q / m = 1 - beta s
    js = c (beta sum p log(p / m) + (1 - beta) sum q log(q / m))
       = sum p log1p((1 - beta) s) / (1 - beta) + sum q log1p(-beta s) / beta
    d js / d student_logits = q (log1p(-beta s) - sum q log1p(-beta s)) / (beta tau_s)

Equal logits have s = 0 and so exactly zero; a column that one side excludes has s = 1 / beta or -1 / (1 - beta), all finite;
and as log1p is small where s is, the divisions by beta and 1 - beta enlarge no rounding error.
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

# Below this no probability of a mixture counts: it keeps s finite where both sides exclude a column.
MIN_PROBABILITY = 1e-30

# Size of one of the buffers of a chunk: on a CPU they stay in the cache, on a GPU a chunk fills the device.
CPU_CHUNK_BYTES = 1 << 20
GPU_CHUNK_BYTES = 1 << 26


class Options(NamedTuple):
    """Everything of a call but logits and labels; a temperature or mix is a float, or floats [N]."""

    student_tau: float | torch.Tensor
    teacher_tau: float | torch.Tensor
    mix: float | torch.Tensor | None  # the teacher's share of the target's logits; None for the teacher's own
    direction: str
    beta: float  # of "js"
    ignore_index: int
    columns: int

    @property
    def one_exponential(self) -> bool:
        """Whether label and KD term need the same softmax of the student."""
        return isinstance(self.student_tau, float) and self.student_tau == 1.0


class Rows(NamedTuple):
    """What is known of each row after the statistics, [N] each; undefined where a side takes no part.

    Sums are of exp2(u), with u = (logits - max) * log2(e) / tau for the student, v the same for the teacher (the target,
    where it is a mix).
    """

    student_max: torch.Tensor
    student_sum: torch.Tensor
    label_sum: torch.Tensor  # the student's sum at temperature 1
    teacher_max: torch.Tensor
    teacher_sum: torch.Tensor
    difference: torch.Tensor  # forward: mean of v - u under p; reverse: of u - v under q; js: of log2(q / m) under q
    label_logit: torch.Tensor  # NaN for a label that is neither a column nor ignore_index
    teacher_difference: torch.Tensor  # js: mean of log2(p / m) under p; elsewhere 0


class _Chunk(NamedTuple):
    """Some rows of a call: target logits, and numbers a row as [n, 1]."""

    rows: slice
    student: torch.Tensor
    teacher: torch.Tensor | None
    stats: Rows
    student_tau: float | torch.Tensor
    teacher_tau: float | torch.Tensor
    buffers: tuple[torch.Tensor, ...]


def compute_dtype(logits: torch.Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _chunks(
    student_NV: torch.Tensor, teacher_NV: torch.Tensor | None, stats: Rows, options: Options, num_buffers: int
) -> Iterator[_Chunk]:
    """As many rows at a time as fit a buffer of the chunk size; at least one."""
    num_rows, num_columns = student_NV.shape
    dtype = compute_dtype(student_NV)
    size = (CPU_CHUNK_BYTES if student_NV.device.type == "cpu" else GPU_CHUNK_BYTES) // (4 * num_columns)
    size = min(max(1, size), num_rows)
    mix = None if teacher_NV is None else options.mix
    buffers = [student_NV.new_empty((size, num_columns), dtype=dtype) for _ in range(num_buffers + (mix is not None))]
    for start in range(0, num_rows, max(1, size)):
        rows = slice(start, min(start + size, num_rows))
        part = [buffer[: rows.stop - start] for buffer in buffers]
        student, teacher = student_NV[rows], None if teacher_NV is None else teacher_NV[rows]
        if teacher is not None and mix is not None:
            share_N1 = torch.as_tensor(mix, dtype=dtype, device=student.device).expand(num_rows)[rows, None]
            teacher = _mixed(student, teacher, share_N1, out=part.pop())
        student_tau, teacher_tau = (
            tau[rows, None] if isinstance(tau, torch.Tensor) else tau
            for tau in (options.student_tau, options.teacher_tau)
        )
        columns = Rows(*(row_N[rows, None] for row_N in stats))
        yield _Chunk(rows, student, teacher, columns, student_tau, teacher_tau, tuple(part))


def _mixed(student: torch.Tensor, teacher: torch.Tensor, share_N1: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out = student + share * (teacher - student): exactly the logits where they are equal, -inf where one of them is.

    At the ends it is one side alone, whatever the other holds.
    """
    out.copy_(teacher).sub_(student).mul_(share_N1).add_(student)
    out.masked_fill_((student == -math.inf) & ~teacher.isnan(), -math.inf)  # there the difference is infinite or NaN
    return torch.where(share_N1 == 0, student, torch.where(share_N1 == 1, teacher, out), out=out)


def _exponents(
    logits: torch.Tensor, max_N1: torch.Tensor, tau: float | torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """out = (logits - max) * log2(e) / tau, whatever the dtype of the logits."""
    if isinstance(tau, torch.Tensor):
        return torch.sub(logits, max_N1, out=out).mul_(LOG2_E / tau)
    # One fused multiply-add. The shift is rounded once a row, alike for the row's elements and its sum, so it cancels.
    return torch.add(max_N1 * (-LOG2_E / tau), logits, alpha=LOG2_E / tau, out=out)


def _take_sums(chunk: _Chunk, with_labels: bool, options: Options) -> None:
    (_, student, teacher, stats, *_), (u, v, weight) = chunk, chunk.buffers[:3]
    # A finite maximum keeps the exponents of a row of -inf from being NaN: they are -inf and the sum is zero.
    stats.student_max.copy_(student.amax(dim=1, keepdim=True)).clamp_(min=MIN_MAX)
    if with_labels and not options.one_exponential:
        _exponents(student, stats.student_max, 1.0, out=weight).exp2_()
        torch.sum(weight, dim=1, keepdim=True, out=stats.label_sum)
    _exponents(student, stats.student_max, chunk.student_tau, out=u)
    if teacher is None:
        torch.sum(u.exp2_(), dim=1, keepdim=True, out=stats.student_sum)
        return
    torch.exp2(u, out=weight)
    torch.sum(weight, dim=1, keepdim=True, out=stats.student_sum)
    stats.teacher_max.copy_(teacher.amax(dim=1, keepdim=True)).clamp_(min=MIN_MAX)
    _exponents(teacher, stats.teacher_max, chunk.teacher_tau, out=v)
    if options.direction != "forward":
        u.sub_(v)
        torch.sum(v.exp2_(), dim=1, keepdim=True, out=stats.teacher_sum)
    else:
        torch.sub(v, u, out=u)
        torch.exp2(v, out=weight)
        torch.sum(weight, dim=1, keepdim=True, out=stats.teacher_sum)
    if options.direction == "js":
        return
    # nansum, because a column of weight zero adds zero also where its difference is infinite, or -inf minus -inf.
    # A NaN among the logits is in the sums too and is not lost.
    torch.nansum(u.mul_(weight), dim=1, keepdim=True, out=stats.difference)
    stats.difference.div_(stats.student_sum if options.direction == "reverse" else stats.teacher_sum)


def _probabilities(
    chunk: _Chunk, beta: float, q: torch.Tensor, s: torch.Tensor, p: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fills q, s and p of the derivation above; a side that is -inf throughout has no probability."""
    stats = chunk.stats
    assert chunk.teacher is not None
    for logits, max_N1, sum_N1, tau, out in (
        (chunk.student, stats.student_max, stats.student_sum, chunk.student_tau, q),
        (chunk.teacher, stats.teacher_max, stats.teacher_sum, chunk.teacher_tau, p),
    ):
        _exponents(logits, max_N1, tau, out=out).exp2_().mul_(sum_N1.reciprocal().masked_fill(sum_N1 == 0, 0.0))
    torch.sub(p, q, out=s)
    # Where both sides exclude a column, s is zero.
    s.div_(torch.add(q, s, alpha=beta).clamp_(min=MIN_PROBABILITY))
    return q, s, p


def _log_ratio(s: torch.Tensor, factor: float, out: torch.Tensor) -> torch.Tensor:
    """out = log2(1 + factor * s), finite where that is zero: there the weight is zero."""
    return torch.mul(s, factor, out=out).clamp_(min=torch.finfo(s.dtype).eps - 1).log1p_().mul_(LOG2_E)


def _take_mixture(chunk: _Chunk, beta: float) -> None:
    *buffers, log_ratio = chunk.buffers
    q, s, p = _probabilities(chunk, beta, *buffers)
    torch.sum(_log_ratio(s, -beta, out=log_ratio).mul_(q), dim=1, keepdim=True, out=chunk.stats.difference)
    torch.sum(_log_ratio(s, 1 - beta, out=log_ratio).mul_(p), dim=1, keepdim=True, out=chunk.stats.teacher_difference)


def _new_rows(student_NV: torch.Tensor, labels_N: torch.Tensor | None, options: Options) -> Rows:
    stats = Rows(*student_NV.new_zeros((len(Rows._fields), len(student_NV)), dtype=compute_dtype(student_NV)).unbind())
    if labels_N is not None:
        stats.label_logit.copy_(label_logits(student_NV, labels_N, options.ignore_index))
    return stats._replace(label_sum=stats.student_sum) if options.one_exponential else stats


def statistics(
    student_NV: torch.Tensor,
    teacher_NV: torch.Tensor | None,
    labels_N: torch.Tensor | None,
    options: Options,
    *,
    of_part: bool = False,
) -> Rows:
    """The first read of the logits, whose columns are all taken: maxima, sums and mean differences.

    With `of_part` the rows have more columns elsewhere, so that what js has of the mixture is left to `mixture`.
    """
    stats = _new_rows(student_NV, labels_N, options)
    of_mixture = teacher_NV is not None and options.direction == "js" and not of_part
    for chunk in _chunks(student_NV, teacher_NV, stats, options, 4 if of_mixture else 3):
        _take_sums(chunk, labels_N is not None, options)
        if of_mixture:
            _take_mixture(chunk, options.beta)
    return stats


def mixture(student_NV: torch.Tensor, teacher_NV: torch.Tensor, stats: Rows, options: Options) -> None:
    """Fills in what js has of the mixture, from maxima and sums that may be those of more columns than these."""
    for chunk in _chunks(student_NV, teacher_NV, stats, options, 4):
        _take_mixture(chunk, options.beta)


def label_logits(student_NV: torch.Tensor, labels_N: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """[N]: the label's logit, zero where it is ignored, NaN where it is no column."""
    last = student_NV.shape[1] - 1
    logits_N = student_NV.gather(1, labels_N.clamp(0, last)[:, None])[:, 0].to(compute_dtype(student_NV))
    logits_N = logits_N.masked_fill((labels_N < 0) | (labels_N > last), math.nan)
    return logits_N.masked_fill(labels_N == ignore_index, 0.0)


def values(
    stats: Rows, labels_N: torch.Tensor | None, with_teacher: bool, options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """kd_N and label_N: tau_s * tau_t * the divergence, and the cross-entropy at temperature 1."""
    kd_N, label_N = torch.zeros_like(stats.student_sum), torch.zeros_like(stats.student_sum)
    if with_teacher:
        if options.direction == "js":
            bits_N = stats.teacher_difference / (1 - options.beta) + stats.difference / options.beta
        else:
            log_ratio_N = (stats.student_sum / stats.teacher_sum).log2()
            bits_N = stats.difference + (-log_ratio_N if options.direction == "reverse" else log_ratio_N)
        # Rounding may leave a value just below zero.
        bits_N = bits_N.clamp(min=0.0).masked_fill((stats.student_sum == 0) | (stats.teacher_sum == 0), 0.0)
        kd_N = options.student_tau * options.teacher_tau * LN_2 * bits_N
    if labels_N is not None:
        label_exponent_N = torch.empty_like(stats.label_sum)
        _exponents(stats.label_logit, stats.student_max, 1.0, out=label_exponent_N)
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
    # Factors of exp2(u) (js: of q), of exp2(v), and of the student's exponentials at temperature 1.
    q_factor = p_factor = label_factor = torch.zeros_like(stats.student_sum)
    if teacher_NV is not None:
        empty_N = (stats.student_sum == 0) | (stats.teacher_sum == 0)
        kd_factor_N = (kd_upstream_N * options.teacher_tau).masked_fill(empty_N, 0.0)
        if options.direction == "js":
            q_factor = kd_factor_N * (LN_2 / options.beta)
        else:
            q_factor = (kd_factor_N / stats.student_sum).masked_fill(empty_N, 0.0)
            p_factor = (kd_factor_N / stats.teacher_sum).masked_fill(empty_N, 0.0)
        q_factor.masked_fill_(stats.teacher_sum.isnan(), math.nan)  # reverse: nan_to_num_ below hides it
    if labels_N is not None:
        without_N = (labels_N == options.ignore_index) | (stats.label_sum == 0)
        label_factor = (label_upstream_N / stats.label_sum).masked_fill(without_N, 0.0)
        last = student_NV.shape[1] - 1
        onehot_N1 = -label_upstream_N.masked_fill(without_N | (labels_N < 0) | (labels_N > last), 0.0)[:, None]
        labels_N1 = labels_N.clamp(0, last)[:, None]
    # One multiplication serves both terms where both have the student's softmax as a summand.
    merged = options.one_exponential and (teacher_NV is None or options.direction == "forward")
    if merged:
        q_factor = q_factor + label_factor
    q_factor, p_factor, label_factor = q_factor[:, None], p_factor[:, None], label_factor[:, None]

    of_mixture = teacher_NV is not None and options.direction == "js"
    for chunk in _chunks(student_NV, teacher_NV, stats, options, 3 if of_mixture else 2):
        rows, student, teacher, columns = chunk[:4]
        grad, other = chunk.buffers[:2]
        if out.dtype == grad.dtype:
            grad = out[rows]
        if of_mixture:
            _probabilities(chunk, options.beta, grad, other, chunk.buffers[2])
            grad.mul_(_log_ratio(other, -options.beta, out=other).sub_(columns.difference)).mul_(q_factor[rows])
        else:
            _exponents(student, columns.student_max, chunk.student_tau, out=grad)
        if teacher is None:
            grad.exp2_().mul_(q_factor[rows])
        elif options.direction == "reverse":
            _exponents(teacher, columns.teacher_max, chunk.teacher_tau, out=other)
            torch.sub(grad, other, out=other).sub_(columns.difference)
            # Not finite where q is zero or the row's KL is infinite: no gradient from there.
            other.nan_to_num_(0.0, 0.0, 0.0).mul_(LN_2)
            grad.exp2_().mul_(q_factor[rows]).mul_(other)
        elif options.direction == "forward":
            grad.exp2_().mul_(q_factor[rows])
            _exponents(teacher, columns.teacher_max, chunk.teacher_tau, out=other).exp2_()
            grad.addcmul_(other, p_factor[rows], value=-1.0)
        if labels_N is not None:
            if not merged:
                _exponents(student, columns.student_max, 1.0, out=other).exp2_()
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
