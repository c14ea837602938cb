"""The engine "cuda": C++ for NVIDIA GPUs, csrc/cuda. This file prepares operands and turns them into pointers.

Fused: products, biases, the pair left out, label masks, exponentials, sums, and the gradients' second product; never materialised: more
than a tile of pairs for each block. float64 and float32 by fused multiply-adds, half dtypes on tensor cores with float32 sums. No
atomics: the same input gives the same bits. No host synchronisation.
"""

import importlib.util
import os
import shutil
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import engines, operands, order, selection
from .engines import Call, Statistics, SumsAndGrads, weights_of, with_logs
from .operands import GROUPS, NO_SHIFT, SETS

_cuda: Any
_missing: str | None = None
try:
    from . import _cuda
except ImportError as error:
    _missing = str(error)

OLDEST_CAPABILITY = (7, 5)
# Blocks that a GPU is to have: its multiprocessors hold three or four each. Where a side has fewer tiles, each block visits a part of the
# candidates only. The number is the same for all GPUs, and so are the bits.
BLOCKS = 512
MOST_PARTS = 8  # partial gradients of x's size


def why_not(call: Call) -> str | None:
    if _missing is not None:
        return f"not built ({_why_missing()})"
    if (call.x.dtype == torch.float64) != (call.product_dtype == torch.float64):
        return f"products of {call.x.dtype} rows in {call.product_dtype} are not served"
    device = call.x.device
    if device.type != _cuda.device_type or torch.version.hip:
        return f"the tensors are on {'an AMD GPU' if torch.version.hip else device.type}, not on an NVIDIA GPU"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST_CAPABILITY:
            return f"the GPU has compute capability {capability[0]}.{capability[1]}, below {OLDEST_CAPABILITY[0]}.{OLDEST_CAPABILITY[1]}"
    return None


def _why_missing() -> str:
    if importlib.util.find_spec(f"{__package__}._cuda") is not None:
        return str(_missing)  # it is there, and doesn't load
    nvcc = any(shutil.which(name) for name in (os.environ.get("CUDACXX", "nvcc"), "/usr/local/cuda/bin/nvcc"))
    return "pip install . would, with the nvcc that is here" if nvcc else "no nvcc found"


def arranges(call: Call) -> bool:
    return False


label_order_pays = engines.label_order_pays
scaled_rows_fwd, scaled_rows_bwd = order.scaled_rows_fwd, order.scaled_rows_bwd
own_products_fwd, own_products_bwd = selection.own_products_fwd, selection.own_products_bwd


