// Products of tiles, C (+)= A B, that stay in the caches of one core.
//
// B is packed: panels of PANEL columns, each K x PANEL without gaps, the last one filled up with zeros. A and C are row by row. A tile of ROWS x PANEL of C stays in registers over up to DEPTH factors, summed in their order:
// <a, b> and <b, a> round alike. A factor is one number, or as in bfloat16.h a pair that is multiplied at once.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace pairloss {
namespace {

// ROWS x VECTORS accumulators, VECTORS operands and a broadcast fill the registers, and the usual lengths of rows are multiples of PANEL.
// Arm has the numbers of the rows in registers too: with 6 of them GCC keeps accumulators in memory.
#if defined(__aarch64__)
constexpr int ROWS = 5;
#else
constexpr int ROWS = 6;
#endif
constexpr int VECTORS = REGISTERS == 32 ? 4 : 2;
constexpr int DEPTH = 128;  // short enough for rounding errors as small as a library's
constexpr int AHEAD = 8;    // the rows of a transposed A lie too far apart for the processor to foresee

template <class T>
constexpr int PANEL = VECTORS * WIDTH<T>;

// Numbers as factors, as they are.
template <class T>
struct Plain {
  using Sum = T;
  static constexpr int TERMS = 1;
  static PAIRLOSS_INLINE T factor(T first, T) { return first; }
  static PAIRLOSS_INLINE Vec<T> add(Vec<T> total, T a, Vec<T> b) { return total + a * b; }
};

// Products of factors F, as kernels.h calls them.
template <class F>
struct Blocked {
  using Sum = typename F::Sum;
  using T = Sum;
  static constexpr int SIDE = PANEL<T>, PAIR_BYTES = sizeof(T);
  static constexpr bool COMMUTES = true;  // <a, b> and <b, a> round alike

  static int64_t block_size(int64_t n, int64_t d, int roles) { return place(n, d, roles, 2 * WEIGHTED); }

  static void pack(const T* rows, int64_t n, int64_t d, int roles, T* to) {
    if (roles & LEFT) pack_factors<false>(n, d, rows, d, to);
    if (roles & RIGHT) pack_panels(rows, d, n, 1, d, to + place(n, d, roles, RIGHT));
    if (roles & WEIGHTED) pack_panels(rows, n, d, d, 1, to + place(n, d, roles, WEIGHTED));
  }

  // Of a tile's weights as factors, or of their transpose, which keeps its stride.
  static int64_t operands_size(int64_t rows, int64_t, int64_t stride, int64_t) {
    return F::TERMS == 1 ? 0 : rounded_up(rows, F::TERMS) * stride;
  }

  // C [m, n] = X Y^T.
  static void scores(int64_t m, int64_t n, int64_t d, Block<T> x, Block<T> y, T* c, int64_t stride_c, T*) {
    product<false>(m, n, factors(d), x.data, factors(d), y.data + place(n, d, y.roles, RIGHT), c, stride_c, false);
  }

  // Where they are not null: to_rows [rows, d] += W Y and to_cols [cols, d] += W^T X, with W [rows, cols]. `memory` of operands_size.
  static void add(int64_t rows, int64_t cols, int64_t d, const T* w, int64_t stride, Block<T> x, Block<T> y, T* to_rows, T* to_cols,
      T* memory) {
    if (to_rows) add<false>(rows, d, cols, w, stride, y.data + place(cols, d, y.roles, WEIGHTED), to_rows, memory);
    if (to_cols) add<true>(cols, d, rows, w, stride, x.data + place(rows, d, x.roles, WEIGHTED), to_cols, memory);
  }

 private:
  static int64_t factors(int64_t depth) { return rounded_up(depth, F::TERMS) / F::TERMS; }

  // Where a role's operand begins in a block that has `roles`: they come in Role's order.
  static int64_t place(int64_t n, int64_t d, int roles, int role) {
    int64_t at = 0;
    if (role > LEFT && roles & LEFT) at += rounded_up(n * factors(d), PADDING);
    if (role > RIGHT && roles & RIGHT) at += rounded_up(n, PANEL<T>) * factors(d);
    if (role > WEIGHTED && roles & WEIGHTED) at += rounded_up(d, PANEL<T>) * factors(n);
    return at;
  }

  // Panels of PANEL columns of the matrix [depth, n] whose entry (k, j) is a[k * stride_k + j * stride_j].
  static void pack_panels(const T* a, int64_t depth, int64_t n, int64_t stride_k, int64_t stride_j, T* to) {
    for (int64_t j0 = 0; j0 < n; j0 += PANEL<T>) {
      const int64_t width = n - j0 < PANEL<T> ? n - j0 : PANEL<T>;
      for (int64_t k = 0; k < depth; k += F::TERMS, to += PANEL<T>) {
        const T* from = a + k * stride_k + j0 * stride_j;
        const bool second = k + 1 < depth;
        for (int64_t j = 0; j < width; ++j) to[j] = F::factor(from[j * stride_j], second ? from[stride_k + j * stride_j] : T(0));
        for (int64_t j = width; j < PANEL<T>; ++j) to[j] = 0;
      }
    }
  }

