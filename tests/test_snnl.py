"""What snnl says about edge cases, options and bad input; the ways in which others went wrong."""

import math

import numpy as np
import pytest
import torch
from conftest import RUNNABLE, TILED, assert_rule, tiles

import pairloss
from pairloss import snnl
from pairloss.testing import Sample

FOUR = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [0.6, -0.8]], dtype=torch.float64)
LABELS = torch.tensor([0, 0, 1, 1])

on_every_engine = pytest.mark.parametrize("engine", RUNNABLE, ids=lambda engine: "-".join(engine))
on_tiled_engines = pytest.mark.parametrize("engine", TILED, ids=lambda engine: "-".join(engine))


def by_hand(features, labels, tau, metric="cosine", eps=0.0, ref=None, ref_labels=None, ignore_index=None):
    """Per-anchor losses by Python loops over the definition; None where the anchor has no positives (eps = 0) or is ignored."""
    candidates = list(zip((features if ref is None else ref).tolist(), (labels if ref is None else ref_labels).tolist(), strict=True))
    losses = []
    for i, (a, label) in enumerate(zip(features.tolist(), labels.tolist(), strict=True)):
        positive = everything = 0.0
        for j, (b, other) in enumerate(candidates):
            if (ref is None and i == j) or other == ignore_index:
                continue
            dot = math.sumprod(a, b) if hasattr(math, "sumprod") else sum(p * q for p, q in zip(a, b, strict=True))
            distance = {
                "cosine": 1 - dot / (math.hypot(*a) * math.hypot(*b)),
                "dot": -dot,
                "sqeuclidean": sum((p - q) ** 2 for p, q in zip(a, b, strict=True)),
            }[metric]
            everything += math.exp(-distance / tau)
            positive += math.exp(-distance / tau) if label == other else 0.0
        if label == ignore_index or (positive == 0 and eps == 0):
            losses.append(None)
        else:
            losses.append(-math.log(eps + positive / (everything + eps)))
    return losses


@pytest.mark.parametrize("eps", [0.0, 1e-3])
@pytest.mark.parametrize("metric", ["cosine", "dot", "sqeuclidean"])
@pytest.mark.parametrize("case", ["self", "ref", "ignore"])
def test_the_definition(metric, eps, case):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(9, 3, dtype=torch.float64, generator=generator)
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 7, 1, 2])
    options = {}
    if case == "ref":
        options = {
            "ref_features": torch.randn(6, 3, dtype=torch.float64, generator=generator),
            "ref_labels": torch.tensor([0, 1, 2, 0, 1, 5]),
        }
    if case == "ignore":
        options = {"ignore_index": 1}
    losses = by_hand(x, labels, 0.7, metric, eps, options.get("ref_features"), options.get("ref_labels"), options.get("ignore_index"))
    counted = [v for v in losses if v is not None]
    for backend in ("reference", "torch"):
        with tiles(4):
            per_anchor = snnl(x, labels, 0.7, metric=metric, eps=eps, reduction="none", backend=backend, **options)
            mean = snnl(x, labels, 0.7, metric=metric, eps=eps, backend=backend, **options)
        assert per_anchor.tolist() == pytest.approx([v or 0.0 for v in losses], rel=1e-12)
        assert mean.item() == pytest.approx(sum(counted) / len(counted), rel=1e-12)


