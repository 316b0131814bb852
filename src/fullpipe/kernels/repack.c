/* From the blocks of a GGUF file into tiles (see native.h), and back to floats. No number is rounded. */
#include <math.h>
#include <string.h>

#include "native.h"

/* Where a form's blocks have what: numbers and bytes of a block, and offsets of d, m (or dmin), scales, low bits, and
   bits above these; -1: there is none. */
typedef struct { int16_t numbers, bytes, d, m, scales, low, high; } layout;

static const layout layouts[FP_FORMS] = {
    [FP_Q4_0] = {32, 18, 0, -1, -1, 2, -1},    [FP_Q4_1] = {32, 20, 0, 2, -1, 4, -1},
    [FP_Q5_0] = {32, 22, 0, -1, -1, 6, 2},     [FP_Q5_1] = {32, 24, 0, 2, -1, 8, 4},
    [FP_Q8_0] = {32, 34, 0, -1, -1, 2, -1},    [FP_Q4_K] = {256, 144, 0, 2, 4, 16, -1},
    [FP_Q5_K] = {256, 176, 0, 2, 4, 48, 16},   [FP_Q6_K] = {256, 210, 208, -1, 192, 0, 128},
};

static int bytes_per_number(int form) { return form == FP_F32 ? 4 : 2; }

/* Bytes that a row of so many inputs takes in the file. */
FP_EXPORT int64_t fp_row_bytes(int form, int inputs) {
    if (fp_is_float(form)) return (int64_t)inputs * bytes_per_number(form);
    return (int64_t)(inputs / layouts[form].numbers) * layouts[form].bytes;
}

/* Bytes that a weight takes in tiles: numbers, and scales. */
FP_EXPORT int64_t fp_quant_bytes(int form, int outputs, int inputs) {
    int64_t tiles = (outputs + FP_CHANNELS - 1) / FP_CHANNELS;
    return tiles * (fp_is_float(form) ? inputs : inputs / FP_BLOCK) * fp_tile_bytes(form);
}
FP_EXPORT int64_t fp_scales_bytes(int form, int outputs, int inputs) {
    int64_t tiles = (outputs + FP_CHANNELS - 1) / FP_CHANNELS;
    return fp_is_float(form) ? 0 : tiles * (inputs / FP_BLOCK / fp_scale_tiles(form)) * fp_scale_bytes(form);
}

/* Bytes are taken eight or four at a time; no bit crosses into a neighbour that the mask leaves. */
static uint64_t eight_at(const uint8_t *at) { uint64_t x; memcpy(&x, at, 8); return x; }
static uint32_t four_at(const uint8_t *at) { uint32_t x; memcpy(&x, at, 4); return x; }
#define EACH8(byte) ((byte) * 0x0101010101010101ULL)
#define EACH4(byte) ((byte) * 0x01010101U)

/* Bits 0..7 of a byte as eight bytes of 0 or 1. */
static uint64_t bits_apart(uint8_t bits) {
    return ((EACH8(bits) & 0x8040201008040201ULL) + EACH8(0x7f)) >> 7 & EACH8(1);
}

/* The 32 numbers of part `part` of a block, as 0..63 without offset, or with Q8_0 plus 128. */
static void numbers_of(int form, const uint8_t *block, int part, uint8_t *out) {
    const layout *at = &layouts[form];
    const uint8_t *low = block + at->low, *high = block + at->high;
    uint64_t x[4];
    for (int i = 0; i < 4; i++) {
        switch (form) {
        case FP_Q8_0:
            x[i] = eight_at(low + 8 * i) ^ EACH8(0x80);
            break;
        case FP_Q4_K: case FP_Q5_K: /* two parts share 32 bytes */
            x[i] = eight_at(low + part / 2 * 32 + 8 * i) >> part % 2 * 4 & EACH8(15);
            if (form == FP_Q5_K) x[i] |= (eight_at(high + 8 * i) >> part & EACH8(1)) << 4;
            break;
        case FP_Q6_K: /* four parts share 64 bytes of low and 32 of high bits */
            x[i] = eight_at(low + part / 4 * 64 + part % 2 * 32 + 8 * i) >> part % 4 / 2 * 4 & EACH8(15);
            x[i] |= (eight_at(high + part / 4 * 32 + 8 * i) >> part % 4 * 2 & EACH8(3)) << 4;
            break;
        default:
            x[i] = eight_at(low + i % 2 * 8) >> i / 2 * 4 & EACH8(15);
            if (at->high >= 0) x[i] |= bits_apart(high[i]) << 4;
        }
    }
    memcpy(out, x, 32);
}

