"""Static analysis, not a measurement: cycles per weight byte of every ARM decode kernel, by llvm-mca.

    python tests/benchmarks/arm_static.py [--slices 2,2,2,2] [--group-size 64] [--activations 8] [--llama-cpp FOLDER]

Takes the group loop of each ``gemv`` from the compiler's assembly and lets llvm-mca (Debian: ``apt install llvm``)
issue it over and over on the scheduling model of the target's core, caches and memory left out.  Cores without a
model of their own in LLVM are analysed on a relative, which is named.  FOLDER is llama.cpp's source, such as
``vendor/llama.cpp`` of llama-cpp-python's source archive: its product of Q4_0 and Q8_0 is compiled by the same
compiler as our C and analysed beside ours.  Scales are not counted as weight bytes on either side.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from mbq_runtime.bundle.layout import ROW_BLOCK
from mbq_runtime.bundle.slice_profile import SliceProfile
from mbq_targets.kernels.isa import ISAS
from mbq_targets.kernels.module import PREFIX, build_modules, depth_plans
from mbq_targets.machines import TARGETS, Target
from mbq_targets.spec import KernelSpec

CORES = {
    "rpi5": (("cortex-a76", "A76, which LLVM models as a 3-wide A57"),),
    "rpi4": (("cortex-a72", "A72, which LLVM models as an A57"), ("cortex-a53", "A53, in order")),
    "arm64": (("cortex-a55", "A55, in order"), ("cortex-a78", "A78, which LLVM models as a 3-wide A57")),
}
_DOTS = {"neon-dotprod": (r"\bsdot\b", 16), "neon": (r"\bs(mull|mlal)2?\b", 8)}
"""By instruction set: its dot-product instruction, and how many products of a weight and a byte one covers."""

_LABEL = re.compile(r"^(\.LBB\w+):")
_BRANCH = re.compile(r"^\s+(?:b\.\w+|cbn?z|tbn?z|b)\s+.*?(\.LBB\w+)$")


def assembly(target: Target, spec: KernelSpec) -> str:
    import tvm

    compiled = (tvm.compile(m, target=tvm.target.Target(target.llvm)) for m in build_modules(ISAS[target.isa], spec))
    return "".join(str(module.mod.inspect_source("asm")) for module in compiled)


def function(source: str, name: str) -> list[str]:
    """The instructions and labels of a function, without directives and comments."""
    body = source.split(f"\n{name}:", 1)[1].split("\n.Lfunc_end", 1)[0]
    return [
        line.split("//")[0].rstrip()
        for line in body.splitlines()
        if _LABEL.match(line) or (line.startswith("\t") and not line.startswith("\t."))
    ]


def loops(lines: list[str]) -> list[list[str]]:
    """The instructions from a label to each branch back to it."""
    places, found = {}, []
    for at, line in enumerate(lines):
        if label := _LABEL.match(line):
            places[label[1]] = at
        elif (branch := _BRANCH.match(line)) and branch[1] in places:
            found.append([part for part in lines[places[branch[1]] : at + 1] if not _LABEL.match(part)])
    return found


def inner_loop(lines: list[str], pattern: str) -> tuple[list[str], int]:
    """The smallest loop with instructions like ``pattern``, and how many of them it has."""
    with_dots = [loop for loop in loops(lines) if any(re.search(pattern, line) for line in loop)]
    inner = min(with_dots, key=len)
    return inner, sum(bool(re.search(pattern, line)) for line in inner)


def table_row(name: str, said: str, bits: int, weights: int, spent: float, inner: list[str]) -> str:
    """spent: cycles for ``weights`` weights."""
    stack = sum("[sp" in line for line in inner)
    return f"| {name} | {said} | {bits} | {spent:.0f} | {weights * bits / 8 / spent:.2f} | {stack} |"


def ggml_q4_0(source: Path) -> list[str]:
    """llama.cpp's Q4_0 x Q8_0 product for the Cortex-A76, as ``function`` gives it."""
    ggml = source / "ggml"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "quants.s")
        command = [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-gnu", "-mcpu=cortex_a76", "-O3"]
        command += ["-DNDEBUG", "-D_GNU_SOURCE", "-fno-sanitize=all", "-S", "-o", str(out)]
        command += [f"-I{ggml / include}" for include in ("include", "src", "src/ggml-cpu")]
        subprocess.run([*command, str(ggml / "src/ggml-cpu/arch/arm/quants.c")], check=True)
        return function(out.read_text(), "ggml_vec_dot_q4_0_q8_0")


def cycles(instructions: list[str], core: str, features: str) -> float:
    """Cycles of one pass, the loop repeated."""
    runs = 100
    straight = [line for line in instructions if not _BRANCH.match(line)]
    command = ["llvm-mca", "-mtriple=aarch64", f"-mcpu={core}", f"-mattr={features}", f"-iterations={runs}"]
    done = subprocess.run(command, input="\n".join(straight), capture_output=True, text=True, check=True)
    found = re.search(r"Total Cycles:\s+(\d+)", done.stdout)
    assert found is not None
    return int(found[1]) / runs


@click.command()
@click.option("--slices", default="2,2,2,2")
@click.option("--group-size", default=64)
@click.option("--activations", "activation_bits", type=click.IntRange(8, 16), default=16)
@click.option("--llama-cpp", type=click.Path(path_type=Path, exists=True))
def main(slices: str, group_size: int, activation_bits: int, llama_cpp: Path | None) -> None:
    """See the module's docstring."""
    if shutil.which("llvm-mca") is None:
        raise SystemExit("llvm-mca is not here: apt install llvm")
    profile = SliceProfile.parse(slices)
    spec = KernelSpec(profile, group_size, activation_bits)
    version = subprocess.run(["llvm-mca", "--version"], capture_output=True, text=True, check=True).stdout
    print(f"static analysis by llvm-mca, {version.splitlines()[0].strip()}; {spec}\n")
    print("| kernels | core | bits | cycles a group of 16 rows | weight bytes/cycle | stack accesses |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    weights = ROW_BLOCK * group_size
    for name, cores in CORES.items():
        target = TARGETS[name]
        pattern, covered = _DOTS[target.isa]
        source = assembly(target, spec)
        plans = depth_plans(profile, ISAS[target.isa].max_width)
        for depth, (bits, plan) in enumerate(zip(profile.depth_bits, plans, strict=True), 1):
            lines = function(source, f"{PREFIX}gemv_d{depth}_compute_")
            inner, dots = inner_loop(lines, pattern)
            # A loop may hold a whole group of 16 rows or some of its rows: its products tell.
            share = dots * covered / (weights * spec.activation_bytes * len(plan.segments))
            for core, said in cores:
                spent = cycles(inner, core, "+dotprod" if "dotprod" in target.isa else "+neon") / share
                print(table_row(f"{name} ({target.isa})", said, bits, weights, spent, inner))
    if llama_cpp is not None:
        pattern, covered = _DOTS["neon-dotprod"]
        inner, dots = inner_loop(ggml_q4_0(llama_cpp), pattern)
        core, said = CORES["rpi5"][0]
        spent = cycles(inner, core, "+dotprod") * weights / (dots * covered)
        print(table_row("llama.cpp Q4_0", said, 4, weights, spent, inner))


if __name__ == "__main__":
    main()
