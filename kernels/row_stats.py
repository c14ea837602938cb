r"""pairloss.ops.row_stats on a GPU: products, biases, label masks and log-sums in one pass, and the weights for their gradients.

    z_ij = score(<x_i, y_j>) + row_bias_i + col_bias_j                         x [N, D], y [M, D], statistics [K, N]
    sum_ki = sum over j in set k of e^z_ij                                     set 0: the positives, 1: the negatives
    A_ij = g_ki e^(z_ij - l_ki) + h_kj e^(z_ij - m_kj)                         set k is the one that the pair is in
    W_ij = A_ij score'(s_ij)
    dx_i = sum_j W_ij y_j,  drow_bias_i = sum_j A_ij                           dy: the same with the sides swapped

with weights (g, l) of the rows and (h, m) of the columns. x against itself: they are the same, A is both roles of a pair.
The N x M matrix is never materialised: the forward pass keeps sums, at most operands.GROUPS per row; the backward kernels are those
of backward.py. No atomics: the same input gives the same bits. No host synchronisation.
"""

import triton
import triton.language as tl

from ._math import (
    LOG2E,
    LOWEST,
    add_log_sums,
    add_to_memory,
    blocked_product,
    capped_exp2,
    less,
    load_rows,
    log_sum,
    outer_sum,
    product,
    shifted,
)
from .pairs import load_side, same_id, tile_logits, tile_set

# Log-sums this close together share one shift in the middle: e^(shift - lse) stays within e^27.5 of 1, so nothing overflows,
# and what underflows is below e^-55 of its row's sum.
WIDTH = tl.constexpr(55.0)
# A shift rounded to float32 is off by at most 64 up to here, which an exponential survives.
LARGEST = tl.constexpr(2.0**30)


@triton.jit
def add_tile(v, m, s, p_m, p_s, m_cols, COLS: tl.constexpr, BOUNDED: tl.constexpr):
    """Adds a tile's row sums to (m, s), which it returns, and its column sums to those in memory."""
    m_tile, s_tile = log_sum(v, 1, BOUNDED)
    m, s = add_log_sums(m, s, m_tile, s_tile, BOUNDED)
    if COLS:
        m_tile, s_tile = log_sum(v, 0, BOUNDED)
        add_to_memory(p_m, p_s, m_cols, m_tile, s_tile, BOUNDED)
    return m, s


