"""pairloss info: versions, devices, and which engine serves what where."""

import importlib.metadata
import platform

import torch
from rich.table import Table

from .. import __version__, cpu, engines
from . import errors
from .measure import engine_name, small_call

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def info() -> None:
    """Versions, devices, and which engine runs where."""
    with errors.reported():
        errors.choice("PAIRLOSS_BACKEND", engines.DEFAULT_BACKEND, engines.BACKENDS)
        console = errors.console()
        console.print(versions())
        for device in devices():
            console.print(engine_table(device))


def versions() -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("pairloss", __version__)
    table.add_row("python", platform.python_version())
    table.add_row("torch", torch.__version__)
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "not installed"
    table.add_row("triton", triton)
    if engines.DEFAULT_BACKEND:
        table.add_row("PAIRLOSS_BACKEND", engines.DEFAULT_BACKEND)
    return table


def devices() -> list[torch.device]:
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0))]


def describe(device: torch.device) -> str:
    if device.type == "cpu":
        ours = "" if cpu.instruction_set() is None else f", engine cpu by {cpu.instruction_set()}"
        return f"cpu: {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads{ours}"
    properties = torch.cuda.get_device_properties(device)
    capability = f"{properties.major}.{properties.minor}"
    return f"{device}: {properties.name}, capability {capability}, {properties.total_memory / 2**30:.1f} GiB"


def engine_table(device: torch.device) -> Table:
    """Per dtype, since an engine may run some of them only."""
    table = Table(title=describe(device), title_justify="left")
    table.add_column("engine")
    table.add_column("runs here")
    table.add_column("chosen for")
    calls = {str(dtype).removeprefix("torch."): small_call(device, dtype) for dtype in DTYPES}
    for name in engines.ENGINES:
        reasons = {dtype: engines.load(name).why_not(call) for dtype, call in calls.items()}
        chosen = [dtype for dtype, call in calls.items() if chosen_name(call) == name]
        table.add_row(name, usable(reasons), ", ".join(chosen) or "-")
    always = [dtype for dtype, call in calls.items() if chosen_name(call) == engines.REFERENCE]
    table.add_row(engines.REFERENCE, "yes, by name only (N x N memory)", ", ".join(always) or "-")
    return table


def chosen_name(call: engines.Call) -> str | None:
    try:
        return engine_name(call, None)
    except RuntimeError:  # PAIRLOSS_BACKEND names an engine that can't run this
        return None


def usable(reasons: dict[str, str | None]) -> str:
    if len(set(reasons.values())) == 1:
        reason = next(iter(reasons.values()))
        return "yes" if reason is None else f"no: {reason}"
    return "; ".join(f"{dtype}: {'yes' if reason is None else f'no: {reason}'}" for dtype, reason in reasons.items())
