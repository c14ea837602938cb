// Products of tiles, from shared memory into the registers of a block's threads.
//
// Rows come to shared memory in chunks of 128 bytes, whatever the number, in lines of 144: reads of 16 bytes by neighbouring rows meet
// different banks. A warp owns 16 rows of a product; its lanes form 32 / LANES groups of rows by LANES of columns.
#pragma once

#include <type_traits>

#include "device.h"

#ifndef PAIRLOSS_WARPS  // the tests run smaller blocks
#define PAIRLOSS_WARPS 4
#define PAIRLOSS_COLS 64
#endif

namespace pairloss::cuda {

constexpr int CHUNK_BYTES = 128, PIECE = 16, LINE = CHUNK_BYTES + PIECE;

template <class T>
struct Shape {
  using Sum = std::conditional_t<sizeof(T) == 8, double, float>;  // what products are added up in
  static constexpr bool HALF = sizeof(T) == 2;
  static constexpr int THREADS = 32 * PAIRLOSS_WARPS, WARPS = PAIRLOSS_WARPS;
  static constexpr int ROWS = 16 * WARPS;                                                   // anchors of a tile
  static constexpr int COLS = PAIRLOSS_COLS / (sizeof(T) == 8 && PAIRLOSS_COLS > 32 ? 2 : 1);  // candidates of a tile
  static constexpr int CHUNK = CHUNK_BYTES / int(sizeof(T));                                // columns of x and y in a chunk
  static constexpr int VECTOR = PIECE / int(sizeof(T));
  static constexpr int LANES = HALF ? 4 : 8;  // half: as mma.m16n8k16 lays out its result
  static constexpr int ROW_LANES = 32 / LANES;
  static constexpr int R = 16 / ROW_LANES;  // rows of a thread
  static constexpr int PAIR_RUN = HALF ? 2 : 1, GRADIENT_RUN = HALF ? 2 : VECTOR;  // neighbouring columns of a thread
  static constexpr int WEIGHT_LINE = COLS * int(sizeof(T)) + PIECE;
};

template <class T>
struct alignas(PIECE) Vector {
  T v[Shape<T>::VECTOR];
};

PAIRLOSS_DEVICE int lane() { return thread() % 32; }
PAIRLOSS_DEVICE int warp() { return thread() / 32; }

// Entry (a, b) of a thread's part of a product is that of this row and this column.
template <class T>
PAIRLOSS_DEVICE int row_of(int a) {
  return warp() * 16 + a * Shape<T>::ROW_LANES + lane() / Shape<T>::LANES;
}

template <class T, int RUN>
PAIRLOSS_DEVICE int col_of(int b) {
  return b / RUN * (Shape<T>::LANES * RUN) + lane() % Shape<T>::LANES * RUN + b % RUN;
}

template <class T>
PAIRLOSS_DEVICE const T& entry(const char* lines, int line_bytes, int line, int at) {
  return reinterpret_cast<const T*>(lines + line * line_bytes)[at];
}

// On tensor cores: += a b with a [ROWS, depth] and b [depth, 4 C], whose lines are its rows, or where TRANSPOSED its columns.
template <class T, bool TRANSPOSED, int C>
PAIRLOSS_DEVICE void add_matrix_product(float (&to)[2][C], const char* a, int a_line, const char* b, int b_line, int depth) {
  const int l = lane();
  for (int k = 0; k < depth; k += 16) {
    uint32_t of_a[4];
    load_matrices<false>(of_a, &entry<T>(a, a_line, warp() * 16 + l % 16, k + l / 16 * 8));
#pragma unroll
    for (int c = 0; c < C; c += 4) {  // 16 columns of b
      uint32_t of_b[4];
      const int first = c * 4, eight = l % 8, second = l / 8 % 2 * 8, third = l / 16 * 8;
      if constexpr (TRANSPOSED) {
        load_matrices<false>(of_b, &entry<T>(b, b_line, first + third + eight, k + second));
      } else {
        load_matrices<true>(of_b, &entry<T>(b, b_line, k + second + eight, first + third));
      }
      multiply<T>(to[0][c], to[0][c + 1], to[1][c], to[1][c + 1], of_a, of_b[0], of_b[1]);
      multiply<T>(to[0][c + 2], to[0][c + 3], to[1][c + 2], to[1][c + 3], of_a, of_b[2], of_b[3]);
    }
  }
}

// By multiply-adds: += a b^T.
template <class T, int C>
PAIRLOSS_DEVICE void add_dots(typename Shape<T>::Sum (&to)[Shape<T>::R][C], const char* a, const char* b) {
  using S = Shape<T>;
#pragma unroll 1
  for (int k = 0; k < S::CHUNK; k += S::VECTOR) {
    Vector<T> of_a[S::R];
#pragma unroll
    for (int r = 0; r < S::R; ++r) of_a[r] = reinterpret_cast<const Vector<T>&>(entry<T>(a, LINE, row_of<T>(r), k));
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const Vector<T> of_b = reinterpret_cast<const Vector<T>&>(entry<T>(b, LINE, col_of<T, S::PAIR_RUN>(c), k));
#pragma unroll
      for (int v = 0; v < S::VECTOR; ++v) {
#pragma unroll
        for (int r = 0; r < S::R; ++r) to[r][c] = multiply_add(widened(of_a[r].v[v]), widened(of_b.v[v]), to[r][c]);
      }
    }
  }
}

