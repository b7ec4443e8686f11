"""Builds the libraries of a target: TVM compiles the kernels, ziglang compiles the C code and links both.

The compiler and the linker come from pip (the ``ziglang`` package). So no system toolchain is needed, and every target
builds on every host. An op library depends on a ``KernelSpec`` and the target, not on the model. A cache keeps it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mbq_runtime.bundle import layout, slice_profile
from mbq_runtime.bundle.isa import this_machine
from mbq_runtime.bundle.slice_profile import CODE_BITS
from mbq_runtime.cache import cache_dir
from mbq_runtime.errors import BuildError

from . import constants
from .machines import Target, best_for
from .spec import KernelSpec

log = logging.getLogger(__name__)

_ROOM = Path(__file__).parent
_SHARED = tuple(Path(str(of)) for of in (__file__, constants.__file__, layout.__file__, slice_profile.__file__))
"""Sources that every library depends on."""
_SHIM = _ROOM / "ort_ops"
_DRIVERS = _ROOM / "tvm_ops"
_EXPORTS = ("RegisterCustomOps", "mbq_ops_build_info", "mbq_set_threads", "mbq_wake_threads")
_COMPILER_FLAGS = (
    "-shared", "-fPIC", "-std=c11", "-O2", "-s", "-Wall", "-Wextra", "-Werror",
    "-fno-sanitize=all", "-ffunction-sections", "-Wl,--gc-sections",
)  # fmt: skip
_IDLE_PASSES = (
    "s_tir.HoistIfThenElse", "s_tir.RenormalizeSplitPattern", "s_tir.InjectPermutedLayout", "s_tir.InjectVirtualThread",
    "s_tir.CompactBufferAllocation", "s_tir.InjectSoftwarePipeline", "tirx.RemoveNoOp",
)  # fmt: skip
"""Passes of TVM that change no byte of a kernel, and take a fifth of the time to compile it."""
_TOOL_LINES = 6
"""An error repeats this many lines of a failing tool's output."""


def build_ops_library(target: Target, spec: KernelSpec, out: Path) -> None:
    """Write the custom-op library for ONNX Runtime.

    Args:
        target: row of the table of machines, with a native library.
        spec: slices, group size and activation bits of the model.
        out: file to write. It is never seen half written.

    Raises:
        BuildError: the target has no native library, or a tool fails. The message ends with the tool's last lines.
    """
    if not target.native:
        raise BuildError(f"target {target.name}: it has no native library to build; choose another target")
    try:
        key = _key(target, str(spec), ("kernels/*.py", "ort_ops/*.[ch]"))
        cached = _cached(f"ops/{key}.so", lambda folder: _build(target, spec, folder))
        out.parent.mkdir(parents=True, exist_ok=True)
        _place(cached, out)
    except OSError as error:
        raise BuildError(f"library for {target.name}: {error}; check space and permissions") from error


def _cached(name: str, make: Callable[[Path], Path]) -> Path:
    """A file of the cache, with its SHA-256 in its name. A missing or damaged file is made again.

    name: folder, key and suffix. make: writes the file to the folder that it gets, and returns its path.
    """
    wanted = cache_dir() / name
    for entry in wanted.parent.glob(f"{wanted.stem}-*{wanted.suffix}"):
        if entry.stem.rpartition("-")[2] == _sha256(entry):
            return entry
        log.warning("%s: damaged; it is made again", entry)
        entry.unlink(missing_ok=True)
    wanted.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mbq-build-") as folder:
        made = make(Path(folder))
        entry = wanted.with_stem(f"{wanted.stem}-{_sha256(made)}")
        _place(made, entry)
    return entry


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _place(source: Path, destination: Path) -> None:
    """Copy a file by renaming a finished copy, so that ``destination`` is never seen half written."""
    with tempfile.NamedTemporaryFile(dir=destination.parent, prefix=f".{destination.name}.", delete=False) as file:
        partial = Path(file.name)
        try:
            with source.open("rb") as content:
                shutil.copyfileobj(content, file)
            # After a loss of power, a name must not stand for a file that was not written.
            file.flush()
            os.fsync(file.fileno())
            partial.chmod(0o755)
            partial.replace(destination)
        finally:
            partial.unlink(missing_ok=True)


