"""Standard streams of a command: a closed one is replaced, so that nothing else gets its number."""

from __future__ import annotations

import os
import sys


def replace_closed() -> None:
    """Open the null device in place of each closed standard stream.

    Python has None for a closed stream.  The next file that a program opens would get the number of the stream, and the
    messages of a library would go into that file.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is not None:
            continue
        opened = os.open(os.devnull, os.O_RDONLY if mode == "r" else os.O_WRONLY)
        os.set_inheritable(opened, opened == number)
        stream = open(opened, mode, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115  until the program ends
        setattr(sys, name, stream)
