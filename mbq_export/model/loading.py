"""Read a model: its description, its tokenizer, and the whole checkpoint in float32.

What is wrong with a model is said in one line, and what can be seen without the weights is said before they are read.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Set
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mbq_runtime.bundle.check import check_tokenizer_files
from mbq_runtime.errors import BundleError, ModelError

from ..memory import WEIGHTS_AT_ONCE
from .boundary import reading
from .checkpoint import Checkpoint
from .config_schema import check_values
from .describe import describe
from .empty_model import empty_model, stored_buffers
from .experts import single_experts
from .families import FAMILIES
from .float8 import FLOAT8, float32_weights, is_float8
from .folding import fold
from .gguf import GgufFile, config_of, load_weights, open_gguf, tokenizer_of
from .mapped_weights import in_file
from .shape import Decoder
from .source import WEIGHT_FILES, ModelSource, read_json, stored_dtypes, stored_weights, weight_files
from .stop_tokens import check_rows, check_stop
from .text_check import check_text, without_folder
from .wrappers import RENAMED, check_wrapper, is_left_out, renamed, text_part

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_HALF_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}
_UNEXPECTED_BUT_IRRELEVANT = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
"""Stored by old versions of transformers, which compute it since."""


@lru_cache(maxsize=1)
def _gguf(source: ModelSource) -> GgufFile:
    """An open GGUF file.  The last one is kept: parsing a vocabulary takes seconds."""
    assert source.gguf is not None
    return open_gguf(Path(source.folder) / source.gguf)


def read_config(source: ModelSource) -> Decoder:
    """The description of a model, without reading its weights.

    Args:
        source: where the model lies.

    Raises:
        ModelError: the model cannot be read, or has no lowering.
    """
    with reading(source.name, _config_file(source)):
        decoder = describe(_config(source), source.name)
    check_size(source, decoder)
    return decoder


def check_size(source: ModelSource, decoder: Decoder) -> None:
    """Refuse a config that describes far more weights than the files hold, before the plan counts on it.

    A few weights that are missing are named when the files are loaded.

    Args:
        source: where the model lies.
        decoder: its description.

    Raises:
        ModelError: as said.
    """
    if source.gguf is not None:
        stored = _gguf(source).stored_weights
    elif source.local is not None:
        stored = stored_weights(source.local)
    else:
        return
    if decoder.parameters > 2 * stored:
        raise ModelError(
            f"{source.name}: {_config_file(source)} describes {decoder.parameters} weights, the files hold {stored}; "
            "give a config and weights that belong together"
        )


def _config_file(source: ModelSource) -> str:
    return "config.json" if source.gguf is None else "metadata"


def check_tokens(source: ModelSource, decoder: Decoder) -> None:
    """Refuse a model that could not be talked to: no tokenizer, ids without rows, nothing that ends a reply.

    So is one whose prompts or tokens would differ on the board.

    Args:
        source: where the model lies.
        decoder: its description.

    Raises:
        ModelError: as said.
    """
    tokenizer = read_tokenizer(source)
    with reading(source.name, "tokenizer"):
        check_text(tokenizer, source.name)
        check_rows(tokenizer, decoder.vocab_size, source.name)
    owners = [*_generation_config(source), tokenizer, _config(source)]
    check_stop(tokenizer, owners, decoder.vocab_size, source.name)


def read_tokenizer(source: ModelSource) -> Any:
    """transformers' tokenizer of a model.

    Args:
        source: where the model lies.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    with reading(source.name, "tokenizer"):
        if source.gguf is not None:
            return tokenizer_of(_gguf(source))
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(**source.load_args)


def _generation_config(source: ModelSource) -> list[Any]:
    """The generation config, if there is one."""
    folder = source.local
    if folder is None or source.gguf is not None or not (folder / "generation_config.json").is_file():
        return []
    values = read_json(folder / "generation_config.json")
    with reading(source.name, "generation_config.json"):
        from transformers import GenerationConfig

        _check_saved(GenerationConfig.from_pretrained(folder), source.name)
    return [type("GenerationValues", (), {"eos_token_id": values.get("eos_token_id")})()]


def _check_saved(generation_config: Any, name: str) -> None:
    """Save it as a bundle does: transformers refuses some values only then, and a board others."""
    with tempfile.TemporaryDirectory(prefix="mbq-generation-") as folder:
        generation_config.save_pretrained(folder)
        try:
            check_tokenizer_files(Path(folder))
        except BundleError as error:
            raise ModelError(f"{name}: {without_folder(folder, error)}") from None


def left_out(source: ModelSource) -> tuple[str, ...]:
    """The parts of a model that are not exported, such as vision; nothing for a model of text alone.

    Args:
        source: where the model lies.

    Raises:
        ModelError: the config cannot be read.
    """
    with reading(source.name, _config_file(source)):
        return _config_and_rest(source)[1]


def _config(source: ModelSource) -> Any:
    return _config_and_rest(source)[0]


