"""Hostile bundles.  Each function below ``ATTACKS`` changes a copy of a good bundle; its name says how.

All hashes are made right again afterwards, unless the attack is on the manifest itself.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import socket
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
from json_fields import set_in
from onnx import TensorProto, helper
from tiny_bundle import write_manifest

HUGE_BYTES = 3 << 30
MANY_FILES = 20_000
ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m"

Attack = Callable[[Path], object]

CONFIG, MANIFEST, GRAPH, TOKENIZER = "genai_config.json", "manifest.json", "model.onnx", "tokenizer.json"


def setting(where: str, value: Any) -> Attack:
    """A value of genai_config.json."""
    return lambda folder: set_in(folder / CONFIG, where, value)


def text(name: str, old: str, new: str) -> Attack:
    """Other text in a file, for JSON that Python would not write."""

    def change(folder: Path) -> None:
        path = folder / name
        content = path.read_text()
        assert old in content
        path.write_text(content.replace(old, new, 1))

    return change


def trim(document: Any) -> Attack:
    """The file that says which depths are there."""
    return lambda folder: (folder / "trim.json").write_text(json.dumps(document))


def parts(value: Any) -> Attack:
    """The ranges of each depth in the manifest."""
    return lambda folder: set_in(folder / MANIFEST, "parts", value)


def unlisted(name: str) -> Attack:
    """A file that the manifest does not list."""

    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\x7fELF")

    return change


def place(name: str, make: Callable[[Path], Any]) -> Attack:
    """Something else in a file's place."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return change


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(HUGE_BYTES)


def bound_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def moved_outside(name: str) -> Attack:
    """A link to a file outside of the bundle with the right content."""

    def change(folder: Path) -> None:
        outside = folder.parent / "outside"
        outside.mkdir(exist_ok=True)
        (folder / name).rename(outside / name)
        (folder / name).symlink_to(outside / name)

    return change


def graph(change: Callable[[onnx.ModelProto], Any]) -> Attack:
    """Another ONNX graph."""

    def apply(folder: Path) -> None:
        model = onnx.load(folder / GRAPH)
        change(model)
        (folder / GRAPH).write_bytes(model.SerializeToString())

    return apply


def elsewhere(tensor: TensorProto, location: str) -> TensorProto:
    """The tensor, with its content in another file."""
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return tensor


def reads_elsewhere_in_a_constant(model: onnx.ModelProto) -> None:
    tensor = elsewhere(TensorProto(dims=[4], data_type=TensorProto.UINT8), "/etc/passwd")
    model.graph.node.append(helper.make_node("Constant", [], ["stolen"], value=tensor))


def a_computed_table(model: onnx.ModelProto) -> None:
    """Positions past the end of a table are read from other memory."""
    (table,) = (tensor for tensor in model.graph.initializer if tensor.name == "cos")
    model.graph.initializer.remove(table)
    model.graph.node.insert(0, helper.make_node("Constant", [], ["cos"], value=table))


def an_endless_loop(model: onnx.ModelProto) -> None:
    value = helper.make_tensor_value_info("value", TensorProto.BOOL, [])
    body = helper.make_graph([], "body", [value], [value])
    model.graph.node.append(helper.make_node("Loop", ["", ""], ["z"], body=body))


def doubled(model: onnx.ModelProto) -> None:
    """30 nodes that each double a value: 22 GB."""
    for i in range(30):
        name = f"twice.{i - 1}" if i else "avg_bits"
        model.graph.node.append(helper.make_node("Concat", [name, name], [f"twice.{i}"], axis=0))


def node(op: str, *inputs: str, **attributes: Any) -> Attack:
    """One node more in the graph."""
    return graph(lambda m: m.graph.node.append(helper.make_node(op, inputs, ["more"], name="more", **attributes)))


def with_tensors(op: str, *tensors: TensorProto, **attributes: Any) -> Attack:
    """One node more, of tensors of its own."""

    def change(model: onnx.ModelProto) -> None:
        model.graph.initializer.extend(tensors)
        names = [tensor.name for tensor in tensors]
        model.graph.node.append(helper.make_node(op, names, ["more"], name="more", **attributes))

    return graph(change)


def zeros(name: str, *shape: int, kind: int = TensorProto.FLOAT) -> TensorProto:
    """A tensor whose content is small, as its shape says."""
    size = math.prod(shape) * (8 if kind == TensorProto.INT64 else 4)
    return TensorProto(name=name, dims=shape, data_type=kind, raw_data=bytes(size))


