"""What the reports say about engines and memory, measured rather than estimated."""

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import engines
from ..engines import Call
from ..prepare import of_temperature, prepare


def call_for(features: Tensor, labels: Tensor, tau: float, metric: str) -> Call:
    """The call that pairloss.snnl makes of these arguments."""
    rows = prepare(features, None, of_temperature(tau / 2 if metric == "sqeuclidean" else tau), metric, None, None)
    return Call(rows.x, None, rows.norm, labels, None, 0, rows.row_bias, None, rows.product_dtype, logit_bound=rows.logit_bound)


def small_call(device: torch.device, dtype: torch.dtype) -> Call:
    features = torch.ones(4, 4, device=device, dtype=dtype)
    return call_for(features, torch.zeros(4, dtype=torch.int64, device=device), 1.0, "cosine")


def engine_name(call: Call, backend: str | None) -> str:
    """The name of the engine that serves the call."""
    backend = backend or engines.DEFAULT_BACKEND
    if backend == engines.REFERENCE:
        return engines.REFERENCE
    chosen = engines.choose(call, backend)
    return next(name for name, module in engines.ENGINES.items() if chosen.__name__ == module)


def saved_bytes(loss: Callable[..., Tensor], *arguments: Any) -> int:
    """Bytes that autograd holds for the backward pass, each storage once."""
    storages: dict[int, int] = {}
    alive: list[Tensor] = []  # a freed storage's address could come again

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(*arguments)
    return sum(storages.values())


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PeakMemory:
    """Most memory in use since the last restart, above what was in use when this was made. None where the system doesn't say."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start = self._read("VmRSS")

    def restart(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with contextlib.suppress(OSError):  # Linux: forget earlier peaks
                Path("/proc/self/clear_refs").write_text("5")

    def _read(self, field: str) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device) if field == "VmRSS" else torch.cuda.max_memory_allocated(self.device)
        try:
            found = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
        except OSError:
            return None
        return None if found is None else int(found[1]) * 1024

    def bytes(self) -> int | None:
        peak = self._read("VmHWM")
        return None if peak is None or self.start is None else max(peak - self.start, 0)
