"""Quality that policies give away in simulated situations, beside an oracle and the controller of an earlier commit.

Each situation of ``mbq_runtime.simulate.situations`` runs under the oracle, under ``auto``, and under ``auto`` of the
earlier commit, whose package is taken out of git and imported beside this one.  Writes a set of ``results/``.

    python tests/benchmarks/given_away.py --before 1076e0f --json results/given-away.json
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import asdict, fields
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from mbq_runtime.control.policy import find_policy
from mbq_runtime.sensing.readings import Readings
from mbq_runtime.simulate.closed_loop import contenders
from mbq_runtime.simulate.compared import Trial
from mbq_runtime.simulate.model import SMOLLM2_135M
from mbq_runtime.simulate.situations import SITUATIONS

ROOT = Path(__file__).parents[2]
PACKAGE = "mbq_before"


def take_out(commit: str, folder: Path) -> None:
    """Write the runtime of a commit as a package of another name."""
    archive = subprocess.run(
        ["git", "archive", commit, "runtime/mbq_runtime"], cwd=ROOT, check=True, capture_output=True
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    (folder / "runtime" / "mbq_runtime").rename(folder / PACKAGE)
    for path in (folder / PACKAGE).rglob("*.py"):
        path.write_text(path.read_text(encoding="utf-8").replace("mbq_runtime", PACKAGE), encoding="utf-8")
    sys.path.insert(0, str(folder))


class Before:
    """The controller of the earlier commit on a simulated board."""

    def __init__(self, trial: Trial) -> None:
        weights = trial.weights
        self._control = import_module(f"{PACKAGE}.control.controller")
        self._readings = import_module(f"{PACKAGE}.sensing.readings").Readings
        self._names = {f.name for f in fields(self._readings)}
        policy = trial.with_goals(find_policy("auto"))
        before = import_module(f"{PACKAGE}.control.policy").POLICIES["auto"]
        self._policy = type(before)(
            before.name, before.help, before.bands, weights.low_bits, weights.high_bits,
            policy.min_tps, policy.last_until_s, weights.bytes_at_budgets, trial.board.cpus,
        )  # fmt: skip
        self._state = self._control.start(self._policy)
        self._threads = import_module(f"{PACKAGE}.control.threads").Threads.of(trial.board.cpus, trial.board.cpus)
        self.threads = trial.board.cpus
        self.pace_tps: float | None = None

    def decide(self, readings: Readings) -> tuple[float, str]:
        old = self._readings(**{name: value for name, value in asdict(readings).items() if name in self._names})
        before_s = self._state.clock_s
        self._state, bits, reason = self._control.step(self._state, old, old.time_s, self._policy)
        self._threads = self._threads.after(old, self._state.clock_s - before_s)
        self.threads = self._threads.count
        return bits, reason


def rows(commit: str) -> list[dict[str, Any]]:
    weights = SMOLLM2_135M
    ((_, auto),) = contenders(["auto"], weights.low_bits, weights.high_bits)
    found = []
    for situation in SITUATIONS.values():
        trial = Trial(situation, weights)
        runs = {
            "oracle": trial.oracle(),
            "auto": trial.run("auto", trial.follow(auto)),
            f"auto at {commit}": trial.run("before", Before(trial)),
        }
        for name, run in runs.items():
            figures = {k: round(v, 3) if isinstance(v, float) else v for k, v in asdict(trial.figures(run)).items()}
            found.append({"situation": situation.name, "policy": name, **figures})
            click.echo(json.dumps(found[-1]), err=True)
    return found


@click.command()
@click.option("--before", default="1076e0f", show_default=True, help="Commit of the earlier controller.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write a set of results/.")
def main(before: str, json_path: Path | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        take_out(before, Path(folder))
        found = rows(before)
    for name in dict.fromkeys(row["policy"] for row in found):
        of = [row for row in found if row["policy"] == name]
        total = {
            key: round(sum(row[key] for row in of), 1) for key in ("kl_seconds", "missed_s", "above_s", "past_hard_s")
        }
        closest = min((row["closest_s"] for row in of if row["closest_s"] is not None), default=None)
        click.echo(f"{name}: {total}, shortest time between two changes in steady surroundings {closest} s")
    if json_path is not None:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout.strip()
        document = {
            "title": f"Quality given away in {len(SITUATIONS)} simulated situations, SmolLM2-135M, 4 to 8 bits",
            "date": datetime.now(UTC).date().isoformat(),
            "machine": "simulated; no board has confirmed the models",
            "commit": commit,
            "published_in": None,
            "command": f"python tests/benchmarks/given_away.py --before {before} --json results/given-away.json",
            "notes": [
                "kl_seconds: KL divergence above that of 8 bits, in nats a token, over the seconds of the situation.",
                "missed_s: seconds in which 0.8 of the quiet speed, or the goal, was missed though some budget holds "
                "it; the first 4 s of a load do not count.",
                "The oracle knows board and future, and stays 1 C below the throttle point too.",
                "above_s: above the throttle point. No budget avoids it where the board decodes without pause.",
            ],
            "rows": found,
        }
        json_path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