def an_attribute_that_comes_twice(model: onnx.ModelProto) -> None:
    """Readers disagree which of them counts."""
    (found,) = (node for node in model.graph.node if node.output[0] == "total64")
    found.attribute.extend([helper.make_attribute("axis", 0), helper.make_attribute("axis", 0)])


def a_flag_that_is_neither_yes_nor_no(model: onnx.ModelProto) -> None:
    """ONNX Runtime keeps the dimensions for 1 alone."""
    (found,) = (node for node in model.graph.node if node.output[0] == "mean")
    found.attribute[0].i = 2


def an_attribute_of_no_caller(model: onnx.ModelProto) -> None:
    (found,) = (node for node in model.graph.node if node.output[0] == "total64")
    found.attribute.add(name="axis", ref_attr_name="axis", type=onnx.AttributeProto.INT)


def older_operators(model: onnx.ModelProto) -> None:
    """They take axes as attributes."""
    model.opset_import[0].version = 17


def a_row_again_and_again(model: onnx.ModelProto) -> None:
    """100,000 times 100,000 numbers."""
    model.graph.initializer.extend([zeros("wide", 1, 100_000), zeros("again", 100_000, kind=TensorProto.INT64)])
    (found,) = (node for node in model.graph.node if node.output[0] == "total64")
    found.input[:] = ["wide", "again"]


def logits_of_every_token(model: onnx.ModelProto) -> None:
    """The head takes all tokens of a pass."""
    (found,) = (node for node in model.graph.node if node.output[0] == "raw")
    found.input[0] = "h"


def function(name: str, *nodes: onnx.NodeProto) -> Attack:
    """A function that a node of the graph calls."""
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("ai.mbq", 1)]

    def change(model: onnx.ModelProto) -> None:
        model.functions.append(helper.make_function("ai.mbq", name, ["x"], ["y"], list(nodes), opsets))
        model.opset_import.add(domain="ai.mbq", version=1)

    return graph(change)


def whole_numbers(name: str, *values: int) -> onnx.NodeProto:
    """A constant in a function."""
    return helper.make_node(
        "Constant", [], [name], value=helper.make_tensor("", TensorProto.INT64, [len(values)], values)
    )


def a_location_that_comes_twice(model: onnx.ModelProto) -> None:
    elsewhere(elsewhere(model.graph.initializer[0], TOKENIZER), "/etc/passwd")


def a_second_graph(folder: Path) -> None:
    """Protocol buffers merge two graphs into one."""
    more = onnx.ModelProto()
    more.graph.initializer.append(
        elsewhere(TensorProto(dims=[4], data_type=TensorProto.UINT8, name="x"), "/etc/passwd")
    )
    (folder / GRAPH).write_bytes((folder / GRAPH).read_bytes() + more.SerializeToString())


def reads_elsewhere_in_an_inner_graph(model: onnx.ModelProto) -> None:
    tensor = elsewhere(TensorProto(dims=[4], data_type=TensorProto.UINT8, name="stolen"), "/etc/passwd")
    inner = helper.make_graph([], "inner", [], [], [tensor])
    model.graph.node.append(helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner))


