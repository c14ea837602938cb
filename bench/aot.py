"""Compiles the shipped Triton kernels for GPUs that need not be there, and shows what their machine code costs.

    python bench/aot.py [--arch 80 90 100] [--dtype bf16 fp16 fp32] [--dim 64 128 256 512]

One line per variant: registers and shared memory, spills (local memory loads and stores, in all and inside loops), matrix
instructions and MUFU (the exponentials). The launchers themselves are run, on CPU tensors, with the launch replaced: a
variant has the types and the alignment that a real call gives it. TRITON_INTERPRET must be unset.
"""

import argparse
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from pairloss.kernels import launch as host
from pairloss.kernels import tiles
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from pairloss.engines import Call

TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DIMS = (64, 128, 256, 512)
MODES = ("all", "ids", "ids, any tau", "ids, bias", "two sets", "both sides", "circle", "cutoff", "positives", "negatives", "rows")
# Shared memory that one program can have, bytes: CUDA C++ Programming Guide, table of technical specifications.
SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
# The matrix instruction of the architecture: mma, wgmma, tcgen05.
MATRIX = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTC[A-Z]*MMA", 120: "HMMA"}
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}


@dataclass(frozen=True)
class Launch:
    """A kernel with the arguments that a launcher gave it."""

    mode: str
    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]
    tile: tiles.Tile


@dataclass(frozen=True)
class Report:
    registers: int
    shared: int
    spills: int  # LDL and STL
    loop_spills: int  # those between the target of a backward branch and the branch
    matrix: int
    loop_matrix: int
    mufu: int


def launches(arch: int, dtype: torch.dtype, d: int, modes: Iterable[str]) -> Iterator[Launch]:
    """Every kernel that the modes run for rows of d columns."""
    n = 512
    x, y, ids = torch.zeros(n, d), torch.zeros(n, d), torch.zeros(n, dtype=torch.int64)
    everything = Call(x, None, None, None, None, 0, None, None, dtype, logit_bound=20.0)
    calls = {
        "all": everything,
        "ids": everything._replace(ids_x=ids),
        "ids, any tau": everything._replace(ids_x=ids, logit_bound=float("inf")),
        "ids, bias": everything._replace(ids_x=ids, row_bias=torch.zeros(n), logit_bound=float("inf")),
        "two sets": everything._replace(y=y, ids_x=ids, ids_y=ids, self_offset=None),
        "both sides": everything._replace(y=y, both_sides=True, self_offset=None),
        "circle": everything._replace(ids_x=ids, score="circle", m=0.25, gamma=256.0, logit_bound=float("inf")),
        "cutoff": everything._replace(y=y, cutoff=torch.tensor(0.5), self_offset=None),
        # sums of pairs: x against itself with both roles and a bias, and two sets without ids
        "positives": everything._replace(ids_x=ids, row_bias=torch.zeros(n)),
        "negatives": everything._replace(y=y, row_bias=torch.zeros(n), col_bias=torch.zeros(n), self_offset=None),
    }
    assert {*calls, "rows"} == set(MODES)
    for mode in modes:
        call = calls.get(mode, everything)
        needs = [True, False, False, call.row_bias is not None, False]
        with _recorded(arch) as record:
            if mode == "rows":
                given = x.to(dtype), torch.ones(()), torch.arange(n)
                host.scaled_rows_fwd(*given, dtype)
                host.scaled_rows_bwd(*given, x)
            elif mode in ("positives", "negatives"):
                host.pair_sum_fwd(call, mode, "softplus")
                host.pair_sum_bwd(call, mode, "softplus", torch.zeros(n), needs)
            else:
                host.row_stats_fwd(call)
                rows, cols = torch.zeros(2, call.num_sets, n), torch.zeros(2, call.num_sets, n if call.both_sides else 0)
                host.row_stats_bwd(call, rows, rows[0], cols, cols[0], needs)
        for kernel, arguments, options, tile in record:
            yield Launch(mode, kernel, arguments, options, tile)


