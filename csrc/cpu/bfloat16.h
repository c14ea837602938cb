// What products of bfloat16 numbers are made of. Where the processor adds up two of them in one instruction (AVX512-BF16) a factor of
// product.h is two terms. Such a product is exact whatever the order of its factors: <a, b> and <b, a> round alike here too.
#pragma once

#include "product.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#elif defined(PAIRLOSS_EMULATED)
#include "emulated.h"
#endif

namespace pairloss {
namespace {

// The bits of v, rounded to nearest even. NaN stays.
PAIRLOSS_INLINE uint32_t bfloat16_bits(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return v != v ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

PAIRLOSS_INLINE float float_of(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

#if defined(__AVX512BF16__) || defined(PAIRLOSS_EMULATED)

struct Bfloat16 {
  using Sum = float;
  static constexpr int TERMS = 2;

  // In the bits of a float that nobody computes with.
  static PAIRLOSS_INLINE float factor(float first, float second) {
    return float_of(bfloat16_bits(first) | bfloat16_bits(second) << 16);
  }

  static PAIRLOSS_INLINE Vec<float> add(Vec<float> total, float a, Vec<float> b) {
    int32_t bits;
    std::memcpy(&bits, &a, sizeof bits);
    const IntVec<float> of_a = bits - IntVec<float>{};
#if defined(__AVX512BF16__)
    return _mm512_dpbf16_ps(total, (__m512bh)of_a, (__m512bh)b);
#else
    return dpbf16ps(total, of_a, (IntVec<float>)b);
#endif
  }
};

#else

// Rows are rounded, weights are not.
struct Bfloat16 : Plain<float> {
  static PAIRLOSS_INLINE float factor(float v, float) { return float_of(bfloat16_bits(v) << 16); }
};

#endif

}  // namespace
}  // namespace pairloss
