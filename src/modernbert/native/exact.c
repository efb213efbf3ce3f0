/* For processors that cannot multiply and add with one rounding, or may not: it is imitated, so that these kernels give
 * the bits of all others. They take many times as long as the portable ones, and are never chosen but by name. */
#include "kernels.h"
#if !FUSES
#define NAME exact
#define EXACT
#define LANES 4
#define HEIGHT 6
#define MULTIPLIES 0
#include "kernels.inc"
#endif
