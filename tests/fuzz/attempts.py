"""Exports of hostile input, each in a forked process: what it said, how it ended and how long it took.

By hand:  PYTHONPATH=tests/export:tests/runtime python tests/fuzz/attempts.py --cases 2000
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import mutations
from meaning import Undecided, difference

LIMIT_S = 10.0
"""Longest time to a refusal."""
EXPORT_LIMIT_S = 120.0
"""Longest time of an export, which may compile kernels."""

TEXT = "The tide turns twice a day, and twice a day the boats leave the harbour. " * 200
FAST = ("--calib-tokens", "512", "--method", "rtn", "--router", "static", "--target", "portable")


CHANGED, UNDECIDED = "CHANGED: ", "UNDECIDED: "


@dataclass(frozen=True)
class Ended:
    """How one attempt ended.

    code: exit code; of a signal its number below zero, None at the time limit; said: stderr; seconds: how long it took.
    """

    code: int | None
    said: str
    seconds: float

    @property
    def fault(self) -> str:
        """What is wrong with the ending, or an empty text."""
        lines = [line for line in self.said.splitlines() if line.strip()]
        if self.code is None:
            return f"no end after {self.seconds:.0f} s"
        if self.code < 0:
            return f"signal {signal.Signals(-self.code).name}"
        if "Traceback" in self.said or "a fault of mbq-export" in self.said:
            return "a traceback"
        if self.code == 0:
            return "exit code 0 and changed output" if CHANGED in self.said else ""
        if self.seconds > LIMIT_S:
            return f"refused after {self.seconds:.0f} s"
        if len(lines) != 1 or not lines[0].startswith("mbq-export: error: ") or not lines[0].isprintable():
            return f"{len(lines)} lines on stderr, not one"
        return ""


def attempt(arguments: list[str], folder: Path) -> Ended:
    """Run ``mbq-export`` in a fork of this process, which has the libraries loaded, and verify the bundle.

    Args:
        arguments: of the command; the bundle is at the last ``--output``.
        folder: the current folder of the command.
    """
    with tempfile.TemporaryFile() as said:
        started = time.monotonic()
        pid = os.fork()
        if pid == 0:
            _child(arguments, folder, said.fileno())
        status = None
        while time.monotonic() - started < EXPORT_LIMIT_S:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                break
            status = None
            time.sleep(0.002)
        seconds = time.monotonic() - started
        if status is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        said.seek(0)
        text = said.read().decode("utf-8", "replace")
    return Ended(None if status is None else os.waitstatus_to_exitcode(status), text, seconds)


def _child(arguments: list[str], folder: Path, stderr: int) -> None:
    code = 1
    try:
        os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(0, 1)
        os.dup2(stderr, 2)
        sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
        code = _exit_code([*arguments, "--json"])
        if code == 0:
            _compare(_verify(arguments), arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _exit_code(arguments: list[str]) -> int:
    from mbq_export.cli import main

    sys.argv = ["mbq-export", *arguments]
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0


def _last(arguments: list[str], option: str) -> Path:
    """The value that counts of an option."""
    return Path(arguments[len(arguments) - arguments[::-1].index(option)])


def _verify(arguments: list[str]) -> list[Path]:
    from mbq_runtime.bundle import verify_bundle

    bundles = [manifest.parent for manifest in _last(arguments, "--output").glob("**/manifest.json")]
    assert bundles, "exit code 0, and no bundle"
    for bundle in bundles:
        verify_bundle(bundle)
    return bundles


def _compare(bundles: list[Path], arguments: list[str]) -> None:
    """Compare the bundles that this machine runs with their checkpoint."""
    from mbq_runtime.bundle.manifest import read

    for bundle in bundles:
        if read(bundle).target.arch == "any":
            try:
                found = difference(_last(arguments, "--model"), bundle)
            except Undecided as undecided:
                print(f"{UNDECIDED}{undecided}", file=sys.stderr)
                continue
            if found:
                print(f"{CHANGED}{found}", file=sys.stderr)


def load_libraries() -> None:
    """Import what every export imports, once for all forks."""
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    warnings.simplefilter("ignore")
    from transformers.utils import logging

    # The command does so before it imports the library.
    logging.set_verbosity_error()
    from transformers.models.gemma3 import modeling_gemma3  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401
    from transformers.models.phi3 import modeling_phi3  # noqa: F401
    from transformers.models.qwen3 import modeling_qwen3  # noqa: F401

    import mbq_export.cli
    import mbq_export.export
    import mbq_export.model.loading
    import mbq_export.prepare  # noqa: F401


def make_case(number: int, seed: int, folder: Path, originals: Path) -> tuple[str, list[str]]:
    """Write the input of one case.

    Args:
        number: of the case; the kinds take turns.
        seed: with the number, decides all draws.
        folder: an empty folder for the case.
        originals: a folder that keeps whole checkpoints for all cases.

    Returns:
        The kind of the case, and the arguments of the command.
    """
    draw = random.Random(f"{seed} {number}")
    kinds = [*mutations.FOLDER_MUTATIONS, "metadata of GGUF", "bytes of GGUF", "options"]
    kind = kinds[number % len(kinds)]
    model, more = folder / "model", []
    if kind.endswith("GGUF"):
        model = folder / "model.gguf"
        mutations.write_gguf(model, draw if kind.startswith("metadata") else None)
        if kind.startswith("bytes"):
            mutations.damage(model, draw, 12_000)
    else:
        mutations.write_folder(model, draw, originals)
        if kind == "options":
            more = mutations.hostile_options(draw)
        else:
            mutations.FOLDER_MUTATIONS[kind](model, draw)
    text = folder / "text.txt"
    text.write_text(TEXT)
    options = ["--output", str(folder / "out" / "bundle"), "--calib-data", str(text), *FAST]
    return kind, [*options, *([] if "--model" in more else ["--model", str(model)]), *more]


@dataclass
class Report:
    """Sums over all cases.

    refused, accepted: number of cases by kind; undecided: accepted cases that transformers does not read; slowest_s: of
    all refusals; faults: what was wrong, with the case's number and what it said.
    """

    refused: Counter[str]
    accepted: Counter[str]
    undecided: int
    slowest_s: float
    faults: list[str]


def run_cases(numbers: range, seed: int, longest_s: float = math.inf) -> Report:
    """Run cases and sum up how they ended.

    Args:
        numbers: of the cases.
        seed: of all draws.
        longest_s: no case starts after this time.
    """
    load_libraries()
    end = time.monotonic() + longest_s
    report, work = Report(Counter(), Counter(), 0, 0.0, []), Path(tempfile.mkdtemp(prefix="mbq-fuzz-"))
    try:
        for number in numbers:
            if time.monotonic() > end:
                break
            folder = work / str(number)
            folder.mkdir()
            kind, arguments = make_case(number, seed, folder, work / "originals")
            ended = attempt(arguments, folder)
            if ended.code != 0:
                report.slowest_s = max(report.slowest_s, ended.seconds)
            report.undecided += UNDECIDED in ended.said
            (report.accepted if ended.code == 0 else report.refused)[kind] += 1
            if ended.fault:
                report.faults.append(f"case {number} ({kind}): {ended.fault}: {ended.said[-2000:]}")
                print(report.faults[-1], file=sys.stderr, flush=True)
            shutil.rmtree(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return report


def main() -> None:
    """Run cases and print the sums as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=500, help="number of cases")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0, help="seed of all draws")
    parser.add_argument("--longest", type=float, default=math.inf, help="seconds after which no case starts")
    options = parser.parse_args()
    numbers = range(options.first, options.first + options.cases)
    report = run_cases(numbers, options.seed, options.longest)
    document = {
        "cases": sum(report.refused.values()) + sum(report.accepted.values()),
        "refused": sum(report.refused.values()),
        "exported_and_verified": sum(report.accepted.values()),
        "undecided": report.undecided,
        "slowest_refusal_s": round(report.slowest_s, 1),
        "exported_by_kind": dict(report.accepted),
        "faults": report.faults,
    }
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