def row_stats_fwd(call: Call) -> Statistics:
    n, m, sets, tile = call.x.shape[0], call.candidates.shape[0], call.num_sets, _Tile.of(call)
    if n == 0 or m == 0:
        return with_logs(call.x.new_zeros(2, sets, n), call.x.new_zeros(2, sets, m if call.both_sides else 0))
    bounded = call.logit_bound <= NO_SHIFT
    # Groups of whole row tiles on both sides: x against itself has one diagonal.
    span_x, span_y = (_tiles(_tiles(rows, GROUPS), tile.rows) for rows in (n, m))
    groups_x, groups_y = _tiles(n, span_x * tile.rows), _tiles(m, span_y * tile.rows)
    rows = operands.Sums(call.x, groups_y, sets, n, bounded)
    cols = rows if call.symmetric else operands.Sums(call.x, groups_x, sets, m if call.both_sides else 0, bounded)
    of_cols = (cols.m, cols.s) if call.symmetric or call.both_sides else (None, None)
    x, y = _sides(call, tile)
    spans = (span_x, span_y * (tile.rows // tile.cols))
    _launch(_cuda.row_stats, call, tile, x, y, call.self_offset, *map(_address, (rows.m, rows.s, *of_cols)), *spans, bounded)
    result = rows.total()
    return with_logs(result, result.new_empty(2, sets, 0) if call.symmetric else cols.total())


def row_stats_bwd(
    call: Call, row_sums: Tensor, row_grads: Tensor, col_sums: Tensor, col_grads: Tensor, needs: list[bool]
) -> list[Tensor | None]:
    row_weights, col_weights = weights_of(row_sums, row_grads), weights_of(col_sums, col_grads)
    scale = operands.scale(operands.steepest(call), row_weights[0], col_weights[0])
    row_weights, col_weights = (torch.stack([g * scale, m]) for g, m in (row_weights, col_weights))
    return _grads(call, _Form("exp", 1), row_weights, col_weights if call.both_sides else None, scale, needs, False)[1]


def pair_sum_fwd_bwd(call: Call, over: str, term: str, with_sums: bool, weights: Tensor | None, needs: list[bool]) -> SumsAndGrads:
    form = _Form(term, SETS.index(over))
    if weights is None:
        weights, needs = call.x.new_zeros(call.x.shape[0]), [False] * 5
    scale = operands.scale(1.0, weights)
    return _grads(call, form, weights * scale, None, scale, needs, with_sums)


class _Form(NamedTuple):
    """Which primitive the gradients are of."""

    term: str
    over: int  # the set that a pair sum is over


class _Tile(NamedTuple):
    rows: int
    cols: int
    chunk: int  # the columns of rows are a multiple
    gradient: int  # columns of the gradient that a block forms

    @staticmethod
    def of(call: Call) -> "_Tile":
        return _Tile(*_cuda.tile(_name(call)))


class _Side(NamedTuple):
    """One side of the comparison, as the kernels take it."""

    rows: Tensor  # [n, D] in the product dtype, D padded
    ids: Tensor | None  # [n] int32, or [n, words]
    bias: Tensor | None  # [n]
    weights: Tensor | None = None  # g, scaled, and m [2, K, n], or of a pair sum g alone [n]; None: this side has none


def _grads(
    call: Call, form: _Form, row_weights: Tensor, col_weights: Tensor | None, scale: Tensor, needs: list[bool], with_sums: bool
) -> SumsAndGrads:
    tile = _Tile.of(call)
    x, y = _sides(call, tile)
    x = x._replace(weights=row_weights.contiguous())
    y = x if call.symmetric else y._replace(weights=None if col_weights is None else col_weights.contiguous())
    to_x, to_y, _, to_row_bias, to_col_bias = needs
    dx, drow_bias, sums = _side_grads(call, form, tile, x, y, call.self_offset, to_x, to_row_bias, with_sums)
    to_y, to_col_bias = (not call.symmetric and need for need in (to_y, to_col_bias))
    offset = None if call.self_offset is None else -call.self_offset
    dy, dcol_bias, _ = _side_grads(call, form, tile, y, x, offset, to_y, to_col_bias, False)
    return sums, [None if grad is None else grad / scale for grad in (dx, dy, None, drow_bias, dcol_bias)]


def _side_grads(
    call: Call, form: _Form, tile: _Tile, x: _Side, y: _Side, self_offset: int | None, need_rows: bool, need_bias: bool, need_sums: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x's rows and bias, W y and A 1, scaled; and the sums over x's pairs."""
    (n, d), m = x.rows.shape, y.rows.shape[0]
    if not (need_rows or need_bias or need_sums):
        return None, None, None
    blocks = max(1, _tiles(n, tile.rows) * _tiles(d, tile.gradient))
    parts = max(1, min(BLOCKS // blocks, MOST_PARTS, _tiles(m, tile.cols)))
    new = call.x.new_empty if n and m else call.x.new_zeros
    # Exponentials have no kernel that forms the bias's gradient alone.
    dx = new(parts, n, d) if need_rows or form.term == "exp" else None
    dbias = new(parts, n) if need_bias else None
    sums = new(parts, n) if need_sums else None
    if n and m:
        visits = None
        if form.term != "exp" and x.ids is not None and y.ids is not None and x.ids.ndim == 1:
            visits = operands.visits(form.over, _id_ranges(x, tile.rows), _id_ranges(y, tile.cols))
        outputs = map(_address, (dx, dbias, sums))
        _launch(_cuda.gradients, call, tile, x, y, self_offset, form.term, form.over, _address(visits), parts, *outputs)
    dx, dbias, sums = (None if v is None else v.sum(0) for v in (dx, dbias, sums))
    return dx[:, : call.x.shape[1]].contiguous() if need_rows and dx is not None else None, dbias, sums


def _sides(call: Call, tile: _Tile) -> tuple[_Side, _Side]:
    ids_x, ids_y = _ids(call)
    x = _Side(operands.padded(call.x.to(call.product_dtype), tile.chunk), ids_x, _contiguous(call.row_bias))
    if call.y is None:
        return x, x
    return x, _Side(operands.padded(call.y.to(call.product_dtype), tile.chunk), ids_y, _contiguous(call.col_bias))


def _ids(call: Call) -> tuple[Tensor | None, Tensor | None]:
    if call.ids_x is None or call.ids_x.ndim == 1:
        return operands.ranks(call.ids_x, call.ids_y)
    return call.ids_x.contiguous().view(torch.int32), None if call.ids_y is None else call.ids_y.contiguous().view(torch.int32)


def _contiguous(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()  # one number may have been expanded to all rows


def _launch(function: Any, call: Call, tile: _Tile, x: _Side, y: _Side, self_offset: int | None, *arguments: Any) -> None:
    """function(dtype, call, *arguments): a launch. Memory that is freed when this returns is used again only behind it on the stream."""
    cutoff = None if call.cutoff is None else call.cutoff.to(call.x)
    kept: list[Tensor | None] = []
    sides = (_native_side(x, tile.rows, kept), _native_side(y, tile.cols, kept))
    on_gpu = call.x.device.type == "cuda"
    native = _cuda.Call(
        x=sides[0],
        y=sides[1],
        symmetric=call.symmetric,
        d=x.rows.shape[1],
        sets=call.num_sets,
        words=0 if x.ids is None or x.ids.ndim == 1 else x.ids.shape[1],
        self_offset=self_offset,
        circle=call.score == "circle",
        margin=call.m,
        gamma=call.gamma,
        cutoff=_address(cutoff),
        device=call.x.device.index or 0,
        stream=torch.cuda.current_stream(call.x.device).cuda_stream if on_gpu else 0,
    )
    function(_name(call), native, *arguments)


def _native_side(side: _Side, tile: int, kept: list[Tensor | None]) -> Any:
    id_ranges = None if side.ids is None or side.ids.ndim > 1 else _id_ranges(side, tile)
    exponentials = side.weights is not None and side.weights.ndim > 1
    weight_ranges = operands.weight_ranges(side.weights, tile) if exponentials and side.weights is not None else None
    tensors = (side.rows, side.ids, id_ranges, side.bias, side.weights, weight_ranges)
    kept += tensors
    rows, ids, ranges, bias, weights, m_ranges = map(_address, tensors)
    return _cuda.Side(n=len(side.rows), rows=rows, ids=ids, id_ranges=ranges, bias=bias, weights=weights, weight_ranges=m_ranges)


def _id_ranges(side: _Side, tile: int) -> Tensor:
    assert side.ids is not None
    return operands.tile_ranges(side.ids, side.ids, tile)


def _name(call: Call) -> str:
    return str(call.product_dtype).removeprefix("torch.")


def _tiles(n: int, size: int) -> int:
    return -(-n // size)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
