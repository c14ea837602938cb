"""What tests need: the tile hook, the error rule, and the table of losses that contract tests are generated from."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import engines
from .contrastive import contrastive, nt_xent, simple_contrastive
from .image_text import clip, siglip
from .metrics import alignment, tolerance, uniformity
from .neighbour import snnl
from .supervised import circle, supcon


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
    """One row of the table of losses: what the contract tests and `pairloss check` iterate over.

    sample(n, d, seed, option) makes the arguments, in float64, for one of the named options.
    """

    function: Callable[..., Tensor]
    sample: Callable[[int, int, int, str], Sample]
    options: tuple[str, ...]
    detached: bool = False  # a factor of the loss is constant in its derivative: finite differences are not the gradient

    def why_not(self, option: str, backend: str) -> str | None:
        """Why an engine does not serve an option."""
        return "triton does not serve multi-hot labels" if "multi-hot" in option and backend == "triton" else None


class _Random:
    """Reproducible arguments."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator, dtype=torch.float64)

    def labels(self, n: int) -> Tensor:
        """Five unbalanced classes, far-apart values, the last a singleton if n allows."""
        values = torch.tensor([-(2**40), 0, 1, 7, 2**62])
        drawn = values[(self.uniform(n) ** 2 * 4).long()]
        drawn[n // 2] = values[-1]
        return drawn

    def multi_hot(self, n: int) -> Tensor:
        """Of 70 classes, more than a word holds, rarely two; the last row has none."""
        classes = torch.tensor([0, 7, 63, 64, 69])
        hot = torch.zeros(n, 70, dtype=torch.bool)
        for _ in range(2):
            hot[torch.arange(n), classes[(self.uniform(n) ** 2 * 5).long()]] = True
        hot[-1] = False
        return hot


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _named(words: list[str]) -> dict[str, Any]:
    """Options whose value is the word itself."""
    names = {"zero": "no_positive", "none": "reduction", "sum": "reduction", "dot": "metric", "sqeuclidean": "metric"}
    return {names[word]: word for word in words if word in names}


def _labelled(n: int, d: int, seed: int, option: str) -> Sample:
    """Arguments of snnl, supcon and circle, but for the temperature."""
    random = _Random(seed)
    differentiable = {"features": random.normal(n, d)}
    others: dict[str, Any] = {"labels": random.labels(n)}
    words = option.split("-")
    if "ref" in words:
        m = n + n // 2 + 1
        differentiable["ref_features"] = random.normal(m, d)
        others |= {"ref_labels": random.labels(m), "ignore_index": 1}
    if "multi" in words:  # multi-hot
        others["labels"] = random.multi_hot(n)
        if "ref" in words:
            others |= {"ref_labels": random.multi_hot(m), "ignore_index": None}
    if "weight" in words:
        others["weight"] = random.uniform(n)
    if "class_weight" in words:
        others |= {"labels": torch.arange(n) % 4, "class_weight": torch.tensor([0.5, 1.0, 2.0, 0.25], dtype=torch.float64)}
    if "ignore_index" in words:
        others["ignore_index"] = 7 if "sqeuclidean" in words else 0
    return Sample(differentiable, others | _named(words))


def _with_tau(sample: Sample, option: str, d: int) -> Sample:
    """Learnable, unless the option is number-tau."""
    tau = float(d) if sample.others.get("metric", "cosine") != "cosine" else 0.2
    if option == "number-tau":
        return Sample(sample.differentiable, sample.others | {"tau": tau})
    return Sample(sample.differentiable | {"tau": _scalar(tau)}, sample.others)


def _snnl_sample(n: int, d: int, seed: int, option: str) -> Sample:
    sample = _labelled(n, d, seed, option)
    match option:
        case "focal":
            sample.others["focal"] = 2.0
        case "focal-eps":
            sample.others.update({"focal": 0.5, "eps": 1e-3})
        case _ if option.endswith("eps"):
            sample.others["eps"] = 1e-5
    return _with_tau(sample, option, d)


def _supcon_sample(n: int, d: int, seed: int, option: str) -> Sample:
    sample = _labelled(n, d, seed, option)
    form = option.split("-")[0]
    if form in ("in", "pairs"):
        sample.others["form"] = form
    if option == "base_tau":
        sample.others["base_tau"] = 0.07
    return _with_tau(sample, option, d)


def _circle_sample(n: int, d: int, seed: int, option: str) -> Sample:
    sample = _labelled(n, d, seed, option)
    if option.startswith("batch"):
        sample.others["pool"] = "batch"
    sample.others.update({"m": 0.4, "gamma": 80} if option == "gamma-80" else {"gamma": 16})
    if option == "dot":
        sample.differentiable["features"] /= sample.differentiable["features"].norm(dim=1, keepdim=True) * 1.1
    return sample


def _pairs(x: str, y: str, n: int, d: int, seed: int, option: str) -> Sample:
    """Arguments of the losses of paired rows: positives are closer than chance."""
    random = _Random(seed)
    query = random.normal(n, d)
    others: dict[str, Any] = {}
    words = option.split("-")
    if "weight" in words:
        others["weight"] = random.uniform(n)
    if "ids" in words:
        others["ids"] = (random.uniform(n) * (n // 2 + 1)).long()
    return Sample({x: query, y: query + random.normal(n, d)}, others | _named(words))


def _contrastive_sample(n: int, d: int, seed: int, option: str) -> Sample:
    sample, random, words = _pairs("query", "key", n, d, seed, option), _Random(seed + 1), option.split("-")
    m = n // 2 + 3
    if "shared" in words:
        sample.differentiable["negative_keys"] = random.normal(m, d)
    if "each" in words:
        sample.differentiable["negative_keys"] = random.normal(n, 3, d)
    if "bias" in words:
        sample.differentiable["key_bias"] = random.normal(n)
        sample.differentiable["negative_bias"] = random.normal(*sample.differentiable["negative_keys"].shape[:-1])
    if "negative_ids" in words:
        sample.others.update({"ids": torch.arange(n), "negative_ids": torch.arange(m) % (n + 1)})
    if "top_k" in words:
        sample.others["top_k"] = 3
    if "threshold" in words:  # no random similarity of this table is as near to it as a rounding
        sample.others["threshold"] = 0.1
    sample.others.update({name: value for name, value in {"both_sides": True, "in_batch": False}.items() if name in words})
    return _with_tau(sample, option, d)


def _nt_xent_sample(n: int, d: int, seed: int, option: str) -> Sample:
    sample, words = _pairs("view_a", "view_b", n, d, seed, option), option.split("-")
    sample.others.update({name: value for name, value in {"decoupled": True, "tau_plus": 0.02, "beta": 0.5}.items() if name in words})
    return _with_tau(sample, option, d)


def _simple_sample(n: int, d: int, seed: int, option: str) -> Sample:
    sample = _pairs("query", "key", n, d, seed, option)
    sample.others.update({"lam": 0.3, "top_k": 3 if "top_k" in option else None})
    return sample


def _clip_sample(n: int, d: int, seed: int, option: str) -> Sample:
    sample = _pairs("image", "text", n, d, seed, option)
    sample.differentiable["logit_scale"] = _scalar(5 / d if option == "dot" else 5.0)
    if option == "label_smoothing":
        sample.others["label_smoothing"] = 0.1
    return sample


def _siglip_sample(n: int, d: int, seed: int, option: str) -> Sample:
    sample = _clip_sample(n, d, seed, option)
    sample.differentiable["logit_bias"] = _scalar(-2.0)
    return sample


def _uniformity_sample(n: int, d: int, seed: int, option: str) -> Sample:
    t = 2.0 if option == "cosine" else 1 / d
    return Sample({"x": _Random(seed).normal(n, d)}, {"metric": option, "t": t})


def _alignment_sample(n: int, d: int, seed: int, option: str) -> Sample:
    sample = _pairs("x", "y", n, d, seed, option)
    sample.others["alpha"] = 1.5 if option == "alpha" else 2.0
    return sample


def _tolerance_sample(n: int, d: int, seed: int, option: str) -> Sample:
    sample = _labelled(n, d, seed, option)
    sample.others["include_self"] = option == "include_self"
    return sample


_LABELLED = ("cosine", "dot", "weight", "zero", "class_weight", "ignore_index", "none", "sum", "ref", "multi-hot")
_PAIRED = ("cosine", "dot", "weight", "none", "sum")
LOSSES = {
    "snnl": LossSpec(
        snnl,
        _snnl_sample,
        (
            *_LABELLED,
            *("sqeuclidean", "cosine-eps", "dot-eps", "sqeuclidean-eps", "number-tau", "focal", "focal-eps"),
            *("sqeuclidean-ignore_index", "sqeuclidean-ref", "multi-hot-ref"),
        ),
    ),
    "supcon": LossSpec(
        supcon,
        _supcon_sample,
        (
            *_LABELLED,
            *("in", "pairs", "number-tau", "base_tau", "in-ref", "in-multi-hot", "multi-hot-ref"),
            *("pairs-ref", "pairs-none", "pairs-weight", "pairs-ignore_index", "pairs-multi-hot", "pairs-zero"),
        ),
    ),
    "circle": LossSpec(circle, _circle_sample, (*_LABELLED, "gamma-80", "batch", "batch-ref", "batch-ignore_index"), detached=True),
    "contrastive": LossSpec(
        contrastive,
        _contrastive_sample,
        (
            *_PAIRED,
            *("number-tau", "ids", "both_sides", "shared", "shared-in_batch", "each", "each-in_batch", "shared-bias", "each-bias"),
            *("top_k", "top_k-ids-both_sides", "top_k-shared-bias", "top_k-each-bias", "shared-negative_ids"),
            *("threshold", "threshold-both_sides", "threshold-each", "threshold-top_k-shared"),
        ),
    ),
    "nt_xent": LossSpec(
        nt_xent, _nt_xent_sample, (*_PAIRED, "number-tau", "ids", "decoupled", "tau_plus", "beta", "tau_plus-beta-ids", "decoupled-beta")
    ),
    "simple_contrastive": LossSpec(simple_contrastive, _simple_sample, (*_PAIRED, "top_k", "top_k-none")),
    "clip": LossSpec(clip, _clip_sample, (*_PAIRED, "label_smoothing", "ids")),
    "siglip": LossSpec(siglip, _siglip_sample, (*_PAIRED, "ids")),
    "uniformity": LossSpec(uniformity, _uniformity_sample, ("cosine", "sqeuclidean")),
    "alignment": LossSpec(alignment, _alignment_sample, ("cosine", "sqeuclidean", "alpha", "weight", "none")),
    "tolerance": LossSpec(tolerance, _tolerance_sample, ("cosine", "dot", "include_self")),
}
