/* Attention in bfloat16 (Vaswani et al. 2017, section 3.2), forward only:

     y = softmax(q k^T / sqrt(width) + bias) v

   Of each sample and head, keys and values are packed for products once; then ROWS queries at a time meet all keys, so
   that scores stay in a core's cache and never are a tensor (the aim of Dao et al. 2022). Terms of products are pairs
   where the processor has them, else float32; scores and sums are float32.

   Queries, keys, values and y are [samples,heads,*,width], and lie as they like, but `width` numbers in a row. Threads
   share samples, heads and queries out, never a sum: results do not depend on how many there are.
   Called by autoencoder/attention.py. */

#include <math.h>
#include <string.h>

#include "product.h"

typedef unsigned short number;

typedef struct {
  long sample, head, row; /* how far apart they are, in numbers */
} steps;

typedef struct {
  long keys, width;
  long terms;          /* of a score: of its width, and one for the bias of its key */
  long panels, across; /* that keys make, and values */
  long row;            /* of shares, in floats: no power of two, lest rows contend for the same places of a cache */
} sizes;

/* Where a thread's memory has them, in floats. */
typedef struct {
  long keys;    /* [panels,terms,PANEL] */
  long values;  /* [across,panels * PANEL,PANEL], if of pairs filled by half */
  long queries; /* [ROWS,terms], and LANES that may be written beyond */
  long scores;  /* [panels,ROWS,PANEL] */
  long shares;  /* [ROWS,row], likewise */
  long seen;    /* [ROWS,PANEL] */
  long end;
} places;

static sizes sized(long keys, long width) {
  long terms = PAIRS ? width / 2 + 1 : width + 1, panels = (keys + PANEL - 1) / PANEL;
  return (sizes){keys, width, terms, panels, (width + PANEL - 1) / PANEL, (panels + 1) * PANEL};
}

static places placed(sizes s) {
  places at = {.values = s.panels * s.terms * PANEL};
  at.queries = at.values + s.across * s.panels * PANEL * PANEL;
  at.scores = at.queries + (ROWS * s.terms / LANES + 2) * LANES;
  at.shares = at.scores + s.panels * ROWS * PANEL;
  at.seen = at.shares + ROWS * s.row;
  at.end = at.seen + ROWS * PANEL;
  return at;
}

/* Up to LANES numbers, and zeros after them; and as many written. */
INLINE vec load_some(const number *from, long count) {
  number part[LANES] = {0};
  if (count < LANES) from = memcpy(part, from, count * sizeof(number));
  return load(from, 0, 1);
}

INLINE void store_some(number *to, long count, vec x) {
  number part[LANES];
  store(count < LANES ? part : to, 0, 1, x);
  if (count < LANES) memcpy(to, part, count * sizeof(number));
}

/* A query or key => its terms, the last one being its part in the bias. */
static void pack_row(sizes s, const number *from, float scale, float last, float *to) {
  for (long c = 0; c < s.width; c += LANES) store(to, c, PAIRS, load_some(from + c, s.width - c) * scale);
  store(to, s.width, PAIRS, (vec){last});
}

/* Beyond the last key it comes again, and is not seen. */
static void pack_keys(sizes s, const number *k, long by_row, const number *bias, float *row, float *to) {
  for (long i = 0; i < s.panels * PANEL; i++) {
    long key = i < s.keys ? i : s.keys - 1;
    float *panel = to + i / PANEL * s.terms * PANEL + i % PANEL;
    pack_row(s, k + key * by_row, 1, i > key ? -INFINITY : bias ? value(bias, key, 1) : 0, row);
    for (long t = 0; t < s.terms; t++) panel[t * PANEL] = row[t];
  }
}

static void pack_values(sizes s, const number *v, long by_row, float *to) {
  for (long panel = 0; panel < s.across; panel++)
    for (long key = 0; key < s.keys; key += 1 + PAIRS)
      for (long h = 0; h < 2; h++) {
        long c = panel * PANEL + h * LANES, count = s.width > c ? s.width - c : 0;
        const number *from = v + key * by_row + c;
        vec one = load_some(from, count), next = key + 1 < s.keys ? load_some(from + by_row, count) : (vec){0};
        if (PAIRS) one = (vec)((bits)one >> 16 | (bits)next);
        *(vec *)(to + (panel * s.panels * PANEL + key / (1 + PAIRS)) * PANEL + h * LANES) = one;
      }
}

