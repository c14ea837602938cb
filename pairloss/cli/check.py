"""pairloss check: every engine that runs here against the float64 truth."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
import typer
from rich.table import Table
from torch import Tensor

from .. import engines, snnl, testing
from ..prepare import METRICS
from . import errors
from .info import devices
from .measure import small_call

# What any order of the sums may cost, relative to the greatest entry of the truth.
FLOORS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# With tiles of 16: less than a tile, ragged tiles off the diagonal, whole ones in label order.
TILE = 16
SIZES = ((7, 5, 3), (50, 24, 4), (96, 33, 2))  # rows, columns, classes
TAU = 0.7
TENSORS = ("loss", "d features", "d tau")


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    metric: str
    size: tuple[int, int, int]


@dataclass(frozen=True)
class Error:
    """Of one tensor of one case, relative to max |truth|."""

    case: Case
    tensor: str
    found: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.found <= self.allowed  # false for NaN

    @property
    def badness(self) -> float:
        return self.found / self.allowed if self.found == self.found else float("inf")


def check(
    backend: Annotated[str | None, typer.Option(help="Only this engine, which must run here.")] = None,
    device: Annotated[str | None, typer.Option(help="Only this device: cpu, cuda or cuda:NUMBER.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Every case instead of the worst per dtype.")] = False,
) -> None:
    """Do the engines compute the right values here?

    Compares loss and gradients of every engine that runs here with plain PyTorch in float64.
    """
    failed = False
    with errors.reported():
        errors.choice("--backend", backend, tuple(engines.ENGINES))
        where = devices() if device is None else [errors.device(device)]
        console = errors.console()
        for on, name in itertools.product(where, engines.ENGINES if backend is None else [backend]):
            reasons = {dtype: engines.load(name).why_not(small_call(on, dtype)) for dtype in FLOORS}
            if None not in reasons.values():
                console.print(f"{name} on {on}: does not run here: {reasons[torch.float32]}", highlight=False)
                failed |= backend is not None
                continue
            found = list(compare(name, on, [dtype for dtype, reason in reasons.items() if reason is None]))
            failed |= not all(error.ok for error in found)
            console.print(table(name, on, found, verbose))
            for dtype, reason in reasons.items():
                if reason is not None:
                    console.print(f"{name} on {on}: no {dtype_name(dtype)}: {reason}", highlight=False)
        console.print("FAILED" if failed else "all ok", style="bold red" if failed else "bold green")
    if failed:
        raise typer.Exit(1)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def compare(backend: str, device: torch.device, dtypes: list[torch.dtype]) -> Iterator[Error]:
    """Ours against what plain PyTorch loses in the same dtype."""
    for dtype in dtypes:
        for case in itertools.starmap(Case, itertools.product([dtype], METRICS, SIZES)):
            features, labels = inputs(case, device)
            with testing.tile_size(TILE):
                ours = evaluate(features, labels, case, backend)
            eager = evaluate(features, labels, case, engines.REFERENCE)
            truth = evaluate(features.double(), labels, case, engines.REFERENCE)
            for name, a, b, t in zip(TENSORS, ours, eager, truth, strict=True):
                scale = t.abs().max()
                found, lost = ((v.double() - t).abs().max() / scale for v in (a, b))
                yield Error(case, name, found.item(), lost.item() + FLOORS[dtype])


def inputs(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    rows, columns, classes = case.size
    generator = torch.Generator().manual_seed(rows)
    labels = torch.randint(classes, (rows,), generator=generator)
    # Around a centre per class: of pure noise the gradient of tau is a small rest of large terms.
    centres = torch.randn(classes, columns, generator=generator)
    features = (centres[labels] + torch.randn(rows, columns, generator=generator)) / columns**0.5
    return features.to(device, case.dtype), labels.to(device)


def evaluate(features: Tensor, labels: Tensor, case: Case, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    features = features.clone().requires_grad_()
    # The same number in every dtype: halves are compared with statistics in float32.
    wide = torch.float64 if features.dtype == torch.float64 else torch.float32
    tau = torch.tensor(TAU, dtype=torch.float32, device=features.device).to(wide).requires_grad_()
    loss = snnl(features, labels, tau, metric=case.metric, backend=backend)
    to_features, to_tau = torch.autograd.grad(loss, (features, tau))
    return loss.detach(), to_features, to_tau


def table(backend: str, device: torch.device, found: list[Error], verbose: bool) -> Table:
    result = Table(title=f"{backend} on {device}: error relative to max |truth|", title_justify="left")
    for name, justify in (("dtype", "left"), ("case", "left"), ("tensor", "left"), ("error", "right"), ("allowed", "right"), ("", "left")):
        result.add_column(name, justify=justify)  # type: ignore[arg-type]
    for dtype in FLOORS:
        mine = [error for error in found if error.case.dtype == dtype]
        for error in mine if verbose else [max(mine, key=lambda e: e.badness)] if mine else []:
            rows, columns, classes = error.case.size
            result.add_row(
                dtype_name(dtype),
                f"{error.case.metric}, {rows} x {columns}, {classes} classes",
                error.tensor,
                f"{error.found:.1e}",
                f"{error.allowed:.1e}",
                "ok" if error.ok else "FAILED",
                style=None if error.ok else "bold red",
            )
    return result
