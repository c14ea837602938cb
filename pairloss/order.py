"""Label order: rows sorted by label, so that most tiles hold no positives and need no mask; counts and sums over classes."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from .engines import Call
from .selection import add_rows_


class LabelOrder:
    """The call with its rows sorted by label, where that pays, and the way back. Stable, so that equal input gives equal bits."""

    def __init__(self, call: Call, engine: Any) -> None:
        self.call, self.order_x, self.order_y = call, None, None
        ids, candidate_ids = call.ids_x, call.candidate_ids
        if ids is None or candidate_ids is None or ids.ndim != 1 or not engine.label_order_pays(call):
            return
        if call.symmetric:
            self.order_x = self.order_y = torch.argsort(ids, stable=True)
        elif call.self_offset is None:
            self.order_x, self.order_y = torch.argsort(ids, stable=True), torch.argsort(candidate_ids, stable=True)
        else:  # the pair left out would no longer stand on one diagonal
            return
        ordered = {name: _take(getattr(call, name), self.order_x, 0) for name in ("x", "ids_x", "row_bias")}
        ordered |= {name: _take(getattr(call, name), self.order_y, 0) for name in ("y", "ids_y", "col_bias")}
        self.call = dataclasses.replace(call, **ordered)

    def rows(self, per_row: Tensor) -> Tensor:
        """Into label order, along the last dimension."""
        return _take(per_row, self.order_x, per_row.ndim - 1)

    def cols(self, per_col: Tensor) -> Tensor:
        return _take(per_col, self.order_y, per_col.ndim - 1) if per_col.shape[-1] else per_col

    def unordered_rows(self, per_row: Any, dim: int) -> Any:
        return _put(per_row, self.order_x, dim)

    def unordered_cols(self, per_col: Any, dim: int) -> Any:
        return _put(per_col, self.order_y, dim)

    def unordered_grads(self, dx: Any, dy: Any, drow_bias: Any, dcol_bias: Any) -> list[Tensor | None]:
        return [_put(dx, self.order_x, 0), _put(dy, self.order_y, 0), _put(drow_bias, self.order_x, 0), _put(dcol_bias, self.order_y, 0)]


def _take(tensor: Tensor | None, order: Tensor | None, dim: int) -> Any:
    return tensor if tensor is None or order is None else tensor.index_select(dim, order)


def _put(tensor: Tensor | None, order: Tensor | None, dim: int) -> Tensor | None:
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