def test_options_weigh_and_count_as_documented():
    x = torch.cat([FOUR, torch.tensor([[-1.0, 0.2]], dtype=torch.float64)])
    labels = torch.tensor([0, 0, 1, 1, 2])  # the last has no positive
    base = snnl(x, labels, 0.5, reduction="none")
    assert base[4] == 0
    each = base.tolist()
    assert snnl(x, labels, 0.5).item() == pytest.approx(sum(each) / 4)
    assert snnl(x, labels, 0.5, no_positive="zero").item() == pytest.approx(sum(each) / 5)
    assert snnl(x, labels, 0.5, reduction="sum").item() == pytest.approx(sum(each))
    weight = torch.tensor([1.0, 2.0, 0.0, 4.0, 100.0], dtype=torch.float64)
    weighted = each[0] + 2 * each[1] + 4 * each[3]
    assert snnl(x, labels, 0.5, weight=weight).item() == pytest.approx(weighted / 7)
    assert snnl(x, labels, 0.5, weight=weight, no_positive="zero").item() == pytest.approx(weighted / 107)
    assert snnl(x, labels, 0.5, weight=weight, reduction="none").tolist() == pytest.approx([each[0], 2 * each[1], 0, 4 * each[3], 0])
    class_weight = torch.tensor([3.0, 1.0, 50.0])
    assert snnl(x, labels, 0.5, class_weight=class_weight).item() == pytest.approx((3 * (each[0] + each[1]) + each[2] + each[3]) / 8)
    focal = [(1 - math.exp(-v)) ** 2 * v for v in each]
    assert snnl(x, labels, 0.5, focal=2.0).item() == pytest.approx(sum(focal) / 4)
    ignored = torch.where(labels == 1, -100, labels)
    without = snnl(x[[0, 1, 4]], labels[[0, 1, 4]], 0.5)
    assert snnl(x, ignored, 0.5, ignore_index=-100).item() == pytest.approx(without.item())
    assert snnl(x, ignored, 0.5, ignore_index=-100, class_weight=class_weight).item() == pytest.approx(without.item())


@pytest.mark.engines
@on_every_engine
@pytest.mark.parametrize(
    ("labels", "options"),
    [
        ([5], {}),
        ([0, 1, 2, 3], {}),
        ([0, 1, 2, 3], {"no_positive": "zero"}),
        ([0, 0, 0, 0], {"ignore_index": 0}),
        ([0, 0, 0, 0], {}),
        ([0, 0, 1, 1], {"weight": [0.0, 0.0, 0.0, 0.0]}),
    ],
    ids=["batch of one", "only singletons", "singletons that count", "all ignored", "one class", "weights of 0"],
)
def test_where_nothing_pulls_loss_and_gradient_are_zero(engine, labels, options):
    x = FOUR[: len(labels)].to(engine.device, torch.float32).requires_grad_()
    options = {k: torch.tensor(v, device=engine.device) if isinstance(v, list) else v for k, v in options.items()}
    loss = snnl(x, torch.tensor(labels, device=engine.device), 0.1, backend=engine.name, **options)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.engines
@on_every_engine
@pytest.mark.parametrize("metric", ["cosine", "dot", "sqeuclidean"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_what_is_not_finite_gives_nan_in_loss_and_gradient(engine, metric, bad, eps):
    """features.md 5.4: a library that filters NaN returns a finite loss with a NaN gradient, or the reverse."""
    for tau in (0.01, 1.0):
        x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0)).to(engine.device)
        x[7, 2] = bad
        x.requires_grad_()
        labels = (torch.arange(20) % 3).to(engine.device)
        with tiles(16):
            loss = snnl(x, labels, tau, metric=metric, eps=eps, backend=engine.name)
            loss.backward()
        assert loss.isnan()
        assert x.grad.isnan().any(1).all()
        with tiles(16):
            ignored = snnl(x, torch.where(torch.arange(20, device=engine.device) == 7, -1, labels), tau, metric=metric, ignore_index=-1)
        assert ignored.isfinite()


@pytest.mark.engines
@on_every_engine
@pytest.mark.parametrize(
    ("labels", "options"),
    [([0], {}), ([0, 1], {}), ([0, 1], {"no_positive": "zero"}), ([0, 1, 1], {}), ([0, 1], {"eps": 1e-5})],
    ids=["alone", "singletons", "singletons that count", "a singleton among others", "eps"],
)
def test_nan_in_an_anchor_without_positives_is_nan_too(engine, labels, options):
    x = FOUR[: len(labels)].float().to(engine.device)
    x[0, 1] = math.nan
    x.requires_grad_()
    loss = snnl(x, torch.tensor(labels, device=engine.device), 0.5, backend=engine.name, **options)
    loss.backward()
    assert loss.isnan()
    assert x.grad[0].isnan().all()
    assert snnl(x.detach().nan_to_num(), torch.tensor(labels, device=engine.device), torch.tensor(-1.0), backend=engine.name).isnan()


