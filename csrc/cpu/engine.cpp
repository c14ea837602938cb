// What the calls of engine.h read, hold and add up, tile by tile; what is computed in a tile is in kernels.cpp.
#include "engine.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <numeric>

#include "kernels.h"
#include "schedule.h"
#include "targets.h"

namespace pairloss {
namespace {

// Floating-point operations that pay for another thread; tests want threads for less.
#ifndef PAIRLOSS_THREAD_FLOPS
#define PAIRLOSS_THREAD_FLOPS 1e6
#endif

// Rows are cut into so many blocks, or more: as many tiles can be visited at once, of a symmetric matrix half as many. Not the number of
// threads: the same tiles give the same bits for any.
constexpr int64_t BLOCKS = 8, SYMMETRIC_BLOCKS = 16;

// A cache line: vectors that cross two cost a fourth of the products' speed.
constexpr std::align_val_t ALIGNMENT{64};

struct Delete {
  void operator()(void* memory) const { ::operator delete[](memory, ALIGNMENT); }
};

template <class T>
using Aligned = std::unique_ptr<T[], Delete>;

template <class T>
Aligned<T> aligned(int64_t n) {
  return Aligned<T>(new (ALIGNMENT) T[n]);
}

// n entries, and PADDING more of value 0.
template <class T>
std::vector<T> padded(const T* from, int64_t n) {
  std::vector<T> to(n + PADDING);
  if (from) std::copy(from, from + n, to.begin());
  return to;
}

// Row i goes to order[i].
template <class T>
void put_in_order(T* rows, const int64_t* order, int64_t n, int64_t d) {
  std::vector<bool> done(n);
  std::vector<T> carried(d);
  for (int64_t i = 0; i < n; ++i) {
    if (done[i]) continue;
    std::copy_n(rows + i * d, d, carried.begin());
    int64_t at = i;
    do {
      at = order[at];
      std::swap_ranges(carried.begin(), carried.end(), rows + at * d);
      done[at] = true;
    } while (at != i);
  }
}

template <class T>
class Run {
 public:
  using Id = typename IdOf<T>::type;

  explicit Run(const Call& call)
      : call_(call),
        kernels_(kernels<T>(call.bfloat16)),
        symmetric_(call.symmetric),
        m_(symmetric_ ? call.n : call.m),
        tile_(tile_size<T>(call.bfloat16, call.tile, std::min(call.n, m_) / (symmetric_ ? SYMMETRIC_BLOCKS : BLOCKS))),
        blocks_x_((call.n + tile_ - 1) / tile_),
        blocks_y_((m_ + tile_ - 1) / tile_),
        row_bias_(padded(static_cast<const T*>(call.row_bias), call.n)),
        col_bias_(padded(static_cast<const T*>(call.col_bias), m_)),
        norm_(call.norm > 0 && std::isfinite(T(call.norm)) ? T(call.norm) : std::numeric_limits<T>::quiet_NaN()),
        x_(call, call.x, call.order_x, call.n),
        y_(call, call.y, call.order_y, symmetric_ ? 0 : m_) {
    read_ids();
    pairs_.x = {row_bias_.data(), ids_x_.data(), call.n + PADDING};
    pairs_.y = {col_bias_.data(), (symmetric_ ? ids_x_ : ids_y_).data(), m_ + PADDING};
    pairs_.words = int(call.words * sizeof(int64_t) / sizeof(Id));
    pairs_.d = call.d;
    pairs_.own = call.own;
    pairs_.circle = call.circle;
    pairs_.m = T(call.margin);
    pairs_.gamma = T(call.gamma);
    pairs_.cutoff = T(call.cutoff);
    pairs_.bounded = pairs_.plain = false;
    const double pairs = double(call.n) * m_ / (symmetric_ ? 2 : 1);
    const double worth = std::max(1.0, std::min(2 * pairs * call.d / PAIRLOSS_THREAD_FLOPS, double(std::min(blocks_x_, blocks_y_))));
    threads_ = std::clamp(int(worth), 1, std::max(1, call.threads));
  }

