"""A tile of pairs, as all kernels see it: what its rows and columns carry, which set its pairs are in, their logits."""

import triton
import triton.language as tl

from ._math import rounded_product


@triton.jit
def load_side(p_ids, p_bias, o, SETS: tl.constexpr, HAS_BIAS: tl.constexpr):
    """(ids, bias) of the rows o; what the call doesn't have is a placeholder."""
    ids = o
    bias = o.to(tl.float32)
    if SETS == 2:
        ids = tl.load(p_ids + o)
    if HAS_BIAS:
        bias = tl.load(p_bias + o)
    return ids, bias


@triton.jit
def load_weights(p_weights, k, o, N, HAS_ROLE: tl.constexpr):
    """Those of the rows o in set k; a placeholder on a side without weights."""
    if HAS_ROLE:
        return tl.load(p_weights + k * N + o)
    else:
        return o.to(tl.float32)


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
def same_id(x, y):
    return x[0][:, None] == y[0][None, :]


@triton.jit
def leave_out(v, i, j, N, M, self_offset, HAS_SELF: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """v, but -inf at the pairs left out and beyond the edges."""
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
        v = tl.where(m_pairs, v, float("-inf"))
    return v


@triton.jit
def circle(s, x, y, only, m, gamma):
    """(score, its slope's magnitude). With r = s for negatives and 1 - s for positives both sets have the one form
    gamma relu(r + m) (r - m); the slope in s is gamma relu(r + m), negative for positives."""
    if only == 2:
        r = tl.where(same_id(x, y), 1 - s, s)
    else:
        sign = tl.where(only == 0, -1.0, 1.0)
        r = tl.where(only == 0, 1.0, 0.0) + sign * s
    slope = gamma * tl.maximum(r + m, 0.0)
    return rounded_product(slope, r - m), slope


@triton.jit
def cut(z, s, x, y, only, cutoff, SETS: tl.constexpr):
    """z, but -inf at the negatives (without ids: all pairs) whose product is below the cutoff."""
    if SETS == 1:
        z = tl.where(s < cutoff, float("-inf"), z)
    elif only == 2:
        z = tl.where((s < cutoff) & ~same_id(x, y), float("-inf"), z)
    else:
        z = tl.where(s < tl.where(only == 0, float("-inf"), cutoff), float("-inf"), z)
    return z


@triton.jit
def tile_logits(
    s, x, y, i, j, only, p_cutoff, N, M, self_offset, m, gamma,
    SETS: tl.constexpr, SCORE: tl.constexpr, HAS_CUTOFF: tl.constexpr, HAS_SELF: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(z of tile (i, j), the magnitude of the score's slope); z is -inf at pairs that are in no set and beyond the edges."""
    z = s
    slope = s
    if SCORE == "circle":
        z, slope = circle(s, x, y, only, m, gamma)
    if HAS_BIAS:
        z += x[1][:, None] + y[1][None, :]  # the biases first: z_ij and z_ji round alike
    z = leave_out(z, i, j, N, M, self_offset, HAS_SELF, BLOCK_M, BLOCK_N)
    if HAS_CUTOFF:
        z = cut(z, s, x, y, only, tl.load(p_cutoff), SETS)
    return z, slope
