"""The primitive itself: the arguments that the losses of today don't use, gradients through the tiles, which tiles are visited."""

import itertools

import pytest
import torch
from conftest import INTERPRETED, ON_CPU, TILED, TILES, assert_rule, skip_if_unable, tiles

from pairloss import engines, pairs, tiled
from pairloss.ops import row_stats

D = 6


def arguments(n: int, m: int, option: str) -> tuple[dict[str, torch.Tensor | None], dict[str, object]]:
    generator = torch.Generator().manual_seed(n * m)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    two_sets = not option.startswith("self")
    differentiable = {"x": randn(n, D), "y": randn(m, D) if two_sets else None, "row_bias": None, "col_bias": None}
    ids = {"ids_x": torch.randint(0, 3, (n,), generator=generator), "ids_y": torch.randint(0, 3, (m,), generator=generator)}
    if not two_sets:
        ids["ids_y"] = None
    if "no-ids" in option:
        ids = {}
    if "words" in option:
        ids = {name: 1 << torch.randint(0, 9, (len(v), 2), generator=generator) for name, v in ids.items() if v is not None}
    if "bias" in option:
        differentiable["row_bias"] = randn(n)
        differentiable["row_bias"][::5] = -torch.inf
        if two_sets:
            differentiable["col_bias"] = randn(m)
            differentiable["col_bias"][1::7] = -torch.inf
    if "norm" in option:
        differentiable["norm"] = torch.tensor(1.7, dtype=torch.float64)
    others: dict[str, object] = dict(ids)
    if "offset" in option or not two_sets:
        others["self_offset"] = 3 if two_sets else 0
    others["both_sides"] = "both-sides" in option
    others["totals"] = "totals" in option
    if "far" in option:  # statistics hundreds of nats apart within a tile
        differentiable["x"] = differentiable["x"] * torch.logspace(0, 1.2, n, dtype=torch.float64)[:, None]
    if "circle" in option:
        differentiable |= {name: torch.nn.functional.normalize(differentiable[name]) for name in ("x", "y")[: 1 + two_sets]}
        others |= {"score": "circle", "m": 0.25, "gamma": 256.0 if "256" in option else 8.0}
    if "cutoff" in option:  # in the widest gap between products, so that no rounding moves a pair across
        x, y = differentiable["x"], differentiable["y"]
        s = (x @ (y if two_sets else x).T).flatten().sort().values[n:-n]
        gap = s.diff().argmax()
        others["cutoff"] = (s[gap] + s[gap + 1]) / 2
    return differentiable, others


OPTIONS = [
    *("self", "self-no-ids", "self-bias", "self-words", "self-far", "self-far-bias"),
    *("two", "two-no-ids", "two-bias", "two-words", "two-offset", "two-far-bias"),
    *("two-both-sides", "two-both-sides-bias-offset", "two-no-ids-both-sides", "two-far-both-sides-bias"),
    *("self-circle", "self-circle-256", "self-circle-bias", "self-circle-words", "two-circle-256-both-sides-bias", "two-circle-offset"),
    *("self-norm", "self-norm-no-ids", "self-norm-circle", "two-norm", "two-norm-both-sides-bias", "two-norm-offset"),
    *("self-totals", "self-totals-norm-bias", "self-totals-words", "two-totals", "two-totals-words", "two-totals-both-sides-norm"),
    *("self-cutoff", "two-cutoff", "two-cutoff-words", "two-no-ids-cutoff-offset-both-sides", "two-no-ids-cutoff-bias"),
]


