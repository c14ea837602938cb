// A GPU for the tests: runs the kernels' own source on a CPU, block by block, with the barriers and shuffles of the real one.
//
// The threads of a block are fibers of one thread, which change places at barriers; or with PAIRLOSS_HOST_THREADS threads of their own,
// for the sanitizers. Shared memory is as large as the launch asks for, and filled with NaN. Tensor cores are there, by their documented
// layout.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#ifdef PAIRLOSS_HOST_THREADS
#include <barrier>
#include <thread>
#else
#include <ucontext.h>
#endif

#include "engine.h"

#define PAIRLOSS_KERNEL
#define PAIRLOSS_DEVICE inline
#define __launch_bounds__(threads, blocks)

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace pairloss::cuda {

struct Index {
  unsigned x, y, z;
};

namespace host {

#ifdef PAIRLOSS_HOST_THREADS
using Barrier = std::barrier<>;
#else
void yield();

class Barrier {
 public:
  explicit Barrier(int size) : size_(size) {}
  void arrive_and_wait() {
    const int64_t mine = turn_;
    if (++arrived_ == size_) {
      arrived_ = 0;
      ++turn_;
    }
    while (turn_ == mine) yield();
  }

 private:
  const int size_;
  int arrived_ = 0;
  int64_t turn_ = 0;
};
#endif

struct Warp {
  Barrier barrier{32};
  double exchanged[32];
  const uint16_t* rows[32];
  uint32_t a[32][4], b[32][2];
};

struct BlockState {
  BlockState(Index block, int threads, int shared_bytes)
      : block(block), threads(threads), memory(new char[shared_bytes]), barrier(threads), warps(threads / 32) {
    std::memset(memory.get(), 0xff, shared_bytes);
    for (auto& warp : warps) warp = std::make_unique<Warp>();
  }

  const Index block;
  const int threads;
  const std::unique_ptr<char[]> memory;
  Barrier barrier;
  std::vector<std::unique_ptr<Warp>> warps;
};

struct Self {
  BlockState* block;
  int thread;
};
inline thread_local Self self;

#ifndef PAIRLOSS_HOST_THREADS
class Fibers {
 public:
  static constexpr size_t STACK = 64 << 10;

  template <class F>
  Fibers(int count, BlockState* block, const F& body) : contexts_(count), stacks_(count), block_(block), left_(count) {
    running = this;
    call_ = [](const void* f) { (*static_cast<const F*>(f))(); };
    body_ = &body;
    for (int k = 0; k < count; ++k) prepare(k);
    go_to(0, &main_);
  }

  // On to the next that is not done.
  void next() {
    const int from = now_;
    int to = from;
    do {
      to = (to + 1) % int(contexts_.size());
    } while (done(to));
    if (to == from) return;
    go_to(to, &contexts_[from]);
    self = {block_, from};
  }

  static inline Fibers* running;

 private:
  void prepare(int k) {
    stacks_[k].reset(new char[STACK]);
    getcontext(&contexts_[k]);
    contexts_[k].uc_stack.ss_sp = stacks_[k].get();
    contexts_[k].uc_stack.ss_size = STACK;
    contexts_[k].uc_link = nullptr;
    makecontext(&contexts_[k], [] { running->begin(); }, 0);
  }

  bool done(int k) const { return !stacks_[k]; }

  void go_to(int k, ucontext_t* from) {
    now_ = k;
    swapcontext(from, &contexts_[k]);
  }

  void begin() {
    self = {block_, now_};
    call_(body_);
    // This stack stays in use until the switch: it is only marked.
    finished_.push_back(std::move(stacks_[now_]));
    if (--left_ == 0) setcontext(&main_);
    next();
  }

  std::vector<ucontext_t> contexts_;
  std::vector<std::unique_ptr<char[]>> stacks_, finished_;
  BlockState* block_;
  int left_, now_ = 0;
  ucontext_t main_;
  void (*call_)(const void*);
  const void* body_;
};

inline void yield() { Fibers::running->next(); }
#endif

// Runs body once for each thread of the block.
template <class F>
void run_block(BlockState* block, const F& body) {
#ifdef PAIRLOSS_HOST_THREADS
  std::vector<std::thread> threads;
  for (int k = 0; k < block->threads; ++k) {
    threads.emplace_back([=] {
      self = {block, k};
      body();
    });
  }
  for (std::thread& thread : threads) thread.join();
#else
  Fibers(block->threads, block, body);
#endif
}

}  // namespace host

inline int thread() { return host::self.thread; }
inline Index block() { return host::self.block->block; }
inline char* shared_memory() { return host::self.block->memory.get(); }
inline void sync_block() { host::self.block->barrier.arrive_and_wait(); }
inline void sync_warp() { host::self.block->warps[thread() / 32]->barrier.arrive_and_wait(); }

template <class A>
A shuffle_xor(A value, int mask) {
  host::Warp& warp = *host::self.block->warps[thread() / 32];
  warp.exchanged[thread() % 32] = double(value);
  warp.barrier.arrive_and_wait();
  const A result = A(warp.exchanged[thread() % 32 ^ mask]);
  warp.barrier.arrive_and_wait();
  return result;
}

inline void copy_async(char* to, const void* from) { std::memcpy(to, from, 16); }
inline void wait_copies() {}

struct Float16 {
  _Float16 value;
};
struct Bfloat16 {
  uint16_t bits;
};

inline double widened(double v) { return v; }
inline float widened(float v) { return v; }
inline float widened(Float16 v) { return float(v.value); }
inline float widened(Bfloat16 v) {
  const uint32_t bits = uint32_t(v.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline double multiply_add(double a, double b, double c) { return std::fma(a, b, c); }

inline float power_of_2(float v) { return std::exp2(v); }

inline void narrow(double v, double* to) { *to = v; }
inline void narrow(float v, float* to) { *to = v; }
inline void narrow(float v, Float16* to) { to->value = _Float16(v); }
inline void narrow(float v, Bfloat16* to) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  to->bits = uint16_t(v == v ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0);
}

constexpr bool HAS_TENSOR_CORES = PAIRLOSS_HOST_CAPABILITY >= 80;

template <class T>
uint32_t packed(float first, float second) {
  T both[2];
  narrow(first, &both[0]);
  narrow(second, &both[1]);
  uint32_t result;
  std::memcpy(&result, both, sizeof result);
  return result;
}

// As PTX has ldmatrix.x4 and mma.m16n8k16. Number k of a lane's two in a register is the high half for odd k.
template <bool TRANSPOSED>
void load_matrices(uint32_t (&to)[4], const void* row) {
  host::Warp& warp = *host::self.block->warps[thread() / 32];
  const int lane = thread() % 32;
  warp.rows[lane] = static_cast<const uint16_t*>(row);
  warp.barrier.arrive_and_wait();
  for (int matrix = 0; matrix < 4; ++matrix) {
    const auto number = [&](int i, int j) -> uint32_t { return TRANSPOSED ? warp.rows[matrix * 8 + j][i] : warp.rows[matrix * 8 + i][j]; };
    const int i = lane / 4, j = lane % 4 * 2;
    to[matrix] = number(i, j) | number(i, j + 1) << 16;
  }
  warp.barrier.arrive_and_wait();
}

template <class T>
void multiply(float& c0, float& c1, float& c2, float& c3, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  host::Warp& warp = *host::self.block->warps[thread() / 32];
  const int lane = thread() % 32;
  std::memcpy(warp.a[lane], a, sizeof a);
  warp.b[lane][0] = b0;
  warp.b[lane][1] = b1;
  warp.barrier.arrive_and_wait();
  const auto number = [](uint32_t both, int k) {
    const uint16_t bits = uint16_t(both >> (k % 2 * 16));
    T value;
    std::memcpy(&value, &bits, sizeof bits);
    return widened(value);
  };
  // Row i of a lies with lanes 4 (i % 8) ..., its second eight rows in odd registers, its second eight columns in registers 2 and 3.
  const auto of_a = [&](int i, int k) { return number(warp.a[i % 8 * 4 + k % 8 / 2][i / 8 + k / 8 * 2], k); };
  const auto of_b = [&](int k, int j) { return number(warp.b[j * 4 + k % 8 / 2][k / 8], k); };
  float* const c[2][2] = {{&c0, &c1}, {&c2, &c3}};
  for (int half = 0; half < 2; ++half) {
    for (int e = 0; e < 2; ++e) {
      for (int k = 0; k < 16; ++k) *c[half][e] += of_a(lane / 4 + half * 8, k) * of_b(k, lane % 4 * 2 + e);
    }
  }
  warp.barrier.arrive_and_wait();
}

template <class... Args>
void launch(const char*, const Stream&, void (*kernel)(Args...), dim3 grid, int threads, int shared_bytes, const Args&... args) {
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        host::BlockState block({x, y, z}, threads, shared_bytes);
        host::run_block(&block, [&] { kernel(args...); });
      }
    }
  }
}

}  // namespace pairloss::cuda
