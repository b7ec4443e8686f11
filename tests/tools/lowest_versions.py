"""Print the lowest versions that pyproject.toml allows, as pins for pip.

    python tests/tools/lowest_versions.py EXTRA ... > lowest.txt
    pip install -r lowest.txt && pip install --no-deps --editable .

A requirement without a lower bound is an error: nobody could say what it was tested with.
"""

from __future__ import annotations

import argparse
import re
import tomllib
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def requirements(project: dict[str, Any], extras: list[str]) -> list[Requirement]:
    """List the requirements of the package and of some extras, extras of extras included.

    Args:
        project: table ``project`` of pyproject.toml.
        extras: names of extras.
    """
    found, todo, seen = list(map(Requirement, project["dependencies"])), list(extras), set()
    while todo:
        extra = todo.pop()
        if extra in seen:
            continue
        seen.add(extra)
        for requirement in map(Requirement, project["optional-dependencies"][extra]):
            if re.sub(r"[-_.]+", "-", requirement.name).lower() == project["name"]:
                todo += sorted(requirement.extras)
            else:
                found.append(requirement)
    return found


def lowest(requirement: Requirement) -> str:
    """Return the lowest version that a requirement allows.

    Args:
        requirement: one with a bound ``>=`` or ``==``.
    """
    bounds = [part.version for part in requirement.specifier if part.operator in (">=", "==")]
    if len(bounds) != 1:
        raise SystemExit(f"{requirement}: pyproject.toml must state one lowest version")
    return bounds[0]


def pins(project: dict[str, Any], extras: list[str]) -> list[str]:
    """List one pin for each package, sorted.

    Args:
        project: table ``project`` of pyproject.toml.
        extras: names of extras.
    """
    return sorted({f"{r.name}=={lowest(r)}" for r in requirements(project, extras)}, key=str.lower)


def main() -> None:
    """Print the pins."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("extras", nargs="*")
    with PYPROJECT.open("rb") as file:
        project = tomllib.load(file)["project"]
    print("\n".join(pins(project, parser.parse_args().extras)))


if __name__ == "__main__":
    main()