  void row_stats(T* row_logs, T* row_sums, T* col_logs, T* col_sums) {
    pack(false, false);
    prepare();
    SumsOf rows(sets(), call_.n), cols(sets(), col_sums ? m_ : 0);
    const Sums<T>&r = rows.sums, &c = symmetric_ ? rows.sums : cols.sums;
    T* const totals = call_.totals ? row_logs + sets() * call_.n : nullptr;
    if (totals) std::fill_n(totals, 2 * call_.n, T(0));
    visit(MIXED, [&](const Tile& t, const Scratch<T>& b) {
      products(t, b);
      if (totals && t.set != NEGATIVES) kernels_.add_totals(pairs_, t, b, totals, totals + call_.n);
      kernels_.add_exponentials(pairs_, t, b, r, t.mirrored || col_sums ? &c : nullptr);
    });
    rows.put(row_logs, row_sums, call_.n);
    if (call_.has_norm) poison(row_logs);
    if (col_sums) cols.put(col_logs, col_sums, m_);
  }

  void row_stats_backward(const T* row_sums, const T* row_grads, const T* col_sums, const T* col_grads, const Gradients& grads) {
    const std::vector<T> of_totals = call_.totals ? padded(row_grads + sets() * call_.n, call_.n) : std::vector<T>();
    const WeightsOf rows(sets(), call_.n, row_sums, row_grads), cols(sets(), m_, col_sums, col_grads);
    pack(grads.dx || grads.dnorm, (symmetric_ ? grads.dx : grads.dy) || grads.dnorm);
    prepare();
    backward(MIXED, grads, [&](const Tile& t, const Scratch<T>& b, T* row_bias, T* col_bias) {
      const Weights<T>* of_cols = symmetric_ ? &rows.weights : col_sums ? &cols.weights : nullptr;
      // x against itself: W_ij + W_ji. The diagonal's row sums see both (i, j) and (j, i).
      T* to_cols = !symmetric_ ? col_bias : t.mirrored ? row_bias : nullptr;
      kernels_.exponential_weights(pairs_, t, b, rows.weights, of_cols, row_bias, to_cols);
      if (!of_totals.empty() && t.set != NEGATIVES) kernels_.add_total_weights(pairs_, t, b, of_totals.data());
      return !symmetric_ || t.mirrored;
    });
  }

  void pair_sum(Set over, bool softplus, T* sums, const T* weights, const Gradients& grads) {
    const std::vector<T> all = padded(weights, weights ? call_.n : 0);
    const T* given = weights ? all.data() : nullptr;
    pack(grads.dx || grads.dnorm, (symmetric_ ? grads.dx : grads.dy) || grads.dnorm);
    backward(over, grads, [&](const Tile& t, const Scratch<T>& b, T* row_bias, T* col_bias) {
      kernels_.pair_sum(pairs_, t, b, over, softplus, sums, given, row_bias, col_bias);
      return true;  // on the diagonal too: there, a tile is not its own transpose
    });
  }

  void own_products(T* products) {
    with_own_rows([&](int64_t i, const T* x, const T* y, Length<T>, Length<T>) { products[i] = kernels_.dot(call_.d, x, y); });
  }

  void own_products_backward(const T* weights, const Gradients& grads) {
    std::vector<double> along(call_.n);
    with_own_rows([&](int64_t i, T* x, T* y, Length<T> of_x, Length<T> of_y) {
      for (T* row : {x, y}) {
        for (int64_t k = 0; k < call_.d; ++k) row[k] *= weights[i];
      }
      along[i] = give_back(x_, i, of_x, y, x_.at(i, grads.dx)) + give_back(y_, i, of_y, x, y_.at(i, grads.dy));
    });
    if (grads.dnorm) *static_cast<T*>(grads.dnorm) = T(std::accumulate(along.begin(), along.end(), 0.0));
  }

 private:
  struct SumsOf {
    std::vector<T> s, m;
    Sums<T> sums;
    int sets;
    int64_t stride;

    SumsOf(int sets, int64_t n)
        : s(sets * (n + PADDING)), m(s.size(), -std::numeric_limits<T>::max()), sets(sets), stride(n + PADDING) {
      for (int k = 0; k < 2; ++k) {
        const int at = std::max(0, k - (2 - sets));
        sums.s[k] = s.data() + at * stride;
        sums.m[k] = m.data() + at * stride;
      }
    }

