"""The kernels of the engine "cuda" without a GPU: their source runs on the CPU, against float64 and under sanitizers."""

import os
import re
import subprocess
import sys

import cuda_host
import pytest
import test_kernels
import test_matrix
import test_pair_sum
import test_row_stats
import torch
from conftest import DTYPES, INTERPRETED, Engine

from pairloss import cuda, operands
from pairloss.ops import row_stats

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter has nothing to do with it"),
    pytest.mark.skipif(cuda_host.why_not() is not None, reason=f"the host build: {cuda_host.why_not()}"),
]
ENGINE = Engine("cuda", "cpu")
FLOATS = (torch.float64, torch.float32)


@pytest.fixture
def host():
    module = cuda_host.load(cuda_host.build())
    with cuda_host.in_place_of_the_gpu(module):
        yield module


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("option", test_row_stats.OPTIONS)
def test_statistics_and_gradients(host, option, dtype):
    test_row_stats.test_statistics_and_gradients(ENGINE, option, dtype, None)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("option", "over", "term"), test_pair_sum.TERM_CASES)
def test_sums_and_gradients(host, option, over, term, dtype):
    test_pair_sum.test_sums_and_gradients(ENGINE, option, over, term, dtype, None)


WITH_PAIRS = [case for case in test_matrix.CASES if case[0] not in ("alignment", "tolerance", "simple_contrastive")]
# (1, 2): no pairs. (70, 5) with the hook: in label order, tiles of one set and of both.
SHAPES = [*((33, 16, None, dtype) for dtype in DTYPES), (1, 2, None, torch.float32), (70, 5, 4, torch.float32)]


@pytest.mark.parametrize(("n", "d", "tile", "dtype"), SHAPES, ids=str)
@pytest.mark.parametrize(("loss", "option"), WITH_PAIRS)
def test_loss_and_gradients(host, loss, option, dtype, n, d, tile):
    test_matrix.check(ENGINE, loss, option, n, d, dtype, tile)


@pytest.mark.parametrize("d", [1, 127, 300, 1025])
def test_widths(host, d):
    """One chunk of columns and many, in one and in several blocks."""
    test_matrix.test_widths(ENGINE, d)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("primitive", ["circle", "positives", "negatives"])
def test_wide_rows(host, primitive, dtype):
    test_kernels.test_wide_rows(ENGINE, primitive, dtype)


def test_half_rows_by_multiply_adds():
    """As GPUs of capability 7.5 multiply them: this file's tests of half rows, which this isn't by its name, again."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "float16"]
    done = subprocess.run(command, env=os.environ | {"PAIRLOSS_HOST_CAPABILITY": "75"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 100, done.stdout[-4000:]


@pytest.mark.parametrize("form", test_kernels.far_apart())
def test_logits_far_apart(host, form):
    test_kernels.test_logits_far_apart(ENGINE, form)


@pytest.mark.parametrize("ends", [(-300, 300), (0, 40)], ids=str)
def test_sums_are_more_exact_than_their_logarithms(host, ends):
    test_kernels.test_sums_are_more_exact_than_their_logarithms(ENGINE, ends)


@pytest.mark.parametrize("over", ["positives", "negatives"])
def test_softplus_keeps_its_digits(host, over):
    test_kernels.test_softplus_keeps_its_digits(ENGINE, over)


@pytest.mark.parametrize("bounded", [True, False])
def test_totals_of_groups(host, bounded):
    test_kernels.test_totals_of_groups(ENGINE, bounded)


@pytest.mark.parametrize("n", [1, 70, 3000])
def test_scale_of_weights(host, n):
    test_kernels.test_scale_of_weights(ENGINE, n, torch.float32)


class Counted:
    """A module whose functions are counted as they are taken."""

    def __init__(self, module) -> None:
        self.module, self.number = module, 0

    def __getattr__(self, name: str):
        value = getattr(self.module, name)
        self.number += name not in ("tile", "entries", "device_type") and not isinstance(value, type)
        return value


def test_ranges_are_found_once_for_each_size(host, monkeypatch):
    """The shipped tiles of half and float rows are square: half the launches of these, where the tests' blocks are not."""
    counted = Counted(host)
    monkeypatch.setattr(cuda, "_cuda", counted)
    side = cuda._Side(torch.zeros(70, 16), torch.arange(70, dtype=torch.int32), None, torch.ones(2, 2, 70))
    for tile in (32, 16, 32):
        assert side.id_ranges(tile).tolist() == [[*range(0, 70, tile)], [*range(tile - 1, 69, tile), 69]]
        assert side.weight_ranges(tile).eq(1).all()
    side.native(32)
    assert counted.number == 4


