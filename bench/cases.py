"""What is timed, forward and backward: our losses, the dense PyTorch that users write today ("naive", and "compiled" by torch.compile),
other libraries', and the three matrix products alone that a dense loss needs, in the rows' dtype ("products") and in float32."""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, normalize, relu

import pairloss
from pairloss import engines, reference

TAU = 0.1
CLASSES = 10
TOP_K = 64
CIRCLE = {"m": 0.4, "gamma": 80.0}
LOGIT_SCALE = 10.0
# The libraries, as they are installed and imported.
PACKAGES = {
    "pml": ("pytorch-metric-learning", "pytorch_metric_learning.losses"),
    "memeff": ("memeff", "memeff"),
    "inf-cl": ("inf-cl", "inf_cl"),
    "siglip-kernel": ("siglip-kernel", "siglip_kernel"),
}
PROVIDERS = ("pairloss", "pairloss-cuda", "products", "products-float32", "naive", "compiled", *PACKAGES)
CUDA_ONLY = ("pairloss-cuda", "compiled", "memeff", "inf-cl", "siglip-kernel")
# Relative to the norm: in float32 neighbours of rank TOP_K may trade places, and eager bfloat16 rounds its logits.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.03}


class Case(NamedTuple):
    loss: str
    n: int  # rows that are compared with each other: N x N pairs
    d: int
    dtype: torch.dtype

    @property
    def id(self) -> str:
        return f"{self.loss}-N{self.n}-D{self.d}-{str(self.dtype).removeprefix('torch.')}"


class Counterpart(NamedTuple):
    """A dense loss, with the most that it holds, float32: so many bytes for each of N^2 pairs and of N^3 triples."""

    function: Callable[..., Tensor]
    bytes_per_pair: float = 0.0
    bytes_per_triple: float = 0.0


class Loss(NamedTuple):
    inputs: Callable[[int, int, int], tuple[Tensor, ...]]  # of N, D and a seed
    ours: Callable[..., Tensor]
    others: dict[str, Counterpart]  # by provider


class Outcome(NamedTuple):
    loss: Tensor
    grads: list[Tensor | None]  # of the inputs that are learnt


def labelled(n: int, d: int, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator), torch.randint(0, CLASSES, (n,), generator=generator)


def paired(n: int, d: int, seed: int, *scalars: float) -> tuple[Tensor, ...]:
    """Scalars are learnt."""
    generator = torch.Generator().manual_seed(seed)
    return (*(torch.randn(n, d, generator=generator) for _ in range(2)), *map(torch.tensor, scalars))


