r"""pairloss.ops.row_stats on a GPU: products, biases, label masks, log-sums and their gradients in one pass each.

    z_ij = score(<x_i, y_j>) + row_bias_i + col_bias_j                         x [N, D], y [M, D], statistics [K, N]
    sum_ki = sum over j in set k of e^z_ij                                     set 0: the positives, 1: the negatives
    A_ij = g_ki e^(z_ij - l_ki) + h_kj e^(z_ij - m_kj)                         set k is the one that the pair is in
    dx_i = sum_j A_ij y_j,  drow_bias_i = sum_j A_ij                           dy: the same with the sides swapped

with weights (g, l) of the rows and (h, m) of the columns. x against itself: they are the same, A is both roles of a pair.
The N x M matrix is never materialised: the forward pass keeps sums, at most launch.GROUPS per row; the backward pass keeps a row
tile's gradient in registers, or for large D a slab of A of at most launch.SLAB_BYTES or one row of tiles. No atomics: the same
input gives the same bits. No host synchronisation.
"""

import triton
import triton.language as tl

from ._math import (
    ACCUMULATOR,
    LOG2E,
    LOWEST,
    add_log_sums,
    add_to_memory,
    blocked_product,
    capped_exp2,
    dot,
    less,
    load_rows,
    log_sum,
    outer_sum,
    score,
    shifted,
    used,
)

# Log-sums this close together share one shift in the middle: e^(shift - lse) stays within e^27.5 of 1, so nothing overflows,
# and what underflows is below e^-55 of its row's sum.
WIDTH = tl.constexpr(55.0)
# A shift rounded to float32 is off by at most 64 up to here, which an exponential survives.
LARGEST = tl.constexpr(2.0**30)


@triton.jit
def load_side(p_ids, p_bias, p_weights, o, N, SETS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ROLE: tl.constexpr):
    """(ids, bias, g_0, g_1, lse_0, lse_1) of the rows o; what the call doesn't have is a placeholder."""
    ids = o
    bias = o.to(tl.float32)
    g_0 = bias
    g_1 = bias
    lse_0 = bias
    lse_1 = bias
    if SETS == 2:
        ids = tl.load(p_ids + o)
    if HAS_BIAS:
        bias = tl.load(p_bias + o)
    if HAS_ROLE:
        g_0 = tl.load(p_weights + o)
        g_1 = tl.load(p_weights + (SETS - 1) * N + o)
        lse_0 = tl.load(p_weights + SETS * N + o)
        lse_1 = tl.load(p_weights + (2 * SETS - 1) * N + o)
    return ids, bias, g_0, g_1, lse_0, lse_1


@triton.jit
def tile_set(p_range_x, p_range_y, i, j, T_X, T_Y, SETS: tl.constexpr):
    """The one set that all pairs of the tile are in, or 2 if they are mixed; from the (least, greatest) ids of its sides."""
    if SETS == 1:
        return 0
    else:
        low_x = tl.load(p_range_x + i)
        high_x = tl.load(p_range_x + T_X + i)
        low_y = tl.load(p_range_y + j)
        high_y = tl.load(p_range_y + T_Y + j)
        apart = (high_x < low_y) | (high_y < low_x)
        one = (low_x == high_x) & (low_y == high_y) & (low_x == low_y)
        return tl.where(apart, 1, tl.where(one, 0, 2))


