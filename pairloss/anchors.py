"""What losses share before and after the pairs, O(N): labels, weights, ignored anchors, reduction."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, ranks
from .prepare import loss_dtype, real_view
from .reference import without_silent


class Labelled(NamedTuple):
    """The checked arguments of a labelled loss."""

    features: Tensor
    ids: Tensor  # [N] labels or [N, W] words of multi-hot ones
    ref_features: Tensor | None
    ref_ids: Tensor | None
    ignored: Tensor | None  # bool [N]
    ref_ignored: Tensor | None
    weight: Tensor | None
    dtype: torch.dtype  # of the statistics and the loss
    self_offset: int | None


def labelled(
    features: Tensor,
    labels: Tensor,
    ref_features: Tensor | None,
    ref_labels: Tensor | None,
    weight: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int | None,
) -> Labelled:
    checks.features("features", features)
    checks.labels("labels", labels, features)
    if (ref_features is None) != (ref_labels is None):
        given, missing = ("ref_labels", "ref_features") if ref_features is None else ("ref_features", "ref_labels")
        raise ValueError(f"{missing}: expected together with {given}, got None")
    if ref_features is not None and ref_labels is not None:
        checks.features("ref_features", ref_features, like=features)
        checks.labels("ref_labels", ref_labels, ref_features)
        if ref_labels.shape[1:] != labels.shape[1:]:
            raise ValueError(f"ref_labels: expected shape [M, {', '.join(map(str, labels.shape[1:]))}], got {list(ref_labels.shape)}")
        ref_features = real_view(ref_features)
    _check_weights(features, weight, class_weight, ignore_index)
    labels, ref_labels = labels.long(), None if ref_labels is None else ref_labels.long()  # before any comparison: uint8 wraps
    if labels.ndim == 2 and (class_weight is not None or ignore_index is not None):
        raise ValueError("class_weight, ignore_index: expected None with multi-hot labels; use weight")
    ignored, ref_ignored = (None if ignore_index is None or v is None else v == ignore_index for v in (labels, ref_labels))
    dtype = loss_dtype(features)
    weight = weights(labels, weight, class_weight, ignored, dtype)
    ref_ids = None if ref_labels is None else _ids(ref_labels)
    self_offset = 0 if ref_features is None else None
    return Labelled(real_view(features), _ids(labels), ref_features, ref_ids, ignored, ref_ignored, weight, dtype, self_offset)


def _ids(labels: Tensor) -> Tensor:
    """Labels as int64; multi-hot ones as words of 64 classes."""
    if labels.ndim == 1:
        return labels
    bits = torch.nn.functional.pad((labels != 0).long(), (0, -labels.shape[1] % 64)).unflatten(1, (-1, 64))
    return (bits << torch.arange(64, device=labels.device)).sum(2)


def _check_weights(features: Tensor, weight: Tensor | None, class_weight: Tensor | None, ignore_index: int | None) -> None:
    if weight is not None:
        checks.per_row("weight", weight, features)
    if class_weight is not None:
        checks.tensor("class_weight", class_weight)
        if class_weight.ndim != 1 or class_weight.shape[0] == 0:
            raise ValueError(f"class_weight: expected shape [C], one entry per class, got {list(class_weight.shape)}")
        checks.same_device("class_weight", class_weight, features)
    for name, value in (("weight", weight), ("class_weight", class_weight)):
        if value is not None:
            checks.real(name, value)


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
    of_class = ranks.shared(class_weight.to(dtype))[labels.clamp(0, num_classes - 1)]
    of_class = torch.where(outside, torch.nan, of_class)
    return of_class if result is None else result * of_class


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), to the last digit also of float64: torch's is x from 20 on."""
    return torch.nn.functional.softplus(x, threshold=50.0)


def reduce_labelled(losses: Tensor, without: Tensor, no_positive: str, given: Labelled, weight: Tensor | None, reduction: str) -> Tensor:
    """reduce of a labelled loss, whose anchors without positives (bool [N]) are skipped or have loss 0."""
    if no_positive == "zero":
        return reduce(losses.masked_fill(without, 0), given.ignored, weight, reduction)
    return reduce(losses, without if given.ignored is None else without | given.ignored, weight, reduction)


def reduce(losses: Tensor, skipped: Tensor | None, weight: Tensor | None, reduction: str) -> Tensor:
    """none: w_i l_i, 0 where an anchor is skipped (bool [N]). sum: their sum. mean: sum(w l) / sum(w) over the others, 0 without any."""
    weight = None if weight is None else weight.to(losses.dtype)
    weighted = losses if weight is None else weight * without_silent(losses, weight)
    if skipped is not None:
        weighted = weighted.masked_fill(skipped, 0)
    if reduction == "none":
        return weighted
    total = ranks.total(weighted.sum())
    return total if reduction == "sum" else total / _total_weight(losses, skipped, weight)


def shares(losses: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """[N]: what the sum or the mean of reduce multiplies each loss with, where no anchor is skipped."""
    weight = None if weight is None else weight.to(losses.dtype)
    total = 1 if reduction == "sum" else _total_weight(losses, None, weight)
    if weight is None and isinstance(total, int):
        return torch.full_like(losses, 1 / total)
    return (torch.ones_like(losses) if weight is None else weight) / total


def _total_weight(losses: Tensor, skipped: Tensor | None, weight: Tensor | None) -> int | Tensor:
    """Of the anchors that are not skipped, 1 each without weights; 1 if it is 0."""
    if weight is not None:
        counted = weight if skipped is None else weight.masked_fill(skipped, 0)
    elif skipped is not None:
        counted = ~skipped
    elif ranks.current() is None:
        return max(1, losses.shape[0])
    else:  # not ranks.count, for which the host would wait
        counted = torch.ones_like(losses, dtype=torch.bool)
    total = ranks.total(counted.sum())
    return total.clamp(min=1) if weight is None else total.masked_fill(total == 0, 1)
