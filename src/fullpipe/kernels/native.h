/* The native kernels: what the files of this folder share, and what Python calls (`__init__.py` mirrors the structs).

   Numbers. A weight stays in the blocks that its file stores; a row is quantised to int8 per block of 32. A block's
   part of a result is an exact integer (of six-bit weights two, with a scale each); the parts are summed in float32, one
   block after the other, with fused multiply-add, each output channel for itself. Weights that are floats are multiplied
   with rows as they are, one input after the other. So a row has the same bits in any company, with any number of
   threads and on every level of instructions. Nothing here may be compiled with -ffast-math or contraction.

   Tiles. Weights lie in tiles of 16 output channels x 32 inputs. A word of 64 bytes has four inputs of each of 16
   channels, so that one instruction multiplies them with four inputs of a row. Word j (0..3) of a tile holds inputs
   4j..4j+3 in its low halves of bytes and 16+4j..16+4j+3 in its high ones; fifth and sixth bits lie in words of their
   own behind them. Eight-bit weights take eight words, plus 128. Scales lie apart, in the order in which tiles are
   read. */
#ifndef FULLPIPE_NATIVE_H
#define FULLPIPE_NATIVE_H

#include <stddef.h>
#include <stdint.h>

#define FP_CHANNELS 16 /* of a tile */
#define FP_BLOCK 32    /* inputs of a tile */
#define FP_SLOTS 256   /* of a block of cache memory; `options.BLOCK` */
#if !defined(__x86_64__)
#define FP_AVXVNNI 0
#elif defined(__clang__)
#define FP_AVXVNNI (__clang_major__ >= 12)
#else
#define FP_AVXVNNI (__GNUC__ >= 11) /* older compilers do not know it */
#endif
#define FP_EXPORT __attribute__((visibility("default")))

typedef enum {
    FP_Q4_0, FP_Q4_1, FP_Q5_0, FP_Q5_1, FP_Q8_0, /* scales of a tile: 16 halves d, and 16 halves m where there is one */
    FP_Q4_K, FP_Q5_K, /* of eight tiles: 16 halves d, 16 halves dmin, then per tile 16 bytes of scale and 16 of minimum */
    FP_Q6_K,          /* of eight tiles: 16 halves d, then per 16 inputs 16 signed bytes */
    FP_F32, FP_F16, FP_BF16, /* numbers as they are, [inputs][16 channels] */
    FP_FORMS
} fp_form;

typedef struct {
    int32_t form, outputs, inputs;
    uint8_t *quants, *scales; /* tiles of channels 0..15 first, in order of inputs */
    const float *bias;        /* [outputs], or NULL */
} fp_weight;

/* 32 inputs of a row. shift: scale times their sum. low: of the first 16. */
typedef struct {
    int8_t q[FP_BLOCK];
    float scale, shift;
    int32_t minus_sum, minus_low;
} fp_block;

/* In what a cache keeps keys and values. Of a head's numbers in int8 the greatest is 127 or -127; their scale, a float,
   stands behind them. Keys in int8 are kept without their bias, which can be a hundred times what differs between them
   and would leave that no precision; attention adds what it does to a product, exactly. */
typedef enum { FP_CACHE_F32, FP_CACHE_F16, FP_CACHE_I8 } fp_cache;

/* Rows that go into a product: as floats [count][inputs], and quantised, [count][inputs / 32]. */
typedef struct {
    int32_t count, inputs;
    const float *x;
    const fp_block *blocks;
} fp_rows;

/* A row's way through attention: a head's keys and values in the first block, and the places it reads, in order of
   position. */
typedef struct {
    const uint8_t *keys, *values; /* of one head: [places], `fp_cache_bytes` each */
    const int64_t *places;
    int32_t count, size, kind; /* size: numbers of a head, a multiple of 16. kind: fp_cache */
    /* What a bias that the keys leave out, turned by the angles of each position, adds to a head's products with them:
       turned [heads][2 * half], the parts of cosine [count][half] and of sine; NULL: nothing. For int8 alone. */
    const float *turned, *cosine, *sine;
    int32_t half; /* of a head's own numbers */
} fp_context;

