"""Compiles the shipped Triton kernels for GPUs that need not be there, and shows what their machine code costs.

    python bench/aot.py [--arch 80 90 100] [--dtype bf16 fp16 fp32] [--dim 64 128 256 512]
    python bench/aot.py --sweep [--arch 90] [--dtype bf16] [--dim 128] [--kernel grads]

One line per variant: registers and shared memory, spills (local memory loads and stores, in all and inside loops), matrix
instructions and MUFU (the exponentials). The launchers themselves are run, on CPU tensors, with the launch replaced: a
variant has the types and the alignment that a real call gives it. TRITON_INTERPRET must be unset.

--sweep compiles other tiles in place of the shipped one, marked *, and ranks them by an estimate: the clocks that the busiest
unit of a multiprocessor (RATES) needs for 1,000 pairs, of tiles whose pairs are all in one set and none left out. That is a
lower bound, which takes enough warps to fill every wait; "in turn" adds up the products and what the next busiest unit does.
Tiles that spill come last. Of row_stats_fwd, tiles with rows whole and in steps are compared.
"""

import argparse
import itertools
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from pairloss.kernels import launch as host
from pairloss.kernels import tiles
from sass import Code, count
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


class Rates(NamedTuple):
    """What a multiprocessor does in a clock. Lanes are those of the table of arithmetic throughput in the CUDA C++ Programming Guide."""

    matrix: int  # FLOP on dense bfloat16, from the data sheets: TFLOP/s / multiprocessors / boost clock
    fma: int  # lanes: float32 add, multiply, fused multiply-add
    alu: int  # lanes: compare, minimum, integer add, logic, conversions
    mufu: int  # lanes: exp2 and the like
    shared: int  # bytes of shared memory: 32 banks of 4
    l2: float  # bytes: 5,120 for all of A100 (its white paper), and assumed of the others, where nothing is published


ISSUE = 4  # warp instructions a clock: a scheduler in each quarter of a multiprocessor (architecture white papers)
RATES = {
    80: Rates(2048, 64, 64, 16, 128, 5120 / 108),  # A100: 312 / 108 / 1.41 GHz
    90: Rates(4096, 128, 64, 16, 128, 5120 / 132),  # H100 SXM: 989 / 132 / 1.83 GHz
    100: Rates(8192, 128, 64, 16, 128, 5120 / 148),  # B200: 2,250 / 148 / 1.85 GHz; mufu and shared as in FlashAttention-4
}
ALU = "FMNMX3?|FSETP?|FSEL|ISETP|SEL|IADD3?|IMNMX|VIADD|VIADDMNMX|VIMNMX3?|LEA|LOP3|PLOP3|SHF|PRMT|F2FP|MOV"
TABLES = {"row_stats_fwd": "FORWARD", "grads": "BACKWARD", "weights": "WEIGHTS"}
SWEPT = ("ids, bias", "ids")  # the hardest first: a tile that spills there isn't compiled for the others
# Numbers that a thread of a swept tile may hold: of the tile, and with the gradient, which Blackwell keeps in a memory of its own.
# Below, warps have little to do between barriers; above, all tiles spill.
PAIRS_A_THREAD = range(16, 65)
SUMS_A_THREAD = 160

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
    programs: int  # that a multiprocessor can hold at a time
    code: Code = field(repr=False)


@dataclass(frozen=True)
class Candidate:
    tile: tiles.Tile
    reports: dict[str, Report]  # by mode
    spills: dict[str, int]  # that every tile runs into
    clocks: dict[str, dict[str, float]]  # of what doesn't spill: by mode, see clocks

    @property
    def warps(self) -> int:
        """Resident on a multiprocessor."""
        return self.tile.num_warps * min(seen.programs for seen in self.reports.values())

    @property
    def rank(self) -> tuple[bool, float, int]:
        estimate = sum(max(busy.values()) for busy in self.clocks.values())
        return any(self.spills.values()), round(estimate), -self.warps


