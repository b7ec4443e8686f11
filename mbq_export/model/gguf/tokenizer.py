"""The tokenizer of a GGUF file, as the published tokenizer.json of such a model is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from .file import GgufFile

# Values of tokenizer.ggml.token_type.
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 2, 3, 4, 5
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""Stands for a space in sentencepiece."""

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(end: str) -> str:
    """Words that end where lower case turns to upper case.  end: what may follow a word."""
    start = r"[^\r\n\p{L}\p{N}]?"
    return f"{start}{_UPPER}*{_LOWER}+{end}|{start}{_UPPER}+{_LOWER}*{end}|"


_SLASHED = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"


@dataclass(frozen=True)
class PreTokenizer:
    """How text is cut before byte-pair merges.

    pattern: a regular expression of the cuts; None for GPT-2's, which the library has.
    digits: single digits are cut out first.
    nfc: text is normalised to NFC first.
    whole_words: a piece that is a token is not built from merges.
    opens: a text opens with bos unless the file says otherwise.
    """

    pattern: str | None = None
    digits: bool = False
    nfc: bool = False
    whole_words: bool = False
    opens: bool = False


_LLAMA_3 = PreTokenizer(_WORDS + r"\p{N}{1,3}" + _REST, whole_words=True, opens=True)
_QWEN_2 = PreTokenizer(_WORDS + r"\p{N}" + _REST, nfc=True)
PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer(),
    "smollm": PreTokenizer(digits=True),
    "refact": PreTokenizer(digits=True),
    "starcoder": PreTokenizer(digits=True),
    "llama-bpe": _LLAMA_3,
    "llama3": _LLAMA_3,
    "llama-v3": _LLAMA_3,
    "qwen2": _QWEN_2,
    "deepseek-r1-qwen": _QWEN_2,
    "gpt-4o": PreTokenizer(_cased(_CONTRACTION) + r"\p{N}{1,3}" + _SLASHED),
    "tekken": PreTokenizer(_cased("") + r"\p{N}" + _SLASHED, whole_words=True, opens=True),
}
"""By ``tokenizer.ggml.pre``."""


def tokenizer_of(file: GgufFile) -> Any:
    """A ``PreTrainedTokenizerFast`` with the file's vocabulary, special tokens and chat template.

    Args:
        file: the open file.

    Raises:
        ModelError: the kind of tokenizer is not supported, or a part of it is missing.
    """
    from transformers import PreTrainedTokenizerFast

    kind = file.need("tokenizer.ggml.model", str)
    if kind not in _KINDS:
        raise file.fault(f"tokenizer.ggml.model is {kind!r}; supported: {', '.join(_KINDS)}")
    tokens = file.need("tokenizer.ggml.tokens", list)
    types = file.get("tokenizer.ggml.token_type", list, [1] * len(tokens)) or []
    if len(types) != len(tokens):
        raise file.fault(
            f"tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens; download it again"
        )
    rows = file.shape("token_embd.weight")[0]
    # The converter fills the list up to the config's vocabulary with tokens that are never used.
    used = max((i + 1 for i, of in enumerate(types) if of != _UNUSED), default=0)
    if used > rows:
        raise file.fault(f"the tokenizer has {used} tokens, the embedding {rows} rows; each token needs a row")
    tokens, types = tokens[:rows], types[:rows]
    tokenizer, opens = _KINDS[kind](file, tokens, types)
    tokenizer.add_special_tokens(
        [_added(token, True) for token, of in zip(tokens, types, strict=True) if of == _CONTROL]
    )
    tokenizer.add_tokens([_added(token, False) for token, of in zip(tokens, types, strict=True) if of == _USER_DEFINED])
    special = {name: _special(file, tokens, key) for name, key in _SPECIAL.items()}
    opens = bool(file.get("tokenizer.ggml.add_bos_token", bool, opens)) and special["bos_token"] is not None
    if file.get("tokenizer.ggml.add_eos_token", bool, False):
        raise file.fault("tokenizer.ggml.add_eos_token is true; a prompt that ends itself cannot be continued")
    for key in ("add_sep_token", "remove_extra_whitespaces", "add_space_prefix"):
        file.get(f"tokenizer.ggml.{key}", bool)
    if opens:
        _open_with(tokenizer, special["bos_token"], tokens)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_max_length=file.need("{arch}.context_length", int),
        **{name: token for name, token in special.items() if token is not None},
    )
    wrapped.chat_template = file.get("tokenizer.chat_template", str)
    return wrapped


