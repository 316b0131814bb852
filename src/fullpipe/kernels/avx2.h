/* The vector operations of AVX2: a vector is two registers. WITH_VNNI: bytes are multiplied by one instruction. */
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "native.h"

#define INLINE static inline __attribute__((always_inline))
#define ROWS_AT_ONCE 4
#define MOST_SUMS 4
#define MOST_TILES 4
#define BLOCK_TILES 1
#define ONE_WORD_AT_A_TIME 0
#define SIGNED_BYTES !WITH_VNNI
#define TWICE(type, a_value, b_value) ((type){(a_value), (b_value)})

typedef struct { __m256 a, b; } vf;
typedef struct { __m256i a, b; } vi, vb;
typedef uint32_t lanes __attribute__((vector_size(32)));

INLINE vf f_load(const float *x) { return TWICE(vf, _mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)); }
INLINE void f_store(float *out, vf x) { _mm256_storeu_ps(out, x.a), _mm256_storeu_ps(out + 8, x.b); }
INLINE vf f_all(float x) { return TWICE(vf, _mm256_set1_ps(x), _mm256_set1_ps(x)); }
INLINE vf f_zero(void) { return TWICE(vf, _mm256_setzero_ps(), _mm256_setzero_ps()); }
INLINE vf f_add(vf x, vf y) { return TWICE(vf, _mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)); }
INLINE vf f_sub(vf x, vf y) { return TWICE(vf, _mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)); }
INLINE vf f_mul(vf x, vf y) { return TWICE(vf, _mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)); }
INLINE vf f_div(vf x, vf y) { return TWICE(vf, _mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)); }
INLINE vf f_fma(vf x, vf y, vf z) { return TWICE(vf, _mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)); }
INLINE vf f_max(vf x, vf y) { return TWICE(vf, _mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)); }
INLINE vf f_min(vf x, vf y) { return TWICE(vf, _mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)); }
INLINE vf f_abs(vf x) {
    __m256 sign = _mm256_set1_ps(-0.0f);
    return TWICE(vf, _mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b));
}
INLINE vf f_less(vf x, vf y, vf then, vf otherwise) {
    return TWICE(vf, _mm256_blendv_ps(otherwise.a, then.a, _mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ)),
                 _mm256_blendv_ps(otherwise.b, then.b, _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ)));
}
INLINE vf f_first(vf x, int count) {
    float whole[16];
    f_store(whole, x);
    for (int l = count; l < 16; l++) whole[l] = 0.0f;
    return f_load(whole);
}
INLINE float f_sum(vf x) {
    __m256 eight = _mm256_add_ps(x.a, x.b);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
INLINE float f_greatest(vf x) {
    __m256 eight = _mm256_max_ps(x.a, x.b);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

INLINE __m128i sixteen(const void *x) { return _mm_loadu_si128((const __m128i *)x); }
INLINE vf f_halves(const uint16_t *x) { return TWICE(vf, _mm256_cvtph_ps(sixteen(x)), _mm256_cvtph_ps(sixteen(x + 8))); }
INLINE void f_store_halves(uint16_t *out, vf x) {
    _mm_storeu_si128((__m128i *)out, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    _mm_storeu_si128((__m128i *)(out + 8), _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
INLINE __m256 brains(const uint16_t *x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(sixteen(x)), 16));
}
INLINE vf f_brains(const uint16_t *x) { return TWICE(vf, brains(x), brains(x + 8)); }
INLINE vf f_ints(vi x) { return TWICE(vf, _mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)); }
INLINE __m256 power(__m256i n) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23)); }
INLINE vf f_power(vi n) { return TWICE(vf, power(n.a), power(n.b)); }

