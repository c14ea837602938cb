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
    LN2,
    LOG2E,
    LOWEST,
    add_to_memory,
    blocked_product,
    capped_exp2,
    centre,
    exp,
    less,
    load_rows,
    log_sum,
    outer_sum,
    product,
    shifted,
)
from .pairs import load_side, load_weights, same_id, tile_logits, tile_set

# Log-sums this close together share one shift in the middle: e^(shift - lse) stays within e^27.5 of 1, so nothing overflows,
# and what underflows is below e^-55 of its row's sum.
WIDTH = tl.constexpr(55.0)
# A shift rounded to float32 is off by at most 64 up to here, which an exponential survives.
LARGEST = tl.constexpr(2.0**30)
# One shift serves all terms of a tile while each row's sum of them is in these bounds, and while each column has had one that is not
# below the least. A term that float32 then takes for 0 is less than 2^-66 of its sum. The rounding of a shift up to HELD is made good.
LEAST = tl.constexpr(2.0**-60)
MOST = tl.constexpr(2.0**60)
SPREAD = tl.constexpr(60.0)
HELD = tl.constexpr(2.0**24)


@triton.jit
def add_shifted(s, shift, p_m, p_s, m_entries, BOUNDED: tl.constexpr):
    """Adds s 2^shift to the sums s e^m in memory."""
    m = tl.zeros_like(s) + shift * LN2
    add_to_memory(p_m, p_s, m_entries, m, shifted(s, m, shift), BOUNDED)


@triton.jit
def add_sums(v, AXIS: tl.constexpr, p_m, p_s, m_entries, BOUNDED: tl.constexpr):
    """Adds the sums of e^v along the axis to those in memory. Bounded: v holds the exponentials already."""
    m, s = log_sum(v, AXIS, BOUNDED)
    add_to_memory(p_m, p_s, m_entries, m, s, BOUNDED)


