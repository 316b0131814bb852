/* The kernels for processors with AVX512 and VNNI: a vector is one register. */
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")
#endif
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "native.h"

#define INLINE static inline __attribute__((always_inline))
#define ROWS_AT_ONCE 8
#define MOST_SUMS 24
#define MOST_TILES 4
#define BLOCK_TILES 2
#define ONE_WORD_AT_A_TIME 1
#define SIGNED_BYTES 0

typedef __m512 vf;
typedef __m512i vi, vb;
typedef uint32_t lanes __attribute__((vector_size(64)));

INLINE vf f_load(const float *x) { return _mm512_loadu_ps(x); }
INLINE void f_store(float *out, vf x) { _mm512_storeu_ps(out, x); }
INLINE vf f_all(float x) { return _mm512_set1_ps(x); }
INLINE vf f_zero(void) { return _mm512_setzero_ps(); }
INLINE vf f_add(vf a, vf b) { return _mm512_add_ps(a, b); }
INLINE vf f_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
INLINE vf f_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
INLINE vf f_div(vf a, vf b) { return _mm512_div_ps(a, b); }
INLINE vf f_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vf f_max(vf a, vf b) { return _mm512_max_ps(a, b); }
INLINE vf f_min(vf a, vf b) { return _mm512_min_ps(a, b); }
INLINE vf f_abs(vf a) { return _mm512_abs_ps(a); }
INLINE vf f_less(vf a, vf b, vf x, vf y) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x); }
INLINE vf f_first(vf a, int count) { return _mm512_maskz_mov_ps((__mmask16)((1 << count) - 1), a); }
INLINE float f_sum(vf a) {
    __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
INLINE float f_greatest(vf a) { return _mm512_reduce_max_ps(a); }

INLINE vf f_halves(const uint16_t *x) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)x)); }
INLINE void f_store_halves(uint16_t *out, vf x) {
    _mm256_storeu_si256((__m256i *)out, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
INLINE vf f_brains(const uint16_t *x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x)), 16));
}
INLINE vf f_ints(vi x) { return _mm512_cvtepi32_ps(x); }
INLINE vf f_power(vi n) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(127)), 23)); }

INLINE vi i_shifted(int32_t x, int by) { return (vi)((lanes)_mm512_set1_epi32(x) << by); }
INLINE vi i_load(const uint8_t *x) { return _mm512_loadu_si512(x); }
INLINE vi i_zero(void) { return _mm512_setzero_si512(); }
INLINE vi i_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
INLINE vi i_bytes(const uint8_t *x) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)x)); }
INLINE vi i_signed_bytes(const int8_t *x) { return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)x)); }
INLINE vi i_rounded(vf x) { return _mm512_cvtps_epi32(x); }
INLINE void i_store_bytes(int8_t *out, vi x) { _mm_storeu_si128((__m128i *)out, _mm512_cvtepi32_epi8(x)); }
INLINE int32_t i_sum(vi x) { return _mm512_reduce_add_epi32(x); }

INLINE vb b_load(const uint8_t *x) { return _mm512_loadu_si512(x); }
INLINE vb b_low(vb x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
INLINE vb b_high(vb x) { return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15)); }
INLINE vb b_eight(vb x) { return x; }
INLINE vb b_or_bits(vb x, vb bits, int from, uint32_t mask) {
    lanes there = from < 4 ? (lanes)bits << (4 - from) : (lanes)bits >> (from - 4);
    return _mm512_or_si512(x, (vb)(there & mask));
}

INLINE vi i_dots(vi acc, const vb *w, const int32_t *x, int count, int bits) {
    (void)bits;
    for (int j = 0; j < count; j++) acc = _mm512_dpbusd_epi32(acc, w[j], _mm512_set1_epi32(x[j]));
    return acc;
}

#include "products.h"
#include "between.h"
#include "anew.h"

const fp_ops fp_avx512 = {product, quantise, norm, rotate, store, attend, gate, blocks_anew, read_all, spin_bytes,
                           spin_floats};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
