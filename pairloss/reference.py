"""The truth: every pair in memory, plain PyTorch, gradients by autograd. Written for reading, exact in float64.

Used by the tests, the benchmarks and the docs, and by backend="reference"; never chosen by itself.
"""

import torch
from torch import Tensor

from .engines import Call, without_autocast


def row_stats(call: Call) -> tuple[Tensor, Tensor]:
    """pairloss.ops.row_stats with the N x M matrix."""
    x, y = (rounded(rows, call.product_dtype) for rows in (call.x, call.candidates))
    with without_autocast(call):
        z = x @ y.T
    col_bias = call.row_bias if call.symmetric else call.col_bias
    if call.row_bias is not None:
        z = z + call.row_bias[:, None]
    if col_bias is not None:
        z = z + col_bias[None, :]

    allowed = torch.ones_like(z, dtype=torch.bool)
    if call.self_offset is not None:
        anchor = torch.arange(x.shape[0], device=x.device)
        candidate = torch.arange(y.shape[0], device=x.device)
        allowed = anchor[:, None] + call.self_offset != candidate[None, :]
    if call.ids_x is None:
        sets = [allowed]
    else:
        same = same_id(call.ids_x, call.candidate_ids)
        sets = [allowed & same, allowed & ~same]

    rows = torch.stack([masked_logsumexp(z, mask, 1) for mask in sets])
    if call.both_sides:
        return rows, torch.stack([masked_logsumexp(z, mask, 0) for mask in sets])
    return rows, rows.new_empty(len(sets), 0)


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
