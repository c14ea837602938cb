"""Temperatures over the steps: values by hand, interchangeable, bad input."""

import functools
import math

import numpy as np
import pytest
import torch

import pairloss
from pairloss import schedules

SCHEDULES = {
    "constant": functools.partial(schedules.constant, tau=0.3),
    "annealed": schedules.annealed,
    "cosine": functools.partial(schedules.cosine, period=7, low=0.07, high=0.2),
}


def test_annealed_is_the_literature_s():
    assert schedules.annealed(0) == 1
    assert [schedules.annealed(epoch) for epoch in range(1, 5)] == [1 / (1 + epoch) ** 0.55 for epoch in range(1, 5)]
    assert schedules.annealed(3, power=0.5) == pytest.approx(0.5)
    assert schedules.annealed(1000, power=0) == 1


@pytest.mark.parametrize(("low", "high"), [(0.1, 1.0), (0.07, 0.2), (0.3, 0.3), (1e-8, 1e8)])
@pytest.mark.parametrize("period", [400, 10, 7.5])
def test_cosine_turns_at_high_and_low(low, high, period):
    tau = functools.partial(schedules.cosine, period=period, low=low, high=high)
    assert [tau(0), tau(period), tau(period / 2), tau(1.5 * period)] == [high, high, low, low]
    assert [tau(10**12 * period), tau((10**12 + 0.5) * period)] == [high, low]  # no digits lost to the turns that are over
    assert tau(period / 4) == pytest.approx((low + high) / 2)
    for step in np.linspace(0, 3 * period, 50):
        assert tau(step) == pytest.approx(low + (high - low) * (1 + math.cos(2 * math.pi * step / period)) / 2, rel=1e-12)
        assert low * (1 - 1e-15) <= tau(step) <= high * (1 + 1e-15)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_every_schedule_takes_a_step_and_gives_a_number_that_a_loss_takes(schedule):
    module = pairloss.nn.SNNL()
    x, labels = torch.randn(8, 3), torch.arange(8) % 2
    for step in (0, 1, 2.5, np.int64(3), 10**9):
        tau = schedule(step)
        assert type(tau) is float
        assert 0 < tau <= 1
        module.tau = tau
        torch.testing.assert_close(module(x, labels), pairloss.snnl(x, labels, tau))


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_bad_steps_are_refused_by_name(schedule):
    with pytest.raises(ValueError, match="step: expected a finite number >= 0, got -1"):
        schedule(-1)
    with pytest.raises(TypeError, match="step: expected a number, got str"):
        schedule("1")


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("tau: expected a finite number > 0, got 0", lambda: schedules.constant(0, tau=0)),
        ("power: expected a finite number >= 0, got -1", lambda: schedules.annealed(0, power=-1)),
        ("period: expected a finite number > 0, got 0", lambda: schedules.cosine(0, period=0, low=0.1, high=1)),
        ("low: expected a finite number > 0, got 0", lambda: schedules.cosine(0, period=9, low=0, high=1)),
        ("high: expected a finite number > 0, got inf", lambda: schedules.cosine(0, period=9, low=0.1, high=math.inf)),
        ("low: expected at most high = 0.1, got 1", lambda: schedules.cosine(0, period=9, low=1, high=0.1)),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_options_are_refused_by_name(message, call):
    with pytest.raises(ValueError, match=message):
        call()
