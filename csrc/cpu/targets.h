// The instruction sets of this processor, and what follows from them: the tile functions, and the size of tiles.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"

namespace pairloss {

// The instruction sets that this processor has and this build serves, best first; and which one is used ("" = the best).
std::vector<std::string> targets();
void use_target(const std::string&);

// Of the one that is used; T is float or double. With bfloat16 products where it has them.
template <class T>
const Kernels<T>& kernels(bool bfloat16);

// The rows and columns of a tile: `wanted`, rounded up to what the tile functions serve, or for 0 what fits the cache, but not
// more than `share` or what is worth a tile.
template <class T>
int64_t tile_size(bool bfloat16, int64_t wanted, int64_t share);

}  // namespace pairloss
