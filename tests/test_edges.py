"""The smallest and emptiest arguments: what the docstrings say comes out, and never NaN, in the loss or in a gradient."""

import math

import pytest
import torch
from conftest import ON_CPU, tiles
from hypothesis import given, settings
from hypothesis import strategies as st

from pairloss import alignment, circle, clip, contrastive, nt_xent, siglip, simple_contrastive, snnl, supcon, tolerance, uniformity
from pairloss.testing import Sample

TAU, GAMMA, SCALE, BIAS, LAM = 0.5, 4.0, 3.0, -1.0, 0.25

on_both = pytest.mark.parametrize("backend", ["reference", "torch"])

LABELLED = {
    "snnl": lambda x, labels, **how: snnl(x, labels, TAU, **how),
    "snnl-sqeuclidean": lambda x, labels, **how: snnl(x, labels, TAU, metric="sqeuclidean", **how),
    "supcon-out": lambda x, labels, **how: supcon(x, labels, TAU, **how),
    "supcon-in": lambda x, labels, **how: supcon(x, labels, TAU, form="in", **how),
    "supcon-pairs": lambda x, labels, **how: supcon(x, labels, TAU, form="pairs", **how),
    "circle": lambda x, labels, **how: circle(x, labels, gamma=GAMMA, **how),
    "circle-batch": lambda x, labels, **how: circle(x, labels, gamma=GAMMA, pool="batch", **how),
}
PAIRED = {
    "contrastive": lambda x, y, **how: contrastive(x, y, TAU, **how),
    "contrastive-both_sides": lambda x, y, **how: contrastive(x, y, TAU, both_sides=True, **how),
    "contrastive-top_k": lambda x, y, **how: contrastive(x, y, TAU, top_k=2, **how),
    "contrastive-threshold": lambda x, y, **how: contrastive(x, y, TAU, threshold=-1.0, **how),
    "simple": lambda x, y, **how: simple_contrastive(x, y, LAM, **how),
    "simple-top_k": lambda x, y, **how: simple_contrastive(x, y, LAM, top_k=2, **how),
    "nt_xent": lambda x, y, **how: nt_xent(x, y, TAU, **how),
    "nt_xent-decoupled": lambda x, y, **how: nt_xent(x, y, TAU, decoupled=True, **how),
    "nt_xent-tau_plus": lambda x, y, **how: nt_xent(x, y, TAU, tau_plus=0.1, **how),
    "nt_xent-beta": lambda x, y, **how: nt_xent(x, y, TAU, beta=1.0, **how),
    "nt_xent-both": lambda x, y, **how: nt_xent(x, y, TAU, tau_plus=0.1, beta=1.0, **how),
    "clip": lambda x, y, **how: clip(x, y, SCALE, **how),
    "clip-smoothed": lambda x, y, **how: clip(x, y, SCALE, label_smoothing=0.1, **how),
    "siglip": lambda x, y, **how: siglip(x, y, SCALE, BIAS, **how),
    "alignment": lambda x, y, **how: alignment(x, y, **how),
}


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def softplus(z):
    return math.log1p(math.exp(z))


def cosine(x, y):
    return torch.cosine_similarity(x, y, dim=-1)


def value(function, *rows, **how):
    """The loss; with it, every gradient is finite."""
    leaves = [v.clone().requires_grad_() for v in rows]
    with tiles(4):
        loss = function(*leaves, **how)
    assert torch.isfinite(loss)
    for grad in torch.autograd.grad(loss, leaves):
        assert torch.isfinite(grad).all()
    return loss.item()


def zero(function, *rows, **how):
    """Loss and gradients are 0, and connected to the graph."""
    leaves = [v.clone().requires_grad_() for v in rows]
    with tiles(4):
        loss = function(*leaves, **how)
    return loss.item() == 0 and all((grad == 0).all() for grad in torch.autograd.grad(loss, leaves))


