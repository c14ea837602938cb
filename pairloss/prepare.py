"""From features to what row_stats compares: O(N D) PyTorch, so that autograd gives the gradients of rows and tau.

Temperature goes into the rows (times sqrt(1/tau) on both sides), which keeps x against itself symmetric.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops, ranks
from .autograd import positional
from .engines import without_autocast
from .reference import rounded

ZERO_NORM = 1e-12


class Rows(NamedTuple):
    x: Tensor
    y: Tensor | None
    row_bias: Tensor | None
    col_bias: Tensor | None
    product_dtype: torch.dtype
    logit_bound: float

    @property
    def poison(self) -> Tensor:
        """[N]: NaN for an anchor with a value that is not finite (or all, where tau is not > 0), else 0."""
        return self.x.detach()[:, 0] * 0  # what is NaN in one column is in all

    def row_stats(self, ids_x: Tensor | None = None, ids_y: Tensor | None = None, self_offset: int | None = None, **how: Any) -> Any:
        """ops.row_stats of these rows; NaN for a NaN anchor also where it has nothing to be compared with."""
        biases = (self.row_bias, self.col_bias)
        rows, cols = ops.row_stats(
            self.x, self.y, ids_x, ids_y, self_offset, *biases, product_dtype=self.product_dtype, logit_bound=self.logit_bound, **how
        )
        return rows + self.poison, cols

    def products(self, y: Tensor) -> Tensor:
        """The product of each anchor with the row of y [N, D] beside it, or with those of y [N, M, D]; rounded as engines round."""
        x, y = rounded(self.x, self.product_dtype), rounded(y, self.product_dtype)
        if y.ndim == 2:
            return (x * y).sum(1)
        with without_autocast(x):
            return torch.einsum("nd,nmd->nm", x, y)

    def against(self, y: Tensor, col_bias: Tensor | None) -> "Rows":
        """The same anchors with other candidates."""
        return self._replace(y=y, col_bias=col_bias, logit_bound=self.logit_bound if col_bias is None else math.inf)


def prepare(
    features: Tensor, ref_features: Tensor | None, tau: float | Tensor, metric: str, ignored: Tensor | None, ref_ignored: Tensor | None
) -> Rows:
    """Rows and biases whose logits are the similarities divided by tau.

    cosine: <a, b> / (|a| |b| tau); dot: <a, b> / tau; sqeuclidean: -|a - b|^2 / tau. Rows with a norm below 1e-12 are the
    zero vector under cosine, with gradient 0. A row that is ignored (bool [N]) is zeroed and gets the bias -inf; in any
    other row a value that is not finite makes the whole row NaN, so that it can't hide behind a logit of -inf.
    """
    product_dtype = _product_dtype(features)
    scale = _inverse_sqrt(tau / 2 if metric == "sqeuclidean" else tau)
    x, row_bias = _cleared(features, ignored)
    y, col_bias = (None, None) if ref_features is None else _cleared(ref_features, ref_ignored)
    if metric == "cosine":
        bound = 1 / tau if isinstance(tau, float) else math.inf
        x, y = unit(x, scale), None if y is None else unit(y, scale)
        return Rows(x, y, row_bias, col_bias, product_dtype, bound)

    x = _poisoned(x * scale, product_dtype)
    y = None if y is None else _poisoned(y * scale, product_dtype)
    if metric == "sqeuclidean":
        # Distances don't move with the origin: near the data they lose fewer digits. (Ignored rows are zeros.)
        with torch.no_grad():
            used = x.new_full((), x.shape[0]) if ignored is None else (~ignored).sum()
            centre = ranks.total(x.sum(0)) / ranks.total(used).clamp(min=1)
        x, row_bias = _with_half_square(x - centre, row_bias, product_dtype)
        if y is not None:
            y, col_bias = _with_half_square(y - centre, col_bias, product_dtype)
    return Rows(x, y, row_bias, col_bias, product_dtype, math.inf)


def loss_dtype(features: Tensor) -> torch.dtype:
    """Of statistics and losses: float32, or float64 for float64 features."""
    return torch.promote_types(features.real.dtype if features.is_complex() else features.dtype, torch.float32)


def real_view(features: Tensor) -> Tensor:
    """Complex rows as real ones of twice the length: their dot product is Re <a, conj b>."""
    return torch.view_as_real(features).flatten(1) if features.is_complex() else features


def _product_dtype(features: Tensor) -> torch.dtype:
    device = features.device.type
    # The meta device has no autocast and asking raises; so does asking whether there is one, under torch.compile in torch 2.6.
    if features.dtype == torch.float32 and device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return features.dtype


def _inverse_sqrt(tau: float | Tensor) -> float | Tensor:
    if isinstance(tau, Tensor):
        return (tau / (tau > 0)).rsqrt()  # NaN in value and gradient where that divides by 0
    return tau**-0.5


def _cleared(features: Tensor, ignored: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Rows in the dtype of the statistics, ignored ones zeroed, and the bias that takes those out of every set."""
    x = features if features.dtype == torch.float64 else features.to(torch.float32)
    if ignored is None:
        return x, None
    bias = torch.zeros(x.shape[0], dtype=x.dtype, device=x.device).masked_fill(ignored, -torch.inf)
    return torch.where(ignored[:, None], 0, x), bias


