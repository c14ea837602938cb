"""The C++ engine by itself: every instruction set, number of threads and length of rows; sanitizers; how it is built or not."""

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_rule, tiles

import pairloss
from pairloss import cpu, engines, testing
from pairloss.ops import pair_sum, row_stats

ROOT = Path(__file__).parent.parent
needs_extension = pytest.mark.skipif(cpu._missing is not None, reason=f"pairloss._cpu: {cpu._missing}")


def missing_sanitizers() -> str | None:
    if shutil.which("g++") is None:
        return "no g++"
    for flag in ("-fsanitize=address,undefined", "-fsanitize=thread"):
        command = ["g++", "-x", "c++", flag, "-", "-o", os.devnull]
        if subprocess.run(command, input="int main() {}", text=True, capture_output=True).returncode != 0:
            return f"g++ has no library for {flag}"
    return None


FORMS = ("self", "self-circle", "two-cutoff", "positives", "negatives")


def run(form: str, n: int, d: int, dtype: torch.dtype, backend: str, product_dtype: torch.dtype) -> list[torch.Tensor]:
    """What a form of the primitive gives, with its gradients."""
    generator = torch.Generator().manual_seed(n + d)
    x, y = (torch.randn(size, d, generator=generator, dtype=torch.float64).div_(d**0.5) for size in (n, n + 9))
    bias, ids = torch.randn(n, generator=generator, dtype=torch.float64), torch.randint(0, 4, (n + 9,), generator=generator)
    leaves = [v.to(dtype).requires_grad_() for v in (x, y, bias)]
    x, y, bias = leaves
    how = {"product_dtype": product_dtype, "backend": backend}
    if form.startswith("self"):
        score = {"score": "circle", "m": 0.25, "gamma": 8.0} if "circle" in form else {}
        out = row_stats(x, None, ids[:n], self_offset=0, row_bias=bias, **score, **how)[0]
        out = out + 0 * y.sum()
    elif form == "two-cutoff":
        both = row_stats(x, y, None, None, 3, bias, cutoff=torch.tensor(-0.1, dtype=dtype), both_sides=True, **how)
        out = torch.cat(both, 1)
    else:
        out = pair_sum(x, y, ids[:n], ids, 3, bias, over=form, **how)
    weights = torch.linspace(0.5, 1.5, out.numel(), dtype=dtype).view_as(out)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)]


def assert_right(form: str, n: int, d: int, dtype: torch.dtype) -> None:
    numbers = torch.float32 if dtype == torch.bfloat16 else dtype
    truth = run(form, n, d, torch.float64, "reference", dtype)
    eager = run(form, n, d, numbers, "reference", dtype)
    for name, *values in zip(("values", "dx", "dy", "dbias"), run(form, n, d, numbers, "cpu", dtype), truth, eager, strict=True):
        assert_rule(name, *values, dtype if name in ("dx", "dy") else numbers)


HERE = [] if cpu._missing else cpu._cpu.targets()


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("target", ["amx", "avx512bf16", "avx512", "avx2", "baseline"])
def test_every_instruction_set_of_this_processor(target, form, dtype):
    if target not in HERE:
        pytest.skip(f"this processor lacks {target}, or this build")
    cpu._cpu.use_target(target)
    try:
        with tiles(32):
            assert_right(form, 101, 37, dtype)
    finally:
        cpu._cpu.use_target("")


@needs_extension
@pytest.mark.parametrize("target", ["avx1024", *sorted({"amx", "avx512bf16", "avx512", "avx2"} - set(HERE))])
def test_an_instruction_set_that_is_not_there_is_refused(target):
    with pytest.raises(ValueError, match=r"target: expected one of pairloss\._cpu\.targets"):
        cpu._cpu.use_target(target)


