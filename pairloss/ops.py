r"""The primitive: statistics of all pairs, row by row, as a torch.library op.

The path of a call, forward and backward alike:

    public loss (checks, prepares rows, combines the statistics; O(N D))
    -> row_stats (here) -> the op pairloss::row_stats (here: autograd, fake kernel, label order)
    -> engines.choose -> row_stats_fwd / row_stats_bwd of the engine -> its kernel or its tiles
"""

import math
from typing import Any

import torch
from torch import Tensor

from . import engines, reference
from .engines import Call

SCORES = ("linear",)

_library = torch.library.Library("pairloss", "DEF")

# What the two ops share: everything that says which pairs are compared, and how.
_PAIRS = (
    "Tensor x, Tensor? y, Tensor? ids_x, Tensor? ids_y, int? self_offset, Tensor? row_bias, Tensor? col_bias, "
    "str score, float m, float gamma, bool both_sides, ScalarType product_dtype, float logit_bound, str? backend"
)
_NUM_PAIRS = _PAIRS.count(",") + 1
_DIFFERENTIABLE = (0, 1, 5, 6)  # x, y, row_bias, col_bias

# row_sums and col_sums are for the backward pass: what the statistics are the logarithms of.
_library.define(f"row_stats({_PAIRS}) -> (Tensor rows, Tensor cols, Tensor row_sums, Tensor col_sums)")
_library.define(f"row_stats_backward({_PAIRS}, Tensor row_weights, Tensor col_weights, bool[] needs) -> Tensor[]")


