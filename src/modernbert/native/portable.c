/* For any processor: what the compiler makes of vectors of four. SSE2 and NEON have those. */
#include "kernels.h"
#define NAME portable
#define LANES 4
#define MULTIPLIES 0
#if defined(__aarch64__)
#define HEIGHT 12 /* of 32 registers */
#else
#define HEIGHT 6
#endif
#include "kernels.inc"
