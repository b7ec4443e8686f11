"""Tokens and text, streamed piece by piece, are those of the Hugging Face tokenizer: for every kind of tokenizer."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from tokenizers_for_tests import KINDS

from mbq_runtime.engine.tokenizer import Tokenizer
from mbq_runtime.errors import BundleError, UsageError

CASES = [
    "",
    " ",
    "def f():\n    return 1\n\n\n        # eight\t\ttabs\r\n",
    "x = [1, 22, 333]  # 4444\n\n12\n\n34  5",
    "日本語と中文、한국어 ไทย עברית العربية हिन्दी",
    "🙂👩‍👩‍👧 🇩🇪 ½ ﬁ 𝔘 \u00a0\u2009\u200b",
    "e\u0301 \u00e9 A\u030a \u00c5",
    "   three before and after   ",
    f"{chr(0x2581)}{chr(0x2581)}a mark{chr(0x2581)}",
    "\ufffd not broken \ufffd",
    "a\0b",
    "<think>thoughts</think><|im_start|>user <s></s>",
    "<0x41><0xE3> bytes",
]
PARTS = [
    "    ", "  ", "\n\n\n", "\t", "\r\n", "def ", "return ", "(x):\n", "123", "4 5", "'ll", "日本", "ไทย", "🙂",
    "👩\u200d👧", "e\u0301", chr(0x2581), "\ufffd", "\0", "<think>", "</s>", "<0xE3>",
]  # fmt: skip
SURROGATES = range(0xD800, 0xE000)
ALPHABETS = [range(0x80), range(0x3000), range(0x11_0000)]


# To read the tokenizer out of the packaged model takes seconds.
PARAMS = [pytest.param(kind, marks=pytest.mark.heavy) if kind == "published_smollm2" else kind for kind in KINDS]


@pytest.fixture(scope="module", params=PARAMS)
def original(request: pytest.FixtureRequest) -> Any:
    return KINDS[request.param]()


@pytest.fixture(scope="module")
def board(original: Any, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The tokenizer of a bundle with the files of ``original``."""
    original.save_pretrained(folder := tmp_path_factory.mktemp("bundle"))
    return Tokenizer(folder)


def any_text(rng: random.Random) -> str:
    """Known parts and characters of all of Unicode, mixed."""
    return "".join(
        rng.choice(PARTS) if rng.random() < 0.6 else "".join(any_character(rng) for _ in range(rng.randrange(13)))
        for _ in range(rng.randrange(13))
    )


def any_character(rng: random.Random) -> str:
    code = rng.choice(rng.choice(ALPHABETS))
    return "?" if code in SURROGATES else chr(code)


def streamed(board: Tokenizer, ids: list[int]) -> str:
    stream = board.stream()
    pieces = [stream.add(token) for token in ids]
    return "".join(pieces) + stream.rest()


def whole(original: Any, ids: list[int]) -> str:
    text: str = original.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


@pytest.mark.parametrize("text", CASES)
def test_chosen_texts(board: Tokenizer, original: Any, text: str) -> None:
    ids = original.encode(text, add_special_tokens=False)
    assert board.encode(text) == ids
    assert [*board.opening_tokens, *ids] == original.encode(text, add_special_tokens=True)
    assert streamed(board, ids) == whole(original, ids)


def test_a_text_that_is_continued(board: Tokenizer, original: Any) -> None:
    """The text before and the continuation are the text of all tokens: no space between them is lost."""
    rng = random.Random(1)
    texts = [*CASES, "The sea is blue", "  two  spaces", *(any_text(rng) for _ in range(100))]
    for text in texts:
        ids = board.encode(text)
        for cut in range(1, len(ids) + 1):
            before, after = ids[:cut], ids[cut:]
            begun = whole(original, before)
            if begun.endswith("\N{REPLACEMENT CHARACTER}") or not whole(original, ids).startswith(begun):
                continue  # a character is cut in two
            stream = board.stream(after=before)
            continued = "".join([stream.add(token) for token in after]) + stream.rest()
            assert begun + continued == whole(original, ids), (text, cut)