    // As pairloss.engines.log_of [K, n] and normalised [2, K, n].
    void put(T* logs, T* to, int64_t n) const {
      for (int k = 0; k < sets; ++k) {
        for (int64_t i = 0; i < n; ++i) {
          const T si = s[k * stride + i], mi = m[k * stride + i], log_sum = mi + std::log(si);
          const T shift = si == 0 ? T(0) : std::abs(mi) < T(1 << 22) ? log_sum : mi;
          logs[k * n + i] = log_sum;
          to[k * n + i] = si == 0 ? T(0) : si * std::exp(mi - shift);
          to[(sets + k) * n + i] = shift;
        }
      }
    }
  };

  struct WeightsOf {
    std::vector<T> parts[4];
    Weights<T> weights;

    // As pairloss.engines.weights_of.
    WeightsOf(int sets, int64_t n, const T* sums, const T* grads) {
      if (!sums) return;
      for (int k = 0; k < sets; ++k) {
        parts[k] = padded(grads + k * n, n);
        parts[sets + k] = padded(sums + (sets + k) * n, n);
        for (int64_t i = 0; i < n; ++i) parts[k][i] = sums[k * n + i] == 0 ? T(0) : parts[k][i] / sums[k * n + i];
      }
      for (int k = 0; k < 2; ++k) {
        const int at = std::max(0, k - (2 - sets));
        weights.g[k] = parts[at].data();
        weights.m[k] = parts[sets + at].data();
      }
    }
  };

  int sets() const { return call_.has_ids ? 2 : 1; }

  // For row_stats, where x against itself has one bias, on both sides.
  void prepare() {
    if (symmetric_) pairs_.y.bias = row_bias_.data();
    pairs_.bounded = bound() <= NO_SHIFT;
    const bool as_they_are = !call_.row_bias && !call_.col_bias && !call_.circle && call_.cutoff == -std::numeric_limits<double>::infinity();
    pairs_.plain = pairs_.bounded && as_they_are;
  }

  // Of |z|: what the caller vouches for, or |x| |y|.
  double bound() const {
    if (call_.logit_bound <= NO_SHIFT || call_.row_bias || call_.col_bias || call_.circle) return call_.logit_bound;
    return x_.longest() * rows_y().longest();
  }

  // An anchor that has no direction has no statistics, not even those of an empty set.
  void poison(T* row_logs) const {
    const int stats = sets() + (call_.totals ? 2 : 0);
    for (int64_t i = 0; i < call_.n; ++i) {
      if (!std::isnan(x_.lengths[i].scale)) continue;
      for (int k = 0; k < stats; ++k) row_logs[k * call_.n + i] = std::numeric_limits<T>::quiet_NaN();
    }
  }

  // Ids in the width of T: as they are, or ranks where they don't fit.
  void read_ids() {
    if (!call_.has_ids) return;
    if (call_.words) {
      ids_x_ = words(call_.ids_x, call_.n);
      if (!symmetric_) ids_y_ = words(call_.ids_y, m_);
      return;
    }
    std::vector<int64_t> ids(call_.ids_x, call_.ids_x + call_.n);
    if (!symmetric_) ids.insert(ids.end(), call_.ids_y, call_.ids_y + m_);
    const auto fits = [](int64_t id) { return id == int64_t(Id(id)); };
    if (!std::all_of(ids.begin(), ids.end(), fits)) {
      std::vector<int64_t> ordered = ids;
      std::sort(ordered.begin(), ordered.end());
      for (int64_t& id : ids) id = std::lower_bound(ordered.begin(), ordered.end(), id) - ordered.begin();
    }
    ids_x_.assign(call_.n + PADDING, 0);
    std::copy_n(ids.begin(), call_.n, ids_x_.begin());
    ranges_x_ = ranges(ids_x_, call_.n);
    if (symmetric_) return;
    ids_y_.assign(m_ + PADDING, 0);
    std::copy_n(ids.begin() + call_.n, m_, ids_y_.begin());
    ranges_y_ = ranges(ids_y_, m_);
  }

  // Multi-hot words in the width of T, word by word.
  std::vector<Id> words(const int64_t* ids, int64_t n) const {
    constexpr int PARTS = sizeof(int64_t) / sizeof(Id);
    std::vector<Id> result(PARTS * call_.words * (n + PADDING));
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t w = 0; w < call_.words; ++w) {
        for (int part = 0; part < PARTS; ++part) {
          result[(w * PARTS + part) * (n + PADDING) + i] = Id(ids[i * call_.words + w] >> (part * 8 * sizeof(Id) % 64));
        }
      }
    }
    return result;
  }