def row_stats(
    x: Tensor,
    y: Tensor | None = None,
    ids_x: Tensor | None = None,
    ids_y: Tensor | None = None,
    self_offset: int | None = None,
    row_bias: Tensor | None = None,
    col_bias: Tensor | None = None,
    *,
    score: str = "linear",
    m: float = 0.0,
    gamma: float = 1.0,
    both_sides: bool = False,
    product_dtype: torch.dtype | None = None,
    logit_bound: float = math.inf,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Log-sums over the positives and the negatives of every anchor, without the N x M matrix.

    .. math::
        s_{ij} = \langle x_i, y_j \rangle, \quad z_{ij} = \mathrm{score}(s_{ij}) + \mathrm{row\_bias}_i + \mathrm{col\_bias}_j

        \mathrm{pos}_i = \log \sum_{j \in P(i)} e^{z_{ij}}, \quad \mathrm{neg}_i = \log \sum_{j \in N(i)} e^{z_{ij}}

    P(i) are the candidates with the anchor's id, N(i) the others, both without the pair left out. An empty set gives
    -inf, in whose gradient there is no NaN. A bias of -inf takes a row out of every set (its features must be finite).

    Args:
        x: anchors [N, D], float32 or float64.
        y: candidates [M, D]; None compares x with itself, which costs about half.
        ids_x, ids_y: integer ids [N] and [M], or multi-hot words [N, W] and [M, W] of int64 (positive = a common bit).
            None: all candidates form one set. With y=None, ids_y stays None.
        self_offset: candidate ``self_offset + i`` is left out for anchor i; None leaves none out. 0 or None with y=None.
        row_bias, col_bias: [N] and [M]. With y=None, row_bias counts on both sides and col_bias stays None.
        score: "linear". m, gamma: its margin and scale (linear has none).
        both_sides: also the statistics over the columns, from the same pass. Not with y=None, where they are the same.
        product_dtype: the dtype that the rows are rounded to before the products; None keeps x.dtype.
        logit_bound: a bound on every \|z_ij\| that the caller vouches for; small enough, no maximum is tracked.
        backend: "reference", "torch", "triton" or None for the best that can run.

    Returns:
        rows [K, N] and cols [K, M] (M = 0 without both_sides) in x.dtype; K = 2 (pos, neg) with ids, 1 without.

    Raises:
        ValueError, RuntimeError: arguments that don't fit together; a backend that can't run.

    Deterministic: the same input on the same engine gives the same bits.
    """
    engines.check_backend(backend)
    backend = backend or engines.DEFAULT_BACKEND
    _check(x, y, ids_x, ids_y, self_offset, row_bias, col_bias, score, both_sides)
    options = (score, m, gamma, both_sides, product_dtype or x.dtype, logit_bound)
    if backend == engines.REFERENCE:
        return reference.row_stats(Call(x, y, ids_x, ids_y, self_offset, row_bias, col_bias, *options))
    rows, cols, _, _ = _RowStats.apply(x, y, ids_x, ids_y, self_offset, row_bias, col_bias, *options, backend)
    return rows, cols


def _check(
    x: Tensor,
    y: Tensor | None,
    ids_x: Tensor | None,
    ids_y: Tensor | None,
    self_offset: int | None,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    score: str,
    both_sides: bool,
) -> None:
    if x.ndim != 2 or x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x: expected float32 or float64 of shape [N, D], got {x.dtype} {list(x.shape)}")
    if score not in SCORES:
        raise ValueError(f"score: expected one of {SCORES}, got {score!r}")
    if y is None:
        if ids_y is not None or col_bias is not None or both_sides or self_offset not in (None, 0):
            raise ValueError("y=None: expected ids_y=None, col_bias=None, both_sides=False and self_offset 0 or None")
    else:
        if y.ndim != 2 or y.shape[1] != x.shape[1] or y.dtype != x.dtype:
            raise ValueError(f"y: expected {x.dtype} of shape [M, {x.shape[1]}], got {y.dtype} {list(y.shape)}")
        if (ids_x is None) != (ids_y is None):
            raise ValueError("ids_x, ids_y: expected both or neither")
    for name, vector, rows in (("ids_x", ids_x, x), ("ids_y", ids_y, y), ("row_bias", row_bias, x), ("col_bias", col_bias, y)):
        if vector is not None and (rows is None or vector.shape[0] != rows.shape[0]):
            raise ValueError(f"{name}: expected one entry per row, got shape {list(vector.shape)}")


class _LabelOrder:
    """The call with its rows sorted by label, where that pays, and the way back.

    Sorted, most tiles hold no positives and need no mask. Stable, so that equal input gives equal bits.
    """

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
        self.call = Call(**{**call.__dict__, **ordered})

    def rows(self, per_row: Tensor) -> Tensor:
        """Into label order, along the last dimension."""
        return _take(per_row, self.order_x, per_row.ndim - 1)

    def cols(self, per_col: Tensor) -> Tensor:
        return _take(per_col, self.order_y, per_col.ndim - 1) if per_col.shape[-1] else per_col

    def unordered_rows(self, per_row: Any, dim: int) -> Any:
        return _put(per_row, self.order_x, dim)

    def unordered_cols(self, per_col: Any, dim: int) -> Any:
        return _put(per_col, self.order_y, dim)


def _take(tensor: Tensor | None, order: Tensor | None, dim: int) -> Any:
    return tensor if tensor is None or order is None else tensor.index_select(dim, order)


def _put(tensor: Tensor | None, order: Tensor | None, dim: int) -> Tensor | None:
    if tensor is None or order is None or not tensor.shape[dim]:
        return tensor
    return torch.empty_like(tensor).index_copy_(dim, order, tensor)


def _row_stats(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *pairs, backend = args
    call = Call(*pairs)
    engine = engines.choose(call, backend)
    with engines.without_autocast(call):
        order = _LabelOrder(call, engine)
        row_sums, col_sums = engine.row_stats_fwd(order.call)
        row_sums, col_sums = order.unordered_rows(row_sums, 2), order.unordered_cols(col_sums, 2)
        return _log(row_sums), _log(col_sums), row_sums, col_sums


def _log(sums: Tensor) -> Tensor:
    s, m = sums
    return s.log() + m


def _row_stats_backward(*args: Any) -> list[Tensor]:
    *pairs, backend, row_weights, col_weights, needs = args
    call = Call(*pairs)
    engine = engines.choose(call, backend)
    with engines.without_autocast(call):
        order = _LabelOrder(call, engine)
        dx, dy, drow_bias, dcol_bias = engine.row_stats_bwd(order.call, order.rows(row_weights), order.cols(col_weights), needs)
        grads = (
            order.unordered_rows(dx, 0),
            order.unordered_cols(dy, 0),
            order.unordered_rows(drow_bias, 0),
            order.unordered_cols(dcol_bias, 0),
        )
    return [grad for grad, need in zip(grads, needs, strict=True) if need]


def _weights(sums: Tensor, grad: Tensor) -> Tensor:
    """grad * exp(z - log sum) = (grad / s) e^-m * exp(z)."""
    s, m = sums
    return torch.stack([torch.where(s == 0, 0, grad / s), m])


def _fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = Call(*args[: _NUM_PAIRS - 1])
    n, m = call.x.shape[0], call.candidates.shape[0] if call.both_sides else 0
    shapes = ((call.num_sets, n), (call.num_sets, m), (2, call.num_sets, n), (2, call.num_sets, m))
    return tuple(call.x.new_empty(shape) for shape in shapes)  # type: ignore[return-value]


def _fake_backward(*args: Any) -> list[Tensor]:
    inputs = [args[i] for i in _DIFFERENTIABLE]
    return [torch.empty_like(v, memory_format=torch.contiguous_format) for v, need in zip(inputs, args[-1], strict=True) if need]


class _RowStats(torch.autograd.Function):
    """Autograd around the op. torch.library.register_autograd lacks torch.func (docs/design.md)."""

    # Each parameter by name: dynamo takes *args for a forward with ctx and fails where nothing requires a gradient.
    @staticmethod
    def forward(
        x: Tensor, y: Any, ids_x: Any, ids_y: Any, self_offset: Any, row_bias: Any, col_bias: Any,
        score: str, m: float, gamma: float, both_sides: bool, product_dtype: torch.dtype, logit_bound: float, backend: Any,
    ) -> Any:  # fmt: skip
        return torch.ops.pairloss.row_stats(
            x, y, ids_x, ids_y, self_offset, row_bias, col_bias, score, m, gamma, both_sides, product_dtype, logit_bound, backend
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        row_sums, col_sums = output[2:]
        ctx.mark_non_differentiable(row_sums, col_sums)
        ctx.save_for_backward(*(v for v in inputs if isinstance(v, Tensor)), row_sums, col_sums)
        ctx.inputs = [None if isinstance(v, Tensor) else v for v in inputs]
        ctx.is_tensor = [isinstance(v, Tensor) for v in inputs]

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor, grad_cols: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        *tensors, row_sums, col_sums = ctx.saved_tensors
        saved = iter(tensors)
        inputs = [next(saved) if is_tensor else v for v, is_tensor in zip(ctx.inputs, ctx.is_tensor, strict=True)]
        needs = [ctx.needs_input_grad[i] for i in _DIFFERENTIABLE]
        weights = _weights(row_sums, grad_rows), _weights(col_sums, grad_cols)
        # Compiled graphs refuse second derivatives by themselves, and dynamo doesn't trace a Function within a Function.
        backward = torch.ops.pairloss.row_stats_backward if torch.compiler.is_compiling() else _RowStatsBackward.apply
        grads = iter(backward(*inputs, *weights, needs))
        result: list[Tensor | None] = [None] * _NUM_PAIRS
        for i, need in zip(_DIFFERENTIABLE, needs, strict=True):
            if need:
                result[i] = next(grads)
        return tuple(result)


class _RowStatsBackward(torch.autograd.Function):
    """The backward op, with no derivative of its own."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return tuple(torch.ops.pairloss.row_stats_backward(*args))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            "pairloss: second derivatives are not implemented by the fused engines; "
            "backend='reference' has them, at the cost of the N x N matrix"
        )


_library.impl("row_stats", _row_stats, "CompositeExplicitAutograd")
_library.impl("row_stats_backward", _row_stats_backward, "CompositeExplicitAutograd")
torch.library.register_fake("pairloss::row_stats", _fake, lib=_library)
torch.library.register_fake("pairloss::row_stats_backward", _fake_backward, lib=_library)
