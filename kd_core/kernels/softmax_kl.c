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

#include <stdatomic.h>
#include <stdbool.h>
#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "vectors.h"

enum { BLOCK = 1024, EDGE = 2 * LANES };
enum dtype { FLOAT32, BFLOAT16, FLOAT16 };
enum kind { NO_TEACHER, FORWARD, REVERSE, JS };
// The student's exponentials at temperature 1 are this power of those at its temperature. SAME also where there are no
// labels; OWN at temperatures where they are none of these powers. Slope and shift of both are exact multiples then.
enum power { OWN = 0, SAME = 1, SQUARE = 2, FOURTH = 4, EIGHTH = 8 };

static const float MIN_MAX = -1e30f;   // a row maximum below this is that of a row of -inf
static const float MAX_EXCESS = 4.0f;  // in units of log 2: exponents stay small, and so do their rounding errors
static const float MAX_LABEL_EXCESS = 64.0f;  // at temperature 1, where high temperatures let it grow: far from overflow
static const float MIN_PROBABILITY = 1e-30f;     // of a mixture: below it nothing counts
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
    struct vector mix;                           // float: the teacher's share of the target; absent: 1
    double beta;                                 // of JS
    float *statistics;                           // [8, rows], in the order of Rows
    int64_t rows, columns, ignore_index, with_sums, with_mixture, kind, rows_at_once;
    _Atomic int64_t next_row;
};

// ---------------------------------------------------------------------------------------------------------------------
// Elements of a row
// ---------------------------------------------------------------------------------------------------------------------

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

