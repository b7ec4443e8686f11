from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
from boards import Board
from machines import BOARDS, Machine


@pytest.fixture(params=BOARDS, ids=str)
def board(request: pytest.FixtureRequest) -> Board:
    return BOARDS[request.param]


@pytest.fixture(scope="session")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Board], Machine]:
    """Each board is built once; a test breaks it and the next one finds it mended."""
    return cache(lambda board: Machine(board, tmp_path_factory.mktemp("board")))


@pytest.fixture
def machine(board: Board, machines: Callable[[Board], Machine]) -> Iterator[Machine]:
    one = machines(board)
    one.start()
    yield one
    one.mend()
