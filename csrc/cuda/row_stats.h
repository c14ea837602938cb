// Sums of e^z over each set of each row and column: see engine.h's Partials.
#pragma once

#include "pairs.h"

namespace pairloss::cuda {

// A sum s e^m.
template <class A>
struct LogSum {
  A s = 0, m = LOWEST<A>;

  PAIRLOSS_DEVICE void add(const LogSum& other) {
    const A top = larger(m, other.m);
    s = s * exponential(m - top) + other.s * exponential(other.m - top);
    m = top;
  }
};

template <class T>
struct Partial {
  typename Shape<T>::Sum *rows_m, *rows_s, *cols_m, *cols_s;
  int64_t span_x, span_y;
  bool bounded;
};

template <class T, bool CIRCLE>
struct RowStats : Block<T> {
  using Base = Block<T>;
  using S = typename Base::S;
  using A = typename Base::A;
  using Base::C, Base::p, Base::z, Base::set;

  // Of a tile's columns, one for each warp.
  struct ColumnSums {
    LogSum<A> of[S::WARPS][2][S::COLS];
  };
  static constexpr int BYTES = Base::BYTES + int(sizeof(ColumnSums));

  const Partial<T>& to;
  LogSum<A> rows[2][S::R];  // of this thread's columns alone
  uint32_t same[S::R];      // bit b: pair (a, b) is positive

  PAIRLOSS_DEVICE RowStats(const Pairs<T>& pairs, const Partial<T>& partial) : Base(pairs), to(partial) {}

  PAIRLOSS_DEVICE ColumnSums& columns() { return *reinterpret_cast<ColumnSums*>(this->after_shared()); }

  PAIRLOSS_DEVICE bool in_set(int k, int a, int b) const { return set != MIXED || int(same[a] >> b & 1) == 1 - k; }

  // z, or where no logit needs a shift e^z: of which the term of a sum with the shift m is this.
  PAIRLOSS_DEVICE A term(A v, A m) const { return to.bounded ? v : exponential(v - m); }
  PAIRLOSS_DEVICE A least_shift() const { return to.bounded ? A(0) : LOWEST<A>; }

  PAIRLOSS_DEVICE void logits() {
    const A cutoff = this->cutoff();
#pragma unroll
    for (int a = 0; a < S::R; ++a) same[a] = 0;
    this->for_pairs([&](int a, int b, int row, int col) {
      const bool positive = this->same_id(row, col);
      same[a] |= uint32_t(positive) << b;
      A slope;
      const A v = this->template logit<CIRCLE>(z[a][b], row, col, positive, cutoff, &slope);
      z[a][b] = to.bounded ? exponential(v) : v;
    });
  }

  PAIRLOSS_DEVICE void add_to_rows() {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      if (set == 1 - k) continue;
#pragma unroll
      for (int a = 0; a < S::R; ++a) {
        LogSum<A>& sum = rows[k][a];
        A top = to.bounded ? A(0) : sum.m, total = 0;
        if (!to.bounded) {
#pragma unroll
          for (int b = 0; b < C; ++b) top = in_set(k, a, b) ? larger(top, z[a][b]) : top;
        }
#pragma unroll
        for (int b = 0; b < C; ++b) total += in_set(k, a, b) ? term(z[a][b], top) : A(0);
        sum.s = (to.bounded ? sum.s : sum.s * exponential(sum.m - top)) + total;
        sum.m = top;
      }
    }
  }

