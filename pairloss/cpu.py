"""The engine "cpu": C++ for tensors on the CPU, csrc/cpu. This file turns calls into pointers.

Fused: the norm, the label order, products, biases, the pair left out, label masks, exponentials, sums, totals; never materialised: more
than one tile of pairs for each thread. float32 and float64; half rows are rounded to their dtype and multiplied in float32. bfloat16
by AMX or AVX512-BF16 where the processor has them, with weights rounded to bfloat16 for the gradient's products; float32 by AMX in
three parts, as exact as float32 for logits and gradients whose terms are above 1e-30 and 1e-36, and gradients below 1e31.
As many threads as torch.get_num_threads(), with the same bits for any number of them.
"""

import torch
from torch import Tensor

from . import engines, order
from .engines import Call, Statistics, SumsAndGrads, tile_size, zero_grads

_missing: str | None = None
try:
    from . import _cpu
except ImportError as error:
    _missing = str(error)


def why_not(call: Call) -> str | None:
    if _missing is not None:
        return f"the extension pairloss._cpu is not built ({_missing})"
    if call.x.device.type != "cpu":
        return f"the tensors are on {call.x.device.type}, not on the CPU"
    return None


def instruction_set() -> str | None:
    """The one that csrc/cpu uses on this processor, None where it isn't built."""
    return None if _missing is not None else _cpu.targets()[0]


label_order_pays = engines.label_order_pays
scaled_rows_fwd, scaled_rows_bwd = order.scaled_rows_fwd, order.scaled_rows_bwd


def arranges(call: Call) -> bool:
    """C++ normalises and rounds rows while it packs them, but knows only one kind of half."""
    return call.norm is None or (call.x.dtype in (call.dtype, torch.bfloat16) and (call.product_dtype == call.dtype or _in_bfloat16(call)))


def row_stats_fwd(call: Call) -> Statistics:
    arguments, sets, n, m = _Arguments(call), call.num_sets, call.x.shape[0], call.candidates.shape[0] if call.both_sides else 0
    shapes = (call.num_stats, n), (sets, m), (2, sets, n), (2, sets, m)
    rows, cols, row_sums, col_sums = (call.x.new_empty(shape, dtype=call.dtype) for shape in shapes)
    to_cols = (cols, col_sums) if call.both_sides else (None, None)
    _cpu.row_stats(arguments.call, *map(_address, (rows, row_sums, *to_cols)))
    return rows, cols, row_sums, col_sums


def row_stats_bwd(
    call: Call, row_sums: Tensor, row_grads: Tensor, col_sums: Tensor, col_grads: Tensor, needs: list[bool]
) -> list[Tensor | None]:
    arguments, grads = _Arguments(call), zero_grads(call, needs)
    rows = row_sums.contiguous(), row_grads.contiguous()
    cols = (col_sums.contiguous(), col_grads.contiguous()) if call.both_sides else (None, None)
    _cpu.row_stats_backward(arguments.call, *map(_address, (*rows, *cols, *grads)))
    return grads


def pair_sum_fwd_bwd(call: Call, over: str, term: str, with_sums: bool, weights: Tensor | None, needs: list[bool]) -> SumsAndGrads:
    arguments, grads = _Arguments(call), zero_grads(call, needs)
    sums = call.x.new_zeros(call.x.shape[0], dtype=call.dtype) if with_sums else None
    weights = None if weights is None else weights.contiguous()
    _cpu.pair_sum(arguments.call, over == "positives", term == "softplus", *map(_address, (sums, weights, *grads)))
    return sums, grads


def own_products_fwd(call: Call) -> Tensor:
    arguments, products = _Arguments(call), call.x.new_empty(call.x.shape[0], dtype=call.dtype)
    _cpu.own_products(arguments.call, _address(products))
    return products


def own_products_bwd(call: Call, weights: Tensor, needs: list[bool]) -> list[Tensor | None]:
    arguments, grads, weights = _Arguments(call), zero_grads(call, needs), weights.contiguous()
    _cpu.own_products_backward(arguments.call, *map(_address, (weights, *grads[:3])))
    return grads[:3]


class _Arguments:
    """The call for C++, and the tensors that it points into."""

    def __init__(self, call: Call) -> None:
        rows = [None if v is None else self._rows(call, v) for v in (call.x, call.y)]
        vectors = (call.order_x, call.order_y, call.ids_x, call.ids_y, call.row_bias, call.col_bias)
        self.tensors = rows + [None if v is None else v.contiguous() for v in vectors]
        x, y, order_x, order_y, ids_x, ids_y, row_bias, col_bias = map(_address, self.tensors)
        self.call = _cpu.Call(
            is_double=call.x.dtype == torch.float64,
            bfloat16=_in_bfloat16(call),
            half=call.x.dtype == torch.bfloat16,
            symmetric=call.symmetric,
            has_ids=call.ids_x is not None,
            n=call.x.shape[0],
            m=call.candidates.shape[0],
            d=call.x.shape[1],
            x=x,
            y=y,
            order_x=order_x,
            order_y=order_y,
            norm=None if call.norm is None else call.norm.item(),
            ids_x=ids_x,
            ids_y=ids_y,
            words=0 if call.ids_x is None or call.ids_x.ndim == 1 else call.ids_x.shape[1],
            self_offset=call.self_offset,
            row_bias=row_bias,
            col_bias=col_bias,
            circle=call.score == "circle",
            margin=call.m,
            gamma=call.gamma,
            cutoff=-torch.inf if call.cutoff is None else call.cutoff.item(),
            logit_bound=call.logit_bound,
            totals=call.totals,
            own=call.own,
            tile=tile_size(0),
            threads=torch.get_num_threads(),
        )

    @staticmethod
    def _rows(call: Call, rows: Tensor) -> Tensor:
        if call.norm is None and not _in_bfloat16(call):
            rows = rows.to(call.product_dtype).to(call.dtype)
        return rows.contiguous()


def _in_bfloat16(call: Call) -> bool:
    return call.dtype == torch.float32 and call.product_dtype == torch.bfloat16


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
