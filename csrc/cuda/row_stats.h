// Sums of e^z over each set of each row and column: see engine.h's Partials.
#pragma once

#include "pairs.h"

namespace pairloss::cuda {

// A sum s e^m. BOUNDED: m is 0.
template <class A, bool BOUNDED>
struct LogSum {
  A s = 0, m = BOUNDED ? A(0) : LOWEST<A>;

  PAIRLOSS_DEVICE void add(const LogSum& other) {
    if constexpr (BOUNDED) {
      s += other.s;
    } else {
      const A top = larger(m, other.m);
      s = s * exponential(m - top) + other.s * exponential(other.m - top);
      m = top;
    }
  }
};

template <class T>
struct Partial {
  typename Shape<T>::Sum *rows_m, *rows_s, *cols_m, *cols_s;
  int64_t span_x, span_y;
  bool bounded;
};

template <class T, bool CIRCLE, bool BOUNDED>
struct RowStats : Block<T> {
  using Base = Block<T>;
  using S = typename Base::S;
  using A = typename Base::A;
  using Base::C, Base::p, Base::z, Base::set;
  using Sum = LogSum<A, BOUNDED>;

  // Of a tile's columns: what each row of threads has, with a shift for each warp. Rows are on different banks.
  struct ColumnSums {
    A s[S::WARPS * S::ROW_LANES][S::COLS + 8], m[S::WARPS][S::COLS];
  };
  static constexpr int BYTES = Base::BYTES + int(sizeof(ColumnSums));

  const Partial<T>& to;
  Sum rows[2][S::R];  // of this thread's columns alone

  PAIRLOSS_DEVICE RowStats(const Pairs<T>& pairs, const Partial<T>& partial) : Base(pairs), to(partial) {}

  PAIRLOSS_DEVICE ColumnSums& columns() { return *reinterpret_cast<ColumnSums*>(this->after_shared()); }

  // z = the logits, or at once e^z where it needs no shift: of which the term of a sum with the shift m is this.
  PAIRLOSS_DEVICE A term(A v, A m) const {
    if constexpr (BOUNDED) {
      return v;
    } else {
      return exponential_of_pair<T>(v - m);
    }
  }

  PAIRLOSS_DEVICE void logits() {
    this->for_pairs([&](int a, int b, int row, int col, bool positive, bool counts) {
      A slope;
      const A v = this->template logit<CIRCLE>(z[a][b], row, col, positive, counts, &slope);
      z[a][b] = BOUNDED ? exponential_of_pair<T>(v) : v;
    });
  }

  template <class F>
  PAIRLOSS_DEVICE void add_to_rows(Sum (&sums)[S::R], F in_set) {
#pragma unroll
    for (int a = 0; a < S::R; ++a) {
      Sum of_tile;
      of_tile.m = sums[a].m;
      if constexpr (!BOUNDED) {
#pragma unroll
        for (int b = 0; b < C; ++b) of_tile.m = in_set(a, b) ? larger(of_tile.m, z[a][b]) : of_tile.m;
      }
#pragma unroll
      for (int b = 0; b < C; ++b) of_tile.s += in_set(a, b) ? term(z[a][b], of_tile.m) : A(0);
      sums[a].add(of_tile);
    }
  }

  // first: the columns before it are rows of the tile, whose sums have these pairs already.
  template <class F>
  PAIRLOSS_DEVICE void add_to_columns(int k, int group, int64_t first, F in_set) {
#pragma unroll
    for (int b = 0; b < C; ++b) {
      const int col = col_of<T, S::PAIR_RUN>(b);
      Sum sum;
      if constexpr (!BOUNDED) {
#pragma unroll
        for (int a = 0; a < S::R; ++a) sum.m = in_set(a, b) ? larger(sum.m, z[a][b]) : sum.m;
        Base::reduce_column([&](int mask) { sum.m = larger(sum.m, shuffle_xor(sum.m, mask)); });
        if (row_lane<T>() == 0) columns().m[warp()][col] = sum.m;
      }
#pragma unroll
      for (int a = 0; a < S::R; ++a) sum.s += in_set(a, b) ? term(z[a][b], sum.m) : A(0);
      columns().s[warp() * S::ROW_LANES + row_lane<T>()][col] = sum.s;
    }
    sync_block();
    this->template share<S::COLS>([&](int col) {
      const int64_t j = this->j0 + col;
      if (j >= p.y.n || j < first) return;
      Sum sum;
#pragma unroll
      for (int w = 0; w < S::WARPS; ++w) {
        Sum of_warp;
        if constexpr (!BOUNDED) of_warp.m = columns().m[w][col];
#pragma unroll
        for (int r = 0; r < S::ROW_LANES; ++r) of_warp.s += columns().s[w * S::ROW_LANES + r][col];
        sum.add(of_warp);
      }
      add_to_memory(to.cols_m, to.cols_s, group, k, p.y.n, j, sum);
    });
  }

