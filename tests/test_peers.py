"""What other libraries get wrong, by the number of the survey that found it: none of it happens here.

What concerns the soft nearest neighbour loss stands in test_snnl.py.
"""

import functools
import math

import pytest
import torch
from conftest import TILED, assert_rule, tiles

import pairloss
from pairloss import flatten_views
from pairloss.testing import LOSSES

on_tiled_engines = pytest.mark.parametrize("engine", TILED, ids=lambda engine: "-".join(engine))

# Two pairs of opposite rows, each the other pair's neighbour: the hardest batch there is.
CROSSED = torch.tensor([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.1], [-1.0, -0.1]], dtype=torch.float64)
OPPOSITE = torch.tensor([0, 1, 0, 1])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_gradients(loss, *rows):
    leaves = [v.clone().requires_grad_() for v in rows]
    value = loss(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves)


def assert_near_float64(loss, *rows, backend=None):
    """Loss and gradients obey the error rule; loss(*rows, backend=...)."""
    ours = with_gradients(functools.partial(loss, backend=backend), *rows)
    eager = with_gradients(functools.partial(loss, backend="reference"), *rows)
    truth = with_gradients(functools.partial(loss, backend="reference"), *(v.double() for v in rows))
    for i, values in enumerate(zip(ours, truth, eager, strict=True)):
        assert torch.isfinite(values[0]).all()
        assert_rule(f"gradient {i}" if i else "loss", *values, rows[0].dtype)
    return truth


@pytest.mark.engines
@on_tiled_engines
@pytest.mark.parametrize("tau", [0.07, 0.02, 0.01])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_pml_1_ntxent_does_not_saturate_at_low_temperature(engine, tau, dtype):
    """log(p + tiny): no more than 87.3 in float32 and 9.7 in float16, with no gradient beyond."""
    x = CROSSED.to(engine.device, dtype)
    views = [v.contiguous() for v in (x[:2], x[2:])]
    loss, *grads = assert_near_float64(lambda a, b, **how: pairloss.nt_xent(a, b, tau, **how), *views, backend=engine.name)
    assert loss.item() == pytest.approx(2 * 0.99 / tau, rel=0.02)
    assert all(grad.abs().max() > 1 for grad in grads)


@pytest.mark.parametrize("tau", [0.07, 0.02, 0.01])
def test_pml_1_nor_with_labels(tau):
    loss, grad = assert_near_float64(lambda x, **how: pairloss.supcon(x, OPPOSITE, tau, form="pairs", **how), CROSSED.float())
    assert loss.item() == pytest.approx(2 * 0.99 / tau, rel=0.02)
    assert grad.abs().max() > 1


def saved_bytes(loss, *rows):
    """Of the tensors that are kept for the backward pass."""
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(*(v.clone().requires_grad_() for v in rows))
    return sum(saved.values())


LEAN = {
    "pml-2-ntxent-of-5-classes": lambda x, y: pairloss.supcon(x, torch.arange(len(x)) % 5, 0.1, form="pairs"),
    "pml-2-ntxent-of-pairs": lambda x, y: pairloss.nt_xent(x, y, 0.1),
    "openclip-16-siglip": lambda x, y: pairloss.siglip(x, y, 10.0, -10.0),
    "openclip-16-clip": lambda x, y: pairloss.clip(x, y, 10.0),
    "supcon": lambda x, y: pairloss.supcon(x, torch.arange(len(x)) % 5, 0.1),
    "circle": lambda x, y: pairloss.circle(x, torch.arange(len(x)) % 5),
}


@pytest.mark.parametrize("loss", LEAN.values(), ids=LEAN)
def test_pml_2_openclip_16_what_is_kept_for_the_backward_pass_is_linear(loss):
    """N^3 there for labelled NT-Xent, 1.2 to 3.2 N^2 for SigLIP, in chunks or not."""
    n, d = 1024, 16
    assert saved_bytes(loss, normal(n, d), normal(n, d, seed=1)) < n * n  # bytes: a quarter of one N x N matrix


ONE_OF_EACH = {
    "snnl": (lambda *a, **k: pairloss.snnl(*a, 0.5, **k), math.log1p(math.exp(-0.8 / 0.5))),
    "supcon": (lambda *a, **k: pairloss.supcon(*a, 0.5, **k), math.log1p(math.exp(-0.8 / 0.5))),
    "supcon-in": (lambda *a, **k: pairloss.supcon(*a, 0.5, form="in", **k), math.log1p(math.exp(-0.8 / 0.5))),
    "supcon-pairs": (lambda *a, **k: pairloss.supcon(*a, 0.5, form="pairs", **k), math.log1p(math.exp(-0.8 / 0.5))),
    "circle": (lambda *a, **k: pairloss.circle(*a, gamma=4, **k), math.log1p(math.exp(4 * (-0.0625 - 0.45 * 0.05)))),
}


