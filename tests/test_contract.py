"""What every loss promises, generated from the table of losses: gradcheck, opcheck, compile, export, autocast, func, dtypes."""

import ast
import inspect
import shutil

import pytest
import torch
from conftest import DTYPES, ON_CPU, tiles
from torch._dynamo.testing import CompileCounterWithBackend

from pairloss import anchors, groups, prepare
from pairloss.autograd import DIFFERENTIABLE
from pairloss.testing import FLOORS, LOSSES, Sample
from pairloss.unit import unit

CASES = [(loss, option) for loss, spec in LOSSES.items() for option in spec.options]


def arguments(loss: str, option: str, n: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Sample, list[str]]:
    sample = LOSSES[loss].sample(n, d, n, option).to(dtype)
    return sample, list(sample.differentiable)


@pytest.mark.parametrize("tile", [4, None], ids=lambda tile: f"tile-{tile or 'shipped'}")  # 9 rows: several tiles, and one
@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize(("loss", "option"), [case for case in CASES if not LOSSES[case[0]].detached])
def test_gradcheck_through_the_tiles(loss, option, backend, tile):
    sample, names = arguments(loss, option, 9, 3, torch.float64)

    def function(*values):
        return LOSSES[loss].function(**dict(zip(names, values, strict=True)), **sample.others, backend=backend)

    with tiles(tile):
        assert torch.autograd.gradcheck(function, [v.requires_grad_() for v in sample.differentiable.values()])


@pytest.mark.parametrize("option", ["cosine", "sqeuclidean", "ref"])
def test_gradcheck_of_the_reference(option):
    sample, names = arguments("snnl", option, 6, 3, torch.float64)

    def function(*values):
        return LOSSES["snnl"].function(**dict(zip(names, values, strict=True)), **sample.others, backend="reference")

    inputs = [v.requires_grad_() for v in sample.differentiable.values()]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def op_calls():
    x, y = torch.randn(9, 4), torch.randn(7, 4)
    ids_x, ids_y = torch.arange(9) % 3, torch.arange(7) % 3
    options = (torch.float32, None, "linear", 0.0, 1.0, False, 5.0, False, "torch")
    yield "self", (x, None, None, ids_x, None, 0, None, None, *options)
    yield "self-bias", (x, None, None, None, None, 0, torch.randn(9), None, *options)
    yield "totals", (x, y, torch.tensor(2.0), ids_x, ids_y, None, None, None, *options[:-2], True, "torch")
    yield "two", (x, y, None, ids_x, ids_y, None, torch.randn(9), torch.randn(7), *options)
    options = (torch.bfloat16, torch.tensor(0.1), "linear", 0.0, 1.0, True, float("inf"), False, "torch")
    yield "both-sides-cutoff", (x, y, torch.tensor(2.0), ids_x, ids_y, 2, None, torch.randn(7), *options)
    options = (torch.float32, None, "circle", 0.25, 32.0, False, float("inf"), False, "torch")
    yield "circle", (x, None, torch.tensor(1.0), ids_x, None, 0, None, None, *options)


@pytest.mark.parametrize(("name", "args"), list(op_calls()), ids=lambda v: v if isinstance(v, str) else "")
def test_opcheck_forward(name, args):
    torch.library.opcheck(torch.ops.pairloss.row_stats.default, args)


@pytest.mark.parametrize(("name", "args"), list(op_calls()), ids=lambda v: v if isinstance(v, str) else "")
def test_opcheck_backward(name, args):
    rows, cols, row_sums, col_sums = torch.ops.pairloss.row_stats(*args)
    needs = [isinstance(args[i], torch.Tensor) for i in DIFFERENTIABLE]
    grads = row_sums, torch.randn_like(rows), col_sums, torch.randn_like(cols)
    torch.library.opcheck(torch.ops.pairloss.row_stats_backward.default, (*args, *grads, needs))


