"""Temperatures that change during training: ``schedule(step, **options)`` is a Python number, whatever the schedule.

``functools.partial(schedules.cosine, period=400, low=0.1, high=1.0)`` fixes the options. A step may be an epoch, and a fraction.
Under torch.compile every new Python number compiles anew: pass ``torch.tensor(tau)`` to a loss, or set ``module.tau = tau``.
"""

import math

from . import checks


def constant(step: float, *, tau: float) -> float:
    """tau at every step."""
    checks.non_negative("step", step)
    return checks.positive("tau", tau)


def annealed(step: float, *, power: float = 0.55) -> float:
    r""":math:`1 / (1 + t)^{power}`: from 1 towards 0, with the epoch as the step.

    Source: Agarap and Azcarraga 2020, after the gradient noise of Neelakantan et al. 2015.

    Example:
        >>> from pairloss import schedules
        >>> [round(schedules.annealed(epoch), 3) for epoch in (0, 1, 9, 99, 999)]
        [1.0, 0.683, 0.282, 0.079, 0.022]
    """
    checks.non_negative("step", step)
    checks.non_negative("power", power)
    return float(1 / (1 + step) ** power)


def cosine(step: float, *, period: float, low: float, high: float) -> float:
    r""":math:`low + (high - low) (1 + \cos(2 \pi t / period)) / 2`: high at 0, low at half a period, and back, for ever.

    Where the temperature is high, groups separate; where it is low, single samples do. The paper counts epochs, from 1.0 to 0.1.

    Source: Kukleva et al. 2023, arXiv 2303.13664, algorithm 1.

    Example:
        >>> from pairloss import schedules
        >>> [schedules.cosine(epoch, period=400, low=0.1, high=1.0) for epoch in (0, 100, 200, 400)]
        [1.0, 0.55, 0.1, 1.0]
    """
    checks.non_negative("step", step)
    checks.positive("period", period)
    checks.positive("low", low)
    checks.positive("high", high)
    if low > high:
        raise ValueError(f"low: expected at most high = {high}, got {low}")
    share = (1 + math.cos(2 * math.pi * (step % period) / period)) / 2
    return float(share * high + (1 - share) * low)  # exactly high and low at the turns
