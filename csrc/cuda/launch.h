// One launch: on a device and stream, with each CUDA error as an exception that names the kernel.
#pragma once

#include "engine.h"

#ifndef __CUDACC__
#include "host.h"
#else

#include <stdexcept>
#include <string>

namespace pairloss::cuda {

inline void check(cudaError_t error, const char* kernel, const char* doing) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("pairloss._cuda: ") + kernel + ": " + doing + ": " + cudaGetErrorString(error));
  }
}

class DeviceGuard {
 public:
  DeviceGuard(int device, const char* kernel) {
    check(cudaGetDevice(&before_), kernel, "reading the current device");
    if (device != before_) check(cudaSetDevice(device), kernel, "choosing the device");
  }
  ~DeviceGuard() { cudaSetDevice(before_); }
  DeviceGuard(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
};

template <class... Args>
void launch(const char* name, const Stream& stream, void (*kernel)(Args...), dim3 grid, int threads, int shared_bytes, const Args&... args) {
  const DeviceGuard guard(stream.device, name);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), name, "asking for shared memory");
  kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream.handle)>>>(args...);
  check(cudaGetLastError(), name, "launching");
}

}  // namespace pairloss::cuda

#endif
