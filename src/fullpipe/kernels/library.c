/* What Python calls: which level of instructions serves, and all layers of a step in one call. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "native.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

static const fp_ops *ops = NULL;

#if defined(__x86_64__)
/* What processor and system have, asked of them and not of the compiler's library, which differs. */
typedef struct { int avx2, avx_vnni, avx512; } instructions;

static instructions found_instructions(void) {
    unsigned a, b, c, d, first = 0, state = 0;
    instructions found = {0, 0, 0};
    if (!__get_cpuid(1, &a, &b, &first, &d) || !(first >> 27 & 1)) return found; /* the system keeps no wide registers */
    __asm__("xgetbv" : "=a"(state), "=d"(d) : "c"(0));
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
    int fma = first >> 12 & 1, halves = first >> 29 & 1;
    found.avx2 = (state & 0x06) == 0x06 && fma && halves && (b >> 5 & 1);
    found.avx512 = found.avx2 && (state & 0xe6) == 0xe6 && /* F, DQ, BW, VL, VNNI */
                   (b >> 16 & 1) && (b >> 17 & 1) && (b >> 30 & 1) && (b >> 31 & 1) && (c >> 11 & 1);
    if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) found.avx_vnni = found.avx2 && (a >> 4 & 1);
    return found;
}

/* The operations of a level; NULL: this processor has no such instructions. */
static const fp_ops *ops_of(const char *level) {
    instructions found = found_instructions();
    if (!strcmp(level, "portable")) return &fp_portable;
    if (!strcmp(level, "avx2")) return found.avx2 ? &fp_avx2 : NULL;
#if FP_AVXVNNI
    if (!strcmp(level, "avxvnni")) return found.avx_vnni ? &fp_avxvnni : NULL;
#endif
    if (!strcmp(level, "avx512")) return found.avx512 ? &fp_avx512 : NULL;
    return NULL;
}
#else
static const fp_ops *ops_of(const char *level) { return strcmp(level, "portable") ? NULL : &fp_portable; }
#endif

/* Choose a level for all that follows. Returns whether this processor has it. */
FP_EXPORT int fp_choose(const char *level) {
    const fp_ops *found = ops_of(level);
    if (found) ops = found;
    return found != NULL;
}

static int min(int64_t a, int64_t b) { return (int)(a < b ? a : b); }

/* ---- products ------------------------------------------------------------------------------------------------- */

/* Weights that share their rows, and where their channels go: one behind the other in a row of the result. */
typedef struct {
    const fp_weight *weights[3];
    int count, add, tiles, step;
    fp_rows rows;
    float *out;
    int64_t stride;
} products;

static void some_tiles(void *of, int64_t part, int thread) {
    const products *p = of;
    (void)thread;
    int first = (int)part * p->step, last = min(first + p->step, p->tiles);
    float *out = p->out;
    for (int i = 0, before = 0; i < p->count; before += fp_tiles(p->weights[i]), out += p->weights[i]->outputs, i++) {
        int from = first - before > 0 ? first - before : 0, to = min(last - before, fp_tiles(p->weights[i]));
        if (from < to)
            ops->product(p->weights[i], &p->rows, from, to, out + (int64_t)from * FP_CHANNELS, p->stride, p->add);
    }
}

static void multiply(int threads, products *p) {
    p->tiles = 0;
    for (int i = 0; i < p->count; i++) p->tiles += fp_tiles(p->weights[i]);
    p->step = threads == 1 ? p->tiles : (p->tiles + 6 * threads - 1) / (6 * threads);
    double tiles = (double)p->tiles * p->rows.inputs / FP_BLOCK;
    fp_share(threads, some_tiles, p, (p->tiles + p->step - 1) / p->step, tiles * (8 + 1.6 * p->rows.count));
}

static void quantise_rows(const float *x, int rows, int inputs, fp_block *out) {
    ops->quantise(x, rows * inputs, out);
}

/* x W^T + bias of some rows: x [rows][inputs], out [rows][outputs]. Returns 0 without memory. */
FP_EXPORT int fp_product(const fp_weight *w, const float *x, int rows, float *out, int threads) {
    fp_block *blocks = NULL;
    if (!fp_is_float(w->form)) {
        blocks = malloc((size_t)rows * (w->inputs / FP_BLOCK) * sizeof(fp_block));
        if (!blocks) return 0;
        quantise_rows(x, rows, w->inputs, blocks);
    }
    int granted = fp_enter(threads);
    products p = {{w}, 1, 0, 0, 0, {rows, w->inputs, x, blocks}, out, w->outputs};
    multiply(granted, &p);
    fp_leave(granted);
    free(blocks);
    return 1;
}

