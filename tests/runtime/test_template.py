"""Chat templates give what transformers gives, and hostile ones end soon with an error of one line."""

from __future__ import annotations

import json
import re
import resource
import signal
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import transformers
from forked_mbq import Mbq
from hostile_templates import HOSTILE
from tiny_bundle import SPECIAL, write_manifest, write_tokenizer

from mbq_export.model.text_check import CONVERSATIONS
from mbq_runtime import Engine
from mbq_runtime.engine.template import RENDER_S, ChatTemplate, TemplateLimitError
from mbq_runtime.errors import BundleError, MbqError, UsageError

FAMILIES = {path.stem: path for path in sorted((Path(__file__).parents[1] / "data/templates").glob("*.jinja"))}
USER = [{"role": "user", "content": "Hi"}]
MORE: Mapping[str, tuple[Sequence[Mapping[str, Any]], Mapping[str, Any]]] = {
    "thoughts off": (USER, {"enable_thinking": False}),
    "thoughts on": (USER, {"enable_thinking": True, "thinking": True}),
    "documents": (USER, {"documents": [{"title": "a", "text": "b"}, {"title": "c", "text": "d"}]}),
    "no prompt": (USER, {"add_generation_prompt": False}),
    "a field for the thoughts": (
        [*USER, {"role": "assistant", "content": "Hello.", "reasoning": "hm"}, *USER],
        {"date_string": "1 Jan 2026"},
    ),
}
"""Conversations besides the standard ones."""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def written(tmp_path: Path) -> Any:
    """Makes a ChatTemplate of a text."""

    def write(text: str, **config: Any) -> ChatTemplate:
        (tmp_path / "chat_template.jinja").write_text(text, encoding="utf-8")
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        return ChatTemplate(tmp_path)

    return write


def test_there_are_enough_families() -> None:
    assert len(FAMILIES) >= 15


@pytest.mark.parametrize("name", FAMILIES)
def test_equal_to_transformers(name: str, original: Any, tmp_path: Path) -> None:
    original.chat_template = FAMILIES[name].read_text(encoding="utf-8")
    original.save_pretrained(tmp_path)
    template = ChatTemplate(tmp_path)
    rendered = 0
    for what, (messages, options) in {**CONVERSATIONS, **MORE}.items():
        arguments = {"add_generation_prompt": True, **options}
        try:
            theirs = original.apply_chat_template([dict(m) for m in messages], tokenize=False, **arguments)
        except Exception:  # the template refuses or fails, as it likes
            theirs = None
        try:
            ours = template.render(messages, options, strict=False)
        except (UsageError, BundleError):
            ours = None
        assert ours == theirs, what
        rendered += ours is not None
    assert rendered >= 5


def test_the_template_for_tools(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("plain")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates/tool_use.jinja").write_text("{{ tools | length }} tools")
    template = ChatTemplate(tmp_path)
    assert template.render(USER) == "plain"
    assert template.render(USER, {"tools": [{}, {}]}) == "2 tools"


def test_templates_in_the_config(tmp_path: Path) -> None:
    for given, expected in (("A", "A"), ([{"name": "default", "template": "B"}], "B")):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": given}))
        assert ChatTemplate(tmp_path).render(USER) == expected
    (tmp_path / "chat_template.jinja").write_text("C")
    assert ChatTemplate(tmp_path).render(USER) == "C"


def test_special_tokens_have_names(written: Any) -> None:
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "extra_special_tokens": {"image_token": "<i>"}}
    template = written("{{ bos_token }}{{ eos_token }}{{ image_token }}{{ pad_token }}|", **config)
    assert template.render(USER) == "<s></s><i>|"
    assert template.render(USER, {"bos_token": "<t>"}) == "<t></s><i>|"


