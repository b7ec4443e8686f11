"""The userland, opened once a session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest
from forked_mbq import Mbq, forks
from userland import Userland


@pytest.fixture(scope="session")
def userland() -> Userland:
    return Userland.open()


@pytest.fixture(scope="session")
def board(userland: Userland) -> Iterator[Callable[[str], Mbq]]:
    """By the name of a core: runs ``mbq``, or another program, there, in forks of one emulated process."""
    with ExitStack() as processes:

        @cache
        def started(cpu: str) -> Mbq:
            python = userland.interpreter(cpu)
            return processes.enter_context(forks(Path("/"), python, userland.environment(python), most_s=1800))

        yield started


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mbq]:
    """Runs ``mbq`` on this machine."""
    with forks(tmp_path_factory.mktemp("elsewhere")) as mbq:
        yield mbq
