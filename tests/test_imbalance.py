"""Class weights and focal cross-entropy: golden data, the definition in loops, extremes, the ways in which others went wrong."""

import itertools
import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from test_golden import FOLDERS, load
from torch.nn.functional import cross_entropy

from pairloss import class_balanced_weights, focal_cross_entropy, inverse_frequency_weights

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
GAMMAS = (0.0, 0.5, 1.0, 2.0, 5.0)


def golden(*kinds: str) -> list[Path]:
    files = {path.stem: path for folder in FOLDERS for kind in kinds for path in folder.glob(f"{kind}__*.npz")}
    return sorted(files.values(), key=lambda path: path.stem)


LOSS_FILES = golden("focal_softmax", "cb_softmax_ce", "inverse_class_frequency_ce")
WEIGHT_FILES = golden("class_weights")


def test_golden_files_are_there():
    assert len(LOSS_FILES) >= 11
    assert len(WEIGHT_FILES) >= 5


@pytest.mark.parametrize("path", WEIGHT_FILES, ids=lambda path: path.stem)
def test_golden_weights(path):
    arrays = load(path)
    counts, beta = arrays["class_counts"].double(), arrays["param_beta"].item()
    # The recorded effective numbers are 1 - beta**n as it stands, which loses digits near beta = 1.
    rtol = max(1e-10, 1e-15 / (1 - beta))
    for name, ours in (
        ("weights_raw", class_balanced_weights(counts, beta, normalise=False)),
        ("weights_normalised", class_balanced_weights(counts, beta)),
        ("inverse_frequency_sumC", inverse_frequency_weights(counts)),
        ("inverse_frequency_balanced", inverse_frequency_weights(counts, normalise=False)),
    ):
        torch.testing.assert_close(ours, arrays[name], rtol=rtol if name.startswith("weights") else 1e-14, atol=0)


@pytest.mark.parametrize("path", LOSS_FILES, ids=lambda path: path.stem)
def test_golden_loss(path):
    arrays = load(path)
    labels = arrays["y_labels"]
    gamma = arrays["param_gamma"].item() if "param_gamma" in arrays else 0.0
    weight = arrays.get("weights")

    def value_and_gradient(mean):
        logits = arrays["logits"].clone().requires_grad_()
        loss = mean(logits)
        return loss.detach(), torch.autograd.grad(loss, logits)[0]

    def check(ours, loss, gradient):
        torch.testing.assert_close(ours[0], loss, rtol=1e-10, atol=0)
        assert (ours[1] - gradient).abs().max() <= 1e-10 * gradient.abs().max()

    per_row = value_and_gradient(lambda logits: focal_cross_entropy(logits, labels, gamma, weight, reduction="none").mean())
    check(per_row, arrays["loss"], arrays["grad_logits"])
    rows = focal_cross_entropy(arrays["logits"], labels, gamma, weight, reduction="none")
    recorded = arrays["per_row"]
    if "loss_weighted_mean" in arrays:
        weighted = value_and_gradient(lambda logits: focal_cross_entropy(logits, labels, gamma, weight))
        check(weighted, arrays["loss_weighted_mean"], arrays["grad_logits_weighted_mean"])
    torch.testing.assert_close(rows, recorded, rtol=1e-10, atol=0)


@pytest.mark.parametrize("path", golden("cb_softmax_ce", "inverse_class_frequency_ce"), ids=lambda path: path.stem)
def test_golden_weights_come_from_the_counts(path):
    arrays = load(path)
    counts, normalise = arrays["class_counts"].double(), bool(arrays["param_normalise_sum_to_C"])
    if "param_beta" in arrays:
        ours = class_balanced_weights(counts, arrays["param_beta"].item(), normalise=normalise)
    else:
        ours = inverse_frequency_weights(counts, normalise=normalise)
    torch.testing.assert_close(ours, arrays["weights"], rtol=1e-10, atol=0)


