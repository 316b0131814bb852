/* The kernels in plain C, for any processor; what the other levels must agree with bit by bit. */
#include <math.h>
#include <string.h>

#include "native.h"

#define INLINE static inline __attribute__((always_inline))
#define ROWS_AT_ONCE 1
#define MOST_SUMS 1
#define MOST_TILES 1
#define BLOCK_TILES 1
#define ONE_WORD_AT_A_TIME 0
#define UNROLL
#define SIGNED_BYTES 0
#define LANES for (int l = 0; l < 16; l++)

typedef struct { float l[16]; } vf;
typedef struct { int32_t l[16]; } vi;
typedef struct { uint8_t l[64]; } vb;

INLINE vf f_load(const float *x) { vf r; memcpy(&r, x, 64); return r; }
INLINE void f_store(float *out, vf x) { memcpy(out, &x, 64); }
INLINE vf f_all(float x) { vf r; LANES r.l[l] = x; return r; }
INLINE vf f_zero(void) { return f_all(0.0f); }
INLINE vf f_add(vf a, vf b) { LANES a.l[l] += b.l[l]; return a; }
INLINE vf f_sub(vf a, vf b) { LANES a.l[l] -= b.l[l]; return a; }
INLINE vf f_mul(vf a, vf b) { LANES a.l[l] *= b.l[l]; return a; }
INLINE vf f_div(vf a, vf b) { LANES a.l[l] /= b.l[l]; return a; }
INLINE vf f_fma(vf a, vf b, vf c) { LANES c.l[l] = fmaf(a.l[l], b.l[l], c.l[l]); return c; }
INLINE vf f_max(vf a, vf b) { LANES a.l[l] = a.l[l] > b.l[l] ? a.l[l] : b.l[l]; return a; }
INLINE vf f_min(vf a, vf b) { LANES a.l[l] = a.l[l] < b.l[l] ? a.l[l] : b.l[l]; return a; }
INLINE vf f_abs(vf a) { LANES a.l[l] = fabsf(a.l[l]); return a; }
INLINE vf f_less(vf a, vf b, vf x, vf y) { LANES x.l[l] = a.l[l] < b.l[l] ? x.l[l] : y.l[l]; return x; }
INLINE vf f_first(vf a, int count) { for (int l = count; l < 16; l++) a.l[l] = 0.0f; return a; }
INLINE float f_sum(vf a) {
    for (int step = 8; step; step /= 2) for (int l = 0; l < step; l++) a.l[l] += a.l[l + step];
    return a.l[0];
}
INLINE float f_greatest(vf a) {
    for (int step = 8; step; step /= 2) for (int l = 0; l < step; l++) a.l[l] = a.l[l] > a.l[l + step] ? a.l[l] : a.l[l + step];
    return a.l[0];
}

INLINE float from_bits(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
INLINE uint32_t to_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }

INLINE float from_half(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
    if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    float size = rest >= 0x400 ? from_bits((rest << 13) + 0x38000000) : (float)rest * 0x1p-24f;
    return from_bits(sign | to_bits(size));
}

/* To nearest, ties to even, of numbers that a half can hold. */
INLINE uint16_t to_half(float x) {
    uint32_t bits = to_bits(x), sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (bits < 0x38800000) return (uint16_t)(sign | (uint32_t)lrintf(from_bits(bits) * 0x1p24f));
    return (uint16_t)(sign | (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
}

INLINE vf f_halves(const uint16_t *x) { vf r; LANES r.l[l] = from_half(x[l]); return r; }
INLINE void f_store_halves(uint16_t *out, vf x) { LANES out[l] = to_half(x.l[l]); }
INLINE vf f_brains(const uint16_t *x) { vf r; LANES r.l[l] = from_bits((uint32_t)x[l] << 16); return r; }
INLINE vf f_ints(vi x) { vf r; LANES r.l[l] = (float)x.l[l]; return r; }
INLINE vf f_power(vi n) { vf r; LANES r.l[l] = from_bits((uint32_t)(n.l[l] + 127) << 23); return r; }

INLINE vi i_shifted(int32_t x, int by) { vi r; LANES r.l[l] = x * (1 << by); return r; }
INLINE vi i_load(const uint8_t *x) { vi r; memcpy(&r, x, 64); return r; }
INLINE vi i_zero(void) { return i_shifted(0, 0); }
INLINE vi i_add(vi a, vi b) { LANES a.l[l] += b.l[l]; return a; }
INLINE vi i_bytes(const uint8_t *x) { vi r; LANES r.l[l] = x[l]; return r; }
INLINE vi i_signed_bytes(const int8_t *x) { vi r; LANES r.l[l] = x[l]; return r; }
INLINE vi i_rounded(vf x) { vi r; LANES r.l[l] = (int32_t)lrintf(x.l[l]); return r; }
INLINE void i_store_bytes(int8_t *out, vi x) { LANES out[l] = (int8_t)x.l[l]; }
INLINE int32_t i_sum(vi x) { int32_t sum = 0; LANES sum += x.l[l]; return sum; }

INLINE vb b_load(const uint8_t *x) { vb r; memcpy(&r, x, 64); return r; }
INLINE vb b_low(vb x) { for (int i = 0; i < 64; i++) x.l[i] &= 15; return x; }
INLINE vb b_high(vb x) { for (int i = 0; i < 64; i++) x.l[i] >>= 4; return x; }
INLINE vb b_eight(vb x) { return x; }
INLINE vb b_or_bits(vb x, vb bits, int from, uint32_t mask) {
    for (int i = 0; i < 64; i++) x.l[i] |= (uint8_t)((bits.l[i] >> from) << 4) & (uint8_t)mask;
    return x;
}

INLINE vi i_dots(vi acc, const vb *w, const int32_t *x, int count, int bits) {
    (void)bits;
    for (int j = 0; j < count; j++) {
        const int8_t *own = (const int8_t *)(x + j);
        LANES for (int i = 0; i < 4; i++) acc.l[l] += w[j].l[4 * l + i] * own[i];
    }
    return acc;
}

#include "products.h"
#include "between.h"
#include "anew.h"

const fp_ops fp_portable = {product, quantise, norm, rotate, store, attend, gate, blocks_anew, read_all, spin_bytes,
                           spin_floats};
