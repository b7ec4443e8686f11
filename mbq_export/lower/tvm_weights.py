"""The weights file of a TVM decoder: which tensors it holds, where, and how it is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mbq_runtime.bundle.layout import ROW_BLOCK
from mbq_runtime.bundle.tensors import Entry, plan, write_header

from ..calibrated import Calibrated, RoutedLinear
from ..format.codes import Sliced
from ..format.planes import pack_matrix
from ..model import per_layer
from ..model.checkpoint import Checkpoint
from ..model.mapped_weights import arrays_in_file
from .decoder import PER_LAYER_TABLE

Array = NDArray[np.generic]

QUERY_GROWTH = "query_growth"
"""The tensor of ``Checkpoint.query_growth``."""

_DTYPES = {np.dtype(np.uint8): "U8", np.dtype(np.float16): "F16", np.dtype(np.float32): "F32"}


def collect(checkpoint: Checkpoint, calibrated: Calibrated, folder: Path | None = None) -> dict[str, Array]:
    """Collect the tensors of a decoder.

    Args:
        checkpoint: norms, rotations and shape of the model.
        calibrated: its slices and routers.
        folder: where packed matrices of experts wait in files without names; None to hold them in memory.

    Returns:
        Tensors by name.  Matrices and routers have names of units, norms have names of the checkpoint.
    """
    d, tensors = checkpoint.decoder, dict[str, Array]()
    for linear in calibrated.units.values():
        matrix = _matrix(linear.unit.name, linear.sliced, calibrated)
        tensors |= matrix if folder is None or linear.unit.experts is None else arrays_in_file(matrix, folder)
        tensors |= _beside(linear)
    if calibrated.embedding is not None:
        tensors |= _matrix("embedding", calibrated.embedding, calibrated)
    tensors["embedding.scale"] = calibrated.embedding_factors(d)
    if calibrated.per_layer is not None:
        tensors |= _matrix(PER_LAYER_TABLE, calibrated.per_layer, calibrated)
        tensors[f"{PER_LAYER_TABLE}.rows.scale"] = np.full(d.per_layer_width, d.per_layer_scale, np.float32)
        tensors[per_layer.NORM] = checkpoint.norm(per_layer.NORM)
    for name, source in _norms(checkpoint).items():
        tensors[name] = checkpoint.norm(source)
    for kind in d.rotary_kinds:
        tensors[f"{kind}.cos"], tensors[f"{kind}.sin"] = checkpoint.rotary(kind)
    for layer in range(d.layers):
        if (scalar := d.layer_scalar(layer)) is not None:
            tensors[scalar] = checkpoint.scalar(scalar)
        if "experts" in d.branches(layer):
            tensors |= expert_tensors(checkpoint, layer)
        if d.mixer(layer) == "delta":
            tensors |= delta_tensors(checkpoint, layer)
        if d.mixer(layer) == "conv":
            taps, bias = checkpoint.taps(d.convolution(layer))
            tensors[f"{d.convolution(layer)}.taps"] = np.ascontiguousarray(taps.T)
            if bias is not None:
                tensors[f"{d.convolution(layer)}.bias"] = bias
    if (growth := checkpoint.query_growth()) is not None:
        tensors[QUERY_GROWTH] = growth
    if turn := calibrated.head_input:
        parts = {"left": turn.left, "left_back": turn.left.T, "right": turn.right, "right_back": turn.right.T}
        tensors |= {f"head_input.{part}": np.ascontiguousarray(value) for part, value in parts.items()}
        tensors["head_input.gain"] = turn.gain
    return tensors


def _matrix(name: str, sliced: Sliced, calibrated: Calibrated) -> dict[str, Array]:
    return {f"{name}.{part}": value for part, value in pack_matrix(sliced, calibrated.profile).items()}


def _beside(linear: RoutedLinear) -> dict[str, Array]:
    """A layer's router and bias.  The bias is padded to whole row blocks."""
    router, prefix = linear.router, f"{linear.unit.name}.router"
    found: dict[str, Array | None] = {
        f"{prefix}.table": np.stack([router.budgets, router.thresholds]),
        f"{prefix}.bias": router.bias,
        f"{prefix}.norm_gain": router.norm_gain,
        f"{prefix}.w1": router.w1,
        f"{prefix}.b1": router.b1,
        f"{prefix}.w2": router.w2,
    }
    if linear.bias is not None:
        found[f"{linear.unit.name}.bias"] = np.pad(linear.bias, (0, -len(linear.bias) % ROW_BLOCK))
    return {name: np.ascontiguousarray(value) for name, value in found.items() if value is not None}


