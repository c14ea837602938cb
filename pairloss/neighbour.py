"""Soft nearest neighbour loss."""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from . import anchors, checks, engines
from .ops import row_stats
from .prepare import METRICS, prepare, real_view


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
        labels: [N], any integers; equal means positive.
        tau: temperature, a number > 0 or a 0-dim tensor, which may be learnable. It divides the distance.
        metric: "cosine", "sqeuclidean", or "dot" (rows as they come).
        eps: 0 for the exact loss, else the constant of the stabilised formula (the literature uses 1e-5).
        ref_features: [M, D], what the anchors are compared with instead (a memory bank); no pair is left out then.
        ref_labels: [M], the labels of ref_features.
        weight: [N], weight of each anchor.
        focal: gamma >= 0; multiplies l_i by (1 - p_i)^gamma, p_i the fraction inside the logarithm.
        no_positive: anchors without positives leave the mean ("skip") or count with loss 0 ("zero"). With eps > 0 they
            count with loss -log(eps), as that formula has it. Anchors without negatives count with loss 0.
        class_weight: [C], weight of each class; labels must then be 0..C-1 (or ignore_index).
        ignore_index: rows with this label are neither anchors nor candidates.
        reduction: "mean" (sum of w l over sum of w, anchors that count), "sum", or "none" ([N], w_i l_i, 0 at anchors
            that don't count).
        backend: "torch", "triton", "reference" (N x N), or None for the best that can run.

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
    checks.features("features", features)
    checks.labels("labels", labels, features)
    tau = checks.temperature("tau", tau, features)
    checks.choice("metric", metric, METRICS)
    checks.non_negative("eps", eps)
    checks.non_negative("focal", focal)
    if (ref_features is None) != (ref_labels is None):
        given, missing = ("ref_labels", "ref_features") if ref_features is None else ("ref_features", "ref_labels")
        raise ValueError(f"{missing}: expected together with {given}, got None")
    if ref_features is not None and ref_labels is not None:
        checks.features("ref_features", ref_features, like=features)
        checks.labels("ref_labels", ref_labels, ref_features)
        ref_features, ref_labels = real_view(ref_features), ref_labels.long()
    anchors.check_options(features, weight, class_weight, ignore_index, reduction, no_positive)
    engines.check_backend(backend)

    features, labels = real_view(features), labels.long()
    ignored = None if ignore_index is None else labels == ignore_index
    ref_ignored = None if ignore_index is None or ref_labels is None else ref_labels == ignore_index

    dtype = torch.promote_types(features.dtype, torch.float32)
    weight = anchors.weights(labels, weight, class_weight, ignored, dtype)
    if isinstance(tau, Tensor):
        tau = tau.to(dtype)

    x, y, row_bias, col_bias, product_dtype, logit_bound, poison = prepare(features, ref_features, tau, metric, ignored, ref_ignored)
    (pos, neg), _ = row_stats(
        x,
        y,
        labels,
        ref_labels,
        0 if y is None else None,
        row_bias,
        col_bias,
        product_dtype=product_dtype,
        logit_bound=logit_bound,
        backend=backend,
    )

    no_positives = pos == -torch.inf
    if eps == 0:
        losses, log_rest = _exact(pos, neg, no_positives)
        counts = ~no_positives if no_positive == "skip" else torch.ones_like(no_positives)
    else:
        if metric == "cosine":  # distance 1 - s: eps is not blind to the 1
            pos, neg = pos - 1 / tau, neg - 1 / tau
        losses, log_rest = _stabilised(pos, neg, math.log(eps))
        counts = torch.ones_like(no_positives)
    if focal:
        losses = losses * torch.exp(focal * log_rest)
    losses, counts = losses + poison, counts | poison.isnan()  # also where the anchor has nothing to be compared with
    if ignored is not None:
        counts = counts & ~ignored
    return anchors.reduce(losses, counts, weight, reduction)


def _exact(pos: Tensor, neg: Tensor, no_positives: Tensor) -> tuple[Tensor, Tensor]:
    """(-log p, log(1 - p)) with p = e^pos / (e^pos + e^neg): from the difference, which keeps its digits once p is near 1."""
    margin = torch.where(no_positives, 0, pos - neg)
    return torch.where(no_positives, 0, -logsigmoid(margin)), logsigmoid(-margin)


def _stabilised(pos: Tensor, neg: Tensor, log_eps: float) -> tuple[Tensor, Tensor]:
    """(-log(eps + p), log(1 - p)) with p = e^pos / (e^pos + e^neg + eps)."""
    log_eps_ = torch.full_like(pos, log_eps)
    rest = torch.logaddexp(neg, log_eps_)
    everything = torch.logaddexp(pos, rest)
    return -torch.logaddexp(log_eps_, pos - everything), rest - everything
