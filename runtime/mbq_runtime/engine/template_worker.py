"""The process that renders chat templates.  ``template.ChatTemplate`` starts it and talks to it.

It imports nothing of this project, so that it starts fast and is small.  Each line of its input is a request as JSON,
each line of its output an answer.  Templates are the work of strangers: the kernel ends the process when a request
takes too long, and refuses memory above a limit.

The environment of the templates is that of transformers (utils/chat_template_utils.py), which model authors test with.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from datetime import datetime
from typing import Any

import jinja2
import jinja2.meta
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_MEMORY_BYTES = 64 << 20
"""What a request may use, besides the interpreter and jinja2 (about 25 MB), and besides copies of what it brings."""
_COPIES = 16
_STARTS = 4
"""A request may take this many times the processor time that the start took: a slow board needs longer to compile."""
_MESSAGE_CHARS = 200


class _Refusal(TemplateError):
    """The template called raise_exception."""


class _GenerationTag(Extension):
    """The tag ``generation``: it marks text of the model for training, and renders as its body."""

    tags = {"generation"}  # noqa: RUF012  as the base class declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Macro) -> str:
        return caller()


class _Dict:
    """The global ``dict`` of templates: without access to attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """The global ``namespace`` of templates: without names of Python's own kind."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace may not have the attribute {name!r}")


def _raise_exception(message: Any) -> None:
    raise _Refusal(str(message))


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment


class _Templates:
    """Compiled templates by their text."""

    def __init__(self) -> None:
        self._environment = _environment()
        self._compiled: dict[str, tuple[jinja2.Template, set[str]]] = {}

    def render(self, request: dict[str, Any]) -> dict[str, Any]:
        source = request["template"]
        if source not in self._compiled:
            names = jinja2.meta.find_undeclared_variables(self._environment.parse(source))
            self._compiled[source] = self._environment.from_string(source), names
        template, names = self._compiled[source]
        unknown = [name for name in request["options"] if name not in names]
        if unknown:
            return {"unknown": unknown[0], "names": sorted(names)}
        parts, room = [], request["most_chars"]
        for part in template.generate({**request["variables"], **request["options"]}):
            parts.append(part)
            room -= len(part)
            if room < 0:
                return {"limit": f"gives more than {request['most_chars']} characters"}
        return {"text": "".join(parts)}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request: the text, or why there is none.

        Args:
            request: "template", "variables", "options" (variables that the template must know), "most_chars".
        """
        try:
            return self.render(request)
        except _Refusal as error:
            return {"refused": _line(error)}
        except MemoryError:
            return {"limit": f"needs more than {_MEMORY_BYTES >> 20} MB of memory"}
        except RecursionError:
            return {"limit": "calls itself too many times"}
        # Templates call filters and methods of Python with any arguments, which raise anything.
        except Exception as error:
            return {"broken": f"{type(error).__name__}: {_line(error)}"}


def _line(error: Exception) -> str:
    text = " ".join(str(error)[: 2 * _MESSAGE_CHARS].split())
    shown = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
    return shown[:_MESSAGE_CHARS]


def _memory_bytes() -> int:
    """The address space of this process."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def main(seconds: float) -> None:
    """Answer requests until the input ends.

    Args:
        seconds: time of one request, at least; the process ends by SIGALRM after it.
    """
    templates = _Templates()
    # What is imported or compiled at the first use must not count in the first request.
    warm = {"template": "{% generation %}{{ a | tojson }}{% endgeneration %}", "most_chars": 9}
    templates.answer({**warm, "variables": {"a": 0}, "options": {}})
    _strftime_now("%d")
    for kind in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        resource.setrlimit(kind, (0, 0))
    # The program that started this one may ignore or block the signal.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    seconds = max(seconds, _STARTS * time.process_time())
    used, most = _memory_bytes(), resource.getrlimit(resource.RLIMIT_AS)[1]
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        limit = used + _MEMORY_BYTES + _COPIES * len(line)
        resource.setrlimit(resource.RLIMIT_AS, (limit if most == resource.RLIM_INFINITY else min(limit, most), most))
        try:
            answer = json.dumps(templates.answer(json.loads(line)))
        except MemoryError:
            answer = json.dumps({"limit": f"needs more than {_MEMORY_BYTES >> 20} MB of memory"})
        sys.stdout.buffer.write(answer.encode() + b"\n")
        sys.stdout.buffer.flush()
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    main(float(sys.argv[1]))