def head_norm_tensors(checkpoint: Checkpoint, layer: int) -> dict[str, str]:
    """The norms of q and of k in a block: their names in the checkpoint, by the names of their tensors.

    Args:
        checkpoint: the model.
        layer: index of the block.
    """
    d, norms = checkpoint.decoder, checkpoint.decoder.family.head_norms
    sources = d.head_norms(layer) or ()
    if norms is None or not norms.whole_row:
        return {source: source for source in sources}
    return {f"layers.{layer}.attention.{part}_row": source for part, source in zip("qk", sources, strict=True)}


def delta_tensors(checkpoint: Checkpoint, layer: int) -> dict[str, Array]:
    """What a delta net computes with, by name: taps [taps, channels], rate, step and gain.

    Args:
        checkpoint: the model.
        layer: index of the block.
    """
    weights, prefix = checkpoint.delta_weights(layer), checkpoint.decoder.delta_net(layer)
    found = {"taps": weights.taps.T, "rate": weights.rate, "step": weights.step, "gain": weights.gain}
    return {f"{prefix}.{part}": np.ascontiguousarray(value) for part, value in found.items()}


def expert_tensors(checkpoint: Checkpoint, layer: int) -> dict[str, Array]:
    """What chooses the experts of a block, by name: the chooser, and the bias if there is one, in whole vectors.

    Args:
        checkpoint: the model.
        layer: index of the block.
    """
    chooser, bias = checkpoint.chooser(layer)
    found: dict[str, Array] = {f"layers.{layer}.chooser": np.ascontiguousarray(chooser)}
    if bias is not None:
        found[f"layers.{layer}.chooser_bias"] = np.pad(bias, (0, -len(bias) % ROW_BLOCK))
    return found


def _norms(checkpoint: Checkpoint) -> dict[str, str]:
    """Names in the checkpoint, by the names of tensors."""
    d = checkpoint.decoder
    names = {d.final_norm: d.final_norm}
    for layer in range(d.layers):
        of_block = [norm for norm, _ in d.normed_units(layer).values()]
        of_block += [name for part in (*d.branches(layer), "both") if (name := d.output_norm(layer, f"{part}_out"))]
        names |= {name: name for name in of_block} | head_norm_tensors(checkpoint, layer)
    return names


def places(tensors: dict[str, Array], depths: Mapping[str, int]) -> dict[str, Entry]:
    """Where the file will hold each tensor.

    Args:
        tensors: result of ``collect``.
        depths: the first depth that reads a tensor, by name; 1 for a tensor that is not named.
    """
    return plan({name: (_DTYPES[t.dtype], t.shape, t.nbytes) for name, t in tensors.items()}, depths)


def write(
    tensors: dict[str, Array],
    entries: dict[str, Entry],
    path: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write the file.

    Args:
        tensors: result of ``collect``.
        entries: result of ``places``.
        path: of the file.
        progress: called with bytes written and bytes in all.
    """
    total, done = sum(entry.size for entry in entries.values()), 0
    with path.open("wb") as file:
        write_header(entries, file)
        for name, entry in entries.items():
            file.write(np.ascontiguousarray(tensors[name]).data.cast("B") if name in tensors else bytes(entry.size))
            done += entry.size
            progress(done, total)
