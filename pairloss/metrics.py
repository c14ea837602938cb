"""What an embedding space looks like: uniformity, alignment, tolerance. Differentiable, so they are losses too."""

import torch
from torch import Tensor

from . import anchors, checks, groups, ranks
from .prepare import loss_dtype, of_multiplier, prepare, real_view
from .reference import masked_logsumexp
from .unit import unit


def uniformity(x: Tensor, t: float = 2.0, *, metric: str = "cosine", backend: str | None = None) -> Tensor:
    r"""How evenly rows spread: the logarithm of the mean Gaussian potential of all pairs. Lower is more uniform.

    .. math::
        \log \frac{2}{N (N - 1)} \sum_{i < j} e^{-t \|x_i - x_j\|^2}

    Args:
        x: [N, D]; float64, float32, float16, bfloat16 or complex.
        t: > 0, the potential's sharpness; the literature uses 2.
        metric: "cosine", rows are normalised inside (what the literature's numbers mean), or "sqeuclidean", rows as they come.
        backend: as in :func:`pairloss.snnl`.

    Returns:
        0-dim tensor; float64 for float64 input, else float32. A single row has no pairs: 0. NaN or inf in x gives NaN. A zero row is
        at squared distance 2 from all rows under "cosine".

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape or range. RuntimeError: a backend that can't run.

    Deterministic: the same input on the same engine gives the same bits.

    Source: Wang and Isola 2020, equation 2.
    """
    checks.options(t=t, backend=backend)
    checks.choice("metric", metric, ("cosine", "sqeuclidean"))
    checks.features("x", x)
    cosine, n = metric == "cosine", ranks.count(x.shape[0])
    rows = prepare(real_view(x), None, of_multiplier(2 * t), metric, None, None)
    (z,), _ = rows.row_stats(None, None, 0, backend=backend)
    z = ranks.gathered(z)
    if n == 1:
        return torch.where(z == -torch.inf, 0, z)[0]
    return masked_logsumexp(z, z != -torch.inf, 0) - z.new_full((), n * (n - 1)).log() - (2 * t if cosine else 0)


def alignment(
    x: Tensor,
    y: Tensor,
    alpha: float = 2.0,
    *,
    metric: str = "cosine",
    weight: Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    r"""How close the rows of positive pairs are. Lower is more aligned.

    .. math::
        l_i = \|x_i - y_i\|^\alpha

    Args:
        x, y: [N, D], row i of each are a pair; float64, float32, float16, bfloat16 or complex.
        alpha: > 0; the literature uses 2.
        metric: "cosine", rows are normalised inside, or "sqeuclidean", rows as they come.
        weight: [N], weight of each pair.
        reduction: "mean" (sum of w l over sum of w), "sum", or "none" ([N], w_i l_i).
        backend: as everywhere; nothing here needs an engine.

    Returns:
        0-dim tensor, or [N] with reduction="none"; float64 for float64 input, else float32. Equal rows have gradient 0. NaN or inf
        in a pair gives NaN in its loss.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape or range.

    Deterministic. Costs O(N D).

    Source: Wang and Isola 2020, equation 1.
    """
    checks.options(alpha=alpha, reduction=reduction, backend=backend)
    checks.choice("metric", metric, ("cosine", "sqeuclidean"))
    checks.paired("x", x, "y", y, None, weight)
    x, y = (real_view(v).to(loss_dtype(v)) for v in (x, y))
    if metric == "cosine":
        x, y = unit(x), unit(y)
    difference = x - y
    size = difference.detach().abs().amax(1)  # out of the squares, which would overflow long before the distance
    same = size == 0
    distance = size * (difference / torch.where(same, 1, size)[:, None]).square().sum(1).masked_fill(same, 1).sqrt()
    return anchors.reduce(torch.where(same, 0, distance.masked_fill(same, 1) ** alpha), None, weight, reduction)


def tolerance(
    features: Tensor, labels: Tensor, *, include_self: bool = False, metric: str = "cosine", backend: str | None = None
) -> Tensor:
    r"""How close rows of one class are: the mean over all pairs of their similarity where the labels agree, and 0 where not.

    .. math::
        \frac{1}{N (N - 1)} \sum_i \sum_{j \ne i,\, y_j = y_i} s_{ij}

    Args:
        features: [N, D]; float64, float32, float16, bfloat16 or complex.
        labels: [N], any integers.
        include_self: whether a row is a pair with itself; then the divisor is N^2.
        metric: "cosine", rows are normalised inside, or "dot", rows as they come.
        backend: as everywhere; nothing here needs an engine.

    Returns:
        0-dim tensor; float64 for float64 input, else float32. A single row without include_self has no pairs: 0. NaN or inf gives NaN.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape or range.

    Deterministic. Costs O(N D), by class sums.

    Source: Wang and Liu 2021, equation 12.
    """
    checks.options(include_self=include_self, backend=backend)
    checks.similarity(metric)
    checks.features("features", features)
    checks.labels("labels", labels, features, multi_hot=False)
    rows, n = prepare(real_view(features), None, 1.0, metric, None, None).normalised(), ranks.count(features.shape[0])
    total, _ = groups.positives(rows, labels.long(), None, backend)
    if include_self:
        return ranks.total((total + rows.products(rows.x, backend)).sum()) / n**2
    return ranks.total(total.sum() / max(1, n * (n - 1)) + rows.poison().sum())
