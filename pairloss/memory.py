"""Features of earlier batches."""

import torch
from torch import Tensor, nn

from . import checks


class FeatureQueue(nn.Module):
    """The last ``size`` rows that were put in, first in, first out: a memory for contrastive losses (MoCo, XBM).

    Args:
        size: number of slots.
        dim: columns of a row.
        ignore_index: label of the empty slots.
        dtype: of the rows, floating-point; None: the default dtype. A loss wants its features in the same.

    Buffers, all of them in checkpoints:
        features [size, dim], 0 in empty slots; labels [size], int64; pointer, the slot that is written next; fill, the number
        of slots that are not empty (both 0-dim int64).

    Each :meth:`enqueue` makes new tensors and leaves those alone that it replaces: a loss that was computed with
    ``queue.features`` can still be differentiated after it, as MoCo's order (loss, enqueue, backward) needs. That costs one
    copy of the queue per call. Nothing waits for the device.

    Example:
        A labelled queue, where empty slots are neither positives nor negatives:

        >>> import torch, pairloss
        >>> queue = pairloss.nn.FeatureQueue(size=4096, dim=16)
        >>> for _ in range(2):
        ...     features, labels = torch.randn(32, 16), torch.arange(32) % 4
        ...     queue.enqueue(features, labels)
        >>> loss = pairloss.snnl(
        ...     features, labels, 0.1, ref_features=queue.features, ref_labels=queue.labels, ignore_index=queue.ignore_index
        ... )

        A queue of negatives, MoCo's keys, where the bias masks empty slots:

        >>> query, key = torch.randn(32, 16, requires_grad=True), torch.randn(32, 16)
        >>> loss = pairloss.contrastive(query, key, 0.07, in_batch=False, negative_keys=queue.features, negative_bias=queue.bias)
        >>> queue.enqueue(key)
        >>> loss.backward()

    Source: He et al. 2020 (MoCo); Wang et al. 2020 (cross-batch memory).
    """

    features: Tensor
    labels: Tensor
    pointer: Tensor
    fill: Tensor

    def __init__(self, size: int, dim: int, *, ignore_index: int = -100, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        checks.count("size", size)
        checks.count("dim", dim)
        checks.integer("ignore_index", ignore_index)
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype: expected a floating-point dtype, got {dtype}")
        self.ignore_index = int(ignore_index)
        self.register_buffer("features", torch.zeros(size, dim, dtype=dtype))
        self.register_buffer("labels", torch.full((size,), self.ignore_index, dtype=torch.long))
        self.register_buffer("pointer", torch.tensor(0))
        self.register_buffer("fill", torch.tensor(0))

    @property
    def bias(self) -> Tensor:
        """[size], in the dtype of the features: 0 for filled slots, -inf for empty ones. Added to a logit it masks the slot."""
        size = self.features.shape[0]
        empty = torch.arange(size, device=self.features.device) >= self.fill
        return self.features.new_zeros(size).masked_fill(empty, -torch.inf)

    @torch.inference_mode(False)  # the buffers of an inference could not serve a later training step
    @torch.no_grad()
    def enqueue(self, features: Tensor, labels: Tensor | None = None) -> None:
        """Put rows in the place of the oldest, detached and in the dtype of the queue.

        Args:
            features: [N, dim], floating-point; N may be 0. Of more than ``size`` rows the last ``size`` stay.
            labels: [N], integers; 0 if left out.

        Raises:
            TypeError, ValueError: an argument of the wrong kind, shape or device.
        """
        size, dim = self.features.shape
        checks.tensor("features", features)
        if features.ndim != 2 or features.shape[1] != dim:
            raise ValueError(f"features: expected shape [N, {dim}], as the queue has {dim} columns, got {list(features.shape)}")
        if not features.is_floating_point():
            raise TypeError(f"features: expected a floating-point dtype, got {features.dtype}")
        if features.device != self.features.device:
            raise ValueError(f"features: expected the device of the queue, {self.features.device}, got {features.device}")
        if labels is None:
            labels = torch.zeros(features.shape[0], dtype=torch.long, device=features.device)
        checks.integers("labels", labels, features.shape[:1], features)

        features, labels = features[-size:], labels[-size:]
        n = features.shape[0]
        slots = (self.pointer + torch.arange(n, device=features.device)) % size
        self.features = self.features.index_copy(0, slots, features.to(self.features.dtype))
        self.labels = self.labels.index_copy(0, slots, labels.long())
        self.pointer = (self.pointer + n) % size
        self.fill = (self.fill + n).clamp(max=size)

    def clear(self) -> None:
        """Empty all slots."""
        self.features = torch.zeros_like(self.features)
        self.labels = torch.full_like(self.labels, self.ignore_index)
        self.pointer, self.fill = torch.zeros_like(self.pointer), torch.zeros_like(self.fill)

    def extra_repr(self) -> str:
        size, dim = self.features.shape
        return f"size={size}, dim={dim}, ignore_index={self.ignore_index}, dtype={self.features.dtype}"
