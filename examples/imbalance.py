"""Classes of unequal size: three classes cut to 5 % of their training rows, and what each loss makes of that.

``python -m examples.imbalance --out DIR`` writes imbalance.png, imbalance-effective.png and results/imbalance.md there.
Source of the study: Cui, Jia, Lin, Song and Belongie 2019 (weights by the effective number of samples); network and schedule are ours.
"""

from pathlib import Path
from typing import Annotated, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import torch
import typer
from matplotlib.ticker import NullLocator
from rich.console import Console
from rich.markdown import Markdown
from torch import Tensor

import pairloss

from . import data as example_data
from .data import HELP, Images
from .imbalance_training import (
    BALANCED_FOCAL,
    BALANCED_SOFTMAX,
    BETAS,
    BY_INVERSE,
    CEILING,
    FOCAL,
    GROUPS,
    PAIRWISE,
    SOFTMAX,
    Recipe,
    Results,
    Settings,
    run,
)

COLOURS = {"majority": "#0072B2", "minority": "#D55E00", "all": "#000000"}
MARKERS = {"majority": "o", "minority": "s", "all": "D"}
ARTICLE_ROWS = (250, 5000)


class Finding(NamedTuple):
    claim: str
    article: str
    difference: npt.NDArray[np.float64]  # [seeds], points of accuracy; > 0 where the claim holds

    @property
    def error(self) -> float:
        return float(self.difference.std(ddof=1) / np.sqrt(len(self.difference)))

    @property
    def verdict(self) -> str:
        mean = self.difference.mean()
        if abs(mean) <= 2 * self.error:
            return "undecided"
        return "holds" if mean > 0 else "the opposite"


def findings(results: Results) -> list[Finding]:
    """The article's findings, each as a difference between two rows of the table, seed by seed."""

    def gain(group: str, better: Recipe, worse: Recipe) -> npt.NDArray[np.float64]:
        return results.of(better, group) - results.of(worse, group)

    best_softmax = max(BALANCED_SOFTMAX, key=lambda recipe: results.of(recipe, "all").mean())
    best_focal = max(BALANCED_FOCAL, key=lambda recipe: results.of(recipe, "all").mean())
    low, high = BALANCED_SOFTMAX[0], BALANCED_SOFTMAX[-1]
    return [
        Finding("cutting hurts the minority (softmax)", "94.4 to 50.4", gain("minority", CEILING, SOFTMAX)),
        Finding("inverse frequency raises the minority", "50.4 to 74.7", gain("minority", BY_INVERSE, SOFTMAX)),
        Finding("inverse frequency lowers the majority", "87.9 to 74.1", gain("majority", SOFTMAX, BY_INVERSE)),
        Finding("inverse frequency lowers all", "76.5 to 73.6", gain("all", SOFTMAX, BY_INVERSE)),
        Finding("focal, gamma 1, raises all", "76.5 to 78.3", gain("all", FOCAL[0], SOFTMAX)),
        Finding("focal, gamma 2, is worse than gamma 1 on all", "78.3 to 75.3", gain("all", FOCAL[0], FOCAL[-1])),
        Finding("beta from 0.9 to 0.9999 raises the minority (softmax)", "49.2 to 75.2", gain("minority", high, low)),
        Finding("beta from 0.9 to 0.9999 lowers the majority (softmax)", "88.7 to 80.9", gain("majority", low, high)),
        Finding(
            f"class-balanced softmax (best beta: {best_softmax.weights:g}) beats softmax on all",
            "76.5 to 80.6",
            gain("all", best_softmax, SOFTMAX),
        ),
        Finding(
            f"class-balanced softmax (beta {best_softmax.weights:g}) beats inverse frequency on all",
            "73.6 to 80.6",
            gain("all", best_softmax, BY_INVERSE),
        ),
        Finding(
            f"class-balanced focal (best beta: {best_focal.weights:g}) beats focal on all",
            "78.3 to 80.6",
            gain("all", best_focal, FOCAL[0]),
        ),
        Finding("weights raise the minority of SNNL (inverse frequency)", "not in it", gain("minority", PAIRWISE[1], PAIRWISE[0])),
        Finding("weights raise the minority of SupCon (inverse frequency)", "not in it", gain("minority", PAIRWISE[4], PAIRWISE[3])),
    ]


