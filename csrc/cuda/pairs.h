// A tile of pairs as all kernels see it: the stream of chunks that its product is formed from, what its rows and columns carry, which
// set its pairs are in, their logits.
#pragma once

#include <cmath>
#include <limits>

#include "../pair_terms.h"
#include "engine.h"
#include "products.h"

namespace pairloss::cuda {

enum Set { POSITIVES = 0, NEGATIVES = 1, MIXED = 2 };

// Stands for the maximum of an empty set: finite, so that no inf - inf arises. As pairloss/operands.py has it.
template <class A>
constexpr A LOWEST = A(-1e38);
template <class A>
constexpr A INFINITE = std::numeric_limits<A>::infinity();

PAIRLOSS_DEVICE float exponential(float v) { return expf(v); }
PAIRLOSS_DEVICE double exponential(double v) { return exp(v); }

// Of a pair of rows of T. Half numbers have an error beside which that of v's last digit here is none.
template <class T, class A>
PAIRLOSS_DEVICE A exponential_of_pair(A v) {
  if constexpr (Shape<T>::HALF) {
    return power_of_2(v * 1.4426950408889634f);
  } else {
    return exponential(v);
  }
}

// NaN among the operands is dropped, as the sums that follow keep it.
template <class A>
PAIRLOSS_DEVICE A larger(A a, A b) {
  return b > a ? b : a;
}

// A call in the kernels' types.
template <class T>
struct Pairs {
  using A = typename Shape<T>::Sum;

  struct Of {
    const T* rows;
    const int32_t *ids, *id_ranges;
    const A *bias, *weights, *weight_ranges;
    int64_t n;
    int tiles;
  };

  Of x, y;
  int64_t self_offset;
  int d, sets, words;
  bool symmetric, has_self;
  A margin, gamma;
  const A* cutoff;
};

// What SIZE rows of a side carry, in shared memory.
template <class A, int SIZE>
struct Carried {
  int32_t ids[SIZE];
  A bias[SIZE];
  A g[2][SIZE], m[2][SIZE];  // weights by set
};

// The sets are numbered as in Set; without ids there is one entry, for NEGATIVES.
PAIRLOSS_DEVICE int entry_of(int set, int sets) { return sets == 1 ? 0 : set; }

// The one set that all pairs of tile (i, j) are in, or MIXED.
template <class T>
PAIRLOSS_DEVICE Set tile_set(const Pairs<T>& p, int i, int j) {
  if (p.sets == 1) return NEGATIVES;
  if (p.words) return MIXED;
  const int32_t *x = p.x.id_ranges + i, *y = p.y.id_ranges + j;
  const int32_t low_x = x[0], high_x = x[p.x.tiles], low_y = y[0], high_y = y[p.y.tiles];
  if (high_x < low_y || high_y < low_x) return NEGATIVES;
  return low_x == high_x && low_y == high_y ? POSITIVES : MIXED;
}

// One tile of the kernel's grid at a time.
template <class T>
struct Block {
  using S = Shape<T>;
  using A = typename S::Sum;
  static constexpr int C = S::COLS / S::LANES;  // columns of a thread

  // Two places for chunks of x and of y: one is computed with while the other is filled.
  static constexpr int X_BYTES = S::ROWS * LINE, Y_BYTES = S::COLS * LINE;
  static constexpr int SLOT_BYTES = X_BYTES + Y_BYTES;

  struct Shared {
    Carried<A, S::ROWS> x;
    Carried<A, S::COLS> y;
  };
  static constexpr int BYTES = 2 * SLOT_BYTES + int(sizeof(Shared));
  static_assert(BYTES % PIECE == 0 && S::ROWS % S::COLS == 0);

  const Pairs<T>& p;
  char* memory;
  int turn = 0;
  int64_t i0 = 0, j0 = 0;  // the tile's first row and column
  Set set = MIXED;
  int height = 0, width = 0;  // rows and columns of the tile that exist
  int left_out = 0;           // in row r the pair of column left_out + r is left out
  bool masked = false;        // some pairs are beyond the edges or left out
  bool uniform = false;       // all pairs are in one set and count
  uint32_t positive[S::R], counted[S::R];  // where it is not, bit b is of pair (a, b)
  A z[S::R][C];                            // products, then logits, then what becomes of them

