// The functions of kernels.h for one instruction set, PAIRLOSS_TARGET. Nothing here may come out of line under a name that other
// translation units share: the linker would keep one copy, of one instruction set, for all.
#include "kernels.h"

#include <cmath>
#include <type_traits>

#include "bfloat16.h"
#include "product.h"
#include "rows.h"
#include "vector.h"

#ifdef PAIRLOSS_AMX
#include "amx.h"
#endif

namespace pairloss {
namespace {

// Logits this close together share one shift: e^-55 below the largest, 14 digits are left below the smallest for sums. As in
// pairloss/pairs.py.
constexpr double SPREAD = 55;

template <class T>
constexpr T INFINITE = std::numeric_limits<T>::infinity();
template <class T>
constexpr T LOWEST = -std::numeric_limits<T>::max();

// Calls f with the two conditions as types.
template <class F>
inline void with(bool a, bool b, F f) {
  if (a) {
    b ? f(std::true_type(), std::true_type()) : f(std::true_type(), std::false_type());
  } else {
    b ? f(std::false_type(), std::true_type()) : f(std::false_type(), std::false_type());
  }
}

// Whether values from low to high can share a shift, and which. No values at all: low > high.
template <class T>
bool shared_shift(T low, T high, T* shift) {
  *shift = low > high || (low >= T(-NO_SHIFT) && high <= T(NO_SHIFT)) ? T(0) : (low + high) / 2;
  return high - low <= T(SPREAD);
}

template <class T>
void clear(int n, T* to) {
  for (int i = 0; i < n; i += WIDTH<T>) store(to + i, Vec<T>{});
}

// All bits of a lane set where the pair is positive.
template <class T, bool MIX>
PAIRLOSS_INLINE IntVec<T> same_id(const Pairs<T>& p, const Tile& t, int i, int j) {
  if constexpr (!MIX) return IntVec<T>{} - typename Number<T>::Int(t.set == POSITIVES);
  const auto *x = p.x.ids + t.i + i, *y = p.y.ids + t.j + j;
  if (p.words == 0) return load_ids<T>(y) == *x;
  IntVec<T> common = {};
  for (int w = 0; w < p.words; ++w) common |= load_ids<T>(y + w * p.y.stride) & x[w * p.x.stride];
  return common != 0;
}

// Row i with `value` at the pair that is left out and in the columns beyond the last.
template <class T>
PAIRLOSS_INLINE void leave_out(const Tile& t, int i, T* row, T value) {
  const int64_t j = t.left_out + i;
  if (j >= 0 && j < t.cols) row[j] = value;
  for (int64_t k = t.cols; k % WIDTH<T>; ++k) row[k] = value;
}

// How a tile's logits are computed: of two sets, with the circle score, as they are.
template <bool MIX_, bool CIRCLE_, bool PLAIN_>
struct How {
  static constexpr bool MIX = MIX_, CIRCLE = CIRCLE_, PLAIN = PLAIN_;
};

// The logits of row i and the columns from j on, from products; -inf at pairs in no set, which have the product -inf. With the circle
// score its slopes, negative for positives.
template <class H, class T>
PAIRLOSS_INLINE Vec<T> logits(const Pairs<T>& p, const Tile& t, Vec<T> products, IntVec<T> same, int i, int j, Vec<T>* slope) {
  if constexpr (H::PLAIN) return products;
  const IntVec<T> none = ((products < p.cutoff) & ~same) | (products == -INFINITE<T>);
  Vec<T> v = products;
  if constexpr (H::CIRCLE) {
    const Vec<T> r = same ? T(1) - products : products, slope_r = circle_slope(r, p.m, p.gamma);
    v = circle(r, slope_r, p.m);
    *slope = none ? Vec<T>{} : same ? -slope_r : slope_r;
  }
  v += p.x.bias[t.i + i] + load(p.y.bias + t.j + j);  // the biases first: z_ij and z_ji round alike
  return none ? broadcast(-INFINITE<T>) : v;
}

// Adds total e^shift, entry by entry, to the sums s e^m.
template <class T>
void add_to_sums(int64_t n, const T* total, const T* shift, T* s, T* m) {
  for (int64_t i = 0; i < n; i += WIDTH<T>) {
    const Vec<T> more = load(total + i), theirs = load(shift + i), ours = load(m + i);
    // Not the shift of a tile in which the row has nothing: it would drown what the row has elsewhere.
    const Vec<T> top = more == T(0) ? ours : larger(ours, theirs);
    store(s + i, load(s + i) * exp<T>(ours - top) + more * exp<T>(theirs - top));
    store(m + i, top);
  }
}

// The two sets that a tile may have, or its one.
template <class T, bool MIX>
struct Split {
  int first;
  Vec<T> sum[2] = {};

