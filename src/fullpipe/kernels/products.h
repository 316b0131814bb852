/* Products of weights in tiles with few rows. Included by each level after its vector operations:

   vf, vi: 16 floats, 16 int32. vb: 64 bytes. ROWS_AT_ONCE: how many rows are worked off at once, with MOST_TILES tiles of
   floats or BLOCK_TILES tiles of blocks at most; MOST_SUMS: how many sums of floats are kept in registers.
   ONE_WORD_AT_A_TIME: a word is multiplied with all rows before the next, so that no product waits for the one before.
   SIGNED_BYTES: eight-bit weights are multiplied as signed numbers, so that nothing has to be taken off. */

typedef int32_t __attribute__((may_alias)) word; /* four inputs of a row */

#ifndef UNROLL
#define UNROLL _Pragma("GCC unroll 24")
#endif
#define AHEAD 32 /* tiles that are asked for ahead */

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

/* What a tile's integers are multiplied with: sum = scale * integer + shift * sum of inputs; of six-bit weights each half
   has a scale of its own, and the second is in shift. */
typedef struct { vf scale, shift; } factors;

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
        f.shift = f_mul(f.scale, f_ints(i_signed_bytes(own + 16)));
        f.scale = f_mul(f.scale, f_ints(i_signed_bytes(own)));
    }
    return f;
}

/* What a row's sum of products begins with, so that weights without their offset need none: some words of a block, of
   inputs that sum up to minus `minus`. */
INLINE vi begun(int form, int32_t minus) {
    return form == FP_Q4_0 ? i_shifted(minus, 3) : form == FP_Q5_0 ? i_shifted(minus, 4)
         : form == FP_Q6_K ? i_shifted(minus, 5) : form == FP_Q8_0 && !SIGNED_BYTES ? i_shifted(minus, 7) : i_zero();
}

/* Products of words first..first + count - 1 of a tile with some rows, onto sums. */
INLINE void add_dots(int form, int rows, const vb *w, const fp_block *const *x, int first, int count, vi *sums) {
#if ONE_WORD_AT_A_TIME
    UNROLL for (int j = first; j < first + count; j++)
        UNROLL for (int r = 0; r < rows; r++) sums[r] = i_dots(sums[r], w + j, (const word *)x[r]->q + j, 1, bits_of(form));
#else
    UNROLL for (int r = 0; r < rows; r++)
        sums[r] = i_dots(sums[r], w + first, (const word *)x[r]->q + first, count, bits_of(form));
#endif
}

/* A tile's part of the sums of some rows: exact integers, times scales. */
INLINE void add_tile(int form, int rows, const vb *w, const fp_block *const *x, const factors *f, vf *sums) {
    vi found[ROWS_AT_ONCE], high[ROWS_AT_ONCE];
    if (form == FP_Q6_K) {
        UNROLL for (int r = 0; r < rows; r++) found[r] = begun(form, x[r]->minus_low);
        add_dots(form, rows, w, x, 0, 4, found);
        UNROLL for (int r = 0; r < rows; r++) high[r] = begun(form, x[r]->minus_sum - x[r]->minus_low);
        add_dots(form, rows, w, x, 4, 4, high);
        UNROLL for (int r = 0; r < rows; r++) {
            vf both = f_fma(f_ints(high[r]), f->shift, f_mul(f_ints(found[r]), f->scale));
            sums[r] = f_fma(both, f_all(x[r]->scale), sums[r]);
        }
        return;
    }
    UNROLL for (int r = 0; r < rows; r++) found[r] = begun(form, x[r]->minus_sum);
    add_dots(form, rows, w, x, 0, 8, found);
    UNROLL for (int r = 0; r < rows; r++) {
        sums[r] = f_fma(f_ints(found[r]), f_mul(f->scale, f_all(x[r]->scale)), sums[r]);
        if (has_shift(form)) sums[r] = f_fma(f->shift, f_all(x[r]->shift), sums[r]);
    }
}

INLINE void ask_for(const uint8_t *next, int bytes) {
    UNROLL for (int line = 0; line < bytes; line += 64) __builtin_prefetch(next + line);
}

