// Gradients of one side, dx = W y, from the weights of both primitives: see engine.h's Gradients. A block owns a tile of dx's rows and a
// part of its columns, and visits a part of the candidates.
#pragma once

#include "pairs.h"

namespace pairloss::cuda {

enum class Form { LINEAR, CIRCLE, TERMS };  // exponentials of either score; terms of a pair sum

template <class T>
struct Gradient {
  using A = typename Shape<T>::Sum;
  int over, parts;
  bool softplus;
  const int32_t* visits;
  A *rows, *bias, *sums;
};

// Chunks of the gradient's columns that a block keeps in registers: 128 registers a thread; of doubles 64, whose terms take the others.
template <class T>
constexpr int GRADIENT_CHUNKS = Shape<T>::HALF ? 4 : sizeof(T) == 8 ? 4 : 8;

// Logarithms this close together share one shift in the middle: nothing overflows, and what underflows is below e^-55 of its row's sum.
constexpr double SPREAD = 55;

// e^v, finite also where v belongs to a weight of 0, which alone may meet a large v. NaN stays.
template <class T, class A>
PAIRLOSS_DEVICE A capped_exponential(A v) {
  constexpr A MOST = sizeof(A) == 8 ? 708 : 87;
  return exponential_of_pair<T>(v > MOST ? MOST : v);
}

template <class T, Form FORM, bool WITH_ROWS>
struct OwnedRows : Block<T> {
  using Base = Block<T>;
  using S = typename Base::S;
  using A = typename Base::A;
  using Base::C, Base::p, Base::z;
  static constexpr int G = S::CHUNK / S::LANES;  // columns of a thread in a chunk of the gradient
  static constexpr int CHUNKS = WITH_ROWS ? GRADIENT_CHUNKS<T> : 0;
  static constexpr int BYTES = Base::BYTES + (WITH_ROWS ? S::ROWS * S::WEIGHT_LINE : 0);

  const Gradient<T>& to;
  A acc[CHUNKS ? CHUNKS : 1][S::R][G];
  A bias[S::R], sums[S::R];  // of this thread's columns alone
  bool role_x, role_y;       // which sides have weights
  A shift = 0;
  bool shared_shift = false;

  PAIRLOSS_DEVICE OwnedRows(const Pairs<T>& pairs, const Gradient<T>& gradient)
      : Base(pairs), to(gradient), role_x(p.x.weights), role_y(p.y.weights) {}

  PAIRLOSS_DEVICE void widen(const A* ranges, int tiles, int tile, A* low, A* high) const {
    if (!ranges) return;
    for (int k = 0; k < 2; ++k) {
      if (this->set == 1 - k) continue;
      const A* of_set = ranges + entry_of(k, p.sets) * tiles + tile;
      const A least = of_set[0], greatest = of_set[p.sets * tiles];
      if (least < *low) *low = least;
      *high = larger(*high, greatest);
    }
  }

  // The shift of tile (i, j), if its weights lie close enough together for one.
  PAIRLOSS_DEVICE void find_shift(int i, int j) {
    A low = INFINITE<A>, high = -INFINITE<A>;
    widen(p.x.weight_ranges, p.x.tiles, i, &low, &high);
    widen(p.y.weight_ranges, p.y.tiles, j, &low, &high);
    shift = low > high ? A(0) : (low + high) / 2;
    shared_shift = high - low <= A(SPREAD);
  }

  // Weights of this tile; with a shared shift g e^(shift - m) in the place of g.
  template <int SIZE>
  PAIRLOSS_DEVICE void carry_weights(Carried<A, SIZE>& carried, const typename Pairs<T>::Of& side, int64_t first) {
    this->template share<2 * SIZE>([&](int at) {
      const int k = at / SIZE, row = at % SIZE;
      const int64_t i = first + row < side.n ? first + row : side.n - 1;
      const int64_t place = entry_of(k, p.sets) * side.n + i;
      A g = 0, m = 0;
      if (side.weights && FORM == Form::TERMS) {
        g = side.weights[i];
      } else if (side.weights && (p.sets == 2 || k == NEGATIVES)) {
        g = side.weights[place];
        m = side.weights[p.sets * side.n + place];
        if (shared_shift) g = g == 0 ? A(0) : g * exponential(shift - m);
      }
      carried.g[k][row] = g;
      carried.m[k][row] = m;
    });
  }

