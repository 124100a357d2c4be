"""softmax_kl as Triton kernels.

Which kernel serves which call (`plan` below decides; V is the number of columns that take part):

    V              kernel                                  reads of the logits            why
    up to 1024     resident, 1024 elements a warp          1 a pass                       no barrier: a row never leaves its warp
    up to 4096     resident, a row a program, 2-4 warps    1 a pass                       32 elements a thread, about 128 registers
    up to 16384    resident, a row a program, 16 warps     1 a pass                       the largest row that fits one block's registers
    above          streaming statistics, then gradient     1 a pass, so 2 with gradient   any V, any GPU; both at the rate of a copy
    above, sm_90   resident over a cluster of blocks       1 with the gradient            registers of 2 to 16 SMs hold the row

A temperature whose label term needs an exponential of its own needs more registers: half the elements a thread, and the
streaming kernel from 8192. So does js, which compares both sides when both normalisers are known: resident kernels and the
cluster have the row still in registers, the streaming kernel goes over it once more, from its end, one row an SM at a time, so
that the L2 still holds it: up to about 90,000 columns of 16 bits on an H200, beyond that what is left of it.

A pass is a call of `statistics`, `gradient`, or `weighted_sum`, which does both. The cluster serves `weighted_sum` alone and
runs only where it is asked for (`cluster_plan`): no GPU has shown it to be faster yet.

Every V gets 128-bit loads: a row is split at 16-byte boundaries into a body, whose length is a multiple of 8 elements, and
an edge of at most 7 elements before and 7 after it. Where the tensors do not share their alignment, loads are as wide as
the hardware allows for single elements.
"""

import contextlib
from typing import Any, NamedTuple

import torch
import triton

from kd_core.kernels.softmax_kl_torch import Options, Rows
from kd_core.kernels.softmax_kl_triton_kernels import (
    _gradient_kernel,
    _resident_kernel,
    _scale_kernel,
    _streaming_kernel,
    _total_kernel,
)

# Integer temperatures whose exponential at temperature 1 is a power of the one at hand: no second exponential.
INTEGER_TEMPERATURES = (1, 2, 3, 4, 8)


class Plan(NamedTuple):
    """How the rows of a call are read; see the table at the head of this file."""

    rows: int  # a program; 0 for the streaming kernel
    block: int  # columns of a program's tile; streaming: lanes
    tail: int  # columns of its second tile
    warps: int
    blocks: int = 1  # in a cluster


STREAMING = Plan(rows=0, block=256, tail=0, warps=4)
STREAMING_TWICE = STREAMING._replace(block=1024, warps=32)  # a row an SM: the L2 may hold it for the second turn
MAX_RESIDENT = 16384
GRADIENT_BLOCK, GRADIENT_WARPS = 2048, 4
TOTAL_BLOCK = 1024
SCALE_BLOCK, SCALE_PROGRAMS = 4096, 1024


