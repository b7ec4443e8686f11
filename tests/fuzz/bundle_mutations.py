"""What a hostile or damaged bundle may look like.  All hashes are made right again, unless the change is on them."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from pathlib import Path

import onnx
from bundles import rehash
from changes import damage, make_odd, mutate_json, mutate_safetensors
from hostile_templates import HOSTILE
from onnx import TensorProto, helper

GRAPH, NATIVE = "model.onnx", (".so",)

Change = Callable[[Path, random.Random], None]

MEANS_THE_SAME = {"values of the engine's settings", "values of the manifest"}
"""Kinds that leave the content alone: a bundle that is still run must give the same reply."""


def _files(folder: Path) -> list[Path]:
    """Files that a change may fall on.  Native code is its maker's."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix not in NATIVE)


def _json(name: str) -> Change:
    return lambda folder, draw: mutate_json(folder / name, draw)


def _bytes(folder: Path, draw: random.Random) -> None:
    """Some bytes of one file change."""
    damage(draw.choice(_files(folder)), draw, draw.choice((256, 4096, 1 << 20)))


def _weights(folder: Path, draw: random.Random) -> None:
    """Numbers of the weights become infinite, no numbers, or others."""
    path = draw.choice([path for path in _files(folder) if path.suffix in (".data", ".safetensors", ".onnx")])
    data = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 4, 64))):
        at = draw.randrange(len(data) // 2, len(data) - 8) & ~3
        value = draw.choice((b"\x00\x00\x80\x7f", b"\x00\x7c\x00\x7c", b"\xff\xff\xff\xff", b"\x00\x00\xc0\x7f"))
        data[at : at + 4] = value
    path.write_bytes(data)


def _template(folder: Path, draw: random.Random) -> None:
    (folder / "chat_template.jinja").write_text(draw.choice(list(HOSTILE.values())), encoding="utf-8")


def _odd(folder: Path, draw: random.Random) -> None:
    make_odd(draw.choice(_files(folder)), draw)


def _added(folder: Path, draw: random.Random) -> None:
    """A file that nobody listed."""
    names = (".x.so", "x.onnx", "README.md", "LICENSE", "lib/x.so", "a/b/c", "adapter.json", "model.onnx.data2")
    path = folder / draw.choice(names)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x7fELF" * 8)


def _header(folder: Path, draw: random.Random) -> None:
    mutate_safetensors(folder / "decoder.safetensors", draw)


def _graph(folder: Path, draw: random.Random) -> None:
    """One to three changes of the graph or of its functions."""
    model = onnx.load(folder / GRAPH, load_external_data=False)
    for _ in range(draw.randint(1, 3)):
        draw.choice(_GRAPH_CHANGES)(model, draw)
    (folder / GRAPH).write_bytes(model.SerializeToString())


def _some_nodes(model: onnx.ModelProto, draw: random.Random) -> list[onnx.NodeProto]:
    places = [model.graph.node, *(function.node for function in model.functions)]
    return draw.choice([place for place in places if len(place)])  # type: ignore[no-any-return]


def _values(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> list[str]:
    names = {name for node in nodes for name in (*node.input, *node.output)}
    return sorted(names | {tensor.name for tensor in model.graph.initializer})


def _rewire(model: onnx.ModelProto, draw: random.Random) -> None:
    nodes = _some_nodes(model, draw)
    node = draw.choice(nodes)
    names = draw.choice((node.input, node.input, node.output))
    if names:
        names[draw.randrange(len(names))] = draw.choice(_values(model, nodes))


def _another_operator(model: onnx.ModelProto, draw: random.Random) -> None:
    nodes = _some_nodes(model, draw)
    node, like = draw.choice(nodes), draw.choice(nodes)
    node.op_type, node.domain = like.op_type, like.domain


def _one_more_node(model: onnx.ModelProto, draw: random.Random) -> None:
    nodes = _some_nodes(model, draw)
    node = onnx.NodeProto()
    node.CopyFrom(draw.choice(nodes))
    node.output[:] = [f"more.{draw.randrange(10**6)}" for _ in node.output]
    nodes.append(node)


def _one_node_less(model: onnx.ModelProto, draw: random.Random) -> None:
    nodes = _some_nodes(model, draw)
    del nodes[draw.randrange(len(nodes))]


def _another_order(model: onnx.ModelProto, draw: random.Random) -> None:
    nodes = _some_nodes(model, draw)
    i, j = draw.randrange(len(nodes)), draw.randrange(len(nodes))
    first = onnx.NodeProto()
    first.CopyFrom(nodes[i])
    nodes[i].CopyFrom(nodes[j])
    nodes[j].CopyFrom(first)


def _attribute(model: onnx.ModelProto, draw: random.Random) -> None:
    node = draw.choice([node for node in _some_nodes(model, draw) if node.attribute] or [model.graph.node[0]])
    value = draw.choice((-1, 0, 1, 2, 3, 7, 1 << 20, (1 << 31) - 1, 1 << 40, (1 << 63) - 1, -(1 << 63)))
    if not node.attribute:
        node.attribute.append(helper.make_attribute(draw.choice(("axis", "keepdims", "alpha", "to")), value))
        return
    found = draw.choice(node.attribute)
    if found.HasField("i"):
        found.i = value
    elif found.HasField("f"):
        found.f = draw.choice((0.0, -1.0, 1e30, float("nan"), float("inf")))
    elif found.ints:
        found.ints[draw.randrange(len(found.ints))] = value
    elif found.HasField("t"):
        _tensor(found.t, draw)


def _initialiser(model: onnx.ModelProto, draw: random.Random) -> None:
    _tensor(draw.choice(model.graph.initializer), draw)


def _tensor(tensor: TensorProto, draw: random.Random) -> None:
    """Another shape, type, place or content."""
    number = draw.choice((0, 1, 2, 3, 64, 1 << 20, 1 << 40, (1 << 63) - 1, -1))
    kind = draw.choice(("shape", "shape", "type", "place", "content", "content"))
    if kind == "shape" and tensor.dims:
        tensor.dims[draw.randrange(len(tensor.dims))] = number
    elif kind == "shape":
        tensor.dims.append(number)
    elif kind == "type":
        tensor.data_type = draw.choice((0, 1, 2, 3, 6, 7, 8, 9, 10, 11, 14, 16, 20, 99))
    elif kind == "place" and tensor.external_data:
        draw.choice(tensor.external_data).value = draw.choice((str(number), "", "x", "../x", "tokenizer.json", "1e3"))
    elif tensor.raw_data:
        data = bytearray(tensor.raw_data)
        for _ in range(draw.choice((1, 2, 8))):
            data[draw.randrange(len(data))] = draw.randrange(256)
        tensor.raw_data = bytes(data)
    elif tensor.int64_data:
        tensor.int64_data[draw.randrange(len(tensor.int64_data))] = number
    elif tensor.int32_data:
        tensor.int32_data[draw.randrange(len(tensor.int32_data))] = number % 256


def _signature(model: onnx.ModelProto, draw: random.Random) -> None:
    value = draw.choice([*model.graph.input, *model.graph.output])
    dims = value.type.tensor_type.shape.dim
    kind = draw.choice(("name", "type", "side", "rank"))
    if kind == "name":
        value.name = draw.choice(("x", "", "logits", "input_ids"))
    elif kind == "type":
        value.type.tensor_type.elem_type = draw.choice((1, 6, 7, 10, 99))
    elif kind == "rank" or not dims:
        dims.add().dim_value = 1
    else:
        draw.choice(dims).dim_value = draw.choice((0, 1, 3, 1 << 40, -1))


def _model(model: onnx.ModelProto, draw: random.Random) -> None:
    kind = draw.choice(("opset", "domain", "ir", "function", "function name"))
    if kind == "opset":
        draw.choice(model.opset_import).version = draw.choice((0, 1, 7, 13, 17, 99, -1))
    elif kind == "domain":
        draw.choice(model.opset_import).domain = draw.choice(("", "ai.onnx", "com.microsoft", "evil"))
    elif kind == "ir":
        model.ir_version = draw.choice((0, 3, 8, 99))
    elif model.functions:
        function = draw.choice(model.functions)
        names = draw.choice((function.input, function.output, function.attribute))
        if kind == "function name":
            function.name = draw.choice(model.functions).name
        elif names:
            names[draw.randrange(len(names))] = draw.choice((*names, "x"))


_GRAPH_CHANGES = (
    _rewire, _rewire, _another_operator, _one_more_node, _one_node_less, _another_order, _attribute, _attribute,
    _initialiser, _initialiser, _signature, _model,
)  # fmt: skip

CHANGES: dict[str, tuple[Change, str]] = {
    "values of the engine's settings": (_json("genai_config.json"), "genai_config.json"),
    "values of the manifest": (_json("manifest.json"), "manifest.json"),
    "values of the tokenizer": (_json("tokenizer.json"), "tokenizer.json"),
    "values of the tokenizer's settings": (_json("tokenizer_config.json"), "tokenizer_config.json"),
    "bytes of any file": (_bytes, "manifest.json"),
    "graph": (_graph, GRAPH),
    "weights": (_weights, "manifest.json"),
    "template": (_template, "chat_template.jinja"),
    "odd files": (_odd, "manifest.json"),
    "another file": (_added, "manifest.json"),
    "header of safetensors": (_header, "decoder.safetensors"),
}
"""How a bundle is changed, and the file that it must have."""

_KEEP_HASHES = {"values of the manifest", "odd files", "another file"}


def kinds(folder: Path) -> list[str]:
    """Changes that a bundle can have; the graph comes four times as often.

    Args:
        folder: the unchanged bundle.
    """
    found = [name for name, (_, needs) in CHANGES.items() if (folder / needs).exists()]
    return found + ["graph"] * 3 * ("graph" in found)


def mutate(folder: Path, kind: str, draw: random.Random) -> None:
    """Change a bundle, and set the hashes of its manifest.

    Args:
        folder: a copy of a bundle.
        kind: a key of ``CHANGES``.
        draw: the generator.
    """
    CHANGES[kind][0](folder, draw)
    if kind not in _KEEP_HASHES:
        # The change may be on the manifest itself, which then may name files that are not there.
        with contextlib.suppress(ValueError, KeyError, TypeError, OSError):
            rehash(folder)
