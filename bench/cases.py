"""What is timed, forward and backward: our losses, the dense PyTorch that users write today ("naive"), pytorch-metric-learning's
("pml"), and the three matrix products alone that a dense loss needs, in the rows' dtype ("products") and in float32."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, normalize, relu

import pairloss
from pairloss import reference

try:
    from pytorch_metric_learning import losses as pml
except ModuleNotFoundError:
    pml = None

TAU = 0.1
CLASSES = 10
TOP_K = 64
CIRCLE = {"m": 0.4, "gamma": 80.0}
PROVIDERS = ("pairloss", "products", "products-float32", "naive", "pml")
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
    bytes_per_pair: float
    bytes_per_triple: float = 0.0


class Loss(NamedTuple):
    inputs: Callable[[int, int], tuple[Tensor, ...]]
    ours: Callable[..., Tensor]
    naive: Counterpart
    pml: Counterpart | None = None


class Outcome(NamedTuple):
    loss: Tensor
    grads: list[Tensor]


def labelled(n: int, d: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, d, generator=generator), torch.randint(0, CLASSES, (n,), generator=generator)


def paired(n: int, d: int, *scalars: float) -> tuple[Tensor, ...]:
    """Scalars are learnt."""
    generator = torch.Generator().manual_seed(0)
    return (*(torch.randn(n, d, generator=generator) for _ in range(2)), *map(torch.tensor, scalars))


def views(n: int, d: int) -> tuple[Tensor, ...]:
    """Two views of n / 2 items: all n are compared."""
    return paired(n // 2, d)


def rows(n: int, d: int) -> tuple[Tensor, ...]:
    return labelled(n, d)[:1]


def pairs_of(labels: Tensor) -> tuple[Tensor, Tensor]:
    """[N, N] masks: a row with itself, two rows of one class."""
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    return itself, (labels[:, None] == labels[None, :]) & ~itself


def supcon(features: Tensor, labels: Tensor) -> Tensor:
    x = normalize(features, dim=1)
    itself, positive = pairs_of(labels)
    log_prob = (x @ x.T / TAU).masked_fill(itself, -torch.inf).log_softmax(1)
    size = positive.sum(1)
    return -(log_prob.masked_fill(~positive, 0).sum(1)[size > 0] / size[size > 0]).mean()


def circle(features: Tensor, labels: Tensor) -> Tensor:
    x = normalize(features, dim=1)
    s = x @ x.T
    itself, positive = pairs_of(labels)
    m, gamma = CIRCLE["m"], CIRCLE["gamma"]
    pos = -gamma * relu(1 + m - s).detach() * (s - (1 - m))
    neg = gamma * relu(s + m).detach() * (s - m)
    log_sums = pos.masked_fill(~positive, -torch.inf).logsumexp(1) + neg.masked_fill(positive | itself, -torch.inf).logsumexp(1)
    return -logsigmoid(-log_sums[log_sums > -torch.inf]).mean()


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
    return torch.pdist(normalize(x.float(), dim=1)).pow(2).mul(-2).exp().mean().log()


def pml_nt_xent(view_a: Tensor, view_b: Tensor) -> Tensor:
    return pml.NTXentLoss(TAU)(torch.cat([view_a, view_b]), torch.arange(len(view_a), device=view_a.device).repeat(2))


# Bytes: measured on the CPU at N = 4,096 (snnl's naive 8,192, pml's nt_xent 512).
LOSSES = {
    "snnl": Loss(
        labelled,
        lambda features, labels: pairloss.snnl(features, labels, TAU),
        Counterpart(lambda features, labels: reference.snnl(features, labels, TAU), 22.2),
        # Its squared distance of unit rows is 2 - 2 s.
        Counterpart(lambda features, labels: pml.NCALoss(softmax_scale=0.5 / TAU)(features, labels), 20.8),
    ),
    "supcon": Loss(
        labelled,
        lambda features, labels: pairloss.supcon(features, labels, TAU),
        Counterpart(supcon, 14.4),
        Counterpart(lambda features, labels: pml.SupConLoss(TAU)(features, labels), 49.1),
    ),
    "circle": Loss(
        labelled,
        lambda features, labels: pairloss.circle(features, labels, **CIRCLE),
        Counterpart(circle, 36.4),
        Counterpart(lambda features, labels: pml.CircleLoss(**CIRCLE)(features, labels), 63.7),
    ),
    "nt_xent": Loss(views, lambda a, b: pairloss.nt_xent(a, b, TAU), Counterpart(nt_xent, 13.5), Counterpart(pml_nt_xent, 0, 17)),
    "contrastive_top_k": Loss(paired, lambda x, y: pairloss.contrastive(x, y, TAU, top_k=TOP_K), Counterpart(contrastive_top_k, 13.7)),
    "clip": Loss(lambda n, d: paired(n, d, 10.0), pairloss.clip, Counterpart(clip, 16.6)),
    "siglip": Loss(lambda n, d: paired(n, d, 10.0, -10.0), pairloss.siglip, Counterpart(siglip, 20.6)),
    "uniformity": Loss(rows, pairloss.uniformity, Counterpart(uniformity, 16.1)),
}


def why_not(case: Case, provider: str, limit: float) -> str | None:
    """Why there is no row of this provider where the memory limit is so many bytes; None if there is."""
    if provider == "pairloss":
        return None
    if provider == "products-float32":
        return why_not(case._replace(dtype=torch.float32), "products", limit) if case.dtype.itemsize == 2 else "for half rows only"
    other = {"products": Counterpart(torch.matmul, 4), "naive": LOSSES[case.loss].naive, "pml": LOSSES[case.loss].pml}[provider]
    if other is None:
        return "pytorch-metric-learning has no such loss"
    if provider == "pml" and pml is None:
        return "pytorch-metric-learning is not installed"
    needs = (other.bytes_per_pair * case.n**2 + other.bytes_per_triple * case.n**3) * case.dtype.itemsize / 4
    return None if needs <= limit else f"would take about {needs / 1e9:,.0f} GB, above the limit of {limit / 1e9:,.0f}"


def step_of(case: Case, device: str, provider: str) -> Callable[[], Outcome | None]:
    loss = LOSSES[case.loss]
    if provider.startswith("products"):
        dtype = torch.float32 if provider == "products-float32" else case.dtype
        return partial(products, *(v.to(device, dtype) for v in paired(case.n, case.d)))
    inputs = tuple(v.to(device, case.dtype) if v.ndim == 2 else v.to(device) for v in loss.inputs(case.n, case.d))
    other = {"naive": loss.naive, "pml": loss.pml}.get(provider)
    return partial(forward_and_backward, loss.ours if other is None else other.function, inputs)


def products(x: Tensor, y: Tensor) -> None:
    s = x @ y.T
    s @ y
    s.T @ x


def forward_and_backward(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Outcome:
    leaves = [v.detach().requires_grad_(v.is_floating_point()) for v in inputs]
    loss = function(*leaves)
    loss.backward()
    return Outcome(loss.detach(), [leaf.grad for leaf in leaves if leaf.grad is not None])


def check_agreement(case: Case, ours: Outcome, provider: str, theirs: Outcome) -> None:
    """The loss and every gradient, but for scalars' in half precision: sums that cancel, which eager gets wrong by half."""
    for mine, other in zip([ours.loss, *ours.grads], [theirs.loss, *theirs.grads], strict=True):
        if mine.ndim == 0 and mine is not ours.loss and case.dtype != torch.float32:
            continue
        error = ((mine.double() - other.double()).norm() / other.double().norm()).item()
        if not error <= TOLERANCE[case.dtype]:
            raise AssertionError(f"{case.id}: {provider} differs from ours by {error:.2g} of its norm, shape {list(mine.shape)}")
