"""``manifest.json``, a bundle's table of contents: its fields, and how it is read, written and verified.

The exporter writes it with ``file_entries`` and ``write``.  An engine reads it with ``read``, and finds truncated files
with ``check_sizes`` before it opens one.  ``verify`` compares the hash of every file.  Each problem is a BundleError
that names the file.

A large file has a hash for each chunk of it, so that a reader can check and fetch each chunk alone.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from ..errors import BundleError, UsageError
from ..progress import Progress
from .layout import NATIVE_LAYOUT, PAGE_BYTES, PORTABLE_LAYOUT
from .reading import check_regular, open_file, parse_json, read_file
from .schema import decode
from .slice_profile import CODE_BITS, SliceProfile
from .tensors import WEIGHTS

MANIFEST_NAME = "manifest.json"
SIGNATURE_NAME = "manifest.json.sig"
"""The maker's signature of the manifest.  A bundle need not have one."""
TRIM_NAME = "trim.json"
"""The depth that a trimmed bundle was cut behind.  A whole bundle has no such file."""
FORMAT = "mbq-bundle"
FORMAT_VERSION = 2
CHUNK_BYTES = 4 << 20
"""A file larger than this has a hash for each chunk of this size.  The last chunk may be shorter."""

GROUP_SIZES = (32, 64, 128)
ACTIVATION_BITS = (8, 16)
ARCHITECTURES = ("aarch64", "x86_64", "any")
OPS_LIBRARY = "lib/libmbq_ops.so"
DECODER_LIBRARY = "decoder.so"
GPU_FILES = ("gpu/plan.json", "gpu/weights.bin")
MOST_TRIM_BYTES = 1000
MOST_MANIFEST_BYTES = 4 << 20
"""A larger manifest is refused.  Those of large models have a few hundred thousand bytes."""
_BLOCK_BYTES = 1 << 18  # read at a time: small enough for the cache of a processor
_LONGEST_NAME, _LONGEST_SHOWN = 255, 120  # characters
PAPERS = ("README.md", "LICENSE", "NOTICE", ".gitattributes")
"""Files for people, which may be added to a bundle.  No engine reads them."""
DOWNLOAD_RECORDS = re.compile(
    r"\.cache/huggingface/(\.gitignore|CACHEDIR\.TAG|(download|upload)/([^/]+/)*[^/]+\.(metadata|lock))"
)
"""What a download with ``hf download --local-dir`` leaves beside the bundle.  Nothing reads it."""
_FREE = (*PAPERS, SIGNATURE_NAME, TRIM_NAME)
_SHA256 = re.compile("[0-9a-f]{64}")
COMMON_FILES = ("genai_config.json", "tokenizer.json")
WEIGHT_FILES = ("model.onnx.data", WEIGHTS, GPU_FILES[1])
"""The large files, which ``parts`` divides by depth."""
ENGINE_FILES: dict[str, dict[str, tuple[str, ...]]] = {
    "onnx": {NATIVE_LAYOUT: ("model.onnx", OPS_LIBRARY), PORTABLE_LAYOUT: ("model.onnx",)},
    "tvm": {NATIVE_LAYOUT: (DECODER_LIBRARY, WEIGHTS)},
    "opencl": {NATIVE_LAYOUT: GPU_FILES},
    "webgpu": {NATIVE_LAYOUT: GPU_FILES},
}
"""By engine and layout: the files that the bundle must have."""


@dataclass(frozen=True)
class ModelFacts:
    """The model as it was exported.

    name: of the checkpoint.
    architecture: class name in the checkpoint's configuration.
    family: ``model_type`` in the checkpoint's configuration.
    parameters: number of weights.
    vocab_size: number of token ids.
    hidden_size: width of the residual stream.
    layers: decoder blocks.
    context_length: tokens of prompt and reply together.
    """

    name: str
    architecture: str
    family: str
    parameters: int
    vocab_size: int
    hidden_size: int
    layers: int
    context_length: int


@dataclass(frozen=True)
class TargetFacts:
    """The machine that the bundle is for.

    name: of the target.
    engine: the engine that runs by default.
    arch: "aarch64", "x86_64" or "any".
    cpu: the core that the compiler optimised for; "" for none.
    features: instruction sets that the processor must have; names as in ``bundle.isa``.
    """

    name: str
    engine: str
    arch: str
    cpu: str
    features: tuple[str, ...]


