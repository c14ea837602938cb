"""The training and the measuring of examples.temperature."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional as F

import pairloss

from . import data as example_data


@dataclass(frozen=True)
class Settings:
    taus: tuple[float, ...] = (0.02, 0.05, 0.07, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 2.0)
    shown: tuple[float, ...] = (0.07, 0.2, 0.5, 2.0)  # in the table, the gradient ratio and the distributions
    top_share: float = 0.25  # of the negatives, kept by the hard forms
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 60
    batch: int = 449
    lr: float = 2e-3
    width: int = 128
    dim: int = 32
    degrees: float = 15
    shift: float = 0.15  # of half the image
    zoom: float = 0.1
    noise: float = 0.1
    nearest: int = 10  # negatives in the distributions
    compared: int = 2000  # test images in the distributions, at most
    device: str = "cpu"


@dataclass(frozen=True)
class Loss:
    """One of the article's four losses. The simple ones pull and push with equal total strength, as the contrastive loss does."""

    kind: str  # "contrastive", "simple", or "untrained"
    hard: bool = False
    tau: float = math.nan

    def __call__(self, a: Tensor, b: Tensor, top_share: float) -> Tensor:
        top_k = max(1, round(top_share * (len(a) - 1))) if self.hard else None
        if self.kind == "simple":
            return pairloss.simple_contrastive(a, b, 1 / (top_k or len(a) - 1), top_k=top_k)
        return pairloss.contrastive(a, b, self.tau, top_k=top_k)

    def __str__(self) -> str:
        name = ("hard " if self.hard else "") + self.kind
        return name if math.isnan(self.tau) else f"{name}, τ = {self.tau:g}"


@dataclass(frozen=True)
class Run:
    """One trained encoder on the test images."""

    loss: Loss
    seed: int
    uniformity: float
    tolerance: float
    embedding_probe: float  # accuracy of a linear classifier on the unit-length embedding
    hidden_probe: float  # and on the layer below it
    positives: Tensor  # [N], similarity of two views of an image
    negatives: Tensor  # [N, nearest], and of a view with the most similar views of other images

    @property
    def positive(self) -> float:
        return float(self.positives.mean())

    @property
    def gap(self) -> float:
        return self.positive - float(self.negatives.mean())


@dataclass(frozen=True)
class Results:
    settings: Settings
    pixel_probe: float
    runs: list[Run]

    def of(self, kind: str, hard: bool, tau: float = math.nan) -> list[Run]:
        """The runs of one loss, by seed. A tau of NaN is that of losses without one."""
        return [r for r in self.runs if (r.loss.kind, r.loss.hard) == (kind, hard) and (r.loss.tau == tau or math.isnan(r.loss.tau))]

    def over_taus(self, hard: bool, measure: str) -> np.ndarray:
        """That attribute of the contrastive runs, [taus, seeds]."""
        return np.array([list(map(attrgetter(measure), self.of("contrastive", hard, tau))) for tau in self.settings.taus])


def gradient_ratio(similarities: Tensor, tau: float, top_k: int | None = None) -> Tensor:
    """The article's r_i: the pull of each negative over that of the positive. [..., M] similarities -> [..., M], whose sum is 1."""
    if top_k is not None:
        kept = similarities >= similarities.topk(top_k).values[..., -1:]
        similarities = similarities.where(kept, -math.inf)
    return (similarities / tau).softmax(-1)


def measured_ratio(similarities: Tensor, tau: float, top_k: int | None = None, positive: float = 0.5) -> Tensor:
    """The same for [M] similarities by differentiating pairloss.contrastive."""
    s = torch.cat([similarities.new_tensor([positive]), similarities])
    query = s.new_tensor([[1.0, 0.0]])
    # Under "dot" the derivative by a key is the query times that by their similarity.
    keys = torch.stack([s, (1 - s.square()).clamp_min(0).sqrt()], 1).requires_grad_()
    loss = pairloss.contrastive(query, keys[:1], tau, negative_keys=keys[1:], in_batch=False, top_k=top_k, metric="dot")
    (gradient,) = torch.autograd.grad(loss, keys)
    return gradient[1:, 0].abs() / gradient[0, 0].abs()


