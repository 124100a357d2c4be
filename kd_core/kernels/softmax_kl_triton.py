"""softmax_kl as Triton kernels.

Which kernel serves which call (`plan` below decides; V is the number of columns that take part):

    V              kernel                                  reads of the logits            why
    up to 1024     resident, 1024 elements a warp          1 a pass                       no barrier: a row never leaves its warp
    up to 4096     resident, a row a program, 2-4 warps    1 a pass                       32 elements a thread, about 128 registers
    up to 16384    resident, a row a program, 16 warps     1 a pass                       the largest row that fits one block's registers
    above          streaming statistics, then gradient     1 a pass, so 2 with gradient   any V, any GPU; both at the rate of a copy
    above, sm_90   resident over a cluster of blocks       1 with the gradient            registers of 2 to 16 SMs hold the row

A temperature whose label term needs an exponential of its own needs more registers: half the elements a thread, and the
streaming kernel from 8192.

A pass is a call of `statistics`, `gradient`, or `weighted_sum`, which does both. The cluster serves `weighted_sum` alone and
runs only where it is asked for (`cluster_plan`): no GPU has shown it to be faster yet.

Every V gets 128-bit loads: a row is split at 16-byte boundaries into a body, whose length is a multiple of 8 elements, and
an edge of at most 7 elements before and 7 after it. Where the tensors do not share their alignment, loads are as wide as
the hardware allows for single elements.

Rows that are -inf, and columns that are -inf on either side, need no mask: maxima start at a finite number, so that an
exponent is -inf or finite, and a product with a probability of zero is dropped by a select.

One-pass statistics with running maxima, and gradients from saved row sums, are those of online softmax (Milakov and
Gimelshein, arXiv 1805.02867) extended to the KL: a shift of the maxima moves its sum by
Z_t (delta_t - delta_s), see `_merge`.
"""

# mypy: disable-error-code="no-untyped-def"

import contextlib
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from kd_core.kernels.softmax_kl_torch import Options

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
MIN_MAX = tl.constexpr(-1e30)  # a row maximum below this is that of a row of -inf
EDGE = tl.constexpr(16)  # 8 lanes before the body, 8 after it

# Integer temperatures whose exponential at temperature 1 is a power of the one at hand: no second exponential.
INTEGER_TEMPERATURES = (1, 2, 3, 4, 8)


# ---------------------------------------------------------------------------------------------------------------------
# Parts of kernels. Shape letters: R rows of a program, B columns of a tile; flags in capitals are known at compile time
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _each(value, stride, rows, present, VECTOR: tl.constexpr):
    """[R]: one number for all rows, or each row's from a vector [N]."""
    if VECTOR:
        return tl.load(value + rows * stride, mask=present, other=1.0)
    else:
        return tl.zeros(rows.shape, tl.float32) + value


@triton.jit
def _slope(tau):
    """Exponent of 2 for each unit of a logit."""
    return tl.full(tau.shape, LOG2_E, tl.float32) / tau


@triton.jit
def _body(rows, stride, V: tl.constexpr, ALIGN: tl.constexpr, PEEL: tl.constexpr):
    """First column of each row's body, and the number of columns in it, both [R]."""
    start = tl.zeros(rows.shape, tl.int32)
    if PEEL:
        start = tl.minimum((ALIGN - (rows * stride) % ALIGN) % ALIGN, V).to(tl.int32)
    return start, (V - start) // ALIGN * ALIGN


@triton.jit
def _body_pointers(pointer, rows, stride, start, offsets, ALIGN: tl.constexpr):
    """[R, B]: the columns start + offsets. Tells the compiler what `_body` made true: groups of ALIGN lie aligned."""
    group: tl.constexpr = min(ALIGN, offsets.shape[1])
    places = (rows * stride + start)[:, None] + offsets
    return pointer + tl.max_contiguous(tl.multiple_of(places, [1, group]), [1, group])


@triton.jit
def _inside(offsets, length, present, ALIGN: tl.constexpr):
    """[R, B]: which columns of a body exist; the same for all of a group."""
    group: tl.constexpr = min(ALIGN, offsets.shape[1])
    return tl.max_constancy((offsets < length[:, None]) & present[:, None], [1, group])


