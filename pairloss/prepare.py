"""From features to what row_stats compares: O(N D) PyTorch, so that autograd gives the gradients of rows and tau.

Temperature goes into the rows (times sqrt(1/tau) on both sides), which keeps x against itself symmetric.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import groups, ops, ranks
from .engines import statistics_dtype
from .reference import rounded
from .unit import unit


class Rows(NamedTuple):
    x: Tensor
    y: Tensor | None
    norm: Tensor | None  # that the rows have when they are compared; None: as they are
    row_bias: Tensor | None
    col_bias: Tensor | None
    product_dtype: torch.dtype
    logit_bound: float

    def but(self, **changes: Any) -> "Rows":
        """With other values of some fields. Dynamo (2.6) doesn't trace _replace."""
        return Rows(**{**dict(zip(Rows._fields, self, strict=True)), **changes})

    def widened(self) -> "Rows":
        """Half rows as float32, for a loss of several parts: the parts of the gradient are added up before it is rounded."""
        dtype = statistics_dtype(self.x)
        return self.but(x=self.x.to(dtype), y=None if self.y is None else self.y.to(dtype))

    def normalised(self) -> "Rows":
        """The rows as they are compared, for what is computed from single ones."""
        if self.norm is None:
            return self
        x, y, *_ = self.widened()
        return self.but(x=unit(x, self.norm), y=None if y is None else unit(y, self.norm), norm=None)

    def poison(self) -> Tensor:
        """[N], of rows as they are compared: NaN for an anchor with a value that is not finite (or all, where tau is not > 0), else 0."""
        assert self.norm is None
        return self.x.detach()[:, 0] * 0  # what is NaN in one column is in all

    def row_stats(
        self, ids_x: Tensor | None = None, ids_y: Tensor | None = None, self_offset: int | None = None, *, totals: bool = False, **how: Any
    ) -> Any:
        """ops.row_stats of these rows; NaN for a NaN anchor also where it has nothing to be compared with."""
        here = totals and ranks.current() is None
        pairs = (self.x, self.y, ids_x, ids_y, self_offset, self.row_bias, self.col_bias)
        how = {**how, "norm": self.norm, "product_dtype": self.product_dtype, "logit_bound": self.logit_bound}  # dynamo (2.6) knows no |=
        rows, cols = ops.row_stats(*pairs, totals=here, **how)
        if totals and not here:
            assert ids_x is not None
            rows = torch.cat([rows, torch.stack(groups.positives(self, ids_x, ids_y, how["backend"]))])
        return rows if self.norm is not None else rows + self.poison(), cols

    def products(self, y: Tensor, backend: str | None) -> Tensor:
        """[N]: the product of each anchor with the row of y [N, D] beside it."""
        return ops.own_products(self.x, y, norm=self.norm, product_dtype=self.product_dtype, backend=backend)

    def against(self, y: Tensor, col_bias: Tensor | None) -> "Rows":
        """The same anchors with other candidates."""
        return self.but(y=y, col_bias=col_bias, logit_bound=self.logit_bound if col_bias is None else math.inf)


def of_temperature(tau: float | Tensor) -> float | Tensor:
    """The scale of rows whose similarities are divided by tau. Not a number > 0 where tau is not."""
    return tau.rsqrt() if isinstance(tau, Tensor) else tau**-0.5


def of_multiplier(factor: float | Tensor) -> float | Tensor:
    return factor.sqrt() if isinstance(factor, Tensor) else factor**0.5


def prepare(
    features: Tensor, ref_features: Tensor | None, scale: float | Tensor, metric: str, ignored: Tensor | None, ref_ignored: Tensor | None
) -> Rows:
    """Rows and biases whose logits are the similarities times scale^2, or NaN where scale is not a number > 0.

    cosine: <a, b> / (|a| |b|); dot: <a, b>; sqeuclidean: -|a - b|^2 / 2. Rows with a norm below 1e-12 are the zero vector under cosine,
    with gradient 0. A row that is ignored (bool [N]) is zeroed and gets the bias -inf; in any other row a value that is not finite
    makes the whole row NaN, so that it can't hide behind a logit of -inf.
    """
    product_dtype = _product_dtype(features)
    dtype = loss_dtype(features)
    x, row_bias = _cleared(features, ignored, dtype)
    y, col_bias = (None, None) if ref_features is None else _cleared(ref_features.to(features.dtype), ref_ignored, dtype)
    if metric == "cosine":
        norm = scale if isinstance(scale, Tensor) else torch.full((), scale, dtype=dtype, device=x.device)
        return Rows(x, y, norm, row_bias, col_bias, product_dtype, math.inf if isinstance(scale, Tensor) else scale**2)

    if isinstance(scale, Tensor):
        scale = scale / (scale > 0)
    x = _poisoned(x.to(dtype) * scale, product_dtype)
    y = None if y is None else _poisoned(y.to(dtype) * scale, product_dtype)
    if metric == "sqeuclidean":
        # Distances don't move with the origin: near the data they lose fewer digits. (Ignored rows are zeros.)
        with torch.no_grad():
            used = x.new_full((), x.shape[0]) if ignored is None else (~ignored).sum()
            centre = ranks.total(x.sum(0)) / ranks.total(used).clamp(min=1)
        x, row_bias = _with_half_square(x - centre, row_bias, product_dtype)
        if y is not None:
            y, col_bias = _with_half_square(y - centre, col_bias, product_dtype)
    return Rows(x, y, None, row_bias, col_bias, product_dtype, math.inf)


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


def _cleared(features: Tensor, ignored: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Rows, ignored ones zeroed, and the bias that takes those out of every set."""
    if ignored is None:
        return features, None
    bias = torch.zeros(features.shape[0], dtype=dtype, device=features.device).masked_fill(ignored, -torch.inf)
    return torch.where(ignored[:, None], 0, features), bias


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
