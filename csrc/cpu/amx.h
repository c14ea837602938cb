// Products by AMX, whose instruction multiplies 16 x 32 by 32 x 16 numbers of bfloat16 and adds up in float32.
//
// Of bfloat16 rows each number is one part. A float is the sum of three, high + middle + low, exactly; of the nine products of parts the
// three least are left out, 2^-24 of the whole: six instructions take half of the time of multiply-adds, and their rounding errors are
// a fourth (bench/notes.md). Denormals count as 0, parts' and their products': terms of a logit below 2^-100 and of a gradient below 2^-124
// have fewer digits. Numbers that bfloat16 rounds to infinity, and gradients above 2^103, are infinite or NaN.
//
// Operands are packed: [blocks of 16 rows or columns][stretches of 32 terms][parts], each a square of 16 x 16 pairs of terms without gaps,
// filled up with zeros to multiples of 32 x 32. Pair p of a stretch is its terms p and 16 + p, so that pairs are made without moving lanes.
// Rows are kept as left operands; a tile makes the right ones from them: less memory than both, and less to read from it.
#pragma once

#ifdef PAIRLOSS_EMULATED
#include "emulated.h"
#else
#include <immintrin.h>
#endif

#include <utility>

#include "kernels.h"
#include "vector.h"

namespace pairloss {
namespace {

// A tile register, or half a row of what is packed into one: 16 lanes whatever the other vectors have.
constexpr int LANES = 16, STRETCH = 2 * LANES, SQUARE = LANES * LANES;
typedef float Lanes __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));

// The tile registers of this thread as the products below have them, and then as they were: other libraries use them too.
class TileRegisters {
 public:
  TileRegisters() {
    Shape shape{};
    shape.palette = 1;
    for (int k = 0; k < 8; ++k) {
      shape.row_bytes[k] = 4 * LANES;
      shape.rows[k] = LANES;
    }
    _tile_storeconfig(&before_);
    // GCC's intrinsics say nothing of most of what they read: neither the shape nor operands.
    asm volatile("" : : "r"(&shape) : "memory");
    _tile_loadconfig(&shape);
  }
  ~TileRegisters() { _tile_loadconfig(&before_); }
  TileRegisters(const TileRegisters&) = delete;

 private:
  struct alignas(64) Shape {
    uint8_t palette, start, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  Shape before_;
};

// The first lanes of a row; 0 from `count` on.
PAIRLOSS_INLINE Lanes load_lanes(const float* row, int64_t count) {
  Lanes v = {};
  if (count >= LANES) {
    std::memcpy(&v, row, sizeof v);
  } else {
    for (int64_t k = 0; k < count; ++k) v[k] = row[k];
  }
  return v;
}

// Quarters of the matrix change places: of each 2 HALF x 2 HALF the upper right one and the lower left one.
template <int HALF, int... LANE>
PAIRLOSS_INLINE void exchange(Bits m[LANES], std::integer_sequence<int, LANE...>) {
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) {
    if (i & HALF) continue;
    const Bits upper = m[i], lower = m[i + HALF];
#ifdef __clang__
    m[i] = __builtin_shufflevector(upper, lower, (LANE & HALF ? LANES + LANE - HALF : LANE)...);
    m[i + HALF] = __builtin_shufflevector(upper, lower, (LANE & HALF ? LANES + LANE : LANE + HALF)...);
#else
    m[i] = __builtin_shuffle(upper, lower, Bits{(LANE & HALF ? LANES + LANE - HALF : LANE)...});
    m[i + HALF] = __builtin_shuffle(upper, lower, Bits{(LANE & HALF ? LANES + LANE : LANE + HALF)...});
#endif
  }
}

PAIRLOSS_INLINE void transpose(Bits m[LANES]) {
  constexpr auto lanes = std::make_integer_sequence<int, LANES>();
  exchange<8>(m, lanes);
  exchange<4>(m, lanes);
  exchange<2>(m, lanes);
  exchange<1>(m, lanes);
}

// The bits of v rounded to bfloat16, ties to even; the lower halves are anything. NaN stays.
PAIRLOSS_INLINE Bits rounded(Lanes v) {
  const Bits bits = (Bits)v;
  return v == v ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x400000;
}

// The bits of v's next part, which is taken off it.
PAIRLOSS_INLINE Bits take_part(Lanes* v) {
  const Bits bits = rounded(*v);
  *v -= (Lanes)(bits & 0xffff0000);
  return bits;
}

PAIRLOSS_INLINE Bits pair_of(Bits first, Bits second) { return first >> 16 | (second & 0xffff0000); }

template <int PARTS>
struct Amx {
  using Sum = float;
  static_assert(PARTS == 1 || PARTS == 3);
  static_assert(BLOCK % STRETCH == 0);
  static constexpr int SIDE = STRETCH, PAIR_BYTES = 4 + 4 * PARTS;  // as floats, and twice as parts
  static constexpr float SCALE = PARTS == 1 ? 1 : 0x1p24f;  // of weights, so that the low parts of small ones are no denormals
  static constexpr bool COMMUTES = PARTS == 1;  // else high * low of <a, b> is low * high of <b, a>, which come one after another

