"""A process that has the libraries of ``mbq-export`` loaded, and forks for each command.

To load them takes seconds, which is longer than most commands of the tests take.  A fork is a process of its own: it
has its exit code, it can be killed, and its limits are its own.

As a script it reads a request a line on stdin.  For each it writes the number of the fork, and when that has ended,
its exit code.
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
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

COMMAND = [sys.executable, "-m", "mbq_export.cli"]
"""What a command begins with."""


class Running:
    """A command that runs in a fork.

    Args:
        arguments: of ``mbq-export``.
        limit_bytes: the largest file that it may write, or None for any.
    """

    def __init__(self, arguments: list[str], limit_bytes: int | None = None) -> None:
        self._server = _server()
        self._said = tempfile.TemporaryDirectory(prefix="mbq-said-")
        self._files = [Path(self._said.name) / name for name in ("stdout", "stderr")]
        request = {"arguments": arguments, "files": list(map(str, self._files)), "limit_bytes": limit_bytes}
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(request).encode() + b"\n")
        self._server.stdin.flush()
        self.returncode: int | None = None
        self.pid = int(self._answer())

    def _answer(self) -> bytes:
        assert self._server.stdout is not None
        line = self._server.stdout.readline()
        assert line, "the process that forks has ended"
        return line

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        if self.returncode is None and select.select([self._server.stdout], [], [], 0)[0]:
            self.returncode = int(self._answer())
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end.

        Args:
            timeout: seconds to wait, or None for as long as it takes.

        Returns:
            What it said on stdout and on stderr.
        """
        if self.returncode is None:
            ended = select.select([self._server.stdout], [], [], timeout)[0]
            assert ended, f"the command takes more than {timeout} s"
            self.returncode = int(self._answer())
        stdout, stderr = (file.read_text(encoding="utf-8") for file in self._files)
        self._said.cleanup()
        return stdout, stderr


@cache
def _server() -> subprocess.Popen[bytes]:
    # Without a buffer, what ``select`` sees is all that there is.
    server = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
    )  # fmt: skip

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


def main() -> None:
    """Fork for each request until stdin ends."""
    _load_libraries()
    for line in sys.stdin.buffer:
        pid = os.fork()
        if pid == 0:
            _run(json.loads(line))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