  PAIRLOSS_DEVICE explicit Block(const Pairs<T>& pairs) : p(pairs), memory(shared_memory()) {}

  PAIRLOSS_DEVICE Shared& shared() { return *reinterpret_cast<Shared*>(memory + 2 * SLOT_BYTES); }
  PAIRLOSS_DEVICE char* after_shared() { return memory + BYTES; }

  // Begins to fill the other place: chunk k of the tile's rows and columns. The last row again instead of rows that don't exist.
  PAIRLOSS_DEVICE void fetch(bool with_x, int64_t first_x, int64_t first_y, int64_t k) {
    char* to = memory + (1 - turn) * SLOT_BYTES;
    if (with_x) fetch_lines<S::ROWS>(to, p.x, first_x, k);
    fetch_lines<S::COLS>(to + X_BYTES, p.y, first_y, k);
  }

  template <int LINES>
  PAIRLOSS_DEVICE void fetch_lines(char* to, const typename Pairs<T>::Of& side, int64_t first, int64_t k) {
    constexpr int PIECES = CHUNK_BYTES / PIECE, AT_A_TIME = S::THREADS / PIECES;
    static_assert(LINES % AT_A_TIME == 0);
    const int line = thread() / PIECES, piece = thread() % PIECES;
    const int last = int(side.n - first < LINES ? side.n - first : LINES) - 1, line_bytes = p.d * int(sizeof(T));
    const char* const from = reinterpret_cast<const char*>(side.rows + first * p.d + k * S::CHUNK) + piece * PIECE;
#pragma unroll
    for (int l = line; l < line + LINES; l += AT_A_TIME) {
      copy_async(to + l * LINE + piece * PIECE, from + int64_t(l < last ? l : last) * line_bytes);
    }
  }

  // What was being fetched is there, and all threads are done with what was there before.
  PAIRLOSS_DEVICE void next_turn() {
    wait_copies();
    sync_block();
    turn = 1 - turn;
  }

  PAIRLOSS_DEVICE const char* chunk_of_x() const { return memory + turn * SLOT_BYTES; }
  PAIRLOSS_DEVICE const char* chunk_of_y() const { return chunk_of_x() + X_BYTES; }

  PAIRLOSS_DEVICE void place(int i, int j) {
    i0 = int64_t(i) * S::ROWS;
    j0 = int64_t(j) * S::COLS;
    set = tile_set(p, i, j);
    height = int(p.x.n - i0 < S::ROWS ? p.x.n - i0 : S::ROWS);
    width = int(p.y.n - j0 < S::COLS ? p.y.n - j0 : S::COLS);
    const int64_t first = i0 + p.self_offset - j0;
    left_out = p.has_self && first > -S::ROWS && first < S::COLS ? int(first) : S::COLS;
    masked = height < S::ROWS || width < S::COLS || left_out < S::COLS;
#pragma unroll
    for (int a = 0; a < S::R; ++a) {
#pragma unroll
      for (int b = 0; b < C; ++b) z[a][b] = 0;
    }
  }

  // Calls f(0) to f(COUNT - 1), each by a thread.
  template <int COUNT, class F>
  PAIRLOSS_DEVICE static void share(F f) {
#pragma unroll
    for (int first = 0; first < COUNT; first += S::THREADS) {
      if (first + S::THREADS <= COUNT || first + thread() < COUNT) f(first + thread());
    }
  }

  template <int SIZE>
  PAIRLOSS_DEVICE void carry(Carried<A, SIZE>& to, const typename Pairs<T>::Of& side, int64_t first) {
    share<SIZE>([&](int k) {
      const int64_t row = first + k < side.n ? first + k : side.n - 1;
      to.ids[k] = p.sets == 2 && p.words == 0 ? side.ids[row] : 0;
      to.bias[k] = side.bias ? side.bias[row] : A(0);
    });
  }