  // The least and the greatest id of every block.
  std::vector<std::pair<Id, Id>> ranges(const std::vector<Id>& ids, int64_t n) const {
    std::vector<std::pair<Id, Id>> result;
    for (int64_t i = 0; i < n; i += tile_) {
      const auto [low, high] = std::minmax_element(ids.begin() + i, ids.begin() + std::min(n, i + tile_));
      result.emplace_back(*low, *high);
    }
    return result;
  }

  Tile tile(int64_t block_x, int64_t block_y) const {
    Tile t;
    t.i = block_x * tile_;
    t.j = block_y * tile_;
    t.rows = int(std::min(tile_, call_.n - t.i));
    t.cols = int(std::min(tile_, m_ - t.j));
    t.set = call_.words ? MIXED : NEGATIVES;
    if (call_.has_ids && !call_.words) {
      const auto &x = ranges_x_[block_x], &y = (symmetric_ ? ranges_x_ : ranges_y_)[block_y];
      if (x.first <= y.second && y.first <= x.second) t.set = x.first == x.second && x == y && !call_.own ? POSITIVES : MIXED;
    }
    t.left_out = call_.has_self ? call_.self_offset + t.i - t.j : -tile_;
    t.mirrored = symmetric_ && block_x != block_y;
    t.diagonal = symmetric_ && block_x == block_y;
    return t;
  }

  // One side's rows: as they come, and what they are packed to, block by block.
  struct Rows {
    const char* given;
    const int64_t* order;
    int64_t n, row_size, stride = 0;
    int roles = 0;
    std::vector<Length<T>> lengths;
    Aligned<T> data;

    Rows(const Call& call, const void* given, const int64_t* order, int64_t n)
        : given(static_cast<const char*>(given)), order(order), n(n), row_size(call.d * (call.half ? sizeof(uint16_t) : sizeof(T))) {}

    int64_t offset(int64_t i) const { return (order ? order[i] : i) * row_size; }
    const void* at(int64_t i) const { return given + offset(i); }
    void* at(int64_t i, void* result) const { return result ? static_cast<char*>(result) + offset(i) : nullptr; }
    Block<T> block(int64_t k) const { return {data.get() + k * stride, roles}; }

    double longest() const {
      double top = 0;
      for (const Length<T>& length : lengths) top = std::max(top, double(length.after));  // NaN counts as none
      return top;
    }
  };

  Rows& rows_y() { return symmetric_ ? x_ : y_; }
  const Rows& rows_y() const { return symmetric_ ? x_ : y_; }

  // For the products: x as their left operand, y as the right one, and the rows whose weights are wanted: x weighted for to_y.
  void pack(bool weighted_y, bool weighted_x) {
    pack(x_, LEFT | (weighted_x ? WEIGHTED : 0) | (symmetric_ ? RIGHT | (weighted_y ? WEIGHTED : 0) : 0));
    if (!symmetric_) pack(y_, RIGHT | (weighted_y ? WEIGHTED : 0));
  }

  void pack(Rows& rows, int roles) {
    rows.roles = roles;
    rows.stride = rounded_up(kernels_.block_size(std::min(tile_, rows.n), call_.d, roles), PADDING);
    rows.data = aligned<T>((rows.n + tile_ - 1) / tile_ * rows.stride);
    rows.lengths.resize(rows.n);
    by_block(rows, std::min(tile_, rows.n), [&](int64_t i, int64_t n, T* memory) {
      for (int64_t r = 0; r < n; ++r) rows.lengths[i + r] = read(rows, i + r, memory + r * call_.d);
      kernels_.pack(memory, n, call_.d, roles, rows.data.get() + i / tile_ * rows.stride);
    });
  }

  // f(the first row, how many, memory for `in_memory` rows) for every block, by all threads.
  template <class F>
  void by_block(const Rows& rows, int64_t in_memory, F f) {
    const int64_t blocks = (rows.n + tile_ - 1) / tile_;
    std::atomic<int64_t> next{0};
    in_parallel(int(std::clamp<int64_t>(blocks, 1, threads_)), [&](int) {
      const Aligned<T> memory = aligned<T>(in_memory * call_.d);
      for (int64_t k; (k = next++) < blocks;) f(k * tile_, std::min(tile_, rows.n - k * tile_), memory.get());
    });
  }

