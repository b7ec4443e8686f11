"""Compares the sizes and shapes in a bundle's files with its manifest.  Values are not looked at."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

from ..errors import BundleError
from .gpu_plan import FOLDER, read_plan
from .layout import ROW_BLOCK
from .manifest import GPU_FILES, Linear, Manifest
from .onnx_file import FLOAT16, UINT8, Tensor, initializers
from .tensors import WEIGHTS, read_entries

_Kind = tuple[int, tuple[int, ...]]
"""Element type and shape."""


def check_contents(folder: Path, manifest: Manifest) -> None:
    """Compare the tensors of each engine's files with the manifest's matrices.

    Args:
        folder: folder of the bundle.
        manifest: the bundle's manifest.

    Raises:
        BundleError: a tensor is missing or has another shape; the message names it.
    """
    for engine in manifest.engines:
        _CHECKS[engine](folder, manifest)


def _check_onnx(folder: Path, manifest: Manifest) -> None:
    """Check the initialisers of ``model.onnx``, and their places in the files that hold them."""
    path = folder / "model.onnx"
    tensors = initializers(path)
    sizes = {entry.name: entry.size for entry in manifest.files}
    for tensor in tensors:
        _check_extent(path, tensor, sizes)
    if manifest.native:
        _check_packed(path, tensors, manifest)
    else:
        _check_codes(path, tensors, manifest)


def _check_tvm(folder: Path, manifest: Manifest) -> None:
    path = folder / WEIGHTS
    entries = read_entries(path)
    for linear in manifest.weights.linears:
        for what, (_, shape) in zip(("planes", "scales"), packed_kinds(linear, manifest.group_size), strict=True):
            entry = entries.get(f"{linear.name}.{what}")
            if entry is None or entry.shape != shape:
                raise BundleError(
                    f"{path}: {linear.name}.{what} has shape {list(entry.shape) if entry else 'none'}, needed "
                    f"{list(shape)} ({linear.N} x {linear.K}, groups of {manifest.group_size}); export the bundle again"
                )


def _check_plan(folder: Path, manifest: Manifest) -> None:
    path, plan = folder / GPU_FILES[0], read_plan(folder)
    sizes = {entry.name: entry.size for entry in manifest.files}
    for name, buffer in plan.buffers.items():
        if buffer.offset >= 0 and buffer.offset + buffer.bytes > sizes[GPU_FILES[1]]:
            raise BundleError(
                f"{path}: {name} ends at byte {buffer.offset + buffer.bytes} of {GPU_FILES[1]}, which is "
                f"{sizes[GPU_FILES[1]]} long; export the bundle again"
            )
    for kernel in plan.kernels.values():
        if f"{FOLDER}/{kernel.file}" not in sizes:
            raise BundleError(f"{path}: names {kernel.file}, which the manifest does not list; export the bundle again")
    for linear in manifest.weights.linears:
        for what, (_, shape) in zip(("planes", "scales"), packed_kinds(linear, manifest.group_size), strict=True):
            found = plan.buffers.get(f"{linear.name}.{what}")
            needed = math.prod(shape) * (1 if what == "planes" else 2)
            if found is None or found.bytes != needed:
                raise BundleError(
                    f"{path}: {linear.name}.{what} has {0 if found is None else found.bytes} bytes, needed {needed} "
                    f"({linear.N} x {linear.K}, groups of {manifest.group_size}); export the bundle again"
                )


_CHECKS = {"onnx": _check_onnx, "tvm": _check_tvm, "opencl": _check_plan, "webgpu": _check_plan}


def _check_extent(path: Path, tensor: Tensor, sizes: dict[str, int]) -> None:
    if not tensor.file:
        return
    held = sizes.get(tensor.file, -1)
    if held < 0:
        raise BundleError(
            f"{path}: {tensor.name} lies in {tensor.file}, which the manifest does not list; export the bundle again"
        )
    if tensor.length != tensor.bytes or tensor.offset < 0 or tensor.offset + tensor.length > held:
        raise BundleError(
            f"{path}: {tensor.name} takes {tensor.bytes} bytes, but it has bytes {tensor.offset} to "
            f"{tensor.offset + tensor.length} of {tensor.file}, which is {held} long; export the bundle again"
        )


def packed_kinds(linear: Linear, group_size: int) -> tuple[_Kind, _Kind]:
    """Element type and shape of a matrix's planes and scales in the native layout.

    Args:
        linear: the matrix.
        group_size: columns that share a scale.
    """
    blocks = -(-linear.N // ROW_BLOCK)
    planes = (blocks * ROW_BLOCK * linear.K,)  # 8 bits a weight, over all planes
    scales = (blocks, linear.K // group_size, 2, ROW_BLOCK)
    return (UINT8, planes), (FLOAT16, scales)


def _check_packed(path: Path, tensors: list[Tensor], manifest: Manifest) -> None:
    found = Counter((tensor.element_type, tensor.shape) for tensor in tensors)
    for linear in manifest.weights.linears:
        for what, kind in zip(("planes", "scales"), packed_kinds(linear, manifest.group_size), strict=True):
            if not found[kind]:
                raise BundleError(
                    f"{path}: no {what} of shape {list(kind[1])} left for {linear.name} "
                    f"({linear.N} x {linear.K}, groups of {manifest.group_size}); export the bundle again"
                )
            found[kind] -= 1


def _check_codes(path: Path, tensors: list[Tensor], manifest: Manifest) -> None:
    needed = sum(linear.N * linear.K for linear in manifest.weights.linears)
    found = sum(tensor.bytes for tensor in tensors if tensor.element_type == UINT8)
    if found < needed:
        raise BundleError(
            f"{path}: {found} bytes of packed weights, the manifest's matrices need {needed}; export the bundle again"
        )
