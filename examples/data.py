"""Images and labels: scikit-learn's digits, an .npz file, or a data set that torchvision knows."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import typer
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10"}
HELP = f"digits, {', '.join(TORCHVISION)} (with torchvision), or an .npz with features [N, H, W] or [N, C, H, W] and labels [N]"
# The split is the same for every seed, so that runs can be compared.
SPLIT_SEED = 0


@dataclass(frozen=True)
class Images:
    """Pixels in [0, 1], [N, C, H, W] float32; labels 0..K-1, int64."""

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def classes(self) -> int:
        return int(self.train_y.max()) + 1


def load(source: str, test_fraction: float = 0.5) -> Images:
    """The images of that name or file; `test_fraction` where they come without a split of their own."""
    if source in TORCHVISION:
        return from_torchvision(source)
    if source == "digits":
        features, labels = load_digits(return_X_y=True)
        features = features.reshape(-1, 8, 8)
    else:
        features, labels = from_file(Path(source))
    features = features.astype(np.float32)
    if features.ndim == 3:
        features = features[:, None]
    low, high = features.min(), features.max()
    features = (features - low) / max(high - low, np.finfo(np.float32).tiny)
    ranks = np.unique(labels, return_inverse=True)[1].astype(np.int64)
    parts = train_test_split(features, ranks, test_size=test_fraction, stratify=ranks, random_state=SPLIT_SEED)
    train_x, test_x, train_y, test_y = map(torch.from_numpy, parts)
    return Images(Path(source).stem, train_x, train_y, test_x, test_y)


def from_file(path: Path) -> tuple[np.ndarray, np.ndarray]:
    if path.suffix != ".npz" or not path.is_file():
        raise typer.BadParameter(f"expected {HELP}, got {path}", param_hint="--data")
    with np.load(path, allow_pickle=False) as archive:
        missing = [name for name in ("features", "labels") if name not in archive.files]
        if missing:
            raise typer.BadParameter(f"{path} lacks {' and '.join(missing)}, it has {', '.join(archive.files)}", param_hint="--data")
        features, labels = archive["features"], archive["labels"]
    if features.ndim not in (3, 4) or labels.shape != features.shape[:1] or labels.dtype.kind not in "iu":
        raise typer.BadParameter(
            f"expected features [N, H, W] or [N, C, H, W] and integer labels [N], got {list(features.shape)} and "
            f"{labels.dtype} {list(labels.shape)}",
            param_hint="--data",
        )
    return features, labels


def from_torchvision(name: str) -> Images:
    try:
        from torchvision import datasets
    except ImportError:
        raise typer.BadParameter(f"{name} needs torchvision: pip install torchvision", param_hint="--data") from None
    parts = []
    for train in (True, False):
        images = getattr(datasets, TORCHVISION[name])("data", train=train, download=True)
        pixels = torch.as_tensor(images.data).float() / 255
        parts += [pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous(), torch.as_tensor(images.targets)]
    return Images(name, *parts)
