"""What every labelled loss does with its per-anchor losses, O(N): weights, ignored anchors, reduction."""

import torch
from torch import Tensor

from . import checks


def check_options(
    features: Tensor, weight: Tensor | None, class_weight: Tensor | None, ignore_index: int | None, reduction: str, no_positive: str
) -> None:
    checks.choice("reduction", reduction, checks.REDUCTIONS)
    checks.choice("no_positive", no_positive, checks.NO_POSITIVE)
    if weight is not None:
        checks.per_row("weight", weight, features)
    if class_weight is not None:
        checks.tensor("class_weight", class_weight)
        if class_weight.ndim != 1 or class_weight.shape[0] == 0:
            raise ValueError(f"class_weight: expected shape [C], one entry per class, got {list(class_weight.shape)}")
        checks.same_device("class_weight", class_weight, features)
    if ignore_index is not None:
        checks.integer("ignore_index", ignore_index)
    for name, value in (("weight", weight), ("class_weight", class_weight)):
        if value is not None and value.is_complex():
            raise TypeError(f"{name}: expected a real dtype, got {value.dtype}")


def weights(
    labels: Tensor, weight: Tensor | None, class_weight: Tensor | None, ignored: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """weight_i * class_weight[label_i], None if both are None.

    A label outside 0..C-1 that is not ignored raises on the CPU; elsewhere, and under torch.compile, where looking would
    wait for the device, its weight is NaN.
    """
    result = None if weight is None else weight.to(dtype)
    if class_weight is None:
        return result
    num_classes = class_weight.shape[0]
    outside = (labels < 0) | (labels >= num_classes)
    if ignored is not None:
        outside = outside & ~ignored
    if labels.device.type == "cpu" and not torch.compiler.is_compiling() and bool(outside.any()):
        raise ValueError(
            f"labels: expected 0..{num_classes - 1} because class_weight has {num_classes} entries, got {labels[outside][0].item()}"
        )
    of_class = class_weight.to(dtype)[labels.clamp(0, num_classes - 1).long()]
    of_class = torch.where(outside, torch.nan, of_class)
    return of_class if result is None else result * of_class


def reduce(losses: Tensor, counts: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """none: w_i l_i, 0 where the anchor doesn't count. sum: their sum. mean: sum(w l) / sum(w) over anchors that count, 0 if none does."""
    weighted = torch.where(counts, losses if weight is None else weight * losses, 0)
    if reduction == "none":
        return weighted
    total = weighted.sum()
    if reduction == "sum":
        return total
    share = counts.sum().to(losses.dtype) if weight is None else torch.where(counts, weight, 0).sum()
    return total / torch.where(share == 0, 1, share)
