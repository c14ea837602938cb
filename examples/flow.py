"""A flow with a clustered latent space: Real NVP by maximum likelihood, without and with the soft nearest neighbour loss.

python -m examples.flow --out DIR
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import normalize
from torch import Tensor

import pairloss

from . import data as example_data
from .flow_layers import RealNVP, bits_per_dimension, dequantise
from .report import TEN, spread

STEPS = 8  # of an interpolation


@dataclass(frozen=True)
class Settings:
    seeds: tuple[int, ...] = (0, 1, 2)
    factors: tuple[float, ...] = (0.0, 0.3)  # of the SNNL beside bits per dimension
    tau: float = 0.1
    epochs: int = 25
    batch: int = 128
    lr: float = 2e-3
    weight_decay: float = 5e-5  # the paper's
    scales: int = 2
    hidden: int = 24
    draws: int = 8  # of dequantisation noise, when bits per dimension are measured
    neighbours: int = 5
    device: str = "cpu"


@dataclass(frozen=True)
class Run:
    """One trained flow. `train_z` and `test_z` are the latents of the images without noise (each pixel in the middle of its level)."""

    factor: float
    seed: int
    flow: RealNVP
    train_bits: float
    test_bits: float
    neighbour_accuracy: float
    entanglement: float
    train_z: Tensor
    test_z: Tensor


@dataclass(frozen=True)
class Results:
    settings: Settings
    levels: int
    pixel_bits: float
    pixel_accuracy: float
    pixel_entanglement: float
    runs: list[Run]

    def of(self, factor: float) -> list[Run]:
        return [run for run in self.runs if run.factor == factor]


def grey_levels(x: Tensor) -> int:
    """How many levels pixels in [0, 1] have: 17 for digits, 256 for bytes. Bits per dimension mean something for such images only."""
    values = x.unique().double()
    steps = round(1 / float(values.diff().min())) if len(values) > 1 else 0
    if not 1 <= steps < 2**16 or not torch.allclose(values * steps, (values * steps).round(), atol=0.02):
        raise typer.BadParameter(f"expected images of evenly spaced grey levels, got {len(values)} values", param_hint="--data")
    return steps + 1


def independent_bits(train_x: Tensor, test_x: Tensor, levels: int) -> float:
    """Bits per dimension of the simplest model: a histogram for each pixel, with one count added to each level."""
    train, test = ((x.flatten(1) * (levels - 1)).round().long() for x in (train_x, test_x))
    counts = 1 + torch.nn.functional.one_hot(train, levels).sum(0)
    return -float((counts / counts.sum(1, keepdim=True)).log2().gather(1, test.T).mean())


def train(settings: Settings, factor: float, seed: int, images: example_data.Images, levels: int, tick: Callable[[], None]) -> RealNVP:
    torch.manual_seed(seed)
    flow = RealNVP(tuple(images.train_x.shape[1:]), settings.scales, settings.hidden).to(settings.device)
    optimiser = torch.optim.Adam(flow.parameters(), settings.lr, weight_decay=settings.weight_decay)
    size = min(settings.batch, len(images.train_x))
    total = settings.epochs * (len(images.train_x) // size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, total)
    for _ in range(settings.epochs):
        # Incomplete batches are left out: their statistics would be noisy.
        for rows in torch.randperm(len(images.train_x))[: len(images.train_x) // size * size].split(size):
            x, y = images.train_x[rows], images.train_y[rows].to(settings.device)
            bits, z = bits_per_dimension(flow, dequantise(x, levels, torch.rand_like(x)).to(settings.device), levels)
            loss = bits.mean()
            if factor:
                loss = loss + factor * pairloss.snnl(z, y, settings.tau)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
            optimiser.step()
            schedule.step()
        tick()
    return flow.eval()


@torch.no_grad()
def measure(flow: RealNVP, factor: float, seed: int, settings: Settings, images: example_data.Images, levels: int) -> Run:
    generator = torch.Generator().manual_seed(seed)

    def bits(x: Tensor) -> float:
        noisy = (dequantise(x, levels, torch.rand(x.shape, generator=generator)).to(settings.device) for _ in range(settings.draws))
        return float(torch.stack([bits_per_dimension(flow, v, levels)[0].mean() for v in noisy]).mean())

    train_z, test_z = (flow(dequantise(x, levels).to(settings.device))[0].cpu() for x in (images.train_x, images.test_x))
    accuracy = neighbour_accuracy(train_z, images.train_y, test_z, images.test_y, settings.neighbours)
    entangled = float(pairloss.entanglement(test_z, images.test_y).loss)
    return Run(factor, seed, flow, bits(images.train_x), bits(images.test_x), accuracy, entangled, train_z, test_z)


def neighbour_accuracy(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, neighbours: int) -> float:
    """k nearest neighbours by cosine similarity, which the SNNL compares by too."""
    model = KNeighborsClassifier(min(neighbours, len(train_x)), metric="cosine").fit(train_x.flatten(1).numpy(), train_y.numpy())
    return float(model.score(test_x.flatten(1).numpy(), test_y.numpy()))


def run(settings: Settings, images: example_data.Images, tick: Callable[[], None] = lambda: None) -> Results:
    levels = grey_levels(images.train_x)
    bits = independent_bits(images.train_x, images.test_x, levels)
    accuracy = neighbour_accuracy(images.train_x, images.train_y, images.test_x, images.test_y, settings.neighbours)
    entangled = float(pairloss.entanglement(images.test_x.flatten(1), images.test_y).loss)
    runs = []
    for factor in settings.factors:
        for seed in settings.seeds:
            flow = train(settings, factor, seed, images, levels, tick)
            runs.append(measure(flow, factor, seed, settings, images, levels))
    return Results(settings, levels, bits, accuracy, entangled, runs)


@torch.no_grad()
def samples(flow: RealNVP, count: int, seed: int) -> Tensor:
    z = torch.randn(count, flow.dimensions, generator=torch.Generator().manual_seed(seed))
    return images_of(flow, z)


@torch.no_grad()
def images_of(flow: RealNVP, z: Tensor) -> Tensor:
    return flow.inverse(z.to(next(flow.parameters()).device)).clamp(0, 1).cpu()


def interpolate(a: Tensor, b: Tensor, steps: int = STEPS) -> Tensor:
    """[steps, D] from a to b: cos(phi) a + sin(phi) b. On a line the middle would be too short for a normal distribution."""
    phi = torch.linspace(0, math.pi / 2, steps)[:, None]
    return phi.cos() * a + phi.sin() * b


def pairs(labels: Tensor, count: int) -> list[tuple[int, int]]:
    """Rows to interpolate between: the first image of class 0 and of 1, of 2 and of 3, and so on."""
    firsts = [int((labels == c).nonzero()[0]) for c in labels.unique()]
    return list(zip(firsts[::2], firsts[1::2], strict=False))[:count]


def name(factor: float) -> str:
    return f"likelihood + {factor:g} SNNL" if factor else "likelihood alone"


def tiles(rows: Sequence[Sequence[Tensor]]) -> np.ndarray:
    """Images [C, H, W] in a grid with a margin of one pixel, as [height, width, 3]."""
    blank = torch.ones_like(rows[0][0])
    full = [[*row, *[blank] * (len(rows[0]) - len(row))] for row in rows]
    padded = [[torch.nn.functional.pad(image, (1, 1, 1, 1), value=1.0) for image in row] for row in full]
    grid = torch.cat([torch.cat(row, 2) for row in padded], 1)
    return (grid.expand(3, -1, -1) if len(grid) == 1 else grid[:3]).permute(1, 2, 0).numpy()


def draw_images(results: Results, images: example_data.Images, path: Path) -> None:
    """Above, samples; below, interpolations between test images: a column for each factor, and test images to compare with."""
    chosen = [results.of(factor)[0] for factor in results.settings.factors]
    figure = Figure(figsize=(3.6 * (1 + len(chosen)), 6.6), layout="constrained")
    axes = figure.subplots(2, 1 + len(chosen), squeeze=False)
    figure.suptitle("Real NVP: samples, and paths from one test image to another through the latent space", fontsize=13)
    rows = pairs(images.test_y, 5)

    def show(where: tuple[int, int], grid: Sequence[Sequence[Tensor]], title: str) -> None:
        axes[where].imshow(tiles(grid), interpolation="nearest", vmin=0, vmax=1)
        axes[where].set_title(title, fontsize=11)
        axes[where].axis("off")

    show((0, 0), images.test_x[:64].split(8), "test images")
    fades = [[(1 - w) * images.test_x[a] + w * images.test_x[b] for w in torch.linspace(0, 1, STEPS)] for a, b in rows]
    show((1, 0), fades, "between test images: cross-fade of pixels")
    for column, run in enumerate(chosen, 1):
        show((0, column), samples(run.flow, 64, run.seed).split(8), f"samples\n{name(run.factor)}, {run.test_bits:.2f} bits/dim")
        between = [list(images_of(run.flow, interpolate(run.test_z[a], run.test_z[b]))) for a, b in rows]
        show((1, column), between, f"between test images: latent\n{name(run.factor)}")
    figure.savefig(path, dpi=110)


def draw_latents(results: Results, images: example_data.Images, path: Path) -> None:
    """Two principal components of the latents at unit length, found on the training images, with the test images in them."""
    chosen = [results.of(factor)[0] for factor in results.settings.factors]
    figure = Figure(figsize=(5 * len(chosen), 5.8), layout="constrained")
    panels = figure.subplots(1, len(chosen), squeeze=False, sharex=True, sharey=True)[0]
    for axes, run in zip(panels, chosen, strict=True):
        plane = PCA(2, random_state=0).fit(normalize(run.train_z.numpy())).transform(normalize(run.test_z.numpy()))
        for c in range(images.classes):
            mine = images.test_y.numpy() == c
            axes.scatter(*plane[mine].T, s=26, color=TEN[c % len(TEN)], marker=f"${c}$", linewidths=0.4)
        measured = f"{results.settings.neighbours}-NN accuracy {run.neighbour_accuracy:.1%}, entanglement {run.entanglement:.3f}"
        axes.set_title(f"{name(run.factor)}\n{measured}", fontsize=11)
        axes.set_xlabel("first principal component")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("second principal component")
    verb = "pulls" if chosen[-1].entanglement < chosen[0].entanglement else "does not pull"
    figure.suptitle(f"SNNL {verb} the classes apart: latents of {len(images.test_x)} test images, at unit length", fontsize=13)
    figure.savefig(path, dpi=110)


def report(results: Results, images: example_data.Images) -> str:
    k = results.settings.neighbours
    lines = [
        f"| | bits/dim, test | bits/dim, training | {k}-NN accuracy, % | entanglement of the test latents |",
        "| --- | --- | --- | --- | --- |",
        f"| pixels, a histogram of each | {results.pixel_bits:.3f} | | {100 * results.pixel_accuracy:.1f} | "
        f"{results.pixel_entanglement:.3f} |",
    ]
    for factor in results.settings.factors:
        runs = results.of(factor)
        cells = (
            spread([r.test_bits for r in runs], ".3f"),
            spread([r.train_bits for r in runs], ".3f"),
            spread([100 * r.neighbour_accuracy for r in runs], ".1f"),
            spread([r.entanglement for r in runs], ".3f"),
        )
        lines.append(f"| latent, {name(factor)} | {' | '.join(cells)} |")
    seeds = ", ".join(map(str, results.settings.seeds))
    tail = (
        f"{images.name}: {len(images.train_x)} training and {len(images.test_x)} test images, {results.levels} grey levels; "
        f"{results.settings.epochs} epochs, tau {results.settings.tau:g}; mean ± standard deviation over seeds {seeds}; "
        f"torch {torch.__version__}, pairloss {pairloss.__version__}."
    )
    return "\n".join([*lines, "", tail, ""])


def main(
    out: Annotated[Path, typer.Option(help="Where the pictures and results/flow.md go.")],
    data: Annotated[str, typer.Option(help=example_data.HELP)] = "digits",
    factors: Annotated[str, typer.Option(help="Factors of the SNNL to compare, separated by commas.")] = "0,0.3",
    tau: Annotated[float, typer.Option(min=1e-3)] = Settings.tau,
    epochs: Annotated[int, typer.Option(min=1)] = Settings.epochs,
    seeds: Annotated[int, typer.Option(min=1, help="How many.")] = len(Settings.seeds),
    hidden: Annotated[int, typer.Option(min=1, help="Channels of the coupling networks, doubled at each scale.")] = Settings.hidden,
    scales: Annotated[int, typer.Option(min=1)] = Settings.scales,
    device: Annotated[str, typer.Option()] = Settings.device,
) -> None:
    """Train Real NVP with and without SNNL on its latent; write flow.png, flow-latent.png and results/flow.md."""
    try:
        chosen = tuple(float(f) for f in factors.split(","))
    except ValueError:
        raise typer.BadParameter(f"expected numbers separated by commas, got {factors}", param_hint="--factors") from None
    images = example_data.load(data, 0.25)
    step = 2 ** (scales - 1)
    if any(side % step for side in images.train_x.shape[2:]):
        raise typer.BadParameter(
            f"images of {list(images.train_x.shape[2:])} pixels can't be halved {scales - 1} times", param_hint="--scales"
        )
    settings = Settings(tuple(range(seeds)), chosen, tau, epochs, hidden=hidden, scales=scales, device=device)
    console = Console()
    with Progress(console=console) as progress:
        task = progress.add_task("training", total=epochs * seeds * len(chosen))
        results = run(settings, images, lambda: progress.advance(task))
    (out / "results").mkdir(parents=True, exist_ok=True)
    draw_images(results, images, out / "flow.png")
    draw_latents(results, images, out / "flow-latent.png")
    text = report(results, images)
    (out / "results" / "flow.md").write_text(text)
    console.print(Markdown(text))


if __name__ == "__main__":
    typer.run(main)
