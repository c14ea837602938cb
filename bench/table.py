"""Writes the README's table of memory and time from the newest rows of bench/results/cpu.csv: python bench/table.py."""

import csv
from pathlib import Path

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- table: python bench/table.py -->", "<!-- end of table -->"
SIZES = (512, 2048, 4096, 8192, 16384, 32768, 65536)


def newest() -> dict[tuple[str, int, str], float]:
    """Medians of float32, D = 128, by provider, N and quantity."""
    with (ROOT / "bench/results/cpu.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["dtype"] == "float32" and row["d"] == "128"]
    return {(row["provider"], int(row["n"]), row["quantity"]): float(row["p50"]) for row in rows}


def table() -> str:
    found = newest()

    def cell(provider: str, n: int, quantity: str, unit: float, digits: int) -> str:
        value = found.get((provider, n, quantity))
        return "-" if value is None else f"{value / unit:,.{digits}f}"

    lines = ["| N | pairloss, ms | naive, ms | products, ms | pairloss, MB | naive, MB |", "|---|---|---|---|---|---|"]
    for n in SIZES:
        times = [cell(provider, n, "seconds", 1e-3, 1 if n < 4096 else 0) for provider in ("pairloss", "naive", "products")]
        peaks = [cell(provider, n, "peak bytes", 1e6, 0) for provider in ("pairloss", "naive")]
        lines.append(f"| {n:,} | " + " | ".join(times + peaks) + " |")
    return "\n".join(lines)


def main() -> None:
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    _, after = rest.split(END)
    readme.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}")


if __name__ == "__main__":
    main()
