"""Gives every attack file to verify, inspect and run, and writes what each command took to results/attacks.json.

python tests/attacks/figures.py      (PYTHONPATH=tests:tests/runtime)
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bundles import ATTACKS, attack
from forked_mbq import Ended, forks
from this_commit import this_commit
from tiny_bundle import write_bundle

from mbq_runtime.bench import environment
from mbq_runtime.sensing import Sensors

ROOT = Path(__file__).resolve().parents[2]
COMMANDS: dict[str, tuple[str, ...]] = {"verify": (), "inspect": (), "run": ("A", "--raw", "--max-tokens", "2")}


def measure(names: Sequence[str]) -> dict[str, dict[str, Ended]]:
    """How each command ended, by command and name of the attack.

    Args:
        names: of the attacks.
    """
    found: dict[str, dict[str, Ended]] = {command: {} for command in COMMANDS}
    with tempfile.TemporaryDirectory(prefix="mbq-attacks-") as name:
        good, copy = write_bundle(Path(name) / "good"), Path(name) / "bundle"
        with forks(Path(name)) as mbq:
            for attacked in names:
                shutil.copytree(good, copy)
                attack(copy, attacked)
                for command, more in COMMANDS.items():
                    found[command][attacked] = mbq([command, copy, *more])
                shutil.rmtree(copy)
    return found


def row(command: str, found: dict[str, Ended]) -> dict[str, Any]:
    """The figures of a command.

    Args:
        command: its name.
        found: what each attack took.
    """
    slowest = max(found, key=lambda name: found[name].seconds)
    largest = max(found, key=lambda name: found[name].mb)
    refused = [one for one in found.values() if one.code == 4 and one.err.count("\n") == 1]
    return {
        "command": command,
        "attacks": len(found),
        "refused_in_one_line": len(refused),
        "most_processor_s": round(found[slowest].seconds, 3),
        "slowest": slowest,
        "most_mb": round(found[largest].mb),
        "largest": largest,
    }


def main() -> None:
    """Measure, and write results/attacks.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="take each attack of so many")
    options = parser.parse_args()
    machine = environment(Sensors().read)
    document = {
        "title": "Attack files: what a refusal takes",
        "date": datetime.date.today().isoformat(),
        "machine": f"{machine['cpus']} cores of {machine['cpu']}",
        "commit": this_commit(),
        "published_in": None,
        "command": "PYTHONPATH=tests:tests/runtime python tests/attacks/figures.py"
        + (f" --every {options.every}" if options.every > 1 else ""),
        "notes": [
            "Each command runs in a fork of a process that has the packages loaded. The processor time "
            "is that of the fork and of what it starts.",
            f"{len(ATTACKS)} attack files are there.",
        ],
        "rows": [row(command, found) for command, found in measure(ATTACKS[:: options.every]).items()],
    }
    path = ROOT / "results" / "attacks.json"
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
