"""From a call to kernel launches: operands, the sums' reduction, grids. O(N D) PyTorch, no host synchronisation."""

import contextlib
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .. import engines, operands
from ..engines import Call, Statistics, SumsAndGrads
from ..operands import ENTRIES, NO_SHIFT, SETS, Sums, cdiv, norm_beside, visits
from . import tiles
from .backward import grads_kernel, weights_kernel
from .pair_sum import pair_sum_fwd_kernel
from .row_stats import row_stats_fwd_kernel
from .rows import scaled_rows_backward_kernel, scaled_rows_kernel
from .tiles import Tile
from .vectors import centred_weights_kernel, id_ranges_kernel, largest_kernel, scaled_weights_kernel, total_kernel

Result = TypeVar("Result")
# As many as the forward kernel of row_stats has for x against itself.
PROGRAMS = operands.GROUPS * (operands.GROUPS + 1) // 2
# Weights of large D at a time, or one row of tiles (256 MiB at M = 1,048,576): about an L2 cache, and where y's gradient is wanted
# too, which each slab reads and writes once, more.
SLAB_BYTES = {False: 64 << 20, True: 256 << 20}
TORCH_ADDS_TO_FLOAT32 = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)  # products of half operands
# Columns are padded to a multiple of this, so that every load is a whole 32 bytes.
ALIGN = 16