  // Whatever a block is for, it is packed alike.
  static int64_t block_size(int64_t n, int64_t d, int) { return left_size(n, d); }

  static void pack(const float* rows, int64_t n, int64_t d, int, float* to) {
    for (int64_t i = 0; i < rounded_up(n, STRETCH); i += LANES) {
      for (int64_t k = 0; k < d; k += STRETCH, to += PARTS * SQUARE) {
        for (int r = 0; r < LANES; ++r) {
          const float* row = rows + (i + r) * d + k;
          const int64_t terms = i + r < n ? d - k : 0;
          Lanes v[2] = {load_lanes(row, terms), load_lanes(row + LANES, terms - LANES)};
          for (int part = 0; part < PARTS; ++part) {
            const Bits first = take_part(v), second = take_part(v + 1), pairs = pair_of(first, second);
            std::memcpy(to + part * SQUARE + r * LANES, &pairs, sizeof pairs);
          }
        }
      }
    }
  }

  // Of the right operand of a product, and of a tile's weights and their transpose.
  static int64_t operands_size(int64_t rows, int64_t cols, int64_t stride, int64_t d) {
    return left_size(rows > cols ? rows : cols, d) + left_size(rows, stride) + left_size(stride, rows);
  }

  // C [m, n] = X Y^T, in whole blocks. `memory` of operands_size.
  static void scores(
      int64_t m, int64_t n, int64_t d, Block<float> x, Block<float> y, float* c, int64_t stride_c, float* memory) {
    for (int64_t k = 0; k < left_size(n, d); k += SQUARE) {
      Bits square[LANES];
      std::memcpy(square, y.data + k, sizeof square);
      transpose(square);
      std::memcpy(memory + k, square, sizeof square);
    }
    multiply<false>(m, n, d, x.data, memory, c, stride_c);
  }

  // Where they are not null: to_rows [rows, d] += W Y and to_cols [cols, d] += W^T X, with W [rows, cols].
  static void add(int64_t rows, int64_t cols, int64_t d, float* w, int64_t stride, Block<float> x, Block<float> y, float* to_rows,
      float* to_cols, float* memory) {
    float *weights = memory + left_size(rows > cols ? rows : cols, d), *transposed = weights + left_size(rows, cols);
    pack_weights(rows, cols, w, stride, to_rows ? weights : nullptr, to_cols ? transposed : nullptr);
    if (to_rows) {
      across(cols, d, y.data, memory);
      multiply<true>(rows, d, cols, weights, memory, to_rows, d);
    }
    if (to_cols) {
      across(rows, d, x.data, memory);
      multiply<true>(cols, d, rows, transposed, memory, to_cols, d);
    }
  }

 private:
  static int64_t left_size(int64_t m, int64_t depth) { return rounded_up(m, STRETCH) * rounded_up(depth, STRETCH) * PARTS / 2; }

  // A left operand [depth, n] as a right one: its pairs are then of rows, p and 16 + p of 32.
  static void across(int64_t depth, int64_t n, const float* a, float* to) {
    const int64_t stretches = rounded_up(n, STRETCH) / STRETCH, block = rounded_up(depth, STRETCH) / STRETCH * PARTS * SQUARE;
    for (int64_t k = 0; k < depth; k += STRETCH, to += PARTS * SQUARE) {
      for (int64_t j = 0; j < stretches; ++j) {
        for (int64_t at = 0; at < PARTS * SQUARE; at += LANES) {
          Bits upper, lower;
          std::memcpy(&upper, a + (k / LANES * stretches + j) * PARTS * SQUARE + at, sizeof upper);
          std::memcpy(&lower, a + ((k / LANES + 1) * stretches + j) * PARTS * SQUARE + at, sizeof lower);
          const Bits first = (upper & 0xffff) | lower << 16, second = pair_of(upper, lower);
          std::memcpy(to + 2 * j * block + at, &first, sizeof first);
          std::memcpy(to + (2 * j + 1) * block + at, &second, sizeof second);
        }
      }
    }
  }

  // W [rows, cols] and its transpose as left operands, where not null. What lies around W in its blocks of 32 x 32 becomes 0.
  static void pack_weights(int64_t rows, int64_t cols, float* w, int64_t stride, float* to, float* transposed) {
    for (int64_t i = 0; i < rows; ++i) std::memset(w + i * stride + cols, 0, (rounded_up(cols, STRETCH) - cols) * sizeof(float));
    for (int64_t i = rows; i < rounded_up(rows, STRETCH); ++i) std::memset(w + i * stride, 0, rounded_up(cols, STRETCH) * sizeof(float));
    const int64_t of_rows = rounded_up(cols, STRETCH) * PARTS * LANES / 2, of_cols = rounded_up(rows, STRETCH) * PARTS * LANES / 2;
    for (int64_t i = 0; i < rows; i += STRETCH) {
      for (int64_t j = 0; j < cols; j += STRETCH) {
        pack_block(w + i * stride + j, stride, to ? to + i / LANES * of_rows + j / STRETCH * PARTS * SQUARE : nullptr, of_rows,
            transposed ? transposed + j / LANES * of_cols + i / STRETCH * PARTS * SQUARE : nullptr, of_cols);
      }
    }
  }