  explicit Split(const Tile& t) : first(MIX ? POSITIVES : t.set) {}

  PAIRLOSS_INLINE void add_to_row(Vec<T> e, IntVec<T> same) {
    if constexpr (MIX) {
      sum[POSITIVES] += same ? e : Vec<T>{};
      sum[NEGATIVES] += same ? Vec<T>{} : e;
    } else {
      sum[0] += e;
    }
  }

  PAIRLOSS_INLINE void add_to_columns(Vec<T> e, IntVec<T> same, T* const total[2], int j) const {
    if constexpr (MIX) {
      store(total[POSITIVES] + j, load(total[POSITIVES] + j) + (same ? e : Vec<T>{}));
      store(total[NEGATIVES] + j, load(total[NEGATIVES] + j) + (same ? Vec<T>{} : e));
    } else {
      store(total[first] + j, load(total[first] + j) + e);
    }
  }

  PAIRLOSS_INLINE void add(Vec<T> e, IntVec<T> same, T* const total[2], int j) {
    add_to_row(e, same);
    add_to_columns(e, same, total, j);
  }

  PAIRLOSS_INLINE void put_row(T* const total[2], int i) const {
    if constexpr (MIX) total[NEGATIVES][i] = pairloss::sum<T>(sum[NEGATIVES]);
    total[first][i] = pairloss::sum<T>(sum[0]);
  }
};

template <class T>
PAIRLOSS_INLINE T largest(Vec<T> v) {
  T top = v[0];
  for (int k = 1; k < WIDTH<T>; ++k) top = v[k] > top ? v[k] : top;
  return top;
}

// The sums of a tile whose logits lie far apart: every row and every column has a shift of its own, its maximum.
template <class T, bool MIX>
void sum_apart(Pairs<T> p, Tile t, Scratch<T> b) {
  const int first = MIX ? POSITIVES : t.set, last = MIX ? NEGATIVES : t.set;
  for (int k = first; k <= last; ++k) {
    for (int j = 0; j < t.cols; j += WIDTH<T>) store(b.col_shift[k] + j, broadcast(LOWEST<T>));
  }
  for (int i = 0; i < t.rows; ++i) {
    const T* z = b.z + i * b.stride;
    for (int k = first; k <= last; ++k) {
      Vec<T> top = broadcast(LOWEST<T>);
      for (int j = 0; j < t.cols; j += WIDTH<T>) {
        Vec<T> v = load(z + j);
        if constexpr (MIX) {
          const IntVec<T> same = same_id<T, MIX>(p, t, i, j);
          v = (k == POSITIVES ? same : ~same) ? v : broadcast(-INFINITE<T>);
        }
        top = larger(top, v);
        store(b.col_shift[k] + j, larger(load(b.col_shift[k] + j), v));
      }
      b.row_shift[k][i] = largest<T>(top);
    }
  }
  for (int i = 0; i < t.rows; ++i) {
    const T* z = b.z + i * b.stride;
    Split<T, MIX> split(t);
    for (int j = 0; j < t.cols; j += WIDTH<T>) {
      const IntVec<T> same = same_id<T, MIX>(p, t, i, j);
      const Vec<T> v = load(z + j), of_row = broadcast(b.row_shift[first][i]), of_col = load(b.col_shift[first] + j);
      split.add_to_row(exp<T>(v - (MIX ? (same ? of_row : broadcast(b.row_shift[last][i])) : of_row)), same);
      split.add_to_columns(exp<T>(v - (MIX ? (same ? of_col : load(b.col_shift[last] + j)) : of_col)), same, b.col_total, j);
    }
    split.put_row(b.row_total, i);
  }
}

template <class H, class T>
void add_exponentials(Pairs<T> p, Tile t, Scratch<T> b, const Sums<T>& rows, const Sums<T>* cols) {
  constexpr bool MIX = H::MIX;
  const int first = MIX ? POSITIVES : t.set, last = MIX ? NEGATIVES : t.set;
  for (int k = first; k <= last; ++k) clear(t.cols, b.col_total[k]);
  // Calls f(j, same, logits) for row i.
  const auto over_row = [&](int i, auto f) {
    leave_out(t, i, b.z + i * b.stride, -INFINITE<T>);
    for (int j = 0; j < t.cols; j += WIDTH<T>) {
      const IntVec<T> same = same_id<T, MIX>(p, t, i, j);
      Vec<T> slope;
      f(j, same, logits<H>(p, t, load(b.z + i * b.stride + j), same, i, j, &slope));
    }
  };
  T shift = 0;
  bool shared = true;
  if (p.bounded) {
    for (int i = 0; i < t.rows; ++i) {
      Split<T, MIX> split(t);
      over_row(i, [&](int j, IntVec<T> same, Vec<T> z) { split.add(exp<T, false>(z), same, b.col_total, j); });
      split.put_row(b.row_total, i);
    }
  } else {
    Vec<T> low = broadcast(INFINITE<T>), high = broadcast(-INFINITE<T>);
    for (int i = 0; i < t.rows; ++i) {
      over_row(i, [&](int j, IntVec<T>, Vec<T> z) {
        store(b.z + i * b.stride + j, z);
        high = larger(high, z);
        low = z == -INFINITE<T> ? low : smaller(low, z);
      });
    }
    shared = shared_shift(-largest<T>(-low), largest<T>(high), &shift);
    if (shared) {
      for (int i = 0; i < t.rows; ++i) {
        Split<T, MIX> split(t);
        for (int j = 0; j < t.cols; j += WIDTH<T>) {
          split.add(exp<T>(load(b.z + i * b.stride + j) - shift), same_id<T, MIX>(p, t, i, j), b.col_total, j);
        }
        split.put_row(b.row_total, i);
      }
    } else {
      sum_apart<T, MIX>(p, t, b);
    }
  }
  for (int k = first; k <= last; ++k) {
    if (shared) {
      for (int i = 0; i < t.rows; i += WIDTH<T>) store(b.row_shift[k] + i, broadcast(shift));
      for (int j = 0; j < t.cols; j += WIDTH<T>) store(b.col_shift[k] + j, broadcast(shift));
    }
    add_to_sums(t.rows, b.row_total[k], b.row_shift[k], rows.s[k] + t.i, rows.m[k] + t.i);
    if (cols) add_to_sums(t.cols, b.col_total[k], b.col_shift[k], cols->s[k] + t.j, cols->m[k] + t.j);
  }
}

// Widens low and high to the m of the n weights that are not 0.
template <class T>
void widen(int64_t n, const T* g, const T* m, T* low, T* high) {
  for (int64_t i = 0; i < n; ++i) {
    if (g[i] == 0) continue;
    if (m[i] < *low || m[i] != m[i]) *low = m[i];  // a NaN sticks
    if (m[i] > *high || m[i] != m[i]) *high = m[i];
  }
}

// g e^(shift - m) of n weights, 0 where g is.
template <class T>
void shift_weights(int64_t n, const T* g, const T* m, T shift, T* to) {
  for (int64_t i = 0; i < n; i += WIDTH<T>) {
    const Vec<T> gi = load(g + i);
    store(to + i, gi == T(0) ? Vec<T>{} : gi * exp<T>(shift - load(m + i)));
  }
}

template <class H, class T>
void exponential_weights(
    Pairs<T> p, Tile t, Scratch<T> b, const Weights<T>& rows, const Weights<T>* cols, T* row_bias, T* col_bias) {
  constexpr bool MIX = H::MIX;
  const int first = MIX ? POSITIVES : t.set, last = MIX ? NEGATIVES : t.set;
  T low = INFINITE<T>, high = -INFINITE<T>, shift;
  for (int k = first; k <= last; ++k) {
    widen(t.rows, rows.g[k] + t.i, rows.m[k] + t.i, &low, &high);
    if (cols) widen(t.cols, cols->g[k] + t.j, cols->m[k] + t.j, &low, &high);
  }
  // Logits of this call may be plain beside sums that other calls have been added to: their exponentials below have no bound of their own.
  const bool shared = shared_shift(low, high, &shift) && (!H::PLAIN || shift >= -T(NO_SHIFT));
  if (shared) {
    for (int k = first; k <= last; ++k) {
      shift_weights(t.rows, rows.g[k] + t.i, rows.m[k] + t.i, shift, b.row_total[k]);
      if (cols) shift_weights(t.cols, cols->g[k] + t.j, cols->m[k] + t.j, shift, b.col_total[k]);
    }
  }
  if (!cols) {
    for (int k = first; k <= last; ++k) clear(t.cols, b.col_total[k]);
  }

  for (int i = 0; i < t.rows; ++i) {
    T* z = b.z + i * b.stride;
    Vec<T> row_sum = {};
    leave_out(t, i, z, -INFINITE<T>);
    for (int j = 0; j < t.cols; j += WIDTH<T>) {
      const IntVec<T> same = same_id<T, MIX>(p, t, i, j);
      Vec<T> a, slope;
      const Vec<T> v = logits<H>(p, t, load(z + j), same, i, j, &slope);
      if (shared) {  // one exponential serves both roles
        a = b.row_total[first][i] + load(b.col_total[first] + j);
        if constexpr (MIX) a = same ? a : b.row_total[last][i] + load(b.col_total[last] + j);
        a *= exp<T, !H::PLAIN>(v - shift);
      } else {
        const int64_t r = t.i + i, c = t.j + j;
        const Vec<T> g = MIX ? (same ? broadcast(rows.g[first][r]) : broadcast(rows.g[last][r])) : broadcast(rows.g[first][r]);
        const Vec<T> m = MIX ? (same ? broadcast(rows.m[first][r]) : broadcast(rows.m[last][r])) : broadcast(rows.m[first][r]);
        a = g * exp<T>(v - m);
        if (cols) {
          const Vec<T> h = MIX ? (same ? load(cols->g[first] + c) : load(cols->g[last] + c)) : load(cols->g[first] + c);
          const Vec<T> n = MIX ? (same ? load(cols->m[first] + c) : load(cols->m[last] + c)) : load(cols->m[first] + c);
          a += h * exp<T>(v - n);
        }
      }
      row_sum += a;
      if (col_bias) store(col_bias + t.j + j, load(col_bias + t.j + j) + a);
      if constexpr (H::CIRCLE) a *= slope;
      store(z + j, a);
    }
    if (row_bias) row_bias[t.i + i] += sum<T>(row_sum);
  }
}

template <class T>
void add_totals(const Pairs<T>& p, const Tile& t, const Scratch<T>& b, T* sums, T* numbers) {
  T *col_sums = b.col_total[0], *col_numbers = b.col_total[1];
  clear(t.cols, col_sums);
  clear(t.cols, col_numbers);
  for (int i = 0; i < t.rows; ++i) {
    T* z = b.z + i * b.stride;
    leave_out(t, i, z, -INFINITE<T>);
    Vec<T> sum_of_row = {}, number_of_row = {};
    for (int j = 0; j < t.cols; j += WIDTH<T>) {
      const Vec<T> s = load(z + j);
      const IntVec<T> counts = same_id<T, true>(p, t, i, j) & (s != -INFINITE<T>);
      const Vec<T> value = counts ? s : Vec<T>{}, one = counts ? broadcast(T(1)) : Vec<T>{};
      sum_of_row += value;
      number_of_row += one;
      store(col_sums + j, load(col_sums + j) + value);
      store(col_numbers + j, load(col_numbers + j) + one);
    }
    sums[t.i + i] += sum<T>(sum_of_row);
    numbers[t.i + i] += sum<T>(number_of_row);
  }
  for (int j = 0; t.mirrored && j < t.cols; ++j) {
    sums[t.j + j] += col_sums[j];
    numbers[t.j + j] += col_numbers[j];
  }
}

// x against itself: W_ij + W_ji.
template <class T>
void add_total_weights(const Pairs<T>& p, const Tile& t, const Scratch<T>& b, const T* of_sums) {
  const bool symmetric = t.mirrored || t.diagonal;
  for (int i = 0; i < t.rows; ++i) {
    T* z = b.z + i * b.stride;
    for (int j = 0; j < t.cols; j += WIDTH<T>) {
      const Vec<T> weight = of_sums[t.i + i] + (symmetric ? load(of_sums + t.j + j) : Vec<T>{});
      store(z + j, load(z + j) + (same_id<T, true>(p, t, i, j) ? weight : Vec<T>{}));
    }
    leave_out(t, i, z, T(0));
  }
}

// What a pair sum adds up, of v = z over negatives and v = -z over positives; v is -inf at pairs that don't count.
template <class T, bool SOFTPLUS, bool POSITIVE>
struct Term {
  Vec<T> value, slope;  // of the term, in z

