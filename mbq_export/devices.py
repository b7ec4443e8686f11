"""Where a calibration is worked on: the processor, or a GPU that torch knows."""

from __future__ import annotations

import os

import torch

from mbq_runtime.errors import UsageError

from . import processes

CPU, GPU = "cpu", "cuda"


def choose(wanted: str, needed_bytes: int) -> str:
    """The device for ``--device``; "auto" is a GPU that has ``needed_bytes`` free, else the processor.

    Of several processes on a machine each takes a GPU of its own, and all of them the processor where "auto" finds that
    one has to.
    Raises UsageError for a device that torch cannot use here.
    """
    at, beside = processes.on_this_machine()
    gpu = f"{GPU}:{at}" if beside > 1 else GPU
    if wanted == "auto":
        there = torch.cuda.is_available() and (beside == 1 or at < torch.cuda.device_count())
        return gpu if all(processes.gathered([there and free_bytes(gpu) >= needed_bytes])) else CPU
    if wanted == GPU:
        wanted = gpu
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
    """Memory of a device: for the processor this process's part of all that the machine has, of a GPU what is free."""
    if torch.device(device).type == GPU:
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // processes.on_this_machine()[1]
