"""What the kernels compute with, as small Triton functions."""

import os

import triton
import triton.language as tl

from .. import operands

# As float32 has it, so that every product with it is by the same number.
LOG2E = tl.constexpr(1.44269502162933349609375)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(operands.LOWEST)
# Triton reads the variable when it decorates, so this is what the functions below became.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
# A GPU adds products up in one fixed order, so forward and backward see the same z_ij, and z_ji. NumPy's float32 products
# depend on the shape of the tile, and the interpreter's bfloat16 ones are garbage (seen in 3.9): there, float64.
ACCUMULATOR = tl.constexpr(tl.float64 if INTERPRETED.value else tl.float32)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """a @ b + acc; acc is of type ACCUMULATOR."""
    if INTERPRETED:
        return acc + tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def used(v):
    """v, by way of an empty instruction: Triton 3.6 fails to compile for sm_90 where every use of a product is in a branch."""
    if INTERPRETED:
        return v
    else:
        return tl.inline_asm_elementwise("", "=f,0", [v], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def load_rows(p, o, o_d, D, EVEN_D: tl.constexpr):
    p = p + o.to(tl.int64)[:, None] * D + o_d[None, :]
    if EVEN_D:
        return tl.load(p)
    else:
        return tl.load(p, mask=o_d[None, :] < D, other=0.0)


@triton.jit
def product(b_x, b_y_t, PRECISION: tl.constexpr):
    """<x_i, y_j> in float32, from whole rows and the transpose of such."""
    acc = tl.zeros([b_x.shape[0], b_y_t.shape[1]], ACCUMULATOR)
    return used(dot(b_x, b_y_t, acc, PRECISION).to(tl.float32))


@triton.jit
def blocked_product(p_x, p_y, o_x, o_y, D, columns, EVEN_D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    """<x_i, y_j> in float32 over the first `columns` of D columns, BLOCK_D at a time."""
    acc = tl.zeros([o_x.shape[0], o_y.shape[0]], ACCUMULATOR)
    for d in tl.range(0, columns, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        b_x = load_rows(p_x, o_x, o_d, D, EVEN_D)
        b_y = load_rows(p_y, o_y, o_d, D, EVEN_D)
        acc = dot(b_x, b_y.T, acc, PRECISION)
    return used(acc.to(tl.float32))


@triton.jit
def rounded_product(a, b):
    """a b, never fused into an addition that follows: forward and backward must see the same value."""
    if INTERPRETED:
        return a * b
    else:
        return tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def outer_sum(a, b, HAS_A: tl.constexpr, HAS_B: tl.constexpr):
    """a_i + b_j, without the side that is absent."""
    if HAS_A and HAS_B:
        return a[:, None] + b[None, :]
    elif HAS_A:
        return a[:, None]
    else:
        return b[None, :]


@triton.jit
def exp(v):
    """Triton's keeps denormals, in four instructions more. Next to what such a term is added to it is nothing."""
    return tl.exp2(v * LOG2E)


@triton.jit
def log_sum(v, AXIS: tl.constexpr, BOUNDED: tl.constexpr):
    """(m, s): the sum of e^v along the axis is s e^m, m the maximum. Bounded: v holds the exponentials already, and m is 0."""
    if BOUNDED:
        s = tl.sum(v, AXIS)
        return tl.zeros_like(s), s
    else:
        m = tl.maximum(tl.max(v, AXIS), LOWEST)
        return m, tl.sum(exp(v - tl.expand_dims(m, AXIS)), AXIS)


@triton.jit
def add_log_sums(m, s, m_more, s_more, BOUNDED: tl.constexpr):
    """The sum of two sums held as (m, s)."""
    if BOUNDED:
        return m, s + s_more
    else:
        top = tl.maximum(m, m_more)
        return top, s * exp(m - top) + s_more * exp(m_more - top)


@triton.jit
def add_to_memory(p_m, p_s, m_entries, m, s, BOUNDED: tl.constexpr):
    """Adds (m, s) to the sums that stand in memory, which no other program touches."""
    if BOUNDED:
        tl.store(p_s, tl.load(p_s, m_entries) + s, m_entries)
    else:
        old_m = tl.load(p_m, m_entries, other=LOWEST)
        old_s = tl.load(p_s, m_entries, other=0.0)
        m, s = add_log_sums(old_m, old_s, m, s, BOUNDED)
        tl.store(p_m, m, m_entries)
        tl.store(p_s, s, m_entries)


@triton.jit
def less(z, shift):
    """z log2(e) - shift, rounded once and after the large parts have cancelled: a fused multiply-add on the GPU."""
    if INTERPRETED:
        return (z.to(tl.float64) * LOG2E - shift).to(tl.float32)
    else:
        return z * LOG2E - shift


@triton.jit
def shifted(g, lse, shift):
    """g e^-lse 2^shift; 0 stays 0 however far its lse lies."""
    return tl.where(g == 0, 0.0, g * tl.exp2(-less(lse, shift)))


@triton.jit
def centre(low, high):
    """Of an empty range 0."""
    return tl.where(low <= high, (low + high) / 2, 0.0)


@triton.jit
def capped_exp2(v):
    """2^v, finite even where v belongs to a weight of 0, which alone may meet a large v."""
    return tl.exp2(tl.minimum(v, 126.0))


@triton.jit
def reciprocal(v):
    """1 / v, off by its last digit; an instruction, where Triton's division, which is off by two, takes eight."""
    if INTERPRETED:
        return 1 / v
    else:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [v], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def softplus(v):
    """log(1 + e^v), to the last digits also where it is tiny: log(1 + e) = 2 artanh(e / (2 + e)), whose series converges as 1/9^k."""
    e = exp(-tl.abs(v))
    t = e * reciprocal(2 + e)
    series = 1 / 15 + tl.zeros_like(t)
    for k in tl.static_range(6, -1, -1):
        series = series * (t * t) + 1 / (2 * k + 1)
    return tl.maximum(v, 0.0) + 2 * t * series


@triton.jit
def sigmoid(v):
    """The derivative of softplus. 1 / inf is the right limit."""
    return reciprocal(1 + exp(-v))