  // Row i as it is compared.
  Length<T> read(const Rows& rows, int64_t i, T* to) const {
    return kernels_.read(rows.at(i), call_.half, call_.d, call_.has_norm ? &norm_ : nullptr, to);
  }

  // The gradient of row i from that of the row as it is compared; the norm's part in it.
  double give_back(const Rows& rows, int64_t i, Length<T> length, const T* gradient, void* to) const {
    return kernels_.give_back(rows.at(i), call_.half, call_.d, length, gradient, to);
  }

  // f(i, x_i, y_i, their lengths) with copies of the rows as they are compared.
  template <class F>
  void with_own_rows(F f) {
    by_block(x_, 2, [&](int64_t first, int64_t n, T* x) {
      T* const y = x + call_.d;
      for (int64_t i = first; i < first + n; ++i) {
        const Length<T> of_x = read(x_, i, x), of_y = read(y_, i, y);
        if (call_.bfloat16) kernels_.round(2 * call_.d, x);
        f(i, x, y, of_x, of_y);
      }
    });
  }

  void products(const Tile& t, const Scratch<T>& b) const {
    kernels_.products(pairs_, t, x_.block(t.i / tile_), rows_y().block(t.j / tile_), b);
  }

  // Weights of a tile from its products, by weigh(tile, scratch, row bias, column bias), whose result says whether the tile adds to
  // the gradient of its candidates too.
  template <class F>
  void backward(Set wanted, const Gradients& grads, F weigh) {
    std::vector<T> row_bias(grads.drow_bias ? call_.n + PADDING : 0), col_bias(grads.dcol_bias ? m_ + PADDING : 0);
    RowGradients dx(*this, x_, grads.dx, grads.dnorm), dy(*this, y_, symmetric_ ? nullptr : grads.dy, symmetric_ ? nullptr : grads.dnorm);
    T* to_y = (symmetric_ ? dx : dy).sums;
    visit(wanted, [&](const Tile& t, const Scratch<T>& b) {
      products(t, b);
      const bool to_cols = weigh(t, b, grads.drow_bias ? row_bias.data() : nullptr, grads.dcol_bias ? col_bias.data() : nullptr);
      kernels_.add_gradients(t, call_.d, x_.block(t.i / tile_), rows_y().block(t.j / tile_), b, dx.sums, to_cols ? to_y : nullptr);
    });
    const double dnorm = dx.give_back() + dy.give_back();
    if (grads.dnorm) *static_cast<T*>(grads.dnorm) = T(dnorm);
    if (grads.drow_bias) std::copy_n(row_bias.begin(), call_.n, static_cast<T*>(grads.drow_bias));
    if (grads.dcol_bias) std::copy_n(col_bias.begin(), m_, static_cast<T*>(grads.dcol_bias));
  }

  // The gradient of one side's rows as they are compared, and from it that of the rows as they come: in the same memory where it can.
  struct RowGradients {
    Run& run;
    const Rows& rows;
    void* const result;
    Aligned<T> memory;
    T* sums = nullptr;  // [n, d]; null: not wanted

    RowGradients(Run& run, const Rows& rows, void* result, const void* dnorm) : run(run), rows(rows), result(result) {
      if (result && !run.call_.half) {
        sums = static_cast<T*>(result);
      } else if (result || dnorm) {
        memory = aligned<T>(rows.n * run.call_.d);
        sums = memory.get();
        std::fill_n(sums, rows.n * run.call_.d, T(0));
      }
    }

    // And the gradient of the norm.
    double give_back() {
      if (!sums) return 0;
      const int64_t d = run.call_.d;
      std::vector<double> along(rows.n);
      if (run.call_.has_norm) {
        run.by_block(rows, 0, [&](int64_t first, int64_t n, T*) {
          for (int64_t i = first; i < first + n; ++i) {
            T* const sum = sums + i * d;
            along[i] = run.give_back(rows, i, rows.lengths[i], sum, run.call_.half ? rows.at(i, result) : sum);
          }
        });
      }
      if (sums == result && rows.order) put_in_order(sums, rows.order, rows.n, d);
      return std::accumulate(along.begin(), along.end(), 0.0);
    }
  };

