"""Checks of arguments, before any work: every message names the argument, what was expected and what came."""

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import engines, ranks

METRICS = ("cosine", "dot", "sqeuclidean")
SIMILARITIES = ("cosine", "dot")
_FEATURE_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex128, torch.complex64, torch.complex32)


def tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def features(name: str, value: Tensor, like: Tensor | None = None) -> None:
    tensor(name, value)
    if value.ndim != 2:
        raise ValueError(f"{name}: expected shape [N, D], got {list(value.shape)}")
    if value.dtype not in _FEATURE_DTYPES:
        raise TypeError(f"{name}: expected a floating-point or complex dtype, got {value.dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {value.layout}")
    if (value.shape[0] == 0 and ranks.current() is None) or value.shape[1] == 0:  # a rank may have no rows
        raise ValueError(f"{name}: expected at least one row and one column, got {list(value.shape)}")
    if like is not None:
        same_device(name, value, like)
        if value.shape[1] != like.shape[1] or value.dtype != like.dtype:
            raise ValueError(
                f"{name}: expected {like.dtype} of shape [M, {like.shape[1]}] like the features, got {value.dtype} {list(value.shape)}"
            )


def labels(name: str, value: Tensor, like: Tensor, multi_hot: bool = True) -> None:
    tensor(name, value)
    if value.is_floating_point() or value.is_complex():
        raise TypeError(f"{name}: expected an integer dtype, got {value.dtype}")
    if not multi_hot or value.ndim != 2 or value.shape[0] != like.shape[0] or value.shape[1] == 0:
        per_row(name, value, like)
    same_device(name, value, like)


def paired(name_x: str, x: Tensor, name_y: str, y: Tensor, ids: Tensor | None, weight: Tensor | None) -> None:
    """Two sets of rows, row i of one belonging to row i of the other."""
    features(name_x, x)
    features(name_y, y, like=x)
    if x.shape[0] != y.shape[0]:
        raise ValueError(f"{name_y}: expected as many rows as {name_x}, {x.shape[0]}, got {y.shape[0]}")
    if ids is not None:
        integers("ids", ids, x.shape[:1], x)
    if weight is not None:
        per_row("weight", weight, x)
        real("weight", weight)


def integers(name: str, value: Tensor, shape: torch.Size, like: Tensor) -> None:
    tensor(name, value)
    if value.is_floating_point() or value.is_complex():
        raise TypeError(f"{name}: expected an integer dtype, got {value.dtype}")
    if value.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(value.shape)}")
    same_device(name, value, like)


def bias(name: str, value: Tensor | None, shape: torch.Size, like: Tensor) -> None:
    if value is None:
        return
    tensor(name, value)
    real(name, value)
    if value.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(value.shape)}")
    same_device(name, value, like)


def real(name: str, value: Tensor) -> None:
    if value.is_complex():
        raise TypeError(f"{name}: expected a real dtype, got {value.dtype}")


def per_row(name: str, value: Tensor, like: Tensor) -> None:
    tensor(name, value)
    if value.ndim != 1 or value.shape[0] != like.shape[0]:
        raise ValueError(f"{name}: expected shape [{like.shape[0]}], one entry per row of the features, got {list(value.shape)}")
    same_device(name, value, like)


def same_device(name: str, value: Tensor, like: Tensor) -> None:
    if value.device != like.device:
        raise ValueError(f"{name}: expected the device of the features, {like.device}, got {value.device}")


def scalar(name: str, value: float | Tensor, like: Tensor, dtype: torch.dtype) -> float | Tensor:
    """A number, or a 0-dim tensor, which is not looked at (that would wait for the device)."""
    if not isinstance(value, Tensor):
        finite(name, value)
        return float(value)
    if value.ndim != 0 or not value.is_floating_point():
        raise ValueError(f"{name}: expected a number or a 0-dim floating-point tensor, got {value.dtype} {list(value.shape)}")
    if value.device.type != "cpu":
        same_device(name, value, like)
    return ranks.shared(value.to(dtype))


def temperature(name: str, value: float | Tensor, like: Tensor, dtype: torch.dtype) -> float | Tensor:
    """A Python number must be > 0."""
    return scalar(name, value, like, dtype) if isinstance(value, Tensor) else positive(name, value)


def positive(name: str, value: float) -> float:
    number(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a finite number > 0, got {value}")
    return float(value)


def non_negative(name: str, value: float) -> None:
    number(name, value)
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected a finite number >= 0, got {value}")


def number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")


def integer(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (numbers.Integral, torch.SymInt)):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if not -(2**63) <= int(value) < 2**63:
        raise ValueError(f"{name}: expected a 64-bit integer, got {value}")


def choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, known))}, got {value!r}")


def similarity(value: str) -> None:
    """The metric of a loss that has no squared Euclidean form."""
    choice("metric", value, SIMILARITIES)


def flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")


def fraction(name: str, value: float) -> None:
    number(name, value)
    if not 0 <= value < 1:
        raise ValueError(f"{name}: expected 0 <= {name} < 1, got {value}")


def finite(name: str, value: float) -> None:
    number(name, value)
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name}: expected a finite number, got {value}")


def count(name: str, value: int) -> None:
    integer(name, value)
    if value < 1:
        raise ValueError(f"{name}: expected an integer >= 1, got {value}")


def _one_of(*known: str) -> Callable[[str, str], None]:
    return lambda name, value: choice(name, value, known)


def _or_none(check: Callable[[str, Any], object]) -> Callable[[str, Any], object]:
    return lambda name, value: None if value is None else check(name, value)


# What each option may be, in every loss that has it: one name means one thing.
OPTIONS: dict[str, Callable[[str, Any], object]] = {
    "metric": _one_of(*METRICS),
    "reduction": _one_of("mean", "sum", "none"),
    "no_positive": _one_of("skip", "zero"),
    "form": _one_of("out", "in", "pairs"),
    "pool": _one_of("anchor", "batch"),
    "backend": lambda _, value: engines.check_backend(value),
    "ignore_index": _or_none(integer),
    "top_k": _or_none(count),
    "threshold": _or_none(finite),
    "base_tau": _or_none(positive),
    "in_batch": flag,
    "both_sides": flag,
    "decoupled": flag,
    "include_self": flag,
    "eps": non_negative,
    "focal": non_negative,
    "beta": non_negative,
    "lam": non_negative,
    "tau_plus": fraction,
    "label_smoothing": fraction,
    "m": finite,
    "gamma": non_negative,
    "alpha": positive,
    "t": positive,
}


def options(**given: object) -> None:
    for name, value in given.items():
        OPTIONS[name](name, value)
