"""The engine "cuda" on tensors of the CPU: builds the kernels' own source with csrc/cuda/host.h, for tests without a GPU.

As a program: runs a few cases of every kernel for a sanitizer that watches, with the module whose file is named, or on a GPU.
"""

import contextlib
import fcntl
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch

from pairloss import cuda

ROOT = Path(__file__).parents[1]
CAPABILITY = os.environ.get("PAIRLOSS_HOST_CAPABILITY", "80")  # a process can hold one module


@functools.cache
def why_not() -> str | None:
    """Why it can't be built here."""
    missing = [tool for tool in ("cmake", "ninja", "c++") if shutil.which(tool) is None]
    if missing or importlib.util.find_spec("pybind11") is None:
        return f"{', '.join(missing) or 'pybind11'} not found"
    probe = ["c++", "-std=c++20", "-x", "c++", "-fsyntax-only", "-"]
    source = "#include <barrier>\n#include <ucontext.h>\n_Float16 half(float v) { return _Float16(v); }"
    done = subprocess.run(probe, input=source, capture_output=True, text=True)
    return None if done.returncode == 0 else "no C++20 compiler with _Float16"


@functools.cache
def build(sanitizer: str = "") -> Path:
    """The module's file. Kept in build/, so that only what changed is compiled again; one process at a time."""
    import pybind11

    target = ROOT / "build" / f"cuda_host_{sanitizer or 'fibers'}_{CAPABILITY}"
    target.mkdir(parents=True, exist_ok=True)
    configure = ["cmake", "-S", str(ROOT), "-B", str(target), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", "-DPAIRLOSS_ENGINE=cuda_host", f"-DPAIRLOSS_SANITIZER={sanitizer}"]
    configure += [f"-DPAIRLOSS_HOST_CAPABILITY={CAPABILITY}"]
    with open(target / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, ["cmake", "--build", str(target)]):
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            assert "warning:" not in done.stdout, done.stdout
    (module,) = target.glob("_cuda_host*.so")
    return module


@functools.cache
def load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_cuda_host", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def in_place_of_the_gpu(module: ModuleType) -> Iterator[None]:
    before = cuda.__dict__.get("_cuda"), cuda._missing
    cuda._cuda, cuda._missing = module, None
    try:
        yield
    finally:
        cuda._cuda, cuda._missing = before


def watched_cases(device: str) -> None:
    """Every kernel: both scores, terms with and without gradients; both ways to lay out a warp. Ragged tiles of every kind."""
    from pairloss.ops import pair_sum, row_stats

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 3, (37,), generator=generator).sort().values.to(device)
    for dtype, product_dtype in ((torch.float64, None), (torch.float32, None), (torch.float32, torch.bfloat16)):
        x, y = (torch.randn(n, 20, generator=generator).to(device, dtype).requires_grad_() for n in (37, 21))
        bias = torch.randn(37, generator=generator).to(device, dtype).requires_grad_()
        options = {"product_dtype": product_dtype, "backend": "cuda"}
        rows, _ = row_stats(x, ids_x=ids, self_offset=0, row_bias=bias, norm=torch.full_like(bias[0], 2.0), **options)
        circle, _ = row_stats(x, ids_x=ids, self_offset=0, score="circle", m=0.25, gamma=0.1, **options)
        both = row_stats(x, y, ids, ids[:21], 3, both_sides=True, **options)
        sums = pair_sum(x, y, ids, ids[:21], over="positives", **options)
        total = sum(v.clamp(min=-1e3).sum() for v in (rows, circle, *both, sums))
        torch.autograd.grad(total, (x, y, bias))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        with in_place_of_the_gpu(load(Path(sys.argv[1]))):
            watched_cases("cpu")
    else:
        watched_cases("cuda")
