"""The well-known implementations' loss and gradient in float64: tests/golden, and more if PAIRLOSS_GOLDEN names a folder.

KINDS says by which options of ours each number comes out; docs/coming-from.md says it to users.
"""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import INTERPRETED, RUNNABLE, TILES, Engine, assert_rule, tiles, why_not

from pairloss import alignment, circle, clip, contrastive, engines, flatten_views, nt_xent, siglip, simple_contrastive, snnl, supcon
from pairloss import tolerance as tolerance_
from pairloss import uniformity as uniformity_
from pairloss.testing import Sample

pytestmark = pytest.mark.engines

FOLDERS = [Path(__file__).parent / "golden", *(Path(folder) for folder in [os.environ.get("PAIRLOSS_GOLDEN")] if folder)]


def snnl_cosine(g, **how):
    return snnl(g.x, g.labels, g.T, eps=g.eps, **how)


def snnl_sqeuclidean(g, **how):
    return snnl(g.x, g.labels, g.T, metric="sqeuclidean", eps=g.eps, **how)


def supcon_hobbitlong(g, **how):
    rows, labels = flatten_views(g.x, g.labels)
    metric = "cosine" if g.normalize else "dot"
    return supcon(rows, labels, g.temperature, base_tau=g.base_temperature, no_positive="zero", metric=metric, **how)


def simclr_hobbitlong(g, **how):
    return nt_xent(*g.x.unbind(1), g.temperature, **how)


def supcon_pml(g, **how):
    return supcon(g.x, g.labels, g.temperature, **how)


def ntxent_pml(g, **how):
    return supcon(g.x, g.labels, g.temperature, form="pairs", **how)


def circle_pml(g, reduction, **how):
    if g.reducer_mean_over_all:
        return circle(g.x, g.labels, m=g.m, gamma=g.gamma, no_positive="zero", reduction=reduction, **how)
    losses = circle(g.x, g.labels, m=g.m, gamma=g.gamma, reduction="none", **how)
    return losses if reduction == "none" else losses.sum() / (losses > 0).sum()  # an anchor's loss may underflow to 0


def circle_tinyzeamays(g, reduction, **how):
    return circle(g.x, g.labels, m=g.m, gamma=g.gamma, pool="batch", **how)


def infonce(g, **how):
    return contrastive(g.x, g.y, g.temperature, **how)


def infonce_with_negatives(g, **how):
    return contrastive(g.x, g.y, g.temperature, negative_keys=g.neg, in_batch=False, **how)


def mnrl(g, **how):
    return contrastive(g.x, g.y, 1 / g.scale, negative_keys=g.neg.flatten(0, 1) if g.n_neg else None, **how)


def mnrl_symmetric(g, **how):
    if g.n_neg:
        return contrastive(g.x, g.y, 1 / g.scale, negative_keys=g.neg.flatten(0, 1), both_sides=True, **how)
    return clip(g.x, g.y, g.scale, **how)


def ntxent(g, **how):
    return nt_xent(g.x, g.y, g.temperature, **how)


def dcl_lightly(g, **how):
    return nt_xent(g.x, g.y, g.temperature, decoupled=True, **how)


def dcl_raminnakhli(g, reduction, **how):
    losses = nt_xent(g.x, g.y, g.temperature, decoupled=True, reduction="none", **how)
    ways = losses.unflatten(0, (2, -1)).mean(1)
    return ways.sum() if g.symmetric_sum else ways[0]


def debiased(g, **how):
    return nt_xent(g.x, g.y, g.temperature, tau_plus=g.tau_plus if g.debiased else 0.0, **how)


def hcl(g, **how):
    hard = {"tau_plus": g.tau_plus, "beta": g.beta} if g.estimator_hard else {}
    return nt_xent(g.x, g.y, g.temperature, **hard, **how)


def clip_openclip(g, **how):
    return clip(g.x, g.y, g.logit_scale, **how)


def siglip_openclip(g, **how):
    return siglip(g.x, g.y, g.logit_scale, g.logit_bias, **how)


def hard_contrastive(g, **how):
    return contrastive(g.x, g.y, g.t, top_k=g.K, **how)


