/* What lies between the products. Included by each level after its vector operations; lanes are summed in one order. */

/* What turns numbers up to this into integers up to 127, and back. */
INLINE float into_bytes(float most) { return most > 1e-30f ? 127.0f / most : 0.0f; }
INLINE float out_of_bytes(float most) { return most > 1e-30f ? most / 127.0f : 0.0f; }

static void quantise(const float *x, int count, fp_block *out) {
    for (int start = 0; start < count; start += FP_BLOCK, out++) {
        vf low = f_load(x + start), high = f_load(x + start + 16);
        float most = f_greatest(f_max(f_abs(low), f_abs(high)));
        vf factor = f_all(into_bytes(most));
        vi first = i_rounded(f_mul(low, factor)), second = i_rounded(f_mul(high, factor));
        i_store_bytes(out->q, first), i_store_bytes(out->q + 16, second);
        int32_t sum = i_sum(first);
        out->minus_low = -sum;
        sum += i_sum(second);
        out->minus_sum = -sum;
        out->scale = out_of_bytes(most);
        vf small = f_all(0x1p-6f); /* a sum of finite numbers stays finite, one of others does not */
        if (!(f_sum(f_add(f_mul(f_abs(low), small), f_mul(f_abs(high), small))) < INFINITY)) out->scale = NAN;
        out->shift = out->scale * (float)sum;
    }
}

/* Float vectors of any length: the rest is filled up with zeros. */
INLINE vf f_part(const float *x, int count) {
    float whole[16] = {0};
    memcpy(whole, x, count * sizeof(float));
    return f_load(whole);
}

INLINE void f_store_part(float *out, vf x, int count) {
    float whole[16];
    f_store(whole, x);
    memcpy(out, whole, count * sizeof(float));
}

static void norm(const float *x, const float *weight, int count, float eps, float *out) {
    vf squares = f_zero();
    int whole = count & ~15;
    for (int i = 0; i < whole; i += 16) squares = f_fma(f_load(x + i), f_load(x + i), squares);
    if (whole < count) {
        vf rest = f_part(x + whole, count - whole);
        squares = f_fma(rest, rest, squares);
    }
    vf scale = f_all(1.0f / sqrtf(f_sum(squares) / (float)count + eps));
    for (int i = 0; i < whole; i += 16) f_store(out + i, f_mul(f_mul(f_load(x + i), scale), f_load(weight + i)));
    if (whole < count) {
        vf rest = f_mul(f_mul(f_part(x + whole, count - whole), scale), f_part(weight + whole, count - whole));
        f_store_part(out + whole, rest, count - whole);
    }
}

static void rotate(float *head, const float *cosine, const float *sine, int size) {
    for (int i = 0, half = size / 2; i < half; i++) {
        float first = head[i], second = head[half + i];
        head[i] = fmaf(first, cosine[i], -(second * sine[i]));
        head[half + i] = fmaf(second, cosine[i], first * sine[i]);
    }
}

static void store_halves(const float *x, int size, uint16_t *out) {
    vf most = f_all(65504.0f), least = f_all(-65504.0f);
    for (int i = 0; i < size; i += 16) f_store_halves(out + i, f_max(f_min(f_load(x + i), most), least));
}

static void store_bytes(const float *x, int size, uint8_t *out) {
    vf most = f_zero(), sum = f_zero(), small = f_all(0x1p-12f); /* see `quantise` */
    for (int i = 0; i < size; i += 16) {
        vf own = f_abs(f_load(x + i));
        most = f_max(most, own), sum = f_fma(own, small, sum);
    }
    float greatest = f_greatest(most), scale = f_sum(sum) < INFINITY ? out_of_bytes(greatest) : NAN;
    vf factor = f_all(into_bytes(greatest));
    for (int i = 0; i < size; i += 16) i_store_bytes((int8_t *)out + i, i_rounded(f_mul(f_load(x + i), factor)));
    memcpy(out + size, &scale, sizeof scale);
}

