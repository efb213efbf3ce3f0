/* For x86 with AVX-512. */
#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,prefer-vector-width=512")
#endif
#define NAME avx512
#define LANES 16
#define HEIGHT 12
#define MULTIPLIES 0
#define TARGET_MAX(a, b) ((Floats)_mm512_max_ps((__m512)(a), (__m512)(b)))
#define TARGET_MIN(a, b) ((Floats)_mm512_min_ps((__m512)(a), (__m512)(b)))
#include "kernels.h"
#include "kernels.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
