"""Exports that a signal ends at random points, and pairs of exports to one output: what is left, and who wins.

By hand:  PYTHONPATH=tests:tests/export python tests/fuzz/kill_attempts.py --cases 130
"""

from __future__ import annotations

import math
import random
import signal
import subprocess
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import kept
from exporting import export, start
from tiny_models import write_checkpoint

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL)
TEXT = "The tide turns twice a day, and twice a day the boats leave the harbour. " * 200
FAST = ("--method", "rtn", "--router", "static")
PAIR_EVERY = 13
"""Every so manyth case is a pair of exports: 10 pairs and 30 kills by each signal in 130 cases."""
LONGEST_S = 300
LEFT = (".part", ".lock", ".old")


@dataclass
class Report(kept.Sums):
    """Sums over all cases.

    kills: by signal; finished: exports that ended before the signal came; left: what kills by SIGKILL left for the next
    run; pairs: pairs of which exactly one wrote the bundle.
    """

    kills: Counter[str] = field(default_factory=Counter)
    finished: int = 0
    left: Counter[str] = field(default_factory=Counter)
    pairs: int = 0


def run_cases(
    numbers: range, seed: int, report: Report, keep: Path | None = None, longest_s: float = math.inf
) -> Report:
    """Run cases and sum up what they left.

    Args:
        numbers: of the cases.
        seed: with the number, decides all draws.
        report: the sums to add to.
        keep: a file that keeps the sums, or None.
        longest_s: no case starts after this time.
    """
    # A shell starts background commands with SIGINT ignored, and what is ignored stays so in children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="mbq-fuzz-kills-") as name:
        work = Path(name)
        model, text = write_checkpoint(work / "model", "llama"), work / "text.txt"
        text.write_text(TEXT)
        command = export(model, text, work / "out" / "bundle", *FAST, "--force")

        whole_s = _seconds(command)

        def one(number: int) -> None:
            at = number % PAIR_EVERY
            if at == PAIR_EVERY - 1:
                fault = _pair(export(model, text, work / f"pair-{number}" / "bundle", *FAST), report)
            else:
                draw = random.Random(f"{seed} {number}")
                fault = _kill(command, work / "out", SIGNALS[at % 4], draw, whole_s, report)
            if fault:
                report.fault(f"case {number}: {fault}")

        kept.count(report, numbers, one, keep, longest_s)
        if report.next_case:
            process = start(command)
            said = process.communicate(timeout=LONGEST_S)
            if process.returncode or _names(work / "out") != ["bundle"]:
                report.fault(f"the last run leaves {_names(work / 'out')}: {said}")
    return report


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def _leftovers(folder: Path) -> dict[str, tuple[int, int]]:
    """What an export that ended in time would have removed: name -> (inode, time of the last change)."""
    found = [path for path in folder.iterdir() if path.name.endswith(LEFT)] if folder.exists() else []
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def _seconds(command: list[str]) -> float:
    """How long a whole export takes, so that kills come before its end."""
    process, begin_s = start(command), time.monotonic()
    said = process.communicate(timeout=LONGEST_S)[1]
    if process.returncode:
        raise SystemExit(f"the export that is to be killed fails: {said}")
    return time.monotonic() - begin_s


def _kill(
    command: list[str], out: Path, number: signal.Signals, draw: random.Random, whole_s: float, report: Report
) -> str:
    """One kill: half of them while the bundle is written, the others before.  Returns what is wrong."""
    # A kill before may have left something, and this one can come before the export removes it.
    before = _leftovers(out)
    process = start(command)
    writing = draw.random() < 0.5
    draft, end = out / ".bundle.part", time.monotonic() + LONGEST_S
    while writing and not draft.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    time.sleep(draw.uniform(0, 0.3 if writing else 0.9 * whole_s))
    process.send_signal(number)
    said = process.communicate(timeout=LONGEST_S)[1]
    left = sorted(name for name, which in _leftovers(out).items() if before.get(name) != which)
    if "Traceback" in said:
        return f"{number.name}: a traceback: {said[-1000:]}"
    if process.returncode == 0:
        report.finished += 1
        return f"a whole export leaves {sorted(_leftovers(out))}" if _leftovers(out) else ""
    report.kills[number.name] += 1
    if process.returncode not in (-number, 128 + number):
        return f"{number.name}: exit code {process.returncode}: {said[-1000:]}"
    if number == signal.SIGKILL:
        report.left.update(name.rpartition(".")[2] for name in left)
        return ""
    return f"{number.name} leaves {left}" if left else ""


def _pair(command: list[str], report: Report) -> str:
    """Two exports to one output at once.  Returns what is wrong."""
    both = [
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8") for _ in range(2)
    ]
    said = [process.communicate(timeout=2 * LONGEST_S)[1] for process in both]
    codes = [process.returncode for process in both]
    if sorted(codes) != [0, 2]:
        return f"two exports to one output end with {codes}: {said}"
    loser = said[codes.index(2)]
    if "another export writes it now" not in loser and "it exists" not in loser:
        return f"the second export says {loser[-500:]}"
    report.pairs += 1
    return ""


if __name__ == "__main__":
    kept.main(__doc__, Report, run_cases)
