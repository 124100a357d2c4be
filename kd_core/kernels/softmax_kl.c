// softmax_kl on a CPU: `statistics` and `gradient` of softmax_kl_torch.py, a row at a time. softmax_kl_native.py compiles it.
//
// A row is read once a pass, at the speed of memory. The first pass works with a shift that is near the maximum instead of
// the maximum, which would have to be known before: should a block of the row exceed the shift by MAX_EXCESS, the sums so far
// are moved to a larger shift and the block is taken again. In the end the sums are moved to the maximum of the row.
//
// Exponents are u = logit * slope - shift, one fused multiply-add, with slope = log2(e) / tau and shift = max * slope rounded
// to float. That rounding is the same for all elements of a row and its sums, so it cancels.
//
// Compile with contraction of a * b + c to a fused multiply-add, which the accuracy of u depends on.

#include <math.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512DQ__
#include <immintrin.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#if defined(__AVX512DQ__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#define INLINE static inline __attribute__((always_inline))

enum { BLOCK = 1024, EDGE = 2 * LANES };
enum dtype { FLOAT32, BFLOAT16, FLOAT16 };
enum kind { NO_TEACHER, FORWARD, REVERSE };
// The student's exponentials at temperature 1 are this power of those at its temperature. SAME also where there are no
// labels; OWN at temperatures where they are none of these powers. Slope and shift of both are exact multiples then.
enum power { OWN = 0, SAME = 1, SQUARE = 2, FOURTH = 4, EIGHTH = 8 };

static const float MIN_MAX = -1e30f;   // a row maximum below this is that of a row of -inf
static const float MAX_EXCESS = 4.0f;  // in units of log 2: exponents stay small, and so do their rounding errors
static const float MAX_LABEL_EXCESS = 64.0f;  // at temperature 1, where high temperatures let it grow: far from overflow
static const double LOG2_E = 1.44269504088896340736;
static const double LN_2 = 0.69314718055994530942;

// ---------------------------------------------------------------------------------------------------------------------
// The call: softmax_kl_native.py has the same structures
// ---------------------------------------------------------------------------------------------------------------------

struct matrix {
    char *data;  // NULL: absent
    int64_t row_bytes;
    int64_t dtype;
};

struct vector {
    const void *data;  // NULL: absent
    int64_t step;      // in elements; 0: one number for all rows
};

struct call {
    struct matrix student, teacher, gradient;
    struct vector labels;                        // int64
    struct vector student_tau, teacher_tau;      // double
    struct vector kd_upstream, label_upstream;   // float
    float *statistics;                           // [7, rows], in the order of Rows
    int64_t rows, columns, ignore_index, with_statistics, reverse, rows_at_once;
    _Atomic int64_t next_row;
};

// ---------------------------------------------------------------------------------------------------------------------
// Vectors of LANES floats
// ---------------------------------------------------------------------------------------------------------------------

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float loose_vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

INLINE vec load(const float *from) { return *(const loose_vec *)from; }
INLINE void store(float *to, vec value) { *(loose_vec *)to = value; }
INLINE vec splat(float value) { return value - (vec){0.0f}; }

INLINE float sum_of_lanes(vec value) {
    float sum = 0.0f;
    for (int lane = 0; lane < LANES; lane++) sum += value[lane];
    return sum;
}

INLINE float max_of_lanes(vec value) {
    float max = value[0];
    for (int lane = 1; lane < LANES; lane++) max = value[lane] > max ? value[lane] : max;
    return max;
}

// 2^f for f in [0, 1) or [-0.5, 0.5], exact at zero: the coefficients are a minimax fit for the interval.
INLINE vec polynomial(vec f, const float coefficients[5]) {
    vec value = splat(coefficients[4]);
    for (int i = 3; i >= 0; i--) value = value * f + coefficients[i];
    return value * f + 1.0f;
}

#ifdef __AVX512DQ__

