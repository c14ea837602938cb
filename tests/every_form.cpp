// Runs the CPU engine through every form, on arrays without a spare entry, and writes what it computes to the file named first: for
// sanitizers, and to compare builds. Each array is its bytes per number (2: float, from weights that may be rounded to bfloat16), the largest
// number in it or in what it was made of, its length and its numbers, all as doubles. The input is fixed; the second argument is the number of threads.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "../csrc/cpu/engine.h"

namespace {

std::mt19937 engine(0);
std::FILE* out;

template <class T>
class Array {  // on the heap, exactly as long as it says: sanitizers see what is read beyond
 public:
  explicit Array(int64_t n) : size_(n), data_(new T[n]()) {}
  T* get() const { return data_.get(); }
  int64_t size() const { return size_; }

 private:
  int64_t size_;
  std::unique_ptr<T[]> data_;
};

template <class T>
Array<T> random(int64_t n, double spread) {
  Array<T> a(n);
  std::normal_distribution<double> normal(0, spread);
  for (int64_t i = 0; i < n; ++i) a.get()[i] = T(normal(engine));
  return a;
}

Array<int64_t> ids(int64_t n, int64_t words, int64_t factor) {
  Array<int64_t> a(n * (words ? words : 1));
  for (int64_t i = 0; i < a.size(); ++i) {
    const int64_t id = engine() % 5;
    a.get()[i] = words ? int64_t(1) << (id * 15 + engine() % 2) : id * factor;
  }
  return a;
}

void put(double value) { std::fwrite(&value, sizeof value, 1, out); }

template <class T>
void write(const Array<T>& a, int bytes = sizeof(T), double scale = 0) {
  for (int64_t i = 0; i < a.size(); ++i) scale = std::max(scale, std::abs(double(a.get()[i])));
  put(bytes);
  put(scale);
  put(a.size());
  for (int64_t i = 0; i < a.size(); ++i) put(a.get()[i]);
}

// As bfloat16, truncated.
template <class T>
Array<uint16_t> half(const Array<T>& a) {
  Array<uint16_t> to(a.size());
  for (int64_t i = 0; i < a.size(); ++i) {
    const float v = float(a.get()[i]);
    uint32_t bits;
    std::memcpy(&bits, &v, sizeof bits);
    to.get()[i] = uint16_t(bits >> 16);
  }
  return to;
}

Array<int64_t> reversed(int64_t n) {
  Array<int64_t> order(n);
  for (int64_t i = 0; i < n; ++i) order.get()[i] = n - 1 - i;
  return order;
}

// A gradient of rows, of T or of bfloat16.
template <class T>
class Rows {
 public:
  Rows(int64_t n, bool half) : full_(half ? 0 : n), half_(half ? n : 0), is_half_(half) {}
  void* get() const { return is_half_ ? static_cast<void*>(half_.get()) : full_.get(); }
  Array<T> numbers() const {
    Array<T> to(full_.size() + half_.size());
    for (int64_t i = 0; i < to.size(); ++i) {
      const uint32_t bits = is_half_ ? uint32_t(half_.get()[i]) << 16 : 0;
      float v;
      std::memcpy(&v, &bits, sizeof v);
      to.get()[i] = is_half_ ? T(v) : full_.get()[i];
    }
    return to;
  }

