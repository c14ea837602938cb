"""Contrastive losses of paired rows: query i belongs to key i, the other keys are negatives."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import anchors, checks, groups, ops, ranks
from .engines import without_autocast
from .prepare import Rows, loss_dtype, of_temperature, prepare, real_view
from .reference import masked_logsumexp, rounded


def contrastive(
    query: Tensor,
    key: Tensor,
    tau: float | Tensor,
    *,
    negative_keys: Tensor | None = None,
    in_batch: bool = True,
    top_k: int | None = None,
    threshold: float | None = None,
    both_sides: bool = False,
    ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    key_bias: Tensor | None = None,
    negative_bias: Tensor | None = None,
    metric: str = "cosine",
    weight: Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    r"""Contrastive loss (InfoNCE): find the key of every query among its negatives.

    .. math::
        l_i = -\log \frac{e^{s_{ii} / \tau}}{e^{s_{ii} / \tau} + \sum_{k \in N(i)} e^{s_{ik} / \tau}}

    The denominator holds the query's own key and its negatives N(i): the other keys of the batch, and ``negative_keys``. Equals
    ``cross_entropy(normalize(query) @ normalize(key).T / tau, arange(N))``, without the matrix.

    Args:
        query: [N, D], the anchors; float64, float32, float16, bfloat16 or complex. Normalised inside when metric is "cosine".
        key: [N, D], key i is the positive of query i.
        tau: temperature, a number > 0 or a 0-dim tensor, which may be learnable. It divides the similarity.
        negative_keys: more negatives, [M, D] for all queries, or [N, M, D] for each its own.
        in_batch: whether the other keys of the batch are negatives; False needs negative_keys.
        top_k: only the K most similar negatives of each query count (all, where it has fewer); biases count as similarity.
        threshold: only negatives with a similarity (before tau) of at least this count, as far as rounding tells; top_k is among
            them.
        both_sides: the mean of this loss and the one with the roles of query and key swapped, from one pass. negative_keys are
            negatives of queries only.
        ids: [N] integers; a key with the query's id that is not its own is neither positive nor negative (the same item twice).
        negative_ids: [M] or [N, M], the ids of negative_keys; without them, none of those is the query's item.
        key_bias: [N], added to every logit of that key; -log Q(key) corrects for sampling keys with probability Q. -inf: the
            key is nobody's negative (its own query's loss is then infinite, unless its weight is 0; as an anchor it has loss 0).
        negative_bias: [M] or [N, M], the same for negative_keys; -inf masks one (``FeatureQueue.bias``).
        metric: "cosine", or "dot" (rows as they come).
        weight: [N], weight of each pair.
        reduction: "mean" (sum of w l over sum of w), "sum", or "none" ([N], w_i l_i).
        backend: "cpu", "torch", "triton", "reference" (N x N), or None for the best that can run.

    Returns:
        0-dim tensor, or [N] with reduction="none"; float64 for float64 inputs, else float32. A query without negatives has loss 0.
        NaN or inf in query i or key i gives NaN in l_i; in a key, in all rows it is compared with.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, device or range. RuntimeError: a backend that can't run.

    Deterministic: the same input on the same engine gives the same bits. The choice of top_k and threshold is constant in the
    derivative.

    Source: van den Oord et al. 2018, equation 4; top_k: Wang and Liu 2021, section 3.3; key_bias: Yi et al. 2019, equation 4.

    Example:
        >>> import torch, pairloss
        >>> query, key = torch.eye(3), torch.tensor([[1.0, 0.2, 0.0], [0.0, 1.0, 0.2], [0.2, 0.0, 1.0]])
        >>> pairloss.contrastive(query, key, tau=0.5)
        tensor(0.2993)
    """
    checks.options(in_batch=in_batch, top_k=top_k, threshold=threshold, both_sides=both_sides, reduction=reduction, backend=backend)
    checks.similarity(metric)
    checks.paired("query", query, "key", key, ids, weight)
    checks.bias("key_bias", key_bias, query.shape[:1], query)
    _check_negatives(query, negative_keys, negative_ids, negative_bias, in_batch, both_sides, ids)
    dtype = loss_dtype(query)
    tau = checks.temperature("tau", tau, query, dtype)

    keys = key if negative_keys is None else torch.cat([key, negative_keys.flatten(0, -2)])
    rows = prepare(real_view(query), real_view(keys), of_temperature(tau), metric, None, None).widened()
    assert rows.y is not None
    own, others = rows.y[: query.shape[0]], rows.y[query.shape[0] :]
    key_bias, negative_bias = (None if bias is None else bias.to(dtype) for bias in (key_bias, negative_bias))
    cutoff = None if threshold is None else torch.as_tensor(threshold / tau, dtype=dtype, device=query.device).detach()

    if top_k is not None and top_k >= _most_negatives(query, negative_keys, in_batch):
        top_k = None
    batch = Candidates(rows.against(own, key_bias), ids, ids, 0, cutoff, backend)
    negatives: list[Tensor] = []  # of each source a log-sum [N, 1], or with top_k the logits of the greatest [N, K]
    neg_of_key = None
    if in_batch and top_k is None:
        pos, neg, neg_of_key = batch.log_sums(both_sides)
        negatives.append(neg[:, None])
    else:
        pos = batch.own_logits()
        if in_batch and top_k is not None:
            negatives.append(batch.hardest(top_k))
            neg_of_key = _log_sum(batch.swapped().hardest(top_k)) if both_sides else None
    if negative_keys is not None and negative_keys.ndim == 2:
        ids_x = None if negative_ids is None else ids
        shared = Candidates(rows.against(others, negative_bias), ids_x, negative_ids, None, cutoff, backend)
        negatives.append(shared.log_sums()[1][:, None] if top_k is None else shared.hardest(top_k))
    elif negative_keys is not None:
        each = others.view(*negative_keys.shape[:2], others.shape[1])
        negatives.append(_logits_of_each(rows, each, negative_bias, ids, negative_ids, cutoff))
    z = torch.cat(negatives, 1)
    neg = _log_sum(z if top_k is None else z.topk(min(top_k, z.shape[1]), dim=1).values)

    losses = anchors.softplus(neg - pos)
    if both_sides:
        assert neg_of_key is not None
        margin = neg_of_key - pos if key_bias is None or top_k is None else neg_of_key + key_bias - pos
        if key_bias is not None:  # a masked key is no anchor
            margin = margin.masked_fill(key_bias == -torch.inf, -torch.inf)
        losses = (losses + anchors.softplus(margin)) / 2
    return anchors.reduce(losses, None, weight, reduction)


def simple_contrastive(
    query: Tensor,
    key: Tensor,
    lam: float,
    *,
    top_k: int | None = None,
    metric: str = "cosine",
    weight: Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    r"""Contrastive loss without a softmax: every negative repels alike, however similar it is.

    .. math::
        l_i = -s_{ii} + \lambda \sum_{k \in N(i)} s_{ik}

    Args:
        query, key: [N, D], key i is the positive of query i, the other keys are its negatives N(i). Normalised inside when
            metric is "cosine".
        lam: lambda >= 0, the weight of the negatives.
        top_k: only the K most similar negatives of each query count.
        metric, weight, reduction, backend: as in :func:`pairloss.contrastive`.

    Returns:
        0-dim tensor, or [N] with reduction="none"; float64 for float64 inputs, else float32. It may be negative. Costs O(N D)
        without top_k. NaN as in :func:`pairloss.contrastive`.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, device or range. RuntimeError: a backend that can't run.

    Deterministic: the same input on the same engine gives the same bits.

    Source: Wang and Liu 2021, equations 8 and 10.
    """
    checks.options(lam=lam, top_k=top_k, reduction=reduction, backend=backend)
    checks.similarity(metric)
    checks.paired("query", query, "key", key, None, weight)
    rows = prepare(real_view(query), real_view(key), 1.0, metric, None, None).normalised()
    assert rows.y is not None
    pos = rows.products(rows.y, backend)
    if top_k is None or top_k >= ranks.count(query.shape[0]) - 1:
        negatives = rows.products(ranks.total(rows.y.sum(0)).expand_as(rows.x), backend) - pos
    else:
        hardest = Candidates(rows, None, None, 0, None, backend).hardest(top_k)
        negatives = torch.where(hardest == -torch.inf, 0, hardest).sum(1)
    return anchors.reduce(lam * negatives - pos, None, weight, reduction)


def nt_xent(
    view_a: Tensor,
    view_b: Tensor,
    tau: float | Tensor,
    *,
    decoupled: bool = False,
    tau_plus: float = 0.0,
    beta: float = 0.0,
    ids: Tensor | None = None,
    metric: str = "cosine",
    weight: Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    r"""NT-Xent (SimCLR): both views of N items are anchors, each finds its partner among the other 2N - 1 rows.

    .. math::
        l_i = -\log \frac{e^{s_{i p(i)} / \tau}}{e^{s_{i p(i)} / \tau} + g_i}, \quad g_i = \sum_{k \in N(i)} e^{s_{ik} / \tau}

    with p(i) the other view of anchor i and N(i) the rows that are neither. Variants change the denominator:

    .. math::
        \text{decoupled: } g_i \text{ alone} \qquad
        \text{tau\_plus: } g_i = \max\Big(\frac{R_i - \tau^+ |N| e^{s_{i p(i)} / \tau}}{1 - \tau^+},\ |N| e^{-1 / \tau}\Big) \qquad
        \text{beta: } R_i = |N| \frac{\sum_k e^{(\beta + 1) s_{ik} / \tau}}{\sum_k e^{\beta s_{ik} / \tau}}

    where R is the plain sum for beta = 0, and the maximum is taken if tau_plus or beta is not 0.

    Args:
        view_a, view_b: [N, D], row i of each are views of the same item. Normalised inside when metric is "cosine".
        tau: temperature, a number > 0 or a 0-dim tensor, which may be learnable. It divides the similarity.
        decoupled: leave the positive out of the denominator (DCL); the loss may then be negative.
        tau_plus: 0 <= tau_plus < 1, the probability that a negative is a positive (debiased loss). Needs metric "cosine".
        beta: >= 0, concentration on hard negatives (HCL). Needs metric "cosine".
        ids: [N] integers; rows with the anchor's id that are not its partner are neither positive nor negative.
        weight: [N], weight of each item, for both of its anchors.
        metric, backend: as in :func:`pairloss.contrastive`.
        reduction: "mean" (over 2N anchors, as SimCLR's papers and lightly), "sum", or "none" ([2N]: view_a's, then view_b's).

    Returns:
        0-dim tensor, or [2N] with reduction="none"; float64 for float64 inputs, else float32. Without negatives (N = 1) the loss is
        0; a decoupled anchor without negatives doesn't count. NaN or inf in a row gives NaN in its anchors and in those it is
        compared with.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, device or range. RuntimeError: a backend that can't run.

    Deterministic: the same input on the same engine gives the same bits. Exact in log space at every temperature; where the
    maximum is active, the negatives get no gradient.

    Source: Chen et al. 2020, equation 1; decoupled: Yeh et al. 2022, equation 6; tau_plus: Chuang et al. 2020, equation 8;
    beta: Robinson et al. 2021, equation 4.

    Example:
        >>> import torch, pairloss
        >>> a, b = torch.eye(3), torch.tensor([[1.0, 0.2, 0.0], [0.0, 1.0, 0.2], [0.2, 0.0, 1.0]])
        >>> pairloss.nt_xent(a, b, tau=0.5)
        tensor(0.5277)
    """
    checks.options(decoupled=decoupled, tau_plus=tau_plus, beta=beta, reduction=reduction, backend=backend)
    checks.similarity(metric)
    checks.paired("view_a", view_a, "view_b", view_b, ids, weight)
    if (tau_plus or beta) and metric != "cosine":
        raise ValueError(f"metric: expected 'cosine' with tau_plus or beta, whose lower bound is of cosines, got {metric!r}")
    tau = checks.temperature("tau", tau, view_a, loss_dtype(view_a))

    item = ranks.numbers(view_a) if ids is None else ids.long()
    both = torch.cat([item, item])
    pairs = prepare(real_view(view_a), real_view(view_b), of_temperature(tau), metric, None, None)
    one_pass = ids is None and not beta  # the other view is the only one with the anchor's id
    pairs = pairs if one_pass else pairs.widened()
    assert pairs.y is not None
    rows = pairs.but(x=torch.cat([pairs.x, pairs.y]), y=None)
    if one_pass:
        (pos, neg), _ = rows.row_stats(both, None, 0, backend=backend)
    else:
        own = pairs.products(pairs.y, backend)
        pos = torch.cat([own, own])
        neg = _hard_log_sum(rows, both, beta, backend) if beta else rows.row_stats(both, None, 0, backend=backend)[0][1]
    none = neg == -torch.inf if decoupled else None
    if tau_plus or beta:
        neg = _debiased(neg, pos, (ranks.count(len(both)) - groups.count(both, both)).to(neg.dtype), tau_plus, tau)
    losses = anchors.softplus(neg - pos) if none is None else (neg - pos).masked_fill(none, 0)
    return anchors.reduce(losses, none, None if weight is None else torch.cat([weight, weight]), reduction)


def _hard_log_sum(rows: Rows, ids: Tensor, beta: float, backend: str | None) -> Tensor:
    """log of sum_k e^((beta + 1) z) over the mean of e^(beta z)."""
    neg = []
    for factor in (beta + 1, beta):
        assert rows.norm is not None
        scaled = rows.but(norm=rows.norm * math.sqrt(factor), logit_bound=rows.logit_bound * factor)
        neg.append(scaled.row_stats(ids, None, 0, backend=backend)[0][1])
    size = (ranks.count(len(ids)) - groups.count(ids, ids)).to(neg[0].dtype)
    empty, poison = size == 0, rows.normalised().poison()
    return torch.where(empty, -torch.inf, neg[0] - torch.where(empty, 0, neg[1]) + torch.where(empty, 1, size).log()) + poison


def _debiased(neg: Tensor, pos: Tensor, size: Tensor, tau_plus: float, tau: float | Tensor) -> Tensor:
    """log max((e^neg - tau_plus size e^pos) / (1 - tau_plus), size e^(-1 / tau))."""
    empty = size == 0
    log_size = torch.where(empty, 1, size).log()
    if tau_plus:
        share = pos + log_size - torch.where(empty, 0, neg) + math.log(tau_plus)  # log of what is taken from each e^neg
        left = torch.where(share < 0, torch.log(-torch.expm1(torch.where(share < 0, share, -1))), -torch.inf)
        neg = neg + left - math.log1p(-tau_plus)
    return torch.where(empty, -torch.inf, torch.maximum(neg, log_size - 1 / tau))


class Candidates(NamedTuple):
    """One source of negatives: rows.y, but for the anchor's own (self_offset) and those with its id."""

    rows: Rows
    ids_x: Tensor | None
    ids_y: Tensor | None
    self_offset: int | None
    cutoff: Tensor | None
    backend: str | None

    def own_logits(self) -> Tensor:
        """[N], of each anchor with the row of y beside it."""
        assert self.rows.y is not None
        z = self.rows.products(self.rows.y, self.backend)
        return z if self.rows.col_bias is None else z + self.rows.col_bias

    def log_sums(self, both_sides: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """The own logits [N] (of self_offset 0), and the log-sums over the negatives: of the anchors [N], and with both_sides of the
        candidates [M]."""
        how: dict[str, Any] = {"cutoff": self.cutoff, "both_sides": both_sides, "backend": self.backend}
        if self.self_offset == 0 and self.ids_x is None:  # the own candidate as the only one with the anchor's id: one pass for both
            number = ranks.numbers(self.rows.x)
            (pos, neg), cols = self.rows.row_stats(number, number, None, **how)
            return pos, neg, cols[1]
        rows, cols = self.rows.row_stats(self.ids_x, self.ids_y, self.self_offset, **how)
        return self.own_logits() if self.self_offset == 0 else rows[-1], rows[-1], cols[-1]

    def hardest(self, k: int) -> Tensor:
        """[N, K]: the K greatest logits; -inf where there are fewer."""
        rows = self.rows.normalised()
        x, y, bias = rows.x, rows.y, rows.col_bias
        assert y is not None
        dtype = rows.product_dtype
        pairs = (self.ids_x, self.ids_y, self.self_offset, bias, self.cutoff)
        index = ops.top_k(x, y, min(k, ranks.count(y.shape[0])), *pairs, product_dtype=dtype, backend=self.backend)
        z = ops.selected_products(x, y, index, product_dtype=dtype)
        return z if bias is None else z + ranks.gathered(bias)[index.clamp(min=0).long()]

    def swapped(self) -> "Candidates":
        """The candidates as anchors, without biases: for each of them, its own is a constant."""
        assert self.rows.y is not None
        rows = self.rows.but(x=self.rows.y, y=self.rows.x, col_bias=None)
        return Candidates(rows, self.ids_y, self.ids_x, self.self_offset, self.cutoff, self.backend)


def _most_negatives(query: Tensor, negative_keys: Tensor | None, in_batch: bool) -> int:
    """How many negatives a query may have."""
    others = ranks.count(query.shape[0]) - 1 if in_batch else 0
    if negative_keys is None:
        return others
    return others + (ranks.count(negative_keys.shape[0]) if negative_keys.ndim == 2 else negative_keys.shape[1])


def _logits_of_each(
    rows: Rows, keys: Tensor, bias: Tensor | None, ids: Tensor | None, key_ids: Tensor | None, cutoff: Tensor | None
) -> Tensor:
    """[N, M]: the logits of M keys of its own for each query; no larger than the keys themselves."""
    unit = rows.against(keys.flatten(0, 1), None).normalised()
    assert unit.y is not None
    x, y = rounded(unit.x, rows.product_dtype), rounded(unit.y, rows.product_dtype).view_as(keys)
    with without_autocast(x):
        z = torch.einsum("nd,nmd->nm", x, y)
    if cutoff is not None:
        z = z.masked_fill(z < cutoff, -torch.inf)
    if ids is not None and key_ids is not None:
        z = z.masked_fill(ids[:, None] == key_ids, -torch.inf)
    return z if bias is None else z + bias


def _log_sum(z: Tensor) -> Tensor:
    """log sum exp of each row; -inf, with gradient 0, where all of it is -inf."""
    return z[:, 0] if z.shape[1] == 1 else masked_logsumexp(z, z != -torch.inf, 1)


def _check_negatives(
    query: Tensor,
    negative_keys: Tensor | None,
    negative_ids: Tensor | None,
    negative_bias: Tensor | None,
    in_batch: bool,
    both_sides: bool,
    ids: Tensor | None,
) -> None:
    if negative_keys is None:
        for name, value in (("negative_ids", negative_ids), ("negative_bias", negative_bias)):
            if value is not None:
                raise ValueError(f"{name}: expected None without negative_keys, got shape {list(value.shape)}")
        if not in_batch:
            raise ValueError("in_batch: expected True without negative_keys, got False")
        return
    checks.tensor("negative_keys", negative_keys)
    n, d = query.shape
    if negative_keys.ndim not in (2, 3) or (negative_keys.ndim == 3 and negative_keys.shape[0] != n):
        raise ValueError(f"negative_keys: expected shape [M, {d}] or [{n}, M, {d}], got {list(negative_keys.shape)}")
    checks.features("negative_keys", negative_keys.flatten(0, -2), like=query)
    if both_sides and not in_batch:
        raise ValueError("both_sides: expected False with in_batch=False, where keys have no negatives, got True")
    if negative_ids is not None:
        checks.integers("negative_ids", negative_ids, negative_keys.shape[:-1], query)
        if ids is None:
            raise ValueError("ids: expected together with negative_ids, got None")
    checks.bias("negative_bias", negative_bias, negative_keys.shape[:-1], query)
