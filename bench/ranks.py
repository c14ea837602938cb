"""Time of a step and peak memory of a rank under pairloss.distributed, appended to bench/results/ranks.csv.

    torchrun --nproc-per-node 4 bench/ranks.py --loss snnl --strategy ring --rows 8192 --columns 128
    tests/hosts.sh 4 1000 python bench/ranks.py --loss snnl --strategy ring --network "1,000 Mbit/s"

On CPUs by gloo, one thread for each rank, each on a core of its own while there are as many; with --device cuda by NCCL. Time: forward and
backward, the slowest rank of each round. Memory: the most that a rank holds above its rows and what the process held before, the
largest of the ranks. Hop: the time in which every rank sends its rows, float32, to the next. bench/rank_costs.py has a model of all that.
"""

import argparse
import csv
import datetime
import gc
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from cases import LOSSES
from run import DTYPES, RESULTS, commit, machine, percentiles, status
from torch import Tensor

import pairloss
from pairloss.ranks import STRATEGIES, Ranks

COLUMNS = [
    *("date", "commit", "machine", "torch", "network", "loss", "strategy", "ranks"),
    *("n", "d", "dtype", "quantity", "p20", "p50", "p80", "rounds"),
]  # fmt: skip


def slowest(step: Callable[[], object], rounds: int, device: torch.device) -> list[float]:
    """The seconds of each round, of the rank that took longest."""
    seconds = []
    for _ in range(rounds + 1):
        dist.barrier()
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    values = torch.tensor(seconds[1:], dtype=torch.float64, device=device)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return values.tolist()


class Peak:
    """Bytes above what is held at the start."""

    def __init__(self, device: torch.device) -> None:
        gc.collect()
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")
            self.before = status("VmRSS")

    def of_all_ranks(self) -> float:
        now = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else status("VmHWM")
        value = torch.tensor(float(now - self.before), dtype=torch.float64, device=self.device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return value.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", default="snnl", choices=list(LOSSES), metavar="LOSS", help=", ".join(LOSSES))
    parser.add_argument("--strategy", default="gather", choices=STRATEGIES)
    parser.add_argument("--rows", type=int, default=8192, help="N, of all ranks together")
    parser.add_argument("--columns", type=int, default=128, help="D")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--network", default="one machine", help="what the row says of it")
    arguments = parser.parse_args()
    local_rank = int(os.environ["LOCAL_RANK"])
    if arguments.device == "cuda":
        torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank)
        dist.init_process_group()
    else:
        os.sched_setaffinity(0, {local_rank % os.cpu_count()})
        torch.set_num_threads(1)
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    rank, ranks, n, d = dist.get_rank(), dist.get_world_size(), arguments.rows, arguments.columns
    loss, dtype = LOSSES[arguments.loss], DTYPES[arguments.dtype]

    def shares(n: int) -> list[Tensor]:
        mine = slice(rank * n // ranks, (rank + 1) * n // ranks)
        parts = (v[mine] if v.ndim else v for v in loss.inputs(n, d))
        parts = [v.to(device, dtype if v.is_floating_point() and v.ndim else v.dtype, copy=True) for v in parts]
        return [v.requires_grad_(v.is_floating_point()) for v in parts]

    function = pairloss.distributed(loss.ours, strategy=arguments.strategy)
    function(*shares(64 * ranks)).backward()
    inputs = shares(n)
    peak = Peak(device)
    quantities = {"seconds": slowest(lambda: function(*inputs).backward(), arguments.rounds, device)}
    quantities["peak bytes"] = [peak.of_all_ranks()]
    if ranks > 1:
        group = Ranks(dist.group.WORLD, "ring", "")
        rows, starts = torch.zeros(n // ranks, d, device=device), [n // ranks * i for i in range(ranks + 1)]
        quantities["hop seconds"] = slowest(lambda: group.shift([rows], 1, group.rank - 1, starts)(), 10, device)
    if rank == 0:
        what = [datetime.date.today().isoformat(), commit(), machine(arguments.device), torch.__version__, arguments.network]
        what += [arguments.loss, arguments.strategy, ranks, n, d, arguments.dtype]
        write([[*what, quantity, *percentiles(values), len(values)] for quantity, values in quantities.items()])
    dist.destroy_process_group()


def write(rows: list[list]) -> None:
    path = RESULTS / "ranks.csv"
    new = not path.exists()
    with path.open("a", newline="") as file:
        csv.writer(file).writerows([COLUMNS] * new + rows)
    for row in rows:
        print(*row[4:], sep="\t", flush=True)


if __name__ == "__main__":
    main()