@triton.jit
def tile_logits(
    s, x, y, i, j, N, M, self_offset, HAS_SELF: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """z of tile (i, j); -inf at the pairs left out and beyond the edges."""
    z = score(used(s.to(tl.float32)))
    if HAS_BIAS:
        z += x[1][:, None] + y[1][None, :]  # the biases first: z_ij and z_ji round alike
    i0 = i * BLOCK_M
    j0 = j * BLOCK_N
    masked = (i0 + BLOCK_M > N) | (j0 + BLOCK_N > M)
    if HAS_SELF:
        first = i0 + self_offset - j0
        masked = masked | ((first > -BLOCK_M) & (first < BLOCK_N))
    if masked:
        o_x = i0 + tl.arange(0, BLOCK_M)
        o_y = j0 + tl.arange(0, BLOCK_N)
        m_pairs = (o_x < N)[:, None] & (o_y < M)[None, :]
        if HAS_SELF:
            m_pairs = m_pairs & ((o_x + self_offset)[:, None] != o_y[None, :])
        z = tl.where(m_pairs, z, float("-inf"))
    return z


@triton.jit
def add_tile(v, m, s, p_m, p_s, m_cols, COLS: tl.constexpr, BOUNDED: tl.constexpr):
    """Adds a tile's row sums to (m, s), which it returns, and its column sums to those in memory."""
    m_tile, s_tile = log_sum(v, 1, BOUNDED)
    m, s = add_log_sums(m, s, m_tile, s_tile, BOUNDED)
    if COLS:
        m_tile, s_tile = log_sum(v, 0, BOUNDED)
        add_to_memory(p_m, p_s, m_cols, m_tile, s_tile, BOUNDED)
    return m, s


@triton.jit(do_not_specialize=["N", "M", "T_X", "T_Y", "self_offset", "span_x", "span_y"])
def row_stats_fwd_kernel(
    p_x, p_y, p_ids_x, p_ids_y, p_range_x, p_range_y, p_bias_x, p_bias_y,
    p_rows_m, p_rows_s, p_cols_m, p_cols_s,
    N, M, D, T_X, T_Y, span_x, span_y, self_offset,
    SETS: tl.constexpr, HAS_SELF: tl.constexpr, HAS_BIAS: tl.constexpr, SYMMETRIC: tl.constexpr, COLS: tl.constexpr,
    BOUNDED: tl.constexpr, PRECISION: tl.constexpr, EVEN_D: tl.constexpr, WHOLE_D: tl.constexpr,
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
        x = load_side(p_ids_x, p_bias_x, p_bias_x, o_x, N, SETS, HAS_BIAS, False)
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
                b_y = load_rows(p_y, o_y, o_d, D, EVEN_D)
                s = dot(b_x, b_y.T, tl.zeros([BLOCK_M, BLOCK_N], ACCUMULATOR), PRECISION)
            else:
                s = blocked_product(p_x, p_y, o_x, o_y, D, EVEN_D, BLOCK_D, PRECISION)
            y = load_side(p_ids_y, p_bias_y, p_bias_y, o_y, M, SETS, HAS_BIAS, False)
            v = tile_logits(s, x, y, i, j, N, M, self_offset, HAS_SELF, HAS_BIAS, BLOCK_M, BLOCK_N)
            if BOUNDED:
                v = tl.exp(v)

            m_cols = o_j < M
            if SYMMETRIC:
                m_cols = m_cols & (j * BLOCK_N >= (i + 1) * BLOCK_M)  # the diagonal's row sums see both (i, j) and (j, i)
            only = tile_set(p_range_x, p_range_y, i, j, T_X, T_Y, SETS)
            if only < 2:
                o = only * M + o_j
                m, t = tl.where(only == 0, m_0, m_1), tl.where(only == 0, s_0, s_1)
                m, t = add_tile(v, m, t, p_cols_m + o, p_cols_s + o, m_cols, COLS, BOUNDED)
                m_0, s_0 = tl.where(only == 0, m, m_0), tl.where(only == 0, t, s_0)
                m_1, s_1 = tl.where(only == 0, m_1, m), tl.where(only == 0, s_1, t)
            else:
                outside = 0.0 if BOUNDED else float("-inf")
                same = x[0][:, None] == y[0][None, :]
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
def tile_weights(
    z, x, y, i, j, p_range_x, p_range_y, p_log_sums_x, p_log_sums_y, T_X, T_Y,
    SETS: tl.constexpr, ROLE_X: tl.constexpr, ROLE_Y: tl.constexpr,
):  # fmt: skip
    """A of tile (i, j), from its logits. The score is linear: A is also the weight of the second product."""
    only = tile_set(p_range_x, p_range_y, i, j, T_X, T_Y, SETS)
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
            w = tl.where(x[0][:, None] == y[0][None, :], u_0, u_1) * exp_z
    else:
        same = x[0][:, None] == y[0][None, :]
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


@triton.jit(do_not_specialize=["N", "M", "T_X", "T_Y", "self_offset"])
def row_stats_bwd_kernel(
    p_x, p_y, p_ids_x, p_ids_y, p_range_x, p_range_y, p_bias_x, p_bias_y, p_weights_x, p_weights_y, p_log_sums_x, p_log_sums_y,
    p_unscale, p_dx, p_dbias,
    N, M, D, T_X, T_Y, self_offset,
    SETS: tl.constexpr, HAS_SELF: tl.constexpr, HAS_BIAS: tl.constexpr, ROLE_X: tl.constexpr, ROLE_Y: tl.constexpr,
    BIAS_GRAD: tl.constexpr, PRECISION: tl.constexpr, EVEN_D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program i owns row tile i of dx, in registers, and visits all tile columns."""
    i = tl.program_id(0)
    o_d = tl.arange(0, BLOCK_D)
    o_i = i * BLOCK_M + tl.arange(0, BLOCK_M)
    o_x = tl.minimum(o_i, N - 1)
    x = load_side(p_ids_x, p_bias_x, p_weights_x, o_x, N, SETS, HAS_BIAS, ROLE_X)
    b_x = load_rows(p_x, o_x, o_d, D, EVEN_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], ACCUMULATOR)
    acc_bias = tl.zeros([BLOCK_M], tl.float32)

    for j in tl.range(0, T_Y):
        o_y = tl.minimum(j * BLOCK_N + tl.arange(0, BLOCK_N), M - 1)
        b_y = load_rows(p_y, o_y, o_d, D, EVEN_D)
        s = dot(b_x, b_y.T, tl.zeros([BLOCK_M, BLOCK_N], ACCUMULATOR), PRECISION)
        y = load_side(p_ids_y, p_bias_y, p_weights_y, o_y, M, SETS, HAS_BIAS, ROLE_Y)
        z = tile_logits(s, x, y, i, j, N, M, self_offset, HAS_SELF, HAS_BIAS, BLOCK_M, BLOCK_N)
        w = tile_weights(z, x, y, i, j, p_range_x, p_range_y, p_log_sums_x, p_log_sums_y, T_X, T_Y, SETS, ROLE_X, ROLE_Y)
        if BIAS_GRAD:
            acc_bias += tl.sum(w, 1)
        acc = dot(w.to(b_y.dtype), b_y, acc, PRECISION)

    unscale = tl.load(p_unscale)
    m_rows = o_i < N
    p_dx += o_i.to(tl.int64)[:, None] * D + o_d[None, :]
    tl.store(p_dx, acc * unscale, m_rows[:, None] & (o_d < D)[None, :])
    if BIAS_GRAD:
        tl.store(p_dbias + o_i, acc_bias * unscale, m_rows)


@triton.jit(do_not_specialize=["N", "M", "T_X", "T_Y", "self_offset", "i_first", "span_x", "stride_slab"])
def row_stats_weights_kernel(
    p_x, p_y, p_ids_x, p_ids_y, p_range_x, p_range_y, p_bias_x, p_bias_y, p_weights_x, p_weights_y, p_log_sums_x, p_log_sums_y,
    p_slab, p_dbias,
    N, M, D, T_X, T_Y, self_offset, i_first, span_x, stride_slab, stride_dbias,
    SETS: tl.constexpr, HAS_SELF: tl.constexpr, HAS_BIAS: tl.constexpr, ROLE_X: tl.constexpr, ROLE_Y: tl.constexpr,
    BIAS_GRAD: tl.constexpr, PRECISION: tl.constexpr, EVEN_D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Writes tile (i, j) of A into the slab, which begins with tile row i_first, in the product dtype, and its row sums into
    row j of p_dbias. Programs next to each other share y's tile."""
    i = i_first + tl.program_id(0) % span_x
    j = tl.program_id(0) // span_x
    o_i = i * BLOCK_M + tl.arange(0, BLOCK_M)
    o_j = j * BLOCK_N + tl.arange(0, BLOCK_N)
    o_x = tl.minimum(o_i, N - 1)
    o_y = tl.minimum(o_j, M - 1)
    s = blocked_product(p_x, p_y, o_x, o_y, D, EVEN_D, BLOCK_D, PRECISION)
    x = load_side(p_ids_x, p_bias_x, p_weights_x, o_x, N, SETS, HAS_BIAS, ROLE_X)
    y = load_side(p_ids_y, p_bias_y, p_weights_y, o_y, M, SETS, HAS_BIAS, ROLE_Y)
    z = tile_logits(s, x, y, i, j, N, M, self_offset, HAS_SELF, HAS_BIAS, BLOCK_M, BLOCK_N)
    w = tile_weights(z, x, y, i, j, p_range_x, p_range_y, p_log_sums_x, p_log_sums_y, T_X, T_Y, SETS, ROLE_X, ROLE_Y)

    m_rows = o_i < N
    o_i -= i_first * BLOCK_M
    p_slab += o_i.to(tl.int64)[:, None] * stride_slab + o_j[None, :]
    tl.store(p_slab, w.to(p_slab.dtype.element_ty), m_rows[:, None] & (o_j < M)[None, :])
    if BIAS_GRAD:
        tl.store(p_dbias + j.to(tl.int64) * stride_dbias + o_i, tl.sum(w, 1), m_rows)
