"""Products of rows beside each other, against the reference in float64."""

import pytest
import torch
from conftest import ON_CPU, TILED, assert_rule, skip_if_unable

from pairloss.ops import own_products
from pairloss.reference import rounded

N, D = 37, 19
NAMES = ("products", "gradient of x", "gradient of y", "gradient of norm")


def run(dtype, device, backend, norm, product_dtype=None):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(N, D, generator=generator, dtype=torch.float64) for _ in range(2))
    x[3] = 0
    scale = None if norm is None else torch.tensor(norm, dtype=torch.promote_types(dtype, torch.float32), device=device)
    leaves = [v.to(dtype).to(device) for v in (x, y)] + ([] if scale is None else [scale])
    leaves = [v.requires_grad_() for v in leaves]
    result = own_products(*leaves[:2], norm=leaves[2] if norm else None, product_dtype=product_dtype, backend=backend)
    weights = torch.linspace(-1, 1, N, dtype=result.dtype, device=device)
    return result.detach(), *torch.autograd.grad(result @ weights, leaves)


@pytest.mark.engines
@pytest.mark.parametrize("norm", [None, 1.7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("engine", TILED, ids=lambda engine: "-".join(engine))
def test_products_and_gradients(engine, dtype, norm):
    skip_if_unable(engine, dtype)
    if norm is None and dtype.itemsize == 2:
        with pytest.raises(ValueError, match="x: expected float32 or float64"):
            run(dtype, engine.device, engine.name, norm)
        return
    ours, eager = run(dtype, engine.device, engine.name, norm), run(dtype, "cpu", "reference", norm)
    # Of halves the truth is that of the rows as they were rounded on the way in.
    truth = eager if dtype.itemsize == 2 else run(torch.float64, "cpu", "reference", norm)
    for name, a, b, c in zip(NAMES, ours, truth, eager, strict=False):
        assert a.dtype == c.dtype
        assert_rule(name, a.double(), b.double(), c.double(), dtype)


@pytest.mark.parametrize("backend", ON_CPU)
def test_gradcheck(backend):
    x, y = (torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    norm = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, y, norm: own_products(x, y, norm=norm, backend=backend), [x, y, norm])
    assert torch.autograd.gradcheck(lambda x, y: own_products(x, y, backend=backend), [x, y])


@pytest.mark.parametrize("backend", ON_CPU)
def test_rows_are_rounded_to_the_product_dtype(backend):
    x, y = torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(0))
    ours, truth = (own_products(x, y, product_dtype=torch.bfloat16, backend=each) for each in (backend, "reference"))
    torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ON_CPU)
def test_rows_and_norms_that_are_not_finite(backend):
    x, y = torch.ones(3, 2), torch.ones(3, 2)
    x[1, 0] = torch.inf
    assert own_products(x, y, norm=torch.tensor(2.0), backend=backend).isnan().tolist() == [False, True, False]
    for norm in (0.0, -1.0, torch.inf, torch.nan):
        assert own_products(x, y, norm=torch.tensor(norm), backend=backend).isnan().all()


def test_rows_that_do_not_stand_beside_each_other_are_refused():
    with pytest.raises(ValueError, match=r"y: expected shape \[3, 2\], got \[4, 2\]"):
        own_products(torch.ones(3, 2), torch.ones(4, 2))
    for norm, got in ((torch.ones(1), r"torch.float32 \[1\]"), (2.0, "float")):
        with pytest.raises(ValueError, match=rf"norm: expected a tensor of torch.float32 and shape \[\], got {got}"):
            own_products(torch.ones(3, 2), torch.ones(3, 2), norm=norm)


def test_gradients_of_rounded_rows_are_not_rounded():
    x, t = torch.randn(6, 8), torch.randn(6, 8)

    def function(rows: torch.Tensor) -> torch.Tensor:
        return rounded(rows, torch.bfloat16)

    assert torch.equal(function(x), x.bfloat16().float())
    assert torch.equal(torch.func.jvp(function, (x,), (t,))[1], t)
    assert torch.equal(torch.func.grad(lambda rows: (torch.func.vmap(function)(rows[None])[0] * t).sum())(x), t)
