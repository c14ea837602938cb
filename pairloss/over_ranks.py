"""The primitive when anchors and candidates are spread over ranks: each rank has its anchors' statistics, over the candidates of all.

Candidates come in blocks (ranks.Ranks.visit), what belongs to them travels home: sums of columns forward, gradients backward. Under
"ring" no more than two blocks are held at a time, and neither are they kept for the backward pass, which goes round again.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import engines, order
from .autograd import DIFFERENTIABLE, NUM_PAIRS, save, saved
from .engines import log_of
from .ranks import Place, Ranks, Rows, added
from .reference import without_silent


def row_stats(ranks: Ranks, *args: Any) -> tuple[Tensor, Tensor]:
    """ops.row_stats; the arguments are those of its op."""
    rows, cols, _, _ = _RowStats.apply(ranks, *args)
    return rows, cols


def pair_sum(ranks: Ranks, *args: Any) -> Tensor:
    return _PairSum.apply(ranks, *args)


def pair_total(ranks: Ranks, *args: Any) -> Tensor:
    """ops.pair_sum with weights, of this rank's anchors."""
    return _PairTotal.apply(ranks, *args)


class _Pairs:
    """A call's anchors against one block of candidates after the other."""

    def __init__(self, ranks: Ranks, args: Sequence[Any], biased_both_ways: bool, starts: list[int] | None = None) -> None:
        self.x, self.y, _, self.ids_x, self.ids_y, self.self_offset, self.row_bias, self.col_bias, self.product_dtype = args[:NUM_PAIRS]
        if self.self_offset not in (None, 0):
            raise ValueError(f"self_offset: expected 0 or None under pairloss.distributed, got {self.self_offset}")
        self.ranks, self.symmetric = ranks, self.y is None
        candidates, ids, bias = (self.x, self.ids_x, self.row_bias) if self.symmetric else (self.y, self.ids_y, self.col_bias)
        # Engines multiply rows rounded to the product dtype: as such they travel.
        self.candidates = [candidates.detach().to(self.product_dtype), ids, bias if biased_both_ways or not self.symmetric else None]
        self.starts = ranks.sizes(candidates.shape[0]) if starts is None else starts

    def against(self, block: Rows, place: Place) -> tuple[Any, ...]:
        """The op's arguments."""
        x, ids_x, row_bias = (None if v is None else v[place.mine] for v in (self.x, self.ids_x, self.row_bias))
        if self.is_symmetric(place):
            return x, None, None, ids_x, None, self.self_offset, row_bias, None, self.product_dtype
        y, ids, bias = block
        offset = None if self.self_offset is None or place.own is None else self.self_offset + place.own
        return x, y.to(self.x.dtype), None, ids_x, ids, offset, row_bias, bias, self.product_dtype

    def is_symmetric(self, place: Place) -> bool:
        return self.symmetric and place.is_own

    def visit(self, compute: Any, *more: Tensor | None, merge: Any = None, once: bool = False) -> Rows:
        """compute(the op's arguments, place, whatever else travels) for every block."""

        def of_block(block: Rows, place: Place) -> Any:
            return compute(self.against(block[:3], place), place, *block[3:])

        return self.ranks.visit([*self.candidates, *more], self.starts, of_block, merge, once)

    def gradients(self, needs: Sequence[bool], backward: Any, *more: Tensor | None, once: bool = False) -> list[Tensor | None]:
        """Of x, y, norm (there is none over ranks), row_bias and col_bias, where needed, from backward(the op's arguments, place, wanted,
        whatever else travels)."""
        need_x, need_y, _, need_row_bias, need_col_bias = needs
        if self.symmetric:
            need_y, need_col_bias = need_x, need_row_bias and self.candidates[2] is not None
        dx, drow_bias = (torch.zeros_like(v) if need else None for v, need in ((self.x, need_x), (self.row_bias, need_row_bias)))

        def of_block(args: tuple[Any, ...], place: Place, *travelling: Tensor | None) -> Any:
            theirs = not self.is_symmetric(place)
            wanted = [need_x, need_y and theirs, False, need_row_bias, need_col_bias and theirs]
            grads = iter(backward(args, place, wanted, *travelling))
            of_x, dy, _, of_row_bias, dcol_bias = (next(grads) if want else None for want in wanted)
            for all_of_them, part in ((dx, of_x), (drow_bias, of_row_bias)):
                if all_of_them is not None and part is not None:
                    all_of_them[place.mine] += part
            return [dy, dcol_bias]

        dy, dcol_bias = self.visit(of_block, *more, once=once)
        if self.symmetric:
            dx, drow_bias = added([dx, drow_bias], [dy, dcol_bias])
            dy = dcol_bias = None
        return [dx, dy, None, drow_bias, dcol_bias]