@pytest.mark.parametrize(("loss", "expected"), ONE_OF_EACH.values(), ids=ONE_OF_EACH)
def test_pml_3_one_query_against_one_positive_and_one_negative_counts(loss, expected):
    query, memory = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.8, 0.6], [0.0, 1.0]])
    labels = {"ref_features": memory, "ref_labels": torch.tensor([0, 1])}
    assert loss(query, torch.tensor([0]), **labels).item() == pytest.approx(expected, rel=1e-6)


LABELLED = {
    "snnl": lambda x, labels, **how: pairloss.snnl(x, labels, 0.1, **how),
    "supcon": lambda x, labels, **how: pairloss.supcon(x, labels, 0.1, **how),
    "supcon-in": lambda x, labels, **how: pairloss.supcon(x, labels, 0.1, form="in", **how),
    "supcon-pairs": lambda x, labels, **how: pairloss.supcon(x, labels, 0.1, form="pairs", **how),
    "circle": lambda x, labels, **how: pairloss.circle(x, labels, **how),
}


@pytest.mark.parametrize("loss", LABELLED.values(), ids=LABELLED)
@pytest.mark.parametrize("labels", [[0, 0, 1, 1], [7, 0, 0, 1], [0, 1, 2, 3]], ids=["pairs", "a class of its own", "nobody has a positive"])
def test_pml_4_nan_is_not_filtered_out(loss, labels):
    """A mean over losses > 0 drops NaN: a finite loss whose gradient is NaN, or NaN with a gradient of 0."""
    x = CROSSED.float()
    x[0, 1] = torch.nan
    value, grad = with_gradients(lambda rows: loss(rows, torch.tensor(labels)), x)
    assert value.isnan()
    assert grad[0].isnan().all()


@pytest.mark.parametrize("loss", LABELLED.values(), ids=LABELLED)
def test_pml_5_without_positives_zero_and_the_hardest_anchors_stay(loss):
    """A mean of nothing is NaN there; and anchors whose probability underflows leave the mean."""
    value, grad = with_gradients(lambda rows: loss(rows, torch.arange(4)), CROSSED.float())
    assert value == 0
    assert not grad.any()
    hard = torch.cat([CROSSED, torch.tensor([[0.1, 1.0], [0.1, 1.1]])]).float()
    labels = torch.tensor([0, 1, 0, 1, 2, 2])
    losses = loss(hard, labels, reduction="none")
    assert losses[:4].min() > 15
    assert loss(hard, labels).item() == pytest.approx(losses.sum().item() / 6, rel=1e-6)


def test_pml_6_the_mean_is_over_the_same_anchors_however_good_they_get():
    """A mean over losses > 0 is 6 times this one: an anchor at rest, whose loss is 0 in float32, leaves it."""
    x = torch.tensor([[1.0, 0.0, 0.0]] * 5 + [[-1.0, 0.0, 0.0]] * 5 + [[0.0, 0.0, 1.0], [0.0, 0.6, -0.8]])
    labels = torch.tensor([0] * 5 + [1] * 5 + [2, 2])
    losses = pairloss.circle(x, labels, gamma=2048, reduction="none")
    assert (losses == 0).sum() == 10
    assert losses[-2:].min() > 1000
    assert pairloss.circle(x, labels, gamma=2048).item() == pytest.approx(losses.sum().item() / 12, rel=1e-6)