def test_an_option_that_the_template_does_not_know(written: Any) -> None:
    template = written("{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}{{ messages[0].content }}")
    assert template.render(USER, {"enable_thinking": False}) == "FalseHi"
    with pytest.raises(UsageError, match=r"no variable 'reasoning_effort', only enable_thinking; leave it out"):
        template.render(USER, {"reasoning_effort": "low"})
    with pytest.raises(UsageError, match="give the messages as the conversation"):
        template.render(USER, {"messages": []})
    with pytest.raises(UsageError, match="not for JSON"):
        template.render(USER, {"enable_thinking": object()})


def test_refusal_of_the_template(written: Any) -> None:
    template = written("{{ raise_exception('roles\n must\x1b alternate' ~ 'a' * 999) }}")
    with pytest.raises(UsageError, match="refuses the conversation: roles must\N{REPLACEMENT CHARACTER} alternatea"):
        template.render(USER)


def test_errors_leave_the_worker_alive(written: Any) -> None:
    template = written("{{ messages[0].content.upper() }}{% if messages | length > 1 %}{{ nothing.more }}{% endif %}")
    assert template.render(USER) == "HI"
    with pytest.raises(BundleError, match="cannot be rendered: UndefinedError: 'nothing' is undefined"):
        template.render(USER * 2)
    assert template.render(USER) == "HI"


def test_long_conversations_are_honest(written: Any) -> None:
    template = written("{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ '\n' }}{% endfor %}")
    messages = [{"role": "user", "content": "日本語 " * 200}] * 5000
    assert len(template.render(messages)) > 4_000_000


def _children_s() -> float:
    """Processor time of processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.fixture(scope="module")
def start_s(tmp_path_factory: pytest.TempPathFactory) -> float:
    """Processor time of the start of a worker."""
    (tmp_path_factory.getbasetemp() / "chat_template.jinja").write_text("A")
    used_s, template = _children_s(), ChatTemplate(tmp_path_factory.getbasetemp())
    template.render(USER)
    del template
    return _children_s() - used_s


QUICK = ("class of a text", "recursion of a macro", "text times a number")
"""Attacks that the quick tier tries; the whole set takes most of a minute."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.heavy) for name in HOSTILE]
)
def test_hostile_template(name: str, written: Any, start_s: float, capfd: pytest.CaptureFixture[str]) -> None:
    template = written(HOSTILE[name])
    peaks = []
    used_s = _children_s()
    with _peak_memory(template, peaks), pytest.raises(MbqError) as caught:
        template.render(USER)
    # A worker may use the time of one request, which is longer where its start is slow.
    assert _children_s() - used_s < 2 * (RENDER_S + 4 * start_s)
    assert max(peaks, default=0) < 100_000_000
    message = str(caught.value)
    assert "status -9" not in message, "the worker hung, and was ended from outside"
    assert len(message) < 600
    assert "\n" not in message
    assert message.isprintable()
    assert capfd.readouterr() == ("", "")


