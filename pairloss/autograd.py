"""The torch.library ops behind pairloss.ops: implementations that call the chosen engine, fake kernels, derivatives.

Each op has a backward op, and a torch.autograd.Function ties the two together: torch.library.register_autograd lacks
torch.func (docs/design.md). The engine is chosen inside the op: at trace time, torch.compile would guard N and recompile.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import engines, own_pairs, selection, totals
from .binding import positional
from .engines import Call, statistics_dtype
from .order import Arrangement
from .reference import without_silent

_library = torch.library.Library("pairloss", "DEF")

# Which pairs are compared.
_PAIRS = (
    "Tensor x, Tensor? y, Tensor? norm, Tensor? ids_x, Tensor? ids_y, int? self_offset, "
    "Tensor? row_bias, Tensor? col_bias, ScalarType product_dtype"
)
NUM_PAIRS = _PAIRS.count(",") + 1
DIFFERENTIABLE = (0, 1, 2, 6, 7)  # x, y, norm, row_bias, col_bias
# And how, in the order of Call's fields.
_ROW_STATS = f"{_PAIRS}, Tensor? cutoff, str score, float m, float gamma, bool both_sides, float logit_bound, bool totals, str? backend"
_PAIR_SUM = f"{_PAIRS}, str over, str term, bool own, str? backend"
_SELECTED = "Tensor x, Tensor y, Tensor index, ScalarType product_dtype"
_OWN = "Tensor x, Tensor y, Tensor? norm, ScalarType product_dtype, str? backend"

# row_sums and col_sums are for the backward pass: what the statistics are the logarithms of.
_library.define(f"row_stats({_ROW_STATS}) -> (Tensor rows, Tensor cols, Tensor row_sums, Tensor col_sums)")
_library.define(
    f"row_stats_backward({_ROW_STATS}, Tensor row_sums, Tensor row_grads, Tensor col_sums, Tensor col_grads, bool[] needs) -> Tensor[]"
)
_library.define(f"pair_sum({_PAIR_SUM}) -> Tensor")
_library.define(f"pair_sum_backward({_PAIR_SUM}, Tensor weights, bool[] needs) -> Tensor[]")
_library.define(f"pair_sum_with_grads({_PAIR_SUM}, Tensor weights, bool[] needs) -> (Tensor sums, Tensor[] grads)")
_library.define(f"top_k({_PAIRS}, Tensor? cutoff, int k) -> Tensor")
_library.define(f"selected_products({_SELECTED}) -> Tensor")
_library.define(f"selected_products_backward({_SELECTED}, Tensor weights, bool[] needs) -> Tensor[]")
_library.define(f"own_products({_OWN}) -> Tensor")
_library.define(f"own_products_backward({_OWN}, Tensor weights, bool[] needs) -> Tensor[]")


def _row_stats(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *call_args, backend = args
    call = Call(*call_args)
    engine = engines.choose(call, backend)
    with engines.without_autocast(call.x):
        arranged = Arrangement(call, engine)
        rows, cols, row_sums, col_sums = engine.row_stats_fwd(arranged.call)
        if call.totals and not arranged.by_engine:
            rows = torch.cat([rows, totals.forward(arranged.call, engine)])
        if arranged.poison is not None:
            rows = rows + arranged.poison * 0
        return arranged.from_rows(rows), arranged.from_cols(cols), arranged.from_rows(row_sums), arranged.from_cols(col_sums)


def _row_stats_backward(*args: Any) -> list[Tensor]:
    *call_args, backend, row_sums, row_grads, col_sums, col_grads, needs = args
    call = Call(*call_args)
    engine = engines.choose(call, backend)
    with engines.without_autocast(call.x):
        arranged = Arrangement(call, engine)
        of_cols, needs_of_engine = map(arranged.cols, (col_sums, col_grads)), arranged.needs(needs)
        row_sums, row_grads = map(arranged.rows, (row_sums, row_grads))
        if arranged.by_engine or not call.totals:
            grads = engine.row_stats_bwd(arranged.call, row_sums, row_grads, *of_cols, needs_of_engine)
        else:
            grads = engine.row_stats_bwd(arranged.call, row_sums, row_grads[: call.num_sets], *of_cols, needs_of_engine)
            totals.add_gradients(arranged.call, engine, row_grads[call.num_sets], grads)
        return _needed(arranged.from_grads(*grads), needs)


def _pair_sum(*args: Any) -> Tensor:
    return _pair_sum_call(args, True, None, [False] * len(DIFFERENTIABLE))[0]


def _pair_sum_backward(*args: Any) -> list[Tensor]:
    *call_args, weights, needs = args
    return _pair_sum_call(call_args, False, weights, needs)[1]


def _pair_sum_with_grads(*args: Any) -> tuple[Tensor, list[Tensor]]:
    *call_args, weights, needs = args
    return _pair_sum_call(call_args, True, weights if any(needs) else None, needs)


def _pair_sum_call(args: Any, with_sums: bool, weights: Tensor | None, needs: list[bool]) -> Any:
    *pairs, over, term, own, backend = args
    call = Call(*pairs)._replace(own=own)
    engine = engines.choose(call, backend)
    with engines.without_autocast(call.x):
        arranged = Arrangement(call, engine)
        weights = None if weights is None else arranged.rows(weights)
        sums, grads = engine.pair_sum_fwd_bwd(arranged.call, over, term, with_sums, weights, arranged.needs(needs))
        if own and not arranged.by_engine:
            own_pairs.add(arranged.call, engine, sums, weights, grads)
        return arranged.from_rows(sums), _needed(arranged.from_grads(*grads), needs)


def _top_k(*args: Any) -> Tensor:
    *call_args, k = args
    call = Call(*call_args)
    with engines.without_autocast(call.x):
        return selection.top_k(call, k)


def _own_products(x: Tensor, y: Tensor, norm: Tensor | None, product_dtype: torch.dtype, backend: str | None) -> Tensor:
    call = _own_call(x, y, norm, product_dtype)
    engine = engines.choose(call, backend)
    return engine.own_products_fwd(Arrangement(call, engine).call)


def _own_products_backward(
    x: Tensor, y: Tensor, norm: Tensor | None, product_dtype: torch.dtype, backend: str | None, weights: Tensor, needs: list[bool]
) -> list[Tensor]:
    call = _own_call(x, y, norm, product_dtype)
    engine = engines.choose(call, backend)
    arranged = Arrangement(call, engine)
    dx, dy, dnorm = engine.own_products_bwd(arranged.call, weights, arranged.needs([*needs, False, False]))
    return _needed(arranged.from_grads(dx, dy, dnorm, None, None)[:3], needs)


def _own_call(x: Tensor, y: Tensor, norm: Tensor | None, product_dtype: torch.dtype) -> Call:
    return Call(x, y, norm, None, None, None, None, None, product_dtype)


def _needed(grads: list[Tensor | None], needs: list[bool]) -> list[Tensor]:
    return [grad for grad, need in zip(grads, needs, strict=True) if need and grad is not None]


def _row_stats_fake(*args: Any) -> tuple[Tensor, ...]:
    call = Call(*args[:-1])
    n, m, dtype = call.x.shape[0], call.candidates.shape[0] if call.both_sides else 0, call.dtype
    return tuple(
        call.x.new_empty(shape, dtype=dtype)
        for shape in ((call.num_stats, n), (call.num_sets, m), (2, call.num_sets, n), (2, call.num_sets, m))
    )


def _sums_fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], dtype=statistics_dtype(x))


def _fake_grads(inputs: list[Tensor], needs: list[bool]) -> list[Tensor]:
    return [torch.empty_like(v, memory_format=torch.contiguous_format) for v, need in zip(inputs, needs, strict=True) if need]


def _fake_backward(*args: Any) -> list[Tensor]:
    return _fake_grads([args[i] for i in DIFFERENTIABLE], args[-1])


_IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "row_stats": (_row_stats, _row_stats_fake),
    "row_stats_backward": (_row_stats_backward, _fake_backward),
    "pair_sum": (_pair_sum, _sums_fake),
    "pair_sum_backward": (_pair_sum_backward, _fake_backward),
    "pair_sum_with_grads": (_pair_sum_with_grads, lambda *args: (_sums_fake(*args), _fake_backward(*args))),
    "top_k": (_top_k, lambda *args: args[0].new_empty(args[0].shape[0], args[-1], dtype=torch.int32)),
    "selected_products": (selection.products, lambda x, y, index, _: x.new_empty(index.shape)),
    "selected_products_backward": (selection.products_backward, lambda *args: _fake_grads([args[0], args[1]], args[-1])),
    "own_products": (_own_products, _sums_fake),
    "own_products_backward": (_own_products_backward, lambda *args: _fake_grads(list(args[:3]), args[-1])),
}
for _name, (_implementation, _fake) in _IMPLEMENTATIONS.items():
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pairloss::{_name}", _fake, lib=_library)


def save(ctx: Any, inputs: tuple[Any, ...], *more: Tensor) -> None:
    ctx.save_for_backward(*(v for v in inputs if isinstance(v, Tensor)), *more)
    ctx.inputs = [None if isinstance(v, Tensor) else v for v in inputs]
    ctx.is_tensor = [isinstance(v, Tensor) for v in inputs]


def saved(ctx: Any) -> tuple[list[Any], tuple[Tensor, ...]]:
    """(the inputs, what was saved besides)."""
    saved = iter(ctx.saved_tensors)
    inputs = [next(saved) if is_tensor else v for v, is_tensor in zip(ctx.inputs, ctx.is_tensor, strict=True)]
    return inputs, tuple(saved)


def _backward(ctx: Any, op: Any, differentiable: tuple[int, ...], args: list[Any]) -> tuple[Tensor | None, ...]:
    needs = [ctx.needs_input_grad[i] for i in differentiable]
    grads = iter(_once(op, *args, needs))
    result: list[Tensor | None] = [None] * len(ctx.inputs)
    for i, need in zip(differentiable, needs, strict=True):
        if need:
            result[i] = next(grads)
    return tuple(result)


# Each parameter by name: dynamo takes *args for a forward with ctx and fails where nothing requires a gradient.
class RowStats(torch.autograd.Function):
    @staticmethod
    @positional
    def forward(
        x: Tensor, y: Any, norm: Any, ids_x: Any, ids_y: Any, self_offset: Any, row_bias: Any, col_bias: Any, product_dtype: torch.dtype,
        cutoff: Any, score: str, m: float, gamma: float, both_sides: bool, logit_bound: float, totals: bool, backend: Any,
    ) -> Any:  # fmt: skip
        return torch.ops.pairloss.row_stats(
            x, y, norm, ids_x, ids_y, self_offset, row_bias, col_bias, product_dtype,
            cutoff, score, m, gamma, both_sides, logit_bound, totals, backend,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)  # or zeros would be made for each of those
        ctx.num_stats = output[0].shape[0]
        save(ctx, inputs, *output[2:])

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor | None, grad_cols: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        inputs, (row_sums, col_sums) = saved(ctx)
        if grad_rows is None:
            grad_rows = row_sums.new_zeros(ctx.num_stats, row_sums.shape[2])
        if grad_cols is None:
            grad_cols = torch.zeros_like(col_sums[0])
        args = [*inputs, row_sums, grad_rows, col_sums, grad_cols]
        return _backward(ctx, torch.ops.pairloss.row_stats_backward, DIFFERENTIABLE, args)


class PairSum(torch.autograd.Function):
    @staticmethod
    @positional
    def forward(
        x: Tensor, y: Any, norm: Any, ids_x: Any, ids_y: Any, self_offset: Any, row_bias: Any, col_bias: Any, product_dtype: torch.dtype,
        over: str, term: str, own: bool, backend: Any,
    ) -> Any:  # fmt: skip
        return torch.ops.pairloss.pair_sum(
            x, y, norm, ids_x, ids_y, self_offset, row_bias, col_bias, product_dtype, over, term, own, backend
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        save(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, torch.ops.pairloss.pair_sum_backward, DIFFERENTIABLE, [*saved(ctx)[0], grad])


class PairTotal(torch.autograd.Function):
    """sum_i weights_i sum_i of the pair sums. Its gradient needs nothing that the pass over the pairs doesn't know: it is formed there."""

    @staticmethod
    @positional
    def forward(
        x: Tensor, y: Any, norm: Any, ids_x: Any, ids_y: Any, self_offset: Any, row_bias: Any, col_bias: Any, product_dtype: torch.dtype,
        over: str, term: str, own: bool, backend: Any, weights: Tensor, needs: list[bool],
    ) -> Any:  # fmt: skip
        pairs = (x, y, norm, ids_x, ids_y, self_offset, row_bias, col_bias, product_dtype)
        sums, grads = torch.ops.pairloss.pair_sum_with_grads(*pairs, over, term, own, backend, weights, needs)
        sums = without_silent(sums, weights)
        return (weights * sums).sum(), sums, *grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        save(ctx, inputs, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        (*args, weights, formed), (sums, *grads) = saved(ctx)
        result: list[Tensor | None] = [None] * len(ctx.inputs)
        if grad is None:
            return tuple(result)
        if any(ctx.needs_input_grad[i] and not has for i, has in zip(DIFFERENTIABLE, formed, strict=True)):
            # An outer torch.func transform wants what the inner one, which formed the gradient, did not.
            result = list(_backward(ctx, torch.ops.pairloss.pair_sum_backward, DIFFERENTIABLE, [*args, grad * weights]))
            (result[-2],) = _once(_multiplied, 1, grad, sums)
            return tuple(result)
        # The inputs come along for the second derivative to be refused: without them the gradient would be a constant.
        inputs = [v for v in (*args, weights) if isinstance(v, Tensor)]
        result[-2], *scaled = _once(_multiplied, 1 + len(grads), grad, sums, *grads, *inputs)
        for i, v in zip((i for i, has in zip(DIFFERENTIABLE, formed, strict=True) if has), scaled, strict=True):
            result[i] = v
        return tuple(result)


def _multiplied(count: int, factor: Tensor, *tensors: Tensor) -> list[Tensor]:
    return [factor * v for v in tensors[:count]]


class SelectedProducts(torch.autograd.Function):
    @staticmethod
    @positional
    def forward(x: Tensor, y: Tensor, index: Tensor, product_dtype: torch.dtype) -> Any:
        return torch.ops.pairloss.selected_products(x, y, index, product_dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        save(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, torch.ops.pairloss.selected_products_backward, (0, 1), [*saved(ctx)[0], grad])


class OwnProducts(torch.autograd.Function):
    @staticmethod
    @positional
    def forward(x: Tensor, y: Tensor, norm: Any, product_dtype: torch.dtype, backend: Any) -> Any:
        return torch.ops.pairloss.own_products(x, y, norm, product_dtype, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        save(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, torch.ops.pairloss.own_products_backward, (0, 1, 2), [*saved(ctx)[0], grad])


def _once(op: Any, *args: Any) -> Any:
    """op(*args), which refuses to be differentiated again."""
    # Compiled graphs refuse second derivatives by themselves, and dynamo doesn't trace a Function within a Function.
    return op(*args) if torch.compiler.is_compiling() or not torch.is_grad_enabled() else _Once.apply(op, *args)


class _Once(torch.autograd.Function):
    """What a backward computes, with no derivative of its own."""

    @staticmethod
    def forward(op: Any, *args: Any) -> tuple[Tensor, ...]:
        return tuple(op(*args))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            "pairloss: second derivatives are not implemented by the fused engines; "
            "backend='reference' has them, at the cost of the N x N matrix"
        )