// x, or max where x is smaller or NaN.
INLINE vec larger(vec x, vec max) { return _mm512_max_ps(x, max); }

// sum + weight * x, but sum where the weight is zero or NaN, whatever x.
INLINE vec add_weighted(vec sum, vec weight, vec x) {
    return _mm512_mask3_fmadd_ps(weight, x, sum, _mm512_cmp_ps_mask(weight, _mm512_setzero_ps(), _CMP_GT_OQ));
}

INLINE vec zero_unless_finite(vec x) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x - x, _mm512_setzero_ps(), _CMP_EQ_OQ), x);
}

// 2^u within 1e-7: 0 for -inf, NaN for NaN.
INLINE vec exp2_of(vec u) {
    static const float c[5] = {0x1.62e4bap-1f, 0x1.ebdb56p-3f, 0x1.c91ce6p-5f, 0x1.277856p-7f, 0x1.e974fap-10f};
    vec fraction = _mm512_reduce_ps(u, _MM_FROUND_TO_NEG_INF);  // of -inf it is 0
    return _mm512_scalef_ps(polynomial(fraction, c), u);
}

#else

typedef int32_t int_vec __attribute__((vector_size(4 * LANES)));

// x, or max where x is smaller or NaN.
INLINE vec larger(vec x, vec max) {
    int_vec is_larger = x > max;
    return (vec)(((int_vec)x & is_larger) | ((int_vec)max & ~is_larger));
}

// sum + weight * x, but sum where the weight is zero or NaN, whatever x.
INLINE vec add_weighted(vec sum, vec weight, vec x) {
    return sum + (vec)((int_vec)(weight * x) & (int_vec)(weight > 0.0f));
}

INLINE vec zero_unless_finite(vec x) { return (vec)((int_vec)x & (int_vec)(x - x == 0.0f)); }

// 2^u within 1e-7, for u < 128: 0 for -inf and below the normal numbers, NaN for NaN.
INLINE vec exp2_of(vec u) {
    static const float c[5] = {0x1.62e42ap-1f, 0x1.ebf9bcp-3f, 0x1.c6b752p-5f, 0x1.3cea88p-7f, 0x1.5bba14p-10f};
    // Adding this rounds u to an integer and leaves integer + 127 in the low bits, where the exponent of 2^integer is.
    const float to_integer = 0x1.8p23f + 127.0f;
    vec biased = u + to_integer;
    vec value = polynomial(u - (biased - to_integer), c) * (vec)((int_vec)biased << 23);
    return (vec)((int_vec)value & ~(int_vec)(u < -126.0f));
}

#endif

