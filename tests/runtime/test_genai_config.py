from __future__ import annotations

from typing import Any

import pytest

from mbq_runtime.bundle.genai_config import PROMPT_CHUNK, genai_config
from mbq_runtime.errors import ModelError


def config(**changes: Any) -> dict[str, Any]:
    model: dict[str, Any] = {
        "family": "llama", "vocab_size": 49152, "context_length": 8192, "layers": 30, "hidden_size": 576, "heads": 9,
        "kv_heads": 3, "head_dim": 64, "eos_token_ids": [2], "native": True,
    }  # fmt: skip
    return genai_config(**{**model, **changes})


def test_names_match_the_graph() -> None:
    decoder = config()["model"]["decoder"]
    assert decoder["inputs"]["past_key_names"] % 3 == "past_key_values.3.key"
    assert decoder["outputs"]["present_value_names"] % 3 == "present.3.value"
    assert decoder["head_size"] == 64


def test_library_is_named_by_native_bundles_only_and_relative() -> None:
    assert config()["model"]["decoder"]["session_options"]["custom_ops_library"] == "lib/libmbq_ops.so"
    assert "custom_ops_library" not in config(native=False)["model"]["decoder"]["session_options"]


def test_token_ids() -> None:
    model = config(eos_token_ids=(2, 0))["model"]
    assert model["eos_token_id"] == [2, 0]
    assert model["pad_token_id"] == 2
    assert "bos_token_id" not in model
    assert config(bos_token_id=1)["model"]["bos_token_id"] == 1
    assert config(pad_token_id=0)["model"]["pad_token_id"] == 0


@pytest.mark.parametrize("ids", [[], [49152], [2, -1]])
def test_token_ids_the_engine_would_refuse(ids: list[int]) -> None:
    with pytest.raises(ModelError, match="end-of-text token ids"):
        config(eos_token_ids=ids)


def test_unknown_families_run_under_the_generic_name() -> None:
    assert config(family="qwen3")["model"]["type"] == "qwen3"
    assert config(family="falcon9")["model"]["type"] == "decoder"


@pytest.mark.parametrize("vocab", [264, 49152, 151936, 262144])
def test_prompt_chunks_do_not_depend_on_the_vocabulary(vocab: int) -> None:
    assert config(vocab_size=vocab)["search"]["chunk_size"] == PROMPT_CHUNK == 128


def test_cache_is_shared_in_place() -> None:
    search = config()["search"]
    assert search["past_present_share_buffer"] is True
    assert search["max_length"] == 8192