  explicit inline Term(Vec<T> v) {
    if constexpr (SOFTPLUS) {
      const Vec<T> e = exp<T>(v < T(0) ? v : -v);
      value = softplus<Number<T>::LOG_TERMS, T>(v, e);
      slope = sigmoid<T>(v, e);
      if constexpr (POSITIVE) slope = -slope;
    } else {
      const IntVec<T> none = v == -INFINITE<T>;
      value = none ? Vec<T>{} : (POSITIVE ? -v : v);
      slope = none ? Vec<T>{} : broadcast(T(1));
    }
  }
};

template <class T, bool SOFTPLUS, bool POSITIVE>
void pair_sum(Pairs<T> p, Tile t, Scratch<T> b, T* sums, const T* weights, T* row_bias, T* col_bias) {
  using TermOf = Term<T, SOFTPLUS, POSITIVE>;
  const T sign = POSITIVE ? -1 : 1;
  const bool mixed = t.set == MIXED;
  T *col_sums = b.col_total[0], *col_weights = b.col_total[1];
  clear(t.cols, col_sums);
  clear(t.cols, col_weights);
  for (int i = 0; i < t.rows; ++i) {
    T* z = b.z + i * b.stride;
    const T bias = p.x.bias[t.i + i], weight = weights ? weights[t.i + i] : T(0);
    const int64_t own = t.left_out + i;
    const bool has_own = p.own && own >= 0 && own < t.cols;
    const T own_logit = has_own ? z[own] + (bias + p.y.bias[t.j + own]) : T(0);
    leave_out(t, i, z, -sign * INFINITE<T>);
    Vec<T> row_sum = {}, row_weight = {};
    for (int j = 0; j < t.cols; j += WIDTH<T>) {
      Vec<T> s = load(z + j);
      if (mixed) {
        const IntVec<T> same = same_id<T, true>(p, t, i, j);
        s = (POSITIVE ? same : ~same) ? s : broadcast(-sign * INFINITE<T>);
      }
      const IntVec<T> none = s == -sign * INFINITE<T>;  // whatever the bias
      const TermOf of_row(none ? broadcast(-INFINITE<T>) : sign * (s + (bias + load(p.y.bias + t.j + j))));
      row_sum += of_row.value;
      Vec<T> w = weight * of_row.slope;
      row_weight += w;
      if (t.mirrored) {  // x against itself: an anchor's bias counts in its own role only
        const TermOf of_col(none ? broadcast(-INFINITE<T>) : sign * (s + load(p.x.bias + t.j + j)));
        const Vec<T> w_col = weights ? load(weights + t.j + j) * of_col.slope : Vec<T>{};
        store(col_sums + j, load(col_sums + j) + of_col.value);
        store(col_weights + j, load(col_weights + j) + w_col);
        w += w_col;
      } else {
        store(col_weights + j, load(col_weights + j) + w);
      }
      store(z + j, w);
    }
    T own_sum = 0, own_weight = 0;
    if (has_own) {
      const Term<T, true, true> of_own(broadcast(-own_logit));
      own_sum = of_own.value[0];
      own_weight = z[own] = weight * of_own.slope[0];
      col_weights[own] += own_weight;
    }
    if (sums) sums[t.i + i] += sum<T>(row_sum) + own_sum;
    if (row_bias) row_bias[t.i + i] += sum<T>(row_weight) + own_weight;
  }
  T* bias_of_cols = t.mirrored ? row_bias : col_bias;
  for (int j = 0; j < t.cols; ++j) {
    if (t.mirrored && sums) sums[t.j + j] += col_sums[j];
    if (bias_of_cols) bias_of_cols[t.j + j] += col_weights[j];
  }
}

// The entries below the diagonal of z [n, n] from those above it.
template <class T>
void mirror(int n, T* z, int64_t stride) {
  for (int i = 1; i < n; ++i) {
    for (int j = 0; j < i; ++j) z[i * stride + j] = z[j * stride + i];
  }
}

// Calls f with the How of a tile.
template <class T, class F>
inline void with_how(const Pairs<T>& p, const Tile& t, F f) {
  if (p.circle) {
    t.set == MIXED ? f(How<true, true, false>()) : f(How<false, true, false>());
  } else {
    with(t.set == MIXED, p.plain, [&](auto mix, auto plain) { f(How<mix, false, plain>()); });
  }
}

// By the products of a Product, as product.h and amx.h have them.
template <class Product, class T = typename Product::Sum>
constexpr Kernels<T> table() {
  Kernels<T> k{};
  k.panel = Product::SIDE;
  k.width = WIDTH<T>;
  k.pair_bytes = Product::PAIR_BYTES;
  k.block_size = Product::block_size;
  k.pack = Product::pack;
  k.operands_size = Product::operands_size;
  k.read = [](const void* given, bool half, int64_t d, const T* norm, T* to) {
    return half ? read(static_cast<const uint16_t*>(given), d, norm, to) : read(static_cast<const T*>(given), d, norm, to);
  };
  k.dot = dot<T>;
  k.round = round_to_bfloat16<T>;
  k.give_back = [](const void* given, bool half, int64_t d, Length<T> length, const T* gradient, void* to) {
    return half ? give_back(static_cast<const uint16_t*>(given), d, length, gradient, static_cast<uint16_t*>(to))
                : give_back(static_cast<const T*>(given), d, length, gradient, static_cast<T*>(to));
  };
  k.products = [](const Pairs<T>& p, const Tile& t, Block<T> x, Block<T> y, const Scratch<T>& b) {
    Product::scores(t.rows, t.cols, p.d, x, y, b.z, b.stride, b.operands);
    if (t.diagonal && !Product::COMMUTES) mirror(t.rows, b.z, b.stride);
  };
  k.add_exponentials = [](const Pairs<T>& p, const Tile& t, const Scratch<T>& b, const Sums<T>& rows, const Sums<T>* cols) {
    with_how(p, t, [&](auto how) { add_exponentials<decltype(how)>(p, t, b, rows, cols); });
  };
  k.exponential_weights = [](const Pairs<T>& p, const Tile& t, const Scratch<T>& b, const Weights<T>& rows, const Weights<T>* cols,
                              T* row_bias, T* col_bias) {
    with_how(p, t, [&](auto how) { exponential_weights<decltype(how)>(p, t, b, rows, cols, row_bias, col_bias); });
  };
  k.add_totals = add_totals<T>;
  k.add_total_weights = add_total_weights<T>;
  k.pair_sum = [](const Pairs<T>& p, const Tile& t, const Scratch<T>& b, Set over, bool softplus, T* sums, const T* weights,
                   T* row_bias, T* col_bias) {
    with(softplus, over == POSITIVES, [&](auto soft, auto positive) {
      pair_sum<T, soft, positive>(p, t, b, sums, weights, row_bias, col_bias);
    });
  };
  k.add_gradients = [](const Tile& t, int64_t d, Block<T> x, Block<T> y, const Scratch<T>& b, T* to_rows, T* to_cols) {
    if (to_rows || to_cols) Product::add(t.rows, t.cols, d, b.z, b.stride, x, y, to_rows ? to_rows + t.i * d : nullptr,
        to_cols ? to_cols + t.j * d : nullptr, b.operands);
  };
  return k;
}

#ifdef PAIRLOSS_AMX
using FloatProduct = Amx<3>;
using Bfloat16Product = Amx<1>;
#else
using FloatProduct = Blocked<Plain<float>>;
using Bfloat16Product = Blocked<Bfloat16>;
#endif

}  // namespace

namespace PAIRLOSS_TARGET {
extern const Kernels<float> float_kernels = table<FloatProduct>();
extern const Kernels<double> double_kernels = table<Blocked<Plain<double>>>();
extern const Kernels<float> bfloat16_kernels = table<Bfloat16Product>();
}  // namespace PAIRLOSS_TARGET

}  // namespace pairloss
