// What is computed in one tile of pairs. kernels.cpp is compiled once for each instruction set and makes a table of these functions;
// targets.cpp chooses a table, engine.cpp owns the memory, schedule.h orders the tiles.
#pragma once

#include <cstdint>

namespace pairloss {

// Vectors are read in whole registers: every array of this engine goes on for so many entries.
constexpr int PADDING = 64;

// A tile of pairs lies in memory as if its sides were multiples of this.
constexpr int BLOCK = 32;

static constexpr int64_t rounded_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// |z| up to which e^z needs no shift. As in pairloss/pairs.py.
constexpr double NO_SHIFT = 28;

enum Set { POSITIVES = 0, NEGATIVES = 1, MIXED = 2 };

// Ids are as wide as numbers, so that a comparison of ids selects numbers.
template <class T>
struct IdOf;
template <>
struct IdOf<float> {
  typedef int32_t type;
};
template <>
struct IdOf<double> {
  typedef int64_t type;
};

template <class T>
struct Side {
  const T* bias;                      // [n], zeros where there is none
  const typename IdOf<T>::type* ids;  // [n]; words [words, stride]; null without ids
  int64_t stride;
};

template <class T>
struct Pairs {
  Side<T> x, y;
  int64_t d;
  int words;     // 0: equal ids are positive; else ids are so many words, and a common bit is
  bool bounded;  // no logit needs a shift
  bool plain;    // bounded, without biases, circle and cutoff: the logits are the products
  bool circle;
  T m, gamma;
  T cutoff;  // -inf: none
  bool own;  // in a pair sum over negatives the pair left out is a positive
};

// What a row is scaled by.
template <class T>
struct Length {
  T inverse;  // 1 / |x|, NaN of a row that is not finite; 0 of one that counts as zero, or stays as it is
  T scale;    // from the row as it comes to the row as it is compared
  T after;    // the norm that it then has
};

// Anchors i, i + 1, ... against candidates j, j + 1, ...
struct Tile {
  int64_t i, j;
  int rows, cols;
  Set set;           // that all pairs are in; without ids NEGATIVES
  int64_t left_out;  // in row r the pair of column left_out + r is left out
  bool mirrored;     // x against itself, off the diagonal: the tile stands for its transpose too
  bool diagonal;     // x against itself, on the diagonal
};

// By set; without ids only NEGATIVES is there.
template <class T>
struct Sums {
  T *s[2], *m[2];  // s e^m
};

template <class T>
struct Weights {
  const T *g[2], *m[2];  // g e^-m
};

// A thread's memory for one tile.
template <class T>
struct Scratch {
  T* z;            // [rows, stride]: products, then logits, then weights of the pairs
  int64_t stride;  // columns, and enough to keep rows out of each other's cache lines
  T* operands;     // what products are made of
  T *row_total[2], *row_shift[2], *col_total[2], *col_shift[2];
};

// What a block of rows is for: the left or the right operand of products, or what weights are multiplied with.
enum Role { LEFT = 1, RIGHT = 2, WEIGHTED = 4 };

template <class T>
struct Block {
  const T* data;  // as Kernels::pack makes it
  int roles;
};

template <class T>
struct Kernels {
  int panel, width;  // what the tile's sides are best multiples of, and must be multiples of
  int pair_bytes;    // of memory that a tile wants for each pair

  // A row [d] as it comes, of T or `half`, of bfloat16; to: as it is compared, scaled to the norm *norm where not null.
  Length<T> (*read)(const void* given, bool half, int64_t d, const T* norm, T* to);

  // From the gradient of the row as it is compared, that of the row as it came, in its type, where `to` is not null. The result is the norm's.
  double (*give_back)(const void* given, bool half, int64_t d, Length<T> length, const T* gradient, void* to);

  // <x, y>; and `row` rounded to bfloat16.
  T (*dot)(int64_t d, const T* x, const T* y);
  void (*round)(int64_t d, T* row);

  // A block of rows [n, d] as the products read it, and how many numbers of memory that takes; for `roles`, some of Role.
  int64_t (*block_size)(int64_t n, int64_t d, int roles);
  void (*pack)(const T* rows, int64_t n, int64_t d, int roles, T* to);

  // Of a tile's memory for operands.
  int64_t (*operands_size)(int64_t rows, int64_t cols, int64_t stride, int64_t d);

  // z = <x_i, y_j>, from the blocks of the tile's anchors and candidates, and the same number for z_ji on the diagonal.
  void (*products)(const Pairs<T>&, const Tile&, Block<T> x, Block<T> y, const Scratch<T>&);

  // From products: adds the exponentials of the logits to the sums of the tile's rows and, where there are any, of its columns.
  void (*add_exponentials)(const Pairs<T>&, const Tile&, const Scratch<T>&, const Sums<T>& rows, const Sums<T>* cols);

  // From products: adds to every anchor's sum [n] and number [n] those of the pairs of its id, of a tile not without them.
  void (*add_totals)(const Pairs<T>&, const Tile&, const Scratch<T>&, T* sums, T* numbers);

  // To weights W: what the gradients [n] of those sums add.
  void (*add_total_weights)(const Pairs<T>&, const Tile&, const Scratch<T>&, const T* of_sums);

  // From products: z = W, the gradient's weights; adds those of the biases to row_bias [n] and col_bias [m], where not null.
  void (*exponential_weights)(
      const Pairs<T>&, const Tile&, const Scratch<T>&, const Weights<T>& rows, const Weights<T>* cols, T* row_bias, T* col_bias);

  // From products: adds the terms of the pairs in set `over` to sums [n] where not null; with the anchors' weights [n], where not null,
  // z = W, and the biases' weights as above. x against itself: row_bias is the anchor's alone, and col_bias null.
  void (*pair_sum)(
      const Pairs<T>&, const Tile&, const Scratch<T>&, Set over, bool softplus, T* sums, const T* weights, T* row_bias, T* col_bias);

  // Where they are not null: to_rows += W y and to_cols += W^T x, from the blocks.
  void (*add_gradients)(const Tile&, int64_t d, Block<T> x, Block<T> y, const Scratch<T>&, T* to_rows, T* to_cols);
};

}  // namespace pairloss
