/* 3x3 convolutions of channels-last maps with a quarter of the multiplications, in float32: F(4x4,3x3)
   (Winograd 1980; Lavin and Gray 2016).

   Four neighbouring values of a row convolved with three weights depend on six pixels. Taken for polynomials, both are
   multiplied value by value at six points: 6 products instead of 12, for rows and columns at once 36 instead of 144.
   The points are 0, A, -A, B, -B and infinity, with A = 2/3 and B = 3/2: rounding errors are 1.7 times those of a
   direct convolution, with the usual 1 and 2 four times (Barabasz et al. 2020).

   Maps are float32, or bfloat16 (narrow), which is widened and rounded as it is read and written.
   C, O: channels in and out, multiples of PANEL. A tile is 4x4 values; `at the points` a map has 36 for each tile.
   Threads share tiles or channels out, never a sum: results do not depend on how many there are.
   All functions return 0, or 1 where memory is short.
   Called by autoencoder/winograd.py. */

#include "product.h"

enum { TILE = 4, SEEN = 6, POINTS = 36 };
enum { CHANNELS = 8 * ROWS }; /* of which gradients are summed up together */

static const float A = 2. / 3, B = 3. / 2, AA = 4. / 9, BB = 9. / 4, SQUARES = 97. / 36;
static const float KA = 1 / (2 * 4. / 9 * (4. / 9 - 9. / 4)), KB = 1 / (2 * 9. / 4 * (9. / 4 - 4. / 9));

/* How far from each other the points of so many floats lie: were it a power of two, they would contend for the same
   lines of a cache. */
INLINE long apart(long floats) { return floats + PANEL; }

/* Maps of [samples,height,width,channels], and how they are cut into tiles. */
typedef struct {
  long samples, height, width, down, across, tiles;
} grid;

typedef struct {
  long sample, top, left; /* of its values */
} place;

static grid cut(long samples, long height, long width) {
  long down = (height + TILE - 1) / TILE, across = (width + TILE - 1) / TILE;
  return (grid){samples, height, width, down, across, samples * down * across};
}

static place where(grid g, long tile) {
  return (place){tile / (g.down * g.across), TILE * (tile / g.across % g.down), TILE * (tile % g.across)};
}

/* Which pixel of a map, or -1 outside of it; `doubled`, the map has half the height and width, and each pixel is seen
   four times. */
INLINE long pixel(grid g, place p, long row, long column, int doubled) {
  long y = p.top + row, x = p.left + column;
  if (y < 0 || y >= g.height || x < 0 || x >= g.width) return -1;
  return (p.sample * (g.height >> doubled) + (y >> doubled)) * (g.width >> doubled) + (x >> doubled);
}

/* Six pixels of a row or a column => points; six points => four values; four values => points, the transpose of that;
   three weights => points; six points => three weights, the transpose. Strides are in vectors. */
INLINE void pixels_to_points(const vec *x, long by, vec *y, long to) {
  vec even_a = KA * (x[4 * by] - BB * x[2 * by]), odd_a = KA * A * (x[3 * by] - BB * x[by]);
  vec even_b = KB * (x[4 * by] - AA * x[2 * by]), odd_b = KB * B * (x[3 * by] - AA * x[by]);
  y[0] = x[0] - SQUARES * x[2 * by] + x[4 * by];
  y[to] = even_a + odd_a, y[2 * to] = even_a - odd_a;
  y[3 * to] = even_b + odd_b, y[4 * to] = even_b - odd_b;
  y[5 * to] = x[by] - SQUARES * x[3 * by] + x[5 * by];
}

INLINE void points_to_values(const vec *x, long by, vec *y, long to) {
  vec even_a = x[by] + x[2 * by], odd_a = A * (x[by] - x[2 * by]);
  vec even_b = x[3 * by] + x[4 * by], odd_b = B * (x[3 * by] - x[4 * by]);
  y[0] = x[0] + even_a + even_b;
  y[to] = odd_a + odd_b;
  y[2 * to] = AA * even_a + BB * even_b;
  y[3 * to] = AA * odd_a + BB * odd_b + x[5 * by];
}

INLINE void values_to_points(const vec *x, long by, vec *y, long to) {
  vec even_a = x[0] + AA * x[2 * by], odd_a = A * (x[by] + AA * x[3 * by]);
  vec even_b = x[0] + BB * x[2 * by], odd_b = B * (x[by] + BB * x[3 * by]);
  y[0] = x[0];
  y[to] = even_a + odd_a, y[2 * to] = even_a - odd_a;
  y[3 * to] = even_b + odd_b, y[4 * to] = even_b - odd_b;
  y[5 * to] = x[3 * by];
}

