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


def shared(scalar: Tensor) -> Tensor:
    """A scalar, or another tensor, that is the same on all ranks."""
    return scalar if _current is None else _Shared.apply(scalar, _current)


class Place(NamedTuple):
    """Where a block of rows stands."""

    start: int  # its first row among those of all ranks
    own: int | None  # where this rank's rows begin in it
    is_own: bool  # it holds nothing else


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

    def visit(self, rows: Rows, starts: Sequence[int], compute: Callable[[Rows, Place], Any], merge: Any = None) -> Rows:
        """compute(block of rows, its place) for blocks that cover the rows of all ranks; what it returns for the block's rows, tensors
        with one entry for each of them, is merged (by default added) and comes back to the rank that they belong to.

        gather: one block. ring: one of each rank, the next of which is under way while one is computed with.
        """
        if self.size == 1:
            return compute(rows, Place(0, 0, True)) or []
        merge = merge or added
        if self.strategy == "gather":
            part = compute(self.gather(rows, starts), Place(0, starts[self.rank], False))
            return self.scatter(part, starts, merge) if part else []
        block, result = rows, None
        for step in range(self.size):
            owner, following = (self.rank - step) % self.size, (self.rank - step - 1) % self.size
            coming = starts[following + 1] - starts[following]
            wait_for_block = self._shift(block, coming) if step + 1 < self.size else None
            part = compute(block, Place(starts[owner], 0 if step == 0 else None, step == 0))
            if part:
                result = self._shift(part if result is None else merge(result(), part), coming)
            if wait_for_block is not None:
                block = wait_for_block()
        return result() if result is not None else []

    def _shift(self, rows: Rows, coming: int) -> Callable[[], Rows]:
        """Starts to send rows to the next rank and to receive as many tensors, of `coming` rows, from the one before."""
        after, before = (dist.get_global_rank(self.group, (self.rank + step) % self.size) for step in (1, -1))
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
