"""Classes of unequal size: weights per class, and the cross-entropy that looks at the hard rows."""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from . import anchors, checks
from .prepare import loss_dtype

# From here on, exp(margin) is 0 even in float64: the modulator is 1 and its derivative 0.
_HOPELESS = -1000.0


def class_balanced_weights(counts: Tensor, beta: float, *, normalise: bool = True) -> Tensor:
    r"""Weights per class by the effective number of its samples.

    .. math::
        w_c = \frac{1}{E_{n_c}}, \qquad E_n = \frac{1 - \beta^n}{1 - \beta}

    between no weights (beta = 0) and the inverse frequency 1/n (beta = 1, the limit). All digits also for beta near 1.

    Args:
        counts: [C], samples per class, >= 0; integers or floats.
        beta: 0 <= beta <= 1; the paper uses 0.9 to 0.9999.
        normalise: the weights sum to the number of classes that are present, else they are 1/E.

    Returns:
        [C], float64 for float64 counts, else float32, on the device of counts. A class with count 0 is absent: its weight is
        0, and it is left out of the normalisation.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape or range. A count < 0 raises on the CPU; elsewhere, and
        under torch.compile, where looking would wait for the device, it gives NaN, as a NaN count does everywhere.

    Source: Cui, Jia, Lin, Song and Belongie 2019, proposition 1; normalised as there.

    Example:
        >>> import torch, pairloss
        >>> pairloss.class_balanced_weights(torch.tensor([900, 90, 0]), beta=0.999)
        tensor([0.2534, 1.7466, 0.0000])
    """
    counts = _checked_counts(counts)
    checks.number("beta", beta)
    if not 0 <= beta <= 1:
        raise ValueError(f"beta: expected a number from 0 to 1, got {beta}")
    if beta == 1:
        each = 1 / counts
    else:
        log_beta = math.log(beta) if beta > 0 else -math.inf
        each = (1 - beta) / -torch.expm1(counts * log_beta)
    each = torch.where(counts == 0, 0, each)
    return _sum_to(each, (counts != 0).sum()) if normalise else each


def inverse_frequency_weights(counts: Tensor, *, normalise: bool = True) -> Tensor:
    r"""Weights per class inverse to its frequency :math:`f_c = n_c / N`.

    .. math::
        w_c = \frac{1}{C f_c} = \frac{N}{C n_c}

    Args:
        counts: [C], samples per class, >= 0; integers or floats.
        normalise: the weights sum to the number of classes that are present; else they are the formula's (scikit-learn's
            "balanced"), which average to 1 over the samples. C counts the classes that are present.

    Returns, raises: as :func:`class_balanced_weights`.

    Example:
        >>> import torch, pairloss
        >>> pairloss.inverse_frequency_weights(torch.tensor([900, 90, 10]), normalise=False)
        tensor([ 0.3704,  3.7037, 33.3333])
    """
    counts = _checked_counts(counts)
    present = (counts != 0).sum()
    each = torch.where(counts == 0, 0, 1 / counts)
    return _sum_to(each, present) if normalise else each * (counts.sum() / present.clamp(min=1))