@on_both
@pytest.mark.parametrize("loss", LABELLED.values(), ids=LABELLED)
def test_labelled_rows_of_which_none_counts(loss, backend):
    one = normal(1, 3)
    assert zero(loss, one, labels=torch.tensor([5]), backend=backend)
    x = normal(6, 3)
    for labels, options in (
        (torch.arange(6), {}),
        (torch.arange(6), {"no_positive": "zero"}),
        (torch.full((6,), 7), {"ignore_index": 7}),
        (torch.tensor([7, 7, 7, 7, 7, 1]), {"ignore_index": 7}),
        (torch.tensor([7, 7, 7, 7, 0, 1]), {"ignore_index": 7, "no_positive": "zero"}),
    ):
        assert zero(loss, x, labels=labels, backend=backend, **options)
    if loss is not LABELLED["circle-batch"]:
        assert zero(loss, x, labels=torch.arange(6) // 2, backend=backend, weight=torch.zeros(6))


@on_both
@pytest.mark.parametrize("loss", LABELLED.values(), ids=LABELLED)
def test_labelled_rows_against_a_memory(loss, backend):
    x, labels = normal(5, 3), torch.tensor([0, 0, 1, 1, 2])

    def against(rows, memory, **how):
        return loss(rows, labels, ref_features=memory, backend=backend, **how)

    assert zero(against, x, normal(1, 3), ref_labels=torch.tensor([9]))
    assert zero(against, x, normal(3, 3), ref_labels=torch.tensor([9, 9, 9]))
    assert value(against, x, normal(2, 3), ref_labels=torch.tensor([0, 1])) > 0
    assert value(against, x, normal(11, 3), ref_labels=torch.arange(11) % 3) > 0
    # A memory of the rows themselves: the pair with itself is not left out.
    assert value(against, x, x, ref_labels=labels) != value(loss, x, labels=labels, backend=backend)


@on_both
def test_one_class(backend):
    """Without negatives: 0 where the positives compete with negatives alone, else a distribution over the positives."""
    x, labels, n = normal(6, 3), torch.zeros(6, dtype=torch.long), 6
    for name in ("snnl", "snnl-sqeuclidean", "supcon-pairs", "circle", "circle-batch"):
        assert value(LABELLED[name], x, labels=labels, backend=backend) == 0, name
    z = (cosine(x[:, None], x[None]) / TAU).fill_diagonal_(-torch.inf)
    mean = z.masked_fill(z == -torch.inf, 0).sum(1) / (n - 1)
    out = value(LABELLED["supcon-out"], x, labels=labels, backend=backend)
    assert out == pytest.approx((z.logsumexp(1) - mean).mean().item(), rel=1e-12)
    assert value(LABELLED["supcon-in"], x, labels=labels, backend=backend) == pytest.approx(math.log(n - 1), rel=1e-12)
    of_all = (z * TAU).masked_fill(z == -torch.inf, 0).sum().item() / (n * (n - 1))
    assert tolerance(x, labels, backend=backend).item() == pytest.approx(of_all, rel=1e-12)


@on_both
def test_equal_rows(backend):
    """All 6 rows the same, 3 classes of 2: every softmax is uniform."""
    x, labels, n = normal(1, 3).expand(6, 3), torch.arange(6) // 2, 6
    everything = {
        "snnl": math.log(n - 1),
        "snnl-sqeuclidean": math.log(n - 1),
        "supcon-out": math.log(n - 1),
        "supcon-in": math.log(n - 1),
        "supcon-pairs": math.log(n - 1),
        # s = 1: the one positive weighs m = 0.25 and is 0.25 beyond its margin, the 4 negatives 1.25 and 0.75.
        "circle": softplus(math.log(4) + GAMMA * (1.25 * 0.75 - 0.25 * 0.25)),
        "circle-batch": softplus(math.log(12) + math.log(3) + GAMMA * (1.25 * 0.75 - 0.25 * 0.25)),
    }
    for name, expected in everything.items():
        assert value(LABELLED[name], x, labels=labels, backend=backend) == pytest.approx(expected, rel=1e-10), name
    debiased = (10 * math.exp(2) - 0.1 * 10 * math.exp(2)) / 0.9  # the same as without
    pairs = {
        **dict.fromkeys(("contrastive", "contrastive-both_sides", "contrastive-threshold", "clip", "clip-smoothed"), math.log(n)),
        "contrastive-top_k": math.log(3),
        "simple": -1 + LAM * (n - 1),
        "simple-top_k": -1 + LAM * 2,
        "nt_xent": math.log(2 * n - 1),
        "nt_xent-decoupled": math.log(2 * n - 2),
        "nt_xent-tau_plus": math.log1p(debiased / math.exp(2)),
        "nt_xent-beta": math.log(2 * n - 1),
        "nt_xent-both": math.log(2 * n - 1),
        "siglip": softplus(-SCALE - BIAS) + (n - 1) * softplus(SCALE + BIAS),
        "alignment": 0.0,
    }
    for name, expected in pairs.items():
        assert value(PAIRED[name], x, x, backend=backend) == pytest.approx(expected, rel=1e-10, abs=1e-30), name
    assert value(lambda rows: uniformity(rows, backend=backend), x) == pytest.approx(0, abs=1e-14)
    assert value(lambda rows: tolerance(rows, labels, backend=backend), x) == pytest.approx(1 / 5)


@on_both
def test_a_batch_of_one_pair(backend):
    x, y = normal(1, 3), normal(2, 3)[:1]
    s = cosine(x, y).item()
    others = {
        "simple": -s,
        "simple-top_k": -s,
        "siglip": softplus(-SCALE * s - BIAS),
        "alignment": 2 - 2 * s,
    }
    for name, loss in PAIRED.items():
        if name in others:
            assert value(loss, x, y, backend=backend) == pytest.approx(others[name], rel=1e-12), name
        else:
            assert zero(loss, x, y, backend=backend), name
    assert zero(lambda rows: uniformity(rows, backend=backend), x)
    assert zero(lambda rows: uniformity(rows, metric="sqeuclidean", backend=backend), x)
    assert zero(lambda rows: tolerance(rows, torch.tensor([3]), backend=backend), x)
    assert tolerance(x, torch.tensor([3]), include_self=True, backend=backend).item() == pytest.approx(1)


@on_both
def test_queries_without_negatives(backend):
    """By ids, a bias of -inf, or a threshold: the loss is 0, and a query with negatives keeps its own."""
    x, y, negatives = normal(4, 3), normal(5, 3)[:4], normal(6, 3)
    same = torch.zeros(4, dtype=torch.long)
    for name in ("contrastive", "contrastive-both_sides", "contrastive-top_k", "nt_xent", "nt_xent-decoupled", "nt_xent-both", "clip"):
        assert zero(PAIRED[name], x, y, ids=same, backend=backend), name
    masked = {"negative_keys": negatives, "negative_bias": torch.full((6,), -torch.inf), "in_batch": False, "backend": backend}
    for options in ({}, {"top_k": 2}, {"threshold": 0.0}):
        assert zero(lambda q, k, options=options: contrastive(q, k, TAU, **masked, **options), x, y)
        assert zero(lambda q, k, options=options: contrastive(q, k, TAU, **(masked | {"negative_bias": None, "threshold": 1.5})), x, y)
    assert zero(
        lambda q, k, n: contrastive(q, k, TAU, negative_keys=n, in_batch=False, threshold=1.5, backend=backend), x, y, normal(4, 2, 3)
    )
    some = torch.tensor([0, 0, 1, 2])
    losses = contrastive(x[:2], y[:2], TAU, ids=some[:2], reduction="none", backend=backend)
    assert losses.tolist() == [0, 0]
    assert contrastive(x, y, TAU, ids=some, reduction="none", backend=backend).min() > 0


@on_both
@pytest.mark.parametrize("options", [{}, {"beta": 1.0}, {"tau_plus": 0.1}, {"beta": 1.0, "tau_plus": 0.1}], ids=str)
def test_a_nan_view_without_negatives_is_not_a_loss_of_0(backend, options):
    x, y = normal(1, 3), normal(1, 3)
    x[0, 1] = math.nan
    assert nt_xent(x, y, TAU, decoupled=True, backend=backend, **options).isnan()


@on_both
@pytest.mark.parametrize("m", [1, 2, 9])
def test_as_many_negatives_as_there_are(backend, m):
    """M != N, shared or each query's own, and fewer than top_k."""
    x, y, shared, each = normal(4, 3), normal(5, 3)[:4], normal(m, 3), normal(4, m, 3)
    pos = cosine(x, y) / TAU
    for negatives, s in ((shared, cosine(x[:, None], shared[None])), (each, cosine(x[:, None], each))):
        expected = torch.nn.functional.softplus((s / TAU).logsumexp(1) - pos).mean().item()
        for options in ({}, {"top_k": 100}, {"threshold": -1.0}):
            how = {"in_batch": False, "backend": backend, **options}
            ours = value(lambda q, k, n, how=how: contrastive(q, k, TAU, negative_keys=n, **how), x, y, negatives)
            assert ours == pytest.approx(expected, rel=1e-12)


@on_both
@pytest.mark.parametrize("name", [*LABELLED, *PAIRED, "uniformity", "tolerance"])
def test_zero_rows(backend, name):
    """Their cosine with everything is 0 and their gradient is 0, where a norm clamped at 1e-12 makes 1e11 of it."""
    x, y = normal(6, 3), normal(7, 3)[:6]
    x[2] = 0
    y[4] = 0
    labels = torch.arange(6) % 2
    leaves = [v.requires_grad_() for v in ((x, y) if name in PAIRED else (x,))]
    if name in PAIRED:
        loss = PAIRED[name](*leaves, backend=backend)
    elif name in LABELLED:
        loss = LABELLED[name](*leaves, labels, backend=backend)
    else:
        loss = uniformity(x, backend=backend) if name == "uniformity" else tolerance(x, labels, backend=backend)
    assert torch.isfinite(loss)
    for leaf, grad in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
        assert grad.abs().max() < 100
        if name != "snnl-sqeuclidean":
            assert (grad[(leaf == 0).all(1)] == 0).all()
    zeros = [torch.zeros_like(v) for v in leaves]
    table = PAIRED if name in PAIRED else LABELLED
    if name in table:
        assert math.isfinite(value(table[name], *zeros, **({} if name in PAIRED else {"labels": labels}), backend=backend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("form", ["out", "in", "pairs"])
def test_a_converged_loss_keeps_its_digits(form, dtype):
    """The negatives are e^-20 of the one positive: as a difference of logarithms, nothing would be left of it."""
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]], dtype=dtype, requires_grad=True)
    loss = supcon(x, torch.tensor([0, 0, 1, 1]), 0.1, form=form)
    assert loss.item() == pytest.approx(2 * math.exp(-20), rel=1e-5)