def a_tensor_of_a_terabyte(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(TensorProto(dims=[1 << 40], data_type=TensorProto.UINT8, name="huge"))


def a_negative_shape(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[0] = -1


def a_table_that_is_too_short(folder: Path) -> None:
    """The context is longer than the rotary table, in both files."""
    for path, where in ((CONFIG, "model.context_length"), (CONFIG, "search.max_length")):
        set_in(folder / path, where, 9600)
    set_in(folder / MANIFEST, "model.context_length", 9600)


def more_logits_than_the_graph_gives(folder: Path) -> None:
    set_in(folder / CONFIG, "model.vocab_size", 1000)
    set_in(folder / MANIFEST, "model.vocab_size", 1000)


def more_layers_than_the_graph_has(folder: Path) -> None:
    set_in(folder / CONFIG, "model.decoder.num_hidden_layers", 9)
    set_in(folder / MANIFEST, "model.layers", 9)


def many_listed_files(folder: Path) -> None:
    """The last of them is missing."""
    document = json.loads((folder / MANIFEST).read_text())
    (folder / "many").mkdir()
    for i in range(MANY_FILES):
        name = f"many/{i}"
        (folder / name).touch()
        document["files"].append({"name": name, "size": 0, "sha256": "0" * 64})
    (folder / name).unlink()
    (folder / MANIFEST).write_text(json.dumps(document))


def many_unlisted_files(folder: Path) -> None:
    (folder / "many").mkdir()
    for i in range(MANY_FILES):
        (folder / f"many/{i}").touch()


def one_bad_byte(name: str) -> Attack:
    def change(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] = 0xFF
        (folder / name).write_bytes(data)

    return change


def list_size(folder: Path, name: str, size: int) -> None:
    """Make the manifest say a size."""
    document = json.loads((folder / MANIFEST).read_text())
    for entry in document["files"]:
        if entry["name"] == name:
            entry["size"] = size
    (folder / MANIFEST).write_text(json.dumps(document))


def listed_as_huge(name: str) -> Attack:
    """A sparse file whose size the manifest says."""

    def change(folder: Path) -> None:
        sparse(folder / name)
        list_size(folder, name, HUGE_BYTES)

    return change


def tokens(where: str, value: Any) -> Attack:
    """A value of tokenizer.json."""
    return lambda folder: set_in(folder / TOKENIZER, where, value)


def steps(name: str, *found: Any) -> dict[str, Any]:
    """Steps of the tokenizer, one after another."""
    return {"type": "Sequence", name: list(found)}


def replacing(old: str, new: str) -> dict[str, Any]:
    """A step that replaces text."""
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def cutting(expression: str) -> dict[str, Any]:
    """A step that cuts text."""
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}


def template(*pieces: Any) -> dict[str, Any]:
    """The step that puts tokens around a text."""
    special = {"<|im_end|>": {"id": "<|im_end|>", "ids": [2], "tokens": ["<|im_end|>"]}}
    return {"type": "TemplateProcessing", "single": list(pieces), "pair": [], "special_tokens": special}


TEXT = {"Sequence": {"id": "A", "type_id": 0}}
SESSION = '"session_options": {'
SEALED: dict[str, Attack] = {
    # What the engine would read beside what is checked.
    "a draft model": setting("model.draft", {"filename": "model.onnx", "session_options": {"custom_ops_library": "x"}}),
    "a second model section": text(CONFIG, '"search":', '"model": {"decoder": {"filename": "x.onnx"}}, "search":'),
    "session options that come twice": text(
        CONFIG, SESSION, '"session_options": {"enable_profiling": "/tmp/x"}, ' + SESSION
    ),
    "a library that comes twice": text(CONFIG, SESSION, SESSION + '"log_id": "a", '),
    "a profile at any path": setting("model.decoder.session_options.enable_profiling", "/tmp/profile"),
    "a provider": setting("model.decoder.session_options.provider_options", [{"OpenVINO": {}}]),
    "a provider that is named": setting("model.decoder.session_options.providers", ["./evil"]),
    "a session entry": setting("model.decoder.session_options.config_entries", {"ep.context_enable": "1"}),
    "a library in a portable bundle": setting("model.decoder.session_options.custom_ops_library", "lib/libmbq_ops.so"),
    "a library elsewhere": setting("model.decoder.session_options.custom_ops_library", "/tmp/x.so"),
    "a graph elsewhere": setting("model.decoder.filename", "../x.onnx"),
    "another kind of model": setting("model.type", "whisper"),
    "a vision model": setting("model.vision", {"filename": "x.onnx"}),
    "another input name": setting("model.decoder.inputs.input_ids", "x"),
    "beams": setting("search.num_beams", 1000),
    # Graphs.
    "weights of another file": graph(lambda m: elsewhere(m.graph.initializer[0], "/etc/passwd")),
    "weights of a parent folder": graph(lambda m: elsewhere(m.graph.initializer[0], "../outside")),
    "a constant of another file": graph(reads_elsewhere_in_a_constant),
    "an inner graph of another file": graph(reads_elsewhere_in_an_inner_graph),
    "a table that is computed": graph(a_computed_table),
    "an endless loop": graph(an_endless_loop),
    "a location that comes twice": graph(a_location_that_comes_twice),
    "a second graph": a_second_graph,
    "memory of the process as weights": graph(lambda m: elsewhere(m.graph.initializer[0], "*/_ORT_MEM_ADDR_/*")),
    "operators of an unknown domain": graph(
        lambda m: m.graph.node.append(helper.make_node("Run", ["x"], ["y"], domain="evil"))
    ),
    "session settings in the graph": graph(lambda m: m.metadata_props.add(key="ort_config", value="{}")),
    "a training graph": graph(lambda m: m.training_info.add()),
    "sparse weights": graph(lambda m: m.graph.sparse_initializer.add()),
    "a tensor of a terabyte": graph(a_tensor_of_a_terabyte),
    "a Concat that doubles a value": graph(doubled),
    "a Concat of one value": node("Concat", "avg_bits", "avg_bits", "avg_bits", axis=0),
    "a shape of a billion": node("ConstantOfShape", "end"),
    "a value that is expanded": node("Expand", "avg_bits", "end"),
    "a value that is tiled": node("Tile", "avg_bits", "end"),
    "a range": node("Range", "last", "end", "last"),
    "padding": node("Pad", "avg_bits", "end"),
    "a stock operator of another domain": node("Tile", "avg_bits", "end", domain="ai.onnx"),
    "a function that the exporter does not write": function("Evil", helper.make_node("Abs", ["x"], ["y"])),
    "functions that call each other": function(
        "Router", *(helper.make_node("SlicedMatMul", ["x"], [f"y{i}"], domain="ai.mbq") for i in range(10))
    ),
    "padding in a function": function(
        "Router", whole_numbers("by", 0, 1 << 40), helper.make_node("Pad", ["x", "by"], ["y"], name="more")
    ),
    "padding by an input of a function": function("Router", helper.make_node("Pad", ["x", "x"], ["y"], name="more")),
    "a shape in a function": function(
        "Router", whole_numbers("by", 1 << 40), helper.make_node("ConstantOfShape", ["by"], ["y"], name="more")
    ),
    "a column plus a row": with_tensors("Add", zeros("column", 200_000, 1), zeros("row", 1, 200_000)),
    "a product of a column and a row": with_tensors("MatMul", zeros("column", 200_000, 1), zeros("row", 1, 200_000)),
    "a row gathered again and again": graph(a_row_again_and_again),
    "logits of every token": graph(logits_of_every_token),
    "a value that two nodes give": graph(
        lambda m: m.graph.node.append(helper.make_node("MatMul", ["h", "head"], ["h"]))
    ),
    "a value that nobody gives": node("MatMul", "nothing", "head"),
    "a value of the wrong width": node("MatMul", "h", "cos"),
    "an attribute that comes twice": graph(an_attribute_that_comes_twice),
    "a flag that is 2": graph(a_flag_that_is_neither_yes_nor_no),
    "an attribute of no caller": graph(an_attribute_of_no_caller),
    "older operators": graph(older_operators),
    "operators of a domain twice": graph(lambda m: m.opset_import.add(domain="ai.onnx", version=21)),
    "an input that no decoder has": graph(lambda m: m.graph.input.add(name="other")),
    "a negative shape": graph(a_negative_shape),
    "a graph that is cut off": lambda f: (f / GRAPH).write_bytes((f / GRAPH).read_bytes()[:-100]),
    "an empty graph": lambda f: (f / GRAPH).write_bytes(b""),
    "a graph of tiny fields": lambda f: (f / GRAPH).write_bytes(b"\x08\x01" * 7_000_000),
    # Values.
    "chunks of 0 tokens": setting("search.chunk_size", 0),
    "chunks of -1 tokens": setting("search.chunk_size", -1),
    "chunks of text": setting("search.chunk_size", "many"),
    "chunks of a billion tokens": setting("search.chunk_size", 10**9),
    "chunks of true": setting("search.chunk_size", True),
    "no end token": setting("model.eos_token_id", None),
    "an empty list of end tokens": setting("model.eos_token_id", []),
    "an end token outside": setting("model.eos_token_id", [264]),
    "an end token of text": setting("model.eos_token_id", ["2"]),
    "an opening token of text": setting("model.bos_token_id", "1"),
    "no heads": setting("model.decoder.num_attention_heads", 0),
    "other heads": setting("model.decoder.num_key_value_heads", 4),
    "heads that do not divide": setting("model.decoder.num_attention_heads", 3),
    "another head size": setting("model.decoder.head_size", 32),
    "a bad byte in the tokenizer": one_bad_byte(TOKENIZER),
    "a bad byte in the tokenizer's settings": one_bad_byte("tokenizer_config.json"),
    "a bad byte in the template": one_bad_byte("chat_template.jinja"),
    "a bad byte in the engine's settings": one_bad_byte(CONFIG),
    "a vocabulary that comes twice": text(TOKENIZER, '"vocab":', '"vocab": {}, "vocab":'),
    "34 steps that double a text": tokens("normalizer", steps("normalizers", *[replacing("A", "AA")] * 34)),
    "steps within steps": tokens(
        "normalizer", steps("normalizers", *[steps("normalizers", *[replacing("A", "B")] * 6)] * 3)
    ),
    "7 steps that double a text": tokens("normalizer", steps("normalizers", *[replacing("A", "AA")] * 7)),
    "7 steps that double a reply": tokens("decoder", steps("decoders", *[replacing("A", "AA")] * 7)),
    "a long text for a letter": tokens("normalizer", replacing("A", "A" * 65)),
    "an expression that matches nothing": tokens(
        "normalizer", steps("normalizers", *[{**replacing("", "AAA"), "pattern": {"Regex": ""}}] * 4)
    ),
    "an expression that takes 2^n steps": tokens("pre_tokenizer", cutting("(A+)+$")),
    "an expression that takes n^9 steps": tokens(
        "normalizer", {**cutting("A*" * 8 + "B"), "type": "Replace", "content": ""}
    ),
    "an expression that refers to itself": tokens("pre_tokenizer", steps("pretokenizers", cutting(r"(A\g<1>?)+"))),
    "an expression that looks back": tokens("decoder", {**cutting("(?<=A+)B"), "type": "Replace", "content": "C"}),
    "an expression of 2000 letters": tokens("pre_tokenizer", cutting("A" * 2000)),
    "spaces that are tried again and again": tokens("pre_tokenizer", cutting(r"\s+$")),
    "an expression that is a number": tokens("pre_tokenizer", {**cutting(""), "pattern": {"Regex": 1}}),
    "a template of the wrong kind": tokens("post_processor", {**template(TEXT), "single": 1}),
    "bytes of bytes": tokens("normalizer", steps("normalizers", *[{"type": "ByteLevel"}] * 7)),
    "a table of long texts": tokens(
        "normalizer", {"type": "Precompiled", "precompiled_charsmap": b64encode(bytes(4) + b"A" * 65).decode()}
    ),
    "a step without a type": tokens("normalizer", {"normalizers": []}),
    "a template that repeats the text": tokens("post_processor", template(TEXT, TEXT)),
    "a template of 100 tokens": tokens(
        "post_processor", template(*[{"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}] * 100, TEXT)
    ),
    "a long suffix of each word": tokens("model.end_of_word_suffix", "A" * 65),
    "a tokenizer of 7 million lists": lambda f: (f / TOKENIZER).write_text("[" + "[]," * 7_000_000 + "[]]"),
    "tokenizer settings that come twice": text("tokenizer_config.json", "{", '{"eos_token": "x", '),
    "a key that comes twice, once escaped": text(CONFIG, '"search":', '"se\\u0061rch": {}, "search":'),
    "settings in UTF-16": lambda f: (f / CONFIG).write_bytes((f / CONFIG).read_text().encode("utf-16")),
    "settings that are a list": lambda f: (f / CONFIG).write_text("[]"),
    "settings nested deep": lambda f: (f / CONFIG).write_text("[" * 100_000),
    "settings larger than the bound": lambda f: (f / CONFIG).write_text(" " * (2 << 20)),
}
"""Changed before the manifest is written, so that all hashes are right."""

RAW: dict[str, Attack] = {
    # Files that nobody listed.
    "a hidden library": unlisted(".libevil.so"),
    "a library named like a readme": unlisted("readme.so"),
    "a library named like a licence": unlisted("LICENSE-onnx.so"),
    "a folder named like a notice": unlisted("notice/lib.so"),
    "a library in a hidden folder": unlisted(".git/lib.so"),
    "a library named like git's attributes": unlisted(".gitattributes.so"),
    "a library in the hub's cache": unlisted(".cache/lib.so"),
    "a library among a download's records": unlisted(".cache/huggingface/download/lib.so"),
    "a record that is a link": lambda f: [
        (f / ".cache/huggingface/download").mkdir(parents=True),
        (f / ".cache/huggingface/download/x.metadata").symlink_to("/etc/passwd"),
    ],
    "another template": unlisted("additional_chat_templates/x.jinja"),
    "a pipe that nobody listed": lambda f: os.mkfifo(f / "x"),
    "a paper that is a link": lambda f: (f / "README.md").symlink_to("/etc/passwd"),
    # Links and special files.
    "a linked tokenizer": moved_outside(TOKENIZER),
    "a linked graph": moved_outside(GRAPH),
    "a linked manifest": moved_outside(MANIFEST),
    "a linked folder": lambda f: (f / "lib").symlink_to("/usr/lib"),
    **{f"a pipe for {name}": place(name, os.mkfifo) for name in (MANIFEST, CONFIG, TOKENIZER, GRAPH)},
    **{
        f"/dev/zero for {name}": place(name, lambda p: p.symlink_to("/dev/zero"))
        for name in (MANIFEST, TOKENIZER, GRAPH)
    },
    **{f"3 GB for {name}": place(name, sparse) for name in (MANIFEST, CONFIG, TOKENIZER, GRAPH)},
    "a socket for the tokenizer": place(TOKENIZER, bound_socket),
    "a folder for the tokenizer": place(TOKENIZER, os.mkdir),
    # What says which slices are there.
    **{
        f"depth {depth!r:.12} in trim.json": trim({"depth": depth})
        for depth in (0, -1, True, 1.0, 10**17, None, "1", 1, [])
    },
    "a list for trim.json": trim([1]),
    "a trim.json nested deep": lambda f: (f / "trim.json").write_text("[" * 3000),
    "a trim.json of 3 GB": lambda f: sparse(f / "trim.json"),
    "a pipe for trim.json": lambda f: os.mkfifo(f / "trim.json"),
    "a link for trim.json": lambda f: (f / "trim.json").symlink_to("/dev/zero"),
    "parts of the tokenizer": parts([[{"name": TOKENIZER, "begin": 0, "end": 10}]]),
    "parts of a file elsewhere": parts([[{"name": "../../etc/passwd", "begin": 0, "end": 0}]]),
    "parts of a negative range": parts([[{"name": "model.onnx.data", "begin": -4096, "end": 0}]]),
    "parts of 10^17 bytes": parts([[{"name": "model.onnx.data", "begin": 0, "end": 10**17}]]),
    "50,000 depths": parts([[]] * 50_000),
    "50,000 ranges of nothing": parts([[{"name": "model.onnx.data", "begin": 0, "end": 0}] * 50_000]),
    # The manifest.
    "a context of 400 digits": text(MANIFEST, '"context_length": 96', '"context_length": ' + "9" * 400),
    "a size of 400 digits": text(MANIFEST, '"size": ', '"size": ' + "1" * 400),
    "a budget of 400 digits": text(MANIFEST, '"min_bits": 3.0', '"min_bits": ' + "1" * 400),
    "a budget of 1e999": text(MANIFEST, '"max_bits": 8.0', '"max_bits": 1e999'),
    "a name with half a character": text(MANIFEST, '"tiny"', '"\\ud800"'),
    "a file name with half a character": text(MANIFEST, '"tokenizer.json"', '"tokenizer\\udfff.json"'),
    "a file name with an escape": text(MANIFEST, '"tokenizer.json"', '"\\u001b[2Jtokenizer.json"'),
    "a file name of 5000 letters": text(MANIFEST, '"tokenizer_config.json"', '"' + "a" * 5000 + '"'),
    "files that come twice": text(MANIFEST, '"files": [', '"files": [], "files": ['),
    "an engine 100,000 times": text(MANIFEST, '"engines": [', '"engines": [' + '"onnx", ' * 100_000),
    "a million slices": text(MANIFEST, '"slices": [', '"slices": [' + "1, " * 1_000_000),
    "facts nested deep": text(MANIFEST, '"windows": 4', '"windows": ' + "[" * 900 + "]" * 900),
    "a layer count of true": text(MANIFEST, '"layers": 1', '"layers": true'),
    "a manifest nested deep": lambda f: (f / MANIFEST).write_text('{"format":' * 100_000),
    "a manifest of 4 million lists": lambda f: (f / MANIFEST).write_text("[" + "[]," * 4_000_000 + "[]]"),
    "a manifest with a bad byte": one_bad_byte(MANIFEST),
    "20,000 files that are listed": many_listed_files,
    "20,000 files that are not listed": many_unlisted_files,
    "a 3 GB graph that the manifest lists": listed_as_huge(GRAPH),
    "a 3 GB tokenizer that the manifest lists": listed_as_huge(TOKENIZER),
    "a 3 GB template that the manifest lists": listed_as_huge("chat_template.jinja"),
    "3 GB of settings that the manifest lists": listed_as_huge(CONFIG),
}
"""The manifest is changed, or does not know of the change."""


BOTH: dict[str, Attack] = {
    "a long context": a_table_that_is_too_short,
    "a large vocabulary": more_logits_than_the_graph_gives,
    "many layers": more_layers_than_the_graph_has,
}
"""The manifest says what the settings say, and all hashes are right."""

REASONS = {
    "a vocabulary that comes twice": "'vocab' comes twice",
    "34 steps that double a text": "has 34 steps",
    "steps within steps": "has 18 steps",
    "7 steps that double a text": "128 times longer",
    "7 steps that double a reply": "128 times longer",
    "a long text for a letter": "65 letters",
    "an expression that matches nothing": "256 times longer",
    **dict.fromkeys(
        (
            "an expression that takes 2^n steps",
            "an expression that takes n^9 steps",
            "an expression that refers to itself",
            "an expression that looks back",
            "an expression of 2000 letters",
            "spaces that are tried again and again",
            "an expression that is a number",
        ),
        "none of those whose time is known",
    ),
    "bytes of bytes": "128 times longer",
    "a template of the wrong kind": "no list",
    "a table of long texts": "65 times longer",
    "a step without a type": "without a type",
    "a template that repeats the text": "repeats the text",
    "a template of 100 tokens": "101 entries",
    "a long suffix of each word": "65 letters",
    "a tokenizer of 7 million lists": "6000000 parts",
    "operators of an unknown domain": "(evil.Run)",
    "a Concat that doubles a value": "one more than the 1",
    "a Concat of one value": "more than 2 times",
    "a shape of a billion": "'more' (ConstantOfShape)",
    "a value that is expanded": "'more' (Expand)",
    "a value that is tiled": "'more' (Tile)",
    "a range": "'more' (Range)",
    "padding": "'more' (Pad)",
    "a stock operator of another domain": "'more' (Tile)",
    "a function that the exporter does not write": "function 'ai.mbq.Evil'",
    "functions that call each other": "(ai.mbq.SlicedMatMul)",
    "padding in a function": "'more' (Pad) adds more",
    "padding by an input of a function": "'more' (Pad) adds more",
    "a shape in a function": "'more' (ConstantOfShape) has a shape",
    "a column plus a row": "makes 40000000000 numbers",
    "a product of a column and a row": "makes 40000000000 numbers",
    "a row gathered again and again": "makes 10000000000 numbers",
    "logits of every token": "[1, 8, 264]",
    "a value that two nodes give": "is there already",
    "a value that nobody gives": "no node before it gives",
    "a value of the wrong width": "does not fit its inputs",
    "an attribute that comes twice": "axis comes twice",
    "a flag that is 2": "'mean' (ReduceMean) does not fit",
    "an attribute of no caller": "'total64' (Gather) does not fit",
    "older operators": "version 17, needed 21 to 22",
    "operators of a domain twice": "named twice",
    "an input that no decoder has": "the input 'other'",
    "a long context": "positions",
    "a large vocabulary": "logits",
    "many layers": "past_key_values.1.key",
}
"""Words of the message for attacks that another check could refuse by chance."""

ATTACKS = [*SEALED, *RAW, *BOTH]


def rehash(folder: Path) -> None:
    """Set the hashes and sizes of a manifest, and leave all else."""
    document = json.loads((folder / MANIFEST).read_text())
    for entry in document["files"]:
        content = (folder / entry["name"]).read_bytes()
        entry["size"], entry["sha256"] = len(content), hashlib.sha256(content).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(document))


def attack(folder: Path, name: str) -> None:
    """Make one attack.

    Args:
        folder: a copy of the good bundle.
        name: one of ``ATTACKS``.
    """
    if name in SEALED:
        SEALED[name](folder)
        write_manifest(folder)
    elif name in BOTH:
        BOTH[name](folder)
        rehash(folder)
    else:
        RAW[name](folder)