@pytest.mark.parametrize("metric", ["dot", "sqeuclidean"])
def test_rows_that_overflow_the_product_dtype_are_nan_and_do_not_vanish(metric):
    x = FOUR.float() * torch.tensor([[1.0], [1.0], [1.0], [1e5]])
    for tau in (0.01, 1.0):
        with torch.autocast("cpu", torch.float16):
            assert snnl(x, LABELS, tau, metric=metric).isnan()
    assert snnl(FOUR.float() * torch.tensor([[1.0], [1.0], [1.0], [1e25]]), LABELS, 1.0, metric="sqeuclidean").isnan()


def test_float64_features_stay_float64_with_a_float32_tau():
    tau = torch.tensor(0.1)
    torch.testing.assert_close(snnl(FOUR, LABELS, tau), snnl(FOUR, LABELS, tau.item()), rtol=1e-14, atol=0)


@pytest.mark.engines
@on_every_engine
def test_a_zero_row_has_gradient_zero_and_bounds_the_others(engine):
    """Others reach 1e12 there: the derivative of x / max(|x|, 1e-12)."""
    x = FOUR.to(engine.device, torch.float32).clone()
    x[1] = 0
    x.requires_grad_()
    loss = snnl(x, LABELS.to(engine.device), 0.1, backend=engine.name)
    loss.backward()
    assert loss.isfinite()
    assert torch.equal(x.grad[1], torch.zeros(2, device=engine.device))
    assert x.grad.abs().max() < 10


def test_a_row_too_long_for_float32_is_nan_and_not_zero():
    x = FOUR.float()
    x[2] *= 1e25
    assert snnl(x, LABELS, 0.1).isnan()


@pytest.mark.parametrize("tau", [0.0, -1.0, math.nan])
def test_a_tensor_tau_that_is_not_positive_gives_nan(tau):
    for metric in ("cosine", "dot", "sqeuclidean"):
        x = FOUR.clone().requires_grad_()
        temperature = torch.tensor(tau, dtype=torch.float64, requires_grad=True)
        loss = snnl(x, LABELS, temperature, metric=metric)
        loss.backward()
        assert loss.isnan()
        assert x.grad.isnan().all()
        assert temperature.grad.isnan()


# How others went wrong (the numbers are of the survey's section 5).


@on_tiled_engines
def test_5_no_anchor_has_a_positive_and_the_hardest_anchors_stay(engine):
    """PML's NCALoss: NaN for the first, and an anchor whose probability underflows is dropped from the mean."""
    far = torch.tensor([[0.0], [200.0], [1.0], [201.0]], requires_grad=True)
    loss = snnl(far, torch.tensor([0, 0, 1, 1]), 1.0, metric="sqeuclidean", backend=engine.name)
    assert loss.item() == pytest.approx(200**2 - 1, rel=1e-4)
    loss.backward()
    assert far.grad.abs().min() > 10


