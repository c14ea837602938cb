"""The truth: every pair in memory, plain PyTorch, gradients by autograd. Written for reading, exact in float64.

Used by the tests, the benchmarks and the docs, and by backend="reference"; never chosen by itself.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from .engines import Call, without_autocast


def row_stats(call: Call) -> tuple[Tensor, Tensor]:
    """pairloss.ops.row_stats with the N x M matrix."""
    s = products(call)
    positive, negative = sets(call)
    if call.cutoff is not None:
        negative = negative & ~(s < call.cutoff)
    col_bias = call.row_bias if call.symmetric else call.col_bias
    pos, neg = (biased(z, call.row_bias, col_bias) for z in scores(s, call))
    masked = [(neg, negative)] if call.ids_x is None else [(pos, positive), (neg, negative)]
    rows = torch.stack([masked_logsumexp(z, mask, 1) for z, mask in masked])
    if call.totals:
        rows = torch.cat([rows, torch.where(positive, s, 0).sum(1)[None], positive.sum(1)[None]])
    if call.both_sides:
        return rows, torch.stack([masked_logsumexp(z, mask, 0) for z, mask in masked])
    return rows, rows.new_empty(len(masked), 0)


def pair_sum(call: Call, over: str, term: str) -> Tensor:
    """pairloss.ops.pair_sum with the N x M matrix."""
    z = biased(products(call), call.row_bias, call.col_bias)
    mask = sets(call)[("positives", "negatives").index(over)]
    values = z
    if term == "softplus":
        values = -logsigmoid(z) if over == "positives" else -logsigmoid(-z)
    sums = torch.where(mask, values, 0).sum(1)
    return sums - logsigmoid(z.diagonal()) if call.own else sums


def top_k(call: Call, k: int) -> Tensor:
    """pairloss.ops.top_k with the N x M matrix."""
    s, negative = products(call), sets(call)[1]
    if call.cutoff is not None:
        negative = negative & ~(s < call.cutoff)
    s = biased(s, None, call.col_bias).masked_fill(~negative, -torch.inf)
    best = s.sort(dim=1, descending=True, stable=True)
    return torch.where(best.values == -torch.inf, -1, best.indices)[:, :k].int()


def products(call: Call) -> Tensor:
    x, y = (rounded(rows, call.product_dtype) for rows in (call.x, call.candidates))
    with without_autocast(call.x):
        return x @ y.T


def scores(s: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """(score of a positive, score of a negative)."""
    if call.score == "linear":
        return s, s
    # Sun et al. 2020, equation 6; how far a pair is from its optimum weighs it, held constant in the derivative.
    pos = -call.gamma * relu(1 + call.m - s).detach() * (s - (1 - call.m))
    neg = call.gamma * relu(s + call.m).detach() * (s - call.m)
    return pos, neg


def biased(z: Tensor, row_bias: Tensor | None, col_bias: Tensor | None) -> Tensor:
    if row_bias is not None:
        z = z + row_bias[:, None]
    return z if col_bias is None else z + col_bias[None, :]


def sets(call: Call) -> tuple[Tensor, Tensor]:
    """[N, M] masks: candidates with the anchor's id, and the others (all, without ids); both without the pair left out."""
    n, m = call.x.shape[0], call.candidates.shape[0]
    allowed = torch.ones(n, m, dtype=torch.bool, device=call.x.device)
    if call.self_offset is not None:
        anchor, candidate = (torch.arange(size, device=call.x.device) for size in (n, m))
        allowed = anchor[:, None] + call.self_offset != candidate[None, :]
    same = torch.zeros_like(allowed) if call.ids_x is None else same_id(call.ids_x, call.candidate_ids)
    return allowed & same, allowed & ~same


def same_id(ids_x: Tensor, ids_y: Tensor | None) -> Tensor:
    """[N, M]: equal labels, or multi-hot words with a common bit."""
    assert ids_y is not None
    if ids_x.ndim == 1:
        return ids_x[:, None] == ids_y[None, :]
    return ((ids_x[:, None] & ids_y[None, :]) != 0).any(-1)


def masked_logsumexp(z: Tensor, mask: Tensor, dim: int) -> Tensor:
    """log sum exp over the mask; an empty row gives -inf and gradient 0."""
    z = z.masked_fill(~mask, -torch.inf)
    top = z.detach().amax(dim, keepdim=True)
    top = torch.where(top == -torch.inf, 0, top)
    total = torch.exp(z - top).sum(dim)
    empty = total == 0
    return torch.where(empty, -torch.inf, torch.log(torch.where(empty, 1, total)) + top.squeeze(dim))


def without_silent(losses: Tensor, weights: Tensor) -> Tensor:
    """The losses, but 0 where a weight of 0 silences an infinite one; it silences no NaN."""
    return losses.masked_fill((weights == 0) & losses.isinf(), 0)


def rounded(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows with the values they have in dtype, gradients unrounded."""
    return rows if dtype == rows.dtype else rows + (rows.to(dtype).to(rows.dtype) - rows).detach()


def snnl(features: Tensor, labels: Tensor, tau: float) -> Tensor:
    """The naive soft nearest neighbour loss on cosine similarity that the benchmarks compare with.

    The mean over anchors with a positive of ``logsumexp over all j != i - logsumexp over positives``, s_ij / tau.
    """
    rows = torch.nn.functional.normalize(features, dim=1)
    logits = rows @ rows.T / tau
    itself = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    logits = logits.masked_fill(itself, -torch.inf)
    positive = (labels[:, None] == labels[None, :]) & ~itself
    per_anchor = logits.logsumexp(1) - logits.masked_fill(~positive, -torch.inf).logsumexp(1)
    return per_anchor[positive.any(1)].mean()
