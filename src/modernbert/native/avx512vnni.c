/* For x86 with AVX-512 and its sums of four products of bytes. */
#if defined(__x86_64__) && !defined(WITHOUT_BF16)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,prefer-vector-width=512")
#endif
#define NAME avx512vnni
#define LANES 16
#define HEIGHT 12
#define MULTIPLIES 0
#define TARGET_FMA(a, b, c) ((Floats)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define TARGET_MAX(a, b) ((Floats)_mm512_max_ps((__m512)(a), (__m512)(b)))
#define TARGET_MIN(a, b) ((Floats)_mm512_min_ps((__m512)(a), (__m512)(b)))
#define ZERO 128
#define DOT(sums, weights, inputs) ((Ints)_mm512_dpbusd_epi32((__m512i)(sums), (__m512i)(weights), (__m512i)(inputs)))
#include "kernels.h"
#include "kernels.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
