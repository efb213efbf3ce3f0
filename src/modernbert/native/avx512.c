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
#define TARGET_FMA(a, b, c) ((Floats)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define TARGET_MAX(a, b) ((Floats)_mm512_max_ps((__m512)(a), (__m512)(b)))
#define TARGET_MIN(a, b) ((Floats)_mm512_min_ps((__m512)(a), (__m512)(b)))
/* The signs move to the inputs, so that pairs of products fit in 16 bits. */
static inline __m512i dot_signed(__m512i sums, __m512i weights, __m512i inputs) {
  __m512i turned = _mm512_mask_sub_epi8(inputs, _mm512_movepi8_mask(weights), _mm512_setzero_si512(), inputs);
  __m512i pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(weights), turned);
  return _mm512_add_epi32(sums, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
#define ZERO 0
#define DOT(sums, weights, inputs) ((Ints)dot_signed((__m512i)(sums), (__m512i)(weights), (__m512i)(inputs)))
#include "kernels.h"
#include "kernels.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
