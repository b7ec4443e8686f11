"""Maps a file that may be shorter than the array of it."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_MAP_FIXED = 0x10  # of Linux, on every processor that bundles are for


def mapped(path: Path, size: int) -> NDArray[np.uint8]:
    """The content of a file, writable for this process alone.  What the file lacks reads as zeros.

    Args:
        path: the file, of at most ``size`` bytes.
        size: bytes of the array.

    Returns:
        uint8 [size].

    Raises:
        OSError: the file cannot be mapped.
    """
    held = path.stat().st_size
    if held == size:
        return np.memmap(path, np.uint8, mode="c")
    whole = np.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE), np.uint8)
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # The file takes the place of the first pages.
        flags = mmap.MAP_PRIVATE | _MAP_FIXED
        place = library.mmap(whole.ctypes.data, held, mmap.PROT_READ | mmap.PROT_WRITE, flags, descriptor, 0)
    finally:
        os.close(descriptor)
    if place != whole.ctypes.data:
        raise OSError(ctypes.get_errno(), "cannot be mapped", str(path))
    return whole