@on_tiled_engines
@pytest.mark.parametrize(
    ("metric", "tau", "scale", "offset"),
    [
        ("sqeuclidean", 1.0, 1, 0),
        ("sqeuclidean", 0.5, 1, 0),
        ("cosine", 0.01, 1, 0),
        ("cosine", 0.005, 1, 0),
        ("sqeuclidean", 0.1, 0.1, 17.7),
    ],
)
def test_25_no_exact_zero_is_needed_on_the_diagonal(engine, metric, tau, scale, offset):
    """exp(-d / T) - eye: a row sum turns negative by rounding, its logarithm NaN. Also with features far from the origin."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(64, 32, generator=generator, dtype=torch.float64) * scale + offset).float()
    sample = Sample({"features": x}, {"labels": torch.arange(64) % 4, "tau": tau, "metric": metric})
    truth = sample.to(torch.float64).run(snnl, backend="reference")
    ours = sample.run(snnl, backend=engine.name)
    assert torch.isfinite(ours[0])
    assert ours[0].item() == pytest.approx(truth[0].item(), rel=1e-4)
    assert_rule("gradient", ours[1]["features"], truth[1]["features"], sample.run(snnl, backend="reference")[1]["features"], torch.float32)


def test_26_without_eps_nothing_saturates_and_singletons_add_nothing():
    """eps caps the loss at -log(eps), kills far anchors' gradients, and singletons add a constant: here only when asked for."""
    x = torch.tensor([[0.0], [6.0], [1.0], [7.0], [50.0]], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 0, 1, 1, 2])
    capped = snnl(x, labels, 1.0, metric="sqeuclidean", eps=1e-5, reduction="none")
    assert capped.tolist() == pytest.approx([-math.log(1e-5)] * 5, rel=1e-6)
    exact = snnl(x, labels, 1.0, metric="sqeuclidean", reduction="none")
    assert exact[:4].min() > 20
    assert exact[4] == 0
    (grad,) = torch.autograd.grad(exact.sum(), x)
    assert grad[:4].abs().min() > 1


def test_27_a_learnable_temperature_goes_the_right_way():
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 4
    loss = pairloss.nn.SNNL(1.0, learnable=True)
    optimizer = torch.optim.SGD(loss.parameters(), lr=1.0)
    before = loss(x, labels)
    before.backward()
    optimizer.step()
    assert loss(x, labels) < before
    assert loss.tau > 0


def test_28_every_layer_of_a_sum_gets_a_gradient():
    layers = [torch.randn(12, d, requires_grad=True) for d in (3, 5, 7)]
    sum(snnl(layer, torch.arange(12) % 3, 0.5) for layer in layers).backward()
    assert all(layer.grad.abs().sum() > 0 for layer in layers)


def test_29_eps_is_not_lost_in_half_precision():
    """1e-9 is 0 in float16: its logarithm -inf, then 0 * NaN."""
    x = torch.tensor([[0.0], [40.0], [1.0], [39.0]], dtype=torch.float16, requires_grad=True)
    loss = snnl(x, torch.tensor([0, 0, 1, 1]), 1.0, metric="sqeuclidean", eps=1e-9)
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(1e-9), rel=1e-6)
    assert torch.isfinite(x.grad).all()


def test_a_converged_loss_keeps_its_digits():
    """all - pos gives 0 here: the negatives are e^-18 of the positives."""
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    loss = snnl(x, LABELS, 0.1)
    assert loss.item() == pytest.approx(2 * math.exp(-20), rel=1e-5)


