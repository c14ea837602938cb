// Single rows: as they come, as they are compared, and the way back of their gradients. As kernels.h calls it.
#pragma once

#include <cmath>
#include <limits>

#include "bfloat16.h"
#include "kernels.h"

namespace pairloss {
namespace {

// The sum of f(k) for k = 0 ... n - 1, in double: as many digits as a library's norms have.
template <class F>
inline double sum_of(int64_t n, F f) {
  constexpr int LANES = 8;
  double lanes[LANES] = {}, total = 0;
  int64_t k = 0;
  for (; k + LANES <= n; k += LANES) {
    for (int lane = 0; lane < LANES; ++lane) lanes[lane] += f(k + lane);
  }
  for (; k < n; ++k) total += f(k);
  for (double lane : lanes) total += lane;
  return total;
}

// Rows as they come, of T or of bfloat16.
template <class T>
struct Numbers {
  static PAIRLOSS_INLINE T get(const T* row, int64_t k) { return row[k]; }
  static PAIRLOSS_INLINE T get(const uint16_t* row, int64_t k) { return T(float_of(uint32_t(row[k]) << 16)); }
  static PAIRLOSS_INLINE void put(T v, T* row, int64_t k) { row[k] = v; }
  static PAIRLOSS_INLINE void put(T v, uint16_t* row, int64_t k) { row[k] = uint16_t(bfloat16_bits(float(v))); }
};

template <class T, class Given>
Length<T> read(const Given* given, int64_t d, const T* norm, T* to) {
  constexpr T ZERO_NORM = T(1e-12);  // as in pairloss/unit.py
  const double square = sum_of(d, [&](int64_t k) {
    const double v = Numbers<T>::get(given, k);
    return v * v;
  });
  const double length = std::sqrt(square);
  Length<T> result{T(0), T(1), T(length)};
  if (norm) {
    // 1 / inf would silently give the zero vector. NaN where a library's norm overflows, as in the other engines.
    const bool finite = T(square) < std::numeric_limits<T>::infinity();
    const double inverse = !finite ? std::numeric_limits<double>::quiet_NaN() : T(length) > ZERO_NORM ? 1 / length : 0;
    result = {T(inverse), T(inverse * *norm), *norm};
  }
  for (int64_t k = 0; k < d; ++k) to[k] = Numbers<T>::get(given, k) * result.scale;
  return result;
}

// With u = given / |given|: scale (g - u <u, g>), where `to` is not null, and <u, g>.
template <class T, class Given>
double give_back(const Given* given, int64_t d, Length<T> length, const T* gradient, Given* to) {
  const double along = length.inverse * sum_of(d, [&](int64_t k) { return double(gradient[k]) * Numbers<T>::get(given, k); });
  const T part = T(along) * length.inverse;
  for (int64_t k = 0; to && k < d; ++k) Numbers<T>::put((gradient[k] - Numbers<T>::get(given, k) * part) * length.scale, to, k);
  return along;
}

template <class T>
T dot(int64_t d, const T* x, const T* y) {
  return T(sum_of(d, [&](int64_t k) { return double(x[k]) * y[k]; }));
}

template <class T>
void round_to_bfloat16(int64_t d, T* row) {
  for (int64_t k = 0; k < d; ++k) row[k] = T(float_of(bfloat16_bits(float(row[k])) << 16));
}

}  // namespace
}  // namespace pairloss
