/* What Windows' C library lacks: memory that begins a cache line. Such memory is given back by a function of its own, so a
 * file that includes this takes all of its memory from there. */
#if defined(_WIN32)
#include <malloc.h>
#include <stdlib.h>
#include <string.h>

static inline int take_aligned(void **memory, size_t alignment, size_t bytes) {
  *memory = _aligned_malloc(bytes, alignment);
  return *memory ? 0 : 12; /* ENOMEM */
}
static inline void *take_zeroed(size_t count, size_t size) {
  void *memory = _aligned_malloc(count * size, 64);
  return memory ? memset(memory, 0, count * size) : 0;
}
#define posix_memalign take_aligned
#define malloc(bytes) _aligned_malloc(bytes, 64)
#define calloc take_zeroed
#define free _aligned_free
#endif
