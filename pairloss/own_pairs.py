"""The own pairs of a pair sum, x_i and y_i as a positive, beside an engine that leaves them out only. O(N D)."""

from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .engines import Call


def add(call: Call, engine: ModuleType, sums: Tensor | None, weights: Tensor | None, grads: list[Tensor | None]) -> None:
    """log(1 + e^-z_ii) to the sums [N], where there are any, and with weights [N] what that adds to the gradients."""
    z = engine.own_products_fwd(call) + sum(bias for bias in (call.row_bias, call.col_bias) if bias is not None)
    if sums is not None:
        sums -= logsigmoid(z)
    if weights is None:
        return
    slopes = -weights * torch.sigmoid(-z)
    dx, dy, dnorm = engine.own_products_bwd(call, slopes, [grad is not None for grad in grads])
    for grad, more in zip(grads, (dx, dy, dnorm, slopes, slopes), strict=True):
        if grad is not None:
            grad += more