  // z = W, from the products; adds to what this thread sums along its rows.
  PAIRLOSS_DEVICE void weigh_exponentials() {
    const auto& x = this->shared().x;
    const auto& y = this->shared().y;
    this->sort_pairs(shared_shift);
    this->for_pairs([&](int a, int b, int row, int col, bool positive, bool counts) {
      const int k = positive ? POSITIVES : NEGATIVES;
      A slope;
      const A v = this->template logit<FORM == Form::CIRCLE>(z[a][b], row, col, positive, counts, &slope);
      A weight;
      if (this->uniform || shared_shift) {  // one exponential serves both roles
        weight = (x.g[k][row] + y.g[k][col]) * capped_exponential<T>(v - shift);
      } else {
        weight = x.g[k][row] * capped_exponential<T>(v - x.m[k][row]) + y.g[k][col] * capped_exponential<T>(v - y.m[k][col]);
      }
      bias[a] += weight;
      z[a][b] = weight * slope;
    });
  }

  // The term of v = sign z, -inf at pairs that don't count; and its derivative in z. The sign is -1 over positives, 1 over negatives.
  PAIRLOSS_DEVICE void term(A v, A sign, A* value, A* slope) const {
    if (to.softplus) {
      const A e = exponential_of_pair<T>(v < A(0) ? v : -v);
      *value = softplus<sizeof(A) == 8 ? 17 : 7, A>(v, e);
      *slope = sign * sigmoid<A>(v, e);
    } else {
      const bool none = v == -INFINITE<A>;
      *value = none ? A(0) : sign * v;
      *slope = none ? A(0) : A(1);
    }
  }

  PAIRLOSS_DEVICE void weigh_terms() {
    const auto& x = this->shared().x;
    const auto& y = this->shared().y;
    const A sign = to.over == POSITIVES ? -1 : 1;
    this->sort_pairs(true);
    this->for_pairs([&](int a, int b, int row, int col, bool positive, bool counts) {
      const bool none = !counts || positive != (to.over == POSITIVES);
      const A s = z[a][b];
      A value, slope, weight = 0, both = 0;
      if (role_x || !role_y) {  // x against itself: an anchor's bias counts in its own role only
        const A z_x = s + (p.symmetric ? x.bias[row] : x.bias[row] + y.bias[col]);
        term(none ? -INFINITE<A> : sign * z_x, sign, &value, &slope);
        sums[a] += value;
        weight = both = x.g[0][row] * slope;
      }
      if (role_y) {
        const A z_y = s + (p.symmetric ? y.bias[col] : x.bias[row] + y.bias[col]);
        term(none ? -INFINITE<A> : sign * z_y, sign, &value, &slope);
        const A of_col = y.g[0][col] * slope;
        both += of_col;
        if (!role_x) weight = of_col;
      }
      bias[a] += weight;
      z[a][b] = both;
    });
  }

  PAIRLOSS_DEVICE static void add_row(A* value) {
    Base::reduce_row([&](int mask) { *value += shuffle_xor(*value, mask); });
  }

  PAIRLOSS_DEVICE void put(int first_chunk, int count) {
    const int part = int(block().z);
    const bool first = block().y == 0;
#pragma unroll
    for (int a = 0; a < S::R; ++a) {
      const int64_t i = this->i0 + row_of<T>(a);
      if (to.bias) add_row(&bias[a]);
      if (to.sums) add_row(&sums[a]);
      if (i >= p.x.n) continue;
      const int64_t place = part * p.x.n + i;
      if (first && col_lane<T>() == 0) {
        if (to.bias) to.bias[place] = bias[a];
        if (to.sums) to.sums[place] = sums[a];
      }
#pragma unroll
      for (int k = 0; k < CHUNKS; ++k) {
        if (k >= count) break;
        A* out = to.rows + place * p.d + int64_t(first_chunk + k) * S::CHUNK;
#pragma unroll
        for (int c = 0; c < G; ++c) out[col_of<T, S::GRADIENT_RUN>(c)] = acc[k][a][c];
      }
    }
  }