@needs_extension
def test_the_best_instruction_set_that_linux_lists_is_used():
    if not Path("/proc/cpuinfo").exists() or platform.machine() != "x86_64":
        pytest.skip("no list of an x86 processor's instruction sets")
    described = Path("/proc/cpuinfo").read_text()
    flags = set(re.search(r"^flags\s*: (.*)", described, re.MULTILINE)[1].split())
    avx512 = {"avx512f", "avx512dq", "avx512vl"}
    needs = {"amx": {"amx_tile", "amx_bf16"} | avx512, "avx512bf16": {"avx512_bf16"} | avx512, "avx512": avx512, "avx2": {"avx2", "fma"}}
    expected = [*(target for target, of in needs.items() if of <= flags), "baseline"]
    if "amx" in expected and ctypes.CDLL(None).syscall(158, 0x1023, 18) != 0:  # arch_prctl: a sandbox that refuses its registers
        expected.remove("amx")
    if "GenuineIntel" in described and "avx512bf16" in expected:  # where it takes longer than avx512
        expected.remove("avx512bf16")
        expected.insert(expected.index("avx512") + 1, "avx512bf16")
    assert expected == HERE


AVX512 = ("-mavx512f", "-mavx512dq", "-mavx512vl", "-mfma")
INSTRUCTIONS = {
    "vdpbf16ps-emulated": (None, ["-DPAIRLOSS_EMULATED"]),
    "vdpbf16ps": ("avx512bf16", [*AVX512, "-mavx512bf16"]),
    "tdpbf16ps-emulated": (None, ["-DPAIRLOSS_EMULATED", "-DPAIRLOSS_AMX"]),
    "tdpbf16ps": ("amx", [*AVX512, "-mamx-tile", "-mamx-bf16", "-DPAIRLOSS_AMX"]),
}


def by_instruction(name: str, given: torch.Tensor, tmp_path: Path) -> torch.Tensor:
    """What tests/bfloat16.cpp makes of the numbers."""
    target, flags = INSTRUCTIONS[name]
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    if target is not None and target not in HERE:
        pytest.skip(f"this processor lacks {target}, or this build")
    program, numbers, results = tmp_path / "program", tmp_path / "in", tmp_path / "out"
    command = ["g++", "-std=c++20", "-O1", "-ffp-contract=off", *flags, "tests/bfloat16.cpp", "-o", str(program)]
    subprocess.run(command, cwd=ROOT, check=True)
    numbers.write_bytes(given.numpy().tobytes())
    subprocess.run([str(program), str(numbers), str(results)], check=True)
    return torch.from_numpy(np.fromfile(results, np.float32))


def normal(numbers: torch.Tensor) -> torch.Tensor:
    return torch.where(numbers.abs() < torch.finfo(torch.float32).tiny, 0, numbers)


def wide_numbers(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator) * 10 ** torch.randint(-3, 4, shape, generator=generator)


@pytest.mark.parametrize("name", ["vdpbf16ps-emulated", "vdpbf16ps"])
def test_the_bfloat16_instruction_rounds_as_torch_does(tmp_path, name):
    """Bit for bit, so that the emulation that other tests run on is what the processor does: terms to bfloat16, to the nearest and ties to
    even; then upper and lower halves after one another, in float32; denormals are 0."""
    v = wide_numbers(4000, 5)
    tie = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, -0x407E8000]).int().view(torch.float32)  # between two numbers of bfloat16
    v[: len(tie)] = torch.stack([torch.zeros(4), tie, torch.zeros(4), torch.ones(4), torch.ones(4)], 1)
    nan, inf = torch.nan, torch.inf
    v[4:14] = torch.tensor(
        [[0, nan, 1, 1, 1], [0, 0, 1, 1, 1], [0, 1, inf, 1, 1], [0, 1, 1, 1, inf], [0, inf, 1, 0, 1], [0, 1e-40, 1, 1e30, 0],
         [2**-127, 0, 2**-63, 0, 2**-63], [0, 1e-20, 0, 1e-20, 0], [1, 2**-24, 2**-24, 1, 1], [3e38, 3e38, -3e38, 1, 1]]
    )  # fmt: skip
    v[5, 1] = torch.tensor(0x7FFFFFFF).int().view(torch.float32)  # the NaN that rounding as a number would make -0
    total, terms = normal(v[:, 0]), normal(v[:, 1:].bfloat16().float())
    for first, second in ((1, 3), (0, 2)):
        total = normal(total + terms[:, first] * terms[:, second])
    torch.testing.assert_close(by_instruction(name, v, tmp_path), total, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["tdpbf16ps-emulated", "tdpbf16ps"])