  // To an entry that no other block touches.
  PAIRLOSS_DEVICE void add_to_memory(A* m, A* s, int group, int k, int64_t n, int64_t at, Sum sum) {
    const int64_t place = (int64_t(group) * p.sets + entry_of(k, p.sets)) * n + at;
    Sum old;
    if constexpr (!BOUNDED) old.m = m[place];
    old.s = s[place];
    sum.add(old);
    if constexpr (!BOUNDED) m[place] = sum.m;
    s[place] = sum.s;
  }

  PAIRLOSS_DEVICE void put_rows(int group) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      if (p.sets == 1 && k == POSITIVES) continue;
#pragma unroll
      for (int a = 0; a < S::R; ++a) {
        Sum sum = rows[k][a];
        Base::reduce_row([&](int mask) {
          Sum other;
          other.s = shuffle_xor(sum.s, mask);
          if constexpr (!BOUNDED) other.m = shuffle_xor(sum.m, mask);
          sum.add(other);
        });
        const int64_t i = this->i0 + row_of<T>(a);
        if (col_lane<T>() == 0 && i < p.x.n) add_to_memory(to.rows_m, to.rows_s, group, k, p.x.n, i, sum);
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
    const int chunks = p.d / S::CHUNK;
    for (int i = i_begin; i < i_end; ++i) {
      const int diagonal = p.symmetric ? i * (S::ROWS / S::COLS) : 0, j_begin = diagonal > j_group ? diagonal : j_group;
      if (j_begin >= j_end) break;  // and so it is for the rows below
      const int64_t i0 = int64_t(i) * S::ROWS, past_diagonal = p.symmetric ? i0 + S::ROWS : 0;
      sync_block();
      this->carry(this->shared().x, p.x, i0);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
#pragma unroll
        for (int a = 0; a < S::R; ++a) rows[k][a] = Sum();
      }
      this->fetch(true, i0, int64_t(j_begin) * S::COLS, 0);
      for (int j = j_begin; j < j_end; ++j) {
        this->place(i, j);
        for (int k = 0; k < chunks; ++k) {
          this->next_turn();
          if (k + 1 < chunks) {
            this->fetch(true, i0, this->j0, k + 1);
          } else if (j + 1 < j_end) {
            this->fetch(true, i0, this->j0 + S::COLS, 0);
          }
          if (k == 0) this->carry(this->shared().y, p.y, this->j0);
          add_products<T, C>(z, this->chunk_of_x(), this->chunk_of_y());
        }
        sync_block();  // what the columns carry is there
        this->sort_pairs(true);
        logits();
        const bool with_columns = to.cols_m && this->j0 + S::COLS > past_diagonal;
        const auto add = [&](int k, auto in_set) {
          add_to_rows(rows[k], in_set);
          if (with_columns) add_to_columns(k, group_x, past_diagonal, in_set);
        };
        if (set == MIXED) {
          add(POSITIVES, [&](int a, int b) { return this->is_positive(a, b); });
          sync_block();  // all are done with the columns' sums
          add(NEGATIVES, [&](int a, int b) { return !this->is_positive(a, b); });
        } else if (set == POSITIVES) {
          add(POSITIVES, [](int, int) { return true; });
        } else {
          add(NEGATIVES, [](int, int) { return true; });
        }
      }
      put_rows(group_y);
    }
  }
};

template <class T, bool CIRCLE>
PAIRLOSS_KERNEL void __launch_bounds__(Shape<T>::THREADS, sizeof(T) == 8 ? 2 : 3) row_stats_kernel(const Pairs<T> pairs, const Partial<T> to) {
  if (to.bounded) {
    RowStats<T, CIRCLE, true>(pairs, to).run();
  } else {
    RowStats<T, CIRCLE, false>(pairs, to).run();
  }
}

}  // namespace pairloss::cuda
