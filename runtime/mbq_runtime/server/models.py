"""The models of a server.  One is in use, and as many as fit stay in memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mbq_runtime.bundle.facts import Budget
from mbq_runtime.errors import UsageError

if TYPE_CHECKING:
    from mbq_runtime.control.bounds import BoundedEngine
    from mbq_runtime.control.governor import Governor
    from mbq_runtime.engine import Engine

log = logging.getLogger(__name__)

Steer = Callable[["Engine"], AbstractContextManager[tuple["BoundedEngine", "Governor"]]]
"""Runs a governor for an engine while a block lasts."""


@dataclass(frozen=True, eq=False)
class Model:
    """A bundle of the server.

    name: as clients call it.
    folder: name of its folder, by which clients can call it too.
    engine: loaded or asleep.
    budget: bits that requests can ask for, within the budget of the bundle.
    """

    name: str
    folder: str
    engine: Engine
    budget: Budget


def named(bundles: Sequence[tuple[str, Engine, Budget]]) -> list[Model]:
    """Models with the names of their manifests, or of their folders where two have the same.

    Args:
        bundles: names of folders, each with its engine and the bits that requests can ask for.

    Raises:
        UsageError: two folders have the same name too.
    """
    names = [engine.manifest.model.name for _, engine, _ in bundles]
    if len(set(names)) < len(names):
        names = [folder for folder, _, _ in bundles]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"two bundles have the name {twice!r}; rename the folder of one")
    return [Model(name, *bundle) for name, bundle in zip(names, bundles, strict=True)]


class Models:
    """The models, as a context manager.  Only the thread of the worker may change which one is in use.

    Args:
        models: at least one; the first answers requests that name none, and is in use at the start.
        steer: runs a governor for an engine while a block lasts.
        most_bytes: bytes of the models in memory, each with one context; None: no bound.  The one in use may have more.
    """

    def __init__(self, models: Sequence[Model], steer: Steer, *, most_bytes: int | None = None) -> None:
        self._models, self._steer, self.most_bytes = list(models), steer, most_bytes
        self._used = [models[0]]  # the one in use is at the end
        self.before_sleep: Callable[[Engine], None] = lambda engine: None
        self._steering = ExitStack()
        self.bounded, self.governor = self._steering.enter_context(steer(models[0].engine))

    def __enter__(self) -> Models:
        return self

    def __exit__(self, *_: object) -> None:
        self._steering.close()

    def __iter__(self) -> Iterator[Model]:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)

    @property
    def first(self) -> Model:
        """The model of requests that name none."""
        return self._models[0]

    def find(self, name: str) -> Model | None:
        """The model of a name, or of a folder of that name; None: there is none.

        Args:
            name: what a client calls it.
        """
        return next((model for model in self if name in (model.name, model.folder)), None)

    @property
    def in_memory(self) -> int:
        """Number of models that are in memory."""
        return sum(not model.engine.asleep for model in self)

    def use(self, model: Model) -> None:
        """Steer a model.  The ones used longest ago are put to sleep until it fits.  Its next reply loads it.

        Where that fails, the model that was in use is still in use.

        Args:
            model: one of these.
        """
        if model is self._used[-1]:
            return
        others = [other for other in self._used if other is not model]
        with ExitStack() as steering:
            steered = steering.enter_context(self._steer(model.engine))
            for other in others:
                if self.most_bytes is not None and self._bytes_with(model) > self.most_bytes:
                    self._put_to_sleep(other)
            before, self._steering = self._steering, steering.pop_all()
        self.bounded, self.governor = steered
        self._used = [*others, model]
        before.close()

    def sleep(self) -> None:
        """Free the memory of all models."""
        for model in self:
            self._put_to_sleep(model)

    def _bytes_with(self, model: Model) -> int:
        """Bytes of the models that are in memory, and of one that will be."""
        return sum(other.engine.memory_bytes for other in self if other is model or not other.engine.asleep)

    def _put_to_sleep(self, model: Model) -> None:
        if not model.engine.asleep:
            self.before_sleep(model.engine)
            model.engine.sleep()
            log.info("%s: asleep", model.engine.path)