static void store(int kind, const float *x, int size, uint8_t *out) {
    if (kind == FP_CACHE_I8) store_bytes(x, size, out);
    else if (kind == FP_CACHE_F16) store_halves(x, size, (uint16_t *)out);
    else memcpy(out, x, size * sizeof(float));
}

/* e to the x, to about one unit in the last place; below -87 and above 88 as at these. */
INLINE vf f_exp(vf x) {
    x = f_max(f_min(x, f_all(88.0f)), f_all(-87.0f));
    vi n = i_rounded(f_mul(x, f_all(1.44269504088896341f)));
    vf k = f_ints(n);
    x = f_fma(k, f_all(-0.693359375f), x);
    x = f_fma(k, f_all(2.12194440e-4f), x);
    vf y = f_all(1.9875691500e-4f);
    y = f_fma(y, x, f_all(1.3981999507e-3f));
    y = f_fma(y, x, f_all(8.3334519073e-3f));
    y = f_fma(y, x, f_all(4.1665795894e-2f));
    y = f_fma(y, x, f_all(1.6666665459e-1f));
    y = f_fma(y, x, f_all(5.0000001201e-1f));
    y = f_fma(y, f_mul(x, x), x);
    return f_mul(f_add(y, f_all(1.0f)), f_power(n));
}

INLINE vf gated(vf gate, vf up) {
    return f_mul(f_div(gate, f_add(f_all(1.0f), f_exp(f_sub(f_zero(), gate)))), up);
}

static void gate(float *gate, const float *up, int count) {
    int whole = count & ~15;
    for (int i = 0; i < whole; i += 16) f_store(gate + i, gated(f_load(gate + i), f_load(up + i)));
    if (whole < count) {
        vf rest = gated(f_part(gate + whole, count - whole), f_part(up + whole, count - whole));
        f_store_part(gate + whole, rest, count - whole);
    }
}

INLINE vf cached(int kind, const uint8_t *row, int part) {
    if (kind == FP_CACHE_I8) return f_ints(i_signed_bytes((const int8_t *)row + 16 * part));
    return kind == FP_CACHE_F16 ? f_halves((const uint16_t *)row + 16 * part) : f_load((const float *)row + 16 * part);
}

/* x times the scale of what is cached there. */
INLINE float scaled(int kind, const uint8_t *row, int size, float x) {
    if (kind != FP_CACHE_I8) return x;
    float scale;
    memcpy(&scale, row + size, sizeof scale);
    return x * scale;
}

INLINE vf f_up_to(const float *x, int count) { return count < 16 ? f_part(x, count) : f_load(x); }

/* Weights of the slots, and their sum, from products with their keys. */
INLINE float softmax(float *scores, int count) {
    for (int i = count; i < ((count + 15) & ~15); i++) scores[i] = -INFINITY;
    vf most = f_load(scores), total = f_zero();
    for (int i = 16; i < count; i += 16) most = f_max(most, f_load(scores + i));
    vf greatest = f_all(f_greatest(most));
    for (int i = 0; i < count; i += 16) {
        vf weight = f_exp(f_sub(f_load(scores + i), greatest));
        if (i + 16 > count) weight = f_first(weight, count - i);
        f_store(scores + i, weight);
        total = f_add(total, weight);
    }
    return f_sum(total);
}

/* Some heads (a constant) over what a row reads, in the order of that. together: so many times 16 numbers of the
   values (a constant, which divides all) are mixed at a time: 1, or all of a size that is a constant and
   of which half is a multiple of 16. kind: of the cache (a constant). */
