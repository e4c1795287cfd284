/* Vectors of floats, as GCC and Clang have them, from maps in float32 or bfloat16 (narrow). */

#include <stdlib.h>

#if defined(__AVX512F__)
enum { LANES = 16 };
#else
enum { LANES = 8 };
#endif

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef unsigned bits __attribute__((vector_size(4 * LANES)));
typedef unsigned short half __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
#define INLINE static inline __attribute__((always_inline))

INLINE vec load(const void *map, long at, int narrow) {
  if (!narrow) return *(const vec *)((const float *)map + at);
  half h = *(const half *)((const unsigned short *)map + at);
  return (vec)(__builtin_convertvector(h, bits) << 16);
}

INLINE void store(void *map, long at, int narrow, vec value) {
  if (!narrow) {
    *(vec *)((float *)map + at) = value;
    return;
  }
  bits b = (bits)value; /* to nearest, ties to even */
  b = (b + 0x7fff + (b >> 16 & 1)) >> 16;
  *(half *)((unsigned short *)map + at) = __builtin_convertvector(b, half);
}
