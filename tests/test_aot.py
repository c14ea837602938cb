"""The shipped tiles in machine code, for GPUs that need not be there: bench/aot.py holds the tools."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("TRITON_INTERPRET is set: Triton's functions are not compiled in this process", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import aot

# Most registers: forward with labels and a running maximum, backward with labels and both roles of a pair.
MODE = "ids, any tau"
FORWARD = [(arch, d) for d in (128, 256) for arch in (80, 90, 100)]
BACKWARD = [(arch, d) for d in (64, 128, 256, 512) for arch in (80, 90, 100)]


@pytest.mark.parametrize(
    ("kernel", "arch", "d"),
    [("row_stats_fwd", *case) for case in FORWARD]
    + [("row_stats_bwd" if case[1] <= 256 else "row_stats_weights", *case) for case in BACKWARD],
)
def test_no_spills_in_loops_and_matrix_units_are_used(kernel: str, arch: int, d: int) -> None:
    (launch,) = (v for v in aot.launches(arch, torch.bfloat16, d, [MODE]) if v.kernel.__name__ == f"{kernel}_kernel")
    report = aot.report(aot.compiled(launch, arch), arch)
    assert report.loop_spills == 0, report
    assert report.matrix > 0, report
    assert report.shared <= aot.SHARED_MEMORY[arch], report


def test_loops_are_found() -> None:
    """One iteration of the tile loop holds the products and the exponentials, so the loops hold most of the kernel's."""
    (launch,) = (v for v in aot.launches(80, torch.bfloat16, 128, [MODE]) if v.kernel.__name__ == "row_stats_bwd_kernel")
    report = aot.report(aot.compiled(launch, 80), 80)
    assert 0 < report.loop_matrix <= report.matrix
    assert report.mufu > 0