INLINE void attend_heads(int heads, int parts, int together, int kind, const float *queries, const fp_context *c,
                         float factor, float *scores, float *out) {
    int64_t row = fp_cache_bytes(kind, c->size);
    int room = c->count + 16;
    for (int i = 0; i < c->count; i++) {
        const uint8_t *key = c->keys + c->places[i] * row;
        vf sums[4];
        UNROLL for (int h = 0; h < heads; h++) sums[h] = f_zero();
        UNROLL for (int p = 0; p < parts; p++) {
            vf k = cached(kind, key, p);
            UNROLL for (int h = 0; h < heads; h++)
                sums[h] = f_fma(f_load(queries + h * c->size + 16 * p), k, sums[h]);
        }
        float times = scaled(kind, key, c->size, factor);
        if (kind != FP_CACHE_I8 || !c->turned) {
            UNROLL for (int h = 0; h < heads; h++) scores[h * room + i] = f_sum(sums[h]) * times;
            continue;
        }
        UNROLL for (int h = 0; h < heads; h++) sums[h] = f_mul(sums[h], f_all(times));
        UNROLL for (int p = 0; p < (parts + 1) / 2; p++) {
            int left = together > 1 ? 16 : c->half - 16 * p;
            vf cosine = f_up_to(c->cosine + (int64_t)i * c->half + 16 * p, left);
            vf sine = f_up_to(c->sine + (int64_t)i * c->half + 16 * p, left);
            UNROLL for (int h = 0; h < heads; h++) {
                const float *own = c->turned + (2 * h) * c->half + 16 * p;
                sums[h] = f_fma(f_up_to(own, left), cosine, sums[h]);
                sums[h] = f_fma(f_up_to(own + c->half, left), sine, sums[h]);
            }
        }
        UNROLL for (int h = 0; h < heads; h++) scores[h * room + i] = f_sum(sums[h]);
    }
    float totals[4];
    UNROLL for (int h = 0; h < heads; h++) totals[h] = softmax(scores + h * room, c->count);
    for (int begin = 0; begin < parts; begin += together) {
        vf mixed[4][8];
        UNROLL for (int h = 0; h < heads; h++) UNROLL for (int p = 0; p < together; p++) mixed[h][p] = f_zero();
        for (int i = 0; i < c->count; i++) {
            const uint8_t *value = c->values + c->places[i] * row;
            float weights[4];
            UNROLL for (int h = 0; h < heads; h++) weights[h] = scaled(kind, value, c->size, scores[h * room + i]);
            UNROLL for (int p = 0; p < together; p++) {
                vf v = cached(kind, value, begin + p);
                UNROLL for (int h = 0; h < heads; h++) mixed[h][p] = f_fma(f_all(weights[h]), v, mixed[h][p]);
            }
        }
        UNROLL for (int h = 0; h < heads; h++) UNROLL for (int p = 0; p < together; p++)
            f_store(out + h * c->size + 16 * (begin + p), f_div(mixed[h][p], f_all(totals[h])));
    }
}

#define ATTEND(name, heads, parts, together, kind)                                                                   \
    static void name(const float *q, const fp_context *c, float factor, float *scores, float *out) {                 \
        attend_heads(heads, parts, together, kind, q, c, factor, scores, out);                                       \
    }
