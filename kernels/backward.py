r"""The gradients of both primitives on a GPU, from the weights of row_stats.py and pair_sum.py.

    dx_i = sum_j W_ij y_j,  dbias_i = sum_j A_ij                               dy: the same with the sides swapped

W is never materialised: its tiles are formed from the products again, and a row tile's gradient stays in registers; for large
D a slab of W, of at most launch.SLAB_BYTES or one row of tiles, goes to the library's products, for both sides. No atomics,
no host synchronisation.
"""

import triton
import triton.language as tl

from ._math import ACCUMULATOR, blocked_product, dot, load_rows, product
from .pair_sum import term_weights, visited, visits
from .pairs import load_side, load_weights, same_id, tile_logits, tile_set
from .row_stats import exp_weights


@triton.jit
def tile_weights(
    s, x, y, i, j, only, role_x, role_y, p_cutoff, N, M, self_offset, m, gamma,
    TERM: tl.constexpr, OVER: tl.constexpr, SETS: tl.constexpr, SCORE: tl.constexpr, HAS_CUTOFF: tl.constexpr,
    HAS_SELF: tl.constexpr, HAS_BIAS: tl.constexpr, ROLE_X: tl.constexpr, ROLE_Y: tl.constexpr, BIAS_GRAD: tl.constexpr,
    WITH_SUMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(A, W, with WITH_SUMS the terms) of tile (i, j), from its products. Roles, what the rows of a side are as anchors: their weights in
    the tile's set, in set 0 if it is mixed, and where both sets' are; where the ranges of log-sums and the weights as (g, lse) are; which
    rows, of how many."""
    if TERM == "exp":
        z, slope = tile_logits(
            s, x, y, i, j, only, p_cutoff, N, M, self_offset, m, gamma,
            SETS, SCORE, HAS_CUTOFF, HAS_SELF, HAS_BIAS, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        a = exp_weights(z, x, y, i, j, only, role_x, role_y, SETS, ROLE_X, ROLE_Y, BLOCK_M, BLOCK_N)
        w = a
        if SCORE == "circle":
            w = a * slope
            if BIAS_GRAD:  # the weights of the positives come with the slope's sign
                a = tl.where(same_id(x, y), -a, a)
        return a, w, w
    else:
        return term_weights(
            s, x, y, role_x[0], role_y[0], i, j, only, N, M, self_offset,
            TERM, OVER, SETS, HAS_SELF, HAS_BIAS, ROLE_X, ROLE_Y, WITH_SUMS, BLOCK_M, BLOCK_N,
        )  # fmt: skip


@triton.jit(do_not_specialize=["N", "M", "T_X", "T_Y", "self_offset", "m", "gamma"])
def grads_kernel(
    p_x, p_y, p_ids_x, p_ids_y, p_range_x, p_range_y, p_bias_x, p_bias_y, p_weights_x, p_weights_y, p_log_sums_x, p_log_sums_y,
    p_given_x, p_given_y, p_cutoff, p_visits, p_unscale,
    p_dx, p_dbias,
    N, M, D, T_X, T_Y, self_offset, m, gamma,
    TERM: tl.constexpr, OVER: tl.constexpr, SETS: tl.constexpr, SCORE: tl.constexpr, HAS_CUTOFF: tl.constexpr,
    HAS_SELF: tl.constexpr, HAS_BIAS: tl.constexpr, ROLE_X: tl.constexpr, ROLE_Y: tl.constexpr, BIAS_GRAD: tl.constexpr,
    HAS_VISITS: tl.constexpr, PRECISION: tl.constexpr, EVEN_D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program i owns row tile i of dx, in registers, and visits the tile columns."""
    i = tl.program_id(0)
    o_d = tl.arange(0, BLOCK_D)
    o_i = i * BLOCK_M + tl.arange(0, BLOCK_M)
    o_x = tl.minimum(o_i, N - 1)
    b_x = load_rows(p_x, o_x, o_d, D, EVEN_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], ACCUMULATOR)
    acc_bias = tl.zeros([BLOCK_M], tl.float32)
    begin, length, count = visits(p_visits, i, T_X, T_Y, HAS_VISITS)

    for number in tl.range(0, count):
        j = visited(number, begin, length)
        o_y = tl.minimum(j * BLOCK_N + tl.arange(0, BLOCK_N), M - 1)
        only = tile_set(p_range_x, p_range_y, i, j, T_X, T_Y, SETS)
        x = load_side(p_ids_x, p_bias_x, o_x, SETS, HAS_BIAS)
        y = load_side(p_ids_y, p_bias_y, o_y, SETS, HAS_BIAS)
        first = tl.where(only == 1, 1, 0) if TERM == "exp" else 0
        role_x = load_weights(p_weights_x, first, o_x, N, ROLE_X), p_weights_x, p_log_sums_x, p_given_x, o_x, N
        role_y = load_weights(p_weights_y, first, o_y, M, ROLE_Y), p_weights_y, p_log_sums_y, p_given_y, o_y, M
        b_y = load_rows(p_y, o_y, o_d, D, EVEN_D)
        s = product(b_x, b_y.T, PRECISION)
        a, w, _ = tile_weights(
            s, x, y, i, j, only, role_x, role_y, p_cutoff, N, M, self_offset, m, gamma,
            TERM, OVER, SETS, SCORE, HAS_CUTOFF, HAS_SELF, HAS_BIAS, ROLE_X, ROLE_Y, BIAS_GRAD, False, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        if BIAS_GRAD:
            acc_bias += tl.sum(a, 1)
        acc = dot(w.to(b_y.dtype), b_y, acc, PRECISION)

    unscale = tl.load(p_unscale)
    m_rows = o_i < N
    p_dx += o_i.to(tl.int64)[:, None] * D + o_d[None, :]
    tl.store(p_dx, acc * unscale, m_rows[:, None] & (o_d < D)[None, :])
    if BIAS_GRAD:
        tl.store(p_dbias + o_i, acc_bias * unscale, m_rows)


@triton.jit(do_not_specialize=["N", "M", "T_X", "T_Y", "self_offset", "m", "gamma", "i_first", "span_x", "stride_slab", "stride_part"])
def weights_kernel(
    p_x, p_y, p_ids_x, p_ids_y, p_range_x, p_range_y, p_bias_x, p_bias_y, p_weights_x, p_weights_y, p_log_sums_x, p_log_sums_y,
    p_given_x, p_given_y, p_cutoff,
    p_slab, p_dbias, p_dbias_y, p_sums,
    N, M, D, T_X, T_Y, i_first, span_x, stride_slab, stride_part, self_offset, m, gamma,
    TERM: tl.constexpr, OVER: tl.constexpr, SETS: tl.constexpr, SCORE: tl.constexpr, HAS_CUTOFF: tl.constexpr,
    HAS_SELF: tl.constexpr, HAS_BIAS: tl.constexpr, ROLE_X: tl.constexpr, ROLE_Y: tl.constexpr, BIAS_GRAD: tl.constexpr,
    BIAS_GRAD_Y: tl.constexpr, WITH_SUMS: tl.constexpr, PRECISION: tl.constexpr, EVEN_D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Writes tile (i, j) of W into the slab, which begins with tile row i_first, in the product dtype; the row sums of A and of the terms
    into row j of p_dbias and p_sums, A's column sums into row i - i_first of p_dbias_y. Programs next to each other share y's tile."""
    i = i_first + tl.program_id(0) % span_x
    j = tl.program_id(0) // span_x
    o_i = i * BLOCK_M + tl.arange(0, BLOCK_M)
    o_j = j * BLOCK_N + tl.arange(0, BLOCK_N)
    o_x = tl.minimum(o_i, N - 1)
    o_y = tl.minimum(o_j, M - 1)
    columns = D
    only = tile_set(p_range_x, p_range_y, i, j, T_X, T_Y, SETS)
    if TERM != "exp" and SETS == 2:
        columns = tl.where(only == 1 - OVER, 0, D)  # a tile without pairs that count: weights of 0 from any product
    s = blocked_product(p_x, p_y, o_x, o_y, D, columns, EVEN_D, BLOCK_D, PRECISION)
    x = load_side(p_ids_x, p_bias_x, o_x, SETS, HAS_BIAS)
    y = load_side(p_ids_y, p_bias_y, o_y, SETS, HAS_BIAS)
    first = tl.where(only == 1, 1, 0) if TERM == "exp" else 0
    role_x = load_weights(p_weights_x, first, o_x, N, ROLE_X), p_weights_x, p_log_sums_x, p_given_x, o_x, N
    role_y = load_weights(p_weights_y, first, o_y, M, ROLE_Y), p_weights_y, p_log_sums_y, p_given_y, o_y, M
    a, w, terms = tile_weights(
        s, x, y, i, j, only, role_x, role_y, p_cutoff, N, M, self_offset, m, gamma,
        TERM, OVER, SETS, SCORE, HAS_CUTOFF, HAS_SELF, HAS_BIAS, ROLE_X, ROLE_Y, BIAS_GRAD or BIAS_GRAD_Y, WITH_SUMS, BLOCK_M, BLOCK_N,
    )  # fmt: skip

    m_rows = o_i < N
    if BIAS_GRAD_Y:
        tl.store(p_dbias_y + (i - i_first).to(tl.int64) * M + o_j, tl.sum(a, 0), o_j < M)
    o_i -= i_first * BLOCK_M
    p_slab += o_i.to(tl.int64)[:, None] * stride_slab + o_j[None, :]
    tl.store(p_slab, w.to(p_slab.dtype.element_ty), m_rows[:, None] & (o_j < M)[None, :])
    if BIAS_GRAD:
        tl.store(p_dbias + j.to(tl.int64) * stride_part + o_i, tl.sum(a, 1), m_rows)
    if WITH_SUMS:
        tl.store(p_sums + j.to(tl.int64) * stride_part + o_i, tl.sum(terms, 1), m_rows)
