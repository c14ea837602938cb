r"""The primitive: what is computed from all pairs, row by row, without the N x M matrix.

The path of a call, forward and backward alike:

    public loss (checks, prepares rows, combines the statistics; O(N D))
    -> row_stats, pair_sum, top_k (here) -> their ops (autograd.py: derivatives, fake kernels, label order)
    -> engines.choose -> row_stats_fwd / row_stats_bwd of the engine -> its kernel or its tiles
"""

import math
from typing import Any

import torch
from torch import Tensor

from . import engines, over_ranks, ranks, reference
from .autograd import OwnProducts, PairSum, PairTotal, RowStats, SelectedProducts
from .engines import Call, statistics_dtype
from .reference import rounded
from .unit import unit

SCORES = ("linear", "circle")
OVER = ("positives", "negatives")
TERMS = ("softplus", "linear")


def row_stats(
    x: Tensor,
    y: Tensor | None = None,
    ids_x: Tensor | None = None,
    ids_y: Tensor | None = None,
    self_offset: int | None = None,
    row_bias: Tensor | None = None,
    col_bias: Tensor | None = None,
    cutoff: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    score: str = "linear",
    m: float = 0.0,
    gamma: float = 1.0,
    both_sides: bool = False,
    product_dtype: torch.dtype | None = None,
    logit_bound: float = math.inf,
    totals: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Log-sums over the positives and the negatives of every anchor, without the N x M matrix.

    .. math::
        s_{ij} = \langle x_i, y_j \rangle, \quad z_{ij} = \mathrm{score}(s_{ij}) + \mathrm{row\_bias}_i + \mathrm{col\_bias}_j

        \mathrm{pos}_i = \log \sum_{j \in P(i)} e^{z_{ij}}, \quad \mathrm{neg}_i = \log \sum_{j \in N(i)} e^{z_{ij}}

    P(i) are the candidates with the anchor's id, N(i) the others, both without the pair left out. An empty set gives
    -inf, in whose gradient there is no NaN. A bias of -inf takes a row out of every set (its features must be finite).

    Args:
        x: anchors [N, D], float32 or float64; with norm also float16 or bfloat16.
        y: candidates [M, D]; None compares x with itself, which costs about half.
        ids_x, ids_y: integer ids [N] and [M], or multi-hot words [N, W] and [M, W] of int64 (positive = a common bit).
            None: all candidates form one set. With y=None, ids_y stays None.
        self_offset: candidate ``self_offset + i`` is left out for anchor i; None leaves none out. 0 or None with y=None.
        row_bias, col_bias: [N] and [M]. With y=None, row_bias counts on both sides and col_bias stays None.
        cutoff: 0-dim, no gradient; a negative (without ids: any pair) with s_ij below it is in no set. "linear" only.
        norm: 0-dim, in the dtype of the result: every row is scaled to this norm first, x_i norm / \|x_i\|. A row shorter than 1e-12
            becomes the zero row, with gradient 0; one that is not finite has NaN statistics.
        score: "linear", z = s; or "circle" (with ids), z = -gamma relu(1 + m - s) (s - 1 + m) of positives and
            gamma relu(s + m) (s - m) of negatives, with the relu held constant in the derivative.
        m, gamma: the circle's margin and scale.
        both_sides: also the statistics over the columns, from the same pass. Not with y=None, where they are the same.
        product_dtype: the dtype that the rows are rounded to before the products; None keeps x.dtype.
        logit_bound: a bound on every \|z_ij\| that the caller vouches for; small enough, no maximum is tracked.
        totals: with ids and the score "linear", two more rows: the sum of s_ij over the candidates with the anchor's id, and how many they
            are; whatever biases and cutoff say. Not with both y and self_offset, nor under pairloss.distributed.
        backend: "reference", "cpu", "torch", "triton" or None for the best that can run.

    Returns:
        rows [K, N] and cols [K, M] (M = 0 without both_sides), float64 for float64 rows, else float32. K = 2 (pos, neg) with ids, 1
        without; rows [4, N] with totals.

    Raises:
        ValueError, RuntimeError: arguments that don't fit together; a backend that can't run.

    Deterministic: the same input on the same engine gives the same bits.
    """
    backend = _backend(backend)
    product_dtype = product_dtype or x.dtype
    _check(x, y, norm, ids_x, ids_y, self_offset, row_bias, col_bias)
    if y is None and (col_bias is not None or both_sides):
        raise ValueError("y=None: expected col_bias=None and both_sides=False")
    if score not in SCORES:
        raise ValueError(f"score: expected one of {SCORES}, got {score!r}")
    if score == "circle" and (ids_x is None or cutoff is not None):
        raise ValueError("score='circle': expected ids_x and cutoff=None")
    if totals and (ids_x is None or score != "linear" or (y is not None and self_offset is not None) or ranks.current() is not None):
        raise ValueError("totals: expected ids_x, score='linear', with y no self_offset, and no pairloss.distributed")
    x, y, norm_of_engine = _normalised(x, y, norm, backend)
    pairs = (x, y, norm_of_engine, *_int64(ids_x, ids_y), self_offset, row_bias, col_bias, product_dtype)
    how = (cutoff, score, m, gamma, both_sides, logit_bound, totals)
    if backend == engines.REFERENCE:
        rows, cols = reference.row_stats(Call(*pairs, *how))
    elif (spread := ranks.current()) is not None:
        rows, cols = over_ranks.row_stats(spread, *pairs, *how, backend)
    else:
        rows, cols, _, _ = RowStats.apply(*pairs, *how, backend)
    if norm is not norm_of_engine:
        rows = rows + x.detach()[:, 0] * 0  # what is NaN in one column is in all
    return rows, cols


def pair_sum(
    x: Tensor,
    y: Tensor | None = None,
    ids_x: Tensor | None = None,
    ids_y: Tensor | None = None,
    self_offset: int | None = None,
    row_bias: Tensor | None = None,
    col_bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    over: str,
    term: str = "softplus",
    weights: Tensor | None = None,
    own: bool = False,
    product_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Sums over the positives or the negatives of every anchor, without the N x M matrix.

    .. math::
        z_{ij} = \langle x_i, y_j \rangle + \mathrm{row\_bias}_i + \mathrm{col\_bias}_j, \quad
        \sum_{j \in P(i)} \log(1 + e^{-z_{ij}}) \quad \text{or} \quad \sum_{j \in N(i)} \log(1 + e^{z_{ij}})

    P(i) and N(i) as in :func:`row_stats`; without ids, all candidates but the pair left out are N(i).

    Args:
        x, y, ids_x, ids_y, self_offset: as in :func:`row_stats`.
        row_bias, col_bias: [N] and [M]. With y=None, row_bias counts for the anchor only (z_ij is not z_ji), and col_bias stays
            None. +inf over positives and -inf over negatives give 0, in value and gradient.
        norm: as in :func:`row_stats`.
        over: "positives" (with ids) or "negatives".
        term: "softplus", the logarithms above, or "linear", the sum of z_ij itself (finite logits only).
        weights: [N] in the dtype of the result, to get sum_i weights_i sum_i. Its gradient is formed in the forward pass, which spares the
            backward pass a product of all pairs, and held until then: the memory of x and y. (Where there is no backward pass,
            torch.no_grad() spares forming it.) A weight of 0 silences an infinite sum.
        own: the pair left out, x_i and y_i, is the anchor's positive: log(1 + e^-z_ii) is added. Over negatives, with y of as many
            rows, self_offset 0 and softplus terms.
        product_dtype, backend: as in :func:`row_stats`.

    Returns:
        [N], float64 for float64 rows, else float32, 0 for an empty set; with weights, 0-dim.

    Raises:
        ValueError, RuntimeError: arguments that don't fit together; a backend that can't run.

    Deterministic: the same input on the same engine gives the same bits.
    """
    backend = _backend(backend)
    product_dtype = product_dtype or x.dtype
    _check(x, y, norm, ids_x, ids_y, self_offset, row_bias, col_bias)
    if y is None and col_bias is not None:
        raise ValueError("y=None: expected col_bias=None")
    if over not in OVER or (over == "positives" and ids_x is None):
        raise ValueError(f"over: expected one of {OVER}, 'positives' with ids_x, got {over!r}")
    if term not in TERMS:
        raise ValueError(f"term: expected one of {TERMS}, got {term!r}")
    if own and (over != "negatives" or term != "softplus" or y is None or y.shape[0] != x.shape[0] or self_offset != 0):
        raise ValueError("own: expected over='negatives', term='softplus', y of as many rows as x and self_offset 0")
    spread = ranks.current()
    x, y, norm = _normalised(x, y, norm, backend)
    pairs = (x, y, norm, *_int64(ids_x, ids_y), self_offset, row_bias, col_bias, product_dtype)
    if weights is None:
        if backend == engines.REFERENCE:
            return reference.pair_sum(Call(*pairs, own=own), over, term)
        if spread is not None:
            sums = over_ranks.pair_sum(spread, *pairs, over, term, False, backend)
            return sums + _own_terms(pairs, backend) if own else sums
        return PairSum.apply(*pairs, over, term, own, backend)
    if weights.shape != x.shape[:1] or weights.dtype != statistics_dtype(x):
        raise ValueError(f"weights: expected {statistics_dtype(x)} of shape [{x.shape[0]}], got {weights.dtype} {list(weights.shape)}")
    if backend == engines.REFERENCE:
        return _weighted(weights, reference.pair_sum(Call(*pairs, own=own), over, term))
    needs = [torch.is_grad_enabled() and v is not None and v.requires_grad for v in (x, y, norm, row_bias, col_bias)]
    if spread is not None:
        total = over_ranks.pair_total(spread, *pairs, over, term, False, backend, weights, needs)
        return ranks.total(total + _weighted(weights, _own_terms(pairs, backend)) if own else total)
    return PairTotal.apply(*pairs, over, term, own, backend, weights, needs)[0]


def _own_terms(pairs: tuple[Any, ...], backend: str | None) -> Tensor:
    """log(1 + e^-z_ii), with its gradient."""
    x, y, norm, *_, row_bias, col_bias, product_dtype = pairs
    z = own_products(x, y, norm=norm, product_dtype=product_dtype, backend=backend)
    return -torch.nn.functional.logsigmoid(z + sum(bias for bias in (row_bias, col_bias) if bias is not None))


def _weighted(weights: Tensor, sums: Tensor) -> Tensor:
    return (weights * reference.without_silent(sums, weights)).sum()


def top_k(
    x: Tensor,
    y: Tensor | None,
    k: int,
    ids_x: Tensor | None = None,
    ids_y: Tensor | None = None,
    self_offset: int | None = None,
    col_bias: Tensor | None = None,
    cutoff: Tensor | None = None,
    *,
    product_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """The candidates with the greatest <x_i, y_j> + col_bias_j in N(i) of every anchor, without the N x M matrix.

    Exact; of equal products the one with the lower index. Not differentiable: :func:`selected_products` of what is chosen is.

    Args:
        x, y, ids_x, ids_y, self_offset, cutoff, product_dtype, backend: as in :func:`row_stats`; all engines but "reference" select alike.
        k: how many, 1 <= k <= M.
        col_bias: [M]; not differentiable here; -inf takes a candidate out.

    Returns:
        int32 [N, k], by decreasing product; -1 where N(i) has fewer.
    """
    backend = _backend(backend)
    _check(x, y, None, ids_x, ids_y, self_offset, None, col_bias)
    y, col_bias = (None if v is None else v.detach() for v in (y, col_bias))
    pairs = (x.detach(), y, None, *_int64(ids_x, ids_y), self_offset, None, col_bias, product_dtype or x.dtype)
    if (spread := ranks.current()) is not None:
        return over_ranks.top_k(spread, *pairs, cutoff, k)
    candidates = (x if y is None else y).shape[0]
    if not 1 <= k <= candidates:
        raise ValueError(f"k: expected 1 <= k <= {candidates}, the number of candidates, got {k}")
    if backend == engines.REFERENCE:
        return reference.top_k(Call(*pairs, cutoff), k)
    return torch.ops.pairloss.top_k(*pairs, cutoff, k)


def selected_products(x: Tensor, y: Tensor, index: Tensor, *, product_dtype: torch.dtype | None = None) -> Tensor:
    """<x_i, y_j> for j = index[i, 0], ..., index[i, K - 1]; -inf, with gradient 0, where the index is -1. [N, K] in x.dtype."""
    if (spread := ranks.current()) is not None:
        return over_ranks.selected_products(spread, x, y, index, product_dtype or x.dtype)
    return SelectedProducts.apply(x, y, index, product_dtype or x.dtype)


def own_products(
    x: Tensor, y: Tensor, *, norm: Tensor | None = None, product_dtype: torch.dtype | None = None, backend: str | None = None
) -> Tensor:
    r"""Products of the rows of x and y that stand beside each other.

    .. math::
        s_i = \langle x_i, y_i \rangle

    Args:
        x, y: [N, D], float32 or float64; with norm also float16 or bfloat16.
        norm, product_dtype, backend: as in :func:`row_stats`.

    Returns:
        [N], float64 for float64 rows, else float32.

    Raises:
        ValueError, RuntimeError: arguments that don't fit together; a backend that can't run.

    Deterministic. Costs O(N D).
    """
    backend, product_dtype = _backend(backend), product_dtype or x.dtype
    _check(x, y, norm, None, None, None, None, None)
    if y.shape[0] != x.shape[0]:
        raise ValueError(f"y: expected shape {list(x.shape)}, got {list(y.shape)}")
    if backend == engines.REFERENCE:
        x, other, _ = _normalised(x, y, norm, backend)
        assert other is not None
        return (rounded(x, product_dtype) * rounded(other, product_dtype)).sum(1)
    # Never one tensor twice, which dynamo refuses.
    return OwnProducts.apply(x, y.view_as(y) if y is x else y, norm, product_dtype, backend)


def _int64(ids_x: Tensor | None, ids_y: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Both as engines take them, and never one tensor twice, which dynamo refuses."""
    ids_x, ids_y = (None if ids is None else ids.long() for ids in (ids_x, ids_y))
    return ids_x, ids_y.view_as(ids_y) if ids_y is not None and ids_y is ids_x else ids_y


def _backend(backend: str | None) -> str | None:
    engines.check_backend(backend)
    backend = backend or engines.DEFAULT_BACKEND
    if backend == engines.REFERENCE and ranks.current() is not None:
        raise ValueError("backend: expected an engine under pairloss.distributed, got 'reference'")
    return backend


def _check(
    x: Tensor,
    y: Tensor | None,
    norm: Tensor | None,
    ids_x: Tensor | None,
    ids_y: Tensor | None,
    self_offset: int | None,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
) -> None:
    dtypes = (torch.float32, torch.float64) if norm is None else (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    if x.ndim != 2 or x.dtype not in dtypes:
        raise ValueError(
            f"x: expected {' or '.join(str(v).removeprefix('torch.') for v in dtypes)} of shape [N, D], got {x.dtype} {list(x.shape)}"
        )
    if y is None:
        if ids_y is not None or self_offset not in (None, 0):
            raise ValueError("y=None: expected ids_y=None and self_offset 0 or None")
    else:
        if y.ndim != 2 or y.shape[1] != x.shape[1] or y.dtype != x.dtype:
            raise ValueError(f"y: expected {x.dtype} of shape [M, {x.shape[1]}], got {y.dtype} {list(y.shape)}")
        if (ids_x is None) != (ids_y is None):
            raise ValueError("ids_x, ids_y: expected both or neither")
    dtype = statistics_dtype(x)
    if norm is not None and (not isinstance(norm, Tensor) or norm.dtype != dtype or norm.ndim):
        got = f"{norm.dtype} {list(norm.shape)}" if isinstance(norm, Tensor) else type(norm).__name__
        raise ValueError(f"norm: expected a tensor of {dtype} and shape [], got {got}")
    candidates = x if y is None else y
    for name, vector, rows in (
        ("ids_x", ids_x, x),
        ("ids_y", ids_y, candidates),
        ("row_bias", row_bias, x),
        ("col_bias", col_bias, candidates),
    ):
        if vector is None:
            continue
        if vector.shape[0] != rows.shape[0]:
            raise ValueError(f"{name}: expected one entry per row, got shape {list(vector.shape)}")
        if "bias" in name and (vector.dtype != dtype or vector.ndim != 1):
            raise ValueError(f"{name}: expected {dtype} of shape [{rows.shape[0]}], got {vector.dtype} {list(vector.shape)}")
        if "ids" in name and (vector.ndim > 2 or 0 in vector.shape[1:]):
            raise ValueError(f"{name}: expected shape [N] or, multi-hot, [N, W] with W >= 1, got {list(vector.shape)}")


def _normalised(x: Tensor, y: Tensor | None, norm: Tensor | None, backend: str | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x, y and norm as they are computed with: engines normalise by themselves, the reference does not, and over ranks unit rows travel."""
    if norm is None or (backend != engines.REFERENCE and ranks.current() is None):
        return x, y, norm
    return unit(x.to(norm.dtype), norm), None if y is None else unit(y.to(norm.dtype), norm), None