@triton.jit(do_not_specialize=["N", "M", "T_X", "T_Y", "self_offset", "span_x", "span_y", "m", "gamma"])
def row_stats_fwd_kernel(
    p_x, p_y, p_ids_x, p_ids_y, p_range_x, p_range_y, p_bias_x, p_bias_y, p_cutoff,
    p_rows_m, p_rows_s, p_cols_m, p_cols_s,
    N, M, D, T_X, T_Y, span_x, span_y, self_offset, m, gamma,
    SETS: tl.constexpr, SCORE: tl.constexpr, HAS_CUTOFF: tl.constexpr, HAS_SELF: tl.constexpr, HAS_BIAS: tl.constexpr,
    SYMMETRIC: tl.constexpr, COLS: tl.constexpr, BOUNDED: tl.constexpr,
    PRECISION: tl.constexpr, EVEN_D: tl.constexpr, WHOLE_D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (b, a): tile rows a * span_x ... against tile columns b * span_y ... .

    Row sums stay in registers until their columns are done. Column sums are added to group a's entry, row sums to group b's:
    no other program touches those. x against itself: tiles on and above the diagonal, whose column sums are the row sums of
    their transposes.
    """
    group_y = tl.program_id(0)
    group_x = tl.program_id(1)
    o_d = tl.arange(0, BLOCK_D)
    i_begin = group_x * span_x
    i_end = tl.minimum(i_begin + span_x, T_X)
    j_end = tl.minimum((group_y + 1) * span_y, T_Y)
    if SYMMETRIC:
        i_end = tl.where(group_y < group_x, i_begin, i_end)
    p_rows_m += group_y.to(tl.int64) * SETS * N
    p_rows_s += group_y.to(tl.int64) * SETS * N
    p_cols_m += group_x.to(tl.int64) * SETS * M
    p_cols_s += group_x.to(tl.int64) * SETS * M

    for i in range(i_begin, i_end):
        o_i = i * BLOCK_M + tl.arange(0, BLOCK_M)
        o_x = tl.minimum(o_i, N - 1)  # the last row again instead of rows that don't exist: their logits are masked
        x = load_side(p_ids_x, p_bias_x, p_bias_x, o_x, N, SETS, HAS_BIAS, False, "exp")
        if WHOLE_D:
            b_x = load_rows(p_x, o_x, o_d, D, EVEN_D)
        m_0 = tl.full([BLOCK_M], LOWEST, tl.float32)
        m_1 = tl.full([BLOCK_M], LOWEST, tl.float32)
        s_0 = tl.zeros([BLOCK_M], tl.float32)
        s_1 = tl.zeros([BLOCK_M], tl.float32)
        j_begin = group_y * span_y
        if SYMMETRIC:
            j_begin = tl.maximum(j_begin, i * (BLOCK_M // BLOCK_N))

        for j in tl.range(j_begin, j_end):
            o_j = j * BLOCK_N + tl.arange(0, BLOCK_N)
            o_y = tl.minimum(o_j, M - 1)
            if WHOLE_D:
                s = product(b_x, load_rows(p_y, o_y, o_d, D, EVEN_D), PRECISION)
            else:
                s = blocked_product(p_x, p_y, o_x, o_y, D, D, EVEN_D, BLOCK_D, PRECISION)
            y = load_side(p_ids_y, p_bias_y, p_bias_y, o_y, M, SETS, HAS_BIAS, False, "exp")
            only = tile_set(p_range_x, p_range_y, i, j, T_X, T_Y, SETS)
            v, _ = tile_logits(
                s, x, y, i, j, only, p_cutoff, N, M, self_offset, m, gamma,
                SETS, SCORE, HAS_CUTOFF, HAS_SELF, HAS_BIAS, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            if BOUNDED:
                v = tl.exp(v)

            m_cols = o_j < M
            if SYMMETRIC:
                m_cols = m_cols & (j * BLOCK_N >= (i + 1) * BLOCK_M)  # the diagonal's row sums see both (i, j) and (j, i)
            if only < 2:
                o = only * M + o_j
                top, t = tl.where(only == 0, m_0, m_1), tl.where(only == 0, s_0, s_1)
                top, t = add_tile(v, top, t, p_cols_m + o, p_cols_s + o, m_cols, COLS, BOUNDED)
                m_0, s_0 = tl.where(only == 0, top, m_0), tl.where(only == 0, t, s_0)
                m_1, s_1 = tl.where(only == 0, m_1, top), tl.where(only == 0, s_1, t)
            else:
                outside = 0.0 if BOUNDED else float("-inf")
                same = same_id(x, y)
                m_0, s_0 = add_tile(tl.where(same, v, outside), m_0, s_0, p_cols_m + o_j, p_cols_s + o_j, m_cols, COLS, BOUNDED)
                o = M + o_j
                m_1, s_1 = add_tile(tl.where(same, outside, v), m_1, s_1, p_cols_m + o, p_cols_s + o, m_cols, COLS, BOUNDED)

        add_to_memory(p_rows_m + o_i, p_rows_s + o_i, o_i < N, m_0, s_0, BOUNDED)
        if SETS == 2:
            add_to_memory(p_rows_m + N + o_i, p_rows_s + N + o_i, o_i < N, m_1, s_1, BOUNDED)
        tl.debug_barrier()  # what some threads added, others add to in the next row of tiles


@triton.jit
def log_sum_range(p_range, t, T, only, low, high, SETS: tl.constexpr):
    """(low, high) widened to the log-sums of row tile t in set `only`, or in both sets if that is 2."""
    first = tl.where(only == 2, 0, only)
    last = tl.where(only == 2, 1, only)
    low = tl.minimum(low, tl.minimum(tl.load(p_range + first * T + t), tl.load(p_range + last * T + t)))
    p_range += SETS * T
    high = tl.maximum(high, tl.maximum(tl.load(p_range + first * T + t), tl.load(p_range + last * T + t)))
    return low, high


@triton.jit
def exp_weights(z, x, y, i, j, only, p_log_sums_x, p_log_sums_y, T_X, T_Y, SETS: tl.constexpr, ROLE_X: tl.constexpr, ROLE_Y: tl.constexpr):
    """A of tile (i, j), from its logits."""
    low = float("inf")
    high = float("-inf")
    if ROLE_X:
        low, high = log_sum_range(p_log_sums_x, i, T_X, only, low, high, SETS)
    if ROLE_Y:
        low, high = log_sum_range(p_log_sums_y, j, T_Y, only, low, high, SETS)
    shift = tl.where(low <= high, (low + high) / 2 * LOG2E, 0.0)  # in units of log2(e); nothing but zero weights: inf, -inf
    _, _, g_x0, g_x1, lse_x0, lse_x1 = x
    _, _, g_y0, g_y1, lse_y0, lse_y1 = y

    if (high - low <= WIDTH) & (tl.abs(shift) <= LARGEST):  # one exponential serves both roles
        exp_z = capped_exp2(less(z, shift))
        if only < 2:
            u_x = shifted(tl.where(only == 0, g_x0, g_x1), tl.where(only == 0, lse_x0, lse_x1), shift)
            u_y = shifted(tl.where(only == 0, g_y0, g_y1), tl.where(only == 0, lse_y0, lse_y1), shift)
            w = outer_sum(u_x, u_y, ROLE_X, ROLE_Y) * exp_z
        else:
            u_0 = outer_sum(shifted(g_x0, lse_x0, shift), shifted(g_y0, lse_y0, shift), ROLE_X, ROLE_Y)
            u_1 = outer_sum(shifted(g_x1, lse_x1, shift), shifted(g_y1, lse_y1, shift), ROLE_X, ROLE_Y)
            w = tl.where(same_id(x, y), u_0, u_1) * exp_z
    else:
        same = same_id(x, y)
        if SETS == 1:
            same = same | True
        w = tl.zeros_like(z)
        if ROLE_X:
            lse = tl.where(same, lse_x0[:, None], lse_x1[:, None])
            w += tl.where(same, g_x0[:, None], g_x1[:, None]) * capped_exp2((z - lse) * LOG2E)
        if ROLE_Y:
            lse = tl.where(same, lse_y0[None, :], lse_y1[None, :])
            w += tl.where(same, g_y0[None, :], g_y1[None, :]) * capped_exp2((z - lse) * LOG2E)
    return w