/* Weights that came as floats, x [rows][inputs], in the blocks of a file: Q8_0 or Q4_1. The numbers fit into halves. */
FP_EXPORT void fp_anew(int form, const float *x, int rows, int inputs, uint8_t *out) {
    ops->anew(form, x, rows, inputs, out);
}

/* Rows as the products see them: x [count], q [count], scales [count / 32]. */
FP_EXPORT void fp_quantised(const float *x, int count, int8_t *q, float *scales) {
    for (int i = 0; i < count; i += FP_BLOCK) {
        fp_block block;
        ops->quantise(x + i, FP_BLOCK, &block);
        memcpy(q + i, block.q, FP_BLOCK);
        scales[i / FP_BLOCK] = block.scale;
    }
}

/* ---- a step --------------------------------------------------------------------------------------------------- */

typedef struct {
    const fp_model *model;
    const fp_layer *layer;
    int index, threads;
    int64_t rows;
    const fp_step *of;
    int64_t *places, *own_places;  /* of what all rows read, [count], and of where each writes, [rows] */
    int64_t longest;               /* how much one row reads at most */
    float *hidden, *normed, *qkv, *mixed, *wide; /* wide: [rows][intermediate], where down takes floats */
    fp_block *blocks, *wide_blocks;
    float *own;                    /* of each thread */
    int64_t own_floats;
} step;

/* Bytes of a head's keys or values of one slot of a cache; see `fp_cache`. */
FP_EXPORT int64_t fp_cached_bytes(int kind, int size) { return fp_cache_bytes(kind, size); }

/* Where a slot lies, counted in heads from where the same head of the same layer begins in the first block. */
static int64_t place_of(const fp_model *m, int32_t slot) {
    return (int64_t)(slot / FP_SLOTS) * m->layers * 2 * m->kv_heads * FP_SLOTS + slot % FP_SLOTS;
}

static int64_t reads_of(const fp_step *of, int64_t row) {
    const int64_t *span = of->spans + 4 * row;
    return span[1] - span[0] + span[3] - span[2];
}

static int wants_blocks(const fp_weight *w) { return !fp_is_float(w->form); }

static void norm_row(step *s, int64_t row, const float *weight, int quantised) {
    int64_t hidden = s->model->hidden;
    ops->norm(s->hidden + row * hidden, weight, (int)hidden, s->model->eps, s->normed + row * hidden);
    if (quantised) ops->quantise(s->normed + row * hidden, (int)hidden, s->blocks + row * (hidden / FP_BLOCK));
}

static void begin_attention(void *of, int64_t row, int thread) {
    step *s = of;
    (void)thread;
    const fp_layer *l = s->layer;
    norm_row(s, row, l->attention_norm, wants_blocks(&l->query) || wants_blocks(&l->key) || wants_blocks(&l->value));
}

static void begin_mlp(void *of, int64_t row, int thread) {
    step *s = of;
    (void)thread;
    norm_row(s, row, s->layer->mlp_norm, wants_blocks(&s->layer->gate) || wants_blocks(&s->layer->up));
}

/* Where a head of keys (0..kv_heads - 1) or values (behind them) of this layer begins in the first block. */
static uint8_t *cache_of(const step *s, int head) {
    const fp_model *m = s->model;
    int64_t heads = (int64_t)s->index * 2 * m->kv_heads + head;
    return m->cache + heads * FP_SLOTS * fp_cache_bytes(m->kind, m->size);
}

static void write_cache(const step *s, int64_t row, int head, const float *x, float *padded) {
    const fp_model *m = s->model;
    memcpy(padded, x, m->head_dim * sizeof(float));
    for (int i = m->head_dim; i < m->size; i++) padded[i] = 0.0f;
    ops->store(m->kind, padded, m->size, cache_of(s, head) + s->own_places[row] * fp_cache_bytes(m->kind, m->size));
}

/* The bias of a head of keys where the cache is to leave it out, or NULL. */
static const float *left_out(const step *s, int64_t kv_head) {
    const float *bias = s->model->kind == FP_CACHE_I8 && !s->layer->key_norm ? s->layer->key.bias : NULL;
    return bias ? bias + kv_head * s->model->head_dim : NULL;
}

