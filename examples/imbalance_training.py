"""The trainings of examples/imbalance.py: the rows that stay, a recipe for each loss, accuracy on the classes cut, the others, all."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import track
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

import pairloss

from .data import Images

GAMMAS = (1.0, 1.5, 2.0)
BETAS = (0.9, 0.99, 0.999, 0.9999)
GROUPS = ("majority", "minority", "all")
INVERSE = "inverse"
# The order in which the classes take their turn at being cut.
TURN_SEED = 0


@dataclass(frozen=True)
class Settings:
    seeds: int = 10
    steps: int = 360
    batch: int = 128
    # In a batch of 128 a cut class has about one row, and so no positive pair: the pairwise losses see all rows at once.
    pair_batch: int = 1024
    lr: float = 3e-3
    weight_decay: float = 1e-2
    tau: float = 0.1
    keep: float = 0.05
    cut: int = 3
    device: str = "cpu"


class Recipe(NamedTuple):
    """One row of the table: the loss, its weights, and what is judged."""

    loss: str  # softmax, snnl, supcon, or pixels: no training at all
    weights: float | str | None = None  # beta, INVERSE, or none
    gamma: float = 0.0
    balanced: bool = False  # no class is cut
    judge: str = "output"  # of softmax: its output, or 1-NN on the hidden layer below it

    @property
    def name(self) -> str:
        if self.loss == "pixels":
            return "pixels, no training (1-NN)"
        words = [{"softmax": "focal" if self.gamma else "softmax", "snnl": "SNNL", "supcon": "SupCon"}[self.loss]]
        words += [f"gamma {self.gamma:g}"] * (self.gamma > 0)
        words += [] if self.weights is None else [f"{INVERSE} frequency" if self.weights == INVERSE else f"beta {self.weights:g}"]
        words += ["no class cut"] * self.balanced
        return ", ".join(words) + " (1-NN)" * self.nearest

    @property
    def nearest(self) -> bool:
        return self.loss != "softmax" or self.judge != "output"

    def class_weights(self, counts: Tensor) -> Tensor | None:
        if self.weights is None:
            return None
        return (
            pairloss.inverse_frequency_weights(counts) if self.weights == INVERSE else pairloss.class_balanced_weights(counts, self.weights)
        )

    def criterion(self, counts: Tensor, tau: float) -> Callable[[Tensor, Tensor], Tensor]:
        weight = self.class_weights(counts)
        if self.loss == "softmax":
            return partial(pairloss.focal_cross_entropy, gamma=self.gamma, weight=weight)
        return partial({"snnl": pairloss.snnl, "supcon": pairloss.supcon}[self.loss], tau=tau, class_weight=weight)


CEILING = Recipe("softmax", balanced=True)
SOFTMAX = Recipe("softmax")
BY_INVERSE = Recipe("softmax", INVERSE)
FOCAL = tuple(Recipe("softmax", gamma=gamma) for gamma in GAMMAS)
BALANCED_SOFTMAX = tuple(Recipe("softmax", beta) for beta in BETAS)
BALANCED_FOCAL = tuple(Recipe("softmax", beta, gamma=1.0) for beta in BETAS)
HIDDEN = Recipe("softmax", judge="hidden")
PAIRWISE = tuple(Recipe(loss, weights) for loss in ("snnl", "supcon") for weights in (None, INVERSE, 0.99))
RECIPES = (CEILING, SOFTMAX, BY_INVERSE, *FOCAL, *BALANCED_SOFTMAX, *BALANCED_FOCAL, Recipe("pixels"), HIDDEN, *PAIRWISE)


@dataclass(frozen=True)
class Results:
    accuracy: dict[Recipe, npt.NDArray[np.float64]]  # [seeds, GROUPS], in per cent
    counts: tuple[int, int]  # training rows of a class that is cut, and of one that is not (medians)

    def of(self, recipe: Recipe, group: str) -> npt.NDArray[np.float64]:
        return self.accuracy[recipe][:, GROUPS.index(group)]


def minority(seed: int, classes: int, cut: int) -> Tensor:
    """The classes that seed cuts. They take turns: after `classes` seeds each was cut equally often."""
    order = torch.randperm(classes, generator=torch.Generator().manual_seed(TURN_SEED))
    return order[(cut * seed + torch.arange(cut)) % classes]


def kept_rows(labels: Tensor, small: Tensor, keep: float, seed: int) -> Tensor:
    """Indices of the training rows that stay; of a class that is cut at least two, so that a row has a positive."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(labels), generator=generator)
    kept = []
    for label in labels.unique():
        of_class = rows[labels[rows] == label]
        kept.append(of_class[: max(2, round(keep * len(of_class)))] if label in small else of_class)
    return torch.cat(kept)


