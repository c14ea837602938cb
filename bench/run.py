"""Paired timings, errors and peak memory of the losses and their counterparts (bench/cases.py), appended to bench/results/.

    python bench/run.py --losses all --rows 8192 --columns 128
    python bench/run.py --losses supcon circle nt_xent --growth
    python bench/run.py --device cuda --dtype bfloat16 --rows 256 512 1024 --graph

Times: every provider once a round, in any order, in one process; the 20th, 50th and 80th percentile of the rounds and of
the ratios to the counterparts in the same round. On CUDA by its events, of several sets of inputs in turn (a graph keeps to one),
in more rounds where they are short. Errors: where float64 is affordable, of the loss and the gradients against it. Ours must keep
to naive's and the floor of pairloss.testing there, elsewhere naive's must agree with ours, or the command fails in the end.
Memory: on the CPU a child process each, the most held above the inputs. A counterpart that would take more than --memory-limit is
not run: its row says how many bytes it needs. One that fails has no row; the reason is printed.
"""

import argparse
import csv
import datetime
import json
import logging
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
from cases import (
    LOSSES,
    PACKAGES,
    PROVIDERS,
    TOLERANCE,
    Case,
    Outcome,
    bytes_needed,
    error,
    forward_and_backward,
    inputs_of,
    providers_of,
    step_of,
    truth,
    why_not,
)
from torch import Tensor

from pairloss import engines
from pairloss.testing import FLOORS

RESULTS = Path(__file__).parent / "results"
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COLUMNS = [
    *("date", "commit", "machine", "device", "threads", "torch", "triton", "pytorch-metric-learning"),
    *("loss", "provider", "engine", "n", "d", "dtype", "quantity", "p20", "p50", "p80", "rounds"),
]
GROWTH = [256, 512, 1024, 2048, 4096, 8192, 16384, 32768]
FEW_ROUNDS_FROM, FEW_ROUNDS = {"cpu": 16384, "cuda": 131072}, 3
# Rows up to which the dense loss in float64 is waited for, and sets of inputs: more than a GPU's caches hold.
FLOAT64_UP_TO, SETS = {"cpu": 2048, "cuda": 16384}, {"cpu": 1, "cuda": 3}
MOST_ROUNDS, SECONDS_OF_ROUNDS = 200, 1.0

Step = Callable[[], Outcome | None]
Rows = list[list[object]]


def timed(step: Step, device: str) -> float:
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        return 1e-3 * start.elapsed_time(end)
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def rounds_of(steps: dict[str, Step], device: str, rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order, shuffle = list(steps), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)  # what a step leaves behind in caches and in the allocator is not always the same one's
        for name in order:
            seconds[name].append(timed(steps[name], device))
    return seconds


def outcomes_of(case: Case, steps: dict[str, Step]) -> tuple[dict[str, Outcome | None], dict[str, str]]:
    """The first step of every provider, and which engines served ours. Whoever fails is left out, but for ours."""
    outcomes, served = {}, {}
    for provider, step in steps.items():
        with engines_used() as used:
            try:
                outcomes[provider] = step()
            except Exception as reason:
                if provider == "pairloss":
                    raise
                print(f"{case.id}: no {provider}: {type(reason).__name__}: {reason}", file=sys.stderr)
        tuned = "triton" in used and os.environ.get("PAIRLOSS_AUTOTUNE") == "1"
        served[provider] = "+".join(sorted(used)) + (", autotuned" if tuned else "")
    if engines.DEFAULT_BACKEND == engines.REFERENCE:
        served["pairloss"] = engines.REFERENCE
    return outcomes, served


def errors_of(case: Case, inputs: tuple[Tensor, ...], outcomes: dict[str, Outcome | None], limit: float) -> tuple[dict[str, float], bool]:
    """Of every provider against float64, or none where that is too large: then against ours. And whether ours is right, or naive's."""
    known = {name: outcome for name, outcome in outcomes.items() if outcome is not None}
    wide = case._replace(dtype=torch.float64)
    affordable = case.n <= FLOAT64_UP_TO[inputs[0].device.type] and bytes_needed(wide, "naive") <= limit
    right, beside = (truth(case, inputs), "float64") if affordable else (known.pop("pairloss"), "ours")
    errors = {name: error(outcome, right, case.dtype) for name, outcome in known.items()}
    bounds = dict.fromkeys(errors, TOLERANCE[case.dtype])
    if affordable:
        eager = known.get("naive") or forward_and_backward(LOSSES[case.loss].others["naive"].function, *inputs)
        bounds["pairloss"] = error(eager, right, case.dtype) + FLOORS[case.dtype]
    wrong = [name for name, value in errors.items() if not value <= bounds[name]]
    for name in wrong:
        print(f"{case.id}: {name} differs from {beside} by {errors[name]:.2g} of a norm, above {bounds[name]:.2g}", file=sys.stderr)
    return errors if affordable else {}, not {"pairloss", "naive"} & set(wrong)


