#include "targets.h"

#include <unistd.h>

#ifdef PAIRLOSS_X86_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <stdexcept>
#include <type_traits>

namespace pairloss {

#define PAIRLOSS_DECLARE(target)                                  \
  namespace target {                                              \
  extern const Kernels<float> float_kernels, bfloat16_kernels;    \
  extern const Kernels<double> double_kernels;                    \
  }
#define PAIRLOSS_TABLES(target) &target::float_kernels, &target::bfloat16_kernels, &target::double_kernels
PAIRLOSS_DECLARE(baseline)
#ifdef PAIRLOSS_X86
PAIRLOSS_DECLARE(avx2)
PAIRLOSS_DECLARE(avx512)
PAIRLOSS_DECLARE(avx512bf16)
#endif
#ifdef PAIRLOSS_X86_AMX
PAIRLOSS_DECLARE(amx)
#endif

namespace {

struct Target {
  const char* name;
  bool (*here)();
  const Kernels<float>*floats, *bfloat16s;
  const Kernels<double>* doubles;
};

#ifdef PAIRLOSS_X86
bool has_avx512() { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"); }
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

#ifdef PAIRLOSS_X86_AMX
// Whether the processor has tiles of bfloat16 and Linux lends this process their registers, which it does when asked.
bool has_amx() {
  static const bool here = [] {
    constexpr unsigned BFLOAT16 = 1 << 22, TILES = 1 << 24;
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, TILE_DATA = 18;
    unsigned a, b, c, d;
    return has_avx512() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && d & BFLOAT16 && d & TILES &&
           syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0;
  }();
  return here;
}
#endif

// Best first. Intel's cores start half as many vdpbf16ps as multiply-adds, and lose by them (bench/notes.md).
const Target TARGETS[] = {
#ifdef PAIRLOSS_X86_AMX
    {"amx", has_amx, PAIRLOSS_TABLES(amx)},
#endif
#ifdef PAIRLOSS_X86
    {"avx512bf16", [] { return has_avx512_bf16() && !__builtin_cpu_is("intel"); }, PAIRLOSS_TABLES(avx512bf16)},
    {"avx512", has_avx512, PAIRLOSS_TABLES(avx512)},
    {"avx512bf16", [] { return has_avx512_bf16() && __builtin_cpu_is("intel"); }, PAIRLOSS_TABLES(avx512bf16)},
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }, PAIRLOSS_TABLES(avx2)},
#endif
    {"baseline", [] { return true; }, PAIRLOSS_TABLES(baseline)},
};

std::atomic<const Target*> chosen{nullptr};

const Target& target() {
  if (const Target* t = chosen) return *t;
  for (const Target& t : TARGETS) {
    if (t.here()) return t;
  }
  throw std::logic_error("no target");
}

// A tile of weights and what it is multiplied with must stay in the second-level cache of a core; this share of it for the tile
// measured best (bench/notes.md).
constexpr double CACHE_SHARE = 0.46;
constexpr int64_t CACHE_BYTES = 512 << 10;  // where the system doesn't say
constexpr int64_t LARGEST_TILE = 512;
constexpr int64_t SMALLEST_TILE = 48;  // below, what is read and written around a tile takes longer than the tile

int64_t cache_bytes() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  const long bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return CACHE_BYTES;
}

}  // namespace

std::vector<std::string> targets() {
  std::vector<std::string> names;
  for (const Target& t : TARGETS) {
    if (t.here()) names.push_back(t.name);
  }
  return names;
}

void use_target(const std::string& name) {
  const Target* found = nullptr;
  for (const Target& t : TARGETS) {
    if (t.here() && name == t.name) found = &t;
  }
  if (!found && !name.empty()) throw std::invalid_argument("target: expected one of pairloss._cpu.targets(), got " + name);
  chosen = found;
}

template <class T>
const Kernels<T>& kernels(bool bfloat16) {
  if constexpr (std::is_same_v<T, float>) {
    return bfloat16 ? *target().bfloat16s : *target().floats;
  } else {
    return *target().doubles;
  }
}

template <class T>
int64_t tile_size(bool bfloat16, int64_t wanted, int64_t share) {
  const Kernels<T>& k = kernels<T>(bfloat16);
  if (wanted > 0) return rounded_up(wanted, k.width);
  const int64_t fits = std::min(int64_t(std::sqrt(CACHE_SHARE * cache_bytes() / k.pair_bytes)), LARGEST_TILE);
  return std::min(std::max<int64_t>(fits / k.panel, 1) * k.panel, rounded_up(std::max(share, SMALLEST_TILE), k.panel));
}

template const Kernels<float>& kernels(bool);
template const Kernels<double>& kernels(bool);
template int64_t tile_size<float>(bool, int64_t, int64_t);
template int64_t tile_size<double>(bool, int64_t, int64_t);

}  // namespace pairloss