 private:
  Array<T> full_;
  Array<uint16_t> half_;
  bool is_half_;
};

template <class T>
void run(pairloss::Call call, double spread) {
  const int64_t n = call.n, m = call.symmetric ? n : call.m, sets = call.has_ids ? 2 : 1;
  const Array<T> x = random<T>(n * call.d, spread), y = random<T>(m * call.d, spread);
  const Array<T> row_bias = random<T>(n, 1), col_bias = random<T>(m, 1), weights = random<T>(n, 1);
  const Array<int64_t> ids_x = ids(n, call.words, 1), ids_y = ids(m, call.words, 1);
  if (call.bfloat16 || call.has_norm) {  // positive: the rounding of weights is compared with sums of what was rounded, which must not cancel
    for (const Array<T>* a : {&x, &y, &weights}) {
      for (int64_t i = 0; i < a->size(); ++i) a->get()[i] = std::abs(a->get()[i]);
    }
  }
  const int of_gradients = call.bfloat16 ? 2 : sizeof(T);
  call.is_double = sizeof(T) == 8;
  call.half = call.has_norm && call.bfloat16;
  const Array<uint16_t> half_x = half(x), half_y = half(y);
  const Array<int64_t> order_x = reversed(n), order_y = reversed(m);
  call.x = call.half ? static_cast<void*>(half_x.get()) : x.get();
  if (!call.symmetric) call.y = call.half ? static_cast<void*>(half_y.get()) : y.get();
  if (call.has_norm) call.order_x = order_x.get();
  if (call.has_norm && !call.symmetric) call.order_y = order_y.get();
  if (call.has_ids) call.ids_x = ids_x.get();
  if (call.has_ids && !call.symmetric) call.ids_y = ids_y.get();
  const bool plain = call.logit_bound < std::numeric_limits<double>::infinity();  // and only some of the gradients
  if (!plain) call.row_bias = row_bias.get();
  if (!plain && !call.symmetric) call.col_bias = col_bias.get();

  const bool both_sides = !call.symmetric;
  Array<T> row_logs((sets + 2) * n), rows((2 * sets + 2) * n), col_logs(both_sides ? sets * m : 0), cols(2 * col_logs.size());
  Array<T> dnorm(1), drow(n), dcol(m), sums(n);
  Rows<T> dx(n * call.d, call.half), dy(m * call.d, call.half);
  const auto of_y = [&](const auto& a) { return call.symmetric ? nullptr : a.get(); };
  const auto for_x = [&](const auto& a) { return plain && call.has_ids ? nullptr : a.get(); };
  const auto for_y = [&](const auto& a) { return plain && call.words == 0 ? nullptr : of_y(a); };
  T* const for_norm = call.has_norm ? dnorm.get() : nullptr;
  call.totals = call.has_ids && !call.circle;
  pairloss::row_stats(call, row_logs.get(), rows.get(), of_y(col_logs), of_y(cols));
  write(rows);  // whose logarithms may be -inf
  Array<T> totals(call.totals ? 2 * n : 0);
  std::copy_n(row_logs.get() + sets * n, totals.size(), totals.get());
  write(totals);
  write(cols);
  // As gradients, sums are as good as other numbers.
  pairloss::row_stats_backward(call, rows.get(), rows.get(), of_y(cols), of_y(cols),
      {for_x(dx), for_y(dy), for_norm, for_x(drow), for_y(dcol)});
  // At a given norm what lies along a row is taken off its gradient, here nearly everything: what is left is measured by that. It adds
  // up over n + m rows to the norm's gradient; twice its mean, since rows differ, and circle's have both signs.
  const auto write_rows = [&](const Rows<T>& gradient, const Array<T>& of, const Array<T>& of_norm) {
    Array<T> numbers = gradient.numbers();
    for (int64_t i = 0; call.has_norm && i < numbers.size(); i += call.d) {
      double square = 0;
      for (int64_t k = i; k < i + call.d; ++k) square += double(of.get()[k]) * of.get()[k];
      for (int64_t k = i; k < i + call.d; ++k) numbers.get()[k] *= T(std::sqrt(square) / call.norm);
    }
    write(numbers, of_gradients, call.has_norm ? 2 * std::abs(double(of_norm.get()[0])) / (n + m) : 0);
  };
  write_rows(dx, x, dnorm);
  write_rows(dy, y, dnorm);
  for (const Array<T>* a : {&dnorm, &drow, &dcol}) write(*a, a == &dnorm ? of_gradients : sizeof(T));
  if (call.circle) return;
  for (bool positives : {false, true}) {
    if (positives && !call.has_ids) continue;
    for (bool softplus : {false, true}) {
      Rows<T> sx(n * call.d, call.half), sy(m * call.d, call.half);
      Array<T> snorm(1), srow(n), scol(m);
      call.own = !call.symmetric && !positives && softplus;
      pairloss::pair_sum(call, positives, softplus, sums.get(), weights.get(),
          {for_x(sx), for_y(sy), for_norm ? snorm.get() : nullptr, for_x(srow), for_y(scol)});
      write_rows(sx, x, snorm);
      write_rows(sy, y, snorm);
      for (const Array<T>* a : {&snorm, &sums, &srow, &scol}) write(*a, a == &snorm ? of_gradients : sizeof(T));
    }
  }
}

}  // namespace

int main(int, char** arguments) {
  out = std::fopen(arguments[1], "wb");
  if (!out) return 2;
  for (int64_t n : {1, 7, 50}) {
    for (int64_t d : {1, 19, 300}) {  // 300: more than one stretch of terms
      for (bool symmetric : {true, false}) {
        for (int64_t words : {-1, 0, 2}) {  // no ids, ids, multi-hot
          for (bool circle : {false, true}) {
            for (double spread : {0.0, 0.1, 3.0}) {  // no shift, one for a tile, and one for each row and column
              const bool plain = spread == 0;
              const bool norm = (n + words + symmetric) % 2 == 0 && d < 300;  // half of the forms, in another order
              if (circle && (plain || words < 0)) continue;
              pairloss::Call call{};
              call.symmetric = symmetric;
              call.has_ids = words >= 0;
              call.words = words > 0 ? words : 0;
              call.n = n;
              call.m = n + 5;
              call.d = d;
              call.has_norm = norm;
              call.norm = plain ? 0.3 : spread;
              call.has_self = true;
              call.self_offset = symmetric ? 0 : 2;
              call.circle = circle;
              call.margin = 0.25;
              call.gamma = 4;
              call.cutoff = circle || symmetric || plain ? -std::numeric_limits<double>::infinity() : -0.5;
              call.logit_bound = plain ? 20 : std::numeric_limits<double>::infinity();
              call.tile = 16;
              call.threads = std::atoi(arguments[2]);
              const double of_rows = (plain ? 0.1 : spread) / d;
              run<float>(call, of_rows);
              run<double>(call, of_rows);
              call.bfloat16 = true;
              run<float>(call, of_rows);
            }
          }
        }
      }
    }
  }
  return std::fclose(out);
}