/* Norms of heads, rotation, and what goes into the cache. */
static void rotate_and_write(void *of, int64_t row, int thread) {
    step *s = of;
    const fp_model *m = s->model;
    int64_t half = m->head_dim / 2;
    const float *cosine = m->cosine + s->of->positions[row] * half, *sine = m->sine + s->of->positions[row] * half;
    float *head = s->qkv + row * (m->heads + 2 * m->kv_heads) * m->head_dim, *padded = s->own + thread * s->own_floats;
    for (int h = 0; h < m->heads + 2 * m->kv_heads; h++, head += m->head_dim) {
        const float *weight = h < m->heads ? s->layer->query_norm : s->layer->key_norm;
        if (h < m->heads + m->kv_heads) {
            if (weight) ops->norm(head, weight, m->head_dim, m->eps, head);
            const float *bias = h < m->heads ? NULL : left_out(s, h - m->heads);
            for (int i = 0; bias && i < m->head_dim; i++) head[i] -= bias[i];
            ops->rotate(head, cosine, sine, m->head_dim);
        }
        if (h >= m->heads) write_cache(s, row, h - m->heads, head, padded);
    }
}

/* What the bias that the cache leaves out adds to a query's products with keys: with a pair of it that is turned by an
   angle, a part times the cosine and a part times the sine. turned: room for [groups][head_dim]. */
static void add_left_out(const fp_model *m, const float *bias, const float *queries, float factor, float *turned,
                         fp_context *to) {
    int half = m->head_dim / 2;
    for (int h = 0; h < m->heads / m->kv_heads; h++) {
        const float *q = queries + (int64_t)h * m->size;
        float *own = turned + (int64_t)h * m->head_dim;
        for (int i = 0; i < half; i++) {
            own[i] = (q[i] * bias[i] + q[half + i] * bias[half + i]) * factor;
            own[half + i] = (q[half + i] * bias[i] - q[i] * bias[half + i]) * factor;
        }
    }
    to->turned = turned, to->cosine = m->cosine, to->sine = m->sine;
}

static void attend_one(void *of, int64_t part, int thread) {
    step *s = of;
    const fp_model *m = s->model;
    int64_t row = part / m->kv_heads, kv_head = part % m->kv_heads, groups = m->heads / m->kv_heads;
    const int64_t *span = s->of->spans + 4 * row, *places = s->places + span[0];
    int64_t shared = span[1] - span[0], branch = span[3] - span[2];
    float *queries = s->own + thread * s->own_floats, *mixed = queries + groups * m->size;
    const float *from = s->qkv + row * (m->heads + 2 * m->kv_heads) * m->head_dim + kv_head * groups * m->head_dim;
    float *to = s->mixed + (row * m->heads + kv_head * groups) * m->head_dim;
    memset(queries, 0, groups * m->size * sizeof(float));
    for (int64_t h = 0; h < groups; h++) memcpy(queries + h * m->size, from + h * m->head_dim, m->head_dim * sizeof(float));
    float *turned = mixed + groups * m->size, *scores = turned + groups * m->size;
    if (branch) { /* two runs are made one */
        int64_t before = groups * (3 * m->size + s->longest + 16);
        int64_t *both = (int64_t *)(queries + before + before % 2);
        memcpy(both, places, shared * sizeof(int64_t));
        memcpy(both + shared, s->places + span[2], branch * sizeof(int64_t));
        places = both;
    }
    fp_context context = {cache_of(s, (int)kv_head), cache_of(s, (int)(m->kv_heads + kv_head)), places,
                          (int32_t)(shared + branch), m->size, m->kind, NULL, NULL, NULL,
                          m->head_dim / 2};
    const float *bias = left_out(s, kv_head);
    float factor = 1.0f / sqrtf((float)m->head_dim);
    if (bias) add_left_out(m, bias, queries, factor, turned, &context);
    ops->attend(queries, (int)groups, &context, factor, scores, mixed);
    for (int64_t h = 0; h < groups; h++) memcpy(to + h * m->head_dim, mixed + h * m->size, m->head_dim * sizeof(float));
}

static void quantise_mixed(void *of, int64_t row, int thread) {
    step *s = of;
    (void)thread;
    int width = s->model->heads * s->model->head_dim;
    ops->quantise(s->mixed + row * width, width, s->blocks + row * (width / FP_BLOCK));
}

