// The primitive on a GPU, on raw device memory: what bindings.cpp offers to Python and pairloss/cuda.py calls.
#pragma once

#include <cstdint>

namespace pairloss::cuda {

// One side of the comparison. Null where the call has none. Sum is float, or double for products in double.
struct Side {
  const void* rows;           // [n, d] in the product dtype, on 16 bytes; d a multiple of a chunk
  const int32_t* ids;         // [n]; or [n, words] of multi-hot ones
  const int32_t* id_ranges;   // [2, tiles]: least and greatest; null for multi-hot ids
  const void* bias;           // Sum [n]
  const void* weights;        // Sum [2, sets, n]: g and m of the weights g e^-m; of a pair sum g alone, [n]
  const void* weight_ranges;  // Sum [2, sets, tiles]: least and greatest m of the weights that are not 0
  int64_t n;
};

struct Call {
  Side x, y;  // x against itself: the same
  bool symmetric;
  int64_t d;
  int sets;   // 2 with ids: positives, negatives; 1 without: all are negatives
  int words;  // 0: equal ids are positive; else a common bit in so many words is
  bool has_self;
  int64_t self_offset;
  bool circle;
  double margin, gamma;
  const void* cutoff;  // Sum, or null
  int device;
  void* stream;
};

enum class Terms { EXPONENTIAL, SOFTPLUS, LINEAR };

// Partial sums s e^m, Sum [groups, sets, n] each, of which the kernel adds to what is there: an entry is for its tile of the one side
// and a group of `span` tiles of the other. Null columns: not wanted. bounded: no logit needs a shift, m stays as it is.
struct Partials {
  void *rows_m, *rows_s, *cols_m, *cols_s;
  int64_t span_x, span_y;
  bool bounded;
};

// Gradients of x's side, in `parts` partial sums over the candidates. Null where not wanted.
struct Gradients {
  Terms terms;
  int over;               // the set that a sum of other terms is over
  const int32_t* visits;  // [3, tiles of x] of begin, length, count: `count` tiles of y in order, skipping `length` from `begin` on
  int parts;
  void *rows, *bias, *sums;  // Sum [parts, n, d], [parts, n], [parts, n]
};

struct Tile {
  int rows, cols, chunk, gradient;  // chunk: d is a multiple; gradient: columns of the gradient that a block forms
};

struct Float16;
struct Bfloat16;

// For products in type T; each compiled from kernels.cu on its own.
template <class T>
struct Kernels {
  static Tile tile();
  static void row_stats(const Call&, const Partials&);
  static void gradients(const Call&, const Gradients&);
};

}  // namespace pairloss::cuda
