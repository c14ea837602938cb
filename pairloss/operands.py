"""What the engines with kernels of their own, "triton" and "cuda", prepare around them alike. O(N D) PyTorch, no host synchronisation."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from .engines import Call

# Partial sums per row: O(N) memory, and 48 * 49 / 2 programs keep 108, 132 or 148 multiprocessors busy in whole waves.
GROUPS = 48
# |z| up to which e^z needs no shift: 2^46 of them still sum in float32, and e^-32 keeps all its digits.
NO_SHIFT = 32.0
# Stands for the maximum of an empty set: finite, so that no inf - inf arises.
LOWEST = -1e38
SETS = ("positives", "negatives")
# Of a vector, for a program of 128 threads. csrc/cuda/engine.h has it too.
ENTRIES = 1024


class Sums:
    """Sums of e^z per group, set and row, held as s e^m."""

    def __init__(self, like: Tensor, groups: int, sets: int, n: int, bounded: bool) -> None:
        self.bounded = bounded
        self.s = like.new_zeros(groups, sets, n)
        self.m = torch.zeros_like(self.s) if bounded else torch.full_like(self.s, LOWEST)


def cdiv(n: int, size: int) -> int:
    return -(-n // size)


def padded(rows: Tensor, multiple: int) -> Tensor:
    """Contiguous, with columns of zeros up to a multiple of so many."""
    missing = -rows.shape[1] % multiple
    return (pad(rows, (0, missing)) if missing else rows).contiguous()


def ranks(call: Call) -> tuple[Tensor | None, Tensor | None]:
    """The ids as int32 that are equal where they are: compared in half the registers of int64."""
    ids_x, ids_y = call.ids_x, call.ids_y
    if ids_x is None:
        return None, None
    ids = ids_x if ids_y is None else torch.cat([ids_x, ids_y])
    if ids_y is not None or not call.ids_ascend:
        ids = ids.sort().values
    return torch.searchsorted(ids, ids_x, out_int32=True), None if ids_y is None else torch.searchsorted(ids, ids_y, out_int32=True)


def norm_beside(rows: Tensor, norm: Tensor) -> Tensor:
    """A temperature may be on the CPU: by value, which waits for nothing."""
    return norm if norm.device == rows.device else torch.full((), norm.item(), dtype=norm.dtype, device=rows.device)


def scaled_weights(
    call: Call, sides: list[tuple[Tensor | None, Tensor]], largest: Callable[..., None], scaled: Callable[..., None]
) -> tuple[list[Tensor], Tensor]:
    """Of each side's sums and their gradients (without sums: of weights) the weights, scaled, and what takes the scale off again. By two
    kernels: largest(sums, grads, to) of each ENTRIES, and scaled(sums, grads, largest, steepest, to, unscale)."""
    slope = steepest(call)
    given = [(None if sums is None else sums.contiguous(), grads.contiguous()) for sums, grads in sides]
    parts = [cdiv(grads.numel(), ENTRIES) for _, grads in given]
    tops, unscale = call.x.new_empty(sum(parts), dtype=call.dtype), call.x.new_empty((), dtype=call.dtype)
    for side, top in zip(given, tops.split(parts), strict=True):
        largest(*side, top)
    weights = [torch.empty_like(grads if sums is None else sums) for sums, grads in given]
    for side, to in zip(given, weights, strict=True):
        scaled(*side, tops, slope, to, unscale)
    return weights, unscale


def steepest(call: Call) -> Tensor | None:
    """A bound on the score's slope, from |s_ij| <= |x| |y|; None: 1."""
    if call.score == "linear":
        return None
    sides = (call.x,) if call.y is None else (call.x, call.y)
    longest = [pad(torch.linalg.vector_norm(rows, dim=1, dtype=call.dtype), (0, 1)).amax() for rows in sides]  # 0 of no rows
    return abs(call.gamma) * ((longest[0] * longest[-1]).nan_to_num() + (1 + abs(call.m)))


def visits(over: int, range_x: Tensor, range_y: Tensor) -> Tensor:
    """[3, T_X] of begin, length and count: a tile row visits `count` tile columns in order, skipping `length` of them from `begin`
    on, and meets all pairs of the set; in label order, no tile that the ranges rule out."""
    (low_x, high_x), t_y = range_x, range_y.shape[1]
    least_from = range_y[0].flip(0).cummin(0).values.flip(0)
    greatest_to = range_y[1].cummax(0).values
    if over == 0:  # from the first tile that reaches up to the row's labels to the last that reaches down to them
        first = torch.searchsorted(greatest_to, low_x, out_int32=True)
        last = torch.searchsorted(least_from, high_x, right=True, out_int32=True)
        return torch.stack([torch.zeros_like(first), first, (last - first).clamp(min=0)])
    # all but those, next to each other, that have the row tile's one label alone
    first = torch.searchsorted(least_from, low_x, out_int32=True)
    last = torch.searchsorted(greatest_to, low_x, right=True, out_int32=True)
    length = torch.where(low_x == high_x, (last - first).clamp(min=0), 0)
    return torch.stack([first, length, t_y - length])
