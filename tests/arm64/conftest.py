"""The userland, opened once a session."""

from __future__ import annotations

import pytest
from userland import Userland


@pytest.fixture(scope="session")
def userland() -> Userland:
    return Userland.open()
