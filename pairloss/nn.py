"""The losses as modules: options at construction, tensors at the call."""

import math

import torch
from torch import Tensor, nn

from . import checks, engines
from .neighbour import snnl
from .prepare import METRICS


class SNNL(nn.Module):
    """:func:`pairloss.snnl` as a module.

    Args:
        tau: temperature > 0, a number. With ``learnable`` it is where training starts; the parameter is ``log_tau``, so
            that tau stays positive. Without, it is a buffer in the default dtype. ``module.tau = value`` sets either, also
            under torch.compile and in checkpoints: a tensor tau never compiles anew.
        learnable: whether tau is a parameter.
        metric, eps, focal, no_positive, class_weight, ignore_index, reduction, backend: as in :func:`pairloss.snnl`.

    Shape:
        features [N, D], labels [N], optionally ref_features [M, D], ref_labels [M], weight [N]; returns a 0-dim tensor, or
        [N] with reduction="none".
    """

    def __init__(
        self,
        tau: float = 0.1,
        *,
        learnable: bool = False,
        metric: str = "cosine",
        eps: float = 0.0,
        focal: float = 0.0,
        no_positive: str = "skip",
        class_weight: Tensor | None = None,
        ignore_index: int | None = None,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        checks.choice("metric", metric, METRICS)
        checks.choice("reduction", reduction, checks.REDUCTIONS)
        checks.choice("no_positive", no_positive, checks.NO_POSITIVE)
        checks.non_negative("eps", eps)
        checks.non_negative("focal", focal)
        engines.check_backend(backend)
        start = torch.tensor(checks.positive("tau", tau))
        self.log_tau = nn.Parameter(start.log()) if learnable else None
        self.register_buffer("_tau", None if learnable else start)
        self.register_buffer("class_weight", class_weight)
        self.options = {
            "metric": metric,
            "eps": eps,
            "focal": focal,
            "no_positive": no_positive,
            "ignore_index": ignore_index,
            "reduction": reduction,
            "backend": backend,
        }

    @property
    def tau(self) -> Tensor:
        """The temperature, a 0-dim tensor."""
        return self._tau if self.log_tau is None else self.log_tau.exp()  # type: ignore[return-value]

    @tau.setter
    def tau(self, value: float) -> None:
        value = checks.positive("tau", value)
        with torch.no_grad():
            if self.log_tau is None:
                self._tau.fill_(value)  # type: ignore[operator]
            else:
                self.log_tau.fill_(math.log(value))

    def forward(
        self,
        features: Tensor,
        labels: Tensor,
        ref_features: Tensor | None = None,
        ref_labels: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        return snnl(
            features,
            labels,
            self.tau,
            ref_features=ref_features,
            ref_labels=ref_labels,
            weight=weight,
            class_weight=self.class_weight,  # type: ignore[arg-type]
            **self.options,  # type: ignore[arg-type]
        )

    def extra_repr(self) -> str:
        return f"learnable={self.log_tau is not None}, " + ", ".join(f"{k}={v!r}" for k, v in self.options.items())
