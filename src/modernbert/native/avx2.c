/* For x86 with AVX2 and FMA. */
#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define NAME avx2
#define LANES 8
#define HEIGHT 6
#define MULTIPLIES 0
#define TARGET_MAX(a, b) ((Floats)_mm256_max_ps((__m256)(a), (__m256)(b)))
#define TARGET_MIN(a, b) ((Floats)_mm256_min_ps((__m256)(a), (__m256)(b)))
#include "kernels.h"
#include "kernels.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