def _merged(a: Tensor, b: Tensor) -> Tensor:
    """Sums s e^m [2, ...] of two sets as that of their union."""
    (s, m), (t, n) = a, b
    top = torch.where(s == 0, n, torch.where(t == 0, m, torch.maximum(m, n)))
    parts = (torch.where(sums == 0, 0, sums * (shift - top).exp()) for sums, shift in ((s, m), (t, n)))
    return engines.normalised(sum(parts), top)  # type: ignore[arg-type]


def _by_row(sums: Tensor) -> Tensor:
    """[2, K, M] as [M, 2, K], as rows travel."""
    return sums.permute(2, 0, 1)


def _by_set(sums: Tensor) -> Tensor:
    return sums.permute(1, 2, 0)


BOTH_SIDES = 4  # among what follows the pairs


class _RowStats(torch.autograd.Function):
    """x against itself: what one rank's rows are to another's they are to it, so that one pass over their pairs gives the sums of both."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, *args: Any) -> Any:
        pairs = _Pairs(ranks, args, biased_both_ways=True)
        sums = pairs.x.new_zeros(2, 1 if pairs.ids_x is None else 2, pairs.x.shape[0])

        def compute(block: tuple[Any, ...], place: Place) -> Any:
            how = _how(pairs, args, place)
            _, _, rows, cols = torch.ops.pairloss.row_stats(*block, *how)
            sums[..., place.mine] = _merged(sums[..., place.mine], rows)
            return [_by_row(cols)] if how[BOTH_SIDES] else None

        home = pairs.visit(compute, merge=lambda a, b: [_by_row(_merged(_by_set(a[0]), _by_set(b[0])))], once=pairs.symmetric)
        col_sums = _by_set(home[0]).contiguous() if home else sums.new_empty(*sums.shape[:2], 0)
        if pairs.symmetric and home:
            sums, col_sums = _merged(sums, col_sums), sums.new_empty(*sums.shape[:2], 0)
        ctx.ranks, ctx.starts = ranks, pairs.starts
        save(ctx, args, sums, col_sums)
        ctx.mark_non_differentiable(sums, col_sums)
        return log_of(sums), log_of(col_sums), sums, col_sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor, grad_cols: Tensor, *_: None) -> Any:
        args, (sums, col_sums) = saved(ctx)
        pairs = _Pairs(ctx.ranks, args, True, ctx.starts)
        of_candidates = torch.cat([sums, grad_rows[None]] if pairs.symmetric else [col_sums, grad_cols[None]])

        def backward(block: tuple[Any, ...], place: Place, wanted: list[bool], *travelling: Tensor) -> Any:
            how = _how(pairs, args, place)
            of_rows = sums[..., place.mine], grad_rows[..., place.mine]
            theirs = _by_set(travelling[0]) if how[BOTH_SIDES] else sums.new_empty(3, sums.shape[1], 0)
            return torch.ops.pairloss.row_stats_backward(*block, *how, *of_rows, theirs[:2], theirs[2], wanted)

        travelling = [_by_row(of_candidates)] if pairs.symmetric or args[NUM_PAIRS + BOTH_SIDES] else []
        return _returned(ctx, pairs, backward, *travelling, once=pairs.symmetric)


def _how(pairs: _Pairs, args: Sequence[Any], place: Place) -> list[Any]:
    """The op's arguments that follow the pairs."""
    how = list(args[NUM_PAIRS:])
    how[BOTH_SIDES] = not place.is_own if pairs.symmetric else how[BOTH_SIDES]
    return how


