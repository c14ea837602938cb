r"""pairloss.ops.pair_sum on a GPU: products, biases, label masks and sums of a term of every pair's logit in one pass.

    z_ij = <x_i, y_j> + row_bias_i + col_bias_j                                 x against itself: without col_bias
    sum_i = sum over j in the set of term(z_ij)
    W_ij = weight_i term'(z_ij);   dx = W y,  dy = W^T x,  drow_bias = W 1,  dcol_bias = W^T 1

The terms are of v = z over negatives (set 1) and v = -z over positives (set 0): softplus(v), or z itself ("linear"). v is -inf
at pairs that don't count. The backward kernels are those of backward.py. Never materialised: more than a tile of pairs, or at
most operands.GROUPS sums per row. No atomics: the same input gives the same bits. No host synchronisation.
"""

import triton
import triton.language as tl

from ._math import blocked_product, load_rows, product, sigmoid, softplus
from .pairs import leave_out, load_side, same_id, tile_set


@triton.jit
def signed(v, OVER: tl.constexpr):
    """z as v, and v as z."""
    if OVER == 0:
        return -v
    else:
        return v


@triton.jit
def tile_products(
    s, x, y, i, j, only, N, M, self_offset,
    OVER: tl.constexpr, SETS: tl.constexpr, HAS_SELF: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """v of tile (i, j) before its biases; -inf at pairs that don't count."""
    v = leave_out(signed(s, OVER), i, j, N, M, self_offset, HAS_SELF, BLOCK_M, BLOCK_N)
    if SETS == 2 and only != OVER:
        v = tl.where(same_id(x, y) == (OVER == 0), v, float("-inf"))
    return v


@triton.jit
def biased(v, bias, OVER: tl.constexpr):
    """v with a bias of z; pairs that don't count stay out, also under an infinite one."""
    return tl.where(v == float("-inf"), v, v + signed(bias, OVER))


@triton.jit
def term_value(v, TERM: tl.constexpr, OVER: tl.constexpr):
    if TERM == "softplus":
        return softplus(v)
    else:
        return signed(tl.where(v == float("-inf"), 0.0, v), OVER)


@triton.jit
def term_weight(g, v, TERM: tl.constexpr, OVER: tl.constexpr):
    """g term'(z)."""
    if TERM == "softplus":
        return signed(g, OVER) * sigmoid(v)
    else:
        return tl.where(v == float("-inf"), 0.0, g)


@triton.jit
def term_weights(
    s, x, y, g_x, g_y, i, j, only, N, M, self_offset,
    TERM: tl.constexpr, OVER: tl.constexpr, SETS: tl.constexpr, HAS_SELF: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROLE_X: tl.constexpr, ROLE_Y: tl.constexpr, WITH_SUMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(W of the pairs whose anchor the row is, or the column if only it has that role; W of both roles; with WITH_SUMS the terms of the
    former), from the products."""
    v = tile_products(s, x, y, i, j, only, N, M, self_offset, OVER, SETS, HAS_SELF, BLOCK_M, BLOCK_N)
    if ROLE_X and ROLE_Y:  # x against itself: an anchor's bias counts in its own role only
        v_x = v
        v_y = v
        if HAS_BIAS:
            v_x = biased(v, x[1][:, None], OVER)
            v_y = biased(v, y[1][None, :], OVER)
        w = term_weight(g_x[:, None], v_x, TERM, OVER)
        both = w + term_weight(g_y[None, :], v_y, TERM, OVER)
    else:
        if HAS_BIAS:
            v = biased(v, x[1][:, None] + y[1][None, :], OVER)
        v_x = v
        w = term_weight(g_x[:, None] if ROLE_X else g_y[None, :], v, TERM, OVER)
        both = w
    terms = w
    if WITH_SUMS:
        terms = term_value(v_x, TERM, OVER)
    return w, both, terms


@triton.jit
def visits(p_visits, i, T_X, T_Y, HAS_VISITS: tl.constexpr):
    """(begin, length, count): tile row i visits `count` tile columns in order, skipping `length` of them from `begin` on."""
    if HAS_VISITS:
        return tl.load(p_visits + i), tl.load(p_visits + T_X + i), tl.load(p_visits + 2 * T_X + i)
    else:
        return T_Y, 0, T_Y


@triton.jit
def visited(number, begin, length):
    return number + tl.where(number >= begin, length, 0)


@triton.jit(do_not_specialize=["N", "M", "T_X", "T_Y", "self_offset"])
def pair_sum_fwd_kernel(
    p_x, p_y, p_ids_x, p_ids_y, p_range_x, p_range_y, p_bias_x, p_bias_y, p_visits,
    p_sums,
    N, M, D, T_X, T_Y, self_offset,
    TERM: tl.constexpr, OVER: tl.constexpr, SETS: tl.constexpr, HAS_SELF: tl.constexpr, HAS_BIAS: tl.constexpr,
    SYMMETRIC: tl.constexpr, HAS_VISITS: tl.constexpr, PRECISION: tl.constexpr, EVEN_D: tl.constexpr, WHOLE_D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (j, g) of (T_Y, groups): the g-th part of the tile rows that tile column j visits, into row g of p_sums. The anchors are the
    columns, whose terms stay in registers, one above the other, as in row_stats."""
    j = tl.program_id(0)
    group = tl.program_id(1)
    o_d = tl.arange(0, BLOCK_D)
    o_j = j * BLOCK_N + tl.arange(0, BLOCK_N)
    o_y = tl.minimum(o_j, M - 1)
    y = load_side(p_ids_y, p_bias_y, o_y, SETS, HAS_BIAS)
    if WHOLE_D:
        b_y_t = load_rows(p_y, o_y, o_d, D, EVEN_D).T
    begin, length, count = visits(p_visits, j, T_Y, T_X, HAS_VISITS)
    span = tl.cdiv(count, tl.num_programs(1))
    terms = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)

    for number in tl.range(group * span, tl.minimum((group + 1) * span, count)):
        i = visited(number, begin, length)
        o_x = tl.minimum(i * BLOCK_M + tl.arange(0, BLOCK_M), N - 1)
        if WHOLE_D:
            s = product(load_rows(p_x, o_x, o_d, D, EVEN_D), b_y_t, PRECISION)
        else:
            s = blocked_product(p_x, p_y, o_x, o_y, D, D, EVEN_D, BLOCK_D, PRECISION)
        x = load_side(p_ids_x, p_bias_x, o_x, SETS, HAS_BIAS and not SYMMETRIC)
        only = tile_set(p_range_x, p_range_y, i, j, T_X, T_Y, SETS)
        v = tile_products(s, x, y, i, j, only, N, M, self_offset, OVER, SETS, HAS_SELF, BLOCK_M, BLOCK_N)
        if HAS_BIAS:
            v = biased(v, y[1][None, :], OVER)
            if not SYMMETRIC:
                v = biased(v, x[1][:, None], OVER)
        terms += term_value(v, TERM, OVER)

    tl.store(p_sums + group.to(tl.int64) * M + o_j, tl.sum(terms, 0), o_j < M)
