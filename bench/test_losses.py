"""Forward and backward, side by side with pytest-benchmark. The paired ratios of the notes come from bench/run.py."""

import pytest
import torch
from cases import LOSSES, PROVIDERS, Case, step_of, why_not

CASES = [Case(loss, n, 128, torch.float32) for loss in LOSSES for n in (512, 2048)]
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
MEMORY_LIMIT = 1e9


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_forward_and_backward(benchmark, case, device, provider):
    reason = why_not(case, provider, MEMORY_LIMIT)
    if reason is not None:
        pytest.skip(reason)
    run = step_of(case, device, provider)

    def step() -> None:
        run()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{case.id} {device}"
    benchmark.pedantic(step, warmup_rounds=1, rounds=10)
