"""Mutated bundles with right hashes: what verify, inspect and run make of them, in a fork for each bundle.

By hand:  PYTHONPATH=tests:tests/export:tests/runtime:tests/attacks python tests/fuzz/bundle_attempts.py --cases 10000
"""

from __future__ import annotations

import gc
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bundle_mutations as mutations
import kept
from tiny_bundle import write_bundle

LIMIT_S = 10
"""Processor time of all three commands."""
WAIT_S = 1800
"""Longest wait on a machine that does other work."""
REFUSAL_MB = 200
"""Memory of a refusal, that of the process that forks aside."""

PROMPT = ("A", "--raw", "--max-tokens", "4", "--json")
COMMANDS: tuple[tuple[str, ...], ...] = (("verify",), ("inspect",), ("run",))


@dataclass(frozen=True)
class Ended:
    """How the commands ended on one bundle.

    code: 0, or what ended the process: below zero a signal, None the time limit.
    codes: exit codes of the commands; said: what each said on stderr; text: the reply of run.
    seconds: of processor time; mb: most memory, beyond that of the process that forked.
    """

    code: int | None
    codes: list[int]
    said: list[str]
    text: str
    seconds: float
    mb: float

    @property
    def accepted(self) -> bool:
        """Whether the bundle was run."""
        return self.code == 0 and self.codes[-1] == 0

    @property
    def fault(self) -> str:
        """What is wrong with the ending, or an empty text."""
        if self.code is None:
            return "no end"
        if self.code in (-signal.SIGXCPU, -signal.SIGKILL):
            return f"no end after {LIMIT_S} s of work"
        if self.code < 0:
            return f"signal {signal.Signals(-self.code).name}"
        if self.code or len(self.codes) != len(COMMANDS):
            return "a traceback"
        for (command, *_), code, said in zip(COMMANDS, self.codes, self.said, strict=True):
            lines = said.splitlines()
            # A tokenizer may make an empty prompt of the text.
            if "Traceback" in said or code not in ((0, 2, 4) if command == "run" else (0, 4)):
                return f"exit code {code}"
            if code and (len(lines) != 1 or not lines[0].startswith("mbq: error: ") or not lines[0].isprintable()):
                return f"{len(lines)} lines on stderr, not one"
        if not self.accepted and self.codes[0] and self.mb > REFUSAL_MB:
            return f"refused with {self.mb:.0f} MB"
        if self.codes[0] and self.accepted:
            return "verify refuses what run takes"
        return ""


def attempt(folder: Path, elsewhere: Path) -> Ended:
    """Run all commands on a bundle in a fork of this process.

    Args:
        folder: the bundle.
        elsewhere: the current folder of the commands.
    """
    with tempfile.TemporaryFile() as told:
        before_mb = kept.resident_mb()
        pid = os.fork()
        if pid == 0:
            _child(folder, elsewhere, told.fileno())
        waited, status = 0.0, None
        while waited < WAIT_S:
            done, status, usage = os.wait4(pid, os.WNOHANG)
            if done:
                break
            status = None
            time.sleep(0.005)
            waited += 0.005
        if status is None:
            os.kill(pid, signal.SIGKILL)
            _, _, usage = os.wait4(pid, 0)
        told.seek(0)
        results = [json.loads(line) for line in told.read().decode().splitlines()]
    seconds = usage.ru_utime + usage.ru_stime
    code = None if status is None else os.waitstatus_to_exitcode(status)
    text = results[-1]["out"] if len(results) == len(COMMANDS) else ""
    own_mb = max(0.0, usage.ru_maxrss / 1000 - before_mb)
    return Ended(code, [r["code"] for r in results], [r["err"] for r in results], text, seconds, own_mb)


def _child(folder: Path, elsewhere: Path, told: int) -> None:
    code = 1
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_S, LIMIT_S + 1))
        os.chdir(elsewhere)
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        for command in COMMANDS:
            found = _command([*command, str(folder), *(PROMPT if command == ("run",) else ())])
            os.write(told, json.dumps(found).encode() + b"\n")
        code = 0
    except BaseException:
        os.write(told, json.dumps({"code": 99, "out": "", "err": traceback.format_exc()}).encode() + b"\n")
    finally:
        os._exit(code)


def _command(arguments: list[str]) -> dict[str, Any]:
    from mbq_runtime.cli import main

    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        # A test runner has objects of its own in their places.
        sys.stdout, sys.stderr = (os.fdopen(fd, "w", encoding="utf-8", closefd=False) for fd in (1, 2))
        found: dict[str, Any] = {"code": main(arguments)}
        sys.stdout.flush()
        sys.stderr.flush()
        for name, file in (("out", out), ("err", err)):
            file.seek(0)
            found[name] = file.read().decode(errors="backslashreplace")
    return found


