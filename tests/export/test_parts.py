"""Files of weights hold the slices of lower depths first, and the manifest says where each depth begins."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tiny_models import write_checkpoint

from mbq_export.calibrated import Calibrated, RoutedLinear
from mbq_export.format.router import RouterParams
from mbq_export.lower import onnx, tvm_weights
from mbq_export.lower.decoder import first_depths
from mbq_export.model.checkpoint import Checkpoint
from mbq_export.model.loading import load
from mbq_export.model.shape import Unit
from mbq_export.model.source import locate
from mbq_export.slicing import rtn
from mbq_export.write import files, parts
from mbq_runtime.bundle.layout import PAGE_BYTES
from mbq_runtime.bundle.listed_files import FileRange
from mbq_runtime.bundle.onnx_file import initializers
from mbq_runtime.bundle.slice_profile import SliceProfile
from mbq_runtime.bundle.tensors import read_entries

PROFILE = SliceProfile.parse("3,1,2,2")


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "own table"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Calibrated]:
    folder = tmp_path_factory.mktemp("model") / "llama"
    checkpoint = load(locate(str(write_checkpoint(folder, "llama", tie_word_embeddings=request.param))))
    ones = np.ones(PROFILE.depths - 1, np.float32)
    router = RouterParams(ones, ones, np.array([3, 8], np.float32), np.array([1, -1], np.float32))

    def routed(unit: Unit) -> RoutedLinear:
        sliced = rtn.slice_unit(checkpoint, unit, 64, PROFILE)
        return RoutedLinear(unit, sliced, checkpoint.bias(unit), router)

    units = {unit.name: routed(unit) for unit in checkpoint.decoder.units()}
    table = None if request.param else rtn.slice_weight(checkpoint.embedding(), 64, PROFILE, "embedding")
    scale = np.ones(checkpoint.decoder.hidden_size, np.float32)
    return checkpoint, Calibrated(PROFILE, 64, "norm", units, table, scale)


def check(found: list[FileRange], places: dict[str, tuple[int, int]], size: int, calibrated: Calibrated) -> None:
    """places: begin and end of each tensor."""
    assert [found[0].begin, found[-1].end] == [0, size]
    assert all(a.end == b.begin and b.begin % PAGE_BYTES == 0 for a, b in pairwise(found))
    for name, (begin, end) in places.items():
        part = name.rpartition(".")[2]
        kind, _, number = part.partition("_")
        depth = int(number) if kind in ("planes", "slice") else 1
        assert found[depth - 1].begin <= begin <= end <= found[depth - 1].end, name
    table = "head" if calibrated.embedding is None else "embedding"
    assert f"{table}.planes_4" in places or f"{table}.slice_4" in places


@pytest.mark.parametrize("layout", ["mbq16", "nbits"])
def test_a_graph_has_its_tensors_in_order_of_depth(
    model: tuple[Checkpoint, Calibrated], layout: str, tmp_path: Path
) -> None:
    lowered = onnx.lower(*model, layout)
    places = files.write_model(lowered.model, lowered.tensors, tmp_path, depths=lowered.depths)
    path = tmp_path / files.EXTERNAL_DATA
    held = {t.name: (t.offset, t.offset + t.length) for t in initializers(tmp_path / "model.onnx") if t.file}
    assert {name: begin for name, (begin, _) in held.items()} == places
    check(parts.ranges(path, places, lowered.depths, 4), held, path.stat().st_size, model[1])


def test_parameters_of_tvm_are_in_order_of_depth(model: tuple[Checkpoint, Calibrated], tmp_path: Path) -> None:
    checkpoint, calibrated = model
    tensors = tvm_weights.collect(checkpoint, calibrated)
    depths = first_depths(checkpoint.decoder, calibrated, [f"planes_{e}" for e in range(1, 5)])
    entries = tvm_weights.places(tensors, depths)
    path = tmp_path / "decoder.safetensors"
    tvm_weights.write(tensors, entries, path)
    found = parts.ranges(path, {name: e.place for name, e in entries.items()}, depths, 4)
    read = read_entries(path)
    assert read == entries
    held = {name: (e.place, e.place + e.size) for name, e in read.items() if name in tensors}
    check(found, held, path.stat().st_size, calibrated)
    content = path.read_bytes()
    for name, (begin, end) in held.items():
        assert content[begin:end] == tensors[name].tobytes(), name
