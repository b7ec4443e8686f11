"""Checks that a bundle is whole and asks for nothing that a bundle does not need.

No native code runs here.  ``mbq verify``, ``mbq inspect`` and every engine call ``check_bundle`` before they use a
bundle.  It compares sizes and shapes in the files with the manifest.  The values of weights are not looked at.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

from ..errors import BundleError
from .facts import Linear
from .file_names import GPU_FILES
from .genai_config import Settings, caches, heads_of, keeping, read_settings, states
from .gpu_plan import FOLDER, read_plan
from .layout import kv_row_bytes, whole_blocks
from .manifest import Manifest
from .onnx_file import UINT8, Graph, Tensor, read_graph
from .operators import unknown_node, unknown_opset
from .parameters import check_parameters, matrix_kinds
from .reading import check_text, read_json
from .shapes import Value, bounds, infer
from .tensors import WEIGHTS, read_entries
from .tokenizer_file import check_tokenizer
from .verify import check_sizes, check_unlisted

_TEXTS = {"chat_template.jinja": 4 << 20}
_OTHER_JSON = {"tokenizer_config.json": 8 << 20, "generation_config.json": 1 << 20}
"""Most bytes of files that this package does not read itself.  Published models have half as much at most."""
_MOST_DIGITS = 40  # Hugging Face writes 10^30 for no limit


def check_bundle(folder: Path, manifest: Manifest) -> Settings:
    """Check all of a bundle but the hashes of its files.

    Args:
        folder: folder of the bundle.
        manifest: the bundle's manifest.

    Returns:
        The checked values of ``genai_config.json``.

    Raises:
        BundleError: a file is missing, not listed, not a regular file, or does not say what the manifest says.
    """
    check_sizes(folder, manifest)
    check_unlisted(folder, manifest)
    settings = read_settings(folder, manifest)
    check_tokenizer_files(folder)
    _check_engines(folder, manifest, settings)
    return settings


def check_tokenizer_files(folder: Path) -> None:
    """Check the files that make text of tokens, and what saves with them; those that are there.

    Args:
        folder: folder of a bundle, or one that a tokenizer was saved to.

    Raises:
        BundleError: a file cannot be read, is too large, or has what no bundle may have.
    """
    if (folder / "tokenizer.json").exists():
        check_tokenizer(folder / "tokenizer.json")
    for name, most_bytes in _TEXTS.items():
        if (folder / name).exists():
            check_text(folder / name, most_bytes)
    for name, most_bytes in _OTHER_JSON.items():
        if (folder / name).exists():
            read_json(folder / name, most_bytes, most_digits=_MOST_DIGITS)


def check_contents(folder: Path, manifest: Manifest) -> None:
    """Compare the tensors of each engine's files with the manifest's matrices.

    Args:
        folder: folder of the bundle.
        manifest: the bundle's manifest.

    Raises:
        BundleError: a tensor is missing or has another shape; the message names it.
    """
    _check_engines(folder, manifest, None)


def _check_engines(folder: Path, manifest: Manifest, settings: Settings | None) -> None:
    for engine in manifest.engines:
        _CHECKS[engine](folder, manifest, settings)


def _check_onnx(folder: Path, manifest: Manifest, settings: Settings | None) -> None:
    """Check the initialisers of ``model.onnx``, and their places in the files that hold them."""
    path = folder / "model.onnx"
    graph = read_graph(path)
    _check_reach(path, graph, manifest)
    tensors = graph.initializers
    sizes = {entry.name: entry.size for entry in manifest.files}
    held = {entry.name: entry.size for entry in manifest.held_files}
    for tensor in tensors:
        _check_extent(path, tensor, sizes)
        if tensor.file and tensor.length > held[tensor.file]:
            raise BundleError(
                f"{path}: {tensor.name} has {tensor.length} bytes, more than all that is left of {tensor.file}; trim "
                "the bundle at more bits"
            )
    if manifest.native:
        _check_packed(path, tensors, manifest)
    else:
        _check_codes(path, tensors, manifest)
    if settings is not None:
        _check_cache_inputs(path, graph, manifest, settings)
        _check_pass(path, graph, manifest, settings)


def _check_tvm(folder: Path, manifest: Manifest, settings: Settings | None) -> None:
    path = folder / WEIGHTS
    entries = read_entries(path, {entry.name: entry.size for entry in manifest.files}.get(WEIGHTS))
    for name, entry in entries.items():
        if name.endswith(_ROTARY):
            _check_rotary(path, name, entry.shape, manifest)
            _check_rotated(path, name, entry.shape, manifest, settings)
    check_parameters(path, entries, manifest, settings)


def _check_plan(folder: Path, manifest: Manifest, settings: Settings | None) -> None:
    path, plan = folder / GPU_FILES[0], read_plan(folder)
    if plan.vocab_size != manifest.model.vocab_size:
        raise BundleError(
            f"{path}: vocab_size is {plan.vocab_size}, needed {manifest.model.vocab_size} as in the manifest; "
            "export the bundle again"
        )
    sizes = {entry.name: entry.size for entry in manifest.files}
    for name, buffer in plan.buffers.items():
        end = max((piece.offset + piece.bytes for piece in buffer.content), default=0)
        if end > sizes[GPU_FILES[1]]:
            raise BundleError(
                f"{path}: {name} ends at byte {end} of {GPU_FILES[1]}, which is {sizes[GPU_FILES[1]]} long; "
                "export the bundle again"
            )
    for kernel in plan.kernels.values():
        if f"{FOLDER}/{kernel.file}" not in sizes:
            raise BundleError(f"{path}: names {kernel.file}, which the manifest does not list; export the bundle again")
    for linear in manifest.weights.linears:
        for what, needed in _gpu_bytes(linear, manifest).items():
            found = plan.buffers.get(f"{linear.name}.{what}")
            if found is None or found.bytes != needed:
                raise BundleError(
                    f"{path}: {linear.name}.{what} has {0 if found is None else found.bytes} bytes, needed {needed} "
                    f"({linear.N} x {linear.K}, groups of {manifest.group_size}); export the bundle again"
                )


def _gpu_bytes(linear: Linear, manifest: Manifest) -> dict[str, int]:
    """Bytes of a matrix's buffers: a GPU has the planes of all slices in one."""
    kinds = matrix_kinds(linear, manifest.group_size, manifest.slices)
    scales = math.prod(kinds.pop("scales")[1])
    return {"planes": sum(math.prod(shape) for _, shape in kinds.values()), "scales": scales}


