"""Losses of a batch that is larger than a device: over the ranks of torch.distributed, and in chunks of the encoder's activations."""

import functools
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

from . import checks
from .ranks import STRATEGIES, Ranks, spread


def distributed(loss: Callable[..., Tensor], group: Any = None, strategy: str = "gather") -> Callable[..., Tensor]:
    r"""The loss of the global batch, whose rows are spread over the ranks of a process group: same call, same value on every rank.

    ``pairloss.distributed(pairloss.snnl)(features, labels, tau)``, called on every rank with its own rows, is
    ``pairloss.snnl`` of the rows of all ranks together. With DistributedDataParallel, FSDP, or whatever averages gradients over
    ranks, parameters get exactly the gradient that one process with the whole batch would compute: the gradient of a rank's rows is
    the loss's times the number of ranks, that of a scalar (temperature, scale, bias) is the loss's itself, on every rank.

    Args:
        loss: a loss of this library, or a module of pairloss.nn; any callable that calls one.
        group: the process group; None: the default one. Modules take the same as their option ``group=``.
        strategy: "gather": each rank holds the rows of all (in the forward pass and in the backward pass, not between), one exchange
            for each. "ring": rows go round, the next block under way while one is computed with; O(N_local D) memory, and the
            exchanges hide behind the computation. The same values up to rounding.

    Returns:
        A callable with the loss's signature. Tensors with rows (features, labels, ids, weights, biases, ref_features, negative_keys)
        are this rank's; their numbers may differ between ranks and may be 0. Rank by rank they make up the global batch, so that labels
        and ids mean the same everywhere, and an anchor's positives may be another rank's. What has no rows (temperatures, options,
        class_weight) must be the same on all ranks. The mean and the sum are the global batch's; ``reduction="none"`` gives this rank's
        anchors, and their gradient is that of the sum of what all ranks make of theirs.

    Raises:
        ValueError: the calls differ between ranks (loss, options, dtypes, columns, which arguments are there, which need gradients), or
            one of them raised before the first exchange: on all ranks, with what each of them called. RuntimeError: a rank is gone,
            on the others, at the latest after the group's timeout.
        backend="reference" is refused. torch.compile, torch.export and torch.func don't see through it.

    Every rank must call it, and differentiate it, in the same order. Each exchange of rows begins with one of their numbers, which every
    rank waits for; on GPUs let the group have a CPU backend too (``init_process_group()`` without one makes both) and no GPU waits.
    Second derivatives are refused. Deterministic for one number of ranks.

    Example:
        >>> import torch, pairloss
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> loss = pairloss.distributed(pairloss.snnl)
        >>> loss(torch.eye(3), torch.tensor([0, 0, 1]), tau=0.5)
        tensor(0.6931)
        >>> dist.destroy_process_group()
    """
    if not callable(loss):
        raise TypeError(f"loss: expected a callable, got {type(loss).__name__}")
    checks.choice("strategy", strategy, STRATEGIES)

    @functools.wraps(loss, updated=())
    def of_global_batch(*args: Any, **kwargs: Any) -> Tensor:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("pairloss.distributed: expected torch.distributed.init_process_group() before the call")
        ranks = Ranks(dist.group.WORLD if group is None else group, strategy, _described(loss, strategy, args, kwargs))
        try:
            with spread(ranks):
                return loss(*args, **kwargs)
        except Exception as error:
            if not ranks.agreed:  # the others wait for this rank
                ranks.signature = f"{type(error).__name__}: {error}"
                with suppress(ValueError, RuntimeError):
                    ranks.agree()
            raise

    return of_global_batch


def _described(loss: Any, strategy: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """The call as far as all ranks must agree on it."""
    name = getattr(loss, "__name__", None) or repr(loss)
    parts = [_described_value(v) for v in args] + [f"{key}={_described_value(v)}" for key, v in sorted(kwargs.items())]
    return f"{name}({', '.join(parts)}) by {strategy}"


def _described_value(value: Any) -> str:
    if isinstance(value, Mapping):
        value = [*value.items()]
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_described_value, value))})"
    if not isinstance(value, Tensor):
        return repr(value)
    shape = ", ".join(["rows", *map(str, value.shape[1:])]) if value.ndim else ""
    needs = " with gradient" if value.requires_grad and torch.is_grad_enabled() else ""
    return f"{str(value.dtype).removeprefix('torch.')}[{shape}]{needs}"