def simple(g, **how):
    return simple_contrastive(g.x, g.y, g.lam, **how)


def hard_simple(g, **how):
    return simple_contrastive(g.x, g.y, g.lam, top_k=g.K, **how)


def uniformity(g, reduction, **how):
    return uniformity_(g.x, g.t, metric="cosine" if g.normalize else "sqeuclidean", **how)


def alignment_(g, **how):
    return alignment(g.x, g.y, g.alpha, metric="cosine" if g.normalize else "sqeuclidean", **how)


def tolerance(g, reduction, **how):
    return tolerance_(g.x, g.labels, include_self=bool(g.include_diagonal), **how)


# How the names of a kind's files begin, and what of ours gives its number, with reduction="none" the losses of its rows.
KINDS = {
    "alignment_ssnl": alignment_,
    "circle_peranchor_pml": circle_pml,
    "circle_pooled_tinyzeamays": circle_tinyzeamays,
    "clip_openclip": clip_openclip,
    "dcl_lightly": dcl_lightly,
    "dcl_raminnakhli": dcl_raminnakhli,
    "debiased_chuang": debiased,
    "hard_contrastive_wangliu": hard_contrastive,
    "hard_simple_wangliu": hard_simple,
    "hcl_joshr17": hcl,
    "infonce_none_infoncepytorch": infonce,
    "infonce_paired_infoncepytorch": infonce_with_negatives,
    "infonce_unpaired_infoncepytorch": infonce_with_negatives,
    "mnrl_sentencetransformers": mnrl,
    "mnrl_variants_sentencetransformers__*_symmetric": mnrl_symmetric,
    "ntxent_lightly": ntxent,
    "ntxent_pml": ntxent_pml,
    "siglip_openclip": siglip_openclip,
    "simclr_hobbitlong": simclr_hobbitlong,
    "simple_wangliu": simple,
    "snnl_cosine_agarap": snnl_cosine,
    "snnl_cosine_cleverhans": snnl_cosine,
    "snnl_sqeuclid_cleverhans": snnl_sqeuclidean,
    "supcon_hobbitlong": supcon_hobbitlong,
    "supcon_pml": supcon_pml,
    "tolerance_nodiag": tolerance,
    "tolerance_withdiag": tolerance,
    "uniformity_ssnl": uniformity,
}

# Files whose number is not ours, and why; what holds of them is tested at the end.
OTHERWISE = {
    "infonce_none_infoncepytorch__n6_d4_T0.5_zerorow0": "the gradient of a zero row is 1e11 there and 0 here",
    "supcon_hobbitlong__n1_d8_v1_T0.07_bT0.07_all_one": "a batch of one is NaN there and 0 here",
    "supcon_pml__n33_d16_T0.1_one": "a batch without negatives is 0 there; here, as in the paper, the positives are told apart",
    "supcon_hobbitlong__n17_d8_v2_T0.1_bT0.1_all_maskasym": "an asymmetric mask is no label",
}


# Its softplus is torch.nn.Softplus, which is x above 20: off by e^-20 = 2e-9, and the gradient with it.
LINEAR_SOFTPLUS = "circle_peranchor_pml"

INPUTS = ("x", "y", "neg", "logit_scale", "logit_bias")


class File(NamedTuple):
    path: Path
    ours: Callable[..., torch.Tensor]


FILES = {path.stem: File(path, ours) for folder in FOLDERS for kind, ours in KINDS.items() for path in sorted(folder.glob(f"{kind}*.npz"))}


def interpretable(stem: str, tile: int | None) -> bool:
    """The interpreter takes milliseconds for each step of each tile: no more than about 20 of them."""
    rows = int(stem.split("__n")[1].split("_")[0]) if "__n" in stem else 4
    return rows <= (8 if tile == 4 else 33)


CASES = [
    (stem, tile, engine)
    for stem in sorted(FILES.keys() - OTHERWISE.keys())
    for tile in TILES
    for engine in RUNNABLE
    if (not INTERPRETED or interpretable(stem, tile)) and (engine.name != engines.REFERENCE or tile is None)
]


