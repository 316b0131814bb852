/* Weights that came as floats become blocks as a GGUF file has them. Included by each level after its vector operations,
   and f_less(a, b, x, y): x where a < b, else y. Sixteen rows at a time, one in each lane, so that nothing is summed
   across lanes and a row's blocks have the same bits on every level.

   Q8_0: the scale is the greatest size / 127. Q4_1: of some ranges, each with its scale and minimum fitted by least
   squares to the integers that it gives, the one with the least squared error; what is measured is what is stored, with
   scale and minimum as halves. Q4_0 is Q4_1 with a minimum of -8 scales, so there is nothing it could say better. */

#define TRIES 4           /* cuts at each end of the range, none among them */
#define CUT 0.03125f      /* by how much of the range each cut goes on */
#define LEAST 0x1p-24f    /* the smallest half above zero */

INLINE vf as_halves(vf x, uint16_t *halves) {
    f_store_halves(halves, x);
    return f_halves(halves);
}

/* (x - from) / step as an integer from least to most, a step of zero taken for a tiny one. */
INLINE vf steps_to(vf x, vf from, vf inverse, float least, float most) {
    vf exact = f_mul(f_sub(x, from), inverse);
    return f_ints(i_rounded(f_min(f_max(exact, f_all(least)), f_all(most))));
}

INLINE vf inverse_of(vf step) { return f_div(f_all(1.0f), f_max(step, f_all(LEAST))); }

typedef struct { vf scale, minimum, error; } fit;

/* Scale and minimum for the integers that a range gives; x: [32], all at least zero. low: what x were taken from. */
INLINE fit fitted(const vf *x, vf low, vf from, vf to) {
    uint16_t halves[16];
    vf inverse = f_mul(f_all(15.0f), inverse_of(f_sub(to, from)));
    vf q1 = f_zero(), q2 = f_zero(), x1 = f_zero(), xq = f_zero();
    for (int i = 0; i < FP_BLOCK; i++) {
        vf q = steps_to(x[i], from, inverse, 0, 15);
        q1 = f_add(q1, q), q2 = f_fma(q, q, q2), x1 = f_add(x1, x[i]), xq = f_fma(x[i], q, xq);
    }
    /* integers, so zero exactly where all are the same */
    vf spread = f_max(f_sub(f_mul(f_all(FP_BLOCK), q2), f_mul(q1, q1)), f_all(1.0f));
    vf slope = f_div(f_sub(f_mul(f_all(FP_BLOCK), xq), f_mul(x1, q1)), spread);
    fit found;
    found.scale = as_halves(slope, halves);
    vf mean = f_mul(f_sub(x1, f_mul(found.scale, q1)), f_all(1.0f / FP_BLOCK));
    found.minimum = as_halves(f_add(mean, low), halves), found.error = f_zero();
    vf start = f_sub(found.minimum, low);
    inverse = inverse_of(found.scale);
    for (int i = 0; i < FP_BLOCK; i++) {
        vf off = f_sub(x[i], f_fma(steps_to(x[i], start, inverse, 0, 15), found.scale, start));
        found.error = f_fma(off, off, found.error);
    }
    return found;
}

static fit best_fit(const vf *x) {
    vf low = x[0], high = x[0], above[FP_BLOCK];
    for (int i = 1; i < FP_BLOCK; i++) low = f_min(low, x[i]), high = f_max(high, x[i]);
    for (int i = 0; i < FP_BLOCK; i++) above[i] = f_sub(x[i], low);
    vf range = f_sub(high, low), cut = f_mul(range, f_all(CUT));
    fit best = fitted(above, low, f_zero(), range);
    for (int t = 1; t < TRIES * TRIES; t++) {
        vf from = f_mul(f_all((float)(t / TRIES)), cut), to = f_sub(range, f_mul(f_all((float)(t % TRIES)), cut));
        fit other = fitted(above, low, from, to);
        best.scale = f_less(other.error, best.error, other.scale, best.scale);
        best.minimum = f_less(other.error, best.error, other.minimum, best.minimum);
        best.error = f_min(other.error, best.error);
    }
    return best;
}

/* A block of each lane, with the halves that go before its integers; q: [32][16]. */
INLINE void four_bits(const vf *x, uint16_t *scales, uint16_t *minima, int8_t *q) {
    fit best = best_fit(x);
    f_store_halves(scales, best.scale), f_store_halves(minima, best.minimum);
    vf inverse = inverse_of(best.scale);
    for (int i = 0; i < FP_BLOCK; i++)
        i_store_bytes(q + 16 * i, i_rounded(steps_to(x[i], best.minimum, inverse, 0, 15)));
}

INLINE void eight_bits(const vf *x, uint16_t *scales, int8_t *q) {
    vf most = f_abs(x[0]);
    for (int i = 1; i < FP_BLOCK; i++) most = f_max(most, f_abs(x[i]));
    vf inverse = inverse_of(as_halves(f_div(most, f_all(127.0f)), scales));
    for (int i = 0; i < FP_BLOCK; i++) i_store_bytes(q + 16 * i, i_rounded(steps_to(x[i], f_zero(), inverse, -127, 127)));
}

/* Rows of floats, x [rows][inputs], as a file's rows of Q8_0 or Q4_1. */
static void blocks_anew(int form, const float *x, int rows, int inputs, uint8_t *out) {
    int bytes = form == FP_Q8_0 ? 34 : 20, blocks = inputs / FP_BLOCK;
    for (int first = 0; first < rows; first += 16) {
        int count = rows - first < 16 ? rows - first : 16;
        for (int b = 0; b < blocks; b++) {
            float lanes_of[FP_BLOCK][16] __attribute__((aligned(64)));
            vf here[FP_BLOCK];
            uint16_t scales[16], minima[16];
            int8_t q[16 * FP_BLOCK];
            memset(lanes_of, 0, sizeof lanes_of);
            for (int r = 0; r < count; r++) {
                const float *from = x + (int64_t)(first + r) * inputs + b * FP_BLOCK;
                for (int i = 0; i < FP_BLOCK; i++) lanes_of[i][r] = from[i];
            }
            for (int i = 0; i < FP_BLOCK; i++) here[i] = f_load(lanes_of[i]);
            if (form == FP_Q8_0) eight_bits(here, scales, q);
            else four_bits(here, scales, minima, q);
            for (int r = 0; r < count; r++) {
                uint8_t *to = out + ((int64_t)(first + r) * blocks + b) * bytes;
                memcpy(to, scales + r, 2);
                if (form == FP_Q8_0) {
                    for (int i = 0; i < FP_BLOCK; i++) to[2 + i] = (uint8_t)q[16 * i + r];
                    continue;
                }
                memcpy(to + 2, minima + r, 2);
                for (int i = 0; i < 16; i++) to[4 + i] = (uint8_t)(q[16 * i + r] | q[16 * (i + 16) + r] << 4);
            }
        }
    }
}