def run(differentiable, others, dtype, device, backend):
    leaves = {k: None if v is None else v.to(device, dtype).detach().requires_grad_() for k, v in differentiable.items()}
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in others.items()}
    if "cutoff" in moved:
        moved["cutoff"] = moved["cutoff"].to(dtype)
    outputs = row_stats(**leaves, **moved, backend=backend)
    # exp(stat - its constant) weighs every statistic, and an empty set (-inf) with 0.
    total = sum(
        (torch.where(out == -torch.inf, 0, out) * torch.linspace(-1, 1, out.numel(), device=device, dtype=dtype).view_as(out)).sum()
        for out in outputs
    )
    wanted = {k: v for k, v in leaves.items() if v is not None}
    grads = torch.autograd.grad(total, list(wanted.values()))
    return [out.detach() for out in outputs], dict(zip(wanted, grads, strict=True))


@pytest.mark.engines
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"tile-{tile or 'shipped'}")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("engine", TILED, ids=lambda engine: "-".join(engine))
def test_statistics_and_gradients(engine, option, dtype, tile):
    if "words" in option and engine.name == "triton":
        pytest.skip("triton does not serve multi-hot words")
    skip_if_unable(engine, dtype)
    # Under the interpreter, which takes milliseconds a tile, fewer tiles.
    differentiable, others = arguments(*((14, 11) if INTERPRETED and tile == 4 else (37, 29)), option)
    truth = run(differentiable, others, torch.float64, "cpu", "reference")
    eager = run(differentiable, others, dtype, "cpu", "reference")
    with tiles(tile):
        ours = run(differentiable, others, dtype, engine.device, engine.name)
    for side, a, b, c in zip(("rows", "cols"), ours[0], truth[0], eager[0], strict=True):
        assert a.shape == b.shape
        if b.numel():
            finite = torch.isfinite(b)
            assert torch.equal(a.cpu()[~finite].double(), b[~finite])
            assert_rule(side, a.cpu()[finite], b[finite], c[finite], dtype)
    # The gradient of the norm is a sum that cancels: its terms as testing.Sample.terms has them.
    given = {name: v for name, v in differentiable.items() if v is not None}
    terms = sum((v * given[name]).abs().sum().item() for name, v in truth[1].items() if v.ndim == 2)
    for name in truth[1]:
        of_name = terms / given["norm"].item() if name == "norm" else 0
        assert_rule(f"gradient of {name}", ours[1][name], truth[1][name], eager[1][name], dtype, of_name)


@pytest.mark.parametrize("tile", [4, None], ids=lambda tile: f"tile-{tile or 'shipped'}")
@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("option", [option for option in OPTIONS if "bias" not in option and "circle" not in option])
def test_gradcheck_through_the_tiles(option, backend, tile):
    differentiable, others = arguments(9, 7, option)
    names = [name for name, v in differentiable.items() if v is not None]

    def finite_statistics(*values):
        outputs = row_stats(**dict(zip(names, values, strict=True)), **others, backend=backend)
        return tuple(torch.where(out == -torch.inf, 0, out) for out in outputs if out.numel())

    inputs = [differentiable[name].clamp(-3, 3).requires_grad_() for name in names]
    with tiles(tile):
        assert torch.autograd.gradcheck(finite_statistics, inputs)


def test_every_kind_of_tile_is_visited(monkeypatch):
    """Diagonal, off-diagonal, ragged, without positives, only positives, mixed; each shift: none, one per tile, one per pair."""
    seen = set()
    original_tiles, original_shift = pairs.Pairs.tiles, pairs.shift

    def watched_tiles(self):
        for tile in original_tiles(self):
            rows, cols = tile.i.stop - tile.i.start, tile.j.stop - tile.j.start
            seen.add("mirrored" if tile.mirrored else "not mirrored")
            seen.add("left out" if tile.left_out is not None else "nothing left out")
            seen.add("ragged" if rows < self.tile or cols < self.tile else "whole")
            seen.add({None: "mixed", 0: "only positives", 1: "no positives"}[tile.only])
            yield tile

    def watched_shift(low, high):
        shift = original_shift(low, high)
        seen.add("shift " + ("per pair" if shift is None else "none" if shift == 0 else "per tile"))
        return shift

    monkeypatch.setattr(pairs.Pairs, "tiles", watched_tiles)
    monkeypatch.setattr(pairs, "shift", watched_shift)
    for option, n in itertools.product(["self", "self-far", "two-both-sides"], [37]):
        differentiable, others = arguments(n, 29, option)
        with tiles(4):
            run(differentiable, others, torch.float64, "cpu", "torch")
    assert seen == {
        *("mirrored", "not mirrored", "left out", "nothing left out", "ragged", "whole", "mixed", "only positives", "no positives"),
        *("shift none", "shift per tile", "shift per pair"),
    }


