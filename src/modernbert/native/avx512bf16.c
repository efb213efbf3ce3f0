/* For x86 with AVX-512, its products of bfloat16 pairs, and its sums of four products of bytes. */
#if defined(__x86_64__) && !defined(WITHOUT_BF16)
#include <immintrin.h>
#include <stdint.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,fma"))), apply_to = function)
#elif defined(IMITATE_BF16)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,prefer-vector-width=512")
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,fma,prefer-vector-width=512")
#endif
#define LANES 16
#define HEIGHT 12
#define MULTIPLIES 1
#define TARGET_FMA(a, b, c) ((Floats)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define TARGET_MAX(a, b) ((Floats)_mm512_max_ps((__m512)(a), (__m512)(b)))
#define TARGET_MIN(a, b) ((Floats)_mm512_min_ps((__m512)(a), (__m512)(b)))
#if defined(IMITATE_BF16)
/* The same sums on a processor without the instruction, so that the layouts can be tested there. */
#define NAME imitated
#define dot(sums, pairs, others) ((Floats)imitate((__m512)(sums), (__m512i)(pairs), (__m512i)(others)))
static inline __m512 imitate(__m512 sums, __m512i a, __m512i b) {
  const __m512i high = _mm512_set1_epi32((int)0xffff0000);
  sums = _mm512_fmadd_ps((__m512)_mm512_and_si512(a, high), (__m512)_mm512_and_si512(b, high), sums);
  return _mm512_fmadd_ps((__m512)_mm512_slli_epi32(a, 16), (__m512)_mm512_slli_epi32(b, 16), sums);
}
#else
#define NAME avx512bf16
/* The instruction takes what is below the normal numbers as 0. */
#define TARGET_NARROWS(x) (!_mm512_fpclass_ps_mask((__m512)(x), 0x20))
#define TARGET_NARROW(x) ((Halves)_mm512_cvtneps_pbh((__m512)(x)))
#define dot(sums, pairs, others) ((Floats)_mm512_dpbf16_ps((__m512)(sums), (__m512bh)(pairs), (__m512bh)(others)))
#define ZERO 128
#define DOT(sums, weights, inputs) ((Ints)_mm512_dpbusd_epi32((__m512i)(sums), (__m512i)(weights), (__m512i)(inputs)))
#endif
#include "kernels.h"
#include "kernels.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
