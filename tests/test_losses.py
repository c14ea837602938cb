"""What the contrastive family and circle loss promise beside their values: what counts, what is refused, modules, memory."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import ON_CPU

import pairloss
from pairloss import anchors, circle, clip, contrastive, entanglement, nt_xent, siglip, simple_contrastive, snnl, supcon, uniformity
from pairloss.testing import LOSSES

N, D = 12, 5
G = torch.Generator().manual_seed(0)
X, Y = torch.randn(N, D, generator=G), torch.randn(N, D, generator=G)
NEGATIVES = torch.randn(7, D, generator=G)
L = torch.arange(N) % 4
HOT = torch.nn.functional.one_hot(L)
EACH = torch.randn(N, 3, D, generator=G)

LABELLED = {
    "snnl": lambda x, labels=L, **options: snnl(x, labels, 0.3, **options),
    "supcon": lambda x, labels=L, **options: supcon(x, labels, 0.3, **options),
    "supcon-in": lambda x, labels=L, **options: supcon(x, labels, 0.3, form="in", **options),
    "supcon-pairs": lambda x, labels=L, **options: supcon(x, labels, 0.3, form="pairs", **options),
    "circle": lambda x, labels=L, **options: circle(x, labels, gamma=8, **options),
    "circle-batch": lambda x, labels=L, **options: circle(x, labels, gamma=8, pool="batch", **options),
}
PAIRED = {
    "contrastive": lambda x, y, **options: contrastive(x, y, 0.3, **options),
    "contrastive-both_sides": lambda x, y, **options: contrastive(x, y, 0.3, both_sides=True, **options),
    "contrastive-top_k": lambda x, y, **options: contrastive(x, y, 0.3, top_k=2, **options),
    "contrastive-threshold": lambda x, y, **options: contrastive(x, y, 0.3, threshold=0.0, **options),
    "nt_xent": lambda x, y, **options: nt_xent(x, y, 0.3, **options),
    "nt_xent-decoupled": lambda x, y, **options: nt_xent(x, y, 0.3, decoupled=True, **options),
    "nt_xent-debiased": lambda x, y, **options: nt_xent(x, y, 0.3, tau_plus=0.1, beta=0.5, **options),
    "clip": lambda x, y, **options: clip(x, y, 4.0, **options),
    "siglip": lambda x, y, **options: siglip(x, y, 4.0, -1.0, **options),
    "simple_contrastive": lambda x, y, **options: simple_contrastive(x, y, 0.5, **options),
    "simple_contrastive-top_k": lambda x, y, **options: simple_contrastive(x, y, 0.5, top_k=2, **options),
}


def named(table):
    return pytest.mark.parametrize("loss", table.values(), ids=table)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@named(LABELLED)
def test_what_is_not_finite_gives_nan_in_loss_and_gradient_of_labelled_rows(loss, bad):
    x = X.clone()
    x[3, 1] = bad
    value = loss(x.requires_grad_())
    value.backward()
    assert value.isnan()
    assert x.grad[3].isnan().any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", [0, 1])
@named(PAIRED)
def test_what_is_not_finite_gives_nan_in_loss_and_gradient_of_paired_rows(loss, side, bad):
    rows = [X.clone(), Y.clone()]
    rows[side][3, 1] = bad
    value = loss(rows[0].requires_grad_(), rows[1].requires_grad_())
    value.backward()
    assert value.isnan()
    assert rows[side].grad[3].isnan().any()


@named(LABELLED)
def test_ignored_rows_might_as_well_not_be_there(loss):
    x = torch.cat([X, torch.full((2, D), torch.nan)]).requires_grad_()
    value = loss(x, torch.cat([L, torch.tensor([-1, -1])]), ignore_index=-1)
    torch.testing.assert_close(value, loss(X))
    value.backward()
    assert torch.isfinite(x.grad).all()
    assert not x.grad[N:].any()


@named(LABELLED)
def test_one_hot_labels_are_labels(loss):
    torch.testing.assert_close(loss(X, HOT), loss(X))


def test_rows_are_positives_of_several_classes():
    """Two classes each: with the first alone, fewer positives."""
    hot = HOT | HOT.roll(1, 1)
    same = ((hot[:, None] & hot[None]) != 0).any(2) & ~torch.eye(N, dtype=torch.bool)
    rows = torch.nn.functional.normalize(X)
    z = (rows @ rows.T / 0.3).masked_fill(torch.eye(N, dtype=torch.bool), -torch.inf)
    expected = z.logsumexp(1) - (torch.where(same, z, 0).sum(1) / same.sum(1))
    torch.testing.assert_close(supcon(X, hot, 0.3, reduction="none"), expected)


def test_ids_take_copies_out_of_both_sets():
    """The same item twice: as if each query had a batch without the other copy."""
    ids = torch.arange(N)
    ids[7] = ids[2]
    losses = contrastive(X, Y, 0.3, ids=ids, reduction="none")
    for i, copy in ((2, 7), (7, 2)):
        kept = torch.arange(N) != copy
        alone = contrastive(X[kept], Y[kept], 0.3, reduction="none")
        torch.testing.assert_close(losses[i], alone[i - (copy < i)])
    others = torch.ones(N, dtype=torch.bool).index_fill(0, torch.tensor([2, 7]), False)
    torch.testing.assert_close(losses[others], contrastive(X, Y, 0.3, reduction="none")[others])


def test_negative_ids_take_the_querys_own_item_out():
    ids = torch.arange(N)
    losses = contrastive(X, Y, 0.3, negative_keys=Y, negative_ids=ids, ids=ids, in_batch=False, reduction="none")
    torch.testing.assert_close(losses, contrastive(X, Y, 0.3, reduction="none"))
    each = contrastive(X, Y, 0.3, negative_keys=Y.expand(N, N, D), negative_ids=ids.expand(N, N), ids=ids, in_batch=False, reduction="none")
    torch.testing.assert_close(each, losses)


def test_a_bias_of_minus_infinity_masks_a_negative():
    bias = torch.tensor([0.0, -torch.inf, 0.0, 0.0, -torch.inf, 0.0, 0.0])
    kept = bias == 0
    for options in ({}, {"top_k": 3}, {"threshold": 0.1}):
        masked = contrastive(X, Y, 0.3, negative_keys=NEGATIVES, negative_bias=bias, **options)
        torch.testing.assert_close(masked, contrastive(X, Y, 0.3, negative_keys=NEGATIVES[kept], **options))


def test_log_q_correction_makes_sampled_keys_count_for_all():
    """Every key three times and -log 3 on each: as if once."""
    rows = {"negative_keys": Y.repeat(3, 1), "in_batch": False, "ids": torch.arange(N), "negative_ids": torch.arange(N).repeat(3)}
    losses = contrastive(X, Y, 0.3, negative_bias=torch.full((3 * N,), -math.log(3)), **rows)
    torch.testing.assert_close(losses, contrastive(X, Y, 0.3))
    q = torch.linspace(0.1, 1, N)
    rows = torch.nn.functional.normalize(X) @ torch.nn.functional.normalize(Y).T / 0.3 - q.log()
    torch.testing.assert_close(contrastive(X, Y, 0.3, key_bias=-q.log()), torch.nn.functional.cross_entropy(rows, torch.arange(N)))


def test_a_threshold_is_inclusive_and_before_tau():
    query, key = torch.eye(4), torch.eye(4) + 0.5 * torch.eye(4).roll(1, 0) + 0.25 * torch.eye(4).roll(2, 0)
    own = torch.logaddexp(torch.tensor(1 / 0.1), torch.tensor(0.5 / 0.1)) - 1 / 0.1
    for threshold in (0.5, 0.3):
        torch.testing.assert_close(contrastive(query, key.T, 0.1, threshold=threshold, metric="dot"), own)
    assert contrastive(query, key.T, 0.1, threshold=0.6, metric="dot") == 0
    assert contrastive(query, key.T, 0.1, threshold=0.25, metric="dot") > own


def test_top_k_of_all_negatives_is_the_loss_itself():
    for options in ({}, {"negative_keys": NEGATIVES}, {"negative_keys": EACH}, {"negative_keys": EACH, "in_batch": False}):
        torch.testing.assert_close(contrastive(X, Y, 0.3, top_k=1000, **options), contrastive(X, Y, 0.3, **options))
    bias = {"key_bias": torch.linspace(-1, 1, N), "both_sides": True}
    torch.testing.assert_close(contrastive(X, Y, 0.3, top_k=1000, **bias), contrastive(X, Y, 0.3, **bias))
    torch.testing.assert_close(simple_contrastive(X, Y, 0.3, top_k=1000), simple_contrastive(X, Y, 0.3))


@named(PAIRED)
def test_zero_weights_take_anchors_out(loss):
    weight = torch.ones(N)
    weight[4] = 0
    losses = loss(X, Y, reduction="none")
    kept = losses.unflatten(0, (-1, N))[:, weight != 0]
    torch.testing.assert_close(loss(X, Y, weight=weight), kept.mean())
    torch.testing.assert_close(loss(X, Y, weight=weight, reduction="sum"), kept.sum())


def test_clip_is_contrastive_on_both_sides_and_nt_xent_is_snnl_of_the_views():
    torch.testing.assert_close(clip(X, Y, 4.0), contrastive(X, Y, 0.25, both_sides=True))
    torch.testing.assert_close(nt_xent(X, Y, 0.3), snnl(torch.cat([X, Y]), torch.arange(N).repeat(2), 0.3))
    for form in ("out", "in", "pairs"):
        torch.testing.assert_close(supcon(torch.cat([X, Y]), torch.arange(N).repeat(2), 0.3, form=form), nt_xent(X, Y, 0.3))


def test_label_smoothing_is_that_of_cross_entropy():
    z = 4 * torch.nn.functional.normalize(X) @ torch.nn.functional.normalize(Y).T
    expected = sum(torch.nn.functional.cross_entropy(v, torch.arange(N), label_smoothing=0.2) for v in (z, z.T)) / 2
    torch.testing.assert_close(clip(X, Y, 4.0, label_smoothing=0.2), expected)


@pytest.mark.parametrize("pool", ["anchor", "batch"])
@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("backend", ON_CPU)
def test_circle_gradient_is_that_of_the_loss_with_frozen_factors(pool, metric, backend):
    """The factors held at x0, the loss is differentiable in the usual sense, and that is our gradient at x0."""
    x0 = X.double() / 3

    def frozen(x):
        def similarity(v):
            v = torch.nn.functional.normalize(v) if metric == "cosine" else v
            return v @ v.T

        s, s0 = similarity(x), similarity(x0)
        itself = torch.eye(N, dtype=torch.bool)
        same = (L[:, None] == L) & ~itself
        pos = (-8 * (1.25 - s0).clamp(min=0) * (s - 0.75)).masked_fill(~same, -torch.inf)
        neg = (8 * (s0 + 0.25).clamp(min=0) * (s - 0.25)).masked_fill(same | itself, -torch.inf)
        if pool == "batch":
            upper = ~torch.ones(N, N, dtype=torch.bool).triu(1)
            pos, neg = (v.masked_fill(upper, -torch.inf).flatten()[None] for v in (pos, neg))
        return torch.nn.functional.softplus(pos.logsumexp(1) + neg.logsumexp(1), threshold=1e9).mean()

    class AtX0(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return frozen(x)

        @staticmethod
        def backward(ctx, grad):
            with torch.enable_grad():
                x = x0.clone().requires_grad_()
                with pairloss.testing.tile_size(4):
                    loss = circle(x, L, gamma=8, pool=pool, metric=metric, backend=backend)
                torch.testing.assert_close(loss, frozen(x0))
                return grad * torch.autograd.grad(loss, x)[0]

    assert torch.autograd.gradcheck(AtX0.apply, x0.clone().requires_grad_())


def test_entanglement_is_the_least_loss():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, D, generator=generator)[L] + 0.7 * torch.randn(N, D, generator=generator)  # neither apart nor one cloud
    x = x.double().requires_grad_()
    for metric in ("cosine", "sqeuclidean"):
        found = entanglement(x, L, metric=metric)
        assert all(found.loss <= snnl(x, L, found.tau * factor, metric=metric) for factor in (0.9, 0.99, 1.01, 1.1))
        tau = found.tau.clone().requires_grad_()
        assert torch.autograd.grad(snnl(x, L, tau, metric=metric), tau)[0].abs() < 1e-3
        torch.testing.assert_close(torch.autograd.grad(found.loss, x), torch.autograd.grad(snnl(x, L, found.tau, metric=metric), x))
    scaled = entanglement(100 * x, L, metric="sqeuclidean")
    torch.testing.assert_close(scaled.loss, found.loss, rtol=1e-3, atol=0)
    nothing = entanglement(x, torch.arange(N))
    assert nothing.loss == 0
    assert entanglement(x, L, ignore_index=0).loss != entanglement(x, L).loss


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_autocast_rounds_rows_and_no_products(dtype):
    """One query, so that its own negatives are shared ones, and the 6 hardest of 7 are all but the one that is masked."""
    query, key, negatives = X[:1].to(dtype), Y[:1].to(dtype), (X[:1] + 0.3 * NEGATIVES).to(dtype)
    least = torch.nn.functional.cosine_similarity(query, negatives).argmin()
    bias = torch.zeros(7).index_fill(0, least, -torch.inf)
    with torch.autocast("cpu", torch.bfloat16):
        shared, own, masked, hardest = (
            contrastive(query, key, 0.01, negative_keys=v, in_batch=False, **options)
            for v, options in [(negatives, {}), (negatives[None], {}), (negatives, {"negative_bias": bias}), (negatives, {"top_k": 6})]
        )
    torch.testing.assert_close(own, shared)
    torch.testing.assert_close(hardest, masked)


@pytest.mark.parametrize("options", [{}, {"both_sides": True}, {"both_sides": True, "top_k": 2}, {"both_sides": True, "threshold": 0.1}])
def test_a_masked_key_is_infinite_for_its_query_alone(options):
    bias = torch.zeros(N).index_fill(0, torch.tensor([1]), -torch.inf).requires_grad_()
    x, y = X.clone().requires_grad_(), Y.clone().requires_grad_()
    losses = contrastive(x, y, 0.3, key_bias=bias, reduction="none", **options)
    assert losses[1] == torch.inf
    assert losses[torch.arange(N) != 1].isfinite().all()
    loss = contrastive(x, y, 0.3, key_bias=bias, weight=(torch.arange(N) != 1).float(), **options)
    torch.testing.assert_close(loss, losses[torch.arange(N) != 1].mean())
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, (x, y, bias)))


@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_top_k_is_among_those_above_the_threshold_wherever_they_come_from(threshold):
    query, keys = X[:3], NEGATIVES[:3]
    bias = torch.tensor([0.0, 0.0, 20.0])
    options = {"top_k": 1, "threshold": threshold, "in_batch": False, "reduction": "none"}
    shared = contrastive(query, Y[:3], 1.0, negative_keys=keys, negative_bias=bias, **options)
    own = contrastive(query, Y[:3], 1.0, negative_keys=keys.expand(3, 3, D), negative_bias=bias.expand(3, 3), **options)
    torch.testing.assert_close(shared, own)


def test_labels_of_few_bits_do_not_wrap():
    labels = torch.tensor([0, 255] * 6, dtype=torch.uint8)
    assert torch.equal(supcon(X, labels, 0.1, ignore_index=-1), supcon(X, labels.long(), 0.1, ignore_index=-1))
    weight = torch.rand(300, generator=torch.Generator().manual_seed(0))
    assert torch.equal(supcon(X, labels, 0.1, class_weight=weight), supcon(X, labels.long(), 0.1, class_weight=weight))


def test_entanglement_of_complex_rows_and_on_the_meta_device():
    z = torch.complex(X * 1e-3, Y * 100)
    found, real = (entanglement(v, L, metric="sqeuclidean") for v in (z, torch.cat([z.real, z.imag], 1)))
    torch.testing.assert_close(found.loss, real.loss)
    torch.testing.assert_close(found.tau, real.tau, rtol=1e-2, atol=0)
    for metric in ("cosine", "sqeuclidean"):
        assert entanglement(X.to("meta"), L.to("meta"), metric=metric).loss.device.type == "meta"
    with pytest.raises(TypeError, match=r"features: expected a torch.Tensor, got str"):
        entanglement("a", L)


def test_alignment_of_far_rows():
    x = torch.full((2, 2), 1e20)
    torch.testing.assert_close(pairloss.alignment(x, -x, 1.0, metric="sqeuclidean"), torch.tensor(8**0.5 * 1e20))
    x = torch.full((1, 2), 1e-24)
    torch.testing.assert_close(pairloss.alignment(x, 0 * x, 1.0, metric="sqeuclidean"), torch.tensor(2**0.5 * 1e-24), rtol=1e-5, atol=0)


BAD = [
    (ValueError, "logit_bias: expected a finite number, got nan", lambda: siglip(X, Y, 1.0, math.nan)),
    (ValueError, "label_smoothing: expected 0 with ids", lambda: clip(X, Y, 1.0, ids=L, label_smoothing=0.1)),
    (ValueError, "key: expected as many rows as query, 12, got 7", lambda: contrastive(X, NEGATIVES, 0.1)),
    (ValueError, r"key: expected torch.float32 of shape \[M, 5\].* got torch.float64", lambda: contrastive(X, Y.double(), 0.1)),
    (ValueError, r"view_b: expected torch.float32 of shape \[M, 5\]", lambda: nt_xent(X, Y[:, :2], 0.1)),
    (ValueError, "tau: expected a finite number > 0, got 0", lambda: contrastive(X, Y, 0)),
    (ValueError, "logit_scale: expected a finite number > 0, got -1", lambda: clip(X, Y, -1)),
    (TypeError, "logit_bias: expected a number, got str", lambda: siglip(X, Y, 1.0, "0")),
    (ValueError, "metric: expected one of 'cosine', 'dot', got 'sqeuclidean'", lambda: contrastive(X, Y, 0.1, metric="sqeuclidean")),
    (ValueError, "metric: expected one of 'cosine', 'sqeuclidean', got 'dot'", lambda: uniformity(X, metric="dot")),
    (ValueError, "metric: expected 'cosine' with tau_plus or beta", lambda: nt_xent(X, Y, 0.1, tau_plus=0.1, metric="dot")),
    (ValueError, "in_batch: expected True without negative_keys, got False", lambda: contrastive(X, Y, 0.1, in_batch=False)),
    (
        ValueError,
        "both_sides: expected False with in_batch=False",
        lambda: contrastive(X, Y, 0.1, in_batch=False, both_sides=True, negative_keys=NEGATIVES),
    ),
    (ValueError, r"negative_keys: expected shape \[M, 5\] or \[12, M, 5\]", lambda: contrastive(X, Y, 0.1, negative_keys=EACH[:2])),
    (ValueError, r"negative_keys: expected torch.float32 of shape", lambda: contrastive(X, Y, 0.1, negative_keys=NEGATIVES[:, :2])),
    (ValueError, "negative_bias: expected None without negative_keys", lambda: contrastive(X, Y, 0.1, negative_bias=torch.zeros(7))),
    (
        ValueError,
        r"negative_bias: expected shape \[7\], got \[6\]",
        lambda: contrastive(X, Y, 0.1, negative_keys=NEGATIVES, negative_bias=torch.zeros(6)),
    ),
    (
        ValueError,
        "ids: expected together with negative_ids, got None",
        lambda: contrastive(X, Y, 0.1, negative_keys=NEGATIVES, negative_ids=torch.arange(7)),
    ),
    (ValueError, r"ids: expected shape \[12\], got \[7\]", lambda: clip(X, Y, 1.0, ids=torch.arange(7))),
    (TypeError, "ids: expected an integer dtype, got torch.float32", lambda: siglip(X, Y, 1.0, 0.0, ids=torch.zeros(12))),
    (ValueError, "top_k: expected an integer >= 1, got 0", lambda: contrastive(X, Y, 0.1, top_k=0)),
    (TypeError, "top_k: expected an integer, got float", lambda: simple_contrastive(X, Y, 0.1, top_k=2.0)),
    (ValueError, "threshold: expected a finite number, got nan", lambda: contrastive(X, Y, 0.1, threshold=math.nan)),
    (TypeError, "both_sides: expected True or False, got 1", lambda: contrastive(X, Y, 0.1, both_sides=1)),
    (ValueError, "lam: expected a finite number >= 0, got -1", lambda: simple_contrastive(X, Y, -1)),
    (ValueError, "tau_plus: expected 0 <= tau_plus < 1, got 1", lambda: nt_xent(X, Y, 0.1, tau_plus=1)),
    (ValueError, "beta: expected a finite number >= 0, got -0.5", lambda: nt_xent(X, Y, 0.1, beta=-0.5)),
    (ValueError, "label_smoothing: expected 0 <= label_smoothing < 1, got 2", lambda: clip(X, Y, 1.0, label_smoothing=2)),
    (ValueError, "form: expected one of 'out', 'in', 'pairs', got 'both'", lambda: supcon(X, L, 0.1, form="both")),
    (ValueError, "base_tau: expected a finite number > 0, got 0", lambda: supcon(X, L, 0.1, base_tau=0)),
    (ValueError, "pool: expected one of 'anchor', 'batch', got 'all'", lambda: circle(X, L, pool="all")),
    (ValueError, "pool: expected 'anchor' with weight", lambda: circle(X, L, pool="batch", weight=torch.ones(N))),
    (ValueError, "pool: expected 'anchor' with .* reduction", lambda: circle(X, L, pool="batch", reduction="none")),
    (ValueError, "m: expected a finite number, got inf", lambda: circle(X, L, m=math.inf)),
    (ValueError, "gamma: expected a finite number >= 0, got -1", lambda: circle(X, L, gamma=-1)),
    (ValueError, "t: expected a finite number > 0, got 0", lambda: uniformity(X, 0)),
    (ValueError, "alpha: expected a finite number > 0, got 0", lambda: pairloss.alignment(X, Y, 0)),
    (ValueError, r"labels: expected shape \[12\]", lambda: pairloss.tolerance(X, HOT)),
    (ValueError, r"ref_labels: expected shape \[M, 4\]", lambda: supcon(X, HOT, 0.1, ref_features=Y, ref_labels=L)),
    (ValueError, r"features: expected shape \[B, V, D\], got \[12, 5\]", lambda: pairloss.flatten_views(X, L)),
    (ValueError, "labels: expected one entry per item, 12", lambda: pairloss.flatten_views(EACH, L[:3])),
    (ValueError, "metric: expected one of 'cosine', 'sqeuclidean', got 'dot'", lambda: entanglement(X, L, metric="dot")),
]


@pytest.mark.parametrize(("error", "message", "call"), BAD, ids=[message.split(":")[0] + str(i) for i, (_, message, _) in enumerate(BAD)])
def test_bad_input_is_refused_by_name(error, message, call):
    with pytest.raises(error, match=message):
        call()


MODULES = {
    "SNNL": lambda m: (m(0.3, focal=1.0)(X, L), snnl(X, L, 0.3, focal=1.0)),
    "SupCon": lambda m: (m(0.3, form="in")(X, L, ref_features=Y, ref_labels=L), supcon(X, L, 0.3, form="in", ref_features=Y, ref_labels=L)),
    "Circle": lambda m: (m(m=0.4, gamma=8, class_weight=torch.rand(4))(X, L).shape, torch.Size()),
    "Contrastive": lambda m: (m(0.3, top_k=2)(X, Y, negative_keys=NEGATIVES), contrastive(X, Y, 0.3, top_k=2, negative_keys=NEGATIVES)),
    "SimpleContrastive": lambda m: (m(0.3)(X, Y), simple_contrastive(X, Y, 0.3)),
    "NTXent": lambda m: (m(0.3, learnable=True, decoupled=True)(X, Y), nt_xent(X, Y, 0.3, decoupled=True)),
    "CLIP": lambda m: (m(label_smoothing=0.1)(X, Y, 4.0), clip(X, Y, 4.0, label_smoothing=0.1)),
    "SigLIP": lambda m: (m(reduction="sum")(X, Y, 4.0, -1.0), siglip(X, Y, 4.0, -1.0, reduction="sum")),
    "Uniformity": lambda m: (m(3)(X), uniformity(X, 3)),
    "Alignment": lambda m: (m(alpha=1)(X, Y), pairloss.alignment(X, Y, 1)),
    "FocalCrossEntropy": lambda m: (m(gamma=2, weight=torch.arange(5.0))(X, L), pairloss.focal_cross_entropy(X, L, 2, torch.arange(5.0))),
    "Tolerance": lambda m: (m(include_self=True)(X, L), pairloss.tolerance(X, L, include_self=True)),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_the_functions(name):
    ours, expected = MODULES[name](getattr(pairloss.nn, name))
    if isinstance(ours, torch.Tensor):
        torch.testing.assert_close(ours.detach(), expected)
    else:
        assert ours == expected


def test_every_loss_has_a_module():
    functions = {getattr(pairloss.nn, name).function for name in MODULES}
    assert functions >= {spec.function for spec in LOSSES.values()}


def test_modules_refuse_what_is_wrong_when_they_are_made():
    with pytest.raises(ValueError, match="form: expected one of 'out', 'in', 'pairs', got 'middle'"):
        pairloss.nn.SupCon(form="middle")
    with pytest.raises(TypeError, match="unexpected keyword argument 'temperature'"):
        pairloss.nn.NTXent(temperature=0.1)
    with pytest.raises(TypeError, match=r"missing a required.*'lam'"):
        pairloss.nn.SimpleContrastive()


def test_class_weights_move_and_checkpoint_with_the_module():
    module = pairloss.nn.Circle(class_weight=torch.rand(4))
    assert module.to("meta").class_weight.device.type == "meta"
    assert "class_weight" in module.state_dict()


LARGE = {
    "snnl": "pairloss.snnl(x, labels, 0.1)",
    "supcon": "pairloss.supcon(x, labels, 0.1)",
    "supcon-pairs": "pairloss.supcon(x, torch.arange(len(x)) // 4, 0.1, form='pairs')",
    "nt_xent": "pairloss.nt_xent(x, y, 0.1)",
    "clip": "pairloss.clip(x, y, 10.0)",
    "siglip": "pairloss.siglip(x, y, 10.0, -10.0)",
    "circle": "pairloss.circle(x, labels)",
    "hard": "pairloss.contrastive(x, y, 0.1, top_k=10)",
    "threshold": "pairloss.contrastive(x, y, 0.1, threshold=0.2)",
    "uniformity": "pairloss.uniformity(x)",
}


@pytest.mark.parametrize("loss", LARGE)
def test_memory_stays_linear(loss):
    """Forward and backward at N = 32,768, D = 64: below 150 MB above the inputs, where N x N would be 4.3 GB."""
    program = f"""