def launches(arch: int, dtype: torch.dtype, d: int, modes: Iterable[str]) -> Iterator[Launch]:
    """Every kernel that the modes run for rows of d columns."""
    n = 2048  # as many as are put in label order
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
                host.pair_sum_fwd_bwd(call, mode, "softplus", True, None, needs)
                host.pair_sum_fwd_bwd(call, mode, "softplus", True, torch.zeros(n), [True, True, False, True, True])
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

    with mock.patch.object(host, "_launch", record_launch), mock.patch.object(tiles, "limits", return_value=_limits(arch)):
        yield record


def _limits(arch: int) -> tiles.Limits:
    return tiles.Limits(arch, SHARED_MEMORY[arch] - tiles.RESERVED)


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
        code = Code.of(_tool("nvdisasm", "--print-code", cubin.name))
    match = re.search(r"REG:(\d+)", usage)
    assert match is not None
    registers, meta = int(match[1]), kernel.metadata
    everywhere, in_loops = code.opcodes(range(len(code.instructions))), code.opcodes(set().union(*code.loops()))
    return Report(
        registers=registers,
        shared=meta.shared,
        spills=count("LDL|STL", everywhere),
        loop_spills=count("LDL|STL", in_loops),
        matrix=count(MATRIX[arch], everywhere),
        loop_matrix=count(MATRIX[arch], in_loops),
        mufu=count("MUFU", everywhere),
        programs=_programs(registers, meta.num_warps, meta.shared, meta.tmem_size, arch),
        code=code,
    )


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([os.path.join(TOOLS, name), *arguments], capture_output=True, text=True, check=True).stdout