def originals(folder: Path, targets: Sequence[str] = ("portable", "host")) -> dict[str, Path]:
    """Whole bundles by name: the tiny graph of the tests, and exports of a tiny model.

    Args:
        folder: where to write them.  Those that are there already stay.
        targets: of the exports.
    """
    program = Path(__file__).with_name("write_originals.py")
    found = {name: folder / name for name in ("tiny", *targets)}
    for name in [name for name, bundle in found.items() if not bundle.exists()]:
        if name == "tiny":
            write_bundle(found[name])
        else:
            subprocess.run([sys.executable, str(program), str(folder), name], check=True, stdout=subprocess.DEVNULL)
    return found


@dataclass
class Report(kept.Sums):
    """Sums over all cases.

    refused, accepted: bundles by kind of change; changed: accepted bundles with another reply, whose content was
    changed; slowest_s: processor time of all refusals; largest_mb: memory of all refusals.
    """

    refused: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    changed: int = 0
    slowest_s: float = 0.0
    largest_mb: float = 0.0

    def add(self, number: int, kind: str, ended: Ended, expected: str) -> None:
        """Add one case.

        Args:
            number: of the case.
            kind: of the change.
            ended: how it ended.
            expected: the reply of the unchanged bundle.
        """
        (self.accepted if ended.accepted else self.refused)[kind] += 1
        fault = ended.fault
        if ended.accepted:
            same = _reply(ended.text) == _reply(expected)
            if not same and kind in mutations.MEANS_THE_SAME:
                fault = fault or f"exit code 0 and changed output: {ended.text[:200]}"
            self.changed += not same
        else:
            self.slowest_s = max(self.slowest_s, ended.seconds)
            self.largest_mb = max(self.largest_mb, ended.mb)
        if fault:
            self.fault(f"case {number} ({kind}): {fault}: {[said[-900:] for said in ended.said]}")


def _reply(text: str) -> tuple[object, object]:
    found = json.loads(text)
    return found["text"], found["tokens"]


def load_packages() -> None:
    """Import what every command imports, once for all forks."""
    import jinja2.sandbox  # noqa: F401
    import numpy.random  # noqa: F401
    import onnxruntime_genai  # noqa: F401
    import tokenizers  # noqa: F401

    import mbq_runtime.cli
    import mbq_runtime.commands.inspect
    import mbq_runtime.commands.run
    import mbq_runtime.commands.verify
    import mbq_runtime.control.energy
    import mbq_runtime.engine.engine
    import mbq_runtime.engine.genai  # noqa: F401

    # What is here stays: a fork need not look through it, nor copy its pages.
    gc.collect()
    gc.freeze()


def run_cases(
    numbers: range,
    seed: int,
    report: Report,
    keep: Path | None = None,
    longest_s: float = math.inf,
    *,
    make: Callable[[Path], Mapping[str, Path]] = originals,
) -> Report:
    """Run cases and sum up how they ended.

    Args:
        numbers: of the cases; kinds of change take turns.
        seed: with the number, decides all draws.
        report: the sums to add to.
        keep: a file that keeps the sums, or None.  The unchanged bundles stay beside it.
        longest_s: no case starts after this time.
        make: writes the unchanged bundles.
    """
    load_packages()
    with tempfile.TemporaryDirectory(prefix="mbq-fuzz-bundles-") as name:
        work = Path(name)
        whole = make(keep.with_suffix(".originals") if keep else work)
        elsewhere = work / "elsewhere"
        elsewhere.mkdir()
        os.environ["XDG_CACHE_HOME"] = str(work / "cache")
        expected = {}
        for name, folder in whole.items():
            ended = attempt(folder, elsewhere)
            assert ended.accepted, (name, ended)
            expected[name] = ended.text

        def one(number: int) -> None:
            draw = random.Random(f"{seed} {number}")
            name = draw.choice(list(whole))
            kinds = mutations.kinds(whole[name])
            kind = kinds[number % len(kinds)]
            folder = Path(shutil.copytree(whole[name], work / "bundle"))
            mutations.mutate(folder, kind, draw)
            report.add(number, kind, attempt(folder, elsewhere), expected[name])
            shutil.rmtree(folder)

        kept.count(report, numbers, one, keep, longest_s)
    return report


if __name__ == "__main__":
    kept.main(__doc__, Report, run_cases)