@pytest.mark.parametrize("beta", [0.0, 1e-300, 0.3, 0.9999, 1 - 2**-30, 1 - 2**-52, 1.0])
def test_effective_numbers_keep_their_digits(beta):
    """1 - beta**n in floating point has no digit left at beta = 1 - 2**-52."""
    counts = [1, 2, 7, 1000]
    exact = [(1 - Fraction(beta) ** n) / (1 - Fraction(beta)) if beta < 1 else n for n in counts]
    ours = class_balanced_weights(torch.tensor(counts, dtype=torch.float64), beta, normalise=False)
    torch.testing.assert_close(ours, torch.tensor([float(1 / v) for v in exact], dtype=torch.float64), rtol=1e-15, atol=0)
    single = class_balanced_weights(torch.tensor(counts), beta, normalise=False)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, ours.float(), rtol=3e-7, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_weights_are_normalised_over_the_classes_that_are_present(device):
    counts = torch.tensor([7, 0, 21, 2, 0], device=device)
    present = counts[counts > 0]
    for function in (
        lambda n: class_balanced_weights(n, 0.9),
        inverse_frequency_weights,
        lambda n: inverse_frequency_weights(n, normalise=False),
    ):
        weights = function(counts)
        assert weights.device == counts.device
        assert weights[counts == 0].tolist() == [0, 0]
        torch.testing.assert_close(weights[counts > 0], function(present))
    assert class_balanced_weights(counts, 0.9).sum().item() == pytest.approx(3)
    assert inverse_frequency_weights(counts).sum().item() == pytest.approx(3)
    assert (inverse_frequency_weights(counts, normalise=False) * counts).sum().item() == pytest.approx(30)
    assert class_balanced_weights(counts, 0.0).tolist() == [1, 0, 1, 1, 0]


@pytest.mark.parametrize("normalise", [True, False])
def test_counts_that_are_all_zero_or_not_a_number(normalise):
    nothing = torch.zeros(3, dtype=torch.long)
    for function in (
        lambda n: class_balanced_weights(n, 0.99, normalise=normalise),
        lambda n: inverse_frequency_weights(n, normalise=normalise),
    ):
        assert function(nothing).tolist() == [0, 0, 0]
        assert function(torch.tensor([3.0, math.nan])).isnan().any()
        assert function(nothing.to("meta")).device.type == "meta"


def by_hand(logits, labels, gamma, weight, ignore_index):
    """Per-row losses by Python loops over the definition; None where the row is ignored."""
    losses = []
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        if label == ignore_index:
            losses.append(None)
            continue
        p = math.exp(row[label]) / sum(map(math.exp, row))
        losses.append(-(1.0 if weight is None else weight[label].item()) * (1 - p) ** gamma * math.log(p))
    return losses


LOGITS = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
LABELS = torch.tensor([0, 1, 2, 3, 3, -100, 1, -100, 0])
WEIGHT = torch.tensor([0.5, 2.0, 0.0, 1.5], dtype=torch.float64)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["", "weight"])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_the_definition(gamma, weight, device):
    losses = by_hand(LOGITS, LABELS, gamma, weight, -100)
    total = sum(v for v in losses if v is not None)
    share = sum(1.0 if weight is None else weight[label].item() for label in LABELS.tolist() if label != -100)
    logits, labels = LOGITS.to(device), LABELS.to(device)
    weight = None if weight is None else weight.to(device)
    assert focal_cross_entropy(logits, labels, gamma, weight, reduction="none").tolist() == pytest.approx(
        [v or 0.0 for v in losses], rel=1e-12
    )
    assert focal_cross_entropy(logits, labels, gamma, weight, reduction="sum").item() == pytest.approx(total, rel=1e-12)
    assert focal_cross_entropy(logits, labels, gamma, weight).item() == pytest.approx(total / share, rel=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["", "weight"])
