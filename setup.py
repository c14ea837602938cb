"""Builds the compiled engines with CMake; where that can't be done, pairloss installs without them and its PyTorch tiles serve."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
FAILED = """
pairloss: the C++ engine for the CPU was not built, and the PyTorch tiles will serve in its place (two to four times slower).
{reason}
It needs CMake 3.24 or newer, a C++20 compiler (GCC 11, Clang 14 or newer) and the headers of this Python. PAIRLOSS_CPU=0 skips it,
PAIRLOSS_CPU=1 makes this an error.
"""


class CMakeBuild(build_ext):
    def build_extension(self, extension: Extension) -> None:
        wanted = os.environ.get("PAIRLOSS_CPU", "")
        if wanted == "0":
            return
        target = Path(self.get_ext_fullpath(extension.name)).parent.absolute()
        with tempfile.TemporaryDirectory() as build:
            reason = self.run_cmake(Path(build), target)
        if reason is not None:
            message = FAILED.format(reason=reason)
            if wanted == "1":
                raise SystemExit(message)
            print(message, file=sys.stderr)

    def run_cmake(self, build: Path, target: Path) -> str | None:
        """None, or why there is no extension."""
        try:
            import pybind11
        except ImportError:
            return "pybind11 was not found."
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
        configure += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DCMAKE_INSTALL_PREFIX={target}"]
        # Build requirements that were installed beside this Python come first.
        environment = os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])}
        for command in (configure, ["cmake", "--build", str(build)], ["cmake", "--install", str(build)]):
            try:
                done = subprocess.run(command, capture_output=True, text=True, env=environment)
            except FileNotFoundError:
                return f"{command[0]} was not found."
            if done.returncode != 0:
                lines = [line for line in (done.stdout + done.stderr).splitlines() if "rror" in line]
                return f"`{' '.join(command[:2])}` failed: {' '.join(lines[:3])}"
        return None


setup(ext_modules=[Extension("pairloss._cpu", sources=[], optional=True)], cmdclass={"build_ext": CMakeBuild})
