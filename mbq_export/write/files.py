"""The files of a bundle: written into a temporary folder beside the bundle's place, then moved there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx
from numpy.typing import NDArray

from mbq_runtime.bundle.layout import PAGE_BYTES
from mbq_runtime.errors import BundleError, UsageError
from mbq_runtime.locks import locked, place_behind_links

EXTERNAL_DATA = "model.onnx.data"
INLINE_BYTES = 1024
"""Tensors up to this size are stored in model.onnx."""


@contextmanager
def reserved(output: Path, force: bool) -> Iterator[None]:
    """Keep a bundle's name for this export while the block runs, and remove what a killed export left behind.

    Args:
        output: the bundle's folder, or a link to it.
        force: whether an existing bundle is replaced.

    Raises:
        UsageError: another export writes ``output``, or it exists and is not to be replaced.
        BundleError: the folder around ``output`` cannot be written.
    """
    place = place_behind_links(output)
    with locked(place, "another export", "another --output"):
        old = _old(place)
        if old.is_dir() and not old.is_symlink() and not os.path.lexists(place):
            # A kill between the two renames of a replacement.
            os.rename(old, place)
        for stale in (old, _draft(place)):
            _remove(stale)
        _check_place(output, force)
        yield


def _remove(stale: Path) -> None:
    """Remove a folder, a file or a link.  What a link leads to stays."""
    if stale.is_symlink() or stale.is_file():
        with suppress(OSError):
            stale.unlink()
    else:
        shutil.rmtree(stale, ignore_errors=True)


def _draft(output: Path) -> Path:
    return output.with_name(f".{output.name}.part")


def _old(output: Path) -> Path:
    return output.with_name(f".{output.name}.old")


def _check_place(output: Path, force: bool) -> None:
    if place_behind_links(output).is_symlink():
        raise UsageError(f"{output}: its links lead to themselves; choose another --output, or remove them")
    if output.exists() and not force:
        raise UsageError(f"{output}: it exists; choose another --output, or --force to replace it")
    if output.exists() and not (output / "manifest.json").is_file():
        raise UsageError(f"{output}: it is not a bundle, --force does not replace it; choose another --output")


@contextmanager
def writing(output: Path, force: bool) -> Iterator[Path]:
    """A temporary folder that becomes the output when the block ends without an error, and is removed otherwise.

    An existing bundle stays as it is until the new one is complete.  A link stays: what it leads to is replaced.

    Args:
        output: the bundle's folder, or a link to it, ``reserved`` by the caller.
        force: whether an existing bundle is replaced.

    Raises:
        UsageError: ``output`` exists and is not to be replaced, or is not a bundle.
        BundleError: writing fails, for example on a full disk.
    """
    _check_place(output, force)
    place = place_behind_links(output)
    draft = _draft(place)
    try:
        _remove(draft)
        draft.mkdir(mode=0o700, parents=True)
        yield draft
        draft.chmod(0o755)
        _swap(draft, place)
    except OSError as error:
        where, reason = error.filename or output, error.strerror or error
        shutil.rmtree(draft, ignore_errors=True)
        left = f"{draft} is left, remove it" if draft.exists() else "the unfinished bundle was removed"
        raise BundleError(
            f"{output}: writing failed at {where} ({reason}); {left}; free some space and run the same command again, "
            "or choose another --output"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _swap(draft: Path, output: Path) -> None:
    if not output.exists():
        os.rename(draft, output)
        return
    old = _old(output)
    _remove(old)
    os.rename(output, old)
    try:
        os.rename(draft, output)
    except OSError:
        os.rename(old, output)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_model(
    model: onnx.ModelProto,
    tensors: dict[str, NDArray[np.generic]],
    folder: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
    depths: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, int]:
    """Write ``model.onnx`` (the graph) and ``model.onnx.data`` (tensors larger than INLINE_BYTES, each on a page).

    Args:
        model: the graph, without its tensors.
        tensors: by name.
        folder: where both files are written.
        progress: called with the number of bytes that are written, and of all bytes.
        depths: the first depth that reads a tensor, by name; 1 for a tensor that is not named.  Tensors of lower depths
            come first.

    Returns:
        Where the tensors of ``model.onnx.data`` begin in it, by name.
    """
    places = {}
    total = sum(tensor.nbytes for tensor in tensors.values())
    done = 0
    with (folder / EXTERNAL_DATA).open("wb") as data:
        for name, tensor in sorted(tensors.items(), key=lambda item: depths.get(item[0], 1)):
            proto = model.graph.initializer.add()
            if tensor.nbytes <= INLINE_BYTES:
                proto.CopyFrom(onnx.numpy_helper.from_array(tensor, name))
            else:
                data.seek(-(-data.tell() // PAGE_BYTES) * PAGE_BYTES)
                proto.name, proto.data_location = name, onnx.TensorProto.EXTERNAL
                proto.data_type = onnx.helper.np_dtype_to_tensor_dtype(tensor.dtype)
                proto.dims.extend(tensor.shape)
                places[name] = data.tell()
                place = {"location": EXTERNAL_DATA, "offset": places[name], "length": tensor.nbytes}
                for key, value in place.items():
                    proto.external_data.add(key=key, value=str(value))
                data.write(tensor.data.cast("B"))
            done += tensor.nbytes
            progress(done, total)
    (folder / "model.onnx").write_bytes(model.SerializeToString(deterministic=True))
    return places


def write_tensors(
    tensors: Mapping[str, NDArray[np.generic]],
    offsets: Mapping[str, int],
    path: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write tensors into one flat file.

    Args:
        tensors: by name.
        offsets: where each tensor starts, in bytes, in ascending order.
        path: the file.
        progress: called with the number of bytes that are written, and of all bytes.
    """
    total, done = sum(tensor.nbytes for tensor in tensors.values()), 0
    with path.open("wb") as file:
        for name, offset in offsets.items():
            tensor = tensors[name]
            file.seek(offset)
            file.write(tensor.data.cast("B"))
            done += tensor.nbytes
            progress(done, total)


def write_json(path: Path, document: object) -> None:
    """Write a JSON file.

    Args:
        path: the file.
        document: what it holds.
    """
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