class _PairSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ranks: Ranks, *args: Any) -> Tensor:
        pairs, how = _Pairs(ranks, args, biased_both_ways=False), args[NUM_PAIRS:]
        ctx.ranks, ctx.starts = ranks, pairs.starts
        save(ctx, args)
        sums = pairs.x.new_zeros(pairs.x.shape[0])

        def compute(block: tuple[Any, ...], place: Place) -> None:
            sums.add_(torch.ops.pairloss.pair_sum(*block, *how))

        pairs.visit(compute)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        args, _ = saved(ctx)
        pairs, how, weights = _Pairs(ctx.ranks, args, False, ctx.starts), args[NUM_PAIRS:], grad.contiguous()
        return _returned(ctx, pairs, lambda block, _, wanted: torch.ops.pairloss.pair_sum_backward(*block, *how, weights, wanted))


class _PairTotal(torch.autograd.Function):
    """The gradient is formed in the forward pass, as in autograd.PairTotal."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, *args: Any) -> Tensor:
        *pair_args, weights, needs = args
        pairs, how = _Pairs(ranks, pair_args, biased_both_ways=False), pair_args[NUM_PAIRS:]
        sums = torch.zeros_like(weights)

        def compute(block: tuple[Any, ...], _: Place, wanted: list[bool]) -> list[Tensor]:
            of_block, grads = torch.ops.pairloss.pair_sum_with_grads(*block, *how, weights, wanted)
            sums.add_(of_block)
            return grads

        grads = pairs.gradients(needs, compute)
        sums = without_silent(sums, weights)
        ctx.formed = [v is not None for v in grads]
        ctx.save_for_backward(sums, *(v for v in grads if v is not None))
        return (weights * sums).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        sums, *formed = ctx.saved_tensors
        grads = iter(formed)
        result: list[Any] = [None] * len(ctx.needs_input_grad)
        for i, has in zip(DIFFERENTIABLE, ctx.formed, strict=True):
            result[1 + i] = grad * next(grads) if has else None
        result[-2] = grad * sums
        return tuple(result)


def _returned(ctx: Any, pairs: _Pairs, backward: Any, *travelling: Tensor, once: bool = False) -> tuple[Any, ...]:
    """What a Function's backward returns: gradients at the places of its differentiable arguments, which follow the ranks."""
    places = [1 + i for i in DIFFERENTIABLE]
    grads = pairs.gradients([ctx.needs_input_grad[i] for i in places], backward, *travelling, once=once)
    result: list[Any] = [None] * len(ctx.needs_input_grad)
    for i, grad in zip(places, grads, strict=True):
        result[i] = grad
    return tuple(result)


def top_k(ranks: Ranks, *args: Any) -> Tensor:
    """ops.top_k, whose indices count the candidates of all ranks, rank by rank."""
    *pair_args, cutoff, k = args
    pairs = _Pairs(ranks, pair_args, biased_both_ways=True)
    candidates = pairs.starts[-1]
    if not 1 <= k <= candidates:
        raise ValueError(f"k: expected 1 <= k <= {candidates}, the number of candidates, got {k}")
    best: list[Tensor] = []

    def compute(block: tuple[Any, ...], place: Place) -> None:
        x, y, *_, bias, product_dtype = block
        y = x if y is None else y
        index = torch.ops.pairloss.top_k(*block, cutoff, min(k, y.shape[0]))
        if y.shape[0] == 0:
            return
        z = torch.ops.pairloss.selected_products(x, y, index, product_dtype)
        if bias is not None:
            z = z + bias[index.clamp(min=0).long()]
        index = torch.where(index < 0, -1, index + place.start)
        if best:
            z, index = torch.cat([best[0], z], 1), torch.cat([best[1], index], 1)
        order = index.argsort(dim=1, stable=True)  # of equal logits the lower index
        z, index = z.gather(1, order), index.gather(1, order)
        order = z.argsort(dim=1, descending=True, stable=True)[:, :k]
        best[:] = [z.gather(1, order), index.gather(1, order)]

    pairs.visit(compute)
    return best[1]


