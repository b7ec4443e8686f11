"""Lowers kernels to text, OpenCL C or WGSL, with what a runtime must know to launch them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mbq_runtime.errors import BuildError

from .kernel import Kernel, module

_DIALECTS: dict[str, tuple[str, re.Pattern[str]]] = {
    "opencl": ("opencl", re.compile(r"__global [\w ]+\*(?: restrict)? (\w+)_ptr")),
    "wgsl": ("webgpu", re.compile(r"@binding\(\d+\) var<storage, \w+> (\w+)_ptr")),
}
"""{dialect: (TVM's name, pattern of a buffer's declaration)}. Buffers are declared in the order of binding."""

_SHARED = {
    "opencl": re.compile(r"^\s*__local [a-z]+(\d*) \w+\[(\d+)\];", re.MULTILINE),
    "wgsl": re.compile(r"^var<workgroup> \w+ : array<(?:vec(\d)<)?\w+>?, (\d+)>;", re.MULTILINE),
}
"""Patterns of an array of 32-bit numbers that a work-group shares: lanes of a vector, and how many vectors."""

_FUNCTION = re.compile(r"^// Function: (\w+)_kernel\n(?!//-+\n// Function)", re.MULTILINE)
_PROTOTYPE = re.compile(r"^__kernel void [^{]*;\n", re.MULTILINE)


@dataclass(frozen=True)
class Source:
    """A kernel as text.

    text: source of one kernel. Its function is ``NAME_kernel``.
    arguments: names of its buffers, in the order they are bound.
    local_bytes: memory that a work-group shares.
    """

    text: str
    arguments: tuple[str, ...]
    local_bytes: int


def lower(kernels: list[Kernel], dialect: str) -> dict[str, Source]:
    """The text of every kernel by name.

    Args:
        kernels: kernels with different names.
        dialect: "opencl" or "wgsl".

    Raises:
        BuildError: TVM cannot lower a kernel.
    """
    kind, buffers = _DIALECTS[dialect]
    try:
        text = _generate(kernels, kind)
    except Exception as error:
        lines = str(error).strip().splitlines()[-6:]
        raise BuildError(f"lowering the device kernels to {dialect} failed: " + " | ".join(lines)) from error
    found: dict[str, Source] = {}
    starts = list(_FUNCTION.finditer(text))
    for i, start in enumerate(starts):
        stop = starts[i + 1].start() if i + 1 < len(starts) else len(text)
        one = _PROTOTYPE.sub("", text[start.end() : stop]).strip() + "\n"
        shared = sum(4 * int(lanes or 1) * int(count) for lanes, count in _SHARED[dialect].findall(one))
        found[start.group(1)] = Source(one, tuple(dict.fromkeys(buffers.findall(one))), shared)
    missing = [kernel.name for kernel in kernels if kernel.name not in found]
    if missing:
        raise BuildError(f"the {dialect} text holds no kernel {missing[0]}; the installed TVM writes another form")
    return found


def _generate(kernels: list[Kernel], kind: str) -> str:
    """The text of all kernels from TVM's code generator ``kind``.

    Only the passes that the generator needs run. TVM's own pipeline would replace each use of a bound value by its
    expression, which makes a megabyte of text for one matmul.
    """
    import tvm
    from tvm import tirx
    from tvm.tirx.build import split_host_device_mods

    target = tvm.target.Target({"kind": kind}, host={"kind": "llvm"})
    passes = [
        tirx.transform.BindTarget(target),
        tirx.transform.FlattenBuffer(),
        tirx.transform.AnnotateEntryFunc(),
        tirx.transform.SplitHostDevice(),
        tirx.transform.MakePackedAPI(),
    ]
    _, devices = split_host_device_mods(tvm.ir.transform.Sequential(passes)(module(kernels)))
    ((device_target, functions),) = devices.items()
    build = tvm.get_global_func(f"target.build.{kind}")
    return str(build(tirx.transform.LowerIntrin()(functions), device_target).inspect_source())