def test_the_tile_instruction_adds_up_as_its_emulation_does(tmp_path, name):
    """Bit for bit: the sums of the lower and of the upper halves' products, in the order of the pairs; their sum is added to the total.
    Denormals are 0."""
    total, *pairs = wide_numbers(3, 40, 16, 16, 2)
    terms = [v.bfloat16() for v in pairs]  # [tile, row, column, half]
    terms[0][0, 0, :3, 0] = torch.tensor([torch.inf, torch.nan, 1e-40]).bfloat16()
    terms[0][1] *= 1e-20
    terms[1][1] *= 1e-20
    given = torch.stack([total[..., 0], *(v.contiguous().view(torch.float32)[..., 0] for v in terms)], 1)
    left, right = (normal(v.float()) for v in terms)
    halves = torch.zeros(2, 40, 16, 16)
    for k in range(16):
        for half in range(2):
            halves[half] = normal(halves[half] + left[:, :, k, None, half] * right[:, None, k, :, half])
    expected = normal(normal(given[:, 0]) + normal(halves[0] + halves[1]))
    torch.testing.assert_close(by_instruction(name, given, tmp_path).view(expected.shape), expected, rtol=0, atol=0, equal_nan=True)


@needs_extension
@pytest.mark.parametrize("d", [8, 128, 700])
@pytest.mark.parametrize("target", HERE)
def test_float32_products_are_as_exact_as_the_librarys(target, d):
    """Against float64, root mean squares; also where numbers of bfloat16 are multiplied."""
    x, y = torch.randn(2, 512, d, generator=torch.Generator().manual_seed(d))
    truth, theirs = (x.double() @ y[0].double()), (x @ y.T)[:, 0]
    cpu._cpu.use_target(target)
    try:
        ours = pair_sum(x, y[:1], None, None, over="negatives", term="linear", backend="cpu")  # of one pair: its logit
    finally:
        cpu._cpu.use_target("")

    def error(z: torch.Tensor) -> float:
        return (z - truth).square().mean().sqrt().item()

    assert error(ours) <= 1.2 * error(theirs)


@needs_extension
@pytest.mark.parametrize("target", HERE)
def test_a_pair_has_one_logit(target):
    """z_ij and z_ji have the same bits, whichever is x: where a tile stands for its transpose they are one number."""
    cpu._cpu.use_target(target)
    try:
        for x in torch.randn(2000, 2, 100, generator=torch.Generator().manual_seed(0)):  # orders of adding up differ in one of 400
            first, second = pair_sum(x, None, None, None, 0, over="negatives", term="linear", backend="cpu")
            assert first == second
    finally:
        cpu._cpu.use_target("")


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("n", "d"), [(530, 5), (30, 600)], ids=["shipped tiles", "long rows"])
def test_sizes_at_which_the_work_is_split(n, d, form, dtype):
    """More rows than a shipped tile has, and more columns than one stretch of a product."""
    assert_right(form, n, d, dtype)


@needs_extension
@pytest.mark.parametrize("form", FORMS)
def test_float64_rows_rounded_to_bfloat16(form):
    ours, truth = (run(form, 20, 8, torch.float64, backend, torch.bfloat16) for backend in ("cpu", "reference"))
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


