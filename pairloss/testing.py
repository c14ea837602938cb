"""What tests need: the tile hook, the error rule, and the table of losses that contract tests are generated from."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import engines
from .neighbour import snnl


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


# |ours - truth| <= |eager PyTorch in the same dtype - truth| + floor * max|truth|, in the max norm: the floor is the room
# that a different order of sums, and weights rounded to the product dtype, may take.
FLOORS = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def error_and_bound(ours: Tensor, truth: Tensor, eager: Tensor, dtype: torch.dtype, terms: float = 0.0) -> tuple[float, float]:
    """The error rule, both sides: an engine is right if the first number is <= the second. NaN only where truth has it.

    terms: where the result is a sum that cancels (the gradient of a scalar), the sum of the terms' magnitudes.
    """

    def error(tensor: Tensor) -> float:
        if not torch.equal(tensor.isnan(), truth.isnan()):
            return math.inf
        return (tensor.double() - truth).nan_to_num().abs().max().item()

    return error(ours), error(eager) + FLOORS[dtype] * max(truth.nan_to_num().abs().max().item(), terms)


@dataclass(frozen=True)
class Sample:
    """Arguments of a loss: those that it has gradients for, and the others."""

    differentiable: dict[str, Tensor]
    others: dict[str, Any]

    def to(self, dtype: torch.dtype) -> "Sample":
        return Sample({name: v.to(dtype) for name, v in self.differentiable.items()}, self.others)

    def on(self, device: str | torch.device) -> "Sample":
        others = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in self.others.items()}
        return Sample({name: v.to(device) for name, v in self.differentiable.items()}, others)

    def terms(self, grads: dict[str, Tensor]) -> dict[str, float]:
        """For each input the magnitude of what its gradient is a sum of: a scalar's is one over all pairs."""
        size = sum((grad * self.differentiable[name]).abs().sum().item() for name, grad in grads.items() if grad.ndim)
        return {name: 0.0 if grad.ndim else size / self.differentiable[name].abs().item() for name, grad in grads.items()}

    def run(self, function: Callable[..., Tensor], **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss (unreduced losses are summed with random weights for the gradient) and its gradients."""
        leaves = {name: v.detach().clone().requires_grad_() for name, v in self.differentiable.items()}
        loss = function(**leaves, **self.others, **kwargs)
        cotangent = torch.linspace(0.5, 1.5, loss.numel(), dtype=torch.float64, device=loss.device).reshape(loss.shape)
        grads = torch.autograd.grad((loss * cotangent.to(loss.dtype)).sum(), list(leaves.values()))
        return loss.detach(), dict(zip(leaves, grads, strict=True))


@dataclass(frozen=True)
class LossSpec:
    """One row of the table of losses: what the contract tests, `pairloss check` and the benchmarks iterate over.

    sample(n, d, seed, option) makes the arguments, in float64, for one of the named options.
    """

    function: Callable[..., Tensor]
    sample: Callable[[int, int, int, str], Sample]
    options: tuple[str, ...]


def _snnl_sample(n: int, d: int, seed: int, option: str) -> Sample:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def labels(n: int) -> Tensor:
        """Five unbalanced classes, far-apart values, the last a singleton if n allows."""
        values = torch.tensor([-(2**40), 0, 1, 7, 2**62])
        drawn = values[(torch.rand(n, generator=generator) ** 2 * 4).long()]
        drawn[n // 2] = values[-1]
        return drawn

    differentiable = {"features": randn(n, d), "tau": torch.tensor(0.2, dtype=torch.float64)}
    others: dict[str, Any] = {"labels": labels(n)}
    if option.startswith(("dot", "sqeuclidean")):
        others["metric"] = option.split("-")[0]
        differentiable["tau"] = torch.tensor(float(d), dtype=torch.float64)
    if option.endswith("eps"):
        others["eps"] = 1e-5
    match option:
        case "number-tau":
            others["tau"] = differentiable.pop("tau").item()
        case "weight":
            others["weight"] = torch.rand(n, generator=generator, dtype=torch.float64)
        case "focal":
            others["focal"] = 2.0
        case "focal-eps":
            others |= {"focal": 0.5, "eps": 1e-3}
        case "zero":
            others["no_positive"] = "zero"
        case "class_weight":
            others |= {"labels": torch.arange(n) % 4, "class_weight": torch.tensor([0.5, 1.0, 2.0, 0.25], dtype=torch.float64)}
        case "ignore_index":
            others["ignore_index"] = 0
        case "sqeuclidean-ignore_index":
            others["ignore_index"] = 7
        case "none" | "sum":
            others["reduction"] = option
        case "ref" | "sqeuclidean-ref":
            differentiable["ref_features"] = randn(n + n // 2 + 1, d)
            others |= {"ref_labels": labels(n + n // 2 + 1), "ignore_index": 1}
    return Sample(differentiable, others)


LOSSES = {
    "snnl": LossSpec(
        snnl,
        _snnl_sample,
        (
            *("cosine", "dot", "sqeuclidean", "cosine-eps", "dot-eps", "sqeuclidean-eps", "number-tau", "weight", "focal", "focal-eps"),
            *("zero", "class_weight", "ignore_index", "sqeuclidean-ignore_index", "none", "sum", "ref", "sqeuclidean-ref"),
        ),
    )
}