def _config_and_rest(source: ModelSource) -> tuple[Any, tuple[str, ...]]:
    """The config of the text model, and the names of the parts that are left out."""
    if source.gguf is not None:
        config = config_of(_gguf(source))
        check_values(config.to_dict(), f"{source.name}: metadata")
        return config, ()
    from transformers import AutoConfig, PreTrainedConfig

    # The file alone is looked at first: transformers would refuse an unknown model in words of its own.
    if source.local is not None:
        values = read_json(source.local / "config.json")
    else:
        values = PreTrainedConfig.get_config_dict(source.folder)[0]
    check_wrapper(values, source.name)
    _check_config(values, source.name)
    if isinstance(values.get("text_config"), dict):
        _check_config(values["text_config"], source.name)
    config, rest = text_part(AutoConfig.from_pretrained(**source.load_args))
    _check_config(config.to_dict(), source.name)
    return config, rest


def _check_config(values: dict[str, Any], name: str) -> None:
    """Refuse what transformers would ask about, or would say only while it loads weights."""
    if values.get("auto_map"):
        raise ModelError(
            f"{name}: config.json has an auto_map, which names code of the checkpoint; code of a checkpoint is never "
            "run: use a version of the model that transformers supports by itself"
        )
    check_values(values, f"{name}: config.json")
    quantization = values.get("quantization_config") or {}
    if not isinstance(quantization, dict):
        raise ModelError(f"{name}: config.json: quantization_config is no object; download it again")
    if quantization and not is_float8(dict(quantization)):
        method = quantization.get("quant_method", "an unknown method")
        raise ModelError(f"{name}: already quantised (quantization_config: {method}); give the original model")


def load(source: ModelSource, weights_folder: Path | None = None, device: str = "cpu") -> Checkpoint:
    """Read config, weights and tokenizer.

    Args:
        source: where the model lies.
        weights_folder: where a file holds the weights, or None to hold them in memory.
        device: as torch names it; "cpu" with a ``weights_folder``.

    Raises:
        ModelError: the model cannot be read, has no lowering, holds weights that it would not use, or has a weight
            that is not finite.
    """
    # Before the weights: what is then left unread in a GGUF file is refused, and the tokenizer's keys are read.
    tokenizer = read_tokenizer(source)
    with reading(source.name, "weights"):
        config, model = _float32_model(source, weights_folder)
        decoder = describe(config, source.name, tied=_is_tied(model))
        fold(model, decoder)
    try:
        model.eval().requires_grad_(False).to(device)
    except torch.OutOfMemoryError:
        raise ModelError(f"{source.name}: its weights do not fit the memory of {device}; use --device cpu") from None
    checkpoint = Checkpoint(source, decoder, model, tokenizer)
    _check_tables(checkpoint)
    return checkpoint


def _float32_model(source: ModelSource, weights_folder: Path | None) -> tuple[Any, Any]:
    """Config and model, with weights that are all finite."""
    config = _config(source)
    describe(config, source.name)
    model = _from_gguf(source, config) if source.gguf is not None else _from_safetensors(source, config, weights_folder)
    for name, values in (*model.named_parameters(), *stored_buffers(model)):
        _check_values(source, name, values)
    # A config may say that the head is the embedding while the files have a head of its own.
    config.tie_word_embeddings = model.config.tie_word_embeddings = _is_tied(model)
    return config, model if weights_folder is None else in_file(model, weights_folder)


def _check_tables(checkpoint: Checkpoint) -> None:
    """Refuse now what would fail when the bundle is written: rotations, and the generation config."""
    decoder, name = checkpoint.decoder, checkpoint.source.name
    with reading(name, "generation config"):
        _check_saved(checkpoint.model.generation_config, name)
    with reading(name, "rotary parameters"):
        for kind in decoder.rotary_kinds:
            last = checkpoint.rotary_at(kind, [0, decoder.context_length - 1])
            width = 2 * last[0].shape[1]
            head_dim = min(
                decoder.heads_of(layer).head_dim
                for layer in range(decoder.layers)
                if decoder.rotary_kind(layer) == kind
            )
            if width > head_dim or not all(np.isfinite(table).all() for table in last):
                raise ModelError(
                    f"{name}: its rotations of {kind} have width {width} and may be infinite; finite ones of at most "
                    f"{head_dim} are needed: check rope_parameters"
                )


def _is_tied(model: Any) -> bool:
    """Whether the head is the embedding.  A config may say so while the file has a head of its own."""
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    return head is embedding or head.data_ptr() == embedding.data_ptr()


def _check_values(source: ModelSource, name: str, parameter: torch.Tensor) -> None:
    if parameter.dtype in FLOAT8:
        raise ModelError(f"{source.name}: weight {name} is {parameter.dtype} without a scale; give the original model")
    # In parts: a table may be almost as large as memory.
    parts = parameter.detach().reshape(-1).split(WEIGHTS_AT_ONCE)
    if bad := sum(int((~torch.isfinite(part)).sum()) for part in parts):
        raise ModelError(
            f"{source.name}: weight {name} holds {bad} values that are NaN or infinite; the checkpoint is broken"
        )


