"""The autoencoder x-500-500-2000-d-2000-500-500-x, trained with and without the soft nearest neighbour loss.

Source: Agarap and Azcarraga 2020 (network, annealed temperature, loss summed over all hidden layers).
"""

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from .. import reference, schedules, snnl
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


class Autoencoder(nn.Module):
    def __init__(self, features: int, code_units: int) -> None:
        super().__init__()
        sizes = (features, *HIDDEN, code_units, *reversed(HIDDEN), features)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        for i, layer in enumerate(self._linears()):  # PyTorch's default shrinks the signal at each of the eight layers
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear" if self._is_linear(i) else "relu")
            nn.init.zeros_(layer.bias)

    def _linears(self) -> Iterator[nn.Linear]:
        return (layer for layer in self.layers if isinstance(layer, nn.Linear))

    def _is_linear(self, i: int) -> bool:
        return i in (CODE, len(LAYERS))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The reconstruction and the activations of LAYERS, from the same pass."""
        activations = []
        for i, layer in enumerate(self.layers):
            x = layer(x) if self._is_linear(i) else layer(x).relu()
            activations.append(x)
        return activations.pop(), activations


def train(data: Dataset, settings: Settings, factor: float, memory: PeakMemory, on_epoch: Callable[[int, Run], None]) -> Run:
    """Full-batch Adam on reconstruction + factor * sum of snnl over the layers; the same start for every factor."""
    device = settings.device
    x, labels = torch.as_tensor(data.train_x, device=device), torch.as_tensor(data.train_y, device=device)
    run = Run()
    memory.restart()
    torch.manual_seed(settings.seed)
    model = Autoencoder(x.shape[1], settings.code_units).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr)

    def entanglement(activations: list[Tensor]) -> list[float]:
        with torch.no_grad():
            return [_snnl(layer, labels, settings.measured_at, settings).item() for layer in activations]

    for epoch in range(settings.epochs):
        synchronise(device)
        start = time.perf_counter()
        reconstruction, activations = model(x)
        loss = nn.functional.mse_loss(reconstruction, x)
        if factor:
            tau = settings.temperature(epoch)
            loss = loss + factor * torch.stack([_snnl(layer, labels, tau, settings) for layer in activations]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.losses.append(loss.item())
        synchronise(device)
        run.step_seconds.append(time.perf_counter() - start)

        if not np.isfinite(run.losses[-1]):
            raise Diverged(f"training diverged: the loss is {run.losses[-1]} in epoch {epoch + 1}; a lower --lr or --factor may help")
        if epoch % max(1, settings.epochs // MEASUREMENTS) == 0:
            run.entanglement[epoch] = entanglement(activations)
        on_epoch(epoch + 1, run)

    run.peak_bytes = memory.bytes()
    with torch.no_grad():
        _, activations = model(x)
        test_x = torch.as_tensor(data.test_x, device=device)
        reconstruction, test_activations = model(test_x)
    run.entanglement[settings.epochs] = entanglement(activations)
    run.reconstruction = nn.functional.mse_loss(reconstruction, test_x).item()
    run.train_codes, run.test_codes = (layers[CODE].cpu().numpy() for layers in (activations, test_activations))
    if factor:
        _measure_engines(run, activations, labels, settings)
    on_epoch(settings.epochs, run)
    return run


def _snnl(features: Tensor, labels: Tensor, tau: float, settings: Settings) -> Tensor:
    return snnl(features, labels, tau, metric=settings.metric, backend=settings.backend)


def _measure_engines(run: Run, activations: list[Tensor], labels: Tensor, settings: Settings) -> None:
    tau = settings.temperature(settings.epochs - 1)
    for layer in activations:
        rows = layer.detach().requires_grad_()
        run.engines.append(engine_name(call_for(rows, labels, tau, settings.metric), settings.backend))
        run.saved_bytes += saved_bytes(_snnl, rows, labels, tau, settings)
        run.naive_saved_bytes += saved_bytes(reference.snnl, rows, labels, tau)
