/* Attention (Vaswani et al. 2017, section 3.2), forward and backward:

     y = shares v,  shares = softmax(q k^T / sqrt(width) + bias)

   Of each sample and head, keys and values are packed for products once; then ROWS queries at a time meet all keys, so
   that scores stay in a core's cache and never are a tensor (the aim of Dao et al. 2022). Backward they are computed
   again. Numbers are float32, or bfloat16 (narrow); terms of products are pairs of the latter where the processor has
   them, else float32; scores and sums are float32.

   Queries, keys, values, y and gradients are [samples,heads,*,width], and lie as they like, but `width` numbers in a
   row. Threads share samples, heads and, forward, queries out, never a sum: results do not depend on how many there
   are. Functions return 0, or 1 where memory is short.
   Called by autoencoder/attention.py. */

#include <math.h>
#include <string.h>

#include "product.h"

typedef struct {
  long sample, head, row; /* how far apart they are, in numbers */
} steps;

/* What a sample and a head have of a tensor. */
typedef struct {
  const void *map;
  long at, row; /* where it begins, and how far apart rows are */
} lines;

INLINE lines of(const void *map, steps by, long sample, long head) {
  return (lines){map, sample * by.sample + head * by.head, by.row};
}

typedef struct {
  int narrow, pairs;
  long queries, keys, width;
  long terms;          /* of a score: of its width, and one for the bias of its key */
  long panels, across; /* that keys make, and values */
  long row;            /* of shares, in floats: no power of two, lest rows contend for the same places of a cache */
  long group;          /* queries whose shares are remembered on the way back, in a core's cache */
} sizes;

INLINE sizes sized(long queries, long keys, long width, int narrow) {
  int pairs = PAIRS && narrow;
  long terms = pairs ? width / 2 + 1 : width + 1, panels = (keys + PANEL - 1) / PANEL, row = (panels + 1) * PANEL;
  long group = (1 << 15) / (row * ROWS) * ROWS, most = (queries + ROWS - 1) / ROWS * ROWS;
  group = group < ROWS ? ROWS : group > most ? most : group;
  return (sizes){narrow, pairs, queries, keys, width, terms, panels, (width + PANEL - 1) / PANEL, row, group};
}

/* Up to LANES numbers, and zeros after them; and as many written. */
INLINE vec load_some(const void *map, long at, long count, int narrow) {
  float part[LANES] = {0};
  long size = narrow ? 2 : 4;
  if (count >= LANES) return load(map, at, narrow);
  if (count > 0) memcpy(part, (const char *)map + at * size, count * size);
  return load(part, 0, narrow);
}

INLINE void store_some(const void *map, long at, long count, int narrow, vec x) {
  float part[LANES];
  long size = narrow ? 2 : 4;
  store(count < LANES ? part : (void *)map, count < LANES ? 0 : at, narrow, x);
  if (count < LANES) memcpy((char *)map + at * size, part, count * size);
}

/* Numbers of a row => terms, and one more, `last`. */
INLINE void pack_row(sizes s, lines from, long row, float scale, float last, float *to) {
  for (long c = 0; c < s.width; c += LANES)
    store(to, c, s.pairs, load_some(from.map, from.at + row * from.row + c, s.width - c, s.narrow) * scale);
  store(to, s.width, s.pairs, (vec){last});
}

/* Keys, or values: [keys,width] => [panels,terms,PANEL]. Beyond the last key it comes again, with `beyond` as its bias.
   `row` is memory for one. */
INLINE void pack_columns(sizes s, lines from, const void *bias, long first_bias, float beyond, float *row, float *to) {
  for (long i = 0; i < s.panels * PANEL; i++) {
    long key = i < s.keys ? i : s.keys - 1;
    float *panel = to + i / PANEL * s.terms * PANEL + i % PANEL;
    pack_row(s, from, key, 1, i > key ? beyond : bias ? value(bias, first_bias + key, s.narrow) : 0, row);
    for (long t = 0; t < s.terms; t++) panel[t * PANEL] = row[t];
  }
}

