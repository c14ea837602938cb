"""Rows of one norm, and the gradient of those that they are made of."""

import math
from typing import Any

import torch
from torch import Tensor

from .binding import positional

ZERO_NORM = 1e-12


def unit(x: Tensor, norm: float | Tensor = 1.0) -> Tensor:
    """Rows of norm `norm`, in the direction of x's; a norm below 1e-12 gives the zero row with gradient 0, one that overflows NaN."""
    # A compiler fuses the steps by itself, and dynamo (2.13) fails to trace two of these Functions whose rows share a symbolic size.
    return scaled(x, norm) if torch.compiler.is_compiling() else _Unit.apply(x, norm)


def scaled(x: Tensor, norm: float | Tensor) -> Tensor:
    return x * (_inverse_norm(x) * _valid(norm))


def backward_(x: Tensor, norm: Tensor, grad: Tensor) -> Tensor:
    """From the gradient of `scaled` that of x, in the same memory; the result is that of norm."""
    inverse, u, along = _along(x, grad)
    grad.addcmul_(u, along, value=-1).mul_(inverse * _valid(norm))
    return along.sum()


def _along(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """1 / |x|, u = x / |x|, and <grad, u>, [N, 1]."""
    inverse = _inverse_norm(x)
    u = x * inverse
    return inverse, u, (grad * u).sum(1, keepdim=True)


class _Unit(torch.autograd.Function):
    """`scaled` with its derivative in closed form, a third of the operations that autograd would record.

    With r = 1 / |x| and u = r x: dx = norm r (g - u <u, g>).
    """

    generate_vmap_rule = True

    @staticmethod
    @positional
    def forward(x: Tensor, norm: Any) -> Any:
        return scaled(x, norm)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, norm = inputs
        tensors = (x, norm) if isinstance(norm, Tensor) else (x,)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.norm = None if isinstance(norm, Tensor) else norm

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        inverse, u, along = _along(x, grad)
        dx = None
        if ctx.needs_input_grad[0]:
            factor = inverse * _valid(tensors[0] if tensors else ctx.norm)
            dx = torch.addcmul(grad, u, along, value=-1)
            # Fresh memory takes longer than the product. (Under vmap a tensor may be batched where dx is not.)
            dx = dx * factor if tensors else dx.mul_(factor)
        return dx, along.sum() if ctx.needs_input_grad[1] else None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dnorm: Tensor | None) -> Tensor:
        x, *tensors = ctx.saved_tensors
        norm = tensors[0] if tensors else ctx.norm
        inverse = _inverse_norm(x)
        u = x * inverse
        tangent = torch.zeros_like(x) if dx is None else (dx - u * (dx * u).sum(1, keepdim=True)) * (inverse * norm)
        return tangent if dnorm is None else tangent + u * dnorm


def _valid(norm: float | Tensor) -> float | Tensor:
    """NaN for a norm that is not one: from a temperature <= 0."""
    return torch.where((norm > 0) & (norm < math.inf), norm, math.nan) if isinstance(norm, Tensor) else norm


def _inverse_norm(x: Tensor) -> Tensor:
    """[N, 1]: 1 / |x|, 0 for a zero row, NaN for a norm that is not finite: 1 / inf would silently give the zero vector."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    inverse = torch.threshold(norm, ZERO_NORM, torch.inf).reciprocal()  # of a small norm 1 / inf
    return inverse + norm * 0  # 0 * inf is NaN; not with alpha=0, which MPS leaves out