def plan(columns: int, *, second_exponential: bool = False, js: bool = False) -> Plan:
    """What serves a call of this many columns; `second_exponential`: the label term needs one (TAU of the kernels is 0)."""
    elements_a_warp, largest = (512, MAX_RESIDENT // 2) if second_exponential or js else (1024, MAX_RESIDENT)
    if columns > largest:
        return STREAMING_TWICE if js else STREAMING
    block = triton.next_power_of_2(columns)
    warps = max(1, block // elements_a_warp) if block <= 4096 else 16
    return Plan(rows=max(1, elements_a_warp // block), block=block, tail=0, warps=warps)


def cluster_plan(columns: int) -> Plan:
    """Rows of up to 262,144 columns over a cluster of thread blocks (sm_90), in two tiles to waste less of a power of 2."""
    block = max(triton.next_power_of_2(columns) // 2, 1024)
    tail = triton.next_power_of_2(max(columns - block, 1024))
    blocks = min(16, max(2, (block + tail) // 8192))
    return Plan(rows=1, block=block, tail=tail, warps=16, blocks=blocks)


def clusters_compile() -> bool:
    """Whether this Triton reduces a row over 8 and 16 blocks: 3.6 did not, 3.9 does."""
    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 9)


def _layout(columns: int, *tensors: torch.Tensor) -> dict[str, Any]:
    """ALIGN, in elements, that the starts of all rows' bodies have in common, and whether there is anything to peel."""
    phases = {tensor.stride(0) % 8 for tensor in tensors if tensor.shape[0] > 1} or {0}
    if len(phases) > 1 or any(tensor.data_ptr() % 16 for tensor in tensors):
        return {"ALIGN": 1, "PEEL": False}
    return {"ALIGN": 8, "PEEL": phases != {0} or columns % 8 != 0}


def _integer_tau(options: Options) -> int:
    """The student's temperature if its exponentials give those at temperature 1, else 0."""
    tau = options.student_tau
    return int(tau) if not isinstance(tau, torch.Tensor) and tau in INTEGER_TEMPERATURES else 0


def _plan(teacher: torch.Tensor | None, labels: torch.Tensor | None, options: Options) -> Plan:
    js = teacher is not None and options.direction == "js"
    return plan(options.columns, second_exponential=labels is not None and _integer_tau(options) == 0, js=js)


def _flags(teacher: torch.Tensor | None, labels: torch.Tensor | None, options: Options) -> dict[str, Any]:
    taus = options.student_tau, options.teacher_tau
    return {
        "V": options.columns,
        "TEACHER": teacher is not None,
        "LABELS": labels is not None,
        "DIRECTION": options.direction,
        "TAU": _integer_tau(options),
        "STUDENT_TAUS": isinstance(taus[0], torch.Tensor),
        "TEACHER_TAUS": isinstance(taus[1], torch.Tensor),
        "MIX": teacher is not None and options.mix is not None,
        "MIXES": isinstance(options.mix, torch.Tensor),
    }


def _numbers(options: Options) -> tuple[Any, ...]:
    """The kernels' arguments from `student_tau` on; the last is not the gradient kernel's."""
    mix = 1.0 if options.mix is None else options.mix
    return options.student_tau, options.teacher_tau, mix, options.beta, 1.0 - options.beta


def statistics(
    student_NV: torch.Tensor,
    teacher_NV: torch.Tensor | None,
    labels_N: torch.Tensor | None,
    options: Options,
    *,
    of_part: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """kd_N, label_N and the eight statistics [8, N] of `Rows`, in float32."""
    chosen = STREAMING if of_part and options.direction == "js" else _plan(teacher_NV, labels_N, options)
    return _forward(student_NV, teacher_NV, labels_N, options, chosen, of_part=of_part)


def mixture(student_NV: torch.Tensor, teacher_NV: torch.Tensor, stats: torch.Tensor, options: Options) -> None:
    """Fills in what js has of the mixture, from maxima and sums that may be those of more columns than these."""
    _stream(_readable(student_NV), _readable(teacher_NV), None, (stats,) * 3, options, STREAMING, with_sums=False)


def _stream(
    student_NV: torch.Tensor,
    teacher_NV: torch.Tensor | None,
    labels_N: torch.Tensor | None,
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    options: Options,
    chosen: Plan,
    *,
    with_sums: bool = True,
    with_mixture: bool = True,
) -> None:
    """Fills kd_N, label_N and the statistics, all of `out`."""
    logits = [tensor for tensor in (student_NV, teacher_NV) if tensor is not None]
    with _device(student_NV):
        _streaming_kernel[(len(student_NV),)](
            student_NV, logits[-1], out[2] if labels_N is None else labels_N.contiguous(), *out, *_numbers(options),
            len(student_NV), student_NV.stride(0), logits[-1].stride(0), options.ignore_index,
            **_flags(teacher_NV, labels_N, options), **_layout(options.columns, *logits), SUMS=with_sums,
            MIXTURE=with_mixture and teacher_NV is not None and options.direction == "js",
            LANES=chosen.block, WIDTH=16 // max(tensor.element_size() for tensor in logits), num_warps=chosen.warps,
        )  # fmt: skip


def _forward(
    student_NV: torch.Tensor,
    teacher_NV: torch.Tensor | None,
    labels_N: torch.Tensor | None,
    options: Options,
    chosen: Plan,
    row_weight_N: torch.Tensor | None = None,
    kd_weight: float = 0.0,
    label_weight: float = 0.0,
    grad_NV: torch.Tensor | None = None,
    of_part: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One read of the logits; a resident plan fills `grad_NV`, where given, with the gradient of the weighted sum."""
    student_NV = _readable(student_NV)
    teacher_NV = None if teacher_NV is None else _readable(teacher_NV)
    num_rows = student_NV.shape[0]
    kd_N, label_N = (torch.empty(num_rows, dtype=torch.float32, device=student_NV.device) for _ in range(2))
    stats = torch.empty((len(Rows._fields), num_rows), dtype=torch.float32, device=student_NV.device)
    if chosen.rows == 0:
        assert grad_NV is None, "the streaming kernel leaves the gradient to `gradient`"
        out = kd_N, label_N, stats
        _stream(student_NV, teacher_NV, labels_N, out, options, chosen, with_mixture=not of_part)
        return out
    logits = [tensor for tensor in (student_NV, teacher_NV, grad_NV) if tensor is not None]
    teacher = student_NV if teacher_NV is None else teacher_NV
    with _device(student_NV):
        _resident_kernel[(triton.cdiv(num_rows, chosen.rows),)](
            student_NV, teacher, stats if labels_N is None else labels_N.contiguous(),
            student_NV if grad_NV is None else grad_NV, kd_N, label_N, stats,
            1.0 if row_weight_N is None else row_weight_N, *_numbers(options),
            num_rows, student_NV.stride(0), teacher.stride(0), 0 if grad_NV is None else grad_NV.stride(0),
            options.ignore_index, kd_weight, label_weight,
            **_flags(teacher_NV, labels_N, options), **_layout(options.columns, *logits),
            WEIGHTS=row_weight_N is not None, GRADIENT=grad_NV is not None,
            ROWS=chosen.rows, BLOCK=chosen.block, TAIL=chosen.tail,
            num_warps=chosen.warps, num_ctas=chosen.blocks,
        )  # fmt: skip
    return kd_N, label_N, stats


def gradient(
    student_NV: torch.Tensor,
    teacher_NV: torch.Tensor | None,
    labels_N: torch.Tensor | None,
    stats: torch.Tensor,
    options: Options,
    kd_upstream: torch.Tensor | float,
    label_upstream: torch.Tensor | float,
    out: torch.Tensor,
) -> None:
    """Fills `out` [N, V] with the gradient; upstream gradients, float32 [N] or one for all, enter before its rounding."""
    student_NV = _readable(student_NV)
    teacher_NV = None if teacher_NV is None else _readable(teacher_NV)
    num_rows = student_NV.shape[0]
    teacher = student_NV if teacher_NV is None else teacher_NV
    kd_stride, label_stride = (
        given.stride(0) if isinstance(given, torch.Tensor) else 0 for given in (kd_upstream, label_upstream)
    )
    with _device(student_NV):
        _gradient_kernel[(num_rows * triton.cdiv(options.columns, GRADIENT_BLOCK),)](
            student_NV, teacher, stats if labels_N is None else labels_N.contiguous(), out, stats,
            kd_upstream, label_upstream, *_numbers(options)[:-1],
            num_rows, student_NV.stride(0), teacher.stride(0), out.stride(0), kd_stride, label_stride,
            options.ignore_index,
            **_flags(teacher_NV, labels_N, options), **_layout(options.columns, student_NV, teacher, out),
            KD=isinstance(kd_upstream, torch.Tensor), LABEL=isinstance(label_upstream, torch.Tensor),
            BLOCK=GRADIENT_BLOCK, num_warps=GRADIENT_WARPS,
        )  # fmt: skip


def weighted_sum(
    student_NV: torch.Tensor,
    teacher_NV: torch.Tensor | None,
    labels_N: torch.Tensor | None,
    options: Options,
    row_weight_N: torch.Tensor | None,
    kd_weight: float,
    label_weight: float,
    grad_NV: torch.Tensor | None,
    chosen: Plan | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """loss, kd_sum, label_sum, float32 scalars; fills `grad_NV`, where given, with the gradient of the loss."""
    chosen = chosen or _plan(teacher_NV, labels_N, options)
    row_weight_N = None if row_weight_N is None else row_weight_N.contiguous()
    weights = row_weight_N, kd_weight, label_weight
    resident_grad = grad_NV if chosen.rows else None
    kd_N, label_N, stats = _forward(student_NV, teacher_NV, labels_N, options, chosen, *weights, resident_grad)
    loss, kd_sum, label_sum = (torch.empty((), dtype=torch.float32, device=stats.device) for _ in range(3))
    with _device(stats):
        _total_kernel[(1,)](
            kd_N, label_N, 1.0 if row_weight_N is None else row_weight_N, loss, kd_sum, label_sum, len(kd_N),
            kd_weight, label_weight, WEIGHTS=row_weight_N is not None, BLOCK=TOTAL_BLOCK,
        )  # fmt: skip
    if grad_NV is not None and chosen.rows == 0:
        weight = 1.0 if row_weight_N is None else row_weight_N
        upstream = kd_weight * weight, label_weight * weight
        gradient(student_NV, teacher_NV, labels_N, stats, options, *upstream, grad_NV)
    return loss, kd_sum, label_sum


def scale_(grad_NV: torch.Tensor, upstream: torch.Tensor) -> None:
    """grad *= upstream, in place, without the host reading the scalar."""
    with _device(grad_NV):
        _scale_kernel[(SCALE_PROGRAMS,)](
            grad_NV, upstream, grad_NV.numel(), PROGRAMS=SCALE_PROGRAMS, BLOCK=SCALE_BLOCK, num_warps=8
        )


def _readable(logits_NV: torch.Tensor) -> torch.Tensor:
    """Logits whose columns are adjacent in memory: the tensor itself, or a copy."""
    return logits_NV if logits_NV.stride(1) == 1 else logits_NV.contiguous()


def _device(tensor: torch.Tensor) -> Any:
    """Kernels are launched on the tensor's GPU, whichever is current."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
