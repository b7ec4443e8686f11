"""Tiny models of every family, each exported once for all tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from family_exports import FamilyExport, export_family


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory, calibration_text: Path) -> Callable[[str], FamilyExport]:
    """By a key of ``MODELS``: the model and its bundles, which are made when they are first asked for."""
    return cache(lambda name: export_family(name, tmp_path_factory.mktemp(name), calibration_text))
