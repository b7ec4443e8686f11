"""What the tests of operators build, and for which targets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mbq_runtime.bundle.isa import problem, this_machine
from mbq_targets.machines import TARGETS, Target
from mbq_targets.spec import KernelSpec

Build = Callable[[str, KernelSpec], Path]
"""(target name, spec) -> path of the built library."""


def runnable() -> list[Target]:
    """List one native target per kernel instruction set that this machine can run."""
    machine = this_machine()
    targets = [t for t in TARGETS.values() if t.native and problem(t, machine) is None]
    return list({target.isa: target for target in targets}.values())
