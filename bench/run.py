"""Paired timings and peak memory, appended to bench/results/: python bench/run.py [--device cpu|cuda] [--case N D dtype]...

Times: every provider in turn, round after round, in one process; the 20th, 50th and 80th percentile of the rounds and of
the ratio to the three matrix products of the same round. Memory: a child process each, the most held above the inputs.
"""

import argparse
import csv
import datetime
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from cases import Case, providers

RESULTS = Path(__file__).parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COLUMNS = [
    "date",
    "commit",
    "machine",
    "threads",
    "torch",
    "triton",
    "loss",
    "provider",
    "n",
    "d",
    "dtype",
    "quantity",
    "p20",
    "p50",
    "p80",
    "rounds",
]
CPU_CASES = [
    *("256 128 float32", "512 128 float32", "1024 128 float32", "2048 128 float32", "4096 128 float32", "8192 128 float32"),
    *("16384 128 float32", "32768 128 float32", "65536 128 float32", "8192 512 float32", "8192 128 bfloat16"),
]
CUDA_CASES = [f"{n} {d} {dtype}" for dtype in ("bfloat16", "float32") for d in (128, 256, 512, 1024) for n in (1024, 4096, 16384, 65536)]
# Beyond these they don't fit an ordinary machine of the kind, or take minutes a round.
LARGEST_NAIVE = {"cpu": 16384, "cuda": 65536}
LARGEST_PRODUCTS = {"cpu": 32768, "cuda": 131072}


def parse_case(text: str) -> Case:
    n, d, dtype = text.split()
    return Case(int(n), int(d), DTYPES[dtype])


def timed(step: Callable[[], None], device: str) -> float:
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def times(case: Case, device: str, rounds: int, names: list[str]) -> dict[str, list[float]]:
    steps = {name: step for name, step in providers(case, device).items() if name in names}
    for step in steps.values():
        timed(step, device)
    result: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            result[name].append(timed(step, device))
    return result


def memory(case: Case, device: str, name: str) -> float:
    """Bytes above the inputs; the process that calls this must be fresh."""
    providers(Case(64, case.d, case.dtype), device)[name]()
    step = providers(case, device)[name]
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


def memory_in_child(text: str, device: str, name: str) -> float | None:
    command = [sys.executable, __file__, "--device", device, "--case", text, "--memory-of", name]
    done = subprocess.run(command, capture_output=True, text=True)
    return None if done.returncode else json.loads(done.stdout)


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return f"{line.split(':')[1].strip()}, {torch.backends.cpu.get_cpu_capability()}"
    return platform.processor()


def percentiles(values: list[float]) -> list[str]:
    cuts = statistics.quantiles(values, n=10) if len(values) > 1 else values * 9
    return [f"{v:.6g}" for v in (cuts[1], statistics.median(values), cuts[7])]


def rows_of(text: str, device: str, rounds: int) -> list[list[object]]:
    case = parse_case(text)
    names = ["pairloss"] + ["products"] * (case.n <= LARGEST_PRODUCTS[device]) + ["naive"] * (case.n <= LARGEST_NAIVE[device])
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS).stdout.strip()
    try:
        from triton import __version__ as triton
    except ModuleNotFoundError:
        triton = ""
    head = [datetime.date.today().isoformat(), commit, machine(device), torch.get_num_threads(), torch.__version__, triton, "snnl"]
    rows: list[list[object]] = []
    seconds = times(case, device, rounds, names)
    for name in names:
        size = [case.n, case.d, text.split()[2]]
        rows.append([*head, name, *size, "seconds", *percentiles(seconds[name]), rounds])
        for base in ("products", "naive"):
            if name == "pairloss" and base in seconds:
                ratios = [ours / theirs for ours, theirs in zip(seconds[name], seconds[base], strict=True)]
                rows.append([*head, name, *size, f"seconds / {base}", *percentiles(ratios), rounds])
        if name != "products" and (peak := memory_in_child(text, device, name)) is not None:
            rows.append([*head, name, *size, "peak bytes", *percentiles([peak]), 1])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--case", action="append", help='"N D dtype"; more than once for several')
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    cases = arguments.case or (CPU_CASES if arguments.device == "cpu" else CUDA_CASES)
    if arguments.memory_of:
        print(json.dumps(memory(parse_case(cases[0]), arguments.device, arguments.memory_of)))
        return

    path = RESULTS / f"{arguments.device}.csv"
    for text in cases:
        rounds = arguments.rounds if int(text.split()[0]) <= 16384 else 3
        rows = rows_of(text, arguments.device, rounds)
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([COLUMNS] * new + rows)
        for row in rows:
            print(*row[7:], sep="\t", flush=True)


if __name__ == "__main__":
    main()