def grad_cache(encoder: Callable[..., Any], loss: Callable[..., Tensor], chunk: int) -> Callable[..., Tensor]:
    """A training step whose batch is larger than the encoder's activations allow: the gradients of the plain step, in chunks.

    Embeddings are computed in chunks without keeping activations; the loss of all of them is differentiated down to the embeddings; then
    each chunk is encoded again, with the same random numbers, and takes its gradient to the parameters. Costs one more forward pass.

        step = pairloss.grad_cache(model, pairloss.distributed(pairloss.clip), chunk=64)
        value = step(images, texts)  # instead of loss = clip(*model(images, texts)); loss.backward()
        optimizer.step()

    Args:
        encoder: called with a chunk of each input, gives a tensor [n, D] or a tuple of them. Outputs without rows (0-dim: a logit
            scale) are taken from the last chunk. If it has ``no_sync`` (DistributedDataParallel), gradients are exchanged with the
            last chunk only.
        loss: called with the encoder's outputs and the keywords of the call; any loss here, under :func:`distributed` too.
        chunk: rows to encode at a time, >= 1.

    Returns:
        ``step(*inputs, backward=Tensor.backward, **keywords)``: inputs are tensors with the batch along the first dimension, keywords
        are the loss's (labels, tau), ``backward`` is called with the loss (for a GradScaler:
        ``lambda loss: scaler.scale(loss).backward()``). Adds gradients to the parameters and returns the loss, detached. Layers that
        look at the batch, such as BatchNorm, see chunks, and see them twice.

    Source: Gao, Zhang, Han and Callan 2021 (arXiv 2101.06983).
    """
    checks.count("chunk", chunk)

    def step(*inputs: Tensor, backward: Callable[[Tensor], Any] = Tensor.backward, **keywords: Any) -> Tensor:
        if not inputs or any(not isinstance(v, Tensor) or v.ndim == 0 or v.shape[0] != inputs[0].shape[0] for v in inputs):
            raise ValueError("inputs: expected one or more tensors with the batch along the first dimension")
        chunks = list(zip(*(v.split(chunk) for v in inputs), strict=True))
        states, outputs = [], []
        with torch.no_grad():
            for part in chunks:
                states.append(_random_state(part))
                outputs.append(_as_tuple(encoder(*part)))
        embeddings = [torch.cat(list(of_chunks)) if of_chunks[0].ndim else of_chunks[-1] for of_chunks in zip(*outputs, strict=True)]
        embeddings = [v.detach().requires_grad_(v.is_floating_point()) for v in embeddings]
        value = loss(*embeddings, **keywords)
        backward(value)

        grads = [v.grad for v in embeddings]
        by_chunk = [[None] * len(chunks) if g is None else _per_chunk(g, chunk, len(chunks)) for g in grads]
        for i, (part, state) in enumerate(zip(chunks, states, strict=True)):
            last = i + 1 == len(chunks)
            quiet = nullcontext() if last or not hasattr(encoder, "no_sync") else encoder.no_sync()
            with quiet, torch.random.fork_rng(devices=state[1], device_type=part[0].device.type if state[1] else "cuda"):
                _restore(state)
                again = _as_tuple(encoder(*part))
                pairs = [(v, g[i]) for v, g in zip(again, by_chunk, strict=True) if g[i] is not None and v.requires_grad]
                torch.autograd.backward([v for v, _ in pairs], [g for _, g in pairs])
        return value.detach()

    return step


def _as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _per_chunk(grad: Tensor, chunk: int, chunks: int) -> list[Tensor | None]:
    return list(grad.split(chunk)) if grad.ndim else [None] * (chunks - 1) + [grad]


def _random_state(inputs: tuple[Tensor, ...]) -> tuple[Tensor, list[int], list[Tensor]]:
    devices, states = get_device_states(*inputs)
    return torch.get_rng_state(), devices, states


def _restore(state: tuple[Tensor, list[int], list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    set_device_states(*state[1:])
