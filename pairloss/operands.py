"""What the engines with kernels of their own prepare and reduce around them, "cuda" more of it than "triton" (kernels/vectors.py). O(N D)
PyTorch, no host synchronisation."""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from .engines import Call, normalised

# Partial sums per row: O(N) memory, and 48 * 49 / 2 programs keep 108, 132 or 148 multiprocessors busy in whole waves.
GROUPS = 48
# |z| up to which e^z needs no shift: 2^46 of them still sum in float32, and e^-32 keeps all its digits.
NO_SHIFT = 32.0
# Stands for the maximum of an empty set: finite, so that no inf - inf arises.
LOWEST = -1e38
SETS = ("positives", "negatives")


class Sums:
    """Sums of e^z per group, set and row, held as s e^m."""

    def __init__(self, like: Tensor, groups: int, sets: int, n: int, bounded: bool) -> None:
        self.bounded = bounded
        self.s = like.new_zeros(groups, sets, n)
        self.m = torch.zeros_like(self.s) if bounded else torch.full_like(self.s, LOWEST)

    def total(self) -> Tensor:
        """[2, K, n]: s and m over all groups."""
        if self.bounded:
            return normalised(self.s.sum(0), torch.zeros_like(self.s[0]))
        top = self.m.amax(0)
        return normalised(self.m.sub_(top).exp_().mul_(self.s).sum(0), top)


def padded(rows: Tensor, multiple: int) -> Tensor:
    """Contiguous, with columns of zeros up to a multiple of so many."""
    missing = -rows.shape[1] % multiple
    return (pad(rows, (0, missing)) if missing else rows).contiguous()


def ranks(ids_x: Tensor | None, ids_y: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The ids as int32 that are equal where they are: compared in half the registers of int64."""
    if ids_x is None:
        return None, None
    ids = (ids_x if ids_y is None else torch.cat([ids_x, ids_y])).sort().values
    return torch.searchsorted(ids, ids_x, out_int32=True), None if ids_y is None else torch.searchsorted(ids, ids_y, out_int32=True)


def scale(steepest: Tensor | float, *weights: Tensor) -> Tensor:
    """A power of two that takes the largest weight times the score's steepest slope to about 2^13: no pair's overflows float16,
    and those down to 2^-27 of the largest keep all its digits."""
    g = torch.cat([v.flatten() for v in weights])
    top = _largest(torch.where(g.isfinite(), g, 0)) * steepest
    return torch.exp2(torch.floor(13 - torch.log2(top.clamp(min=2.0**-100))))


def steepest(call: Call) -> Tensor | float:
    """A bound on the score's slope, from |s_ij| <= |x| |y|."""
    if call.score == "linear":
        return 1.0
    longest_x, longest_y = (_largest(torch.linalg.vector_norm(rows, dim=1, dtype=call.dtype)) for rows in (call.x, call.candidates))
    return abs(call.gamma) * ((longest_x * longest_y).nan_to_num() + 1 + abs(call.m))


def _largest(values: Tensor) -> Tensor:
    """The greatest magnitude, 0 of nothing."""
    return pad(values, (0, 1)).abs().amax()


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


def weight_ranges(weights: Tensor, block: int) -> Tensor:
    """[2, K, T]: least and greatest m of the weights g e^-m that are not 0; inf, -inf where all are."""
    g, m = weights
    return tile_ranges(torch.where(g == 0, math.inf, m), torch.where(g == 0, -math.inf, m), block)


def tile_ranges(low: Tensor, high: Tensor, block: int) -> Tensor:
    """[2, ..., T]: least and greatest of every tile of the last dimension."""
    limits = (-math.inf, math.inf) if low.is_floating_point() else (torch.iinfo(low.dtype).min, torch.iinfo(low.dtype).max)
    missing = (0, -low.shape[-1] % block)
    lows = pad(low, missing, value=limits[1]).unflatten(-1, (-1, block)).amin(-1)
    highs = pad(high, missing, value=limits[0]).unflatten(-1, (-1, block)).amax(-1)
    return torch.stack([lows, highs])