@settings(deadline=None, max_examples=150)
@given(
    name=st.sampled_from(sorted(LABELLED)),
    labels=st.lists(st.sampled_from([-3, 0, 1, 5]), min_size=1, max_size=20),
    ref_labels=st.one_of(st.none(), st.lists(st.sampled_from([-3, 0, 1, 5, 2**40]), min_size=1, max_size=20)),
    zeros=st.lists(st.integers(0, 19), max_size=3),
    duplicates=st.booleans(),
    d=st.integers(1, 5),
    ignore_index=st.sampled_from([None, 0, -3]),
    no_positive=st.sampled_from(["skip", "zero"]),
    tile=st.sampled_from([1, 4, None]),
)
def test_any_labelled_batch_is_finite_and_agrees_with_the_reference(
    name, labels, ref_labels, zeros, duplicates, d, ignore_index, no_positive, tile
):
    rows = {"x": normal(len(labels), d)}
    rows["x"][[i for i in zeros if i < len(labels)]] = 0
    if duplicates:
        rows["x"][1:3] = rows["x"][0]
    others = {"labels": torch.tensor(labels), "ignore_index": ignore_index, "no_positive": no_positive}
    if ref_labels is not None:
        rows["ref_features"] = normal(len(ref_labels), d)
        others["ref_labels"] = torch.tensor(ref_labels)
    agree(LABELLED[name], Sample(rows, others), tile)


