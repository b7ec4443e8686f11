"""Calibration data: every kind of source, its two parts, and everything that can be wrong with it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import write_checkpoint

from mbq_export.data import corpora, documents, replies, windows
from mbq_export.data.documents import WHOLE_BYTES, read_documents
from mbq_export.data.windows import calibration_windows, open_source
from mbq_export.model import pieces
from mbq_export.model.checkpoint import Checkpoint
from mbq_export.model.loading import load
from mbq_export.model.source import locate
from mbq_export.progress import no_report
from mbq_runtime.cache import CACHE_VARIABLE
from mbq_runtime.errors import UsageError

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</{{ m['role'] }}>{% endfor %}"
STRICT_TEMPLATE = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('the user speaks first') }}{% endif %}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A model whose tokens are bytes, so that windows can be read back."""
    found = load(locate(str(write_checkpoint(tmp_path_factory.mktemp("models") / "llama", "llama"))))
    found.tokenizer.chat_template = TEMPLATE
    return found


def numbered(words: int) -> str:
    """Eight bytes a word, every word different."""
    return "".join(f"w{i:06d} " for i in range(words))


def shown(checkpoint: Checkpoint, windows: np.ndarray) -> list[str]:
    return [checkpoint.tokenizer.decode(window) for window in windows]


def test_last_quarter_of_a_text_is_held_back(checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(numbered(160))  # 1280 tokens: 40 windows of 32, the last ten held back
    fitted, held_back = calibration_windows(checkpoint, open_source(str(file)), 4, 2, 32)
    assert fitted.shape == (4, 32)
    assert held_back.shape == (2, 32)
    assert fitted.dtype == held_back.dtype == np.int64
    assert shown(checkpoint, fitted) == [numbered(160)[32 * w :][:32] for w in (0, 9, 19, 29)]
    assert shown(checkpoint, held_back) == [numbered(160)[32 * w :][:32] for w in (30, 39)]


def test_more_than_a_quarter_is_held_back_when_asked(checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(numbered(16))  # 4 windows
    fitted, held_back = calibration_windows(checkpoint, open_source(str(file)), 2, 2, 32)
    assert "".join(shown(checkpoint, np.concatenate([fitted, held_back]))) == numbered(16)


@pytest.mark.parametrize(("count", "held_back"), [(4, 1), (3, 2), (1, 9)])
def test_too_short(checkpoint: Checkpoint, tmp_path: Path, count: int, held_back: int) -> None:
    file = tmp_path / "text.txt"
    file.write_text(numbered(16))
    needed = f"text.txt: too short, it has 4 windows of 32 tokens, {count + held_back} are needed"
    with pytest.raises(UsageError, match=needed):
        calibration_windows(checkpoint, open_source(str(file)), count, held_back, 32)


def test_windows_begin_with_the_opening_token(checkpoint: Checkpoint, tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    opened = load(checkpoint.source)
    opened.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 256)]
    )
    file = tmp_path / "text.txt"
    file.write_text(numbered(100))
    assert checkpoint.opening_tokens == []
    assert opened.opening_tokens == [256]
    fitted, _ = calibration_windows(opened, open_source(str(file)), 2, 1, 33)
    assert fitted.shape == (2, 33)
    assert (fitted[:, 0] == 256).all()
    assert opened.tokenizer.decode(fitted[0, 1:]) == numbered(4)


def chat(*turns: tuple[str, str]) -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]}, ensure_ascii=False)


