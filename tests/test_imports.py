"""Who may import whom, read from the source: imports in functions and for types alone count as well."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "mbq_export": ROOT / "mbq_export",
    "mbq_runtime": ROOT / "runtime" / "mbq_runtime",
    "mbq_targets": ROOT / "targets" / "mbq_targets",
}

MAY_IMPORT = {
    "mbq_runtime": set[str](),
    "mbq_targets": {"mbq_runtime"},
    "mbq_export": {"mbq_runtime", "mbq_targets"},
}
"""Of this project's packages, besides itself."""

NOT_ON_A_BOARD = {"torch", "transformers", "onnx", "tvm"}
"""What ``mbq_runtime`` does without.  It loads TVM's run-time library by itself, without the package's compiler."""

_CALIBRATION = {"calibrated", "context", "format", "memory", "methods", "model", "processes", "progress", "store"}
ROOMS = {
    "format": set[str](),
    "model": {"compiled", "format", "lines", "memory"},
    "data": {"model", "progress"},
    "transforms": _CALIBRATION,
    "slicing": _CALIBRATION | {"compiled", "devices"},
    "tuning": _CALIBRATION,
    "routing": _CALIBRATION | {"quality", "slicing", "tuning"},
    "lower": {"calibrated", "format", "model"},
}
"""Rooms of ``mbq_export``: the modules and rooms of the package that each may import, besides itself."""


def modules() -> dict[str, Path]:
    """Every module of the three packages, by its dotted name."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


MODULES = modules()


def imported(module: str, path: Path) -> Iterator[str]:
    """Dotted names that a module imports: of this project the modules, of others what the statement names."""
    parents = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = parents[: len(parents) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in MODULES else base


GRAPH = {module: {name for name in imported(module, path) if name != module} for module, path in MODULES.items()}


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """The modules of one circle in order, the first of them also at the end; empty when there is none."""
    finished: set[str] = set()

    def visit(module: str, trail: list[str]) -> list[str]:
        if module in trail:
            return [*trail[trail.index(module) :], module]
        if module in finished:
            return []
        for name in sorted(graph[module] & graph.keys()):
            found = visit(name, [*trail, module])
            if found:
                return found
        finished.add(module)
        return []

    return next((found for module in sorted(graph) if (found := visit(module, []))), [])


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_module_imports_itself_by_a_circle() -> None:
    assert not (found := circle(GRAPH)), " -> ".join(found)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages(package: str) -> None:
    refused = FOLDERS.keys() - MAY_IMPORT[package] - {package}
    if package == "mbq_runtime":
        refused |= NOT_ON_A_BOARD
    for module, names in GRAPH.items():
        if module.split(".")[0] == package:
            assert not {name for name in names if name.split(".")[0] in refused}, module


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_of_the_exporter(room: str) -> None:
    for module, names in GRAPH.items():
        if module.split(".")[:2] == ["mbq_export", room]:
            rooms = {name.split(".")[1] for name in names if name.startswith("mbq_export.")}
            assert rooms <= ROOMS[room] | {room}, f"{module} imports {sorted(rooms - ROOMS[room])}"