def augment(x: Tensor, settings: Settings, generator: torch.Generator) -> Tensor:
    """A view of each image: turned, zoomed, shifted, noisy."""
    uniform = torch.rand(4, len(x), generator=generator) * 2 - 1
    angle, zoom = uniform[0] * math.radians(settings.degrees), 1 + settings.zoom * uniform[1]
    cosine, sine, (right, down) = zoom * angle.cos(), zoom * angle.sin(), settings.shift * uniform[2:]
    maps = torch.stack([torch.stack([cosine, -sine, right], 1), torch.stack([sine, cosine, down], 1)], 1).to(x.device)
    moved = F.grid_sample(x, F.affine_grid(maps, list(x.shape), align_corners=False), align_corners=False)
    return moved + settings.noise * torch.randn(x.shape, generator=generator).to(x.device)


class Encoder(nn.Module):
    """Image -> hidden layer and, from it, the embedding."""

    def __init__(self, pixels: int, width: int, dim: int) -> None:
        super().__init__()
        # Without normalisation all embeddings start in a narrow cone, where the hard losses let them collapse.
        layers = [nn.Linear(pixels, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU()]
        self.body = nn.Sequential(nn.Flatten(), *layers)
        self.head = nn.Linear(width, dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.body(x)
        return hidden, self.head(hidden)


def train(settings: Settings, loss: Loss, seed: int, x: Tensor) -> Encoder:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    x = x.to(settings.device)
    encoder = Encoder(x[0].numel(), settings.width, settings.dim).to(settings.device)
    if loss.kind == "untrained":
        return encoder.eval()
    optimiser = torch.optim.AdamW(encoder.parameters(), settings.lr, weight_decay=1e-4)
    size = min(settings.batch, len(x))
    for _ in range(settings.epochs):
        # Incomplete batches are left out: they would have fewer negatives.
        for rows in torch.randperm(len(x), generator=generator)[: len(x) // size * size].to(x.device).split(size):
            views = torch.cat([augment(x[rows], settings, generator) for _ in range(2)])
            a, b = encoder(views)[1].chunk(2)
            value = loss(a, b, settings.top_share)
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
    return encoder.eval()


@torch.no_grad()
def measure(settings: Settings, loss: Loss, seed: int, encoder: Encoder, images: example_data.Images) -> Run:
    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        hidden, embedding = encoder(x.to(settings.device))
        return hidden.cpu(), F.normalize(embedding).cpu()

    (train_hidden, train_z), (test_hidden, test_z) = encode(images.train_x), encode(images.test_x)
    generator = torch.Generator().manual_seed(seed)
    a, b = (encode(augment(images.test_x[: settings.compared], settings, generator))[1] for _ in range(2))
    s = a @ b.T
    return Run(
        loss,
        seed,
        float(pairloss.uniformity(test_z)),
        float(pairloss.tolerance(test_z, images.test_y)),
        probe(train_z, images.train_y, test_z, images.test_y),
        probe(train_hidden, images.train_y, test_hidden, images.test_y),
        s.diagonal().clone(),
        s.fill_diagonal_(-math.inf).topk(min(settings.nearest, len(s) - 1)).values,
    )


def probe(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> float:
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    model.fit(train_x.flatten(1).numpy(), train_y.numpy())
    return float(model.score(test_x.flatten(1).numpy(), test_y.numpy()))


def losses(settings: Settings) -> list[Loss]:
    contrastive = [Loss("contrastive", hard, tau) for hard in (False, True) for tau in settings.taus]
    return [*contrastive, Loss("simple"), Loss("simple", hard=True), Loss("untrained")]


def run(settings: Settings, images: example_data.Images, tick: Callable[[], None] = lambda: None) -> Results:
    pixels = probe(images.train_x, images.train_y, images.test_x, images.test_y)
    runs = []
    for loss in losses(settings):
        for seed in settings.seeds:
            encoder = train(settings, loss, seed, images.train_x)
            runs.append(measure(settings, loss, seed, encoder, images))
            tick()
    return Results(settings, pixels, runs)
