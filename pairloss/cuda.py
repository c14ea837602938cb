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

from . import engines, operands, selection
from .engines import Call, Statistics, SumsAndGrads
from .operands import NO_SHIFT, SETS, Sums, cdiv

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
own_products_fwd, own_products_bwd = selection.own_products_fwd, selection.own_products_bwd


def scaled_rows_fwd(rows: Tensor, norm: Tensor, order: Tensor | None, product_dtype: torch.dtype) -> Tensor:
    rows, norm = rows.contiguous(), operands.norm_beside(rows, norm)
    result = torch.empty(rows.shape, dtype=product_dtype, device=rows.device)
    _cuda.scaled_rows(_stream(rows), _name(rows), _name(result), *map(_address, (rows, norm, order)), *rows.shape, _address(result))
    return result


def scaled_rows_bwd(rows: Tensor, norm: Tensor, order: Tensor | None, grad: Tensor) -> tuple[Tensor, Tensor]:
    rows, norm, grad = rows.contiguous(), operands.norm_beside(rows, norm), grad.contiguous()
    drows, along = torch.empty_like(rows), grad.new_empty(len(rows))
    given = *map(_address, (rows, norm, order)), *rows.shape
    _cuda.scaled_rows_backward(_stream(rows), _name(rows), *given, *map(_address, (grad, drows, along)))
    return drows, along.sum()


