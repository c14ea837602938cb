"""The temperature study: gradient ratio against autograd, what hardness and temperature do to an embedding, how verdicts are found."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from examples import data, temperature
from examples.temperature_training import Loss, Results, Run, Settings, augment, gradient_ratio, losses, measured_ratio, run

SHORT = Settings(taus=(0.2, 2.0), shown=(0.2, 2.0), seeds=(0,), epochs=10, batch=224)


@pytest.fixture(scope="module")
def images() -> data.Images:
    return data.load("digits")


@pytest.fixture(scope="module")
def results(images: data.Images) -> Results:
    return run(SHORT, images)


@pytest.mark.parametrize("top_k", [None, 1, 7])
@pytest.mark.parametrize("tau", [0.05, 0.3, 2.0])
def test_gradient_ratio_is_autograds(tau: float, top_k: int | None):
    s = torch.rand(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    formula = gradient_ratio(s, tau, top_k)
    assert (measured_ratio(s, tau, top_k) - formula).abs().max() < 1e-12
    assert formula.sum().item() == pytest.approx(1)
    assert formula.count_nonzero() == (top_k or 40)


def test_gradient_ratio_is_exponential_in_similarity():
    s = torch.linspace(-1, 1, 21, dtype=torch.float64)
    for tau in (0.07, 1.0):
        assert torch.allclose(gradient_ratio(s, tau).log().diff(), s.diff() / tau)


def test_views(images: data.Images):
    still = dataclasses.replace(SHORT, degrees=0, shift=0, zoom=0, noise=0)
    generator = torch.Generator().manual_seed(0)
    x = images.train_x[:50]
    assert torch.allclose(augment(x, still, generator), x, atol=1e-5)
    shifted = augment(x, dataclasses.replace(still, shift=0.3), generator)
    mass = x.sum((1, 2, 3))
    columns = torch.arange(8.0)
    moved = ((shifted - x).sum((1, 2)) * columns).sum(1) / mass
    # At most 0.3 of half of the 8 pixels, to both sides; some of the digit may leave the picture.
    assert moved.max() > 0.5
    assert moved.min() < -0.5
    again = (augment(x, SHORT, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(*again)


def test_the_simple_loss_is_the_contrastive_at_infinite_temperature():
    a, b = torch.randn(2, 12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def gradient(loss: Loss, scale: float) -> torch.Tensor:
        x = a.clone().requires_grad_()
        (scale * loss(x, b, 0.25)).backward()
        return x.grad

    hot = 1e7
    # Of n negatives and a positive, the positive takes 1 / (n + 1) of the softmax: hence the factor.
    for hard, n in ((False, 11), (True, 3)):
        assert torch.allclose(gradient(Loss("contrastive", hard, hot), hot * (n + 1) / n), gradient(Loss("simple", hard), 1.0), atol=1e-6)


def test_training_without_labels_finds_the_classes(results: Results):
    (untrained,), (trained,) = results.of("untrained", False), results.of("contrastive", False, 0.2)
    assert trained.embedding_probe > untrained.embedding_probe + 0.02
    assert trained.uniformity < untrained.uniformity - 1


def test_hardness_keeps_the_embedding_uniform_at_a_high_temperature(results: Results):
    (cool,), (hot,) = (results.of("contrastive", False, tau) for tau in SHORT.taus)
    (hard_hot,), (simple,), (hard_simple,) = results.of("contrastive", True, 2.0), results.of("simple", False), results.of("simple", True)
    assert cool.uniformity < hot.uniformity - 0.2
    assert cool.tolerance < hot.tolerance
    assert cool.gap > hot.gap
    assert hard_hot.uniformity < hot.uniformity - 0.2
    assert hard_simple.uniformity < simple.uniformity - 0.4
    assert hard_simple.embedding_probe > simple.embedding_probe + 0.02


def made_up(uniformity: list[float], accuracy: list[float], simple: float) -> Results:
    """Plain results over three temperatures, the same for two seeds; hard ones that stay at the best."""
    settings = Settings(taus=(0.1, 0.3, 1.0), shown=(0.1, 1.0), seeds=(0, 1))
    runs = []
    for loss in losses(settings):
        i = settings.taus.index(loss.tau) if loss.kind == "contrastive" else 0
        u, value = (uniformity[i], accuracy[i]) if not loss.hard else (min(uniformity), max(accuracy))
        if loss.kind == "simple" and not loss.hard:
            value = simple
        for seed in settings.seeds:
            # A little apart, so that ranks exist.
            runs.append(Run(loss, seed, u, u / 100 + seed * 1e-6, value, value, torch.full((3,), 0.9), torch.full((3, 2), 0.1 * i)))
    return Results(settings, 0.9, runs)


def verdicts(results: Results) -> dict[str, str]:
    return {finding.claim.split(" (probe")[0]: finding.verdict for finding in temperature.findings(results)}


def test_verdicts_follow_the_numbers():
    like_the_article = verdicts(made_up([-3.0, -2.0, -1.0], [0.90, 0.95, 0.80], 0.7))
    reproduced = {claim for claim, verdict in like_the_article.items() if verdict == "reproduced"}
    # The positives do not depend on tau here.
    assert set(like_the_article) - reproduced == {"Plain: the larger τ, the nearer the positives are to similarity 1"}
    flat = verdicts(made_up([-1.0, -2.0, -3.0], [0.95, 0.949, 0.948], 0.945))
    for start in ("Plain: the larger τ, the less uniform", "Plain: accuracy", "Simple: much worse"):
        assert [verdict for claim, verdict in flat.items() if claim.startswith(start)] == ["not reproduced"]
    assert temperature.Finding("", "", "", (True, False)).verdict == "in 1 of 2 seeds"


def test_command_writes_its_files(tmp_path: Path):
    app = typer.Typer()
    app.command()(temperature.main)
    file = tmp_path / "small.npz"
    rng = np.random.default_rng(0)
    np.savez(file, features=rng.random((40, 4, 4)), labels=np.arange(40) % 2)
    arguments = ["--out", str(tmp_path), "--data", str(file), "--epochs", "1", "--batch", "8", "--seeds", "1"]
    outcome = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    for name in ("temperature.png", "temperature-similarity.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "results/temperature.md").read_text()
    assert text.count("reproduced** |") == len(temperature.findings(made_up([1, 2, 3], [1, 2, 3], 1)))
    assert all(f"| {name} |" in text for name in ("contrastive, τ = 0.2", "hard contrastive, τ = 0.2", "simple", "hard simple"))
    assert f"seeds 0; torch {torch.__version__}" in text

    refused = CliRunner().invoke(app, ["--out", str(tmp_path), "--top-share", "1.5"])
    assert refused.exit_code == 2
    assert "expected a share in (0, 1], got 1.5" in refused.output
