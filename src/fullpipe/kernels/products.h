/* Products of weights in tiles with few rows. Included by each level after its vector operations:

   vf, vi: 16 floats, 16 int32. vb: 64 bytes. ROWS_AT_ONCE: how many rows' sums are kept in registers.
   SIGNED_BYTES: eight-bit weights are multiplied as signed numbers, so that nothing has to be taken off. */

typedef int32_t __attribute__((may_alias)) word; /* four inputs of a row */

#ifndef UNROLL
#define UNROLL _Pragma("GCC unroll 8")
#endif
#define AHEAD 16 /* tiles that are asked for ahead */

INLINE int bits_of(int form) {
    return form == FP_Q8_0 ? 8 : form == FP_Q6_K ? 6 : form == FP_Q5_0 || form == FP_Q5_1 || form == FP_Q5_K ? 5 : 4;
}

INLINE int has_shift(int form) { return form == FP_Q4_1 || form == FP_Q5_1 || form == FP_Q4_K || form == FP_Q5_K; }

INLINE void unpack(int form, const uint8_t *tile, vb *w) {
    if (form == FP_Q8_0) {
        UNROLL for (int j = 0; j < 8; j++) w[j] = b_eight(b_load(tile + 64 * j));
        return;
    }
    UNROLL for (int j = 0; j < 4; j++) {
        vb packed = b_load(tile + 64 * j);
        w[j] = b_low(packed), w[4 + j] = b_high(packed);
    }
    if (bits_of(form) == 5) {
        vb fifth = b_load(tile + 256);
        UNROLL for (int j = 0; j < 8; j++) w[j] = b_or_bits(w[j], fifth, j, 0x10101010);
    }
    if (bits_of(form) == 6) {
        UNROLL for (int j = 0; j < 8; j++) w[j] = b_or_bits(w[j], b_load(tile + 256 + j / 4 * 64), 2 * (j % 4), 0x30303030);
    }
}

/* What a tile's integers are multiplied with: sum = scale * integer + shift * sum of inputs; of six-bit weights the
   halves have integer factors of their own. */
typedef struct { vf scale, shift; vi low, high; } factors;

INLINE factors factors_of(int form, const uint8_t *scales, int block) {
    factors f;
    const uint16_t *halves = (const uint16_t *)scales;
    f.scale = f_halves(halves);
    if (form == FP_Q4_1 || form == FP_Q5_1) f.shift = f_halves(halves + 16);
    if (form == FP_Q4_K || form == FP_Q5_K) {
        const uint8_t *own = scales + 64 + 32 * (block % 8);
        f.scale = f_mul(f.scale, f_ints(i_bytes(own)));
        f.shift = f_mul(f_sub(f_zero(), f_halves(halves + 16)), f_ints(i_bytes(own + 16)));
    }
    if (form == FP_Q6_K) {
        const int8_t *own = (const int8_t *)scales + 32 + 32 * (block % 8);
        f.low = i_signed_bytes(own), f.high = i_signed_bytes(own + 16);
    }
    return f;
}

/* One row's exact integers for a tile. */
INLINE vi integers(int form, const vb *w, const fp_block *x, const factors *f) {
    const word *q = (const word *)x->q;
    int bits = bits_of(form);
    if (form == FP_Q6_K) {
        vi low = i_dots(i_shifted(x->minus_low, 5), w, q, 4, bits);
        vi high = i_dots(i_shifted(x->minus_sum - x->minus_low, 5), w + 4, q + 4, 4, bits);
        return i_add(i_mul(low, f->low), i_mul(high, f->high));
    }
    vi start = form == FP_Q4_0 ? i_shifted(x->minus_sum, 3) : form == FP_Q5_0 ? i_shifted(x->minus_sum, 4)
             : form == FP_Q8_0 && !SIGNED_BYTES ? i_shifted(x->minus_sum, 7) : i_zero();
    return i_dots(start, w, q, 8, bits);
}

