"""The flow example: layers against autograd's Jacobian, inverses, a normalised density, then what it shows, at reduced length."""

import math

import numpy as np
import pytest
import torch
import typer
from torch.func import jacrev
from typer.testing import CliRunner

from examples import data, flow
from examples.flow_layers import BatchNorm, Coupling, Logit, RealNVP, Squeeze, checkerboard, half_of_channels, normal_log_density

SHAPE = (4, 4, 4)
LAYERS = {
    "logit": lambda: Logit(),
    "squeeze": lambda: Squeeze(),
    "batch norm": lambda: BatchNorm(4),
    "checkerboard, odd": lambda: Coupling(SHAPE, checkerboard(SHAPE, True), 8),
    "checkerboard, even": lambda: Coupling(SHAPE, checkerboard(SHAPE, False), 8),
    "channels, first": lambda: Coupling(SHAPE, half_of_channels(SHAPE, True), 8),
    "channels, second": lambda: Coupling(SHAPE, half_of_channels(SHAPE, False), 8),
}
FLOWS = {
    "8 x 8, two scales": lambda: RealNVP((1, 8, 8), 2, 6),
    "two channels, three scales": lambda: RealNVP((2, 4, 4), 3, 6),
    "6 x 4, one scale": lambda: RealNVP((3, 6, 4), 1, 6),
}