INLINE vi i_shifted(int32_t x, int by) {
    __m256i all = (__m256i)((lanes)_mm256_set1_epi32(x) << by);
    return TWICE(vi, all, all);
}
INLINE vi i_load(const uint8_t *x) {
    return TWICE(vi, _mm256_loadu_si256((const __m256i *)x), _mm256_loadu_si256((const __m256i *)(x + 32)));
}
INLINE vi i_zero(void) { return TWICE(vi, _mm256_setzero_si256(), _mm256_setzero_si256()); }
INLINE vi i_add(vi x, vi y) { return TWICE(vi, _mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)); }
INLINE vi i_bytes(const uint8_t *x) {
    __m128i all = sixteen(x);
    return TWICE(vi, _mm256_cvtepu8_epi32(all), _mm256_cvtepu8_epi32(_mm_srli_si128(all, 8)));
}
INLINE vi i_signed_bytes(const int8_t *x) {
    __m128i all = sixteen(x);
    return TWICE(vi, _mm256_cvtepi8_epi32(all), _mm256_cvtepi8_epi32(_mm_srli_si128(all, 8)));
}
INLINE vi i_rounded(vf x) { return TWICE(vi, _mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)); }
INLINE void i_store_bytes(int8_t *out, vi x) {
    __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
    _mm_storeu_si128((__m128i *)out, _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
INLINE int32_t i_sum(vi x) {
    __m256i eight = _mm256_add_epi32(x.a, x.b);
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}

INLINE vb b_load(const uint8_t *x) { return i_load(x); }
INLINE vb b_low(vb x) {
    __m256i mask = _mm256_set1_epi8(15);
    return TWICE(vb, _mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask));
}
INLINE vb b_high(vb x) { return b_low(TWICE(vb, _mm256_srli_epi16(x.a, 4), _mm256_srli_epi16(x.b, 4))); }
INLINE vb b_eight(vb x) {
    __m256i top = SIGNED_BYTES ? _mm256_set1_epi8(-128) : _mm256_setzero_si256();
    return TWICE(vb, _mm256_xor_si256(x.a, top), _mm256_xor_si256(x.b, top));
}
INLINE __m256i bits_there(__m256i bits, int from, uint32_t mask) {
    return (__m256i)((from < 4 ? (lanes)bits << (4 - from) : (lanes)bits >> (from - 4)) & mask);
}
INLINE vb b_or_bits(vb x, vb bits, int from, uint32_t mask) {
    return TWICE(vb, _mm256_or_si256(x.a, bits_there(bits.a, from, mask)), _mm256_or_si256(x.b, bits_there(bits.b, from, mask)));
}

#if WITH_VNNI
INLINE vi i_dots(vi acc, const vb *w, const int32_t *x, int count, int bits) {
    (void)bits;
    for (int j = 0; j < count; j++) {
        __m256i all = _mm256_set1_epi32(x[j]);
        acc = TWICE(vi, _mm256_dpbusd_avx_epi32(acc.a, w[j].a, all), _mm256_dpbusd_avx_epi32(acc.b, w[j].b, all));
    }
    return acc;
}
#else
/* Pairs of products fit into 16 bits, and so do sums of some pairs: at most 15 * 127 * 2 * 8 = 30480 of four bits,
   31 * 127 * 2 * 4 = 31496 of five, 63 * 127 * 2 * 2 = 32004 of six, 128 * 127 * 2 = 32512 of eight. */
INLINE __m256i pairs(__m256i w, __m256i x, int bits) {
    return bits == 8 ? _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w)) : _mm256_maddubs_epi16(w, x);
}
INLINE vi i_dots(vi acc, const vb *w, const int32_t *x, int count, int bits) {
    __m256i ones = _mm256_set1_epi16(1);
    int together = bits == 4 ? 8 : bits == 5 ? 4 : bits == 6 ? 2 : 1;
    for (int j = 0; j < count; j += together) {
        __m256i a = _mm256_setzero_si256(), b = a;
        for (int i = j; i < j + together && i < count; i++) {
            __m256i all = _mm256_set1_epi32(x[i]);
            a = _mm256_add_epi16(a, pairs(w[i].a, all, bits)), b = _mm256_add_epi16(b, pairs(w[i].b, all, bits));
        }
        acc.a = _mm256_add_epi32(acc.a, _mm256_madd_epi16(a, ones));
        acc.b = _mm256_add_epi32(acc.b, _mm256_madd_epi16(b, ones));
    }
    return acc;
}
#endif

#include "products.h"
#include "between.h"
#include "anew.h"
