/* The random words behind sampling noise: Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
   SC 2011) in the order of numpy's `random.Philox(key=[seed, position])`, so word i is that of token i. Integers, so the
   same on every machine. */
#include "native.h"

#define ROUNDS 10
#define SIDE_BY_SIDE 2 /* blocks of four words whose multiplications overlap */

/* The words of blocks number, number + 1, ... numpy counts from 1. */
static void draw(uint64_t seed, uint64_t position, uint64_t number, int blocks, uint64_t words[][4]) {
    for (int b = 0; b < blocks; b++) {
        words[b][0] = number + (uint64_t)b + 1;
        words[b][1] = words[b][2] = words[b][3] = 0;
    }
    for (int round = 0; round < ROUNDS; round++) {
        for (int b = 0; b < blocks; b++) {
            unsigned __int128 first = (unsigned __int128)0xD2E7470EE14C6C93u * words[b][0];
            unsigned __int128 second = (unsigned __int128)0xCA5A826395121157u * words[b][2];
            words[b][0] = (uint64_t)(second >> 64) ^ words[b][1] ^ seed;
            words[b][1] = (uint64_t)second;
            words[b][2] = (uint64_t)(first >> 64) ^ words[b][3] ^ position;
            words[b][3] = (uint64_t)first;
        }
        seed += 0x9E3779B97F4A7C15u;
        position += 0xBB67AE8584CAA73Bu;
    }
}

/* Words of some tokens, in any order. */
FP_EXPORT void fp_words_of(uint64_t seed, uint64_t position, const int64_t *tokens, int64_t count, uint64_t *words) {
    uint64_t block[1][4];
    int64_t drawn = -1;
    for (int64_t i = 0; i < count; i++) {
        if (tokens[i] / 4 != drawn) draw(seed, position, (uint64_t)(drawn = tokens[i] / 4), 1, block);
        words[i] = block[0][tokens[i] % 4];
    }
}

/* Tokens below vocab whose words are at least `least`, in order, and these words: the first `room` of them. Returns how
   many there are. */
FP_EXPORT int64_t fp_words_from(uint64_t seed, uint64_t position, int64_t vocab, uint64_t least, int64_t room,
                                int64_t *tokens, uint64_t *words) {
    uint64_t blocks[SIDE_BY_SIDE][4];
    int64_t found = 0;
    for (int64_t start = 0; start < vocab; start += 4 * SIDE_BY_SIDE) {
        draw(seed, position, (uint64_t)start / 4, SIDE_BY_SIDE, blocks);
        for (int64_t i = 0; i < 4 * SIDE_BY_SIDE && start + i < vocab; i++) {
            uint64_t word = blocks[i / 4][i % 4];
            if (word < least) continue;
            if (found < room) tokens[found] = start + i, words[found] = word;
            found++;
        }
    }
    return found;
}