def report(results: Results, settings: Settings, data: Images) -> str:
    """The fragment of the page: a row for each loss, a line for each finding."""
    few, many = results.counts
    lines = ["| loss | majority, % | minority, % | all, % |", "|---|---:|---:|---:|"]
    for recipe, values in results.accuracy.items():
        cells = [f"{mean:.1f} ± {std:.1f}" for mean, std in zip(values.mean(0), values.std(0, ddof=1), strict=True)]
        lines.append(f"| {recipe.name} | {' | '.join(cells)} |")
    lines += ["", "| finding | article, % | difference here, points | verdict |", "|---|---|---:|---|"]
    for claim in findings(results):
        lines.append(f"| {claim.claim} | {claim.article} | {claim.difference.mean():+.1f} ± {claim.error:.1f} | {claim.verdict} |")
    lines += [
        "",
        "First table: mean ± standard deviation over the seeds. Second: mean of the paired differences ± its standard error, positive "
        'where the finding holds; "holds" and "the opposite" where it is more than two standard errors from 0. The best beta is the best '
        "on the test set, as in the article, which flatters it.",
        "",
        f"Data: {data.name}, {len(data.train_y)} training rows, {len(data.test_y)} test rows; of {data.classes} classes {settings.cut} cut "
        f"from about {many} rows to about {few}. Seeds 0 to {settings.seeds - 1}, {settings.steps} steps. "
        f"torch {torch.__version__}, pairloss {pairloss.__version__}.",
    ]
    return "\n".join(lines) + "\n"


def effective_number(counts: Tensor, beta: float) -> Tensor:
    """E_n = (1 - beta^n) / (1 - beta)."""
    return 1 / pairloss.class_balanced_weights(counts, beta, normalise=False)


def weight_ratio(counts: Tensor, beta: float) -> float:
    """Of the first class to the second."""
    first, second = pairloss.class_balanced_weights(counts, beta)
    return float(first / second)


