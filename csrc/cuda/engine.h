// The primitive on a GPU, on raw device memory: what bindings.cpp offers to Python and pairloss/cuda.py calls.
#pragma once

#include <cstdint>

namespace pairloss::cuda {

// Where launches go.
struct Stream {
  int device;
  void* handle;
};

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
  Stream stream;
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

// Around the pairs: rows of one norm, row order[i] of the given ones at place i.
struct GivenRows {
  const void* rows;      // X [n, d]
  const void* norm;      // Sum, one number
  const int64_t* order;  // [n], or null
  int64_t n, d;
};

// To T [n, d], the product dtype. Double rows to double ones; any others.
template <class X, class T>
void scaled_rows(const Stream&, const GivenRows&, void* to);

// From their gradients, Sum [n, d], those of the given rows, X [n, d], and each row's part of the norm's, Sum [n].
template <class X>
void scaled_rows_backward(const Stream&, const GivenRows&, const void* grads, void* drows, void* along);

constexpr int ENTRIES = 1024;  // of a vector, whose largest is one of `largest`'s results; as pairloss/operands.py has it

// Vectors of A, float or double, of `size` entries: [sets, n], of which sums have two, s and m.
template <class A>
struct Vectors {
  using Number = A;
  // Over the groups of Partials, and its logarithm: a sum s e^m as pairloss.engines.normalised has it.
  static void total(const Stream&, const void* s, const void* m, void* sums, void* logs, int64_t size, int groups, bool bounded);
  // The greatest finite |grad / s| of each ENTRIES; null sums: 1.
  static void largest(const Stream&, const void* sums, const void* grads, void* to, int64_t size);
  // grad / s, 0 for an empty set, times a power of two that takes the greatest of `largest` times the score's steepest slope to about
  // 2^13: no pair's weight overflows float16, and those down to 2^-27 of the largest keep all their digits. Behind it m. And its inverse.
  static void scaled_weights(const Stream&, const void* sums, const void* grads, const void* largest, int64_t parts,
      const void* steepest, void* weights, void* unscale, int64_t size);
  // [n, width], the first columns of [parts, n, stride], added up, times a number unless that is null.
  static void sum_of_parts(const Stream&, const void* from, const void* factor, void* to, int64_t n, int64_t stride, int64_t width, int parts);
};

// [2, vectors, tiles]: least and greatest of each `size` entries of [vectors, n], but for those where the second is 0, unless it is null.
template <class V>
void ranges(const Stream&, const void* values, const void* skipped_at_0, void* to, int64_t n, int64_t size, int vectors);

}  // namespace pairloss::cuda
