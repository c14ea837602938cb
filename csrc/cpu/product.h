// Products of tiles, C (+)= A B, that stay in the caches of one core.
//
// B is packed: panels of PANEL columns, each K x PANEL without gaps, the last one filled up with zeros. A and C are as they
// come. A tile of ROWS x PANEL of C stays in registers over up to DEPTH terms, summed in their order: <a, b> and <b, a> round
// alike.
#pragma once

#include "vector.h"

namespace pairloss {
namespace {

// ROWS x VECTORS accumulators, VECTORS operands and a broadcast fill the registers, and the usual lengths of rows are multiples of PANEL.
constexpr int ROWS = 6, VECTORS = REGISTERS == 32 ? 4 : 2;
constexpr int DEPTH = 128;  // short enough for rounding errors as small as a library's
constexpr int AHEAD = 8;    // the rows of a transposed A lie too far apart for the processor to foresee

template <class T>
constexpr int PANEL = VECTORS * WIDTH<T>;

// Panels of the matrix whose entry (k, j) is a[k * stride_k + j * stride_j].
template <class T>
void pack(const T* a, int64_t depth, int64_t columns, int64_t stride_k, int64_t stride_j, T* panels) {
  for (int64_t j0 = 0; j0 < columns; j0 += PANEL<T>) {
    const int64_t width = columns - j0 < PANEL<T> ? columns - j0 : PANEL<T>;
    for (int64_t k = 0; k < depth; ++k, panels += PANEL<T>) {
      const T* from = a + k * stride_k + j0 * stride_j;
      for (int64_t j = 0; j < width; ++j) panels[j] = from[j * stride_j];
      for (int64_t j = width; j < PANEL<T>; ++j) panels[j] = 0;
    }
  }
}

// One ROWS x PANEL tile of C; rows and columns beyond `rows` and `columns` are not written. Entry (i, k) of A is
// a[i * stride_a + k], or transposed, a[k * stride_a + i].
template <class T, bool TRANSPOSED>
inline void product_block(
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
      for (int v = 0; v < VECTORS; ++v) total[i][v] += ai * b[v];
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

// C (+)= A B with A [m, depth] (transposed: its transpose as it lies), B the panels of a [depth, n] matrix, C [m, n].
template <class T, bool TRANSPOSED>
void product(int64_t m, int64_t n, int64_t depth, const T* a, int64_t stride_a, const T* panels, T* c, int64_t stride_c, bool add) {
  for (int64_t k = 0; k < depth || k == 0; k += DEPTH) {
    const int64_t terms = depth - k < DEPTH ? depth - k : DEPTH;
    for (int64_t i = 0; i < m; i += ROWS) {
      const int rows = int(m - i < ROWS ? m - i : ROWS);
      const T* a_block = TRANSPOSED ? a + k * stride_a + i : a + i * stride_a + k;
      for (int64_t j = 0; j < n; j += PANEL<T>) {
        product_block<T, TRANSPOSED>(
            terms, a_block, stride_a, panels + j * depth + k * PANEL<T>, c + i * stride_c + j, stride_c, rows, n - j, add || k > 0);
      }
    }
  }
}

}  // namespace
}  // namespace pairloss