/* Two numbers for one: the first of each pair and the second, lane by lane, in bfloat16. */
INLINE vec paired(vec first, vec second) {
  bits a = (bits)first, b = (bits)second;
  a += 0x7fff + (a >> 16 & 1), b += 0x7fff + (b >> 16 & 1);
  return (vec)(a >> 16 | (b & 0xffff0000));
}

/* Rows [count,width] from `first` on => [across,room,PANEL], of pairs of rows filled by half. */
INLINE void pack_rows(sizes s, lines from, long first, long count, long room, float *to) {
  for (long panel = 0; panel < s.across; panel++)
    for (long i = 0; i < count; i += 1 + s.pairs)
      for (long half = 0; half < 2; half++) {
        long c = panel * PANEL + half * LANES, at = from.at + (first + i) * from.row + c;
        vec one = load_some(from.map, at, s.width - c, s.narrow);
        if (s.pairs) one = paired(one, i + 1 < count ? load_some(from.map, at + from.row, s.width - c, 1) : (vec){0});
        *(vec *)(to + (panel * room + i / (1 + s.pairs)) * PANEL + half * LANES) = one;
      }
}

/* Sums [rows,PANEL] of a panel of the width => rows from `first` on. */
INLINE void put_rows(sizes s, const float *sums, long panel, long rows, const float *scales, float scale, lines to,
                     long first) {
  for (long c = panel * PANEL; c < s.width && c < (panel + 1) * PANEL; c += LANES)
    for (long i = 0; i < rows; i++)
      store_some(to.map, to.at + (first + i) * to.row + c, s.width - c, s.narrow,
                 *(const vec *)(sums + i * PANEL + c % PANEL) * (scales ? scales[i] : scale));
}

/* Halves of a vector are joined until one number is left. */
INLINE float joined(vec x, int largest) {
  float lanes[LANES];
  *(vec *)lanes = x;
  for (int n = LANES / 2; n; n /= 2)
    for (int i = 0; i < n; i++) {
      float a = lanes[i], b = lanes[i + n];
      lanes[i] = !largest ? a + b : a > b ? a : b;
    }
  return lanes[0];
}

/* Scores [panels,ROWS,PANEL], of one row => shares before they are divided by their sum, e^(score - the row's largest);
   returns 1 / sum. */
INLINE float softmax(sizes s, const float *scores, float *shares, int narrow) {
  const vec *at = (const vec *)scores;
  long apart = 2 * ROWS; /* vectors, from panel to panel */
  vec most[2] = {at[0], at[1]}, sum[2] = {{0}, {0}};
  for (long panel = 1; panel < s.panels; panel++)
    for (int h = 0; h < 2; h++) most[h] = LARGER(at[panel * apart + h], most[h]);
  float most_of_all = joined(LARGER(most[0], most[1]), 1);
  for (long panel = 0; panel < s.panels; panel++)
    for (int h = 0; h < 2; h++) {
      vec less = at[panel * apart + h] - most_of_all, share = exponential(less);
      share = (vec)((bits)share & ~(bits)(less < (vec){0} - 87)); /* nothing of what is masked */
      store(shares, panel * PANEL + h * LANES, narrow, share);
      sum[h] += share;
    }
  return 1 / joined(sum[0] + sum[1], 0);
}

/* Rows of x times w => y; and its columns, of which each number of the next is `by_term` on. */
static void rows_times(sizes s, long rows, const float *x, long by_row, const float *w, long length, float *y) {
  if (s.pairs) products(rows, x, by_row, 1, w, length, y, 0, 1);
  else products(rows, x, by_row, 1, w, length, y, 0, 0);
}

static void columns_times(sizes s, long columns, const float *x, long by_term, const float *w, long length, float *y,
                          int add) {
  if (s.pairs) products(columns, x, 1, by_term, w, length, y, add, 1);
  else products(columns, x, 1, by_term, w, length, y, add, 0);
}