def build_for_this_machine(source: Path, defines: Mapping[str, int]) -> Path | None:
    """Compile one C file for this machine and return the library. None if the machine is no native target.

    Args:
        source: the C file.
        defines: {macro: value} for the compiler.

    Raises:
        BuildError: as for ``build_ops_library``.
    """
    target = best_for(this_machine())
    if not target.native:
        return None

    macros = tuple(f"-D{name}={value}" for name, value in defines.items())

    def make(folder: Path) -> Path:
        library = folder / "library.so"
        # Without contraction of a product and a sum into one instruction, every machine computes the same numbers.
        flags = ("-O3", f"-mcpu={target.cpu.replace('-', '_')}", "-ffp-contract=off", *macros)
        _link(target, folder, [source], flags, library)
        return library

    try:
        return _cached(f"here/{_key(target, source.read_text() + ' '.join(macros), ())}.so", make)
    except OSError as error:
        raise BuildError(f"{source.name} for this machine: {error}; check space and permissions") from error


def _key(target: Target, content: str, sources: tuple[str, ...]) -> str:
    """Hash of everything that a file is made from. sources: patterns below this folder."""
    digest = hashlib.sha256()
    for path in sorted([*(path for pattern in sources for path in _ROOM.glob(pattern)), *_SHARED]):
        source = path.read_bytes()
        digest.update(f"{path.name} {len(source)}\n".encode() + source)
    tools = [f"{name} {_version(name)}" for name in ("apache-tvm", "ziglang")]
    digest.update("\n".join([repr(target), content, *tools]).encode())
    return digest.hexdigest()[:32]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise BuildError(f"the Python package {package} is missing; install mbq-export[export]") from None


def build_decoder(target: Target, spec: KernelSpec, module: Any, out: Path) -> None:
    """Write a whole decoder as one library: its Relax functions and the kernels that they call.

    Args:
        target: row of the table of machines, with a native library.
        spec: slices, group size and activation bits of the model.
        module: IRModule of Relax functions and of the operations of ``tvm_ops``, made for the same ``spec``.
        out: file to write. It is never seen half written.

    Raises:
        BuildError: as for ``build_ops_library``.
    """
    import tvm

    try:
        kernels = _kernels(target, spec)
        with tempfile.TemporaryDirectory(prefix="mbq-build-") as name:
            folder = Path(name)
            (folder / "mbq_config.h").write_text(config_header(target, spec))
            compiled = _compiled(module, target)
            shared = ("pool.c", "attend.c") if spec.kv_bits == 8 else ("pool.c",)
            sources = [*sorted(_DRIVERS.glob("*.c")), *(_SHIM / name for name in shared)]

            def link(library: str, objects: list[str], **_: object) -> None:
                _link(target, folder, [*map(Path, objects), *sources, *kernels], (), Path(library))

            compiled.export_library(str(folder / "decoder.so"), fcompile=link, workspace_dir=name)
            out.parent.mkdir(parents=True, exist_ok=True)
            _place(folder / "decoder.so", out)
    except OSError as error:
        raise BuildError(f"library for {target.name}: {error}; check space and permissions") from error
    except tvm.error.TVMError as error:
        raise BuildError(f"the decoder for {target.name} cannot be exported: {_last_lines(str(error))}") from error


def _build(target: Target, spec: KernelSpec, folder: Path) -> Path:
    (folder / "mbq_config.h").write_text(config_header(target, spec))
    exports = folder / "exports.map"
    exports.write_text("{ global: " + " ".join(f"{name};" for name in _EXPORTS) + " local: *; };\n")
    library = folder / "libmbq_ops.so"
    # Its threads run until the process ends.
    flags = ("-fvisibility=hidden", f"-Wl,--version-script={exports}", "-Wl,-z,nodelete")
    kernels = _kernels(target, spec)
    _link(target, folder, [*sorted(_SHIM.glob("*.c")), *kernels], flags, library)
    return library


def _link(target: Target, folder: Path, inputs: list[Path], flags: tuple[str, ...], library: Path) -> None:
    """Compile and link C sources and object files to a library. folder: holds mbq_config.h."""
    command = [sys.executable, "-m", "ziglang", "cc", "-target", target.triple, *_COMPILER_FLAGS, *flags]
    command += [f"-I{folder}", f"-I{_SHIM}", *map(str, inputs), "-lm", "-o", str(library)]
    zig_cache = str(cache_dir() / "zig")
    environment = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": zig_cache, "ZIG_LOCAL_CACHE_DIR": zig_cache}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode != 0 or not library.is_file():
        raise BuildError(f"linking the library for {target.name} failed: {_last_lines(result.stderr or result.stdout)}")


def _last_lines(text: str) -> str:
    return " | ".join(text.strip().splitlines()[-_TOOL_LINES:])


