"""One calibration that several processes share: the GPUs of a machine, or several machines.

``torchrun`` starts the processes and torch.distributed connects them.  Each process holds the whole model, does its
share of the expensive work (windows to run, rows to slice, routers to fit), and then receives what the others made.
Each process does all other work itself.  A single process has the whole share and waits for nobody.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import distributed

from mbq_runtime.errors import ModelError

T = TypeVar("T")


@contextmanager
def connected() -> Iterator[None]:
    """Connect this process with those that ``torchrun`` started beside it, while the block runs."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    distributed.init_process_group()
    try:
        yield
    finally:
        distributed.destroy_process_group()


def _are_connected() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def count() -> int:
    """The number of processes that share the work."""
    return distributed.get_world_size() if _are_connected() else 1


def index() -> int:
    """The index of this process.  Process 0 prints, keeps finished steps and writes bundles."""
    return distributed.get_rank() if _are_connected() else 0


def on_this_machine() -> tuple[int, int]:
    """The index of this process among those on this machine, and their number."""
    return (int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])) if count() > 1 else (0, 1)


def share(total: int) -> slice:
    """The part of a row of things that this process works on.  Shares differ by one thing at most.

    Args:
        total: the number of things.
    """
    return slice(total * index() // count(), total * (index() + 1) // count())


@contextmanager
def _waiting() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ModelError(
            f"process {index()} of {count()}: another one has ended ({str(error).splitlines()[0]}); mend what that one "
            "says and run the same command again: what was finished before is kept"
        ) from error


def gathered(own: Iterable[T]) -> list[T]:
    """The things that all processes made, in the order of their shares.

    Args:
        own: what this process made.  Its tensors are on the processor.
    """
    mine = list(own)
    if count() == 1:
        return mine
    parts: list[Any] = [None] * count()
    with _waiting():
        distributed.all_gather_object(parts, mine)
    return [thing for part in parts for thing in part]


def from_first(thing: T) -> T:
    """The value that the first process has.

    Args:
        thing: this process's own value, which is replaced.
    """
    if count() == 1:
        return thing
    things = [thing]
    with _waiting():
        distributed.broadcast_object_list(things, src=0)
    return things[0]


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """Replace a tensor, in place, by its sum over all processes.

    Args:
        tensor: any shape and dtype, the same in every process.
    """
    if count() > 1:
        with _waiting():
            distributed.all_reduce(tensor)
    return tensor


def sum_gradients(parameters: list[torch.Tensor]) -> None:
    """Replace each gradient, in place, by its sum over all processes.

    Args:
        parameters: the same in every process.
    """
    if count() > 1:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        # At one go: hundreds of small sums would each wait for the network.
        total = summed(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, part in zip(gradients, total.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
