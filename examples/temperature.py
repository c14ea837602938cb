"""What the temperature of the contrastive loss does: one small encoder, trained without labels at ten temperatures, plain and hard.

python -m examples.temperature --out DIR
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress
from scipy.stats import spearmanr

import pairloss

from . import data as example_data
from .temperature_training import Results, Settings, gradient_ratio, losses, measured_ratio, run

# Okabe and Ito; the line style and the marker say it once more.
PLAIN, HARD, GREY = "#0072b2", "#d55e00", "#717581"
BY_TAU = ("#000000", "#0072b2", "#009e73", "#e69f00")
STYLES = {False: {"color": PLAIN, "marker": "o", "linestyle": "-"}, True: {"color": HARD, "marker": "s", "linestyle": "--"}}
MEASURES = ("uniformity", "tolerance", "embedding_probe", "hidden_probe")
PROBED = {"embedding_probe": "embedding", "hidden_probe": "hidden layer"}
# The thresholds of the findings. A point of accuracy is about two standard errors on the 899 test digits.
RANK, POINT, MUCH, SHARE = 0.9, 0.01, 0.02, 0.5


@dataclass(frozen=True)
class Finding:
    """A claim of the article, the criterion by which it counts here, the numbers, and whether it holds in each seed."""

    claim: str
    criterion: str
    numbers: str
    holds: tuple[bool, ...]

    @property
    def verdict(self) -> str:
        if all(self.holds):
            return "reproduced"
        return f"in {sum(self.holds)} of {len(self.holds)} seeds" if any(self.holds) else "not reproduced"


def findings(results: Results) -> list[Finding]:
    """What of the article holds on these data."""
    return [ratio(results), *trends(results), *probes(results)]


def ratio(results: Results) -> Finding:
    taus = results.settings.taus
    s = torch.linspace(-1, 1, 101, dtype=torch.float64)
    error = max(float((measured_ratio(s, tau, k) - gradient_ratio(s, tau, k)).abs().max()) for tau in taus for k in (None, 10))
    share = [float(gradient_ratio(s, tau)[-10:].sum()) for tau in taus]  # of the similarities above 0.8
    return Finding(
        "The gradient on a negative, relative to the positive's, is r(s); a small τ gives it to the most similar negatives",
        "autograd within 1e-9 of the formula; share of the negatives with s > 0.8 falls with τ",
        f"largest difference {error:.0e}; share {100 * share[0]:.0f} % at τ = {taus[0]:g}, {100 * share[-1]:.0f} % at τ = {taus[-1]:g}",
        (error < 1e-9 and share == sorted(share, reverse=True),),
    )


def trends(results: Results, start: float = 0) -> list[Finding]:
    """What depends on τ, for τ from `start` up."""
    chosen = np.array(results.settings.taus) >= start
    taus = np.array(results.settings.taus)[chosen]
    uniformity, tolerance = ([results.over_taus(hard, name)[chosen] for hard in (False, True)] for name in MEASURES[:2])
    positive, gap = (results.over_taus(False, name)[chosen] for name in ("positive", "gap"))

    def rises(claim: str, values: np.ndarray, other: np.ndarray | None = None, sign: int = 1) -> Finding:
        """Values [taus, seeds] rise (sign 1) or fall (-1) with τ, or with other values."""
        rho = [rank_correlation(taus if other is None else other[:, i], values[:, i]) for i in range(values.shape[1])]
        bound = f"≥ {RANK:g}" if sign > 0 else f"≤ -{RANK:g}"
        extremes = "" if other is not None else f"; lowest at τ = {taus[low(values)]:g}, highest at τ = {taus[low(-values)]:g}"
        return Finding(claim, f"rank correlation {bound}", spread(rho, 2) + extremes, tuple(sign * r >= RANK for r in rho))

    def steadier(claim: str, plain: np.ndarray, hard: np.ndarray) -> Finding:
        """The values lie lower on average, and vary less over τ."""
        ranges, means = [np.ptp(v, axis=0) for v in (plain, hard)], [v.mean(0) for v in (plain, hard)]
        holds = (means[1] < means[0]) & (ranges[1] < SHARE * ranges[0])
        numbers = f"mean {spread(means[1])}, plain {spread(means[0])}; range {spread(ranges[1])}, plain {spread(ranges[0])}"
        return Finding(claim, f"lower mean over τ, range under {100 * SHARE:g} % of plain's", numbers, tuple(holds.tolist()))

    return [
        rises("Plain: the larger τ, the less uniform (the measure rises)", uniformity[0]),
        steadier("Hard: more uniform on the whole, and less dependent on τ", *uniformity),
        rises("Plain: the larger τ, the more tolerant of similar images", tolerance[0]),
        steadier("Hard: less tolerant on the whole, and less dependent on τ", *tolerance),
        rises("Plain: uniformity costs tolerance (both measures rise together)", tolerance[0], uniformity[0]),
        rises("Plain: the larger τ, the nearer the positives are to similarity 1", positive),
        rises("Plain: the larger τ, the smaller the gap from the positives to the nearest negatives", gap, sign=-1),
    ]


def probes(results: Results) -> list[Finding]:
    """What concerns accuracy. All are compared on the test half, for the choice of the best τ too."""
    taus, found = results.settings.taus, []
    for name in MEASURES[2:]:
        plain, hard = (results.over_taus(h, name) for h in (False, True))
        simple, hard_simple = (np.array([getattr(r, name) for r in results.of("simple", h)]) for h in (False, True))
        best, best_hard = plain.max(0), hard.max(0)
        drops = [best - plain[0], best - plain[-1], best_hard - hard[-1]]
        where = f"probe on the {PROBED[name]}"
        found += [
            Finding(
                f"Plain: accuracy over τ is an inverted U ({where})",
                f"smallest and largest τ at least {100 * POINT:g} point below the best",
                f"best at τ = {taus[low(-plain)]:g}; {points(drops[0])} less at τ = {taus[0]:g}, {points(drops[1])} at {taus[-1]:g}",
                tuple((np.minimum(drops[0], drops[1]) >= POINT).tolist()),
            ),
            Finding(
                f"Hard: stays good at large τ ({where})",
                f"above plain at the largest τ, and loses under {100 * SHARE:g} % of what plain loses from its best",
                f"{percent(hard[-1])}, plain {percent(plain[-1])}; lost {points(drops[2])}, plain {points(drops[1])}",
                tuple(((hard[-1] > plain[-1]) & (drops[2] < SHARE * drops[1])).tolist()),
            ),
            Finding(
                f"Simple: much worse than contrastive ({where})",
                f"at least {100 * MUCH:g} points below contrastive at its best τ",
                f"{percent(simple)}, contrastive {percent(best)}",
                tuple((best - simple >= MUCH).tolist()),
            ),
            Finding(
                f"Hard simple: as good as contrastive ({where})",
                f"at most {100 * POINT:g} point below contrastive at its best τ",
                f"{percent(hard_simple)}, contrastive {percent(best)}",
                tuple((best - hard_simple <= POINT).tolist()),
            ),
        ]
    return found


def rank_correlation(x: Sequence[float] | np.ndarray, y: np.ndarray) -> float:
    # What is constant neither rises nor falls.
    return float(spearmanr(x, y).statistic) if np.ptp(x) and np.ptp(y) else 0.0


def low(values: np.ndarray) -> int:
    """Where [taus, seeds] are lowest on average."""
    return int(values.mean(1).argmin())


def spread(values: Sequence[float] | np.ndarray, digits: int = 3, unit: str = "") -> str:
    # A negative zero would be shown as -0.000.
    mean = statistics.mean(map(float, values)) + 0.0
    deviation = f" ± {statistics.stdev(map(float, values)):.{digits}f}" if len(values) > 1 else ""
    return f"{mean:.{digits}f}{deviation}{unit}"


def percent(values: Sequence[float] | np.ndarray) -> str:
    return spread(100 * np.asarray(values), 1, " %")


def points(values: np.ndarray) -> str:
    return spread(100 * values, 1, " points")


def draw(results: Results) -> Figure:
    figure = Figure(figsize=(13, 8), layout="constrained")
    axes = figure.subplots(2, 3)
    draw_ratio(axes[0, 0], results.settings)
    titles = (
        "Uniformity (lower: more even)",
        "Tolerance (higher: classes closer)",
        "Linear probe on the embedding",
        "Linear probe on the hidden layer",
    )
    for ax, name, title in zip(axes.flat[1:5], MEASURES, titles, strict=True):
        percents = name in PROBED
        for hard in (False, True):
            values = results.over_taus(hard, name) * (100 if percents else 1)
            mean, deviation = values.mean(1), values.std(1, ddof=1) if values.shape[1] > 1 else None
            label = f"hard: nearest {100 * results.settings.top_share:g} %" if hard else "plain"
            ax.errorbar(results.settings.taus, mean, deviation, capsize=3, markersize=5, label=label, **STYLES[hard])
        if percents:
            ax.axhline(100 * results.pixel_probe, color=GREY, linestyle=":", label="raw pixels")
        over_tau(ax, title, "test accuracy, %" if percents else name)
    low_end, high_end = (f([ax.get_ylim()[i] for ax in axes[1, :2]]) for i, f in enumerate((min, max)))
    for ax in axes[1, :2]:
        ax.set_ylim(low_end, high_end)
    draw_four(axes[1, 2], results)
    figure.suptitle(headline(results), fontsize=14)
    return figure


def headline(results: Results) -> str:
    plain, hard = (results.over_taus(h, "embedding_probe").mean(1) for h in (False, True))
    taus = results.settings.taus
    ends = ", ".join(f"{name} {100 * values[-1]:.1f} %" for name, values in (("plain", plain), ("hard", hard)))
    return f"Accuracy of the plain loss is best at τ = {taus[int(plain.argmax())]:g}; at τ = {taus[-1]:g}: {ends}"


def over_tau(ax: Axes, title: str, label: str) -> None:
    ax.set(xscale="log", xlabel="temperature τ", ylabel=label)
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_title(title, fontsize=12)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=9)


def draw_ratio(ax: Axes, settings: Settings) -> None:
    s = torch.linspace(-1, 1, 101, dtype=torch.float64)
    for tau, colour in zip(settings.shown, BY_TAU, strict=False):
        ax.plot(s, gradient_ratio(s, tau), color=colour, label=f"τ = {tau:g}")
        ax.plot(s[::10], measured_ratio(s, tau)[::10], "o", color=colour, markersize=4)
    ax.set(yscale="log", ylim=(1e-6, 3), xlabel="similarity s of a negative", ylabel="r(s), share of the gradient")
    ax.set_title("Share of each negative (dots: autograd)", fontsize=12)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=9)


def draw_four(ax: Axes, results: Results) -> None:
    """Contrastive, hard contrastive, simple, hard simple side by side."""
    best = [results.settings.taus[low(-results.over_taus(hard, "embedding_probe"))] for hard in (False, True)]
    rows = [results.of("contrastive", False, best[0]), results.of("contrastive", True, best[1])]
    rows += [results.of("simple", hard) for hard in (False, True)]
    ticks = [f"contrastive\n(τ = {best[0]:g})", f"hard\ncontrastive\n(τ = {best[1]:g})", "simple", "hard\nsimple"]
    for i, (name, marker, fill) in enumerate((("embedding_probe", "o", "full"), ("hidden_probe", "D", "none"))):
        for j, (runs, hard) in enumerate(zip(rows, (False, True, False, True), strict=True)):
            values = 100 * np.array([getattr(r, name) for r in runs])
            ax.plot([j + 0.3 * i - 0.15] * len(values), values, marker, color=STYLES[hard]["color"], alpha=0.7, fillstyle=fill)
        ax.plot([], [], marker, color=GREY, fillstyle=fill, label=f"probe on the {PROBED[name]}")
    ax.set_xticks(range(4), ticks)
    ax.set_ylabel("test accuracy, %")
    ax.set_title("Four losses, a mark for each seed", fontsize=12)
    ax.grid(alpha=0.3, axis="y")
    ax.set_ylim(ax.get_ylim()[0] - 0.25 * np.ptp(ax.get_ylim()))  # room for the legend
    ax.legend(fontsize=9, loc="lower left")


def draw_similarities(results: Results) -> Figure:
    shown = results.settings.shown
    figure = Figure(figsize=(13, 6), layout="constrained")
    axes = figure.subplots(2, len(shown), sharex=True, sharey=True, squeeze=False)
    values = {
        (hard, tau): [
            torch.cat([getattr(r, n).flatten() for r in results.of("contrastive", hard, tau)]) for n in ("positives", "negatives")
        ]
        for hard in (False, True)
        for tau in shown
    }
    # The few below are left out of view, so that the rest can be told apart.
    start = math.floor(10 * min(float(v.quantile(0.005)) for pair in values.values() for v in pair)) / 10
    gaps = {}
    for (key, (positives, negatives)), ax in zip(values.items(), axes.flat, strict=True):
        edges = np.linspace(start, 1, 51)
        ax.hist(negatives, edges, density=True, color=HARD, alpha=0.6, label=f"{results.settings.nearest} nearest negatives")
        ax.hist(positives, edges, density=True, color=PLAIN, alpha=0.6, label="positive")
        gaps[key] = float(positives.mean() - negatives.mean())
        ax.set_title(f"{'hard' if key[0] else 'plain'}, τ = {key[1]:g}: gap {gaps[key]:.3f}", fontsize=11)
        ax.grid(alpha=0.3)
    for ax in axes[-1]:
        ax.set_xlabel("similarity of two views")
    for ax in axes[:, 0]:
        ax.set_ylabel("density")
    axes[0, 0].legend(fontsize=9, loc="upper left")
    ends = [gaps[False, tau] for tau in (shown[0], shown[-1])]
    gap = f"{ends[0]:.3f} at τ = {shown[0]:g}, {ends[1]:.3f} at τ = {shown[-1]:g}"
    figure.suptitle(f"Gap between positives and nearest negatives, plain: {gap}", fontsize=14)
    return figure


def row(finding: Finding) -> str:
    return f"| {finding.claim} | {finding.criterion} | {finding.numbers} | **{finding.verdict}** |"


def fragment(results: Results, images: example_data.Images) -> str:
    settings = results.settings
    lines = ["| loss | uniformity | tolerance | probe, embedding | probe, hidden layer |", "|---|---|---|---|---|"]
    for loss in losses(settings):
        if math.isnan(loss.tau) or loss.tau in settings.shown:
            runs = results.of(loss.kind, loss.hard, loss.tau)
            columns = [(spread, percent)[name in PROBED]([getattr(r, name) for r in runs]) for name in MEASURES]
            lines.append(f"| {loss} | {' | '.join(columns)} |")
    lines += [f"| raw pixels | | | {100 * results.pixel_probe:.1f} % | |", ""]
    lines += ["| finding of the article | counts as reproduced if, in every seed | numbers | verdict |", "|---|---|---|---|"]
    lines += list(map(row, findings(results)))
    start = settings.taus[low(results.over_taus(False, "uniformity"))]
    if start > settings.taus[0] and len(later := [tau for tau in settings.taus if tau >= start]) > 2:
        what = f"the same, for the {len(later)} temperatures from τ = {start:g} up, where the plain loss is the most uniform"
        lines += ["", f"| {what} | criterion | numbers | verdict |", "|---|---|---|---|", *map(row, trends(results, start))]
    counts = f"{len(images.train_x):,} images for training, {len(images.test_x):,} for the test"
    seeds = ", ".join(map(str, settings.seeds))
    return "\n".join(
        [*lines, "", f"{images.name}: {counts}; seeds {seeds}; torch {torch.__version__}, pairloss {pairloss.__version__}.", ""]
    )


def main(
    out: Annotated[Path, typer.Option(help="Folder for temperature.png, temperature-similarity.png and results/temperature.md.")],
    data: Annotated[str, typer.Option(help=example_data.HELP)] = "digits",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = Settings.epochs,
    batch: Annotated[int, typer.Option(min=3, help="Images in a batch; all but one are negatives.")] = Settings.batch,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each loss.")] = len(Settings.seeds),
    top_share: Annotated[float, typer.Option(help="Share of the negatives that the hard forms keep, in (0, 1].")] = Settings.top_share,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:NUMBER.")] = Settings.device,
) -> None:
    """Train at ten temperatures, plain and hard; write the pictures and the tables."""
    if not 0 < top_share <= 1:
        raise typer.BadParameter(f"expected a share in (0, 1], got {top_share:g}", param_hint="--top-share")
    settings = replace(Settings(), epochs=epochs, batch=batch, seeds=tuple(range(seeds)), top_share=top_share, device=device)
    images = example_data.load(data)
    console = Console()
    with Progress(console=console) as progress:
        task = progress.add_task("training", total=len(losses(settings)) * seeds)
        results = run(settings, images, lambda: progress.advance(task))
    (out / "results").mkdir(parents=True, exist_ok=True)
    draw(results).savefig(out / "temperature.png", dpi=100)
    draw_similarities(results).savefig(out / "temperature-similarity.png", dpi=100)
    text = fragment(results, images)
    (out / "results" / "temperature.md").write_text(text)
    console.print(Markdown(text))


if __name__ == "__main__":
    typer.run(main)