X = torch.randn(4, 3)
L = torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "features: expected a torch.Tensor, got list", {"features": [[1.0]]}),
        (ValueError, r"features: expected shape \[N, D\], got \[4\]", {"features": torch.randn(4)}),
        (
            TypeError,
            "features: expected a floating-point or complex dtype, got torch.int64",
            {"features": torch.ones(4, 3, dtype=torch.long)},
        ),
        (ValueError, r"features: expected at least one row and one column, got \[0, 3\]", {"features": torch.randn(0, 3), "labels": L[:0]}),
        (ValueError, r"features: expected at least one row and one column, got \[4, 0\]", {"features": torch.randn(4, 0)}),
        (TypeError, "labels: expected a torch.Tensor, got list", {"labels": [0, 1, 0, 1]}),
        (TypeError, "labels: expected an integer dtype, got torch.float32", {"labels": L.float()}),
        (ValueError, r"labels: expected shape \[4\], one entry per row of the features, got \[3\]", {"labels": L[:3]}),
        (ValueError, r"labels: expected shape \[4\].* got \[4, 0\]", {"labels": L[:, None][:, :0]}),
        (ValueError, r"labels: expected shape \[4\].* got \[4, 1, 1\]", {"labels": L[:, None, None]}),
        (ValueError, "class_weight, ignore_index: expected None with multi-hot labels", {"labels": L[:, None], "ignore_index": 1}),
        (ValueError, "labels: expected the device of the features, cpu, got meta", {"labels": L.to("meta")}),
        (ValueError, "tau: expected a finite number > 0, got 0", {"tau": 0}),
        (ValueError, "tau: expected a finite number > 0, got -0.1", {"tau": -0.1}),
        (ValueError, "tau: expected a finite number > 0, got nan", {"tau": math.nan}),
        (ValueError, "tau: expected a finite number > 0, got inf", {"tau": math.inf}),
        (TypeError, "tau: expected a number, got str", {"tau": "0.1"}),
        (ValueError, r"tau: expected a number or a 0-dim floating-point tensor, got torch.float32 \[1\]", {"tau": torch.ones(1)}),
        (ValueError, "tau: expected a number or a 0-dim floating-point tensor, got torch.int64", {"tau": torch.tensor(1)}),
        (ValueError, "metric: expected one of 'cosine', 'dot', 'sqeuclidean', got 'l2'", {"metric": "l2"}),
        (ValueError, "eps: expected a finite number >= 0, got -1e-05", {"eps": -1e-5}),
        (ValueError, "focal: expected a finite number >= 0, got -2", {"focal": -2}),
        (ValueError, "no_positive: expected one of 'skip', 'zero', got 'error'", {"no_positive": "error"}),
        (ValueError, "reduction: expected one of 'mean', 'sum', 'none', got 'avg'", {"reduction": "avg"}),
        (ValueError, "backend: expected one of 'reference', 'triton', 'cuda', 'cpu', 'torch' or None, got 'jax'", {"backend": "jax"}),
        (TypeError, "ignore_index: expected an integer, got float", {"ignore_index": 1.0}),
        (ValueError, "ignore_index: expected a 64-bit integer", {"ignore_index": 2**70}),
        (TypeError, "features: expected a dense tensor, got layout torch.sparse_coo", {"features": X.to_sparse()}),
        (TypeError, "weight: expected a real dtype, got torch.complex64", {"weight": torch.ones(4, dtype=torch.complex64)}),
        (ValueError, r"weight: expected shape \[4\]", {"weight": torch.ones(3)}),
        (TypeError, "weight: expected a torch.Tensor, got float", {"weight": 1.0}),
        (ValueError, r"class_weight: expected shape \[C\], one entry per class, got \[2, 2\]", {"class_weight": torch.ones(2, 2)}),
        (
            ValueError,
            r"labels: expected 0..1 because class_weight has 2 entries, got 5",
            {"class_weight": torch.ones(2), "labels": L + 4 * L},
        ),
        (ValueError, "ref_labels: expected together with ref_features, got None", {"ref_features": X}),
        (ValueError, "ref_features: expected together with ref_labels, got None", {"ref_labels": L}),
        (ValueError, r"ref_features: expected torch.float32 of shape \[M, 3\]", {"ref_features": torch.randn(4, 2), "ref_labels": L}),
        (ValueError, r"ref_features: expected torch.float32 .* got torch.float64", {"ref_features": X.double(), "ref_labels": L}),
        (ValueError, r"ref_labels: expected shape \[4\]", {"ref_features": X, "ref_labels": L[:2]}),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_input_is_refused_by_name(monkeypatch, error, message, arguments):
    monkeypatch.setattr(pairloss.neighbour, "prepare", None)  # raised before any work
    with pytest.raises(error, match=message):
        snnl(**({"features": X, "labels": L, "tau": 0.1} | arguments))