def test_gamma_0_is_cross_entropy(weight, reduction):
    for dtype in (torch.float64, torch.float32):
        logits = LOGITS.to(dtype, copy=True).requires_grad_()
        results = []
        for loss in (
            focal_cross_entropy(logits, LABELS, 0.0, weight, reduction=reduction),
            cross_entropy(logits, LABELS, None if weight is None else weight.to(dtype), reduction=reduction),
        ):
            results.append((loss, *torch.autograd.grad(loss.sum(), logits)))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("ignore_index", [1, None])
def test_ignore_index(ignore_index):
    labels = LABELS.clamp(min=0)
    ours = focal_cross_entropy(LOGITS, labels, 2.0, ignore_index=ignore_index, reduction="none")
    assert ours.tolist() == pytest.approx([v or 0.0 for v in by_hand(LOGITS, labels, 2.0, None, ignore_index)])
    assert (ours == 0).tolist() == [label == ignore_index for label in labels.tolist()]


@pytest.mark.parametrize("what", ["all ignored", "weights of 0", "no rows"])
def test_where_no_row_counts_loss_and_gradient_are_zero(what):
    logits = LOGITS.clone()[: 0 if what == "no rows" else 9]
    logits[:3] = math.nan if what == "all ignored" else 1.0  # what is ignored is not looked at
    logits.requires_grad_()
    labels = torch.full_like(LABELS, -100 if what == "all ignored" else 2)[: len(logits)]
    loss = focal_cross_entropy(logits, labels, 2.0, WEIGHT)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("gamma", GAMMAS)
def test_what_is_ignored_or_masked_leaves_no_trace(gamma):
    logits = LOGITS.clone()
    labels = LABELS.clone()
    logits[5, 1], logits[7] = math.nan, math.inf  # ignored rows
    labels[labels == 2] = 1
    logits[:5, 2] = -math.inf  # a masked class
    logits.requires_grad_()
    loss = focal_cross_entropy(logits, labels, gamma)
    loss.backward()
    masked = torch.cat([LOGITS[:5, [0, 1, 3]], LOGITS[[6, 8]][:, [0, 1, 3]]]).requires_grad_()
    counted = torch.cat([labels[:5], labels[[6, 8]]])
    expected = focal_cross_entropy(masked, counted - (counted == 3).long(), gamma, reduction="none")
    rows = focal_cross_entropy(logits, labels, gamma, reduction="none")
    torch.testing.assert_close(rows[:5], expected[:5])
    assert logits.grad.isfinite().all()
    assert logits.grad[[5, 7]].abs().sum() == 0
    assert logits.grad[:5, 2].abs().sum() == 0
    torch.testing.assert_close(logits.grad[:5, [0, 1, 3]], torch.autograd.grad(expected.sum() / 7, masked)[0][:5])


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("others", [[], [-math.inf, -math.inf]], ids=["C = 1", "the others masked"])
def test_one_class_alone_has_loss_and_gradient_zero(gamma, others):
    logits = torch.tensor([[3.0, *others], [-1e30, *others], [1e30, *others]], requires_grad=True)
    loss = focal_cross_entropy(logits, torch.zeros(3, dtype=torch.long), gamma)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("column", [0, 2], ids=["other class", "label"])
@pytest.mark.parametrize("num_classes", [3, 4])
def test_what_is_not_finite_gives_nan_in_loss_and_gradient(gamma, bad, column, num_classes):
    logits = torch.tensor([[0.5, 1.0, 2.0, 3.0][:num_classes], [1.0, 2.0, -1.0, 0.0][:num_classes]])
    logits[0, column] = bad
    logits.requires_grad_()
    loss = focal_cross_entropy(logits, torch.tensor([2, 1]), gamma)
    loss.backward()
    assert loss.isnan()
    assert logits.grad[0].isnan().any()
    assert logits.grad[1].isfinite().all()


