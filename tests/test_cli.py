"""The command line as a user meets it: tables, files, and one line for whatever is wrong."""

import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from pairloss import cpu, engines, testing, tiled
from pairloss.cli import app
from pairloss.cli.measure import engine_name, small_call


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(engines, "DEFAULT_BACKEND", None)
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])


def data(rows=30, columns=6, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(rows) % classes
    return {"features": rng.normal(size=(rows, columns)) + 3 * labels[:, None], "labels": labels}


def test_info_lists_versions_devices_and_engines(run):
    result = run("info")
    assert result.exit_code == 0
    for word in ("pairloss", "torch", torch.__version__, "cpu: ", "threads", *engines.BACKENDS, "by name only"):
        assert word in result.output
    assert cpu.instruction_set() is None or f"engine cpu by {cpu.instruction_set()}" in result.output
    assert max(map(len, result.output.splitlines())) <= 100


def test_info_marks_the_engine_that_is_chosen(run, monkeypatch):
    monkeypatch.setattr(engines, "DEFAULT_BACKEND", "reference")
    row = next(line for line in run("info").output.splitlines() if "by name only" in line)
    assert "float32, bfloat16, float64" in row


@pytest.fixture
def few_cases(monkeypatch):
    monkeypatch.setattr(testing, "LOSSES", {"snnl": dataclasses.replace(testing.LOSSES["snnl"], options=("cosine", "number-tau"))})


def test_check_passes(run):
    result = run("check", "--device", "cpu", "--backend", "torch")
    assert result.exit_code == 0, result.output
    assert result.output.count(" ok ") == 4  # the worst of each dtype
    assert result.output.rstrip().endswith("all ok")


@pytest.mark.usefixtures("few_cases")
def test_check_verbose_shows_every_case(run):
    result = run("check", "--device", "cpu", "--backend", "torch", "--verbose")
    assert result.output.count(" ok ") == 4 * (3 + 2)  # dtypes; loss, features and, where it is a tensor, tau
    assert max(map(len, result.output.splitlines())) <= 100


@pytest.mark.usefixtures("few_cases")
@pytest.mark.parametrize("factor", [1.1, math.nan])
def test_check_fails_when_an_engine_is_wrong(run, monkeypatch, factor):
    right = tiled.row_stats_bwd
    monkeypatch.setattr(tiled, "row_stats_bwd", lambda *a: [None if g is None else g * factor for g in right(*a)])
    result = run("check", "--device", "cpu", "--backend", "torch")
    assert result.exit_code == 1
    assert result.output.count("FAILED") == 4 + 1


@pytest.mark.usefixtures("few_cases")
def test_check_lists_an_engine_that_cannot_run(run, monkeypatch):
    monkeypatch.setattr(tiled, "why_not", lambda call: "it rains")
    assert "torch on cpu: does not run here: it rains" in run("check", "--device", "cpu").output
    assert run("check", "--device", "cpu", "--backend", "torch").exit_code == 1


@pytest.mark.usefixtures("few_cases")
def test_check_names_a_dtype_that_an_engine_lacks(run, monkeypatch):
    monkeypatch.setattr(tiled, "why_not", lambda call: "too wide" if call.x.dtype == torch.float64 else None)
    result = run("check", "--device", "cpu", "--backend", "torch")
    assert result.exit_code == 0
    assert "torch on cpu: no float64: too wide" in result.output
    assert result.output.count(" ok ") == 3


def finite(value):
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, list):
        return all(map(finite, value))
    return not isinstance(value, float) or math.isfinite(value)