@needs_extension
@pytest.mark.parametrize("target", HERE)
def test_gradients_from_sums_that_grew_in_other_calls(target):
    """As over ranks: this call's logits need no shift, its anchors' log-sums lie far from them, and in the other set have no gradient."""
    x, y, ids = torch.tensor([[1.0, 0]]), torch.tensor([[18.7, 0], [10, 0], [-70, 0], [5, 0]]), torch.tensor([1, -1, 0, 3])
    everything, half = (engines.Call(x, y[:n], None, torch.tensor([0]), ids[:n], None, None, None, torch.float32) for n in (4, 2))
    grads = torch.tensor([[1.0], [0]])
    cpu._cpu.use_target(target)
    try:
        _, _, row_sums, col_sums = cpu.row_stats_fwd(everything)
        ours = cpu.row_stats_bwd(half, row_sums, grads, col_sums, grads[:, :0], [True, True, False, False, False])
    finally:
        cpu._cpu.use_target("")
    assert torch.equal(ours[0], torch.zeros(1, 2))
    assert torch.equal(ours[1], torch.zeros(2, 2))


@needs_extension
@pytest.mark.parametrize("loss", ["snnl", "clip", "siglip", "circle", "supcon"])
def test_the_same_bits_for_any_number_of_threads(loss):
    spec = testing.LOSSES[loss]
    sample = spec.sample(700, 24, 0, spec.options[0]).to(torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4, 7):
            torch.set_num_threads(threads)
            with tiles(64):  # 11 x 11
                results.append(sample.run(spec.function, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    for loss_value, grads in results[1:]:
        # O(N) steps around the engine are torch's, and may be split by threads: the gradient of a scalar is such a sum.
        assert all(torch.equal(grad, results[0][1][name]) for name, grad in grads.items() if grad.ndim > 0)
        torch.testing.assert_close(loss_value, results[0][0], rtol=1e-6, atol=0)


def test_without_the_extension_the_tiles_of_torch_serve(monkeypatch):
    monkeypatch.setattr(cpu, "_missing", "no such file")
    features, labels = torch.randn(9, 4), torch.arange(9) % 3
    call = engines.Call(features, None, None, labels, None, 0, None, None, torch.float32)
    assert engines.choose(call, None).__name__ == "pairloss.tiled"
    with pytest.raises(RuntimeError, match=r"backend='cpu' can't run here: the extension pairloss._cpu is not built \(no such file\)"):
        pairloss.snnl(features, labels, 0.1, backend="cpu")


def build_without_compiler(tmp_path: Path, wanted: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    environment = os.environ | {"CXX": "/nonexistent/c++", "PAIRLOSS_CPU": wanted, "PAIRLOSS_CUDA": "0"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_an_install_without_compiler_says_in_a_paragraph_what_it_lacks(tmp_path):
    done = build_without_compiler(tmp_path, "")
    assert done.returncode == 0, done.stderr
    assert 'the C++ engine "cpu" was not built' in done.stderr
    assert "C++20 compiler" in done.stderr
    assert len(done.stderr.splitlines()) < 12
    assert not list((tmp_path / "lib").glob("**/*.so"))


def test_an_extension_that_is_demanded_must_build(tmp_path):
    done = build_without_compiler(tmp_path, "1")
    assert done.returncode != 0
    assert "was not built" in done.stderr
    assert "was not built" not in build_without_compiler(tmp_path, "0").stderr


def test_an_install_without_pybind11_says_so(tmp_path, monkeypatch):
    (tmp_path / "pybind11.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = build_without_compiler(tmp_path, "")
    assert done.returncode == 0, done.stderr
    assert "pybind11 was not found." in done.stderr


ADDRESS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
BUILDS = {
    "address": (*ADDRESS, "-DPAIRLOSS_EMULATED"),
    "thread": ("-fsanitize=thread", "-DPAIRLOSS_EMULATED"),
    "wide": ("-DPAIRLOSS_WIDE", "-DPAIRLOSS_EMULATED"),  # vectors of 64 bytes, as for AVX-512, on any processor
    "tiles": (*ADDRESS, "-DPAIRLOSS_AMX", "-DPAIRLOSS_EMULATED"),
    "floats": (),  # bfloat16 rows multiplied as floats; in the others by emulated instructions
}


BYTES = {8: torch.float64, 4: torch.float32, 2: torch.bfloat16}


def build_every_form(tmp_path: Path, builds: dict[str, tuple[str, ...]], compiler: str = "g++") -> None:
    """tests/every_form.cpp in these builds, side by side; no OpenMP, whose library thread sanitizers don't know."""
    sources = ["tests/every_form.cpp", *(f"csrc/cpu/{name}.cpp" for name in ("engine", "targets", "kernels"))]
    flags = [
        "-std=c++20",
        "-O1",
        "-ffp-contract=off",
        "-DPAIRLOSS_TARGET=baseline",
        "-DPAIRLOSS_THREAD_FLOPS=1",
        "-pthread",
        "-Wno-psabi",
    ]
    command = [compiler, *flags, *sources]
    running = [subprocess.Popen([*command, *of_build, "-o", str(tmp_path / build)], cwd=ROOT) for build, of_build in builds.items()]
    assert {build.wait() for build in running} == {0}


def every_form(tmp_path: Path, build: str, threads: int, *emulator: str) -> list[tuple[torch.dtype, float, torch.Tensor]]:
    """What a build computes, each array with what its errors are measured by."""
    out = tmp_path / f"{build}.bin"
    done = subprocess.run([*emulator, str(tmp_path / build), str(out), str(threads)], capture_output=True, text=True)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("this thread sanitizer does not know this kernel's address space")
    assert done.returncode == 0, done.stderr[:3000]
    numbers, arrays = torch.from_numpy(np.fromfile(out)), []
    while len(numbers):
        size = int(numbers[2])
        arrays.append((BYTES[int(numbers[0])], float(numbers[1]), numbers[3 : 3 + size]))
        numbers = numbers[3 + size :]
    return arrays


def test_sanitizers_and_wide_vectors(tmp_path):
    """No access out of bounds, no undefined behaviour, no race; the same bits for 2 and 4 threads; vectors of 64 bytes and tiles compute
    the same, and so do products of bfloat16 by their instructions, but for weights rounded to it."""
    reason = missing_sanitizers()
    if reason is not None:
        pytest.skip(reason)
    build_every_form(tmp_path, BUILDS)
    results = {build: every_form(tmp_path, build, threads) for build, threads in zip(BUILDS, (2, 4, 3, 3, 1), strict=True)}
    assert len(results["address"]) > 1000
    for (dtype, scale, a), (_, _, b), (_, _, wide), (_, _, tiled), (_, _, floats) in zip(*results.values(), strict=True):
        assert torch.isfinite(a).all()
        assert torch.equal(a, b)
        if len(a):
            assert (a - wide).abs().max() <= testing.FLOORS[torch.float32 if dtype == torch.bfloat16 else dtype] * scale
            assert (a - tiled).abs().max() <= testing.FLOORS[dtype] * scale
            assert (a - floats).abs().max() <= testing.FLOORS[dtype] * scale
    for build in ("address", "tiles"):
        gradients = [
            (v, floats)
            for (dtype, _, v), (_, _, floats) in zip(results[build], results["floats"], strict=True)
            if dtype == torch.bfloat16 and v.any()
        ]
        assert sum(not torch.equal(*both) for both in gradients) > len(gradients) / 2  # weights were rounded: the instruction was used


ARM_COMPILER, ARM = "aarch64-linux-gnu-g++", "qemu-aarch64"


def test_arm_computes_the_same(tmp_path):
    """NEON, optimised as it is shipped, in an emulator."""
    for program in (ARM_COMPILER, ARM):
        if shutil.which(program) is None:
            pytest.skip(f"no {program}, which NEON needs on another processor (apt-get install g++-aarch64-linux-gnu qemu-user)")
    build_every_form(tmp_path, {"floats": ()})
    build_every_form(tmp_path, {"arm": ("-static", "-O3", "-ffp-contract=fast")}, ARM_COMPILER)
    here, arm = every_form(tmp_path, "floats", 1), every_form(tmp_path, "arm", 2, ARM)
    assert len(here) > 1000
    for (dtype, scale, ours), (_, _, theirs) in zip(here, arm, strict=True):
        assert torch.isfinite(theirs).all()
        if len(ours):
            assert (ours - theirs).abs().max() <= testing.FLOORS[dtype] * scale