/* Rows of terms, packed, times columns => [panels,ROWS,PANEL]. */
INLINE void meet(sizes s, long rows, const float *terms, const float *columns, float *y) {
  for (long panel = 0; panel < s.panels; panel++)
    rows_times(s, rows, terms, s.terms, columns + panel * s.terms * PANEL, s.terms, y + panel * ROWS * PANEL);
}

/* Where a thread's memory has what it needs, in floats. */
typedef struct {
  long keys;       /* [panels,terms,PANEL] */
  long values;     /* forward [across,panels * PANEL,PANEL], backward as keys */
  long queries;    /* [ROWS,terms], and what may be written beyond */
  long scores;     /* [panels,ROWS,PANEL] */
  long shares;     /* [ROWS,row] */
  long seen;       /* [ROWS,PANEL] */
  long backs;      /* as queries */
  long of_shares;  /* as scores */
  long of_scores;  /* [ROWS,row], in pairs along a row */
  long key_rows;   /* [across,panels * PANEL,PANEL] */
  long query_rows; /* [across,group,PANEL] */
  long back_rows;  /* likewise */
  long all_shares; /* [group,row], of pairs of rows filled by half */
  long all_scores; /* likewise */
  long of_keys;    /* [across,keys,PANEL], sums */
  long of_values;  /* likewise */
  long end;
} places;

INLINE places placed(sizes s, int backward) {
  long rows = (ROWS * s.terms / PANEL + 2) * PANEL, columns = s.panels * s.terms * PANEL,
       upright = s.across * s.panels * PANEL * PANEL, group = s.across * s.group * PANEL;
  places at = {.values = columns};
  at.queries = at.values + (backward ? columns : upright);
  at.scores = at.queries + rows;
  at.shares = at.scores + s.panels * ROWS * PANEL;
  at.seen = at.shares + ROWS * s.row;
  at.end = at.backs = at.seen + ROWS * PANEL;
  if (!backward) return at;
  at.of_shares = at.backs + rows;
  at.of_scores = at.of_shares + ROWS * s.row;
  at.key_rows = at.of_scores + ROWS * s.row;
  at.query_rows = at.key_rows + upright;
  at.back_rows = at.query_rows + group;
  at.all_shares = at.back_rows + group;
  at.all_scores = at.all_shares + s.group * s.row;
  at.of_keys = at.all_scores + s.group * s.row;
  at.of_values = at.of_keys + s.across * s.keys * PANEL;
  at.end = at.of_values + s.across * s.keys * PANEL;
  return at;
}

/* What up to ROWS queries see. */
INLINE void attend(sizes s, places at, float *memory, lines q, long first, long rows, lines y) {
  float *shares = memory + at.shares, *seen = memory + at.seen, parts[ROWS];
  for (long i = 0; i < rows; i++) pack_row(s, q, first + i, 1 / sqrtf(s.width), 1, memory + at.queries + i * s.terms);
  meet(s, rows, memory + at.queries, memory + at.keys, memory + at.scores);
  for (long i = 0; i < rows; i++) parts[i] = softmax(s, memory + at.scores + i * PANEL, shares + i * s.row, s.pairs);
  for (long panel = 0; panel < s.across; panel++) {
    const float *values = memory + at.values + panel * s.panels * PANEL * PANEL;
    rows_times(s, rows, shares, s.row, values, (s.keys + s.pairs) >> s.pairs, seen);
    put_rows(s, seen, panel, rows, parts, 0, y, first);
  }
}