_CHECKS = {"onnx": _check_onnx, "tvm": _check_tvm, "opencl": _check_plan, "webgpu": _check_plan}


_ROTARY = (".cos", ".sin")
_KEY_VALUE = ("key", "value")


def _check_reach(path: Path, graph: Graph, manifest: Manifest) -> None:
    """Refuse a graph that reaches for more than a decoder needs, or whose tables end before the context does."""
    if graph.outside:
        raise BundleError(f"{path}: {graph.outside}; do not trust the bundle, export it again")
    # The bundle's own library has the operators of a native graph.
    functions = sorted(graph.functions) if manifest.native else []
    unknown = f"the function {functions[0][:80]!r} is in a native graph" if functions else ""
    unknown = unknown or unknown_opset(graph.opsets, graph.functions)
    unknown = unknown or unknown_node(graph.nodes, graph.functions, manifest.model.layers, len(manifest.slices))
    if unknown:
        raise BundleError(f"{path}: {unknown}; do not trust the bundle, export it again")
    size = path.stat().st_size
    for tensor in graph.initializers:
        if not tensor.file and math.prod(tensor.shape) > size:
            raise BundleError(f"{path}: {tensor.name[:80]} is larger than the file; export the bundle again")
        if tensor.name in graph.attention_tables:
            _check_rotary(path, tensor.name, tensor.shape, manifest)
    if computed := sorted(graph.attention_tables - {tensor.name for tensor in graph.initializers} - {""}):
        raise BundleError(f"{path}: {computed[0][:80]} is computed, needed a table; export the bundle again")


def _check_rotary(path: Path, name: str, shape: tuple[int, ...], manifest: Manifest) -> None:
    """A table has a row for each position of the context."""
    rows, needed = shape[0] if len(shape) == 2 else 0, manifest.model.context_length
    if rows < needed:
        raise BundleError(
            f"{path}: {name} has {rows} positions, context_length of the manifest is {needed}; export the bundle again"
        )


def _check_cache_inputs(path: Path, graph: Graph, manifest: Manifest, settings: Settings) -> None:
    """The graph takes a cache of the heads that genai_config.json gives to the engine, and gives all logits."""
    logits, vocab = graph.outputs.get("logits", ()), manifest.model.vocab_size
    if not logits or logits[-1] != vocab:
        raise BundleError(
            f"{path}: the output logits has shape {list(logits) or 'none'}, needed {vocab} as the manifest says; "
            "export the bundle again"
        )
    for layer in keeping(manifest):
        for state, held in states(manifest, settings).items():
            shape = graph.inputs.get(f"past.{layer}.{state}", ())
            if shape[1:] != held:
                raise BundleError(
                    f"{path}: past.{layer}.{state} has shape {list(shape) or 'none'}, needed {list(held)} behind "
                    "the batch; export the bundle again"
                )
    said = "the manifest" if manifest.model.attention else "genai_config.json"
    for layer, of in caches(manifest, settings).items():
        row = _cache_row(manifest, of.head_dim)
        for name in (f"past_key_values.{layer}.{part}" for part in _KEY_VALUE):
            shape = graph.inputs.get(name, ())
            if len(shape) != 4 or (shape[1], shape[3]) != (of.kv_heads, row):
                raise BundleError(
                    f"{path}: {name} has shape {list(shape) or 'none'}, needed {of.kv_heads} heads of "
                    f"{row} as {said} says; export the bundle again"
                )


def _cache_row(manifest: Manifest, head_dim: int) -> int:
    """Numbers of a cached key or value: float32, or bytes."""
    return head_dim if manifest.kv_bits == 32 else kv_row_bytes(head_dim, manifest.kv_bits)


