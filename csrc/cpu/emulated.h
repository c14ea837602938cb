// Instructions as Intel's manual has them, for tests on processors without them. Denormals count as 0 and become 0. A product of two
// bfloat16 numbers is exact, so that a product and a sum are a fused multiply-add.
#pragma once

#include "vector.h"

namespace pairloss {
namespace {

template <class V>
PAIRLOSS_INLINE V without_denormals(V v) {
  constexpr float LEAST = std::numeric_limits<float>::min();
  return (v < LEAST) & (v > -LEAST) ? V{} : v;
}

// vdpbf16ps: in each lane two fused multiply-adds, that of the upper halves first.
PAIRLOSS_INLINE Vec<float> dpbf16ps(Vec<float> total, IntVec<float> a, IntVec<float> b) {
  total = without_denormals(total);
  for (int shift = 0; shift <= 16; shift += 16) {
    const auto half = [&](IntVec<float> pair) { return without_denormals((Vec<float>)(pair << shift & int32_t(0xffff0000))); };
    total = without_denormals(total + half(a) * half(b));
  }
  return total;
}

// The tile registers of this thread, all of 16 rows of 64 bytes, and the instructions under the names of Intel's intrinsics.
typedef float TileRow __attribute__((vector_size(64)));
typedef int32_t TileBits __attribute__((vector_size(64)));
thread_local TileRow tiles[8][16];
thread_local unsigned char tile_shape[64];

inline void _tile_storeconfig(void* to) { std::memcpy(to, tile_shape, sizeof tile_shape); }
inline void _tile_loadconfig(const void* from) { std::memcpy(tile_shape, from, sizeof tile_shape); }
inline void _tile_zero(int tile) { std::memset(tiles[tile], 0, sizeof tiles[tile]); }

inline void _tile_loadd(int tile, const void* from, int64_t stride) {
  for (int row = 0; row < 16; ++row) std::memcpy(&tiles[tile][row], static_cast<const char*>(from) + row * stride, 64);
}

inline void _tile_stored(int tile, void* to, int64_t stride) {
  for (int row = 0; row < 16; ++row) std::memcpy(static_cast<char*>(to) + row * stride, &tiles[tile][row], 64);
}

// tdpbf16ps: the lower halves' products have a sum and the upper halves' another; the sum of both is added to the tile.
__attribute__((no_sanitize("address", "thread", "undefined"))) inline void _tile_dpbf16ps(int to, int left, int right) {
  const auto number = [](TileBits bits, int half) {
    return without_denormals((TileRow)(half == 0 ? bits << 16 : bits & int32_t(0xffff0000)));
  };
  TileRow rights[16][2];
  for (int k = 0; k < 16; ++k) {
    for (int half = 0; half < 2; ++half) rights[k][half] = number((TileBits)tiles[right][k], half);
  }
  for (int i = 0; i < 16; ++i) {
    const TileRow lefts[2] = {number((TileBits)tiles[left][i], 0), number((TileBits)tiles[left][i], 1)};
    TileRow total[2] = {};
    for (int k = 0; k < 16; ++k) {
      for (int half = 0; half < 2; ++half) total[half] = without_denormals(total[half] + lefts[half][k] * rights[k][half]);
    }
    tiles[to][i] = without_denormals(without_denormals(tiles[to][i]) + without_denormals(total[0] + total[1]));
  }
}

}  // namespace
}  // namespace pairloss