def test_any_text(board: Tokenizer, original: Any) -> None:
    rng = random.Random(0)
    for _ in range(300):
        text = any_text(rng)
        ids = original.encode(text, add_special_tokens=False)
        assert board.encode(text) == ids, repr(text)
        assert streamed(board, ids) == whole(original, ids), repr(text)


def test_any_tokens(board: Tokenizer, original: Any) -> None:
    """Also those that are not UTF-8, those that have no text, and those that the tokenizer does not have."""
    rng = random.Random(0)
    first = list(range(300))
    for _ in range(300):
        pool = rng.choice([first, range(len(original) + 3)])
        ids = [rng.choice(pool) for _ in range(rng.randrange(16))]
        assert streamed(board, ids) == whole(original, ids), ids


def test_text_comes_soon(board: Tokenizer, original: Any) -> None:
    """No piece waits longer than its character, or than a run of single bytes."""
    ids = original.encode("def f(x):\n    return x + 1\n" * 8, add_special_tokens=False)
    stream, shown = board.stream(), ""
    for count, token in enumerate(ids, 1):
        shown += stream.add(token)
        assert shown == whole(original, ids[:count])


@pytest.mark.parametrize("single", ["$A", "<s> $A", "<s> $A </s>", "$A </s>", "[MASK] <s> $A", "[MASK] <s> $A </s>"])
def test_what_stands_before_every_text(single: str, tmp_path: Path) -> None:
    """A tokenizer may put tokens behind a text too, which no prompt gets."""
    names = ["<s>", "</s>", "[MASK]"]
    vocabulary = tokenizers.models.WordLevel({name: i for i, name in enumerate([*names, "a", "[UNK]"])}, "[UNK]")
    native = tokenizers.Tokenizer(vocabulary)
    special = [(name, i) for i, name in enumerate(names)]
    native.post_processor = tokenizers.processors.TemplateProcessing(single=single, special_tokens=special)
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=native, bos_token="<s>", eos_token="</s>")
    wrapped.save_pretrained(tmp_path)
    before = single.partition("$A")[0].split()
    assert Tokenizer(tmp_path).opening_tokens == [names.index(name) for name in before]
    with_bos = [*Tokenizer(tmp_path).opening_tokens, *Tokenizer(tmp_path).encode("a")]
    assert wrapped("a")["input_ids"][: len(with_bos)] == with_bos


def test_bytes_that_are_no_character_do_not_gather(board: Tokenizer, original: Any) -> None:
    """The window stays short, so that the work of a token does not grow with those before it."""
    alone = [
        [token for token in range(300) if board.spell(token) == bytes([byte])] for byte in (0xF0, 0x9F, 0x98, 0xE2)
    ]
    singles = [found[0] for found in alone if found]
    rng = random.Random(0)
    for tokens in ([singles[0]] * 200, [rng.choice(singles) for _ in range(200)]):
        stream, text, longest = board.stream(), "", 0
        for token in tokens:
            text += stream.add(token)
            longest = max(longest, 0 if stream._bytes else len(stream._window))
        assert longest < 12
        assert text + stream.rest() == whole(original, tokens)


def test_half_a_character(board: Tokenizer) -> None:
    with pytest.raises(UsageError, match=r"text has U\+D83D, half a character, at position 2; remove it"):
        board.encode("ab\ud83d")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[]", b'{"model": {}}', b'{"version": "1.0", "model": {"type": "BPE", "vocab": 1}}'],
)
def test_bad_file(tmp_path: Path, content: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(
        BundleError, match=r"tokenizer.json: the tokenizer cannot be loaded: .*; check the files"
    ) as caught:
        Tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_damaged_bytes(tmp_path: Path) -> None:
    KINDS["gemma3"]().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    good, rng = bytearray(file.read_bytes()), random.Random(0)
    errors = []
    for _ in range(60):
        bad = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        file.write_bytes(bad)
        try:
            board = Tokenizer(tmp_path)
            board.encode("some text 123")
        except BundleError as error:
            errors.append(str(error))
    assert len(errors) > 10
    assert not any("\n" in error for error in errors)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"the tokenizer cannot be loaded: .*No such file"):
        Tokenizer(tmp_path)
