"""Time of a step and peak memory of a rank under pairloss.distributed, by gloo on this machine, appended to bench/results/ranks.csv.

    python bench/ranks.py --losses snnl clip --ranks 1 2 --rows 8192 --columns 128

One thread for each rank, each on a core of its own while there are as many. Time: forward and backward, the slowest rank of each round.
Memory: the most that a rank holds above its rows and what the process held before, the largest of the ranks.
"""

import argparse
import csv
import datetime
import gc
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import LOSSES, Case
from run import RESULTS, commit, machine, percentiles, status
from torch import Tensor

import pairloss
from pairloss.ranks import STRATEGIES

COLUMNS = ["date", "commit", "machine", "torch", "loss", "strategy", "ranks", "n", "d", "quantity", "p20", "p50", "p80", "rounds"]


def measure(rank: int, ranks: int, store: str, case: Case, strategy: str, rounds: int, out: Any) -> None:
    os.sched_setaffinity(0, {rank % os.cpu_count()})
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    loss = pairloss.distributed(LOSSES[case.loss].ours, strategy=strategy)

    def shares(n: int) -> list[Tensor]:
        mine = slice(rank * n // ranks, (rank + 1) * n // ranks)
        parts = (v[mine].clone() if v.ndim else v for v in LOSSES[case.loss].inputs(n, case.d))
        return [v.requires_grad_(v.is_floating_point()) for v in parts]

    loss(*shares(64)).backward()
    inputs = shares(case.n)
    gc.collect()
    before, seconds = status("VmRSS"), []
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(rounds + 1):
        dist.barrier()
        start = time.perf_counter()
        loss(*inputs).backward()
        seconds.append(time.perf_counter() - start)
    values = torch.tensor([*seconds[1:], status("VmHWM") - before], dtype=torch.float64)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    if rank == 0:
        out.put(values.tolist())
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", nargs="+", default=["snnl"], choices=list(LOSSES), metavar="LOSS", help=", ".join(LOSSES))
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=int, default=8192, help="N, of all ranks together")
    parser.add_argument("--columns", type=int, default=128, help="D")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    path = RESULTS / "ranks.csv"
    for loss in arguments.losses:
        case = Case(loss, arguments.rows, arguments.columns, torch.float32)
        for ranks in arguments.ranks:
            for strategy in STRATEGIES[: 2 if ranks > 1 else 1]:
                out = mp.get_context("spawn").SimpleQueue()
                with tempfile.TemporaryDirectory() as folder:
                    context = mp.spawn(measure, (ranks, f"{folder}/store", case, strategy, arguments.rounds, out), ranks, join=False)
                    *seconds, peak = out.get()
                    while not context.join():
                        pass
                what = [
                    datetime.date.today().isoformat(),
                    commit(),
                    machine("cpu"),
                    torch.__version__,
                    loss,
                    strategy,
                    ranks,
                    case.n,
                    case.d,
                ]
                rows = [
                    [*what, "seconds", *percentiles(seconds), arguments.rounds],
                    [*what, "peak bytes", *percentiles([peak]), 1],
                ]
                new = not path.exists()
                with path.open("a", newline="") as file:
                    csv.writer(file).writerows([COLUMNS] * new + rows)
                for row in rows:
                    print(*row[4:], sep="\t", flush=True)


if __name__ == "__main__":
    main()
