/* For ARM processors with sums of four products of bytes (SDOT: Armv8.2 with FEAT_DotProd). */
#if defined(__aarch64__) && !defined(WITHOUT_BF16)
#if defined(__clang__)
#include <arm_neon.h>
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif
#include "kernels.h"
#define SUMS_OF_BYTES
#include "neon.inc"
#define NAME neondot
#define MULTIPLIES 0
#include "kernels.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
