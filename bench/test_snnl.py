"""Forward and backward, side by side with pytest-benchmark. The paired ratios of the notes come from bench/run.py."""

import pytest
import torch
from cases import Case, providers

CASES = [Case(512, 128, torch.float32), Case(2048, 128, torch.float32), Case(8192, 128, torch.float32), Case(8192, 128, torch.bfloat16)]
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.mark.parametrize("provider", ["pairloss", "naive", "products"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_forward_and_backward(benchmark, case, device, provider):
    run = providers(case, device)[provider]

    def step() -> None:
        run()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{case.id} {device}"
    benchmark.pedantic(step, warmup_rounds=1, rounds=3 if case.n > 4096 else 20)
