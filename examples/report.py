"""What the examples' tables and pictures have in common."""

import statistics
from collections.abc import Sequence

# Petroff 2021: ten colours that stay apart for colour-blind readers. The number of the class as marker says it once more.
TEN = ("#3f90da", "#e76300", "#bd1f01", "#717581", "#832db6", "#a96b59", "#ffa90e", "#b9ac70", "#94a4a2", "#92dadd")


def spread(values: Sequence[float], form: str) -> str:
    """Mean ± standard deviation over the seeds."""
    if len(values) == 1:
        return format(values[0], form)
    return f"{format(statistics.mean(values), form)} ± {format(statistics.stdev(values), form)}"