/* 32 numbers of one channel into a tile. */
static void put_numbers(int form, const uint8_t *in, int channel, uint8_t *tile) {
    uint32_t fifth = 0, top[2] = {0, 0};
    tile += 4 * channel;
    for (int j = 0; j < 8; j++) {
        uint32_t word = four_at(in + 4 * j);
        if (form == FP_Q8_0) memcpy(tile + 64 * j, &word, 4);
        fifth |= (word >> 4 & EACH4(1)) << j;
        top[j / 4] |= (word >> 4 & EACH4(3)) << 2 * (j % 4);
    }
    if (form == FP_Q8_0) return;
    for (int j = 0; j < 4; j++) {
        uint32_t both = (four_at(in + 4 * j) & EACH4(15)) | (four_at(in + 16 + 4 * j) & EACH4(15)) << 4;
        memcpy(tile + 64 * j, &both, 4);
    }
    if (fp_tile_bytes(form) == 320) memcpy(tile + 256, &fifth, 4);
    if (form == FP_Q6_K) memcpy(tile + 256, &top[0], 4), memcpy(tile + 320, &top[1], 4);
}

/* Scale and minimum, 6 bits each, of part `part` of a K block. */
static void k_scale(const uint8_t *packed, int part, uint8_t *scale, uint8_t *minimum) {
    if (part < 4) {
        *scale = packed[part] & 63, *minimum = packed[part + 4] & 63;
    } else {
        *scale = (packed[part + 4] & 15) | (packed[part - 4] >> 6) << 4;
        *minimum = packed[part + 4] >> 4 | (packed[part] >> 6) << 4;
    }
}

static int is_finite_half(const uint8_t *half) { return (half[1] & 0x7c) != 0x7c; }

/* The scales of one channel of a block into the record of its tiles. Returns whether they are finite. */
static int put_scales(int form, const uint8_t *block, int channel, uint8_t *record) {
    const layout *at = &layouts[form];
    memcpy(record + 2 * channel, block + at->d, 2);
    int finite = is_finite_half(block + at->d);
    if (at->m >= 0) {
        memcpy(record + 32 + 2 * channel, block + at->m, 2);
        finite &= is_finite_half(block + at->m);
    }
    if (form == FP_Q4_K || form == FP_Q5_K)
        for (int part = 0; part < 8; part++) {
            uint8_t *own = record + 64 + 32 * part + channel;
            k_scale(block + at->scales, part, own, own + 16);
        }
    if (form == FP_Q6_K) for (int half = 0; half < 16; half++) record[32 + 16 * half + channel] = block[at->scales + half];
    return finite;
}

static int put_floats(const fp_weight *w, const uint8_t *row, int channel, uint8_t *tile) {
    int size = bytes_per_number(w->form), finite = 1;
    for (int i = 0; i < w->inputs; i++) {
        const uint8_t *x = row + (int64_t)i * size;
        memcpy(tile + ((int64_t)i * FP_CHANNELS + channel) * size, x, size);
        finite &= w->form == FP_F16 ? is_finite_half(x) : (x[size - 1] & 0x7f) != 0x7f || !(x[size - 2] & 0x80);
    }
    return finite;
}

/* Rows of a file, one behind the other, into the tiles of output channels first, first + 1, ...
   Returns 0 when there is a number that is not finite. What is left of the last tile must be zero before. */
FP_EXPORT int fp_repack(const fp_weight *w, int first, int rows, const uint8_t *raw) {
    int64_t row_bytes = fp_row_bytes(w->form, w->inputs);
    int finite = 1;
    if (fp_is_float(w->form)) {
        for (int r = 0; r < rows; r++) {
            int64_t tile = (first + r) / FP_CHANNELS;
            uint8_t *to = w->quants + tile * w->inputs * fp_tile_bytes(w->form);
            finite &= put_floats(w, raw + r * row_bytes, (first + r) % FP_CHANNELS, to);
        }
        return finite;
    }
    const layout *at = &layouts[w->form];
    int parts = at->numbers / FP_BLOCK, blocks = w->inputs / at->numbers;
    for (int begin = 0, many; begin < rows; begin += many) { /* a tile's channels block by block: they share its lines */
        int channel = (first + begin) % FP_CHANNELS;
        many = rows - begin < FP_CHANNELS - channel ? rows - begin : FP_CHANNELS - channel;
        int64_t tile = (first + begin) / FP_CHANNELS;
        uint8_t *quants = w->quants + tile * blocks * parts * fp_tile_bytes(w->form);
        uint8_t *scales = w->scales + tile * blocks * fp_scale_bytes(w->form);
        for (int b = 0; b < blocks; b++) {
            for (int r = 0; r < many; r++) {
                const uint8_t *block = raw + (begin + r) * row_bytes + (int64_t)b * at->bytes;
                finite &= put_scales(w->form, block, channel + r, scales);
                for (int part = 0; part < parts; part++) {
                    uint8_t numbers[32];
                    numbers_of(w->form, block, part, numbers);
                    put_numbers(w->form, numbers, channel + r, quants + part * fp_tile_bytes(w->form));
                }
            }
            scales += fp_scale_bytes(w->form);
            quants += parts * fp_tile_bytes(w->form);
        }
    }
    return finite;
}

