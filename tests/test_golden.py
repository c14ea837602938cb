"""The well-known implementations' loss and gradient in float64: tests/golden, and more if PAIRLOSS_GOLDEN names a folder."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import INTERPRETED, RUNNABLE, TILES, assert_rule, tiles, why_not

import pairloss

pytestmark = pytest.mark.engines

FOLDERS = [Path(__file__).parent / "golden", *(Path(folder) for folder in [os.environ.get("PAIRLOSS_GOLDEN")] if folder)]
FILES = sorted({path.stem: path for folder in FOLDERS for path in folder.glob("snnl_[cs]*.npz")}.values(), key=lambda path: path.stem)


def interpretable(path: Path, tile: int | None) -> bool:
    """The interpreter takes milliseconds for each step of each tile: no more than about 20 of them."""
    rows = int(path.stem.split("__n")[1].split("_")[0]) if "__n" in path.stem else 4
    return rows <= (16 if tile == 4 else 64)


CASES = [(path, tile) for path in FILES for tile in TILES if not INTERPRETED or interpretable(path, tile)]


def load(path: Path) -> dict[str, torch.Tensor]:
    with np.load(path, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def run(arrays: dict[str, torch.Tensor], path: Path, dtype: torch.dtype, engine, backend: str):
    x = arrays["x"].to(engine.device, dtype).requires_grad_()
    options = {"metric": "cosine" if "_cosine_" in path.stem else "sqeuclidean", "eps": arrays["param_eps"].item(), "backend": backend}
    labels = arrays["y_labels"].to(engine.device)
    loss = pairloss.snnl(x, labels, arrays["param_T"].item(), **options)
    loss.backward()
    per_row = pairloss.snnl(x.detach(), labels, arrays["param_T"].item(), reduction="none", **options)
    return loss.detach(), x.grad, per_row


def test_golden_files_are_there():
    assert len(FILES) >= 17


@pytest.mark.parametrize(("path", "tile"), CASES, ids=lambda v: v.stem if isinstance(v, Path) else f"tile-{v or 'shipped'}")
@pytest.mark.parametrize("engine", RUNNABLE, ids=lambda engine: "-".join(engine))
def test_golden(engine, path, tile):
    arrays = load(path)
    expected = [arrays[name] for name in ("loss_diag0", "grad_x_diag0", "per_row_diag0")]
    if why_not(engine, torch.float64) is None:
        with tiles(tile):
            loss, grad, per_row = run(arrays, path, torch.float64, engine, engine.name)
        # Of what passes for zero: -log(1e-5) + log(1 + 1e-5) of one class at T = 100, gradients of an underflow.
        torch.testing.assert_close(loss.cpu(), expected[0], rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(per_row.cpu(), expected[2], rtol=1e-10, atol=1e-14)
        scale = expected[1].abs().max().item()
        assert (grad.cpu() - expected[1]).abs().max() <= max(1e-10 * scale, 1e-16)
    else:
        dtype = torch.float32
        with tiles(tile):
            ours = run(arrays, path, dtype, engine, engine.name)
        eager = run(arrays, path, dtype, engine, "reference")
        # At T = 100 with one class the gradient is the rounding of a float32 sum of ones.
        for name, a, b, c in zip(("loss", "gradient", "per row"), ours, expected, eager, strict=True):
            assert_rule(name, a, b, c, dtype)
