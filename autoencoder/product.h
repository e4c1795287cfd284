/* Products of matrices whose right side is cut into panels of PANEL columns; sums are float32.

   Terms are float32, or pairs: two neighbouring terms in bfloat16 in the place of one. */

#include "vectors.h"

#if defined(__AVX512F__)
enum { ROWS = 12 };
#else
enum { ROWS = 6 };
#endif
/* ROWS x 2 vectors are summed in registers. */
enum { PANEL = 2 * LANES };

#if defined(__AVX512BF16__)
enum { PAIRS = 1 }; /* the processor multiplies them, twice as many at once */
#define PAIR(sum, x, w) (vec)_mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_ps(x), (__m512bh)(w))
#else
enum { PAIRS = 0 };
#define PAIR(sum, x, w) sum
#endif

INLINE vec added(vec sum, float x, vec w, int pairs) {
  if (pairs) return PAIR(sum, x, w);
  return sum + x * w;
}

/* y [rows,PANEL] (+)= x [rows,length] w [length,PANEL], for as many rows as registers hold. */
INLINE void product(int rows, const float *x, long by_row, long by_term, const float *w, long length, float *y, int add,
                    int pairs) {
  vec sum[ROWS][2];
  for (int i = 0; i < rows; i++)
    for (int h = 0; h < 2; h++) sum[i][h] = add ? ((vec *)y)[2 * i + h] : (vec){0};
  for (long k = 0; k < length; k++) {
    vec first = ((const vec *)w)[2 * k], second = ((const vec *)w)[2 * k + 1];
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++) {
      float value = x[i * by_row + k * by_term];
      sum[i][0] = added(sum[i][0], value, first, pairs), sum[i][1] = added(sum[i][1], value, second, pairs);
    }
  }
  for (int i = 0; i < rows; i++)
    for (int h = 0; h < 2; h++) ((vec *)y)[2 * i + h] = sum[i][h];
}

#define CASE(N) case N: product(N, x, by_row, by_term, w, length, y, add, pairs); break;
INLINE void products(long rows, const float *x, long by_row, long by_term, const float *w, long length, float *y,
                     int add, int pairs) {
  for (; rows > 0; rows -= ROWS, x += ROWS * by_row, y += ROWS * PANEL)
    switch (rows < ROWS ? rows : ROWS) {
      CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if defined(__AVX512F__)
      CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
    }
}
