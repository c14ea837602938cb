"""The soft nearest neighbour loss on the layers of a model, beside its primary loss, and the entanglement of the layers over the epochs."""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.hooks import RemovableHandle

from . import checks
from .neighbour import Entanglement, entanglement, snnl

AGGREGATES: dict[str, Callable[[Tensor], Tensor]] = {"sum": torch.sum, "mean": torch.mean, "min": torch.amin}


class LayerwiseLoss(NamedTuple):
    loss: Tensor
    primary: Tensor
    snnl_per_layer: Tensor


class LayerwiseSNNL(nn.Module):
    r"""A primary loss plus the soft nearest neighbour loss of the hidden layers, from the one forward pass of the training step.

    .. math::
        L = L_{primary}(outputs, target) + factor \cdot \sum_l \mathrm{snnl}(h_l, labels, \tau)

    with h_l the output of layer l, flattened to [N, D_l]. A positive factor disentangles the classes, a negative one entangles
    them, 0 leaves the primary loss alone and computes nothing else. Hooks on the layers keep what they give while ``model(x)`` runs;
    the call of the criterion uses it and lets it go. A classifier's target is its labels. An autoencoder's target is its input, and the
    labels come third.

    Args:
        model: any module; neither kept nor copied, and not part of this one's parameters or state. It may be wrapped in
            DistributedDataParallel or torch.compile before or after; a compiled model must not have run yet.
        layers: names of submodules, as ``model.named_modules()`` has them. None: every submodule with a weight of two or more
            dimensions (linear, convolution, embedding) but the one defined last, which makes the outputs.
        primary: a function (outputs, target) -> 0-dim tensor.
        factor: a finite number, the weight of the aggregated SNNL; ``criterion.factor`` may be set later.
        code_units: use only the first columns. A number: of every layer, as the authors' code has it; {name: number}: of these
            layers, say of the code of an autoencoder, as their paper has it. A narrower layer is used whole.
        tau: temperature > 0; with ``learnable`` where training starts. None: 0.1, or what schedule says.
        learnable: one temperature for each layer, the parameter ``log_tau`` [layers]; give it to the optimiser.
        schedule: a function epoch -> tau instead of tau, such as ``pairloss.schedules.annealed``; :meth:`set_epoch` or :meth:`step`
            moves it. Epoch and temperature are buffers: they checkpoint, and a new temperature never compiles anew.
        aggregate: "sum", "mean" or "min" over the layers.
        metric, eps, focal, no_positive, ignore_index, backend: as in :func:`pairloss.snnl`. Its ignore_index is not the primary loss's.

    Called with:
        outputs: of the model's last forward pass; goes to ``primary`` as it is.
        target: goes to ``primary`` as it is.
        labels: [N] integers or [N, C] multi-hot, as in :func:`pairloss.snnl`. None: the target, which must then be integers.

    Returns:
        (loss, primary, snnl_per_layer): 0-dim, 0-dim, and [layers] in the order of ``criterion.layers``; NaN (not computed) where
        factor is 0.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape or range, a name that the model lacks, a layer whose output is not
        a tensor [N, ...]. RuntimeError: no forward pass of the model since the last call, or one without gradients although the
        outputs have them, a layer that the pass left out, or a call after :meth:`remove`.

    What counts is the model's last complete ``model(x)``; layers that are called by themselves are not seen. A layer that runs several
    times in a pass has the mean over its calls. An in-place operation behind a layer changes what is seen of it. Until the criterion is
    called or the model runs again, the activations of the last pass stay in memory.

    :meth:`remove` takes the hooks off the model; so does leaving ``with LayerwiseSNNL(...) as criterion:``, and so does the end of the
    criterion's life. A copy or pickle of the model alone has hooks that keep nothing; copied together, both work as the originals do.
    In DistributedDataParallel each process compares the rows of its own batch; ``pairloss.distributed(criterion)`` compares those of all,
    with a gradient for log_tau that is the same everywhere. Alone, a learnable criterion must be wrapped too.

    Source: Frosst, Papernot and Hinton 2019 (layers, both signs); Agarap and Azcarraga 2020 (annealing, autoencoder, code units).

    Example:
        >>> import torch, pairloss
        >>> x, labels = torch.randn(32, 8), torch.arange(32) % 3
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
        >>> criterion = pairloss.nn.LayerwiseSNNL(model, ["1"], factor=0.5, schedule=pairloss.schedules.annealed)
        >>> for epoch in range(2):
        ...     criterion.set_epoch(epoch)
        ...     loss, primary, snnl_per_layer = criterion(model(x), labels)
        ...     loss.backward()
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 2), torch.nn.Linear(2, 8))
        >>> criterion = pairloss.nn.LayerwiseSNNL(model, ["0"], primary=torch.nn.functional.mse_loss)
        >>> criterion(model(x), x, labels).snnl_per_layer.shape
        torch.Size([1])
    """

    epoch: Tensor
    _tau: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str] | None = None,
        *,
        primary: Callable[[Any, Any], Tensor] = cross_entropy,
        factor: float = 1.0,
        code_units: int | Mapping[str, int] | None = None,
        tau: float | None = None,
        learnable: bool = False,
        schedule: Callable[[int], float] | None = None,
        aggregate: str = "sum",
        metric: str = "cosine",
        eps: float = 0.0,
        focal: float = 0.0,
        no_positive: str = "skip",
        ignore_index: int | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        checks.finite("factor", factor)
        checks.choice("aggregate", aggregate, tuple(AGGREGATES))
        checks.flag("learnable", learnable)
        for name, function in (("primary", primary), ("schedule", schedule)):
            if not callable(function) and (name == "primary" or function is not None):
                raise TypeError(f"{name}: expected a function, got {type(function).__name__}")
        if schedule is not None and (learnable or tau is not None):
            raise ValueError(f"schedule: it sets the temperature, so it can't go with {'learnable' if learnable else 'tau'}")
        self.options = {
            "metric": metric,
            "eps": eps,
            "focal": focal,
            "no_positive": no_positive,
            "ignore_index": ignore_index,
            "backend": backend,
        }
        checks.options(**self.options)
        model = _unwrapped(model)
        self.layers = _names(model, layers)
        self.code_units = _units(code_units, self.layers)
        self.primary, self.factor, self.aggregate, self.schedule = primary, float(factor), aggregate, schedule

        start = torch.tensor(checks.positive("tau", 0.1 if tau is None else tau))
        self.log_tau = nn.Parameter(start.log().repeat(len(self.layers))) if learnable else None
        self.register_buffer("_tau", None if learnable else start)
        self.register_buffer("epoch", torch.tensor(0))
        self.set_epoch(0)
        self._pass = _Pass(self.layers)
        self._handles = self._pass.attach(model)
        self._remove_at_the_end()

    @property
    def tau(self) -> Tensor:
        """The temperature: 0-dim, or [layers] where it is learnable."""
        return self._tau if self.log_tau is None else self.log_tau.exp()  # type: ignore[return-value]

    def set_epoch(self, epoch: int) -> None:
        """Count epochs from 0; the schedule, if there is one, sets the temperature."""
        checks.integer("epoch", epoch)
        checks.non_negative("epoch", epoch)
        if self.schedule is not None:
            self._tau.fill_(checks.positive("schedule", self.schedule(int(epoch))))  # type: ignore[union-attr]
        self.epoch.fill_(int(epoch))

    def step(self) -> None:
        """On to the next epoch. It reads the count, so on a GPU it waits for the device."""
        self.set_epoch(int(self.epoch) + 1)

    def forward(self, outputs: Any, target: Any, labels: Tensor | None = None) -> LayerwiseLoss:
        seen = self._pass.take(outputs)
        primary = self.primary(outputs, target)
        checks.tensor("primary", primary)
        if primary.ndim != 0:
            raise ValueError(f"primary: expected a 0-dim loss, got {list(primary.shape)}")
        if self.factor == 0:
            return LayerwiseLoss(primary, primary, primary.new_full((len(self.layers),), torch.nan))
        if labels is None:
            if not isinstance(target, Tensor) or target.is_floating_point() or target.is_complex():
                kind = target.dtype if isinstance(target, Tensor) else type(target).__name__
                raise TypeError(f"labels: expected them as third argument, as the target is not a tensor of integers but {kind}")
            labels = target
        taus = self.tau.expand(len(self.layers))
        losses = []
        for name, tau in zip(self.layers, taus.unbind(), strict=True):
            rows = _rows(name, seen[name], labels, self.code_units.get(name))
            losses.append(_mean([snnl(row, labels, tau, **self.options) for row in rows]))  # type: ignore[arg-type]
        per_layer = torch.stack(losses)
        return LayerwiseLoss(primary + self.factor * AGGREGATES[self.aggregate](per_layer), primary, per_layer)

    def remove(self) -> None:
        """Take the hooks off the model. The criterion can't be called after that."""
        self._pass.close()
        _remove(self._handles)

    def __enter__(self) -> "LayerwiseSNNL":
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def _remove_at_the_end(self) -> None:
        weakref.finalize(self, _remove, self._handles).atexit = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pass.listening = bool(self._handles)
        self._remove_at_the_end()

    def extra_repr(self) -> str:
        temperature = "learnable" if self.log_tau is not None else "fixed" if self.schedule is None else "scheduled"
        options = ", ".join(f"{k}={v!r}" for k, v in self.options.items())
        return f"layers={self.layers}, factor={self.factor:g}, aggregate={self.aggregate!r}, tau={temperature}, {options}"


