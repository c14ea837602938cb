"""The tile table: which tile, how many warps and pipeline stages serve rows of D columns. Checked by bench/aot.py.

PAIRLOSS_AUTOTUNE=1 times a row's tile and its others at the first call of a kind (D, a dtype, the sizes to a power of two) and takes
the fastest, which may be another one, with other last bits, in the next process.
"""

import logging
import os
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
import triton

from .. import engines

AUTOTUNE = os.environ.get("PAIRLOSS_AUTOTUNE") == "1"
_logger = logging.getLogger(__name__)
_fastest: dict[Hashable, "Tile"] = {}


class Tile(NamedTuple):
    block_m: int
    block_n: int
    block_d: int | None  # columns per step of a product; None: all of D at once, held in shared memory
    num_warps: int
    num_stages: int


class Row(NamedTuple):
    """A tile and what it serves. why: what the numbers of bench/aot.py decided; nothing here has been timed yet."""

    max_d: float
    bits: int  # widest element
    newest: float  # architecture, as 10 * major + minor
    tile: Tile
    why: str
    others: tuple[Tile, ...] = ()  # near it or better by the estimate of bench/aot.py --sweep, on one of its architectures
    spills: tuple[str, ...] = ()  # with what it does: "circle", the score, "bias", the gradient of a bias beside exponentials


class Limits(NamedTuple):
    """What a device allows."""

    architecture: int
    shared_memory: int  # bytes that the operands of one program can have


ANY = float("inf")
# Shared memory besides the operands: sums that cross warps, barriers.
RESERVED = 8 << 10

# The first row that fits serves. block_n is a multiple of block_m: x against itself visits blocks of block_n rows.
FORWARD = (
    Row(
        *(256, 16, 90, Tile(64, 128, None, 8, 2)),
        "128 x 128 spills, and 64 x 128 with 4 warps",
        (Tile(64, 64, None, 4, 2), Tile(64, 128, None, 8, 3), Tile(32, 128, None, 4, 2)),
    ),
    Row(
        *(512, 16, 90, Tile(64, 64, None, 8, 2)),
        "64 x 128 doesn't fit",
        (Tile(64, 128, 64, 8, 3), Tile(64, 128, 64, 8, 2)),
    ),
    Row(
        *(ANY, 16, 90, Tile(64, 128, 64, 8, 3)),
        "any D: a plain blocked product",
        (Tile(64, 128, 64, 8, 2), Tile(64, 64, 64, 4, 3)),
    ),
    Row(
        *(256, 16, ANY, Tile(64, 64, None, 8, 2)),
        "64 x 128 spills on sm_100",
        (Tile(64, 64, None, 8, 3), Tile(64, 64, 64, 8, 3)),
    ),
    Row(
        *(ANY, 16, ANY, Tile(64, 64, 64, 8, 3)),
        "as above",
        (Tile(64, 64, 64, 8, 2), Tile(64, 64, 64, 8, 4)),
    ),
    Row(
        *(ANY, 32, ANY, Tile(64, 64, 32, 4, 3)),
        "ieee products run on the plain cores: short unrolled loops",
        (Tile(32, 64, 32, 4, 2), Tile(32, 128, 32, 8, 3), Tile(64, 64, 32, 8, 3)),
    ),
)
# The gradient of block_m rows stays in registers.
BACKWARD = (
    Row(
        *(64, 16, 89, Tile(128, 32, None, 8, 3)),
        "64 x 64 and 128 x 64 spill where there are biases",
        (Tile(64, 32, None, 4, 2), Tile(128, 32, None, 8, 2)),
    ),
    Row(
        *(128, 16, 89, Tile(64, 64, None, 4, 3)),
        "the next without spills is 20 % slower",
        (Tile(128, 32, None, 8, 2), Tile(64, 128, None, 8, 2), Tile(64, 64, None, 4, 2)),
        ("circle", "bias"),
    ),
    Row(*(128, 16, 89, Tile(128, 32, None, 8, 2)), "64 x 64 spills 5 times with biases, 12 with a circle", (Tile(32, 128, None, 4, 2),)),
    Row(
        *(256, 16, 89, Tile(64, 32, None, 4, 2)),
        "64 x 64 with 8 warps is 10 % slower",
        (Tile(64, 64, None, 8, 2), Tile(32, 64, None, 4, 2)),
        ("bias",),
    ),
    Row(*(256, 16, 89, Tile(32, 64, None, 4, 2)), "64 x 32 spills 25 times with biases", (Tile(64, 64, None, 8, 2),)),
    Row(
        *(128, 16, 90, Tile(128, 64, None, 8, 2)),
        "128 x 128 spills, and 128 x 64 with 3 stages and a circle's slopes, and this on sm_100",
        (Tile(64, 64, None, 4, 2), Tile(256, 32, None, 8, 2), Tile(128, 32, None, 8, 2)),
    ),
    Row(
        *(256, 16, ANY, Tile(128, 32, None, 8, 2)),
        "the gradient's 128 registers a thread leave room for 32 columns",
        (Tile(64, 32, None, 4, 2), Tile(64, 64, None, 8, 2), Tile(128, 32, None, 4, 2), Tile(256, 32, None, 8, 2)),
    ),
    Row(64, 32, ANY, Tile(64, 32, None, 8, 2), "4 warps spill; wider rows go through the slab, to the library's float32 product"),
)
# Larger D: weights into a slab, the library's product finishes.
WEIGHTS = (
    Row(
        *(ANY, 16, 90, Tile(128, 128, 64, 8, 3)),
        "the fewest bytes a pair, which bound it",
        (Tile(128, 128, 64, 8, 2), Tile(128, 64, 64, 8, 3), Tile(256, 64, 64, 8, 2)),
        ("circle",),
    ),
    Row(
        *(ANY, 16, ANY, Tile(128, 64, 64, 8, 3)),
        "128 x 128 spills with a circle's slopes and on sm_100, and doesn't fit sm_86",
        (Tile(128, 64, 64, 8, 2), Tile(64, 128, 64, 8, 3)),
    ),
    Row(
        *(ANY, 32, ANY, Tile(64, 64, 32, 4, 2)),
        "short unrolled loops, as in FORWARD",
        (Tile(64, 64, 32, 4, 3), Tile(128, 32, 32, 4, 2), Tile(128, 64, 32, 8, 2)),
    ),
)


