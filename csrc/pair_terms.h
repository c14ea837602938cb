// What a pair of rows contributes, and its derivative. V is a number, on the host or in a CUDA kernel, or a vector of numbers T as
// GCC and Clang have them. The Triton twins are in kernels/pairs.py and kernels/_math.py.
#pragma once

#ifdef __CUDACC__
#define PAIRLOSS_BOTH __host__ __device__
#else
#define PAIRLOSS_BOTH
#endif

namespace pairloss {

// max(v, 0). NaN stays.
template <class V>
PAIRLOSS_BOTH inline V relu(V v) {
  return v < V{} ? V{} : v;
}

// a b, never fused into an addition that follows: forward and backward, and z_ij and z_ji, must see the same value.
template <class V>
PAIRLOSS_BOTH inline V rounded_product(V a, V b) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(V) == 8) {
    return __dmul_rn(a, b);
  } else {
    return __fmul_rn(a, b);
  }
#else
  V product = a * b;
  // The compiler can't look into these, one for each kind of register on machines that could fuse.
#if defined(__AVX512F__)
  asm("" : "+v"(product));
#elif defined(__FMA__)
  asm("" : "+x"(product));
#elif defined(__aarch64__) && !defined(PAIRLOSS_WIDE)
  asm("" : "+w"(product));
#endif
  return product;
#endif
}

// The circle score. With r = s for negatives and 1 - s for positives both sets have the one form
//
//     z = gamma relu(r + m) (r - m)
//
// whose derivative in r is gamma relu(r + m): the relu is held constant (Sun et al. 2020, equation 6).
template <class V, class T>
PAIRLOSS_BOTH inline V circle_slope(V r, T m, T gamma) {
  return gamma * relu(r + m);
}

template <class V, class T>
PAIRLOSS_BOTH inline V circle(V r, V slope, T m) {
  return rounded_product(slope, V(r - m));
}

// log(1 + e^v), from e = e^-|v|. To the last digits also where it is tiny: log(1 + e) = 2 artanh(t) with t = e / (2 + e) <= 1/3,
// whose series in t^2 converges as 1/9^k.
template <int TERMS, class T, class V>
PAIRLOSS_BOTH inline V softplus(V v, V e) {
  const V t = e / (e + T(2)), t2 = t * t;
  V series = t2 * T(1.0 / (2 * TERMS + 1)) + T(1.0 / (2 * TERMS - 1));
  for (int k = TERMS - 2; k >= 0; --k) series = series * t2 + T(1.0 / (2 * k + 1));
  return relu(v) + T(2) * t * series;
}

// Its derivative.
template <class T, class V>
PAIRLOSS_BOTH inline V sigmoid(V v, V e) {
  const V one = V{} + T(1);
  return (v < V{} ? e : one) / (one + e);
}

}  // namespace pairloss
