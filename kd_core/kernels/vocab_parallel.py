"""softmax_kl for logits whose columns are spread over the ranks of a process group.

Each rank reads its own columns once. One all_gather of eight floats a row makes the statistics of whole rows known to all,
and every rank computes the same values and the gradient of its own columns from them: the backward pass communicates
nothing. js looks at its columns again when both normalisers are known, and sums two more floats a row over the ranks. The merge is that of online softmax (Milakov and Gimelshein, arXiv 1805.02867), extended to the KL's sum.

Shape letters: N rows, V this rank's columns, R ranks.
"""

from typing import Any

import torch
import torch.distributed as dist

from kd_core.kernels import softmax_kl as single
from kd_core.kernels.softmax_kl_arguments import check_call
from kd_core.kernels.softmax_kl_torch import LOG2_E, MIN_MAX, Options, Rows, values

IGNORED = -1  # in labels that count from this rank's first column; a label of another rank is V or more


def _merge(rows_RN: Rows, options: Options) -> Rows:
    """Statistics of whole rows from those of their parts, each field [R, N]."""
    student_max, teacher_max = rows_RN.student_max.amax(0), rows_RN.teacher_max.amax(0)
    slope_s, slope_t = LOG2_E / options.student_tau, LOG2_E / options.teacher_tau
    # Differences of products, not products of differences: the sums are relative to shifts that were rounded so.
    delta_s = rows_RN.student_max * slope_s - student_max * slope_s
    delta_t = rows_RN.teacher_max * slope_t - teacher_max * slope_t
    student_sums, teacher_sums = rows_RN.student_sum * delta_s.exp2(), rows_RN.teacher_sum * delta_t.exp2()
    reverse = options.direction == "reverse"
    weights, shift = (student_sums, delta_s - delta_t) if reverse else (teacher_sums, delta_t - delta_s)
    differences = torch.where(weights == 0, 0.0, weights * (rows_RN.difference + shift)).sum(0) / weights.sum(0)
    zeros = torch.zeros_like(student_max)  # js: the mixture can be looked at only now
    return Rows(
        student_max,
        student_sums.sum(0),
        (rows_RN.label_sum * (rows_RN.student_max * LOG2_E - student_max * LOG2_E).exp2()).sum(0),
        teacher_max,
        teacher_sums.sum(0),
        zeros if options.direction == "js" else differences,
        rows_RN.label_logit.sum(0),
        zeros,
    )


class _VocabParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, group: Any, columns: int, args: tuple[Any, ...]) -> Any:
        teacher, labels, *given, impl = args
        options = single.make_options(student, *given)
        found = torch.zeros(len(student), dtype=torch.bool, device=student.device)
        if columns > 0:
            stats = single.statistics_of_part(student, teacher, labels, options, impl)
        else:
            stats = student.new_zeros((len(Rows._fields), len(student)), dtype=single._dtype(student))
            stats[0] = stats[3] = MIN_MAX
        if labels is not None:
            found = (labels >= 0) & (labels < columns)
            stats[6].masked_fill_(~found, 0.0)
        stats[7] = found  # nothing else is there yet
        ranks = dist.get_world_size(group)
        parts = stats.new_empty((ranks * len(stats), len(student)))
        dist.all_gather_into_tensor(parts, stats, group=group)
        parts_RN = Rows(*parts.view(ranks, len(stats), -1).unbind(1))
        rows = _merge(parts_RN, options)
        if labels is not None:  # a label that is no rank's column is loud, as in softmax_kl
            nowhere_N = parts_RN.teacher_difference.sum(0) == 0
            rows.label_logit.masked_fill_(nowhere_N & (labels != IGNORED), torch.nan)
        stats = torch.stack(rows)
        if teacher is not None and options.direction == "js":
            if columns > 0:
                single.add_mixture(student, teacher, stats, options, impl)
            of_mixture = stats[5::2].contiguous()  # the differences of both sides
            dist.all_reduce(of_mixture, group=group)
            stats[5::2] = of_mixture
            rows = Rows(*stats.unbind())
        ctx.save_for_backward(stats, student, teacher, labels, *given[:3])
        ctx.rest, ctx.columns = (*given[3:], impl), columns
        return values(rows, labels, teacher is not None, options)

    @staticmethod
    def backward(ctx: Any, kd_upstream_N: torch.Tensor, label_upstream_N: torch.Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "softmax_kl_vocab_parallel can be differentiated once; create_graph=True is not supported"
            )
        stats, student, *tensors = ctx.saved_tensors
        if ctx.columns == 0:
            return torch.zeros_like(student), None, None, None
        upstream = kd_upstream_N, label_upstream_N
        return single._softmax_kl_gradient(*upstream, stats, student, *tensors, *ctx.rest), None, None, None


def softmax_kl_vocab_parallel(
    student_logits_NV: torch.Tensor,
    teacher_logits_NV: torch.Tensor | None,
    labels_N: torch.Tensor | None = None,
    *,
    first_column: int,
    group: Any = None,
    temperature: float | torch.Tensor = 1.0,
    teacher_temperature: float | torch.Tensor | None = None,
    direction: str = "forward",
    beta: float | None = None,
    mix: float | torch.Tensor | None = None,
    ignore_index: int = -100,
    valid_columns: int | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`softmax_kl` over the columns of all ranks of `group`; call on every rank of it.

    The upstream gradients must be the same on every rank, as they are when each computes the same loss from what is
    returned; then each rank gets the gradient of its own columns, not divided by anything.

    Args:
        student_logits_NV: float [N, V], this rank's columns; ranks may have different numbers of them.
        teacher_logits_NV: float [N, at least as many], the same columns of the teacher; None for labels alone.
        labels_N: int64 [N], columns counted over all ranks, or ignore_index; the same on every rank.
        first_column: which column of the whole the first of this rank is.
        group: the process group; default all ranks.
        valid_columns: of the whole; columns from here on take part in nothing.
        impl: as for `softmax_kl`, without "reference".

    The other arguments, the values returned (float64 for float64 logits) and the errors are those of `softmax_kl`.
    """
    if impl == "reference":
        raise ValueError("impl must be one of auto, triton, torch for columns spread over ranks, got 'reference'")
    width = student_logits_NV.shape[1] if student_logits_NV.ndim == 2 else 0
    columns = width if valid_columns is None else min(max(valid_columns - first_column, 0), width)
    local_N = shown_N = None
    if labels_N is not None:
        local_N = labels_N - first_column
        here = (local_N >= 0) & (local_N < columns)
        shown_N = torch.where(here, local_N, IGNORED)
        local_N = torch.where(here, local_N, width).masked_fill_(labels_N == ignore_index, IGNORED)
    student, teacher, _, *rest = check_call(
        student_logits_NV, teacher_logits_NV, shown_N, temperature, teacher_temperature, direction, beta, mix,
        IGNORED, max(columns, 1), impl,
    )  # fmt: skip
    return _VocabParallel.apply(student, group, columns, (teacher, local_N, *rest))