def _from_gguf(source: ModelSource, config: Any) -> Any:
    model, file = empty_model(config), _gguf(source)
    load_weights(model, file)
    file.refuse_unread()
    return model


def _from_float8(source: ModelSource, config: Any) -> Any:
    files = weight_files(_folder(source, "float8 weights"))
    del config.quantization_config
    return _from_stored(source, config, float32_weights(files, source.name))


def _with_experts(source: ModelSource, config: Any, weights_folder: Path | None) -> Any:
    """The experts' weights as the files have them, one by one: transformers would join all of a block in memory."""
    from safetensors.torch import load_file

    # The files are mapped into memory.
    files = weight_files(_folder(source, "models with experts"))
    stored = {name: weight for file in files for name, weight in load_file(file).items()}
    stored = single_experts(stored, FAMILIES[config.model_type])
    if weights_folder is None:
        stored = {name: weight.float() for name, weight in stored.items()}
    return _from_stored(source, config, stored)


def _folder(source: ModelSource, what: str) -> Path:
    if source.local is None:
        raise ModelError(f"{source.name}: {what} are read from a folder; download the model and give that")
    return source.local


def _from_stored(source: ModelSource, config: Any, stored: dict[str, torch.Tensor]) -> Any:
    """The model of a folder, with weights by their names in the files."""
    from transformers import GenerationConfig

    weights = {renamed(name): weight for name, weight in stored.items()}
    head, embedding = weights.get(_HEAD), weights.get(_EMBEDDING)
    if head is not None and embedding is not None and not torch.equal(head, embedding):
        config.tie_word_embeddings = False
    model = empty_model(config)
    buffers = {name: buffer.shape for name, buffer in stored_buffers(model)}
    wanted = {name: parameter.shape for name, parameter in model.named_parameters()} | buffers
    tied = {_HEAD} if config.tie_word_embeddings else set()
    _check_names(
        source,
        config,
        missing=wanted.keys() - weights.keys() - tied,
        mismatched={name for name in wanted.keys() & weights.keys() if wanted[name] != weights[name].shape},
        unexpected=weights.keys() - wanted.keys(),
    )
    for name in buffers:
        model.get_buffer(name).copy_(weights[name])
    for name in (wanted.keys() - buffers.keys()) & weights.keys():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, torch.nn.Parameter(weights[name], requires_grad=False))
    model.tie_weights()
    if (_folder(source, "weights") / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source.folder)
    return model


def _from_safetensors(source: ModelSource, config: Any, weights_folder: Path | None) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    if getattr(config, "quantization_config", None):
        return _from_float8(source, config)
    if describe(config, source.name).experts is not None:
        return _with_experts(source, config, weights_folder)
    transformers_logging.disable_progress_bar()
    # Weights in the dtype of their safetensors files are not copied: the files are mapped into memory.
    # A config may name another dtype.
    dtype = torch.float32 if weights_folder is None else _dtype_of(stored_dtypes(_files_of(source)))
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        **source.load_args, config=config, dtype=dtype, output_loading_info=True, key_mapping=RENAMED
    )
    model, report = loaded
    mismatched = {str(entry[0] if isinstance(entry, tuple) else entry) for entry in report["mismatched_keys"]}
    _check_names(
        source,
        config,
        missing=set(report["missing_keys"]),
        mismatched=mismatched,
        unexpected=set(report["unexpected_keys"]),
    )
    return model


def _dtype_of(stored: Set[str]) -> torch.dtype:
    """A dtype that holds all values of files, and is that of the files if they have one."""
    return _HALF_DTYPES[next(iter(stored))] if len(stored) == 1 and stored <= _HALF_DTYPES.keys() else torch.float32


def _files_of(source: ModelSource) -> list[Path]:
    """The weights of a model; those of a hub id are downloaded."""
    if source.local is not None:
        return weight_files(source.local)
    from huggingface_hub import snapshot_download

    return weight_files(Path(snapshot_download(source.folder, allow_patterns=list(WEIGHT_FILES))))


def _check_names(
    source: ModelSource, config: Any, *, missing: Set[str], mismatched: Set[str], unexpected: Set[str]
) -> None:
    """Refuse files whose weights are not those of the model."""
    if missing:
        raise ModelError(
            f"{source.name}: {len(missing)} weights are missing, the first is {min(missing)}; download the model again"
        )
    if mismatched:
        raise ModelError(
            f"{source.name}: weight {min(mismatched)} has another shape than config.json says; download both again"
        )
    unused = sorted(name for name in unexpected if not (_UNEXPECTED_BUT_IRRELEVANT.search(name) or is_left_out(name)))
    if unused:
        raise ModelError(
            f"{source.name}: {len(unused)} weights are in the files that a {config.model_type} model of this "
            f"config.json does not use, the first is {unused[0]}; the bundle would ignore them: check config.json"
        )
