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
#define TARGET_FMA(a, b, c) ((Floats)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define TARGET_MAX(a, b) ((Floats)_mm256_max_ps((__m256)(a), (__m256)(b)))
#define TARGET_MIN(a, b) ((Floats)_mm256_min_ps((__m256)(a), (__m256)(b)))
/* The signs move to the inputs, so that pairs of products fit in 16 bits. */
static inline __m256i dot_signed(__m256i sums, __m256i weights, __m256i inputs) {
  __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(inputs, weights));
  return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#define ZERO 0
#define DOT(sums, weights, inputs) ((Ints)dot_signed((__m256i)(sums), (__m256i)(weights), (__m256i)(inputs)))
#include "kernels.h"
#include "kernels.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
