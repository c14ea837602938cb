"""Checks of arguments, before any work: every message names the argument, what was expected and what came."""

import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

REDUCTIONS = ("mean", "sum", "none")
NO_POSITIVE = ("skip", "zero")
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
    if value.shape[0] == 0 or value.shape[1] == 0:
        raise ValueError(f"{name}: expected at least one row and one column, got {list(value.shape)}")
    if like is not None:
        same_device(name, value, like)
        if value.shape[1] != like.shape[1] or value.dtype != like.dtype:
            raise ValueError(
                f"{name}: expected {like.dtype} of shape [M, {like.shape[1]}] like the features, got {value.dtype} {list(value.shape)}"
            )


def labels(name: str, value: Tensor, like: Tensor) -> None:
    tensor(name, value)
    if value.is_floating_point() or value.is_complex():
        raise TypeError(f"{name}: expected an integer dtype, got {value.dtype}")
    per_row(name, value, like)


def per_row(name: str, value: Tensor, like: Tensor) -> None:
    tensor(name, value)
    if value.ndim != 1 or value.shape[0] != like.shape[0]:
        raise ValueError(f"{name}: expected shape [{like.shape[0]}], one entry per row of the features, got {list(value.shape)}")
    same_device(name, value, like)


def same_device(name: str, value: Tensor, like: Tensor) -> None:
    if value.device != like.device:
        raise ValueError(f"{name}: expected the device of the features, {like.device}, got {value.device}")


def temperature(name: str, value: float | Tensor, like: Tensor) -> float | Tensor:
    """A Python number must be > 0; a tensor is not looked at (that would wait for the device)."""
    if isinstance(value, Tensor):
        if value.ndim != 0 or not value.is_floating_point():
            raise ValueError(f"{name}: expected a number or a 0-dim floating-point tensor, got {value.dtype} {list(value.shape)}")
        if value.device.type != "cpu":
            same_device(name, value, like)
        return value
    return positive(name, value)


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
        raise TypeError(f"{name}: expected an integer or None, got {type(value).__name__}")
    if not -(2**63) <= int(value) < 2**63:
        raise ValueError(f"{name}: expected a 64-bit integer, got {value}")


def choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, known))}, got {value!r}")