  static void pack_block(const float* w, int64_t stride, float* to, int64_t of_rows, float* transposed, int64_t of_cols) {
    Bits of_column[2][PARTS][LANES];
    for (int r = 0; r < LANES; ++r) {
      Lanes v[2][2];
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) v[k / 2][k % 2] = SCALE * load_lanes(w + (r + k / 2 * LANES) * stride + k % 2 * LANES, LANES);
#pragma GCC unroll 3
      for (int part = 0; part < PARTS; ++part) {
        Bits bits[2][2];
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) bits[k / 2][k % 2] = take_part(&v[k / 2][k % 2]);
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          if (to) {
            const Bits pairs = pair_of(bits[half][0], bits[half][1]);
            std::memcpy(to + half * of_rows + part * SQUARE + r * LANES, &pairs, sizeof pairs);
          }
          of_column[half][part][r] = pair_of(bits[0][half], bits[1][half]);
        }
      }
    }
    if (!transposed) return;
    for (int half = 0; half < 2; ++half) {
      for (int part = 0; part < PARTS; ++part) {
        Bits* m = of_column[half][part];
        transpose(m);
        std::memcpy(transposed + half * of_cols + part * SQUARE, m, SQUARE * sizeof(float));
      }
    }
  }

  // C (+)= A B by blocks of 32 x 32. Without ADD, C has whole blocks.
  template <bool ADD>
  static void multiply(int64_t m, int64_t n, int64_t depth, const float* left, const float* right, float* c, int64_t stride_c) {
    const TileRegisters registers;
    const int64_t stretches = rounded_up(depth, STRETCH) / STRETCH, block = stretches * PARTS * SQUARE;
    alignas(64) float total[STRETCH * STRETCH];
    for (int64_t j = 0; j < n; j += STRETCH) {
      for (int64_t i = 0; i < m; i += STRETCH) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        multiply_block(stretches, left + i / LANES * block, right + j / LANES * block, block);
        float *to = c + i * stride_c + j, *out = ADD ? total : to;
        const int64_t stride = ADD ? STRETCH : stride_c;
        _tile_stored(0, out, 4 * stride);
        _tile_stored(1, out + LANES, 4 * stride);
        _tile_stored(2, out + LANES * stride, 4 * stride);
        _tile_stored(3, out + LANES * stride + LANES, 4 * stride);
        if constexpr (ADD) {
          const int64_t rows = m - i < STRETCH ? m - i : STRETCH, columns = n - j < STRETCH ? n - j : STRETCH;
          for (int64_t r = 0; r < rows; ++r) {
            for (int64_t s = 0; s < columns; ++s) to[r * stride_c + s] += total[r * STRETCH + s] / SCALE;
          }
        }
      }
    }
  }

  // Adds to the first four tile registers, the least products first: what is added to the large ones is rounded like them.
  static PAIRLOSS_INLINE void multiply_block(int64_t stretches, const float* a, const float* b, int64_t block) {
    constexpr int MIDDLE = SQUARE, LOW = 2 * SQUARE;
    if constexpr (PARTS == 3) {
      for (int64_t k = 0; k < stretches; ++k) {
        const float *of_a = a + k * PARTS * SQUARE, *of_b = b + k * PARTS * SQUARE;
        load_left(of_a + LOW, block);
        load_right(of_b, block);
        multiply_registers();
        load_left(of_a + MIDDLE, block);
        multiply_registers();
        load_right(of_b + MIDDLE, block);
        multiply_registers();
        load_left(of_a, block);
        multiply_registers();
        load_right(of_b + LOW, block);
        multiply_registers();
      }
    }
    for (int64_t k = 0; k < stretches; ++k) {
      load_left(a + k * PARTS * SQUARE, block);
      load_right(b + k * PARTS * SQUARE, block);
      multiply_registers();
    }
  }

  static PAIRLOSS_INLINE void load_left(const float* a, int64_t block) {
    _tile_loadd(4, a, 4 * LANES);
    _tile_loadd(5, a + block, 4 * LANES);
  }

  static PAIRLOSS_INLINE void load_right(const float* b, int64_t block) {
    _tile_loadd(6, b, 4 * LANES);
    _tile_loadd(7, b + block, 4 * LANES);
  }

  static PAIRLOSS_INLINE void multiply_registers() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
};

}  // namespace
}  // namespace pairloss