/* Channels of gate and up that are worked off at once: of floats as many as products take at once (see `products.h`). */
#define MOST_GATED 96
static int gated(const fp_layer *l) { return fp_is_float(l->gate.form) ? MOST_GATED : FP_BLOCK; }

/* Some channels of gate and up for all rows, and what becomes of them. */
static void gate_and_up(void *of, int64_t part, int thread) {
    step *s = of;
    const fp_layer *l = s->layer;
    int most = gated(l), start = (int)part * most, width = l->gate.outputs, count = min(most, width - start);
    int first = start / FP_CHANNELS, last = (start + count + FP_CHANNELS - 1) / FP_CHANNELS;
    float *gates = s->own + thread * s->own_floats, *ups = gates + s->rows * most;
    fp_rows rows = {(int)s->rows, s->model->hidden, s->normed, s->blocks};
    ops->product(&l->gate, &rows, first, last, gates, most, 0);
    ops->product(&l->up, &rows, first, last, ups, most, 0);
    for (int64_t row = 0; row < s->rows; row++) {
        float *own = gates + row * most;
        ops->gate(own, ups + row * most, count);
        if (wants_blocks(&l->down)) ops->quantise(own, count, s->wide_blocks + (row * width + start) / FP_BLOCK);
        else memcpy(s->wide + row * width + start, own, count * sizeof(float));
    }
}

static void run_layer(step *s) {
    const fp_model *m = s->model;
    const fp_layer *l = s->layer;
    int64_t rows = s->rows, qkv = (int64_t)(m->heads + 2 * m->kv_heads) * m->head_dim;
    int mixed = m->heads * m->head_dim;
    double numbers = (double)rows * m->hidden, read = 0;
    for (int64_t row = 0; row < rows; row++) read += (double)reads_of(s->of, row);
    fp_share(s->threads, begin_attention, s, rows, numbers / 4);
    products in = {{&l->query, &l->key, &l->value}, 3, 0, 0, 0, {(int)rows, m->hidden, s->normed, s->blocks}, s->qkv, qkv};
    multiply(s->threads, &in);
    fp_share(s->threads, rotate_and_write, s, rows, numbers / 2);
    fp_share(s->threads, attend_one, s, rows * m->kv_heads, read * mixed / 25);
    if (wants_blocks(&l->out)) fp_share(s->threads, quantise_mixed, s, rows, numbers / 8);
    products out = {{&l->out}, 1, 1, 0, 0, {(int)rows, mixed, s->mixed, s->blocks}, s->hidden, m->hidden};
    multiply(s->threads, &out);
    fp_share(s->threads, begin_mlp, s, rows, numbers / 4);
    int64_t parts = (l->gate.outputs + gated(l) - 1) / gated(l);
    fp_share(s->threads, gate_and_up, s, parts, (double)l->gate.outputs * m->hidden / 256 * (8 + 1.6 * rows));
    products down = {{&l->down}, 1, 1, 0, 0, {(int)rows, m->intermediate, s->wide, s->wide_blocks}, s->hidden, m->hidden};
    multiply(s->threads, &down);
}

static void *cut(uint8_t **free_from, int64_t bytes) {
    void *here = *free_from;
    *free_from += (bytes + 63) & ~63LL;
    return here;
}

/* Divide memory for a step; with NULL only measure it. */
static int64_t lay_out(step *s, uint8_t *from) {
    const fp_model *m = s->model;
    int64_t rows = s->rows, mixed = (int64_t)m->heads * m->head_dim, most = mixed > m->hidden ? mixed : m->hidden;
    int64_t groups = m->heads / m->kv_heads, attention = groups * (3 * m->size + s->longest + 16) + 2 * s->longest + 16;
    int64_t gates = 2 * rows * MOST_GATED;
    uint8_t *at = from;
    s->own_floats = ((attention > gates ? attention : gates) + 31) & ~15LL;
    s->places = cut(&at, s->of->count * 8);
    s->own_places = cut(&at, rows * 8);
    s->normed = cut(&at, rows * m->hidden * 4);
    s->qkv = cut(&at, rows * (mixed + 2LL * m->kv_heads * m->head_dim) * 4);
    s->mixed = cut(&at, rows * mixed * 4);
    s->wide = cut(&at, rows * m->intermediate * 4);
    s->blocks = cut(&at, rows * (most / FP_BLOCK + 1) * (int64_t)sizeof(fp_block));
    s->wide_blocks = cut(&at, rows * (m->intermediate / FP_BLOCK + 1) * (int64_t)sizeof(fp_block));
    s->own = cut(&at, s->threads * s->own_floats * 4);
    return at - from;
}

