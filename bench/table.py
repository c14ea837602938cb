"""Writes the README's tables of memory and time from the newest rows of bench/results/cpu.csv: python bench/table.py.

With --cases it prints every case of a file instead, beside all that it was compared with:

    python bench/table.py --cases --results bench/results/cuda.csv --dtype bfloat16
"""

import argparse
import csv
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench/results/cpu.csv"
BEGIN, END = "<!-- table of {}: python bench/table.py -->", "<!-- end of table -->"
SIZES = (128, 512, 2048, 4096, 8192, 16384, 32768, 65536)
ROWS = 8192

Found = dict[tuple[str, str, int, str], float]


def newest(path: Path, dtype: str = "float32", d: int = 128) -> Found:
    """Medians on the machine measured last, by loss, provider, N and quantity."""
    rows = [row for row in last_machine(path) if (row["dtype"], int(row["d"])) == (dtype, d)]
    return {(row["loss"], row["provider"], int(row["n"]), row["quantity"]): float(row["p50"]) for row in rows}


def last_machine(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if row["machine"] == rows[-1]["machine"]]


def cases(path: Path, dtype: str) -> str:
    """All cases, and what each provider takes and gets wrong."""
    rows = [row for row in last_machine(path) if row["dtype"] == dtype]
    by_d = {d: newest(path, dtype, d) for d in sorted({int(row["d"]) for row in rows})}
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    measured = [(loss, n, d) for d, found in by_d.items() for loss, by, n, what in found if (by, what) == ("pairloss", "seconds")]
    table = []
    for loss, n, d in sorted(measured):
        found = by_d[d]
        times = cells(found, loss, n, tuple(providers), ())
        times = ["over memory" if (loss, by, n, "bytes needed") in found else time for by, time in zip(providers, times, strict=True)]
        wanted = [("pairloss", "seconds / products"), ("pairloss", "error"), ("naive", "error")]
        more = [found.get((loss, by, n, quantity)) for by, quantity in wanted]
        numbers = ["-" if value is None else f"{value:.2g}" for value in more]
        table.append([f"`{loss}`", f"{n:,}", f"{d:,}", *times, *cells(found, loss, n, (), ("pairloss",)), *numbers])
    head = ("loss", "N", "D", *(f"{by}, ms" for by in providers), "pairloss, MB", "of the products", "error", "naive's")
    return lines(head, table)


def cells(found: Found, loss: str, n: int, times: tuple[str, ...], peaks: tuple[str, ...]) -> list[str]:
    columns = [(provider, "seconds", 1e-3, 1 if n < 4096 else 0) for provider in times]
    columns += [(provider, "peak bytes", 1e6, 0) for provider in peaks]
    values = [(found.get((loss, provider, n, quantity)), unit, digits) for provider, quantity, unit, digits in columns]
    return ["-" if value is None else f"{value / unit:,.{digits}f}" for value, unit, digits in values]


def lines(head: tuple[str, ...], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [list(head), ["---"] * len(head), *rows])


def tables(path: Path = RESULTS, n: int = ROWS) -> dict[str, str]:
    found = newest(path)
    measured_sizes = [size for size in SIZES if ("snnl", "pairloss", size, "seconds") in found]
    sizes = [
        [f"{size:,}", *cells(found, "snnl", size, ("pairloss", "naive", "products"), ("pairloss", "naive"))] for size in measured_sizes
    ]
    measured = dict.fromkeys(loss for loss, provider, size, _ in found if (provider, size) == ("pairloss", n))
    losses = [[f"`{loss}`", *cells(found, loss, n, ("pairloss", "naive", "pml"), ("pairloss", "naive", "pml"))] for loss in measured]
    return {
        "sizes": lines(("N", "pairloss, ms", "naive, ms", "products, ms", "pairloss, MB", "naive, MB"), sizes),
        "losses": lines(("loss", "pairloss, ms", "naive, ms", "PML, ms", "pairloss, MB", "naive, MB", "PML, MB"), losses),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--rows", type=int, default=ROWS, help="N of the table of losses")
    parser.add_argument("--into", type=Path, default=ROOT / "README.md", help="the page with the tables")
    parser.add_argument("--cases", action="store_true", help="print every case")
    parser.add_argument("--dtype", default="float32", help="of --cases")
    arguments = parser.parse_args()
    if arguments.cases:
        print(cases(arguments.results, arguments.dtype))
        return
    page = arguments.into.read_text()
    for name, table in tables(arguments.results, arguments.rows).items():
        before, rest = page.split(BEGIN.format(name))
        _, after = rest.split(END, 1)
        page = f"{before}{BEGIN.format(name)}\n{table}\n{END}{after}"
    arguments.into.write_text(page)


if __name__ == "__main__":
    main()
