"""Embeddings by the circle loss, beside triplet margin loss and cross-entropy: same network, same epochs, same seeds.

Source: Sun et al. 2020 (the loss and its decision boundary), for images of 8 x 8 pixels and more.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

import pairloss

from . import data as example_data
from .report import TEN, spread

PIXELS, UNTRAINED, SOFTMAX, TRIPLET, CIRCLE = "raw pixels", "untrained", "cross-entropy", "triplet margin", "circle"
PLANE = 2  # units of the embedding that can be drawn as it is
METRICS = ("cosine", "euclidean")
# More pairs than this would only be drawn over one another.
MOST_ANCHORS = 1000
BLUE, ORANGE = "#0072b2", "#d55e00"

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Settings:
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    epochs: int = 20
    losses: tuple[str, ...] = (SOFTMAX, TRIPLET, CIRCLE)
    wide: int = 16  # units of the other embedding
    m: float = 0.25  # of the circle loss, and the margin of the triplets
    # Ten classes on a circle are 36 degrees apart, s_n = 0.81: no pair of neighbours can reach s_n <= m, and a large gamma, which listens
    # to the worst pairs alone, leaves classes stuck behind one another. A small one listens to all pairs.
    gamma_plane: float = 0.25
    gamma_wide: float = 64.0
    lr: float = 3e-3
    batch: int = 64
    neighbours: int = 5
    device: str = "cpu"

    def gamma(self, units: int) -> float:
        return self.gamma_plane if units == PLANE else self.gamma_wide


@dataclass(frozen=True)
class Pairs:
    """For each anchor, the similarity to one negative and to one positive, both drawn at random."""

    s_n: Tensor
    s_p: Tensor


@dataclass
class Results:
    settings: Settings
    accuracy: dict[tuple[str, int], list[tuple[float, float]]] = field(default_factory=dict)  # (name, units) -> by METRICS, per seed
    frames: dict[int, Tensor] = field(default_factory=dict)  # epochs done -> test embedding by the circle loss, first seed
    pairs: dict[tuple[str, int], list[Pairs]] = field(default_factory=dict)  # (name, epochs done) -> wide embedding, per seed


class Network(nn.Module):
    """Three convolutions, then an embedding without an activation."""

    def __init__(self, channels: int, units: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise((channels, 16, 32, 64)):
            layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        # In place of the last pooling, 2 x 2 cells whatever the size of the image.
        self.body = nn.Sequential(*layers[:-1], nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 64), nn.ReLU())
        self.embedding = nn.Linear(64, units)

    def forward(self, x: Tensor) -> Tensor:
        return self.embedding(self.body(x))


def loss_of(name: str, units: int, settings: Settings, head: nn.Linear) -> Loss:
    """Of embeddings and labels; `head` is the layer above the embedding that cross-entropy needs."""
    if name == CIRCLE:
        return lambda z, y: pairloss.circle(z, y, m=settings.m, gamma=settings.gamma(units))
    if name == SOFTMAX:
        return lambda z, y: cross_entropy(head(z), y)
    try:
        from pytorch_metric_learning import distances, losses, miners
    except ImportError:
        raise typer.BadParameter(
            f"{TRIPLET} needs pytorch-metric-learning: pip install pytorch-metric-learning", param_hint="--losses"
        ) from None
    similarity = distances.CosineSimilarity()
    triplets = losses.TripletMarginLoss(margin=settings.m, distance=similarity)
    miner = miners.TripletMarginMiner(margin=settings.m, distance=similarity)
    return lambda z, y: triplets(z, y, miner(z, y))


@torch.no_grad()
def embed(model: nn.Module, x: Tensor) -> Tensor:
    model.eval()
    return torch.cat([model(part) for part in x.split(1024)]).cpu()


def train(name: str, units: int, seed: int, settings: Settings, images: example_data.Images, on_epoch: Callable[[int, Network], None]):
    """Adam with one cycle of the learning rate; every loss starts from the same weights and sees the same batches."""
    torch.manual_seed(seed)
    model = Network(images.train_x.shape[1], units).to(settings.device)
    head = nn.Linear(units, images.classes).to(settings.device)
    batch = min(settings.batch, len(images.train_x))
    steps = len(images.train_x) // batch
    on_epoch(0, model)
    if name == UNTRAINED:
        return model
    loss = loss_of(name, units, settings, head)
    optimiser = torch.optim.Adam([*model.parameters(), *head.parameters()], settings.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, settings.lr, total_steps=settings.epochs * steps)
    order = torch.Generator().manual_seed(seed)
    for epoch in range(1, settings.epochs + 1):
        model.train()
        for rows in torch.randperm(len(images.train_x), generator=order)[: steps * batch].to(settings.device).split(batch):
            optimiser.zero_grad()
            loss(model(images.train_x[rows]), images.train_y[rows]).backward()
            optimiser.step()
            schedule.step()
        on_epoch(epoch, model)
    return model


def run(settings: Settings, images: example_data.Images, on_training: Callable[[], None] = lambda: None) -> Results:
    """Each loss with 2 units and with `wide` ones, for every seed; `on_training` is called after each."""
    images = replace(images, **{k: getattr(images, k).to(settings.device) for k in ("train_x", "train_y", "test_x", "test_y")})
    results = Results(settings)
    pixels = [x.flatten(1).cpu() for x in (images.train_x, images.test_x)]
    results.accuracy[PIXELS, pixels[0].shape[1]] = [accuracies(*pixels, settings, images)]
    for units, name, seed in itertools.product((PLANE, settings.wide), (UNTRAINED, *settings.losses), settings.seeds):
        watch = functools.partial(keep, results, name, units, seed, images)
        model = train(name, units, seed, settings, images, watch)
        train_z, test_z = embed(model, images.train_x), embed(model, images.test_x)
        results.accuracy.setdefault((name, units), []).append(accuracies(train_z, test_z, settings, images))
        on_training()
    return results


def keep(results: Results, name: str, units: int, seed: int, images: example_data.Images, epoch: int, model: nn.Module) -> None:
    """What the pictures show of a training under way."""
    settings = results.settings
    if units == settings.wide and epoch in stages(settings.epochs):
        pairs = sample_pairs(embed(model, images.test_x), images.test_y.cpu(), seed)
        results.pairs.setdefault((name, epoch), []).append(pairs)
    elif (name, units, seed) == (CIRCLE, PLANE, settings.seeds[0]) and epoch in frame_epochs(settings.epochs):
        results.frames[epoch] = embed(model, images.test_x)


def stages(epochs: int) -> tuple[int, ...]:
    """Before training, under way, after it."""
    return tuple(sorted({0, max(1, epochs // 10), epochs}))


def frame_epochs(epochs: int) -> tuple[int, ...]:
    """Five of them, close together at first, where most happens."""
    return (0, *sorted({round(e) for e in np.geomspace(1, epochs, 4)}))


def accuracies(train_z: Tensor, test_z: Tensor, settings: Settings, images: example_data.Images) -> tuple[float, float]:
    k = min(settings.neighbours, len(train_z))
    labels = images.train_y.cpu(), images.test_y.cpu()
    cosine, euclidean = (KNeighborsClassifier(k, metric=m).fit(train_z, labels[0]).score(test_z, labels[1]) for m in METRICS)
    return cosine, euclidean


def sample_pairs(z: Tensor, labels: Tensor, seed: int) -> Pairs:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(z), generator=generator)[:MOST_ANCHORS]
    z, labels = normalize(z[rows]), labels[rows]
    same = labels[:, None] == labels
    positive, negative = same & ~torch.eye(len(z), dtype=torch.bool), ~same
    anchors = (positive.any(1) & negative.any(1)).nonzero()[:, 0]
    s_p, s_n = (
        (z[anchors] * z[torch.multinomial(mask[anchors].float(), 1, generator=generator)[:, 0]]).sum(1) for mask in (positive, negative)
    )
    return Pairs(s_n, s_p)


def circle_logit(s_n: Tensor, s_p: Tensor, m: float) -> Tensor:
    """alpha_n (s_n - m) - alpha_p (s_p - 1 + m), whose sign is the side of the boundary: s_n^2 + (s_p - 1)^2 - 2 m^2 for s_n >= -m."""
    return (s_n + m).relu() * (s_n - m) - (1 + m - s_p).relu() * (s_p - 1 + m)


def triplet_logit(s_n: Tensor, s_p: Tensor, m: float) -> Tensor:
    return s_n - s_p + m


def pull(name: str, s_n: Tensor, s_p: Tensor, m: float) -> tuple[Tensor, Tensor]:
    """Minus the derivatives of the loss by s_n and s_p, without their common factor."""
    if name == CIRCLE:
        return -(s_n + m).relu(), (1 + m - s_p).relu()
    short = (triplet_logit(s_n, s_p, m) > 0).float()  # beyond the boundary triplets are at rest
    return -short, short


def draw_frames(results: Results, images: example_data.Images) -> Figure:
    figure = Figure(figsize=(3 * len(results.frames), 4.1), layout="constrained")
    colours = TEN if images.classes <= len(TEN) else colormaps["turbo"](np.linspace(0, 1, images.classes))
    for ax, (epoch, z) in zip(figure.subplots(1, len(results.frames), squeeze=False)[0], results.frames.items(), strict=True):
        for c in range(images.classes):
            mine = z[images.test_y.cpu() == c].numpy()
            ax.scatter(*mine.T, s=22, color=colours[c], marker=f"${c}$", linewidths=0.3, alpha=0.8)
        reach = 1.08 * float(z.abs().max())
        ax.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
        ax.plot(0, 0, "+", color="black", markersize=9)
        ax.tick_params(labelsize=8)
        ax.locator_params(nbins=5)
        ax.set_title("untrained" if epoch == 0 else f"epoch {epoch}", fontsize=12)
    figure.suptitle("The circle loss turns classes into directions: a layer of 2 units, test images, before normalisation", fontsize=13)
    if images.classes <= 20:
        handles = [Line2D([], [], color=colours[c], marker="o", linestyle="", label=str(c)) for c in range(images.classes)]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(images.classes, 10), frameon=False, title="class")
    return figure


def draw_pairs(results: Results) -> Figure:
    settings = results.settings
    trained = [name for name in (TRIPLET, CIRCLE) if name in settings.losses]
    figure = Figure(figsize=(5.6 * len(trained), 6.3), layout="constrained")
    axes = figure.subplots(1, len(trained), sharex=True, sharey=True, squeeze=False)[0]
    for ax, name in zip(axes, trained, strict=True):
        draw_boundary(ax, name, settings.m)
        for epoch, colour, marker in zip(stages(settings.epochs), ("black", ORANGE, BLUE), "Xo^", strict=False):
            pairs = results.pairs[name, epoch][0]
            when = "untrained" if epoch == 0 else f"epoch {epoch}"
            # Untrained, all lie on one another in the corner.
            look = {"s": 110, "clip_on": False, "zorder": 6} if epoch == 0 else {"s": 9, "alpha": 0.6, "zorder": 3}
            label = f"{when}: {inside(pairs, name, settings.m):.0%} beyond the boundary"
            ax.scatter(pairs.s_n, pairs.s_p, color=colour, marker=marker, linewidths=0, label=label, **look)
        ax.plot(0, 1, "*", color="black", markersize=14, zorder=5, clip_on=False, linestyle="", label="s_n = 0, s_p = 1")
        ax.set_title(f"{name} loss, m = {settings.m:g}", fontsize=12, pad=12)
        ax.set_xlabel("similarity to a negative, s_n")
        ax.legend(loc="lower left", fontsize=9.5, framealpha=1)
    axes[0].set_ylabel("similarity to a positive, s_p")
    title = (
        "Triplet loss: straight boundary, the same pull (arrows) up to it\n"
        "Circle loss: round boundary, a pull that grows with the distance from the optimum"
    )
    figure.suptitle(title, fontsize=13)
    return figure


def draw_boundary(ax: Axes, name: str, m: float) -> None:
    """The boundary, and what pulls on a pair."""
    logit = circle_logit if name == CIRCLE else triplet_logit
    grid = torch.linspace(-1, 1, 401)
    s_n, s_p = torch.meshgrid(grid, grid, indexing="xy")
    ax.contour(grid, grid, logit(s_n, s_p, m), levels=[0], colors="black", linewidths=2.2, zorder=4)
    s_n, s_p = s_n[20::40, 20::40], s_p[20::40, 20::40]
    ax.quiver(s_n, s_p, *pull(name, s_n, s_p, m), color="#b0b0b0", angles="xy", scale=22, width=0.004, zorder=1)
    if name == CIRCLE:  # the rest of the full circle, where alpha_n is 0
        angle = torch.linspace(0, 2 * torch.pi, 200)
        ax.plot(2**0.5 * m * angle.cos(), 1 + 2**0.5 * m * angle.sin(), ":", color="black", linewidth=1.5, zorder=4)
    ax.set(xlim=(-1, 1), ylim=(-1, 1), aspect="equal")


def inside(pairs: Pairs, boundary: str, m: float) -> float:
    logit = circle_logit if boundary == CIRCLE else triplet_logit
    return float((logit(pairs.s_n, pairs.s_p, m) < 0).float().mean())


def report(results: Results, images: example_data.Images) -> str:
    settings, k = results.settings, results.settings.neighbours
    lines = [f"| embedding | units | {k}-NN by cosine, % | {k}-NN by distance, % |", "| --- | --- | --- | --- |"]
    for (name, units), runs in results.accuracy.items():
        columns = [spread([100 * run[i] for run in runs], ".1f") for i in range(len(METRICS))]
        lines.append(f"| {name} | {units} | {' | '.join(columns)} |")
    header = ("s_n", "its deviation over pairs", "s_p", "its deviation", "beyond the round boundary, %", "beyond the straight one, %")
    lines += ["", f"| {settings.wide} units | {' | '.join(header)} |", f"|{' --- |' * (1 + len(header))}"]
    for name in (UNTRAINED, *settings.losses):
        runs = results.pairs[name, 0 if name == UNTRAINED else settings.epochs]
        columns = [spread([float(getattr(getattr(run, s), of)()) for run in runs], ".2f") for s in ("s_n", "s_p") for of in ("mean", "std")]
        columns += [spread([100 * inside(run, boundary, settings.m) for run in runs], ".1f") for boundary in (CIRCLE, TRIPLET)]
        lines.append(f"| {name} | {' | '.join(columns)} |")
    tail = (
        f"{images.name}: {len(images.train_x)} training and {len(images.test_x)} test images; {settings.epochs} epochs, m {settings.m:g}, "
        f"gamma {settings.gamma_plane:g} with {PLANE} units and {settings.gamma_wide:g} with {settings.wide}; mean ± standard deviation "
        f"over seeds {', '.join(map(str, settings.seeds))}; torch {torch.__version__}, pairloss {pairloss.__version__}."
    )
    return "\n".join([*lines, "", tail, ""])


def main(
    out: Annotated[Path, typer.Option(help="Where circle.png, circle-pairs.png and results/circle.md go.")],
    data: Annotated[str, typer.Option(help=example_data.HELP)] = "digits",
    losses: Annotated[str, typer.Option(help="What to compare, separated by commas.")] = ",".join(Settings.losses),
    epochs: Annotated[int, typer.Option(min=1)] = Settings.epochs,
    seeds: Annotated[int, typer.Option(min=1, help="How many.")] = len(Settings.seeds),
    m: Annotated[float, typer.Option(help="Relaxation of the circle loss, margin of the triplets; in (0, 1).")] = Settings.m,
    gamma: Annotated[float, typer.Option(min=1e-3, help="Scale of the circle loss with the wide embedding.")] = Settings.gamma_wide,
    gamma_plane: Annotated[float, typer.Option(min=1e-3, help="The same with 2 units.")] = Settings.gamma_plane,
    wide: Annotated[int, typer.Option(min=3, help="Units of the wide embedding.")] = Settings.wide,
    batch: Annotated[int, typer.Option(min=3)] = Settings.batch,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:NUMBER.")] = Settings.device,
) -> None:
    """Train embeddings of 2 units and wide ones by circle loss, triplet loss and cross-entropy; write pictures and tables."""
    names = tuple(name.strip() for name in losses.split(","))
    known = (SOFTMAX, TRIPLET, CIRCLE)
    if CIRCLE not in names or not set(names) <= set(known):
        raise typer.BadParameter(f"expected some of {', '.join(known)}, with {CIRCLE} among them, got {losses}", param_hint="--losses")
    if not 0 < m < 1:
        raise typer.BadParameter(f"expected a number in (0, 1), got {m:g}", param_hint="--m")
    settings = Settings(
        tuple(range(seeds)), epochs, names, wide, m=m, gamma_plane=gamma_plane, gamma_wide=gamma, batch=batch, device=device
    )
    images = example_data.load(data)
    console = Console()
    with Progress(console=console) as progress:
        task = progress.add_task("training", total=2 * seeds * (1 + len(names)))
        results = run(settings, images, lambda: progress.advance(task))
    (out / "results").mkdir(parents=True, exist_ok=True)
    draw_frames(results, images).savefig(out / "circle.png", dpi=110)
    draw_pairs(results).savefig(out / "circle-pairs.png", dpi=110)
    text = report(results, images)
    (out / "results" / "circle.md").write_text(text)
    console.print(Markdown(text))


if __name__ == "__main__":
    typer.run(main)