@triton.jit
def add_tile(
    v, terms, shift, lowest, m_rows, m_cols, counts_x, counts_y, p_rows_m, p_rows_s, p_cols_m, p_cols_s,
    ROWS: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """(terms, shift, lowest) with a tile's e^v, whose row sums are added to those in memory: see the kernel. counts: the rows and
    columns that can have pairs at all."""
    if BOUNDED:
        new = exp(v)
        terms += new
        if ROWS:
            add_sums(new, 1, p_rows_m, p_rows_s, m_rows, BOUNDED)
    else:
        new = tl.exp2(less(v, shift))
        sums = tl.sum(new, 1)
        fits = tl.max(sums, 0) <= MOST
        if ROWS:
            fits = fits & (tl.min(tl.where(counts_x, sums, MOST), 0) >= LEAST)
        if fits:
            terms += new
            if ROWS:
                add_shifted(sums, shift, p_rows_m, p_rows_s, m_rows, BOUNDED)
        else:
            if ROWS:
                add_sums(v, 1, p_rows_m, p_rows_s, m_rows, BOUNDED)
            top = tl.max(v, 0) * LOG2E
            highest = tl.maximum(tl.max(top, 0), shift)
            least = tl.min(tl.where(counts_y, tl.maximum(top, lowest), highest), 0)
            if (highest - least <= SPREAD) & (tl.abs(highest) <= HELD):
                terms = terms * tl.exp2(shift - highest) + tl.exp2(less(v, highest))
                shift = highest
                lowest = least
            else:
                add_sums(v, 0, p_cols_m, p_cols_s, m_cols, BOUNDED)
    return terms, shift, lowest


@triton.jit(do_not_specialize=["N", "M", "T_X", "T_Y", "self_offset", "span_x", "span_y", "m", "gamma"])
def row_stats_fwd_kernel(
    p_x, p_y, p_ids_x, p_ids_y, p_range_x, p_range_y, p_bias_x, p_bias_y, p_cutoff,
    p_rows_m, p_rows_s, p_cols_m, p_cols_s,
    N, M, D, T_X, T_Y, span_x, span_y, self_offset, m, gamma,
    SETS: tl.constexpr, SCORE: tl.constexpr, HAS_CUTOFF: tl.constexpr, HAS_SELF: tl.constexpr, HAS_BIAS: tl.constexpr,
    SYMMETRIC: tl.constexpr, ROWS: tl.constexpr, BOUNDED: tl.constexpr,
    PRECISION: tl.constexpr, EVEN_D: tl.constexpr, WHOLE_D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (b, a): tile columns b * span_y ... against tile rows a * span_x ... .

    The terms of a tile column stay in registers until its rows are done, one above the other, so that threads add up their sums
    once for all of them. Row sums, each of a few lanes, are added to group b's entry tile by tile, column sums to group a's: no
    other program touches those; between two tiles' additions lies the barrier that their product's operands need in shared memory (one
    of our own in that loop would keep Triton from pipelining it). x against itself: tiles on and above the diagonal, whose row sums are
    the column sums of their transposes.
    """
    group_y = tl.program_id(0)
    group_x = tl.program_id(1)
    o_d = tl.arange(0, BLOCK_D)
    j_begin = group_y * span_y
    j_end = tl.minimum(j_begin + span_y, T_Y)
    if SYMMETRIC:
        j_end = tl.where(group_y < group_x, j_begin, j_end)
    p_rows_m += group_y.to(tl.int64) * SETS * N
    p_rows_s += group_y.to(tl.int64) * SETS * N
    p_cols_m += group_x.to(tl.int64) * SETS * M
    p_cols_s += group_x.to(tl.int64) * SETS * M
    nothing = 0.0 if BOUNDED else LOWEST

    for j in range(j_begin, j_end):
        o_j = j * BLOCK_N + tl.arange(0, BLOCK_N)
        o_y = tl.minimum(o_j, M - 1)  # the last row again instead of rows that don't exist: their logits are masked
        y = load_side(p_ids_y, p_bias_y, o_y, SETS, HAS_BIAS)
        m_cols = o_j < M
        counts_y = m_cols & (y[1] > float("-inf")) if HAS_BIAS else m_cols
        if WHOLE_D:
            b_y_t = load_rows(p_y, o_y, o_d, D, EVEN_D).T
        i_end = tl.minimum((group_x + 1) * span_x, T_X)
        if SYMMETRIC:
            i_end = tl.minimum(i_end, (j + 1) * (BLOCK_N // BLOCK_M))
        # Terms of one set, as parts of 2^shift; every column has had one of at least 2^lowest.
        set_of_terms = SETS - 1
        terms = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        shift = nothing
        lowest = nothing

        for i in tl.range(group_x * span_x, i_end):
            o_i = i * BLOCK_M + tl.arange(0, BLOCK_M)
            o_x = tl.minimum(o_i, N - 1)
            if WHOLE_D:
                s = product(load_rows(p_x, o_x, o_d, D, EVEN_D), b_y_t, PRECISION)
            else:
                s = blocked_product(p_x, p_y, o_x, o_y, D, D, EVEN_D, BLOCK_D, PRECISION)
            x = load_side(p_ids_x, p_bias_x, o_x, SETS, HAS_BIAS)
            only = tile_set(p_range_x, p_range_y, i, j, T_X, T_Y, SETS)
            v, _ = tile_logits(
                s, x, y, i, j, only, p_cutoff, N, M, self_offset, m, gamma,
                SETS, SCORE, HAS_CUTOFF, HAS_SELF, HAS_BIAS, BLOCK_M, BLOCK_N,
            )  # fmt: skip

            m_rows = o_i < N
            counts_x = m_rows & (x[1] > float("-inf")) if HAS_BIAS else m_rows
            if SYMMETRIC:
                m_rows = m_rows & ((i + 1) * BLOCK_M <= j * BLOCK_N)  # the diagonal's column sums see both (i, j) and (j, i)
            if only < 2:
                if only != set_of_terms:
                    col_sums = set_of_terms * M + o_j
                    add_shifted(tl.sum(terms, 0), shift, p_cols_m + col_sums, p_cols_s + col_sums, m_cols, BOUNDED)
                    terms = tl.zeros_like(terms)
                    shift = nothing
                    lowest = nothing
                    set_of_terms = only
                row_sums = only * N + o_i
                col_sums = only * M + o_j
                terms, shift, lowest = add_tile(
                    v, terms, shift, lowest, m_rows, m_cols, counts_x, counts_y,
                    p_rows_m + row_sums, p_rows_s + row_sums, p_cols_m + col_sums, p_cols_s + col_sums, ROWS, BOUNDED,
                )  # fmt: skip
            else:
                outside = 0.0 if BOUNDED else float("-inf")
                if BOUNDED:
                    v = exp(v)
                same = same_id(x, y)
                for k in tl.static_range(2):
                    of_set = tl.where(same, v, outside) if k == 0 else tl.where(same, outside, v)
                    add_sums(of_set, 0, p_cols_m + k * M + o_j, p_cols_s + k * M + o_j, m_cols, BOUNDED)
                    if ROWS:
                        add_sums(of_set, 1, p_rows_m + k * N + o_i, p_rows_s + k * N + o_i, m_rows, BOUNDED)

        tl.debug_barrier()  # what some threads added, others add to, here and in the next column of tiles
        col_sums = set_of_terms * M + o_j
        add_shifted(tl.sum(terms, 0), shift, p_cols_m + col_sums, p_cols_s + col_sums, m_cols, BOUNDED)
        tl.debug_barrier()


@triton.jit
def widened(low, high, role, t, T, k, SETS: tl.constexpr, HAS_ROLE: tl.constexpr):
    """(low, high) widened to the log-sums of tile t in set k."""
    _, _, p_log_sums, _, _, _ = role
    if HAS_ROLE:
        low = tl.minimum(low, tl.load(p_log_sums + k * T + t))
        high = tl.maximum(high, tl.load(p_log_sums + (SETS + k) * T + t))
    return low, high


@triton.jit
def at_shift(u, role, t, T, k, shift, SETS: tl.constexpr, HAS_ROLE: tl.constexpr):
    """g e^-lse 2^shift of set k from the weights g e^(centre - lse) of tile t. The factor stays finite where all of them are 0."""
    _, _, p_log_sums, _, _, _ = role
    if HAS_ROLE:
        u *= capped_exp2(-less(centre(tl.load(p_log_sums + k * T + t), tl.load(p_log_sums + (SETS + k) * T + t)), shift))
    return u


@triton.jit
def one_by_one(z, role, k, AXIS: tl.constexpr, SETS: tl.constexpr, HAS_ROLE: tl.constexpr):
    """g e^(z - lse) of set k."""
    _, _, _, p_given, o, N = role
    if HAS_ROLE:
        p_given += k * N + o
        return tl.expand_dims(tl.load(p_given), AXIS) * capped_exp2((z - tl.expand_dims(tl.load(p_given + SETS * N), AXIS)) * LOG2E)
    else:
        return 0.0


@triton.jit
def exp_weights(
    z, x, y, i, j, only, role_x, role_y,
    SETS: tl.constexpr, ROLE_X: tl.constexpr, ROLE_Y: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A of tile (i, j), from its logits. Weights are centred, and log-sums have ranges, in tiles of the larger block on either side."""
    u_x, p_weights_x, _, _, o_x, N = role_x
    u_y, p_weights_y, _, _, o_y, M = role_y
    LARGE: tl.constexpr = max(BLOCK_M, BLOCK_N)
    i = i * BLOCK_M // LARGE
    j = j * BLOCK_N // LARGE
    T_X = tl.cdiv(N, LARGE)
    T_Y = tl.cdiv(M, LARGE)
    first = tl.where(only == 1, 1, 0)
    low, high = widened(float("inf"), float("-inf"), role_x, i, T_X, first, SETS, ROLE_X)
    low, high = widened(low, high, role_y, j, T_Y, first, SETS, ROLE_Y)
    if only == 2:
        low, high = widened(low, high, role_x, i, T_X, 1, SETS, ROLE_X)
        low, high = widened(low, high, role_y, j, T_Y, 1, SETS, ROLE_Y)
    shift = centre(low, high) * LOG2E

    if (high - low <= WIDTH) & (tl.abs(shift) <= LARGEST):  # one exponential serves both roles
        exp_z = capped_exp2(less(z, shift))
        u_x = at_shift(u_x, role_x, i, T_X, first, shift, SETS, ROLE_X)
        u_y = at_shift(u_y, role_y, j, T_Y, first, shift, SETS, ROLE_Y)
        if only < 2:
            a = outer_sum(u_x, u_y, ROLE_X, ROLE_Y) * exp_z
        else:
            v_x = at_shift(load_weights(p_weights_x, 1, o_x, N, ROLE_X), role_x, i, T_X, 1, shift, SETS, ROLE_X)
            v_y = at_shift(load_weights(p_weights_y, 1, o_y, M, ROLE_Y), role_y, j, T_Y, 1, shift, SETS, ROLE_Y)
            a = tl.where(same_id(x, y), outer_sum(u_x, u_y, ROLE_X, ROLE_Y), outer_sum(v_x, v_y, ROLE_X, ROLE_Y)) * exp_z
    else:
        a = one_by_one(z, role_x, first, 1, SETS, ROLE_X) + one_by_one(z, role_y, first, 0, SETS, ROLE_Y)
        if only == 2:
            others = one_by_one(z, role_x, 1, 1, SETS, ROLE_X) + one_by_one(z, role_y, 1, 0, SETS, ROLE_Y)
            a = tl.where(same_id(x, y), a, others)
    return a