@pytest.mark.parametrize("gamma", GAMMAS)
def test_a_masked_label_is_inf_with_a_finite_gradient(gamma):
    logits = torch.tensor([[-math.inf, 1.0, 1.0]], requires_grad=True)
    loss = focal_cross_entropy(logits, torch.tensor([0]), gamma)
    loss.backward()
    assert loss.item() == math.inf
    torch.testing.assert_close(logits.grad, torch.tensor([[-1.0, 0.5, 0.5]]))


def test_nan_in_a_class_that_is_alone_is_nan_too():
    logits = torch.tensor([[math.nan]], requires_grad=True)
    loss = focal_cross_entropy(logits, torch.tensor([0]), 2.0)
    loss.backward()
    assert loss.isnan()
    assert logits.grad.isnan().all()


# From what vanishes next to 1 to where a difference of two is still a float32.
SIZES = (0.0, 1e-8, 1.0, 17.0, 80.0, 100.0, 1e4, 1e38)


@pytest.mark.parametrize("gamma", [0.0, 1e-3, 0.5, 0.99, 1.0, 2.0, 5.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_finite_logits_give_finite_losses_and_gradients(gamma, dtype):
    sizes = [v for v in SIZES if v <= torch.finfo(dtype).max]
    values = sorted({sign * v for v in sizes for sign in (-1, 1)})
    logits = torch.tensor(list(itertools.product(values, repeat=3)), dtype=dtype, requires_grad=True)
    labels = torch.arange(len(logits)) % 3
    losses = focal_cross_entropy(logits, labels, gamma, torch.tensor([1.0, 0.5, 0.0]), reduction="none")
    losses.backward(torch.ones_like(losses))
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert losses.isfinite().all()
    assert (losses >= 0).all()
    assert logits.grad.dtype == dtype
    assert logits.grad.isfinite().all()
    if dtype == torch.float32:
        exact = logits.detach().double().requires_grad_()
        truth = focal_cross_entropy(exact, labels, gamma, torch.tensor([1.0, 0.5, 0.0]), reduction="none")
        truth.backward(torch.ones_like(truth))
        # exp() of a logarithm that is 100 large loses two digits.
        torch.testing.assert_close(losses.double(), truth, rtol=2e-5, atol=1e-36)
        torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=2e-5, atol=1e-36)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_a_loss_beyond_the_largest_number_is_inf_with_a_finite_gradient(gamma):
    logits = torch.tensor([[-3e38, 3e38], [3e38, -3e38], [0.0, 1.0]], requires_grad=True)
    losses = focal_cross_entropy(logits, torch.zeros(3, dtype=torch.long), gamma, reduction="none")
    losses.sum().backward()
    assert losses.tolist()[:2] == [math.inf, 0]
    torch.testing.assert_close(logits.grad[:2], torch.tensor([[-1.0, 1.0], [0.0, 0.0]]))
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("margin", [17.0, 30.0, 80.0])
def test_a_converged_loss_keeps_its_digits(gamma, margin):
    """-log p from p, or 1 - p, is 0 here in float32: the others are e^-17 of the label's class, and less."""
    logits = torch.tensor([[margin, 0.0, 0.0]], requires_grad=True)
    loss = focal_cross_entropy(logits, torch.tensor([0]), gamma)
    loss.backward()
    rest = 2 * math.exp(-margin)
    expected = rest ** (1 + gamma)
    if expected > 1e-36:
        assert loss.item() == pytest.approx(expected, rel=1e-4)
        assert logits.grad[0, 0].item() == pytest.approx(-(1 + gamma) * expected, rel=1e-4)


# How others went wrong (the numbers are of the survey's section 5).


@pytest.mark.parametrize("logit", [-80.0, -100.0, -1e4])
def test_33_focal_does_not_overflow_where_the_label_is_hopeless(logit):
    """The exp-space modulator of vandit15 and fcakyon: 65.86 at a logit of -80, 0.284 at -100, where the row should count most."""
    for gamma in GAMMAS:
        logits = torch.tensor([[logit, 0.0]], requires_grad=True)
        loss = focal_cross_entropy(logits, torch.tensor([0]), gamma)
        loss.backward()
        assert loss.item() == pytest.approx(-logit, rel=1e-6)
        torch.testing.assert_close(logits.grad, torch.tensor([[-1.0, 1.0]]))


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.9999, 1.0])
def test_33_an_absent_class_has_weight_0_and_the_others_keep_theirs(beta):
    """n = 0: 1 / 0, then inf / inf in every weight."""
    counts = torch.tensor([5, 0, 50])
    weights = class_balanced_weights(counts, beta)
    assert weights[1] == 0
    torch.testing.assert_close(weights[[0, 2]], class_balanced_weights(counts[[0, 2]], beta))
    loss = focal_cross_entropy(LOGITS[:, :3], torch.tensor([0, 2, 0, 2, 2, 0, 2, 2, 0]), 2.0, weights)
    assert loss.isfinite()


