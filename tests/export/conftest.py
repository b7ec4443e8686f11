"""Tiny models of every family, each exported once for all tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from family_exports import FamilyExport, export_8_bits, export_family


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory, calibration_text: Path) -> Callable[[str], FamilyExport]:
    """By a key of ``MODELS``: the model and its bundles, which are made when they are first asked for."""
    return cache(lambda name: export_family(name, tmp_path_factory.mktemp(name), calibration_text))


@pytest.fixture(scope="session")
def bundles_8_bits(
    families: Callable[[str], FamilyExport], tmp_path_factory: pytest.TempPathFactory, calibration_text: Path
) -> Callable[[str], Path]:
    """By the same key: a bundle with keys and values of 8 bits and of the same slices, for both engines here."""
    return cache(lambda name: export_8_bits(families(name), tmp_path_factory.mktemp(name), calibration_text))
