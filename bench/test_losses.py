"""Forward and backward, side by side with pytest-benchmark. The paired ratios of the notes come from bench/run.py."""

import pytest
import torch
from cases import LOSSES, Case, inputs_of, providers_of, step_of, why_not

CASES = [Case(loss, n, 128, torch.float32) for loss in LOSSES for n in (512, 2048)]
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
MEMORY_LIMIT = 1e9


@pytest.mark.parametrize(
    ("case", "device", "provider"),
    [(case, device, provider) for case in CASES for device in DEVICES for provider in providers_of(case.loss, device)],
    ids=lambda value: value.id if isinstance(value, Case) else value,
)
def test_forward_and_backward(benchmark, case, device, provider):
    reason = why_not(case, provider, device, MEMORY_LIMIT)
    if reason is not None:
        pytest.skip(reason)
    run = step_of(case, provider, [inputs_of(case, device)])

    def step() -> None:
        run()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{case.id} {device}"
    benchmark.pedantic(step, warmup_rounds=1, rounds=10)
