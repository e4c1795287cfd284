/* GroupNorm of channels-last maps (Wu and He 2018), with SiLU after it or without, forward and backward.

     z = weight * (x - mean) / deviation + bias          y = z, or z * sigmoid(z)

   Maps are [samples,pixels,channels], float32 or bfloat16 (narrow); all else is float32. Channels are a multiple of
   LANES. Sums are made of some pixels at a time, of which there are as many whatever the threads: results do not depend
   on how many there are. All functions return 0, or 1 where memory is short.
   Called by autoencoder/norms.py. */

#include <math.h>

#include "vectors.h"

enum { AT_ONCE = 1 << 14 }; /* values of a chunk: its sums are of float32, and a core's cache holds it */

typedef struct {
  long samples, pixels, channels, groups;
  int narrow, silu, threads;
  long each, chunks; /* pixels of a chunk */
} layout;

static layout cut(long samples, long pixels, long channels, long groups, int narrow, int silu, int threads) {
  long each = AT_ONCE / channels < 1 ? 1 : AT_ONCE / channels;
  return (layout){samples, pixels, channels, groups, narrow, silu, threads, each, (pixels + each - 1) / each};
}

/* Where a chunk begins in a map, and how many pixels it has. */
INLINE long begin(layout l, long sample, long chunk) { return (sample * l.pixels + chunk * l.each) * l.channels; }
INLINE long length(layout l, long chunk) { return chunk + 1 < l.chunks ? l.each : l.pixels - chunk * l.each; }

INLINE vec sigmoid(vec x) { return 1 / (1 + exponential(-x)); }

/* Over a chunk, of each channel, sums of what differs from `origin`, the first pixel of the sample, and of its square:
   sums [2,channels]. */
INLINE void moments(layout l, const void *x, long from, long origin, long count, float *sums, int narrow, int silu) {
  (void)silu;
  for (long c = 0; c < l.channels; c += LANES) {
    vec first = load(x, origin + c, narrow), sum[4] = {0}, square[4] = {0};
    long p = 0;
    for (; p + 4 <= count; p += 4)
      for (int i = 0; i < 4; i++) {
        vec d = load(x, from + (p + i) * l.channels + c, narrow) - first;
        sum[i] += d, square[i] += d * d;
      }
    for (; p < count; p++) {
      vec d = load(x, from + p * l.channels + c, narrow) - first;
      sum[0] += d, square[0] += d * d;
    }
    *(vec *)(sums + c) = sum[0] + sum[1] + (sum[2] + sum[3]);
    *(vec *)(sums + l.channels + c) = square[0] + square[1] + (square[2] + square[3]);
  }
}

/* Sums [2,channels] of a sample's chunks => sum[c], one of the two. */
INLINE double total(layout l, const float *sums, long sample, long which, long c) {
  double sum = 0;
  for (long k = 0; k < l.chunks; k++) sum += sums[((sample * l.chunks + k) * 2 + which) * l.channels + c];
  return sum;
}

/* Mean and 1 / deviation of a sample's groups, of moments put together as Chan et al. 1983 do. */
static void statistics(layout l, const void *x, const float *sums, long sample, float eps, float *mean, float *rstd) {
  double n = l.pixels;
  long wide = l.channels / l.groups;
  for (long g = 0; g < l.groups; g++) {
    double of_all = 0, squares = 0, count = 0;
    for (long c = g * wide; c < (g + 1) * wide; c++) {
      double sum = total(l, sums, sample, 0, c), own = value(x, begin(l, sample, 0) + c, l.narrow) + sum / n;
      double apart = own - of_all;
      squares += total(l, sums, sample, 1, c) - sum * sum / n + apart * apart * n * count / (n + count);
      of_all += apart * n / (n + count);
      count += n;
    }
    mean[sample * l.groups + g] = of_all;
    rstd[sample * l.groups + g] = 1 / sqrt(squares / count + eps);
  }
}