INLINE void ask_for(const uint8_t *next, int bytes) {
    UNROLL for (int line = 0; line < bytes; line += 64) __builtin_prefetch(next + line);
}

/* 16 channels for some rows (a constant), of weights in blocks. */
INLINE void tile_of_blocks(int form, int rows, const fp_weight *w, int tile, const fp_rows *x, int row, float *out) {
    int blocks = x->inputs / FP_BLOCK, shared = fp_scale_tiles(form);
    int bytes = fp_tile_bytes(form), scale_bytes = fp_scale_bytes(form);
    const uint8_t *quants = w->quants + (int64_t)tile * blocks * bytes;
    const uint8_t *scales = w->scales + (int64_t)tile * (blocks / shared) * scale_bytes;
    const fp_block *own = x->blocks + (int64_t)row * blocks;
    vf sums[ROWS_AT_ONCE];
    UNROLL for (int r = 0; r < rows; r++) sums[r] = f_zero();
    for (int block = 0; block < blocks; block++) {
        ask_for(quants + AHEAD * bytes, bytes);
        if (block % shared == 0) ask_for(scales + AHEAD / shared * scale_bytes, scale_bytes);
        vb words[8];
        unpack(form, quants, words);
        factors f = factors_of(form, scales, block);
        UNROLL for (int r = 0; r < rows; r++) {
            const fp_block *b = own + (int64_t)r * blocks + block;
            vf found = f_ints(integers(form, words, b, &f));
            sums[r] = f_fma(found, f_mul(f.scale, f_all(b->scale)), sums[r]);
            if (has_shift(form)) sums[r] = f_fma(f.shift, f_all(b->shift), sums[r]);
        }
        quants += bytes;
        if (block % shared == shared - 1) scales += scale_bytes;
    }
    UNROLL for (int r = 0; r < rows; r++) f_store(out + 16 * r, sums[r]);
}

INLINE vf channels(int form, const uint8_t *at) {
    return form == FP_F32 ? f_load((const float *)at)
         : form == FP_F16 ? f_halves((const uint16_t *)at) : f_brains((const uint16_t *)at);
}

/* The same of weights that are floats; even and odd inputs are summed apart, for two sums take half the time of one. */
INLINE void tile_of_floats(int form, int rows, const fp_weight *w, int tile, const fp_rows *x, int row, float *out) {
    int inputs = x->inputs, bytes = fp_tile_bytes(form);
    const uint8_t *at = w->quants + (int64_t)tile * inputs * bytes;
    const float *own = x->x + (int64_t)row * inputs;
    vf even[ROWS_AT_ONCE], odd[ROWS_AT_ONCE];
    UNROLL for (int r = 0; r < rows; r++) even[r] = odd[r] = f_zero();
    int i = 0;
    for (; i + 1 < inputs; i += 2, at += 2 * bytes) {
        ask_for(at + 2048, 2 * bytes);
        vf first = channels(form, at), second = channels(form, at + bytes);
        UNROLL for (int r = 0; r < rows; r++) {
            const float *here = own + (int64_t)r * inputs + i;
            even[r] = f_fma(first, f_all(here[0]), even[r]), odd[r] = f_fma(second, f_all(here[1]), odd[r]);
        }
    }
    if (i < inputs) {
        vf last = channels(form, at);
        UNROLL for (int r = 0; r < rows; r++) even[r] = f_fma(last, f_all(own[(int64_t)r * inputs + i]), even[r]);
    }
    UNROLL for (int r = 0; r < rows; r++) f_store(out + 16 * r, f_add(even[r], odd[r]));
}

typedef void tile_function(const fp_weight *w, int tile, const fp_rows *x, int row, float *out);

#define TILE(form, rows, of)                                                                                         \
    static void tile_##form##_##rows(const fp_weight *w, int tile, const fp_rows *x, int row, float *out) {          \
        of(FP_##form, rows, w, tile, x, row, out);                                                                   \
    }