@settings(deadline=None, max_examples=150)
@given(
    name=st.sampled_from(sorted(PAIRED)),
    ids=st.lists(st.integers(0, 3), min_size=1, max_size=20),
    with_ids=st.booleans(),
    zeros=st.lists(st.integers(0, 19), max_size=3),
    d=st.integers(1, 5),
    tile=st.sampled_from([1, 4, None]),
)
def test_any_paired_batch_is_finite_and_agrees_with_the_reference(name, ids, with_ids, zeros, d, tile):
    n = len(ids)
    rows = {"x": normal(n, d), "y": normal(n + 1, d)[:n]}
    rows["x"][[i for i in zeros if i < n]] = 0
    takes_ids = with_ids and name != "clip-smoothed" and name.split("-")[0] not in ("simple", "alignment")
    agree(PAIRED[name], Sample(rows, {"ids": torch.tensor(ids)} if takes_ids else {}), tile)


def agree(loss, sample, tile):
    truth = sample.run(loss, backend="reference")
    assert all(torch.isfinite(v).all() for v in (truth[0], *truth[1].values()))
    for backend in ON_CPU:
        with tiles(tile):
            ours = sample.run(loss, backend=backend)
        torch.testing.assert_close(ours[0], truth[0], rtol=1e-9, atol=1e-12)
        for name, grad in truth[1].items():
            torch.testing.assert_close(ours[1][name], grad, rtol=1e-7, atol=1e-10)


@settings(deadline=None, max_examples=150)
@given(
    labels=st.lists(st.sampled_from([-3, 0, 1, 5, 2**40]), min_size=1, max_size=40),
    d=st.integers(1, 9),
    tau=st.floats(0.01, 10.0),
    metric=st.sampled_from(["cosine", "dot", "sqeuclidean"]),
    ignore_index=st.sampled_from([None, 0, -3]),
    no_positive=st.sampled_from(["skip", "zero"]),
    eps=st.sampled_from([0.0, 1e-4]),
    tile=st.sampled_from([1, 4, 7, None]),
    seed=st.integers(0, 100),
)
def test_any_labels_and_shapes_agree_with_the_reference(labels, d, tau, metric, ignore_index, no_positive, eps, tile, seed):
    x = torch.randn(len(labels), d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    others = {
        "labels": torch.tensor(labels),
        "tau": tau,
        "metric": metric,
        "ignore_index": ignore_index,
        "no_positive": no_positive,
        "eps": eps,
    }
    sample = Sample({"features": x}, others)
    truth = sample.run(snnl, backend="reference")
    for backend in ON_CPU:
        with tiles(tile):
            ours = sample.run(snnl, backend=backend)
        torch.testing.assert_close(ours[0], truth[0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(ours[1]["features"], truth[1]["features"], rtol=1e-7, atol=1e-10)