def graphs_of(case: Case, steps: dict[str, Step]) -> dict[str, Step]:
    """The steps that can be captured."""
    graphs = {}
    for name, step in steps.items():
        try:
            graphs[name] = graph_of(step)
        except Exception as reason:
            print(f"{case.id}: no graph of {name}: {type(reason).__name__}: {reason}", file=sys.stderr)
    return graphs


def graph_of(step: Step) -> Step:
    """The step as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@contextmanager
def engines_used() -> Iterator[set[str]]:
    """The names of the engines that serve the calls made inside; none serves top-k selection, nor backend="reference"."""
    used: set[str] = set()
    choose = engines.choose
    names = {module: name for name, module in engines.ENGINES.items()}

    def recorded(call: engines.Call, backend: str | None) -> ModuleType:
        engine = choose(call, backend)
        used.add(names[engine.__name__])
        return engine

    with mock.patch.object(engines, "choose", recorded):
        yield used


def profile(case: Case, device: str) -> str:
    """Which kernels the time of three steps goes to."""
    step = step_of(case, "pairloss", [inputs_of(case, device)])
    step()
    activity = {"cpu": torch.profiler.ProfilerActivity.CPU, "cuda": torch.profiler.ProfilerActivity.CUDA}[device]
    with torch.profiler.profile(activities=[activity]) as seen:
        for _ in range(3):
            step()
    return seen.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=12, max_name_column_width=60)


def memory_on_cuda(step: Step) -> int:
    """Bytes above what is held already."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def memory_on_cpu(case: Case, provider: str) -> int:
    """Bytes above the inputs; the process that calls this must be fresh."""
    small, step = (step_of(of, provider, [inputs_of(of, "cpu")]) for of in (case._replace(n=64), case))
    small()
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    step()
    return status("VmHWM") - before


def status(key: str) -> int:
    match = re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def memory_in_child(case: Case, provider: str) -> int:
    size = ["--losses", case.loss, "--rows", str(case.n), "--columns", str(case.d), "--dtype", name_of(case.dtype)]
    command = [sys.executable, __file__, *size, "--memory-of", provider]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def machine(device: str) -> str:
    if device == "cuda":
        driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]
        return f"{torch.cuda.get_device_name()}, driver {driver}, CUDA {torch.version.cuda}"
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return f"{line.split(':')[1].strip()}, {torch.backends.cpu.get_cpu_capability()}"
    return platform.processor()


def percentiles(values: list[float]) -> list[str]:
    # "inclusive": the other method extrapolates beyond few values.
    cuts = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else values * 9
    return [f"{v:.6g}" for v in (cuts[1], statistics.median(values), cuts[7])]


def rows_of(case: Case, head: list[object], device: str, wanted: set[str], rounds: int, limit: float, graph: bool) -> tuple[Rows, bool]:
    """And whether the results were right."""
    rows: Rows = []
    head = [*head, case.loss]
    size = [case.n, case.d, name_of(case.dtype)]
    sets = [inputs_of(case, device, seed) for seed in range(SETS[device])]
    steps = {}
    for provider in [name for name in providers_of(case.loss, device) if name in wanted]:
        reason = why_not(case, provider, device, limit)
        if reason is None:
            steps[provider] = step_of(case, provider, sets)
            continue
        print(f"{case.id}: no {provider}: {reason}", file=sys.stderr)
        if bytes_needed(case, provider) > limit:
            rows.append([*head, provider, "", *size, "bytes needed", *percentiles([bytes_needed(case, provider)]), 1])
    outcomes, engine = outcomes_of(case, steps)
    errors, passed = errors_of(case, sets[0], outcomes, limit)
    steps = {name: steps[name] for name in outcomes}
    outcomes.clear()

    rounds = enough(steps, rounds, device)
    seconds = {"seconds": rounds_of(steps, device, rounds)}
    if graph:
        seconds["seconds as a graph"] = rounds_of(graphs_of(case, steps), device, rounds)
    for provider, step in steps.items():
        by = engine[provider] or (f"{PACKAGES[provider][0]} {installed(PACKAGES[provider][0])}" if provider in PACKAGES else "")
        what = [*head, provider, by, *size]
        for quantity, measured in seconds.items():
            if provider not in measured:
                continue
            rows.append([*what, quantity, *percentiles(measured[provider]), rounds])
            for base in [name for name in measured if name != "pairloss"] if provider == "pairloss" else []:
                ratios = [ours / theirs for ours, theirs in zip(measured[provider], measured[base], strict=True)]
                rows.append([*what, f"{quantity} / {base}", *percentiles(ratios), rounds])
        if provider in errors:
            rows.append([*what, "error", *percentiles([errors[provider]]), 1])
        if not provider.startswith("products"):
            peak = memory_on_cuda(step) if device == "cuda" else memory_in_child(case, provider)
            rows.append([*what, "peak bytes", *percentiles([peak]), 1])
    return rows, passed


