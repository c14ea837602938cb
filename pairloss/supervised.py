"""Losses of labelled rows: every row with the anchor's label is a positive."""

import math
from typing import Any

import torch
from torch import Tensor

from . import anchors, checks, ops, ranks
from .prepare import Rows, of_temperature, prepare
from .reference import masked_logsumexp


def supcon(
    features: Tensor,
    labels: Tensor,
    tau: float | Tensor,
    *,
    form: str = "out",
    base_tau: float | None = None,
    metric: str = "cosine",
    ref_features: Tensor | None = None,
    ref_labels: Tensor | None = None,
    weight: Tensor | None = None,
    no_positive: str = "skip",
    class_weight: Tensor | None = None,
    ignore_index: int | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    r"""Supervised contrastive loss, at any batch size.

    .. math::
        \text{out: } l_i = -\frac{1}{|P(i)|} \sum_{p \in P(i)} \log \frac{e^{s_{ip} / \tau}}{\sum_{a \ne i} e^{s_{ia} / \tau}} \qquad
        \text{in: } l_i = -\log \frac{1}{|P(i)|} \sum_{p \in P(i)} \frac{e^{s_{ip} / \tau}}{\sum_{a \ne i} e^{s_{ia} / \tau}}

        \text{pairs: } l_i = -\sum_{p \in P(i)} \log \frac{e^{s_{ip} / \tau}}{e^{s_{ip} / \tau} + \sum_{n \in N(i)} e^{s_{in} / \tau}}

    P(i) are the other rows with the anchor's label, N(i) those with another. The denominator of "out" and "in" holds every row but
    the anchor; that of "pairs" one positive and the negatives (NT-Xent with several positives).

    Args:
        features: [N, D], any strides; float64, float32, float16, bfloat16 or complex. Normalised inside when metric is
            "cosine". Several views of an item are rows with its label: :func:`pairloss.flatten_views`.
        labels: [N], any integers; or [N, C] multi-hot (not 0: has the class), positive when two rows share a class. Multi-hot
            labels take no class_weight or ignore_index, and a tiled pass more.
        tau: temperature, a number > 0 or a 0-dim tensor, which may be learnable. It divides the similarity.
        form: "out", "in" or "pairs".
        base_tau: multiply the loss by tau / base_tau, as the authors' code does; None leaves it.
        metric: "cosine", or "dot" (rows as they come).
        ref_features: [M, D], what the anchors are compared with instead (a memory bank); no pair is left out then.
        ref_labels: [M] (or [M, C]), the labels of ref_features.
        weight, class_weight, ignore_index: as in :func:`pairloss.snnl`.
        no_positive: anchors without positives leave the mean ("skip") or count with loss 0 ("zero"). The mean of "pairs" is over
            pairs, where they have no part. Anchors without negatives count: with loss 0 in "pairs" and "in" of one positive.
        reduction: "mean" ("out", "in": sum of w l over sum of w, anchors that count; "pairs": over sum of w |P|), "sum", or "none"
            ([N], w_i l_i, 0 at anchors that don't count).
        backend: "cpu", "torch", "triton", "reference" (N x N), or None for the best that can run.

    Returns:
        0-dim tensor, or [N] with reduction="none": float64 for float64 (complex128) features, else float32. If no anchor counts, 0,
        still connected to the graph. NaN, inf, tensor tau <= 0 and zero rows as in :func:`pairloss.snnl`.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, device or range. RuntimeError: a backend that can't run.

    Deterministic: the same input on the same engine gives the same bits.

    Source: Khosla et al. 2020, equations 2 (out) and 3 (in, with |P| inside the logarithm).

    Example:
        >>> import torch, pairloss
        >>> features = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
        >>> pairloss.supcon(features, torch.tensor([0, 0, 1]), tau=0.5)
        tensor(0.3485)
    """
    checks.options(form=form, base_tau=base_tau, no_positive=no_positive, ignore_index=ignore_index, reduction=reduction, backend=backend)
    checks.similarity(metric)
    given = anchors.labelled(features, labels, ref_features, ref_labels, weight, class_weight, ignore_index)
    tau = checks.temperature("tau", tau, features, given.dtype)
    rows = prepare(given.features, given.ref_features, of_temperature(tau), metric, given.ignored, given.ref_ignored)
    if form == "pairs":
        rows = rows.widened()
    (pos, neg, similarity, size), _ = rows.row_stats(given.ids, given.ref_ids, given.self_offset, totals=True, backend=backend)
    none, weight = size == 0, given.weight
    some = size.clamp(min=1)

    margin = (neg - pos).masked_fill(none, 0)
    if form == "out":  # what one positive loses by the log-sum, 0, is all that would be left of a converged loss
        losses = (pos - similarity / some).masked_fill(size <= 1, 0) + anchors.softplus(margin)
    elif form == "in":
        losses = some.log() + anchors.softplus(margin)
    else:
        losses = _each_positive(rows, given, neg, backend) / some
        weight = size if weight is None else weight * size
    if base_tau is not None:
        losses = losses * (tau / base_tau)
    return anchors.reduce_labelled(losses, none, no_positive, given, weight, reduction)


def _each_positive(rows: Rows, given: anchors.Labelled, neg: Tensor, backend: str | None) -> Tensor:
    """Sum over P(i) of log(1 + e^(neg_i - z_ip)): a second pass, over the tiles that hold positives."""
    return ops.pair_sum(
        rows.x, rows.y, given.ids, given.ref_ids, given.self_offset, -neg,
        norm=rows.norm, over="positives", product_dtype=rows.product_dtype, backend=backend,
    )  # fmt: skip


def flatten_views(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Features [B, V, D] of V views of each item and labels [B] (or [B, C]) as rows [B V, D] and their labels, for labelled losses.

    Item by item: row ``b * V + v`` is view v of item b. Without labels, ``torch.arange(B)`` makes an item's views positives.

    Example:
        >>> import torch, pairloss
        >>> rows, labels = pairloss.flatten_views(torch.randn(8, 3, 16), torch.arange(8) % 2)
        >>> rows.shape, labels.shape
        (torch.Size([24, 16]), torch.Size([24]))
    """
    checks.tensor("features", features)
    checks.tensor("labels", labels)
    if features.ndim != 3:
        raise ValueError(f"features: expected shape [B, V, D], got {list(features.shape)}")
    if labels.ndim not in (1, 2) or labels.shape[0] != features.shape[0]:
        raise ValueError(f"labels: expected one entry per item, {features.shape[0]}, got shape {list(labels.shape)}")
    return features.flatten(0, 1), labels.repeat_interleave(features.shape[1], 0)


def circle(
    features: Tensor,
    labels: Tensor,
    *,
    m: float = 0.25,
    gamma: float = 256.0,
    pool: str = "anchor",
    metric: str = "cosine",
    ref_features: Tensor | None = None,
    ref_labels: Tensor | None = None,
    weight: Tensor | None = None,
    no_positive: str = "skip",
    class_weight: Tensor | None = None,
    ignore_index: int | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    r"""Circle loss: pairs far from their optimum pull harder.

    .. math::
        l_i = \log\Big(1 + \sum_{n \in N(i)} e^{\gamma \alpha_{in} (s_{in} - m)}
              \sum_{p \in P(i)} e^{-\gamma \alpha_{ip} (s_{ip} - 1 + m)}\Big)

        \alpha_{in} = [s_{in} + m]_+, \quad \alpha_{ip} = [1 + m - s_{ip}]_+

    The weights alpha are held constant in the derivative, as in the paper: a finite difference of the loss is not its gradient.

    Args:
        features: [N, D], any strides; float64, float32, float16, bfloat16 or complex. Normalised inside when metric is "cosine".
        labels: [N], any integers; or [N, C] multi-hot, positive when two rows share a class.
        m: relaxation: pairs are at rest at s_p >= 1 - m and s_n <= m. The paper uses 0.25 (faces) and 0.4 (retrieval).
        gamma: scale > 0. The paper uses 256 with m = 0.25 and 80 with m = 0.4.
        pool: "anchor", one loss per anchor (pytorch-metric-learning), or "batch", one loss over all pairs of the batch, each
            unordered pair once (the authors' formula); "batch" takes no weight, class_weight or reduction.
        metric: "cosine", or "dot" (rows as they come, meant to be unit rows).
        ref_features, ref_labels, weight, class_weight, ignore_index: as in :func:`pairloss.snnl`.
        no_positive: anchors without positives or without negatives leave the mean ("skip") or count with loss 0 ("zero").
        reduction: "mean" (sum of w l over sum of w, anchors that count), "sum", or "none" ([N], w_i l_i, 0 at anchors that don't
            count).
        backend: "cpu", "torch", "triton", "reference" (N x N), or None for the best that can run.

    Returns:
        0-dim tensor, or [N] with reduction="none": float64 for float64 (complex128) features, else float32. If no anchor counts
        (pool="batch": no positive pair or no negative one), 0, still connected to the graph. NaN, inf and zero rows as in
        :func:`pairloss.snnl`.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, device or range. RuntimeError: a backend that can't run.

    Deterministic: the same input on the same engine gives the same bits.

    Source: Sun et al. 2020, equations 4 to 6 with the optima of section 3.3 (O_p = 1 + m, O_n = -m).

    Example:
        >>> import torch, pairloss
        >>> features = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
        >>> pairloss.circle(features, torch.tensor([0, 0, 1]), gamma=4)
        tensor(0.9624)
    """
    checks.options(m=m, gamma=gamma, pool=pool, no_positive=no_positive, ignore_index=ignore_index, reduction=reduction, backend=backend)
    checks.similarity(metric)
    if pool == "batch" and (weight is not None or class_weight is not None or reduction != "mean"):
        raise ValueError("pool: expected 'anchor' with weight, class_weight or a reduction, got 'batch'")
    given = anchors.labelled(features, labels, ref_features, ref_labels, weight, class_weight, ignore_index)
    rows = prepare(given.features, given.ref_features, 1.0, metric, given.ignored, given.ref_ignored).but(logit_bound=torch.inf)
    score: dict[str, Any] = {"score": "circle", "m": float(m), "gamma": float(gamma)}
    (pos, neg), _ = rows.row_stats(given.ids, given.ref_ids, given.self_offset, **score, backend=backend)
    if pool == "batch":
        twice = 2 if given.self_offset == 0 else 1  # x against itself sees each pair from both sides
        pos, neg = (masked_logsumexp(z, z != -torch.inf, 0)[None] - math.log(twice) for z in map(ranks.gathered, (pos, neg)))
    empty = torch.minimum(pos, neg) == -torch.inf
    losses = anchors.softplus((pos + neg).masked_fill(empty, -torch.inf))  # loss and gradient 0
    if pool == "batch":
        return losses[0]
    return anchors.reduce_labelled(losses, empty, no_positive, given, given.weight, reduction)
