"""What a training shows while it runs and tells at the end: live table, tables, results.json."""

import json
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from sklearn.neighbors import KNeighborsClassifier

from .. import __version__
from .autoencoder import LAYERS, Run, Settings
from .data import NEIGHBOURS, Array, Dataset

PLAIN, WITH_SNNL = "autoencoder", "autoencoder + SNNL"


class Display:
    """A progress bar and the entanglement of each layer, per training."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.runs: dict[str, Run] = {}
        self.progress = Progress(
            TextColumn("{task.description:<18}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TextColumn("T {task.fields[tau]}"),
            TimeElapsedColumn(),
        )
        names = (PLAIN, WITH_SNNL)
        self.tasks = {name: self.progress.add_task(name, total=settings.epochs, start=False, loss=0.0, tau="-") for name in names}

    def start(self, name: str) -> None:
        self.progress.start_task(self.tasks[name])

    def update(self, name: str, epoch: int, run: Run) -> None:
        self.runs[name] = run
        tau = f"{self.settings.temperature(epoch - 1):.3f}" if name == WITH_SNNL else "-"
        self.progress.update(self.tasks[name], completed=epoch, loss=run.losses[-1], tau=tau)

    def render(self) -> Group:
        title = Text(f"entanglement before training -> now (SNNL of the training set at T = {self.settings.measured_at:g})", style="italic")
        table = Table()
        table.add_column("layer")
        for name in self.runs:
            table.add_column(name, justify="right")
        histories = [list(run.entanglement.values()) for run in self.runs.values()]
        for i, layer in enumerate(LAYERS):
            table.add_row(layer, *(f"{history[0][i]:.3f} -> {history[-1][i]:.3f}" for history in histories))
        return Group(self.progress, title, table) if self.runs else Group(self.progress)

    @contextmanager
    def live(self, console: Console) -> Iterator[None]:
        # Where output can't move the cursor, rich prints the last state once.
        with Live(get_renderable=self.render, console=console, refresh_per_second=4):
            yield
        if not console.is_terminal:
            console.line()


@dataclass(frozen=True)
class Outcome:
    data: Dataset
    settings: Settings
    plain: Run
    with_snnl: Run
    accuracy: dict[str, float]


def accuracies(data: Dataset, plain: Run, with_snnl: Run) -> dict[str, float]:
    """Test accuracy of k-NN on raw features and on both codes."""
    spaces = {
        "raw": (data.train_x, data.test_x),
        "plain": (plain.train_codes, plain.test_codes),
        "snnl": (with_snnl.train_codes, with_snnl.test_codes),
    }
    return {name: knn_accuracy(train, data.train_y, test, data.test_y) for name, (train, test) in spaces.items()}


def knn_accuracy(train_x: Array, train_y: Array, test_x: Array, test_y: Array) -> float:
    return float(KNeighborsClassifier(NEIGHBOURS).fit(train_x, train_y).score(test_x, test_y))


def summary(outcome: Outcome) -> Table:
    """Without and with the loss, and what the N x N path would hold."""
    plain, ours, accuracy = outcome.plain, outcome.with_snnl, outcome.accuracy
    data = outcome.data
    layers = len(LAYERS)
    table = Table(title=f"{data.name}: {len(data.train_x)} training rows, {len(data.test_x)} test rows", title_justify="left")
    for name, justify in (("", "left"), ("raw features", "right"), (PLAIN, "right"), (WITH_SNNL, "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_row(
        f"test accuracy, {NEIGHBOURS}-NN on the code", *(f"{accuracy[name]:.2%}" for name in ("raw", "plain", "snnl")), style="bold"
    )
    table.add_row("test reconstruction error (MSE)", "", f"{plain.reconstruction:.4f}", f"{ours.reconstruction:.4f}")
    table.add_row("time per step, fastest", "", milliseconds(min(plain.step_seconds)), milliseconds(min(ours.step_seconds)))
    table.add_row("peak memory above the start", "", mebibytes(plain.peak_bytes), mebibytes(ours.peak_bytes))
    table.add_row(f"kept for backward by the loss, {layers} layers", "", "", mebibytes(ours.saved_bytes))
    table.add_row("  as N x N matrices (reference.snnl)", "", "", mebibytes(ours.naive_saved_bytes))
    table.add_row("engine", "", "", ", ".join(sorted(set(ours.engines))))
    return table


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"


def mebibytes(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**20:.1f} MiB"


def write_json(outcome: Outcome, seconds: float, path: Path) -> None:
    settings, data = outcome.settings, outcome.data

    def run(r: Run) -> dict[str, Any]:
        return {
            "seconds_per_step": {"fastest": min(r.step_seconds), "median": statistics.median(r.step_seconds)},
            "peak_memory_bytes": r.peak_bytes,
            "test_reconstruction_mse": r.reconstruction,
            "loss": r.losses,
            "entanglement": {
                "epochs": list(r.entanglement),
                **{layer: [values[i] for values in r.entanglement.values()] for i, layer in enumerate(LAYERS)},
            },
        }

    results = {
        "pairloss": __version__,
        "torch": torch.__version__,
        "data": {"name": data.name, "train_rows": len(data.train_x), "test_rows": len(data.test_x), "classes": list(data.classes)},
        "settings": {
            "tau": "anneal" if settings.tau is None else settings.tau,
            "factor": settings.factor,
            "epochs": settings.epochs,
            "code_units": settings.code_units,
            "lr": settings.lr,
            "metric": settings.metric,
            "seed": settings.seed,
            "device": str(settings.device),
            "threads": torch.get_num_threads(),
        },
        "engines": dict(zip(LAYERS, outcome.with_snnl.engines, strict=True)),
        "test_knn_accuracy": outcome.accuracy,
        "entanglement_temperature": settings.measured_at,
        "saved_for_backward_bytes": outcome.with_snnl.saved_bytes,
        "saved_for_backward_bytes_n_by_n": outcome.with_snnl.naive_saved_bytes,
        "plain": run(outcome.plain),
        "snnl": run(outcome.with_snnl),
        "seconds": seconds,
    }
    path.write_text(json.dumps(results, indent=1) + "\n")