_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""Names in transformers, and in metadata keys."""


def _special(file: GgufFile, tokens: list[str], key: str) -> str | None:
    number = file.get(f"tokenizer.ggml.{key}_token_id", int)
    if number is None:
        return None
    if not 0 <= number < len(tokens):
        raise file.fault(f"tokenizer.ggml.{key}_token_id is {number}; the tokenizer has {len(tokens)} tokens")
    return tokens[number]


def _added(token: str, special: bool) -> AddedToken:
    return AddedToken(token, special=special, normalized=False)


def _open_with(tokenizer: Tokenizer, bos: str | None, tokens: list[str]) -> None:
    """Put bos before every text, as a file with ``add_bos_token`` asks."""
    assert bos is not None
    template = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokens.index(bos))]
    )
    inner = tokenizer.post_processor
    tokenizer.post_processor = template if inner is None else processors.Sequence([inner, template])


def _byte_level(file: GgufFile, tokens: list[str], types: list[int]) -> tuple[Tokenizer, bool]:
    """GPT-2's kind: merges of bytes.  Also whether a text opens with bos where the file does not say."""
    name = file.get("tokenizer.ggml.pre", str)
    cuts = PRE_TOKENIZERS.get(name or "")
    if cuts is None:
        raise file.fault(
            f"tokenizer.ggml.pre is {name!r}; supported: {', '.join(PRE_TOKENIZERS)}; "
            "use the Hugging Face folder of this model"
        )
    file.get("tokenizer.ggml.scores", list)
    merges = [tuple(merge.split(" ", 1)) for merge in file.need("tokenizer.ggml.merges", list)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    model = models.BPE(vocabulary, merges, ignore_merges=cuts.whole_words)
    tokenizer = Tokenizer(model)
    if cuts.nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if cuts.digits else []
    if cuts.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(cuts.pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cuts.pattern is None))
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer, cuts.opens


def _sentencepiece(file: GgufFile, tokens: list[str], types: list[int]) -> tuple[Tokenizer, bool]:
    """Merges of characters, with bytes for characters that are no token.  Texts open with bos."""
    file.get("tokenizer.ggml.pre", str)
    scores = file.need("tokenizer.ggml.scores", list)[: len(tokens)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    unknown = next((token for token, of in zip(tokens, types, strict=True) if of == _UNKNOWN), None)
    model = models.BPE(
        vocabulary, _merges(vocabulary, tokens, scores), unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    prefixed = file.get("tokenizer.ggml.add_space_prefix", bool, True)
    replace = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace]) if prefixed else replace
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefixed else steps)
    return tokenizer, True


def _merges(vocabulary: dict[str, int], tokens: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """The merges that make sentencepiece's choice: the pair whose token has the highest score comes first."""
    found: list[tuple[float, str, str]] = []
    for token, score in zip(tokens, scores, strict=True):
        # The converter lowers the scores of added tokens; runs of spaces are tokens of the model itself.
        score = 0.0 if not token.strip(_SPACE) else score
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [(left, right) for left, right in pairs if left in vocabulary and right in vocabulary]
        known.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        found += [(score, left, right) for left, right in known]
    found.sort(key=lambda merge: merge[0], reverse=True)
    return [(left, right) for _, left, right in found]


_KINDS: dict[str, Callable[[GgufFile, list[str], list[int]], tuple[Tokenizer, bool]]] = {
    "gpt2": _byte_level,
    "llama": _sentencepiece,
}
"""By ``tokenizer.ggml.model``."""
