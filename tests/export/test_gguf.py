"""GGUF files made by llama.cpp's own converter say what the Hugging Face folders say that they were made from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from llama_cpp_converter import convert
from tiny_models import write_checkpoint
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from mbq_export.model.gguf import config_of, open_gguf, tokenizer_of
from mbq_export.model.loading import check_tokens, load, read_config
from mbq_export.model.source import locate
from mbq_export.model.stop_tokens import stop_token_ids
from mbq_runtime.errors import ModelError

pytestmark = pytest.mark.heavy

VOCABULARY = 400
ROWS = 416
"""The embedding has more rows than the tokenizer has tokens, as in many published models."""
TOKENS = 1500
"""More than the 1024 from which YaRN scales.  62 layers attend to each of them."""
LOCAL = {"rope_type": "default", "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
# Name -> base model, changes of its config.  Each is one way in which files of published models differ.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3": (
        "llama",
        {
            "max_position_embeddings": 131072,
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
            },
        },
    ),
    "llama-linear-with-biases": (
        "llama",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        },
    ),
    "llama-yarn": ("llama", {"rope_parameters": {**YARN, "rope_theta": 1e4}}),
    "llama-untied": ("llama", {"tie_word_embeddings": False}),
    "mistral": ("mistral", {}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": {**YARN, "rope_theta": 1e6}}),
    "qwen3": ("qwen3", {}),
    "gemma-3-linear": (
        "gemma3_text",
        {
            "vocab_size": VOCABULARY,  # the converter leaves out rows without a token
            "num_hidden_layers": 7,
            "query_pre_attn_scalar": 32,
            "layer_types": ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": LOCAL,
            },
        },
    ),
    # llama.cpp tells the 27B model by its number of layers; its queries are scaled by hidden_size / heads.
    "gemma-3-27b": (
        "gemma3_text",
        {
            "vocab_size": VOCABULARY,
            "num_hidden_layers": 62,
            "hidden_size": 96,
            "intermediate_size": 64,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "query_pre_attn_scalar": 48,
            "layer_types": ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(62)],
        },
    ),
    "phi-3-window": ("phi3", {"original_max_position_embeddings": 4096}),
    "phi-3-longrope": ("phi3-longrope", {"partial_rotary_factor": 1.0, "rope_scaling": {
        "type": "longrope", "short_factor": [1 + i / 50 for i in range(32)], "long_factor": [2 + i for i in range(32)],
    }}),
    "phi-4-mini-partial": ("phi3-longrope", {}),
}  # fmt: skip
PHI = ("phi-3-window", "phi-3-longrope", "phi-4-mini-partial")


def write_tokenizer(folder: Path) -> tuple[int, int]:
    """A byte-level tokenizer with merges, as the converter needs one.  Returns bos and eos."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - 2, initial_alphabet=alphabet, show_progress=False)
    words = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tokenizer.train_from_iterator([words, "12\n\n345 def f(): return x "], trainer)
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")
    wrapped.save_pretrained(folder)
    return int(tokenizer.token_to_id("<bos>")), int(tokenizer.token_to_id("<eos>"))


def write_folder(folder: Path, base: str, **changes: Any) -> Path:
    """A Hugging Face folder whose tokenizer the converter takes."""
    folder.mkdir(parents=True)
    bos, eos = write_tokenizer(folder)
    ids = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": eos, "vocab_size": ROWS}
    write_checkpoint(folder, base, **{"max_position_embeddings": 4096, **ids, **changes})
    write_tokenizer(folder)
    return folder