class EntanglementMonitor:
    """The entanglement of a model's layers over the epochs, for a plot.

    Args:
        model, layers: as in :class:`LayerwiseSNNL`. The model stays without hooks between the measurements.
        tau: a temperature > 0: :func:`pairloss.snnl` at it, which is quick. None: :func:`pairloss.entanglement`, at the temperature
            that is best for each layer, which takes 57 times as long and can be compared between layers.
        metric, ignore_index, backend: as there.

    ``history`` is {epoch: (loss, tau)}, each [layers] on the CPU.

    Example:
        >>> import torch, pairloss
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
        >>> monitor = pairloss.nn.EntanglementMonitor(model, ["0", "1"], tau=0.1)
        >>> x, labels = torch.randn(32, 8), torch.arange(32) % 3
        >>> for epoch in range(3):
        ...     measured = monitor.measure(epoch, x, labels)
        >>> {name: len(values) for name, values in monitor.curves().items()}
        {'0': 3, '1': 3}
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str] | None = None,
        *,
        tau: float | None = None,
        metric: str = "cosine",
        ignore_index: int | None = None,
        backend: str | None = None,
    ) -> None:
        self.tau = None if tau is None else checks.positive("tau", tau)
        self.options: dict[str, Any] = {"metric": metric, "ignore_index": ignore_index, "backend": backend}
        checks.options(**self.options)
        if tau is None:
            checks.choice("metric", metric, ("cosine", "sqeuclidean"))
        self.model = _unwrapped(model)
        self.layers = _names(self.model, layers)
        self.history: dict[int, Entanglement] = {}

    def measure(self, epoch: int, inputs: Any, labels: Tensor) -> Entanglement:
        """Run the model on the inputs (a tuple: several arguments), in eval mode and without gradients, and note the result."""
        seen = activations(self.model, self.layers, inputs)
        found = [[self._of(row, labels) for row in _rows(name, seen[name], labels, None)] for name in self.layers]
        parts = [torch.stack([_mean([call[i] for call in calls]) for calls in found]).cpu() for i in (0, 1)]
        self.history[epoch] = Entanglement(*parts)
        return self.history[epoch]

    def _of(self, rows: Tensor, labels: Tensor) -> Entanglement:
        if self.tau is None:
            return entanglement(rows, labels, **self.options)
        loss = snnl(rows, labels, self.tau, **self.options)
        return Entanglement(loss, loss.new_tensor(self.tau))

    def curves(self) -> dict[str, list[float]]:
        """Per layer the losses over the epochs of ``history``."""
        return {name: [float(measured.loss[i]) for measured in self.history.values()] for i, name in enumerate(self.layers)}


@torch.no_grad()
def activations(model: nn.Module, layers: Sequence[str], inputs: Any) -> dict[str, list[Any]]:
    """What each layer gives in a pass in eval mode, one entry per call. The model is as before after it, and has no hooks more."""
    seen = _Pass(tuple(layers))
    handles = seen.attach(model)
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        model(*inputs) if isinstance(inputs, tuple) else model(inputs)
        return seen.take(None)
    finally:
        for module, training in modes:  # not model.train(): a user may have frozen some in eval mode
            module.training = training
        _remove(handles)


class _Pass:
    """What the layers gave in the last complete forward pass of the model; its methods are the hooks.

    A pass begins with a new dict rather than a cleared one: under torch.compile nothing is then asked about the old one.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.listening = True
        self.with_grad = False
        self.running: dict[str, list[Any]] | None = None
        self.complete: dict[str, list[Any]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Activations can't be copied, being results. A copied model whose criterion was not copied would only hoard them.
        return self.__dict__ | {"listening": False, "running": None, "complete": None}

    def attach(self, model: nn.Module) -> list[RemovableHandle]:
        layers = [model.get_submodule(name).register_forward_hook(partial(self.saw, name)) for name in self.names]
        return [model.register_forward_pre_hook(self.begin), *layers, model.register_forward_hook(self.end)]

    def begin(self, module: nn.Module, inputs: Any) -> None:
        self.complete = None
        self.running = {name: [] for name in self.names} if self.listening else None
        self.with_grad = torch.is_grad_enabled()

    def saw(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if self.running is not None:  # else the layer runs by itself, or again, in the backward pass of a checkpointed one
            self.running[name].append(output)

    def end(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.complete, self.running = self.running, None

    def take(self, outputs: Any) -> dict[str, list[Any]]:
        """The pass, which is forgotten with that."""
        seen, self.complete = self.complete, None
        if not self.listening:
            raise RuntimeError("LayerwiseSNNL: its hooks have been removed from the model, or it was copied without the model")
        if seen is None:
            raise RuntimeError(
                "LayerwiseSNNL: no forward pass of the model since the last call; call it once after each model(x), and make it "
                "before a compiled model runs for the first time"
            )
        if isinstance(outputs, Tensor) and outputs.requires_grad and not self.with_grad:
            raise RuntimeError("LayerwiseSNNL: the outputs have gradients, but the model's last forward pass ran without")
        for name, calls in seen.items():
            if not calls:
                raise RuntimeError(f"layer {name!r}: it did not run in the model's last forward pass")
        return seen

    def close(self) -> None:
        self.listening, self.running, self.complete = False, None, None


def _remove(handles: list[RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()


def _unwrapped(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):  # of torch.compile
            model = inner
        else:
            return model


def _names(model: nn.Module, layers: Iterable[str] | None) -> tuple[str, ...]:
    known = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    if layers is None:
        weights = {name: getattr(module, "weight", None) for name, module in model.named_modules() if name}
        names = tuple(name for name, weight in weights.items() if isinstance(weight, Tensor) and weight.ndim >= 2)[:-1]
        if not names:
            raise ValueError(f"layers: none found by themselves; name some of the model's submodules: {', '.join(known) or 'it has none'}")
        return names
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise TypeError(f"layers: expected a sequence of names, got {type(layers).__name__}")
    names = tuple(layers)
    for name in names:
        if name not in known:
            raise ValueError(f"layers: expected names of the model's submodules, {', '.join(known) or 'it has none'}; got {name!r}")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"layers: expected at least one name and none twice, got {list(names)}")
    return names


def _units(code_units: int | Mapping[str, int] | None, layers: tuple[str, ...]) -> dict[str, int]:
    if code_units is None:
        return {}
    units = dict(code_units) if isinstance(code_units, Mapping) else dict.fromkeys(layers, code_units)
    for name, count in units.items():
        if name not in layers:
            raise ValueError(f"code_units: expected names among layers, {', '.join(layers)}, got {name!r}")
        checks.count("code_units", count)
    return units


def _rows(name: str, outputs: list[Any], labels: Tensor, units: int | None) -> list[Tensor]:
    """The outputs of a layer as [N, D]."""
    checks.tensor("labels", labels)
    rows = []
    for output in outputs:
        if not isinstance(output, Tensor):
            raise TypeError(f"layer {name!r}: expected a tensor as output, got {type(output).__name__}; name a submodule that gives one")
        if output.ndim < 2 or labels.ndim == 0 or output.shape[0] != labels.shape[0]:
            raise ValueError(
                f"layer {name!r}: expected output [N, ...] with one row per label, labels {list(labels.shape)}, got {list(output.shape)}"
            )
        flat = output.flatten(1)[:, :units]
        checks.features(f"layer {name!r}", flat)
        rows.append(flat)
    return rows


def _mean(values: list[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(values).mean(0)