@pytest.mark.parametrize("over", ["positives", "negatives"])
def test_opcheck_of_the_other_ops(over):
    x, y = torch.randn(9, 4), torch.randn(7, 4)
    pairs = (x, y, torch.tensor(2.0), torch.arange(9) % 3, torch.arange(7) % 3, None, torch.randn(9), torch.randn(7), torch.float32)
    ops = torch.ops.pairloss
    torch.library.opcheck(ops.pair_sum.default, (*pairs, over, "softplus", False, "torch"))
    torch.library.opcheck(ops.pair_sum_backward.default, (*pairs, over, "softplus", False, "torch", torch.randn(9), [True] * 5))
    for needs in ([True] * 5, [False, True, False, False, False], [False] * 5):
        torch.library.opcheck(ops.pair_sum_with_grads.default, (*pairs, over, "softplus", False, "torch", torch.randn(9), needs))
    own = (x, x + 1, torch.tensor(2.0), None, None, 0, None, None, torch.float32, "negatives", "softplus", True, "torch")
    torch.library.opcheck(ops.pair_sum_with_grads.default, (*own, torch.randn(9), [True] * 3 + [False] * 2))
    torch.library.opcheck(ops.top_k.default, (*pairs, torch.tensor(0.1), 3))
    index = ops.top_k(*pairs, None, 3)
    torch.library.opcheck(ops.selected_products.default, (x, y, index, torch.float32))
    torch.library.opcheck(ops.selected_products_backward.default, (x, y, index, torch.float32, torch.randn(9, 3), [True, True]))


TRACED = {inspect.getmodule(inspect.unwrap(spec.function)) for spec in LOSSES.values()} | {anchors, groups, prepare}


@pytest.mark.parametrize("module", sorted(TRACED, key=lambda module: module.__name__), ids=lambda module: module.__name__)
def test_the_oldest_dynamo_knows_what_it_traces(module):
    """That of torch 2.6, which CI doesn't have: seen to fail at these, and each stops torch.compile of a loss."""
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        assert not (isinstance(node, ast.Attribute) and node.attr == "_replace"), f"line {node.lineno}: _replace of a named tuple"
        assert not (isinstance(node, ast.AugAssign) and isinstance(node.value, ast.Dict)), f"line {node.lineno}: |= of dictionaries"
        if isinstance(node, ast.ClassDef) and any(isinstance(base, ast.Name) and base.id == "NamedTuple" for base in node.bases):
            for method in (v for v in node.body if isinstance(v, ast.FunctionDef)):
                assert not method.decorator_list, f"line {method.lineno}: a property of a named tuple"


@pytest.mark.parametrize(("loss", "option"), CASES)
def test_compiles_to_one_graph_with_the_same_result(loss, option):
    sample, _ = arguments(loss, option, 13, 5)
    expected = sample.run(LOSSES[loss].function)
    torch.compiler.reset()
    ours = sample.run(torch.compile(LOSSES[loss].function, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad], ids=lambda mode: mode.__name__)
def test_compiles_where_nothing_requires_a_gradient(mode):
    torch.compiler.reset()
    sample, _ = arguments("snnl", "cosine", 13, 5)
    compiled = torch.compile(LOSSES["snnl"].function, fullgraph=True, backend="aot_eager")
    with mode():
        ours = compiled(**sample.differentiable, **sample.others)
        torch.testing.assert_close(ours, LOSSES["snnl"].function(**sample.differentiable, **sample.others))