def test_chats_go_through_the_template(checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text(
        chat(("user", "a\u2028b"), ("assistant", "c")) + "\n\n" + chat(("user", "d" * 200)), encoding="utf-8"
    )
    fitted, _ = calibration_windows(checkpoint, open_source(str(file)), 1, 1, 64)
    expected = "<user>a\u2028b</user><assistant>c</assistant><user>" + "d" * 200
    assert bytes(checkpoint.tokenizer.decode(fitted[0]), "utf-8") == bytes(expected, "utf-8")[:64]


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("{'messages': []}", ["not JSON", "one object"]),
        ('{"txt": "hello"}', ["no field 'messages'", "it has txt", '"role"']),
        ('["messages"]', ["no field 'messages'"]),
        ('{"messages": []}', ["field 'messages' is []"]),
        ('{"messages": [{"role": "user", "content": "a"}, {"content": "b"}]}', ["message 2", "no field 'role'"]),
        ('{"messages": [{"role": "user"}]}', ["message 1", "no field 'content'"]),
        ('{"messages": [{"role": "user", "content": null}]}', ["message 1", "'content' is None", "a string"]),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, parts: list[str]) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text(chat(("user", "fine")) + "\n" + line + "\n")
    with pytest.raises(UsageError) as caught:
        open_source(str(file))
    for part in (f"{file}, line 2", *parts):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_chats_need_a_template_that_takes_them(checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text(chat(("system", "s")))
    other = load(checkpoint.source)
    with pytest.raises(UsageError, match=r"line 1: the tokenizer of llama has no chat template"):
        calibration_windows(other, open_source(str(file)), 1, 1, 8)
    other.tokenizer.chat_template = STRICT_TEMPLATE
    with pytest.raises(UsageError, match=r"line 1: the chat template of llama refuses it: the user speaks first"):
        calibration_windows(other, open_source(str(file)), 1, 1, 8)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "empty"),
        (b"  \n", "empty"),
        (b" \n" * 3000, "empty"),
        ("naïve".encode("latin-1"), "byte 2 is not UTF-8"),
        (None, "cannot be read"),
        ("text".encode("utf-16"), "UTF-16, which is not read"),
        (b"PK\x03\x04rest", "a zip archive"),
        (b"\x1f\x8brest", "gzip"),
        (b"a\0b", "byte 1 is zero"),
    ],
)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_file_that_is_no_text(tmp_path: Path, content: bytes | None, part: str, suffix: str) -> None:
    file = tmp_path / f"data{suffix}"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError, match=part) as caught:
        open_source(str(file))
    assert str(file) in str(caught.value)


ROWS = [
    {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
    {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
    {"conversations": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
    {"instruction": "Q", "input": "", "output": "A"},
]
SAID = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".parquet", "bom.jsonl", "data.json"])
@pytest.mark.parametrize("row", [*ROWS, {"text": "plain"}], ids=["openai", "sharegpt", "roles", "alpaca", "text"])
def test_rows_of_the_kinds_that_other_tools_read(tmp_path: Path, kind: str, row: dict[str, object]) -> None:
    file = tmp_path / f"rows{kind}"
    rows = [row, row]
    if kind == ".parquet":
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist(rows), file)
    elif kind.endswith(".jsonl"):
        mark = "\ufeff" if kind.startswith("bom") else ""
        file.write_text(mark + "\n".join(map(json.dumps, rows)), encoding="utf-8")
    else:
        file.write_text(json.dumps({"data": rows} if kind.startswith("data") else rows), encoding="utf-8")
    found = list(read_documents(file))
    assert [document.content for document in found] == [SAID if "text" not in row else "plain\n"] * 2


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("\ufeffThe tide", encoding="utf-8")
    assert [document.content for document in read_documents(file)] == ["The tide"]


def test_a_text_may_begin_with_many_blanks(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(" " * 5000 + "The tide")
    assert [str(document.content).strip() for document in read_documents(file)] == ["The tide"]


@pytest.mark.parametrize("size", ["small", "large"])
def test_rows_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str) -> None:
    """Both a file whose rows are all checked and one of which the first row is."""
    from pyarrow import schema, string
    from pyarrow.parquet import write_table

    if size == "large":
        monkeypatch.setattr(documents, "CHECKED_BYTES", 1)
    blank, rowless = tmp_path / "blank.jsonl", tmp_path / "rowless.parquet"
    blank.write_text("\n" * 5000)
    write_table(schema([("text", string())]).empty_table(), rowless)
    for file in (blank, rowless):
        with pytest.raises(UsageError, match=f"{file.name}: it is empty; a row looks like"):
            read_documents(file)


