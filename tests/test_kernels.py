"""What only engines with kernels have: their scalar functions, the slab of weights for wide rows, the tiles they don't visit."""

import importlib
import importlib.util
from unittest import mock

import pytest
import torch
from conftest import DTYPES, INTERPRETED, TILED, Engine, assert_rule, skip_if_unable, tiles, why_not
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from pairloss import autograd, engines, operands, order
from pairloss.engines import Call
from pairloss.ops import pair_sum, row_stats

NOT_HERE = pytest.mark.skip(reason=f"triton: {why_not(Engine('triton', 'cpu'))}")
NOWHERE = [pytest.param(Engine("triton", "nowhere"), marks=NOT_HERE)]
KERNELS = [engine for engine in TILED if engine.name in ("triton", "cuda")] or NOWHERE
TRITON = [engine for engine in KERNELS if engine in TILED and engine.name == "triton"] or NOWHERE
WIDE = 300  # columns: more than the kernels keep a gradient of in registers
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.mark.engines
@pytest.mark.parametrize("over", ["positives", "negatives"])
@pytest.mark.parametrize("engine", TILED, ids=lambda engine: "-".join(engine))
def test_softplus_keeps_its_digits(engine, over):
    """A sum of one term each: log(1 + e^z) with 1 + e^z rounded would be 0 from z = -17 on."""
    z = torch.linspace(-80, 80, 161)
    # Tiles of one label: all are negatives. One candidate: every pair is a positive.
    ids = {"ids_x": torch.zeros(161, dtype=torch.long), "ids_y": torch.full((1,), 0 if over == "positives" else 1)}
    moved = {name: v.to(engine.device) for name, v in ids.items()}
    x = z[:, None].to(engine.device).requires_grad_()
    sums = pair_sum(x, torch.ones(1, 1, device=engine.device), **moved, over=over, backend=engine.name)
    (grad,) = torch.autograd.grad(sums.sum(), x)
    sign = -1 if over == "positives" else 1
    truth = torch.nn.functional.softplus(sign * z.double(), threshold=1e3)
    slope = sign * torch.sigmoid(sign * z.double())
    # An exponential of z is off by the rounding of z itself, 80 * 2^-24.
    assert ((sums.detach().cpu() - truth).abs() <= 1e-5 * truth).all()
    assert ((grad[:, 0].cpu() - slope).abs() <= 1e-5 * slope.abs()).all()


@pytest.mark.engines
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("primitive", ["circle", "positives", "negatives"])
@pytest.mark.parametrize("engine", TILED, ids=lambda engine: "-".join(engine))
def test_wide_rows(engine, primitive, dtype):
    """Tiles without pairs that count among them, and a circle whose slopes reach 500."""
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(40, WIDE, generator=generator, dtype=torch.float64)).to(dtype).double()
    ids = torch.arange(40) // 7

    def run(backend: str, device: str, to: torch.dtype, product_dtype: torch.dtype):
        leaf = x.to(device, to).requires_grad_()
        options = {"ids_x": ids.to(device), "self_offset": 0, "product_dtype": product_dtype, "backend": backend}
        if primitive == "circle":
            out = row_stats(leaf, **options, score="circle", m=0.25, gamma=256.0)[0]
            out = torch.where(out == -torch.inf, 0, out)
        else:
            out = pair_sum(leaf, **options, over=primitive)
        weights = torch.linspace(0.5, 1, out.numel(), dtype=to, device=device).view_as(out)
        return out.detach(), torch.autograd.grad((out * weights).sum(), leaf)[0]

    truth = run("reference", "cpu", torch.float64, torch.float64)
    eager = run("reference", "cpu", torch.float32, dtype)
    with tiles(16):
        ours = run(engine.name, engine.device, torch.float32, dtype)
    for name, *values in zip(("values", "gradient"), ours, truth, eager, strict=True):
        assert_rule(name, *values, dtype)


