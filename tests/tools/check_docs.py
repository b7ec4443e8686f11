"""Lint rules that ruff does not have: documented parameters and short parameter lists.

    python tests/tools/check_docs.py [PATH ...]

Each public function, method and dataclass must name every parameter in its docstring, as ``name: meaning``.
A method without a docstring inherits that of the same method of a base class.  A public function takes at most
five positional parameters.  The command names each fault with file and line, and exits with 1 if there is one.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("mbq_export", "runtime/mbq_runtime", "targets/mbq_targets")
MOST_POSITIONAL = 5
_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Fault:
    """One broken rule.

    path: file, relative to the repository; line: 1-based; text: what is wrong.
    """

    path: Path
    line: int
    text: str


def _is_public(name: str) -> bool:
    return not name.startswith("_") or name in ("__init__", "__call__")


def _decorators(node: _Function | ast.ClassDef) -> str:
    return " ".join(ast.unparse(decorator) for decorator in node.decorator_list)


def _names(docstring: str, parameter: str) -> bool:
    """Whether the docstring has ``parameter: ...``, alone or in a list such as ``a, b: ...``."""
    return (
        re.search(rf"(?<![\w.]){re.escape(parameter)}\*?(?:(?:,| and|, and) \*{{0,2}}\w+)*:\s", docstring) is not None
    )


def _parameters(function: _Function) -> list[ast.arg]:
    arguments = function.args
    found = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    found += [extra for extra in (arguments.vararg, arguments.kwarg) if extra is not None]
    return [one for one in found if one.arg not in ("self", "cls") and not one.arg.startswith("_")]


def _method_docs(trees: dict[Path, ast.Module]) -> dict[tuple[str, str], str]:
    """Docstrings by class and method name, over all files."""
    found = {}
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                for method in node.body:
                    if isinstance(method, _Function) and (text := ast.get_docstring(method)):
                        found[node.name, method.name] = text
    return found


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, int]]:
    """Public fields of a dataclass that have no docstring of their own below them."""
    for i, statement in enumerate(node.body):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        if "ClassVar" in ast.unparse(statement.annotation) or statement.target.id.startswith("_"):
            continue
        below = node.body[i + 1] if i + 1 < len(node.body) else None
        own = (
            isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str)
        )
        if not own and not ("field(" in ast.unparse(statement) and "init=False" in ast.unparse(statement)):
            yield statement.target.id, statement.lineno


class _Check:
    def __init__(self, path: Path, docs: dict[tuple[str, str], str]) -> None:
        self.path, self.docs = path, docs
        self.faults: list[Fault] = []

    def _fault(self, line: int, text: str) -> None:
        self.faults.append(Fault(self.path, line, text))

    def function(self, node: _Function, owner: ast.ClassDef | None) -> None:
        where = node.name if owner is None else f"{owner.name}.{node.name}"
        decorators = _decorators(node)
        if "click." in decorators or ".command(" in decorators or "overload" in decorators:
            return  # click's help documents the options
        text = ast.get_docstring(node) or ""
        if owner is not None:
            for base in [owner, *owner.bases]:
                name = owner.name if base is owner else ast.unparse(base).split("[")[0].split(".")[-1]
                text += "\n" + self.docs.get((name, node.name), "")
            if node.name in ("__init__", "__call__"):
                text += "\n" + (ast.get_docstring(owner) or "")
        wanted = _parameters(node)
        missing = [one.arg for one in wanted if not _names(text, one.arg)]
        if missing:
            self._fault(node.lineno, f"{where}: the docstring does not name {', '.join(missing)}")
        positional = [*node.args.posonlyargs, *node.args.args]
        count = len([one for one in positional if one.arg not in ("self", "cls")])
        if count > MOST_POSITIONAL:
            self._fault(node.lineno, f"{where}: {count} positional parameters; at most {MOST_POSITIONAL}")

    def body(self, body: list[ast.stmt], owner: ast.ClassDef | None = None) -> None:
        for node in body:
            if isinstance(node, _Function) and _is_public(node.name):
                self.function(node, owner)
            elif isinstance(node, ast.ClassDef) and _is_public(node.name):
                if "dataclass" in _decorators(node):
                    text = ast.get_docstring(node) or ""
                    missing = [name for name, _ in _fields(node) if not _names(text, name)]
                    if missing:
                        self._fault(node.lineno, f"{node.name}: the docstring does not name {', '.join(missing)}")
                self.body(node.body, node)


def faults(paths: list[Path]) -> list[Fault]:
    """All faults below the given paths.

    paths: files or folders, relative to the repository.
    """
    files = sorted(file for path in paths for file in ([path] if path.is_file() else path.rglob("*.py")))
    everything = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    docs = _method_docs({file: ast.parse(file.read_text(encoding="utf-8")) for file in everything})
    found: list[Fault] = []
    for file in files:
        check = _Check(file.relative_to(ROOT), docs)
        check.body(ast.parse(file.read_text(encoding="utf-8")).body)
        found += check.faults
    return found


def main(arguments: list[str]) -> int:
    """The command.

    arguments: paths to check; all packages without them.
    """
    found = faults([ROOT / path for path in arguments or PACKAGES])
    for fault in found:
        print(f"{fault.path}:{fault.line}: {fault.text}")
    print(f"{len(found)} faults")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
