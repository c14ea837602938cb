// The instruction vdpbf16ps as Intel's manual has it, for tests on processors without it: in each lane two fused multiply-adds, that of
// the upper halves first; denormals count as 0 and become 0. A product of two bfloat16 numbers is exact, so that a product and a sum
// are a fused multiply-add.
#pragma once

#include "vector.h"

namespace pairloss {
namespace {

PAIRLOSS_INLINE Vec<float> without_denormals(Vec<float> v) {
  constexpr float LEAST = std::numeric_limits<float>::min();
  return (v < LEAST) & (v > -LEAST) ? Vec<float>{} : v;
}

PAIRLOSS_INLINE Vec<float> dpbf16ps(Vec<float> total, IntVec<float> a, IntVec<float> b) {
  total = without_denormals(total);
  for (int shift = 0; shift <= 16; shift += 16) {
    const auto half = [&](IntVec<float> pair) { return without_denormals((Vec<float>)(pair << shift & int32_t(0xffff0000))); };
    total = without_denormals(total + half(a) * half(b));
  }
  return total;
}

}  // namespace
}  // namespace pairloss