// By multiply-adds: += w b.
template <class T, int C>
PAIRLOSS_DEVICE void add_rows(typename Shape<T>::Sum (&to)[Shape<T>::R][C], const char* w, const char* b) {
  using S = Shape<T>;
#pragma unroll 1
  for (int k = 0; k < S::COLS; k += S::VECTOR) {
    Vector<T> of_w[S::R];
#pragma unroll
    for (int r = 0; r < S::R; ++r) of_w[r] = reinterpret_cast<const Vector<T>&>(entry<T>(w, S::WEIGHT_LINE, row_of<T>(r), k));
#pragma unroll
    for (int v = 0; v < S::VECTOR; ++v) {
#pragma unroll
      for (int c = 0; c < C; c += S::GRADIENT_RUN) {
        struct alignas(S::GRADIENT_RUN * sizeof(T)) Run {
          T v[S::GRADIENT_RUN];
        };
        const Run of_b = reinterpret_cast<const Run&>(entry<T>(b, LINE, k + v, col_of<T, S::GRADIENT_RUN>(c)));
#pragma unroll
        for (int e = 0; e < S::GRADIENT_RUN; ++e) {
#pragma unroll
          for (int r = 0; r < S::R; ++r) to[r][c + e] = multiply_add(widened(of_w[r].v[v]), widened(of_b.v[e]), to[r][c + e]);
        }
      }
    }
  }
}

template <class T>
constexpr bool ON_TENSOR_CORES = Shape<T>::HALF && HAS_TENSOR_CORES;

// A chunk of the tile's rows of x by a chunk of those of y.
template <class T, int C>
PAIRLOSS_DEVICE void add_products(typename Shape<T>::Sum (&to)[Shape<T>::R][C], const char* x, const char* y) {
  if constexpr (ON_TENSOR_CORES<T>) {
    add_matrix_product<T, true>(to, x, LINE, y, LINE, Shape<T>::CHUNK);
  } else {
    add_dots<T>(to, x, y);
  }
}

// The tile's weights by a chunk of its rows of y.
template <class T, int C>
PAIRLOSS_DEVICE void add_gradient(typename Shape<T>::Sum (&to)[Shape<T>::R][C], const char* weights, const char* y) {
  if constexpr (ON_TENSOR_CORES<T>) {
    add_matrix_product<T, false>(to, weights, Shape<T>::WEIGHT_LINE, y, LINE, Shape<T>::COLS);
  } else {
    add_rows<T>(to, weights, y);
  }
}

}  // namespace pairloss::cuda
