"""Fused pairwise losses: soft nearest neighbour, contrastive and circle loss without the N x N matrix."""

from . import nn, schedules, testing
from .contrastive import contrastive, nt_xent, simple_contrastive
from .global_batch import distributed, grad_cache
from .image_text import clip, siglip
from .imbalance import class_balanced_weights, focal_cross_entropy, inverse_frequency_weights
from .metrics import alignment, tolerance, uniformity
from .neighbour import entanglement, snnl
from .supervised import circle, flatten_views, supcon

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "alignment",
    "circle",
    "class_balanced_weights",
    "clip",
    "contrastive",
    "distributed",
    "entanglement",
    "flatten_views",
    "focal_cross_entropy",
    "grad_cache",
    "inverse_frequency_weights",
    "nn",
    "nt_xent",
    "schedules",
    "siglip",
    "simple_contrastive",
    "snnl",
    "supcon",
    "testing",
    "tolerance",
    "uniformity",
]
