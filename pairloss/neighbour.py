"""Soft nearest neighbour loss."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import anchors, checks, ranks
from .prepare import loss_dtype, of_temperature, prepare, real_view


def snnl(
    features: Tensor,
    labels: Tensor,
    tau: float | Tensor,
    *,
    metric: str = "cosine",
    eps: float = 0.0,
    ref_features: Tensor | None = None,
    ref_labels: Tensor | None = None,
    weight: Tensor | None = None,
    focal: float = 0.0,
    no_positive: str = "skip",
    class_weight: Tensor | None = None,
    ignore_index: int | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    r"""Soft nearest neighbour loss: how entangled the classes are, at any batch size.

    .. math::
        l_i = -\log \frac{\sum_{j \ne i,\, y_j = y_i} e^{-d_{ij} / \tau}}{\sum_{k \ne i} e^{-d_{ik} / \tau}}

    with d = 1 - cosine similarity, the squared Euclidean distance, or minus the dot product. Low when each row's
    neighbours share its label. The same value as ``pairloss.reference.snnl`` (a few lines of plain PyTorch), but without
    the N x N matrix: O(N D) memory, and exact in log space at every temperature. With ``eps`` > 0 it is the stabilised
    formula of Frosst et al.'s code, whose logarithm saturates at ``-log(eps)``:

    .. math::
        l_i = -\log \Big( \epsilon + \frac{\sum_{j \ne i, y_j = y_i} e^{-d_{ij}/\tau}}{\epsilon + \sum_{k \ne i} e^{-d_{ik}/\tau}} \Big)

    Args:
        features: [N, D], N >= 1, D >= 1, any strides; float64, float32, float16, bfloat16 or complex (compared by
            Re <a, conj b>). They are normalised inside when metric is "cosine".
        labels: [N], any integers, equal means positive; or [N, C] multi-hot (not 0: has the class), positive when two rows share a
            class, without class_weight and ignore_index.
        tau: temperature, a number > 0 or a 0-dim tensor, which may be learnable. It divides the distance.
        metric: "cosine", "sqeuclidean", or "dot" (rows as they come).
        eps: 0 for the exact loss, else the constant of the stabilised formula (the literature uses 1e-5).
        ref_features: [M, D], what the anchors are compared with instead (a memory bank); no pair is left out then.
        ref_labels: [M] (or [M, C]), the labels of ref_features.
        weight: [N], weight of each anchor.
        focal: gamma >= 0; multiplies l_i by (1 - p_i)^gamma, p_i the fraction inside the logarithm.
        no_positive: anchors without positives leave the mean ("skip") or count with loss 0 ("zero"). With eps > 0 they
            count with loss -log(eps), as that formula has it. Anchors without negatives count with loss 0.
        class_weight: [C], weight of each class; labels must then be 0..C-1 (or ignore_index).
        ignore_index: rows with this label are neither anchors nor candidates.
        reduction: "mean" (sum of w l over sum of w, anchors that count), "sum", or "none" ([N], w_i l_i, 0 at anchors
            that don't count).
        backend: "cpu", "torch", "triton", "reference" (N x N), or None for the best that can run.

    Returns:
        0-dim tensor, or [N] with reduction="none": float64 for float64 (complex128) features, else float32. If no anchor
        counts, 0, still connected to the graph. NaN or inf in a row that is not ignored gives NaN in loss and gradient,
        and so does a tensor tau <= 0 (a check would wait for the device). A row with a norm below 1e-12 is the zero
        vector under "cosine", with gradient 0; one whose norm overflows float32 is NaN.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, device or range. RuntimeError: a backend that can't run.

    Half features are multiplied in their dtype (under autocast, float32 ones in autocast's); all else is float32.
    Deterministic: the same input on the same engine gives the same bits. Second derivatives: backend="reference" only.
    Under torch.compile, pass an annealed tau as a tensor: every new Python number would compile anew.

    Source: Salakhutdinov and Hinton 2007; Frosst, Papernot and Hinton 2019, equation 1; eps as in Agarap and Azcarraga 2020.

    Example:
        >>> import torch, pairloss
        >>> features = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
        >>> pairloss.snnl(features, torch.tensor([0, 0, 1]), tau=0.5)
        tensor(0.3485)
    """
    checks.options(
        metric=metric, eps=eps, focal=focal, no_positive=no_positive, ignore_index=ignore_index, reduction=reduction, backend=backend
    )
    given = anchors.labelled(features, labels, ref_features, ref_labels, weight, class_weight, ignore_index)
    tau = checks.temperature("tau", tau, features, given.dtype)
    scale = of_temperature(tau / 2 if metric == "sqeuclidean" else tau)
    rows = prepare(given.features, given.ref_features, scale, metric, given.ignored, given.ref_ignored)
    (pos, neg), _ = rows.row_stats(given.ids, given.ref_ids, given.self_offset, backend=backend)

    if eps:
        if metric == "cosine":  # distance 1 - s: eps is not blind to the 1
            pos, neg = pos - 1 / tau, neg - 1 / tau
        losses, log_rest = _stabilised(pos, neg, math.log(eps))
        losses = losses * torch.exp(focal * log_rest) if focal else losses
        return anchors.reduce(losses, given.ignored, given.weight, reduction)
    no_positives = pos == -torch.inf
    margin = (neg - pos).masked_fill(no_positives, 0)  # minus it, its logistic is the fraction, and keeps its digits near 1
    losses = anchors.softplus(margin)
    losses = losses * torch.exp(-focal * anchors.softplus(-margin)) if focal else losses
    return anchors.reduce_labelled(losses, no_positives, no_positive, given, given.weight, reduction)


def _stabilised(pos: Tensor, neg: Tensor, log_eps: float) -> tuple[Tensor, Tensor]:
    """(-log(eps + p), log(1 - p)) with p = e^pos / (e^pos + e^neg + eps)."""
    log_eps_ = torch.full_like(pos, log_eps)
    rest = torch.logaddexp(neg, log_eps_)
    everything = torch.logaddexp(pos, rest)
    return -torch.logaddexp(log_eps_, pos - everything), rest - everything


# Of an interval that each golden section keeps.
GOLDEN = (math.sqrt(5) - 1) / 2


class Entanglement(NamedTuple):
    loss: Tensor
    tau: Tensor


def entanglement(
    features: Tensor, labels: Tensor, *, metric: str = "cosine", ignore_index: int | None = None, backend: str | None = None
) -> Entanglement:
    r"""The soft nearest neighbour loss at the temperature that makes it least: a measure of how entangled the classes are.

    .. math::
        \min_\tau \mathrm{snnl}(\mathrm{features}, \mathrm{labels}, \tau)

    Comparable between layers and epochs, whose distances differ in scale, where a loss at one temperature is not.

    Args:
        features, ignore_index, backend: as in :func:`pairloss.snnl`.
        labels: [N], any integers.
        metric: "cosine" or "sqeuclidean".

    Returns:
        (loss, tau), 0-dim tensors. The loss is differentiable, with tau held constant, which at the minimum is the whole gradient.
        If no anchor counts, the loss is 0 and tau means nothing; a tau at the end of its range says that there is no minimum.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, device or range. RuntimeError: a backend that can't run.

    Looked for among 16 temperatures from 1/1000 to 100 of the mean squared distance (cosine: of 1), then by 20 golden sections: 57
    forward passes. The loss need not be convex in tau; a minimum narrower than a factor of 2 could be missed. Deterministic.

    Source: Frosst, Papernot and Hinton 2019, section 2.
    """
    checks.choice("metric", metric, ("cosine", "sqeuclidean"))
    checks.features("features", features)
    checks.labels("labels", labels, features, multi_hot=False)

    def at(log_tau: Tensor) -> Tensor:
        return snnl(features, labels, log_tau.exp(), metric=metric, ignore_index=ignore_index, backend=backend)

    with torch.no_grad():
        grid = torch.linspace(math.log(1e-3), math.log(1e2), 16, dtype=loss_dtype(features), device=features.device)
        if metric == "sqeuclidean":
            used = torch.ones_like(labels, dtype=grid.dtype) if ignore_index is None else (labels.long() != ignore_index).to(grid.dtype)
            grid = grid + _mean_square_distance(real_view(features).to(grid.dtype), used).log()
        best = grid.gather(0, torch.stack([at(log_tau) for log_tau in grid]).argmin()[None])[0]
        low, high = best - grid.diff()[0], best + grid.diff()[0]
        for _ in range(20):
            a, b = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
            left = at(a) <= at(b)
            low, high = torch.where(left, low, a), torch.where(left, b, high)
        log_tau = torch.minimum(torch.maximum((low + high) / 2, grid[0]), grid[-1])
    return Entanglement(at(log_tau), log_tau.exp())


def _mean_square_distance(features: Tensor, used: Tensor) -> Tensor:
    share = used / ranks.total(used.sum()).clamp(min=1)
    rows = torch.where(used[:, None] == 0, 0, features)
    centre = ranks.total((share[:, None] * rows).sum(0))
    spread = 2 * ranks.total(((rows - centre).square().sum(1) * share).sum())
    return torch.where(spread > 0, spread, 1)