def selected_products(ranks: Ranks, x: Tensor, y: Tensor, index: Tensor, product_dtype: torch.dtype) -> Tensor:
    """ops.selected_products with the indices of :func:`top_k`."""
    return _SelectedProducts.apply(ranks, x, y, index, product_dtype)


def _within(index: Tensor, start: int, rows: int) -> Tensor:
    """Of the candidates of all ranks those in one block, counted there; -1 for the others."""
    return torch.where((index >= start) & (index < start + rows), index - start, -1)


class _SelectedProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ranks: Ranks, x: Tensor, y: Tensor, index: Tensor, product_dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, y, index)
        ctx.ranks, ctx.product_dtype, ctx.starts = ranks, product_dtype, ranks.sizes(y.shape[0])
        result = x.new_full(index.shape, -torch.inf)

        def compute(block: Rows, place: Place) -> None:
            rows = block[0].to(x.dtype)
            here = _within(index, place.start, rows.shape[0])
            if rows.shape[0]:
                found = torch.ops.pairloss.selected_products(x, rows, here, product_dtype)
                result.copy_(torch.where(here >= 0, found, result))

        ranks.visit([y.to(product_dtype)], ctx.starts, compute)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, y, index = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[1:3])
        dx = torch.zeros_like(x) if wanted[0] else None

        def compute(block: Rows, place: Place) -> Rows:
            rows = block[0].to(x.dtype)
            dy = torch.zeros_like(rows) if wanted[1] else None
            if rows.shape[0]:
                here = _within(index, place.start, rows.shape[0])
                grads = torch.ops.pairloss.selected_products_backward(x, rows, here, ctx.product_dtype, grad.contiguous(), wanted)
                for to, part in zip([v for v in (dx, dy) if v is not None], grads, strict=True):
                    to.add_(part)
            return [dy]

        (dy,) = ctx.ranks.visit([y.to(ctx.product_dtype)], ctx.starts, compute)
        return None, dx, dy, None, None


def count(ranks: Ranks, ids: Tensor, candidate_ids: Tensor) -> Tensor:
    """groups.count over the candidates of all ranks."""
    result = torch.zeros_like(ids)

    def compute(block: Rows, _: Place) -> None:
        result.add_(order.Classes(ids, block[0]).count)

    ranks.visit([candidate_ids], ranks.sizes(len(candidate_ids)), compute)
    return result


def class_sums(ranks: Ranks, rows: Tensor, row_ids: Tensor, ids: Tensor) -> Tensor:
    """Of every anchor the sum of the rows with its id, of all ranks, [N, D]."""
    return _ClassSums.apply(ranks, rows, row_ids, ids)


class _ClassSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ranks: Ranks, rows: Tensor, row_ids: Tensor, ids: Tensor) -> Tensor:
        ctx.ranks = ranks
        ctx.save_for_backward(row_ids, ids)
        return _sums_of_classes(ranks, rows, row_ids, ids)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        row_ids, ids = ctx.saved_tensors
        return None, _sums_of_classes(ctx.ranks, grad, ids, row_ids), None, None  # the transpose: anchors and candidates change places


def _sums_of_classes(ranks: Ranks, rows: Tensor, row_ids: Tensor, ids: Tensor) -> Tensor:
    result = rows.new_zeros(len(ids), rows.shape[1])

    def compute(block: Rows, place: Place) -> None:
        values, value_ids = block
        result.add_(order.Classes(ids, value_ids).sums(values))

    ranks.visit([rows, row_ids], ranks.sizes(len(rows)), compute)
    return result
