"""``ChatTemplate``: a bundle's chat template, rendered by jinja2 as transformers renders it.

A template is a program of a stranger.  It runs in a process of its own (``template_worker``) with limits that the
kernel enforces: it cannot block or fill the process of the engine.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mbq_runtime.errors import BundleError, UsageError

Message = Mapping[str, Any]
"""One message: "role" and "content", and what else the template knows, such as "tool_calls"."""

RENDER_S = 1.5
"""Most seconds for one conversation; more on a slow processor.  Templates of published models need milliseconds."""
_HANG_S = 30.0
"""After this the worker is ended from outside: it did not start, or it is stopped."""
_SPARE_CHARS = 1 << 16
"""Most characters that a template may add of its own."""
_COPIES = 8
"""Most times that a template may repeat what it is given."""

_SOURCE_BYTES = 1 << 20
"""Most bytes of a template.  Those of published models have up to 20 thousand."""
_EXTRA_TEMPLATES = "additional_chat_templates"
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""Fields of a message that have reasoning, under the names of several templates."""
_WORKER = Path(__file__).with_name("template_worker.py")


class TemplateLimitError(BundleError):
    """A chat template needs more time, memory or text than any honest one."""


class ChatTemplate:
    """The chat templates of a bundle.

    Args:
        path: folder of the bundle.

    Raises:
        BundleError: a file of the templates cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        config = _read_config(path / "tokenizer_config.json")
        self._sources = dict(_sources(path, config))
        for name, source in self._sources.items():
            if len(source) > _SOURCE_BYTES:
                what = f"the chat template {name} is longer than {_SOURCE_BYTES} characters"
                raise BundleError(f"{path}: {what}; it is not one of a published model: remove it")
        self._special = dict(_special_tokens(config))
        self._worker = _Worker()

    @property
    def exists(self) -> bool:
        """Whether there is a template that renders a conversation."""
        return "default" in self._sources

    def source(self, tools: bool = False) -> str:
        """The text of the template that renders a conversation.

        Args:
            tools: whether it has tools.

        Raises:
            BundleError: there is no template.
        """
        return self._source({"tools": []} if tools else {})

    def render(
        self, messages: Sequence[Message], options: Mapping[str, Any] | None = None, *, strict: bool = True
    ) -> str:
        """Render a conversation.

        Args:
            messages: the conversation, at least one message.
            options: variables of the template, such as ``enable_thinking``, ``tools`` or ``documents``.
            strict: whether an option that the template does not read is an error.

        Returns:
            The prompt, ready for the reply unless ``options`` has another ``add_generation_prompt``.

        Raises:
            BundleError: there is no template, or it is broken; ``TemplateLimitError`` where it passes a limit.
            UsageError: the template refuses the conversation or does not know an option, or a value is not for JSON.
        """
        options = dict(options or {})
        source = self._source(options)
        variables = {
            **self._special,
            "messages": [_message(message) for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": options.pop("add_generation_prompt", True),
        }
        if "messages" in options:
            raise UsageError("option 'messages' of the chat template: give the messages as the conversation")
        if not strict:
            variables, options = {**variables, **options}, {}
        try:
            given = len(json.dumps([variables, options], ensure_ascii=False))
            request = {"template": source, "variables": variables, "options": options}
            line = json.dumps({**request, "most_chars": _COPIES * given + _SPARE_CHARS}).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(f"the conversation or an option of the chat template is not for JSON: {error}") from None
        return self._text(self._worker.ask(line))

    def _source(self, options: Mapping[str, Any]) -> str:
        name = "tool_use" if options.get("tools") is not None and "tool_use" in self._sources else "default"
        if name not in self._sources:
            raise BundleError(f"{self.path}: the bundle has no chat template; pass the text with chat=False")
        return self._sources[name]

    def _text(self, answer: Mapping[str, Any]) -> str:
        what = f"{self.path}: the chat template"
        if "text" in answer:
            return str(answer["text"])
        if "refused" in answer:
            raise UsageError(f"{what} refuses the conversation: {answer['refused']}")
        if "unknown" in answer:
            known = ", ".join(name for name in answer["names"] if name not in {*self._special, "messages"})
            raise UsageError(f"{what} has no variable {answer['unknown']!r}, only {known or 'none'}; leave it out")
        if "broken" in answer:
            raise BundleError(f"{what} cannot be rendered: {answer['broken']}; use no template (mbq run --raw)")
        raise TemplateLimitError(f"{what} {answer['limit']}; do not trust it; use no template (mbq run --raw)")


class _Worker:
    """The process that renders.  It starts at the first request, and again after a request that it did not survive."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._finalizer: weakref.finalize[Any, Any] | None = None  # ends the process, at the latest with this object

    def ask(self, line: bytes) -> Mapping[str, Any]:
        """Send a request, and wait for the answer.

        Args:
            line: the request as one line of JSON.

        Raises:
            UsageError: the process cannot start.
        """
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = self._start()
                self._finalizer = weakref.finalize(self, _end, self._process)
            process, end = self._process, self._finalizer
            assert end is not None
            watch = threading.Timer(_HANG_S, process.kill)
            watch.daemon = True
            watch.start()
            answer: Mapping[str, Any] = {}
            try:
                answer = _exchange(process, line)
            finally:
                watch.cancel()
                # At a limit the heap may be full; after an interrupt the answer is still in the pipe.
                if not answer or "limit" in answer:
                    end()
            return answer or {"limit": _cause_of_death(process)}

    def _start(self) -> subprocess.Popen[bytes]:
        if importlib.util.find_spec("jinja2") is None:
            raise UsageError("chat templates need the package jinja2, which is not installed: pip install jinja2")
        # An interpreter of its own: sys.executable is another program where Python is embedded.
        python = shlex.split(os.environ.get("MBQ_PYTHON", "")) or [sys.executable]
        command = [*python, "-P", str(_WORKER), str(RENDER_S)]
        try:
            return subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                process_group=0,  # Ctrl-C is for this process
            )
        except OSError as error:
            raise UsageError(
                f"chat templates need a second process, which cannot start ({python[0]}: {error.strerror}); set "
                "MBQ_PYTHON to the command of this Python"
            ) from None