def network(pixels: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, outputs))


def batches(rows: int, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Indices of each step's rows: every row once, in a new order, and again."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[Tensor] = []
    for _ in range(steps):
        if not waiting:
            waiting = list(torch.randperm(rows, generator=generator).split(batch))
        yield waiting.pop(0)


def train(recipe: Recipe, x: Tensor, y: Tensor, classes: int, settings: Settings, seed: int) -> nn.Sequential:
    """AdamW, the rate divided by ten after 60 % and 80 % of the steps, the same number of steps for every loss."""
    torch.manual_seed(seed)
    on_pairs = recipe.loss != "softmax"
    model = network(x[0].numel(), 32 if on_pairs else classes).to(x.device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    milestones = [round(0.6 * settings.steps), round(0.8 * settings.steps)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, milestones)
    criterion = recipe.criterion(y.bincount(minlength=classes), settings.tau)
    for index in batches(len(x), settings.pair_batch if on_pairs else settings.batch, settings.steps, seed):
        index = index.to(x.device)
        loss = criterion(model(x[index]), y[index])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def predictions(recipe: Recipe, model: nn.Sequential, x: Tensor, y: Tensor, test_x: Tensor) -> Tensor:
    if not recipe.nearest:
        return model(test_x).argmax(1).cpu()
    # One neighbour: with five, a class of four rows would need three of them to win the vote.
    space = nn.Flatten() if recipe.loss == "pixels" else model[:-1] if recipe.judge == "hidden" else model
    train_codes, test_codes = (nn.functional.normalize(space(rows)).cpu().numpy() for rows in (x, test_x))
    return torch.from_numpy(KNeighborsClassifier(1).fit(train_codes, y.cpu().numpy()).predict(test_codes))


def evaluate(recipe: Recipe, settings: Settings, data: Images, seed: int) -> list[float]:
    """Accuracy on the test rows of each of GROUPS, in per cent."""
    classes, device = data.classes, settings.device
    small = minority(seed, classes, settings.cut)
    rows = torch.arange(len(data.train_y)) if recipe.balanced else kept_rows(data.train_y, small, settings.keep, seed)
    x, y = data.train_x[rows].to(device), data.train_y[rows].to(device)
    model = nn.Sequential() if recipe.loss == "pixels" else train(recipe, x, y, classes, settings, seed)
    right = (predictions(recipe, model, x, y, data.test_x.to(device)) == data.test_y).double()
    is_small = torch.isin(data.test_y, small)
    return [100 * right[part].mean().item() for part in (~is_small, is_small, torch.ones_like(is_small))]


def run(settings: Settings, data: Images, recipes: tuple[Recipe, ...] = RECIPES, quiet: bool = True) -> Results:
    """Every recipe from the same seeds: the same classes cut, the same rows kept, the same start."""
    jobs = [(recipe, seed) for seed in range(settings.seeds) for recipe in recipes]
    found: dict[Recipe, list[list[float]]] = {recipe: [] for recipe in recipes}
    for recipe, seed in track(jobs, "training", disable=quiet):
        found[recipe].append(evaluate(recipe, settings, data, seed))
    small = minority(0, data.classes, settings.cut)
    sizes = data.train_y[kept_rows(data.train_y, small, settings.keep, 0)].bincount(minlength=data.classes)
    is_small = torch.isin(torch.arange(data.classes), small)
    return Results(
        {recipe: np.array(rows) for recipe, rows in found.items()}, (int(sizes[is_small].median()), int(sizes[~is_small].median()))
    )
