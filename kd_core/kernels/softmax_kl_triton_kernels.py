"""The kernels of softmax_kl_triton.py, which launches them: what is done with a tile of a row, and with whole rows.

Rows that are -inf, and columns that are -inf on either side, need no mask: maxima start at a finite number, so that an
exponent is -inf or finite, and a product with a probability of zero is dropped by a select.

One-pass statistics with running maxima, and gradients from saved row sums, are those of online softmax (Milakov and
Gimelshein, arXiv 1805.02867) extended to the KL: a shift of the maxima moves its sum by
Z_t (delta_t - delta_s), see `_merge`. What js needs is derived at the head of softmax_kl_torch.py.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
MIN_MAX = tl.constexpr(-1e30)  # a row maximum below this is that of a row of -inf
MIN_PROBABILITY = tl.constexpr(1e-30)  # of a mixture: below it nothing counts
EDGE = tl.constexpr(16)  # 8 lanes before the body, 8 after it


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
def _load_sides(student, teacher, inside, share, TEACHER: tl.constexpr, MIX: tl.constexpr):
    """Logits of the student and of the target, which is s + share * (t - s): exactly either's where they are equal."""
    s = _load(student, inside)
    t = s
    if TEACHER:
        t = _load(teacher, inside)
        if MIX:
            # Where s is -inf the difference is infinite or undefined. At the ends it is one side, whatever the other holds.
            mixed = tl.where(s == -float("inf"), s + t, tl.fma(share, t - s, s))
            t = tl.where(share == 0, s, tl.where(share == 1, t, mixed))
    return s, t


@triton.jit
def _load_body(
    student, teacher, rows, student_stride, teacher_stride, start, offsets, inside, share,
    TEACHER: tl.constexpr, MIX: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    return _load_sides(
        _body_pointers(student, rows, student_stride, start, offsets, ALIGN),
        _body_pointers(teacher, rows, teacher_stride, start, offsets, ALIGN),
        inside, share, TEACHER, MIX,
    )  # fmt: skip


@triton.jit
def _load_columns(
    student, teacher, rows, student_stride, teacher_stride, columns, inside, share,
    TEACHER: tl.constexpr, MIX: tl.constexpr,
):  # fmt: skip
    return _load_sides(
        student + (rows * student_stride)[:, None] + columns,
        teacher + (rows * teacher_stride)[:, None] + columns,
        inside, share, TEACHER, MIX,
    )  # fmt: skip


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
    s, t, c_s, c_t, c_1, k_s, k_t, k_1, TEACHER: tl.constexpr, LABELS: tl.constexpr, DIRECTION: tl.constexpr, TAU: tl.constexpr
):  # fmt: skip
    """Sums over the columns of a tile: z_s, z_1, z_t and a, the sum of e_t (v - u), in reverse of e_s (u - v); js: no a."""
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
        if DIRECTION == "reverse":
            a = tl.sum(tl.where(e_s > 0, e_s * (u - v), 0.0), 1)
        if DIRECTION == "forward":
            a = tl.sum(tl.where(e_t > 0, e_t * (v - u), 0.0), 1)
    return z_s, z_1, z_t, a


@triton.jit
def _shift(z_s, z_1, z_t, a, delta_s, delta_1, delta_t, DIRECTION: tl.constexpr):
    """Sums relative to new maxima; each delta is the old shift less the new one, in exponents of 2."""
    scale_s, scale_t = tl.exp2(delta_s), tl.exp2(delta_t)
    if DIRECTION == "reverse":
        a = tl.where(scale_s > 0, scale_s * (a + z_s * (delta_s - delta_t)), 0.0)
    if DIRECTION == "forward":
        a = tl.where(scale_t > 0, scale_t * (a + z_t * (delta_t - delta_s)), 0.0)
    return z_s * scale_s, z_1 * tl.exp2(delta_1), z_t * scale_t, a