INLINE int forward(const void *q, const void *k, const void *v, const void *bias, void *y, const steps *by,
                   long samples, long heads, sizes s, int threads) {
  places at = placed(s, 0);
  long all = samples * heads, blocks = (s.queries + ROWS - 1) / ROWS, next = 0;
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
      long one = item / parts, part = item % parts, sample = one / heads, head = one % heads;
      if (ready != one) {
        pack_columns(s, of(k, by[1], sample, head), bias, sample * s.keys, -INFINITY, memory + at.queries,
                     memory + at.keys);
        pack_rows(s, of(v, by[2], sample, head), 0, s.keys, s.panels * PANEL, memory + at.values);
      }
      ready = one;
      for (long first = part * blocks / parts * ROWS; first < (part + 1) * blocks / parts * ROWS; first += ROWS)
        attend(s, at, memory, of(q, by[0], sample, head), first, s.queries - first < ROWS ? s.queries - first : ROWS,
               of(y, by[3], sample, head));
    }
  }
  free(scratch);
  return 0;
}

/* q, k, v and bias [samples,keys] or null => y; q, k, v and y lie by their steps. */
int attention(const void *q, const void *k, const void *v, const void *bias, void *y, const steps *by, int narrow,
              long samples, long heads, long queries, long keys, long width, int threads) {
  if (narrow) return forward(q, k, v, bias, y, by, samples, heads, sized(queries, keys, width, 1), threads);
  return forward(q, k, v, bias, y, by, samples, heads, sized(queries, keys, width, 0), threads);
}

/* A row's shares before they are divided, and what comes back to them => the row's shares, and what comes back to its
   scores: share * (back - the shares' mean of back). */
INLINE void through_softmax(sizes s, float *shares, const float *back, float part, float *of_scores) {
  vec mean = {0};
  for (long c = 0; c < s.panels * PANEL; c += LANES)
    mean += *(vec *)(shares + c) * *(const vec *)(back + c / PANEL * ROWS * PANEL + c % PANEL);
  float all = joined(mean, 0) * part;
  for (long c = 0; c < s.panels * PANEL; c += LANES) {
    vec share = *(vec *)(shares + c) * part;
    *(vec *)(of_scores + c) = share * (*(const vec *)(back + c / PANEL * ROWS * PANEL + c % PANEL) - all);
    *(vec *)(shares + c) = share;
  }
}

/* Rows [rows,row] => pairs of rows, one number of each. */
INLINE void pair_rows(sizes s, const float *from, long rows, float *to) {
  for (long i = 0; i < rows; i += 2)
    for (long c = 0; c < s.panels * PANEL; c += LANES) {
      vec second = i + 1 < rows ? *(const vec *)(from + (i + 1) * s.row + c) : (vec){0};
      *(vec *)(to + i / 2 * s.row + c) = paired(*(const vec *)(from + i * s.row + c), second);
    }
}

/* What comes back to up to ROWS queries, of which the group remembers shares and scores' gradients as its rows from
   `within` on. */
INLINE void attend_back(sizes s, places at, float *memory, lines q, lines back, lines of_q, long first, long within,
                        long rows) {
  float scale = 1 / sqrtf(s.width), *all_shares = memory + at.all_shares + (within >> s.pairs) * s.row,
        *all_scores = memory + at.all_scores + (within >> s.pairs) * s.row,
        *shares = s.pairs ? memory + at.shares : all_shares, *of_scores = s.pairs ? memory + at.of_scores : all_scores;
  for (long i = 0; i < rows; i++) {
    pack_row(s, q, first + i, scale, 1, memory + at.queries + i * s.terms);
    pack_row(s, back, first + i, 1, 0, memory + at.backs + i * s.terms);
  }
  meet(s, rows, memory + at.queries, memory + at.keys, memory + at.scores);
  meet(s, rows, memory + at.backs, memory + at.values, memory + at.of_shares);
  for (long i = 0; i < rows; i++) {
    float part = softmax(s, memory + at.scores + i * PANEL, shares + i * s.row, 0);
    through_softmax(s, shares + i * s.row, memory + at.of_shares + i * PANEL, part, of_scores + i * s.row);
  }
  if (s.pairs) {
    pair_rows(s, shares, rows, all_shares);
    pair_rows(s, of_scores, rows, all_scores);
    for (long i = 0; i < rows; i++)
      for (long c = 0; c < s.panels * PANEL; c += LANES)
        store(of_scores + i * s.row, c, 1, *(vec *)(of_scores + i * s.row + c));
  }
  for (long panel = 0; panel < s.across; panel++) {
    const float *keys = memory + at.key_rows + panel * s.panels * PANEL * PANEL;
    rows_times(s, rows, of_scores, s.row, keys, (s.keys + s.pairs) >> s.pairs, memory + at.seen);
    put_rows(s, memory + at.seen, panel, rows, 0, scale, of_q, first);
  }
}