def views(n: int, d: int, seed: int) -> tuple[Tensor, ...]:
    """Two views of n / 2 items: all n are compared."""
    return paired(n // 2, d, seed)


def rows(n: int, d: int, seed: int) -> tuple[Tensor, ...]:
    return labelled(n, d, seed)[:1]


def pairs_of(labels: Tensor) -> tuple[Tensor, Tensor]:
    """[N, N] masks: a row with itself, two rows of one class."""
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    return itself, (labels[:, None] == labels[None, :]) & ~itself


def supcon(features: Tensor, labels: Tensor) -> Tensor:
    x = normalize(features, dim=1)
    itself, positive = pairs_of(labels)
    log_prob = (x @ x.T / TAU).masked_fill(itself, -torch.inf).log_softmax(1)
    size = positive.sum(1)
    each = log_prob.masked_fill(~positive, 0).sum(1) / size.clamp(min=1)  # 0 where there are no positives
    return -each.sum() / (size > 0).sum()


def circle(features: Tensor, labels: Tensor) -> Tensor:
    x = normalize(features, dim=1)
    s = x @ x.T
    itself, positive = pairs_of(labels)
    m, gamma = CIRCLE["m"], CIRCLE["gamma"]
    pos = -gamma * relu(1 + m - s).detach() * (s - (1 - m))
    neg = gamma * relu(s + m).detach() * (s - m)
    log_sums = pos.masked_fill(~positive, -torch.inf).logsumexp(1) + neg.masked_fill(positive | itself, -torch.inf).logsumexp(1)
    counts = log_sums > -torch.inf
    return -logsigmoid(-log_sums.masked_fill(~counts, -torch.inf)).sum() / counts.sum()  # 0 where an anchor doesn't count


def nt_xent(view_a: Tensor, view_b: Tensor) -> Tensor:
    x = normalize(torch.cat([view_a, view_b]), dim=1)
    index = torch.arange(len(x), device=x.device)
    logits = (x @ x.T / TAU).masked_fill(index[:, None] == index[None, :], -torch.inf)
    return cross_entropy(logits, index.roll(len(view_a)))


def contrastive_top_k(query: Tensor, key: Tensor) -> Tensor:
    logits = normalize(query, dim=1) @ normalize(key, dim=1).T / TAU
    itself = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    hardest = logits.masked_fill(itself, -torch.inf).topk(min(TOP_K, len(logits) - 1), dim=1).values
    chosen = torch.cat([logits.diagonal()[:, None], hardest], 1)
    return cross_entropy(chosen, torch.zeros(len(chosen), dtype=torch.int64, device=chosen.device))


def clip(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """open_clip's ClipLoss of one process, with one product instead of its two."""
    logits = logit_scale * normalize(image, dim=1) @ normalize(text, dim=1).T
    index = torch.arange(len(logits), device=logits.device)
    return (cross_entropy(logits, index) + cross_entropy(logits.T, index)) / 2


def siglip(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """open_clip's SigLipLoss of one process."""
    logits = logit_scale * normalize(image, dim=1) @ normalize(text, dim=1).T + logit_bias
    labels = 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - 1
    return -logsigmoid(labels * logits).sum() / len(logits)


def uniformity(x: Tensor) -> Tensor:
    """align_uniform's; pdist has no half precision."""
    x = x.float() if x.dtype.itemsize == 2 else x
    return torch.pdist(normalize(x, dim=1)).pow(2).mul(-2).exp().mean().log()


def library(provider: str) -> Any:
    return importlib.import_module(PACKAGES[provider][1])


def pml_nt_xent(view_a: Tensor, view_b: Tensor) -> Tensor:
    return library("pml").NTXentLoss(TAU)(torch.cat([view_a, view_b]), torch.arange(len(view_a), device=view_a.device).repeat(2))


def memeff_clip(image: Tensor, text: Tensor, _: Tensor) -> Tensor:
    """Its scale is a number; stable=True, the default, would give another gradient than the loss has."""
    return library("memeff").MemoryEfficientCLIPLoss(temperature=1 / LOGIT_SCALE, stable=False)(image, text)


def inf_cl_clip(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    image, text = normalize(image, dim=1), normalize(text, dim=1)
    one_way = partial(library("inf-cl").cal_flash_loss, scale=logit_scale, head_dim=min(256, image.shape[1]))
    return (one_way(image, text).mean() + one_way(text, image).mean()) / 2


def siglip_kernel_siglip(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    image, text = normalize(image, dim=1), normalize(text, dim=1)
    return library("siglip-kernel").fused_siglip_loss(image, text, logit_scale.log(), logit_bias)


# Bytes: measured on the CPU at N = 4,096 (snnl's naive 8,192, pml's nt_xent 512).
LOSSES = {
    "snnl": Loss(
        labelled,
        lambda features, labels: pairloss.snnl(features, labels, TAU),
        {
            "naive": Counterpart(lambda features, labels: reference.snnl(features, labels, TAU), 22.2),
            # Its squared distance of unit rows is 2 - 2 s.
            "pml": Counterpart(lambda features, labels: library("pml").NCALoss(softmax_scale=0.5 / TAU)(features, labels), 20.8),
        },
    ),
    "supcon": Loss(
        labelled,
        lambda features, labels: pairloss.supcon(features, labels, TAU),
        {
            "naive": Counterpart(supcon, 14.4),
            "pml": Counterpart(lambda features, labels: library("pml").SupConLoss(TAU)(features, labels), 49.1),
        },
    ),
    "circle": Loss(
        labelled,
        lambda features, labels: pairloss.circle(features, labels, **CIRCLE),
        {
            "naive": Counterpart(circle, 36.4),
            "pml": Counterpart(lambda features, labels: library("pml").CircleLoss(**CIRCLE)(features, labels), 63.7),
        },
    ),
    "nt_xent": Loss(
        views,
        lambda a, b: pairloss.nt_xent(a, b, TAU),
        {"naive": Counterpart(nt_xent, 13.5), "pml": Counterpart(pml_nt_xent, 0, 17)},
    ),
    "contrastive_top_k": Loss(
        paired, lambda x, y: pairloss.contrastive(x, y, TAU, top_k=TOP_K), {"naive": Counterpart(contrastive_top_k, 13.7)}
    ),
    "clip": Loss(
        lambda *size: paired(*size, LOGIT_SCALE),
        pairloss.clip,
        {"naive": Counterpart(clip, 16.6), "memeff": Counterpart(memeff_clip), "inf-cl": Counterpart(inf_cl_clip)},
    ),
    "siglip": Loss(
        lambda *size: paired(*size, LOGIT_SCALE, -10.0),
        pairloss.siglip,
        {"naive": Counterpart(siglip, 20.6), "siglip-kernel": Counterpart(siglip_kernel_siglip)},
    ),
    "uniformity": Loss(rows, pairloss.uniformity, {"naive": Counterpart(uniformity, 16.1)}),
}


def counterpart(loss: str, provider: str) -> Counterpart | None:
    """What stands beside ours, None where there is nothing."""
    if provider == "products":
        return Counterpart(torch.matmul, 4)
    others = LOSSES[loss].others
    return others["naive"] if provider == "compiled" else others.get(provider)


def providers_of(loss: str, device: str) -> list[str]:
    """Those that have the loss."""
    has = [name for name in PROVIDERS if name not in PACKAGES or counterpart(loss, name) is not None]
    return [name for name in has if device == "cuda" or name not in CUDA_ONLY]


def why_not(case: Case, provider: str, device: str, limit: float) -> str | None:
    """Why there is no row of this provider where the memory limit is so many bytes; None if there is."""
    if provider == "pairloss":
        return None
    if provider == "pairloss-cuda":
        call = engines.Call(torch.empty(1, case.d, device=device), *[None] * 7, case.dtype)
        return engines.load("cuda").why_not(call)
    if provider == "products-float32":
        half = case.dtype.itemsize == 2
        return why_not(case._replace(dtype=torch.float32), "products", device, limit) if half else "for half rows only"
    if provider in PACKAGES and importlib.util.find_spec(PACKAGES[provider][1].partition(".")[0]) is None:
        return f"{PACKAGES[provider][0]} is not installed"
    needs = bytes_needed(case, provider)
    return None if needs <= limit else f"would take about {needs / 1e9:,.0f} GB, above the limit of {limit / 1e9:,.0f}"


def bytes_needed(case: Case, provider: str) -> float:
    other = counterpart(case.loss, provider)
    return 0.0 if other is None else (other.bytes_per_pair * case.n**2 + other.bytes_per_triple * case.n**3) * case.dtype.itemsize / 4


def inputs_of(case: Case, device: str, seed: int = 0) -> tuple[Tensor, ...]:
    given = LOSSES[case.loss].inputs(case.n, case.d, seed)
    scalars = torch.promote_types(case.dtype, torch.float32)
    return tuple(v.to(device, case.dtype if v.ndim else scalars) if v.is_floating_point() else v.to(device) for v in given)


def step_of(case: Case, provider: str, sets: list[tuple[Tensor, ...]]) -> Callable[[], Outcome | None]:
    """A step, which takes the next set of inputs each time."""
    if provider.startswith("products"):
        dtype = torch.float32 if provider == "products-float32" else case.dtype
        device = sets[0][0].device
        return _in_turn(products, [tuple(v.to(device, dtype) for v in paired(case.n, case.d, seed)) for seed in range(len(sets))])
    function = LOSSES[case.loss].ours
    if provider == "pairloss-cuda":
        function = partial(_on_engine, "cuda", function)
    elif (other := counterpart(case.loss, provider)) is not None:
        function = other.function
    if provider == "compiled":
        torch.compiler.reset()  # of other sizes, for which a limited number of versions is kept
        function = torch.compile(function, dynamic=False)
    return _in_turn(partial(forward_and_backward, function), sets)


def _in_turn(step: Callable[..., Outcome | None], sets: list[tuple[Tensor, ...]]) -> Callable[[], Outcome | None]:
    turns = cycle(sets)
    return lambda: step(*next(turns))


def _on_engine(name: str, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    with mock.patch.object(engines, "DEFAULT_BACKEND", name):
        return function(*inputs)


def products(x: Tensor, y: Tensor) -> None:
    s = x @ y.T
    s @ y
    s.T @ x


def forward_and_backward(function: Callable[..., Tensor], *inputs: Tensor) -> Outcome:
    leaves = [v.detach().requires_grad_(v.is_floating_point()) for v in inputs]
    loss = function(*leaves)
    loss.backward()
    return Outcome(loss.detach(), [leaf.grad for leaf in leaves if leaf.requires_grad])


def truth(case: Case, inputs: tuple[Tensor, ...]) -> Outcome:
    """The dense loss in float64, of the same rows."""
    wide = [v.double() if v.is_floating_point() else v for v in inputs]
    return forward_and_backward(LOSSES[case.loss].others["naive"].function, *wide)


def error(outcome: Outcome, right: Outcome, dtype: torch.dtype) -> float:
    """The largest of the loss and every gradient there is, relative to its norm; but for scalars' in half precision: sums that cancel,
    which eager gets wrong by half."""

    def parts() -> Iterator[tuple[Tensor, Tensor]]:
        yield outcome.loss, right.loss
        for mine, other in zip(outcome.grads, right.grads, strict=True):
            if mine is not None and other is not None and (mine.ndim > 0 or dtype.itemsize > 2):
                yield mine, other

    errors = torch.stack([(mine.double() - other.double()).norm() / other.double().norm() for mine, other in parts()])
    return errors.max().item()
