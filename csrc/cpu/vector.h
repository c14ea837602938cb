// Vectors of the instruction set that this file is compiled for, as GCC and Clang have them, and the exponential.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "../pair_terms.h"

#define PAIRLOSS_INLINE inline __attribute__((always_inline))

namespace pairloss {
namespace {

#if defined(__AVX512F__) || defined(PAIRLOSS_WIDE)  // tests build the wide form for processors without it
constexpr int VECTOR_BYTES = 64, REGISTERS = 32;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int VECTOR_BYTES = 16, REGISTERS = 32;
#else
constexpr int VECTOR_BYTES = 16, REGISTERS = 16;
#endif

template <class T>
struct Number;

template <>
struct Number<float> {
  typedef int32_t Int;
  typedef float V __attribute__((vector_size(VECTOR_BYTES)));
  typedef int32_t I __attribute__((vector_size(VECTOR_BYTES)));
  static constexpr int MANTISSA = 23, BIAS = 127, EXP_TERMS = 7, LOG_TERMS = 7;
  static constexpr float EXP_RANGE = 87;
};

template <>
struct Number<double> {
  typedef int64_t Int;
  typedef double V __attribute__((vector_size(VECTOR_BYTES)));
  typedef int64_t I __attribute__((vector_size(VECTOR_BYTES)));
  static constexpr int MANTISSA = 52, BIAS = 1023, EXP_TERMS = 13, LOG_TERMS = 17;
  static constexpr double EXP_RANGE = 708;
};

template <class T>
using Vec = typename Number<T>::V;
template <class T>
using IntVec = typename Number<T>::I;  // ids, and what comparisons of Vec<T> give
template <class T>
constexpr int WIDTH = VECTOR_BYTES / int(sizeof(T));

template <class T>
inline Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
inline IntVec<T> load_ids(const typename Number<T>::Int* p) {
  IntVec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
inline void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}

template <class T>
inline Vec<T> broadcast(T value) {
  return value - Vec<T>{};  // x + 0 would be an addition: of -0 it is 0
}

template <class T>
inline T sum(Vec<T> v) {
  T lanes[WIDTH<T>];  // halved again and again: one after another they would wait for each other
  store(lanes, v);
#pragma GCC unroll 4
  for (int half = WIDTH<T> / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
  }
  return lanes[0];
}

// The order of the operands says what becomes of a NaN: these keep `a`'s other operand where either is one.
template <class V>
inline V larger(V a, V b) {
  return b > a ? b : a;
}

template <class V>
inline V smaller(V a, V b) {
  return b < a ? b : a;
}

constexpr double reciprocal_factorial(int n) { return n < 2 ? 1.0 : reciprocal_factorial(n - 1) / n; }

// e^v to a unit in the last place or two, and what rounding v by half a unit would make of it. 0 below -EXP_RANGE and, CAPPED, no more
// than e^EXP_RANGE above it: a pair that has no weight may have any logit, and 0 * inf would be NaN. Else v must not be above. NaN stays.
template <class T, bool CAPPED = true>
PAIRLOSS_INLINE Vec<T> exp(Vec<T> v) {
  using N = Number<T>;
  // The integer, with the exponent's bias, stands in the last bits of the mantissa.
  constexpr T LOG2E = T(1.442695040888963407359924681), LN2 = T(0.693147180559945309417232121);
  constexpr T TO_INTEGER = T(1.5) * T(int64_t(1) << N::MANTISSA) + N::BIAS;
  const Vec<T> capped = CAPPED && v > N::EXP_RANGE ? broadcast<T>(N::EXP_RANGE) : v;
  const Vec<T> shifted = capped * LOG2E + TO_INTEGER;
  const Vec<T> n = shifted - TO_INTEGER;
  const Vec<T> r = capped - n * LN2;  // |r| <= log(2) / 2
  Vec<T> series = broadcast<T>(T(reciprocal_factorial(N::EXP_TERMS)));
#pragma GCC unroll 16
  for (int k = N::EXP_TERMS - 1; k >= 0; --k) series = series * r + T(reciprocal_factorial(k));
  const Vec<T> power = (Vec<T>)((IntVec<T>)shifted << N::MANTISSA);
  return v < -N::EXP_RANGE ? Vec<T>{} : series * power;
}

}  // namespace
}  // namespace pairloss