def _programs(registers: int, warps: int, shared: int, tensor_memory: int, arch: int) -> int:
    """Limits from the same table as SHARED_MEMORY. A warp's registers come by 256, a program takes 1 KiB of shared memory besides."""
    of_warps = (64 if arch in (80, 90, 100) else 48) // warps
    of_registers = 65536 // (-(-registers // 8) * 8 * 32 * warps)
    of_shared = (SHARED_MEMORY[arch] + 1024) // (shared + 1024)
    return min(of_warps, of_registers, of_shared, 512 // tensor_memory if tensor_memory else of_warps)


def executed(launch: Launch, seen: Report, arch: int) -> list[int]:
    """The instructions of a warp for a tile: the shortest way through its products and on to the next tile's, past the branches for
    pairs of both sets, pairs left out, and weights far apart."""
    code = seen.code
    product = MATRIX[arch] if seen.matrix else "FFMA2?"
    products = {number for number, opcode in enumerate(code.opcodes(range(len(code.after)))) if count(product, [opcode])}
    innermost = min((loop for loop in code.loops() if loop & products), key=len)
    way = min(filter(None, (code.shortest(number, {number}) for number in innermost & products)), key=len)
    if launch.tile.block_d is None:
        return way
    # That was a step of a product. Around it are the loop over tiles, or a program for each tile.
    first, outside = way[0], code.without(way)
    ends = {number for number, line in enumerate(code.instructions) if line == "EXIT"}
    tile = outside.shortest(first, {first}) or outside.shortest(0, {first}) + outside.shortest(first, ends)
    return tile + way * (_steps(launch) - 1)


def _steps(launch: Launch) -> int:
    return -(-launch.arguments["D"] // launch.arguments["BLOCK_D"])


def clocks(launch: Launch, seen: Report, arch: int) -> dict[str, float]:
    """That each unit of a multiprocessor is busy for 1,000 pairs, see executed."""
    rates, tile, way = RATES[arch], launch.tile, executed(launch, seen, arch)
    opcodes = seen.code.opcodes(way)
    d, size = _steps(launch) * launch.arguments["BLOCK_D"], launch.arguments["p_x"].element_size()
    pairs = tile.block_m * tile.block_n
    products = 2 if launch.kernel.__name__ == "grads_kernel" else 1

    # tcgen05 takes as long for 64 rows as for 128 (assumed), and reads its columns again for every 128.
    blocks = -(-tile.block_m // 128) if arch == 100 else tile.block_m / 128
    matrix = 2 * products * d * tile.block_n * 128 * blocks if seen.matrix else 0.0
    visited = tile.block_m if launch.kernel.__name__ == "row_stats_fwd_kernel" else tile.block_n
    loaded = d * size * (visited if tile.block_d is None else tile.block_m + tile.block_n)
    stored = pairs * size if "p_slab" in launch.arguments else 0
    read = 0.0  # from shared memory by matrix instructions; sm_80 loads registers first
    if arch == 100:  # the rows of the second product, weights, are in tensor memory
        read = d * size * (tile.block_m + products * tile.block_n * blocks)
    for line in (seen.code.instructions[number] for number in way):
        # wgmma, of four warps: 32 bytes of each column, and of 64 rows unless those are in registers
        if match := re.search(r"HGMMA\.64x(\d+)x\S+ R\d+, (gdesc)?", line):
            read += tile.num_warps / 4 * 32 * (int(match[1]) + (64 if match[2] else 0))
    # 128 bytes an access, or more where the lanes' words differ for certain; neighbours often load the same
    widths = [opcode.split(".")[-1] for opcode in opcodes if count("LDSM|STSM?", [opcode])]
    accesses = sum({"64": 2, "128": 4, "2": 2, "4": 4}.get(width, 1) for width in widths) + count("LDS|SHFL", opcodes)

    threads = 32 * tile.num_warps
    multiply_add = count("FADD|FMUL|FFMA", opcodes) + 2 * count("FADD2|FMUL2|FFMA2", opcodes)
    busy = {
        "matrix": matrix * size / 2 / rates.matrix,
        "mufu": threads * count("MUFU", opcodes) / rates.mufu,
        "fma": threads * (multiply_add / rates.fma + count("IMAD", opcodes) / rates.alu),
        "alu": threads * count(ALU, opcodes) / rates.alu,
        "issue": tile.num_warps * len(way) / ISSUE,
        "shared": (4 * threads * accesses + read + loaded) / rates.shared,
        "l2": (loaded + stored) / rates.l2,
    }
    return {unit: 1000 * value / pairs for unit, value in busy.items()}


def sweep(arch: int, dtype: torch.dtype, d: int, kernel: str, modes: Iterable[str], asked: Iterable[tiles.Tile]) -> list[Candidate]:
    """The tiles asked for, best first, without those that don't fit. To save time, more stages of what spills are left out."""
    candidates: list[Candidate] = []
    for tile in sorted(asked, key=lambda tile: (tile.num_stages, str(tile))):
        if any(other.tile._replace(num_stages=tile.num_stages) == tile and any(other.spills.values()) for other in candidates):
            continue
        candidate = Candidate(tile, {}, {}, {})
        for mode in modes:
            with mock.patch.object(tiles, TABLES[kernel], (tiles.Row(tiles.ANY, 32, tiles.ANY, tile, ""),)):
                launch = next(v for v in launches(arch, dtype, d, [mode]) if v.kernel.__name__ == f"{kernel}_kernel")
            seen = candidate.reports[mode] = report(compiled(launch, arch), arch)
            # Programs that write weights are done with a tile when they end.
            candidate.spills[mode] = seen.spills if kernel == "weights" else seen.loop_spills
            if candidate.spills[mode] or not seen.programs:
                break
            candidate.clocks[mode] = clocks(launch, seen, arch)
        if candidate.warps:
            candidates.append(candidate)
    return sorted(candidates, key=lambda candidate: candidate.rank)


def shipped(arch: int, dtype: torch.dtype, d: int, kernel: str) -> tiles.Tile | None:
    with mock.patch.object(tiles, "limits", return_value=_limits(arch)):
        backward, tile = (tiles.choose(table, d, dtype, torch.device("cpu")) for table in (tiles.BACKWARD, getattr(tiles, TABLES[kernel])))
    return None if kernel == "weights" and backward else tile


def grid(arch: int, dtype: torch.dtype, d: int, kernel: str, tile: tiles.Tile) -> list[tiles.Tile]:
    """The tile and others like it."""
    result = {tile}
    steps = {tile.block_d, None if kernel == "row_stats_fwd" else tile.block_d}
    sizes = (32, 64, 128, 256)
    rows = sizes if arch < 90 or dtype == torch.float32 else sizes[1:]  # wgmma and tcgen05 take 64 at least
    for m, n, step, warps, stages in itertools.product(rows, sizes, steps, (4, 8), (2, 3, 4)):
        other = tiles.Tile(m, n, step, warps, stages)
        sums = m * n + (m * tiles.padded(d) if kernel == "grads" and arch < 100 else 0)
        if (
            m * n // (32 * warps) in PAIRS_A_THREAD
            and sums // (32 * warps) <= SUMS_A_THREAD
            and (kernel != "row_stats_fwd" or n % m == 0)
            and (step is not None or stages < 4)  # 4 stages are compiled as 3 are
            and tiles.operand_bytes(other, d, dtype, kernel == "row_stats_fwd") <= _limits(arch).shared_memory
        ):
            result.add(other)
    return list(result)


def print_sweep(arch: int, name: str, d: int, kernel: str, modes: Sequence[str]) -> None:
    dtype = DTYPES[name]
    tile = shipped(arch, dtype, d, kernel)
    if tile is None:
        return
    columns = "  ".join(f"{mode:>13} bound  in turn" for mode in modes)
    print(
        f"{kernel}, sm_{arch}, {name}, D = {d}\n           tile warps stages  regs  shared  spills  warps resident  {columns}", flush=True
    )
    for candidate in sweep(arch, dtype, d, kernel, modes, grid(arch, dtype, d, kernel, tile)):
        m, n, block_d, warps, stages = candidate.tile
        registers, shared = (max(getattr(seen, of) for seen in candidate.reports.values()) for of in ("registers", "shared"))
        line = f"{'*' if candidate.tile == tile else ' '} {f'{m}x{n}x{block_d}':>13} {warps:5} {stages:6} {registers:5} {shared:7}"
        line += f" {max(candidate.spills.values()):7} {candidate.warps:15}"
        for busy in candidate.clocks.values():
            bound = max(busy, key=lambda unit: busy[unit])
            beside = max(value for unit, value in busy.items() if unit != "matrix")
            line += f"  {busy[bound]:13.1f} {bound:6} {busy['matrix'] + beside:7.1f}"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], choices=sorted(SHARED_MEMORY))
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--dim", type=int, nargs="+", default=list(DIMS))
    parser.add_argument("--mode", nargs="+", choices=MODES, help="all; of a sweep: " + " and ".join(SWEPT))
    parser.add_argument("--kernel", default="", help="only kernels with this in their name")
    parser.add_argument("--sweep", action="store_true", help="rank other tiles")
    options = parser.parse_args()
    if options.sweep and not set(options.arch) <= set(RATES):
        parser.error(f"a sweep knows the rates of {sorted(RATES)}")
    cases = itertools.product(options.arch, options.dtype, options.dim)
    if options.sweep:
        for arch, name, d in cases:
            for kernel in TABLES:
                if options.kernel in kernel:
                    print_sweep(arch, name, d, kernel, options.mode or SWEPT)
        return
    print(f"{'kernel':26} {'mode':13} sm  dtype    D  {'tile':>13} warps stages  regs  shared  spills in loops  matrix  MUFU")
    for arch, name, d in cases:
        for launch in launches(arch, DTYPES[name], d, options.mode or MODES):
            kernel = launch.kernel.__name__.removesuffix("_kernel")
            if options.kernel not in kernel:
                continue
            tile = launch.tile
            shape = f"{tile.block_m}x{tile.block_n}x{launch.arguments.get('BLOCK_D')}"
            head = f"{kernel:26} {launch.mode:13} {arch:3} {name} {d:5} {shape:>13} {tile.num_warps:5} {tile.num_stages:6}"
            result = report(compiled(launch, arch), arch)
            print(
                f"{head} {result.registers:5} {result.shared:7} {result.spills:7} {result.loop_spills:8} {result.matrix:7} {result.mufu:5}",
                flush=True,
            )


if __name__ == "__main__":
    main()