# Of the kernels that go through rows once: so many numbers at a time, 16 a thread.
ROWS_TILE = 2048
WIDEST = 512


def of_rows(d: int) -> Tile:
    """block_m rows, block_d of their d columns at a time."""
    block_d = min(padded(d), WIDEST)
    return Tile(ROWS_TILE // block_d, 1, block_d, 4, 1)


def of_entries(block: int) -> Tile:
    """So many entries of a vector."""
    return Tile(block, 1, None, 4 if block >= 512 else 1, 1)


def override() -> int | None:
    """The tile that pairloss.testing.tile_size asks for, at least what tl.dot takes."""
    from ._math import INTERPRETED

    asked = engines.tile_size(0)
    if asked == 0:
        return None
    return 1 << (max(asked, 4 if INTERPRETED.value else 16) - 1).bit_length()


def padded(d: int) -> int:
    """The block that holds d columns."""
    return max(16, 1 << (d - 1).bit_length())


def choose(
    table: tuple[Row, ...],
    d: int,
    dtype: torch.dtype,
    device: torch.device,
    heavy: tuple[str, ...] = (),
    kind: Hashable = None,
    launch: Callable[[Tile], Any] | None = None,
) -> Tile | None:
    """The first tile of the table that serves d columns of the dtype and fits the device, with the override's size; one that doesn't
    spill with what is heavy, if there is one.

    With a launch, and what is alike in all launches of its kind: under PAIRLOSS_AUTOTUNE=1 the fastest of its row.
    """
    asked, allowed = override(), limits(device)

    def fits(tile: Tile) -> bool:
        wasteful = tile.block_d is None and d > 256 and padded(d) > 1.25 * d
        return not wasteful and operand_bytes(tile, d, dtype, table is FORWARD) <= allowed.shared_memory

    def serves(row: Row) -> bool:
        return d <= row.max_d and 8 * dtype.itemsize <= row.bits and allowed.architecture <= row.newest and fits(row.tile)

    serving = sorted(filter(serves, table), key=lambda row: not set(heavy).isdisjoint(row.spills))
    if not serving:
        return None
    row = serving[0]
    if asked is not None:
        return row.tile._replace(block_m=asked, block_n=asked)
    if not AUTOTUNE or launch is None:
        return row.tile
    key = (kind, padded(d), dtype, device)
    if key not in _fastest and can_wait(device):
        seconds = {tile: seconds_of(launch, tile) for tile in (row.tile, *filter(fits, row.others))}
        _fastest[key] = min(seconds, key=lambda tile: seconds[tile])
        _logger.info("%s: %s", key, ", ".join(f"{tile} {1e3 * taken:.3g} ms" for tile, taken in seconds.items()))
    return _fastest.get(key, row.tile)


def can_wait(device: torch.device) -> bool:
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def seconds_of(launch: Callable[[Tile], Any], tile: Tile) -> float:
    """Infinite where the tile takes more than the device has, or Triton fails to compile it."""
    try:
        return 1e-3 * triton.testing.do_bench(lambda: launch(tile), warmup=10, rep=50, return_mode="median")
    except Exception as reason:
        _logger.warning("%s is left out: %s: %s", tile, type(reason).__name__, reason)
        return float("inf")


def operand_bytes(tile: Tile, d: int, dtype: torch.dtype, forward: bool) -> int:
    """Shared memory that the operands of a tile take, with all stages of the pipeline in flight. Of rows that are held whole one side
    stays: forward the columns, whose sums do."""
    m, n, block_d, _, stages = tile
    if block_d is not None:
        return stages * (m + n) * block_d * dtype.itemsize
    return (n + stages * m if forward else m + stages * n) * padded(d) * dtype.itemsize


def limits(device: torch.device) -> Limits:
    if device.type != "cuda":
        return Limits(80, 1 << 30)
    properties = torch.cuda.get_device_properties(device)
    return Limits(10 * properties.major + properties.minor, properties.shared_memory_per_block_optin - RESERVED)