import json, re, torch, pairloss
def status(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
def step(n):
    x, y = torch.randn(n, 64, requires_grad=True), torch.randn(n, 64, requires_grad=True)
    labels = torch.randint(0, 10, (n,))
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    {LARGE[loss]}.backward()
    return status("VmHWM") - before
step(2048)
print(json.dumps(step({16384 if loss == "nt_xent" else 32768})))
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads Linux's /proc")
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # other tests run beside it
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=one_thread)
    used = json.loads(result.stdout) / 1e6
    assert used < 150, f"{used:.0f} MB"
    assert used > 32768 * 64 * 4 / 1e6  # the gradient alone: less would mean that the measurement failed


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize("backend", [*ON_CPU, "reference"])
def test_ids_of_any_integer_dtype(backend, dtype):
    ids = torch.arange(N) % 2
    for loss in (
        lambda ids: contrastive(X, Y, 0.2, ids=ids, backend=backend),
        lambda ids: contrastive(X, Y, 0.2, ids=ids, top_k=3, backend=backend),
        lambda ids: contrastive(X, Y, 0.2, ids=ids, negative_keys=Y, negative_ids=ids, backend=backend),
        lambda ids: nt_xent(X, Y, 0.2, ids=ids, backend=backend),
        lambda ids: clip(X, Y, 5.0, ids=ids, backend=backend),
        lambda ids: siglip(X, Y, 5.0, -2.0, ids=ids, backend=backend),
    ):
        assert torch.equal(loss(ids.to(dtype)), loss(ids))


def test_the_logarithm_of_1_plus_e_to_the_x_keeps_the_digits_of_float64():
    x = torch.tensor([-800.0, -40.0, 0.0, 19.0, 21.0, 36.0, 49.0, 51.0, 1e3, math.inf], dtype=torch.float64)
    expected = torch.logaddexp(x, torch.zeros_like(x))
    torch.testing.assert_close(anchors.softplus(x), expected, rtol=1e-15, atol=0)
