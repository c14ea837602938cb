// Reads n times five floats (a total, two terms, two terms that they meet) from the file named first and writes to the second what
// csrc/cpu/bfloat16.h makes of each. With PAIRLOSS_AMX: n times three tiles of 16 x 16 floats (totals, pairs, pairs that they meet) and what
// is in the first after tdpbf16ps. By the instructions, or by their emulation.
#include <cstdio>

#ifdef PAIRLOSS_AMX
#include <sys/syscall.h>
#include <unistd.h>

#include "../csrc/cpu/amx.h"
#else
#include "../csrc/cpu/bfloat16.h"
#endif

using namespace pairloss;

int main(int, char** arguments) {
  std::FILE *in = std::fopen(arguments[1], "rb"), *out = std::fopen(arguments[2], "wb");
  if (!in || !out) return 2;
#ifdef PAIRLOSS_AMX
#ifndef PAIRLOSS_EMULATED
  if (syscall(SYS_arch_prctl, 0x1023, 18) != 0) return 3;
#endif
  // What another library may have set up, 5 rows in the first register, is there again.
  alignas(64) uint8_t before[64] = {1}, after[64];
  before[16] = 64;
  before[48] = 5;
  asm volatile("" : : "r"(before) : "memory");
  _tile_loadconfig(before);
  { const TileRegisters registers; }
  _tile_storeconfig(after);
  asm volatile("" : : "r"(after) : "memory");
  if (std::memcmp(before, after, sizeof before) != 0) return 4;

  const TileRegisters registers;
  for (alignas(64) float v[3][256]; std::fread(v, sizeof v, 1, in) == 1;) {
    asm volatile("" ::: "memory");
    _tile_loadd(0, v[0], 64);
    _tile_loadd(1, v[1], 64);
    _tile_loadd(2, v[2], 64);
    _tile_dpbf16ps(0, 1, 2);
    _tile_stored(0, v[0], 64);
    if (std::fwrite(v[0], sizeof v[0], 1, out) != 1) return 2;
  }
#else
  for (float v[5]; std::fread(v, sizeof v, 1, in) == 1;) {
    const float b = Bfloat16::factor(v[3], v[4]);
    float total[WIDTH<float>], factors[WIDTH<float>];
    for (int k = 0; k < WIDTH<float>; ++k) {
      total[k] = v[0];
      std::memcpy(factors + k, &b, sizeof b);
    }
    store(total, Bfloat16::add(load(total), Bfloat16::factor(v[1], v[2]), load(factors)));
    if (std::fwrite(total, sizeof(float), 1, out) != 1) return 2;
  }
#endif
  return std::fclose(out);
}