@pytest.mark.parametrize("loss", LOSSES)
def test_compiles_once_for_all_batch_sizes(loss):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    option = LOSSES[loss].options[0]
    compiled = torch.compile(LOSSES[loss].function, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for n in (9, 64, 700, 2049, 33):
        sample, _ = arguments(loss, option, n, 5)
        torch.testing.assert_close(sample.run(compiled), sample.run(LOSSES[loss].function))
        frames.append(counter.frame_count)
    assert len(set(frames)) == 1


def test_compiles_with_inductor():
    if shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler for the CPU, there is none")
    torch.compiler.reset()
    sample, _ = arguments("snnl", "cosine", 33, 5)
    ours = sample.run(torch.compile(LOSSES["snnl"].function, fullgraph=True))
    torch.testing.assert_close(ours, sample.run(LOSSES["snnl"].function))


@pytest.mark.parametrize("loss", LOSSES)
def test_exports(loss):
    option = LOSSES[loss].options[0]
    sample, names = arguments(loss, option, 20, 5)
    names += [name for name, v in sample.others.items() if isinstance(v, torch.Tensor)]
    constants = {name: v for name, v in sample.others.items() if name not in names}

    class Loss(torch.nn.Module):
        def forward(self, *values):
            return LOSSES[loss].function(**dict(zip(names, values, strict=True)), **constants)

    def inputs(n):
        sample, _ = arguments(loss, option, n, 5)
        return tuple((sample.differentiable | sample.others)[name] for name in names)

    n = torch.export.Dim("n", min=2)
    shapes = tuple({0: n} if v.ndim else None for v in inputs(20))
    program = torch.export.export(Loss(), inputs(20), dynamic_shapes=(shapes,))
    torch.testing.assert_close(program.module()(*inputs(31)), Loss()(*inputs(31)))


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_autocast_rounds_only_the_products(autocast, compiled):
    """float32 features under autocast: as if the prepared rows had been rounded; statistics, loss and gradient float32."""
    sample, _ = arguments("snnl", "cosine", 40, 7)
    function = LOSSES["snnl"].function
    if compiled:
        torch.compiler.reset()
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    features = sample.differentiable["features"].requires_grad_()

    def under_autocast(function, **options):
        with torch.autocast("cpu", autocast):
            loss = function(features, sample.others["labels"], 0.2, **options)
        return loss.detach(), *torch.autograd.grad(loss, features)

    expected = under_autocast(LOSSES["snnl"].function, backend="reference")
    ours = under_autocast(function)
    assert [v.dtype for v in ours] == [torch.float32, torch.float32]
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-5, atol=1e-6)
    if autocast == torch.bfloat16:  # the default engine may round the weights too, before they are multiplied with rows
        assert (ours[1] - expected[1]).abs().max() <= FLOORS[autocast] * expected[1].abs().max()
        ours = under_autocast(function, backend="torch")
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(ours[0], LOSSES["snnl"].function(features, sample.others["labels"], 0.2))


@pytest.mark.parametrize(
    ("loss", "option"),
    [*((loss, spec.options[0]) for loss, spec in LOSSES.items()), ("snnl", "ref"), ("supcon", "pairs"), ("contrastive", "top_k")],
)
def test_functorch_grad(loss, option):
    sample, names = arguments(loss, option, 20, 5)
    gradient = torch.func.grad(
        lambda *values: LOSSES[loss].function(**dict(zip(names, values, strict=True)), **sample.others), argnums=tuple(range(len(names)))
    )
    expected = sample.run(lambda **kwargs: LOSSES[loss].function(**kwargs) / 0.5)[1]  # run() weighs a single loss with 0.5
    torch.testing.assert_close(dict(zip(names, gradient(*sample.differentiable.values()), strict=True)), expected)


@pytest.mark.parametrize("backend", [*ON_CPU, "reference"])
def test_a_func_transform_of_something_else_around_siglip(backend):
    """The inner transform wants no gradient of the rows, the outer one does."""
    sample, _ = arguments("siglip", LOSSES["siglip"].options[0], 6, 3, torch.float64)
    image = sample.differentiable.pop("image")

    def loss(image, backend):
        return LOSSES["siglip"].function(image, **sample.differentiable, **sample.others, backend=backend)

    def outer(image):
        return torch.func.grad(lambda c: c * loss(image * 1, backend))(image.new_ones(()))

    torch.testing.assert_close(torch.func.grad(outer)(image), torch.func.grad(lambda rows: loss(rows, "reference"))(image))