class _Side:
    """One side of the comparison, as the kernels take it."""

    def __init__(self, rows: Tensor, ids: Tensor | None, bias: Tensor | None, weights: Tensor | None = None) -> None:
        self.rows = rows  # [n, D] in the product dtype, D padded
        self.ids = ids  # [n]
        self.bias = bias  # [n]
        self.weights = weights  # g, scaled, and m [2, K, n], or of a pair sum g alone [n]; None: this side has none
        self._of_tiles: dict[Hashable, tuple[Tensor, Tensor]] = {}

    def id_ranges(self, tile: Tile) -> tuple[Tensor | None, Tensor | None]:
        """[2, T]: the least and the greatest id of every block_m rows, and of every block_n."""
        if self.ids is None:
            return None, None
        large, small = sorted(tile[:2], reverse=True)
        of_large, of_small = self._kept((large, small), lambda: self._id_ranges(large, small))
        return (of_large, of_small) if tile.block_m == large else (of_small, of_large)

    def _id_ranges(self, large: int, small: int) -> tuple[Tensor, Tensor]:
        n = len(self.rows)
        of_large, of_small = (torch.empty(2, cdiv(n, block), dtype=self.ids.dtype, device=self.ids.device) for block in (large, small))
        arguments = {"p_ids": self.ids, "p_large": of_large, "p_small": of_small, "N": n, "LARGE": large, "SMALL": small}
        arguments |= {"T": of_large.shape[1], "T_SMALL": of_small.shape[1]}
        _launch(id_ranges_kernel, of_large.shape[1:], tiles.of_entries(large), arguments)
        return of_large, of_small

    def centred_weights(self, tile: Tile) -> tuple[Tensor | None, Tensor | None]:
        """[2, K, T]: the least and the greatest m of the larger block's rows; and the weights from their centre, [K, n]."""
        if self.weights is None:
            return None, None
        large = max(tile[:2])
        return self._kept(large, lambda: self._centred_weights(large))

    def _centred_weights(self, large: int) -> tuple[Tensor, Tensor]:
        _, sets, n = self.weights.shape
        ranges, centred = self.weights.new_empty(2, sets, cdiv(n, large)), self.weights.new_empty(sets, n)
        arguments = {"p_weights": self.weights, "p_ranges": ranges, "p_centred": centred, "N": n, "T": ranges.shape[2], "SETS": sets}
        _launch(centred_weights_kernel, (ranges.shape[2], sets), tiles.of_entries(large), arguments | {"LARGE": large})
        return ranges, centred

    def _kept(self, key: Hashable, of_tiles: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        if key not in self._of_tiles:
            self._of_tiles[key] = of_tiles()
        return self._of_tiles[key]


class _Form(NamedTuple):
    """Which primitive the backward kernels serve."""

    term: str = "exp"
    over: int = 1  # the set that a pair sum is over
    with_sums: bool = False  # whose sums are wanted too, and come with the weights of large D


def row_stats_fwd(call: Call) -> Statistics:
    n, m, sets = call.x.shape[0], call.candidates.shape[0], call.num_sets
    if n == 0 or m == 0:
        sums = [call.x.new_zeros(2, sets, size, dtype=call.dtype) for size in (n, m if call.both_sides else 0)]
        return sums[0][0].log(), sums[1][0].log(), sums[0], sums[1]
    x, y = _sides(call)
    kind = call.score, call.both_sides, call.cutoff is None, call.logit_bound <= NO_SHIFT
    return _on_tile(tiles.FORWARD, y, x, lambda tile: _row_stats_fwd(call, x, y, tile), kind)


def _row_stats_fwd(call: Call, x: _Side, y: _Side, tile: Tile) -> Statistics:
    """x's rows are the columns of the kernel's tiles, whose sums cost less."""
    n, m, sets = call.x.shape[0], call.candidates.shape[0], call.num_sets
    # Groups of whole tile columns on both sides: x against itself has one diagonal.
    span_x, span_y = (cdiv(cdiv(rows, operands.GROUPS), tile.block_n) for rows in (n, m))
    groups_x, groups_y = cdiv(n, span_x * tile.block_n), cdiv(m, span_y * tile.block_n)
    bounded = call.logit_bound <= NO_SHIFT

    float32 = torch.empty(0, dtype=torch.float32, device=x.rows.device)
    of_x = Sums(float32, groups_y, sets, n, bounded)
    of_y = of_x if call.symmetric else Sums(float32, groups_x, sets, m if call.both_sides else 0, bounded)
    arguments = _arguments(call, y, x, tile, None if call.self_offset is None else -call.self_offset) | _score_arguments(call)
    arguments |= {
        "p_rows_m": of_y.m,
        "p_rows_s": of_y.s,
        "p_cols_m": of_x.m,
        "p_cols_s": of_x.s,
        "span_x": span_y * (tile.block_n // tile.block_m),
        "span_y": span_x,
        "SYMMETRIC": call.symmetric,
        "ROWS": call.symmetric or call.both_sides,
        "BOUNDED": bounded,
        "WHOLE_D": tile.block_d is None,
    }
    _launch(row_stats_fwd_kernel, (groups_x, groups_y), tile, arguments)
    row_sums, row_logs = _total(of_x)
    col_sums, col_logs = _total(of_y) if call.both_sides else (row_sums.new_empty(2, sets, 0), row_logs.new_empty(sets, 0))
    return row_logs, col_logs, row_sums, col_sums


def _on_tile(
    table: tuple[tiles.Row, ...], x: _Side, y: _Side, launch: Callable[[Tile], Result], *kind: Hashable, heavy: tuple[str, ...] = ()
) -> Result:
    """The launch on the tile of the table. Kind: what makes one launch another, besides the operands."""
    (n, d), m = x.rows.shape, len(y.rows)
    sizes, given = (n.bit_length(), m.bit_length()), (v is None for side in (x, y) for v in (side.ids, side.bias, side.weights))
    tile = tiles.choose(table, d, x.rows.dtype, x.rows.device, heavy, (launch.__qualname__, *sizes, x is y, *given, *kind), launch)
    assert tile is not None
    return launch(tile)


def _heavy(call: Call, form: _Form, bias: bool) -> tuple[str, ...]:
    """What of a backward pass takes registers besides, see tiles.Row."""
    takes = {"circle": call.score == "circle", "bias": bias}
    return tuple(name for name, it_does in takes.items() if it_does and form.term == "exp")


def _total(sums: Sums) -> tuple[Tensor, Tensor]:
    """Over all groups, [2, K, n], and its logarithm."""
    groups, sets, n = sums.s.shape
    total, logs = sums.s.new_empty(2, sets, n), sums.s.new_empty(sets, n)
    arguments = {"p_s": sums.s, "p_m": sums.m, "p_sums": total, "p_logs": logs, "groups": groups, "BOUNDED": sums.bounded}
    _launch_over_entries(total_kernel, logs.numel(), arguments)
    return total, logs


def _pair_sums(call: Call, form: _Form, x: _Side, y: _Side) -> Tensor:
    n, m = len(x.rows), len(y.rows)
    if n == 0 or m == 0:
        return torch.zeros(n, dtype=torch.float32, device=x.rows.device)

    def launch(tile: Tile) -> Tensor:  # x's rows are the columns of the kernel's tiles
        arguments = _arguments(call, y, x, tile, None if call.self_offset is None else -call.self_offset)
        arguments |= {"TERM": form.term, "OVER": form.over, **_visits(form, arguments["p_range_y"], arguments["p_range_x"])}
        of_x, of_y = arguments["T_Y"], arguments["T_X"]
        groups = max(1, min(operands.GROUPS, PROGRAMS // of_x, of_y))
        sums = torch.empty(groups, n, dtype=torch.float32, device=x.rows.device)
        arguments |= {"p_sums": sums, "SYMMETRIC": call.symmetric, "WHOLE_D": tile.block_d is None}
        _launch(pair_sum_fwd_kernel, (of_x, groups), tile, arguments)
        return sums.sum(0)

    return _on_tile(tiles.FORWARD, y, x, launch, form)


def row_stats_bwd(
    call: Call, row_sums: Tensor, row_grads: Tensor, col_sums: Tensor, col_grads: Tensor, needs: list[bool]
) -> list[Tensor | None]:
    sides = [(row_sums, row_grads), (col_sums, col_grads)]
    return _grads(call, _Form(), sides if call.both_sides else sides[:1], needs)[1]


def pair_sum_fwd_bwd(call: Call, over: str, term: str, with_sums: bool, weights: Tensor | None, needs: list[bool]) -> SumsAndGrads:
    form = _Form(term, SETS.index(over), with_sums)
    if weights is None:
        return _pair_sums(call, form, *_sides(call)), [None] * len(needs)
    return _grads(call, form, [(None, weights)], needs)


def _scaled_weights(call: Call, sides: list[tuple[Tensor | None, Tensor]]) -> tuple[list[Tensor], Tensor]:
    def largest(sums: Tensor | None, grads: Tensor, to: Tensor) -> None:
        arguments = {"p_sums": sums, "p_grads": grads, "HAS_SUMS": sums is not None, "p_largest": to}
        _launch_over_entries(largest_kernel, grads.numel(), arguments)

    def scaled(sums: Tensor | None, grads: Tensor, largest: Tensor, steepest: Tensor | None, to: Tensor, unscale: Tensor) -> None:
        arguments = {"p_sums": sums, "p_grads": grads, "HAS_SUMS": sums is not None, "p_largest": largest, "parts": len(largest)}
        arguments |= {"p_steepest": steepest, "CIRCLE": steepest is not None, "p_weights": to, "p_unscale": unscale, "N": grads.shape[-1]}
        _launch_over_entries(scaled_weights_kernel, grads.numel(), arguments)

    return operands.scaled_weights(call, sides, largest, scaled)


class _Wanted(NamedTuple):
    """Gradients of a side."""

    rows: bool
    bias: bool


def _grads(
    call: Call, form: _Form, sides: list[tuple[Tensor | None, Tensor]], needs: list[bool]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """And the sums of a pair sum before them, where they are wanted."""
    (row_weights, *others), unscale = _scaled_weights(call, sides)
    x, y = _sides(call, row_weights, others[0] if others else None)
    to_x, to_y, _, to_row_bias, to_col_bias = needs
    of_x, of_y = _Wanted(to_x, to_row_bias), _Wanted(to_y and not call.symmetric, to_col_bias and not call.symmetric)
    offset = call.self_offset
    back = None if offset is None else -offset
    in_registers = tiles.choose(tiles.BACKWARD, x.rows.shape[1], x.rows.dtype, x.rows.device) is not None
    if in_registers or not (len(x.rows) and len(y.rows)):
        dx, drow_bias = _side_grads(call, form, x, y, offset, of_x, unscale)
        dy, dcol_bias = _side_grads(call, form, y, x, back, of_y, unscale)
        sums = _pair_sums(call, form, x, y) if form.with_sums else None
    elif any(of_x) or form.with_sums:
        dx, drow_bias, dy, dcol_bias, sums = _grads_by_slabs(call, form, x, y, offset, of_x, of_y, unscale)
    else:
        dy, dcol_bias, dx, drow_bias, sums = _grads_by_slabs(call, form, y, x, back, of_y, of_x, unscale)
    return sums, [dx, dy, None, drow_bias, dcol_bias]


def _side_grads(
    call: Call, form: _Form, x: _Side, y: _Side, self_offset: int | None, wanted: _Wanted, unscale: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x's rows and bias: W y and A 1."""
    (n, d), m = x.rows.shape, y.rows.shape[0]
    if not any(wanted):
        return None, None
    float32 = {"dtype": torch.float32, "device": x.rows.device}

    def launch(tile: Tile) -> tuple[Tensor, Tensor]:
        dx, dbias = torch.empty(n, d, **float32), torch.empty(n if wanted.bias else 0, **float32)
        arguments = _weight_arguments(call, form, x, y, tile, self_offset)
        arguments |= {"BIAS_GRAD": wanted.bias, "p_unscale": unscale, "p_dx": dx, "p_dbias": dbias}
        arguments |= _visits(form, arguments["p_range_x"], arguments["p_range_y"])
        _launch(grads_kernel, (cdiv(n, tile.block_m),), tile, arguments)
        return dx, dbias

    if n == 0 or m == 0:
        dx, dbias = torch.zeros(n, d, **float32), torch.zeros(n, **float32)
    else:
        kind = form, call.score, call.cutoff is None, wanted.bias
        dx, dbias = _on_tile(tiles.BACKWARD, x, y, launch, *kind, heavy=_heavy(call, form, wanted.bias))
    return _unpadded(dx, call) if wanted.rows else None, dbias if wanted.bias else None


def _grads_by_slabs(
    call: Call, form: _Form, x: _Side, y: _Side, self_offset: int | None, of_x: _Wanted, of_y: _Wanted, unscale: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of both sides' rows and biases from the same weights, W y, A 1, W^T x and A^T 1, and the sums."""
    if not (any(of_x) or any(of_y) or form.with_sums):
        return None, None, None, None, None
    (n, d), m = x.rows.shape, len(y.rows)
    stride = cdiv(m, ALIGN) * ALIGN

    def launch(tile: Tile) -> tuple[Tensor, ...]:
        tiles_in_slab = max(1, SLAB_BYTES[of_y.rows] // (stride * x.rows.itemsize * tile.block_m))
        size = min(tiles_in_slab * tile.block_m, n)
        slab, float32 = x.rows.new_empty(size, stride), x.rows.new_empty(0, dtype=torch.float32)
        dx, dy = float32.new_empty(n if of_x.rows else 0, d), float32.new_zeros(m if of_y.rows else 0, d)
        dbias_x, dbias_y = float32.new_empty(n if of_x.bias else 0), float32.new_zeros(m if of_y.bias else 0)
        sums = float32.new_empty(n if form.with_sums else 0)
        # Of every tile of the other side.
        part_x, part_sums = (float32.new_empty(cdiv(m, tile.block_n), size if wanted else 0) for wanted in (of_x.bias, form.with_sums))
        part_y = float32.new_empty(cdiv(size, tile.block_m), len(dbias_y))
        arguments = _weight_arguments(call, form, x, y, tile, self_offset)
        arguments |= {"BIAS_GRAD": of_x.bias, "BIAS_GRAD_Y": of_y.bias, "WITH_SUMS": form.with_sums, "p_slab": slab, "stride_slab": stride}
        arguments |= {"p_dbias": part_x, "p_dbias_y": part_y, "p_sums": part_sums, "stride_part": size}
        for begin in range(0, n, size):
            end = min(begin + size, n)
            span = cdiv(end - begin, tile.block_m)
            grid = (span * arguments["T_Y"],)
            _launch(weights_kernel, grid, tile, arguments | {"i_first": begin // tile.block_m, "span_x": span})
            weights = slab[: end - begin, :m]
            if of_x.rows:
                _multiply(weights, y.rows, dx[begin:end], 0)
            if of_y.rows:
                _multiply(weights.T, x.rows[begin:end], dy, 1)
            if of_x.bias:
                dbias_x[begin:end] = part_x[:, : end - begin].sum(0)
            if of_y.bias:
                dbias_y += part_y[:span].sum(0)
            if form.with_sums:
                sums[begin:end] = part_sums[:, : end - begin].sum(0)
        return dx, dbias_x, dy, dbias_y, sums

    kind, heavy = (form, call.score, call.cutoff is None, of_x, of_y), _heavy(call, form, of_x.bias or of_y.bias)
    dx, dbias_x, dy, dbias_y, sums = _on_tile(tiles.WEIGHTS, x, y, launch, *kind, heavy=heavy)
    for grad in (dx, dbias_x, dy, dbias_y):
        grad *= unscale
    return (
        _unpadded(dx, call) if of_x.rows else None,
        dbias_x if of_x.bias else None,
        _unpadded(dy, call) if of_y.rows else None,
        dbias_y if of_y.bias else None,
        sums if form.with_sums else None,
    )


def _unpadded(rows: Tensor, call: Call) -> Tensor:
    return rows[:, : call.x.shape[1]].contiguous()


def _multiply(a: Tensor, b: Tensor, to: Tensor, beta: int) -> None:
    """to = a @ b + beta to, in float32."""
    if a.dtype == torch.float32:
        torch.addmm(to, a, b, beta=beta, out=to)
    elif a.is_cuda and TORCH_ADDS_TO_FLOAT32:
        torch.addmm(to, a, b, out_dtype=torch.float32, beta=beta, out=to)
    else:
        torch.addmm(to, a.float(), b.float(), beta=beta, out=to)


def scaled_rows_fwd(rows: Tensor, norm: Tensor, order: Tensor | None, product_dtype: torch.dtype) -> Tensor:
    result = torch.empty(rows.shape, dtype=product_dtype, device=rows.device)
    _launch_over_rows(scaled_rows_kernel, rows, norm, order, {"p_rows": result})
    return result


def scaled_rows_bwd(rows: Tensor, norm: Tensor, order: Tensor | None, grad: Tensor) -> tuple[Tensor, Tensor]:
    drows, along = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device), grad.new_empty(len(rows))
    _launch_over_rows(scaled_rows_backward_kernel, rows, norm, order, {"p_grad": grad.contiguous(), "p_dx": drows, "p_along": along})
    return drows, along.sum()


def _launch_over_rows(kernel: Any, rows: Tensor, norm: Tensor, order: Tensor | None, arguments: dict[str, Any]) -> None:
    n, d = rows.shape
    if n == 0:
        return
    tile = tiles.of_rows(d)
    arguments |= {"p_x": rows.contiguous(), "p_norm": norm_beside(rows, norm), "p_order": order, "HAS_ORDER": order is not None}
    arguments |= {"N": n, "D": d, "BLOCK_N": tile.block_m, "BLOCK_D": tile.block_d}
    _launch(kernel, (cdiv(n, tile.block_m),), tile, arguments)


def _sides(call: Call, row_weights: Tensor | None = None, col_weights: Tensor | None = None) -> tuple[_Side, _Side]:
    ids_x, ids_y = _ids(call)
    x = _Side(_operand(call.x, call), ids_x, _bias(call.row_bias, call.col_bias, call.x), row_weights)
    if call.symmetric:
        return x, x
    assert call.y is not None
    return x, _Side(_operand(call.y, call), ids_y, _bias(call.col_bias, call.row_bias, call.y), col_weights)


def _ids(call: Call) -> tuple[Tensor | None, Tensor | None]:
    """Of few rows as they are: ranking them, which takes a sort, would take longer than to compare int64."""
    if call.ids_ascend or engines.label_order_pays(call):
        return operands.ranks(call)
    ids_x, ids_y = (None if ids is None else ids.contiguous() for ids in (call.ids_x, call.ids_y))
    return ids_x, ids_y


def _operand(rows: Tensor, call: Call) -> Tensor:
    return operands.padded(rows.to(call.product_dtype), ALIGN)


def _bias(bias: Tensor | None, other: Tensor | None, rows: Tensor) -> Tensor | None:
    """Both sides have a bias or none has."""
    if bias is not None:
        return bias.contiguous()  # one number may have been expanded to all rows
    return None if other is None else torch.zeros(rows.shape[0], dtype=torch.float32, device=rows.device)


def _arguments(call: Call, x: _Side, y: _Side, tile: Tile, self_offset: int | None) -> dict[str, Any]:
    """What all kernels take."""
    d = x.rows.shape[1]
    block_d = tiles.padded(d) if tile.block_d is None else tile.block_d
    (range_x, _), (_, range_y) = x.id_ranges(tile), y.id_ranges(tile)
    return {
        "p_x": x.rows,
        "p_y": y.rows,
        "p_ids_x": x.ids,
        "p_ids_y": y.ids,
        "p_range_x": range_x,
        "p_range_y": range_y,
        "p_bias_x": x.bias,
        "p_bias_y": y.bias,
        "N": x.rows.shape[0],
        "M": y.rows.shape[0],
        "D": d,
        "T_X": cdiv(x.rows.shape[0], tile.block_m),
        "T_Y": cdiv(y.rows.shape[0], tile.block_n),
        "self_offset": self_offset or 0,
        "SETS": call.num_sets,
        "HAS_SELF": self_offset is not None,
        "HAS_BIAS": x.bias is not None,
        "PRECISION": _precision(x.rows.dtype),
        "EVEN_D": d % block_d == 0,
        "BLOCK_D": block_d,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
    }


def _precision(dtype: torch.dtype) -> str:
    """How torch is set to multiply float32. Its old getter raises once the new setting has been used."""
    if dtype != torch.float32:
        return "ieee"
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", None) or torch.get_float32_matmul_precision()
    return "tf32" if setting in ("tf32", "high", "medium") else "ieee"


def _score_arguments(call: Call) -> dict[str, Any]:
    return {
        "p_cutoff": call.cutoff,
        "m": float(call.m),
        "gamma": float(call.gamma),
        "SCORE": call.score,
        "HAS_CUTOFF": call.cutoff is not None,
    }


def _visits(form: _Form, ranges: Tensor | None, ranges_visited: Tensor | None) -> dict[str, Any]:
    """What sums of one set take besides, to visit tiles that have its pairs; row_stats visits all."""
    visited = None
    if form.term != "exp" and ranges is not None and ranges_visited is not None:
        visited = visits(form.over, ranges, ranges_visited)
    return {"p_visits": visited, "HAS_VISITS": visited is not None}


def _weight_arguments(call: Call, form: _Form, x: _Side, y: _Side, tile: Tile, self_offset: int | None) -> dict[str, Any]:
    """What the kernels of the backward pass take: x is the side whose gradients are wanted."""
    (log_sums_x, weights_x), (log_sums_y, weights_y) = (
        side.centred_weights(tile) if form.term == "exp" else (None, side.weights) for side in (x, y)
    )
    return {
        **_arguments(call, x, y, tile, self_offset),
        **_score_arguments(call),
        "p_weights_x": weights_x,
        "p_weights_y": weights_y,
        "p_log_sums_x": log_sums_x,
        "p_log_sums_y": log_sums_y,
        "p_given_x": x.weights,
        "p_given_y": y.weights,
        "TERM": form.term,
        "OVER": form.over,
        "ROLE_X": x.weights is not None,
        "ROLE_Y": y.weights is not None,
    }


def launch_options(tile: Tile) -> dict[str, Any]:
    # Triton 3.10 changes the default of enable_fp_fusion.
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True}


def _launch_over_entries(kernel: Any, size: int, arguments: dict[str, Any]) -> None:
    if size:
        grid = (cdiv(size, ENTRIES),)
        _launch(kernel, grid, tiles.of_entries(ENTRIES), arguments | {"size": size, "BLOCK": ENTRIES})


def _launch(kernel: Any, grid: tuple[int, ...], tile: Tile, arguments: dict[str, Any]) -> None:
    device = next(v.device for v in arguments.values() if isinstance(v, Tensor))
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
        kernel[grid](**arguments, **launch_options(tile))
