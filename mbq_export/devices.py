"""Where a calibration is worked on: the processor, or a GPU that torch knows."""

from __future__ import annotations

import os

import torch

from mbq_runtime.errors import UsageError

CPU, GPU = "cpu", "cuda"


def choose(wanted: str, needed_bytes: int) -> str:
    """The device for ``--device``; "auto" is a GPU that has ``needed_bytes`` free, else the processor.

    Raises UsageError for a device that torch cannot use here.
    """
    if wanted == "auto":
        return GPU if torch.cuda.is_available() and free_bytes(GPU) >= needed_bytes else CPU
    try:
        torch.zeros(1, device=wanted).cpu()
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without it
        reason = str(error).strip().splitlines()[0]
        usable = [CPU, *(f"{GPU}:{i}" for i in range(torch.cuda.device_count()))]
        raise UsageError(
            f"--device {wanted}: torch cannot use it ({reason}); usable here: {', '.join(usable)}"
        ) from None
    return wanted


def free_bytes(device: str) -> int:
    """Memory of a device: all of this machine's for the processor, what is free of a GPU's."""
    if torch.device(device).type == GPU:
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
