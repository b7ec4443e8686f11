"""``mbq`` for tests: commands that run in forks of one process that has the packages loaded, each of them measured.

To load the packages takes longer than most commands of the tests take.  As a script it reads one request a line on
stdin, and writes one result a line.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

MOST_S = 60
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
"""(arguments: Sequence[object], stdin: str = "") -> Ended"""


@contextmanager
def forks(folder: Path) -> Iterator[Mbq]:
    """A function that runs ``mbq`` with arguments.

    Args:
        folder: the current folder of the commands.
    """
    command = [sys.executable, str(Path(__file__).resolve())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder) as process:
        requests, results = process.stdin, process.stdout
        assert requests is not None
        assert results is not None

        def mbq(arguments: Sequence[object], stdin: str = "") -> Ended:
            request = {"arguments": [str(argument) for argument in arguments], "stdin": stdin}
            print(json.dumps(request), file=requests, flush=True)
            return Ended(**json.loads(results.readline()))

        yield mbq
        requests.close()


def _measured(request: dict[str, Any]) -> Ended:
    given, end = os.pipe()
    os.write(end, request["stdin"].encode())  # a pipe holds more than a test gives
    os.close(end)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            _run(request["arguments"], given, out.fileno(), err.fileno())
        os.close(given)
        _, status, usage = os.wait4(child, 0)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="backslashreplace"))
    used_s = usage.ru_utime + usage.ru_stime
    return Ended(os.waitstatus_to_exitcode(status), *texts, used_s, usage.ru_maxrss / 1000)


def _run(arguments: list[str], *files: int) -> NoReturn:
    for number, file in enumerate(files):
        os.dup2(file, number)
    # The requests that follow are in the buffer of the stdin until now.
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    signal.alarm(MOST_S)
    code = 99  # a traceback
    try:
        from mbq_runtime.cli import main

        code = main(arguments)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        if code == 99:
            import traceback

            os.write(2, traceback.format_exc().encode())
        os._exit(code)


def main() -> None:
    """Run what is asked for until stdin ends."""
    for name in NEEDED_LATER:
        importlib.import_module(name)
    for line in sys.stdin:
        print(json.dumps(vars(_measured(json.loads(line)))), flush=True)


if __name__ == "__main__":
    main()