/* As many of some heads as are worked off at once; how many. */
#define ATTEND_SOME(name, kind)                                                                                      \
    ATTEND(name##_64_4, 4, 4, 4, kind) ATTEND(name##_64_1, 1, 4, 4, kind) ATTEND(name##_128_2, 2, 8, 8, kind)         \
    ATTEND(name##_128_1, 1, 8, 8, kind) ATTEND(name##_any, 1, c->size / 16, 1, kind)                                  \
    static int name(const float *q, int heads, const fp_context *c, float factor, float *scores, float *out) {       \
        if (2 * c->half != c->size) return name##_any(q, c, factor, scores, out), 1;                                 \
        if (c->size == 64 && heads >= 4) return name##_64_4(q, c, factor, scores, out), 4;                           \
        if (c->size == 64) return name##_64_1(q, c, factor, scores, out), 1;                                         \
        if (c->size == 128 && heads >= 2) return name##_128_2(q, c, factor, scores, out), 2;                         \
        if (c->size == 128) return name##_128_1(q, c, factor, scores, out), 1;                                       \
        return name##_any(q, c, factor, scores, out), 1;                                                             \
    }
ATTEND_SOME(attend_floats, FP_CACHE_F32) ATTEND_SOME(attend_halves, FP_CACHE_F16) ATTEND_SOME(attend_bytes, FP_CACHE_I8)

/* A head's bits do not depend on how many are worked off at once: each has sums of its own, in the same order. */
static void attend(const float *queries, int heads, const fp_context *c, float factor, float *scores, float *out) {
    fp_context own = *c;
    for (int h = 0, done; h < heads; h += done) {
        const float *q = queries + h * c->size;
        if (c->turned) own.turned = c->turned + 2 * h * c->half;
        float *o = out + h * c->size;
        if (c->kind == FP_CACHE_I8) done = attend_bytes(q, heads - h, &own, factor, scores, o);
        else if (c->kind == FP_CACHE_F16) done = attend_halves(q, heads - h, &own, factor, scores, o);
        else done = attend_floats(q, heads - h, &own, factor, scores, o);
    }
}

static int32_t read_all(const uint8_t *from, int64_t bytes) {
    vi sums[8];
    for (int j = 0; j < 8; j++) sums[j] = i_zero();
    for (int64_t i = 0; i + 512 <= bytes; i += 512) {
        UNROLL for (int j = 0; j < 8; j++) {
            __builtin_prefetch(from + i + 4096 + 64 * j);
            sums[j] = i_add(sums[j], i_load(from + i + 64 * j));
        }
    }
    for (int j = 1; j < 8; j++) sums[0] = i_add(sums[0], sums[j]);
    return i_sum(sums[0]);
}

/* Nothing but products of bytes, in as many sums as hide the time that one takes. Returns how many. */
static double spin_bytes(int64_t count) {
    enum { SUMS = ONE_WORD_AT_A_TIME ? 16 : 8 };
    vb w[8];
    word x[16] = {0x01010101, 0x02020202, 0x03030303, 0x01020304, 1, 2, 3, 4};
    vi sums[SUMS];
    for (int j = 0; j < 8; j++) w[j] = b_load((const uint8_t *)x);
    for (int r = 0; r < SUMS; r++) sums[r] = i_shifted(r, 1);
    for (int64_t i = 0; i < count; i++) {
        __asm__ volatile("" : "+m"(x)); /* as if they were others each time: nothing is computed once for all */
#if ONE_WORD_AT_A_TIME
        UNROLL for (int j = 0; j < 8; j++)
            UNROLL for (int r = 0; r < SUMS; r++) sums[r] = i_dots(sums[r], w + j, x + (j + r) % 8, 1, 4);
#else
        UNROLL for (int r = 0; r < SUMS; r++) sums[r] = i_dots(sums[r], w, x + r, 8, 4);
#endif
    }
    int32_t kept = 0;
    for (int j = 0; j < SUMS; j++) kept += i_sum(sums[j]);
    volatile int32_t seen = kept;
    (void)seen;
    return 64.0 * 8 * SUMS * (double)count;
}

/* The same of floats. */
static double spin_floats(int64_t count) {
    enum { SUMS = ONE_WORD_AT_A_TIME ? 16 : 6 };
    float x[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    vf sums[SUMS], w = f_all(1e-9f);
    for (int r = 0; r < SUMS; r++) sums[r] = f_all((float)r);
    for (int64_t i = 0; i < count; i++) {
        __asm__ volatile("" : "+m"(x));
        UNROLL for (int j = 0; j < 4; j++)
            UNROLL for (int r = 0; r < SUMS; r++) sums[r] = f_fma(w, f_all(x[j]), sums[r]);
    }
    float kept = 0;
    for (int r = 0; r < SUMS; r++) kept += f_sum(sums[r]);
    volatile float seen = kept;
    (void)seen;
    return 16.0 * 4 * SUMS * (double)count;
}
