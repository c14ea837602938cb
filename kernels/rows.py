r"""Rows as the products compare them, and the gradient of the rows that they are made of, each in one pass.

    u_i = x_o(i) / |x_o(i)|,  r_i = norm u_i                                         o: the order, |x| < 1e-12: r_i = 0
    dx_o(i) = norm / |x_o(i)| (g_i - u_i <u_i, g_i>),  dnorm = sum_i <u_i, g_i>

What pairloss/unit.py says in PyTorch, where it takes a dozen launches. No atomics, no host synchronisation.
"""

import triton
import triton.language as tl

from .. import unit
from ._math import INTERPRETED

ZERO_NORM = tl.constexpr(unit.ZERO_NORM)


@triton.jit
def inverse_length(square):
    """1 / |x|, 0 for a zero row, NaN for a length that is not finite."""
    length = tl.sqrt_rn(square)
    inverse = tl.where(length > ZERO_NORM, tl.div_rn(1.0, length), 0.0)
    return tl.where(length < float("inf"), inverse, float("nan"))


@triton.jit
def load_norm(p_norm):
    """NaN for a norm that is not one: from a temperature <= 0."""
    norm = tl.load(p_norm)
    return tl.where((norm > 0) & (norm < float("inf")), norm, float("nan"))


@triton.jit
def places(p_order, N, HAS_ORDER: tl.constexpr, BLOCK_N: tl.constexpr):
    """(rows of this program, which given ones they are, which of them there are)."""
    o = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    given = o
    if HAS_ORDER:
        given = tl.load(p_order + o, o < N, other=0)
    return o, given, o < N


@triton.jit
def load(p, rows, m_rows, o_d, D):
    return tl.load(p + rows[:, None] * D + o_d[None, :], m_rows[:, None] & (o_d < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def rounded(v, p):
    """v as numbers that p points to, to nearest. The interpreter (seen in 3.9) truncates bfloat16."""
    if INTERPRETED and p.dtype.element_ty == tl.bfloat16:
        bits = v.to(tl.int32, bitcast=True)
        v = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return v.to(p.dtype.element_ty)


@triton.jit(do_not_specialize=["N"])
def scaled_rows_kernel(
    p_x, p_norm, p_order,
    p_rows,
    N, D, HAS_ORDER: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program i writes rows i * BLOCK_N ... ."""
    o, given, m_rows = places(p_order, N, HAS_ORDER, BLOCK_N)
    square = tl.zeros([BLOCK_N], tl.float32)
    for d in tl.range(0, D, BLOCK_D):
        x = load(p_x, given, m_rows, d + tl.arange(0, BLOCK_D), D)
        square += tl.sum(x * x, 1)
    factor = inverse_length(square) * load_norm(p_norm)
    for d in tl.range(0, D, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        x = load(p_x, given, m_rows, o_d, D)
        rows = rounded(x * factor[:, None], p_rows)
        tl.store(p_rows + o[:, None] * D + o_d[None, :], rows, m_rows[:, None] & (o_d < D)[None, :])


@triton.jit(do_not_specialize=["N"])
def scaled_rows_backward_kernel(
    p_x, p_norm, p_order, p_grad,
    p_dx, p_along,
    N, D, HAS_ORDER: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """From the gradients of those rows dx, in its dtype, and each row's part in the norm's."""
    o, given, m_rows = places(p_order, N, HAS_ORDER, BLOCK_N)
    square = tl.zeros([BLOCK_N], tl.float32)
    along = tl.zeros([BLOCK_N], tl.float32)
    for d in tl.range(0, D, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        x = load(p_x, given, m_rows, o_d, D)
        square += tl.sum(x * x, 1)
        along += tl.sum(x * load(p_grad, o, m_rows, o_d, D), 1)
    inverse = inverse_length(square)
    along *= inverse
    factor = inverse * load_norm(p_norm)
    for d in tl.range(0, D, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        u = load(p_x, given, m_rows, o_d, D) * inverse[:, None]
        dx = (load(p_grad, o, m_rows, o_d, D) - u * along[:, None]) * factor[:, None]
        tl.store(p_dx + given[:, None] * D + o_d[None, :], rounded(dx, p_dx), m_rows[:, None] & (o_d < D)[None, :])
    tl.store(p_along + o, along, m_rows)
