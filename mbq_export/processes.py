"""One calibration, worked on by several processes: the GPUs of a machine, or machines.

``torchrun`` starts them and torch.distributed connects them.  Each holds the whole model, does its share of what is
dear (windows to run, rows to slice, routers to fit), and is then given what the others made; all else every one does
for itself.  A process by itself has the whole share, and waits for nobody.
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
    """While the block runs, this process and those that ``torchrun`` started beside it know one another."""
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
    """How many processes share the work."""
    return distributed.get_world_size() if _are_connected() else 1


def index() -> int:
    """Which of them this is; the first, 0, is the one that speaks, keeps what is finished, and writes bundles."""
    return distributed.get_rank() if _are_connected() else 0


def on_this_machine() -> tuple[int, int]:
    """Which of the processes on this machine this is, and how many they are."""
    return (int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])) if count() > 1 else (0, 1)


def share(total: int) -> slice:
    """This process's part of ``total`` things in a row; the shares differ by one at most."""
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
    """The things that every process made, in the order of their shares; what holds tensors is on the processor."""
    mine = list(own)
    if count() == 1:
        return mine
    parts: list[Any] = [None] * count()
    with _waiting():
        distributed.all_gather_object(parts, mine)
    return [thing for part in parts for thing in part]


def from_first(thing: T) -> T:
    """What the first process has in place of ``thing``."""
    if count() == 1:
        return thing
    things = [thing]
    with _waiting():
        distributed.broadcast_object_list(things, src=0)
    return things[0]


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``, which becomes the sum of every process's."""
    if count() > 1:
        with _waiting():
            distributed.all_reduce(tensor)
    return tensor


def sum_gradients(parameters: list[torch.Tensor]) -> None:
    """Every parameter's gradient becomes the sum of every process's."""
    if count() > 1:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        # At one go: hundreds of small sums would each wait for the network.
        total = summed(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, part in zip(gradients, total.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
