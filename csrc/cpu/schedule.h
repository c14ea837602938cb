// Threads, and the order in which they visit the blocks of a matrix.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace pairloss {

// Runs f(0) ... f(threads - 1) at the same time, or fewer where threads can't be had. With OpenMP on the threads that torch keeps: its
// library is loaded already, and threads of our own would have to wait for those that still spin after torch's last operation.
template <class F>
void in_parallel(int threads, F f) {
  if (threads == 1) return f(0);
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
  f(omp_get_thread_num());
#else
  std::vector<std::jthread> others;  // which join when they go
  others.reserve(threads);
  try {
    for (int t = 1; t < threads; ++t) others.emplace_back(f, t);
  } catch (const std::system_error&) {
  }
  f(0);
#endif
}

// A turn in something that blocks use one after another, in the order in which they were handed out.
class Turn {
 public:
  int64_t draw() { return drawn_++; }  // under the lock of the order
  void wait(int64_t ticket) const {
    while (done_.load(std::memory_order_acquire) != ticket) std::this_thread::yield();
  }
  void pass() { done_.fetch_add(1, std::memory_order_release); }

 private:
  int64_t drawn_ = 0;
  std::atomic<int64_t> done_{0};
};

// Calls visit(thread, i, j) for the blocks of a matrix of `rows` by `cols` blocks for which wanted(i, j), of a symmetric one for those
// with i <= j. Blocks that share rows or columns (in a symmetric matrix: either's rows with either's columns) are visited one after
// another and always in the same order: what is added up has the same bits for any number of threads. Rounds keep the threads out of
// each other's way: no two blocks of a round share anything. In a symmetric matrix i + j is the round's number modulo the blocks, so
// that each meets one other, or itself.
template <class Wanted, class Visit>
void visit_blocks(bool symmetric, int64_t rows, int64_t cols, int threads, Wanted wanted, Visit visit) {
  std::vector<Turn> of_rows(rows), of_cols(symmetric ? 0 : cols);
  const int64_t round_size = std::min(rows, cols), others = std::max(rows, cols);
  std::mutex order;
  int64_t next = 0;
  in_parallel(threads, [&](int thread) {
    for (;;) {
      int64_t i, j, row_ticket, col_ticket = 0;
      Turn *row, *col;
      {
        const std::lock_guard<std::mutex> lock(order);
        do {
          if (next == rows * cols) return;
          const int64_t round = next / round_size, first = next % round_size;
          const int64_t second = (symmetric ? round - first + others : round + first) % others;
          i = rows <= cols ? first : second;
          j = rows <= cols ? second : first;
          ++next;
        } while ((symmetric && i > j) || !wanted(i, j));
        row = &of_rows[i];
        col = !symmetric ? &of_cols[j] : i != j ? &of_rows[j] : nullptr;
        row_ticket = row->draw();
        if (col) col_ticket = col->draw();
      }
      row->wait(row_ticket);
      if (col) col->wait(col_ticket);
      visit(thread, i, j);
      row->pass();
      if (col) col->pass();
    }
  });
}

}  // namespace pairloss