  // Calls f(tile, scratch) for all tiles, or for those that can hold pairs of one set.
  template <class F>
  void visit(Set wanted, F f) {
    std::vector<Aligned<T>> memory;
    for (int thread = 0; thread < threads_; ++thread) memory.push_back(aligned<T>(scratch_size()));
    const auto has_pairs = [&](int64_t i, int64_t j) { return has(wanted, tile(i, j)); };
    visit_blocks(symmetric_, blocks_x_, blocks_y_, threads_, has_pairs, [&](int thread, int64_t i, int64_t j) {
      f(tile(i, j), scratch(memory[thread].get()));
    });
  }

  static bool has(Set wanted, const Tile& t) { return wanted == MIXED || t.set == MIXED || t.set == wanted; }

  int64_t row_stride() const {
    const int64_t line = 64 / sizeof(T);  // an odd number of cache lines: rows must not compete for the same places in the cache
    return (rounded_up(std::min(tile_, m_), BLOCK) / line | 1) * line;
  }

  int64_t vector_size() const { return rounded_up(tile_, PADDING) + PADDING; }

  int64_t z_size() const { return rounded_up(std::min(tile_, call_.n), BLOCK) * row_stride() + PADDING; }

  int64_t operands_size() const {
    return kernels_.operands_size(std::min(tile_, call_.n), std::min(tile_, m_), row_stride(), call_.d);
  }

  int64_t scratch_size() const { return z_size() + 8 * vector_size() + operands_size(); }

  Scratch<T> scratch(T* memory) const {
    Scratch<T> b;
    b.z = memory;
    b.stride = row_stride();
    memory += z_size();
    for (T** part : {b.row_total, b.row_shift, b.col_total, b.col_shift}) {
      for (int k = 0; k < 2; ++k, memory += vector_size()) part[k] = memory;
    }
    b.operands = memory;
    return b;
  }

  const Call& call_;
  const Kernels<T>& kernels_;
  const bool symmetric_;
  const int64_t m_, tile_, blocks_x_, blocks_y_;
  const std::vector<T> row_bias_, col_bias_;
  const T norm_;
  std::vector<Id> ids_x_, ids_y_;
  std::vector<std::pair<Id, Id>> ranges_x_, ranges_y_;
  Pairs<T> pairs_;
  Rows x_, y_;
  int threads_;
};

template <class F>
void with_type(const Call& call, F f) {
  if (call.is_double) {
    f(double());
  } else {
    f(float());
  }
}

}  // namespace

void row_stats(const Call& call, void* row_logs, void* row_sums, void* col_logs, void* col_sums) {
  with_type(call, [&](auto type) {
    using T = decltype(type);
    Run<T>(call).row_stats(
        static_cast<T*>(row_logs), static_cast<T*>(row_sums), static_cast<T*>(col_logs), static_cast<T*>(col_sums));
  });
}

void row_stats_backward(
    const Call& call, const void* row_sums, const void* row_grads, const void* col_sums, const void* col_grads, const Gradients& grads) {
  with_type(call, [&](auto type) {
    using T = decltype(type);
    Run<T>(call).row_stats_backward(static_cast<const T*>(row_sums), static_cast<const T*>(row_grads), static_cast<const T*>(col_sums),
        static_cast<const T*>(col_grads), grads);
  });
}

void pair_sum(const Call& call, bool over_positives, bool softplus, void* sums, const void* weights, const Gradients& grads) {
  with_type(call, [&](auto type) {
    using T = decltype(type);
    Run<T>(call).pair_sum(
        over_positives ? POSITIVES : NEGATIVES, softplus, static_cast<T*>(sums), static_cast<const T*>(weights), grads);
  });
}

void own_products(const Call& call, void* products) {
  with_type(call, [&](auto type) { Run<decltype(type)>(call).own_products(static_cast<decltype(type)*>(products)); });
}

void own_products_backward(const Call& call, const void* weights, const Gradients& grads) {
  with_type(call, [&](auto type) {
    using T = decltype(type);
    Run<T>(call).own_products_backward(static_cast<const T*>(weights), grads);
  });
}

}  // namespace pairloss