INLINE void weights_to_points(const vec *x, long by, vec *y, long to) {
  vec even_a = x[0] + AA * x[2 * by], even_b = x[0] + BB * x[2 * by];
  y[0] = x[0];
  y[to] = even_a + A * x[by], y[2 * to] = even_a - A * x[by];
  y[3 * to] = even_b + B * x[by], y[4 * to] = even_b - B * x[by];
  y[5 * to] = x[2 * by];
}

INLINE void points_to_weights(const vec *x, long by, vec *y, long to) {
  vec even_a = x[by] + x[2 * by], even_b = x[3 * by] + x[4 * by];
  y[0] = x[0] + even_a + even_b;
  y[to] = A * (x[by] - x[2 * by]) + B * (x[3 * by] - x[4 * by]);
  y[2 * to] = AA * even_a + BB * even_b + x[5 * by];
}

/* Tiles [rows,C] times weights [C,PANEL]; and, added up, some channels of tiles [T,C], transposed, times tiles
   [T,PANEL]. */
static void forward(long rows, const float *x, const float *w, long seen, float *y) {
  products(rows, x, seen, 1, w, seen, y, 0, 0);
}

static void backward(long rows, const float *x, long channels, const float *w, long tiles, float *y, int add) {
  products(rows, x, 1, channels, w, tiles, y, add, 0);
}

/* Pixels of a tile, for LANES channels from `at` on => points, `to` floats apart. */
INLINE void take_pixels(const void *map, int narrow, const long *pixels, long channels, long at, float *points,
                        long to) {
  vec x[POINTS], y[POINTS];
  for (int i = 0; i < POINTS; i++) x[i] = pixels[i] < 0 ? (vec){0} : load(map, pixels[i] * channels + at, narrow);
  for (int i = 0; i < SEEN; i++) pixels_to_points(x + SEEN * i, 1, y + SEEN * i, 1);
  for (int i = 0; i < SEEN; i++) pixels_to_points(y + i, SEEN, x + i, SEEN);
  for (int i = 0; i < POINTS; i++) *(vec *)(points + i * to) = x[i];
}

/* Tiles => [36,block,C], apart, the first `count` of the block. */
INLINE void all_pixels(const void *map, int narrow, int doubled, grid g, long first, long count, long channels,
                       long block, float *points) {
  for (long t = 0; t < count; t++) {
    long pixels[POINTS];
    place p = where(g, first + t);
    for (int i = 0; i < POINTS; i++) pixels[i] = pixel(g, p, i / SEEN - 1, i % SEEN - 1, doubled);
    for (long at = 0; at < channels; at += LANES)
      take_pixels(map, narrow, pixels, channels, at, points + t * channels + at, apart(block * channels));
  }
}

/* Points [36,block,PANEL], apart, of tiles => values, from channel `at` on. */
INLINE void put_values(const float *points, long block, grid g, long first, long count, const float *bias,
                       const void *rest, void *map, int narrow, long channels, long at) {
  for (long t = 0; t < count; t++)
    for (long half = 0; half < PANEL; half += LANES) {
      vec x[POINTS], y[TILE * SEEN];
      place p = where(g, first + t);
      for (int i = 0; i < POINTS; i++) x[i] = *(const vec *)(points + i * apart(block * PANEL) + t * PANEL + half);
      for (int i = 0; i < SEEN; i++) points_to_values(x + i, SEEN, y + i, SEEN);
      for (int i = 0; i < TILE; i++) points_to_values(y + SEEN * i, 1, x + TILE * i, 1);
      for (int i = 0; i < TILE * TILE; i++) {
        long pixel_ = pixel(g, p, i / TILE, i % TILE, 0), to = pixel_ * channels + at + half;
        if (pixel_ < 0) continue;
        if (bias) x[i] += *(const vec *)(bias + at + half);
        if (rest) x[i] += load(rest, to, narrow);
        store(map, to, narrow, x[i]);
      }
    }
}

/* LANES x LANES numbers that lie in any way => as many vectors; and vectors, which are changed, to where they lie. */
INLINE void take_square(const float *from, long by_lane, long by_vector, vec *x) {
  for (int k = 0; k < LANES; k++)
    if (by_lane == 1) x[k] = *(const vec *)(from + k * by_vector);
    else if (by_vector == 1) x[k] = *(const vec *)(from + k * by_lane);
    else
      for (int lane = 0; lane < LANES; lane++) x[k][lane] = from[lane * by_lane + k * by_vector];
  if (by_lane != 1 && by_vector == 1) turn(x);
}

