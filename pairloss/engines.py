"""The table of engines and the one place that chooses between them.

An engine is a module with ten functions; a new one is that module and a line in ENGINES:

    why_not(call) -> str | None                                why it can't run this call, None if it can
    label_order_pays(call) -> bool                             whether rows sorted by label make it faster
    arranges(call) -> bool                                     whether it normalises and sorts the rows, and forms totals and own pairs,
                                                               by itself: else call.norm, the orders and dnorm are None, call.totals and
                                                               call.own False
    row_stats_fwd(call)                                        sum of exp(z) over each set of each row (column), and its logarithm
        -> (rows, cols, row_sums, col_sums)
    row_stats_bwd(call, row_sums, row_grads, col_sums,         from A_ij = the weight of the pair's set in row i (and in column j),
        col_grads, needs)                                      its grad over its sum, times exp(z_ij); None where needs says so
        -> [dx, dy, dnorm, drow_bias, dcol_bias]
    pair_sum_fwd_bwd(call, over, term, with_sums,              sum of term(z) over one set of each row, None unless with_sums; and
        weights, needs)                                        with weights [N], which may be None, from W_ij = weights_i term'(z_ij)
        -> (sums [N], [dx, dy, dnorm, drow_bias, dcol_bias])
    scaled_rows_fwd(rows, norm, order, product_dtype) -> rows  where it doesn't arrange: rows of the given norm, row order[i] at place i, in
    scaled_rows_bwd(rows, norm, order, grad)                   norm's dtype, or rounded for the products already; and from their gradient,
        -> (drows, dnorm)                                      which it may overwrite, that of what came. order.py has these two for
                                                               engines that have none of their own
    own_products_fwd(call)                                     <x_i, y_i> of rows that stand beside each other, [N]; selection.py has
    own_products_bwd(call, weights, needs)                     these two for engines that have none of their own
        -> [dx, dy, dnorm]

In row_stats sums are [2, K, N] (columns: [2, K, M], M = 0 without both_sides): the sum is s e^m, a weight g e^-m likewise. The pair
spans any temperature, and unlike a rounded logarithm of the sum it gives weights that add up to 1. An empty set has the sum
0 e^0 and the weight 0. A weight of 0 may come with any m, and its pairs with any logit. Totals, of an engine that forms them, are two
more rows of `rows` and of row_grads.
"""

import functools
import importlib
import math
import os
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

ENGINES = {
    "triton": "pairloss.kernels",
    "cuda": "pairloss.cuda",
    "cpu": "pairloss.cpu",
    "torch": "pairloss.tiled",
}
REFERENCE = "reference"  # naive N x N under autograd: only by name, never chosen
BACKENDS = (REFERENCE, *ENGINES)
# The first engine of the row whose why_not is None serves the call.
PREFERENCE = {"cpu": ("cpu", "torch"), "cuda": ("triton", "cuda", "torch")}

# The one documented override: the backend of every call that names none.
DEFAULT_BACKEND = os.environ.get("PAIRLOSS_BACKEND") or None

# Set by pairloss.testing.tile_size.
_tile_override: int | None = None


Statistics = tuple[Tensor, Tensor, Tensor, Tensor]
SumsAndGrads = tuple[Tensor | None, list[Tensor | None]]


