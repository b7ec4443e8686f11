"""Prints the kernels that a target gets.

    python -m mbq_targets.show rpi5                   # list them
    python -m mbq_targets.show rpi5 gemv_d2           # one kernel as TVM text
    python -m mbq_targets.show rpi5 gemv_d2 --llvm    # the same as LLVM's intermediate text
    python -m mbq_targets.show rpi5 gemv_d2 --asm     # the same as assembly
    python -m mbq_targets.show webgpu matmul --asm    # a GPU kernel as OpenCL C or WGSL

A GPU kernel is compiled for the sizes of one model. The command takes the sizes of SmolLM2-135M.
"""

from __future__ import annotations

import sys
from typing import Any

import click

from mbq_runtime.bundle.facts import ACTIVATION_BITS, GROUP_SIZES, KV_BITS
from mbq_runtime.bundle.slice_profile import SliceProfile
from mbq_runtime.errors import MbqError, UsageError

from .machines import Gpu, Target, resolve
from .spec import KernelSpec

_HIDDEN, _FFN, _VOCAB, _HEADS, _KV_HEADS, _HEAD_DIM, _NORM_EPS = 576, 1536, 49152, 9, 3, 64, 1e-5


def _native_kernels(target: Target, spec: KernelSpec) -> dict[str, Any]:
    """{name: IRModule with that function alone} of a target with a native library."""
    import tvm

    from .kernels.isa import ISAS
    from .kernels.module import PREFIX, build_modules

    modules = build_modules(ISAS[target.isa], spec)
    functions = [function for module in modules for function in module.functions_items()]
    return {str(name.name_hint).removeprefix(PREFIX): tvm.IRModule({name: function}) for name, function in functions}


def _gpu_kernels(gpu: Gpu, spec: KernelSpec) -> dict[str, Any]:
    """{name: ``gpu.kernel.Kernel``} for one token, in the order in which a layer calls them."""
    from .gpu import attention, matmul, routing, sampling

    groups, router = gpu.work_groups, routing.RouterShape(spec.profile, 0)
    threads = groups.token_threads
    table = matmul.MatrixShape(_VOCAB, _HIDDEN, spec.group_size, spec.profile)
    weight = matmul.MatrixShape(_HIDDEN, _HIDDEN, spec.group_size, spec.profile)
    heads = attention.Heads(_HEADS, _KV_HEADS, _HEAD_DIM, _HEAD_DIM)
    kernels = [
        matmul.gather("gather", table, threads, 1),
        routing.norm("norm", _HIDDEN, _NORM_EPS, threads, 1, branch=True, router=router),
        matmul.matmul("matmul", weight, groups, 1),
        attention.rotate("rotate", heads, 1, threads),
        attention.attend("attend", heads, 1, groups.attention_threads, scale=_HEAD_DIM**-0.5, window=None),
        routing.gate("gate", _FFN, threads, 1, activation="silu", router=router),
        sampling.argmax("argmax", _VOCAB, threads, groups.chunk),
    ]
    return {kernel.name: kernel for kernel in kernels}


def _kernels(target: Target, spec: KernelSpec) -> dict[str, Any]:
    if target.gpu is not None:
        return _gpu_kernels(target.gpu, spec)
    if not target.native:
        raise UsageError(f"target {target.name}: it runs stock operators and has no kernels; choose another target")
    return _native_kernels(target, spec)


def kernel_names(target: Target, spec: KernelSpec) -> list[str]:
    """The names of the kernels that ``kernel_text`` accepts.

    Args:
        target: row of the table of machines.
        spec: slices, group size and activation bits of the model.

    Raises:
        UsageError: the target has no kernels.
    """
    return list(_kernels(target, spec))


def kernel_text(target: Target, spec: KernelSpec, name: str, form: str = "tvm") -> str:
    """The text of one kernel.

    Args:
        target: row of the table of machines.
        spec: slices, group size and activation bits of the model.
        name: one of ``kernel_names``.
        form: "tvm", "llvm" or "asm". For a GPU, "asm" is OpenCL C or WGSL and there is no "llvm".

    Raises:
        UsageError: the target has no kernel of that name, or no text of that form.
    """
    import tvm

    kernels = _kernels(target, spec)
    if name not in kernels:
        raise UsageError(f"target {target.name}: it has no kernel {name!r}; choose one of {', '.join(kernels)}")
    kernel = kernels[name]
    if target.gpu is not None:
        return _gpu_text(target.gpu, kernel, form)
    if form == "tvm":
        return str(kernel.script())
    compiled = tvm.compile(kernel, target=tvm.target.Target(target.llvm))
    return str(compiled.mod.inspect_source({"llvm": "ll", "asm": "asm"}[form]))


def _gpu_text(gpu: Gpu, kernel: Any, form: str) -> str:
    from .gpu.kernel import module
    from .gpu.source import lower

    if form == "llvm":
        raise UsageError("a kernel of a GPU has no LLVM text; use --asm for its OpenCL C or WGSL")
    return str(module([kernel]).script()) if form == "tvm" else lower([kernel], gpu.dialect)[kernel.name].text


@click.command()
@click.argument("target")
@click.argument("kernel", required=False)
@click.option("--tvm", "form", flag_value="tvm", default=True, help="Print TVM's text (the default).")
@click.option("--llvm", "form", flag_value="llvm", help="Print LLVM's intermediate text.")
@click.option("--asm", "form", flag_value="asm", help="Print assembly, or OpenCL C or WGSL for a GPU.")
@click.option("--slices", default="3,1,2,2", show_default=True, help="Bits of each slice.")
@click.option(
    "--group-size", type=click.Choice([*map(str, GROUP_SIZES)]), default="64", show_default=True,
    help="Weights that share a scale.",
)  # fmt: skip
@click.option(
    "--activation-bits", type=click.Choice([*map(str, ACTIVATION_BITS)]), default="16", show_default=True,
    help="Bits of a rounded activation.",
)  # fmt: skip
@click.option(
    "--kv-bits", type=click.Choice([*map(str, KV_BITS)]), default="32", show_default=True,
    help="Bits of a cached key or value.",
)  # fmt: skip
def main(target: str, kernel: str | None, form: str, slices: str, **bits: str) -> None:
    """List the kernels of TARGET, or print its kernel KERNEL."""
    try:
        spec = KernelSpec(SliceProfile.parse(slices), **{name: int(value) for name, value in bits.items()})
        row = resolve(target)
        lines = kernel_names(row, spec) if kernel is None else [kernel_text(row, spec, kernel, form)]
    except MbqError as error:
        click.echo(f"mbq_targets.show: error: {error}", err=True)
        sys.exit(error.exit_code)
    click.echo("\n".join(lines))


if __name__ == "__main__":
    main()
