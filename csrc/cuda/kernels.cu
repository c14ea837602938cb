// The launchers for one type, PAIRLOSS_TYPE. Compiled once for each, by nvcc for GPUs and as C++ for the tests on a CPU.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "gradients.h"
#include "launch.h"
#include "row_stats.h"

namespace pairloss::cuda {
namespace {

using T = PAIRLOSS_TYPE;
using S = Shape<T>;
using A = typename S::Sum;

int64_t tiles(int64_t n, int size) { return (n + size - 1) / size; }

void check(bool fits, const char* kernel, const char* what) {
  if (!fits) throw std::invalid_argument(std::string("pairloss._cuda: ") + kernel + ": " + what);
}

typename Pairs<T>::Of of(const Side& side, int size, const char* kernel) {
  check(reinterpret_cast<uintptr_t>(side.rows) % PIECE == 0, kernel, "rows must lie on 16 bytes");
  check(tiles(side.n, size) <= INT32_MAX / 2, kernel, "too many rows");
  return {static_cast<const T*>(side.rows), side.ids, side.id_ranges, static_cast<const A*>(side.bias), static_cast<const A*>(side.weights),
      static_cast<const A*>(side.weight_ranges), side.n, int(tiles(side.n, size))};
}

Pairs<T> pairs_of(const Call& call, const char* kernel) {
  check(call.d > 0 && call.d % S::CHUNK == 0, kernel, "d must be a multiple of the chunk");
  check(call.d <= INT32_MAX / int64_t(sizeof(T)), kernel, "too many columns");
  check(call.sets == 1 || (call.x.ids && call.y.ids && (call.words > 0 || (call.x.id_ranges && call.y.id_ranges))), kernel, "ids are missing");
  Pairs<T> p;
  p.x = of(call.x, S::ROWS, kernel);
  p.y = of(call.y, S::COLS, kernel);
  p.d = int(call.d);
  p.self_offset = call.has_self ? call.self_offset : 0;
  p.sets = call.sets;
  p.words = call.words;
  p.symmetric = call.symmetric;
  p.has_self = call.has_self;
  p.margin = A(call.margin);
  p.gamma = A(call.gamma);
  p.cutoff = static_cast<const A*>(call.cutoff);
  return p;
}

template <Form FORM, bool WITH_ROWS>
void launch_gradients(const char* name, const Call& call, dim3 grid, const Pairs<T>& p, const Gradient<T>& to) {
  launch(name, call.stream, gradients_kernel<T, FORM, WITH_ROWS>, grid, S::THREADS, OwnedRows<T, FORM, WITH_ROWS>::BYTES, p, to);
}

}  // namespace

template <>
Tile Kernels<T>::tile() {
  return {S::ROWS, S::COLS, S::CHUNK, GRADIENT_CHUNKS<T> * S::CHUNK};
}

template <>
void Kernels<T>::row_stats(const Call& call, const Partials& partials) {
  constexpr const char* NAME = "row_stats";
  if (call.x.n == 0 || call.y.n == 0) return;
  check(partials.rows_m && partials.rows_s && !partials.cols_m == !partials.cols_s, NAME, "sums are missing");
  check(partials.span_x > 0 && partials.span_y > 0, NAME, "spans must be positive");
  const Pairs<T> p = pairs_of(call, NAME);
  const Partial<T> to{static_cast<A*>(partials.rows_m), static_cast<A*>(partials.rows_s), static_cast<A*>(partials.cols_m),
      static_cast<A*>(partials.cols_s), partials.span_x, partials.span_y, partials.bounded};
  const dim3 grid(unsigned((p.y.tiles + to.span_y - 1) / to.span_y), unsigned((p.x.tiles + to.span_x - 1) / to.span_x));
  if (call.circle) {
    launch(NAME, call.stream, row_stats_kernel<T, true>, grid, S::THREADS, RowStats<T, true, false>::BYTES, p, to);
  } else {
    launch(NAME, call.stream, row_stats_kernel<T, false>, grid, S::THREADS, RowStats<T, false, false>::BYTES, p, to);
  }
}

template <>
void Kernels<T>::gradients(const Call& call, const Gradients& gradients) {
  const bool terms = gradients.terms != Terms::EXPONENTIAL;
  const char* name = terms ? "pair_sum" : "row_stats_backward";
  if (call.x.n == 0 || call.y.n == 0) return;
  check(gradients.parts > 0 && gradients.parts < 65536, name, "parts must be positive");
  check(terms || (gradients.rows && !gradients.sums), name, "outputs don't fit");
  check(terms || ((call.x.weights || call.y.weights) && !call.x.weights == !call.x.weight_ranges && !call.y.weights == !call.y.weight_ranges),
      name, "weights are missing");
  const Pairs<T> p = pairs_of(call, name);
  const Gradient<T> to{gradients.over, gradients.parts, gradients.terms == Terms::SOFTPLUS, gradients.visits,
      static_cast<A*>(gradients.rows), static_cast<A*>(gradients.bias), static_cast<A*>(gradients.sums)};
  const int64_t columns = gradients.rows ? tiles(p.d, GRADIENT_CHUNKS<T> * S::CHUNK) : 1;
  check(columns < 65536, name, "too many columns");
  const dim3 grid(unsigned(p.x.tiles), unsigned(columns), unsigned(gradients.parts));
  if (terms && gradients.rows) {
    launch_gradients<Form::TERMS, true>(name, call, grid, p, to);
  } else if (terms) {
    launch_gradients<Form::TERMS, false>(name, call, grid, p, to);
  } else if (call.circle) {
    launch_gradients<Form::CIRCLE, true>(name, call, grid, p, to);
  } else {
    launch_gradients<Form::LINEAR, true>(name, call, grid, p, to);
  }
}

}  // namespace pairloss::cuda