@triton.jit
def _merge(
    m_s, m_t, z_s, z_1, z_t, a, s, t, c_s, c_t, c_1,
    TEACHER: tl.constexpr, LABELS: tl.constexpr, DIRECTION: tl.constexpr, TAU: tl.constexpr,
):  # fmt: skip
    """Running maxima and sums, [R], after one more tile."""
    new_m_s, new_m_t = tl.maximum(m_s, tl.max(s, 1)), m_t
    if TEACHER:
        new_m_t = tl.maximum(m_t, tl.max(t, 1))
    # Shifts are the products themselves, rounded once: all terms of a sum use the same one, so its error cancels.
    k_s, k_t, k_1 = new_m_s * c_s, new_m_t * c_t, new_m_s * c_1
    z_s, z_1, z_t, a = _shift(z_s, z_1, z_t, a, m_s * c_s - k_s, m_s * c_1 - k_1, m_t * c_t - k_t, DIRECTION)
    more_s, more_1, more_t, more_a = _sums(
        s, t, c_s[:, None], c_t[:, None], c_1, k_s[:, None], k_t[:, None], k_1[:, None], TEACHER, LABELS, DIRECTION, TAU
    )
    return new_m_s, new_m_t, z_s + more_s, z_1 + more_1, z_t + more_t, a + more_a


@triton.jit
def _log2_of_1_plus(z):
    """Within 4e-7 of itself, also where z is small; for 1 + z below 2^-23 that of 2^-23. As in vectors.h."""
    total = tl.maximum(1.0 + z, 1.1920928955078125e-07)
    bits = total.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F2AAAAB) >> 23  # total / 2^exponent is in [2/3, 4/3)
    reduced = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    f = tl.where(exponent == 0, z, reduced)  # 1 + z has rounded z
    # A minimax fit of log2(1 + f) / f for f in [-1/3, 1/3].
    value = tl.fma(f, -0.22167724370956421, 0.24686215817928314)
    value = tl.fma(f, value, -0.23689232766628265)
    value = tl.fma(f, value, 0.28558203577995300)
    value = tl.fma(f, value, -0.36078369617462158)
    value = tl.fma(f, value, 0.48096549510955811)
    value = tl.fma(f, value, -0.72134661674499512)
    value = tl.fma(f, value, 1.44269478321075440)
    return tl.fma(f, value, exponent.to(tl.float32))


@triton.jit
def _ratio(z_s, z_t):
    """What q is compared with is e_t times this, as q is e_s; zero where either side is -inf throughout."""
    empty = (z_s == 0) | (z_t == 0)
    return tl.where(empty, 0.0, tl.div_rn(z_s, tl.where(empty, 1.0, z_t)))  # exactly 1 for equal sums


@triton.jit
def _skew(e_s, e_t, ratio, beta):
    """(p - q) / (beta p + (1 - beta) q), zero where both are."""
    gap = tl.fma(e_t, ratio, -e_s)
    return gap / tl.maximum(tl.fma(gap, beta, e_s), MIN_PROBABILITY)


@triton.jit
def _mixture_sums(s, t, c_s, c_t, k_s, k_t, ratio, beta, rest):
    """Sums over the columns of a tile, of which z_s is the whole: of q log2(q / m) and of p log2(p / m)."""
    e_s, e_t = tl.exp2(tl.fma(s, c_s, -k_s)), tl.exp2(tl.fma(t, c_t, -k_t))
    skew = _skew(e_s, e_t, ratio, beta)
    return tl.sum(e_s * _log2_of_1_plus(-beta * skew), 1), tl.sum(e_t * ratio * _log2_of_1_plus(rest * skew), 1)


@triton.jit
def _mean(total, z):
    return tl.where(z == 0, 0.0, total / z)


@triton.jit
def _finish(
    student, labels, kd, label, stats, rows, present, N, stride, ignore_index, tau_s, tau_t, m_s, m_t, z_s, z_1, z_t, a, b,
    beta, rest,
    V: tl.constexpr, TEACHER: tl.constexpr, LABELS: tl.constexpr, DIRECTION: tl.constexpr,
):  # fmt: skip
    """Writes the rows' values and statistics; returns the mean difference."""
    difference = tl.zeros(rows.shape, tl.float32)
    teacher_difference, value = difference, difference
    if TEACHER:
        if DIRECTION == "js":
            difference, teacher_difference = _mean(a, z_s), _mean(b, z_s)
            value = difference / beta + teacher_difference / rest
        elif DIRECTION == "reverse":
            difference = a / z_s
            value = difference - tl.log2(z_s / z_t)
        else:
            difference = a / z_t
            value = difference + tl.log2(z_s / z_t)
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
    tl.store(stats + 7 * N, teacher_difference, mask=present)
    return difference