def _exchange(process: subprocess.Popen[bytes], line: bytes) -> Mapping[str, Any]:
    """The answer of a process; empty if it ended without one."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(line)
        process.stdin.flush()
    except BrokenPipeError:
        return {}
    reply = process.stdout.readline()
    answer: Mapping[str, Any] = json.loads(reply) if reply.endswith(b"\n") else {}
    return answer


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        with suppress(BrokenPipeError):  # the rest of a request that nobody reads
            if pipe is not None:
                pipe.close()
    process.wait()


def _cause_of_death(process: subprocess.Popen[bytes]) -> str:
    if process.returncode == -signal.SIGALRM:
        return f"takes too long (the limit is {RENDER_S:g} s, more on a slow processor)"
    return f"ends the process that renders it (status {process.returncode})"


def _read_config(file: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(file.read_bytes()) if file.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{file}: unreadable ({error}); check the files with mbq verify") from None
    if not isinstance(config, dict):
        raise BundleError(f"{file}: holds a {type(config).__name__}, needed an object; check the files with mbq verify")
    return config


def _sources(path: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, text) of each template.  A file counts more than the config, as in transformers."""
    given = config.get("chat_template")
    if isinstance(given, str):
        yield "default", given
    for entry in given if isinstance(given, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("template"), str):
            yield str(entry.get("name")), entry["template"]
    files = {"default": path / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((path / _EXTRA_TEMPLATES).glob("*.jinja"))}
    for name, file in files.items():
        if file.is_file():
            try:
                with file.open("rb") as opened:
                    yield name, opened.read(_SOURCE_BYTES + 1).decode()
            except (OSError, ValueError) as error:
                raise BundleError(f"{file}: unreadable ({error}); check the files with mbq verify") from None


def _special_tokens(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, text) of each special token that has a name, such as ``bos_token``."""
    for group in (config.get("model_specific_special_tokens"), config.get("extra_special_tokens"), config):
        for name, value in group.items() if isinstance(group, dict) else ():
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str) and (group is not config or name.endswith("_token")):
                yield name, text


def _message(message: Message) -> dict[str, Any]:
    """A message as transformers gives it to a template: without null fields, its reasoning under each known name."""
    given = {key: value for key, value in message.items() if value is not None}
    reasoning = next((given[name] for name in REASONING_FIELDS if name in given), None)
    return given if reasoning is None else {"thinking": reasoning, **given, "reasoning_content": reasoning}