def test_33_beta_1_is_the_inverse_frequency():
    """(1 - beta) / (1 - beta^n): 0 / 0."""
    counts = torch.tensor([1, 10, 400])
    torch.testing.assert_close(class_balanced_weights(counts, 1.0, normalise=False), torch.tensor([1.0, 0.1, 0.0025]))
    torch.testing.assert_close(class_balanced_weights(counts, 1.0), inverse_frequency_weights(counts))
    near = class_balanced_weights(counts, 1 - 2**-52, normalise=False)
    torch.testing.assert_close(near, torch.tensor([1.0, 0.1, 0.0025]))


def test_33_an_unknown_reduction_is_not_silently_none():
    with pytest.raises(ValueError, match="reduction: expected one of 'mean', 'sum', 'none', got 'avg'"):
        focal_cross_entropy(LOGITS, LABELS, 2.0, reduction="avg")


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_gradcheck(gamma, reduction):
    logits, weight = LOGITS.clone().requires_grad_(), WEIGHT.clone().requires_grad_()

    def function(logits, weight):
        return focal_cross_entropy(logits, LABELS, gamma, weight, reduction=reduction)

    assert torch.autograd.gradcheck(function, (logits, weight))
    assert torch.autograd.gradgradcheck(function, (logits, weight))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_compiles_to_one_graph_with_the_same_result(gamma):
    counts = torch.tensor([3, 1, 0, 9])

    def step(logits, labels, counts):
        return focal_cross_entropy(logits, labels, gamma, class_balanced_weights(counts, 0.99)), inverse_frequency_weights(counts)

    torch.compiler.reset()
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        logits = LOGITS.float().requires_grad_()
        loss, weights = function(logits, LABELS, counts)
        results.append((loss.detach(), weights, *torch.autograd.grad(loss, logits)))
    torch.testing.assert_close(*results)


def test_what_cannot_be_looked_at_is_nan_under_compile():
    """On the CPU it raises; a device would have to be waited for."""
    torch.compiler.reset()
    compiled = torch.compile(focal_cross_entropy, fullgraph=True, backend="aot_eager")
    rows = compiled(LOGITS, LABELS.clamp(min=0) + 1, 2.0, reduction="none")
    assert rows.isnan().tolist() == (LABELS == 3).tolist()
    weights = torch.compile(class_balanced_weights, fullgraph=True, backend="aot_eager")(torch.tensor([3, -1]), 0.9, normalise=False)
    assert weights.isnan().tolist() == [False, True]


def test_everything_is_made_on_the_device_of_the_logits():
    logits = LOGITS.to("meta").requires_grad_()
    loss = focal_cross_entropy(logits, LABELS.to("meta"), 2.0, WEIGHT.to("meta"))
    loss.backward()
    assert {loss.device.type, logits.grad.device.type} == {"meta"}


