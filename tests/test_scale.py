"""The learnable scale: its bound, its gradient there, checkpoints, compile."""

import math

import pytest
import torch

from pairloss.nn import CLIP, LogitScale


def test_it_starts_where_it_is_told():
    assert LogitScale()().item() == pytest.approx(1 / 0.07)
    scale = LogitScale(20.0)
    assert scale().item() == pytest.approx(20)
    assert scale.tau.item() == pytest.approx(0.05)
    assert scale().ndim == scale.tau.ndim == 0
    assert [name for name, _ in scale.named_parameters()] == ["log_scale"]
    assert repr(scale) == "LogitScale(maximum=100.0)"


@pytest.mark.parametrize("maximum", [100.0, 5, None])
def test_a_call_bounds_the_parameter_itself(maximum):
    scale = LogitScale(5.0, maximum=maximum)
    with torch.no_grad():
        scale.log_scale.fill_(10.0)
    for value in (scale(), 1 / scale.tau, scale.log_scale.exp()):
        assert value.item() == pytest.approx(maximum or math.exp(10), rel=1e-5)
    with torch.no_grad():
        scale.log_scale.fill_(-3.0)
    assert scale().item() == pytest.approx(math.exp(-3))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_gradient_flows_at_the_bound_and_the_parameter_comes_back(compiled):
    """A clamp in the graph has derivative 0 beyond its bound: the parameter would stay there for ever."""
    torch.compiler.reset()
    scale = LogitScale(100.0)
    call = torch.compile(scale, fullgraph=True, backend="aot_eager") if compiled else scale
    with torch.no_grad():
        scale.log_scale.fill_(6.0)
    value = call()
    assert value.item() == pytest.approx(100, rel=1e-5)
    value.backward()
    assert scale.log_scale.grad.item() == pytest.approx(100, rel=1e-5)
    torch.optim.SGD(scale.parameters(), lr=0.01).step()
    assert call().item() == pytest.approx(100 / math.e, rel=1e-5)


def test_calls_before_backward_do_not_disturb_one_another():
    scale = LogitScale(50.0)
    first, tau = scale(), scale.tau
    (first + scale() * tau).backward()
    assert scale.log_scale.grad.item() == pytest.approx(50, rel=1e-5)


def test_gradients():
    scale = LogitScale(7.0).double()
    scale.tau.backward()
    assert scale.log_scale.grad.item() == pytest.approx(-1 / 7)


def test_a_loss_learns_it():
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(16, 8, generator=generator)
    text = image + 0.1 * torch.randn(16, 8, generator=generator)
    scale, loss = LogitScale(5.0), CLIP()
    optimizer = torch.optim.SGD(scale.parameters(), lr=1.0)
    before = loss(image, text, scale())
    before.backward()
    optimizer.step()
    assert loss(image, text, scale()) < before
    assert scale() > 5


def test_checkpoints():
    scale, other = LogitScale(3.0), LogitScale()
    other.load_state_dict(scale.state_dict())
    assert other().item() == pytest.approx(3)
    assert other.to("meta")().device.type == "meta"


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "initial: expected a finite number > 0, got 0", {"initial": 0}),
        (ValueError, "initial: expected a finite number > 0, got inf", {"initial": math.inf}),
        (TypeError, "initial: expected a number, got str", {"initial": "1"}),
        (ValueError, "initial: expected at most maximum = 10.0, got 11.0", {"initial": 11, "maximum": 10}),
        (ValueError, "maximum: expected a finite number > 0, got -1", {"maximum": -1}),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_options_are_refused_by_name(error, message, arguments):
    with pytest.raises(error, match=message):
        LogitScale(**arguments)