@pytest.mark.parametrize(("form", "operations", "kernels"), [("snnl", 9, 15), ("snnl in label order", 13, 15), ("clip", 17, 27)])
def test_launches_of_a_step(host, monkeypatch, form, operations, kernels):
    counted = Counted(host)
    monkeypatch.setattr(cuda, "_cuda", counted)
    assert test_kernels.count_operations(ENGINE, form) <= operations
    assert counted.number <= kernels


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("product_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows(host, dtype, product_dtype, ordered):
    test_kernels.test_rows(ENGINE, dtype, product_dtype, ordered)


def test_entries(host):
    """That a kernel takes as many as Python makes room for."""
    assert host.entries == operands.ENTRIES


@pytest.mark.parametrize("tau", [0.001, 1.0])
@pytest.mark.parametrize("metric", ["cosine", "dot", "sqeuclidean"])
@pytest.mark.parametrize("kind", ["number", "tensor"])
def test_any_temperature(host, kind, metric, tau):
    test_matrix.test_any_temperature(ENGINE, torch.float32, metric, tau, kind)


@pytest.mark.parametrize("scale", [1e5, 1e12])
def test_logits_of_any_size(host, scale):
    test_matrix.test_logits_of_any_size(ENGINE, "sqeuclidean", 1e-8, scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_input_same_bits(host, dtype):
    test_matrix.test_same_input_same_bits(ENGINE, dtype)


def test_nan_stays(host):
    """In what it is part of, also where a maximum drops it."""
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    x[33] = torch.nan
    x.requires_grad_()
    ours, truth = (row_stats(x, ids_x=torch.arange(40) % 2, self_offset=0, backend=backend)[0] for backend in ("cuda", "reference"))
    assert torch.equal(ours.isnan(), truth.isnan())
    grads = [torch.autograd.grad(rows[rows.isnan()].sum(), x)[0] for rows in (ours, truth)]
    assert torch.equal(grads[0].isnan(), grads[1].isnan())


def test_operands_that_do_not_fit_are_refused_by_name(host):
    side = host.Side(n=4, rows=8, ids=0, id_ranges=0, bias=0, weights=0, weight_ranges=0)
    options = {"symmetric": True, "sets": 1, "words": 0, "self_offset": None, "circle": False, "margin": 0.0, "gamma": 1.0}
    options |= {"cutoff": 0, "stream": host.Stream(0, 0)}
    with pytest.raises(ValueError, match="row_stats: d must be a multiple of the chunk"):
        host.row_stats("float32", host.Call(x=side, y=side, d=5, **options), 16, 16, 0, 0, 1, 1, False)
    with pytest.raises(ValueError, match="row_stats: rows must lie on 16 bytes"):
        host.row_stats("float32", host.Call(x=side, y=side, d=32, **options), 16, 16, 0, 0, 1, 1, False)
    with pytest.raises(ValueError, match="row_stats_backward: weights are missing"):
        host.gradients("float32", host.Call(x=side, y=side, d=32, **options), "exp", 1, 0, 1, 16, 0, 0)
    with pytest.raises(ValueError, match="no kernels for int8"):
        host.tile("int8")


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_sanitizer_is_silent(sanitizer):
    """thread: no race and no missing barrier. address: nothing beyond the memory of a launch, shared or global."""
    library = subprocess.run(["c++", f"-print-file-name=lib{sanitizer[0]}san.so"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(library):
        pytest.skip(f"the compiler has no {sanitizer} sanitizer")
    module = cuda_host.build(sanitizer)
    # Leaks: Python's own. exitcode: of a report, by both.
    options = {"LD_PRELOAD": library, "ASAN_OPTIONS": "detect_leaks=0:exitcode=66", "TSAN_OPTIONS": "exitcode=66"}
    done = subprocess.run([sys.executable, cuda_host.__file__, str(module)], env=os.environ | options, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "WARNING" not in done.stderr, done.stderr[-4000:]