def test_only_wanted_gradients_are_computed(monkeypatch):
    asked = []
    original = tiled.row_stats_bwd

    def watched(*args):
        grads = original(*args)
        asked.append((args[-1], [grad is not None for grad in grads]))
        return grads

    monkeypatch.setattr(tiled, "row_stats_bwd", watched)
    for wanted in itertools.product([False, True], repeat=4):
        if any(wanted):
            differentiable, others = arguments(9, 7, "two-bias")
            leaves = [v.requires_grad_(want) for v, want in zip(differentiable.values(), wanted, strict=True)]
            rows, _ = row_stats(**differentiable, **others, backend="torch")
            torch.where(rows == -torch.inf, 0, rows).sum().backward()
            of_call = [*wanted[:2], False, *wanted[2:]]  # no norm
            assert asked[-1] == (of_call, of_call)
            assert [leaf.grad is not None for leaf in leaves] == list(wanted)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"totals": True}, "totals: expected ids_x, score='linear'"),
        ({"x": torch.zeros(3)}, r"x: expected float32 or float64 of shape \[N, D\]"),
        ({"x": torch.zeros(3, 2, dtype=torch.float16)}, "x: expected float32 or float64"),
        ({"y": torch.zeros(3, 5)}, r"y: expected torch.float32 of shape \[M, 2\], got torch.float32 \[3, 5\]"),
        ({"ids_y": torch.zeros(3, dtype=torch.long)}, "y=None: expected ids_y=None"),
        ({"self_offset": 1}, "y=None: expected"),
        ({"y": torch.zeros(4, 2), "ids_x": torch.zeros(3)}, "ids_x, ids_y: expected both or neither"),
        ({"row_bias": torch.zeros(2)}, r"row_bias: expected one entry per row, got shape \[2\]"),
        ({"row_bias": torch.zeros(3, dtype=torch.float64)}, r"row_bias: expected torch.float32 of shape \[3\], got torch.float64 \[3\]"),
        ({"ids_x": torch.zeros(3, 0, dtype=torch.long)}, r"ids_x: expected shape \[N\] or, multi-hot, \[N, W\] with W >= 1, got \[3, 0\]"),
        ({"score": "angular"}, r"score: expected one of \('linear', 'circle'\), got 'angular'"),
        ({"score": "circle"}, "score='circle': expected ids_x and cutoff=None"),
        ({"col_bias": torch.zeros(3)}, "y=None: expected col_bias=None and both_sides=False"),
        ({"backend": "numpy"}, "backend: expected one of 'reference', 'triton', 'cuda', 'cpu', 'torch' or None, got 'numpy'"),
    ],
)
def test_arguments_that_do_not_fit_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        row_stats(**({"x": torch.zeros(3, 2)} | changed))


def test_a_backend_that_cannot_run_says_why(monkeypatch):
    monkeypatch.setattr(tiled, "why_not", lambda call: "it is Sunday")
    with pytest.raises(RuntimeError, match="backend='torch' can't run here: it is Sunday"):
        row_stats(torch.zeros(3, 2), backend="torch")


def test_the_default_backend_can_be_overridden(monkeypatch):
    monkeypatch.setattr(engines, "DEFAULT_BACKEND", "nonsense")
    with pytest.raises(ValueError, match=r"PAIRLOSS_BACKEND: expected one of .*, got 'nonsense'"):
        row_stats(torch.zeros(3, 2))
