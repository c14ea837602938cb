"""Features and labels from scikit-learn's digits or from an .npz file, checked, split and scaled."""

import math
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import MinMaxScaler

from .errors import InputError

Array = npt.NDArray[np.generic]
NEIGHBOURS = 5  # of the k-NN classifier that judges the codes
# The split is the same for every --seed, so that runs can be compared.
SPLIT_SEED = 0


@dataclass(frozen=True)
class Dataset:
    name: str
    classes: Sequence[str]  # names; the labels are 0..C-1
    train_x: npt.NDArray[np.float32]
    train_y: npt.NDArray[np.int64]
    test_x: npt.NDArray[np.float32]
    test_y: npt.NDArray[np.int64]


def load(source: str, test_fraction: float) -> Dataset:
    """ "digits" or the path of an .npz, split by class; features in [0, 1] by the training set's least and greatest."""
    if source == "digits":
        features, labels = load_digits(return_X_y=True)
    else:
        features, labels = read_npz(Path(source))
        check(features, labels)
    classes, ranks = np.unique(labels, return_inverse=True)
    check_split(source, ranks, test_fraction)

    train_x, test_x, train_y, test_y = train_test_split(
        features.astype(np.float64), ranks.astype(np.int64), test_size=test_fraction, stratify=ranks, random_state=SPLIT_SEED
    )
    scaler = MinMaxScaler().fit(train_x)
    train_x, test_x = (scaler.transform(part).astype(np.float32) for part in (train_x, test_x))
    return Dataset(Path(source).name, [str(c) for c in classes], train_x, train_y, test_x, test_y)


def read_npz(path: Path) -> tuple[Array, Array]:
    if path.is_dir() or not path.exists():
        raise InputError(f"--data: expected digits or an .npz file, {path} {'is a folder' if path.is_dir() else 'does not exist'}")
    # numpy would take a lone array or a pickle as well
    if not zipfile.is_zipfile(path):
        raise InputError(f"--data: {path} is not an .npz archive (numpy.savez writes one)")
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [name for name in ("features", "labels") if name not in archive.files]
            if missing:
                raise InputError(f"--data: {path} lacks {' and '.join(missing)}, it has {', '.join(archive.files) or 'nothing'}")
            return read(path, archive, "features"), read(path, archive, "labels")
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"--data: {path} can't be read: {one_line(error)}") from None


def read(path: Path, archive: "np.lib.npyio.NpzFile", name: str) -> Array:
    try:
        array = archive[name]
    except (ValueError, EOFError, MemoryError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
        if "allow_pickle" in str(error):
            raise InputError(f"{name}: expected numbers, {path} has pickled Python objects, which are never loaded") from None
        raise InputError(f"{name}: {path} can't be read: {one_line(error)}") from None
    if not isinstance(array, np.ndarray):
        raise InputError(f"{name}: expected an array, {path} has something else under that name")
    return array


def one_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def check(features: Array, labels: Array) -> None:
    if features.ndim != 2:
        raise InputError(f"features: expected shape [N, D], got {list(features.shape)}")
    if features.dtype.kind not in "fiub":
        raise InputError(f"features: expected real numbers, got dtype {features.dtype}")
    if 0 in features.shape:
        raise InputError(f"features: expected at least one row and one column, got shape {list(features.shape)}")
    if labels.ndim != 1:
        raise InputError(f"labels: expected shape [N], got {list(labels.shape)}")
    if labels.dtype.kind not in "iu":
        raise InputError(f"labels: expected integers, got dtype {labels.dtype}")
    if len(labels) != len(features):
        raise InputError(f"labels: expected one per row of features, {len(features)}, got {len(labels)}")
    unusable = int((~(np.abs(features.astype(np.float64)) <= np.finfo(np.float32).max)).sum())
    if unusable:
        raise InputError(f"features: expected finite float32 numbers, got {unusable} that are NaN, infinite or too large")


def check_split(source: str, ranks: Array, test_fraction: float) -> None:
    """What a split with every class on both sides needs."""
    counts = np.bincount(ranks)
    if len(counts) < 2:
        raise InputError(f"labels: expected at least 2 classes, {source} has 1")
    if counts.min() < 2:
        raise InputError(
            f"labels: expected at least 2 rows of every class, one for training and one for the test; "
            f"{int((counts < 2).sum())} of {len(counts)} classes have 1"
        )
    test_rows = math.ceil(len(ranks) * test_fraction)
    train_rows = len(ranks) - test_rows
    if test_rows < len(counts) or train_rows < max(len(counts), NEIGHBOURS):
        raise InputError(
            f"--test-fraction: {test_fraction:g} of {len(ranks)} rows leaves {train_rows} for training and {test_rows} for the test; "
            f"expected at least one row of each of the {len(counts)} classes in both, and {NEIGHBOURS} for training"
        )
