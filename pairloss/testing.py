"""Hooks for tests."""

from collections.abc import Iterator
from contextlib import contextmanager

from . import engines


@contextmanager
def tile_size(n: int) -> Iterator[None]:
    """Make every engine work on tiles of n rows and columns (at least what its hardware needs), so that small data has
    off-diagonal, ragged and mixed tiles.

    >>> import pairloss.testing
    >>> with pairloss.testing.tile_size(16):
    ...     ...
    """
    if n < 1:
        raise ValueError(f"n: expected a tile size >= 1, got {n}")
    before, engines._tile_override = engines._tile_override, n
    try:
        yield
    finally:
        engines._tile_override = before