/* Of a group of queries, sums for keys and values: those of the scores' gradients times queries, and of shares times
   what comes back. */
INLINE void gather(sizes s, places at, float *memory, lines q, lines back, long first, long count) {
  pack_rows(s, q, first, count, s.group, memory + at.query_rows);
  pack_rows(s, back, first, count, s.group, memory + at.back_rows);
  for (long panel = 0; panel < s.across; panel++) {
    long from = panel * s.group * PANEL, to = panel * s.keys * PANEL, length = (count + s.pairs) >> s.pairs;
    columns_times(s, s.keys, memory + at.all_scores, s.row, memory + at.query_rows + from, length,
                  memory + at.of_keys + to, first > 0);
    columns_times(s, s.keys, memory + at.all_shares, s.row, memory + at.back_rows + from, length,
                  memory + at.of_values + to, first > 0);
  }
}

INLINE int backward(const void *q, const void *k, const void *v, const void *bias, const void *back, void *of_q,
                    void *of_k, void *of_v, const steps *by, long samples, long heads, sizes s, int threads) {
  places at = placed(s, 1);
  long next = 0;
  float *scratch = aligned_alloc(64, threads * at.end * sizeof(float));
  if (!scratch) return 1;
#pragma omp parallel num_threads(threads)
  {
    long thread;
#pragma omp atomic capture
    thread = next++;
    float *memory = scratch + thread * at.end;
#pragma omp for schedule(dynamic)
    for (long one = 0; one < samples * heads; one++) {
      long sample = one / heads, head = one % heads;
      lines keys = of(k, by[1], sample, head), queries = of(q, by[0], sample, head),
            backs = of(back, by[3], sample, head);
      pack_columns(s, keys, bias, sample * s.keys, -INFINITY, memory + at.queries, memory + at.keys);
      pack_columns(s, of(v, by[2], sample, head), 0, 0, 0, memory + at.queries, memory + at.values);
      pack_rows(s, keys, 0, s.keys, s.panels * PANEL, memory + at.key_rows);
      for (long first = 0; first < s.queries; first += s.group) {
        long count = s.queries - first < s.group ? s.queries - first : s.group;
        for (long i = 0; i < count; i += ROWS)
          attend_back(s, at, memory, queries, backs, of(of_q, by[4], sample, head), first + i, i,
                      count - i < ROWS ? count - i : ROWS);
        gather(s, at, memory, queries, backs, first, count);
      }
      for (long panel = 0; panel < s.across; panel++) {
        long to = panel * s.keys * PANEL;
        put_rows(s, memory + at.of_keys + to, panel, s.keys, 0, 1 / sqrtf(s.width), of(of_k, by[5], sample, head), 0);
        put_rows(s, memory + at.of_values + to, panel, s.keys, 0, 1, of(of_v, by[6], sample, head), 0);
      }
    }
  }
  free(scratch);
  return 0;
}

/* What comes back to y => to q, k and v; all lie by their steps: q, k, v, back, and the three. */
int attention_backward(const void *q, const void *k, const void *v, const void *bias, const void *back, void *of_q,
                       void *of_k, void *of_v, const steps *by, int narrow, long samples, long heads, long queries,
                       long keys, long width, int threads) {
  if (narrow)
    return backward(q, k, v, bias, back, of_q, of_k, of_v, by, samples, heads, sized(queries, keys, width, 1), threads);
  return backward(q, k, v, bias, back, of_q, of_k, of_v, by, samples, heads, sized(queries, keys, width, 0), threads);
}