def unit(x: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """Rows of norm `scale`, in the direction of x's; a norm below 1e-12 gives the zero row with gradient 0, one that overflows NaN."""
    # A compiler fuses the steps by itself, and dynamo (2.13) fails to trace two of these Functions whose rows share a symbolic size.
    return _scaled(x, scale) if torch.compiler.is_compiling() else _Unit.apply(x, scale)


def _scaled(x: Tensor, scale: float | Tensor) -> Tensor:
    return x * (_inverse_norm(x) * scale)


class _Unit(torch.autograd.Function):
    """_scaled with its derivative in closed form, a third of the operations that autograd would record.

    With r = 1 / |x| and u = r x: dx = scale r (g - u <u, g>).
    """

    generate_vmap_rule = True

    @staticmethod
    @positional
    def forward(x: Tensor, scale: Any) -> Any:
        return _scaled(x, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, scale = inputs
        tensors = (x, scale) if isinstance(scale, Tensor) else (x,)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.scale = None if isinstance(scale, Tensor) else scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        scale = tensors[0] if tensors else ctx.scale
        inverse = _inverse_norm(x)
        u = x * inverse
        along = (grad * u).sum(1, keepdim=True)
        dx = None
        if ctx.needs_input_grad[0]:
            factor = inverse * scale
            dx = torch.addcmul(grad, u, along, value=-1)
            # Fresh memory takes longer than the product. (Under vmap a tensor may be batched where dx is not.)
            dx = dx * factor if tensors else dx.mul_(factor)
        return dx, along.sum() if ctx.needs_input_grad[1] else None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dscale: Tensor | None) -> Tensor:
        x, *tensors = ctx.saved_tensors
        scale = tensors[0] if tensors else ctx.scale
        inverse = _inverse_norm(x)
        u = x * inverse
        tangent = torch.zeros_like(x) if dx is None else (dx - u * (dx * u).sum(1, keepdim=True)) * (inverse * scale)
        return tangent if dscale is None else tangent + u * dscale


def _inverse_norm(x: Tensor) -> Tensor:
    """[N, 1]: 1 / |x|, 0 for a zero row, NaN for a norm that is not finite: 1 / inf would silently give the zero vector."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    inverse = torch.threshold(norm, ZERO_NORM, torch.inf).reciprocal()  # of a small norm 1 / inf
    return torch.add(inverse, norm, alpha=0)  # 0 * inf is NaN


def _poisoned(x: Tensor, product_dtype: torch.dtype) -> Tensor:
    finite = torch.isfinite(x.to(product_dtype)).all(1, keepdim=True)
    return x * torch.where(finite, 1, torch.nan)  # a factor, so that the row's gradient is NaN too


def _with_half_square(x: Tensor, bias: Tensor | None, product_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The rows and -|x|^2 / 2 of them as the product sees them: of unrounded rows, distances could come out negative."""
    x = rounded(x, product_dtype)
    half_square = x.square().sum(1) / -2
    # An overflow to -inf would take the row out of every set.
    factor = torch.where(half_square.isfinite(), 1, torch.nan)
    x, half_square = x * factor[:, None], half_square * factor
    return x, half_square if bias is None else half_square + bias
