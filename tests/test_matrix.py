"""Every loss x option x engine x dtype x shape x tile against float64, by the one error rule."""

import functools

import pytest
import torch
from conftest import DTYPES, INTERPRETED, RUNNABLE, TILED, Engine, assert_same_loss_and_gradients, skip_if_unable, tiles

from pairloss import pairs, snnl
from pairloss.testing import LOSSES, Sample

pytestmark = pytest.mark.engines

# (N, D, tile). (1, 2): no pairs. (2, 3): one pair. (33, 16): ragged at tiles of 4 and 16, every kind of tile; one tile as shipped.
# (40, 70): whole tiles of 4, rows longer than a tile; label order is on. (70, 5): label order with tiles of 16.
SHAPES = [(1, 2, None), (2, 3, None), (33, 16, 4), (33, 16, 16), (33, 16, None), (40, 70, 4), (70, 5, 16)]
if INTERPRETED:  # takes milliseconds for each step of each tile: as few tiles as still are of every kind
    SHAPES = [(1, 4, None), (18, 5, 4), (67, 16, 16), (70, 20, None)]

# Halves differ from float32 in how rows and weights are rounded, not in how tiles are cut: a shape of each kind of tile, all in test-all.
HALF_SHAPES = SHAPES[2:3] if INTERPRETED else [SHAPES[0], SHAPES[3], SHAPES[5]]


CASES = [(loss, option) for loss, spec in LOSSES.items() for option in spec.options]


def size(loss: str, n: int) -> int:
    """nt_xent compares the 2 n rows of both views: from half as many, the tiles of the shape, and not four times as many."""
    return (n + 1) // 2 if INTERPRETED and loss == "nt_xent" else n


def matrix():
    for loss, option in CASES:
        for dtype in DTYPES:
            # Most options are what happens around the kernels, and they are the same for both halves.
            half = dtype.itemsize == 2
            once = INTERPRETED and dtype == torch.float16 and option != LOSSES[loss].options[0]
            for n, d, tile in SHAPES:
                often = not half or ((n, d, tile) in HALF_SHAPES and not once)
                rows = size(loss, n)
                name = f"{loss}-{option}-{str(dtype).removeprefix('torch.')}-{rows}-{d}-{tile or 'shipped'}"
                yield pytest.param(loss, option, dtype, rows, d, tile, id=name, marks=() if often else pytest.mark.slow)


@functools.cache
def truth_of(loss: str, option: str, n: int, d: int, dtype: torch.dtype):
    """The sample with values that exist in dtype, its float64 truth, and eager PyTorch's answer in dtype."""
    spec = LOSSES[loss]
    sample = spec.sample(n, d, 17 * n + d, option).to(dtype)
    return (
        sample,
        sample.to(torch.float64).run(spec.function, backend="reference"),
        sample.run(spec.function, backend="reference"),
    )


def check(engine: Engine, loss: str, option: str, n: int, d: int, dtype: torch.dtype, tile: int | None, layout: str | None = None) -> None:
    reason = LOSSES[loss].why_not(option, engine.name)
    if reason is not None:
        pytest.skip(reason)
    sample, truth, eager = truth_of(loss, option, n, d, dtype)
    moved = sample.on(engine.device)
    moved = Sample({name: in_layout(v, layout) for name, v in moved.differentiable.items()}, moved.others)
    with tiles(tile):
        ours = moved.run(LOSSES[loss].function, backend=engine.name)
    assert_same_loss_and_gradients(sample, ours, truth, eager, dtype)


def in_layout(tensor: torch.Tensor, layout: str | None) -> torch.Tensor:
    if layout is None or tensor.ndim < 2:
        return tensor
    if layout == "transposed":
        return tensor.t().contiguous().t()
    if layout == "sliced":
        wide = torch.full((2 * tensor.shape[0], tensor.shape[1] + 3), torch.nan, dtype=tensor.dtype, device=tensor.device)
        wide[::2, 1:-2] = tensor
        return wide[::2, 1:-2]
    raise AssertionError(layout)


@pytest.mark.parametrize(("loss", "option", "dtype", "n", "d", "tile"), list(matrix()))
@pytest.mark.parametrize("engine", TILED, ids=lambda engine: "-".join(engine))
def test_loss_and_gradients(engine, dtype, n, d, tile, loss, option):
    skip_if_unable(engine, dtype)
    check(engine, loss, option, n, d, dtype, tile)


