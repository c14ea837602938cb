"""The losses as modules: options at construction, tensors at the call."""

import inspect
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import checks, contrastive, image_text, imbalance, metrics, neighbour, supervised
from .global_batch import distributed
from .layerwise import EntanglementMonitor as EntanglementMonitor
from .layerwise import LayerwiseSNNL as LayerwiseSNNL
from .memory import FeatureQueue as FeatureQueue
from .ranks import STRATEGIES
from .scale import LogitScale as LogitScale


class _Loss(nn.Module):
    """A loss function as a module. Its options, by their names and defaults, are the module's; its tensors come with the call.

    group: None, or a torch.distributed process group, or "world" for the default one: the loss of the batch that is spread over its
    ranks, by ``strategy``, as :func:`pairloss.distributed` has it.
    """

    function: ClassVar[Callable[..., Tensor]]
    buffer: ClassVar[str | None] = None  # a tensor among the options
    own: ClassVar[tuple[str, ...]] = ()  # options of the module itself

    def __init_subclass__(cls) -> None:
        if not hasattr(cls, "function"):
            return
        given = inspect.signature(cls.function).parameters.values()
        own = [v for name, v in inspect.signature(cls.__init__).parameters.items() if name in cls.own]
        options = [v for v in given if v.name in checks.OPTIONS or v.name == cls.buffer]
        spread = [v for name, v in inspect.signature(_Loss.__init__).parameters.items() if name in ("group", "strategy")]
        cls.__signature__ = inspect.Signature([*own, *options, *spread])  # type: ignore[attr-defined]

    def __init__(self, *leading: Any, group: Any = None, strategy: str = "gather", **options: Any) -> None:
        super().__init__()
        checks.choice("strategy", strategy, STRATEGIES)
        if isinstance(group, str):
            checks.choice("group", group, ("world",))
        self.group, self.strategy = group, strategy
        bound = inspect.signature(type(self)).replace(parameters=self._parameters_of_function()).bind(*leading, **options)
        bound.apply_defaults()
        self.options = dict(bound.arguments)
        if self.buffer is not None:
            self.register_buffer(self.buffer, self.options.pop(self.buffer))
        checks.options(**self.options)

    def _parameters_of_function(self) -> list[inspect.Parameter]:
        return [v for name, v in inspect.signature(type(self)).parameters.items() if name not in (*self.own, "group", "strategy")]

    def forward(self, *tensors: Tensor, **more: Tensor | None) -> Tensor:
        if self.buffer is not None:
            more[self.buffer] = getattr(self, self.buffer)
        function = type(self).function
        if self.group is not None:
            function = distributed(function, None if self.group == "world" else self.group, self.strategy)
        return function(*tensors, **more, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items())


class _TemperatureLoss(_Loss):
    """A loss with a temperature.

    tau > 0, a number: with ``learnable`` where training starts, the parameter being ``log_tau``, so that tau stays positive;
    without, a buffer in the default dtype. ``module.tau = value`` sets either, also under torch.compile and in checkpoints: a
    tensor tau never compiles anew.
    """

    own = ("tau", "learnable")

    def __init__(self, tau: float = 0.1, *, learnable: bool = False, **options: Any) -> None:
        super().__init__(**options)
        start = torch.tensor(checks.positive("tau", tau))
        self.log_tau = nn.Parameter(start.log()) if learnable else None
        self.register_buffer("_tau", None if learnable else start)

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

    def forward(self, *tensors: Tensor, **more: Tensor | None) -> Tensor:
        return super().forward(*tensors, tau=self.tau, **more)

    def extra_repr(self) -> str:
        return f"learnable={self.log_tau is not None}, {super().extra_repr()}"


class SNNL(_TemperatureLoss):
    """:func:`pairloss.snnl` as a module; called with features, labels, and optionally ref_features=, ref_labels=, weight=."""

    function, buffer = neighbour.snnl, "class_weight"


class SupCon(_TemperatureLoss):
    """:func:`pairloss.supcon` as a module; called with features, labels, and optionally ref_features=, ref_labels=, weight=."""

    function, buffer = supervised.supcon, "class_weight"


class Circle(_Loss):
    """:func:`pairloss.circle` as a module; called with features, labels, and optionally ref_features=, ref_labels=, weight=."""

    function, buffer = supervised.circle, "class_weight"


class Contrastive(_TemperatureLoss):
    """:func:`pairloss.contrastive` as a module; called with query, key, and optionally negative_keys=, ids=, weight= and the like."""

    function = contrastive.contrastive


class SimpleContrastive(_Loss):
    """:func:`pairloss.simple_contrastive` as a module; called with query, key, and optionally weight=."""

    function = contrastive.simple_contrastive


class NTXent(_TemperatureLoss):
    """:func:`pairloss.nt_xent` as a module; called with view_a, view_b, and optionally ids=, weight=."""

    function = contrastive.nt_xent


class CLIP(_Loss):
    """:func:`pairloss.clip` as a module; called with image, text, logit_scale, and optionally ids=, weight=."""

    function = image_text.clip


class SigLIP(_Loss):
    """:func:`pairloss.siglip` as a module; called with image, text, logit_scale, logit_bias, and optionally ids=, weight=."""

    function = image_text.siglip


class Uniformity(_Loss):
    """:func:`pairloss.uniformity` as a module; called with x."""

    function = metrics.uniformity


class Alignment(_Loss):
    """:func:`pairloss.alignment` as a module; called with x, y, and optionally weight=."""

    function = metrics.alignment


class Tolerance(_Loss):
    """:func:`pairloss.tolerance` as a module; called with features, labels."""

    function = metrics.tolerance


class FocalCrossEntropy(_Loss):
    """:func:`pairloss.focal_cross_entropy` as a module; called with logits, labels."""

    function, buffer = imbalance.focal_cross_entropy, "weight"