def test_the_reference_has_every_kind_of_derivative():
    x, labels = arguments("snnl", "cosine", 4, 3, torch.float64)[0].differentiable["features"], torch.tensor([0, 0, 1, 1])

    def loss(x, tau=0.3):
        return LOSSES["snnl"].function(x, labels, tau, no_positive="zero", backend="reference")

    hessian = torch.func.hessian(loss)(x)
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(loss, x))
    tangent = torch.ones_like(x)
    torch.testing.assert_close(torch.func.jvp(loss, (x,), (tangent,))[1], torch.func.grad(loss)(x).sum())
    torch.testing.assert_close(torch.func.vmap(loss)(torch.stack([x, 2 * x])), torch.stack([loss(x), loss(x)]))
    tau = torch.tensor(0.3, dtype=torch.float64)
    of_tau = torch.func.jvp(lambda tau: loss(x, tau), (tau,), (torch.ones_like(tau),))[1]
    torch.testing.assert_close(of_tau, torch.func.grad(lambda tau: loss(x, tau))(tau))


def test_vmap_over_temperatures_alone():
    x, labels, taus = torch.randn(6, 3), torch.arange(6) % 2, torch.tensor([0.3, 0.5])

    def gradient(tau):
        return torch.func.grad(lambda x: LOSSES["snnl"].function(x, labels, tau, backend="reference"))(x)

    def unit_gradient(scale):
        return torch.func.vjp(lambda x: unit(x, scale), x)[1](x[:1].expand(6, 3))[0]

    for function in (gradient, unit_gradient):
        torch.testing.assert_close(torch.func.vmap(function)(taus), torch.stack([function(tau) for tau in taus]))


def test_second_derivatives_are_refused_clearly():
    sample, _ = arguments("snnl", "cosine", 9, 3, torch.float64)
    x = sample.differentiable["features"].requires_grad_()
    loss = LOSSES["snnl"].function(x, sample.others["labels"], 0.5)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"second derivatives are not implemented .* backend='reference' has them"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_in_and_out(dtype):
    sample, _ = arguments("snnl", "number-tau", 12, 4, dtype)
    loss, grads = sample.run(LOSSES["snnl"].function)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert grads["features"].dtype == dtype


@pytest.mark.parametrize(("dtype", "real"), [(torch.complex64, torch.float32), (torch.complex128, torch.float64)], ids=str)
@pytest.mark.parametrize("metric", ["cosine", "dot", "sqeuclidean"])
def test_complex_features_count_by_their_real_view(dtype, real, metric):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(12, 3, dtype=dtype, generator=generator).requires_grad_()
    x = torch.cat([z.detach().real, z.detach().imag], 1).requires_grad_()
    labels = torch.arange(12) % 3
    loss, real_loss = (LOSSES["snnl"].function(v, labels, 0.5, metric=metric) for v in (z, x))
    loss.backward()
    real_loss.backward()
    assert loss.dtype == real
    torch.testing.assert_close(loss, real_loss)
    torch.testing.assert_close(torch.cat([z.grad.real, z.grad.imag], 1), x.grad)
    if metric == "cosine":  # Re <a, conj b>, as written
        unit = z.detach() / z.detach().abs().square().sum(1, keepdim=True).sqrt()
        logits = (unit @ unit.conj().T).real / 0.5
        same = (labels[:, None] == labels) & ~torch.eye(12, dtype=torch.bool)
        other = labels[:, None] != labels
        expected = ((logits.exp() * (same | other)).sum(1) / (logits.exp() * same).sum(1)).log().mean()
        torch.testing.assert_close(loss.detach(), expected)


@pytest.mark.parametrize(("loss", "option"), CASES)
def test_everything_is_made_on_the_device_of_the_features(loss, option):
    """On the meta device: an operand left on the CPU would raise."""
    sample, _ = arguments(loss, option, 20, 5)
    result, grads = sample.on("meta").run(LOSSES[loss].function)
    assert {v.device.type for v in (result, *grads.values())} == {"meta"}
