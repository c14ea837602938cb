"""The shipped tiles in machine code, for GPUs that need not be there: bench/aot.py holds the tools."""

import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("TRITON_INTERPRET is set: Triton's functions are not compiled in this process", allow_module_level=True)

from pairloss.kernels.tiles import Tile

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import aot

# What takes most registers: labels and a running maximum forward; labels, both roles of a pair and biases or slopes backward.
FORWARD = [("row_stats_fwd", "ids, any tau", arch, d) for arch, d in ((80, 128), (90, 128), (90, 256), (90, 512), (100, 128))]
BACKWARD = [("grads", "ids, bias", arch, d) for d in (64, 128, 256) for arch in (80, 90, 100)]
SLAB = [("weights", mode, arch, 512) for mode in ("ids, bias", "circle") for arch in (80, 90, 100)]
CIRCLE = [("row_stats_fwd", "circle", 90, 128), *(("grads", "circle", arch, d) for arch, d in ((80, 128), (90, 128), (100, 256)))]
PAIR_SUM = [("pair_sum_fwd", "positives", 90, 128), ("grads", "positives", 80, 256), ("grads", "positives", 90, 128)]


def launched(kernel: str, mode: str, arch: int, d: int) -> aot.Launch:
    return next(v for v in aot.launches(arch, torch.bfloat16, d, [mode]) if v.kernel.__name__ == f"{kernel}_kernel")


def report(kernel: str, mode: str, arch: int, d: int) -> aot.Report:
    return aot.report(aot.compiled(launched(kernel, mode, arch, d), arch), arch)


@pytest.mark.parametrize(("kernel", "mode", "arch", "d"), FORWARD + BACKWARD + SLAB + CIRCLE + PAIR_SUM)
def test_no_spills_in_loops_and_matrix_units_are_used(kernel, mode, arch, d):
    seen = report(kernel, mode, arch, d)
    assert seen.loop_spills == 0, seen
    assert kernel != "weights" or seen.spills == 0, seen  # a program is one tile
    assert seen.matrix > 0, seen
    assert seen.shared <= aot.SHARED_MEMORY[arch], seen


@pytest.mark.parametrize(("kernel", "mode", "arch", "d"), FORWARD)
def test_a_barrier_between_two_tiles_additions_to_the_same_sums(kernel, mode, arch, d):
    launch = launched(kernel, mode, arch, d)
    seen = aot.report(aot.compiled(launch, arch), arch)
    assert "BAR.SYNC.DEFER_BLOCKING" in seen.code.opcodes(aot.executed(launch, seen, arch))


AROUND = [("scaled_rows", "rows"), ("scaled_rows_backward", "rows"), ("centred_weights", "ids, any tau")]
AROUND += [(kernel, "circle") for kernel in ("total", "largest", "scaled_weights", "id_ranges")]


@pytest.mark.parametrize(("kernel", "mode"), AROUND)
@pytest.mark.parametrize(("arch", "d"), [(80, 128), (90, 1024), (100, 128)])
def test_kernels_around_the_pairs_do_not_spill(kernel, mode, arch, d):
    assert report(kernel, mode, arch, d).spills == 0


def test_loops_are_found():
    """Or the test above would pass whatever spills: the products of the backward pass are in its loop over tiles."""
    seen = report("grads", "ids, bias", 80, 128)
    assert seen.loop_matrix == seen.matrix


@pytest.mark.parametrize(("kernel", "mode", "d", "products"), [("row_stats_fwd", "ids", 512, 1), ("grads", "ids, bias", 128, 2)])
def test_sweep_counts_what_a_tile_executes(kernel, mode, d, products):
    """A product in steps, in a loop within the loop over tiles, and both products of the backward pass."""
    tile = launched(kernel, mode, 80, d).tile
    (candidate,) = aot.sweep(80, torch.bfloat16, d, kernel, [mode], [tile])
    seen, busy = candidate.reports[mode], candidate.clocks[mode]
    launch = launched(kernel, mode, 80, d)
    executed = seen.code.opcodes(aot.executed(launch, seen, 80))
    flop = 2 * 16 * 8 * 16  # of mma.m16n8k16
    assert executed.count("HMMA.16816.F32.BF16") * flop * tile.num_warps == 2 * products * tile.block_m * tile.block_n * d
    assert busy["matrix"] == pytest.approx(1000 * 2 * products * d / 2048)
    # One exponential a pair, and those of rows and columns: all branches together have four times as many.
    assert 1 <= busy["mufu"] / (1000 / 16) < 1.5
    assert replace(candidate, spills={mode: 1}).rank > candidate.rank


def test_sweep_finds_the_tile_where_its_product_begins_before_the_loop():
    """As on sm_100, where the way back to that product by the loop over rows, past all tiles, is the shorter one."""
    (candidate,) = aot.sweep(100, torch.bfloat16, 128, "row_stats_fwd", ["ids"], [Tile(64, 64, None, 8, 2)])
    assert candidate.clocks["ids"]["mufu"] == pytest.approx(1000 / 16)


@pytest.mark.parametrize("d", [64, 512])
@pytest.mark.parametrize("dtype", aot.DTYPES.values(), ids=str)
def test_launchers_give_kernels_their_parameters(dtype, d):
    """And no others, which Triton refuses: its interpreter drops them."""
    for launch in aot.launches(90, dtype, d, aot.MODES):
        assert set(launch.arguments) == {parameter.name for parameter in launch.kernel.params}, launch.kernel.__name__
