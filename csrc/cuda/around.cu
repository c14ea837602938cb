// The kernels around the pairs, O(N D), each one launch where PyTorch takes a dozen: what engine.h has of them, for all types. Their
// Triton twins are in kernels/rows.py and kernels/vectors.py.
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "launch.h"
#include "pairs.h"

namespace pairloss::cuda {
namespace {

constexpr int THREADS = Shape<float>::THREADS, WARPS = Shape<float>::WARPS;
template <class A>
constexpr A NOT_A_NUMBER = std::numeric_limits<A>::quiet_NaN();
template <class A>
constexpr A GREATEST = std::numeric_limits<A>::max();
// Where the search for the least of some numbers begins.
template <class V>
constexpr V ABOVE_ALL = std::numeric_limits<V>::has_infinity ? std::numeric_limits<V>::infinity() : std::numeric_limits<V>::max();

// Of the rows, tiles or entries that blocks share out, `each` to a block.
PAIRLOSS_DEVICE int64_t first_of_block(int each) { return int64_t(block().x) * each; }

template <class A, class F>
PAIRLOSS_DEVICE A over_warp(A value, F f) {
  for (int mask = 1; mask < 32; mask *= 2) value = f(value, shuffle_xor(value, mask));
  return value;
}

template <class A>
PAIRLOSS_DEVICE A sum_of_warp(A value) {
  return over_warp(value, [](A a, A b) { return a + b; });
}

template <class A>
PAIRLOSS_DEVICE A largest_of_block(A value) {
  A* of_warps = reinterpret_cast<A*>(shared_memory());
  value = over_warp(value, [](A a, A b) { return larger(a, b); });
  if (lane() == 0) of_warps[warp()] = value;
  sync_block();
  for (int w = 0; w < WARPS; ++w) value = larger(value, of_warps[w]);
  return value;
}

// 1 / |x|, 0 for a zero row, NaN for a length that is not finite: as pairloss/unit.py has it.
template <class A>
PAIRLOSS_DEVICE A inverse_length(A square) {
  constexpr A ZERO_NORM = A(1e-12);
  const A length = std::sqrt(square);
  if (!(length < INFINITE<A>)) return NOT_A_NUMBER<A>;
  return length > ZERO_NORM ? A(1) / length : A(0);
}

// NaN for a norm that is not one: from a temperature <= 0.
template <class A>
PAIRLOSS_DEVICE A valid(A norm) {
  return norm > A(0) && norm < INFINITE<A> ? norm : NOT_A_NUMBER<A>;
}

// A warp for each row.
template <class X, class T, class A>
PAIRLOSS_KERNEL void __launch_bounds__(THREADS, 1)
    scaled_rows_kernel(const X* x, const A* norm, const int64_t* order, T* to, int64_t n, int64_t d) {
  const int64_t i = first_of_block(WARPS) + warp();
  if (i >= n) return;
  const X* given = x + (order ? order[i] : i) * d;
  A square = 0;
  for (int64_t k = lane(); k < d; k += 32) square = multiply_add(A(widened(given[k])), A(widened(given[k])), square);
  const A factor = inverse_length(sum_of_warp(square)) * valid(*norm);
  for (int64_t k = lane(); k < d; k += 32) narrow(A(widened(given[k])) * factor, to + i * d + k);
}

template <class X, class A>
PAIRLOSS_KERNEL void __launch_bounds__(THREADS, 1)
    scaled_rows_backward_kernel(const X* x, const A* norm, const int64_t* order, const A* grads, X* dx, A* along, int64_t n, int64_t d) {
  const int64_t i = first_of_block(WARPS) + warp();
  if (i >= n) return;
  const int64_t at = (order ? order[i] : i) * d;
  const A* grad = grads + i * d;
  A square = 0, product = 0;
  for (int64_t k = lane(); k < d; k += 32) {
    const A v = widened(x[at + k]);
    square = multiply_add(v, v, square);
    product = multiply_add(v, grad[k], product);
  }
  const A inverse = inverse_length(sum_of_warp(square)), along_u = sum_of_warp(product) * inverse, factor = inverse * valid(*norm);
  for (int64_t k = lane(); k < d; k += 32) narrow((grad[k] - A(widened(x[at + k])) * inverse * along_u) * factor, dx + at + k);
  if (lane() == 0) along[i] = along_u;
}

template <class A>
PAIRLOSS_KERNEL void __launch_bounds__(THREADS, 1)
    total_kernel(const A* s, const A* m, A* sums, A* logs, int64_t size, int groups, bool bounded) {
  constexpr A LOG_HELD = A(1 << 22);  // up to which float holds a logarithm to a quarter
  const int64_t at = first_of_block(THREADS) + thread();
  if (at >= size) return;
  A top = bounded ? A(0) : LOWEST<A>, total = 0;
  for (int64_t g = 0; g < groups && !bounded; ++g) top = larger(top, m[g * size + at]);
  for (int64_t g = 0; g < groups; ++g) total += s[g * size + at] * (bounded ? A(1) : exponential(m[g * size + at] - top));
  const bool empty = total == A(0);
  const A log_sum = top < LOG_HELD && top > -LOG_HELD ? top + std::log(total) : top;
  total *= exponential(top - log_sum);
  sums[at] = empty ? A(0) : total;
  sums[size + at] = empty ? A(0) : log_sum;
  logs[at] = empty ? -INFINITE<A> : std::log(total) + log_sum;
}

// grad / s, 0 for an empty set.
template <class A>
PAIRLOSS_DEVICE A weight(const A* sums, const A* grads, int64_t at) {
  if (!sums) return grads[at];
  return sums[at] == A(0) ? A(0) : grads[at] / sums[at];
}

template <class A>
PAIRLOSS_KERNEL void __launch_bounds__(THREADS, 1) largest_kernel(const A* sums, const A* grads, A* largest, int64_t size) {
  A top = 0;
  for (int k = thread(); k < ENTRIES; k += THREADS) {
    const int64_t at = first_of_block(ENTRIES) + k;
    if (at >= size) break;
    const A g = weight(sums, grads, at), magnitude = g < A(0) ? -g : g;
    if (magnitude < INFINITE<A>) top = larger(top, magnitude);
  }
  top = largest_of_block(top);
  if (thread() == 0) largest[block().x] = top;
}

template <class A>
PAIRLOSS_KERNEL void __launch_bounds__(THREADS, 1) scaled_weights_kernel(
    const A* sums, const A* grads, const A* largest, int64_t parts, const A* steepest, A* weights, A* unscale, int64_t size) {
  constexpr A LEAST = A(0x1p-100);
  A top = 0;
  for (int64_t k = thread(); k < parts; k += THREADS) top = larger(top, largest[k]);
  top = largest_of_block(top) * (steepest ? *steepest : A(1));
  top = !(top > LEAST) ? LEAST : top > GREATEST<A> ? GREATEST<A> : top;
  const int e = int(std::floor(A(13) - std::log2(top)));
  const A scale = std::ldexp(A(1), e);
  for (int k = thread(); k < ENTRIES; k += THREADS) {
    const int64_t at = first_of_block(ENTRIES) + k;
    if (at >= size) break;
    weights[at] = weight(sums, grads, at) * scale;
    if (sums) weights[size + at] = sums[size + at];
  }
  if (block().x == 0 && thread() == 0) *unscale = std::ldexp(A(1), -e);
}

// A warp for each tile, block().y for each of the vectors.
template <class V>
PAIRLOSS_KERNEL void __launch_bounds__(THREADS, 1)
    ranges_kernel(const V* values, const V* skipped_at_0, V* to, int64_t n, int64_t tiles, int size, int vectors) {
  const int64_t tile = first_of_block(WARPS) + warp(), vector = block().y;
  if (tile >= tiles) return;
  const auto lower = [](V a, V b) { return b < a ? b : a; };
  V least = ABOVE_ALL<V>, greatest = -ABOVE_ALL<V>;
  const int64_t first = tile * size, past = first + size < n ? first + size : n;
  for (int64_t i = vector * n + first + lane(); i < vector * n + past; i += 32) {
    if (skipped_at_0 && skipped_at_0[i] == V(0)) continue;
    least = lower(least, values[i]);
    greatest = larger(greatest, values[i]);
  }
  least = over_warp(least, lower);
  greatest = over_warp(greatest, [](V a, V b) { return larger(a, b); });
  if (lane() != 0) return;
  to[vector * tiles + tile] = least;
  to[(vectors + vector) * tiles + tile] = greatest;
}

// A warp for each row.
template <class A>
PAIRLOSS_KERNEL void __launch_bounds__(THREADS, 1)
    sum_of_parts_kernel(const A* from, const A* factor, A* to, int64_t n, int64_t stride, int64_t width, int parts) {
  const int64_t i = first_of_block(WARPS) + warp();
  if (i >= n) return;
  for (int64_t k = lane(); k < width; k += 32) {
    A sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += from[(part * n + i) * stride + k];
    to[i * width + k] = factor ? sum * *factor : sum;
  }
}

template <class V>
const V* in(const void* p) {
  return static_cast<const V*>(p);
}

template <class V>
V* out(void* p) {
  return static_cast<V*>(p);
}

// Blocks of `each` that cover n.
unsigned blocks(int64_t n, int each, const char* kernel) {
  const int64_t count = (n + each - 1) / each;
  if (count > INT32_MAX) throw std::invalid_argument(std::string("pairloss._cuda: ") + kernel + ": too many rows");
  return unsigned(count);
}

}  // namespace

template <class X, class T>
void scaled_rows(const Stream& stream, const GivenRows& rows, void* to) {
  using A = typename Shape<T>::Sum;
  constexpr const char* NAME = "scaled_rows";
  if (rows.n == 0) return;
  launch(NAME, stream, scaled_rows_kernel<X, T, A>, dim3(blocks(rows.n, WARPS, NAME)), THREADS, 0, in<X>(rows.rows), in<A>(rows.norm),
      rows.order, out<T>(to), rows.n, rows.d);
}

template <class X>
void scaled_rows_backward(const Stream& stream, const GivenRows& rows, const void* grads, void* drows, void* along) {
  using A = typename Shape<X>::Sum;
  constexpr const char* NAME = "scaled_rows_backward";
  if (rows.n == 0) return;
  launch(NAME, stream, scaled_rows_backward_kernel<X, A>, dim3(blocks(rows.n, WARPS, NAME)), THREADS, 0, in<X>(rows.rows),
      in<A>(rows.norm), rows.order, in<A>(grads), out<X>(drows), out<A>(along), rows.n, rows.d);
}

template <class A>
void Vectors<A>::total(const Stream& stream, const void* s, const void* m, void* sums, void* logs, int64_t size, int groups, bool bounded) {
  constexpr const char* NAME = "total";
  if (size == 0) return;
  launch(NAME, stream, total_kernel<A>, dim3(blocks(size, THREADS, NAME)), THREADS, 0, in<A>(s), in<A>(m), out<A>(sums), out<A>(logs), size,
      groups, bounded);
}

template <class A>
void Vectors<A>::largest(const Stream& stream, const void* sums, const void* grads, void* to, int64_t size) {
  constexpr const char* NAME = "largest";
  if (size == 0) return;
  launch(NAME, stream, largest_kernel<A>, dim3(blocks(size, ENTRIES, NAME)), THREADS, WARPS * int(sizeof(A)), in<A>(sums), in<A>(grads),
      out<A>(to), size);
}

template <class A>
void Vectors<A>::scaled_weights(const Stream& stream, const void* sums, const void* grads, const void* largest, int64_t parts,
    const void* steepest, void* weights, void* unscale, int64_t size) {
  constexpr const char* NAME = "scaled_weights";
  if (size == 0) return;
  launch(NAME, stream, scaled_weights_kernel<A>, dim3(blocks(size, ENTRIES, NAME)), THREADS, WARPS * int(sizeof(A)), in<A>(sums),
      in<A>(grads), in<A>(largest), parts, in<A>(steepest), out<A>(weights), out<A>(unscale), size);
}

template <class A>
void Vectors<A>::sum_of_parts(
    const Stream& stream, const void* from, const void* factor, void* to, int64_t n, int64_t stride, int64_t width, int parts) {
  constexpr const char* NAME = "sum_of_parts";
  if (n == 0) return;
  launch(NAME, stream, sum_of_parts_kernel<A>, dim3(blocks(n, WARPS, NAME)), THREADS, 0, in<A>(from), in<A>(factor), out<A>(to), n, stride,
      width, parts);
}

template <class V>
void ranges(const Stream& stream, const void* values, const void* skipped_at_0, void* to, int64_t n, int64_t size, int vectors) {
  constexpr const char* NAME = "ranges";
  if (n == 0) return;
  const int64_t tiles = (n + size - 1) / size;
  launch(NAME, stream, ranges_kernel<V>, dim3(blocks(tiles, WARPS, NAME), unsigned(vectors)), THREADS, 0, in<V>(values),
      in<V>(skipped_at_0), out<V>(to), n, tiles, int(size), vectors);
}

#define PAIRLOSS_OF_ROWS(X, T) template void scaled_rows<X, T>(const Stream&, const GivenRows&, void*);
#define PAIRLOSS_OF_FLOATS(X)     \
  PAIRLOSS_OF_ROWS(X, float)      \
  PAIRLOSS_OF_ROWS(X, Float16)    \
  PAIRLOSS_OF_ROWS(X, Bfloat16)
PAIRLOSS_OF_ROWS(double, double)
PAIRLOSS_OF_FLOATS(float)
PAIRLOSS_OF_FLOATS(Float16)
PAIRLOSS_OF_FLOATS(Bfloat16)

template void scaled_rows_backward<double>(const Stream&, const GivenRows&, const void*, void*, void*);
template void scaled_rows_backward<float>(const Stream&, const GivenRows&, const void*, void*, void*);
template void scaled_rows_backward<Float16>(const Stream&, const GivenRows&, const void*, void*, void*);
template void scaled_rows_backward<Bfloat16>(const Stream&, const GivenRows&, const void*, void*, void*);

template struct Vectors<float>;
template struct Vectors<double>;
template void ranges<int32_t>(const Stream&, const void*, const void*, void*, int64_t, int64_t, int);
template void ranges<float>(const Stream&, const void*, const void*, void*, int64_t, int64_t, int);
template void ranges<double>(const Stream&, const void*, const void*, void*, int64_t, int64_t, int);

}  // namespace pairloss::cuda
