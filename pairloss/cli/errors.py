"""What the user got wrong, in one line and with exit code 2."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import typer
from rich.console import Console

from .. import engines
from .measure import small_call


class InputError(ValueError):
    """Its message is all that the user needs."""


@contextmanager
def reported() -> Iterator[None]:
    try:
        yield
    except InputError as error:
        typer.echo(f"pairloss: {error}", err=True)
        raise typer.Exit(2) from None
    except BrokenPipeError:  # pairloss info | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None


def device(name: str | None) -> torch.device:
    """The device of that name if it is here; the GPU if there is one and none is named."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device: expected cpu, cuda or cuda:NUMBER, got {name!r}") from None
    if found.type not in ("cpu", "cuda"):
        raise InputError(f"--device: expected cpu, cuda or cuda:NUMBER, got {name!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found.type == "cuda" and (found.index or 0) >= count:
        raise InputError(f"--device: {name} is not available, PyTorch sees {count} CUDA device{'' if count == 1 else 's'} here")
    return torch.device("cpu") if found.type == "cpu" else found


def choice(option: str, value: str | None, known: tuple[str, ...]) -> None:
    if value is not None and value not in known:
        raise InputError(f"{option}: expected one of {', '.join(known)}, got {value!r}")


def between(option: str, value: float, low: float, high: float = float("inf"), *, open_low: bool = False) -> None:
    """low <= value < high, or low < value < high; false for NaN."""
    if not (low <= value < high) or (open_low and value == low):
        expected = f"{'>' if open_low else '>='} {low:g}" + (f" and < {high:g}" if high != float("inf") else "")
        raise InputError(f"{option}: expected a number {expected}, got {value:g}")


def backend_runs(name: str | None, on: torch.device) -> None:
    """Before any work: does the engine of that name run on this device?"""
    source = "--backend" if name else "PAIRLOSS_BACKEND"
    name = name or engines.DEFAULT_BACKEND
    choice(source, name, engines.BACKENDS)
    if name in engines.ENGINES:
        reason = engines.load(name).why_not(small_call(on, torch.float32))
        if reason is not None:
            raise InputError(f"{source}: {name} can't run on {on}: {reason}")


def console() -> Console:
    """Tables as wide as the terminal; elsewhere as wide as they are made for."""
    return Console() if sys.stdout.isatty() else Console(width=100)
