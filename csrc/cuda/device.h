// What kernels ask of the machine: who they are, barriers, shuffles, asynchronous copies, half numbers. host.h answers the same on a CPU,
// where the tests run the kernels.
#pragma once

#ifndef __CUDACC__
#include "host.h"
#else

#include <cstdint>

#define PAIRLOSS_KERNEL __global__
#define PAIRLOSS_DEVICE __device__ __forceinline__

namespace pairloss::cuda {

struct Index {
  unsigned x, y, z;
};

PAIRLOSS_DEVICE int thread() {
  __builtin_assume(threadIdx.x < 1024);  // that it is not negative makes divisions shifts
  return int(threadIdx.x);
}
PAIRLOSS_DEVICE Index block() { return {blockIdx.x, blockIdx.y, blockIdx.z}; }

PAIRLOSS_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

PAIRLOSS_DEVICE void sync_block() { __syncthreads(); }
PAIRLOSS_DEVICE void sync_warp() { __syncwarp(); }

template <class A>
PAIRLOSS_DEVICE A shuffle_xor(A value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

PAIRLOSS_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// 16 bytes from global to shared memory. They are there after wait_copies and a barrier.
PAIRLOSS_DEVICE void copy_async(char* to, const void* from) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
#else
  *reinterpret_cast<int4*>(to) = *static_cast<const int4*>(from);
#endif
}

PAIRLOSS_DEVICE void wait_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

struct Float16 {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

constexpr __device__ bool is_float16(Float16) { return true; }
constexpr __device__ bool is_float16(Bfloat16) { return false; }

PAIRLOSS_DEVICE double widened(double v) { return v; }
PAIRLOSS_DEVICE float widened(float v) { return v; }
PAIRLOSS_DEVICE float widened(Bfloat16 v) { return __uint_as_float(uint32_t(v.bits) << 16); }
PAIRLOSS_DEVICE float widened(Float16 v) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(v.bits));
  return result;
}

PAIRLOSS_DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
PAIRLOSS_DEVICE double multiply_add(double a, double b, double c) { return __fma_rn(a, b, c); }

// 2^v, to a few units in the last place; denormals are 0.
PAIRLOSS_DEVICE float power_of_2(float v) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
}

PAIRLOSS_DEVICE void narrow(double v, double* to) { *to = v; }
PAIRLOSS_DEVICE void narrow(float v, float* to) { *to = v; }
PAIRLOSS_DEVICE void narrow(float v, Float16* to) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to->bits) : "f"(v)); }
PAIRLOSS_DEVICE void narrow(float v, Bfloat16* to) {
#if __CUDA_ARCH__ >= 800
  asm("{.reg .b32 both; .reg .b16 high; cvt.rn.bf16x2.f32 both, %1, %1; mov.b32 {%0, high}, both;}" : "=h"(to->bits) : "f"(v));
#else
  const uint32_t bits = __float_as_uint(v);
  to->bits = uint16_t(v == v ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0);
#endif
}

#if __CUDA_ARCH__ >= 800
constexpr bool HAS_TENSOR_CORES = true;  // that take a chunk's 16 columns at a time
#else
constexpr bool HAS_TENSOR_CORES = false;
#endif

// Two neighbours in one register, for tensor cores.
template <class T>
PAIRLOSS_DEVICE uint32_t packed(float first, float second) {
  uint32_t both = 0;
#if __CUDA_ARCH__ >= 800
  if constexpr (is_float16(T())) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  }
#endif
  return both;
}

// Four 8 x 8 matrices of half numbers; this lane's address is of row lane % 8 of number lane / 8. To each lane two neighbours of row
// lane / 4; of the TRANSPOSED matrix.
template <bool TRANSPOSED>
PAIRLOSS_DEVICE void load_matrices(uint32_t (&to)[4], const void* row) {
  if constexpr (TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
}

#define PAIRLOSS_MMA(type)                                                                                           \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "    \
               "{%8, %9}, {%0, %1, %2, %3};"                                                                         \
               : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)                                                              \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

// A warp's c [16, 8] += a [16, 16] b [16, 8], in the instruction's layout.
template <class T>
PAIRLOSS_DEVICE void multiply(float& c0, float& c1, float& c2, float& c3, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  if constexpr (is_float16(T())) {
    PAIRLOSS_MMA("f16");
  } else {
    PAIRLOSS_MMA("bf16");
  }
#endif
}

}  // namespace pairloss::cuda

#endif