@contextmanager
def _recorded(arch: int) -> Iterator[list[tuple[Any, dict[str, Any], dict[str, Any], tiles.Tile]]]:
    record: list[tuple[Any, dict[str, Any], dict[str, Any], tiles.Tile]] = []

    def record_launch(kernel: Any, grid: tuple[int, ...], tile: tiles.Tile, arguments: dict[str, Any]) -> None:
        record.append((kernel, arguments, host.launch_options(tile), tile))

    with (
        mock.patch.object(host, "_launch", record_launch),
        mock.patch.object(tiles, "limits", return_value=tiles.Limits(arch, SHARED_MEMORY[arch] - tiles.RESERVED)),
    ):
        yield record


def compiled(launch: Launch, arch: int) -> CompiledKernel:
    """The variant that the launch would compile on a GPU of this architecture."""
    signature, constexprs, attributes = {}, {}, {}
    for position, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constexprs[parameter.name] = value
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32"
            # N, M and the tile counts of a real call may be anything.
            if value % 16 == 0 and parameter.name in ("D", "stride_slab"):
                attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)


def report(kernel: CompiledKernel, arch: int) -> Report:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", cubin.name)
        sass = _tool("nvdisasm", cubin.name)
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None
    lines = sass.splitlines()
    in_loop = _loop_lines(lines)

    def count(instruction: str, where: Iterable[int]) -> int:
        return sum(re.search(rf"\b{instruction}\b", lines[number]) is not None for number in where)

    everywhere = range(len(lines))
    return Report(
        registers=int(registers[1]),
        shared=kernel.metadata.shared,
        spills=count("(LDL|STL)", everywhere),
        loop_spills=count("(LDL|STL)", in_loop),
        matrix=count(MATRIX[arch], everywhere),
        loop_matrix=count(MATRIX[arch], in_loop),
        mufu=count("MUFU", everywhere),
    )


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([os.path.join(TOOLS, name), *arguments], capture_output=True, text=True, check=True).stdout


def _loop_lines(sass: list[str]) -> set[int]:
    """Lines that a branch back to an earlier label runs again."""
    labels = {match[1]: number for number, line in enumerate(sass) if (match := re.match(r"(\.L_x_\d+):", line))}
    inside: set[int] = set()
    for number, line in enumerate(sass):
        match = re.search(r"\bBRA\b.*?`\((\.L_x_\d+)\)", line)
        begin = labels.get(match[1], number) if match else number
        if begin < number - 1:  # a branch to itself is the end of the code
            inside.update(range(begin, number))
    return inside


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], choices=sorted(SHARED_MEMORY))
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--dim", type=int, nargs="+", default=list(DIMS))
    parser.add_argument("--mode", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--kernel", default="", help="only kernels with this in their name")
    options = parser.parse_args()
    print(f"{'kernel':26} {'mode':13} sm  dtype    D  {'tile':>13} warps stages  regs  shared  spills in loops  matrix  MUFU")
    for arch in options.arch:
        for name in options.dtype:
            for d in options.dim:
                for launch in launches(arch, DTYPES[name], d, options.mode):
                    kernel = launch.kernel.__name__.removesuffix("_kernel")
                    if options.kernel not in kernel:
                        continue
                    tile = launch.tile
                    shape = f"{tile.block_m}x{tile.block_n}x{launch.arguments.get('BLOCK_D')}"
                    head = f"{kernel:26} {launch.mode:13} {arch:3} {name} {d:5} {shape:>13} {tile.num_warps:5} {tile.num_stages:6}"
                    result = report(compiled(launch, arch), arch)
                    print(
                        f"{head} {result.registers:5} {result.shared:7} {result.spills:7} {result.loop_spills:8} "
                        f"{result.matrix:7} {result.mufu:5}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
