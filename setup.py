"""Builds the compiled engines with CMake; where one can't be built, pairloss installs without it and another serves in its place."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
WITHOUT = {
    "cpu": "the slower PyTorch tiles will serve in its place.",
    "cuda": "Triton's kernels or the PyTorch tiles will serve in its place.",
}
NEEDS = {
    "cpu": "CMake 3.24 or newer, a C++20 compiler (GCC 11, Clang 14 or newer) and the headers of this Python",
    "cuda": "what the CPU's needs, and nvcc of CUDA 12 or newer that knows the GPUs in CMAKE_CUDA_ARCHITECTURES",
}
FAILED = """
pairloss: the C++ engine "{engine}" was not built, and {without}
{reason}
It needs {needs}. {variable}=0 skips it, {variable}=1 makes this an error.
"""


class CMakeBuild(build_ext):
    def build_extension(self, extension: Extension) -> None:
        engine = extension.name.rpartition("_")[2]
        variable = f"PAIRLOSS_{engine.upper()}"
        wanted = os.environ.get(variable, "")
        if wanted == "0" or (engine == "cuda" and wanted != "1" and not has_nvcc()):
            return
        target = Path(self.get_ext_fullpath(extension.name)).parent.absolute()
        with tempfile.TemporaryDirectory() as build:
            reason = run_cmake(engine, Path(build), target)
        if reason is not None:
            message = FAILED.format(engine=engine, without=WITHOUT[engine], reason=reason, needs=NEEDS[engine], variable=variable)
            if wanted == "1":
                raise SystemExit(message)
            print(message, file=sys.stderr)


def has_nvcc() -> bool:
    """As CMake looks for it."""
    names = [os.environ.get("CUDACXX", ""), "nvcc", "/usr/local/cuda/bin/nvcc"]
    return any(shutil.which(name) for name in names if name)


def run_cmake(engine: str, build: Path, target: Path) -> str | None:
    """None, or why there is no extension."""
    try:
        import pybind11
    except ImportError:
        return "pybind11 was not found."
    configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DCMAKE_INSTALL_PREFIX={target}", f"-DPAIRLOSS_ENGINE={engine}"]
    if "CMAKE_CUDA_ARCHITECTURES" in os.environ:
        configure.append(f"-DCMAKE_CUDA_ARCHITECTURES={os.environ['CMAKE_CUDA_ARCHITECTURES']}")
    # Build requirements that were installed beside this Python come first.
    environment = os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])}
    for command in (configure, ["cmake", "--build", str(build)], ["cmake", "--install", str(build)]):
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
        except FileNotFoundError:
            return f"{command[0]} was not found."
        if done.returncode != 0:
            lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if re.search(r"\b[Ee]rror\b", line)]
            return f"`{' '.join(command[:2])}` failed: {' '.join(lines[:3])}"
    return None


setup(
    ext_modules=[Extension(f"pairloss._{engine}", sources=[], optional=True) for engine in WITHOUT],
    cmdclass={"build_ext": CMakeBuild},
)
