"""Runs commands in processes of their own, and measures them.  One JSON list of arguments a line, one result a line.

Each command runs in a fork, so that the packages are imported once.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import tempfile
from typing import Any

MOST_S = 60
NEEDED_LATER = ("mbq_runtime.commands.inspect", "mbq_runtime.commands.run", "mbq_runtime.commands.verify",
                "mbq_runtime.engine", "onnxruntime", "onnxruntime_genai", "tokenizers")  # fmt: skip
"""What the commands import when they need it."""


def measured(arguments: list[str]) -> dict[str, Any]:
    """Exit code, text, processor seconds and peak memory of ``mbq ARGUMENTS``."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            signal.alarm(MOST_S)
            code = 99  # a traceback
            try:
                code = main(arguments)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                if code == 99:
                    import traceback

                    os.write(2, traceback.format_exc().encode())
                os._exit(code)
        _, status, usage = os.wait4(child, 0)
        found = {"code": os.waitstatus_to_exitcode(status), "seconds": usage.ru_utime + usage.ru_stime}
        found["mb"] = usage.ru_maxrss / 1000
        for name, file in (("out", out), ("err", err)):
            file.seek(0)
            found[name] = file.read().decode(errors="backslashreplace")
    return found


if __name__ == "__main__":
    from mbq_runtime.cli import main

    for name in NEEDED_LATER:
        importlib.import_module(name)
    for line in sys.stdin:
        print(json.dumps(measured(json.loads(line))), flush=True)
