"""Compiles the engine "cuda" for GPUs that need not be there, and shows the registers and spills of its kernels.

python bench/cuda_aot.py [--arch 75 80 90 100] [--parts double float Float16 Bfloat16 around]
"""

import argparse
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"
AROUND = "around"
PARTS = ("double", "float", "Float16", "Bfloat16", AROUND)


@dataclass(frozen=True)
class Report:
    kernel: str
    registers: int
    spill_bytes: int

    @property
    def owns_gradient(self) -> bool:
        return self.kernel.startswith("gradients") and self.kernel.endswith("with rows")


def reports(arch: int, part: str, *options: str) -> list[Report]:
    """Of all kernels for products of a type, or of those around the pairs. Warnings are errors."""
    command = ["nvcc", "-std=c++17", "-O3", f"-arch=sm_{arch}", "-Werror", "all-warnings", "-Xptxas", "-v", *options]
    command += ["-cubin", "-o", "/dev/null"]
    command += [str(SOURCES / "around.cu")] if part == AROUND else [f"-DPAIRLOSS_TYPE={part}", str(SOURCES / "kernels.cu")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stdout + done.stderr)
    entries = re.split(r"Compiling entry function '", done.stderr)[1:]
    return [_report(entry) for entry in entries]


def _report(entry: str) -> Report:
    name = re.match(r"\w+", entry)
    spills, registers = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", entry), re.search(r"Used (\d+) registers", entry)
    assert name is not None
    assert spills is not None
    assert registers is not None
    return Report(_readable(name[0]), int(registers[1]), int(spills[1]) + int(spills[2]))


def _readable(mangled: str) -> str:
    """What the mangled name of a kernel says."""
    if "row_stats" in mangled:
        return "row_stats " + ("circle" if "Lb1E" in mangled else "linear")
    form = re.search(r"4FormE(\d)E", mangled)
    if form is None:
        around = re.search(r"\d([a-z][a-z_]*)_kernel", mangled)
        assert around is not None, mangled
        return around[1]
    return f"gradients {('linear', 'circle', 'terms')[int(form[1])]} {'with' if 'Lb1E' in mangled else 'without'} rows"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[75, 80, 90, 100])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    options = parser.parse_args()
    print(f"{'kernel':32} sm  {'part':8}  regs  spilled bytes")
    for arch in options.arch:
        for part in options.parts:
            for report in reports(arch, part):
                print(f"{report.kernel:32} {arch:3} {part:8} {report.registers:5} {report.spill_bytes:14}", flush=True)


if __name__ == "__main__":
    main()