  PAIRLOSS_DEVICE void run() {
    const int i = int(block().x), chunks = p.d / S::CHUNK, first_chunk = int(block().y) * CHUNKS;
    const int count = !WITH_ROWS || chunks - first_chunk < CHUNKS ? (WITH_ROWS ? chunks - first_chunk : 0) : CHUNKS;
    const int64_t i0 = int64_t(i) * S::ROWS;
    const int begin = to.visits ? to.visits[i] : p.y.tiles, length = to.visits ? to.visits[p.x.tiles + i] : 0;
    const int visits = to.visits ? to.visits[2 * p.x.tiles + i] : p.y.tiles, span = (visits + to.parts - 1) / to.parts;
    const int from = int(block().z) * span, until = from + span < visits ? from + span : visits;
    const auto visited = [&](int number) { return number + (number >= begin ? length : 0); };
    this->i0 = i0;
#pragma unroll
    for (int a = 0; a < S::R; ++a) {
      bias[a] = sums[a] = 0;
#pragma unroll
      for (int k = 0; k < CHUNKS; ++k) {
#pragma unroll
        for (int c = 0; c < G; ++c) acc[k][a][c] = 0;
      }
    }
    this->carry(this->shared().x, p.x, i0);
    if (from < until) this->fetch(true, i0, int64_t(visited(from)) * S::COLS, 0);
    for (int number = from; number < until; ++number) {
      const int j = visited(number);
      const auto fetch_next_tile = [&] {
        if (number + 1 < until) this->fetch(true, i0, int64_t(visited(number + 1)) * S::COLS, 0);
      };
      this->place(i, j);
      if constexpr (FORM != Form::TERMS) find_shift(i, j);
      for (int k = 0; k < chunks; ++k) {
        this->next_turn();
        if (k + 1 < chunks) {
          this->fetch(true, i0, this->j0, k + 1);
        } else if (count > 0) {
          this->fetch(false, i0, this->j0, first_chunk);
        } else {
          fetch_next_tile();
        }
        if (k == 0) {
          this->carry(this->shared().y, p.y, this->j0);
          carry_weights(this->shared().x, p.x, i0);
          carry_weights(this->shared().y, p.y, this->j0);
        }
        add_products<T, C>(z, this->chunk_of_x(), this->chunk_of_y());
      }
      sync_block();  // what rows and columns carry is there
      if constexpr (FORM == Form::TERMS) {
        weigh_terms();
      } else {
        weigh_exponentials();
      }
      if constexpr (WITH_ROWS) {
        Weights<T> weights{this->after_shared(), {}};
        weights.set(z);  // of a warp's rows, which no other warp reads
#pragma unroll
        for (int k = 0; k < CHUNKS; ++k) {
          if (k >= count) break;
          this->next_turn();
          if (k + 1 < count) {
            this->fetch(false, i0, this->j0, first_chunk + k + 1);
          } else {
            fetch_next_tile();
          }
          weights.template add_gradient<G>(acc[k], this->chunk_of_y());
        }
        sync_warp();
      }
    }
    put(first_chunk, count);
  }
};

template <class T, Form FORM, bool WITH_ROWS>
PAIRLOSS_KERNEL void __launch_bounds__(Shape<T>::THREADS, WITH_ROWS ? 2 : 3) gradients_kernel(const Pairs<T> pairs, const Gradient<T> to) {
  OwnedRows<T, FORM, WITH_ROWS>(pairs, to).run();
}

}  // namespace pairloss::cuda
