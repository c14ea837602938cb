"""Which engines and devices the tests run on, and NaN in every tensor that is allocated but not written."""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import contextlib
import importlib.util
import types
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import pytest
import torch

from pairloss import engines, operands, testing

# The tests are many and small: threads would only wait for one another.
torch.set_num_threads(1)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TILES = (4, 16, None)  # None: as shipped


class Engine(NamedTuple):
    name: str
    device: str


def call_of(device: str, dtype: torch.dtype) -> engines.Call:
    x = torch.zeros(2, 2, device=device, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    ids = torch.zeros(2, device=device, dtype=torch.long)
    return engines.Call(x, None, None, ids, None, 0, None, None, dtype)


def why_not(engine: Engine, dtype: torch.dtype = torch.float32) -> str | None:
    if engine.name == engines.REFERENCE:
        return None
    return engines.load(engine.name).why_not(call_of(engine.device, dtype))


def runnable() -> list[Engine]:
    """Every engine that can run here; under TRITON_INTERPRET=1 only triton, whose tests then are a process of their own."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    names = ["triton"] if INTERPRETED else list(engines.BACKENDS)
    return [engine for device in devices for engine in (Engine(name, device) for name in names) if why_not(engine) is None]


RUNNABLE = runnable()
TILED = [engine for engine in RUNNABLE if engine.name != engines.REFERENCE]
ON_CPU = [engine.name for engine in TILED if engine.device == "cpu"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "engines: runs on every engine; repeated under TRITON_INTERPRET=1")
    config.addinivalue_line("markers", "slow: only in make test-all")


def pytest_report_header() -> list[str]:
    lines = [f"engines under test: {', '.join(f'{name} ({device})' for name, device in RUNNABLE)}"]
    for name in engines.ENGINES:
        reason = why_not(Engine(name, "cpu"))
        if reason is not None:
            lines.append(f"engine {name} is not tested on cpu: {reason}")
    return lines


def patch_the_language_once_a_launch() -> None:
    """Triton's interpreter puts its own functions into the language for each call, and for each call of a function within it, where they
    are already: four tenths of its time."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, []
    everything = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})  # the modules that a function may know it by

    class Scope(interpreter._LangPatchScope):
        def restore(self) -> None:
            patched.pop().restore()

    def patch_lang(fn):
        if patched:
            return interpreter._LangPatchScope()  # nothing was changed
        patched.append(patch(everything))
        return Scope()

    interpreter._patch_lang = patch_lang


if INTERPRETED and importlib.util.find_spec("triton") is not None:
    patch_the_language_once_a_launch()


@pytest.fixture(autouse=True)
def _nan_in_unwritten_memory():
    """Deterministic mode fills what torch.empty and its kin return with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def tiles(n: int | None) -> Iterator[None]:
    """Tiles of n rows, several for each program of a GPU; None: as shipped."""
    if n is None:
        yield
    else:
        with testing.tile_size(n), mock.patch.object(operands, "GROUPS", 2):
            yield


def assert_rule(name: str, ours: torch.Tensor, truth: torch.Tensor, eager: torch.Tensor, dtype: torch.dtype, terms: float = 0.0) -> None:
    error, bound = testing.error_and_bound(ours.cpu(), truth.cpu(), eager.cpu(), dtype, terms)
    assert error <= bound, f"{name}: error {error:.3e} > {bound:.3e} ({dtype}, largest value {truth.abs().max():.3e})"


def assert_same_loss_and_gradients(sample: testing.Sample, ours, truth, eager, dtype: torch.dtype) -> None:
    """Each a result of Sample.run."""
    assert_rule("loss", ours[0], truth[0], eager[0], dtype)
    terms = sample.terms(truth[1])
    for name, grad in ours[1].items():
        assert grad.dtype == dtype
        assert_rule(f"gradient of {name}", grad, truth[1][name], eager[1][name], dtype, terms[name])


def skip_if_unable(engine: Engine, dtype: torch.dtype) -> None:
    reason = why_not(engine, dtype)
    if reason is not None:
        pytest.skip(f"{engine.name}: {reason}")