@triton.jit
def _edge(lane, start, length, V: tl.constexpr):
    """Columns outside the body for lanes 0 to EDGE - 1, and which of them exist; start and length broadcast to lane."""
    columns = tl.where(lane < EDGE // 2, lane, start + length + lane - EDGE // 2)
    return columns, tl.where(lane < EDGE // 2, lane < start, (columns < V) & (lane < EDGE))


@triton.jit
def _load(pointers, inside):
    # Upcast before anything else: the interpreter has no bfloat16 arithmetic.
    return tl.load(pointers, mask=inside, other=-float("inf")).to(tl.float32)


@triton.jit
def _label_exp(s, e_s, c_1, k_1, TAU: tl.constexpr):
    """exp2 at temperature 1, where the student's temperature is an integer TAU by multiplication."""
    if TAU == 1:
        return e_s
    elif TAU == 2:
        return e_s * e_s
    elif TAU == 3:
        return e_s * e_s * e_s
    elif TAU == 4:
        square = e_s * e_s
        return square * square
    elif TAU == 8:
        square = e_s * e_s
        return (square * square) * (square * square)
    else:
        return tl.exp2(tl.fma(s, c_1, -k_1))


@triton.jit
def _sums(
    s, t, c_s, c_t, c_1, k_s, k_t, k_1, TEACHER: tl.constexpr, LABELS: tl.constexpr, REVERSE: tl.constexpr, TAU: tl.constexpr
):  # fmt: skip
    """Sums over the columns of a tile: z_s, z_1, z_t and a, the sum of e_t (v - u), in reverse of e_s (u - v)."""
    u = tl.fma(s, c_s, -k_s)
    e_s = tl.exp2(u)
    z_s = tl.sum(e_s, 1)
    z_1, z_t, a = z_s, z_s, z_s
    if LABELS:
        z_1 = tl.sum(_label_exp(s, e_s, c_1, k_1, TAU), 1)
    if TEACHER:
        v = tl.fma(t, c_t, -k_t)
        e_t = tl.exp2(v)
        z_t = tl.sum(e_t, 1)
        # The select drops infinite or undefined differences of columns without probability. A NaN is in z_t or z_s too.
        if REVERSE:
            a = tl.sum(tl.where(e_s > 0, e_s * (u - v), 0.0), 1)
        else:
            a = tl.sum(tl.where(e_t > 0, e_t * (v - u), 0.0), 1)
    return z_s, z_1, z_t, a


@triton.jit
def _shift(z_s, z_1, z_t, a, delta_s, delta_1, delta_t, REVERSE: tl.constexpr):
    """Sums relative to new maxima; each delta is the old shift less the new one, in exponents of 2."""
    scale_s, scale_t = tl.exp2(delta_s), tl.exp2(delta_t)
    if REVERSE:
        a = tl.where(scale_s > 0, scale_s * (a + z_s * (delta_s - delta_t)), 0.0)
    else:
        a = tl.where(scale_t > 0, scale_t * (a + z_t * (delta_t - delta_s)), 0.0)
    return z_s * scale_s, z_1 * tl.exp2(delta_1), z_t * scale_t, a


@triton.jit
def _merge(
    m_s, m_t, z_s, z_1, z_t, a, s, t, c_s, c_t, c_1,
    TEACHER: tl.constexpr, LABELS: tl.constexpr, REVERSE: tl.constexpr, TAU: tl.constexpr,
):  # fmt: skip
    """Running maxima and sums, [R], after one more tile."""
    new_m_s, new_m_t = tl.maximum(m_s, tl.max(s, 1)), m_t
    if TEACHER:
        new_m_t = tl.maximum(m_t, tl.max(t, 1))
    # Shifts are the products themselves, rounded once: all terms of a sum use the same one, so its error cancels.
    k_s, k_t, k_1 = new_m_s * c_s, new_m_t * c_t, new_m_s * c_1
    z_s, z_1, z_t, a = _shift(z_s, z_1, z_t, a, m_s * c_s - k_s, m_s * c_1 - k_1, m_t * c_t - k_t, REVERSE)
    more_s, more_1, more_t, more_a = _sums(
        s, t, c_s[:, None], c_t[:, None], c_1, k_s[:, None], k_t[:, None], k_1[:, None], TEACHER, LABELS, REVERSE, TAU
    )
    return new_m_s, new_m_t, z_s + more_s, z_1 + more_1, z_t + more_t, a + more_a


@triton.jit
def _finish(
    student, labels, kd, label, stats, rows, present, N, stride, ignore_index, tau_s, tau_t, m_s, m_t, z_s, z_1, z_t, a,
    V: tl.constexpr, TEACHER: tl.constexpr, LABELS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Writes the rows' values and statistics; returns the mean difference."""
    difference = tl.zeros(rows.shape, tl.float32)
    value = difference
    if TEACHER:
        log_ratio = tl.log2(z_s / z_t)
        if REVERSE:
            difference = a / z_s
            value = difference - log_ratio
        else:
            difference = a / z_t
            value = difference + log_ratio
        # Rounding may leave a value just below zero; a comparison keeps NaN.
        value = tl.where(value < 0, 0.0, tau_s * tau_t * LN_2 * value)
        value = tl.where((z_s == 0) | (z_t == 0), 0.0, value)
    tl.store(kd + rows, value, mask=present)
    logit = tl.zeros(rows.shape, tl.float32)
    value = logit
    if LABELS:
        index = tl.load(labels + rows, mask=present, other=0)
        valid = (index >= 0) & (index < V)
        logit = tl.load(student + rows * stride + index, mask=present & valid, other=float("nan")).to(tl.float32)
        logit = tl.where(index == ignore_index, 0.0, logit)
        value = LN_2 * (tl.log2(z_1) - tl.fma(logit, LOG2_E, -(m_s * LOG2_E)))
        value = tl.where((index == ignore_index) | (z_1 == 0), 0.0, value)
    tl.store(label + rows, value, mask=present)
    stats += rows
    tl.store(stats, m_s, mask=present)
    tl.store(stats + N, z_s, mask=present)
    tl.store(stats + 2 * N, z_1, mask=present)
    tl.store(stats + 3 * N, m_t, mask=present)
    tl.store(stats + 4 * N, z_t, mask=present)
    tl.store(stats + 5 * N, difference, mask=present)
    tl.store(stats + 6 * N, logit, mask=present)
    return difference


@triton.jit
def _factors(
    labels, rows, present, ignore_index, kd_upstream, label_upstream, tau_t, z_s, z_1, z_t, difference,
    V: tl.constexpr, TEACHER: tl.constexpr, LABELS: tl.constexpr, REVERSE: tl.constexpr, TAU: tl.constexpr,
):  # fmt: skip
    """[R] each: factors of e_s, e_t and e_1 in the gradient, the label's column, and what is subtracted there."""
    q = tl.zeros(rows.shape, tl.float32)
    p, one, onehot = q, q, q
    index = tl.zeros(rows.shape, tl.int32) - 1
    if TEACHER:
        empty = (z_s == 0) | (z_t == 0)
        q = tl.where(empty, 0.0, kd_upstream * tau_t / z_s)
        p = tl.where(empty, 0.0, kd_upstream * tau_t / z_t)
        if REVERSE:
            q = tl.where(difference == float("inf"), 0.0, q * LN_2)  # an infinite KL has no derivative
            q = tl.where(z_t != z_t, float("nan"), q)  # the select in `_gradient` hides it
    if LABELS:
        label = tl.load(labels + rows, mask=present, other=0)
        without = (label == ignore_index) | (z_1 == 0)
        one = tl.where(without, 0.0, label_upstream / z_1)
        onehot = tl.where(without, 0.0, label_upstream)
        index = tl.where((label >= 0) & (label < V), label, -1).to(tl.int32)
        # One multiplication serves both terms where both have the student's softmax as a summand.
        if TAU == 1 and not (TEACHER and REVERSE):
            q += one
    return q, p, one, index, onehot


@triton.jit
def _gradient(
    s, t, columns, c_s, c_t, c_1, k_s, k_t, k_1, difference, q, p, one, index, onehot,
    TEACHER: tl.constexpr, LABELS: tl.constexpr, REVERSE: tl.constexpr, TAU: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile in float32."""
    u = tl.fma(s, c_s, -k_s)
    e_s = tl.exp2(u)
    g = q * e_s
    if TEACHER:
        v = tl.fma(t, c_t, -k_t)
        if REVERSE:
            g = tl.where(g != 0, g * (u - v - difference), 0.0)
        else:
            g = tl.fma(-p, tl.exp2(v), g)
    if LABELS:
        if TAU != 1 or (TEACHER and REVERSE):
            g = tl.fma(one, _label_exp(s, e_s, c_1, k_1, TAU), g)
        g = tl.where(columns == index, g - onehot, g)
    return g


# ---------------------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _resident_kernel(
    student, teacher, labels, grad, kd, label, stats, row_weight, student_tau, teacher_tau,
    N, student_stride, teacher_stride, grad_stride, ignore_index, kd_weight, label_weight,
    V: tl.constexpr, TEACHER: tl.constexpr, LABELS: tl.constexpr, REVERSE: tl.constexpr, TAU: tl.constexpr,
    STUDENT_TAUS: tl.constexpr, TEACHER_TAUS: tl.constexpr, ALIGN: tl.constexpr, PEEL: tl.constexpr,
    WEIGHTS: tl.constexpr, GRADIENT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Statistics and values of ROWS rows held in registers, and with GRADIENT their gradient: one read of the logits."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    present = rows < N
    weight = _each(row_weight, 1, rows, present, WEIGHTS)
    taken = present & (weight != 0)  # a row of weight 0 takes no part: it is read as one of -inf
    tau_s = _each(student_tau, 1, rows, present, STUDENT_TAUS)
    tau_t = _each(teacher_tau, 1, rows, present, TEACHER_TAUS)
    c_s, c_t, c_1 = _slope(tau_s)[:, None], _slope(tau_t)[:, None], LOG2_E

    # Up to three tiles: BLOCK columns, TAIL columns after them, and the edge.
    start, length = _body(rows, student_stride, V, ALIGN, PEEL)
    offsets = tl.arange(0, BLOCK)[None, :]
    inside = _inside(offsets, length, taken, ALIGN)
    t = _load(_body_pointers(student, rows, student_stride, start, offsets, ALIGN), inside)
    s = t
    m_s = tl.maximum(tl.max(s, 1), MIN_MAX)
    m_t = m_s
    if TEACHER:
        t = _load(_body_pointers(teacher, rows, teacher_stride, start, offsets, ALIGN), inside)
        m_t = tl.maximum(tl.max(t, 1), MIN_MAX)
    if TAIL > 0:
        tail_offsets = BLOCK + tl.arange(0, TAIL)[None, :]
        tail_inside = _inside(tail_offsets, length, taken, ALIGN)
        tail_t = _load(_body_pointers(student, rows, student_stride, start, tail_offsets, ALIGN), tail_inside)
        tail_s = tail_t
        m_s = tl.maximum(m_s, tl.max(tail_s, 1))
        if TEACHER:
            tail_t = _load(_body_pointers(teacher, rows, teacher_stride, start, tail_offsets, ALIGN), tail_inside)
            m_t = tl.maximum(m_t, tl.max(tail_t, 1))
    if PEEL:
        edge_columns, edge_inside = _edge(tl.arange(0, EDGE)[None, :], start[:, None], length[:, None], V)
        edge_taken, edge_inside = edge_inside & taken[:, None], edge_inside & present[:, None]
        edge_t = _load(student + (rows * student_stride)[:, None] + edge_columns, edge_taken)
        edge_s = edge_t
        m_s = tl.maximum(m_s, tl.max(edge_s, 1))
        if TEACHER:
            edge_t = _load(teacher + (rows * teacher_stride)[:, None] + edge_columns, edge_taken)
            m_t = tl.maximum(m_t, tl.max(edge_t, 1))

    k_s, k_t, k_1 = m_s[:, None] * c_s, m_t[:, None] * c_t, m_s[:, None] * c_1
    z_s, z_1, z_t, a = _sums(s, t, c_s, c_t, c_1, k_s, k_t, k_1, TEACHER, LABELS, REVERSE, TAU)
    if TAIL > 0:
        more_s, more_1, more_t, more_a = _sums(
            tail_s, tail_t, c_s, c_t, c_1, k_s, k_t, k_1, TEACHER, LABELS, REVERSE, TAU
        )
        z_s, z_1, z_t, a = z_s + more_s, z_1 + more_1, z_t + more_t, a + more_a
    if PEEL:
        more_s, more_1, more_t, more_a = _sums(
            edge_s, edge_t, c_s, c_t, c_1, k_s, k_t, k_1, TEACHER, LABELS, REVERSE, TAU
        )
        z_s, z_1, z_t, a = z_s + more_s, z_1 + more_1, z_t + more_t, a + more_a
    difference = _finish(
        student, labels, kd, label, stats, rows, present, N, student_stride, ignore_index, tau_s, tau_t,
        m_s, m_t, z_s, z_1, z_t, a, V, TEACHER, LABELS, REVERSE,
    )  # fmt: skip

    if GRADIENT:
        q, p, one, index, onehot = _factors(
            labels, rows, present, ignore_index, weight * kd_weight, weight * label_weight, tau_t,
            z_s, z_1, z_t, difference, V, TEACHER, LABELS, REVERSE, TAU,
        )  # fmt: skip
        q, p, one, index, onehot = q[:, None], p[:, None], one[:, None], index[:, None], onehot[:, None]
        difference = difference[:, None]
        g = _gradient(
            s, t, start[:, None] + offsets, c_s, c_t, c_1, k_s, k_t, k_1, difference, q, p, one, index, onehot,
            TEACHER, LABELS, REVERSE, TAU,
        )  # fmt: skip
        pointers = _body_pointers(grad, rows, grad_stride, start, offsets, ALIGN)
        tl.store(pointers, g.to(grad.dtype.element_ty), mask=_inside(offsets, length, present, ALIGN))
        if TAIL > 0:
            g = _gradient(
                tail_s, tail_t, start[:, None] + tail_offsets, c_s, c_t, c_1, k_s, k_t, k_1, difference,
                q, p, one, index, onehot, TEACHER, LABELS, REVERSE, TAU,
            )  # fmt: skip
            pointers = _body_pointers(grad, rows, grad_stride, start, tail_offsets, ALIGN)
            tl.store(pointers, g.to(grad.dtype.element_ty), mask=_inside(tail_offsets, length, present, ALIGN))
        if PEEL:
            g = _gradient(
                edge_s, edge_t, edge_columns, c_s, c_t, c_1, k_s, k_t, k_1, difference, q, p, one, index, onehot,
                TEACHER, LABELS, REVERSE, TAU,
            )  # fmt: skip
            pointers = grad + (rows * grad_stride)[:, None] + edge_columns
            tl.store(pointers, g.to(grad.dtype.element_ty), mask=edge_inside)


@triton.jit
def _streaming_kernel(
    student, teacher, labels, kd, label, stats, student_tau, teacher_tau, N, student_stride, teacher_stride, ignore_index,
    V: tl.constexpr, TEACHER: tl.constexpr, LABELS: tl.constexpr, REVERSE: tl.constexpr, TAU: tl.constexpr,
    STUDENT_TAUS: tl.constexpr, TEACHER_TAUS: tl.constexpr, ALIGN: tl.constexpr, PEEL: tl.constexpr,
    LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Statistics and values of one row, read once.

    Each of LANES lanes keeps maxima and sums of its own over WIDTH adjacent columns at a time, the size of one load of a
    thread: the loop has no barrier and no exchange between threads.
    """
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    present = rows < N
    tau_s = _each(student_tau, 1, rows, present, STUDENT_TAUS)
    tau_t = _each(teacher_tau, 1, rows, present, TEACHER_TAUS)
    c_s, c_t, c_1 = _slope(tau_s), _slope(tau_t), LOG2_E
    start, length = _body(rows, student_stride, V, ALIGN, PEEL)
    tile = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    z_s = tl.zeros([LANES], tl.float32)
    z_1, z_t, a = z_s, z_s, z_s
    m_s, m_t = z_s + MIN_MAX, z_s + MIN_MAX
    if PEEL:
        columns, exists = _edge(tile, start[:, None], length[:, None], V)
        t = _load(student + (rows * student_stride)[:, None] + columns, exists)
        s = t
        if TEACHER:
            t = _load(teacher + (rows * teacher_stride)[:, None] + columns, exists)
        m_s, m_t, z_s, z_1, z_t, a = _merge(
            m_s, m_t, z_s, z_1, z_t, a, s, t, c_s, c_t, c_1, TEACHER, LABELS, REVERSE, TAU
        )
    for first in range(0, V, LANES * WIDTH):
        offsets = first + tile
        inside = _inside(offsets, length, present, ALIGN)
        t = _load(_body_pointers(student, rows, student_stride, start, offsets, ALIGN), inside)
        s = t
        if TEACHER:
            t = _load(_body_pointers(teacher, rows, teacher_stride, start, offsets, ALIGN), inside)
        m_s, m_t, z_s, z_1, z_t, a = _merge(
            m_s, m_t, z_s, z_1, z_t, a, s, t, c_s, c_t, c_1, TEACHER, LABELS, REVERSE, TAU
        )
    row_m_s, row_m_t = tl.max(m_s, 0, keep_dims=True), tl.max(m_t, 0, keep_dims=True)
    z_s, z_1, z_t, a = _shift(
        z_s, z_1, z_t, a, m_s * c_s - row_m_s * c_s, m_s * c_1 - row_m_s * c_1, m_t * c_t - row_m_t * c_t, REVERSE
    )
    z_s, z_1 = tl.sum(z_s, 0, keep_dims=True), tl.sum(z_1, 0, keep_dims=True)
    z_t, a = tl.sum(z_t, 0, keep_dims=True), tl.sum(a, 0, keep_dims=True)
    _finish(
        student, labels, kd, label, stats, rows, present, N, student_stride, ignore_index, tau_s, tau_t,
        row_m_s, row_m_t, z_s, z_1, z_t, a, V, TEACHER, LABELS, REVERSE,
    )  # fmt: skip


@triton.jit
def _gradient_kernel(
    student, teacher, labels, grad, stats, kd_upstream, label_upstream, student_tau, teacher_tau,
    N, student_stride, teacher_stride, grad_stride, kd_stride, label_stride, ignore_index,
    V: tl.constexpr, TEACHER: tl.constexpr, LABELS: tl.constexpr, REVERSE: tl.constexpr, TAU: tl.constexpr,
    STUDENT_TAUS: tl.constexpr, TEACHER_TAUS: tl.constexpr, ALIGN: tl.constexpr, PEEL: tl.constexpr,
    KD: tl.constexpr, LABEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of BLOCK columns of a row, elementwise from the row's statistics."""
    blocks: tl.constexpr = (V + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    rows = (program // blocks).to(tl.int64) + tl.arange(0, 1)
    block = program % blocks
    present = rows < N
    tau_s = _each(student_tau, 1, rows, present, STUDENT_TAUS)
    tau_t = _each(teacher_tau, 1, rows, present, TEACHER_TAUS)
    c_s, c_t, c_1 = _slope(tau_s)[:, None], _slope(tau_t)[:, None], LOG2_E
    kd_upstream = _each(kd_upstream, kd_stride, rows, present, KD)
    label_upstream = _each(label_upstream, label_stride, rows, present, LABEL)
    # A row that nothing comes from takes no part: it is read as one of -inf.
    taken = present & ((kd_upstream != 0) | (label_upstream != 0))
    stats += rows
    m_s, m_t = tl.load(stats, mask=taken, other=0.0)[:, None], tl.load(stats + 3 * N, mask=taken, other=0.0)[:, None]
    k_s, k_t, k_1 = m_s * c_s, m_t * c_t, m_s * c_1
    z_s, z_1 = tl.load(stats + N, mask=taken, other=0.0), tl.load(stats + 2 * N, mask=taken, other=0.0)
    z_t, difference = tl.load(stats + 4 * N, mask=taken, other=0.0), tl.load(stats + 5 * N, mask=taken, other=0.0)
    q, p, one, index, onehot = _factors(
        labels, rows, present, ignore_index, kd_upstream, label_upstream, tau_t, z_s, z_1, z_t, difference,
        V, TEACHER, LABELS, REVERSE, TAU,
    )  # fmt: skip
    q, p, one, index, onehot = q[:, None], p[:, None], one[:, None], index[:, None], onehot[:, None]
    difference = difference[:, None]

    start, length = _body(rows, student_stride, V, ALIGN, PEEL)
    offsets = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = _inside(offsets, length, taken, ALIGN)
    t = _load(_body_pointers(student, rows, student_stride, start, offsets, ALIGN), inside)
    s = t
    if TEACHER:
        t = _load(_body_pointers(teacher, rows, teacher_stride, start, offsets, ALIGN), inside)
    g = _gradient(
        s, t, start[:, None] + offsets, c_s, c_t, c_1, k_s, k_t, k_1, difference, q, p, one, index, onehot,
        TEACHER, LABELS, REVERSE, TAU,
    )  # fmt: skip
    pointers = _body_pointers(grad, rows, grad_stride, start, offsets, ALIGN)
    tl.store(pointers, g.to(grad.dtype.element_ty), mask=_inside(offsets, length, present, ALIGN))
    if PEEL:  # noqa: SIM102  (known at compile time; `and` is not)
        if block == 0:
            edge_columns, edge_inside = _edge(tl.arange(0, EDGE)[None, :], start[:, None], length[:, None], V)
            edge_t = _load(student + (rows * student_stride)[:, None] + edge_columns, edge_inside & taken[:, None])
            edge_s = edge_t
            if TEACHER:
                edge_t = _load(teacher + (rows * teacher_stride)[:, None] + edge_columns, edge_inside & taken[:, None])
            edge_g = _gradient(
                edge_s, edge_t, edge_columns, c_s, c_t, c_1, k_s, k_t, k_1, difference, q, p, one, index, onehot,
                TEACHER, LABELS, REVERSE, TAU,
            )  # fmt: skip
            edge_pointers = grad + (rows * grad_stride)[:, None] + edge_columns
            tl.store(edge_pointers, edge_g.to(grad.dtype.element_ty), mask=edge_inside)


@triton.jit
def _total_kernel(
    kd, label, row_weight, loss, kd_sum, label_sum, N, kd_weight, label_weight,
    WEIGHTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Weighted sums over the rows in a fixed order, by one program."""
    kd_total = tl.zeros([BLOCK], tl.float32)
    label_total = kd_total
    first = 0
    while first < N:  # the interpreter of Triton 3.6 has no `range` over numbers of the call
        rows = first + tl.arange(0, BLOCK)
        present = rows < N
        weight = _each(row_weight, 1, rows, present, WEIGHTS)
        # A row of weight zero takes no part, whatever its value.
        taken = present & (weight != 0)
        kd_total += weight * tl.load(kd + rows, mask=taken, other=0.0)
        label_total += weight * tl.load(label + rows, mask=taken, other=0.0)
        first += BLOCK
    kd_total, label_total = tl.sum(kd_total, 0), tl.sum(label_total, 0)
    tl.store(kd_sum, kd_total)
    tl.store(label_sum, label_total)
    # Nor does a term of weight zero.
    kd_part = tl.where(kd_weight == 0, 0.0, kd_weight * kd_total)
    tl.store(loss, kd_part + tl.where(label_weight == 0, 0.0, label_weight * label_total))


@triton.jit
def _scale_kernel(grad, upstream, size, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr):
    """grad *= upstream, a scalar on the device; nothing is read where it is 1."""
    factor = tl.load(upstream)
    if factor != 1.0:
        for block in range(tl.program_id(0), tl.cdiv(size, BLOCK), PROGRAMS):
            offsets = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            g = tl.load(grad + offsets, mask=offsets < size, other=0.0).to(tl.float32)
            tl.store(grad + offsets, (g * factor).to(grad.dtype.element_ty), mask=offsets < size)


# ---------------------------------------------------------------------------------------------------------------------
# Launches
# ---------------------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How the rows of a call are read; see the table at the head of this file."""

    rows: int  # a program; 0 for the streaming kernel
    block: int  # columns of a program's tile; streaming: lanes
    tail: int  # columns of its second tile
    warps: int
    blocks: int = 1  # in a cluster


STREAMING = Plan(rows=0, block=256, tail=0, warps=4)
MAX_RESIDENT = 16384
GRADIENT_BLOCK, GRADIENT_WARPS = 2048, 4
TOTAL_BLOCK = 1024
SCALE_BLOCK, SCALE_PROGRAMS = 4096, 1024


def plan(columns: int, *, second_exponential: bool = False) -> Plan:
    """What serves a call of this many columns; `second_exponential`: the label term needs one (TAU of the kernels is 0)."""
    elements_a_warp, largest = (512, MAX_RESIDENT // 2) if second_exponential else (1024, MAX_RESIDENT)
    if columns > largest:
        return STREAMING
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


def _plan(labels: torch.Tensor | None, options: Options) -> Plan:
    return plan(options.columns, second_exponential=labels is not None and _integer_tau(options) == 0)


def _flags(teacher: torch.Tensor | None, labels: torch.Tensor | None, options: Options) -> dict[str, Any]:
    taus = options.student_tau, options.teacher_tau
    return {
        "V": options.columns,
        "TEACHER": teacher is not None,
        "LABELS": labels is not None,
        "REVERSE": options.reverse,
        "TAU": _integer_tau(options),
        "STUDENT_TAUS": isinstance(taus[0], torch.Tensor),
        "TEACHER_TAUS": isinstance(taus[1], torch.Tensor),
    }


def statistics(
    student_NV: torch.Tensor, teacher_NV: torch.Tensor | None, labels_N: torch.Tensor | None, options: Options
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """kd_N, label_N and the seven statistics [7, N] of `Rows`, in float32."""
    return _forward(student_NV, teacher_NV, labels_N, options, _plan(labels_N, options))


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One read of the logits; a resident plan fills `grad_NV`, where given, with the gradient of the weighted sum."""
    student_NV = _readable(student_NV)
    teacher_NV = None if teacher_NV is None else _readable(teacher_NV)
    num_rows = student_NV.shape[0]
    kd_N, label_N = (torch.empty(num_rows, dtype=torch.float32, device=student_NV.device) for _ in range(2))
    stats = torch.empty((7, num_rows), dtype=torch.float32, device=student_NV.device)
    logits = [tensor for tensor in (student_NV, teacher_NV, grad_NV) if tensor is not None]
    flags = _flags(teacher_NV, labels_N, options) | _layout(options.columns, *logits)
    teacher = student_NV if teacher_NV is None else teacher_NV
    labels = stats if labels_N is None else labels_N.contiguous()
    with _device(student_NV):
        if chosen.rows == 0:
            assert grad_NV is None, "the streaming kernel leaves the gradient to `gradient`"
            _streaming_kernel[(num_rows,)](
                student_NV, teacher, labels, kd_N, label_N, stats, options.student_tau, options.teacher_tau,
                num_rows, student_NV.stride(0), teacher.stride(0), options.ignore_index,
                **flags, LANES=chosen.block, WIDTH=16 // max(tensor.element_size() for tensor in logits),
                num_warps=chosen.warps,
            )  # fmt: skip
        else:
            _resident_kernel[(triton.cdiv(num_rows, chosen.rows),)](
                student_NV, teacher, labels, student_NV if grad_NV is None else grad_NV, kd_N, label_N, stats,
                1.0 if row_weight_N is None else row_weight_N, options.student_tau, options.teacher_tau,
                num_rows, student_NV.stride(0), teacher.stride(0), 0 if grad_NV is None else grad_NV.stride(0),
                options.ignore_index, kd_weight, label_weight,
                **flags, WEIGHTS=row_weight_N is not None, GRADIENT=grad_NV is not None,
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
            kd_upstream, label_upstream, options.student_tau, options.teacher_tau,
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
    chosen = chosen or _plan(labels_N, options)
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
