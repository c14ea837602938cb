"""Of every anchor, the sum of s_ij over the candidates with its id and how many they are, beside an engine that forms neither.

Equal ids have class sums, O(N D); multi-hot ones take a pass over the pairs for each.
"""

from types import ModuleType

import torch
from torch import Tensor

from . import order
from .engines import Call
from .selection import as_multiplied


def forward(call: Call, engine: ModuleType) -> Tensor:
    """[2, N]."""
    x, y, ids, candidate_ids, itself = _labelled(call)
    if ids.ndim == 1:
        classes = order.Classes(ids, candidate_ids)
        sums = (x * _sums(classes, y, itself)).sum(1)
        return torch.stack([sums, classes.count - int(itself)])
    ones = x.new_ones(len(x))
    without_products = call._replace(x=call.x.new_zeros(len(x), 1), y=None if call.y is None else call.x.new_zeros(len(y), 1))
    calls = _without_biases(call), without_products._replace(row_bias=ones, col_bias=None)
    return torch.stack([engine.pair_sum_fwd_bwd(each, "positives", "linear", True, None, [False] * 5)[0] for each in calls])


def add_gradients(call: Call, engine: ModuleType, weights: Tensor, grads: list[Tensor | None]) -> None:
    """To those of x and y, where there are any: of the sums times the weights [N]."""
    x, y, ids, candidate_ids, itself = _labelled(call)
    if ids.ndim == 1:
        weights, classes = weights[:, None], order.Classes(ids, candidate_ids)
        dx = weights * _sums(classes, y, itself)
        dy = _sums(classes if call.symmetric else order.Classes(candidate_ids, ids), weights * x, itself)
        more = [dx + dy, None] if call.symmetric else [dx, dy]
    else:
        needs = [grad is not None for grad in grads[:2]] + [False] * 3
        more = engine.pair_sum_fwd_bwd(_without_biases(call), "positives", "linear", False, weights, needs)[1][:2]
    for grad, one in zip(grads, more, strict=False):
        if grad is not None and one is not None:
            grad += one


def _labelled(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor, bool]:
    """Both sides, with rows as the products round them, and whether each row leaves out itself."""
    assert call.ids_x is not None
    assert call.candidate_ids is not None
    return *as_multiplied(call), call.ids_x, call.candidate_ids, call.self_offset is not None


def _sums(classes: order.Classes, rows: Tensor, itself: bool) -> Tensor:
    """[N, D]: of the rows of each class, where wanted but for row i itself."""
    sums = classes.sums(rows)
    return sums - rows if itself else sums


def _without_biases(call: Call) -> Call:
    return call._replace(row_bias=None, col_bias=None)