def called_gpt2(folder: Path) -> None:
    """The converter takes a Phi model's tokenizer for sentencepiece unless it is called so."""
    file = folder / "tokenizer_config.json"
    text = re.sub(r'"tokenizer_class": "[^"]*"', '"tokenizer_class": "GPT2Tokenizer"', file.read_text(encoding="utf-8"))
    file.write_text(text, encoding="utf-8")


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_the_folder_it_was_made_from(case: str, tmp_path: Path) -> None:
    base, changes = CASES[case]
    folder = write_folder(tmp_path / case, base, **changes)
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    plain = AutoTokenizer.from_pretrained(folder)
    if case in PHI:
        called_gpt2(folder)
    source = locate(str(convert(folder, tmp_path / f"{case}.gguf")))
    checkpoint = load(source)
    ids = torch.randint(0, VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, found = original(ids).logits, checkpoint.model(ids).logits
    assert (wanted - found).norm() <= 1e-3 * wanted.norm()
    # What the lowering reads.
    decoder = checkpoint.decoder
    assert decoder == read_config(source)
    assert decoder.context_length == read_config(locate(str(folder))).context_length
    assert [decoder.window(i) for i in range(decoder.layers)] == [
        read_config(locate(str(folder))).window(i) for i in range(decoder.layers)
    ]
    text = "The tide  turns\n\n345 éü 日本"
    assert checkpoint.tokenizer(text)["input_ids"] == plain(text)["input_ids"]


def edited(path: Path, output: Path, *, drop: tuple[str, ...] = (), **values: Any) -> Path:
    """A copy of a GGUF file with metadata keys changed (``__`` stands for a dot) or dropped."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(output, reader.fields["general.architecture"].contents())
    changed = {key.replace("__", "."): value for key, value in values.items()}
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture" or key in drop or key in changed:
            continue
        kinds = field.types
        writer.add_key_value(key, field.contents(), kinds[0], kinds[-1] if len(kinds) > 1 else None)
    for key, value in changed.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        if isinstance(value, np.ndarray):
            writer.add_tensor(key, value)
        else:
            add[type(value)](key, value)
    for tensor in reader.tensors:
        if tensor.name not in drop:
            writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return output


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_folder(tmp_path_factory.mktemp("gguf") / "llama", "llama")
    return convert(folder, folder.with_suffix(".gguf"))


def read_all(path: Path) -> None:
    """All that an export reads of a model, in its order."""
    source = locate(str(path))
    check_tokens(source, read_config(source))
    load(source)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"llama__expert_weights_scale": 2.0}, r"metadata key llama\.expert_weights_scale = 2\.0 is not supported"),
        ({"blk__0__attn_sinks__weight": np.ones(6, np.float32)}, r"tensor blk\.0\.attn_sinks\.weight is not supported"),
        ({"llama__rope__scaling__type": "spiral"}, "spiral"),
        ({"llama__rope__scaling__attn_factor": 1.25}, r"rope\.scaling\.attn_factor is 1\.25; only yarn and longrope"),
        (
            {"llama__rope__scaling__type": "none", "llama__rope__scaling__attn_factor": 1.25},
            r"rope\.scaling\.attn_factor is 1\.25",
        ),
        (
            {
                "llama__rope__scaling__type": "linear",
                "llama__rope__scaling__factor": 4.0,
                "llama__rope__scaling__attn_factor": 0.5,
            },
            r"rope\.scaling\.attn_factor is 0\.5",
        ),
        ({"llama__attention__causal": False}, "not causal"),
        ({"llama__rope__dimension_count": 16}, "rope.dimension_count is 16; 32 are needed"),
        ({"llama__vocab_size": 417}, "417, the embedding has 416 rows"),
        ({"drop": ("llama.block_count",)}, r"llama\.block_count is missing"),
        ({"drop": ("blk.1.attn_q.weight",)}, "1 weights are missing, the first is model.layers.1.self_attn.q_proj"),
        ({"tokenizer__ggml__pre": "no-such-cuts"}, "no-such-cuts"),
        ({"tokenizer__ggml__add_eos_token": True}, "ends itself"),
        ({"tokenizer__ggml__eos_token_id": 4000}, "4000; the tokenizer has 416 tokens"),
    ],
    ids=str,
)
def test_what_is_not_understood_is_refused(llama: Path, tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    path = edited(llama, tmp_path / "edited.gguf", **changes)
    with pytest.raises(ModelError, match=reason) as caught:
        read_all(path)
    assert "\n" not in str(caught.value)


YARN_IN_A_FILE = {"type": "yarn", "factor": 4.0, "original_context_length": 64}


@pytest.mark.parametrize(
    "scaling",
    [
        {"factor": 4.0},
        {"type": "none", "factor": 4.0},
        {"type": "linear", "factor": 4.0},
        {"type": "linear"},
        {"type": "linear", "factor": 0.0},
        {"attn_factor": 1.0},
        YARN_IN_A_FILE,
        {**YARN_IN_A_FILE, "factor": 1.0, "attn_factor": 1.25},
        *({**YARN_IN_A_FILE, "attn_factor": factor} for factor in (0.5, 1.0, 1.25)),
    ],
    ids=str,
)
def test_rotations_are_scaled_as_llama_cpp_scales_them(llama: Path, tmp_path: Path, scaling: dict[str, Any]) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    path = edited(llama, tmp_path / "edited.gguf", **{f"llama__rope__scaling__{k}": v for k, v in scaling.items()})
    ids = np.random.default_rng(0).integers(0, VOCABULARY, 300).tolist()
    theirs = llama_cpp.Llama(
        str(path), n_ctx=512, logits_all=True, verbose=False, n_threads=1, type_k=0, type_v=0, flash_attn=False,
        yarn_attn_factor=-1.0, yarn_beta_fast=-1.0, yarn_beta_slow=-1.0,
    )  # fmt: skip
    theirs.eval(ids)
    with torch.no_grad():
        logits = load(locate(str(path))).model(torch.tensor([ids])).logits[0, -16:].numpy()
    wanted = np.array(theirs._scores)[len(ids) - 16 : len(ids)]
    error = np.linalg.norm(logits - wanted) / np.linalg.norm(wanted)
    assert error < 0.01, error


def test_an_end_of_turn_of_its_own_ends_replies(llama: Path, tmp_path: Path) -> None:
    path = edited(llama, tmp_path / "eot.gguf", tokenizer__ggml__eot_token_id=65, tokenizer__ggml__eom_token_id=66)
    config = config_of(open_gguf(path))
    assert config.eos_token_id == [399, 65, 66]
    assert stop_token_ids(tokenizer_of(open_gguf(path)), [config], VOCABULARY) == [399, 65, 66]


@pytest.mark.parametrize(("pre", "opens"), [("llama-bpe", True), ("tekken", True), ("qwen2", False)])
def test_texts_open_with_bos_as_llama_cpp_opens_them(llama: Path, tmp_path: Path, pre: str, opens: bool) -> None:
    path = edited(llama, tmp_path / "bos.gguf", drop=("tokenizer.ggml.add_bos_token",), tokenizer__ggml__pre=pre)
    ids = tokenizer_of(open_gguf(path))("tide")["input_ids"]
    assert (ids[0] == 398) == opens
    path = edited(path, tmp_path / "said.gguf", tokenizer__ggml__add_bos_token=not opens)
    assert (tokenizer_of(open_gguf(path))("tide")["input_ids"][0] == 398) != opens


def pieces(path: Path, text: str) -> list[str]:
    tokenizer = tokenizer_of(open_gguf(path))
    return [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("pre", "text", "cuts"),
    [
        ("smollm", "a\n\n345 don't", ["a", "ĊĊ", "3", "4", "5", "Ġdon", "'t"]),
        ("gpt-2", "a\n\n345 don't", ["a", "Ċ", "Ċ", "345", "Ġdon", "'t"]),
        ("llama-bpe", "a\n\n3456 DON'T", ["a", "ĊĊ", "345", "6", "ĠDON", "'T"]),
        ("qwen2", "a\n\n345 DON'T", ["a", "ĊĊ", "3", "4", "5", "ĠDON", "'T"]),
        ("gpt-4o", "aBc don't 3456", ["a", "Bc", "Ġdon't", "Ġ", "345", "6"]),
        ("tekken", "aBc don't 345", ["a", "Bc", "Ġdon", "'t", "Ġ", "3", "4", "5"]),
    ],
)
def test_text_is_cut_as_the_published_tokenizers_cut_it(
    llama: Path, tmp_path: Path, pre: str, text: str, cuts: list[str]
) -> None:
    assert pieces(edited(llama, tmp_path / "pre.gguf", tokenizer__ggml__pre=pre), text) == cuts


def test_qwen_normalises_text(llama: Path, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(open_gguf(edited(llama, tmp_path / "pre.gguf", tokenizer__ggml__pre="qwen2")))
    assert tokenizer("e\u0301")["input_ids"] == tokenizer("\u00e9")["input_ids"]


def test_a_window_that_the_file_does_not_hold(llama: Path, tmp_path: Path) -> None:
    """Mistral 7B v0.1 and its descendants attend through a window, which the converter drops."""
    shape = {"embedding_length": 4096, "feed_forward_length": 14336, "block_count": 32}
    shape |= {"attention.head_count": 32, "attention.head_count_kv": 8, "context_length": 32768}
    shape |= {"rope.dimension_count": 128, "attention.key_length": 128, "attention.value_length": 128}
    changes = {f"llama.{key}".replace(".", "__"): value for key, value in shape.items()}
    config = config_of(open_gguf(edited(llama, tmp_path / "m.gguf", llama__rope__freq_base=10000.0, **changes)))
    assert (config.model_type, config.sliding_window) == ("mistral", 4096)
    config = config_of(open_gguf(edited(llama, tmp_path / "n.gguf", llama__rope__freq_base=1e6, **changes)))
    assert config.model_type == "llama"


def test_all_parts_of_a_split_file_are_read(llama: Path, tmp_path: Path) -> None:
    folder = llama.with_suffix("")
    convert(folder, tmp_path / "split.gguf", "--split-max-tensors", "8")
    parts = sorted(tmp_path.glob("split-*.gguf"))
    assert len(parts) > 1
    whole, split = load(locate(str(llama))), load(locate(str(parts[0])))
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, split.model.state_dict()[name])
    with pytest.raises(ModelError, match=f"part 2 of {len(parts)}; give part 1"):
        open_gguf(parts[1])
    parts[-1].unlink()
    with pytest.raises(ModelError, match="1 parts are missing"):
        open_gguf(parts[0])


def test_a_file_that_is_no_whole_gguf(llama: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(llama.read_bytes()[: llama.stat().st_size // 2])
    pointer = tmp_path / "pointer.gguf"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    other = tmp_path / "other.gguf"
    other.write_bytes(b"PK\x03\x04" + bytes(64))
    for path, reason in ((cut, "download it again"), (pointer, "git-lfs pointer"), (other, "no GGUF file")):
        with pytest.raises(ModelError, match=reason) as caught:
            load(locate(str(path)))
        assert "\n" not in str(caught.value)


def test_sentencepiece(tmp_path: Path) -> None:
    """A Llama 2 kind of tokenizer: merges by score, bytes for what has no token, a space before the text."""
    import sentencepiece

    folder = write_folder(tmp_path / "spm", "llama", bos_token_id=1, eos_token_id=2, pad_token_id=2)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=VOCABULARY,
        model_type="bpe", byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizer = tokenizer_of(open_gguf(convert(folder, tmp_path / "spm.gguf")))
    for sample in ("The tide turns", "a  b\n\n  c", "日本 é", text[:2000]):
        ids = tokenizer(sample)["input_ids"]
        assert ids == [processor.bos_id(), *processor.encode(sample)]
        assert tokenizer.decode(ids, skip_special_tokens=True) == sample
