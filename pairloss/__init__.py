"""Fused pairwise losses for PyTorch: the N x N matrix never exists."""

from . import nn, testing
from .neighbour import snnl

__version__ = "0.1.0"
__all__ = ["__version__", "nn", "snnl", "testing"]