def enough(steps: dict[str, Step], rounds: int, device: str) -> int:
    """As many rounds as asked for; on CUDA, whose clocks rise with work, more of short ones. Also what warms up."""
    round_of_all = sum(timed(step, device) for step in steps.values())
    return rounds if device == "cpu" else max(rounds, min(MOST_ROUNDS, int(SECONDS_OF_ROUNDS / round_of_all)))


def output_of(*command: str) -> str:
    """What it prints, or nothing where it is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=RESULTS).stdout.strip()
    except OSError:
        return ""


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def default_limit(device: str) -> float:
    """Bytes: what an ordinary machine spares, or most of the GPU's memory."""
    return 6e9 if device == "cpu" else 0.8 * torch.cuda.get_device_properties(0).total_memory


def arguments_of(command: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", nargs="+", default=["all"], choices=["all", *LOSSES], metavar="LOSS", help=f"all, {', '.join(LOSSES)}")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--rows", type=int, nargs="+", default=[8192], help="N: rows compared with each other")
    size.add_argument("--growth", action="store_const", dest="rows", const=GROWTH, help=f"--rows {' '.join(map(str, GROWTH))}")
    parser.add_argument("--columns", type=int, nargs="+", default=[128], help="D")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=DTYPES)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--providers", nargs="+", default=PROVIDERS, choices=PROVIDERS, metavar="PROVIDER", help=", ".join(PROVIDERS))
    parser.add_argument("--rounds", type=int, default=7, help=f"at most {FEW_ROUNDS} from N = {FEW_ROUNDS_FROM['cpu']:,} on (CPU)")
    parser.add_argument("--graph", action="store_true", help="time CUDA graphs of the steps too")
    parser.add_argument("--memory-limit", type=float, help="GB for a counterpart; 6, or 80 %% of the GPU")
    parser.add_argument("--profile", action="store_true", help="print where ours spends its time, and no more")
    parser.add_argument("--results", type=Path, help="the CSV file; bench/results/DEVICE.csv")
    parser.add_argument("--commit", default="", help="for the rows; git's")
    parser.add_argument("--memory-of", choices=PROVIDERS, help=argparse.SUPPRESS)
    return parser.parse_args(command)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # what PAIRLOSS_AUTOTUNE=1 finds
    arguments = arguments_of()
    device = arguments.device
    losses = LOSSES if "all" in arguments.losses else arguments.losses
    cases = [
        Case(loss, n, d, DTYPES[dtype]) for dtype in arguments.dtype for d in arguments.columns for loss in losses for n in arguments.rows
    ]
    if arguments.memory_of:
        print(json.dumps(memory_on_cpu(cases[0], arguments.memory_of)))
        return

    if arguments.profile:
        for case in cases:
            print(f"3 steps of {case.id}", profile(case, device), sep="\n", flush=True)
        return

    path = arguments.results or RESULTS / f"{device}.csv"
    limit = 1e9 * arguments.memory_limit if arguments.memory_limit else default_limit(device)
    failed = 0
    head = [datetime.date.today().isoformat(), arguments.commit or output_of("git", "rev-parse", "--short", "HEAD"), machine(device)]
    head += [device, torch.get_num_threads(), *map(installed, ("torch", "triton", "pytorch-metric-learning"))]
    for case in cases:
        rounds = arguments.rounds if case.n < FEW_ROUNDS_FROM[device] else min(FEW_ROUNDS, arguments.rounds)
        try:
            rows, passed = rows_of(case, head, device, {"pairloss", *arguments.providers}, rounds, limit, arguments.graph)
        except Exception:  # the other cases are worth having
            print(f"{case.id}:", traceback.format_exc(), file=sys.stderr)
            rows, passed = [], False
        failed += not passed
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([COLUMNS] * new + rows)
        for row in rows:
            print(*row[8:], sep="\t", flush=True)
    if failed:
        sys.exit(f"{failed} of {len(cases)} cases failed")


if __name__ == "__main__":
    main()
