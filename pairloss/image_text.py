"""Losses of image-text pairs, whose scale is learnt: open_clip's ClipLoss and SigLipLoss, at any batch size."""

import torch
from torch import Tensor

from . import anchors, checks, ops, ranks
from .contrastive import Candidates
from .prepare import loss_dtype, of_multiplier, prepare, real_view


def clip(
    image: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    *,
    label_smoothing: float = 0.0,
    ids: Tensor | None = None,
    metric: str = "cosine",
    weight: Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    r"""CLIP's loss: the cross entropy of finding the text of an image and the image of a text, rows and columns from one pass.

    .. math::
        z_{ij} = c\, s_{ij}

        l_i = \tfrac12 \Big(\log \sum_j e^{z_{ij}} - z_{ii}\Big) + \tfrac12 \Big(\log \sum_j e^{z_{ji}} - z_{ii}\Big)

    Args:
        image, text: [N, D], row i of each are a pair; float64, float32, float16, bfloat16 or complex. Normalised inside when metric
            is "cosine" (rows that are unit already stay as they are).
        logit_scale: c > 0, the multiplier itself, already exponentiated: a number or a 0-dim tensor, which may be learnable
            (``pairloss.nn.LogitScale``).
        label_smoothing: 0 <= e < 1: (1 - e) of the weight on the pair, e spread evenly over all N candidates. Not with ids.
        ids: [N] integers; a candidate with the anchor's id that is not its own is neither positive nor negative.
        metric: "cosine", or "dot" (rows as they come).
        weight: [N], weight of each pair.
        reduction: "mean" (sum of w l over sum of w), "sum", or "none" ([N], w_i l_i).
        backend: "cpu", "torch", "triton", "reference" (N x N), or None for the best that can run.

    Returns:
        0-dim tensor, or [N] with reduction="none"; float64 for float64 inputs, else float32. A single pair has loss 0. A tensor
        logit_scale <= 0 gives NaN. NaN as in :func:`pairloss.contrastive`.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, device or range. RuntimeError: a backend that can't run.

    Deterministic: the same input on the same engine gives the same bits.

    Source: Radford et al. 2021, figure 3; label smoothing as in torch.nn.functional.cross_entropy.

    Example:
        >>> import torch, pairloss
        >>> image, text = torch.eye(3), torch.tensor([[1.0, 0.2, 0.0], [0.0, 1.0, 0.2], [0.2, 0.0, 1.0]])
        >>> pairloss.clip(image, text, logit_scale=10)
        tensor(0.0004)
    """
    checks.options(label_smoothing=label_smoothing, reduction=reduction, backend=backend)
    checks.similarity(metric)
    checks.paired("image", image, "text", text, ids, weight)
    if label_smoothing and ids is not None:
        raise ValueError(f"label_smoothing: expected 0 with ids, whose copies it would spread weight on, got {label_smoothing}")
    logit_scale = checks.temperature("logit_scale", logit_scale, image, loss_dtype(image))
    rows = prepare(real_view(image), real_view(text), of_multiplier(logit_scale), metric, None, None)
    if ids is not None or label_smoothing:
        rows = rows.widened()
    pos, neg_image, neg_text = Candidates(rows, ids, ids, 0, None, backend).log_sums(both_sides=True)
    losses = (anchors.softplus(neg_image - pos) + anchors.softplus(neg_text - pos)) / 2
    if label_smoothing:
        rows, n = rows.normalised(), ranks.count(image.shape[0])
        assert rows.y is not None
        swapped = rows.but(x=rows.y)
        mean_image, mean_text = (ranks.total(v.sum(0)).div(n).expand_as(v) for v in (rows.x, rows.y))
        mean = (rows.products(mean_text, backend) + swapped.products(mean_image, backend)) / 2
        losses = losses + label_smoothing * (rows.products(rows.y, backend) - mean)
    return anchors.reduce(losses, None, weight, reduction)


def siglip(
    image: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    *,
    ids: Tensor | None = None,
    metric: str = "cosine",
    weight: Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    r"""SigLIP's loss: every image-text pair is a binary decision, matched or not.

    .. math::
        z_{ij} = c\, s_{ij} + b, \quad l_i = \log(1 + e^{-z_{ii}}) + \sum_{j \ne i} \log(1 + e^{z_{ij}})

    Args:
        image, text: [N, D], row i of each are a pair; float64, float32, float16, bfloat16 or complex. Normalised inside when metric
            is "cosine".
        logit_scale: c > 0, the multiplier itself, already exponentiated: a number or a 0-dim tensor, which may be learnable. The
            paper starts at 10.
        logit_bias: b, a number or a 0-dim tensor, which may be learnable. The paper starts at -10.
        ids: [N] integers; a text with the image's id that is not its own is neither positive nor negative.
        metric: "cosine", or "dot" (rows as they come).
        weight: [N], weight of each image.
        reduction: "mean" (sum of w l over sum of w: the sum over all pairs divided by N, as in the paper), "sum", or "none" ([N],
            w_i l_i).
        backend: "cpu", "torch", "triton", "reference" (N x N), or None for the best that can run.

    Returns:
        0-dim tensor, or [N] with reduction="none"; float64 for float64 inputs, else float32. A tensor logit_scale <= 0 gives NaN.
        NaN as in :func:`pairloss.contrastive`.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, device or range. RuntimeError: a backend that can't run.

    Deterministic: the same input on the same engine gives the same bits.

    Source: Zhai et al. 2023, equation 1.

    Example:
        >>> import torch, pairloss
        >>> image, text = torch.eye(3), torch.tensor([[1.0, 0.2, 0.0], [0.0, 1.0, 0.2], [0.2, 0.0, 1.0]])
        >>> pairloss.siglip(image, text, logit_scale=10, logit_bias=-5)
        tensor(0.0616)
    """
    checks.options(reduction=reduction, backend=backend)
    checks.similarity(metric)
    checks.paired("image", image, "text", text, ids, weight)
    dtype = loss_dtype(image)
    logit_scale = checks.temperature("logit_scale", logit_scale, image, dtype)
    logit_bias = checks.scalar("logit_bias", logit_bias, image, dtype)
    rows = prepare(real_view(image), real_view(text), of_multiplier(logit_scale), metric, None, None)
    bias = torch.as_tensor(logit_bias, dtype=dtype, device=image.device).expand(image.shape[0])
    weights = None if reduction == "none" else anchors.shares(bias, weight, reduction)
    losses = ops.pair_sum(
        rows.x, rows.y, ids, ids, 0, bias,
        norm=rows.norm, over="negatives", weights=weights, own=True, product_dtype=rows.product_dtype, backend=backend,
    )  # fmt: skip
    return anchors.reduce(losses, None, weight, reduction) if weights is None else losses