/* Some rows and some tiles of 16 channels (constants), of weights in blocks: out [tiles][rows][16]. */
INLINE void tiles_of_blocks(int form, int rows, int tiles, const fp_weight *w, int tile, const fp_rows *x, int row,
                            float *out) {
    int blocks = x->inputs / FP_BLOCK, shared = fp_scale_tiles(form);
    int bytes = fp_tile_bytes(form), scale_bytes = fp_scale_bytes(form);
    int64_t apart = (int64_t)blocks * bytes, scales_apart = (int64_t)(blocks / shared) * scale_bytes;
    const uint8_t *quants = w->quants + tile * apart, *scales = w->scales + tile * scales_apart;
    const fp_block *own = x->blocks + (int64_t)row * blocks;
    vf sums[MOST_SUMS];
    UNROLL for (int s = 0; s < rows * tiles; s++) sums[s] = f_zero();
    for (int block = 0; block < blocks; block++) {
        vb words[MOST_TILES][8];
        factors f[MOST_TILES];
        int64_t skipped = block + AHEAD < blocks ? 0 : tiles - 1; /* behind its end stands what others of these are at */
        UNROLL for (int t = 0; t < tiles; t++) {
            ask_for(quants + (t + skipped) * apart + AHEAD * bytes, bytes);
            if (block % shared == 0)
                ask_for(scales + (t + skipped) * scales_apart + AHEAD / shared * scale_bytes, scale_bytes);
            unpack(form, quants + t * apart, words[t]);
            f[t] = factors_of(form, scales + t * scales_apart, block);
        }
        const fp_block *here[ROWS_AT_ONCE];
        UNROLL for (int r = 0; r < rows; r++) here[r] = own + (int64_t)r * blocks + block;
        UNROLL for (int t = 0; t < tiles; t++) add_tile(form, rows, words[t], here, &f[t], sums + t * rows);
        quants += bytes;
        if (block % shared == shared - 1) scales += scale_bytes;
    }
    UNROLL for (int s = 0; s < rows * tiles; s++) f_store(out + 16 * s, sums[s]);
}

INLINE vf channels(int form, const uint8_t *at) {
    return form == FP_F32 ? f_load((const float *)at)
         : form == FP_F16 ? f_halves((const uint16_t *)at) : f_brains((const uint16_t *)at);
}

/* The same of weights that are floats. What is read of a row serves all tiles, and few rows have sums enough that none
   waits for the one before. A channel's sum goes over the inputs in their order, however many rows and tiles there are. */
INLINE void tiles_of_floats(int form, int rows, int tiles, const fp_weight *w, int tile, const fp_rows *x, int row,
                            float *out) {
    int inputs = x->inputs, bytes = fp_tile_bytes(form);
    int64_t apart = (int64_t)inputs * bytes;
    const uint8_t *at = w->quants + tile * apart;
    const float *own = x->x + (int64_t)row * inputs;
    vf sums[MOST_SUMS];
    UNROLL for (int s = 0; s < rows * tiles; s++) sums[s] = f_zero();
    for (int i = 0; i < inputs; i++, at += bytes) {
        vf here[MOST_TILES];
        UNROLL for (int t = 0; t < tiles; t++) {
            __builtin_prefetch(at + t * apart + 2048);
            here[t] = channels(form, at + t * apart);
        }
        UNROLL for (int r = 0; r < rows; r++) {
            vf all = f_all(own[(int64_t)r * inputs + i]);
            UNROLL for (int t = 0; t < tiles; t++) sums[t * rows + r] = f_fma(here[t], all, sums[t * rows + r]);
        }
    }
    UNROLL for (int s = 0; s < rows * tiles; s++) f_store(out + 16 * s, sums[s]);
}

typedef void some_tiles(int rows, int tiles, const fp_weight *w, int tile, const fp_rows *x, int row, float *out);

#define CASE(of, form, rows, tiles) case 8 * (rows) + (tiles): of(FP_##form, rows, tiles, w, tile, x, row, out); return;
#define UP_TO_FOUR(of, form, tiles)                                                                                  \
    CASE(of, form, 1, tiles) CASE(of, form, 2, tiles) CASE(of, form, 3, tiles) CASE(of, form, 4, tiles)
#define UP_TO_EIGHT(of, form, tiles)                                                                                 \
    UP_TO_FOUR(of, form, tiles)                                                                                      \
    CASE(of, form, 5, tiles) CASE(of, form, 6, tiles) CASE(of, form, 7, tiles) CASE(of, form, 8, tiles)