@pytest.mark.parametrize("harm", ["cut", "columns"])
def test_a_parquet_file_that_is_not_whole_or_has_no_text(tmp_path: Path, harm: str) -> None:
    from pyarrow import Table, parquet

    file = tmp_path / "rows.parquet"
    parquet.write_table(Table.from_pylist([{"label": 3}] * 500), file)
    if harm == "cut":
        file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UsageError, match="not a whole Parquet file" if harm == "cut" else "it has label"):
        read_documents(file)


def test_a_long_text_is_read_in_parts_from_all_over_it(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """10 GB of which almost all is a hole: what is read is a small share, and a hole is no text."""
    file = tmp_path / "long.txt"
    words = numbered(125).replace(" ", "\n")
    with file.open("w") as out:
        for _ in range(20 * WHOLE_BYTES // len(words)):
            out.write(words)
    tracemalloc.start()
    fitted, held_back = calibration_windows(checkpoint, open_source(str(file)), 40, 10, 512)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (fitted.shape, held_back.shape) == ((40, 512), (10, 512))
    assert peak < 8 * WHOLE_BYTES * 8  # ids of a part as Python numbers; the whole file would take twenty times that
    starts = [
        int(document.where.rpartition(" ")[2]) for document, _ in zip(read_documents(file), range(4), strict=False)
    ]
    assert max(starts) - min(starts) > 10 * WHOLE_BYTES
    with file.open("r+b") as out:
        out.truncate(10 << 30)
    with pytest.raises(UsageError, match="is zero: no text"):
        list(read_documents(file))


@pytest.mark.parametrize("row", ["text", "messages"])
def test_the_tokens_of_a_long_row_take_four_bytes_each(checkpoint: Checkpoint, tmp_path: Path, row: str) -> None:
    """One number of Python takes eight bytes in a list, and most of them 28 more."""
    file, words = tmp_path / "long.jsonl", numbered(1 << 18)
    content = {"text": words} if row == "text" else {"messages": [{"role": "user", "content": words}]}
    file.write_text(json.dumps(content))
    source = open_source(str(file))
    tracemalloc.start()
    fitted, _ = calibration_windows(checkpoint, source, 40, 10, 512)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert fitted.dtype == np.int64
    tokens = len(words)
    rendered = tokens if row == "messages" else 0
    assert peak - 2 * rendered < 6 * tokens


def test_of_a_very_long_text_the_first_tokens_are_used(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "LONGEST_TOKENS", 200)
    monkeypatch.setattr(pieces, "PIECE_CHARS", 64)
    monkeypatch.setattr(pieces, "_SEARCHED_CHARS", 32)
    file, words = tmp_path / "long.jsonl", numbered(400)
    file.write_text(json.dumps({"text": words}) + "\n" + json.dumps({"text": words}))
    fitted, held_back = calibration_windows(checkpoint, open_source(str(file)), 2, 1, 32)
    places = [words.index(shown(checkpoint, [window])[0]) for window in (*fitted, *held_back)]
    needed = windows._SPREAD * 3 * 32
    assert places == sorted(places)
    assert needed < places[-1] + 32 <= needed + 200 + 64


@pytest.mark.parametrize("row", [{"text": "a\ud800b"}, {"messages": [{"role": "user", "content": "\udfff"}]},
                                 {"instruction": "a", "input": "\ud83d", "output": "b"}])  # fmt: skip
def test_half_a_character_is_refused(tmp_path: Path, row: dict[str, Any]) -> None:
    """No tokenizer reads it."""
    file = tmp_path / "half.jsonl"
    file.write_text(json.dumps(row))
    with pytest.raises(UsageError, match=r"line 1.*half a character, \\ud") as caught:
        open_source(str(file))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_number_of_5000_digits_is_no_row(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"long{suffix}"
    file.write_text('{"text": ' + "1" * 5000 + "}")
    with pytest.raises(UsageError, match="not JSON"):
        open_source(str(file))


TOKENIZER_MEMORY = """
import resource, sys
from pathlib import Path
from mbq_export.data.documents import read_documents
from mbq_export.model.checkpoint import Checkpoint
from transformers import PreTrainedTokenizerFast

class Reader(Checkpoint):
    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

reader = Reader(PreTrainedTokenizerFast(tokenizer_file=sys.argv[1]))
document = next(iter(read_documents(Path(sys.argv[2])))).content
reader.tokens(document[:1000])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(len(reader.tokens(document)), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10)
"""


@pytest.mark.heavy
@pytest.mark.parametrize("space", [" ", ""], ids=["words", "one word"])
def test_a_long_text_takes_little_memory_to_tokenize(checkpoint: Checkpoint, tmp_path: Path, space: str) -> None:
    """The tokenizer keeps about 300 bytes for each token of what it is given at once."""
    text, tokenizer = tmp_path / "text.txt", tmp_path / "tokenizer.json"
    text.write_text(numbered(WHOLE_BYTES // 8).replace(" ", space))
    checkpoint.tokenizer.backend_tokenizer.save(str(tokenizer))
    done = subprocess.run(
        [sys.executable, "-c", TOKENIZER_MEMORY, str(tokenizer), str(text)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    tokens, taken_bytes = map(int, done.stdout.split())
    assert tokens == text.stat().st_size
    assert taken_bytes < 48 << 20, "at once it would be about 300 MB"


def test_tokens_of_pieces_are_those_of_the_whole_text(monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    text = corpora.technical()[:200_000]
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learned.train_from_iterator([text[:50_000]], trainers.BpeTrainer(vocab_size=600, show_progress=False))

    def encode(part: str) -> list[int]:
        return learned.encode(part, add_special_tokens=False).ids

    monkeypatch.setattr(pieces, "PIECE_CHARS", 8192)
    cut = list(pieces.pieces(text, encode))
    assert len(cut) >= 25
    assert max(map(len, cut)) <= 8192
    assert [token for piece in cut for token in encode(piece)] == encode(text)


@pytest.mark.parametrize("letters", ["日本語と中文", "ä", "🙂", "a", "aé日🙂"])
def test_a_long_text_without_lines_is_cut_between_characters(tmp_path: Path, letters: str) -> None:
    file = tmp_path / "long.txt"
    for more in range(4):
        text = "x" * more + letters * (3 * WHOLE_BYTES // len(letters.encode()))
        file.write_text(text, encoding="utf-8")
        parts = [str(document.content) for document in read_documents(file)]
        assert len(parts) > 2
        assert all(part in text for part in parts)
        assert sum(map(len, parts)) > len(text) - 2 * len(parts)


@pytest.mark.parametrize("path", ["/dev/zero", "fifo"])
def test_a_device_is_no_file(tmp_path: Path, path: str) -> None:
    if path == "fifo":
        path = str(tmp_path / "fifo")
        os.mkfifo(path)
    with pytest.raises(UsageError, match="not a regular file"):
        open_source(path)


@pytest.mark.parametrize("read", [pytest.param(corpora.wikipedia, marks=pytest.mark.heavy), corpora.code])
def test_parts_of_a_packaged_text_share_nothing(read: Callable[[str], str]) -> None:
    parts = {name: read(name) for name in ("calibration", "validation", "evaluation")}
    lines = {name: {line for line in part.split("\n") if len(line) > 90} for name, part in parts.items()}
    assert not lines["calibration"] & lines["validation"]
    assert not (lines["calibration"] | lines["validation"]) & lines["evaluation"]
    assert 0.1 < len(parts["validation"]) / len(parts["calibration"]) < 0.5


def test_kept_replies_that_are_damaged_are_written_again(tmp_path: Path) -> None:
    file = tmp_path / "replies" / "x.json"
    assert replies._kept(file) is None
    chats = [[{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]]
    replies._keep(chats, file)
    assert replies._kept(file) == chats
    for damage in (b"", b"{", b"[1]", b'{"a": 1}', b'[[{"role": "user"}]]', b"\xff", b"[" * 10**5):
        file.write_bytes(damage)
        assert replies._kept(file) is None, damage


@pytest.mark.heavy
def test_the_default_is_text_and_code_and_what_the_model_says(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(replies, "_CALIBRATION_REPLY_TOKENS", 16)
    told = []
    fitted, held_back = calibration_windows(
        checkpoint, open_source(None), 17, 6, 128, report=lambda what, done, total: told.append((what, done == 0))
    )
    of_part = [(f"writing replies ({part})", begins) for part in ("fitted", "held_back") for begins in (True, False)]
    assert list(dict.fromkeys(told)) == of_part, "each part is named before its work"

    def kinds(windows: np.ndarray, packaged: str, prompts: str) -> list[str]:
        texts = {"wikipedia": corpora.wikipedia(packaged), "code": corpora.code(packaged)}
        asked = json.loads(replies.CALIBRATION.read_text(encoding="utf-8"))[prompts]
        found = []
        for window in windows:
            shown = checkpoint.tokenizer.decode(window)[4:-4]
            said = "<user>" in shown or "<assistant>" in shown or any(shown[:20] in str(chat) for chat in asked)
            names = [name for name, content in texts.items() if shown in content]
            found.append(names[0] if names else "chat" if said else "?")
        return found

    of_fitted, of_rest = kinds(fitted, "calibration", "fitted"), kinds(held_back, "validation", "held_back")
    assert {kind: of_fitted.count(kind) for kind in set(of_fitted)} == {"wikipedia": 9, "code": 4, "chat": 4}
    assert {kind: of_rest.count(kind) for kind in set(of_rest)} == {"wikipedia": 4, "code": 1, "chat": 1}
    assert len(set(of_fitted[:8])) > 1, "kinds are mixed"
    with pytest.raises(UsageError, match=r"Wikipedia.* has \d+ windows of 512 tokens, 19998 are needed"):
        calibration_windows(checkpoint, open_source(None), 64, 39996, 512)


def test_prompts_for_calibration_are_not_those_that_are_measured_on() -> None:
    prompts = json.loads(replies.CALIBRATION.read_text(encoding="utf-8"))
    measured = json.loads(replies.HELD_BACK.read_text(encoding="utf-8"))
    seen: set[str] = set()
    for chats in (prompts["fitted"], prompts["held_back"], measured["chat"] + measured["conversation"]):
        turns = {turn for chat in chats for turn in ([chat] if isinstance(chat, str) else chat["turns"])}
        assert not turns & seen
        seen |= turns
    assert (len(prompts["fitted"]), len(prompts["held_back"])) == (160, 48)


def test_a_model_without_a_template_continues_the_plain_prompt(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "none"))
    monkeypatch.setattr(replies, "_CALIBRATION_REPLY_TOKENS", 4)
    (tmp_path / "none").write_text("")  # nothing can be kept
    plain = load(checkpoint.source)
    first = json.loads(replies.CALIBRATION.read_text(encoding="utf-8"))["fitted"][0]
    assert replies.answers("fitted", plain, 100, no_report).startswith(f"{first}\n\n")


@pytest.mark.heavy
def test_wikipedia_is_whole_paragraphs_of_prose() -> None:
    paragraphs = corpora.wikipedia("calibration").split("\n\n")
    assert paragraphs[0].startswith("Anarchism is a political philosophy that advocates self-governed societies")
    assert paragraphs[1].startswith("Anarchism draws on many currents of thought and strategy.")
    assert not [p for p in paragraphs if re.match(r"[*:;#=|]|File:|Image:|__", p)]
    assert sum(map(len, paragraphs)) > 800_000


def test_three_domains_are_long_enough_to_measure_on() -> None:
    for content in (corpora.wikipedia("evaluation"), corpora.news(), corpora.technical()):
        assert len(content) > 24 * 512 * 6
    assert "context manager" in corpora.technical()
