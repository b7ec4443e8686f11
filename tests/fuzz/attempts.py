"""Exports of hostile input, each in a forked process: what it said, how it ended and how long it took.

By hand:  PYTHONPATH=tests:tests/export:tests/runtime python tests/fuzz/attempts.py --cases 2000
"""

from __future__ import annotations

import gc
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import kept
import mutations
from meaning import Undecided, difference

LIMIT_S = 10.0
"""Processor time of a refusal."""
EXPORT_LIMIT_S = 120
"""Processor time of an export, which may compile kernels."""
WAIT_S = 1800.0
"""Longest wait on a machine that does other work."""
REFUSAL_MB = 1000
"""Memory of a refusal, that of the process that forks aside.  A checkpoint may be loaded before it is refused."""

TEXT = "The tide turns twice a day, and twice a day the boats leave the harbour. " * 200
FAST = ("--calib-tokens", "512", "--method", "rtn", "--router", "static", "--target", "portable")


CHANGED, UNDECIDED = "CHANGED: ", "UNDECIDED: "


@dataclass(frozen=True)
class Ended:
    """How one attempt ended.

    code: exit code; of a signal its number below zero, None at the time limit; said: stderr; seconds: processor time;
    mb: most memory, beyond that of the process that forked.
    """

    code: int | None
    said: str
    seconds: float
    mb: float

    @property
    def fault(self) -> str:
        """What is wrong with the ending, or an empty text."""
        lines = [line for line in self.said.splitlines() if line.strip()]
        if self.code is None:
            return f"no end after {WAIT_S:.0f} s"
        if self.code in (-signal.SIGXCPU, -signal.SIGKILL):
            return f"no end after {EXPORT_LIMIT_S} s of work"
        if self.code < 0:
            return f"signal {signal.Signals(-self.code).name}"
        if "Traceback" in self.said or "a fault of mbq-export" in self.said:
            return "a traceback"
        if self.code == 0:
            return "exit code 0 and changed output" if CHANGED in self.said else ""
        if self.seconds > LIMIT_S:
            return f"refused after {self.seconds:.0f} s of work"
        if self.mb > REFUSAL_MB:
            return f"refused with {self.mb:.0f} MB"
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
        before_mb, started = kept.resident_mb(), time.monotonic()
        pid = os.fork()
        if pid == 0:
            _child(arguments, folder, said.fileno())
        done = 0
        while not done and time.monotonic() - started < WAIT_S:
            time.sleep(0.005)
            done, status, usage = os.wait4(pid, os.WNOHANG)
        if not done:
            os.kill(pid, signal.SIGKILL)
            _, _, usage = os.wait4(pid, 0)
        said.seek(0)
        text = said.read().decode("utf-8", "replace")
    code = os.waitstatus_to_exitcode(status) if done else None
    return Ended(code, text, usage.ru_utime + usage.ru_stime, max(0.0, usage.ru_maxrss / 1000 - before_mb))


def _child(arguments: list[str], folder: Path, stderr: int) -> None:
    code = 1
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (EXPORT_LIMIT_S, EXPORT_LIMIT_S + 1))
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

    # What is here stays: a fork need not look through it, nor copy its pages.
    gc.collect()
    gc.freeze()


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
class Report(kept.Sums):
    """Sums over all cases.

    refused, accepted: number of cases by kind; undecided: accepted cases that transformers does not read; slowest_s:
    processor time of all refusals; largest_mb: memory of all refusals.
    """

    refused: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    undecided: int = 0
    slowest_s: float = 0.0
    largest_mb: float = 0.0


def run_cases(
    numbers: range, seed: int, report: Report, keep: Path | None = None, longest_s: float = math.inf
) -> Report:
    """Run cases and sum up how they ended.

    Args:
        numbers: of the cases.
        seed: of all draws.
        report: the sums to add to.
        keep: a file that keeps the sums, or None.
        longest_s: no case starts after this time.
    """
    load_libraries()
    with tempfile.TemporaryDirectory(prefix="mbq-fuzz-") as name:
        work = Path(name)

        def one(number: int) -> None:
            folder = work / str(number)
            folder.mkdir()
            kind, arguments = make_case(number, seed, folder, work / "originals")
            ended = attempt(arguments, folder)
            if ended.code != 0:
                report.slowest_s = max(report.slowest_s, ended.seconds)
                report.largest_mb = max(report.largest_mb, ended.mb)
            report.undecided += UNDECIDED in ended.said
            (report.accepted if ended.code == 0 else report.refused)[kind] += 1
            if ended.fault:
                report.fault(f"case {number} ({kind}): {ended.fault}: {ended.said[-2000:]}")
            shutil.rmtree(folder)

        kept.count(report, numbers, one, keep, longest_s)
    return report


if __name__ == "__main__":
    kept.main(__doc__, Report, run_cases)
