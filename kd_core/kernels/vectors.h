// Vectors of floats as wide as the machine's, base-2 exponentials and logarithms of them, and floats of 16 bits.

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512DQ__
#include <immintrin.h>
#endif

#if defined(__AVX512DQ__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#define INLINE static inline __attribute__((always_inline))

// ---------------------------------------------------------------------------------------------------------------------
// Vectors of LANES floats
// ---------------------------------------------------------------------------------------------------------------------

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t int_vec __attribute__((vector_size(4 * LANES)));
typedef float loose_vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

INLINE vec load(const float *from) { return *(const loose_vec *)from; }
INLINE void store(float *to, vec value) { *(loose_vec *)to = value; }
INLINE vec splat(float value) { return value - (vec){0.0f}; }

// 2^f for f in [0, 1) or [-0.5, 0.5], exact at zero: the coefficients are a minimax fit for the interval.
INLINE vec polynomial(vec f, const float coefficients[5]) {
    vec value = splat(coefficients[4]);
    for (int i = 3; i >= 0; i--) value = value * f + coefficients[i];
    return value * f + 1.0f;
}

// yes where the number is zero, otherwise no.
INLINE vec where_zero(int_vec number, vec yes, vec no) {
    int_vec is_zero = number == 0;
    return (vec)(((int_vec)yes & is_zero) | ((int_vec)no & ~is_zero));
}

#ifdef __AVX512DQ__

INLINE float sum_of_lanes(vec value) { return _mm512_reduce_add_ps(value); }
INLINE float max_of_lanes(vec value) { return _mm512_reduce_max_ps(value); }

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

// log2(1 + z) within 4e-7 of itself, also where z is small; for 1 + z below 2^-23, and for NaN, that of 2^-23.
INLINE vec log2_of_1_plus(vec z) {
    // A minimax fit of log2(1 + f) / f for f in [-1/3, 1/3].
    static const float c[8] = {0x1.715472p+0f,  -0x1.715458p-1f, 0x1.ec8238p-2f,  -0x1.717148p-2f,
                               0x1.246f9ep-2f, -0x1.e527cep-3f, 0x1.f992dep-3f, -0x1.c5feb8p-3f};
    vec sum = larger(1.0f + z, splat(0x1p-23f));
    int_vec exponent = ((int_vec)sum - 0x3f2aaaab) >> 23;  // sum / 2^exponent is in [2/3, 4/3)
    vec f = where_zero(exponent, z, (vec)((int_vec)sum - (exponent << 23)) - 1.0f);  // 1 + z has rounded z
    vec value = splat(c[7]);
    for (int i = 6; i >= 0; i--) value = value * f + c[i];
    return value * f + __builtin_convertvector(exponent, vec);
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