/* What each level of instructions implements. */
typedef struct {
    /* Tiles first..last (exclusive) of 16 channels for all rows; out[row * stride] is the first channel of the first.
       add: onto what is there. */
    void (*product)(const fp_weight *w, const fp_rows *rows, int first, int last, float *out, int64_t stride, int add);
    void (*quantise)(const float *x, int count, fp_block *out);
    void (*norm)(const float *x, const float *weight, int count, float eps, float *out);
    /* Pairs (i, i + size / 2) of one head turn by angles with this cosine and sine, [size / 2] each. */
    void (*rotate)(float *head, const float *cosine, const float *sine, int size);
    void (*store)(int kind, const float *x, int size, uint8_t *out); /* a head into the cache */
    /* Heads that share keys and values: queries and out [heads][size]; scores: room for heads * (count + 16). */
    void (*attend)(const float *queries, int heads, const fp_context *context, float factor, float *scores, float *out);
    void (*gate)(float *gate, const float *up, int count); /* silu(gate) * up, in place */
    /* Rows of weights, x [rows][inputs], as a file's rows in blocks: of Q8_0 or Q4_1. */
    void (*anew)(int form, const float *x, int rows, int inputs, uint8_t *out);
    /* For measuring the limits: read memory and give something made of it; do nothing but multiply bytes, or floats, and
       give how many products that were. */
    int32_t (*read)(const uint8_t *from, int64_t bytes);
    double (*spin_bytes)(int64_t count), (*spin_floats)(int64_t count);
} fp_ops;

/* One layer. The last two norms are of single heads, [head_dim], or NULL. */
typedef struct {
    const float *attention_norm, *mlp_norm, *query_norm, *key_norm;
    fp_weight query, key, value, out, gate, up, down;
} fp_layer;

/* kind: fp_cache. size: of a head in the cache, head_dim rounded up to a multiple of 16.
   cosine, sine: [angles][head_dim / 2], by position.
   cache: [blocks][layers][2 * kv_heads][FP_SLOTS], `fp_cache_bytes` each, keys first. So a block is one piece of memory,
   and what nobody uses is never touched. */
typedef struct {
    int32_t layers, hidden, heads, kv_heads, head_dim, size, intermediate, kind;
    float eps;
    const fp_layer *layer;
    uint8_t *cache;
    int64_t slots; /* of the cache */
    const float *cosine, *sine;
    int64_t angles;
    void *memory; /* for what a step needs between its layers; grows */
    int64_t bytes;
} fp_model;

/* The rows of a step; see `models/step.py`. positions, slots: [rows]. reads: [count], slots of the cache. spans:
   [rows][4], first and end of the two runs of reads that a row reads, in order of position. */
typedef struct {
    int64_t rows, count;
    const int64_t *positions;
    const int32_t *slots, *reads;
    const int64_t *spans;
} fp_step;

/* Work in parts 0..count - 1, each done by one of some threads, 0..threads - 1. ns: about how long it takes one. */
typedef void fp_part(void *of, int64_t part, int thread);
int fp_enter(int threads); /* how many there are for the caller, who may run parts until it leaves */
void fp_leave(int threads);
void fp_share(int threads, fp_part *part, void *of, int64_t count, double ns);

extern const fp_ops fp_portable;
#if defined(__x86_64__)
extern const fp_ops fp_avx2, fp_avx512;
#endif
#if FP_AVXVNNI
extern const fp_ops fp_avxvnni;
#endif

static inline int fp_tiles(const fp_weight *w) { return (w->outputs + FP_CHANNELS - 1) / FP_CHANNELS; }

static inline int fp_is_float(int form) { return form >= FP_F32; }

/* Bytes of a tile's numbers, of 16 x 32 for blocks and of 16 x 1 for floats; of its scales, and how many tiles share
   one record of these. */
static inline int fp_tile_bytes(int form) {
    static const int16_t bytes[FP_FORMS] = {256, 256, 320, 320, 512, 256, 320, 384, 64, 32, 32};
    return bytes[form];
}
static inline int fp_scale_bytes(int form) {
    static const int16_t bytes[FP_FORMS] = {32, 64, 32, 64, 32, 320, 320, 288, 0, 0, 0};
    return bytes[form];
}
/* Bytes of a head's keys or values of one slot, so that all of them begin at multiples of 16. */
static inline int64_t fp_cache_bytes(int kind, int size) {
    return kind == FP_CACHE_F32 ? 4 * (int64_t)size : kind == FP_CACHE_F16 ? 2 * (int64_t)size : size + 16;
}
static inline int fp_scale_tiles(int form) { return form == FP_Q4_K || form == FP_Q5_K || form == FP_Q6_K ? 8 : 1; }

#endif
