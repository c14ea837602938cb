r"""What belongs to rows, O(N): their sums and weights, and the ranges of tiles. A launch each, where PyTorch takes a dozen.

    (s, m)_k = sum over groups of s e^m                          as pairloss.engines.normalised has it, and its logarithm
    g_k = 2^e grad_k / s_k,  e = floor(13 - log2(steepest max |grad / s|))
    [least, greatest] of every tile's ids, and of the m_k of its weights that are not 0
    u_k = g_k e^(c_k - m_k), from the centre c_k between the latter

The power of two: no pair's weight overflows float16, and those down to 2^-27 of the largest keep all its digits.
"""

import triton
import triton.language as tl

from ._math import LOWEST, centre, exp

LOG_HELD = tl.constexpr(2.0**22)  # up to which float32 holds a logarithm to a quarter
LEAST, MOST = tl.constexpr(2.0**-100), tl.constexpr(3e38)
EXPONENT, BIAS = tl.constexpr(23), tl.constexpr(127)  # of a float32: where it stands, and what stands there for 1


@triton.jit
def power_of_two(e):
    return ((e.to(tl.int32) + BIAS) << EXPONENT).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["size", "groups"])
def total_kernel(p_s, p_m, p_sums, p_logs, size, groups, BOUNDED: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_entries = o < size
    top = tl.full([BLOCK], LOWEST, tl.float32)
    if BOUNDED:
        top = tl.zeros([BLOCK], tl.float32)
    else:
        for group in tl.range(0, groups):
            top = tl.maximum(top, tl.load(p_m + group * size.to(tl.int64) + o, m_entries, other=LOWEST))
    s = tl.zeros([BLOCK], tl.float32)
    for group in tl.range(0, groups):
        o_group = group * size.to(tl.int64) + o
        more = tl.load(p_s + o_group, m_entries, other=0.0)
        if not BOUNDED:
            more *= exp(tl.load(p_m + o_group, m_entries, other=LOWEST) - top)
        s += more

    empty = s == 0
    m = tl.where(tl.abs(top) < LOG_HELD, top + tl.log(tl.where(empty, 1.0, s)), top)
    s = tl.where(empty, 0.0, s * exp(top - m))
    m = tl.where(empty, 0.0, m)
    tl.store(p_sums + o, s, m_entries)
    tl.store(p_sums + size.to(tl.int64) + o, m, m_entries)
    tl.store(p_logs + o, tl.where(empty, float("-inf"), tl.log(tl.where(empty, 1.0, s)) + m), m_entries)


@triton.jit
def load_weights(p_sums, p_grads, o, m_entries, HAS_SUMS: tl.constexpr):
    """grad / s, 0 for an empty set."""
    g = tl.load(p_grads + o, m_entries, other=0.0)
    if HAS_SUMS:
        s = tl.load(p_sums + o, m_entries, other=0.0)
        g = tl.where(s == 0, 0.0, g / tl.where(s == 0, 1.0, s))
    return g


@triton.jit(do_not_specialize=["size"])
def largest_kernel(p_sums, p_grads, p_largest, size, HAS_SUMS: tl.constexpr, BLOCK: tl.constexpr):
    """The greatest finite |grad / s| of each program's part."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.abs(load_weights(p_sums, p_grads, o, o < size, HAS_SUMS))
    tl.store(p_largest + tl.program_id(0), tl.max(tl.where(g < float("inf"), g, 0.0), 0))


@triton.jit(do_not_specialize=["size", "N", "parts"])
def scaled_weights_kernel(
    p_sums, p_grads, p_largest, p_steepest,
    p_weights, p_unscale,
    size, N, parts, HAS_SUMS: tl.constexpr, CIRCLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """g, and m behind it. A circle's kernels know the slope's magnitude, which for positives is negative: so are their weights."""
    top = tl.zeros([BLOCK], tl.float32)
    for first in tl.range(0, parts, BLOCK):
        part = first + tl.arange(0, BLOCK)
        top = tl.maximum(top, tl.load(p_largest + part, part < parts, other=0.0))
    largest = tl.max(top, 0)
    if CIRCLE:
        largest *= tl.load(p_steepest)
    e = tl.floor(13 - tl.log2(tl.minimum(tl.maximum(largest, LEAST), MOST)))

    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_entries = o < size
    g = load_weights(p_sums, p_grads, o, m_entries, HAS_SUMS) * power_of_two(e)
    if CIRCLE:
        g = tl.where(o < N, -g, g)
    tl.store(p_weights + o, g, m_entries)
    if HAS_SUMS:
        tl.store(p_weights + size.to(tl.int64) + o, tl.load(p_sums + size.to(tl.int64) + o, m_entries, other=0.0), m_entries)
    if tl.program_id(0) == 0:
        tl.store(p_unscale, power_of_two(-e))


@triton.jit(do_not_specialize=["N", "T", "T_SMALL"])
def id_ranges_kernel(p_ids, p_large, p_small, N, T, T_SMALL, LARGE: tl.constexpr, SMALL: tl.constexpr):
    """Program t: the least and the greatest id of tile t, and of the small ones in it."""
    t = tl.program_id(0)
    ids = tl.load(p_ids + tl.minimum(t * LARGE + tl.arange(0, LARGE), N - 1))  # the last row again changes no range
    tl.store(p_large + t, tl.min(ids, 0))
    tl.store(p_large + T + t, tl.max(ids, 0))
    parts = tl.reshape(ids, [LARGE // SMALL, SMALL])
    o = t * (LARGE // SMALL) + tl.arange(0, LARGE // SMALL)
    m_tiles = o < T_SMALL
    tl.store(p_small + o, tl.min(parts, 1), m_tiles)
    tl.store(p_small + T_SMALL + o, tl.max(parts, 1), m_tiles)


@triton.jit(do_not_specialize=["N", "T"])
def centred_weights_kernel(p_weights, p_ranges, p_centred, N, T, SETS: tl.constexpr, LARGE: tl.constexpr):
    """Program (t, k): the least and the greatest m of tile t; inf and -inf where all weights are 0. And the weights from its centre."""
    t = tl.program_id(0)
    k = tl.program_id(1)
    o = t * LARGE + tl.arange(0, LARGE)
    m_rows = o < N
    g = tl.load(p_weights + k * N + o, m_rows, other=0.0)
    m = tl.load(p_weights + (SETS + k) * N + o, m_rows, other=0.0)
    low = tl.min(tl.where(g == 0, float("inf"), m), 0)
    high = tl.max(tl.where(g == 0, float("-inf"), m), 0)
    tl.store(p_ranges + k * T + t, low)
    tl.store(p_ranges + (SETS + k) * T + t, high)
    tl.store(p_centred + k * N + o, tl.where(g == 0, 0.0, g * exp(centre(low, high) - m)), m_rows)