static float half_at(const uint8_t *at) {
    uint32_t bits = (uint32_t)(at[0] | at[1] << 8), rest = bits & 0x7fff;
    float size = rest >= 0x400 ? 0 : (float)rest * 0x1p-24f;
    if (rest >= 0x400) {
        uint32_t wide = (rest << 13) + (rest >= 0x7c00 ? 0x70000000 : 0x38000000);
        memcpy(&size, &wide, 4);
    }
    return bits & 0x8000 ? -size : size;
}

static float float_at(int form, const uint8_t *at) {
    if (form == FP_F16) return half_at(at);
    uint32_t bits = 0;
    memcpy((uint8_t *)&bits + (form == FP_BF16 ? 2 : 0), at, bytes_per_number(form));
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static int number_at(int form, const uint8_t *tile, int channel, int i) {
    if (form == FP_Q8_0) return tile[64 * (i / 4) + 4 * channel + i % 4] - 128;
    int x = tile[64 * (i / 4 % 4) + 4 * channel + i % 4] >> (i / 16 * 4) & 15;
    if (fp_tile_bytes(form) == 320) x |= (tile[256 + 4 * channel + i % 4] >> i / 4 & 1) << 4;
    if (form == FP_Q6_K) x |= (tile[256 + i / 16 * 64 + 4 * channel + i % 4] >> 2 * (i / 4 % 4) & 3) << 4;
    return x - (form == FP_Q4_0 ? 8 : form == FP_Q5_0 ? 16 : form == FP_Q6_K ? 32 : 0);
}

/* One output channel as floats, in the arithmetic of the gguf package. */
static void channel_floats(const fp_weight *w, int channel, float *out) {
    int lane = channel % FP_CHANNELS, shared = fp_scale_tiles(w->form), blocks = w->inputs / FP_BLOCK;
    int64_t tile = channel / FP_CHANNELS;
    for (int i = 0; fp_is_float(w->form) && i < w->inputs; i++)
        out[i] = float_at(w->form, w->quants + ((tile * w->inputs + i) * FP_CHANNELS + lane) * bytes_per_number(w->form));
    for (int b = 0; !fp_is_float(w->form) && b < blocks; b++, out += FP_BLOCK) {
        const uint8_t *numbers = w->quants + (tile * blocks + b) * fp_tile_bytes(w->form);
        const uint8_t *record = w->scales + (tile * blocks + b) / shared * fp_scale_bytes(w->form);
        float scale = half_at(record + 2 * lane), second = scale, shift = 0;
        if (w->form == FP_Q4_1 || w->form == FP_Q5_1) shift = half_at(record + 32 + 2 * lane);
        if (w->form == FP_Q4_K || w->form == FP_Q5_K) {
            const uint8_t *own = record + 64 + 32 * (b % 8) + lane;
            second = scale *= (float)own[0], shift = -(half_at(record + 32 + 2 * lane) * (float)own[16]);
        }
        if (w->form == FP_Q6_K) {
            const int8_t *own = (const int8_t *)record + 32 + 32 * (b % 8) + lane;
            second = scale * (float)own[16], scale *= (float)own[0];
        }
        for (int i = 0; i < FP_BLOCK; i++)
            out[i] = (float)number_at(w->form, numbers, lane, i) * (i < 16 ? scale : second) + shift;
    }
}

/* Output channels as floats: out [count][inputs]. */
FP_EXPORT void fp_look_up(const fp_weight *w, const int64_t *which, int count, float *out) {
    for (int i = 0; i < count; i++) channel_floats(w, (int)which[i], out + (int64_t)i * w->inputs);
}