INLINE void put_square(vec *x, float *to, long by_lane, long by_vector) {
  if (by_vector == 1) turn(x);
  for (int k = 0; k < LANES; k++)
    if (by_vector == 1) *(vec *)(to + k * by_lane) = x[k];
    else
      for (int lane = 0; lane < LANES; lane++) to[lane * by_lane + k * by_vector] = x[k][lane];
}

/* Weight [made,seen,3,3], of which the strides are told => points [made/PANEL,36,seen + 1,PANEL], the last row
   unused. */
int winograd_weights(const float *weight, const long *strides, float *points, long seen, long made, int threads) {
#pragma omp parallel for collapse(2) num_threads(threads)
  for (long panel = 0; panel < made / PANEL; panel++)
    for (long c = 0; c < seen; c += LANES) {
      vec x[2][9][LANES], y[3 * SEEN], z[POINTS];
      for (int half = 0; half < 2; half++)
        for (int i = 0; i < 9; i++)
          take_square(weight + (panel * PANEL + half * LANES) * strides[0] + c * strides[1] + i / 3 * strides[2] +
                          i % 3 * strides[3],
                      strides[0], strides[1], x[half][i]);
      for (int k = 0; k < LANES; k++)
        for (int half = 0; half < 2; half++) {
          float *to = points + panel * POINTS * apart(seen * PANEL) + (c + k) * PANEL + half * LANES;
          for (int i = 0; i < 3; i++) weights_to_points(x[half][i] + k, 3 * LANES, y + i, 3);
          for (int i = 0; i < SEEN; i++) weights_to_points(y + 3 * i, 1, z + SEEN * i, 1);
          for (int i = 0; i < POINTS; i++) *(vec *)(to + i * apart(seen * PANEL)) = z[i];
        }
    }
  return 0;
}

INLINE int convolve(const void *x, int narrow, int doubled, const float *weights, const float *bias, const void *rest,
                    void *y, grid g, long seen, long made, int threads) {
  /* weights larger than a core's cache are read once a block; of few blocks, channels are shared out too */
  long block = seen * made < 1 << 16 ? ROWS : 2 * ROWS, panels = made / PANEL;
  long blocks = (g.tiles + block - 1) / block, parts = blocks < 2 * threads ? (2 * threads + blocks - 1) / blocks : 1;
  if (parts > panels) parts = panels;
  long of_pixels = apart(block * seen), of_values = apart(block * PANEL), of_weights = apart(seen * PANEL);
  long each = POINTS * (of_pixels + of_values), next = 0;
  float *scratch = aligned_alloc(64, threads * each * sizeof(float));
  if (!scratch) return 1;
#pragma omp parallel num_threads(threads)
  {
    long thread, ready = -1;
#pragma omp atomic capture
    thread = next++;
    float *from = scratch + thread * each, *to = from + POINTS * of_pixels;
#pragma omp for schedule(dynamic)
    for (long item = 0; item < blocks * parts; item++) {
      long number = item / parts, part = item % parts, first = number * block;
      long count = g.tiles - first < block ? g.tiles - first : block;
      if (ready != number) all_pixels(x, narrow, doubled, g, first, count, seen, block, from);
      ready = number;
      for (long panel = part * panels / parts; panel < (part + 1) * panels / parts; panel++) {
        const float *w = weights + panel * POINTS * of_weights;
        for (long i = 0; i < POINTS; i++)
          forward(count, from + i * of_pixels, w + i * of_weights, seen, to + i * of_values);
        put_values(to, block, g, first, count, bias, rest, y, narrow, made, panel * PANEL);
      }
    }
  }
  free(scratch);
  return 0;
}

/* Maps x [samples,height,width,seen], or to be doubled to that, => y [...,made] from the points of weights; bias [made]
   and rest, like y, or null. */
int winograd(const void *x, int doubled, int narrow, const float *weights, const float *bias, const void *rest, void *y,
             long samples, long height, long width, long seen, long made, int threads) {
  grid g = cut(samples, height, width);
  if (narrow) return convolve(x, 1, doubled, weights, bias, rest, y, g, seen, made, threads);
  return convolve(x, 0, doubled, weights, bias, rest, y, g, seen, made, threads);
}

/* A tile of what comes back [...,made] => points [made/PANEL,36,tiles,PANEL], those of tile t. */
INLINE void take_values(const void *map, int narrow, grid g, long tile, long made, float *points, long tiles, long t) {
  place p = where(g, tile);
  for (long at = 0; at < made; at += LANES) {
    vec x[TILE * TILE], y[TILE * SEEN], z[POINTS];
    for (int i = 0; i < TILE * TILE; i++) {
      long pixel_ = pixel(g, p, i / TILE, i % TILE, 0);
      x[i] = pixel_ < 0 ? (vec){0} : load(map, pixel_ * made + at, narrow);
    }
    for (int i = 0; i < TILE; i++) values_to_points(x + i, TILE, y + i, TILE);
    for (int i = 0; i < SEEN; i++) values_to_points(y + TILE * i, 1, z + SEEN * i, 1);
    float *to = points + at / PANEL * POINTS * apart(tiles * PANEL) + t * PANEL + at % PANEL;
    for (int i = 0; i < POINTS; i++) *(vec *)(to + i * apart(tiles * PANEL)) = z[i];
  }
}

