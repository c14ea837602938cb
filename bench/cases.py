"""What is timed: our loss forward and backward, the naive way, and the three matrix products alone that the naive way needs."""

from collections.abc import Callable
from typing import NamedTuple

import torch

import pairloss
from pairloss import reference

TAU = 0.1
CLASSES = 10


class Case(NamedTuple):
    n: int
    d: int
    dtype: torch.dtype

    @property
    def id(self) -> str:
        return f"N{self.n}-D{self.d}-{str(self.dtype).removeprefix('torch.')}"


def providers(case: Case, device: str, backend: str | None = None) -> dict[str, Callable[[], None]]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(case.n, case.d, generator=generator).to(device, case.dtype)
    labels = torch.randint(0, CLASSES, (case.n,), generator=generator).to(device)

    def ours() -> None:
        pairloss.snnl(features.detach().requires_grad_(), labels, TAU, backend=backend).backward()

    def naive() -> None:
        reference.snnl(features.detach().requires_grad_(), labels, TAU).backward()

    def products() -> None:
        s = features @ features.T
        s @ features
        s.T @ features

    return {"pairloss": ours, "naive": naive, "products": products}
