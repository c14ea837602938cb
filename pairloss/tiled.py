"""The engine "torch": tiles of PyTorch operations, on any device, in O(N D) memory.

Fused: products, biases, the pair left out, label masks, log-sums; never materialised: more than one tile of pairs.
x against itself visits only tiles on and above the diagonal: each gives its row sums to its rows and its column sums
to its columns, and in backward both roles of a pair, W_ij + W_ji, come from one exponential.

exp2 is the cheaper exponential. A whole tile shares one shift where its values lie close enough together that nothing
is lost; shifts come off in natural units, before anything is rounded.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from . import engines, order, selection
from . import pairs as pair_tiles
from .engines import Call, Statistics, SumsAndGrads, normalised, weights_of, with_logs, zero_grads
from .pairs import LOG2E, Pairs, Role, Tile

# A logarithm costs as much as the product: one serves 2^HALVINGS terms 1 + e^z, whose product float32 holds up to this z.
HALVINGS, MULTIPLIED = 3, 10.0
SETS = ("positives", "negatives")


def why_not(call: Call) -> str | None:
    return None


def label_order_pays(call: Call) -> bool:
    return pair_tiles.on_host(call) and engines.label_order_pays(call)


def arranges(call: Call) -> bool:
    return False


scaled_rows_fwd, scaled_rows_bwd = order.scaled_rows_fwd, order.scaled_rows_bwd
own_products_fwd, own_products_bwd = selection.own_products_fwd, selection.own_products_bwd


def row_stats_fwd(call: Call) -> Statistics:
    pairs = Pairs(call)
    rows = _Sums(pairs, call.x.shape[0])
    cols = rows if call.symmetric else _Sums(pairs, call.candidates.shape[0] if call.both_sides else 0)

    for tile in pairs.tiles():
        z, _ = pairs.logits(tile)
        to_cols = tile.mirrored or call.both_sides
        shift = pairs.value_shift(z)
        pairs.leave_out(z, tile)
        if shift is None:
            for k, zk in pairs.split(z, tile, -math.inf):
                rows.add(k, tile.i, *pairs.exp_sum(zk, 1))
                if to_cols:
                    cols.add(k, tile.j, *pairs.exp_sum(zk, 0))
        else:
            e = pairs.exp_(z, shift)
            for k, ek in pairs.split(e, tile, 0.0):
                rows.add(k, tile.i, shift, ek.sum(1))
                if to_cols:
                    cols.add(k, tile.j, shift, ek.sum(0))
    row_sums = normalised(rows.s, rows.m)
    return with_logs(row_sums, row_sums.new_empty(*row_sums.shape[:2], 0) if call.symmetric else normalised(cols.s, cols.m))


def row_stats_bwd(
    call: Call, row_sums: Tensor, row_grads: Tensor, col_sums: Tensor, col_grads: Tensor, needs: list[bool]
) -> list[Tensor | None]:
    pairs = Pairs(call)
    rows = _Weights(pairs, weights_of(row_sums, row_grads))
    cols = rows if call.symmetric else _Weights(pairs, weights_of(col_sums, col_grads)) if call.both_sides else None

    dx, dy, _, drow_bias, dcol_bias = grads = zero_grads(call, needs)
    to_y, to_col_bias = (dx, drow_bias) if call.symmetric else (dy, dcol_bias)

    for tile in pairs.tiles():
        z, derivative = pairs.logits(tile)
        pairs.leave_out(z, tile)
        a = _pair_weights(pairs, tile, z, rows, cols)
        off_diagonal = tile.mirrored or not call.symmetric
        if drow_bias is not None:
            drow_bias[tile.i] += a.sum(1)
        if to_col_bias is not None and off_diagonal:
            to_col_bias[tile.j] += a.sum(0)
        w = a if derivative is None else a.mul_(derivative)
        if dx is not None:
            dx[tile.i].addmm_(w, pairs.y[tile.j])
        if to_y is not None and off_diagonal:
            to_y[tile.j].addmm_(w.T, pairs.x[tile.i])
    return grads


def pair_sum_fwd_bwd(call: Call, over: str, term: str, with_sums: bool, weights: Tensor | None, needs: list[bool]) -> SumsAndGrads:
    pairs = Pairs(call)
    wanted = SETS.index(over)
    sums = call.x.new_zeros(call.x.shape[0]) if with_sums else None
    dx, dy, _, drow_bias, dcol_bias = grads = zero_grads(call, needs)
    to_y = dx if call.symmetric else dy
    for tile in pairs.tiles(wanted):
        total: Tensor | None = None
        for role in pairs.roles(tile):
            if weights is not None:
                w = _slopes(role.z, over, term, pairs.buffer(role.spare, tile))
                w = pairs.only_(w, tile, wanted).mul_(weights[role.anchors].unsqueeze(role.dim))
                if drow_bias is not None:
                    drow_bias[role.anchors] += w.sum(role.dim)
                total = w if total is None else total.add_(w)
            if sums is not None:
                sums[role.anchors] += _term_sums(pairs, tile, role, over, term)
        if total is None:
            continue
        if dcol_bias is not None:
            dcol_bias[tile.j] += total.sum(0)
        if dx is not None:
            dx[tile.i].addmm_(total, pairs.y[tile.j])
        if to_y is not None:  # on the diagonal too: there, a tile is not its own transpose
            to_y[tile.j].addmm_(total.T, pairs.x[tile.i])
    return sums, grads


def _slopes(z: Tensor, over: str, term: str, out: Tensor) -> Tensor:
    """The derivatives of the terms in z."""
    if term == "linear":
        return out.fill_(1)
    return torch.neg(z, out=out).sigmoid_().neg_() if over == "positives" else torch.sigmoid(z, out=out)


def _term_sums(pairs: Pairs, tile: Tile, role: Role, over: str, term: str) -> Tensor:
    """The sums of the terms of each anchor. Overwrites z."""
    wanted = SETS.index(over)
    z = role.z.neg_() if term == "softplus" and over == "positives" else role.z
    if term == "softplus" and pairs.host and z.amax().item() <= MULTIPLIED:
        return _log1p_sum(pairs.only_(z.mul_(LOG2E).exp2_(), tile, wanted), role.dim)
    values = logsigmoid(z.neg_()).neg_() if term == "softplus" else z  # not softplus: that is the identity from 20 on
    return pairs.only_(values, tile, wanted).sum(role.dim)


def _log1p_sum(e: Tensor, dim: int) -> Tensor:
    """Sum of log(1 + e) over a dimension, with one logarithm for 2^HALVINGS: (1 + a)(1 + b) - 1 = a + b + a b keeps the digits of small e.

    Overwrites e.
    """
    for _ in range(HALVINGS):
        if e.shape[dim] % 2:
            break
        a, b = e.chunk(2, dim)
        e = a.addcmul_(a, b).add_(b)
    return e.log1p_().sum(dim)


def _pair_weights(pairs: Pairs, tile: Tile, z: Tensor, rows: "_Weights", cols: "_Weights | None") -> Tensor:
    """A: the row's weight times exp(z) plus the column's; may overwrite z."""
    sets = range(pairs.num_sets) if tile.only is None else [tile.only]
    shift = None
    if pairs.host:
        ranges = [rows.range[k][tile.row] for k in sets] + ([cols.range[k][tile.col] for k in sets] if cols else [])
        shift = pair_tiles.shift(min(low for low, _ in ranges), max(high for _, high in ranges))
    if shift is not None:  # one exponential serves both roles
        outer = [
            _outer_sum(rows.shifted(k, tile.i, shift), cols.shifted(k, tile.j, shift) if cols else None, pairs.buffer(1 + k, tile))
            for k in sets
        ]
        e = pairs.exp_(z, shift)
        if not pairs.bounded:  # a pair without weight on either side may be anything: 0 * inf is NaN
            e.clamp_(max=torch.finfo(e.dtype).max)
        # lerp takes either end exactly
        return e.mul_(outer[0] if len(outer) == 1 else torch.lerp(outer[1], outer[0], pairs.same(tile), out=outer[1]))
    w = rows.exact(pairs, tile, z, tile.i, 1)
    return w if cols is None else w.add_(cols.exact(pairs, tile, z, tile.j, 0))


def _outer_sum(row: Tensor, col: Tensor | None, out: Tensor) -> Tensor:
    return out.copy_(row[:, None]) if col is None else torch.add(row[:, None], col[None, :], out=out)


class _Sums:
    """Running sums of exp(z) per set and row, as s e^m."""

    def __init__(self, pairs: Pairs, n: int) -> None:
        self.bounded = pairs.bounded
        self.s = pairs.x.new_zeros(pairs.num_sets, n)
        self.m = torch.full_like(self.s, 0.0 if self.bounded else torch.finfo(self.s.dtype).min)

    def add(self, k: int, rows: slice, shift: float | Tensor, total: Tensor) -> None:
        s, m = self.s[k, rows], self.m[k, rows]
        if self.bounded:
            s += total
            return
        # Not the shift of a tile in which the row has nothing: it would drown what the row has elsewhere.
        top = torch.where(total == 0, m, torch.maximum(m, torch.as_tensor(shift, dtype=m.dtype, device=m.device)))
        s.mul_((m - top).exp_()).add_(total * (shift - top).clamp_(max=0).exp_())
        m.copy_(top)


class _Weights:
    """The weights of one side, g e^-m: what backward multiplies a pair's exp(z) with."""

    def __init__(self, pairs: Pairs, weights: Tensor) -> None:
        self.g, self.m = weights
        none = self.g == 0
        self.range = [pairs.ranges(self.m[k], none[k]) for k in range(pairs.num_sets)] if pairs.host else []
        self.unshifted = self._shifted(slice(None), 0.0)

    def shifted(self, k: int, rows: slice, shift: float) -> Tensor:
        """The weights times exp(shift), as plain numbers."""
        return (self.unshifted[:, rows] if shift == 0 else self._shifted(rows, shift))[k]

    def _shifted(self, rows: slice, shift: float) -> Tensor:
        g = self.g[:, rows]
        return torch.where(g == 0, 0, g * (shift - self.m[:, rows]).exp_())

    def exact(self, pairs: Pairs, tile: Tile, z: Tensor, rows: slice, dim: int) -> Tensor:
        """A_ij of one side with a shift of its own for each pair: right however far the log-sums lie apart."""
        g, m = (v[:, rows].unsqueeze(1 + dim) for v in (self.g, self.m))
        if tile.only is not None:
            return pairs.exp_(z.clone(), m[tile.only]).mul_(g[tile.only])
        same = pairs.same(tile).bool()
        return pairs.exp_(z.clone(), torch.where(same, m[0], m[1])).mul_(torch.where(same, g[0], g[1]))
