"""Loops in C that lie beside the modules that use them, compiled for this machine."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mbq_targets.build import build_for_this_machine

from .devices import CPU

Argument = torch.Tensor | ctypes.Structure | int


class Compiled:
    """The functions of one C file.  Threads share the rows, and their number does not change the result.

    Args:
        library: the compiled file.
    """

    def __init__(self, library: Path) -> None:
        self._functions = ctypes.CDLL(str(library))

    def __call__(self, name: str, rows: int, *arguments: Argument) -> None:
        """Call a function for all rows.

        Args:
            name: of the function, which takes the first row, the row after the last, and the other arguments.
            rows: how many there are.
            arguments: contiguous tensors, structures and integers.
        """
        function, passed = getattr(self._functions, name), [_passed(argument) for argument in arguments]
        threads = torch.get_num_threads()
        if threads == 1:
            function(ctypes.c_int64(0), ctypes.c_int64(rows), *passed)
            return
        ends = [ctypes.c_int64(rows * i // threads) for i in range(threads + 1)]
        list(_pool(threads).map(lambda begin, end: function(begin, end, *passed), ends[:-1], ends[1:]))


def _passed(argument: Argument) -> Any:
    if isinstance(argument, ctypes.Structure):
        return ctypes.byref(argument)
    return ctypes.c_int64(argument) if isinstance(argument, int) else ctypes.c_void_p(argument.data_ptr())


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def compiled(source: Path, device: torch.device, defines: Mapping[str, int] | None = None) -> Compiled | None:
    """The compiled functions of a C file; None where torch's operations do the work.

    Args:
        source: the C file.
        device: where the work is done.
        defines: {macro: value} for the compiler.
    """
    return _built(source, tuple((defines or {}).items())) if device.type == CPU else None


@cache
def _built(source: Path, defines: tuple[tuple[str, int], ...]) -> Compiled | None:
    library = build_for_this_machine(source, dict(defines))
    return None if library is None else Compiled(library)
