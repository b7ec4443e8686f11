"""Helpers that live in other rooms of the tests, whose folders are not on the import path here."""

from __future__ import annotations

import importlib.util
from types import ModuleType

from board_packages import REPO


def helper(room: str, name: str) -> ModuleType:
    """The module ``tests/ROOM/NAME.py``."""
    path = REPO / "tests" / room / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{room}_{name}_for_arm64", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
