"""The learnable scale of logits."""

import math

import torch
from torch import Tensor, nn

from . import checks


class LogitScale(nn.Module):
    r"""A factor for logits that is learned as its logarithm, :math:`e^{log\_scale}`: positive, and 1 / tau.

    Args:
        initial: where training starts, > 0; CLIP's 1 / 0.07.
        maximum: each call first sets the parameter, in place, to at most its logarithm, as CLIP's training does: beyond that a
            step of the optimizer is lost, but the gradient is that of the scale without a bound. None: no bound.

    Shape:
        No arguments; returns a 0-dim tensor in the dtype of the parameter ``log_scale``.

    Source: Radford et al. 2021 (CLIP), section 2.5.

    Example:
        >>> import torch, pairloss
        >>> scale = pairloss.nn.LogitScale(initial=20.0)
        >>> scale()
        tensor(20., grad_fn=<ExpBackward0>)
        >>> loss = pairloss.snnl(torch.randn(8, 3), torch.arange(8) % 2, scale.tau)
    """

    def __init__(self, initial: float = 1 / 0.07, *, maximum: float | None = 100.0) -> None:
        super().__init__()
        initial = checks.positive("initial", initial)
        self.maximum = None if maximum is None else checks.positive("maximum", maximum)
        if self.maximum is not None and initial > self.maximum:
            raise ValueError(f"initial: expected at most maximum = {self.maximum}, got {initial}")
        self.log_scale = nn.Parameter(torch.tensor(math.log(initial)))

    def forward(self) -> Tensor:
        if self.maximum is not None:
            with torch.no_grad():  # a clamp in the graph would stop the gradient, and the parameter could never come back
                self.log_scale.clamp_(max=math.log(self.maximum))
        return self.log_scale.exp()

    @property
    def tau(self) -> Tensor:
        """The temperature, 1 / scale: a 0-dim tensor."""
        return 1 / self()

    def extra_repr(self) -> str:
        return f"maximum={self.maximum}"
