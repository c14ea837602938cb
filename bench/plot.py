"""Draws time, memory, and time over that of the products, against N from the newest rows of bench/results/cpu.csv into docs/growth.png.

Of another file, dtype or D:

    python bench/plot.py --results bench/results/cuda.csv --dtype bfloat16 --columns 512 --out growth.png
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator
from table import RESULTS, ROOT, Found, newest

# Okabe and Ito; the marker says it once more.
PROVIDERS = {
    "pairloss": ("pairloss", "#0072b2", "o"),
    "naive": ("dense PyTorch (naive)", "#d55e00", "s"),
    "pml": ("pytorch-metric-learning", "#009e73", "^"),
}
QUANTITIES = {
    "seconds": ("time, forward + backward (ms)", 1e-3),
    "peak bytes": ("peak memory above inputs (MB)", 1e6),
    "seconds / products": ("time / the three products alone", 1),
}


def draw(found: Found, losses: list[str]) -> Figure:
    figure = Figure(figsize=(3.6 * len(losses), 9.0), layout="constrained", facecolor="white")
    grid = figure.subplots(len(QUANTITIES), len(losses), sharex=True, sharey="row", squeeze=False)
    for row, (quantity, (label, unit)) in zip(grid, QUANTITIES.items(), strict=True):
        for axes, loss in zip(row, losses, strict=True):
            for provider, n, values in curves(found, loss, quantity):
                name, colour, marker = PROVIDERS[provider]
                axes.plot(n, [value / unit for value in values], color=colour, marker=marker, markersize=5, linewidth=1.8, label=name)
            style(axes, sorted({n for of, _, n, _ in found if of in losses}))
        row[0].set_ylabel(label)
    for axes, loss in zip(grid[0], losses, strict=True):
        axes.set_title(loss, fontsize=12)
    for axes in grid[-1]:
        axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
        axes.axhline(1, color="#666666", linewidth=0.8)
        axes.set_xlabel("N, rows compared with each other")
    handles = {name: handle for axes in grid[0] for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles), frameon=False, fontsize=11)
    return figure


def curves(found: Found, loss: str, quantity: str) -> Iterator[tuple[str, list[int], list[float]]]:
    for provider in PROVIDERS:
        # No memory beyond what a process had is no point on a logarithmic scale.
        points = sorted(
            (n, value) for (of, by, n, what), value in found.items() if (of, by, what) == (loss, provider, quantity) and value > 0
        )
        if points:
            yield provider, [n for n, _ in points], [value for _, value in points]


def style(axes: Axes, sizes: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    # Every other size, as powers of two are too near to each other to read.
    axes.xaxis.set_major_locator(FixedLocator(sizes[::2]))
    axes.xaxis.set_minor_locator(FixedLocator(sizes))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:,.0f}"))
    axes.yaxis.set_major_locator(LogLocator(10))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", nargs="+", default=["snnl", "supcon", "circle"])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/growth.png")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--columns", type=int, default=128, help="D")
    arguments = parser.parse_args()
    draw(newest(arguments.results, arguments.dtype, arguments.columns), arguments.losses).savefig(arguments.out, dpi=120)


if __name__ == "__main__":
    main()