/* z = scale * x + shift: both, of a sample's channels. */
static void affine(layout l, long sample, const float *weight, const float *bias, const float *mean, const float *rstd,
                   float *scale, float *shift) {
  for (long c = 0; c < l.channels; c++) {
    long g = sample * l.groups + c * l.groups / l.channels;
    scale[c] = weight[c] * rstd[g];
    shift[c] = bias[c] - mean[g] * scale[c];
  }
}

INLINE void apply(layout l, const void *x, long from, long count, const float *scale, const float *shift, void *y,
                  int narrow, int silu) {
  for (long p = 0; p < count; p++)
    for (long c = 0; c < l.channels; c += LANES) {
      long at = from + p * l.channels + c;
      vec z = *(const vec *)(scale + c) * load(x, at, narrow) + *(const vec *)(shift + c);
      if (silu) z *= sigmoid(z);
      store(y, at, narrow, z);
    }
}

/* Calls a function with its last two arguments known when it is compiled. */
#define KNOWN(l, function, ...)                             \
  do {                                                      \
    if (l.narrow && l.silu) function(l, __VA_ARGS__, 1, 1); \
    else if (l.narrow) function(l, __VA_ARGS__, 1, 0);      \
    else if (l.silu) function(l, __VA_ARGS__, 0, 1);        \
    else function(l, __VA_ARGS__, 0, 0);                    \
  } while (0)

/* x => y; mean and rstd [samples,groups], which the backward pass wants. */
int norm_forward(const void *x, const float *weight, const float *bias, void *y, float *mean, float *rstd, float eps,
                 int narrow, int silu, long samples, long pixels, long channels, long groups, int threads) {
  layout l = cut(samples, pixels, channels, groups, narrow, silu, threads);
  float *sums = malloc((samples * l.chunks + samples) * 2 * channels * sizeof(float));
  if (!sums) return 1;
  float *both = sums + samples * l.chunks * 2 * channels; /* [samples,2,channels] */
#pragma omp parallel num_threads(threads)
  {
#pragma omp for collapse(2)
    for (long sample = 0; sample < samples; sample++)
      for (long k = 0; k < l.chunks; k++)
        KNOWN(l, moments, x, begin(l, sample, k), begin(l, sample, 0), length(l, k),
              sums + (sample * l.chunks + k) * 2 * channels);
#pragma omp for
    for (long sample = 0; sample < samples; sample++) {
      float *scale = both + sample * 2 * channels;
      statistics(l, x, sums, sample, eps, mean, rstd);
      affine(l, sample, weight, bias, mean, rstd, scale, scale + channels);
    }
#pragma omp for collapse(2)
    for (long sample = 0; sample < samples; sample++)
      for (long k = 0; k < l.chunks; k++) {
        const float *scale = both + sample * 2 * channels;
        KNOWN(l, apply, x, begin(l, sample, k), length(l, k), scale, scale + channels, y);
      }
  }
  free(sums);
  return 0;
}

/* What comes back to z: y's gradient, through SiLU if that came after it. */
INLINE vec through(vec back, vec z, int silu) {
  if (!silu) return back;
  vec s = sigmoid(z);
  return back * s * (1 + z * (1 - s));
}

/* Over a chunk, of each channel, sums of z's gradient, and of that times x less the first pixel's value:
   sums [2,channels]. */
INLINE void products(layout l, const void *x, const void *back, long from, long origin, long count, const float *scale,
                     float *sums, int narrow, int silu) {
  for (long c = 0; c < l.channels; c += LANES) {
    vec a = *(const vec *)(scale + c), b = *(const vec *)(scale + l.channels + c), first = load(x, origin + c, narrow);
    vec sum = {0}, product = {0};
    for (long p = 0; p < count; p++) {
      long at = from + p * l.channels + c;
      vec v = load(x, at, narrow), of_z = through(load(back, at, narrow), a * v + b, silu);
      sum += of_z, product += of_z * (v - first);
    }
    *(vec *)(sums + c) = sum;
    *(vec *)(sums + l.channels + c) = product;
  }
}