#if ROWS_AT_ONCE == 1
#define BLOCK_CASES(form) CASE(tiles_of_blocks, form, 1, 1)
#define FLOAT_CASES(form) CASE(tiles_of_floats, form, 1, 1)
#elif ROWS_AT_ONCE == 4
#define BLOCK_CASES(form) UP_TO_FOUR(tiles_of_blocks, form, 1)
#define FLOAT_CASES(form) UP_TO_FOUR(tiles_of_floats, form, 1)                                                       \
    CASE(tiles_of_floats, form, 1, 2) CASE(tiles_of_floats, form, 1, 3) CASE(tiles_of_floats, form, 1, 4)            \
    CASE(tiles_of_floats, form, 2, 2)
#else
#define BLOCK_CASES(form) UP_TO_EIGHT(tiles_of_blocks, form, 1) UP_TO_EIGHT(tiles_of_blocks, form, 2)
#define FLOAT_CASES(form)                                                                                            \
    UP_TO_EIGHT(tiles_of_floats, form, 1) UP_TO_EIGHT(tiles_of_floats, form, 2) UP_TO_EIGHT(tiles_of_floats, form, 3)  \
    UP_TO_FOUR(tiles_of_floats, form, 4) CASE(tiles_of_floats, form, 5, 4) CASE(tiles_of_floats, form, 6, 4)
#endif

#define TILES(form, cases)                                                                                           \
    static void some_##form(int rows, int tiles, const fp_weight *w, int tile, const fp_rows *x, int row, float *out) {\
        switch (8 * rows + tiles) { cases(form) }                                                                    \
    }
TILES(Q4_0, BLOCK_CASES) TILES(Q4_1, BLOCK_CASES) TILES(Q5_0, BLOCK_CASES) TILES(Q5_1, BLOCK_CASES)
TILES(Q8_0, BLOCK_CASES) TILES(Q4_K, BLOCK_CASES) TILES(Q5_K, BLOCK_CASES) TILES(Q6_K, BLOCK_CASES)
TILES(F32, FLOAT_CASES) TILES(F16, FLOAT_CASES) TILES(BF16, FLOAT_CASES)

static some_tiles *const some_of[FP_FORMS] = {some_Q4_0, some_Q4_1, some_Q5_0, some_Q5_1, some_Q8_0, some_Q4_K,
                                              some_Q5_K, some_Q6_K, some_F32, some_F16, some_BF16};

/* How many tiles are worked off together with so many rows. A single row of blocks waits for memory alone, which comes
   best from one place; eight-bit blocks need no unpacking that could be shared. */
INLINE int tiles_at_once(int form, int rows) {
    int is_float = fp_is_float(form), most = is_float ? MOST_SUMS : ROWS_AT_ONCE;
    int tiles = is_float ? MOST_TILES : rows == 1 || form == FP_Q8_0 ? 1 : BLOCK_TILES;
    return tiles * rows > most ? most / rows : tiles;
}

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

/* Some rows through tiles first..last (exclusive), as many of either at once as there are registers for. */
static void product_of_rows(const fp_weight *w, const fp_rows *x, int begin, int end, int first, int last, float *out,
                            int64_t stride, int add) {
    float sums[16 * MOST_SUMS] __attribute__((aligned(64)));
    int passes = (end - begin + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE, most = (end - begin + passes - 1) / passes;
    for (int tile = first, tiles; tile < last; tile += tiles) {
        tiles = tiles_at_once(w->form, most);
        tiles = tiles < last - tile ? tiles : last - tile;
        for (int row = begin, rows; row < end; row += rows) {
            passes = (end - row + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE, rows = (end - row + passes - 1) / passes;
            some_of[w->form](rows, tiles, w, tile, x, row, sums);
            float *to = out + row * stride + (tile - first) * FP_CHANNELS;
            for (int t = 0; t < tiles; t++)
                for (int r = 0; r < rows; r++)
                    put_tile(w, tile + t, sums + 16 * (t * rows + r), to + r * stride + t * FP_CHANNELS, add);
        }
    }
}

static void product(const fp_weight *w, const fp_rows *x, int first, int last, float *out, int64_t stride, int add) {
    int bytes = fp_is_float(w->form) ? 4 * x->inputs : x->inputs / FP_BLOCK * (int)sizeof(fp_block);
    int most = ROWS_IN_CACHE / bytes / ROWS_AT_ONCE * ROWS_AT_ONCE;
    most = most < ROWS_AT_ONCE ? ROWS_AT_ONCE : most;
    for (int begin = 0; begin < x->count; begin += most)
        product_of_rows(w, x, begin, begin + most < x->count ? begin + most : x->count, first, last, out, stride, add);
}
