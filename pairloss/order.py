"""How rows are arranged for an engine: normalised, and sorted by label, so that most tiles hold no positives and need no mask. Counts
and sums over classes."""

from typing import Any

import torch
from torch import Tensor

from . import unit
from .engines import Call
from .selection import add_rows_


class Arrangement:
    """A call as its engine takes it, and the way back: rows of the call's norm, sorted by label where that pays.

    The sort is stable, so that equal input gives equal bits.
    """

    def __init__(self, call: Call, engine: Any) -> None:
        self.given, self.engine, self.by_engine = call, engine, engine.arranges(call)
        self.order_x, self.order_y = _label_order(call, engine)
        self.poison: Tensor | None = None  # [N]: NaN for an anchor that has no direction
        changes: dict[str, Any] = {}
        if self.order_x is not None:
            changes = {name: _take(getattr(call, name), self.order_x, 0) for name in ("ids_x", "row_bias")}
            changes |= {name: _take(getattr(call, name), self.order_y, 0) for name in ("ids_y", "col_bias")}
        if self.by_engine:
            changes |= {} if self.order_x is None else {"order_x": self.order_x, "order_y": self.order_y}
        elif call.norm is not None or self.order_x is not None:
            x, y = (self._arranged(rows, order) for rows, order in ((call.x, self.order_x), (call.y, self.order_y)))
            changes |= {"x": x, "y": y, "norm": None}
            self.poison = None if call.norm is None else x[:, 0] * 0  # what is NaN in one column is in all
        if (call.totals or call.own) and not self.by_engine:
            changes |= {"totals": False, "own": False}
        self.call = call._replace(**changes) if changes else call

    def _arranged(self, rows: Tensor | None, order: Tensor | None) -> Any:
        if rows is None or self.given.norm is None:
            return _take(rows, order, 0)
        return self.engine.scaled_rows_fwd(rows, self.given.norm, order, self.given.product_dtype)

    def rows(self, per_row: Tensor) -> Tensor:
        """What belongs to the anchors, along the last dimension, as the engine takes it."""
        return _take(per_row, self.order_x, per_row.ndim - 1)

    def cols(self, per_col: Tensor) -> Tensor:
        return _take(per_col, self.order_y, per_col.ndim - 1) if per_col.shape[-1] else per_col

    def from_rows(self, per_row: Any) -> Any:
        return _put(per_row, self.order_x)

    def from_cols(self, per_col: Any) -> Any:
        return _put(per_col, self.order_y)

    def needs(self, needs: list[bool]) -> list[bool]:
        """Which gradients the engine is asked for."""
        if self.by_engine or self.given.norm is None:
            return needs
        x, y, norm, *biases = needs
        return [x or norm, (y or norm) and self.given.y is not None, False, *biases]

    def from_grads(self, dx: Any, dy: Any, dnorm: Any, drow_bias: Any, dcol_bias: Any) -> list[Tensor | None]:
        drow_bias, dcol_bias = _put(drow_bias, self.order_x), _put(dcol_bias, self.order_y)
        if not self.by_engine:
            dx, of_x = self._given_back(self.given.x, self.order_x, dx)
            dy, of_y = self._given_back(self.given.y, self.order_y, dy)
            dnorm = of_x if of_y is None else of_y if of_x is None else of_x + of_y
        return [dx, dy, dnorm, drow_bias, dcol_bias]

    def _given_back(self, rows: Tensor | None, order: Tensor | None, grad: Tensor | None) -> Any:
        """The gradient of rows as they were given, and what that of the norm has from them."""
        if grad is None or self.given.norm is None:
            return _put(grad, order, 0), None
        return self.engine.scaled_rows_bwd(rows, self.given.norm, order, grad)


def scaled_rows_fwd(rows: Tensor, norm: Tensor, order: Tensor | None, product_dtype: torch.dtype) -> Tensor:
    """As engines.py says."""
    return _take(unit.scaled(rows.to(norm.dtype), norm), order, 0)


def scaled_rows_bwd(rows: Tensor, norm: Tensor, order: Tensor | None, grad: Tensor) -> tuple[Tensor, Tensor]:
    grad = _put(grad, order, 0)
    of_norm = unit.backward_(rows.to(grad.dtype), norm, grad)
    return grad.to(rows.dtype), of_norm


def _label_order(call: Call, engine: Any) -> tuple[Tensor | None, Tensor | None]:
    ids, candidate_ids = call.ids_x, call.candidate_ids
    if ids is None or candidate_ids is None or ids.ndim != 1 or not engine.label_order_pays(call):
        return None, None
    if call.symmetric:
        order = torch.argsort(ids, stable=True)
        return order, order
    if call.self_offset is None:
        return torch.argsort(ids, stable=True), torch.argsort(candidate_ids, stable=True)
    return None, None  # the pair left out would no longer stand on one diagonal


def _take(tensor: Tensor | None, order: Tensor | None, dim: int) -> Any:
    return tensor if tensor is None or order is None else tensor.index_select(dim, order)


def _put(tensor: Tensor | None, order: Tensor | None, dim: int = -1) -> Any:
    if tensor is None or order is None or not tensor.shape[dim]:
        return tensor
    return torch.empty_like(tensor).index_copy_(dim, order, tensor)


def count(ids: Tensor, candidate_ids: Tensor) -> Tensor:
    """[N]: how many candidates have the anchor's id, itself included."""
    ordered = candidate_ids.sort().values
    return torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids)


def class_sums(rows: Tensor, row_ids: Tensor, ids: Tensor) -> Tensor:
    """[N, D]: the sum of the rows whose id is ids_i; where there is none, the sum of some other class."""
    ordered = row_ids.sort().values
    first = torch.searchsorted(ordered, row_ids)  # a class is numbered by where it begins in label order
    sums = add_rows_(torch.zeros_like(rows), first, rows)
    return sums[torch.searchsorted(ordered, ids).clamp(max=rows.shape[0] - 1)]
