/* For every 64-bit ARM processor. */
#if defined(__aarch64__)
#include "kernels.h"
#include "neon.inc"
#define NAME neon
#define MULTIPLIES 0
/* No product of two bytes is -128 * -128, so two of them fit in 16 bits. */
static inline int32x4_t dot_signed(int32x4_t sums, int8x16_t weights, int8x16_t inputs) {
  int16x8_t low = vmull_s8(vget_low_s8(weights), vget_low_s8(inputs)), high = vmull_high_s8(weights, inputs);
  return vpadalq_s16(sums, vpaddq_s16(low, high));
}
#define ZERO 0
#define DOT(sums, weights, inputs) ((Ints)dot_signed((int32x4_t)(sums), (int8x16_t)(weights), (int8x16_t)(inputs)))
#include "kernels.inc"
#endif