/* Halves of a vector are joined until one number is left. */
INLINE float largest(vec x) {
  float lanes[LANES];
  *(vec *)lanes = x;
  for (int n = LANES / 2; n; n /= 2)
    for (int i = 0; i < n; i++) lanes[i] = lanes[i] > lanes[i + n] ? lanes[i] : lanes[i + n];
  return lanes[0];
}

INLINE float total(vec x) {
  float lanes[LANES];
  *(vec *)lanes = x;
  for (int n = LANES / 2; n; n /= 2)
    for (int i = 0; i < n; i++) lanes[i] += lanes[i + n];
  return lanes[0];
}

/* Scores => shares before they are divided by their sum, e^(score - the row's largest); returns the sum. */
INLINE float softmax(sizes s, const float *scores, float *shares) {
  const vec *at = (const vec *)scores;
  long apart = 2 * ROWS; /* vectors, from panel to panel */
  vec most[2] = {at[0], at[1]}, sum[2] = {{0}, {0}};
  for (long panel = 1; panel < s.panels; panel++)
    for (int h = 0; h < 2; h++) most[h] = LARGER(at[panel * apart + h], most[h]);
  float most_of_all = largest(LARGER(most[0], most[1]));
  for (long panel = 0; panel < s.panels; panel++)
    for (int h = 0; h < 2; h++) {
      vec share = exponential(at[panel * apart + h] - most_of_all);
      store(shares, panel * PANEL + h * LANES, PAIRS, share);
      sum[h] += share;
    }
  return total(sum[0] + sum[1]);
}

/* What up to ROWS queries see. */
static void attend(sizes s, places at, float *memory, const number *q, long by_query, long rows, number *y,
                   long by_row) {
  float *queries = memory + at.queries, *scores = memory + at.scores, *shares = memory + at.shares,
        *seen = memory + at.seen;
  float sums[ROWS];
  for (long i = 0; i < rows; i++) pack_row(s, q + i * by_query, 1 / sqrtf(s.width), 1, queries + i * s.terms);
  for (long panel = 0; panel < s.panels; panel++)
    products(rows, queries, s.terms, 1, memory + at.keys + panel * s.terms * PANEL, s.terms,
             scores + panel * ROWS * PANEL, 0, PAIRS);
  for (long i = 0; i < rows; i++) sums[i] = softmax(s, scores + i * PANEL, shares + i * s.row);
  for (long panel = 0; panel < s.across; panel++) {
    const float *values = memory + at.values + panel * s.panels * PANEL * PANEL;
    products(rows, shares, s.row, 1, values, (s.keys + PAIRS) >> PAIRS, seen, 0, PAIRS);
    for (long c = panel * PANEL; c < s.width && c < (panel + 1) * PANEL; c += LANES)
      for (long i = 0; i < rows; i++)
        store_some(y + i * by_row + c, s.width - c, *(vec *)(seen + i * PANEL + c % PANEL) / sums[i]);
  }
}

/* q, k, v and bias [samples,keys] or null => y; q, k, v and y lie by their steps. Returns 0, or 1 where memory is
   short. */
int attention(const number *q, const number *k, const number *v, const number *bias, number *y, const steps *by,
              long samples, long heads, long queries, long keys, long width, int threads) {
  sizes s = sized(keys, width);
  places at = placed(s);
  long all = samples * heads, blocks = (queries + ROWS - 1) / ROWS, next = 0;
  long parts = all < 2 * threads ? (2 * threads + all - 1) / all : 1; /* of few heads, queries are shared out too */
  if (parts > blocks) parts = blocks;
  float *scratch = aligned_alloc(64, threads * at.end * sizeof(float));
  if (!scratch) return 1;
#pragma omp parallel num_threads(threads)
  {
    long thread, ready = -1;
#pragma omp atomic capture
    thread = next++;
    float *memory = scratch + thread * at.end;
#pragma omp for schedule(dynamic)
    for (long item = 0; item < all * parts; item++) {
      long one = item / parts, part = item % parts, sample = one / heads, head = one % heads, from[4];
      for (int i = 0; i < 4; i++) from[i] = sample * by[i].sample + head * by[i].head;
      if (ready != one) {
        pack_keys(s, k + from[1], by[1].row, bias ? bias + sample * keys : 0, memory + at.queries, memory + at.keys);
        pack_values(s, v + from[2], by[2].row, memory + at.values);
      }
      ready = one;
      for (long first = part * blocks / parts * ROWS; first < (part + 1) * blocks / parts * ROWS; first += ROWS)
        attend(s, at, memory, q + from[0] + first * by[0].row, by[0].row,
               queries - first < ROWS ? queries - first : ROWS, y + from[3] + first * by[3].row, by[3].row);
    }
  }
  free(scratch);
  return 0;
}