def draw(results: Results, path: Path) -> None:
    """A line for each loss: majority, minority and all, mean and standard deviation."""
    recipes = list(results.accuracy)
    figure, axes = plt.subplots(figsize=(8.5, 0.31 * len(recipes) + 1.5), layout="constrained")
    for group in GROUPS:
        values = np.array([results.of(recipe, group) for recipe in recipes])
        offset = 0.22 * (GROUPS.index(group) - 1)
        axes.errorbar(
            values.mean(1),
            np.arange(len(recipes)) + offset,
            xerr=values.std(1, ddof=1),
            fmt=MARKERS[group],
            color=COLOURS[group],
            markersize=4.5,
            elinewidth=1,
            label=group,
        )
    for line in range(1, len(recipes), 2):
        axes.axhspan(line - 0.5, line + 0.5, color="0.95", zorder=0)
    axes.axvline(results.of(SOFTMAX, "minority").mean(), color=COLOURS["minority"], linestyle=":", linewidth=1)
    axes.set_yticks(range(len(recipes)), [recipe.name for recipe in recipes])
    axes.set_ylim(len(recipes) - 0.5, -0.5)
    axes.set_xlim(0, 101)
    axes.set_xlabel("accuracy on the test set, % (dotted: minority of plain softmax)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    before, after, weighted = (results.of(recipe, "minority").mean() for recipe in (CEILING, SOFTMAX, BY_INVERSE))
    title = f"Softmax on the classes that are cut: {before:.0f} % before, {after:.0f} % after, {weighted:.0f} % with inverse frequency"
    figure.suptitle(title, x=0.01, ha="left")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_effective(counts: tuple[int, int], path: Path) -> None:
    """E_n against n, and the weight of a cut class over that of another against beta."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.3), layout="constrained")
    n = torch.logspace(0, 5, 200, dtype=torch.float64)
    lines = [*zip(BETAS, plt.colormaps["viridis"](np.linspace(0, 0.75, len(BETAS))), strict=True), (1.0, "0.4")]
    for beta, colour in lines:
        numbers = effective_number(n, beta)
        left.loglog(n, numbers, color=colour, linestyle="--" if beta == 1 else "-")
        left.annotate(f"{beta:g}" + ": n itself" * (beta == 1), (1e5, numbers[-1]), (5, -3), textcoords="offset points", color=colour)
    left.annotate("beta", (1e5, 3), (5, -3), textcoords="offset points", color="0.2")
    left.set(xlabel="n, rows of a class", ylabel="E, effective number of rows", title="E saturates at 1 / (1 - beta)", ylim=(0.8, 1.5e5))

    gaps = torch.logspace(0, -5.5, 150, dtype=torch.float64)
    cases = ((counts, COLOURS["majority"], "o", "here", "right"), (ARTICLE_ROWS, COLOURS["minority"], "s", "article", "left"))
    for (few, many), colour, marker, where, side in cases:
        rows = torch.tensor([few, many], dtype=torch.float64)
        curve = [weight_ratio(rows, 1 - gap) for gap in gaps.tolist()]
        right.semilogx(gaps, curve, color=colour)
        right.semilogx([1 - beta for beta in BETAS], [weight_ratio(rows, beta) for beta in BETAS], marker, color=colour)
        half = next(i for i, ratio in enumerate(curve) if ratio > curve[-1] / 2)
        label = f"{where}:\n{few} rows\nagainst {many:,}"
        right.annotate(
            label,
            (float(gaps[half]), curve[half]),
            (-10 if side == "right" else 10, -20),
            textcoords="offset points",
            ha=side,
            color=colour,
        )
    right.set_xticks([1, *(1 - beta for beta in BETAS), 1e-5], ["0", *(f"{beta:g}" for beta in BETAS), "0.99999"])
    right.xaxis.set_minor_locator(NullLocator())
    right.invert_xaxis()
    right.set(xlabel="beta", ylabel="weight of a cut class, that of another = 1", title="What beta does depends on n", ylim=(0, None))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(
    out: Annotated[Path, typer.Option(help="Folder for the pictures; the tables go to its results/.")],
    data: Annotated[str, typer.Option(help=HELP)] = "digits",
    seeds: Annotated[int, typer.Option(min=2)] = Settings.seeds,
    steps: Annotated[int, typer.Option(min=1)] = Settings.steps,
    cut: Annotated[int, typer.Option(min=1, help="How many classes are cut.")] = Settings.cut,
    keep: Annotated[float, typer.Option(min=0, max=1, help="Fraction of their rows that stays.")] = Settings.keep,
    device: Annotated[str, typer.Option()] = "cpu",
) -> None:
    """Accuracy on the classes that were cut, on the others, and on all, for each loss."""
    images = example_data.load(data)
    if cut >= images.classes:
        raise typer.BadParameter(f"{images.name} has {images.classes} classes: cut fewer", param_hint="--cut")
    settings = Settings(seeds=seeds, steps=steps, cut=cut, keep=keep, device=device)
    results = run(settings, images, quiet=False)
    (out / "results").mkdir(parents=True, exist_ok=True)
    text = report(results, settings, images)
    (out / "results" / "imbalance.md").write_text(text)
    draw(results, out / "imbalance.png")
    draw_effective(results.counts, out / "imbalance-effective.png")
    Console().print(Markdown(text))


if __name__ == "__main__":
    typer.run(main)