@dataclass(frozen=True)
class Budget:
    """The average bits per weight that the routers can hold.

    min_bits: lowest budget.
    max_bits: highest budget.
    default_bits: the budget of an engine that is given none.

    >>> Budget(3.0, 8.0, 8.0).check(4, "bundle")
    4.0
    >>> Budget(3.0, 8.0, 8.0).check(9, "bundle")
    Traceback (most recent call last):
    mbq_runtime.errors.UsageError: average bits 9: bundle takes a number from 3 to 8
    """

    min_bits: float
    max_bits: float
    default_bits: float

    def check(self, avg_bits: float, where: str) -> float:
        """Return a budget as a float.

        Args:
            avg_bits: average bits per weight.
            where: the bundle, for the message.

        Raises:
            UsageError: ``avg_bits`` is not a number in the range.
        """
        try:
            value = float(avg_bits)
        except (TypeError, ValueError):
            value = math.nan
        if not self.min_bits <= value <= self.max_bits:  # NaN fails both comparisons
            raise UsageError(
                f"average bits {avg_bits}: {where} takes a number from {self.min_bits:g} to {self.max_bits:g}"
            )
        return value


@dataclass(frozen=True)
class RouterFacts:
    """The routers.

    kind: "static", "norm" or "mlp".
    bytes: size of all routers' parameters.
    """

    kind: str
    bytes: int


@dataclass(frozen=True)
class QualityPoint:
    """How the bundle predicts held-back text at one budget.

    asked_bits: the budget.
    avg_bits_used: average bits per weight that the routers then chose.
    perplexity: of the text.
    kl_divergence: mean KL divergence from the original model, in nats a token; NaN in bundles of early versions.
    same_top: share of the tokens where both find the same next token most likely; NaN in bundles of early versions.
    """

    asked_bits: float
    avg_bits_used: float
    perplexity: float
    kl_divergence: float = math.nan
    same_top: float = math.nan


@dataclass(frozen=True)
class Quality:
    """What the exporter measured.

    reference_perplexity: of the original model, on the same text.
    floor_bits: the quality floor: lowest average bits per weight that the exporter recommends.
    curve: by rising budgets.
    """

    reference_perplexity: float
    floor_bits: float
    curve: tuple[QualityPoint, ...]


@dataclass(frozen=True)
class Linear:
    """One routed matrix.

    name: of its unit and role.
    N: rows, which are outputs.
    K: columns, which are inputs.
    """

    name: str
    N: int
    K: int


@dataclass(frozen=True)
class Weights:
    """The weights that a decoded token reads.

    routed_parameters: number of weights that follow the budget.
    bytes_per_token: bytes read for a decoded token, by average bits per weight (as text: "3" or "3.5").
    linears: all routed matrices in graph order.
    """

    routed_parameters: int
    bytes_per_token: Mapping[str, int]
    linears: tuple[Linear, ...]


class Chunk(NamedTuple):
    """A range of a file that has its own hash.

    begin, end: bytes of the file, without ``end``.
    sha256: 64 hexadecimal digits.
    """

    begin: int
    end: int
    sha256: str