  PAIRLOSS_DEVICE bool same_id(int row, int col) {
    if (set != MIXED) return set == POSITIVES;
    if (p.words == 0) return shared().x.ids[row] == shared().y.ids[col];
    if (row >= height || col >= width) return false;
    const int64_t i = i0 + row, j = j0 + col;
    for (int w = 0; w < p.words; ++w) {
      if (p.x.ids[i * p.words + w] & p.y.ids[j * p.words + w]) return true;
    }
    return false;
  }

  PAIRLOSS_DEVICE bool is_left_out(int row, int col) const {
    return masked && (row >= height || col >= width || row + left_out == col);
  }

  // Which pairs are positive and which count, once what rows and columns carry is there and z are the products.
  PAIRLOSS_DEVICE void sort_pairs(bool may_be_uniform) {
    uniform = may_be_uniform && set != MIXED && !masked && !p.cutoff;
    if (uniform) return;
#pragma unroll
    for (int a = 0; a < S::R; ++a) positive[a] = counted[a] = 0;
#pragma unroll 1
    for (int b = 0; b < C; ++b) {
      const int col = col_of<T, S::PAIR_RUN>(b);
#pragma unroll
      for (int a = 0; a < S::R; ++a) {
        const int row = row_of<T>(a);
        positive[a] |= uint32_t(same_id(row, col)) << b;
        counted[a] |= uint32_t(!is_left_out(row, col)) << b;
      }
    }
    if (!p.cutoff) return;
    const A cutoff = *p.cutoff;
    each_pair([&](int a, int b) {
      if (z[a][b] < cutoff) counted[a] &= positive[a] | ~(1u << b);
    });
  }

  PAIRLOSS_DEVICE bool is_positive(int a, int b) const { return positive[a] & 1u << b; }

  // Calls f(a, b, row, column, positive, counts) for the thread's pairs, column by column.
  template <class F>
  PAIRLOSS_DEVICE void for_pairs(F f) {
    const auto call = [&](int a, int b, bool same, bool counts) { f(a, b, row_of<T>(a), col_of<T, S::PAIR_RUN>(b), same, counts); };
    if (!uniform) {
      each_pair([&](int a, int b) { call(a, b, is_positive(a, b), counted[a] & 1u << b); });
    } else if (set == POSITIVES) {
      each_pair([&](int a, int b) { call(a, b, true, true); });
    } else {
      each_pair([&](int a, int b) { call(a, b, false, true); });
    }
  }

  template <class F>
  PAIRLOSS_DEVICE static void each_pair(F f) {
#pragma unroll
    for (int b = 0; b < C; ++b) {
#pragma unroll
      for (int a = 0; a < S::R; ++a) f(a, b);
    }
  }

  // The logit of a pair with the product s, -inf if it doesn't count; and the derivative of its score.
  template <bool CIRCLE>
  PAIRLOSS_DEVICE A logit(A s, int row, int col, bool same, bool counts, A* slope) {
    A v = s;
    *slope = 1;
    if constexpr (CIRCLE) {
      const A r = same ? A(1) - s : s, steepness = circle_slope(r, p.margin, p.gamma);
      v = circle(r, steepness, p.margin);
      *slope = same ? -steepness : steepness;
    }
    v += shared().x.bias[row] + shared().y.bias[col];  // the biases first: z_ij and z_ji round alike
    return counts ? v : -INFINITE<A>;
  }

  // Over the lanes that share a row.
  template <class F>
  PAIRLOSS_DEVICE static void reduce_row(F f) {
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) {
      if (mask & S::COLUMN_BITS) f(mask);
    }
  }

  // Over the lanes that share a column.
  template <class F>
  PAIRLOSS_DEVICE static void reduce_column(F f) {
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) {
      if (!(mask & S::COLUMN_BITS)) f(mask);
    }
  }
};

}  // namespace pairloss::cuda
