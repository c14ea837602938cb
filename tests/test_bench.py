"""What measures: the errors beside float64, what has no row and why, and the commands for a GPU, which must not fail where time is dear."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import cases
import gpu
import run

ROOT = gpu.ROOT
HEAD = ["today", "commit", "machine", "cpu", 1, "torch", "triton", "pml"]
SMALL = cases.Case("clip", 64, 16, torch.float32)


def rows(case, limit=1e9):
    """By provider and quantity."""
    found, passed = run.rows_of(case, HEAD, "cpu", set(cases.PROVIDERS), 2, limit, False)
    listed = [dict(zip(run.COLUMNS, row, strict=True)) for row in found]
    return {(row["provider"], row["quantity"]): float(row["p50"]) for row in listed}, passed


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", cases.LOSSES)
def test_ours_keep_the_error_rule(loss, dtype):
    case = cases.Case(loss, 130, 16, dtype)
    inputs = cases.inputs_of(case, "cpu")
    errors, passed = run.errors_of(case, inputs, {"pairloss": cases.step_of(case, "pairloss", [inputs])()}, 1e9)
    assert errors["pairloss"] > 0
    assert passed


def test_a_case_has_times_ratios_errors_and_memory():
    found, passed = rows(SMALL)
    assert passed
    assert found["pairloss", "seconds"] > 0
    assert found["pairloss", "seconds / naive"] > 0
    assert found["naive", "error"] < 1e-5
    assert ("naive", "peak bytes") in found
    assert ("products", "error") not in found


def test_what_is_too_large_says_what_it_needs(capsys):
    found, passed = rows(SMALL, limit=5e4)
    assert passed
    assert found["naive", "bytes needed"] == pytest.approx(16.6 * 64**2)
    assert ("naive", "seconds") not in found
    assert "no naive: would take about" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("case", "message"), [(SMALL, "pairloss differs from float64"), (SMALL._replace(n=2080), "naive differs from ours")]
)
def test_a_wrong_gradient_of_ours_is_said_and_its_times_are_kept(monkeypatch, capsys, case, message):
    wrong = cases.LOSSES["clip"]._replace(ours=lambda image, text, scale: 2 * cases.pairloss.clip(image, text, scale))
    monkeypatch.setitem(cases.LOSSES, "clip", wrong)
    found, passed = rows(case)
    assert not passed
    assert found["pairloss", "seconds"] > 0
    assert message in capsys.readouterr().err


def test_another_library_that_fails_is_left_out(monkeypatch, capsys):
    def fails(*_):
        raise RuntimeError("no kernel")

    others = cases.LOSSES["clip"].others | {"pml": cases.Counterpart(fails)}
    monkeypatch.setitem(cases.LOSSES, "clip", cases.LOSSES["clip"]._replace(others=others))
    monkeypatch.setitem(cases.PACKAGES, "pml", ("math", "math"))
    found, passed = rows(SMALL)
    assert passed
    assert ("pml", "seconds") not in found
    assert math.isfinite(found["naive", "seconds"])
    assert "no pml: RuntimeError: no kernel" in capsys.readouterr().err


def test_sets_of_inputs_take_turns():
    case = cases.Case("snnl", 8, 4, torch.float32)
    step = cases.step_of(case, "pairloss", [cases.inputs_of(case, "cpu", seed) for seed in range(2)])
    first, second, third = (step().loss.item() for _ in range(3))
    assert first == third != second


@pytest.mark.parametrize("part", [part for part in gpu.PARTS if part not in ("build", "tests")])
def test_commands_for_a_gpu_are_ones_that_run_takes(part):
    commands = list(gpu.PARTS[part]())
    assert commands
    for command in commands:
        _, script, *arguments = command[command.index(sys.executable) :]
        assert (ROOT / script).samefile(run.__file__)
        taken = run.arguments_of(arguments)
        assert taken.device == "cuda"
        assert set(taken.providers) <= set(cases.PROVIDERS)


def test_tests_for_a_gpu_need_no_other_packages():
    """They are collected where nothing but torch, NumPy, pybind11 and pytest can be imported."""
    pytest_command, *sanitizers = gpu.tests()
    files = [argument for argument in pytest_command if argument.endswith(".py")]
    assert {"test_matrix.py", "test_snnl.py"} <= {Path(file).name for file in files}
    for command in sanitizers:
        assert (ROOT / command[-1]).exists()
    others = ("hypothesis", "typer", "rich", "sklearn", "scipy", "matplotlib", "lightning", "accelerate", "pytorch_metric_learning")
    code = f"import sys\nfor name in {others}: sys.modules[name] = None\nimport pytest\nsys.exit(pytest.main(sys.argv[1:]))"
    options = ["--collect-only", "-q", "-m", "engines and not slow"]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run([sys.executable, "-c", code, *options, *files], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_the_table_of_cases(tmp_path):
    """Of the machine measured last, with what was too large marked."""
    import table

    written = tmp_path / "rows.csv"
    with written.open("w", newline="") as file:
        writer = table.csv.writer(file)
        writer.writerow(run.COLUMNS)
        for machine, case, limit in (("before", SMALL, 1e9), ("now", SMALL, 1e9), ("now", SMALL._replace(n=128), 1e5)):
            given = [machine if cell == "machine" else cell for cell in HEAD]
            writer.writerows(run.rows_of(case, given, "cpu", {"pairloss", "naive"}, 2, limit, False)[0])
    head, _, *lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.cases(written, "float32").splitlines())
    small, large = (dict(zip(head, line, strict=True)) for line in lines)
    assert (small["N"], large["N"]) == ("64", "128")
    assert float(small["pairloss, ms"]) > 0
    assert float(small["naive, ms"]) > 0
    assert float(small["error"]) < 1e-5
    assert large["naive, ms"] == "over memory"


@pytest.mark.parametrize("command", ["true", "false", "no-such-command", "sleep 30"])
def test_a_command_for_a_gpu_ends_in_time_and_says_how(command):
    assert gpu.run(command.split(), 0.5) is (command == "true")


@pytest.mark.parametrize("loss", ["supcon", "circle"])
def test_dense_losses_skip_anchors_that_do_not_count(loss):
    """Without indexing by a mask, which no CUDA graph takes: an anchor alone in its class has no positives."""
    features, labels = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 0, 1, 1, 1, 2])
    ours = cases.LOSSES[loss].ours(features, labels)
    torch.testing.assert_close(cases.LOSSES[loss].others["naive"].function(features, labels), ours)
