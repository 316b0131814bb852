/* The kernels for processors with AVX2 and AVX-VNNI. */
#include "native.h"
#if FP_AVXVNNI
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avxvnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avxvnni")
#endif
#define WITH_VNNI 1
#include "avx2.h"

const fp_ops fp_avxvnni = {product, quantise, norm, rotate, store, attend, gate, blocks_anew, read_all, spin_bytes,
                           spin_floats};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