#if ROWS_AT_ONCE == 1
#define TILES(form, of) TILE(form, 1, of)
#define NAMES(form) {tile_##form##_1}
#else
#define FOUR_TILES(form, of) TILE(form, 1, of) TILE(form, 2, of) TILE(form, 3, of) TILE(form, 4, of)
#define FOUR_NAMES(form) tile_##form##_1, tile_##form##_2, tile_##form##_3, tile_##form##_4
#if ROWS_AT_ONCE == 4
#define TILES(form, of) FOUR_TILES(form, of)
#define NAMES(form) {FOUR_NAMES(form)}
#else
#define TILES(form, of) FOUR_TILES(form, of) TILE(form, 5, of) TILE(form, 6, of) TILE(form, 7, of) TILE(form, 8, of)
#define NAMES(form) {FOUR_NAMES(form), tile_##form##_5, tile_##form##_6, tile_##form##_7, tile_##form##_8}
#endif
#endif

TILES(Q4_0, tile_of_blocks) TILES(Q4_1, tile_of_blocks) TILES(Q5_0, tile_of_blocks) TILES(Q5_1, tile_of_blocks)
TILES(Q8_0, tile_of_blocks) TILES(Q4_K, tile_of_blocks) TILES(Q5_K, tile_of_blocks) TILES(Q6_K, tile_of_blocks)
TILES(F32, tile_of_floats) TILES(F16, tile_of_floats) TILES(BF16, tile_of_floats)

static tile_function *const tiles_of[FP_FORMS][ROWS_AT_ONCE] = {
    NAMES(Q4_0), NAMES(Q4_1), NAMES(Q5_0), NAMES(Q5_1), NAMES(Q8_0), NAMES(Q4_K), NAMES(Q5_K), NAMES(Q6_K),
    NAMES(F32), NAMES(F16), NAMES(BF16)};

/* What is summed becomes what is put out: bias, and what stands there already, come on top. */
static void put_tile(const fp_weight *w, int tile, const float *sums, float *out, int add) {
    int start = tile * FP_CHANNELS;
    const float *bias = w->bias ? w->bias + start : NULL;
    if (w->outputs - start >= FP_CHANNELS) {
        vf value = f_load(sums);
        if (bias) value = f_add(value, f_load(bias));
        f_store(out, add ? f_add(f_load(out), value) : value);
        return;
    }
    for (int c = 0; c < w->outputs - start; c++) {
        float value = sums[c];
        if (bias) value += bias[c];
        out[c] = add ? out[c] + value : value;
    }
}

#define ROWS_IN_CACHE (1 << 19) /* bytes of rows that are worked off before the next tiles are read */

static void product(const fp_weight *w, const fp_rows *x, int first, int last, float *out, int64_t stride, int add) {
    float sums[16 * ROWS_AT_ONCE] __attribute__((aligned(64)));
    int bytes = fp_is_float(w->form) ? 4 * x->inputs : x->inputs / FP_BLOCK * (int)sizeof(fp_block);
    int most = ROWS_IN_CACHE / bytes / ROWS_AT_ONCE * ROWS_AT_ONCE;
    most = most < ROWS_AT_ONCE ? ROWS_AT_ONCE : most;
    for (int begin = 0; begin < x->count; begin += most) {
        int end = begin + most < x->count ? begin + most : x->count;
        for (int tile = first; tile < last; tile++) {
            for (int row = begin, rows; row < end; row += rows) {
                int passes = (end - row + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
                rows = (end - row + passes - 1) / passes;
                tiles_of[w->form][rows - 1](w, tile, x, row, sums);
                float *to = out + row * stride + (tile - first) * FP_CHANNELS;
                for (int r = 0; r < rows; r++) put_tile(w, tile, sums + 16 * r, to + r * stride, add);
            }
        }
    }
}
