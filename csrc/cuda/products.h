// Products of tiles, from shared memory into the registers of a block's threads.
//
// Rows come to shared memory in chunks of 128 bytes, whatever the number, in lines of 144: reads of 16 bytes by neighbouring rows meet
// different banks. A warp owns 16 rows of a product; its lanes form ROW_LANES groups of rows by LANES of columns.
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
  // The bits of a lane that say which of the columns is its. Half: as mma.m16n8k16 lays out its result. Else lanes share a row with
  // their neighbour but one and a column with their neighbour: reads of 16 bytes then take half the time, as pairs of lanes read the same.
  static constexpr int COLUMN_BITS = HALF ? 3 : 14;
  static constexpr int LANES = HALF ? 4 : 8, ROW_LANES = 32 / LANES;
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

template <class T>
PAIRLOSS_DEVICE int row_lane() {
  return Shape<T>::HALF ? lane() / 4 : lane() % 2 + lane() / 16 * 2;
}

template <class T>
PAIRLOSS_DEVICE int col_lane() {
  return Shape<T>::HALF ? lane() % 4 : lane() / 2 % 8;
}

// Entry (a, b) of a thread's part of a product is that of this row and this column.
template <class T>
PAIRLOSS_DEVICE int row_of(int a) {
  return warp() * 16 + a * Shape<T>::ROW_LANES + row_lane<T>();
}

template <class T, int RUN>
PAIRLOSS_DEVICE int col_of(int b) {
  return b / RUN * (Shape<T>::LANES * RUN) + col_lane<T>() * RUN + b % RUN;
}

template <class T>
PAIRLOSS_DEVICE const T& entry(const char* lines, int line_bytes, int line, int at) {
  return reinterpret_cast<const T*>(lines + line * line_bytes)[at];
}

// On tensor cores: += a b with 16 columns of a, as multiply takes them, and 16 rows of b [.., 4 C] from k on, which are its lines, or where
// TRANSPOSED its columns.
template <class T, bool TRANSPOSED, int C>
PAIRLOSS_DEVICE void add_matrix_product(float (&to)[2][C], const uint32_t (&a)[4], const char* b, int k) {
  const int l = lane(), eight = l % 8, second = l / 8 % 2 * 8, third = l / 16 * 8;
#pragma unroll
  for (int c = 0; c < C; c += 4) {  // 16 columns of b
    uint32_t of_b[4];
    if constexpr (TRANSPOSED) {
      load_matrices<false>(of_b, &entry<T>(b, LINE, c * 4 + third + eight, k + second));
    } else {
      load_matrices<true>(of_b, &entry<T>(b, LINE, k + second + eight, c * 4 + third));
    }
    multiply<T>(to[0][c], to[0][c + 1], to[1][c], to[1][c + 1], a, of_b[0], of_b[1]);
    multiply<T>(to[0][c + 2], to[0][c + 3], to[1][c + 2], to[1][c + 3], a, of_b[2], of_b[3]);
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
    for (int k = 0; k < Shape<T>::CHUNK; k += 16) {
      uint32_t of_x[4];
      load_matrices<false>(of_x, &entry<T>(x, LINE, warp() * 16 + lane() % 16, k + lane() / 16 * 8));
      add_matrix_product<T, true>(to, of_x, y, k);
    }
  } else {
    add_dots<T>(to, x, y);
  }
}

// A warp's part of the tile's weights for the product with rows of y: as multiply takes it, in registers, which are laid out like those of
// a result; else in shared memory, `lines` of the whole tile.
template <class T>
struct Weights {
  using S = Shape<T>;
  char* const lines;
  uint32_t packs[ON_TENSOR_CORES<T> ? S::COLS / 16 : 1][4];

  template <int C>
  PAIRLOSS_DEVICE void set(const typename S::Sum (&w)[S::R][C]) {
    if constexpr (ON_TENSOR_CORES<T>) {
#pragma unroll
      for (int b = 0; b < C; b += 2) {
#pragma unroll
        for (int a = 0; a < 2; ++a) packs[b / 4][b % 4 + a] = packed<T>(w[a][b], w[a][b + 1]);
      }
    } else {
#pragma unroll
      for (int b = 0; b < C; ++b) {
#pragma unroll
        for (int a = 0; a < S::R; ++a) {
          narrow(w[a][b], reinterpret_cast<T*>(lines + row_of<T>(a) * S::WEIGHT_LINE) + col_of<T, S::PAIR_RUN>(b));
        }
      }
    }
  }

  // += the weights by a chunk of y.
  template <int C>
  PAIRLOSS_DEVICE void add_gradient(typename S::Sum (&to)[S::R][C], const char* y) const {
    if constexpr (ON_TENSOR_CORES<T>) {
#pragma unroll
      for (int k = 0; k < S::COLS; k += 16) add_matrix_product<T, false>(to, packs[k / 16], y, k);
    } else {
      add_rows<T>(to, lines, y);
    }
  }
};

}  // namespace pairloss::cuda