INLINE const float *read_block(const struct matrix *matrix, int64_t row, struct block block, float *scratch) {
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
    float mix, beta, rest;  // rest: 1 - beta
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
    row.kind = (enum kind)call->kind;
    row.mix = call->mix.data ? float_at(call->mix, index) : 1.0f;
    row.beta = (float)call->beta;
    row.rest = (float)(1.0 - call->beta);
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

// The target's logits: student + mix * (teacher - student), so exactly either's where they are equal; -inf where one of them
// is; at the ends of the mix one side alone, whatever the other holds.
static const float *mixed(float mix, const float *student, const float *teacher, int64_t count, float *scratch) {
    if (mix == 1.0f) return teacher;
    if (mix == 0.0f) return student;
    for (int64_t i = 0; i < count; i += LANES) {
        vec s = load(student + i), t = load(teacher + i);
        store(scratch + i, where_zero(s != -INFINITY, s + t, s + mix * (t - s)));
    }
    return scratch;
}

INLINE const float *read_target(
    const struct call *call, const struct row *row, struct block block, const float *student, float *scratch
) {
    if (row->kind == NO_TEACHER) return NULL;
    const float *teacher = read_block(&call->teacher, row->index, block, scratch);
    return mixed(row->mix, student, teacher, block.padded, scratch);
}

// The combinations of kind and power for which the loops over a block are compiled.
#define FOR_EACH_LOOP(LOOP) \
    LOOP(NO_TEACHER, OWN) LOOP(NO_TEACHER, SAME) \
    LOOP(FORWARD, OWN) LOOP(FORWARD, SAME) LOOP(FORWARD, SQUARE) LOOP(FORWARD, FOURTH) LOOP(FORWARD, EIGHTH) \
    LOOP(REVERSE, OWN) LOOP(REVERSE, SAME) LOOP(REVERSE, SQUARE) LOOP(REVERSE, FOURTH) LOOP(REVERSE, EIGHTH) \
    LOOP(JS, OWN) LOOP(JS, SAME) LOOP(JS, SQUARE) LOOP(JS, FOURTH) LOOP(JS, EIGHTH)
#define LOOP_INDEX(kind, power) (16 * (kind) + (power))

// ---------------------------------------------------------------------------------------------------------------------
// First pass: statistics
// ---------------------------------------------------------------------------------------------------------------------

INLINE vec power_of(vec x, enum power power) {
    vec square = x * x;
    switch (power) {
        case FOURTH: return square * square;
        case EIGHTH: return square * square * (square * square);
        default: return square;
    }
}

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
        if (kind == FORWARD) difference = add_weighted(difference, p, v - u);
        if (kind == REVERSE) difference = add_weighted(difference, q, u - v);
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

static void take_sums(const struct call *call, const struct row *row) {
    _Alignas(4 * LANES) float student_scratch[BLOCK], teacher_scratch[BLOCK];
    struct maxima maxima = {MIN_MAX, MIN_MAX}, base = maxima;
    struct exponents exponents = {0};
    struct sums sums = {0};
    for (int64_t i = 0; i < num_blocks(row->layout); i++) {
        struct block block = block_of(row->layout, i);
        const float *student = read_block(&call->student, row->index, block, student_scratch);
        const float *teacher = read_target(call, row, block, student, teacher_scratch);
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

struct statistics {
    struct maxima maxima;
    float student_sum, label_sum, teacher_sum, difference;
};

static struct statistics statistics_of(const struct call *call, const struct row *row) {
    const float *first = call->statistics + row->index;
    int64_t step = call->rows;
    return (struct statistics){{first[0], first[3 * step]}, first[step], first[2 * step], first[4 * step], first[5 * step]};
}

// ---------------------------------------------------------------------------------------------------------------------
// First pass of JS, second turn: the row's normalisers are known and the row is in the cache. softmax_kl_torch.py derives it
// ---------------------------------------------------------------------------------------------------------------------

// What q is to be compared with is p times this: zero where either side is -inf throughout.
static float ratio_of(struct statistics statistics) {
    bool empty = statistics.student_sum == 0.0f || statistics.teacher_sum == 0.0f;
    return empty ? 0.0f : statistics.student_sum / statistics.teacher_sum;
}

// (p - q) / (beta p + (1 - beta) q), zero where both are.
INLINE vec skew_of(vec p, vec q, float beta) {
    vec gap = p - q;
    return gap / larger(q + beta * gap, splat(MIN_PROBABILITY));
}

static void take_mixture(const struct call *call, const struct row *row) {
    _Alignas(4 * LANES) float student_scratch[BLOCK], teacher_scratch[BLOCK];
    struct statistics statistics = statistics_of(call, row);
    struct exponents e = exponents_of(row, statistics.maxima);
    float ratio = ratio_of(statistics), beta = row->beta;
    double student_difference = 0.0, teacher_difference = 0.0;
    for (int64_t i = 0; i < num_blocks(row->layout); i++) {
        struct block block = block_of(row->layout, i);
        const float *student = read_block(&call->student, row->index, block, student_scratch);
        const float *teacher = read_target(call, row, block, student, teacher_scratch);
        vec of_student = splat(0.0f), of_teacher = of_student;
        for (int64_t j = 0; j < block.padded; j += LANES) {
            vec q = exp2_of(apply(e.student, load(student + j))), p = exp2_of(apply(e.teacher, load(teacher + j))) * ratio;
            vec skew = skew_of(p, q, beta);
            of_student += q * log2_of_1_plus(-beta * skew);
            of_teacher += p * log2_of_1_plus(row->rest * skew);
        }
        student_difference += sum_of_lanes(of_student);
        teacher_difference += sum_of_lanes(of_teacher);
    }
    float *first = call->statistics + row->index;
    float inverse = statistics.student_sum == 0.0f ? 0.0f : 1.0f / statistics.student_sum;
    first[5 * call->rows] = (float)student_difference * inverse;
    first[7 * call->rows] = (float)teacher_difference * inverse;
}

// ---------------------------------------------------------------------------------------------------------------------
// Second pass: the student's gradient
// ---------------------------------------------------------------------------------------------------------------------

// Factors of the student's, the teacher's, and the student's exponentials at temperature 1, and what the label's column
// gets besides.
struct factors {
    float student, teacher, label, onehot;
    float difference;   // as in Rows
    float ratio, beta;  // of JS
};

INLINE void write_gradient_as(
    const enum kind kind, const enum power power, const float *student, const float *teacher, int64_t count,
    struct exponents e, struct factors factors, float *out
) {
    for (int64_t i = 0; i < count; i += LANES) {
        vec x = load(student + i), u = apply(e.student, x), q = exp2_of(u), gradient = q * factors.student;
        if (kind == JS) {
            vec p = exp2_of(apply(e.teacher, load(teacher + i))) * factors.ratio;
            gradient *= log2_of_1_plus(-factors.beta * skew_of(p, q, factors.beta)) - factors.difference;
        }
        if (kind == FORWARD) gradient -= exp2_of(apply(e.teacher, load(teacher + i))) * factors.teacher;
        // Not finite where q is zero or the row's KL is infinite: no gradient from there.
        if (kind == REVERSE) gradient *= zero_unless_finite(u - apply(e.teacher, load(teacher + i)) - factors.difference);
        if (power == OWN) gradient += exp2_of(apply(e.label, x)) * factors.label;
        else if (power != SAME) gradient += power_of(q, power) * factors.label;
        else if (kind == REVERSE || kind == JS) gradient += q * factors.label;
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

static struct factors factors_of(const struct call *call, const struct row *row, struct statistics statistics) {
    struct factors factors = {.difference = statistics.difference, .ratio = ratio_of(statistics), .beta = row->beta};
    if (row->kind != NO_TEACHER) {
        float upstream = float_at(call->kd_upstream, row->index) * (float)row->teacher_tau;
        if (statistics.student_sum != 0.0f && statistics.teacher_sum != 0.0f) {
            factors.student = upstream / statistics.student_sum;
            factors.teacher = upstream / statistics.teacher_sum;
        }
        // zero_unless_finite and log2_of_1_plus hide it.
        if (isnan(statistics.teacher_sum)) factors.student = NAN;
        if (row->kind == REVERSE) factors.student *= (float)LN_2;
        if (row->kind == JS) factors.student *= (float)(LN_2 / row->beta);
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
    if (row->power == SAME && row->kind <= FORWARD) factors.student += factors.label;
    for (int64_t i = 0; i < num_blocks(row->layout); i++) {
        struct block block = block_of(row->layout, i);
        const float *student = read_block(&call->student, row->index, block, student_scratch);
        const float *teacher = read_target(call, row, block, student, teacher_scratch);
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
            if (call->with_sums) take_sums(call, &row);
            if (call->with_mixture) take_mixture(call, &row);
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