@triton.jit
def _factors(
    labels, rows, present, ignore_index, kd_upstream, label_upstream, tau_t, z_s, z_1, z_t, difference, beta,
    V: tl.constexpr, TEACHER: tl.constexpr, LABELS: tl.constexpr, DIRECTION: tl.constexpr, TAU: tl.constexpr,
):  # fmt: skip
    """[R] each: factors of e_s, e_t and e_1 in the gradient, the label's column, and what is subtracted there.

    js has its gradient as a factor of e_s, in which p, e_t times its own factor, is compared with e_s.
    """
    q = tl.zeros(rows.shape, tl.float32)
    p, one, onehot = q, q, q
    index = tl.zeros(rows.shape, tl.int32) - 1
    if TEACHER:
        empty = (z_s == 0) | (z_t == 0)
        q = tl.where(empty, 0.0, kd_upstream * tau_t / z_s)
        p = tl.where(empty, 0.0, kd_upstream * tau_t / z_t)
        if DIRECTION == "reverse":
            q = tl.where(difference == float("inf"), 0.0, q * LN_2)  # an infinite KL has no derivative
        if DIRECTION == "js":
            q, p = q * (LN_2 / beta), _ratio(z_s, z_t)
        if DIRECTION != "forward":
            q = tl.where(z_t != z_t, float("nan"), q)  # `_gradient` hides it
    if LABELS:
        label = tl.load(labels + rows, mask=present, other=0)
        without = (label == ignore_index) | (z_1 == 0)
        one = tl.where(without, 0.0, label_upstream / z_1)
        onehot = tl.where(without, 0.0, label_upstream)
        index = tl.where((label >= 0) & (label < V), label, -1).to(tl.int32)
        # One multiplication serves both terms where both have the student's softmax as a summand.
        if TAU == 1 and (not TEACHER or DIRECTION == "forward"):
            q += one
    return q, p, one, index, onehot


