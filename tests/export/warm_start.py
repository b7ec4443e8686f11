"""A process that has the libraries of ``mbq-export`` loaded, and forks for each command.

To load them takes seconds, which is longer than most commands of the tests take.  A fork is a process of its own: it
has its exit code, it can be killed, and its limits are its own.

As a script it reads a request a line on stdin.  Each request names a pipe.  The number of the fork comes through it,
and when the fork has ended, its exit code.
"""

from __future__ import annotations

import atexit
import json
import os
import resource
import select
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

COMMAND = [sys.executable, "-m", "mbq_export.cli"]
"""What a command begins with."""


_PATIENCE_S = 240
"""Most seconds until a command has begun.  The first one waits for the libraries."""


class Running:
    """A command that runs in a fork.  Several can run at the same time.

    Args:
        arguments: of ``mbq-export``.
        limit_bytes: the largest file that it may write, or None for any.
        environment: more variables.  ``OMP_NUM_THREADS`` counts too.
    """

    def __init__(
        self, arguments: list[str], limit_bytes: int | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="mbq-said-")
        pipe, self.stdout, self.stderr = (Path(self._folder.name) / name for name in ("answers", "stdout", "stderr"))
        os.mkfifo(pipe)
        # Each command has a pipe of its own: a number that nobody has read is not taken for one of the next command.
        self._answers = os.fdopen(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0)
        for file in (self.stdout, self.stderr):
            file.touch()
        files = [str(self.stdout), str(self.stderr)]
        request = {
            "arguments": arguments, "pipe": str(pipe), "files": files, "limit_bytes": limit_bytes,
            "environment": {**(environment or {})},
        }  # fmt: skip
        stdin = _server().stdin
        assert stdin is not None
        stdin.write(json.dumps(request).encode() + b"\n")
        self.returncode: int | None = None
        self.pid = self._answer(_PATIENCE_S)

    def _answer(self, timeout_s: float | None) -> int:
        # The pipe has no buffer here, so what ``select`` sees is all that there is.
        ready = select.select([self._answers], [], [], timeout_s)[0]
        assert ready, f"the command takes more than {timeout_s} s"
        line = self._answers.readline()
        assert line, "the process that waits for the command has ended"
        return int(line)

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        if self.returncode is None and select.select([self._answers], [], [], 0)[0]:
            self.returncode = self._answer(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal.  A command that has ended gets none.

        Args:
            number: of the signal.
        """
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it has ended just now
                os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end.

        Args:
            timeout: seconds to wait, or None for as long as it takes.

        Returns:
            What it said on stdout and on stderr.
        """
        if self.returncode is None:
            self.returncode = self._answer(timeout)
        said = self.stdout.read_text(encoding="utf-8"), self.stderr.read_text(encoding="utf-8")
        self._answers.close()
        self._folder.cleanup()
        return said


@cache
def _server() -> subprocess.Popen[bytes]:
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, bufsize=0, env=environment)

    def end() -> None:
        assert server.stdin is not None
        server.stdin.close()
        server.wait()

    atexit.register(end)
    return server


def _load_libraries() -> None:
    """Import what an export imports.  Nothing is computed, so there are no threads that a fork would lose."""
    warnings.simplefilter("ignore")
    from transformers.utils import logging

    # The command does so before it imports the library.
    logging.set_verbosity_error()
    from transformers.models.llama import modeling_llama  # noqa: F401

    import mbq_export.calibrate
    import mbq_export.cli
    import mbq_export.model.loading
    import mbq_export.prepare
    import mbq_export.write.bundle  # noqa: F401


def _run(request: dict[str, Any]) -> NoReturn:
    code = 1
    try:
        for number, file in enumerate((os.devnull, *request["files"])):
            os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, "utf-8", closefd=False) for number in (1, 2))
        if request["limit_bytes"] is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit_bytes"],) * 2)
        os.environ.update(request["environment"])
        if threads := request["environment"].get("OMP_NUM_THREADS"):
            import torch

            torch.set_num_threads(int(threads))  # it read the variable when it was loaded
        sys.argv = ["mbq-export", *request["arguments"]]
        from mbq_export.cli import main

        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _keep(request: dict[str, Any]) -> NoReturn:
    """Run a command in a fork.  Tell its number, and its exit code when it has ended."""
    try:
        pid = os.fork()
        if pid == 0:
            _run(request)
        with open(request["pipe"], "wb", buffering=0) as answers:
            answers.write(b"%d\n" % pid)
            answers.write(b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    finally:
        os._exit(0)


def main() -> None:
    """Fork for each request until stdin ends."""
    _load_libraries()
    for line in sys.stdin.buffer:
        if os.fork() == 0:
            _keep(json.loads(line))
        with suppress(ChildProcessError):  # nobody runs
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


if __name__ == "__main__":
    main()
