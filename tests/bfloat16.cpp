// Reads n times five floats (a total, two terms, two terms that they meet) from the file named first and writes to the second what
// csrc/cpu/bfloat16.h makes of each: by the instruction, or by its emulation.
#include <cstdio>

#include "../csrc/cpu/bfloat16.h"

int main(int, char** arguments) {
  using pairloss::Bfloat16;
  std::FILE *in = std::fopen(arguments[1], "rb"), *out = std::fopen(arguments[2], "wb");
  if (!in || !out) return 2;
  for (float v[5]; std::fread(v, sizeof v, 1, in) == 1;) {
    const float b = Bfloat16::factor(v[3], v[4]);
    float total[pairloss::WIDTH<float>], factors[pairloss::WIDTH<float>];
    for (int k = 0; k < pairloss::WIDTH<float>; ++k) {
      total[k] = v[0];
      std::memcpy(factors + k, &b, sizeof b);
    }
    pairloss::store(total, Bfloat16::add(pairloss::load(total), Bfloat16::factor(v[1], v[2]), pairloss::load(factors)));
    if (std::fwrite(total, sizeof(float), 1, out) != 1) return 2;
  }
  return std::fclose(out);
}
