/* For any processor: what the compiler makes of vectors of four. NEON and SSE2 have those. */
#define NAME portable
#define LANES 4
#define MULTIPLIES 0
#if defined(__aarch64__)
#define HEIGHT 12 /* of 32 registers */
#else
#define HEIGHT 6
#endif
#include "kernels.h"
#include "kernels.inc"