@pytest.mark.parametrize(
    ("options", "classes"),
    [
        ((), 3),
        (("--tau", "0.5", "--metric", "sqeuclidean", "--code-units", "1", "--backend", "reference"), 12),
    ],
)
def test_train_writes_numbers_and_picture(run, tmp_path, options, classes):
    np.savez("mine.npz", **data(classes=classes))
    result = run("train", "--data", "mine.npz", "--epochs", 2, "--device", "cpu", "--out", "deep/er", *options)
    assert result.exit_code == 0, result.output
    assert "5-NN" in result.output
    assert (tmp_path / "deep/er/pairloss.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "deep/er/results.json").read_text())
    assert finite(results)
    assert results["data"] == {"name": "mine.npz", "train_rows": 15, "test_rows": 15, "classes": [str(i) for i in range(classes)]}
    assert set(results["engines"].values()) == {
        "reference" if options else engine_name(small_call(torch.device("cpu"), torch.float32), None)
    }
    # Both start from the same weights.
    start, trained = ({k: v[0] for k, v in results[name]["entanglement"].items()} for name in ("plain", "snnl"))
    assert start == trained
    assert results["plain"]["entanglement"]["epochs"] == [0, 1, 2]


def test_training_is_deterministic(run, tmp_path):
    np.savez("mine.npz", **data())
    both = []
    for out in ("a", "b"):
        run("train", "--data", "mine.npz", "--epochs", 2, "--device", "cpu", "--out", out)
        results = json.loads((tmp_path / out / "results.json").read_text())
        both.append([results[name][key] for name in ("plain", "snnl") for key in ("loss", "entanglement")])
    assert both[0] == both[1]


def test_training_that_diverges_says_so(run):
    np.savez("mine.npz", **data())
    result = run("train", "--data", "mine.npz", "--epochs", 9, "--device", "cpu", "--lr", "1e30")
    assert result.exit_code == 1
    assert "training diverged" in result.stderr


def changed(**arrays):
    return {**data(), **arrays}


def with_entry(value):
    features = data()["features"]
    features[3, 2] = value
    return changed(features=features)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"features": data()["features"]}, "--data: mine.npz lacks labels, it has features"),
        ({"x": np.ones(3), "y": np.ones(3)}, "--data: mine.npz lacks features and labels, it has x, y"),
        (changed(labels=np.array([{}] * 30)), "labels: expected numbers, mine.npz has pickled Python objects, which are never loaded"),
        (changed(features=np.array([[None] * 6] * 30)), "features: expected numbers, mine.npz has pickled Python objects"),
        (with_entry(np.nan), "features: expected finite float32 numbers, got 1 that are NaN, infinite or too large"),
        (with_entry(-np.inf), "features: expected finite float32 numbers, got 1 that"),
        (with_entry(1e39), "features: expected finite float32 numbers, got 1 that"),
        (changed(features=np.array([["a"] * 6] * 30)), "features: expected real numbers, got dtype <U1"),
        (changed(features=np.ones((30, 6), complex)), "features: expected real numbers, got dtype complex128"),
        (changed(features=np.ones(30)), "features: expected shape [N, D], got [30]"),
        (changed(features=np.ones((30, 0))), "features: expected at least one row and one column, got shape [30, 0]"),
        (changed(labels=np.ones((30, 1), int)), "labels: expected shape [N], got [30, 1]"),
        (changed(labels=np.ones(29, int)), "labels: expected one per row of features, 30, got 29"),
        (changed(labels=np.arange(30) % 3 / 2), "labels: expected integers, got dtype float64"),
        (changed(labels=np.ones(30, int)), "labels: expected at least 2 classes, mine.npz has 1"),
        (changed(labels=np.minimum(np.arange(30), 1)), "labels: expected at least 2 rows of every class"),
        (data(rows=6), "--test-fraction: 0.5 of 6 rows leaves 3 for training and 3 for the test; expected"),
    ],
)
def test_bad_data_is_one_clear_line(run, arrays, message):
    np.savez("mine.npz", **arrays)
    assert_refused(run("train", "--data", "mine.npz", "--epochs", 1), message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--data", "none.npz"), "--data: expected digits or an .npz file, none.npz does not exist"),
        (("--data", "."), "--data: expected digits or an .npz file, . is a folder"),
        (("--data", "lone.npy"), "--data: lone.npy is not an .npz archive"),
        (("--data", "broken.npz"), "--data: broken.npz is not an .npz archive"),
        (("--tau", "0"), "--tau: expected a number > 0, got 0"),
        (("--tau", "nan"), "--tau: expected a number > 0, got nan"),
        (("--tau", "warm"), "--tau: expected a number > 0 or anneal, got 'warm'"),
        (("--factor", "-1"), "--factor: expected a number > 0, got -1"),
        (("--epochs", "0"), "--epochs: expected a number >= 1, got 0"),
        (("--code-units", "0"), "--code-units: expected a number >= 1, got 0"),
        (("--lr", "0"), "--lr: expected a number > 0, got 0"),
        (("--test-fraction", "1"), "--test-fraction: expected a number > 0 and < 1, got 1"),
        (("--metric", "manhattan"), "--metric: expected one of cosine, dot, sqeuclidean, got 'manhattan'"),
        (("--backend", "magic"), "--backend: expected one of reference, triton, cuda, cpu, torch, got 'magic'"),
        (("--device", "tpu"), "--device: expected cpu, cuda or cuda:NUMBER, got 'tpu'"),
        (("--device", "meta"), "--device: expected cpu, cuda or cuda:NUMBER, got 'meta'"),
        (("--device", "cuda:99"), "--device: cuda:99 is not available, PyTorch sees "),
        (("--out", "lone.npy"), "--out: can't make the folder lone.npy: File exists"),
    ],
)
def test_bad_option_is_one_clear_line(run, tmp_path, options, message):
    np.save("lone.npy", np.ones(3))
    (tmp_path / "broken.npz").write_bytes(b"not a zip")
    assert_refused(run("train", *options), message)


def test_backend_that_cannot_run_is_refused_before_work(run, monkeypatch):
    monkeypatch.setattr(tiled, "why_not", lambda call: "it rains")
    assert_refused(run("demo", "--backend", "torch", "--device", "cpu"), "--backend: torch can't run on cpu: it rains")
    monkeypatch.setattr(engines, "DEFAULT_BACKEND", "torch")
    assert_refused(run("demo", "--device", "cpu"), "PAIRLOSS_BACKEND: torch can't run on cpu: it rains")


def assert_refused(result, message):
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"pairloss: {message}")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_missing_extra_is_named():
    code = "import sys; sys.modules['rich'] = sys.modules['rich.console'] = None; import pairloss.__main__ as m; m.main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "pip install 'pairloss[cli]'" in result.stderr
