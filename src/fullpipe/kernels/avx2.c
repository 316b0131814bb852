/* The kernels for processors with AVX2. */
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define WITH_VNNI 0
#include "avx2.h"

const fp_ops fp_avx2 = {product, quantise, norm, rotate, store, attend, gate, blocks_anew, read_all, spin_bytes,
                           spin_floats};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
