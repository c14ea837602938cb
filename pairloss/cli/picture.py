"""The picture: test set in the plane, raw and as both codes, and the entanglement over the epochs."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from sklearn.decomposition import PCA
from sklearn.preprocessing import normalize

from .autoencoder import CODE, LAYERS, Run
from .data import NEIGHBOURS, Array
from .report import Outcome

# Petroff 2021: ten colours that stay apart for colour-blind readers. The marker says the class once more.
TEN = ("#3f90da", "#e76300", "#bd1f01", "#717581", "#832db6", "#a96b59", "#ffa90e", "#b9ac70", "#94a4a2", "#92dadd")
# Okabe and Ito, without yellow; the code in black.
LAYER_COLOURS = ("#56b4e9", "#0072b2", "#009e73", "#000000", "#cc79a7", "#d55e00", "#e69f00")
LEGEND_CLASSES = 20


def draw(outcome: Outcome, path: Path) -> None:
    data, accuracy = outcome.data, outcome.accuracy
    colours = TEN if len(data.classes) <= len(TEN) else tuple(map(tuple, colormaps["turbo"](np.linspace(0, 1, len(data.classes)))))
    markers = [f"${c}$" if c.isdigit() and len(c) <= 2 else "o" for c in data.classes]

    figure = Figure(figsize=(11, 10.4), layout="constrained")
    top, bottom = figure.subplots(2, 2)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)  # type: ignore[union-attr,call-arg]
    figure.suptitle(title(outcome), fontsize=14)
    units = f"{outcome.settings.code_units}-unit code"
    unit_length = outcome.settings.metric == "cosine"  # a code is then its direction
    codes = [normalize(run.test_codes) if unit_length else run.test_codes for run in (outcome.plain, outcome.with_snnl)]
    for axes, rows, name, key in (
        (top[0], data.test_x, f"raw features ({data.test_x.shape[1]})", "raw"),
        (top[1], codes[0], f"autoencoder, {units}", "plain"),
        (bottom[0], codes[1], f"autoencoder + SNNL, {units}", "snnl"),
    ):
        scatter(axes, rows, data.test_y, colours, markers)
        axes.set_title(f"{name}: {NEIGHBOURS}-NN accuracy {accuracy[key]:.1%}", fontsize=12)
    curves(bottom[1], outcome)

    if len(data.classes) <= LEGEND_CLASSES:
        handles = [Line2D([], [], color=colours[i], marker="o", linestyle="", markersize=8, label=c) for i, c in enumerate(data.classes)]
        what = f"{len(data.test_x)} test rows, first two principal components" + (" (codes at unit length)" if unit_length else "")
        figure.legend(handles=handles, title=what, loc="outside lower center", ncols=10, frameon=False, fontsize=11)
    figure.savefig(path, dpi=120)


def title(outcome: Outcome) -> str:
    plain, ours = (final(run)[CODE] for run in (outcome.plain, outcome.with_snnl))
    verb = "pulls the classes apart" if ours < plain else "does not pull the classes apart here"
    return f"The soft nearest neighbour loss {verb}: entanglement of the code {ours:.3f}, without it {plain:.3f}"


def final(run: Run) -> list[float]:
    return list(run.entanglement.values())[-1]


def scatter(axes: Axes, rows: Array, labels: Array, colours: Any, markers: list[str]) -> None:
    # One dimension is enough for a code: the plane then has a flat side.
    plane = PCA(min(2, *rows.shape), random_state=0).fit_transform(rows)
    if plane.shape[1] == 1:
        plane = np.column_stack([plane, np.zeros(len(plane))])
    for i, marker in enumerate(markers):
        mine = labels == i
        axes.scatter(plane[mine, 0], plane[mine, 1], s=26, color=colours[i], marker=marker, linewidths=0.4, alpha=0.85)
    axes.set_xticks([])
    axes.set_yticks([])


def curves(axes: Axes, outcome: Outcome) -> None:
    for run, style in ((outcome.plain, "--"), (outcome.with_snnl, "-")):
        epochs = list(run.entanglement)
        for i, layer in enumerate(LAYERS):
            values = [measured[i] for measured in run.entanglement.values()]
            width = 2.4 if i == CODE else 1.4
            axes.plot(epochs, values, style, color=LAYER_COLOURS[i], linewidth=width, label=layer if style == "-" else None)
    axes.set_title("entanglement per layer: with SNNL solid, without dashed", fontsize=12)
    axes.set_xlabel("epoch")
    axes.set_ylabel(f"SNNL of the training set at T = {outcome.settings.measured_at:g}")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9, ncols=2, framealpha=0.9)
