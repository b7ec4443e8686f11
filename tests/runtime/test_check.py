from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tiny_bundle import facts

from mbq_runtime import BundleError
from mbq_runtime.bundle import manifest, tensors
from mbq_runtime.bundle.check import check_contents
from mbq_runtime.bundle.facts import Linear, Weights
from mbq_runtime.bundle.listed_files import file_entries
from mbq_runtime.bundle.onnx_file import initializers
from mbq_runtime.bundle.parameters import matrix_kinds

LINEARS = (Linear("layers.0.attn_in", 40, 128), Linear("head", 100, 64))


def arrays() -> dict[str, NDArray[np.generic]]:
    found: dict[str, NDArray[np.generic]] = {"norm": np.ones(4, np.float32), "scalar": np.array(3, np.int64)}
    for linear in LINEARS:
        for part, (_, shape) in matrix_kinds(linear, 64, facts().slices).items():
            found[f"{linear.name}.{part}"] = np.zeros(shape, np.uint8)
    return found


def save(folder: Path, tensors: dict[str, NDArray[np.generic]]) -> manifest.Manifest:
    """Write a graph that has only initialisers, with the big ones in another file, and its manifest."""
    protos = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    graph = helper.make_graph([], "g", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])], protos)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)])
    onnx.save(
        model,
        folder / "model.onnx",
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=64,
    )
    for name in ("genai_config.json", "tokenizer.json", "lib/libmbq_ops.so"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    return replace(
        facts(),
        layout="mbq16",
        weights=Weights(40 * 128 + 100 * 64, {}, LINEARS),
        files=file_entries(folder),
    )


def test_sizes_of_the_packed_form() -> None:
    assert matrix_kinds(Linear("x", 40, 128), 32, (3, 5)) == {
        "planes_1": ("U8", (48 * 128 * 3 // 8,)),
        "planes_2": ("U8", (48 * 128 * 5 // 8,)),
        "scales": ("U8", (3, 2 + 4, 32)),
    }


def test_reader_agrees_with_the_onnx_package(tmp_path: Path) -> None:
    tensors = arrays()
    save(tmp_path, tensors)
    found = {tensor.name: tensor for tensor in initializers(tmp_path / "model.onnx")}
    assert found.keys() == tensors.keys()
    for proto in onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.initializer:
        tensor = found[proto.name]
        external = {entry.key: entry.value for entry in proto.external_data}
        assert tensor.shape == tuple(proto.dims) == tensors[proto.name].shape
        assert tensor.element_type == proto.data_type
        assert tensor.file == external.get("location", "")
        assert tensor.offset == int(external.get("offset", 0))
        assert tensor.length == tensor.bytes == tensors[proto.name].nbytes


def test_a_model_that_holds_its_matrices(tmp_path: Path) -> None:
    check_contents(tmp_path, save(tmp_path, arrays()))


def test_a_matrix_that_is_not_there(tmp_path: Path) -> None:
    tensors = arrays()
    tensors["head.scales"] = tensors["head.scales"][:, :, :8]
    with pytest.raises(BundleError, match=r"no scales of shape \[7, 5, 32\] left for head \(100 x 64, groups of 64\)"):
        check_contents(tmp_path, save(tmp_path, tensors))


def test_two_matrices_do_not_share_one_tensor(tmp_path: Path) -> None:
    facts_ = save(tmp_path, arrays())
    twice = replace(facts_, weights=replace(facts_.weights, linears=(*LINEARS, LINEARS[1])))
    with pytest.raises(BundleError, match=r"no planes_1 of shape .* left for head"):
        check_contents(tmp_path, twice)


def test_weights_past_the_end_of_their_file(tmp_path: Path) -> None:
    found = save(tmp_path, arrays())
    short = [replace(e, size=e.size - 1) if e.name == "model.onnx.data" else e for e in found.files]
    with pytest.raises(
        BundleError, match=r"head\.scales takes 1120 bytes, but it has bytes \d+ to \d+ of model\.onnx\.data"
    ):
        check_contents(tmp_path, replace(found, files=tuple(short)))


def test_weights_in_a_file_nobody_listed(tmp_path: Path) -> None:
    found = save(tmp_path, arrays())
    kept = tuple(entry for entry in found.files if entry.name != "model.onnx.data")
    with pytest.raises(BundleError, match=r"lies in model\.onnx\.data, which the manifest does not list"):
        check_contents(tmp_path, replace(found, files=kept))


def test_portable_layout_holds_enough_codes(tmp_path: Path) -> None:
    tensors = arrays()
    portable = replace(save(tmp_path, tensors), layout="nbits")
    check_contents(tmp_path, portable)
    for name in [name for name in tensors if name.startswith("head.planes")]:
        del tensors[name]
    fewer = replace(save(tmp_path, tensors), layout="nbits")
    with pytest.raises(BundleError, match="7840 bytes of packed weights, the manifest's matrices need 11520"):
        check_contents(tmp_path, fewer)


@pytest.mark.parametrize("data", [b"\xff" * 30, b"\x3a\xff\x01", b"\x3a\x02\x2a\x05", b"\x0b"])
def test_what_is_no_onnx_file(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(data)
    with pytest.raises(BundleError, match="not an ONNX file"):
        initializers(tmp_path / "model.onnx")


TVM_LINEARS = (Linear("layers.0.attn_in", 40, 64), Linear("head", 264, 64))
SIZES = {"U8": 1, "F16": 2, "F32": 4}
Kinds = dict[str, tuple[str, tuple[int, ...]]]


def tvm_kinds() -> Kinds:
    """Type and shape of each tensor of a small decoder."""
    kinds: Kinds = {f"full_attention.{part}": ("F32", (facts().model.context_length, 8)) for part in ("cos", "sin")}
    kinds |= {"embedding.scale": ("F32", (64,)), "model.norm": ("F32", (64,))}
    for linear in TVM_LINEARS:
        kinds |= {f"{linear.name}.{part}": kind for part, kind in matrix_kinds(linear, 64, facts().slices).items()}
        kinds[f"{linear.name}.router.table"] = ("F32", (2, 5))
        kinds |= {f"{linear.name}.router.{part}": ("F32", (3,)) for part in ("bias", "norm_gain")}
    return kinds


def save_tvm(folder: Path, kinds: Kinds) -> manifest.Manifest:
    """Write a file of parameters of zeros, and the manifest of its bundle."""
    entries = tensors.plan({name: (kind, shape, SIZES[kind] * prod(shape)) for name, (kind, shape) in kinds.items()})
    with (folder / tensors.WEIGHTS).open("wb") as file:
        tensors.write_header(entries, file)
        file.write(bytes(sum(entry.size for entry in entries.values())))
    return replace(facts(), layout="mbq16", engines=("tvm",), weights=Weights(0, {}, TVM_LINEARS))


def test_parameters_of_tvm_hold_the_context(tmp_path: Path) -> None:
    context, kinds = facts().model.context_length, tvm_kinds()
    check_contents(tmp_path, save_tvm(tmp_path, kinds))
    kinds["full_attention.cos"] = ("F32", (context - 1, 8))
    with pytest.raises(BundleError, match=f"full_attention.cos has {context - 1} positions"):
        check_contents(tmp_path, save_tvm(tmp_path, kinds))


def test_every_parameter_of_tvm_has_the_shape_of_the_manifest(tmp_path: Path) -> None:
    for name, (kind, shape) in tvm_kinds().items():
        if name.startswith("full_attention"):
            continue
        for wrong in (
            (kind, (*shape[:-1], shape[-1] * 2)),
            (kind, (*shape, 1)),
            ("F16" if kind != "F16" else "F32", shape),
        ):
            if name.endswith("table") and wrong == (kind, (2, 10)):
                continue  # a longer table
            with pytest.raises(BundleError, match=f"{name} has type .* and shape .*, needed {kind} and "):
                check_contents(tmp_path, save_tvm(tmp_path, tvm_kinds() | {name: wrong}))
        if name != "model.norm":  # the manifest does not name norms
            rest = {other: value for other, value in tvm_kinds().items() if other != name}
            with pytest.raises(BundleError, match=f"{name} has shape none, needed "):
                check_contents(tmp_path, save_tvm(tmp_path, rest))


def test_matrices_of_tvm_fit_the_width_and_the_vocabulary(tmp_path: Path) -> None:
    """A file that agrees with the manifest, whose head does not give the logits of all tokens."""
    for linear, needed in (("head", r"\[264, 64\]"), ("layers.0.attn_in", r"\[any, 64\]")):
        linears = tuple(Linear(linear, 96, 128) if one.name == linear else one for one in TVM_LINEARS)
        kinds = tvm_kinds()
        wider = matrix_kinds(Linear(linear, 96, 128), 64, facts().slices)
        kinds |= {f"{linear}.{part}": kind for part, kind in wider.items()}
        found = replace(save_tvm(tmp_path, kinds), weights=Weights(0, {}, linears))
        with pytest.raises(BundleError, match=f"{linear} is 96 x 128 in the manifest, needed {needed}"):
            check_contents(tmp_path, found)