def test_pml_6_anchors_without_positives_leave_the_mean_or_count_as_you_say():
    """Which is the difference between two libraries: 5.19 of the one is 2.60 of the other."""
    x, labels = normal(8, 4), torch.tensor([0, 0, 1, 1, 2, 3, 4, 5])
    skip, zero = (pairloss.supcon(x, labels, 0.1, no_positive=policy) for policy in ("skip", "zero"))
    assert skip.item() == pytest.approx(2 * zero.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_pml_9_distances_in_half_precision(dtype):
    """torch.cdist and pdist refuse bfloat16, their substitutes hold N^2 D."""
    x, y, labels = normal(20, 6).to(dtype), normal(20, 6, seed=1).to(dtype), torch.arange(20) % 4
    for metric in ("cosine", "sqeuclidean"):
        assert_near_float64(functools.partial(pairloss.snnl, labels=labels, tau=2.0, metric=metric), x)
        assert_near_float64(functools.partial(pairloss.uniformity, t=0.5, metric=metric), x)
        assert_near_float64(functools.partial(pairloss.alignment, metric=metric), x, y)


def test_pml_9_distances_have_second_derivatives():
    x, labels = normal(6, 3).double().requires_grad_(), torch.arange(6) % 2
    for loss in (
        lambda a: pairloss.snnl(a, labels, 0.5, metric="sqeuclidean", backend="reference"),
        lambda a: pairloss.uniformity(a, metric="sqeuclidean", backend="reference"),
    ):
        assert torch.autograd.gradgradcheck(loss, x)


def test_pml_10_any_number_of_views():
    """By the formula: each of 3 views has the other 2 for positives."""
    views = torch.nn.functional.normalize(normal(5, 3, 4).double(), dim=2)
    z = (views.flatten(0, 1) @ views.flatten(0, 1).T / 0.2).fill_diagonal_(-torch.inf)
    item = torch.arange(15) // 3
    positive = (item[:, None] == item).fill_diagonal_(False)
    expected = (z.logsumexp(1) - z.masked_fill(~positive, 0).sum(1) / 2).mean()
    assert pairloss.supcon(*flatten_views(views, torch.arange(5)), 0.2).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("loss", LABELLED.values(), ids=LABELLED)
@pytest.mark.parametrize("m", [2, 50])
def test_pml_11_losses_of_each_anchor_whatever_the_memory(loss, m):
    """An IndexError where the memory is larger than the batch."""
    x, labels = normal(6, 3), torch.arange(6) % 2
    memory = {"ref_features": normal(m, 3, seed=1), "ref_labels": torch.arange(m) % 2}
    losses = loss(x, labels, reduction="none", **memory)
    assert losses.shape == (6,)
    for i in range(6):
        torch.testing.assert_close(losses[i], loss(x[i : i + 1], labels[i : i + 1], reduction="none", **memory)[0])


@pytest.mark.parametrize(("loss", "option"), [(loss, spec.options[0]) for loss, spec in LOSSES.items()])
def test_lightly_12_no_loss_is_cut_off_from_the_graph(loss, option):
    """torch.tensor(loss): a regulariser that trains nothing."""
    sample = LOSSES[loss].sample(12, 4, 0, option)
    _, grads = sample.run(LOSSES[loss].function)
    assert all(grad.abs().max() > 0 for grad in grads.values())


def test_lightly_14_decoupled_of_one_pair_is_zero():
    """-inf there."""
    loss, *grads = with_gradients(lambda a, b: pairloss.nt_xent(a, b, 0.1, decoupled=True), normal(1, 4), normal(1, 4, seed=1))
    assert loss == 0
    assert not any(grad.any() for grad in grads)


def test_supcontrast_20_the_temperature_does_not_scale_the_loss_unless_asked_to():
    """T / 0.07 there: at T = 0.5 loss and gradient, so the learning rate, are 7.1 times as large."""
    x, labels = normal(12, 4), torch.arange(12) % 3
    z = (torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(x).T / 0.5).fill_diagonal_(-torch.inf)
    positive = (labels[:, None] == labels).fill_diagonal_(False)
    plain = (z.logsumexp(1) - z.masked_fill(~positive, 0).sum(1) / 3).mean()
    loss, grad = with_gradients(lambda a: pairloss.supcon(a, labels, 0.5), x)
    torch.testing.assert_close(loss, plain)
    scaled, scaled_grad = with_gradients(lambda a: pairloss.supcon(a, labels, 0.5, base_tau=0.07), x)
    torch.testing.assert_close(scaled, plain * 0.5 / 0.07)
    torch.testing.assert_close(scaled_grad, grad * 0.5 / 0.07)


UNNORMALISED = {
    "supcon": lambda x, **how: pairloss.supcon(x, torch.arange(16, device=x.device) % 2, 0.07, metric="dot", **how),
    "supcon-in": lambda x, **how: pairloss.supcon(x, torch.arange(16, device=x.device) % 2, 0.07, form="in", metric="dot", **how),
    "nt_xent": lambda x, **how: pairloss.nt_xent(x[:8], x[8:], 0.07, metric="dot", **how),
    "contrastive": lambda x, **how: pairloss.contrastive(x[:8], x[8:], 0.07, metric="dot", **how),
    "clip": lambda x, **how: pairloss.clip(x[:8], x[8:], 100.0, metric="dot", **how),
}


@pytest.mark.engines
@on_tiled_engines
@pytest.mark.parametrize("loss", UNNORMALISED.values(), ids=UNNORMALISED)
def test_supcontrast_21_rows_that_are_not_normalised(engine, loss):
    """A maximum that includes the row itself, which is then masked: every other exponential underflows, and the loss is NaN."""
    x = 10 * normal(16, 16).to(engine.device)
    assert_near_float64(loss, x, backend=engine.name)


def circle_pair_weights(s_pos, s_neg, gamma=8.0):
    """dl/ds of one positive and one negative, by rows whose dot products they are."""
    memory = torch.tensor([[s_pos, 0.0], [s_neg, 0.0]], dtype=torch.float64, requires_grad=True)
    labels = {"ref_features": memory, "ref_labels": torch.tensor([0, 1]), "metric": "dot"}
    query = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    loss = pairloss.circle(query, torch.tensor([0]), m=0.25, gamma=gamma, **labels)
    (grad,) = torch.autograd.grad(loss, memory)
    return loss.item(), grad[0, 0].item(), grad[1, 0].item()


@pytest.mark.parametrize(("s_pos", "s_neg"), [(0.9, 0.1), (0.2, 0.6), (-0.5, -0.2), (1.0, -0.9), (0.7, 0.2)])
def test_quaterion_22_tf_similarity_23_circle_weighs_pairs_by_their_distance_from_the_optimum(s_pos, s_neg):
    """With m's sign turned, satisfied positives pull most and negatives below m not at all; with sums of two logarithms, or
    weights that have a derivative, it is another loss."""
    loss, of_positive, of_negative = circle_pair_weights(s_pos, s_neg)
    alpha_pos, alpha_neg = max(1.25 - s_pos, 0), max(s_neg + 0.25, 0)
    z = 8 * alpha_neg * (s_neg - 0.25) - 8 * alpha_pos * (s_pos - 0.75)
    assert loss == pytest.approx(math.log1p(math.exp(z)), rel=1e-12)
    sigmoid = 1 / (1 + math.exp(-z))
    assert of_positive == pytest.approx(-8 * alpha_pos * sigmoid, rel=1e-12)
    assert of_negative == pytest.approx(8 * alpha_neg * sigmoid, rel=1e-12)


SELF = {
    "supcon": lambda x, **how: pairloss.supcon(x, torch.arange(16, device=x.device) % 4, 0.005, **how),
    "supcon-in": lambda x, **how: pairloss.supcon(x, torch.arange(16, device=x.device) % 4, 0.005, form="in", **how),
    "nt_xent": lambda x, **how: pairloss.nt_xent(x[:8], x[8:], 0.005, **how),
    "dcl-30-decoupled": lambda x, **how: pairloss.nt_xent(x[:8], x[8:], 0.005, decoupled=True, **how),
    "uniformity": lambda x, **how: pairloss.uniformity(x, 100.0, **how),
    "uniformity-far-away": lambda x, **how: pairloss.uniformity(x + 20, 2.0, metric="sqeuclidean", **how),
}


@pytest.mark.engines
@on_tiled_engines
@pytest.mark.parametrize("loss", SELF.values(), ids=SELF)
def test_snnl_25_dcl_30_a_row_is_left_out_and_not_subtracted_or_dimmed(engine, loss):
    """exp(z_ii) - 1 leaves a rounding that a small temperature blows up; a logit lowered by 103 is still the largest at tau = 0.005."""
    x = normal(16, 8).to(engine.device)
    with tiles(16):
        assert_near_float64(loss, x, backend=engine.name)


@pytest.mark.parametrize("name", ["SNNL", "SupCon", "NTXent", "Contrastive"])
def test_snnl_27_every_learnable_temperature_goes_the_right_way(name):
    x, labels = normal(40, 8), torch.arange(40) % 4
    second = labels if name in ("SNNL", "SupCon") else x + normal(40, 8, seed=1)
    module = getattr(pairloss.nn, name)(0.5, learnable=True)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    before = module(x, second)
    before.backward()
    optimizer.step()
    assert module(x, second) < before
    assert module.tau > 0


@pytest.mark.engines
@on_tiled_engines
@pytest.mark.parametrize("options", [{"beta": 1.0}, {"beta": 1.0, "tau_plus": 0.1}, {"tau_plus": 0.1}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("tau", [0.07, 0.01])
def test_hcl_30_hard_negatives_do_not_overflow(engine, options, dtype, tau):
    """e^((beta + 1) s / tau) is inf in float16 below tau = 0.18 and in float32 below 0.0225."""
    views = [v.to(engine.device, dtype) for v in (normal(8, 6), normal(8, 6, seed=1))]

    assert_near_float64(functools.partial(pairloss.nt_xent, tau=tau, **options), *views, backend=engine.name)


@pytest.mark.engines
@on_tiled_engines
@pytest.mark.parametrize(("n", "d"), [(1, 1), (3, 257), (19, 300), (17, 33)])
def test_infclip_32_any_number_of_rows_and_columns(engine, n, d):
    """Multiples of a head's width there, one positive, and no weights."""
    image, text, weight = (v.to(engine.device) for v in (normal(n, d), normal(n, d, seed=1), torch.arange(1.0, n + 1)))
    ids = (torch.arange(n) // 2).to(engine.device)

    assert_near_float64(functools.partial(pairloss.clip, logit_scale=10.0, weight=weight, ids=ids), image, text, backend=engine.name)