/* Sums at the points [36,rows,PANEL], apart, => gradients of the weights of a panel and of channels from `first` on, of
   weights [made,seen,3,3] in any layout. */
INLINE void put_weights(const float *points, long rows, float *weight, const long *strides, long panel, long first) {
  for (long c = 0; c < rows; c += LANES)
    for (long half = 0; half < 2; half++) {
      vec x[POINTS], y[3 * SEEN], z[9][LANES];
      for (int k = 0; k < LANES; k++) {
        for (int i = 0; i < POINTS; i++)
          x[i] = *(const vec *)(points + i * apart(rows * PANEL) + (c + k) * PANEL + half * LANES);
        for (int i = 0; i < SEEN; i++) points_to_weights(x + i, SEEN, y + i, SEEN);
        for (int i = 0; i < 3; i++) points_to_weights(y + SEEN * i, 1, z[3 * i] + k, LANES);
      }
      for (int i = 0; i < 9; i++)
        put_square(z[i],
                   weight + (panel * PANEL + half * LANES) * strides[0] + (first + c) * strides[1] +
                       i / 3 * strides[2] + i % 3 * strides[3],
                   strides[0], strides[1]);
    }
}

INLINE int gradient(const void *x, int doubled, const void *back, int narrow, float *weight, const long *strides,
                    grid g, long seen, long made, int threads) {
  /* so many tiles at once that a cache holds them at the points, and that sums are not read and written too often */
  long panels = made / PANEL, budget = seen * made * POINTS;
  budget = budget < 1 << 20 ? 1 << 20 : budget > 1 << 22 ? 1 << 22 : budget;
  long chunk = budget / (POINTS * (seen + made));
  if (chunk < 2 * ROWS) chunk = 2 * ROWS;
  if (chunk > g.tiles) chunk = g.tiles;
  /* sums of a panel and some channels: a thread's own until they are weights, if all tiles are met at once */
  long parts = (seen + CHANNELS - 1) / CHANNELS, each = POINTS * apart(CHANNELS * PANEL), once = chunk == g.tiles,
       next = 0;
  long of_pixels = apart(chunk * seen), of_values = apart(chunk * PANEL);
  long floats = POINTS * (of_pixels + panels * of_values) + each * (once ? threads : panels * parts);
  float *scratch = aligned_alloc(64, floats * sizeof(float));
  if (!scratch) return 1;
  float *pixels = scratch, *values = pixels + POINTS * of_pixels, *sums = values + POINTS * panels * of_values;
#pragma omp parallel num_threads(threads)
  {
    long thread;
#pragma omp atomic capture
    thread = next++;
    for (long first = 0; first < g.tiles; first += chunk) {
      long count = g.tiles - first < chunk ? g.tiles - first : chunk;
#pragma omp for
      for (long t = 0; t < count; t++) {
        all_pixels(x, narrow, doubled, g, first + t, 1, seen, chunk, pixels + t * seen);
        take_values(back, narrow, g, first + t, made, values, chunk, t);
      }
#pragma omp for
      for (long item = 0; item < panels * parts; item++) {
        long panel = item / parts, from = item % parts * CHANNELS,
             rows = seen - from < CHANNELS ? seen - from : CHANNELS;
        float *sum = sums + (once ? thread : item) * each;
        for (long i = 0; i < POINTS; i++)
          backward(rows, pixels + i * of_pixels + from, seen, values + (panel * POINTS + i) * of_values, count,
                   sum + i * apart(rows * PANEL), first > 0);
        if (first + count == g.tiles) put_weights(sum, rows, weight, strides, panel, from);
      }
    }
  }
  free(scratch);
  return 0;
}

/* Gradient of weights [made,seen,3,3], of which the strides are told, from maps x [...,seen] and what comes back. */
int winograd_gradient(const void *x, int doubled, const void *back, int narrow, float *weight, const long *strides,
                      long samples, long height, long width, long seen, long made, int threads) {
  grid g = cut(samples, height, width);
  if (narrow) return gradient(x, doubled, back, 1, weight, strides, g, seen, made, threads);
  return gradient(x, doubled, back, 0, weight, strides, g, seen, made, threads);
}
