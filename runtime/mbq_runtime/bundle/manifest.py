"""``manifest.json``, a bundle's table of contents: its fields, and how it is read and written.

The exporter writes it with ``write``, with the files that ``listed_files.file_entries`` finds.  An engine reads it with
``read``.  Each problem is a BundleError that names the file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..errors import BundleError, UsageError
from ..whole_file import write_whole
from .facts import (
    ACTIVATION_BITS,
    ARCHITECTURES,
    GROUP_SIZES,
    KV_BITS,
    NOT_MEASURED,
    STATES,
    Budget,
    ModelFacts,
    Quality,
    RouterFacts,
    TargetFacts,
    Weights,
)
from .file_names import ENGINE_FILES, ENGINE_WEIGHTS, MANIFEST_NAME, OPS_LIBRARY, TRIM_NAME, WEIGHT_FILES
from .layout import NATIVE_LAYOUT
from .listed_files import FileEntry, FileRange, check_entries, check_parts
from .reading import parse_json, read_file, shown
from .schema import decode
from .slice_profile import CODE_BITS, SliceProfile

FORMAT = "mbq-bundle"
FORMAT_VERSION = 3
MOST_TRIM_BYTES = 1000
_MOST_SIDE = 1 << 20
MOST_MANIFEST_BYTES = 4 << 20
"""A larger manifest is refused.  Those of large models have a few hundred thousand bytes."""


@dataclass(frozen=True)
class Manifest:
    """All of ``manifest.json`` but the two format fields.

    model: the model as it was exported.
    target: the machine that the bundle is for.
    slices: widths of the slices in bits, most significant first.
    group_size: columns of a matrix that share a scale.
    layout: "mbq16" (own kernels) or "nbits" (stock operators).
    budget: average bits per weight that the routers can hold.
    router: the routers.
    weights: the weights that a decoded token reads.
    calibration: settings of the export.
    seed: random seed of the export.
    tools: versions of the packages that made the bundle, by name.
    files: all files but the manifest, by name.
    quality: what the exporter measured.
    engines: engines that can run the bundle.
    activation_bits: width of the integers that a processor rounds activations to; a GPU does not round them.
    kv_bits: bits of a cached key or value: 32 for float32, or 8.
    parts: for each depth, the ranges of the weight files that this depth needs besides those of lower depths.  One
        part holds all depths; none: the bundle has no weight files.
    """

    model: ModelFacts
    target: TargetFacts
    slices: tuple[int, ...]
    group_size: int
    layout: str
    budget: Budget
    router: RouterFacts
    weights: Weights
    calibration: Mapping[str, Any]
    seed: int
    tools: Mapping[str, str]
    files: tuple[FileEntry, ...]
    quality: Quality = NOT_MEASURED
    engines: tuple[str, ...] = ("onnx",)
    activation_bits: int = 16
    kv_bits: int = 32
    parts: tuple[tuple[FileRange, ...], ...] = ()

    @property
    def profile(self) -> SliceProfile:
        """The slices with their planes and depths."""
        return SliceProfile(self.slices)

    @property
    def native(self) -> bool:
        """Whether the bundle carries its own compiled kernels."""
        return self.layout == NATIVE_LAYOUT

    @property
    def ops_library(self) -> str | None:
        """The library that ONNX Runtime must load for the graph; None without one."""
        return OPS_LIBRARY if self.native and "onnx" in self.engines else None

    @property
    def deepest(self) -> int:
        """The deepest depth that a token may get, 1-based."""
        return 1 + sum(bits < self.budget.max_bits for bits in self.profile.depth_bits[:-1])

    @property
    def trimmed(self) -> bool:
        """Whether the bundle lacks its deeper slices."""
        return self.held_files != self.files

    @property
    def held_files(self) -> tuple[FileEntry, ...]:
        """``files`` as they are in the folder: a trimmed bundle has only the first chunks of its weight files."""
        needed = self.needed_bytes(self.deepest)
        return tuple(entry.first(needed[entry.name]) for entry in self.files)

    @property
    def total_bytes(self) -> int:
        """Size of all files in the folder but the manifest."""
        return sum(entry.size for entry in self.held_files)

    def engine_bytes(self, engine: str) -> int:
        """Size of all of them but the weights of other engines.

        Args:
            engine: kind of engine.
        """
        others = {*WEIGHT_FILES} - {ENGINE_WEIGHTS[engine]}
        return sum(entry.size for entry in self.held_files if entry.name not in others)

    def limited(self, depth: int) -> Manifest:
        """The manifest of the same bundle without its deeper slices.

        What was measured is left out: it was measured with all slices.  The quality floor stays, if it is held.

        Args:
            depth: the deepest depth that stays, 1-based.

        Raises:
            BundleError: the bundle cannot be cut there.
        """
        bits = self.profile.depth_bits
        if not 1 <= depth <= len(bits):
            raise BundleError(f"depth {depth}: the bundle has depths 1 to {len(bits)}; pull or trim it again")
        if depth == len(bits):
            return self
        if len(self.parts) != len(bits):
            raise BundleError(
                "the weights of this bundle are not divided by depth, so it cannot be trimmed; use all of it, or "
                "export it again"
            )
        most = float(bits[depth - 1])
        default = min(self.budget.default_bits, most)
        sizes = {key: size for key, size in self.weights.bytes_per_token.items() if float(key) <= most}
        return replace(
            self,
            budget=replace(self.budget, max_bits=most, default_bits=default),
            weights=replace(self.weights, bytes_per_token=sizes),
            quality=replace(self.quality, floor_bits=min(self.quality.floor_bits, most), curve=()),
        )

    def needed_bytes(self, depth: int) -> dict[str, int]:
        """By file: how many bytes, counted from its begin, a reader needs.

        Args:
            depth: the deepest depth that is read, 1-based.
        """
        needed = {entry.name: entry.size for entry in self.files}
        for part in self.parts[depth:]:
            for found in part:
                needed[found.name] = min(needed[found.name], found.begin)
        return needed


def read(folder: str | os.PathLike[str]) -> Manifest:
    """Read and check ``manifest.json``.  No other file is opened.

    Args:
        folder: folder of the bundle.

    Raises:
        BundleError: there is no manifest, or it is too new or broken.
    """
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    if not os.path.isdir(folder):  # also for a name that the system does not take
        raise BundleError(f"{folder}: no such folder; give the folder that mbq-export wrote")
    if not os.path.lexists(path):
        raise BundleError(f"{folder}: no {MANIFEST_NAME}; give the folder that mbq-export wrote")
    manifest = parse(read_file(path, MOST_MANIFEST_BYTES), path)
    trim = folder / TRIM_NAME
    if not os.path.lexists(trim):
        return manifest
    return limited(manifest, read_file(trim, MOST_TRIM_BYTES), trim)


def limited(manifest: Manifest, trim: bytes, path: Path | str) -> Manifest:
    """The manifest of a trimmed bundle.

    Args:
        manifest: what its ``manifest.json`` says, which is of the whole bundle.
        trim: content of its ``trim.json``.
        path: of that file or its address, for messages.

    Raises:
        BundleError: the content is not a depth of the bundle.
    """
    try:
        document = parse_json(trim)
        depth = document["depth"] if isinstance(document, dict) else None
        if type(depth) is not int:
            raise ValueError("needed an object with a whole number as depth")
        return manifest.limited(depth)
    except (ValueError, KeyError, BundleError) as error:
        raise BundleError(f"{path}: {error}; pull or trim the bundle again") from None


def trim_text(manifest: Manifest) -> bytes | None:
    """Content of ``trim.json`` for a bundle; None for one that needs no such file.

    Args:
        manifest: of the bundle, from ``Manifest.limited`` for a trimmed one.
    """
    if manifest.deepest == manifest.profile.depths:
        return None
    return json.dumps({"depth": manifest.deepest}).encode() + b"\n"


def parse(content: bytes, path: Path | str) -> Manifest:
    """Check the content of a ``manifest.json``.

    Args:
        content: the file's bytes.
        path: the file or its address, for messages.

    Raises:
        BundleError: the manifest is of another version, or broken.
    """
    try:
        document = parse_json(content)
    except ValueError as error:
        raise BundleError(f"{path}: not valid JSON ({error}); copy the bundle again") from None
    _check_format(document, path)
    manifest = decode(Manifest, document, path)
    _check_values(manifest, path)
    return manifest


def write(manifest: Manifest, folder: str | os.PathLike[str]) -> None:
    """Write ``manifest.json`` in one step: a reader sees the old file or the whole new one.

    Args:
        manifest: what is written.
        folder: folder of the bundle.

    Raises:
        BundleError: ``read`` would refuse the manifest.
    """
    path = Path(folder) / MANIFEST_NAME
    _check_values(manifest, path)
    document = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(manifest)}
    for name in ("states", "attention"):
        if not document["model"][name]:
            del document["model"][name]
    if manifest.kv_bits == 32:
        del document["kv_bits"]
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    write_whole(path, f"{text}\n".encode())


def bundle_hash(folder: Path) -> str:
    """The hash of the manifest, which stands for all files of the bundle: it lists theirs.

    Args:
        folder: folder of the bundle.
    """
    return sha256((folder / MANIFEST_NAME).read_bytes()).hexdigest()


def _check_format(document: object, path: Path | str) -> None:
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        seen = document.get("format") if isinstance(document, dict) else type(document).__name__
        raise BundleError(f"{path}: format is {seen!r}, needed {FORMAT!r}; give the folder that mbq-export wrote")
    version = document.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise BundleError(f"{path}: format_version is {version!r}, needed {FORMAT_VERSION}; export the bundle again")
    if version > FORMAT_VERSION:
        raise BundleError(
            f"{path}: format_version is {version}, this mbq reads {FORMAT_VERSION}; "
            "upgrade it (pip install -U mbq-export), or export the bundle with the older version"
        )
    if version < FORMAT_VERSION:
        raise BundleError(
            f"{path}: format_version is {version}, this mbq reads {FORMAT_VERSION}; export the model again with this "
            "version of mbq-export, or run the bundle with the version that wrote it"
        )


def _check_values(manifest: Manifest, path: Path | str) -> None:
    if len(manifest.slices) > CODE_BITS:
        raise BundleError(f"{path}: {len(manifest.slices)} slices, needed at most {CODE_BITS}; export the bundle again")
    try:
        profile = manifest.profile
    except UsageError as error:
        raise BundleError(f"{path}: {error}") from None
    budget = manifest.budget
    rules: list[tuple[bool, str, object, str]] = [
        (manifest.group_size in GROUP_SIZES, "group_size", manifest.group_size, f"one of {GROUP_SIZES}"),
        (
            manifest.activation_bits in ACTIVATION_BITS,
            "activation_bits",
            manifest.activation_bits,
            f"one of {ACTIVATION_BITS}",
        ),
        (manifest.kv_bits in KV_BITS, "kv_bits", manifest.kv_bits, f"one of {KV_BITS}"),
        (
            manifest.kv_bits == 32
            or (manifest.layout == NATIVE_LAYOUT and not set(manifest.engines) - {"onnx", "tvm"}),
            "kv_bits",
            manifest.kv_bits,
            "32 without own kernels on a processor",
        ),
        (
            manifest.kv_bits == 32 or all(of.source == layer for layer, of in enumerate(manifest.model.attention)),
            "kv_bits",
            manifest.kv_bits,
            "32 where blocks share keys and values",
        ),
        (manifest.layout in ENGINE_FILES["onnx"], "layout", manifest.layout, " or ".join(ENGINE_FILES["onnx"])),
        *(
            (manifest.layout in ENGINE_FILES.get(engine, ()), "engines", engine, f"engines that read {manifest.layout}")
            for engine in manifest.engines
        ),
        (len(set(manifest.engines)) == len(manifest.engines), "engines", manifest.engines, "each engine once"),
        (manifest.target.engine in manifest.engines, "target.engine", manifest.target.engine, "one of engines"),
        (manifest.target.arch in ARCHITECTURES, "target.arch", manifest.target.arch, " or ".join(ARCHITECTURES)),
        (
            profile.min_bits <= budget.min_bits <= budget.default_bits <= budget.max_bits <= profile.depth_bits[-1],
            "budget",
            f"{budget.min_bits:g} to {budget.max_bits:g}, default {budget.default_bits:g}",
            f"a range within {profile.min_bits} to {profile.depth_bits[-1]} bits that holds its default",
        ),
        *(
            (getattr(manifest.model, name) > 0, f"model.{name}", getattr(manifest.model, name), "above 0")
            for name in ("parameters", "vocab_size", "hidden_size", "layers", "context_length")
        ),
        (
            {name: len(shape) for name, shape in manifest.model.states.items()} in ({}, STATES),
            "model.states",
            dict(manifest.model.states),
            f"none, or of these dimensions: {STATES}",
        ),
        *(
            (all(0 < side <= _MOST_SIDE for side in shape), f"model.states.{name}", shape, f"1 to {_MOST_SIDE}")
            for name, shape in manifest.model.states.items()
        ),
        *_attention_rules(manifest.model),
        *(
            (
                linear.N > 0 and linear.K > 0 and linear.K % manifest.group_size == 0,
                f"weights.linears {linear.name}",
                f"{linear.N} x {linear.K}",
                f"K a multiple of group_size {manifest.group_size}",
            )
            for linear in manifest.weights.linears
        ),
        *_table_rules(manifest.weights.bytes_per_token),
    ]
    for holds, field, seen, needed in rules:
        if not holds:
            raise BundleError(f"{path}: {field} is {shown(seen)}, needed {needed}; export the bundle again")
    check_entries(manifest.files, manifest.engines, manifest.layout, path)
    check_parts(manifest.parts, manifest.files, profile.depths, path)


def _attention_rules(model: ModelFacts) -> Iterator[tuple[bool, str, object, str]]:
    """Rules that hold between the heads of blocks, as (holds, field, value, needed)."""
    given = model.attention
    yield len(given) in (0, model.layers), "model.attention", len(given), f"none, or an entry for {model.layers} blocks"
    for layer, of in enumerate(given):
        field = f"model.attention[{layer}]"
        for name, size in (("kv_heads", of.kv_heads), ("head_dim", of.head_dim)):
            yield 0 < size <= _MOST_SIDE, f"{field}.{name}", size, f"1 to {_MOST_SIDE}"
        # What is shared is of a block that has its own, and of the same shape.
        inside = 0 <= of.source <= layer
        source = given[of.source] if inside else of
        same = inside and source == replace(of, source=of.source) and source.source == of.source
        yield (
            same,
            f"{field}.source",
            of.source,
            "the block itself, or an earlier one of the same heads that has its own",
        )


def _table_rules(bytes_per_token: Mapping[str, int]) -> Iterator[tuple[bool, str, object, str]]:
    """Rules of the table of bytes, between whose rows a policy draws lines."""
    field, seen = "weights.bytes_per_token", set[float]()
    for text, size in bytes_per_token.items():
        bits = _number(text)
        yield 0 < bits <= CODE_BITS, field, text, f"numbers of bits above 0 and at most {CODE_BITS} as keys"
        yield bits not in seen, field, text, "each number of bits once"
        yield size > 0, f"{field}.{text}", size, "above 0"
        seen.add(bits)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
