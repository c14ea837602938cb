"""Paired timings and peak memory of the losses and their counterparts (bench/cases.py), appended to bench/results/.

    python bench/run.py --losses all --rows 8192 --columns 128
    python bench/run.py --losses supcon circle nt_xent --growth

Times: every provider once a round, in any order, in one process; the 20th, 50th and 80th percentile of the rounds and of
the ratios to the counterparts in the same round. Before, the loss and the gradients of all must agree. Memory: a child process
each, the most held above the inputs. A counterpart that would take more than --memory-limit has no row; the reason is printed.
"""

import argparse
import csv
import datetime
import json
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest import mock

import torch
from cases import LOSSES, PROVIDERS, Case, Outcome, check_agreement, step_of, why_not

from pairloss import engines

RESULTS = Path(__file__).parent / "results"
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COLUMNS = [
    *("date", "commit", "machine", "device", "threads", "torch", "triton", "pytorch-metric-learning"),
    *("loss", "provider", "engine", "n", "d", "dtype", "quantity", "p20", "p50", "p80", "rounds"),
]
GROWTH = [256, 512, 1024, 2048, 4096, 8192, 16384, 32768]
FEW_ROUNDS_FROM, FEW_ROUNDS = 16384, 3


class Timing(NamedTuple):
    seconds: dict[str, list[float]]
    engine: str


def timed(step: Callable[[], Outcome | None], device: str) -> float:
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def times(case: Case, device: str, rounds: int, providers: list[str]) -> Timing:
    steps = {name: step_of(case, device, name) for name in providers}
    with engines_used() as used:
        ours = steps["pairloss"]()
    for name, step in steps.items():
        theirs = step() if name != "pairloss" else None
        if ours is not None and theirs is not None:
            check_agreement(case, ours, name, theirs)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order, shuffle = list(steps), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)  # what a step leaves behind in caches and in the allocator is not always the same one's
        for name in order:
            seconds[name].append(timed(steps[name], device))
    engine = engines.REFERENCE if engines.DEFAULT_BACKEND == engines.REFERENCE else "+".join(sorted(used))
    return Timing(seconds, engine)


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


def memory(case: Case, device: str, provider: str) -> float:
    """Bytes above the inputs; the process that calls this must be fresh."""
    step_of(case._replace(n=64), device, provider)()
    step = step_of(case, device, provider)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    step()
    return status("VmHWM") - before


def status(key: str) -> int:
    match = re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def memory_in_child(case: Case, device: str, provider: str) -> float:
    size = ["--losses", case.loss, "--rows", str(case.n), "--columns", str(case.d), "--dtype", name_of(case.dtype)]
    command = [sys.executable, __file__, *size, "--device", device, "--memory-of", provider]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return f"{line.split(':')[1].strip()}, {torch.backends.cpu.get_cpu_capability()}"
    return platform.processor()


def percentiles(values: list[float]) -> list[str]:
    # "inclusive": the other method extrapolates beyond few values.
    cuts = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else values * 9
    return [f"{v:.6g}" for v in (cuts[1], statistics.median(values), cuts[7])]


def rows_of(case: Case, device: str, rounds: int, limit: float) -> list[list[object]]:
    providers = []
    for provider in PROVIDERS:
        reason = why_not(case, provider, limit)
        if reason is None:
            providers.append(provider)
        else:
            print(f"{case.id}: no {provider}: {reason}", file=sys.stderr)
    seconds, engine = times(case, device, rounds, providers)

    head = [datetime.date.today().isoformat(), commit(), machine(device), device, torch.get_num_threads()]
    head += [*map(installed, ("torch", "triton", "pytorch-metric-learning")), case.loss]
    rows: list[list[object]] = []
    for provider in providers:
        what = [*head, provider, engine if provider == "pairloss" else "", case.n, case.d, name_of(case.dtype)]
        rows.append([*what, "seconds", *percentiles(seconds[provider]), rounds])
        if provider == "pairloss":
            for base in providers[1:]:
                ratios = [ours / theirs for ours, theirs in zip(seconds[provider], seconds[base], strict=True)]
                rows.append([*what, f"seconds / {base}", *percentiles(ratios), rounds])
        if not provider.startswith("products"):
            rows.append([*what, "peak bytes", *percentiles([memory_in_child(case, device, provider)]), 1])
    return rows


def commit() -> str:
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS).stdout.strip()


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def default_limit(device: str) -> float:
    """Gigabytes: what an ordinary machine spares, or most of the GPU's memory."""
    return 6.0 if device == "cpu" else 0.8e-9 * torch.cuda.get_device_properties(0).total_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", nargs="+", default=["all"], choices=["all", *LOSSES], metavar="LOSS", help=f"all, {', '.join(LOSSES)}")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--rows", type=int, nargs="+", default=[8192], help="N: rows compared with each other")
    size.add_argument("--growth", action="store_const", dest="rows", const=GROWTH, help=f"--rows {' '.join(map(str, GROWTH))}")
    parser.add_argument("--columns", type=int, nargs="+", default=[128], help="D")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=DTYPES)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=7, help=f"at most {FEW_ROUNDS} from N = {FEW_ROUNDS_FROM:,} on")
    parser.add_argument("--memory-limit", type=float, help="GB for a counterpart; 6, or 80 %% of the GPU")
    parser.add_argument("--results", type=Path, help="the CSV file; bench/results/DEVICE.csv")
    parser.add_argument("--memory-of", choices=PROVIDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = arguments.device
    losses = LOSSES if "all" in arguments.losses else arguments.losses
    cases = [
        Case(loss, n, d, DTYPES[dtype]) for dtype in arguments.dtype for d in arguments.columns for loss in losses for n in arguments.rows
    ]
    if arguments.memory_of:
        print(json.dumps(memory(cases[0], device, arguments.memory_of)))
        return

    path = arguments.results or RESULTS / f"{device}.csv"
    limit = 1e9 * (arguments.memory_limit or default_limit(device))
    for case in cases:
        rounds = arguments.rounds if case.n < FEW_ROUNDS_FROM else min(FEW_ROUNDS, arguments.rounds)
        rows = rows_of(case, device, rounds, limit)
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([COLUMNS] * new + rows)
        for row in rows:
            print(*row[8:], sep="\t", flush=True)


if __name__ == "__main__":
    main()
