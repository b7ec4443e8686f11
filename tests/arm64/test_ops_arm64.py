"""The cross-built op libraries on emulated boards, against the numpy definition."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from board_packages import REPO
from forked_mbq import Ended, Mbq
from rooms import helper

from mbq_runtime.bundle.slice_profile import SliceProfile
from mbq_targets.build import build_ops_library
from mbq_targets.machines import TARGETS
from mbq_targets.spec import KernelSpec

pytestmark = pytest.mark.slow

OP_CHECK = REPO / "tests" / "targets" / "op_check.py"

# Every arm64 target on the weakest core it is meant for, and the two general ones on other cores too.
BOARDS = [
    ("arm64", "cortex-a76"),
    ("arm64", "max"),
    ("arm64-i8mm", "max"),
    ("rpi4", "cortex-a72"),
    ("rpi4", "cortex-a57"),
    ("rpi4", "cortex-a53"),
    ("rpi5", "cortex-a76"),
    ("jetson-orin", "max"),
]
# The project's own slices and group size go to every board, others to a board of each kind of kernel.
USUAL = KernelSpec(SliceProfile((3, 1, 2, 2)), 64, kv_bits=8)
RUNS = [(target, cpu, USUAL) for target, cpu in BOARDS]
RUNS += [
    ("arm64", "cortex-a76", KernelSpec(SliceProfile((2, 2, 2, 2)), 32)),
    ("arm64", "cortex-a76", KernelSpec(SliceProfile((1, 2, 1, 4)), 64)),
    ("arm64", "cortex-a76", KernelSpec(SliceProfile((3, 1, 2, 2)), 64, activation_bits=8)),
    ("arm64-i8mm", "max", KernelSpec(SliceProfile((2, 2, 2, 2)), 32)),
    ("arm64-i8mm", "max", KernelSpec(SliceProfile((3, 1, 2, 2)), 64, activation_bits=8)),
    ("rpi4", "cortex-a72", KernelSpec(SliceProfile((4, 4)), 128)),
    ("rpi4", "cortex-a72", KernelSpec(SliceProfile((3, 1, 2, 2)), 64, activation_bits=8)),
]

Board = Callable[[str], Mbq]
Cases = Callable[[KernelSpec], Path]
Library = Callable[[str, KernelSpec], Path]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    """A folder of prepared cases for a spec, each made once."""

    @cache
    def prepared(spec: KernelSpec) -> Path:
        folder = tmp_path_factory.mktemp("cases")
        helper("targets", "op_cases").prepare(folder, spec)
        return folder

    return prepared


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """A target's op library, cross-built here."""

    def built(target: str, spec: KernelSpec) -> Path:
        out = tmp_path_factory.mktemp("ops") / "libmbq_ops.so"
        build_ops_library(TARGETS[target], spec, out)
        return out

    return built


def op_check(board: Mbq, *paths: Path) -> Ended:
    """Run ``op_check.py`` on a board.  paths: folder and library in turn."""
    return board(paths, program=OP_CHECK.read_text(encoding="utf-8"), imports=["numpy", "onnxruntime"])


def test_every_arm64_target_is_run_here() -> None:
    assert {target.name for target in TARGETS.values() if target.arch == "aarch64"} == {name for name, _ in BOARDS}


@pytest.mark.parametrize("cpu", list(dict.fromkeys(cpu for _, cpu, _ in RUNS)))
def test_ops_give_the_references_numbers(board: Board, cases: Cases, library: Library, cpu: str) -> None:
    """All libraries that a core runs, in one process: to start it takes longer than to run them."""
    folders = {library(target, spec): cases(spec) for target, on, spec in RUNS if on == cpu}
    done = op_check(board(cpu), *(path for built, folder in folders.items() for path in (folder, built)))
    assert done.code == 0, f"exit {done.code}\n{done.out}\n{done.err}"
    counts = re.findall(r"^(.+): (\d+) cases, 0 problems$", done.out, re.MULTILINE)
    assert {built: int(count) for built, count in counts} == {
        str(built): len(list(folder.glob("*/model.onnx"))) for built, folder in folders.items()
    }


def test_emulated_cores_refuse_what_they_lack(board: Board, cases: Cases, library: Library) -> None:
    """The proof of the proof: dot product code on a core without it must die, or passing above means nothing."""
    done = op_check(board("cortex-a72"), cases(USUAL), library("arm64", USUAL))
    assert done.code == -signal.SIGILL