class Call(NamedTuple):
    """What an engine is asked for: the arguments of pairloss.ops.row_stats and pair_sum, checked."""

    x: Tensor
    y: Tensor | None
    norm: Tensor | None
    ids_x: Tensor | None
    ids_y: Tensor | None
    self_offset: int | None
    row_bias: Tensor | None
    col_bias: Tensor | None
    product_dtype: torch.dtype
    cutoff: Tensor | None = None
    score: str = "linear"
    m: float = 0.0
    gamma: float = 1.0
    both_sides: bool = False
    logit_bound: float = math.inf
    totals: bool = False
    own: bool = False  # of a pair sum
    # Which row of x, and of y, the anchors and candidates are, whose biases and ids come in this order; None: the rows as they come.
    order_x: Tensor | None = None
    order_y: Tensor | None = None
    ids_ascend: bool = False  # on both sides

    @property
    def symmetric(self) -> bool:
        return self.y is None

    @property
    def candidates(self) -> Tensor:
        return self.x if self.y is None else self.y

    @property
    def candidate_ids(self) -> Tensor | None:
        return self.ids_x if self.y is None else self.ids_y

    @property
    def dtype(self) -> torch.dtype:
        """Of statistics and biases."""
        return statistics_dtype(self.x)

    @property
    def num_sets(self) -> int:
        """2 with ids (positives, negatives), 1 without (everything)."""
        return 1 if self.ids_x is None else 2

    @property
    def num_stats(self) -> int:
        """Of a row: the log-sum of each set, and the two totals."""
        return self.num_sets + (2 if self.totals else 0)


def statistics_dtype(rows: Tensor) -> torch.dtype:
    return torch.float64 if rows.dtype == torch.float64 else torch.float32


def tile_size(default: int) -> int:
    return default if _tile_override is None else _tile_override


def label_order_pays(call: Call) -> bool:
    """For engines to take as theirs: from 2,048 rows on, or 4 tiles under pairloss.testing.tile_size."""
    return min(call.x.shape[0], call.candidates.shape[0]) >= 4 * tile_size(512)


def normalised(s: Tensor, m: Tensor) -> Tensor:
    """[2, K, N] of sums s e^m, with m the log-sum itself where float32 holds it to a quarter; an empty set: 0 e^0."""
    empty = s == 0
    log_sum = torch.where(m.abs() < 2.0**22, m + s.log(), m)
    return torch.stack([torch.where(empty, 0, s * (m - log_sum).exp()), torch.where(empty, 0, log_sum)])


def log_of(sums: Tensor) -> Tensor:
    s, m = sums
    return s.log() + m


def with_logs(row_sums: Tensor, col_sums: Tensor) -> Statistics:
    return log_of(row_sums), log_of(col_sums), row_sums, col_sums


def weights_of(sums: Tensor, grad: Tensor) -> Tensor:
    """grad * exp(z - log sum) = (grad / s) e^-m * exp(z)."""
    s, m = sums
    return torch.stack([(grad / s).masked_fill(s == 0, 0), m])


def zero_grads(call: Call, needs: list[bool]) -> list[Tensor | None]:
    """Of x, y, norm, row_bias and col_bias, where they are wanted."""
    inputs = (call.x, call.y, call.norm, call.row_bias, call.col_bias)
    return [
        torch.zeros_like(v, memory_format=torch.contiguous_format) if need and v is not None else None
        for v, need in zip(inputs, needs, strict=True)
    ]


def without_autocast(rows: Tensor) -> AbstractContextManager[None]:
    """The call says in which dtype to multiply; autocast must not change its mind."""
    device = rows.device.type  # the meta device has no autocast, and asking raises
    return torch.autocast(device, enabled=False) if device != "meta" and torch.is_autocast_enabled(device) else nullcontext()


@functools.cache
def load(name: str) -> ModuleType:
    return importlib.import_module(ENGINES[name])


def check_backend(backend: str | None) -> None:
    for name, value in (("backend", backend), ("PAIRLOSS_BACKEND", DEFAULT_BACKEND)):
        if value is not None and value not in BACKENDS:
            raise ValueError(f"{name}: expected one of {', '.join(map(repr, BACKENDS))} or None, got {value!r}")


def choose(call: Call, backend: str | None) -> ModuleType:
    """The engine for this call: the named one, or the first that can."""
    if backend is not None:
        engine = load(backend)
        reason = engine.why_not(call)
        if reason is not None:
            raise RuntimeError(f"backend={backend!r} can't run here: {reason}; the engines are {', '.join(BACKENDS)}")
        return engine
    names = PREFERENCE.get(call.x.device.type, ("torch",))
    return next(engine for engine in map(load, names) if engine.why_not(call) is None)