def shaken(module: torch.nn.Module, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """In evaluation, with random parameters and statistics: a new flow is the identity, where nothing could go wrong."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    for layer in module.modules():
        if isinstance(layer, BatchNorm):
            torch.nn.init.normal_(layer.mean)
            torch.nn.init.uniform_(layer.var, 0.5, 2)
    return module.eval().to(dtype)


@pytest.mark.parametrize("name", [*LAYERS, *FLOWS])
def test_log_determinant_is_that_of_the_jacobian(name):
    module = shaken((LAYERS | FLOWS)[name](), torch.float64)
    shape = {"8 x 8, two scales": (1, 8, 8), "two channels, three scales": (2, 4, 4), "6 x 4, one scale": (3, 6, 4)}.get(name, SHAPE)
    x = torch.rand(2, *shape, dtype=torch.float64)
    _, log_dets = module(x)
    assert log_dets.shape == (2,)
    if name not in ("squeeze", "batch norm"):
        assert abs(log_dets[0] - log_dets[1]) > 1e-3  # it depends on the image
    for image, log_det in zip(x, log_dets, strict=True):
        jacobian = jacrev(lambda v: module(v[None])[0].flatten())(image).reshape(image.numel(), -1)
        torch.testing.assert_close(log_det, torch.linalg.slogdet(jacobian).logabsdet, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("shape", "scales"), [((1, 8, 8), 2), ((3, 28, 28), 2), ((2, 12, 4), 3), ((1, 7, 5), 1)])
def test_flow_inverts(shape, scales):
    module = shaken(RealNVP(shape, scales, 6))
    with torch.no_grad():
        x = torch.rand(4, *shape)
        z, _ = module(x)
        assert z.shape == (4, math.prod(shape))
        assert (module.inverse(z) - x).abs().max() < 1e-4


@pytest.mark.parametrize("name", LAYERS)
def test_layers_invert(name):
    layer = shaken(LAYERS[name]())
    with torch.no_grad():
        x = torch.rand(4, *SHAPE)
        assert (layer.inverse(layer(x)[0]) - x).abs().max() < 1e-4


def test_coupling_leaves_what_the_mask_keeps_and_changes_the_rest():
    for mask in (checkerboard(SHAPE, True), half_of_channels(SHAPE, False)):
        x = torch.rand(2, *SHAPE)
        y, _ = shaken(Coupling(SHAPE, mask, 8))(x)
        kept = mask.expand_as(x).bool()
        assert kept.float().mean() == 0.5
        assert torch.equal(y[kept], x[kept])
        assert (y[~kept] != x[~kept]).all()


def test_squeeze_puts_each_square_into_the_channels():
    y, _ = Squeeze()(torch.arange(16.0).reshape(1, 1, 4, 4))
    assert y[0, :, 0, 0].tolist() == [0, 1, 4, 5]
    # The halves are rows of the squares: no half of a checkerboard, whose halves are the diagonals.
    assert half_of_channels((4, 2, 2), True).flatten().tolist() == [1, 1, 0, 0]


def test_batch_norm_in_training_uses_the_batch():
    torch.manual_seed(0)
    norm, x = BatchNorm(3, momentum=0.1), 3 * torch.randn(16, 3, 4, 2) + 5
    y, log_det = norm(x)
    values = x.double().numpy()
    var = values.var((0, 2, 3))
    torch.testing.assert_close(
        y, torch.tensor((values - values.mean((0, 2, 3), keepdims=True)) / np.sqrt(var + 1e-5)[:, None, None]).float()
    )
    torch.testing.assert_close(log_det, torch.full((16,), float(-0.5 * 8 * np.log(var + 1e-5).sum())))
    torch.testing.assert_close(norm.var.flatten(), torch.tensor(0.9 + 0.1 * var).float())
    torch.testing.assert_close(norm.mean.flatten(), torch.tensor(0.1 * values.mean((0, 2, 3))).float())
    with pytest.raises(RuntimeError, match="eval"):
        norm.inverse(y)


def test_density_integrates_to_one():
    """Over all images of two pixels, by the midpoint rule; they reach beyond [0, 1] by what the logit's margin lets through."""
    module = shaken(RealNVP((1, 1, 2), 1, 4), torch.float64)
    reach, n = 0.05 / 0.9, 150
    side = (torch.arange(n, dtype=torch.float64) + 0.5) / n * (1 + 2 * reach) - reach
    with torch.no_grad():
        z, log_det = module(torch.cartesian_prod(side, side).reshape(-1, 1, 1, 2))
        total = (normal_log_density(z) + log_det).exp().sum() * ((1 + 2 * reach) / n) ** 2
    assert abs(total - 1) < 0.01


def test_bits_per_dimension_count_every_jacobian():
    """A new flow is the logit alone, whose density torch.distributions has."""
    from torch.distributions import AffineTransform, Normal, SigmoidTransform, TransformedDistribution

    x = torch.rand(3, 1, 4, 4, dtype=torch.float64)
    new = RealNVP((1, 4, 4), 2, 4).eval().double()
    for layer in new.modules():
        if isinstance(layer, BatchNorm):
            layer.eps = 0  # with it, the normalisation of variance 1 is not quite the identity
    bits, _ = flow.bits_per_dimension(new, x, 17)
    zero = torch.zeros((), dtype=torch.float64)
    pixel = TransformedDistribution(Normal(zero, zero + 1), [SigmoidTransform(), AffineTransform(-0.05 / 0.9, 1 / 0.9)])
    levels = pixel.log_prob(x) - math.log(17)  # the probability of a level: density times its width
    torch.testing.assert_close(bits, -levels.flatten(1).mean(1) / math.log(2))


def test_grey_levels():
    assert flow.grey_levels(torch.arange(17) / 16) == 17
    assert flow.grey_levels(torch.arange(256) / 255) == 256
    with pytest.raises(typer.BadParameter, match="evenly spaced"):
        flow.grey_levels(torch.tensor([0, 0.1, 0.137, 1]))
    with pytest.raises(typer.BadParameter, match="evenly spaced"):
        flow.grey_levels(torch.zeros(5))


def test_interpolation_starts_and_ends_at_the_images():
    a, b = torch.randn(2, 64)
    between = flow.interpolate(a, b, 5)
    torch.testing.assert_close(between[[0, 4]], torch.stack([a, b]))
    torch.testing.assert_close(between[2], (a + b) / math.sqrt(2))


def test_snnl_clusters_the_latent_at_a_cost_in_bits():
    """Over seeds 0 to 3: 0.25 to 0.29 bits, accuracy 1.3 to 3.3 points, entanglement to 0.48 to 0.57 of what it was."""
    digits = data.load("digits", 0.25)
    images = data.Images("digits", digits.train_x[:512], digits.train_y[:512], digits.test_x[:300], digits.test_y[:300])
    settings = flow.Settings(seeds=(0,), factors=(0.0, 1.0), epochs=10, batch=64, hidden=6, draws=2)
    results = flow.run(settings, images)
    assert results.levels == 17
    (plain,), (clustered,) = results.of(0.0), results.of(1.0)
    assert plain.test_bits < 2.8  # 4.09 for uniform levels, 3.8 for a new flow; seen: 2.58 to 2.62
    assert 0.1 < clustered.test_bits - plain.test_bits < 0.5
    assert clustered.entanglement < 0.75 * plain.entanglement
    assert clustered.neighbour_accuracy > plain.neighbour_accuracy > 0.85
    for trained in (plain, clustered):
        with torch.no_grad():
            assert (trained.flow.inverse(trained.test_z) - flow.dequantise(images.test_x, 17)).abs().max() < 1e-4


def test_independent_bits_by_hand():
    """Level 1 twice and level 0 once in training: with a count added to each of two levels, 2/5 and 3/5."""
    bits = flow.independent_bits(torch.tensor([[[[0.0]]], [[[1.0]]], [[[1.0]]]]), torch.tensor([[[[1.0]]], [[[0.0]]]]), 2)
    assert bits == pytest.approx(-(math.log2(3 / 5) + math.log2(2 / 5)) / 2)


def tiny(path):
    rng = np.random.default_rng(0)
    np.savez(path, features=rng.integers(0, 5, (60, 4, 4)), labels=np.arange(60) % 3)
    return str(path)


def app():
    application = typer.Typer()
    application.command()(flow.main)
    return application


def test_command_writes_pictures_and_table(tmp_path):
    given = ["--data", tiny(tmp_path / "tiny.npz"), "--epochs", "1", "--seeds", "2", "--hidden", "2", "--factors", "0,0.5"]
    result = CliRunner().invoke(app(), ["--out", str(tmp_path / "out"), *given])
    assert result.exit_code == 0, result.output
    for picture in ("flow.png", "flow-latent.png"):
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "out/results/flow.md").read_text()
    assert "| latent, likelihood + 0.5 SNNL |" in table
    assert table.count("±") == 9  # four columns of two variants, and the line that says what it means
    assert "5 grey levels" in table


@pytest.mark.parametrize(
    ("given", "message"), [(["--scales", "5"], "halved"), (["--factors", "a"], "numbers"), (["--data", "none.npz"], "expected")]
)
def test_command_refuses(tmp_path, given, message):
    result = CliRunner().invoke(app(), ["--out", str(tmp_path), *given])
    assert result.exit_code == 2
    assert message in result.output