def test_autocast_changes_nothing_for_float32_logits():
    with torch.autocast("cpu", torch.bfloat16):
        ours = focal_cross_entropy(LOGITS.float(), LABELS, 2.0)
    assert torch.equal(ours, focal_cross_entropy(LOGITS.float(), LABELS, 2.0))


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "logits: expected a torch.Tensor, got list", {"logits": [[1.0]]}),
        (ValueError, r"logits: expected shape \[N, C\] with C >= 1, got \[9\]", {"logits": LOGITS[:, 0]}),
        (ValueError, r"logits: expected shape \[N, C\] with C >= 1, got \[9, 0\]", {"logits": LOGITS[:, :0]}),
        (TypeError, "logits: expected a floating-point dtype, got torch.int64", {"logits": LOGITS.long()}),
        (TypeError, "logits: expected a floating-point dtype, got torch.complex64", {"logits": LOGITS.to(torch.complex64)}),
        (TypeError, "labels: expected a torch.Tensor, got list", {"labels": [0] * 9}),
        (TypeError, "labels: expected an integer dtype, got torch.float32", {"labels": LABELS.float()}),
        (ValueError, r"labels: expected shape \[9\].* got \[8\]", {"labels": LABELS[:8]}),
        (ValueError, "labels: expected the device of the features, cpu, got meta", {"labels": LABELS.to("meta")}),
        (ValueError, "labels: expected 0..3 because logits has 4 columns, got 4", {"labels": LABELS.clamp(min=0) + 1}),
        (ValueError, "labels: expected 0..3 because logits has 4 columns, got -100", {"ignore_index": None}),
        (ValueError, "gamma: expected a finite number >= 0, got -1", {"gamma": -1}),
        (ValueError, "gamma: expected a finite number >= 0, got nan", {"gamma": math.nan}),
        (TypeError, "gamma: expected a number, got str", {"gamma": "2"}),
        (TypeError, "weight: expected a torch.Tensor, got list", {"weight": [1.0] * 4}),
        (ValueError, r"weight: expected shape \[4\], one entry per column of logits, got \[9\]", {"weight": torch.ones(9)}),
        (TypeError, "weight: expected a real dtype, got torch.complex64", {"weight": torch.ones(4, dtype=torch.complex64)}),
        (ValueError, "weight: expected the device of the features, cpu, got meta", {"weight": WEIGHT.to("meta")}),
        (TypeError, "ignore_index: expected an integer, got float", {"ignore_index": 1.0}),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_input_of_the_loss_is_refused_by_name(error, message, arguments):
    with pytest.raises(error, match=message):
        focal_cross_entropy(**({"logits": LOGITS, "labels": LABELS, "gamma": 2.0} | arguments))


@pytest.mark.parametrize(
    ("error", "message", "counts"),
    [
        (TypeError, "counts: expected a torch.Tensor, got list", [1, 2]),
        (TypeError, "counts: expected an integer or floating-point dtype, got torch.bool", torch.tensor([True])),
        (TypeError, "counts: expected an integer or floating-point dtype, got torch.complex64", torch.ones(2, dtype=torch.complex64)),
        (ValueError, r"counts: expected shape \[C\], one entry per class, got \[2, 2\]", torch.ones(2, 2)),
        (ValueError, r"counts: expected shape \[C\], one entry per class, got \[0\]", torch.ones(0)),
        (ValueError, "counts: expected numbers >= 0, got -3", torch.tensor([1, -3])),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_counts_are_refused_by_name(error, message, counts):
    with pytest.raises(error, match=message):
        class_balanced_weights(counts, 0.9)
    with pytest.raises(error, match=message):
        inverse_frequency_weights(counts)


@pytest.mark.parametrize(
    ("error", "message", "beta"),
    [
        (ValueError, "beta: expected a number from 0 to 1, got 1.1", 1.1),
        (ValueError, "beta: expected a number from 0 to 1, got -0.1", -0.1),
        (ValueError, "beta: expected a number from 0 to 1, got nan", math.nan),
        (TypeError, "beta: expected a number, got Tensor", torch.tensor(0.9)),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_beta_is_refused_by_name(error, message, beta):
    with pytest.raises(error, match=message):
        class_balanced_weights(torch.tensor([1, 2]), beta)