def test_a_new_worker_after_a_hostile_template(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text(
        "{{ messages[0].content * (99999999 if messages | length > 1 else 1) }}"
    )
    template = ChatTemplate(tmp_path)
    for _ in range(2):
        assert template.render(USER) == "Hi"
        with pytest.raises(TemplateLimitError, match="needs more than 64 MB of memory"):
            template.render(USER * 2)


def test_the_worker_ends_with_its_owner(written: Any) -> None:
    template = written("A")
    template.render(USER)
    process = template._worker._process
    assert process is not None
    assert process.poll() is None
    del template
    assert process.poll() is not None


def test_a_worker_that_died_is_started_again(written: Any) -> None:
    template = written("A")
    template.render(USER)
    process = template._worker._process
    process.kill()
    process.wait()
    assert template.render(USER) == "A"


def test_the_time_limit_holds_where_the_program_ignores_its_signal(written: Any) -> None:
    template = written(HOSTILE["nested ranges"])
    before = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    try:
        with pytest.raises(TemplateLimitError, match=r"takes too long"):
            template.render(USER)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
        signal.signal(signal.SIGALRM, before)


def test_a_huge_template(written: Any) -> None:
    with pytest.raises(BundleError, match="the chat template default is longer than 1048576"):
        written("a" * 2_000_000)
    assert len(written("{# " + "a" * 1_000_000 + "#}b").render(USER)) == 1


def test_a_chat_goes_on_after_a_refusal(bundle_copy: Path, mbq: Mbq) -> None:
    """Also when the next message is refused while the chat counts tokens."""
    refusing = "{% if messages[-1].content == 'Hi' %}{{ raise_exception('not ' ~ messages | length) }}{% endif %}A"
    _engine(bundle_copy, refusing)
    done = mbq(["chat", bundle_copy, "--max-tokens", 2], "a\nHi\nb\n")
    assert done.code == 0, done.err
    assert done.err.count("refuses the conversation: not 3") == 1
    assert done.err.count("2 tokens, ") == 2


def test_no_worker(written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MBQ_PYTHON", "/nowhere/python -X utf8")
    with pytest.raises(UsageError, match=r"cannot start \(/nowhere/python: No such file"):
        written("A").render(USER)
    monkeypatch.setenv("MBQ_PYTHON", "/bin/false")
    with pytest.raises(TemplateLimitError, match="ends the process that renders it"):
        written("A").render(USER)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
def test_a_bad_config(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(BundleError, match="check the files with mbq verify"):
        ChatTemplate(tmp_path)


def test_a_template_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(BundleError, match=r"chat_template.jinja: unreadable"):
        ChatTemplate(tmp_path)


ASKING = "{{ '" + SPECIAL[1] + "' ~ mood ~ messages[-1].content ~ '\n' }}"


def test_options_in_the_python_interface(bundle_copy: Path) -> None:
    engine = _engine(bundle_copy, ASKING)
    assert engine.chat_prompt(USER, {"mood": "!"}) == SPECIAL[1] + "!Hi\n"
    plain, kind = (engine.generate("Hi", template_kwargs=kwargs) for kwargs in (None, {"mood": "kind"}))
    assert kind.stats.prompt_tokens == plain.stats.prompt_tokens + 4
    for prompt, chat in (("Hi", False), ([1, 2], True)):
        with pytest.raises(UsageError, match="template_kwargs mood: no chat template renders this prompt"):
            engine.generate(prompt, chat=chat, template_kwargs={"mood": "kind"})  # type: ignore[arg-type]


def test_options_in_the_commands(bundle_copy: Path, mbq: Mbq) -> None:
    _engine(bundle_copy, "{{ raise_exception(mood) }}")
    for command in (["run", bundle_copy, "Hi"], ["chat", bundle_copy]):
        done = mbq([*command, "--chat-template-kwargs", '{"mood": "sad"}'], "Hi\n")
        assert "refuses the conversation: sad" in done.err
    done = mbq(["run", bundle_copy, "Hi", "--chat-template-kwargs", "[1]"])
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "expected a JSON object such as" in done.err


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["recursion of a macro", "nested ranges", "text times a number", "class of a text"])
def test_hostile_template_in_the_commands(bundle_copy: Path, mbq: Mbq, name: str) -> None:
    _engine(bundle_copy, HOSTILE[name])
    done = mbq(["run", bundle_copy, "Hi"])
    assert (done.code, done.out, done.err.count("\n")) == (4, "", 1)
    assert "the chat template" in done.err
    done = mbq(["chat", bundle_copy], "Hi\n")
    assert done.code == 0
    assert re.fullmatch(r".*the chat template .*\n", done.err)


def _engine(folder: Path, template: str) -> Engine:
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    write_manifest(folder)
    return Engine.load(folder, threads=1)


class _peak_memory:
    """Collects the resident bytes of a template's worker."""

    def __init__(self, template: ChatTemplate, peaks: list[int]) -> None:
        self._template, self._peaks, self._done = template, peaks, threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            process = self._template._worker._process
            try:
                status = Path(f"/proc/{process.pid}/status").read_text() if process else ""
            except OSError:
                continue
            if found := re.search(r"VmHWM:\s*(\d+) kB", status):
                self._peaks.append(int(found[1]) * 1024)