def test_a_backend_that_cannot_run_here_is_refused_with_its_reason():
    if TILED[0].name == "triton":
        pytest.skip("the interpreter serves triton on the CPU")
    with pytest.raises(RuntimeError, match=r"backend='triton' can't run here: .*; the engines are"):
        snnl(X, L, 0.1, backend="triton")


def test_the_module_checks_its_options_and_sets_either_kind_of_tau():
    for options in ({"metric": "l2"}, {"eps": -1.0}, {"reduction": "avg"}, {"tau": 0.0}, {"backend": "jax"}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}: expected"):
            pairloss.nn.SNNL(**options)
    for learnable in (False, True):
        module = pairloss.nn.SNNL(0.3, learnable=learnable)
        module.tau = 0.7
        assert module.tau.item() == pytest.approx(0.7)
        assert repr(module.to("meta"))


def test_numpy_numbers_are_numbers():
    assert torch.equal(snnl(X, L, np.float64(0.3), ignore_index=np.int64(5)), snnl(X, L, 0.3, ignore_index=5))


def test_label_dtypes_and_the_module_give_the_same():
    expected = snnl(X, L, 0.3, metric="dot")
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.bool):
        assert torch.equal(snnl(X, L.to(dtype), 0.3, metric="dot"), expected)
    module = pairloss.nn.SNNL(0.3, metric="dot")
    torch.testing.assert_close(module(X, L), expected)
    module.tau = 1.0
    torch.testing.assert_close(module(X, L), snnl(X, L, 1.0, metric="dot"))
    assert "metric='dot'" in repr(module)
    restored = pairloss.nn.SNNL(5.0, metric="dot")
    restored.load_state_dict(module.state_dict())
    assert torch.equal(restored.tau, module.tau)


@pytest.mark.engines
@on_every_engine
def test_pairs_that_nobody_weighs_do_not_overflow(engine):
    """Two long rows without positives: their pair's exponential is 2^1300 of any other's, its weight 0."""
    x = torch.tensor([[30.0, 0.0], [30.0, 0.0], [0.0, 1.0], [0.0, 0.5], [0.0, -1.0], [0.0, 2.0]]).to(engine.device).requires_grad_()
    snnl(x, torch.tensor([7, 8, 0, 1, 0, 1], device=engine.device), 1.0, metric="dot", backend=engine.name).backward()
    assert torch.isfinite(x.grad).all()
    assert x.grad[2:].abs().sum() > 0


@pytest.mark.parametrize("metric", ["dot", "sqeuclidean"])
def test_an_infinite_row_does_not_hide_behind_a_logit_of_minus_infinity(metric):
    """In one column, -inf times what is positive is a logit of -inf: a candidate with weight 0."""
    x = torch.tensor([[-math.inf], [1.0], [2.0], [3.0]], requires_grad=True)
    losses = snnl(x, LABELS, 1.0, metric=metric, reduction="none")
    losses.sum().backward()
    assert losses.isnan().all()
    assert x.grad.isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounded_rows_have_no_distance_to_themselves(dtype):
    """With |x|^2 of the unrounded rows, a row's logit with itself comes out far from 0."""
    x = (torch.randn(20, 30, generator=torch.Generator().manual_seed(0)) + 3).requires_grad_()
    with torch.autocast("cpu", dtype):
        rows = pairloss.prepare.prepare(x, None, 0.05**-0.5, "sqeuclidean", None, None)
    rounded = rows.x.to(dtype).float()
    assert rows.product_dtype == dtype
    torch.testing.assert_close(rounded.square().sum(1) + 2 * rows.row_bias, torch.zeros(20), rtol=0, atol=1e-3)


def test_a_centre_that_overflows_makes_every_row_nan():
    x = torch.zeros(4, 3)
    x[:, 1] = 2e38
    losses = snnl(x, torch.arange(4), 1.0, metric="sqeuclidean", no_positive="zero", reduction="none")
    assert losses.isnan().all()