def load(path: Path) -> dict[str, torch.Tensor]:
    with np.load(path, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def expected(arrays: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The loss, the gradient of each input, and the losses of the rows where the file has them."""
    exact = "_diag0" if "loss_diag0" in arrays else ""  # else with the rounding of what should be 0, times 1e10
    result = {name: arrays[name + exact] for name in ("loss", "per_row") if name in arrays}
    if "pair_loss" in arrays:
        result["per_row"] = torch.zeros(len(arrays["x"]), dtype=torch.float64).index_add(0, arrays["pair_anchor"], arrays["pair_loss"])
    return result | {f"gradient of {name}": arrays[f"grad_{name}{exact}"] for name in INPUTS if name in arrays}


def run(file: File, arrays: dict[str, torch.Tensor], dtype: torch.dtype, engine: Engine, backend: str) -> dict[str, torch.Tensor]:
    """By ours, what the file has."""
    inputs = {name: arrays[name].to(engine.device, dtype).requires_grad_() for name in INPUTS if name in arrays}
    labels = {"labels": arrays["y_labels"].to(engine.device)} if "y_labels" in arrays else {}
    parameters = {name.removeprefix("param_").replace("lambda", "lam"): v.item() for name, v in arrays.items() if name.startswith("param_")}
    given = SimpleNamespace(**inputs, **labels, **parameters)
    loss = file.ours(given, reduction="mean", backend=backend)
    result = {"loss": loss.detach()}
    if "per_row" in arrays or "pair_loss" in arrays:
        result["per_row"] = file.ours(given, reduction="none", backend=backend).detach()
    grads = torch.autograd.grad(loss, list(inputs.values()))
    return result | {f"gradient of {name}": grad for name, grad in zip(inputs, grads, strict=True)}


def test_golden_files_are_there():
    local = [path.stem for path in FOLDERS[0].glob("*.npz")]
    for kind in KINDS:
        assert sum(stem.startswith(kind.split("*")[0]) for stem in local) >= (2 if "simclr" in kind else 3), kind
    assert FILES.keys() >= OTHERWISE.keys()


def case_id(value: str | int | Engine | None) -> str:
    return "-".join(value) if isinstance(value, Engine) else value if isinstance(value, str) else f"tile-{value or 'shipped'}"


@pytest.mark.parametrize(("stem", "tile", "engine"), CASES, ids=case_id)
def test_golden(stem, tile, engine):
    arrays = load(FILES[stem].path)
    truth = expected(arrays)
    if why_not(engine, torch.float64) is None:
        with tiles(tile):
            ours = run(FILES[stem], arrays, torch.float64, engine, engine.name)
        assert ours.keys() == truth.keys()
        for name, value in truth.items():
            error, scale = (ours[name].cpu() - value).abs(), value.abs()
            if name.startswith("gradient"):
                scale = scale.max()
            # Of what passes for zero: -log(1e-5) + log(1 + 1e-5) of one class at T = 100, gradients of an underflow.
            bound = ((1e-9 if stem.startswith(LINEAR_SOFTPLUS) else 1e-10) * scale).clamp(
                min=1e-16 if name.startswith("gradient") else 1e-14
            )
            assert (error <= bound).all(), f"{name}: {error.max():.3e}, largest value {value.abs().max():.3e}"
    else:
        with tiles(tile):
            ours = run(FILES[stem], arrays, torch.float32, engine, engine.name)
        eager = run(FILES[stem], arrays, torch.float32, engine, engines.REFERENCE)
        # As in the matrix: at a scale of 100 the gradient of the scale is a sum that cancels 70-fold and more.
        inputs = {name: arrays[name] for name in INPUTS if name in arrays and name != "logit_bias"}
        terms = Sample(inputs, {}).terms({name: truth[f"gradient of {name}"] for name in inputs})
        # At T = 100 with one class the gradient is the rounding of a float32 sum of ones.
        for name, value in truth.items():
            assert_rule(name, ours[name], value, eager[name], torch.float32, terms.get(name.removeprefix("gradient of "), 0.0))


def test_otherwise_a_zero_row_has_gradient_zero():
    file = FILES["infonce_none_infoncepytorch__n6_d4_T0.5_zerorow0"]
    arrays = load(file.path)
    ours, theirs = run(file, arrays, torch.float64, Engine("torch", "cpu"), "torch"), expected(arrays)
    zero = (arrays["x"] == 0).all(1)
    assert theirs["gradient of x"][zero].abs().min() > 1e9
    theirs["gradient of x"][zero] = 0
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-10, atol=1e-14)


def test_otherwise_a_batch_of_one_is_zero():
    file = FILES["supcon_hobbitlong__n1_d8_v1_T0.07_bT0.07_all_one"]
    arrays = load(file.path)
    assert expected(arrays)["loss"].isnan()
    ours = run(file, arrays, torch.float64, Engine("torch", "cpu"), "torch")
    assert ours["loss"] == 0
    assert (ours["gradient of x"] == 0).all()


def test_otherwise_without_negatives_supcon_still_tells_positives_apart():
    """By the formula, as SupContrast has it."""
    arrays = load(FILES["supcon_pml__n33_d16_T0.1_one"].path)
    assert arrays["loss"] == 0
    x = torch.nn.functional.normalize(arrays["x"])
    z = (x @ x.T / 0.1).fill_diagonal_(-torch.inf)
    literal = (z.logsumexp(1) - z.nan_to_num(neginf=0).sum(1) / 32).mean()
    assert supcon(arrays["x"], arrays["y_labels"], 0.1).item() == pytest.approx(literal.item(), rel=1e-12)


def test_otherwise_a_mask_that_is_not_symmetric_is_no_label():
    mask = load(FILES["supcon_hobbitlong__n17_d8_v2_T0.1_bT0.1_all_maskasym"].path)["mask"]
    assert not torch.equal(mask, mask.T)


def test_supcontrast_with_contrast_mode_one():
    """No file has it: anchors are the first views only, which is a weight of 0 for the others."""
    arrays = load(FILES["supcon_hobbitlong__n33_d16_v2_T0.07_bT0.07_all_unb"].path)
    x, labels = torch.nn.functional.normalize(arrays["x"], dim=2), arrays["y_labels"]
    candidates = torch.cat([x[:, 0], x[:, 1]])
    z = (x[:, 0] @ candidates.T / 0.07).fill_diagonal_(-torch.inf)
    positive = (labels[:, None] == labels.repeat(2)).fill_diagonal_(False)
    literal = -(z - z.logsumexp(1, keepdim=True)).masked_fill(~positive, 0).sum(1) / positive.sum(1)
    rows, of_rows = flatten_views(arrays["x"], labels)
    first = torch.tensor([1.0, 0.0], dtype=torch.float64).repeat(len(labels))
    assert supcon(rows, of_rows, 0.07, weight=first).item() == pytest.approx(literal.mean().item(), rel=1e-12)


def test_the_mean_over_losses_above_zero_is_the_default_where_none_underflows():
    stem = "circle_peranchor_pml__n33_d16_m0.4_g80_unb"
    arrays = load(FILES[stem].path)
    assert arrays["param_reducer_mean_over_all"] == 0
    loss = circle(arrays["x"], arrays["y_labels"], m=0.4, gamma=80)
    assert loss.item() == pytest.approx(arrays["loss"].item(), rel=1e-10)


def test_simclr_is_the_sum_of_its_two_directions():
    """No file has it: objective.py's arithmetic, with -1e9 on the diagonals."""
    arrays = load(FILES["ntxent_lightly__n48_d24_T1"].path)
    x, y = (torch.nn.functional.normalize(arrays[name]) for name in ("x", "y"))
    target, large = torch.arange(len(x)), 1e9 * torch.eye(len(x), dtype=torch.float64)
    a = torch.cat([x @ y.T, x @ x.T - large], 1)
    b = torch.cat([y @ x.T, y @ y.T - large], 1)
    literal = sum(torch.nn.functional.cross_entropy(z, target) for z in (a, b))
    assert 2 * nt_xent(arrays["x"], arrays["y"], 1.0).item() == pytest.approx(literal.item(), rel=1e-12)
    assert literal.item() == pytest.approx(2 * arrays["loss"].item(), rel=1e-10)