static int make_room(fp_model *m, int64_t bytes) {
    if (bytes <= m->bytes) return 1;
    free(m->memory);
    m->memory = aligned_alloc(64, (bytes + 63) & ~63LL);
    m->bytes = m->memory ? bytes : 0;
    return m->memory != NULL;
}

FP_EXPORT void fp_release(fp_model *m) {
    free(m->memory);
    m->memory = NULL, m->bytes = 0;
}

/* Whether a row reads a whole path, its own slot last, and nothing beyond the cache. */
static int is_whole(const fp_model *m, const fp_step *of, int64_t row) {
    const int64_t *span = of->spans + 4 * row;
    if (span[0] < 0 || span[1] < span[0] || span[1] > of->count || span[2] < 0 || span[3] < span[2] || span[3] > of->count)
        return 0;
    if (of->positions[row] < 0 || reads_of(of, row) != of->positions[row] + 1) return 0;
    return of->reads[(span[3] > span[2] ? span[3] : span[1]) - 1] == of->slots[row] && of->positions[row] < m->angles;
}

/* All layers for the rows of a step. hidden: [rows][hidden], in place. taps: of how many layers' results a copy goes to
   tapped, [rows][taps][hidden]; tap: which layers, counted from 1. Returns 1; 0 without memory; -1, and nothing is changed, when what a row reads is no path. */
FP_EXPORT int fp_run(fp_model *m, const fp_step *of, float *hidden, const int32_t *tap, int taps, float *tapped,
                     int threads) {
    step s = {.model = m, .of = of, .rows = of->rows, .hidden = hidden, .threads = fp_enter(threads)};
    int outcome = 0;
    outcome = -1;
    for (int64_t i = 0; i < of->count; i++) if (of->reads[i] < 0 || of->reads[i] >= m->slots) goto done;
    for (int64_t row = 0; row < s.rows; row++) {
        if (!is_whole(m, of, row)) goto done;
        if (reads_of(of, row) > s.longest) s.longest = reads_of(of, row);
    }
    outcome = 0;
    if (!make_room(m, lay_out(&s, NULL))) goto done;
    lay_out(&s, m->memory);
    for (int64_t i = 0; i < of->count; i++) s.places[i] = place_of(m, of->reads[i]);
    for (int64_t row = 0; row < s.rows; row++) s.own_places[row] = place_of(m, of->slots[row]);
    for (int i = 0, done = 0; i < m->layers; i++) {
        s.index = i, s.layer = &m->layer[i];
        run_layer(&s);
        if (done == taps || tap[done] != i + 1) continue;
        for (int64_t row = 0; row < s.rows; row++)
            memcpy(tapped + (row * taps + done) * m->hidden, hidden + row * m->hidden, m->hidden * sizeof(float));
        done++;
    }
    outcome = 1;
done:
    fp_leave(s.threads);
    return outcome;
}

/* Final norm and head: hidden [rows][inputs] -> out [rows][outputs]. Returns 0 without memory. */
FP_EXPORT int fp_logits(const fp_weight *head, const float *norm, float eps, const float *hidden, int rows, float *out,
                        int threads) {
    float *normed = malloc((size_t)rows * head->inputs * sizeof(float) + 1);
    if (!normed) return 0;
    for (int64_t row = 0; row < rows; row++)
        ops->norm(hidden + row * head->inputs, norm, head->inputs, eps, normed + row * head->inputs);
    int outcome = fp_product(head, normed, rows, out, threads);
    free(normed);
    return outcome;
}

/* ---- what the machine can do ----------------------------------------------------------------------------------- */

/* Read so many bytes, a multiple of 512, and give something made of them. */
FP_EXPORT int32_t fp_read(const uint8_t *from, int64_t bytes) { return ops->read(from, bytes); }

/* Products of bytes, or of floats, in a loop of nothing else; returns how many. */
FP_EXPORT double fp_spin(int64_t count, int floats) { return floats ? ops->spin_floats(count) : ops->spin_bytes(count); }
