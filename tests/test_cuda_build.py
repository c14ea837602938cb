"""What nvcc makes of the engine "cuda" for GPUs that need not be there: no warning, no spill."""

import shutil
import sys
from pathlib import Path

import pytest
from conftest import INTERPRETED

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import cuda_aot

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="nothing here is interpreted"),
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc not found"),
]


# Float16 and Bfloat16 differ in one instruction.
@pytest.mark.parametrize("dtype", ["double", "float", "Bfloat16"])
def test_no_warnings_and_no_spills(dtype):
    seen = cuda_aot.reports(90, dtype)
    assert len(seen) == 6, "row_stats of two scores; gradients of two scores and of terms, terms without gradients"
    for report in seen:
        assert report.spill_bytes == 0, report
        blocks = 2 if report.owns_gradient or dtype == "double" else 3
        assert report.registers * 128 * blocks <= 65536, f"fewer blocks on a multiprocessor than the launch bounds say: {report}"


def test_kernels_around_the_pairs():
    seen = cuda_aot.reports(90, cuda_aot.AROUND)
    assert len({report.kernel for report in seen}) == 7
    for report in seen:
        assert report.spill_bytes == 0, report
