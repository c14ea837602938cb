"""How rows are arranged for an engine: normalised, and sorted by label, so that most tiles hold no positives and need no mask. Counts
and sums over classes."""

from typing import Any

import torch
from torch import Tensor

from . import unit
from .engines import Call
from .selection import add_rows_, rows_at


class Arrangement:
    """A call as its engine takes it, and the way back: rows of the call's norm, sorted by label where that pays.

    The sort is stable, so that equal input gives equal bits.
    """

    def __init__(self, call: Call, engine: Any) -> None:
        self.given, self.engine, self.by_engine = call, engine, engine.arranges(call)
        self.order_x: Tensor | None = None
        self.order_y: Tensor | None = None
        self.poison: Tensor | None = None  # [N]: NaN for an anchor that has no direction, else a number
        changes: dict[str, Any] = {}
        if _has_label_order(call) and engine.label_order_pays(call):
            assert call.ids_x is not None
            ids_x, self.order_x = call.ids_x.sort(stable=True)
            ids_y, self.order_y = (None, self.order_x) if call.ids_y is None else call.ids_y.sort(stable=True)
            changes = {"ids_x": ids_x, "ids_y": ids_y, "ids_ascend": True}
            changes |= {"row_bias": _take(call.row_bias, self.order_x, 0), "col_bias": _take(call.col_bias, self.order_y, 0)}
        if self.by_engine:
            changes |= {} if self.order_x is None else {"order_x": self.order_x, "order_y": self.order_y}
        elif call.norm is not None or self.order_x is not None:
            x, y = (self._arranged(rows, order) for rows, order in ((call.x, self.order_x), (call.y, self.order_y)))
            changes |= {"x": x, "y": y, "norm": None}
            self.poison = None if call.norm is None else x[:, 0]  # what is NaN in one column is in all
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


def _has_label_order(call: Call) -> bool:
    if call.ids_x is None or call.ids_x.ndim != 1:
        return False
    # Of two sets, the pair left out would no longer stand on one diagonal.
    return call.symmetric or (call.ids_y is not None and call.self_offset is None)


def _take(tensor: Tensor | None, order: Tensor | None, dim: int) -> Any:
    return tensor if tensor is None or order is None else tensor.index_select(dim, order)


def _put(tensor: Tensor | None, order: Tensor | None, dim: int = -1) -> Any:
    if tensor is None or order is None or not tensor.shape[dim]:
        return tensor
    return torch.empty_like(tensor).index_copy_(dim, order, tensor)


class Classes:
    """Of every anchor the rows that have its id: how many they are, itself included, and their sum."""

    def __init__(self, ids: Tensor, row_ids: Tensor) -> None:
        ordered = row_ids.sort().values
        # A class is numbered by where it begins in label order.
        self._of_rows = torch.searchsorted(ordered, row_ids)
        self._all_occur = ids is row_ids
        self._of_anchors = self._of_rows if self._all_occur else torch.searchsorted(ordered, ids)
        self.count = torch.searchsorted(ordered, ids, right=True) - self._of_anchors  # [N]

    def sums(self, rows: Tensor) -> Tensor:
        """[N, D]: the sum of the rows whose id is ids_i."""
        if not rows.shape[0]:
            return rows.new_zeros(self.count.shape[0], rows.shape[1])
        sums = add_rows_(torch.zeros_like(rows), self._of_rows, rows)
        if self._all_occur:
            return rows_at(sums, self._of_anchors)
        sums = rows_at(sums, self._of_anchors.clamp(max=rows.shape[0] - 1))
        return torch.where(self.count[:, None] > 0, sums, 0)
