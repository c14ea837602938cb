"""The second form of the primitive, sums over pairs, against the reference in float64."""

import pytest
import torch
from conftest import INTERPRETED, ON_CPU, RUNNABLE, TILED, TILES, assert_rule, skip_if_unable, tiles

from pairloss import testing
from pairloss.ops import pair_sum

D = 6
OPTIONS = [
    *("self", "self-bias", "self-words", "self-no-ids-bias", "two", "two-bias", "two-words", "two-offset", "two-offset-bias"),
    *("two-no-ids", "two-no-ids-offset-bias", "two-infinite-bias"),
    *("two-own", "two-own-bias", "two-own-words", "two-own-one-id-bias", "two-own-no-ids", "two-own-no-ids-bias"),
]
OVER = ("positives", "negatives")
CASES = [(option, over) for option in OPTIONS for over in OVER if over == "negatives" or not ("no-ids" in option or "own" in option)]

# Infinite biases and own pairs have no linear sum.
LINEAR = [(option, over, "linear") for option, over in CASES if "infinite" not in option and "own" not in option]
TERM_CASES = [(*case, "softplus") for case in CASES] + LINEAR


def arguments(n: int, m: int, option: str, over: str):
    generator = torch.Generator().manual_seed(n + m)
    own = "own" in option
    m = n if own else m

    def randn(*shape: int) -> torch.Tensor:
        return 3 * torch.randn(*shape, generator=generator, dtype=torch.float64)

    two_sets = option.startswith("two")
    differentiable = {"x": randn(n, D), "y": randn(m, D) if two_sets else None, "row_bias": None, "col_bias": None}
    others: dict[str, object] = {"over": over}
    if "no-ids" not in option:
        others["ids_x"] = torch.randint(0, 3, (n,), generator=generator)
        others["ids_y"] = torch.randint(0, 3, (m,), generator=generator) if two_sets else None
    if "one-id" in option:
        others |= {k: torch.zeros_like(v) for k, v in others.items() if isinstance(v, torch.Tensor)}
    if "words" in option:
        others |= {k: 1 << torch.randint(0, 9, (len(v), 2), generator=generator) for k, v in others.items() if isinstance(v, torch.Tensor)}
    if "bias" in option:
        differentiable["row_bias"] = randn(n)
        if two_sets:
            differentiable["col_bias"] = randn(m)
    if "infinite" in option:
        for name in ("row_bias", "col_bias"):
            differentiable[name][::4] = torch.inf if over == "positives" else -torch.inf
    if "offset" in option or own or not two_sets:
        others["self_offset"] = 3 if "offset" in option else 0
    if own:
        others["own"] = True
    return differentiable, others


def run(differentiable, others, dtype, device, backend, term):
    leaves = {k: None if v is None else v.to(device, dtype).detach().requires_grad_() for k, v in differentiable.items()}
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in others.items()}
    sums = pair_sum(**leaves, **moved, term=term, backend=backend)
    wanted = {k: v for k, v in leaves.items() if v is not None}
    weights = torch.linspace(0.5, 1, len(sums), device=device, dtype=dtype)
    return sums.detach(), dict(zip(wanted, torch.autograd.grad(sums @ weights, list(wanted.values())), strict=True))


@pytest.mark.engines
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"tile-{tile or 'shipped'}")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("option", "over", "term"), TERM_CASES)
@pytest.mark.parametrize("engine", TILED, ids=lambda engine: "-".join(engine))
def test_sums_and_gradients(engine, option, over, term, dtype, tile):
    if "words" in option and engine.name == "triton":
        pytest.skip("triton does not serve multi-hot words")
    skip_if_unable(engine, dtype)
    differentiable, others = arguments(*((14, 11) if INTERPRETED and tile == 4 else (37, 29)), option, over)
    truth = run(differentiable, others, torch.float64, "cpu", "reference", term)
    eager = run(differentiable, others, dtype, "cpu", "reference", term)
    with tiles(tile):
        ours = run(differentiable, others, dtype, engine.device, engine.name, term)
    assert_rule("sums", ours[0], truth[0], eager[0], dtype)
    for name, grad in ours[1].items():
        assert_rule(f"gradient of {name}", grad, truth[1][name], eager[1][name], dtype)