  // C [m, n] += A B, without gaps between the rows of C.
  template <bool TRANSPOSED>
  static void add(int64_t m, int64_t n, int64_t depth, const T* a, int64_t stride_a, const T* right, T* c, T* memory) {
    if constexpr (F::TERMS > 1) {
      pack_factors<TRANSPOSED>(m, depth, a, stride_a, memory);
      a = memory;
      if (!TRANSPOSED) stride_a = factors(depth);
    }
    product<TRANSPOSED>(m, n, factors(depth), a, stride_a, right, c, n, true);
  }

  // The factors of A [m, depth] (TRANSPOSED: of its transpose as it lies, which keeps its stride).
  template <bool TRANSPOSED>
  static void pack_factors(int64_t m, int64_t depth, const T* a, int64_t stride_a, T* to) {
    constexpr int TERMS = F::TERMS;
    const int64_t count = factors(depth), whole = depth / TERMS;
    if constexpr (TRANSPOSED) {
      for (int64_t k = 0; k < count; ++k) {
        const T *first = a + TERMS * k * stride_a, *last = first + (TERMS - 1) * stride_a;
        for (int64_t i = 0; i < m; ++i) to[k * stride_a + i] = F::factor(first[i], k < whole ? last[i] : T(0));
      }
    } else {
      for (int64_t i = 0; i < m; ++i, a += stride_a, to += count) {
        for (int64_t k = 0; k < whole; ++k) to[k] = F::factor(a[TERMS * k], a[TERMS * k + TERMS - 1]);
        if (whole < count) to[whole] = F::factor(a[TERMS * whole], T(0));
      }
    }
  }

  // One ROWS x PANEL tile of C; rows and columns beyond `rows` and `columns` are not written. Entry (i, k) of A is
  // a[i * stride_a + k], or transposed, a[k * stride_a + i].
  template <bool TRANSPOSED>
  static inline void product_block(
      int64_t depth, const T* a, int64_t stride_a, const T* panel, T* c, int64_t stride_c, int rows, int64_t columns, bool add) {
    Vec<T> total[ROWS][VECTORS] = {};
    const T* row[ROWS];
    for (int i = 0; i < ROWS; ++i) row[i] = a + (i < rows ? i : rows - 1) * stride_a;
    for (int64_t k = 0; k < depth; ++k, panel += PANEL<T>) {
      if constexpr (TRANSPOSED) __builtin_prefetch(a + (k + AHEAD) * stride_a);
      Vec<T> b[VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) b[v] = load(panel + v * WIDTH<T>);
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i) {
        const T ai = TRANSPOSED ? a[k * stride_a + i] : row[i][k];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) total[i][v] = F::add(total[i][v], ai, b[v]);
      }
    }
    if (columns >= PANEL<T>) {
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i) {  // unrolled: what has an index that varies is no register
        if (i == rows) return;
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) {
          T* to = c + i * stride_c + v * WIDTH<T>;
          store(to, add ? load(to) + total[i][v] : total[i][v]);
        }
      }
    } else {
      T all[ROWS][PANEL<T>];
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) store(&all[i][v * WIDTH<T>], total[i][v]);
      }
      for (int i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; ++j) c[i * stride_c + j] = (add ? c[i * stride_c + j] : T(0)) + all[i][j];
      }
    }
  }

  // C (+)= A B of factors.
  template <bool TRANSPOSED>
  static void product(
      int64_t m, int64_t n, int64_t depth, const T* a, int64_t stride_a, const T* panels, T* c, int64_t stride_c, bool add) {
    for (int64_t k = 0; k < depth || k == 0; k += DEPTH) {
      const int64_t terms = depth - k < DEPTH ? depth - k : DEPTH;
      for (int64_t i = 0; i < m; i += ROWS) {
        const int rows = int(m - i < ROWS ? m - i : ROWS);
        const T* a_block = TRANSPOSED ? a + k * stride_a + i : a + i * stride_a + k;
        for (int64_t j = 0; j < n; j += PANEL<T>) {
          product_block<TRANSPOSED>(
              terms, a_block, stride_a, panels + j * depth + k * PANEL<T>, c + i * stride_c + j, stride_c, rows, n - j, add || k > 0);
        }
      }
    }
  }
};

}  // namespace
}  // namespace pairloss
