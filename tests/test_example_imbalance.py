"""The imbalance example: which rows stay, weights that change nothing, and at reduced length what cutting and weights do."""

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from examples import data, imbalance
from examples import imbalance_training as training
from examples.imbalance_training import BY_INVERSE, CEILING, PAIRWISE, SOFTMAX, Recipe, Settings

APP = typer.Typer()
APP.command()(imbalance.main)


@pytest.fixture(scope="module")
def digits() -> data.Images:
    return data.load("digits")


def test_every_class_is_cut_equally_often():
    groups = [training.minority(seed, 10, 3) for seed in range(10)]
    assert all(len(group.unique()) == 3 for group in groups)
    assert torch.cat(groups).bincount(minlength=10).tolist() == [3] * 10


def test_only_rows_of_the_cut_classes_leave(digits):
    small = training.minority(4, 10, 3)
    rows = training.kept_rows(digits.train_y, small, 0.05, seed=4)
    assert len(rows.unique()) == len(rows)
    before, after = digits.train_y.bincount(), digits.train_y[rows].bincount()
    for label in range(10):
        assert after[label] == (round(0.05 * before[label].item()) if label in small else before[label])
    assert not torch.equal(rows, training.kept_rows(digits.train_y, small, 0.05, seed=5))
    assert training.kept_rows(digits.train_y, small, 0.0, seed=4).numel() == before.sum() - before[small].sum() + 6  # two of each stay


def test_batches_have_every_row_once_before_any_comes_again():
    steps = list(training.batches(10, 4, 7, seed=0))
    assert [len(step) for step in steps] == [4, 4, 2, 4, 4, 2, 4]
    assert torch.cat(steps[:3]).sort().values.tolist() == torch.cat(steps[3:6]).sort().values.tolist() == list(range(10))


@pytest.mark.parametrize("loss", ["softmax", "snnl", "supcon"])
def test_beta_0_trains_the_same_network_as_no_weights(digits, loss):
    settings = Settings(steps=4)
    rows = training.kept_rows(digits.train_y, training.minority(0, 10, 3), 0.05, seed=0)
    networks = [
        training.train(Recipe(loss, weights), digits.train_x[rows], digits.train_y[rows], 10, settings, seed=0)
        for weights in (None, 0.0, 0.9)
    ]
    plain, zero, weighted = (torch.nn.utils.parameters_to_vector(network.parameters()) for network in networks)
    torch.testing.assert_close(zero, plain, rtol=0, atol=1e-7)
    assert (weighted - plain).abs().max() > 1e-4


def test_all_is_majority_and_minority_together(digits):
    recipe = Recipe("pixels")
    majority, minority, everything = training.evaluate(recipe, Settings(), digits, seed=1)
    share = torch.isin(digits.test_y, training.minority(1, 10, 3)).double().mean().item()
    assert everything == pytest.approx((1 - share) * majority + share * minority)
    uncut = training.evaluate(recipe, Settings(keep=1.0), digits, seed=1)
    assert uncut[0] == pytest.approx(majority, abs=1.0)  # 99.1 and 98.9: what is cut is no neighbour of the others
    assert uncut[1] > minority + 10


def test_effective_number_follows_its_recurrence():
    n = torch.arange(1, 101, dtype=torch.float64)
    for beta in imbalance.BETAS:
        numbers = imbalance.effective_number(n, beta)
        torch.testing.assert_close(numbers[1:], 1 + beta * numbers[:-1])
        assert imbalance.effective_number(torch.tensor([1e7], dtype=torch.float64), beta).item() == pytest.approx(1 / (1 - beta))


def test_cutting_hurts_the_minority_and_inverse_frequency_trades_majority_for_it(digits):
    results = training.run(Settings(seeds=3, steps=100), digits, (CEILING, SOFTMAX, BY_INVERSE))
    # Over five seeds: 90 to 93, 0 to 0.4, and 68 to 86.
    assert (results.of(CEILING, "minority") - results.of(SOFTMAX, "minority")).min() > 60
    assert (results.of(BY_INVERSE, "minority") - results.of(SOFTMAX, "minority")).min() > 40
    # Over five seeds the difference is between -1.1 and -5.0.
    assert (results.of(BY_INVERSE, "majority") - results.of(SOFTMAX, "majority")).mean() < -1
    assert results.of(BY_INVERSE, "all").mean() > results.of(SOFTMAX, "all").mean() + 10


def test_weights_lift_the_minority_of_snnl_early_in_the_training(digits):
    plain, weighted = PAIRWISE[:2]
    results = training.run(Settings(seeds=3, steps=40), digits, (plain, weighted))
    # Over five seeds the differences are 3.4 to 13.7.
    assert (results.of(weighted, "minority") - results.of(plain, "minority")).mean() > 2
    assert results.of(plain, "minority").min() > 40  # 58 to 69: neighbours find the classes that softmax gives up
    assert results.of(weighted, "majority").min() > 94


def test_supcon_keeps_the_minority_with_and_without_weights(digits):
    results = training.run(Settings(seeds=1, steps=40), digits, (PAIRWISE[3], PAIRWISE[4]))
    # Over five seeds 51 to 70 and 55 to 70; what weights change varies too much from seed to seed for a short test.
    assert all(results.of(recipe, "minority").min() > 40 for recipe in results.accuracy)
    assert all(results.of(recipe, "majority").min() > 94 for recipe in results.accuracy)


@pytest.mark.parametrize(
    ("difference", "verdict"), [([1.0, 1.2, 1.1], "holds"), ([-1.0, -1.2, -1.1], "the opposite"), ([1.0, -1.2, 0.5], "undecided")]
)
def test_verdict_is_by_two_standard_errors(difference, verdict):
    assert imbalance.Finding("", "", np.array(difference)).verdict == verdict


def test_command_writes_pictures_and_tables(tmp_path):
    result = CliRunner().invoke(APP, ["--out", str(tmp_path / "out"), "--seeds", "2", "--steps", "1"])
    assert result.exit_code == 0, result.output
    for picture in ("imbalance.png", "imbalance-effective.png"):
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "out/results/imbalance.md").read_text()
    assert all(f"| {recipe.name} |" in text for recipe in training.RECIPES)
    assert len({recipe.name for recipe in training.RECIPES}) == len(training.RECIPES)
    assert sum(text.count(f"| {verdict} |") for verdict in ("holds", "the opposite", "undecided")) == 13
    assert f"Seeds 0 to 1, 1 steps. torch {torch.__version__}" in text


@pytest.mark.parametrize(
    ("given", "message"), [(["--cut", "10"], "cut fewer"), (["--seeds", "1"], "--seeds"), (["--data", "none.npz"], "expected")]
)
def test_command_refuses(tmp_path, given, message):
    result = CliRunner().invoke(APP, ["--out", str(tmp_path), "--steps", "1", *given])
    assert result.exit_code == 2
    assert message in result.output
    assert not list(tmp_path.iterdir())
