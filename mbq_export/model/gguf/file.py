"""One GGUF file, or all parts of a split one, with a record of what has been read from it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mbq_runtime.errors import ModelError

T = TypeVar("T")

_PART = re.compile(r"^(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")

IRRELEVANT = (
    "GGUF.",  # the header: version and counts
    "general.",  # who made the file, and from what; the architecture is read by ``open_gguf``
    "quantize.imatrix.",  # how llama.cpp chose its roundings
    "split.",  # read by ``open_gguf``
    "tokenizer.chat_template.",  # templates under further names; the model's own is tokenizer.chat_template
    "tokenizer.chat_templates",
    "tokenizer.huggingface.json",  # the same tokenizer once more
    "tokenizer.ggml.fim_",  # tokens that fill in code; a decoder does not treat them in a special way
    "tokenizer.ggml.prefix_token_id",
    "tokenizer.ggml.suffix_token_id",
    "tokenizer.ggml.middle_token_id",
    "tokenizer.ggml.seperator_token_id",
    "tokenizer.ggml.cls_token_id",
    "tokenizer.ggml.mask_token_id",
)
"""Beginnings of metadata keys that do not change what the model computes."""


class GgufFile:
    """Metadata and tensors of a GGUF checkpoint.

    Args:
        path: the file, or the first part of a split file.
        metadata: values by key.
        tensors: the gguf package's tensors by name.
    """

    def __init__(self, path: Path, metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
        self.path = path
        self.architecture = str(metadata.get("general.architecture", ""))
        self._metadata = metadata
        self._tensors = tensors
        self._read: set[str] = set()

    def fault(self, text: str) -> ModelError:
        """The error that names this file.

        Args:
            text: what is wrong with the file.
        """
        return ModelError(f"{self.path.name}: {text}")

    def get(self, key: str, kind: Callable[[Any], T], default: T | None = None) -> T | None:
        """A metadata value, or the default.

        Args:
            key: full key; ``{arch}`` in it stands for the architecture.
            kind: turns the stored value into what is returned, such as ``int``.
            default: returned when the file has no such key.

        Raises:
            ModelError: the value is of another kind.
        """
        key = key.format(arch=self.architecture)
        self._read.add(key)
        if key not in self._metadata:
            return default
        value = self._metadata[key]
        try:
            return kind(value)
        except (TypeError, ValueError):
            raise self.fault(f"metadata key {key} is {value!r}; a value of another kind is needed") from None

    def need(self, key: str, kind: Callable[[Any], T]) -> T:
        """A metadata value that must be there.

        Args:
            key: as ``get`` takes it.
            kind: as ``get`` takes it.

        Raises:
            ModelError: the key is missing, or its value is of another kind.
        """
        value = self.get(key, kind)
        if value is None:
            key = key.format(arch=self.architecture)
            raise self.fault(f"metadata key {key} is missing; convert the model again with a current llama.cpp")
        return value

    @property
    def tensor_names(self) -> list[str]:
        """Names of all tensors, in the file's order."""
        return list(self._tensors)

    @property
    def stored_weights(self) -> int:
        """Number of weights in all tensors."""
        return sum(math.prod(self.shape(name)) for name in self._tensors)

    def has(self, name: str) -> bool:
        """Whether the file has the tensor.

        Args:
            name: the tensor's name in the file.
        """
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor as torch has it, the slowest axis first.

        Args:
            name: the tensor's name in the file.
        """
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def tensor(self, name: str) -> NDArray[np.float32]:
        """Values of a tensor, dequantised to float32.

        Args:
            name: the tensor's name in the file.

        Raises:
            ModelError: the tensor's storage type is unknown, or its data are cut off.
        """
        from gguf import dequantize

        self._read.add(name)
        found = self._tensors[name]
        try:
            values = dequantize(found.data, found.tensor_type)
        except (NotImplementedError, ValueError, KeyError) as error:
            raise self.fault(f"tensor {name} of type {found.tensor_type.name} cannot be decoded: {error}") from None
        return np.asarray(values, np.float32).reshape(self.shape(name))

    def refuse_unread(self) -> None:
        """Refuse a file that says something nobody has read.

        Raises:
            ModelError: a metadata key or a tensor is neither read nor known to be irrelevant.
        """
        keys = [key for key in self._metadata if key not in self._read and not key.startswith(IRRELEVANT)]
        if keys:
            value = str(self._metadata[keys[0]])
            shown = value if len(value) < 60 else value[:57] + "..."
            raise self.fault(
                f"metadata key {keys[0]} = {shown} is not supported ({len(keys)} such keys); "
                "the bundle would ignore it: use the Hugging Face folder of this model"
            )
        names = [name for name in self._tensors if name not in self._read]
        if names:
            raise self.fault(
                f"tensor {names[0]} is not supported ({len(names)} such tensors); "
                "the bundle would ignore it: use the Hugging Face folder of this model"
            )


def open_gguf(path: Path) -> GgufFile:
    """Read a file's metadata and map its tensors, of all parts where the file is split.

    Args:
        path: the file; of a split file, its first part.

    Raises:
        ModelError: the file is not a whole GGUF file, a part is missing, or the first part is not the one given.
    """
    metadata, tensors = _read(path)
    count = int(metadata.get("split.count", 0))
    for other in _other_parts(path, count):
        _, more = _read(other)
        tensors |= more
    wanted = int(metadata.get("split.tensors.count", 0)) if count > 1 else 0
    if wanted and wanted != len(tensors):
        raise ModelError(f"{path.name}: its {count} parts hold {len(tensors)} tensors, {wanted} are needed")
    return GgufFile(path, metadata, tensors)


def _other_parts(path: Path, count: int) -> list[Path]:
    """Parts 2 and up of a split file."""
    if count <= 1:
        return []
    name = _PART.match(path.name)
    if name is None or int(name["count"]) != count:
        raise ModelError(
            f"{path.name}: part of a file split in {count}; its name must end in -00001-of-{count:05}.gguf"
        )
    if int(name["number"]) != 1:
        raise ModelError(f"{path.name}: part {int(name['number'])} of {count}; give part 1, the others are found by it")
    others = [path.with_name(f"{name['stem']}-{i:05}-of-{count:05}.gguf") for i in range(2, count + 1)]
    missing = [other.name for other in others if not other.is_file()]
    if missing:
        raise ModelError(
            f"{path.name}: part 1 of {count}; {len(missing)} parts are missing beside it ({', '.join(missing)})"
        )
    return others


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata and tensors of one file."""
    from gguf import GGUFReader

    with path.open("rb") as file:
        magic = file.read(40)
    if magic.startswith(b"version https://git-lfs"):
        raise ModelError(f"{path}: a git-lfs pointer, not the file itself; run git lfs pull, or download it again")
    if magic[:4] != b"GGUF":
        raise ModelError(f"{path}: begins with {magic[:4]!r}, not with GGUF; it is no GGUF file")
    try:
        reader = GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    # The package raises whatever its parsing meets in a damaged file.
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ModelError(f"{path}: not a whole GGUF file ({reason}); download it again") from error
    return metadata, tensors
