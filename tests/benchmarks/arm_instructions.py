"""Instructions of one decode step on an emulated ARM core, at each depth: a count, which says nothing of time.

    python tests/benchmarks/arm_instructions.py BUNDLE [--cpu cortex-a76] [--bits 3,4,6,8]

BUNDLE is for an arm64 target and has the engine onnx.  It decodes with one thread in the userland that the tests use,
under QEMU (Debian: ``apt install qemu-user``), whose plugin ``count_instructions.c`` counts: two replies of different
length, and the difference of their counts over that of their tokens.  All of a step is in it, sampling and Python
included; loading and the prompt are not.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from mbq_runtime.bundle.manifest import read

sys.path.insert(0, str(Path(__file__).parents[1] / "arm64"))
from userland import CPU_PARTS, Userland  # type: ignore[import-not-found]  # another room of the tests

FEW_TOKENS, MORE_TOKENS = 2, 10

REPLY = """
import sys
from mbq_runtime.engine import Engine
bundle, bits, tokens = sys.argv[1:]
engine = Engine.load(bundle, threads=1)
reply = engine.generate("The sea", chat=False, avg_bits=float(bits), max_tokens=int(tokens))
reply.text()
assert len(reply.stats.bits) == int(tokens), reply.stats
"""


def build_plugin(out: Path) -> None:
    source = Path(__file__).with_name("count_instructions.c")
    command = [sys.executable, "-m", "ziglang", "cc", "-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([*command, "-fno-sanitize=all", "-o", str(out), str(source)], check=True)


def count(userland: Userland, plugin: Path, cpu: str, bundle: Path, bits: float, tokens: int) -> tuple[int, int]:
    """Instructions and dot products of a program that loads the bundle and makes a reply."""
    log = plugin.with_suffix(".log")
    done = userland.run(
        ["-c", REPLY, bundle.resolve(), str(bits), str(tokens)], cpu, {"PYTHONHASHSEED": "0"},
        emulator=["qemu-aarch64", "-plugin", plugin, "-d", "plugin", "-D", log],
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"the emulated reply failed:\n{done.stderr[-2000:]}")
    instructions, dots = map(int, log.read_text().split())
    return instructions, dots


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--cpu", type=click.Choice(list(CPU_PARTS)), default="cortex-a76")
@click.option("--bits", help="Budgets, by commas.  [default: one for each depth]")
def main(bundle: Path, cpu: str, bits: str | None) -> None:
    """See the module's docstring."""
    if shutil.which("qemu-aarch64") is None:
        raise SystemExit("qemu-aarch64 is not here: apt install qemu-user")
    manifest = read(bundle)
    budgets = [float(b) for b in bits.split(",")] if bits else [float(b) for b in manifest.profile.depth_bits]
    weights, userland = manifest.weights.routed_parameters, Userland.open()
    print(f"instructions executed under emulation, no measure of time; {cpu}, one thread, {manifest.model.name}")
    print(f"slices {manifest.profile}, {manifest.activation_bits}-bit activations, {weights} weights a token\n")
    print("| bits | million instructions a token | for a weight | of them dot products |")
    print("| ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        plugin = Path(folder) / "count.so"
        build_plugin(plugin)
        for budget in budgets:
            few, more = (count(userland, plugin, cpu, bundle, budget, n) for n in (FEW_TOKENS, MORE_TOKENS))
            instructions, dots = ((b - a) / (MORE_TOKENS - FEW_TOKENS) for a, b in zip(few, more, strict=True))
            print(
                f"| {budget:g} | {instructions / 1e6:.1f} | {instructions / weights:.3f} | {dots / instructions:.0%} |"
            )


if __name__ == "__main__":
    main()
