"""The files of a bundle: written into a temporary folder beside the bundle's place, then moved there."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from mbq_runtime.bundle.layout import PAGE_BYTES
from mbq_runtime.errors import BundleError, UsageError

EXTERNAL_DATA = "model.onnx.data"
INLINE_BYTES = 1024
"""Tensors up to this size are stored in model.onnx."""


@contextmanager
def writing(output: Path, force: bool) -> Iterator[Path]:
    """A temporary folder that becomes the output when the block ends without an error, and is removed otherwise.

    An existing bundle stays as it is until the new one is complete.

    Args:
        output: the bundle's folder.
        force: whether an existing bundle is replaced.

    Raises:
        UsageError: ``output`` exists and is not to be replaced, or is not a bundle.
        BundleError: writing fails, for example on a full disk.
    """
    if output.exists() and not force:
        raise UsageError(f"{output}: it exists; choose another --output, or --force to replace it")
    if output.exists() and not (output / "manifest.json").is_file():
        raise UsageError(f"{output}: it is not a bundle, --force does not replace it; choose another --output")
    draft: Path | None = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".part", dir=output.parent))
        yield draft
        draft.chmod(0o755)
        _swap(draft, output)
    except OSError as error:
        where = error.filename or output
        raise BundleError(
            f"{output}: writing failed at {where} ({error.strerror or error}); nothing was left behind; "
            "free some space or choose another --output"
        ) from error
    finally:
        if draft is not None:
            shutil.rmtree(draft, ignore_errors=True)


def _swap(draft: Path, output: Path) -> None:
    if not output.exists():
        os.rename(draft, output)
        return
    old = output.with_name(f".{output.name}.old")
    shutil.rmtree(old, ignore_errors=True)
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
) -> None:
    """Write ``model.onnx`` (the graph) and ``model.onnx.data`` (tensors larger than INLINE_BYTES, each on a page).

    Args:
        model: the graph, without its tensors.
        tensors: by name.
        folder: where both files are written.
        progress: called with the number of bytes that are written, and of all bytes.
    """
    total = sum(tensor.nbytes for tensor in tensors.values())
    done = 0
    with (folder / EXTERNAL_DATA).open("wb") as data:
        for name, tensor in tensors.items():
            proto = model.graph.initializer.add()
            if tensor.nbytes <= INLINE_BYTES:
                proto.CopyFrom(onnx.numpy_helper.from_array(tensor, name))
            else:
                data.seek(-(-data.tell() // PAGE_BYTES) * PAGE_BYTES)
                proto.name, proto.data_location = name, onnx.TensorProto.EXTERNAL
                proto.data_type = onnx.helper.np_dtype_to_tensor_dtype(tensor.dtype)
                proto.dims.extend(tensor.shape)
                place = {"location": EXTERNAL_DATA, "offset": data.tell(), "length": tensor.nbytes}
                for key, value in place.items():
                    proto.external_data.add(key=key, value=str(value))
                data.write(tensor.data.cast("B"))
            done += tensor.nbytes
            progress(done, total)
    (folder / "model.onnx").write_bytes(model.SerializeToString(deterministic=True))


def write_tensors(
    tensors: Mapping[str, NDArray[np.generic]],
    offsets: Mapping[str, int],
    path: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write tensors into one flat file.

    Args:
        tensors: by name.
        offsets: where each tensor starts, in bytes.
        path: the file.
        progress: called with the number of bytes that are written, and of all bytes.
    """
    total, done = sum(tensor.nbytes for tensor in tensors.values()), 0
    with path.open("wb") as file:
        for name, tensor in tensors.items():
            file.seek(offsets[name])
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
