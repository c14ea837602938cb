// The primitive on the CPU: the same calls as pairloss/engines.py lists, on raw memory.
#pragma once

#include <cstdint>

namespace pairloss {

// Arguments as in pairloss.engines.Call; arrays are contiguous, float or double, ids int64, and null where there are none (or nothing
// is in them).
struct Call {
  bool is_double;
  bool bfloat16;      // rows are rounded to bfloat16 for the products, and weights may be
  bool half;          // x and y are of bfloat16, and so are their gradients
  bool symmetric;     // x against itself: y, order_y, ids_y, col_bias null
  bool has_ids;
  int64_t n, m, d;
  const void *x, *y;
  const int64_t *order_x, *order_y;  // [n], [m]: which row is which, null: as they come. All other arrays are in this order.
  bool has_norm;                     // every row is scaled to the norm `norm` first; NaN where that is not one
  double norm;
  const int64_t *ids_x, *ids_y;  // [n]; or [n, words] of multi-hot ones, words > 0
  int64_t words;
  bool has_self;
  int64_t self_offset;
  const void *row_bias, *col_bias;
  bool circle;
  double margin, gamma, cutoff, logit_bound;
  bool totals;  // two more rows of logarithms: the sums of <x_i, y_j> over the pairs of one id, and how many they are. And gradients of the sums
  bool own;  // over negatives in pair_sum: the pair left out is a positive
  int64_t tile;  // rows and columns, 0: what fits the cache
  int threads;
};

// Sums [2, K, n]: s and m of the sum s e^m. Their logarithms, and the gradients of these, [K, n]. Null columns: without both_sides.
void row_stats(const Call&, void* row_logs, void* row_sums, void* col_logs, void* col_sums);

// What a call adds to. Null where it is not wanted; dx and dy are in the order of x and y as they come.
struct Gradients {
  void *dx, *dy, *dnorm, *drow_bias, *dcol_bias;
};

void row_stats_backward(
    const Call&, const void* row_sums, const void* row_grads, const void* col_sums, const void* col_grads, const Gradients&);

// The sums [n] and, with weights [n], the gradients; either may be null.
void pair_sum(const Call&, bool over_positives, bool softplus, void* sums, const void* weights, const Gradients&);

// <x_i, y_i> [n], and with weights [n] the gradients of x, y and norm.
void own_products(const Call&, void* products);
void own_products_backward(const Call&, const void* weights, const Gradients&);

}  // namespace pairloss