@dataclass(frozen=True)
class FileEntry:
    """One file of the bundle.

    name: POSIX path relative to the folder.
    size: bytes.
    sha256: 64 hexadecimal digits.
    chunks: sha256 of each ``CHUNK_BYTES`` of the file in order; empty for a file of one chunk.
    """

    name: str
    size: int
    sha256: str
    chunks: tuple[str, ...] = ()

    def ranges(self) -> Iterator[Chunk]:
        """The chunks of the file in order.  A small file is one chunk, an empty file has none."""
        hashes = self.chunks or (self.sha256,)
        for begin in range(0, self.size, CHUNK_BYTES):
            yield Chunk(begin, min(begin + CHUNK_BYTES, self.size), hashes[begin // CHUNK_BYTES])

    def first(self, needed: int) -> FileEntry:
        """The entry of a file that has only the first chunks: those with the bytes that are needed.

        ``sha256`` is still that of the whole file.

        Args:
            needed: bytes.
        """
        count = -(-needed // CHUNK_BYTES)
        return replace(self, size=min(self.size, count * CHUNK_BYTES), chunks=self.chunks[:count])


@dataclass(frozen=True)
class FileRange:
    """A range of a file of weights.

    name: of the file.
    begin, end: bytes of the file, without ``end``.  Both are on a page, but the end of the file need not be.
    """

    name: str
    begin: int
    end: int


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
    quality: Quality = Quality(0.0, 0.0, ())
    engines: tuple[str, ...] = ("onnx",)
    activation_bits: int = 16
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
                "export it for a processor"
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
    draft = path.with_name(f".{MANIFEST_NAME}.part")
    draft.write_text(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(draft, path)


def file_entries(folder: str | os.PathLike[str]) -> tuple[FileEntry, ...]:
    """Size and hash of every file but the manifest, its signature and ``trim.json``, sorted by name.

    Args:
        folder: folder of the bundle.
    """
    folder = Path(folder)
    entries = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name not in (MANIFEST_NAME, SIGNATURE_NAME, TRIM_NAME):
            entries.append(_entry(path, name))
    return tuple(entries)


def _entry(path: Path, name: str) -> FileEntry:
    whole, chunks, size = sha256(), [], 0
    with path.open("rb") as file:
        while block := file.read(CHUNK_BYTES):
            whole.update(block)
            chunks.append(sha256(block).hexdigest())
            size += len(block)
    return FileEntry(name, size, whole.hexdigest(), tuple(chunks) if size > CHUNK_BYTES else ())


def undivided(files: tuple[FileEntry, ...]) -> tuple[tuple[FileRange, ...], ...]:
    """The ``parts`` of a bundle whose weight files mix the slices of all depths: one part of whole files.

    Args:
        files: of the bundle.
    """
    part = tuple(FileRange(entry.name, 0, entry.size) for entry in files if entry.name in WEIGHT_FILES)
    return (part,) if part else ()


def check_sizes(folder: str | os.PathLike[str], manifest: Manifest) -> None:
    """Check that every listed file is there, is a regular file, and has its size.  No file is opened.

    Args:
        folder: folder of the bundle.
        manifest: the bundle's manifest.

    Raises:
        BundleError: a file is missing, has another size, or is a link, a pipe or a device.
    """
    folder = Path(folder)
    for parent in sorted({str(parent) for entry in manifest.files for parent in PurePosixPath(entry.name).parents}):
        if parent != "." and (folder / parent).is_symlink():
            raise BundleError(f"{folder / parent}: a symbolic link, needed a folder; copy the bundle with cp -rL")
    for entry in manifest.held_files:
        path = folder / entry.name
        size = check_regular(path)
        if size != entry.size:
            raise BundleError(
                f"{path}: {size} bytes long where the manifest says {entry.size}: an incomplete copy; "
                "copy the bundle again"
            )


def check_unlisted(folder: str | os.PathLike[str], manifest: Manifest) -> None:
    """Refuse what the manifest does not list: an engine or tokenizer could read it.

    ``PAPERS``, the signature and ``DOWNLOAD_RECORDS`` are let through.

    Args:
        folder: folder of the bundle.
        manifest: the bundle's manifest.

    Raises:
        BundleError: there is a file, link, pipe or device that the manifest does not list.
    """
    listed = {entry.name for entry in manifest.files} | {MANIFEST_NAME}
    folders = [""]
    while folders:
        place = folders.pop()
        try:
            with os.scandir(Path(folder) / place) as found:
                for item in found:
                    name = place + item.name
                    if item.is_dir(follow_symlinks=False):
                        folders.append(f"{name}/")
                    elif name not in listed and not (_is_harmless(name) and item.is_file(follow_symlinks=False)):
                        raise BundleError(
                            f"{item.path}: not listed in the manifest; remove it, or export the bundle again"
                        )
        except OSError as error:
            raise BundleError(f"{error.filename}: cannot be read ({error.strerror}); copy the bundle again") from None


def verify(folder: str | os.PathLike[str], progress: Progress | None = None) -> Manifest:
    """Compare the size and hash of every file with the manifest.

    Args:
        folder: folder of the bundle.
        progress: called with (bytes done, bytes in all).

    Returns:
        The manifest.

    Raises:
        BundleError: a file is missing, differs, or is not listed.
    """
    folder = Path(folder)
    manifest = read(folder)
    check_sizes(folder, manifest)
    check_unlisted(folder, manifest)
    done = 0

    def count(read_bytes: int) -> None:
        nonlocal done
        done += read_bytes
        if progress is not None:
            progress(done, manifest.total_bytes)

    for entry, held in zip(manifest.files, manifest.held_files, strict=True):
        path = folder / entry.name
        try:
            with open_file(path) as file:
                _check_hashes(path, file, held, count, whole=held == entry)
        except OSError as error:
            raise BundleError(f"{path}: cannot be read ({error.strerror})") from None
    return manifest


def _check_hashes(path: Path, file: BinaryIO, entry: FileEntry, count: Callable[[int], None], *, whole: bool) -> None:
    """whole: whether all of the file is there, so that its own hash can be compared."""
    together = sha256()
    for chunk in entry.ranges():
        found = sha256()
        for begin in range(chunk.begin, chunk.end, _BLOCK_BYTES):
            block = file.read(min(_BLOCK_BYTES, chunk.end - begin))
            found.update(block)
            together.update(block)
            count(len(block))
        if entry.chunks:
            _check_hash(path, found.hexdigest(), chunk.sha256, f"bytes {chunk.begin} to {chunk.end} differ")
    if whole:
        _check_hash(path, together.hexdigest(), entry.sha256, "its contents differ")


def _check_hash(path: Path, found: str, needed: str, what: str) -> None:
    if found != needed:
        raise BundleError(
            f"{path}: {what} from the manifest (sha256 {found[:12]}..., needed {needed[:12]}...); "
            "copy, pull or export the bundle again"
        )


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
        *(
            (
                linear.N > 0 and linear.K > 0 and linear.K % manifest.group_size == 0,
                f"weights.linears {linear.name}",
                f"{linear.N} x {linear.K}",
                f"K a multiple of group_size {manifest.group_size}",
            )
            for linear in manifest.weights.linears
        ),
        *(
            (_is_number(bits), "weights.bytes_per_token", bits, "numbers of bits as keys")
            for bits in manifest.weights.bytes_per_token
        ),
        *(
            (
                _is_inside(entry.name),
                "files",
                entry.name,
                f"names relative to the bundle, without .., of at most {_LONGEST_NAME} letters",
            )
            for entry in manifest.files
        ),
        *(
            (
                entry.size >= 0 and _is_sha256(entry.sha256),
                f"files {entry.name}",
                f"{entry.size}, {entry.sha256!r}",
                "a size in bytes and 64 hexadecimal digits",
            )
            for entry in manifest.files
        ),
        *(
            (
                len(entry.chunks) == _chunk_count(entry.size) and all(map(_is_sha256, entry.chunks)),
                f"files {entry.name} chunks",
                f"{len(entry.chunks)} hashes",
                f"{_chunk_count(entry.size)} of 64 hexadecimal digits",
            )
            for entry in manifest.files
        ),
    ]
    for holds, field, seen, needed in rules:
        if not holds:
            raise BundleError(f"{path}: {field} is {_shown(seen)}, needed {needed}; export the bundle again")
    names = Counter(entry.name for entry in manifest.files)
    twice = [name for name, count in names.items() if count > 1]
    needed_files = [*COMMON_FILES, *(name for e in manifest.engines for name in ENGINE_FILES[e][manifest.layout])]
    missing = [name for name in needed_files if name not in names]
    if twice or missing:
        problem = f"lists {twice[0]} twice" if twice else f"does not list {missing[0]}"
        raise BundleError(f"{path}: files {problem}; export the bundle again")
    _check_parts(manifest, path)


def _chunk_count(size: int) -> int:
    """Hashes of chunks that a file of this size has."""
    return -(-size // CHUNK_BYTES) if size > CHUNK_BYTES else 0


def _check_parts(manifest: Manifest, path: Path | str) -> None:
    """The parts cut each weight file into ranges without a gap, which begin on a page."""
    if len(manifest.parts) not in (0, 1, manifest.profile.depths):
        raise BundleError(
            f"{path}: parts has {len(manifest.parts)} depths, needed 1 or {manifest.profile.depths}; "
            "export the bundle again"
        )
    sizes = {entry.name: entry.size for entry in manifest.files if entry.name in WEIGHT_FILES}
    ends = dict.fromkeys(sizes, 0)
    for found in (found for part in manifest.parts for found in part):
        begin = ends.get(found.name)
        last = found.end == sizes.get(found.name)
        if begin is None or found.begin != begin or found.end < begin or not (last or found.end % PAGE_BYTES == 0):
            raise BundleError(
                f"{path}: parts has bytes {found.begin} to {found.end} of {_shown(found.name)}, needed a range of a "
                f"weight file that begins at {begin or 0} and ends on a page of {PAGE_BYTES} bytes; "
                "export the bundle again"
            )
        ends[found.name] = found.end
    for name, end in ends.items() if manifest.parts else ():
        if end != sizes[name]:
            raise BundleError(
                f"{path}: parts ends at byte {end} of {name}, needed {sizes[name]}; export the bundle again"
            )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _is_harmless(name: str) -> bool:
    return name in _FREE or DOWNLOAD_RECORDS.fullmatch(name) is not None


def _is_inside(name: str) -> bool:
    """Whether a name stays in the bundle on every system, and is not that of the manifest."""
    return (
        len(name) <= _LONGEST_NAME
        and not {"", ".", ".."} & set(name.split("/"))
        and name not in (MANIFEST_NAME, SIGNATURE_NAME, TRIM_NAME)
        and name.isprintable()
        and not any(c in name for c in "\\:")
    )


def _is_sha256(text: str) -> bool:
    return _SHA256.fullmatch(text) is not None
