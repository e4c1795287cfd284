/* Vectors of floats, as GCC and Clang have them, from maps in float32 or bfloat16 (narrow). */

#include <immintrin.h>
#include <stdlib.h>

/* The larger and the smaller of two, lane by lane; of a number and NaN, the second. */
#if defined(__AVX512F__)
enum { LANES = 16 };
#define LARGER _mm512_max_ps
#define SMALLER _mm512_min_ps
#else
enum { LANES = 8 };
#define LARGER _mm256_max_ps
#define SMALLER _mm256_min_ps
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

INLINE float value(const void *map, long at, int narrow) {
  if (!narrow) return ((const float *)map)[at];
  union {
    unsigned bits;
    float value;
  } one = {(unsigned)((const unsigned short *)map)[at] << 16};
  return one.value;
}

INLINE void store(void *map, long at, int narrow, vec value) {
  if (!narrow) {
    *(vec *)((float *)map + at) = value;
    return;
  }
  half *to = (half *)((unsigned short *)map + at); /* to nearest, ties to even */
#if defined(__AVX512BF16__)
  *to = (half)_mm512_cvtneps_pbh((__m512)value);
#else
  bits b = (bits)value;
  b = (b + 0x7fff + (b >> 16 & 1)) >> 16;
  *to = __builtin_convertvector(b, half);
#endif
}

/* The rows of a matrix => its columns. */
INLINE void turn(vec *x) {
#if defined(__clang__)
  vec y[LANES];
  for (int i = 0; i < LANES; i++)
    for (int lane = 0; lane < LANES; lane++) y[i][lane] = x[lane][i];
  for (int i = 0; i < LANES; i++) x[i] = y[i];
#else
#pragma GCC unroll 4
  for (int step = 1; step < LANES; step *= 2)
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
      if (i & step) continue;
      bits first, second; /* of both rows, laid end to end */
      for (int lane = 0; lane < LANES; lane++) {
        first[lane] = lane & step ? LANES + lane - step : lane;
        second[lane] = lane & step ? LANES + lane : lane + step;
      }
      vec row = x[i];
      x[i] = __builtin_shuffle(row, x[i + step], first);
      x[i + step] = __builtin_shuffle(row, x[i + step], second);
    }
#endif
}

/* e^x to 2 units in the last place (coefficients of Cephes, Moshier 1989); below -87 and above 88 as there. */
INLINE vec exponential(vec x) {
  const vec zero = {0}, magic = zero + 0x1.8p23f;
  x = SMALLER(zero + 88, LARGER(zero - 87, x));
  vec n = x * 1.44269504088896341f + magic; /* the whole number next to it, in the last bits */
  bits exponent = (bits)n << 23;
  n -= magic;
  x = x - n * 0.693359375f + n * 2.12194440e-4f;
  vec y = 1.9875691500e-4f * x + 1.3981999507e-3f;
  y = y * x + 8.3334519073e-3f;
  y = y * x + 4.1665795894e-2f;
  y = y * x + 1.6666665459e-1f;
  y = y * x + 5.0000001201e-1f;
  return (vec)((bits)(y * x * x + x + 1) + exponent);
}