def _check_pass(path: Path, graph: Graph, manifest: Manifest, settings: Settings) -> None:
    """Infer all shapes of the largest pass: nothing is larger than the model's widths need."""
    model, linears = manifest.model, manifest.weights.linears
    tokens = min(settings.chunk_size, model.context_length)
    room = model.context_length if manifest.kv_bits == 32 else whole_blocks(model.context_length)
    cached = {
        f"{layer}.{part}": Value((1, of.kv_heads, room, _cache_row(manifest, of.head_dim)))
        for layer, of in caches(manifest, settings).items()
        for part in _KEY_VALUE
    }
    kept = {
        f"{layer}.{state}": Value((1, *shape))
        for layer in keeping(manifest)
        for state, shape in states(manifest, settings).items()
    }
    inputs = {
        "input_ids": Value((1, tokens)),
        "attention_mask": Value((1, model.context_length)),
        "position_ids": Value((1, tokens), tuple(range(model.context_length - tokens, model.context_length))),
        "avg_bits": Value((2,)),
        "scored": Value((1,), (1,)),
        **{f"past_key_values.{name}": value for name, value in cached.items()},
        **{f"past.{name}": value for name, value in kept.items()},
    }
    given = dict(inputs)
    for tensor in graph.initializers:
        if tensor.name in given:
            raise BundleError(f"{path}: two values have the name {tensor.name[:80]!r}; export the bundle again")
        given[tensor.name] = Value(tensor.shape, tensor.numbers)
    if graph.inputs.get("avg_bits") != inputs["avg_bits"].shape:
        raise BundleError(
            f"{path}: avg_bits has shape {list(graph.inputs.get('avg_bits', ())) or 'none'}, needed "
            f"{list(inputs['avg_bits'].shape)}; export the bundle again"
        )
    if unknown := sorted(graph.inputs.keys() - inputs.keys()):
        raise BundleError(f"{path}: the input {unknown[0][:80]!r} is none of a decoder; export the bundle again")
    weight_bytes = sum(tensor.bytes for tensor in graph.initializers)
    if weight_bytes < model.vocab_size * model.hidden_size:
        raise BundleError(
            f"{path}: {weight_bytes} bytes of weights, needed {model.vocab_size * model.hidden_size} for "
            f"{model.vocab_size} tokens and width {model.hidden_size}; export the bundle again"
        )
    widths = [side for linear in linears for side in ((linear.K,) if linear.name == "head" else (linear.N, linear.K))]
    width = max(
        model.hidden_size, (settings.heads + 2 * settings.kv_heads) * settings.head_dim, len(linears), *widths, 1
    )
    try:
        found = infer(graph.nodes, graph.functions, given, bounds(tokens, width, model.vocab_size, weight_bytes))
    except ValueError as error:
        raise BundleError(f"{path}: {error}; do not trust the bundle, export it again") from None
    outputs: dict[str, tuple[int, ...]] = dict.fromkeys(("logits", "all_logits"), (1, 1, model.vocab_size))
    outputs |= {f"present.{name}": value.shape for name, value in (cached | kept).items()}
    outputs["avg_bits_used"] = (1,)
    for name, needed in outputs.items():
        shape = found[name].shape if name in found else ()
        if name in found and found[name].varies:
            raise BundleError(f"{path}: data decides the shape of {name}; do not trust the bundle, export it again")
        if shape != needed:
            raise BundleError(
                f"{path}: {name} gets the shape {list(shape) or 'none'}, needed {list(needed)}; export the bundle again"
            )


def _check_rotated(
    path: Path, name: str, shape: tuple[int, ...], manifest: Manifest, settings: Settings | None
) -> None:
    """A table is not wider than half a head.  The library itself refuses a cache of other heads."""
    if settings is None:
        return
    most = max((of.head_dim for of in heads_of(manifest, settings).values()), default=0)
    if 2 * shape[-1] > most:
        raise BundleError(
            f"{path}: {name} rotates {2 * shape[-1]} numbers of a head, which has {most} "
            "as genai_config.json says; export the bundle again"
        )


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


def _check_packed(path: Path, tensors: list[Tensor], manifest: Manifest) -> None:
    found = Counter(tensor.shape for tensor in tensors if tensor.element_type == UINT8)
    for linear in manifest.weights.linears:
        for what, (_, shape) in matrix_kinds(linear, manifest.group_size, manifest.slices).items():
            if not found[shape]:
                raise BundleError(
                    f"{path}: no {what} of shape {list(shape)} left for {linear.name} "
                    f"({linear.N} x {linear.K}, groups of {manifest.group_size}); export the bundle again"
                )
            found[shape] -= 1


def _check_codes(path: Path, tensors: list[Tensor], manifest: Manifest) -> None:
    needed = sum(linear.N * linear.K for linear in manifest.weights.linears)
    found = sum(tensor.bytes for tensor in tensors if tensor.element_type == UINT8)
    if found < needed:
        raise BundleError(
            f"{path}: {found} bytes of packed weights, the manifest's matrices need {needed}; export the bundle again"
        )
