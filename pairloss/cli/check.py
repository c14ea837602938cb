"""pairloss check: every engine that runs here against the float64 truth, over the table of losses."""

import itertools
from collections.abc import Iterator
from typing import Annotated, NamedTuple

import torch
import typer
from rich.table import Table

from .. import engines, testing
from . import errors
from .info import devices
from .measure import small_call

# Off-diagonal, ragged and mixed tiles, and rows in label order, at a size that takes no time.
TILE, ROWS, COLUMNS = 16, 67, 10


class Finding(NamedTuple):
    """Of one tensor of one case."""

    dtype: torch.dtype
    case: str
    tensor: str
    error: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.error <= self.bound


def check(
    backend: Annotated[str | None, typer.Option(help="Only this engine, which must run here.")] = None,
    device: Annotated[str | None, typer.Option(help="Only this device: cpu, cuda or cuda:NUMBER.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Every case instead of the worst per dtype.")] = False,
) -> None:
    """Do the engines compute the right values here?

    Compares loss and gradients of every engine that runs here with plain PyTorch in float64, for every loss and option.
    """
    failed = False
    with errors.reported():
        errors.choice("--backend", backend, tuple(engines.ENGINES))
        where = devices() if device is None else [errors.device(device)]
        console = errors.console()
        for on, name in itertools.product(where, engines.ENGINES if backend is None else [backend]):
            reasons = {dtype: engines.load(name).why_not(small_call(on, dtype)) for dtype in testing.FLOORS}
            if None not in reasons.values():
                console.print(f"{name} on {on}: does not run here: {reasons[torch.float32]}", highlight=False)
                failed |= backend is not None
                continue
            found = [finding for dtype, reason in reasons.items() if reason is None for finding in compare(name, on, dtype)]
            failed |= not all(finding.ok for finding in found)
            console.print(table(f"{name} on {on}", found, verbose))
            for dtype, reason in reasons.items():
                if reason is not None:
                    console.print(f"{name} on {on}: no {dtype_name(dtype)}: {reason}", highlight=False)
        console.print("FAILED" if failed else "all ok", style="bold red" if failed else "bold green")
    if failed:
        raise typer.Exit(1)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def compare(backend: str, device: torch.device, dtype: torch.dtype) -> Iterator[Finding]:
    for loss, spec in testing.LOSSES.items():
        for option in (option for option in spec.options if spec.why_not(option, backend) is None):
            sample = spec.sample(ROWS, COLUMNS, 0, option).to(dtype).on(device)
            truth = sample.to(torch.float64).run(spec.function, backend=engines.REFERENCE)
            eager = sample.run(spec.function, backend=engines.REFERENCE)
            with testing.tile_size(TILE):
                ours = sample.run(spec.function, backend=backend)
            case = f"{loss}, {option}"
            yield Finding(dtype, case, "loss", *testing.error_and_bound(ours[0], truth[0], eager[0], dtype))
            terms = sample.terms(truth[1])
            for name, grad in ours[1].items():
                numbers = testing.error_and_bound(grad, truth[1][name], eager[1][name], dtype, terms[name])
                yield Finding(dtype, case, f"d {name}", *numbers)


def table(title: str, found: list[Finding], verbose: bool) -> Table:
    result = Table(title=f"{title}: greatest errors against float64", title_justify="left")
    for name, justify in (("dtype", "left"), ("case", "left"), ("tensor", "left"), ("error", "right"), ("allowed", "right"), ("", "left")):
        result.add_column(name, justify=justify)  # type: ignore[arg-type]
    for _, group in itertools.groupby(found, key=lambda finding: finding.dtype):
        findings = list(group)
        for finding in findings if verbose else [max(findings, key=lambda f: f.error / f.bound)]:
            result.add_row(
                dtype_name(finding.dtype),
                finding.case,
                finding.tensor,
                f"{finding.error:.1e}",
                f"{finding.bound:.1e}",
                "ok" if finding.ok else "FAILED",
                style=None if finding.ok else "bold red",
            )
    return result
