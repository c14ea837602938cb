"""The tiles of a call and what is in them: products, logits, masks. What the engine "torch" (tiled.py) is made of."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .engines import Call, tile_size
from .reference import same_id

# One 512 x 512 float32 tile is 1 MiB: with its operands it stays in a core's L2. Elsewhere launches must be worth it.
CPU_TILE, DEVICE_TILE = 512, 2048

LOG2E = math.log2(math.e)
# float32 keeps full precision in exp down to e^-87: within this width of one another, all values of a tile may share a
# shift and still leave 14 digits below the smallest for the sums.
WIDTH = 55.0
# Values this close to 0 need no shift at all.
NO_SHIFT = 28.0


class Tile(NamedTuple):
    """Anchors [i0, i1) against candidates [j0, j1)."""

    i: slice
    j: slice
    row: int  # number of the tile row and column
    col: int
    only: int | None  # the one set that all pairs belong to (0 = positives, 1 = negatives), None: mixed
    left_out: int | None  # which diagonal of the tile is left out
    mirrored: bool  # x against itself, off the diagonal: the tile stands for its transpose too


class Role(NamedTuple):
    """One side of a tile's pairs as the anchors of a pair sum."""

    anchors: slice
    dim: int  # over which their candidates lie
    z: Tensor
    spare: int  # number of a buffer that is free


def shift(low: float, high: float) -> float | None:
    """One shift for values in [low, high], None if they lie too far apart (or are not numbers)."""
    if low >= -NO_SHIFT and high <= NO_SHIFT:
        return 0.0
    return (low + high) / 2 if high - low <= WIDTH else None


def on_host(call: Call) -> bool:
    """Whether values may steer the program without waiting for a device."""
    return call.x.device.type == "cpu"


def tile_rows(call: Call) -> int:
    return tile_size(CPU_TILE if on_host(call) else DEVICE_TILE)


