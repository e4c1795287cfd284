/* Gated rows (GEGLU: Shazeer 2020, equation 6), forward and backward:

     y = value * gelu(gate),  gelu(g) = g * (share of a normal distribution that lies below g)

   Rows x [2,width] are values, then gates; float32 or bfloat16 (narrow), worked on in float32. Width is a multiple of
   LANES. Threads share rows out.
   Called by autoencoder/gates.py. */

#include "vectors.h"

typedef struct {
  vec gelu, slope; /* and its derivative */
} gelu;

/* What lies beyond |g| is a polynomial in 1 / (1 + 0.305 |g|) times the density, after Hastings 1955; relative
   error 4e-7 (fitted to erfc in float64), and in float32 as many times 1e-7 as g squared. */
INLINE gelu gelu_of(vec g) {
  const vec zero = {0};
  vec size = LARGER(g, -g), t = 1 / (1 + 0.305f * size), bell = exponential(-0.5f * g * g);
  vec beyond = 0.0366992574f * t - 0.152988575f;
  beyond = beyond * t + 0.185717314f;
  beyond = beyond * t - 0.0379771556f;
  beyond = beyond * t + 0.121021814f;
  beyond = beyond * t + 0.103420841f;
  beyond = beyond * t + 0.122466817f;
  beyond = (beyond * t + 0.121639733f) * t * bell;
  vec positive = (vec)((bits)(g > zero) & (bits)(zero + 1)); /* 1 or 0 */
  vec share = positive + (1 - 2 * positive) * beyond;
  vec near = SMALLER(zero + 14, LARGER(zero - 14, g)); /* where there is a density; of NaN, NaN */
  return (gelu){LARGER(zero, g) - size * beyond, share + near * bell * 0.398942280f};
}

INLINE void forward(const void *x, void *y, int narrow, long row, long width) {
  for (long c = 0; c < width; c += LANES) {
    vec value = load(x, 2 * row * width + c, narrow), gate = load(x, (2 * row + 1) * width + c, narrow);
    store(y, row * width + c, narrow, value * gelu_of(gate).gelu);
  }
}

INLINE void backward(const void *x, const void *back, void *into, int narrow, long row, long width) {
  for (long c = 0; c < width; c += LANES) {
    long of_value = 2 * row * width + c, of_gate = of_value + width;
    vec b = load(back, row * width + c, narrow);
    gelu g = gelu_of(load(x, of_gate, narrow));
    store(into, of_gate, narrow, b * load(x, of_value, narrow) * g.slope);
    store(into, of_value, narrow, b * g.gelu);
  }
}

/* x [rows,2,width] => y [rows,width]. Returns 0. */
int gate_forward(const void *x, void *y, int narrow, long rows, long width, int threads) {
#pragma omp parallel for num_threads(threads)
  for (long row = 0; row < rows; row++)
    if (narrow) forward(x, y, 1, row, width);
    else forward(x, y, 0, row, width);
  return 0;
}

/* What comes back to y => to x. Returns 0. */
int gate_backward(const void *x, const void *back, void *into, int narrow, long rows, long width, int threads) {
#pragma omp parallel for num_threads(threads)
  for (long row = 0; row < rows; row++)
    if (narrow) backward(x, back, into, 1, row, width);
    else backward(x, back, into, 0, row, width);
  return 0;
}