@pytest.mark.parametrize("tile", [4, None], ids=lambda tile: f"tile-{tile or 'shipped'}")
@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize(("option", "over"), [case for case in CASES if "infinite" not in case[0]])
def test_gradcheck_through_the_tiles(option, over, backend, tile):
    differentiable, others = arguments(9, 7, option, over)
    names = [name for name, v in differentiable.items() if v is not None]

    def function(*values):
        return pair_sum(**dict(zip(names, values, strict=True)), **others, backend=backend)

    with tiles(tile):
        assert torch.autograd.gradcheck(function, [differentiable[name].requires_grad_() for name in names])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"over": "both"}, r"over: expected one of \('positives', 'negatives'\)"),
        ({"over": "positives"}, "'positives' with ids_x"),
        ({"over": "negatives", "term": "hinge"}, r"term: expected one of \('softplus', 'linear'\), got 'hinge'"),
        ({"over": "negatives", "col_bias": torch.zeros(3)}, "y=None: expected col_bias=None"),
        ({"over": "negatives", "self_offset": 0, "own": True}, "own: expected .* y of as many rows as x and self_offset 0"),
        ({"over": "negatives", "y": torch.zeros(3, 2), "own": True}, "own: expected .* self_offset 0"),
        ({"over": "negatives", "y": torch.zeros(4, 2), "self_offset": 0, "own": True}, "own: expected"),
        (
            {"over": "negatives", "y": torch.zeros(3, 2), "self_offset": 0, "own": True, "term": "linear"},
            "own: expected .* term='softplus'",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        pair_sum(torch.zeros(3, 2), **changed)


@pytest.mark.engines
@pytest.mark.parametrize("tile", [4, None], ids=lambda tile: f"tile-{tile or 'shipped'}")
@pytest.mark.parametrize(("option", "over"), CASES)
@pytest.mark.parametrize("engine", TILED, ids=lambda engine: "-".join(engine))
def test_weights_give_the_weighted_sum_and_its_gradients_at_once(engine, option, over, tile):
    if "words" in option and engine.name == "triton":
        pytest.skip("triton does not serve multi-hot words")
    differentiable, others = arguments(14, 11, option, over)
    leaves = {k: None if v is None else v.to(engine.device, torch.float32).requires_grad_() for k, v in differentiable.items()}
    weights = torch.linspace(-0.5, 1, 14, device=engine.device).requires_grad_()
    moved = {k: v.to(engine.device) if isinstance(v, torch.Tensor) else v for k, v in others.items()} | {"backend": engine.name}
    wanted = [weights, *(v for v in leaves.values() if v is not None)]
    with tiles(tile):
        total = pair_sum(**leaves, **moved, weights=weights)
        ours = torch.autograd.grad(3 * total, wanted)
        afterwards = pair_sum(**leaves, **moved) @ weights
        theirs = torch.autograd.grad(3 * afterwards, wanted)
        with torch.no_grad():
            torch.testing.assert_close(pair_sum(**leaves, **moved, weights=weights), afterwards)
    torch.testing.assert_close(total, afterwards)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= testing.FLOORS[torch.float32] * b.abs().max()


@pytest.mark.engines
@pytest.mark.parametrize("engine", RUNNABLE, ids=lambda engine: "-".join(engine))
def test_a_weight_of_zero_silences_an_infinite_sum(engine):
    to = {"device": engine.device}
    x = torch.tensor([[1.0], [2.0], [3.0]], **to, requires_grad=True)
    bias, weights = torch.tensor([torch.inf, 0.0, 0.0], **to), torch.tensor([0.0, 1.0, 1.0], **to)
    total = pair_sum(x, torch.ones(1, 1, **to), None, None, None, bias, over="negatives", weights=weights, backend=engine.name)
    assert total.item() == pytest.approx(torch.nn.functional.softplus(torch.tensor([2.0, 3.0])).sum().item(), rel=1e-6)
    grad = torch.autograd.grad(total, x)[0]
    torch.testing.assert_close(grad, torch.tensor([[0.0], [2.0], [3.0]], **to).sigmoid() * weights[:, None], rtol=4e-6, atol=0)


def test_second_derivatives_of_a_weighted_sum_are_refused():
    x = torch.randn(5, 3, requires_grad=True)
    total = pair_sum(x, over="negatives", weights=torch.ones(5))
    grad = torch.autograd.grad(total, x, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="second derivatives"):
        grad.sum().backward()


def test_weights_that_do_not_fit_are_named():
    for weights in (torch.ones(2), torch.ones(3, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"weights: expected torch.float32 of shape \[3\]"):
            pair_sum(torch.zeros(3, 2), over="negatives", weights=weights)