class Pairs:
    """The tiles of a call and what is in them."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.num_sets = call.num_sets
        self.tile = tile_rows(call)
        self.host = on_host(call)
        self.x = call.x.to(call.product_dtype).to(call.x.dtype).contiguous()
        self.y = self.x if call.y is None else call.y.to(call.product_dtype).to(call.x.dtype).contiguous()
        # Small logits leave the product in units of log2(e) already, large ones would lose digits to that rounding.
        self.bounded = self._bound() <= NO_SHIFT
        self.unit = LOG2E if self.bounded else 1.0
        col_bias = call.row_bias if call.symmetric else call.col_bias
        self.row_bias, self.col_bias = (None if bias is None else bias * self.unit for bias in (call.row_bias, col_bias))
        self.ids_x, self.ids_y = self._ids()
        self.buffers = self.x.new_empty(4 if call.score == "linear" else 5, min(self.tile, len(self.x)) * min(self.tile, len(self.y)))

    def _bound(self) -> float:
        """Of |z|: what the caller vouches for, or |x| |y|, where looking is free."""
        if not self.host or self.call.row_bias is not None or self.call.col_bias is not None or self.call.score != "linear":
            return self.call.logit_bound
        if 0 in (len(self.x), len(self.y)):
            return 0.0
        longest = [torch.linalg.vector_norm(rows, dim=1).amax().item() for rows in ((self.x,) if self.call.symmetric else (self.x, self.y))]
        return longest[0] * longest[-1]

    def _ids(self) -> tuple[Tensor | None, Tensor | None]:
        """On the CPU labels become ranks in the features' dtype: exact, and compared four times as fast as int64."""
        ids_x, ids_y = self.call.ids_x, self.call.candidate_ids
        if ids_x is None or ids_y is None or ids_x.ndim > 1 or not self.host:
            return ids_x, ids_y
        _, ranks = torch.unique(ids_x if self.call.symmetric else torch.cat([ids_x, ids_y]), return_inverse=True)
        ranks = ranks.to(self.x.dtype)
        return ranks[: len(self.x)], ranks if self.call.symmetric else ranks[len(self.x) :]

    def ranges(self, values: Tensor, empty: Tensor | None = None) -> list[tuple[float, float]]:
        """(least, greatest) per tile of a vector on the host, without the entries that are empty."""
        low = values if empty is None else torch.where(empty, math.inf, values)
        high = values if empty is None else torch.where(empty, -math.inf, values)
        if not len(values):
            return []
        lows = torch.stack([part.amin() for part in low.split(self.tile)]).tolist()
        highs = torch.stack([part.amax() for part in high.split(self.tile)]).tolist()
        return list(zip(lows, highs, strict=True))

    def tiles(self, wanted: int | None = None) -> Iterator[Tile]:
        """All tiles, or those that can hold pairs of the set `wanted`."""
        labelled = self.ids_x is not None and self.ids_x.ndim == 1 and self.host
        ranges_x = self.ranges(self.ids_x) if labelled else None  # type: ignore[arg-type]
        ranges_y = ranges_x if self.call.symmetric else self.ranges(self.ids_y) if labelled else None  # type: ignore[arg-type]
        for row, i in enumerate(self._slices(len(self.x))):
            for col, j in enumerate(self._slices(len(self.y))):
                if self.call.symmetric and col < row:
                    continue
                only: int | None = None if self.num_sets == 2 else 0 if wanted is None else wanted
                if ranges_x is not None and ranges_y is not None:
                    (low_x, high_x), (low_y, high_y) = ranges_x[row], ranges_y[col]
                    if high_x < low_y or high_y < low_x:
                        only = 1
                    elif low_x == high_x == low_y == high_y:
                        only = 0
                if wanted is not None and only not in (None, wanted):
                    continue
                left_out = None if self.call.self_offset is None else self.call.self_offset + i.start - j.start
                if left_out is not None and not i.start - i.stop < left_out < j.stop - j.start:
                    left_out = None
                yield Tile(i, j, row, col, only, left_out, self.call.symmetric and col > row)

    def _slices(self, n: int) -> Iterator[slice]:
        return (slice(start, min(start + self.tile, n)) for start in range(0, n, self.tile))

    def buffer(self, number: int, tile: Tile) -> Tensor:
        """Memory for a tile's values, the same for every tile: fresh memory costs as much as what is done in it."""
        rows, cols = tile.i.stop - tile.i.start, tile.j.stop - tile.j.start
        return self.buffers[number, : rows * cols].view(rows, cols)

    def logits(self, tile: Tile) -> tuple[Tensor, Tensor | None]:
        """(z times the unit in buffer 0, the derivative of the score in buffer 4 or None where that is 1)."""
        derivative = None
        if self.call.score == "linear" and self.call.cutoff is None:
            z = self.product(tile, self.unit, self.col_bias)
            if self.row_bias is not None:
                z.add_(self.row_bias[tile.i, None])
            self.make_symmetric(z, tile)
            return z, None
        z = self.product(tile)
        self.make_symmetric(z, tile)
        if self.call.cutoff is not None:
            below = z < self.call.cutoff
            if tile.only is None:
                below &= self.same(tile) == 0
            if tile.only != 0 or self.num_sets == 1:
                z.masked_fill_(below, -math.inf)
        if self.call.score == "circle":
            z, derivative = self.circle_(z, tile)
        if self.unit != 1:
            z.mul_(self.unit)
        if self.row_bias is not None:
            z.add_(self.row_bias[tile.i, None])
        if self.col_bias is not None:
            z.add_(self.col_bias[tile.j])
        return z, derivative

    def product(self, tile: Tile, factor: float = 1.0, col_bias: Tensor | None = None) -> Tensor:
        """<x_i, y_j> times the factor plus the bias, in buffer 0."""
        x, y, out = self.x[tile.i], self.y[tile.j], self.buffer(0, tile)
        if col_bias is None:
            return torch.addmm(out, x, y.T, beta=0, alpha=factor, out=out)
        return torch.addmm(col_bias[tile.j], x, y.T, alpha=factor, out=out)

    def make_symmetric(self, z: Tensor, tile: Tile) -> None:
        if self.call.symmetric and not tile.mirrored:  # a product need not round z_ij and z_ji alike, but both stand for one pair
            z.copy_(torch.add(z, z.T, out=self.buffer(1, tile)).mul_(0.5))

    def circle_(self, s: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
        """(the circle score of s, over s; its derivative in buffer 4). Both are factor * (s - optimum) with the factor held."""
        m, gamma = self.call.m, self.call.gamma

        def factor(k: int, number: int) -> Tensor:
            out = self.buffer(number, tile)
            return (torch.sub(s, 1 + m, out=out).clamp_(max=0) if k == 0 else torch.add(s, m, out=out).clamp_(min=0)).mul_(gamma)

        optimum = (1 - m, m)
        if tile.only is not None:
            derivative = factor(tile.only, 4)
            return s.sub_(optimum[tile.only]).mul_(derivative), derivative
        positive, derivative = factor(0, 1), factor(1, 4)
        z = torch.sub(s, optimum[0], out=self.buffer(2, tile)).mul_(positive)
        same = self.same(tile)
        s.sub_(optimum[1]).mul_(derivative).lerp_(z, same)  # lerp takes either end exactly
        return s, derivative.lerp_(positive, same)

    def roles(self, tile: Tile) -> Iterator[Role]:
        """The tile's pairs with the rows as anchors, and, where it stands for its transpose too, with the columns."""
        s, bias = self.product(tile), self.call.row_bias
        z = self.buffer(1, tile).copy_(s) if bias is None else torch.add(s, bias[tile.i, None], out=self.buffer(1, tile))
        yield Role(tile.i, 1, z if self.call.col_bias is None else z.add_(self.call.col_bias[tile.j]), 2)
        if tile.mirrored:
            yield Role(tile.j, 0, s if bias is None else s.add_(bias[tile.j]), 1)

    def only_(self, values: Tensor, tile: Tile, wanted: int) -> Tensor:
        """The values with 0 at the pairs that are not in the set."""
        if tile.only is None:
            values.masked_fill_(self.same(tile) == wanted, 0)
        if tile.left_out is not None:
            values.diagonal(tile.left_out).fill_(0)
        return values

    def leave_out(self, z: Tensor, tile: Tile) -> None:
        if tile.left_out is not None:
            z.diagonal(tile.left_out).fill_(-math.inf)

    def exp_(self, z: Tensor, shift: float | Tensor) -> Tensor:
        """exp(logit - shift), over z. The shift comes off first, exactly: large parts cancel before anything is rounded."""
        if isinstance(shift, Tensor) or shift:
            z.sub_(shift * self.unit)
        return (z if self.bounded else z.mul_(LOG2E)).exp2_()

    def exp_sum(self, z: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """(m, sum of exp(logit - m)) with m the maximum, finite for an empty row."""
        m = z.amax(dim, keepdim=True).clamp_(min=torch.finfo(z.dtype).min)
        return m.squeeze(dim), self.exp_(z.clone(), m).sum(dim)

    def value_shift(self, z: Tensor) -> float | None:
        """One shift for all values of the tile, None if there is none (or, off the CPU, no way to know)."""
        if self.bounded:
            return 0.0
        if not self.host:
            return None
        low, high = z.aminmax()
        return shift(low.item(), high.item())

    def same(self, tile: Tile) -> Tensor:
        """1 where the ids agree, 0 elsewhere, in buffer 3."""
        assert self.ids_x is not None
        assert self.ids_y is not None
        ids_x, ids_y = self.ids_x[tile.i], self.ids_y[tile.j]
        if ids_x.ndim == 1 and self.host:
            return torch.eq(ids_x[:, None], ids_y[None, :], out=self.buffer(3, tile))
        return self.buffer(3, tile).copy_(same_id(ids_x, ids_y))

    def split(self, values: Tensor, tile: Tile, outside: float) -> Iterator[tuple[int, Tensor]]:
        """(set, the tile's values with `outside` at the pairs of the other set); may overwrite values."""
        if tile.only is not None:
            yield tile.only, values
            return
        same = self.same(tile)
        if outside == 0:
            positive = torch.mul(values, same, out=self.buffer(1, tile))
            yield 0, positive
            yield 1, values.sub_(positive)  # v - v or v - 0: exact
        else:
            mask = same.bool()
            yield 0, values.masked_fill(~mask, outside)
            yield 1, values.masked_fill(mask, outside)