def row_stats_fwd(call: Call) -> Statistics:
    n, m, sets, tile = call.x.shape[0], call.candidates.shape[0], call.num_sets, _Tile.of(call)
    if n == 0 or m == 0:
        sums = [call.x.new_zeros(2, sets, size, dtype=call.dtype) for size in (n, m if call.both_sides else 0)]
        return sums[0][0].log(), sums[1][0].log(), sums[0], sums[1]
    bounded = call.logit_bound <= NO_SHIFT
    # Groups of whole row tiles on both sides: x against itself has one diagonal.
    span_x, span_y = (cdiv(cdiv(rows, operands.GROUPS), tile.rows) for rows in (n, m))
    groups_x, groups_y = cdiv(n, span_x * tile.rows), cdiv(m, span_y * tile.rows)
    like = call.x.new_empty(0, dtype=call.dtype)
    rows = Sums(like, groups_y, sets, n, bounded)
    cols = rows if call.symmetric else Sums(like, groups_x, sets, m if call.both_sides else 0, bounded)
    of_cols = (cols.m, cols.s) if call.symmetric or call.both_sides else (None, None)
    x, y = _sides(call, tile)
    spans = (span_x, span_y * (tile.rows // tile.cols))
    _launch(_cuda.row_stats, call, tile, x, y, call.self_offset, *map(_address, (rows.m, rows.s, *of_cols)), *spans, bounded)
    row_sums, row_logs = _total(rows)
    col_sums, col_logs = _total(cols) if call.both_sides else (row_sums.new_empty(2, sets, 0), row_logs.new_empty(sets, 0))
    return row_logs, col_logs, row_sums, col_sums


def row_stats_bwd(
    call: Call, row_sums: Tensor, row_grads: Tensor, col_sums: Tensor, col_grads: Tensor, needs: list[bool]
) -> list[Tensor | None]:
    sides: list[tuple[Tensor | None, Tensor]] = [(row_sums, row_grads), (col_sums, col_grads)]
    return _grads(call, _Form("exp", 1), sides if call.both_sides else sides[:1], needs, False)[1]


def pair_sum_fwd_bwd(call: Call, over: str, term: str, with_sums: bool, weights: Tensor | None, needs: list[bool]) -> SumsAndGrads:
    sides: list[tuple[Tensor | None, Tensor]] = [] if weights is None else [(None, weights)]
    return _grads(call, _Form(term, SETS.index(over)), sides, needs if sides else [False] * 5, with_sums)


def _total(sums: Sums) -> tuple[Tensor, Tensor]:
    """Over all groups, [2, K, n], and its logarithm."""
    groups, sets, n = sums.s.shape
    total, logs = sums.s.new_empty(2, sets, n), sums.s.new_empty(sets, n)
    _cuda.total(_stream(logs), _name(logs), *map(_address, (sums.s, sums.m, total, logs)), logs.numel(), groups, sums.bounded)
    return total, logs


def _scaled_weights(call: Call, sides: list[tuple[Tensor | None, Tensor]]) -> tuple[list[Tensor], Tensor]:
    def largest(sums: Tensor | None, grads: Tensor, to: Tensor) -> None:
        _cuda.largest(_stream(grads), _name(grads), *map(_address, (sums, grads, to)), grads.numel())

    def scaled(sums: Tensor | None, grads: Tensor, largest: Tensor, steepest: Tensor | None, to: Tensor, unscale: Tensor) -> None:
        given = *map(_address, (sums, grads, largest)), len(largest), _address(steepest)
        _cuda.scaled_weights(_stream(grads), _name(grads), *given, *map(_address, (to, unscale)), grads.numel())

    return operands.scaled_weights(call, sides, largest, scaled)


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
        return _Tile(*_cuda.tile(str(call.product_dtype).removeprefix("torch.")))


class _Side:
    """One side of the comparison, as the kernels take it."""

    def __init__(self, rows: Tensor, ids: Tensor | None, bias: Tensor | None, weights: Tensor | None = None) -> None:
        self.rows = rows  # [n, D] in the product dtype, D padded
        self.ids = ids  # [n] int32, or [n, words]
        self.bias = bias  # [n]
        self.weights = weights  # g, scaled, and m [2, K, n], or of a pair sum g alone [n]; None: this side has none
        self._ranges: dict[tuple[str, int], Tensor] = {}

    def id_ranges(self, tile: int) -> Tensor | None:
        """[2, T], of tiles of so many rows."""
        if self.ids is None or self.ids.ndim > 1:
            return None
        return self._in_tiles("ids", tile, self.ids[None], None)[:, 0]

    def weight_ranges(self, tile: int) -> Tensor | None:
        """[2, K, T], of m."""
        if self.weights is None or self.weights.ndim == 1:
            return None
        return self._in_tiles("weights", tile, self.weights[1], self.weights[0])

    def _in_tiles(self, name: str, tile: int, vectors: Tensor, skipped_at_0: Tensor | None) -> Tensor:
        """[2, K, T]: the least and the greatest of every tile of each of K vectors, but for entries where the other tensor is 0."""
        if (name, tile) not in self._ranges:
            count, n = vectors.shape
            ranges = vectors.new_empty(2, count, cdiv(n, tile))
            _cuda.ranges(_stream(vectors), _name(vectors), *map(_address, (vectors, skipped_at_0, ranges)), n, tile, count)
            self._ranges[name, tile] = ranges
        return self._ranges[name, tile]

    def native(self, tile: int) -> Any:
        given = {"rows": self.rows, "ids": self.ids, "bias": self.bias, "weights": self.weights}
        given |= {"id_ranges": self.id_ranges(tile), "weight_ranges": self.weight_ranges(tile)}
        return _cuda.Side(n=len(self.rows), **{name: _address(tensor) for name, tensor in given.items()})


def _grads(
    call: Call, form: _Form, sides: list[tuple[Tensor | None, Tensor]], needs: list[bool], with_sums: bool
) -> tuple[Tensor | None, list[Tensor | None]]:
    weights, unscale = _scaled_weights(call, sides)
    row_weights, col_weights = [*weights, None, None][:2]
    tile = _Tile.of(call)
    x, y = _sides(call, tile, row_weights, col_weights)
    to_x, to_y, _, to_row_bias, to_col_bias = needs
    dx, drow_bias, sums = _side_grads(call, form, tile, x, y, call.self_offset, unscale, to_x, to_row_bias, with_sums)
    to_y, to_col_bias = (not call.symmetric and need for need in (to_y, to_col_bias))
    offset = None if call.self_offset is None else -call.self_offset
    dy, dcol_bias, _ = _side_grads(call, form, tile, y, x, offset, unscale, to_y, to_col_bias, False)
    return sums, [dx, dy, None, drow_bias, dcol_bias]


def _side_grads(
    call: Call, form: _Form, tile: _Tile, x: _Side, y: _Side, self_offset: int | None, unscale: Tensor,
    need_rows: bool, need_bias: bool, need_sums: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients of x's rows and bias, W y and A 1; and the sums over x's pairs."""
    (n, d), m, width = x.rows.shape, y.rows.shape[0], call.x.shape[1]
    if not (need_rows or need_bias or need_sums):
        return None, None, None

    def new(make: Any, wanted: bool, *shape: int) -> Tensor | None:
        return make(shape, dtype=call.dtype, device=call.x.device) if wanted else None

    if n == 0 or m == 0:
        return new(torch.zeros, need_rows, n, width), new(torch.zeros, need_bias, n), new(torch.zeros, need_sums, n)
    blocks = cdiv(n, tile.rows) * max(1, cdiv(d, tile.gradient))
    parts = max(1, min(BLOCKS // blocks, MOST_PARTS, cdiv(m, tile.cols)))
    dx = new(torch.empty, need_rows or form.term == "exp", parts, n, d)  # exponentials have no kernel for the bias's gradient alone
    dbias, sums = new(torch.empty, need_bias, parts, n), new(torch.empty, need_sums, parts, n)
    visits = None
    if form.term != "exp" and (ranges_x := x.id_ranges(tile.rows)) is not None and (ranges_y := y.id_ranges(tile.cols)) is not None:
        visits = operands.visits(form.over, ranges_x, ranges_y)
    outputs = map(_address, (dx, dbias, sums))
    _launch(_cuda.gradients, call, tile, x, y, self_offset, form.term, form.over, _address(visits), parts, *outputs)
    return (
        _sum_of_parts(dx, unscale, width) if need_rows and dx is not None else None,
        None if dbias is None else _sum_of_parts(dbias[..., None], unscale, 1)[:, 0],
        None if sums is None else _sum_of_parts(sums[..., None], None, 1)[:, 0],
    )


def _sum_of_parts(parts: Tensor, factor: Tensor | None, width: int) -> Tensor:
    """The first columns of [parts, n, d], added up, times the factor; in place where that is all."""
    count, n, d = parts.shape
    whole = count == 1 and width == d
    if whole and factor is None:
        return parts[0]
    to = parts[0] if whole else parts.new_empty(n, width)
    _cuda.sum_of_parts(_stream(to), _name(to), *map(_address, (parts, factor, to)), n, d, width, count)
    return to


def _sides(call: Call, tile: _Tile, row_weights: Tensor | None = None, col_weights: Tensor | None = None) -> tuple[_Side, _Side]:
    ids_x, ids_y = _ids(call)
    x = _Side(operands.padded(call.x.to(call.product_dtype), tile.chunk), ids_x, _contiguous(call.row_bias), row_weights)
    if call.y is None:
        return x, x
    return x, _Side(operands.padded(call.y.to(call.product_dtype), tile.chunk), ids_y, _contiguous(call.col_bias), col_weights)


def _ids(call: Call) -> tuple[Tensor | None, Tensor | None]:
    if call.ids_x is None or call.ids_x.ndim == 1:
        return operands.ranks(call)
    return call.ids_x.contiguous().view(torch.int32), None if call.ids_y is None else call.ids_y.contiguous().view(torch.int32)


def _contiguous(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()  # one number may have been expanded to all rows


def _launch(function: Any, call: Call, tile: _Tile, x: _Side, y: _Side, self_offset: int | None, *arguments: Any) -> None:
    """function(dtype, call, *arguments): a launch. Memory that is freed when this returns is used again only behind it on the stream."""
    cutoff = None if call.cutoff is None else call.cutoff.to(call.x.device, call.dtype)
    native = _cuda.Call(
        x=x.native(tile.rows),
        y=y.native(tile.cols),
        symmetric=call.symmetric,
        d=x.rows.shape[1],
        sets=call.num_sets,
        words=0 if x.ids is None or x.ids.ndim == 1 else x.ids.shape[1],
        self_offset=self_offset,
        circle=call.score == "circle",
        margin=call.m,
        gamma=call.gamma,
        cutoff=_address(cutoff),
        stream=_stream(call.x),
    )
    function(_name(x.rows), native, *arguments)


def _stream(tensor: Tensor) -> Any:
    if tensor.device.type != "cuda":
        return _cuda.Stream(0, 0)
    return _cuda.Stream(tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream)


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
