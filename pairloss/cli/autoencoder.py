"""The autoencoder x-500-500-2000-d-2000-500-500-x, trained with and without the soft nearest neighbour loss.

Source: Agarap and Azcarraga 2020 (network, annealed temperature, loss summed over all hidden layers).
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from .. import reference, schedules, snnl
from ..layerwise import activations
from ..nn import EntanglementMonitor, LayerwiseSNNL
from .data import Dataset
from .measure import PeakMemory, call_for, engine_name, saved_bytes, synchronise

HIDDEN = (500, 500, 2000)
LAYERS = ("encoder 1", "encoder 2", "encoder 3", "code", "decoder 1", "decoder 2", "decoder 3")
CODE = LAYERS.index("code")
# How often entanglement is measured during training.
MEASUREMENTS = 20
# Where annealing ends up after about 65 epochs: what is compared must not move with the epoch.
MEASURED_AT = 0.1


@dataclass(frozen=True)
class Settings:
    tau: float | None  # None: annealed
    factor: float
    epochs: int
    code_units: int
    lr: float
    metric: str
    seed: int
    device: torch.device
    backend: str | None

    def temperature(self, epoch: int) -> float:
        return schedules.annealed(epoch) if self.tau is None else self.tau

    @property
    def measured_at(self) -> float:
        return MEASURED_AT if self.tau is None else self.tau


@dataclass
class Run:
    """What one training gave."""

    losses: list[float] = field(default_factory=list)
    entanglement: dict[int, list[float]] = field(default_factory=dict)  # epochs done -> per layer, on the training set
    step_seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    reconstruction: float = 0.0  # mean squared error per feature, test set
    train_codes: npt.NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 0), np.float32))
    test_codes: npt.NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 0), np.float32))
    engines: list[str] = field(default_factory=list)  # that serve the layers
    saved_bytes: int = 0  # held for backward by pairloss.snnl, all layers
    naive_saved_bytes: int = 0  # the same by the N x N path


class Diverged(RuntimeError):
    pass


def autoencoder(features: int, code_units: int) -> nn.Sequential:
    """Modules by the names in LAYERS, and the output."""
    sizes = (features, *HIDDEN, code_units, *reversed(HIDDEN), features)
    linears = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    model = nn.Sequential()
    for i, (name, linear) in enumerate(zip((*LAYERS, "output"), linears, strict=True)):
        straight = i in (CODE, len(LAYERS))
        # PyTorch's default shrinks the signal at each of the eight layers.
        nn.init.kaiming_normal_(linear.weight, nonlinearity="linear" if straight else "relu")
        nn.init.zeros_(linear.bias)
        model.add_module(name, linear if straight else nn.Sequential(linear, nn.ReLU()))
    return model


def train(data: Dataset, settings: Settings, factor: float, memory: PeakMemory, on_epoch: Callable[[int, Run], None]) -> Run:
    """Full-batch Adam on reconstruction + factor * sum of snnl over the layers; the same start for every factor."""
    device = settings.device
    x, labels = torch.as_tensor(data.train_x, device=device), torch.as_tensor(data.train_y, device=device)
    run = Run()
    memory.restart()
    torch.manual_seed(settings.seed)
    model = autoencoder(x.shape[1], settings.code_units).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr)
    criterion = LayerwiseSNNL(
        model,
        LAYERS,
        primary=nn.functional.mse_loss,
        factor=factor,
        schedule=settings.temperature,
        metric=settings.metric,
        backend=settings.backend,
    ).to(device)
    monitor = EntanglementMonitor(model, LAYERS, tau=settings.measured_at, metric=settings.metric, backend=settings.backend)

    def measure(epoch: int) -> None:
        run.entanglement[epoch] = monitor.measure(epoch, x, labels).loss.tolist()

    for epoch in range(settings.epochs):
        if epoch % max(1, settings.epochs // MEASUREMENTS) == 0:
            measure(epoch)
        synchronise(device)
        start = time.perf_counter()
        criterion.set_epoch(epoch)
        loss = criterion(model(x), x, labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.losses.append(loss.item())
        synchronise(device)
        run.step_seconds.append(time.perf_counter() - start)

        if not np.isfinite(run.losses[-1]):
            raise Diverged(f"training diverged: the loss is {run.losses[-1]} in epoch {epoch + 1}; a lower --lr or --factor may help")
        on_epoch(epoch + 1, run)

    run.peak_bytes = memory.bytes()
    criterion.remove()
    measure(settings.epochs)
    test_x = torch.as_tensor(data.test_x, device=device)
    with torch.no_grad():
        run.reconstruction = nn.functional.mse_loss(model(test_x), test_x).item()
        run.train_codes, run.test_codes = (model[: CODE + 1](rows).cpu().numpy() for rows in (x, test_x))
    if factor:
        _measure_engines(run, [calls[0] for calls in activations(model, LAYERS, x).values()], labels, settings)
    on_epoch(settings.epochs, run)
    return run


def _snnl(features: Tensor, labels: Tensor, tau: float, settings: Settings) -> Tensor:
    return snnl(features, labels, tau, metric=settings.metric, backend=settings.backend)


def _measure_engines(run: Run, layers: list[Tensor], labels: Tensor, settings: Settings) -> None:
    tau = settings.temperature(settings.epochs - 1)
    for layer in layers:
        rows = layer.detach().requires_grad_()
        run.engines.append(engine_name(call_for(rows, labels, tau, settings.metric), settings.backend))
        run.saved_bytes += saved_bytes(_snnl, rows, labels, tau, settings)
        run.naive_saved_bytes += saved_bytes(reference.snnl, rows, labels, tau)