@pytest.mark.engines
@pytest.mark.parametrize("wanted", [("x", "y", "row_bias", "col_bias"), ("y", "col_bias"), ("x",), ("row_bias",)], ids=" ".join)
@pytest.mark.parametrize("primitive", ["row_stats", "softplus", "linear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("engine", TILED, ids=lambda engine: "-".join(engine))
def test_wide_rows_of_two_sets(engine, dtype, primitive, wanted, monkeypatch):
    """The gradients of both sides or of one, from more than one slab of weights, and the sums that come with them."""
    launched = []
    if engine.name == "triton":
        from pairloss.kernels import launch

        _launch = launch._launch
        monkeypatch.setattr(launch, "_launch", lambda kernel, *how: (launched.append(kernel.__name__), _launch(kernel, *how)))
        two_tiles = 2 * 16 * 32 * dtype.itemsize  # of rows: 40 are two and a half
        monkeypatch.setattr(launch, "SLAB_BYTES", {False: two_tiles, True: two_tiles})
    generator = torch.Generator().manual_seed(0)
    sizes = {"x": (40, WIDE), "y": (29, WIDE), "row_bias": (40,), "col_bias": (29,)}
    given = {name: torch.randn(size, generator=generator, dtype=torch.float64) for name, size in sizes.items()}
    given |= {name: torch.nn.functional.normalize(given[name]).to(dtype).double() for name in ("x", "y")}
    given |= {name: given[name].float().double() for name in ("row_bias", "col_bias")}
    ids = {"ids_x": torch.arange(40) // 7, "ids_y": torch.arange(29) // 7}

    def run(backend: str, device: str, to: torch.dtype, product_dtype: torch.dtype):
        leaves = {name: v.to(device, to).requires_grad_(name in wanted) for name, v in given.items()}
        options = {"self_offset": -3, "product_dtype": product_dtype, "backend": backend} | {name: v.to(device) for name, v in ids.items()}
        if primitive == "row_stats":
            rows, cols = row_stats(**leaves, **options, both_sides=True)
            out = torch.cat([rows, cols], 1)
            total = (torch.where(out == -torch.inf, 0, out) * torch.linspace(0.5, 1, out.shape[1], dtype=to, device=device)).sum()
        else:
            weights = torch.linspace(0.5, 1, 40, dtype=to, device=device)
            total = pair_sum(**leaves, **options, over="negatives", term=primitive, weights=weights)
        return total.detach(), *torch.autograd.grad(total, [leaves[name] for name in wanted])

    truth = run("reference", "cpu", torch.float64, torch.float64)
    eager = run("reference", "cpu", torch.float32, dtype)
    with tiles(16):
        ours = run(engine.name, engine.device, torch.float32, dtype)
    if engine.name == "triton":  # one pass for both sides, and for the sums
        assert launched.count("weights_kernel") == 2
        assert "pair_sum_fwd_kernel" not in launched
    for name, *values in zip(("total", *wanted), ours, truth, eager, strict=True):
        assert_rule(name, *values, dtype)


def far_apart() -> dict[str, tuple[dict[str, torch.Tensor], dict[str, object]]]:
    """Tensors and options of row_stats: rows, columns and sets of a tile whose sums lie hundreds of powers of e from each other."""
    n, m, d = 75, 90, 8
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.nn.functional.normalize(torch.randn(size, d, generator=generator, dtype=torch.float64)) for size in (n, m))
    length = torch.tensor([1e-3, 1.0, 16.0, 14.0], dtype=torch.float64).repeat_interleave(5).repeat(4)[:n, None]
    steep = x.abs() * length
    steep[40:] *= 0.1  # and a long way back down
    rows, cols = torch.linspace(-150, 250, n, dtype=torch.float64), 400 - 15 * (torch.arange(m, dtype=torch.float64) - 40).abs()
    wild = 100 * torch.sin(torch.arange(m, dtype=torch.float64))
    rows[5:25], rows[33:36], wild[::7] = 40, -torch.inf, -torch.inf  # those don't count
    kinds = torch.eye(2, dtype=torch.float64)[torch.arange(n) % 2]
    steps = torch.stack([41.0 * (torch.arange(m) // 16), torch.zeros(m)], 1).double()
    ids = torch.arange(96) // 16
    own_axis = 14 * torch.eye(6, dtype=torch.float64)[ids]
    both, none = {"self_offset": None, "both_sides": True}, {"self_offset": None}
    return {
        "steep norms": ({"x": steep}, {"ids_x": torch.arange(n) % 3}),
        "steep norms in label order": ({"x": steep}, {"ids_x": torch.arange(n) // 25}),
        "sets": ({"x": own_axis, "y": own_axis}, both | {"ids_x": ids, "ids_y": ids}),
        "anchors": ({"x": x, "y": y, "row_bias": rows}, both),
        "candidates": ({"x": x, "y": y, "col_bias": cols}, both),
        "anchors and candidates": ({"x": x, "y": y, "row_bias": rows, "col_bias": wild}, both),
        "anchors and candidates, one side": ({"x": x, "y": y, "row_bias": rows, "col_bias": wild}, none),
        "two kinds of anchors": ({"x": kinds, "y": steps, "row_bias": -41 * kinds[:, 1]}, both),
        "enormous": ({"x": x, "y": y, "row_bias": torch.full((n,), 1e10), "col_bias": torch.zeros(m)}, both),
        "enormous, one anchor": ({"x": 6e4 * x[:1], "y": 6e4 * (x[:1] + 1e-9 * y[:24])}, none),
        "beyond a cutoff": ({"x": 14 * x, "y": 14 * y}, none | {"cutoff": torch.tensor(60.0)}),
    }


@pytest.mark.engines
@pytest.mark.parametrize("form", far_apart())
@pytest.mark.parametrize("engine", TILED, ids=lambda engine: "-".join(engine))
def test_logits_far_apart(engine, form):
    given, options = far_apart()[form]
    given = {name: v.float().double() for name, v in given.items()}

    def run(backend: str, device: str, to: torch.dtype):
        leaves = {name: v.to(device, to).requires_grad_() for name, v in given.items()}
        moved = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in options.items()}
        out = torch.cat(row_stats(**leaves, **moved, product_dtype=to, backend=backend), 1)
        weights = torch.linspace(0.5, 1, out.numel(), dtype=to, device=device).view_as(out)
        total = (torch.where(out == -torch.inf, 0, out) * weights).sum()
        return out.detach(), *torch.autograd.grad(total, list(leaves.values()))

    truth, eager = (run("reference", "cpu", dtype) for dtype in (torch.float64, torch.float32))
    with tiles(16):
        ours = run(engine.name, engine.device, torch.float32)
    assert torch.equal(ours[0].cpu() == -torch.inf, truth[0] == -torch.inf)
    finite = truth[0].isfinite()
    ours, truth, eager = ((out.cpu()[finite], *grads) for out, *grads in (ours, truth, eager))
    for name, *values in zip(("values", *given), ours, truth, eager, strict=True):
        assert_rule(name, *values, torch.float32)


@pytest.mark.engines
@pytest.mark.parametrize("ends", [(-300, 300), (250, 290), (0, 40)], ids=str)
@pytest.mark.parametrize("engine", KERNELS, ids=lambda engine: "-".join(engine))
def test_sums_are_more_exact_than_their_logarithms(engine, ends):
    """s e^m of one pair each: its exponential, to digits that a rounded logarithm hasn't got. Of anchors with one shift, too."""
    z = torch.linspace(*ends, 97)
    pairs = (z[:, None].to(engine.device), torch.ones(1, 1, device=engine.device), None, None, None, None, None, None)
    _, _, (s, m), _ = autograd._row_stats(*pairs, torch.float32, None, "linear", 0.0, 1.0, False, torch.inf, False, engine.name)
    torch.testing.assert_close((s.double().log() + m).cpu()[0], z.double(), rtol=0, atol=3e-6)


@pytest.mark.engines
@pytest.mark.parametrize(("n", "m"), [(0, 3), (3, 0), (0, 0)])
@pytest.mark.parametrize("engine", TILED, ids=lambda engine: "-".join(engine))
def test_nothing_to_compare(engine, n, m):
    x, y = (torch.ones(size, 4, device=engine.device).requires_grad_() for size in (n, m))
    ids = {"ids_x": torch.zeros(n, dtype=torch.long, device=engine.device), "ids_y": torch.zeros(m, dtype=torch.long, device=engine.device)}
    rows, cols = row_stats(x, y, **ids, score="circle", both_sides=True, backend=engine.name)
    sums = pair_sum(x, y, **ids, over="negatives", backend=engine.name)
    totals = row_stats(x, y, **ids, totals=True, backend=engine.name)[0][2:]
    assert torch.equal(totals, torch.zeros_like(totals))
    assert rows.shape == (2, n)
    assert cols.shape == (2, m)
    assert (torch.cat([rows, cols], 1) == -torch.inf).all()
    assert torch.equal(sums, torch.zeros_like(sums))
    total = sums.sum() + totals[0].sum() + torch.where(rows == -torch.inf, 0, rows).sum() + torch.where(cols == -torch.inf, 0, cols).sum()
    for leaf, grad in zip((x, y), torch.autograd.grad(total, (x, y)), strict=True):
        assert torch.equal(grad, torch.zeros_like(leaf))


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="host code, tested without the interpreter")
@pytest.mark.parametrize("over", [0, 1], ids=["positives", "negatives"])
@pytest.mark.parametrize("order", ["sorted", "nearly sorted", "random", "one label", "singletons"])
def test_visited_tiles(order, over):
    """All tiles with pairs of the set, and in label order none that its ranges of labels rule out."""
    generator = torch.Generator().manual_seed(0)
    for n, m in ((37, 61), (64, 64), (5, 90)):
        ids_x, ids_y = (torch.randint(0, 6, (size,), generator=generator, dtype=torch.int32) for size in (n, m))
        if order == "one label":
            ids_x, ids_y = torch.zeros_like(ids_x), torch.zeros_like(ids_y)
        elif order == "singletons":
            ids_x, ids_y = torch.arange(n, dtype=torch.int32), torch.arange(m, dtype=torch.int32)
        elif "sorted" in order:
            ids_x, ids_y = ids_x.sort().values, ids_y.sort().values
        if order == "nearly sorted":
            ids_y[:: m // 3] = 3
        ranges = (torch.stack([torch.stack(part.aminmax()) for part in ids.split(size)], 1) for ids, size in ((ids_x, 8), (ids_y, 4)))
        for row, (begin, length, count) in zip(ids_x.split(8), operands.visits(over, *ranges).T.tolist(), strict=True):
            visited = {number + (length if number >= begin else 0) for number in range(count)}
            same = {j: row[:, None] == part for j, part in enumerate(ids_y.split(4))}
            assert visited <= set(same)
            assert visited >= {j for j, part in same.items() if (part if over == 0 else ~part).any()}
            if order in ("sorted", "one label", "singletons"):
                ruled_out = {
                    j
                    for j, part in enumerate(ids_y.split(4))
                    if (part.max() < row.min() or part.min() > row.max() if over == 0 else same[j].all())
                }
                assert not visited & ruled_out


@pytest.mark.engines
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("product_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("engine", KERNELS, ids="-".join)
def test_rows(engine, dtype, product_dtype, ordered):
    """What order.py computes in PyTorch, of any rows for any products; rows that count as zero, and one that is too long."""
    skip_if_unable(engine, dtype)
    if dtype == torch.float64:
        product_dtype = dtype
    here, device = engines.load(engine.name), engine.device
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(37, 70, generator=generator).to(device, dtype)
    rows[3], rows[4] = 0, 1e-13
    norm = torch.tensor(2.5, dtype=engines.statistics_dtype(rows), device=device)
    places = torch.randperm(37, generator=generator).to(device) if ordered else None
    grad = torch.randn(37, 70, generator=generator).to(norm) + (rows if places is None else rows[places])  # also along the rows
    ours = here.scaled_rows_fwd(rows, norm, places, product_dtype), *here.scaled_rows_bwd(rows, norm, places, grad)
    forward = order.scaled_rows_fwd(rows.double(), norm.double(), places, torch.float64)
    truth = forward, *order.scaled_rows_bwd(rows.double(), norm.double(), places, grad.double())
    for one, other, to in zip(ours, truth, (product_dtype, dtype, norm.dtype), strict=True):
        assert one.dtype == to
        torch.testing.assert_close(one.double(), other, rtol=torch.finfo(to).eps, atol=4 * torch.finfo(norm.dtype).eps)
    rows[5, 0] = torch.inf
    given = torch.arange(37, device=device) if places is None else places
    assert torch.equal(here.scaled_rows_fwd(rows, norm, places, product_dtype).isnan().all(1), given == 5)
    for bad in (-1.0, torch.inf):
        assert here.scaled_rows_fwd(rows, torch.full_like(norm, bad), places, product_dtype)[given < 3].isnan().all()


def launches_of(engine: Engine):
    """The module that makes an engine's launches."""
    return importlib.import_module({"triton": "pairloss.kernels.launch", "cuda": "pairloss.cuda"}[engine.name])


@pytest.mark.engines
@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("engine", KERNELS, ids=lambda engine: "-".join(engine))
def test_totals_of_groups(engine, bounded):
    """Sums s e^m of 3 groups, some empty, far apart, or so large that float32 can't hold their logarithm to a quarter."""
    sums = operands.Sums(torch.zeros(0, device=engine.device), 3, 2, 700, bounded)
    generator = torch.Generator().manual_seed(0)
    sums.s.copy_(torch.rand(3, 2, 700, generator=generator) + 0.5)
    if not bounded:
        sums.m.copy_(100 * torch.randn(3, 2, 700, generator=generator))
        sums.m[:, 0, :50] += 3e7
    for groups, sets, rows in ((slice(None), 1, slice(None, None, 3)), (1, slice(None), slice(None, None, 5))):
        sums.s[groups, sets, rows] = 0
        if not bounded:
            sums.m[groups, sets, rows] = operands.LOWEST
    truth = torch.logsumexp(sums.s.double().log() + (0 if bounded else sums.m.double()), 0)
    (s, m), logs = launches_of(engine)._total(sums)
    torch.testing.assert_close(logs.double(), truth, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(s.double().log() + m, truth, rtol=1e-8, atol=1e-6)
    assert torch.equal((s == 0) & (m == 0), truth == -torch.inf)


@pytest.mark.engines
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [1, 70, 3000])
@pytest.mark.parametrize("engine", KERNELS, ids=lambda engine: "-".join(engine))
def test_scale_of_weights(engine, n, dtype):
    """A power of two that takes the largest finite weight to about 2^13, and comes off again exactly; of both sides together."""
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(n, 4, dtype=dtype, device=engine.device)
    sums, grads = torch.rand(2, 2, n, generator=generator) + 0.5, torch.randn(2, n, generator=generator)
    sums[0, 0, 1::2] = 0
    grads[-1, -1] *= 100
    expected = torch.where(sums[0] == 0, 0, grads / sums[0])
    for factor in (1e-25, 1.0, 1e25):
        sides = [(sums.to(engine.device), (grads * size).to(engine.device)) for size in (factor, 8 * factor)]
        sides[0][1][1, n // 2] = torch.inf
        weights, unscale = launches_of(engine)._scaled_weights(Call(x, x, None, None, None, None, None, None, dtype), sides)
        assert torch.log2(unscale).frac() == 0
        assert 2**12 <= max(g[g.isfinite()].abs().max().item() for g, _ in weights) <= 2**14
        for (g, m), size in zip(weights, (factor, 8 * factor), strict=True):
            finite = g.isfinite().cpu()
            torch.testing.assert_close((g * unscale).cpu()[finite], (expected * size)[finite], rtol=1e-6, atol=0)
            assert torch.equal(m.cpu(), sums[1])


@needs_triton
def test_kernels_over_rows_get_what_is_on_their_device():
    """Also of a temperature on the CPU, which serves rows on any device."""
    from pairloss.kernels import launch

    rows, order = torch.empty(9, 4, device="meta"), torch.empty(9, dtype=torch.int64, device="meta")
    with mock.patch.object(launch, "_launch") as launched:
        launch.scaled_rows_fwd(rows, torch.tensor(0.5), order, torch.float32)
        launch.scaled_rows_bwd(rows, torch.tensor(0.5), order, torch.empty_like(rows))
    assert launched.call_count == 2
    for call in launched.call_args_list:
        pointers = {name: v for name, v in call.args[3].items() if isinstance(v, torch.Tensor)}
        assert {"p_x", "p_norm", "p_order"} <= set(pointers)
        assert {v.device.type for v in pointers.values()} == {"meta"}


class Operations(TorchDispatchMode):
    """Counts those that would be launches: not views, nor torch.empty."""

    NONE = ("empty", "empty_like", "new_empty", "view", "expand", "slice", "select", "squeeze", "unsqueeze", "alias", "detach", "t")
    NONE += ("split", "split_with_sizes", "unbind")

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func.overloadpacket.__name__ not in self.NONE
        return func(*args, **(kwargs or {}))


def count_operations(engine: Engine, form: str) -> int:
    """Of PyTorch, around the kernels, in a step of snnl, in label order or not, or of clip."""
    x, ids = torch.randn(64, 128, device=engine.device).bfloat16(), torch.arange(64, device=engine.device) % 10
    two = form == "clip"
    y, others, left_out = (x + 1, ids + 0, None) if two else (None, None, 0)
    pairs = (x, y, torch.tensor(3.0, device=engine.device), ids, others, left_out, None, None)
    how = (torch.bfloat16, None, "linear", 0.0, 1.0, two, torch.inf if two else 10.0, False, engine.name)
    with tiles(16 if "order" in form else 64), Operations() as seen:
        rows, cols, row_sums, col_sums = autograd._row_stats(*pairs, *how)  # the mode would see no further than the op
        autograd._row_stats_backward(*pairs, *how, row_sums, rows, col_sums, cols, [True, two, False, False, False])
    return seen.number


@pytest.mark.engines
@pytest.mark.parametrize(("form", "operations", "kernels"), [("snnl", 5, 11), ("snnl in label order", 13, 11), ("clip", 9, 21)])
@pytest.mark.parametrize("engine", TRITON, ids="-".join)
def test_launches_of_a_step(engine, form, operations, kernels):
    """A small batch on a GPU waits for the host: no more operations around the kernels than bench/notes.md has."""
    from pairloss.kernels import launch

    def written(kernel, grid, tile, arguments):
        outputs = ["p_rows", "p_rows_s", "p_cols_s", "p_sums", "p_logs"]
        outputs += ["p_largest", "p_weights", "p_unscale", "p_large", "p_small", "p_ranges", "p_centred", "p_dx", "p_along"]
        with _disable_current_modes():
            for tensor in (arguments.get(name) for name in outputs):
                if tensor is not None:
                    tensor.fill_(1)

    with mock.patch.object(launch, "_launch", side_effect=written) as launched:
        assert count_operations(engine, form) <= operations
    assert launched.call_count <= kernels


def other_tiles():
    if importlib.util.find_spec("triton") is None:
        return []
    from pairloss.kernels import tiles as table

    tables = {"FORWARD": table.FORWARD, "BACKWARD": table.BACKWARD, "WEIGHTS": table.WEIGHTS}
    return list(dict.fromkeys((name, row.bits, tile) for name, rows in tables.items() for row in rows for tile in row.others))


@pytest.mark.engines
@pytest.mark.parametrize(("name", "bits", "tile"), other_tiles(), ids=str)
@pytest.mark.parametrize("engine", TRITON, ids="-".join)
def test_other_tiles_give_the_same(engine, name, bits, tile, monkeypatch):
    """Those that PAIRLOSS_AUTOTUNE=1 may take."""
    from pairloss.kernels import tiles as table

    choose = table.choose
    monkeypatch.setattr(table, "choose", lambda of, *how: tile if of is getattr(table, name) else choose(of, *how))
    monkeypatch.setattr(operands, "GROUPS", 1)  # programs of several tiles
    dtype = torch.float16 if bits == 16 else torch.float32
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(140, WIDE if name == "WEIGHTS" else 24, generator=generator)).to(dtype).double()
    ids = torch.arange(140) // 30

    def run(backend: str, device: str, to: torch.dtype, product_dtype: torch.dtype):
        leaf, labels = x.to(device, to).requires_grad_(), ids.to(device)
        how = {"product_dtype": product_dtype, "backend": backend}
        one_set = row_stats(leaf, None, labels, None, 0, **how)[0]
        two_sets = row_stats(leaf[:130], leaf[10:], labels[:130], labels[10:], -10, both_sides=True, **how)
        out = torch.cat([one_set, *two_sets], 1)
        weights = torch.linspace(0.5, 1, out.numel(), dtype=to, device=device).view_as(out)
        return out.detach(), torch.autograd.grad((out * weights).sum(), leaf)[0]

    truth = run("reference", "cpu", torch.float64, torch.float64)
    eager = run("reference", "cpu", torch.float32, dtype)
    ours = run(engine.name, engine.device, torch.float32, dtype)
    for what, *values in zip(("values", "gradient"), ours, truth, eager, strict=True):
        assert_rule(what, *values, dtype)


@needs_triton
def test_autotune_takes_the_fastest_tile_and_looks_once(monkeypatch):
    from pairloss.kernels import launch
    from pairloss.kernels import tiles as table

    given = torch.empty(100, 128, dtype=torch.bfloat16)
    serving = [table.FORWARD[0].tile, *table.FORWARD[0].others]
    seconds, looked = dict.fromkeys(serving, 2.0) | {serving[-1]: 1.0, serving[0]: float("inf")}, []

    def seconds_of(_, tile):
        looked.append(tile)
        return seconds[tile]

    def chosen(rows=given):
        side = launch._Side(rows, None, None)
        return launch._on_tile(table.FORWARD, side, side, lambda tile: tile)

    monkeypatch.setattr(table, "_fastest", {})
    monkeypatch.setattr(table, "seconds_of", seconds_of)
    monkeypatch.setattr(table, "can_wait", lambda device: True)
    assert chosen() == serving[0]
    assert not looked
    monkeypatch.setattr(table, "AUTOTUNE", True)
    assert chosen() == chosen() == serving[-1]
    assert looked == serving
    assert chosen(given[:70]) == serving[-1]  # sizes of one kind
    assert looked == serving
    with tiles(16):
        assert chosen().block_m == 16
    monkeypatch.setattr(table, "can_wait", lambda device: False)  # as while a CUDA graph is captured
    assert chosen() == serving[-1]
    assert chosen(given.repeat(9, 1)) == serving[0]


@needs_triton
def test_a_tile_that_spills_serves_where_no_other_does():
    from pairloss.kernels import tiles as table

    spilling, other = (table.Tile(size, size, None, 4, 2) for size in (32, 64))
    rows = tuple(table.Row(256, 16, table.ANY, tile, "", (), spills) for tile, spills in ((spilling, ("circle",)), (other, ())))

    def chosen(*heavy, of=rows):
        return table.choose(of, 128, torch.bfloat16, torch.device("cpu"), heavy)

    assert chosen() == chosen("bias") == spilling
    assert chosen("circle") == chosen("bias", "circle") == other
    assert chosen("circle", of=rows[:1]) == spilling
    assert chosen("circle", of=()) is None


@needs_triton
def test_a_tile_that_does_not_fit_is_never_the_fastest(monkeypatch):
    import triton
    from pairloss.kernels import tiles as table

    def launch(tile):
        raise triton.runtime.errors.OutOfResources(1, 0, "shared memory")

    monkeypatch.setattr(triton.testing, "do_bench", lambda run, **_: run())
    assert table.seconds_of(launch, table.FORWARD[0].tile) == float("inf")