  // first: the columns before it are rows of the tile, whose sums have these pairs already.
  PAIRLOSS_DEVICE void add_to_columns(int group, int64_t first) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      if (set == 1 - k) continue;
#pragma unroll
      for (int b = 0; b < C; ++b) {
        LogSum<A> sum;
        sum.m = least_shift();
        if (!to.bounded) {
#pragma unroll
          for (int a = 0; a < S::R; ++a) sum.m = in_set(k, a, b) ? larger(sum.m, z[a][b]) : sum.m;
          Base::reduce_column([&](int mask) { sum.m = larger(sum.m, shuffle_xor(sum.m, mask)); });
        }
#pragma unroll
        for (int a = 0; a < S::R; ++a) sum.s += in_set(k, a, b) ? term(z[a][b], sum.m) : A(0);
        Base::reduce_column([&](int mask) { sum.s += shuffle_xor(sum.s, mask); });
        if (lane() < S::LANES) columns().of[warp()][k][col_of<T, S::PAIR_RUN>(b)] = sum;
      }
    }
    sync_block();
    for (int at = thread(); at < 2 * S::COLS; at += S::THREADS) {
      const int k = at / S::COLS, col = at % S::COLS;
      const int64_t j = this->j0 + col;
      if (set == 1 - k || j >= p.y.n || j < first) continue;
      LogSum<A> sum = columns().of[0][k][col];
      for (int w = 1; w < S::WARPS; ++w) sum.add(columns().of[w][k][col]);
      add_to_memory(to.cols_m, to.cols_s, group, k, p.y.n, j, sum);
    }
  }

  // To an entry that no other block touches.
  PAIRLOSS_DEVICE void add_to_memory(A* m, A* s, int group, int k, int64_t n, int64_t at, LogSum<A> sum) {
    const int64_t place = (int64_t(group) * p.sets + entry_of(k, p.sets)) * n + at;
    LogSum<A> old;
    old.m = m[place];
    old.s = s[place];
    sum.add(old);
    m[place] = sum.m;
    s[place] = sum.s;
  }

  PAIRLOSS_DEVICE void put_rows(int group) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      if (p.sets == 1 && k == POSITIVES) continue;
#pragma unroll
      for (int a = 0; a < S::R; ++a) {
        LogSum<A> sum = rows[k][a];
        Base::reduce_row([&](int mask) {
          LogSum<A> other;
          other.s = shuffle_xor(sum.s, mask);
          other.m = shuffle_xor(sum.m, mask);
          sum.add(other);
        });
        const int64_t i = this->i0 + row_of<T>(a);
        if (lane() % S::LANES == 0 && i < p.x.n) add_to_memory(to.rows_m, to.rows_s, group, k, p.x.n, i, sum);
      }
    }
  }

  // Block (b, a): a group of tile rows against a group of tile columns. x against itself: the tiles on and above the diagonal, whose
  // column sums are the row sums of their transposes.
  PAIRLOSS_DEVICE void run() {
    const int group_y = int(block().x), group_x = int(block().y);
    const int i_begin = int(group_x * to.span_x), j_group = int(group_y * to.span_y);
    const int i_end = i_begin + to.span_x < p.x.tiles ? int(i_begin + to.span_x) : p.x.tiles;
    const int j_end = j_group + to.span_y < p.y.tiles ? int(j_group + to.span_y) : p.y.tiles;
    const int chunks = int(p.d / S::CHUNK);
    for (int i = i_begin; i < i_end; ++i) {
      const int diagonal = p.symmetric ? i * (S::ROWS / S::COLS) : 0, j_begin = diagonal > j_group ? diagonal : j_group;
      if (j_begin >= j_end) break;  // and so it is for the rows below
      const int64_t i0 = int64_t(i) * S::ROWS, past_diagonal = p.symmetric ? i0 + S::ROWS : 0;
      sync_block();
      this->carry(this->shared().x, p.x, i0);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
#pragma unroll
        for (int a = 0; a < S::R; ++a) {
          rows[k][a] = LogSum<A>();
          rows[k][a].m = least_shift();
        }
      }
      this->fetch(true, i0, int64_t(j_begin) * S::COLS, 0);
      for (int j = j_begin; j < j_end; ++j) {
        this->place(i, j);
        for (int k = 0; k < chunks; ++k) {
          this->next_turn();
          if (k == 0) this->carry(this->shared().y, p.y, this->j0);
          if (k + 1 < chunks) {
            this->fetch(true, i0, this->j0, k + 1);
          } else if (j + 1 < j_end) {
            this->fetch(true, i0, this->j0 + S::COLS, 0);
          }
          add_products<T, C>(z, this->chunk_of_x(), this->chunk_of_y());
        }
        sync_block();  // what the columns carry is there
        logits();
        add_to_rows();
        if (to.cols_m && this->j0 + S::COLS > past_diagonal) add_to_columns(group_x, past_diagonal);
      }
      put_rows(group_y);
    }
  }
};

template <class T, bool CIRCLE>
PAIRLOSS_KERNEL void __launch_bounds__(Shape<T>::THREADS, sizeof(T) == 8 ? 2 : 3) row_stats_kernel(const Pairs<T> pairs, const Partial<T> to) {
  RowStats<T, CIRCLE>(pairs, to).run();
}

}  // namespace pairloss::cuda