def focal_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    gamma: float,
    weight: Tensor | None = None,
    *,
    ignore_index: int | None = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""Cross-entropy in which rows that are already right count little.

    .. math::
        l_i = -w_{y_i} (1 - p_i)^\gamma \log p_i, \qquad p_i = \mathrm{softmax}(z_i)_{y_i}

    Both logarithms come from the same difference, log-sum-exp of the other classes minus the label's logit: they keep their
    digits where p rounds to 1, at every gamma >= 0 and every size of the logits.

    Args:
        logits: [N, C], C >= 1: float64, float32, float16 or bfloat16. -inf masks a class.
        labels: [N], integers 0..C-1 (or ignore_index).
        gamma: >= 0; 0 gives ``F.cross_entropy(logits, labels, weight)``.
        weight: [C], weight of each class, as of :func:`class_balanced_weights`.
        ignore_index: rows with this label don't count, whatever their logits.
        reduction: "mean" (sum of w l over sum of w, rows that count), "sum", or "none" ([N], w_i l_i, 0 at rows that don't
            count). ``reduction="none"`` and ``.mean()`` is the mean over N that the literature's code uses.

    Returns:
        0-dim tensor, or [N] with reduction="none": float64 for float64 logits, else float32, which half logits are computed
        in. If no row counts, 0, still connected to the graph. A row with one class only, all others masked, has loss and
        gradient 0. NaN or inf in a row that is not ignored gives NaN in loss and gradient, -inf at its label the loss inf.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, device or range. A label outside 0..C-1 raises on the
        CPU; elsewhere, and under torch.compile, where looking would wait for the device, its row is NaN.

    Differentiable twice, and in weight. O(N C) memory.

    Source: Lin, Goyal, Girshick, He and Dollar 2017, in its softmax form.

    Example:
        >>> import torch, pairloss
        >>> logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 3.0]])
        >>> pairloss.focal_cross_entropy(logits, torch.tensor([0, 1]), gamma=2.0)
        tensor(0.8567)
    """
    _check_logits(logits)
    checks.integers("labels", labels, logits.shape[:1], logits)
    _check_weight(weight, logits)
    checks.options(gamma=gamma, ignore_index=ignore_index, reduction=reduction)

    labels = labels.long()
    counts = torch.ones_like(labels, dtype=torch.bool) if ignore_index is None else labels != ignore_index
    num_classes = logits.shape[1]
    outside = counts & ((labels < 0) | (labels >= num_classes))
    if labels.device.type == "cpu" and not torch.compiler.is_compiling() and bool(outside.any()):
        raise ValueError(f"labels: expected 0..{num_classes - 1} because logits has {num_classes} columns, got {labels[outside][0].item()}")
    index = labels.clamp(0, num_classes - 1)

    logits = logits.to(loss_dtype(logits))
    margin = torch.where(outside, torch.nan, _margin(logits, index, ~counts))
    losses = -logsigmoid(margin)
    if gamma:
        # Where the clamp acts the modulator's derivative is 0, but autograd would multiply it with a loss that may be inf.
        losses = losses * torch.exp(gamma * logsigmoid(-margin.clamp(min=_HOPELESS)))
    return anchors.reduce(losses, ~counts, None if weight is None else weight[index], reduction)


def _margin(logits: Tensor, index: Tensor, ignored: Tensor) -> Tensor:
    """log p - log(1 - p) of the class index; inf where it is the only class, 0 in ignored rows."""
    target = logits.gather(1, index[:, None]).squeeze(1)
    target = torch.where(target == torch.inf, torch.nan, target)
    others = logits.scatter(1, index[:, None], -torch.inf)
    alone = (others == -torch.inf).all(1)
    # The derivative of a log-sum-exp of nothing is NaN, and so may be that of an ignored row.
    others = torch.where((alone | ignored)[:, None], 0, others)
    # Differences first: logits of 1e4 that differ by 1 keep its digits. A constant shift has no derivative.
    top = others.detach().amax(1)
    rest = (others - top[:, None]).exp().sum(1).log()
    margin = torch.where(alone, target + torch.inf, (target - top) - rest)
    return torch.where(ignored, 0, margin)


def _checked_counts(counts: Tensor) -> Tensor:
    """In the dtype of the weights; NaN where < 0."""
    checks.tensor("counts", counts)
    if counts.dtype == torch.bool or counts.is_complex():
        raise TypeError(f"counts: expected an integer or floating-point dtype, got {counts.dtype}")
    if counts.ndim != 1 or counts.shape[0] == 0:
        raise ValueError(f"counts: expected shape [C], one entry per class, got {list(counts.shape)}")
    negative = counts < 0
    if counts.device.type == "cpu" and not torch.compiler.is_compiling() and bool(negative.any()):
        raise ValueError(f"counts: expected numbers >= 0, got {counts[negative][0].item()}")
    return torch.where(negative, torch.nan, counts.to(torch.float64 if counts.dtype == torch.float64 else torch.float32))


def _sum_to(each: Tensor, total: Tensor) -> Tensor:
    share = each.sum()
    return each * (total / torch.where(share == 0, 1, share))


def _check_logits(logits: Tensor) -> None:
    checks.tensor("logits", logits)
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits: expected shape [N, C] with C >= 1, got {list(logits.shape)}")
    if not logits.is_floating_point():
        raise TypeError(f"logits: expected a floating-point dtype, got {logits.dtype}")


def _check_weight(weight: Tensor | None, logits: Tensor) -> None:
    if weight is None:
        return
    checks.tensor("weight", weight)
    if weight.ndim != 1 or weight.shape[0] != logits.shape[1]:
        raise ValueError(f"weight: expected shape [{logits.shape[1]}], one entry per column of logits, got {list(weight.shape)}")
    checks.real("weight", weight)
    checks.same_device("weight", weight, logits)