/* The gradient of x is scale * z's gradient + slope * x + level: what a sample's channels have as slope and level, and
   as sums for the gradients of weight and bias [2,channels]. */
static void through_statistics(layout l, const void *x, const float *sums, long sample, const float *weight,
                               const float *mean, const float *rstd, float *slope, float *level, float *of_weights) {
  long wide = l.channels / l.groups;
  for (long g = 0; g < l.groups; g++) {
    double m = mean[sample * l.groups + g], r = rstd[sample * l.groups + g], of_mean = 0, of_scale = 0;
    for (long c = g * wide; c < (g + 1) * wide; c++) {
      double sum = total(l, sums, sample, 0, c), first = value(x, begin(l, sample, 0) + c, l.narrow);
      double product = (total(l, sums, sample, 1, c) + (first - m) * sum) * r;
      of_mean += weight[c] * sum, of_scale += weight[c] * product;
      of_weights[c] = product, of_weights[l.channels + c] = sum;
    }
    double n = l.pixels * wide;
    for (long c = g * wide; c < (g + 1) * wide; c++) {
      slope[c] = -of_scale / n * r * r;
      level[c] = (-of_mean + of_scale * m * r) / n * r;
    }
  }
}

INLINE void back_to_x(layout l, const void *x, const void *back, long from, long count, const float *scale,
                      const float *slope, void *into, int narrow, int silu) {
  for (long p = 0; p < count; p++)
    for (long c = 0; c < l.channels; c += LANES) {
      long at = from + p * l.channels + c;
      vec a = *(const vec *)(scale + c), v = load(x, at, narrow);
      vec of_z = through(load(back, at, narrow), a * v + *(const vec *)(scale + l.channels + c), silu);
      store(into, at, narrow, a * of_z + *(const vec *)(slope + c) * v + *(const vec *)(slope + l.channels + c));
    }
}

/* What comes back to y => to x, and to weight and bias. */
int norm_backward(const void *x, const void *back, const float *weight, const float *bias, const float *mean,
                  const float *rstd, void *into, float *of_weight, float *of_bias, int narrow, int silu, long samples,
                  long pixels, long channels, long groups, int threads) {
  layout l = cut(samples, pixels, channels, groups, narrow, silu, threads);
  long pair = 2 * channels;
  float *sums = malloc((samples * l.chunks + 3 * samples) * pair * sizeof(float));
  if (!sums) return 1;
  float *scales = sums + samples * l.chunks * pair, *slopes = scales + samples * pair,
        *of_weights = slopes + samples * pair;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for
    for (long sample = 0; sample < samples; sample++)
      affine(l, sample, weight, bias, mean, rstd, scales + sample * pair, scales + sample * pair + channels);
#pragma omp for collapse(2)
    for (long sample = 0; sample < samples; sample++)
      for (long k = 0; k < l.chunks; k++)
        KNOWN(l, products, x, back, begin(l, sample, k), begin(l, sample, 0), length(l, k), scales + sample * pair,
              sums + (sample * l.chunks + k) * pair);
#pragma omp for
    for (long sample = 0; sample < samples; sample++)
      through_statistics(l, x, sums, sample, weight, mean, rstd, slopes + sample * pair,
                         slopes + sample * pair + channels, of_weights + sample * pair);
#pragma omp for collapse(2)
    for (long sample = 0; sample < samples; sample++)
      for (long k = 0; k < l.chunks; k++)
        KNOWN(l, back_to_x, x, back, begin(l, sample, k), length(l, k), scales + sample * pair, slopes + sample * pair,
              into);
  }
  for (long c = 0; c < channels; c++) {
    double by_weight = 0, by_bias = 0;
    for (long sample = 0; sample < samples; sample++)
      by_weight += of_weights[sample * pair + c], by_bias += of_weights[sample * pair + channels + c];
    of_weight[c] = by_weight, of_bias[c] = by_bias;
  }
  free(sums);
  return 0;
}
