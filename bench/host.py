"""What the host does in a step while a GPU waits for it: python bench/host.py [--rows 64] [--columns 128] [--dtype bfloat16]

Without a GPU: engine "triton" compiles for sm_90 and launches as always, on tensors of the CPU, but the driver's launch does nothing.
So PyTorch's operations, which compute here and are only started on a GPU, count with what they take for so few rows; results are rubbish.
One line a loss: the median step, forward and backward, and how much of it is launches.
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pairloss.kernels
import torch
import triton
from cases import LOSSES, Case, forward_and_backward, inputs_of
from pairloss.kernels import launch, tiles
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from pairloss import engines

ARCHITECTURE = 90
REGISTERS, THREADS, SHARED_MEMORY = 64, 1024, 227 << 10


class NoDevice:
    """Stands for the driver's functions and for a compiled kernel's launcher."""

    def __init__(self, *_: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> None:
        pass

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        return 1, 1, REGISTERS, 0, THREADS  # module, function, registers, spills, threads

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MEMORY, "multiprocessor_count": 132, "warpSize": 32}


class Driver(DriverBase):
    def __init__(self) -> None:
        self.utils, self.launcher_cls = NoDevice(), NoDevice

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCHITECTURE, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> None:
        return None

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


@contextlib.contextmanager
def without_a_gpu() -> Iterator[None]:
    triton.runtime.driver.set_active(Driver())  # for good: to go back to a driver, Triton must find one
    limits = tiles.Limits(ARCHITECTURE, SHARED_MEMORY - tiles.RESERVED)
    with (
        mock.patch.object(pairloss.kernels, "_wrong_device", return_value=None),
        mock.patch.object(tiles, "limits", return_value=limits),
        mock.patch.object(engines, "DEFAULT_BACKEND", "triton"),
    ):
        yield


def seconds(case: Case, rounds: int) -> tuple[float, float, int]:
    """Of a step, of its launches, and how many those are: medians."""
    launches: list[float] = []
    original = launch._launch

    def timed(*arguments: Any) -> None:
        begin = time.perf_counter()
        original(*arguments)
        launches.append(time.perf_counter() - begin)

    inputs = inputs_of(case, "cpu")
    steps, parts = [], []
    with mock.patch.object(launch, "_launch", timed):
        for _ in range(rounds + 5):  # the first ones compile
            launches.clear()
            begin = time.perf_counter()
            forward_and_backward(LOSSES[case.loss].ours, *inputs)
            steps.append(time.perf_counter() - begin)
            parts.append(sum(launches))
    return statistics.median(steps[5:]), statistics.median(parts[5:]), len(launches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--columns", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--rounds", type=int, default=300)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with without_a_gpu():
        for loss in ("snnl", "nt_xent", "supcon", "circle", "clip", "siglip"):
            case = Case(loss, arguments.rows, arguments.columns, getattr(torch, arguments.dtype))
            step, part, count = seconds(case, arguments.rounds)
            print(f"{loss:8} {1e6 * step:5.0f} us, of which {count} launches {1e6 * part:4.0f}")


if __name__ == "__main__":
    main()
