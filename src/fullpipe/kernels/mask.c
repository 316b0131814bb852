/* Logits of tokens that may follow, by a bit for each. */
#include "native.h"

#include <string.h>

#define BARRED 0xFF800000u /* -inf */

typedef uint32_t eight __attribute__((vector_size(32)));

/* In place, for arguments of this size are passed differently with and without AVX. */
static inline void mask(eight *logits, uint8_t bits) {
    const eight places = {1, 2, 4, 8, 16, 32, 64, 128};
    eight keep = (eight)((places & bits) != 0);
    *logits = (*logits & keep) | (BARRED & ~keep);
}

/* Copies the logits of tokens that may follow; those of others become -inf, and those of tokens from `known` on, a
   multiple of eight. Returns whether anything but -inf is there then. */
FP_EXPORT int fp_masked(const float *given, int64_t size, const uint8_t *may_follow, int64_t known, float *out) {
    eight left = {0}, logits;
    int64_t start = 0, end = known < size ? known : size;
    for (; start + 8 <= end; start += 8) {
        memcpy(&logits, given + start, sizeof logits);
        mask(&logits, may_follow[start / 8]);
        left |= logits ^ BARRED;
        memcpy(out + start, &logits, sizeof logits);
    }
    for (; start < size; start += 8) {
        size_t bytes = sizeof *out * (size_t)(size - start < 8 ? size - start : 8);
        logits = (eight){0} + BARRED;
        memcpy(&logits, given + start, bytes);
        mask(&logits, start < end ? may_follow[start / 8] : 0);
        memcpy(out + start, &logits, bytes);
        for (size_t i = bytes / sizeof *out; i < 8; i++) logits[i] = BARRED;
        left |= logits ^ BARRED;
    }
    uint32_t any = 0;
    for (int i = 0; i < 8; i++) any |= left[i];
    return any != 0;
}