@pytest.mark.parametrize("layout", ["transposed", "sliced"])
@pytest.mark.parametrize("engine", TILED, ids=lambda engine: "-".join(engine))
@pytest.mark.parametrize("option", ["cosine", "sqeuclidean-ref"])
def test_layouts(engine, layout, option):
    check(engine, "snnl", option, 33, 16, torch.float32, 16, layout)


@pytest.mark.parametrize("d", [1, 15, 127, 300, 1025, 2048])
@pytest.mark.parametrize("engine", TILED, ids=lambda engine: "-".join(engine))
def test_widths(engine, d):
    check(engine, "snnl", "dot", 20, d, torch.float32, None)


@pytest.mark.parametrize("tau", [0.001, 0.005, 0.02, 0.1, 1.0, 100.0])
@pytest.mark.parametrize("metric", ["cosine", "dot", "sqeuclidean"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("engine", TILED, ids=lambda engine: "-".join(engine))
@pytest.mark.parametrize("kind", ["number", "tensor"])
def test_any_temperature(engine, dtype, metric, tau, kind):
    """Finite and right where logits reach thousands, and where they vanish."""
    skip_if_unable(engine, dtype)
    spec = LOSSES["snnl"]
    sample = spec.sample(37, 8, 5, metric).to(dtype)
    tau_ = torch.tensor(tau, dtype=dtype)
    differentiable = {"features": sample.differentiable["features"]} | ({"tau": tau_} if kind == "tensor" else {})
    sample = Sample(differentiable, sample.others | ({"tau": tau_.item()} if kind == "number" else {}))
    truth = sample.to(torch.float64).run(spec.function, backend="reference")
    eager = sample.run(spec.function, backend="reference")
    with tiles(16):
        ours = sample.on(engine.device).run(spec.function, backend=engine.name)
    assert torch.isfinite(ours[0]).all()
    assert all(torch.isfinite(grad).all() for grad in ours[1].values())
    assert_same_loss_and_gradients(sample, ours, truth, eager, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("engine", RUNNABLE, ids=lambda engine: "-".join(engine))
def test_same_input_same_bits(engine, dtype):
    skip_if_unable(engine, dtype)
    sample = LOSSES["snnl"].sample(70, 16, 3, "sqeuclidean").to(dtype).on(engine.device)
    with tiles(16):
        (loss, grads), (again, again_grads) = (sample.run(LOSSES["snnl"].function, backend=engine.name) for _ in range(2))
    assert torch.equal(loss, again)
    assert all(torch.equal(grads[name], again_grads[name]) for name in grads)


@pytest.mark.skipif(INTERPRETED, reason="the tiled engine is tested without the interpreter")
@pytest.mark.parametrize(("dtype", "tile"), [(torch.float64, 4), (torch.float32, None)], ids=["float64-tile-4", "float32-tile-shipped"])
@pytest.mark.parametrize(("loss", "option"), CASES)
def test_the_tiled_engine_without_looking_at_values(monkeypatch, loss, option, dtype, tile):
    """As on a device whose values it must not wait for."""
    monkeypatch.setattr(pairs, "on_host", lambda call: False)
    check(Engine("torch", "cpu"), loss, option, 33, 16, dtype, tile)


@pytest.mark.parametrize("scale", [1e3, 1e5, 1e8, 1e12])
@pytest.mark.parametrize(("metric", "tau"), [("sqeuclidean", 1.0), ("sqeuclidean", 1e-8), ("dot", 0.01), ("dot", 1.0)])
@pytest.mark.parametrize("engine", TILED, ids=lambda engine: "-".join(engine))
def test_logits_of_any_size(engine, metric, tau, scale):
    """Unscaled pixels at a small temperature: |z| far above 2^24, where float32 has no integers left."""
    x = torch.randn(24, 16, generator=torch.Generator().manual_seed(0)) * scale
    sample = Sample({"features": x}, {"labels": torch.arange(24) % 4, "tau": tau, "metric": metric})
    truth = sample.to(torch.float64).run(snnl, backend="reference")
    eager = sample.run(snnl, backend="reference")
    with tiles(16):
        ours = sample.on(engine.device).run(snnl, backend=engine.name)
    assert_same_loss_and_gradients(sample, ours, truth, eager, torch.float32)


def test_unwritten_memory_is_nan():
    assert torch.empty(5).isnan().all()
    assert torch.ones(3).new_empty(2).isnan().all()