def _kernels(target: Target, spec: KernelSpec) -> list[Path]:
    """The object files of the kernels. Those that the cache does not have are compiled.

    Kernels of the cache of keys and values depend on the target alone, and take longer than all others.
    """
    linear = replace(spec, kv_bits=32)
    objects = [_object(target, str(linear), lambda kernels, isa: kernels.linear_module(isa, linear))]
    if spec.kv_bits == 8:
        objects.append(_object(target, "kv_bits=8", lambda kernels, isa: kernels.cache_module(isa)))
    return objects


def _object(target: Target, content: str, module: Callable[[Any, Any], Any]) -> Path:
    """The object file of an IRModule.

    content: what the module depends on, beside the sources. module: makes it, of the folder's ``module`` and the
    instruction set.
    """

    def make(folder: Path) -> Path:
        # A cached file must not wait for the import of the compiler, which takes seconds.
        from .kernels import module as kernels
        from .kernels.isa import ISAS

        compiled = _compiled(module(kernels, ISAS[target.isa]), target, skipped=_IDLE_PASSES)
        compiled.mod.write_to_file(str(folder / "kernels.o"))
        return folder / "kernels.o"

    return _cached(f"kernels/{_key(target, content, ('kernels/*.py',))}.o", make)


def _compiled(module: Any, target: Target, skipped: tuple[str, ...] = ()) -> Any:
    """An IRModule compiled for ``target``. skipped: names of passes that do not run."""
    import tvm

    try:
        with tvm.transform.PassContext(disabled_pass=list(skipped)):
            return tvm.compile(module, target=tvm.target.Target(target.llvm))
    except Exception as error:
        raise BuildError(f"compiling for {target.name} failed: {_last_lines(str(error))}") from error


def config_header(target: Target, spec: KernelSpec) -> str:
    """The text of ``mbq_config.h``: every number that the C code shares with Python, as ``MBQ_NAME``.

    Args:
        target: row of the table of machines.
        spec: slices, group size and activation bits of the model.
    """
    from .kernels import attention, router
    from .kernels.activations import TILE_K
    from .kernels.emit import LANES
    from .kernels.isa import ISAS
    from .kernels.matmul import SCRATCH_BYTES

    def braces(values: tuple[int, ...]) -> str:
        return "{" + ", ".join(map(str, values)) + "}"

    profile = spec.profile
    defines = {
        "GROUP": spec.group_size,
        "ACTIVATION_BYTES": spec.activation_bytes,
        "CODE_BITS": CODE_BITS,
        "ROW_BLOCK": layout.ROW_BLOCK,
        "LANES": LANES,
        "ROUTER_STEP": router.STEP,
        "MAX_HIDDEN": constants.MAX_HIDDEN,
        "MEAN_SQUARE_EPS": constants.MEAN_SQUARE_EPS,
        "FEW_TOKENS": ISAS[target.isa].few_at_most(spec.activation_bytes),
        "MAX_THREADS": constants.MAX_THREADS,
        "PIECES_PER_THREAD": constants.PIECES_PER_THREAD,
        "TILE_K": TILE_K,
        "SCRATCH_BYTES": SCRATCH_BYTES,
        "KV_BITS": spec.kv_bits,
        "KV_SCALE_BYTES": layout.KV_SCALE_BYTES,
        "KEY_LANES": layout.KEY_LANES,
        "SMALLEST_ACTIVATION": f"{constants.SMALLEST_ACTIVATION}f",
        "MOST_HEAD_DIM": constants.MOST_HEAD_DIM,
        "ATTEND_ROWS": attention.ROWS,
        "ATTEND_TILE": attention.TILE_BLOCKS,
        "STATE_NUMBERS": attention.STATE_NUMBERS,
        "ATTEND_SCRATCH": attention.SCRATCH_NUMBERS,
        "QUERY_BYTES": attention.number_bytes(ISAS[target.isa]),
        "NEVER": f"{attention.NEVER}f",
        "DEPTHS": profile.depths,
        "SLICES": braces(profile.slices),
        "SLICES_TEXT": f'"{profile}"',
        "DEPTH_BITS": braces(profile.depth_bits),
        "EACH_DEPTH(X)": " ".join(f"X({depth})" for depth in range(1, profile.depths + 1)),
        "BUILD_INFO": f'"target={target.name} isa={target.isa} {spec}"',
    }
    return "".join(f"#define MBQ_{name} {value}\n" for name, value in defines.items())
