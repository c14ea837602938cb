"""The K most similar negatives of every anchor, and the products of chosen pairs, a slab of rows at a time.

Selecting is bound by memory and served by the library's product and topk on any device. Loss and gradient then belong to
the K chosen pairs: a threshold compared again in another tile order could take another pair.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .engines import Call, without_autocast
from .reference import rounded, same_id

# Values in memory at a time, beside O(N K): a few such slabs, or of one row of pairs if that is longer. Elsewhere launches
# must be worth it.
SLAB, DEVICE_SLAB = 1 << 21, 1 << 26


def top_k(call: Call, k: int) -> Tensor:
    """pairloss.ops.top_k."""
    x, y = (rounded(rows, call.product_dtype) for rows in (call.x, call.candidates))
    index = torch.empty(len(x), k, dtype=torch.int32, device=x.device)
    for rows in _slabs(x, len(y)):
        s = x[rows] @ y.T
        if call.cutoff is not None:
            s.masked_fill_(s < call.cutoff, -torch.inf)
        if call.col_bias is not None:
            s += call.col_bias
        if call.ids_x is not None:
            assert call.candidate_ids is not None
            s.masked_fill_(same_id(call.ids_x[rows], call.candidate_ids), -torch.inf)
        if call.self_offset is not None and -len(s) < call.self_offset + rows.start < len(y):
            s.diagonal(call.self_offset + rows.start).fill_(-torch.inf)
        index[rows] = _best(s, k)
    return index


def _best(s: Tensor, k: int) -> Tensor:
    """[n, k] columns of the greatest entries, equal ones by column, -1 in place of -inf. Overwrites s."""
    s.nan_to_num_(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)  # a NaN is chosen, and the product is NaN again
    values, columns = s.topk(k, dim=1)
    least = values[:, -1:]
    if not _may_look(s) or bool(((s >= least).sum(1) > k).any()):  # ties across the k-th
        above, tied = s > least, s == least
        chosen = above | (tied & (tied.cumsum(1) <= k - above.sum(1, keepdim=True)))
        columns = torch.where(chosen, torch.arange(s.shape[1], 0, -1, device=s.device), 0).topk(k, dim=1).indices
    columns = columns.sort(dim=1).values
    values, order = s.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return torch.where(values == -torch.inf, -1, columns.gather(1, order)).int()


def products(x: Tensor, y: Tensor, index: Tensor, product_dtype: torch.dtype) -> Tensor:
    """pairloss.ops.selected_products."""
    x, y = rounded(x, product_dtype), rounded(y, product_dtype)
    result = torch.empty(index.shape, dtype=x.dtype, device=x.device)
    for rows in _slabs(x, index.shape[1] * x.shape[1]):
        with without_autocast(x):
            result[rows] = torch.einsum("nd,nkd->nk", x[rows], y[index[rows].clamp(min=0)])
    return result.masked_fill_(index < 0, -torch.inf)


def products_backward(x: Tensor, y: Tensor, index: Tensor, product_dtype: torch.dtype, weights: Tensor, needs: list[bool]) -> list[Tensor]:
    weights = weights.masked_fill(index < 0, 0)
    x, y = rounded(x, product_dtype), rounded(y, product_dtype)
    dx, dy = (torch.zeros_like(v, memory_format=torch.contiguous_format) for v in (x, y))
    for rows in _slabs(x, index.shape[1] * x.shape[1]):
        chosen = index[rows].clamp(min=0)
        if needs[0]:
            with without_autocast(x):
                dx[rows] = torch.einsum("nk,nkd->nd", weights[rows], y[chosen])
        if needs[1]:
            add_rows_(dy, chosen.flatten(), (weights[rows, :, None] * x[rows, None, :]).flatten(0, 1))
    return [grad for grad, need in zip((dx, dy), needs, strict=True) if need]


def own_products_fwd(call: Call) -> Tensor:
    """As engines.py says."""
    x, y = as_multiplied(call)
    return (x * y).sum(1)


def own_products_bwd(call: Call, weights: Tensor, needs: list[bool]) -> list[Tensor | None]:
    x, y = as_multiplied(call)
    return [weights[:, None] * other if need else None for other, need in zip((y, x), needs, strict=False)] + [None]


def as_multiplied(call: Call) -> tuple[Tensor, Tensor]:
    """Both sides, with the values that the products see. Nothing is recorded here."""
    x = call.x.to(call.product_dtype).to(call.dtype)
    return x, x if call.y is None else call.y.to(call.product_dtype).to(call.dtype)


def add_rows_(total: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """total[index] += rows, in a fixed order: CUDA's index_add_ has none, nor the CPU's index_put_."""
    if total.device.type == "cpu":
        return total.index_add_(0, index.long(), rows)
    return total.index_put_((index.long(),), rows, accumulate=True)


def rows_at(rows: Tensor, index: Tensor) -> Tensor:
    """rows[index], whose gradient is added up as in add_rows_."""
    return rows.index_select(0, index) if rows.device.type == "cpu" else rows[index]


def _slabs(rows: Tensor, width: int) -> Iterator[slice]:
    n, step = len(rows), max(1, (SLAB if _may_look(rows) else DEVICE_SLAB) // max(1, width))
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def _may_look(rows: Tensor) -> bool:
    """Whether values may steer the program without waiting for a device."""
    return rows.device.type == "cpu"
