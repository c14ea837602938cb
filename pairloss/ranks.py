"""The ranks that a batch is spread over, and what a loss asks of them. Without :func:`pairloss.distributed` a batch is one rank's.

Every rank differentiates its own copy of the loss. The backward pass of each exchange is its transpose, so that together they
differentiate the sum of the copies: a row's gradient is that of the loss times the number of ranks, which averaging over ranks, as
DistributedDataParallel and FSDP do with parameters, takes back. A scalar that all ranks share gets the loss's gradient itself.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

STRATEGIES = ("gather", "ring")

Rows = list[Any]  # tensors with one entry per row along the first dimension, or None
_current: "Ranks | None" = None


def current() -> "Ranks | None":
    return _current


def total(values: Tensor) -> Tensor:
    """The sum of the values, per rank of one shape, over all ranks."""
    return values if _current is None else _Total.apply(values, _current)


def gathered(rows: Tensor) -> Tensor:
    """The rows of all ranks."""
    return rows if _current is None else _Gathered.apply(rows, _current)


def count(rows: int) -> int:
    """How many rows the ranks have together."""
    return rows if _current is None else _current.sizes(rows)[-1]


def first(rows: int) -> int:
    """How many rows the ranks before this one have."""
    return 0 if _current is None else _current.sizes(rows)[_current.rank]


def numbers(rows: Tensor) -> Tensor:
    """[N]: which of the rows of all ranks these are."""
    own = torch.arange(rows.shape[0], device=rows.device)
    return own if _current is None else own + first(rows.shape[0])


def shared(scalar: Tensor) -> Tensor:
    """A scalar, or another tensor, that is the same on all ranks."""
    return scalar if _current is None else _Shared.apply(scalar, _current)


class Place(NamedTuple):
    """Where a block of rows stands, and what it is to be compared with."""

    start: int  # its first row among those of all ranks
    own: int | None  # where this rank's rows begin in it
    is_own: bool  # it holds nothing else
    mine: slice  # the rows of this rank that are compared with it


ALL = slice(None)


@dataclass
class Ranks:
    """A process group during one call of a loss."""

    group: Any
    strategy: str
    signature: str  # of the call: what must be the same on all ranks
    agreed: bool = False  # on the signature

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group)

    def agree(self) -> None:
        """Refuses calls that differ between ranks; what a call exchanges first says so."""
        if not self.agreed:
            self.sizes(0)

    def sizes(self, rows: int) -> list[int]:
        """Where each rank's rows begin, and at last how many there are."""
        # Where the group can talk on the CPU, no device is waited for.
        device = "cpu" if "cpu:" in dist.get_backend_config(self.group) else f"cuda:{torch.cuda.current_device()}"
        mine = torch.tensor([_hash(self.signature), rows], device=device)
        all_of_them = [torch.empty_like(mine) for _ in range(self.size)]
        with self._talking():
            dist.all_gather(all_of_them, mine, group=self.group)
        hashes, counts = torch.stack(all_of_them).T.tolist()
        self.agreed = True
        if len(set(hashes)) > 1:
            self._refuse()
        return [0, *itertools.accumulate(counts)]

    def _refuse(self) -> None:
        signatures: list[Any] = [None] * self.size
        with self._talking():
            dist.all_gather_object(signatures, self.signature, group=self.group)
        other, theirs = next((i, s) for i, s in enumerate(signatures) if s != signatures[0])
        raise ValueError(
            f"pairloss.distributed: expected the same call on all ranks, got {signatures[0]} on rank 0, {theirs} on rank {other}"
        )

    @contextmanager
    def _talking(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(f"pairloss.distributed: rank {self.rank} of {self.size} lost contact with another rank: {error}") from error

    def sum(self, values: Tensor) -> Tensor:
        self.agree()
        values = values.contiguous().clone()
        with self._talking():
            dist.all_reduce(values, group=self.group)
        return values

    def gather(self, rows: Rows, starts: Sequence[int]) -> Rows:
        return [None if v is None else self._gather(v.contiguous(), starts) for v in rows]

    def _gather(self, rows: Tensor, starts: Sequence[int]) -> Tensor:
        result = rows.new_empty(starts[-1], *rows.shape[1:])
        parts = [result[a:b] for a, b in itertools.pairwise(starts)]
        with self._talking():
            if len({len(part) for part in parts}) == 1:
                # Its name since torch 2.13, which warns of the older one.
                all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
                all_gather(result, rows, group=self.group)
                return result
            parts[self.rank].copy_(rows)
            sources = [(part, dist.get_global_rank(self.group, i)) for i, part in enumerate(parts) if len(part)]
            for work in [dist.broadcast(part, source, group=self.group, async_op=True) for part, source in sources]:
                work.wait()
        return result

    def scatter(self, rows: Rows, starts: Sequence[int], merge: Callable[[Rows, Rows], Rows]) -> Rows:
        """This rank's share of rows of all ranks, merged over what every rank has of it."""
        sizes = [b - a for a, b in itertools.pairwise(starts)]
        mine = sizes[self.rank]
        parts: list[Rows] = [[] for _ in sizes]
        for v in rows:
            received = None if v is None else v.new_empty(mine * self.size, *v.shape[1:])
            if v is not None:
                with self._talking():
                    dist.all_to_all_single(received, v.contiguous(), [mine] * self.size, sizes, group=self.group)
            for i, part in enumerate(parts):
                part.append(None if received is None else received[i * mine : (i + 1) * mine])
        result = parts[0]
        for part in parts[1:]:
            result = merge(result, part)
        return result

    def visit(
        self, rows: Rows, starts: Sequence[int], compute: Callable[[Rows, Place], Any], merge: Any = None, once: bool = False
    ) -> Rows:
        """compute(block of rows, its place) for blocks that cover the rows of all ranks; what it returns for the block's rows, tensors
        with one entry for each of them, is merged (by default added) and comes back to the rank that they belong to.

        gather: one block. ring: one of each rank, the next of which is under way while one is computed with. once: of two ranks only
        one visits the other's rows, or each half of the pairs.
        """
        if self.size == 1:
            return compute(rows, Place(0, 0, True, ALL)) or []
        merge = merge or added
        return (self._visit_gathered if self.strategy == "gather" else self._visit_round)(rows, starts, compute, merge, once)

    def _visit_gathered(self, rows: Rows, starts: Sequence[int], compute: Any, merge: Any, once: bool) -> Rows:
        held, n = self.gather(rows, starts), starts[-1]
        result: Rows = []
        for end, place in self._once(starts) if once else [(n, Place(0, starts[self.rank], False, ALL))]:
            part = compute(_rows(held, place.start, end), place) or []
            if (place.start, end) == (0, n):
                result = part
                continue
            result = result or [None] * len(part)
            for i, v in enumerate(part):
                if v is not None:
                    result[i] = v.new_zeros(n, *v.shape[1:]) if result[i] is None else result[i]
                    result[i][place.start : end] = v
        return self.scatter(result, starts, merge) if result else []

    def _visit_round(self, rows: Rows, starts: Sequence[int], compute: Any, merge: Any, once: bool) -> Rows:
        block, result, last = rows, None, self.size // 2 if once else self.size - 1
        for step in range(last + 1):
            owner = (self.rank - step) % self.size
            wait_for_block = self.shift(block, 1, owner - 1, starts) if step < last else None
            end, place = starts[owner + 1], Place(starts[owner], 0 if step == 0 else None, step == 0, ALL)
            if once and 2 * step == self.size:
                end, place = self._half(owner, starts)
            before = place.start - starts[owner]
            part = compute(_rows(block, before, end - starts[owner]), place)
            if part:
                part = [v if v is None or not before else torch.cat([v.new_zeros(before, *v.shape[1:]), v]) for v in part]
                part = part if result is None else merge(result(), part)
                by = 1 if step < last else -step  # with the block, at last home
                result = self.shift(part, by, owner - by, starts)
            if wait_for_block is not None:
                block = wait_for_block()
        return result() if result is not None else []

    def _once(self, starts: Sequence[int]) -> list[tuple[int, Place]]:
        """(end, place) of the rows that this rank visits: its own, those of half of the other ranks, going back from it, and of one that
        is as far either way half of the pairs.
        """
        own, first = starts[self.rank], self.rank - (self.size - 1) // 2
        before = [(starts[first], own)] if first >= 0 else [(0, own), (starts[first % self.size], starts[-1])]
        result = [(starts[self.rank + 1], Place(own, 0, True, ALL))]
        result += [(end, Place(begin, None, False, ALL)) for begin, end in before if self.size > 2]
        return result if self.size % 2 else [*result, self._half((self.rank - self.size // 2) % self.size, starts)]

    def _half(self, owner: int, starts: Sequence[int]) -> tuple[int, Place]:
        """The first half of the lower rank's rows is compared by itself, the second by the other."""
        begin, end, own = starts[owner], starts[owner + 1], starts[self.rank + 1] - starts[self.rank]
        if self.rank < owner:
            return end, Place(begin, None, False, slice(own // 2))
        return end, Place(begin + (end - begin) // 2, None, False, ALL)

    def shift(self, rows: Rows, by: int, owner: int, starts: Sequence[int]) -> Callable[[], Rows]:
        """Starts to send rows to the rank that is `by` further on and to receive as many tensors, with the rows of `owner`."""
        after, before = (dist.get_global_rank(self.group, (self.rank + step) % self.size) for step in (by, -by))
        owner %= self.size
        coming = starts[owner + 1] - starts[owner]
        sent = [None if v is None else v.contiguous() for v in rows]
        received = [None if v is None else v.new_empty(coming, *v.shape[1:]) for v in rows]
        sends = [dist.P2POp(dist.isend, v, after, self.group) for v in sent if v is not None and v.numel()]
        receives = [dist.P2POp(dist.irecv, v, before, self.group) for v in received if v is not None and v.numel()]
        with self._talking():
            works = dist.batch_isend_irecv(sends + receives) if sends or receives else []

        def wait() -> Rows:
            with self._talking():
                for work in works:
                    work.wait()
            sent.clear()  # until here they must live
            return received

        return wait


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def _rows(rows: Rows, begin: int, end: int) -> Rows:
    return [None if v is None else v[begin:end] for v in rows]


def added(a: Rows, b: Rows) -> Rows:
    """Entry by entry, None being nothing."""
    return [v if u is None else u if v is None else u + v for u, v in zip(a, b, strict=True)]


@contextmanager
def spread(ranks: Ranks) -> Iterator[None]:
    """Losses within are those of the batch that is spread over the ranks."""
    global _current
    before, _current = _current, ranks
    try:
        yield
    finally:
        _current = before


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.sum(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.ranks.sum(grad), None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks, ctx.starts = ranks, ranks.sizes(rows.shape[0])
        return ranks.gather([rows], ctx.starts)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.ranks.scatter([grad], ctx.starts, added)[0], None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scalar: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return scalar.view_as(scalar)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.ranks.sum(grad) / ctx.ranks.size, None
