"""A model of a step under pairloss.distributed: computation, bytes on the wire, and what of one hides behind the other.

    python bench/rank_costs.py             beside the newest rows of bench/results/ranks.csv
    python bench/rank_costs.py --predict   many GPUs, from assumed rates (none was measured)

A rank has n = N / ranks rows of D columns. A pass goes over all pairs: `products` times n^2 D for a block of n x n pairs, while each
row of the next block brings `row_bytes` D and each row of the one before takes `result_bytes` D on. Losses of rows against themselves
compute their own block at half the price, and of two ranks' blocks one (pairloss.ranks, once).
"""

import argparse
import csv
from typing import NamedTuple

from run import RESULTS

FLOAT32, BFLOAT16 = 4, 2
CORES = 2  # of the CPUs that the rows are of
KEYS = ("network", "loss", "strategy", "ranks", "n", "d", "dtype", "quantity", "machine")
# What a GPU is taken to do: products of the whole loss in bfloat16, and bytes each way within 8 GPUs and beyond.
RATE, WITHIN, BEYOND = 400e12, 300e9, 40e9
SIZES = [(2**17, 8), (2**20, 8), (2**20, 32), (2**20, 256), (2**22, 256), (12_000_000, 32), (2**24, 256), (2**24, 1024), (2**20, 1024)]


class Pass(NamedTuple):
    products: int
    row_bytes: int
    result_bytes: int


class Form(NamedTuple):
    once: bool
    passes: tuple[Pass, ...]


def form(loss: str, row_bytes: int) -> Form:
    if loss == "siglip":  # the gradient is formed in the forward pass
        return Form(False, (Pass(6, row_bytes, FLOAT32),))
    return Form(loss != "clip", (Pass(2, row_bytes, 0), Pass(6, row_bytes, FLOAT32)))


def flops(form: Form, n: int, d: int, ranks: int) -> float:
    return sum(sum(blocks(form, of, n, d, ranks)) for of in form.passes)


def blocks(form: Form, of: Pass, n: int, d: int, ranks: int) -> list[float]:
    """Of every step of the ring, floating-point operations."""
    whole = of.products * n * n * d
    if not form.once:
        return [whole] * ranks
    last = [whole / 2] if ranks % 2 == 0 else []
    return [whole / 2] + [whole] * ((ranks - 1) // 2) + last


def seconds(form: Form, strategy: str, n: int, d: int, ranks: int, rate: float, bandwidth: float) -> float:
    return sum((ring if strategy == "ring" else gather)(form, of, n, d, ranks, rate, bandwidth) for of in form.passes)


def gather(form: Form, of: Pass, n: int, d: int, ranks: int, rate: float, bandwidth: float) -> float:
    return sum(blocks(form, of, n, d, ranks)) / rate + (ranks - 1) * n * d * (of.row_bytes + of.result_bytes) / bandwidth


def ring(form: Form, of: Pass, n: int, d: int, ranks: int, rate: float, bandwidth: float) -> float:
    """The exchanges hide behind the computation, but for the last result."""
    steps, row, result = blocks(form, of, n, d, ranks), n * d * of.row_bytes / bandwidth, n * d * of.result_bytes / bandwidth
    if ranks == 1:
        return steps[0] / rate
    total = result
    for i, step in enumerate(steps):
        wire = (row if i + 1 < len(steps) else 0) + (result if i > (1 if form.once else 0) else 0)
        total += max(step / rate, wire)
    return total


def bytes_held(loss: str, n: int, d: int, row_bytes: int) -> float:
    """Beside a rank's inputs under "ring", in the backward pass: prepared rows and their gradients, two blocks on their way, the one that
    is computed with, and its gradient: as computed, on its way out and in.
    """
    sides = 2 if loss in ("clip", "siglip") else 1
    held = sides * FLOAT32 + sides * FLOAT32 + 2 * row_bytes + FLOAT32 + 3 * FLOAT32
    return n * d * held


def compare() -> None:
    with (RESULTS / "ranks.csv").open() as file:
        found = {tuple(row[key] for key in KEYS): row for row in csv.DictReader(file)}
    medians = {key: float(row["p50"]) for key, row in found.items()}
    print(f"{'network':14}{'loss':6}{'strategy':9}{'ranks':>5}{'N':>7}{'D':>5}{'seconds':>9}{'model':>9}{'MB':>7}{'model':>7}")
    for key, measured in medians.items():
        network, loss, strategy, ranks, n, d, dtype, quantity, machine = key
        ranks, n, d = int(ranks), int(n), int(d)
        alone = medians.get(("one machine", loss, "gather", "1", str(n), str(d), dtype, quantity, machine))
        hop = medians.get((network, loss, strategy, str(ranks), str(n), str(d), dtype, "hop seconds", machine))
        if quantity != "seconds" or dtype != "float32" or alone is None or hop is None:
            continue
        how = form(loss, FLOAT32)
        rate, bandwidth = flops(how, n, d, 1) / alone * min(1, CORES / ranks), n // ranks * d * FLOAT32 / hop
        model = seconds(how, strategy, n // ranks, d, ranks, rate, bandwidth)
        peak = medians[(*key[:-2], "peak bytes", machine)]
        held = bytes_held(loss, n // ranks, d, FLOAT32) if strategy == "ring" else float("nan")
        print(f"{network:14}{loss:6}{strategy:9}{ranks:5}{n:7}{d:5}{measured:9.3f}{model:9.3f}{peak / 1e6:7.1f}{held / 1e6:7.1f}")


def predict() -> None:
    print(f"bfloat16, D = 768, {RATE / 1e12:.0f} TFLOP/s, {WITHIN / 1e9:.0f} GB/s within 8 GPUs, {BEYOND / 1e9:.0f} GB/s beyond; ring")
    print(f"{'loss':8}{'N':>12}{'GPUs':>6}{'seconds':>10}{'of it wire':>12}{'gather, s':>10}{'GB a GPU':>10}")
    for loss in ("clip", "siglip", "snnl"):
        for n, ranks in SIZES:
            how, mine = form(loss, BFLOAT16), n // ranks
            bandwidth = WITHIN if ranks <= 8 else BEYOND
            ring_seconds, gather_seconds = (seconds(how, strategy, mine, 768, ranks, RATE, bandwidth) for strategy in ("ring", "gather"))
            wire = 1 - flops(how, mine, 768, ranks) / RATE / ring_seconds
            held = bytes_held(loss, mine, 768, BFLOAT16) / 1e9
            print(f"{loss:8}{n:12,}{ranks:6}{ring_seconds:10.3f}{wire:12.1%}{gather_seconds:10.3f}{held:10.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predict", action="store_true")
    if parser.parse_args().predict:
        predict()
    else:
        compare()