@triton.jit
def _gradient(
    s, t, columns, c_s, c_t, c_1, k_s, k_t, k_1, difference, q, p, one, index, onehot, beta,
    TEACHER: tl.constexpr, LABELS: tl.constexpr, DIRECTION: tl.constexpr, TAU: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile in float32."""
    u = tl.fma(s, c_s, -k_s)
    e_s = tl.exp2(u)
    g = q * e_s
    if TEACHER:
        v = tl.fma(t, c_t, -k_t)
        if DIRECTION == "reverse":
            g = tl.where(g != 0, g * (u - v - difference), 0.0)
        elif DIRECTION == "js":
            g *= _log2_of_1_plus(-beta * _skew(e_s, tl.exp2(v), p, beta)) - difference
        else:
            g = tl.fma(-p, tl.exp2(v), g)
    if LABELS:
        if TAU != 1 or (TEACHER and DIRECTION != "forward"):
            g = tl.fma(one, _label_exp(s, e_s, c_1, k_1, TAU), g)
        g = tl.where(columns == index, g - onehot, g)
    return g


# ---------------------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _resident_kernel(
    student, teacher, labels, grad, kd, label, stats, row_weight, student_tau, teacher_tau, mix, beta, rest,
    N, student_stride, teacher_stride, grad_stride, ignore_index, kd_weight, label_weight,
    V: tl.constexpr, TEACHER: tl.constexpr, LABELS: tl.constexpr, DIRECTION: tl.constexpr, TAU: tl.constexpr,
    STUDENT_TAUS: tl.constexpr, TEACHER_TAUS: tl.constexpr, MIX: tl.constexpr, MIXES: tl.constexpr, ALIGN: tl.constexpr, PEEL: tl.constexpr,
    WEIGHTS: tl.constexpr, GRADIENT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Statistics and values of ROWS rows held in registers, and with GRADIENT their gradient: one read of the logits."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    present = rows < N
    weight = _each(row_weight, 1, rows, present, WEIGHTS)
    taken = present & (weight != 0)  # a row of weight 0 takes no part: it is read as one of -inf
    tau_s = _each(student_tau, 1, rows, present, STUDENT_TAUS)
    tau_t = _each(teacher_tau, 1, rows, present, TEACHER_TAUS)
    share = _each(mix, 1, rows, present, MIXES)[:, None]
    c_s, c_t, c_1 = _slope(tau_s)[:, None], _slope(tau_t)[:, None], LOG2_E

    # Up to three tiles: BLOCK columns, TAIL columns after them, and the edge.
    start, length = _body(rows, student_stride, V, ALIGN, PEEL)
    offsets = tl.arange(0, BLOCK)[None, :]
    inside = _inside(offsets, length, taken, ALIGN)
    s, t = _load_body(
        student, teacher, rows, student_stride, teacher_stride, start, offsets, inside, share, TEACHER, MIX, ALIGN
    )
    m_s, m_t = tl.maximum(tl.max(s, 1), MIN_MAX), tl.maximum(tl.max(t, 1), MIN_MAX)
    if TAIL > 0:
        tail_offsets = BLOCK + tl.arange(0, TAIL)[None, :]
        tail_inside = _inside(tail_offsets, length, taken, ALIGN)
        tail_s, tail_t = _load_body(
            student, teacher, rows, student_stride, teacher_stride, start, tail_offsets, tail_inside, share,
            TEACHER, MIX, ALIGN,
        )  # fmt: skip
        m_s, m_t = tl.maximum(m_s, tl.max(tail_s, 1)), tl.maximum(m_t, tl.max(tail_t, 1))
    if PEEL:
        edge_columns, edge_inside = _edge(tl.arange(0, EDGE)[None, :], start[:, None], length[:, None], V)
        edge_taken, edge_inside = edge_inside & taken[:, None], edge_inside & present[:, None]
        edge_s, edge_t = _load_columns(
            student, teacher, rows, student_stride, teacher_stride, edge_columns, edge_taken, share, TEACHER, MIX
        )
        m_s, m_t = tl.maximum(m_s, tl.max(edge_s, 1)), tl.maximum(m_t, tl.max(edge_t, 1))

    k_s, k_t, k_1 = m_s[:, None] * c_s, m_t[:, None] * c_t, m_s[:, None] * c_1
    z_s, z_1, z_t, a = _sums(s, t, c_s, c_t, c_1, k_s, k_t, k_1, TEACHER, LABELS, DIRECTION, TAU)
    if TAIL > 0:
        more_s, more_1, more_t, more_a = _sums(
            tail_s, tail_t, c_s, c_t, c_1, k_s, k_t, k_1, TEACHER, LABELS, DIRECTION, TAU
        )
        z_s, z_1, z_t, a = z_s + more_s, z_1 + more_1, z_t + more_t, a + more_a
    if PEEL:
        more_s, more_1, more_t, more_a = _sums(
            edge_s, edge_t, c_s, c_t, c_1, k_s, k_t, k_1, TEACHER, LABELS, DIRECTION, TAU
        )
        z_s, z_1, z_t, a = z_s + more_s, z_1 + more_1, z_t + more_t, a + more_a
    b = a
    if TEACHER and DIRECTION == "js":
        ratio = _ratio(z_s, z_t)[:, None]
        a, b = _mixture_sums(s, t, c_s, c_t, k_s, k_t, ratio, beta, rest)
        if TAIL > 0:
            more_a, more_b = _mixture_sums(tail_s, tail_t, c_s, c_t, k_s, k_t, ratio, beta, rest)
            a, b = a + more_a, b + more_b
        if PEEL:
            more_a, more_b = _mixture_sums(edge_s, edge_t, c_s, c_t, k_s, k_t, ratio, beta, rest)
            a, b = a + more_a, b + more_b
    difference = _finish(
        student, labels, kd, label, stats, rows, present, N, student_stride, ignore_index, tau_s, tau_t,
        m_s, m_t, z_s, z_1, z_t, a, b, beta, rest, V, TEACHER, LABELS, DIRECTION,
    )  # fmt: skip

    if GRADIENT:
        q, p, one, index, onehot = _factors(
            labels, rows, present, ignore_index, weight * kd_weight, weight * label_weight, tau_t,
            z_s, z_1, z_t, difference, beta, V, TEACHER, LABELS, DIRECTION, TAU,
        )  # fmt: skip
        q, p, one, index, onehot = q[:, None], p[:, None], one[:, None], index[:, None], onehot[:, None]
        difference = difference[:, None]
        g = _gradient(
            s, t, start[:, None] + offsets, c_s, c_t, c_1, k_s, k_t, k_1, difference, q, p, one, index, onehot, beta,
            TEACHER, LABELS, DIRECTION, TAU,
        )  # fmt: skip
        pointers = _body_pointers(grad, rows, grad_stride, start, offsets, ALIGN)
        tl.store(pointers, g.to(grad.dtype.element_ty), mask=_inside(offsets, length, present, ALIGN))
        if TAIL > 0:
            g = _gradient(
                tail_s, tail_t, start[:, None] + tail_offsets, c_s, c_t, c_1, k_s, k_t, k_1, difference,
                q, p, one, index, onehot, beta, TEACHER, LABELS, DIRECTION, TAU,
            )  # fmt: skip
            pointers = _body_pointers(grad, rows, grad_stride, start, tail_offsets, ALIGN)
            tl.store(pointers, g.to(grad.dtype.element_ty), mask=_inside(tail_offsets, length, present, ALIGN))
        if PEEL:
            g = _gradient(
                edge_s, edge_t, edge_columns, c_s, c_t, c_1, k_s, k_t, k_1, difference, q, p, one, index, onehot, beta,
                TEACHER, LABELS, DIRECTION, TAU,
            )  # fmt: skip
            pointers = grad + (rows * grad_stride)[:, None] + edge_columns
            tl.store(pointers, g.to(grad.dtype.element_ty), mask=edge_inside)


@triton.jit
def _streaming_kernel(
    student, teacher, labels, kd, label, stats, student_tau, teacher_tau, mix, beta, rest,
    N, student_stride, teacher_stride, ignore_index,
    V: tl.constexpr, TEACHER: tl.constexpr, LABELS: tl.constexpr, DIRECTION: tl.constexpr, TAU: tl.constexpr,
    STUDENT_TAUS: tl.constexpr, TEACHER_TAUS: tl.constexpr, MIX: tl.constexpr, MIXES: tl.constexpr,
    ALIGN: tl.constexpr, PEEL: tl.constexpr,
    SUMS: tl.constexpr, MIXTURE: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Statistics and values of one row, read once, and for MIXTURE once more from its end: what js has of the mixture.

    Each of LANES lanes keeps maxima and sums of its own over WIDTH adjacent columns at a time, the size of one load of a
    thread: the loops have no barrier and no exchange between threads. Without SUMS the first turn's are those in `stats`.
    """
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    present = rows < N
    tau_s = _each(student_tau, 1, rows, present, STUDENT_TAUS)
    tau_t = _each(teacher_tau, 1, rows, present, TEACHER_TAUS)
    share = _each(mix, 1, rows, present, MIXES)[:, None]
    c_s, c_t, c_1 = _slope(tau_s), _slope(tau_t), LOG2_E
    start, length = _body(rows, student_stride, V, ALIGN, PEEL)
    tile = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    a = tl.zeros([LANES], tl.float32)
    b = a
    if PEEL:
        columns, exists = _edge(tile, start[:, None], length[:, None], V)
        edge_s, edge_t = _load_columns(
            student, teacher, rows, student_stride, teacher_stride, columns, exists, share, TEACHER, MIX
        )
    if SUMS:
        z_s, z_1, z_t = a, a, a
        m_s, m_t = a + MIN_MAX, a + MIN_MAX
        if PEEL:
            m_s, m_t, z_s, z_1, z_t, a = _merge(
                m_s, m_t, z_s, z_1, z_t, a, edge_s, edge_t, c_s, c_t, c_1, TEACHER, LABELS, DIRECTION, TAU
            )
        for first in range(0, V, LANES * WIDTH):
            offsets = first + tile
            inside = _inside(offsets, length, present, ALIGN)
            s, t = _load_body(
                student,
                teacher,
                rows,
                student_stride,
                teacher_stride,
                start,
                offsets,
                inside,
                share,
                TEACHER,
                MIX,
                ALIGN,
            )
            m_s, m_t, z_s, z_1, z_t, a = _merge(
                m_s, m_t, z_s, z_1, z_t, a, s, t, c_s, c_t, c_1, TEACHER, LABELS, DIRECTION, TAU
            )
        row_m_s, row_m_t = tl.max(m_s, 0, keep_dims=True), tl.max(m_t, 0, keep_dims=True)
        z_s, z_1, z_t, a = _shift(
            z_s, z_1, z_t, a, m_s * c_s - row_m_s * c_s, m_s * c_1 - row_m_s * c_1, m_t * c_t - row_m_t * c_t, DIRECTION
        )
        z_s, z_1 = tl.sum(z_s, 0, keep_dims=True), tl.sum(z_1, 0, keep_dims=True)
        z_t = tl.sum(z_t, 0, keep_dims=True)
    else:
        row_m_s, row_m_t = tl.load(stats + rows), tl.load(stats + 3 * N + rows)
        z_s, z_1, z_t = tl.load(stats + N + rows), tl.load(stats + 2 * N + rows), tl.load(stats + 4 * N + rows)
    if MIXTURE:
        ratio = _ratio(z_s, z_t)[:, None]
        k_s, k_t = (row_m_s * c_s)[:, None], (row_m_t * c_t)[:, None]
        c_s, c_t = c_s[:, None], c_t[:, None]
        a = b
        if PEEL:
            a, b = _mixture_sums(edge_s, edge_t, c_s, c_t, k_s, k_t, ratio, beta, rest)
        last: tl.constexpr = (V - 1) // (LANES * WIDTH) * (LANES * WIDTH)
        for first in range(0, V, LANES * WIDTH):
            offsets = last - first + tile
            inside = _inside(offsets, length, present, ALIGN)
            s, t = _load_body(
                student,
                teacher,
                rows,
                student_stride,
                teacher_stride,
                start,
                offsets,
                inside,
                share,
                TEACHER,
                MIX,
                ALIGN,
            )
            more_a, more_b = _mixture_sums(s, t, c_s, c_t, k_s, k_t, ratio, beta, rest)
            a, b = a + more_a, b + more_b
    a, b = tl.sum(a, 0, keep_dims=True), tl.sum(b, 0, keep_dims=True)
    if SUMS:
        _finish(
            student, labels, kd, label, stats, rows, present, N, student_stride, ignore_index, tau_s, tau_t,
            row_m_s, row_m_t, z_s, z_1, z_t, a, b, beta, rest, V, TEACHER, LABELS, DIRECTION,
        )  # fmt: skip
    else:
        tl.store(stats + 5 * N + rows, _mean(a, z_s))
        tl.store(stats + 7 * N + rows, _mean(b, z_s))


@triton.jit
def _gradient_kernel(
    student, teacher, labels, grad, stats, kd_upstream, label_upstream, student_tau, teacher_tau, mix, beta,
    N, student_stride, teacher_stride, grad_stride, kd_stride, label_stride, ignore_index,
    V: tl.constexpr, TEACHER: tl.constexpr, LABELS: tl.constexpr, DIRECTION: tl.constexpr, TAU: tl.constexpr,
    STUDENT_TAUS: tl.constexpr, TEACHER_TAUS: tl.constexpr, MIX: tl.constexpr, MIXES: tl.constexpr,
    ALIGN: tl.constexpr, PEEL: tl.constexpr,
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
    share = _each(mix, 1, rows, present, MIXES)[:, None]
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
        labels, rows, present, ignore_index, kd_upstream, label_upstream, tau_t, z_s, z_1, z_t, difference, beta,
        V, TEACHER, LABELS, DIRECTION, TAU,
    )  # fmt: skip
    q, p, one, index, onehot = q[:, None], p[:, None], one[:, None], index[:, None], onehot[:, None]
    difference = difference[:, None]

    start, length = _body(rows, student_stride, V, ALIGN, PEEL)
    offsets = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = _inside(offsets, length, taken, ALIGN)
    s, t = _load_body(
        student, teacher, rows, student_stride, teacher_stride, start, offsets, inside, share, TEACHER, MIX, ALIGN
    )
    g = _gradient(
        s, t, start[:, None] + offsets, c_s, c_t, c_1, k_s, k_t, k_1, difference, q, p, one, index, onehot, beta,
        TEACHER, LABELS, DIRECTION, TAU,
    )  # fmt: skip
    pointers = _body_pointers(grad, rows, grad_stride, start, offsets, ALIGN)
    tl.store(pointers, g.to(grad.dtype.element_ty), mask=_inside(offsets, length, present, ALIGN))
    if PEEL:  # noqa: SIM102  (known at compile time; `and` is not)
        if block == 0:
            edge_columns, edge_inside = _edge(tl.arange(0, EDGE)[None, :], start[:, None], length[:, None], V)
            edge_s, edge_t = _load_columns(
                student, teacher, rows, student_stride, teacher_stride, edge_columns, edge_inside & taken[:, None], share,
                TEACHER, MIX,
            )  # fmt: skip
            edge_g = _gradient(
                edge_s, edge_t, edge_columns, c_s, c_t, c_1, k_s, k_t, k_1, difference, q, p, one, index, onehot, beta,
                TEACHER, LABELS, DIRECTION, TAU,
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
