"""Where a calibration runs: the processor, or a GPU that torch knows."""

from __future__ import annotations

import os

import torch

from mbq_runtime.errors import UsageError

from . import processes

CPU, GPU = "cpu", "cuda"


def choose(wanted: str, needed_bytes: int) -> str:
    """The device to calibrate on.  Each of several processes on a machine gets a GPU of its own.

    Args:
        wanted: a device as torch names it, or "auto": a GPU with enough free memory, else the processor.
            With "auto", all processes use the processor if one of them has to.
        needed_bytes: memory that the calibration needs.

    Raises:
        UsageError: torch cannot use the device here.
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
    """Memory for this process: of a GPU what is free, of the processor this process's share of all memory.

    Args:
        device: as torch names it.
    """
    if torch.device(device).type == GPU:
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // processes.on_this_machine()[1]
