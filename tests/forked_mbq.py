"""``mbq`` for tests: commands that run in forks of one process that has the packages loaded, each of them measured.

To load the packages takes longer than most commands of the tests take, and an emulated board loads them for tens of
seconds.  As a script it reads one request a line on stdin, and writes one result a line.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

MOST_S = 60
"""Longest wait for a command."""
NEEDED_LATER = ("mbq_runtime.commands.inspect", "mbq_runtime.commands.run", "mbq_runtime.commands.verify",
                "mbq_runtime.engine", "onnxruntime", "onnxruntime_genai", "tokenizers")  # fmt: skip
"""What the commands import when they need it."""


@dataclass(frozen=True)
class Ended:
    """What a command did.

    code: exit code; below 0 for a signal
    out: what it wrote to stdout
    err: what it wrote to stderr
    seconds: processor time, that of the processes that it started included
    mb: peak of resident memory
    """

    code: int
    out: str
    err: str
    seconds: float
    mb: float


Mbq = Callable[..., Ended]
"""(arguments: Sequence[object], stdin: str = "", program: str = "", imports: Sequence[str] = NEEDED_LATER,
environment: Mapping[str, str] = {}) -> Ended

program: text of a Python program that runs in place of ``mbq``.  imports: what the process loads before it forks.
environment: more variables.
"""


@contextmanager
def forks(
    folder: Path,
    python: Sequence[object] = (sys.executable,),
    environment: Mapping[str, str] | None = None,
    most_s: int = MOST_S,
) -> Iterator[Mbq]:
    """A function that runs ``mbq`` with arguments.

    Args:
        folder: the current folder of the commands.
        python: command of the interpreter.
        environment: all variables of the commands, or None for those of this process.
        most_s: longest wait for a command.
    """
    command = [*map(str, python), str(Path(__file__).resolve()), str(most_s)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder, env=environment
    ) as process:
        requests, results = process.stdin, process.stdout
        assert requests is not None
        assert results is not None

        def mbq(
            arguments: Sequence[object],
            stdin: str = "",
            program: str = "",
            imports: Sequence[str] = NEEDED_LATER,
            environment: Mapping[str, str] | None = None,
        ) -> Ended:
            request = {
                "arguments": [str(argument) for argument in arguments], "stdin": stdin, "program": program,
                "imports": [*imports], "environment": {**(environment or {})},
            }  # fmt: skip
            print(json.dumps(request), file=requests, flush=True)
            return Ended(**json.loads(results.readline()))

        yield mbq
        requests.close()


def _measured(request: dict[str, Any]) -> Ended:
    given, end = os.pipe()
    os.write(end, request["stdin"].encode(errors="surrogateescape"))  # a pipe holds more than a test gives
    os.close(end)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            _run(request, given, out.fileno(), err.fileno())
        os.close(given)
        _, status, usage = os.wait4(child, 0)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="backslashreplace"))
    used_s = usage.ru_utime + usage.ru_stime
    return Ended(os.waitstatus_to_exitcode(status), *texts, used_s, usage.ru_maxrss / 1000)


def _run(request: dict[str, Any], *files: int) -> NoReturn:
    for number, file in enumerate(files):
        os.dup2(file, number)
    # The requests that follow are in the buffer of the stdin until now.
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    signal.alarm(request["most_s"])
    os.environ.update(request["environment"])
    code = 99  # a traceback
    try:
        code = _program(request) if request["program"] else _mbq(request["arguments"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        if code == 99:
            import traceback

            os.write(2, traceback.format_exc().encode())
        os._exit(code)


def _mbq(arguments: list[str]) -> int:
    from mbq_runtime.cli import main

    return main(arguments)


def _program(request: dict[str, Any]) -> int:
    sys.argv = ["-c", *request["arguments"]]
    try:
        exec(compile(request["program"], "program", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    return 0


def main(most_s: int) -> None:
    """Run what is asked for until stdin ends.

    Args:
        most_s: longest wait for a command.
    """
    for line in sys.stdin:
        request = {**json.loads(line), "most_s": most_s}
        for name in request["imports"]:
            importlib.import_module(name)
        print(json.dumps(vars(_measured(request))), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
