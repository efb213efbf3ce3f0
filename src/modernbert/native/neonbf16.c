/* For ARM processors with products of bfloat16 pairs (BFDOT: FEAT_BF16) beside the sums of four products of bytes. */
#if defined(__aarch64__) && !defined(WITHOUT_BF16)
#if defined(__clang__)
#include <arm_neon.h>
#pragma clang attribute push(__attribute__((target("dotprod,bf16"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod+bf16")
#endif
#include "kernels.h"
#define SUMS_OF_BYTES
#include "neon.inc"
#define NAME neonbf16
#define MULTIPLIES 1
#define dot(sums, pairs, others) ((Floats)dot_pairs((float32x4_t)(sums), (float32x4_t)(pairs), (float32x4_t)(others)))
static inline float32x4_t dot_pairs(float32x4_t sums, float32x4_t pairs, float32x4_t others) {
  return vbfdotq_f32(sums, vreinterpretq_bf16_f32(pairs), vreinterpretq_bf16_f32(others));
}
#include "kernels.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
