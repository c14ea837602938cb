"""A function of a test on ranks, by gloo on this machine, and the rows and the model that they share."""

import datetime
import itertools

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from pairloss.testing import FLOORS

needs_gloo = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo")


def assert_close(ours, expected, what=""):
    floor = FLOORS[torch.float64]
    torch.testing.assert_close(ours, expected, rtol=floor, atol=floor, msg=lambda message: f"{what}: {message}")


# Ranks are forks of a process that has imported what takes seconds.
START = "forkserver"
mp.set_forkserver_preload(["torch._dynamo", "pairloss.testing"])


def run(worker, ranks: int, tmp_path, *args, backend: str = "gloo") -> None:
    """The worker on so many ranks; what one of them raises is raised here."""
    mp.start_processes(start_rank, (worker, ranks, f"file://{tmp_path}/store", args, backend), ranks, start_method=START)


def start_rank(rank, worker, ranks, store, args, backend="gloo"):
    torch.set_num_threads(1)
    if "nccl" in backend:
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=ranks, timeout=datetime.timedelta(seconds=60))
    worker(rank, ranks, *args)
    dist.barrier()
    dist.destroy_process_group()


def shares(n: int, ranks: int, even: bool) -> list[slice]:
    """Rows of each rank: as many for all; or none for the first, and most for the last."""
    ends = [n * i // ranks for i in range(ranks + 1)] if even else [0, 0, *range(2, ranks), n]
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


def has_rows(name: str, value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0 and name != "class_weight"


def part(values: dict, rank: int, ranks: int, even: bool) -> dict:
    return {k: v[shares(len(v), ranks, even)[rank]] if has_rows(k, v) else v for k, v in values.items()}


def batch(seed=0, n=24, d=6):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64), torch.randint(0, 4, (n,), generator=generator)


class Model(nn.Module):
    """An encoder and a temperature of its own, which the loss takes out of the model's output."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)).double()
        self.log_tau = nn.Parameter(torch.tensor(-1.0, dtype=torch.float64))

    def forward(self, x):
        return self.encoder(x), self.log_tau.exp()