INLINE vec power_of(vec x, enum power power) {
    vec square = x * x;
    switch (power) {
        case FOURTH: return square * square;
        case EIGHTH: return square * square * (square * square);
        default: return square;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Elements of a row as float, and back
// ---------------------------------------------------------------------------------------------------------------------

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE float from_bfloat16(uint16_t bits) { return float_of((uint32_t)bits << 16); }

INLINE float from_float16(uint16_t half) {
    // The exponent's bias grows by 112; infinities and NaN need the rest of its bits.
    float magnitude = float_of((uint32_t)(half & 0x7fff) << 13) * 0x1p112f;
    uint32_t bits = bits_of(magnitude) | (magnitude >= 65536.0f ? 0x7f800000u : 0u);
    return float_of(bits | (uint32_t)(half & 0x8000) << 16);
}

INLINE uint16_t to_bfloat16(float value) {
    uint32_t bits = bits_of(value), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)(value == value ? rounded : 0x7fc0u);
}

INLINE uint16_t to_float16(float value) {
    uint32_t bits = bits_of(value) & 0x7fffffff, sign = (bits_of(value) >> 16) & 0x8000;
    uint32_t normal = ((bits + 0xfff + ((bits >> 13) & 1)) >> 13) - (112 << 10);
    normal = bits >= 0x47800000 || normal > 0x7c00 ? 0x7c00 : normal;
    // The last place of 0.5 is that of the subnormal numbers.
    uint32_t subnormal = bits_of(float_of(bits) + 0.5f) - bits_of(0.5f);
    uint32_t half = bits < 0x38800000 ? subnormal : normal;
    return (uint16_t)(sign | (bits > 0x7f800000 ? 0x7e00 : half));
}

static int64_t element_bytes(int64_t dtype) { return dtype == FLOAT32 ? 4 : 2; }

static char *element(const struct matrix *matrix, int64_t row, int64_t column) {
    return matrix->data + row * matrix->row_bytes + column * element_bytes(matrix->dtype);
}

static void to_floats(const void *from, int64_t dtype, int64_t count, float *restrict to) {
    const uint16_t *restrict halves = from;
    if (dtype == FLOAT32) memcpy(to, from, 4 * count);
    else if (dtype == BFLOAT16) for (int64_t i = 0; i < count; i++) to[i] = from_bfloat16(halves[i]);
    else for (int64_t i = 0; i < count; i++) to[i] = from_float16(halves[i]);
}

static void from_floats(const float *restrict from, int64_t dtype, int64_t count, void *to) {
    uint16_t *restrict halves = to;
    if (dtype == FLOAT32) memcpy(to, from, 4 * count);
    else if (dtype == BFLOAT16) for (int64_t i = 0; i < count; i++) halves[i] = to_bfloat16(from[i]);
    else for (int64_t i = 0; i < count; i++) halves[i] = to_float16(from[i]);
}

// ---------------------------------------------------------------------------------------------------------------------
// A row in blocks: BLOCK elements each, aligned, and at last the edge, which is what is left before and after them
// ---------------------------------------------------------------------------------------------------------------------

struct layout {
    int64_t before, body, after;  // numbers of elements; those of the body are a multiple of LANES
};

// Elements of two ranges of columns, one after the other, and then up to `padded` elements of -inf, which take no part.
struct block {
    int64_t first, count, second, second_count, padded;
};

static struct layout layout_of(const struct call *call, int64_t row) {
    int64_t misaligned = (intptr_t)element(&call->student, row, 0) / 4 % LANES;
    int64_t before = call->student.dtype != FLOAT32 || misaligned == 0 ? 0 : LANES - misaligned;
    if (before > call->columns) before = call->columns;
    int64_t after = (call->columns - before) % LANES;
    return (struct layout){before, call->columns - before - after, after};
}

static int64_t body_blocks(struct layout layout) { return (layout.body + BLOCK - 1) / BLOCK; }
static int64_t num_blocks(struct layout layout) { return body_blocks(layout) + (layout.before + layout.after > 0); }

static struct block block_of(struct layout layout, int64_t index) {
    if (index == body_blocks(layout)) {
        return (struct block){0, layout.before, layout.before + layout.body, layout.after, EDGE};
    }
    int64_t start = index * BLOCK, rest = layout.body - start, count = rest < BLOCK ? rest : BLOCK;
    return (struct block){layout.before + start, count, 0, 0, count};
}

// Position in the block of a column, -1 where it is in another block.
static int64_t position(struct block block, int64_t column) {
    if (column >= block.first && column < block.first + block.count) return column - block.first;
    if (column >= block.second && column < block.second + block.second_count) return block.count + column - block.second;
    return -1;
}

static bool is_in_place(const struct matrix *matrix, struct block block) {
    return matrix->dtype == FLOAT32 && block.padded == block.count;
}

static const float *read_block(const struct matrix *matrix, int64_t row, struct block block, float *scratch) {
    const char *first = element(matrix, row, block.first);
    if (is_in_place(matrix, block)) return (const float *)first;
    to_floats(first, matrix->dtype, block.count, scratch);
    to_floats(element(matrix, row, block.second), matrix->dtype, block.second_count, scratch + block.count);
    for (int64_t i = block.count + block.second_count; i < block.padded; i++) scratch[i] = -INFINITY;
    return scratch;
}

// Where the block is computed that write_block then writes.
static float *place_of_block(const struct matrix *matrix, int64_t row, struct block block, float *scratch) {
    return is_in_place(matrix, block) ? (float *)element(matrix, row, block.first) : scratch;
}

static void write_block(const struct matrix *matrix, int64_t row, struct block block, const float *from) {
    if (is_in_place(matrix, block)) return;
    from_floats(from, matrix->dtype, block.count, element(matrix, row, block.first));
    from_floats(from + block.count, matrix->dtype, block.second_count, element(matrix, row, block.second));
}

// ---------------------------------------------------------------------------------------------------------------------
// What is known of a row, besides its logits
// ---------------------------------------------------------------------------------------------------------------------

struct row {
    int64_t index;
    struct layout layout;
    enum kind kind;
    enum power power;
    double student_tau, teacher_tau;
    int64_t label;
    bool with_label;  // it is not ignored
    bool label_is_column;
};

struct maxima {
    float student, teacher;
};

// An exponent is logit * slope - shift.
struct exponent {
    float slope, shift;
};

struct exponents {
    struct exponent student, label, teacher;
};

static double double_at(struct vector vector, int64_t row) { return ((const double *)vector.data)[row * vector.step]; }
static float float_at(struct vector vector, int64_t row) { return ((const float *)vector.data)[row * vector.step]; }
static int64_t int_at(struct vector vector, int64_t row) { return ((const int64_t *)vector.data)[row * vector.step]; }

static enum power power_at(double tau, bool with_teacher) {
    if (tau == SAME) return SAME;
    return with_teacher && (tau == SQUARE || tau == FOURTH || tau == EIGHTH) ? (enum power)tau : OWN;
}

static struct row row_at(const struct call *call, int64_t index) {
    bool with_teacher = call->teacher.data, with_labels = call->labels.data;
    struct row row = {.index = index, .layout = layout_of(call, index)};
    row.kind = !with_teacher ? NO_TEACHER : call->reverse ? REVERSE : FORWARD;
    row.student_tau = double_at(call->student_tau, index);
    row.teacher_tau = double_at(call->teacher_tau, index);
    row.power = with_labels ? power_at(row.student_tau, with_teacher) : SAME;
    row.label = with_labels ? int_at(call->labels, index) : call->ignore_index;
    row.with_label = row.label != call->ignore_index;
    row.label_is_column = row.with_label && row.label >= 0 && row.label < call->columns;
    return row;
}

static struct exponent exponent_of(float max, double tau) {
    float slope = (float)(LOG2_E / tau);
    return (struct exponent){slope, max * slope};
}

static struct exponents exponents_of(const struct row *row, struct maxima maxima) {
    return (struct exponents){
        exponent_of(maxima.student, row->student_tau),
        exponent_of(maxima.student, 1.0),
        exponent_of(maxima.teacher, row->teacher_tau),
    };
}

INLINE vec apply(struct exponent exponent, vec logits) { return logits * exponent.slope - exponent.shift; }

// The combinations of kind and power for which the loops over a block are compiled.
#define FOR_EACH_LOOP(LOOP) \
    LOOP(NO_TEACHER, OWN) LOOP(NO_TEACHER, SAME) \
    LOOP(FORWARD, OWN) LOOP(FORWARD, SAME) LOOP(FORWARD, SQUARE) LOOP(FORWARD, FOURTH) LOOP(FORWARD, EIGHTH) \
    LOOP(REVERSE, OWN) LOOP(REVERSE, SAME) LOOP(REVERSE, SQUARE) LOOP(REVERSE, FOURTH) LOOP(REVERSE, EIGHTH)
#define LOOP_INDEX(kind, power) (16 * (kind) + (power))

// ---------------------------------------------------------------------------------------------------------------------
// First pass: statistics
// ---------------------------------------------------------------------------------------------------------------------

struct sums {
    double student, label, teacher, difference;
};

struct block_result {
    struct sums sums;
    struct maxima maxima;
};

INLINE struct block_result take_block_as(
    const enum kind kind, const enum power power, const float *student, const float *teacher, int64_t count, struct exponents e
) {
    vec student_sum = splat(0.0f), label_sum = student_sum, teacher_sum = student_sum, difference = student_sum;
    vec student_max = splat(MIN_MAX), teacher_max = student_max;
    for (int64_t i = 0; i < count; i += LANES) {
        vec x = load(student + i), u = apply(e.student, x), q = exp2_of(u);
        student_max = larger(x, student_max);
        student_sum += q;
        if (power != SAME) label_sum += power == OWN ? exp2_of(apply(e.label, x)) : power_of(q, power);
        if (kind == NO_TEACHER) continue;
        vec y = load(teacher + i), v = apply(e.teacher, y), p = exp2_of(v);
        teacher_max = larger(y, teacher_max);
        teacher_sum += p;
        // A column of weight zero adds zero also where its difference is infinite, or -inf minus -inf. A NaN among the
        // logits is in the sums too and is not lost.
        difference = kind == FORWARD ? add_weighted(difference, p, v - u) : add_weighted(difference, q, u - v);
    }
    return (struct block_result){
        {sum_of_lanes(student_sum), sum_of_lanes(label_sum), sum_of_lanes(teacher_sum), sum_of_lanes(difference)},
        {max_of_lanes(student_max), max_of_lanes(teacher_max)},
    };
}

static struct block_result take_block(
    const struct row *row, const float *student, const float *teacher, int64_t count, struct exponents exponents
) {
    switch (LOOP_INDEX(row->kind, row->power)) {
#define LOOP(kind, power) \
    case LOOP_INDEX(kind, power): return take_block_as(kind, power, student, teacher, count, exponents);
        FOR_EACH_LOOP(LOOP)
#undef LOOP
    }
    __builtin_unreachable();
}

static float max_of_block(const float *logits, int64_t count) {
    vec max = splat(MIN_MAX);
    for (int64_t i = 0; i < count; i += LANES) max = larger(load(logits + i), max);
    return max_of_lanes(max);
}

static struct sums moved(struct sums sums, const struct row *row, struct exponents from, struct exponents to) {
    double student = (double)from.student.shift - to.student.shift, teacher = (double)from.teacher.shift - to.teacher.shift;
    double label = row->power == OWN ? (double)from.label.shift - to.label.shift : row->power * student;
    bool reverse = row->kind == REVERSE;
    // In float, so that what the weights underflow to is dropped here as in a block, also where its difference is infinite.
    float weight = (float)exp2(reverse ? student : teacher);
    double difference = reverse ? sums.student * (student - teacher) : sums.teacher * (teacher - student);
    return (struct sums){
        sums.student * exp2(student),
        sums.label * exp2(label),
        sums.teacher * exp2(teacher),
        weight == 0.0f ? 0.0 : weight * (sums.difference + difference),
    };
}

static float larger_of(float x, float max) { return x > max ? x : max; }

static struct maxima larger_maxima(struct maxima a, struct maxima b) {
    return (struct maxima){larger_of(a.student, b.student), larger_of(a.teacher, b.teacher)};
}

static bool exceeds(struct maxima maxima, struct maxima base, struct exponents exponents) {
    float student = maxima.student - base.student, teacher = maxima.teacher - base.teacher;
    return student * exponents.student.slope > MAX_EXCESS || student * exponents.label.slope > MAX_LABEL_EXCESS ||
           teacher * exponents.teacher.slope > MAX_EXCESS;
}

static struct sums total(struct sums a, struct sums b) {
    return (struct sums){a.student + b.student, a.label + b.label, a.teacher + b.teacher, a.difference + b.difference};
}

static float label_logit(const struct call *call, const struct row *row) {
    float logit = row->with_label ? NAN : 0.0f;
    if (row->label_is_column) {
        to_floats(element(&call->student, row->index, row->label), call->student.dtype, 1, &logit);
    }
    return logit;
}

static void write_statistics(
    const struct call *call, const struct row *row, struct maxima maxima, struct sums sums
) {
    const float values[7] = {
        maxima.student,
        (float)sums.student,
        (float)(row->power == SAME ? sums.student : sums.label),
        maxima.teacher,
        (float)sums.teacher,
        (float)(sums.difference / (row->kind == REVERSE ? sums.student : sums.teacher)),
        label_logit(call, row),
    };
    for (int i = 0; i < 7; i++) call->statistics[i * call->rows + row->index] = values[i];
}

static void take_statistics(const struct call *call, const struct row *row) {
    _Alignas(4 * LANES) float student_scratch[BLOCK], teacher_scratch[BLOCK];
    struct maxima maxima = {MIN_MAX, MIN_MAX}, base = maxima;
    struct exponents exponents = {0};
    struct sums sums = {0};
    for (int64_t i = 0; i < num_blocks(row->layout); i++) {
        struct block block = block_of(row->layout, i);
        const float *student = read_block(&call->student, row->index, block, student_scratch), *teacher = NULL;
        if (row->kind != NO_TEACHER) teacher = read_block(&call->teacher, row->index, block, teacher_scratch);
        if (i == 0) {
            base.student = max_of_block(student, block.padded);
            if (teacher != NULL) base.teacher = max_of_block(teacher, block.padded);
            exponents = exponents_of(row, base);
        }
        struct block_result result = take_block(row, student, teacher, block.padded, exponents);
        maxima = larger_maxima(maxima, result.maxima);
        if (exceeds(maxima, base, exponents)) {
            struct exponents raised = exponents_of(row, maxima);
            sums = moved(sums, row, exponents, raised);
            base = maxima;
            exponents = raised;
            result = take_block(row, student, teacher, block.padded, exponents);
        }
        sums = total(sums, result.sums);
    }
    write_statistics(call, row, maxima, moved(sums, row, exponents, exponents_of(row, maxima)));
}

// ---------------------------------------------------------------------------------------------------------------------
// Second pass: the student's gradient
// ---------------------------------------------------------------------------------------------------------------------

// Factors of the student's, the teacher's, and the student's exponentials at temperature 1, and what the label's column
// gets besides.
struct factors {
    float student, teacher, label, onehot;
    float difference;  // as in Rows
};

INLINE void write_gradient_as(
    const enum kind kind, const enum power power, const float *student, const float *teacher, int64_t count,
    struct exponents e, struct factors factors, float *out
) {
    for (int64_t i = 0; i < count; i += LANES) {
        vec x = load(student + i), u = apply(e.student, x), q = exp2_of(u), gradient = q * factors.student;
        if (kind == FORWARD) gradient -= exp2_of(apply(e.teacher, load(teacher + i))) * factors.teacher;
        // Not finite where q is zero or the row's KL is infinite: no gradient from there.
        if (kind == REVERSE) gradient *= zero_unless_finite(u - apply(e.teacher, load(teacher + i)) - factors.difference);
        if (power == OWN) gradient += exp2_of(apply(e.label, x)) * factors.label;
        else if (power != SAME) gradient += power_of(q, power) * factors.label;
        else if (kind == REVERSE) gradient += q * factors.label;
        store(out + i, gradient);
    }
}

static void write_gradient(
    const struct row *row, const float *student, const float *teacher, int64_t count, struct exponents exponents,
    struct factors factors, float *out
) {
    switch (LOOP_INDEX(row->kind, row->power)) {
#define LOOP(kind, power) \
    case LOOP_INDEX(kind, power): write_gradient_as(kind, power, student, teacher, count, exponents, factors, out); break;
        FOR_EACH_LOOP(LOOP)
#undef LOOP
    }
}

struct statistics {
    struct maxima maxima;
    float student_sum, label_sum, teacher_sum, difference;
};

static struct statistics statistics_of(const struct call *call, const struct row *row) {
    const float *first = call->statistics + row->index;
    int64_t step = call->rows;
    return (struct statistics){{first[0], first[3 * step]}, first[step], first[2 * step], first[4 * step], first[5 * step]};
}

static struct factors factors_of(const struct call *call, const struct row *row, struct statistics statistics) {
    struct factors factors = {.difference = statistics.difference};
    if (row->kind != NO_TEACHER) {
        float upstream = float_at(call->kd_upstream, row->index) * (float)row->teacher_tau;
        if (statistics.student_sum != 0.0f && statistics.teacher_sum != 0.0f) {
            factors.student = upstream / statistics.student_sum;
            factors.teacher = upstream / statistics.teacher_sum;
        }
        // zero_unless_finite hides it.
        if (isnan(statistics.teacher_sum)) factors.student = NAN;
        if (row->kind == REVERSE) factors.student *= (float)LN_2;
    }
    if (row->with_label && statistics.label_sum != 0.0f) {
        float upstream = float_at(call->label_upstream, row->index);
        factors.label = upstream / statistics.label_sum;
        if (row->label_is_column) factors.onehot = -upstream;
    }
    return factors;
}

static bool has_upstream(const struct call *call, int64_t row) {
    return float_at(call->kd_upstream, row) != 0.0f || float_at(call->label_upstream, row) != 0.0f;
}

static void take_gradient(const struct call *call, const struct row *row) {
    if (!has_upstream(call, row->index)) {  // takes no part, whatever its logits
        memset(element(&call->gradient, row->index, 0), 0, call->columns * element_bytes(call->gradient.dtype));
        return;
    }
    _Alignas(4 * LANES) float student_scratch[BLOCK], teacher_scratch[BLOCK], out_scratch[BLOCK];
    struct statistics statistics = statistics_of(call, row);
    struct exponents exponents = exponents_of(row, statistics.maxima);
    struct factors factors = factors_of(call, row, statistics);
    // One multiplication serves both terms where both have the student's softmax as a summand.
    if (row->power == SAME && row->kind != REVERSE) factors.student += factors.label;
    for (int64_t i = 0; i < num_blocks(row->layout); i++) {
        struct block block = block_of(row->layout, i);
        const float *student = read_block(&call->student, row->index, block, student_scratch), *teacher = NULL;
        if (row->kind != NO_TEACHER) teacher = read_block(&call->teacher, row->index, block, teacher_scratch);
        float *out = place_of_block(&call->gradient, row->index, block, out_scratch);
        write_gradient(row, student, teacher, block.padded, exponents, factors, out);
        int64_t label = position(block, row->label);
        if (label >= 0) out[label] += factors.onehot;
        write_block(&call->gradient, row->index, block, out);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Entry points
// ---------------------------------------------------------------------------------------------------------------------

// Any number of threads may work on one call: each takes rows until none is left.
void softmax_kl(struct call *call) {
    for (;;) {
        int64_t first = atomic_fetch_add(&call->next_row, call->rows_at_once);
        if (first >= call->rows) return;
        int64_t last = first + call->rows_at_once;
        for (int64_t index = first; index < last && index < call->rows; index++) {
            struct row row = row_at(call, index);
            if (call->with_statistics) take_statistics(call, &row);
            if (call->gradient.data != NULL) take_gradient(call, &row);
        }
    }
}

// Fewer page faults where memory is written for the first time.
void softmax_kl_huge_pages(char *memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), first = ((uintptr_t)memory + page - 1) & -page;
    madvise((void *)first, ((uintptr_t)memory + bytes - first) & -page, MADV_HUGEPAGE);
#endif
}
