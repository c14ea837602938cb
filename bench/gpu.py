"""What wants a GPU, in parts of a few minutes each: python bench/gpu.py [--part build tests peers sweep profile]

Takes what the interpreter has: PyTorch, Triton, NumPy, pybind11, CMake, ninja, setuptools, pytest, nvcc; no network. pytest-xdist makes
the tests, which compile some 700 variants of the kernels, as many times faster as there are cores. Other libraries are compared where
they are installed. Times, errors and peak memory are appended to bench/results/cuda.csv, or --results, case by case. A command that
fails or takes too long doesn't keep the next from running.
"""

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
Command = list[str]


def build() -> Iterator[Command]:
    """First without the engines in C++: where they can't be built, that stays, and Triton's kernels are tested all the same."""
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "-e", "."]
    yield ["env", "PAIRLOSS_CPU=0", "PAIRLOSS_CUDA=0", *install]
    major, minor = torch.cuda.get_device_capability()
    yield ["env", "PAIRLOSS_CUDA=1", f"CMAKE_CUDA_ARCHITECTURES={major}{minor}-real", *install]


def tests() -> Iterator[Command]:
    """Of the files that run on every engine: other tests need more packages, and no GPU."""
    files = [str(file) for file in sorted((ROOT / "tests").glob("test_*.py")) if "mark.engines" in file.read_text()]
    side_by_side = ["-n", "auto"] if importlib.util.find_spec("xdist") else []
    yield [sys.executable, "-m", "pytest", "-q", *side_by_side, "-m", "engines and not slow", *files]
    for tool in ("memcheck", "racecheck"):
        yield ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", sys.executable, "tests/cuda_host.py"]


def bench(losses: str, rows: str, columns: str, dtype: str, *more: str) -> Command:
    size = ["--rows", *rows.split(), "--columns", *columns.split(), "--dtype", *dtype.split()]
    return [sys.executable, "bench/run.py", "--device", "cuda", "--losses", *losses.split(), *size, *more]


def between(*providers: str) -> Command:
    return ["--providers", "pairloss", *providers]


def peers() -> Iterator[Command]:
    """The cases that other kernels publish."""
    dense = between("pairloss-cuda", "products", "naive")
    others = *dense, "pml", "memeff", "inf-cl", "siglip-kernel"
    yield bench("snnl clip supcon nt_xent circle", "65536", "512", "bfloat16", *others)
    yield bench("siglip", "65536", "768", "bfloat16", *others)
    yield bench("snnl supcon nt_xent", "65536", "128 1024", "bfloat16", *dense)
    yield bench("snnl clip siglip", "16384", "256", "bfloat16 float16 float32", *others)
    yield bench("snnl clip siglip", "16384", "512", "bfloat16", *between("products", "naive", "compiled"))


def sweep() -> Iterator[Command]:
    """Latency, eager and as CUDA graphs; growth; a size at which N x N would take terabytes; which tiles are the fastest."""
    losses = "snnl supcon circle nt_xent clip siglip"
    yield bench(losses, "256 1024 2048", "128", "bfloat16 float32", *between("products", "naive"), "--graph")
    yield bench("snnl", "4096 16384 65536", "64 256 1024", "bfloat16", *between("pairloss-cuda", "products", "naive"))
    yield bench("snnl", "1048576", "256", "bfloat16", *between(), "--rounds", "1")
    yield ["env", "PAIRLOSS_AUTOTUNE=1", *bench("snnl clip siglip circle", "65536", "64 128 256 512", "bfloat16", *between("products"))]


def profile() -> Iterator[Command]:
    """Which kernels the time goes to."""
    yield bench("snnl clip", "65536", "128 512", "bfloat16", "--profile")


PARTS = {part.__name__: part for part in (build, tests, peers, sweep, profile)}
FIRST = ["build", "tests", "peers"]


def run(command: Command, seconds: float) -> bool:
    """Whether it ended well, in time; what it had started ends with it."""
    print("$", *command, flush=True)
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    environment = os.environ | {"PATH": path, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    try:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    except OSError as reason:
        print(reason)
        return False
    try:
        return process.wait(seconds) == 0
    except subprocess.TimeoutExpired as reason:
        print(reason)
        os.killpg(process.pid, signal.SIGKILL)
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=FIRST, help=" ".join(FIRST))
    parser.add_argument("--seconds", type=float, default=300, help="that a command may take; 300")
    parser.add_argument("--results", help="the CSV file; bench/results/cuda.csv")
    parser.add_argument("--commit", help="for the rows, where there is no git")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu.py: expected a CUDA device, got none")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, nvcc {shutil.which('nvcc')}", flush=True)
    given = [word for name in ("results", "commit") if (value := getattr(arguments, name)) for word in (f"--{name}", value)]
    lines, failed = [], 0
    for part in arguments.part:
        for command in PARTS[part]():
            begin = time.perf_counter()
            passed = run([*command, *(given if "bench/run.py" in command else [])], arguments.seconds)
            failed += not passed
            lines.append(f"{part:8} {'passed' if passed else 'FAILED'} {time.perf_counter() - begin:6.0f} s  {' '.join(command)[:110]}")
    print(*lines, sep="\n")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
