"""The controller on this machine: generation beside other programs and under a cgroup limit.

Each disturbance is run under the policy ``auto``: calm, disturbed, calm again.  Where the speed of a fixed 8 bits is
needed, each run has a shorter one at 8 bits before it.  ``LIMITS`` has a row for each, with what must hold:

- load: a program takes a whole core.  The budget falls within 3 s and is back within 30 s, or need not fall because
  threads and guessed tokens are enough; tokens/s are at least 1.5 times those of 8 bits.
- part: a program takes 24 % of all processors.  At least 5.5 bits are kept, and 0.8 of the calm speed.
- spikes: a program takes a core for 2 s of every 20 s.  The budget never changes.
- limit: a cgroup allows half of the processors.  As for a load.  It needs root, and a cgroup that can be written.

Prints the machine, a table with the median and the spread of the runs, and raw JSON, and draws every run; the exit code
tells whether all medians held.

    python tests/benchmarks/closed_loop.py bundles/smollm2-135m-host --out closed_loop --runs 5 --only part \\
        --json results/disturbances.json
    python tests/benchmarks/closed_loop.py bundles/smollm2-135m-host --out closed_loop --seconds 300 --disturbed 120
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import click
from matplotlib.figure import Figure
from measured_on import measured_on

from mbq_runtime import Engine
from mbq_runtime.control.events import Event
from mbq_runtime.control.governor import Governor
from mbq_runtime.control.policy import POLICIES, Policy
from mbq_runtime.engine.threads import cores
from mbq_runtime.sensing import Sensors

PROMPT = "Tell me a long story about the sea."
REPLY_TOKENS = 256
FIXED_S, FIXED_DISTURBED_S = 60.0, 40.0
"""Length of a run at 8 bits, and of its disturbance.  Its speed does not change, so it is short."""
Limits = dict[str, tuple[str, float]]
_WHOLE: Limits = {"drop_s": ("<=", 3.0), "back_s": ("<=", 30.0), "changes": ("<=", 6), "speed_ratio": (">=", 1.5)}
LIMITS: dict[str, Limits] = {
    "load": _WHOLE,
    "part": {"least_bits": (">=", 5.5), "kept_speed": (">=", 0.8)},
    "spikes": {"changes": ("<=", 0)},
    "limit": _WHOLE,
}
_BUSY = "while True: pass"
# Works for a share of each 50 ms.
_PARTLY = "import sys, time\nshare = float(sys.argv[1])\nwhile True:\n end = time.perf_counter() + 0.05 * share\n"
_PARTLY += " while time.perf_counter() < end: pass\n time.sleep(0.05 * (1 - share))"
_SPIKES = (
    "import time\nwhile True:\n end = time.perf_counter() + 2\n while time.perf_counter() < end: pass\n time.sleep(18)"
)


@contextmanager
def program(text: str, *arguments: str) -> Iterator[None]:
    """Another Python program."""
    load = subprocess.Popen([sys.executable, "-c", text, *arguments])
    try:
        yield
    finally:
        load.kill()
        load.wait()


@contextmanager
def part_of_all() -> Iterator[None]:
    """24 % of all processors, as programs of which each takes at most half a core."""
    count = max(1, math.ceil(0.24 * (os.cpu_count() or 1) / 0.5))
    share = 0.24 * (os.cpu_count() or 1) / count
    with ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(program(_PARTLY, f"{share:.3f}"))
        yield


class Group:
    """A cgroup of our own.  Version 1 or 2, whichever holds the processor's controller."""

    PERIOD_US = 100_000

    def __init__(self) -> None:
        v1, v2 = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")
        self.version = 1 if (v1 / "cpu.cfs_quota_us").exists() else 2
        self._parent = v1 if self.version == 1 else v2
        self.path = self._parent / f"mbq-benchmark-{os.getpid()}"

    def __enter__(self) -> Group:
        if self.version == 2:
            (self._parent / "cgroup.subtree_control").write_text("+cpu")
        self.path.mkdir()
        (self.path / "cgroup.procs").write_text(str(os.getpid()))
        return self

    def __exit__(self, *_: object) -> None:
        (self._parent / "cgroup.procs").write_text(str(os.getpid()))
        self.path.rmdir()

    @contextmanager
    def half(self) -> Iterator[None]:
        """Half of this machine's processor time."""
        quota = self.PERIOD_US * (os.cpu_count() or 1) // 2
        name, on, off = {
            1: ("cpu.cfs_quota_us", f"{quota}", "-1"),
            2: ("cpu.max", f"{quota} {self.PERIOD_US}", f"max {self.PERIOD_US}"),
        }[self.version]
        (self.path / name).write_text(on)
        try:
            yield
        finally:
            (self.path / name).write_text(off)


@dataclass
class Recording:
    """One run.  Times in seconds from its start; tokens: (time, budget) of each; changes: (time, budget, reason)."""

    policy: str
    on_s: float = 0.0
    off_s: float = 0.0
    tokens: list[tuple[float, float]] = field(default_factory=list)
    changes: list[tuple[float, float, str]] = field(default_factory=list)

    def speed(self, begin_s: float, end_s: float) -> float:
        return sum(begin_s <= at < end_s for at, _ in self.tokens) / (end_s - begin_s)

    @property
    def speed_disturbed(self) -> float:
        return self.speed(self.on_s, self.off_s)


def record(engine: Engine, policy: Policy, disturb: Callable[[], Any], end_s: float, disturbed_s: float) -> Recording:
    """Generate one reply after the other, with the disturbance in the middle."""
    run, start_s = Recording(policy.name), time.monotonic()

    def now() -> float:
        return time.monotonic() - start_s

    def schedule() -> None:
        time.sleep((end_s - disturbed_s) / 2)
        run.on_s = now()
        with disturb():
            time.sleep(disturbed_s)
        run.off_s = now()

    def note(event: Event) -> None:
        if event.is_change:
            run.changes.append((now(), event.new, event.reason))

    disturber = threading.Thread(target=schedule)
    with Governor(engine, Sensors(), policy, note):
        disturber.start()
        while now() < end_s:
            with engine.generate(PROMPT, max_tokens=REPLY_TOKENS) as reply:
                for _ in reply:
                    run.tokens.append((now(), engine.avg_bits))
                    if now() >= end_s:
                        break
    disturber.join()
    return run


def judge(name: str, auto: Recording, fixed: Recording | None) -> dict[str, float]:
    """The figures of ``LIMITS``; infinite for what never happened.  A budget that never fell was back at once."""
    never = float("inf")
    drops = [at - auto.on_s for at, _, _ in auto.changes if at >= auto.on_s]
    backs = [at - auto.off_s for at, bits, _ in auto.changes if at >= auto.off_s and bits == 8.0]
    # The first seconds of a load are those of the reaction.
    disturbed = [bits for at, bits in auto.tokens if auto.on_s + 3 <= at < auto.off_s]
    found = {
        "drop_s": min(drops, default=0.0),
        "back_s": min(backs, default=never if drops else 0.0),
        "changes": len(auto.changes),
        "speed_ratio": auto.speed_disturbed / fixed.speed_disturbed if fixed else never,
        "least_bits": min(disturbed, default=0.0),
        "kept_speed": auto.speed(auto.on_s + 3, auto.off_s) / auto.speed(auto.on_s / 2, auto.on_s),
    }
    return {figure: found[figure] for figure in LIMITS[name]}


def holds(name: str, figure: str, value: float) -> bool:
    way, limit = LIMITS[name][figure]
    return value >= limit if way == ">=" else value <= limit


SAID = {
    "load": "another program takes a core",
    "part": "another program takes 24 % of the processors",
    "spikes": "a program takes a core for 2 s of every 20 s",
    "limit": "a cgroup's limit of half of the processors",
}


def write_rows(path: Path, measured: dict[str, Any], figures: dict[str, list[dict[str, float]]]) -> None:
    """Put the figures into a file of ``results/``, in place of earlier ones of the same disturbances.

    Args:
        path: the file, which exists.
        measured: what it was measured on.
        figures: disturbance -> figure -> value, one for each run.
    """
    kept = json.loads(path.read_text(encoding="utf-8"))
    rows = [row for row in kept["rows"] if row["disturbance"] not in {SAID[name] for name in figures}]
    about = {"commit": measured["commit"], "machine": f"{measured['cpus']} cores of {measured['cpu']}"}
    for name, runs in figures.items():
        for figure, (way, limit) in LIMITS[name].items():
            values = [one[figure] for one in runs]
            rows.append(
                {"disturbance": SAID[name], "figure": figure, "median": statistics.median(values),
                 "least": min(values), "most": max(values), "needed": f"{way} {limit:g}", "runs": len(runs), **about}
            )  # fmt: skip
    path.write_text(json.dumps(kept | {"rows": rows}, indent=1) + "\n", encoding="utf-8")


def draw(title: str, runs: list[Recording], end_s: float, path: Path) -> None:
    figure = Figure(figsize=(9, 5), layout="constrained")
    speed, budget = figure.subplots(2, sharex=True)
    for run in runs:
        seconds = range(int(end_s))
        speed.plot(seconds, [run.speed(s, s + 1) for s in seconds], label=run.policy, linewidth=1)
        budget.plot(*zip(*run.tokens, strict=True), label=run.policy, linewidth=1.5)
    for axis in (speed, budget):
        axis.axvspan(runs[-1].on_s, runs[-1].off_s, color="tab:red", alpha=0.12)
        axis.grid(alpha=0.3)
    speed.set_title(title)
    speed.set_ylabel("tokens/s")
    budget.set_ylabel("budget, bits")
    budget.set_xlabel("seconds")
    speed.legend()
    figure.savefig(path, dpi=120)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the plots and result.json.")
@click.option("--seconds", type=float, default=300.0, help="Length of each run.")
@click.option("--disturbed", type=float, default=120.0, help="How long the load or the limit lasts, in the middle.")
@click.option("--runs", type=int, default=1, help="Runs of each disturbance.")
@click.option("--threads", type=int)
@click.option("--engine", help="What the bundle runs on.  [default: its own choice]")
@click.option("--json", "json_path", type=click.Path(path_type=Path, exists=True), help="A file of results/ to renew.")
@click.option("--only", multiple=True, type=click.Choice(list(LIMITS)), help="Some of the disturbances.")
def main(
    bundle: Path,
    out: Path,
    seconds: float,
    disturbed: float,
    runs: int,
    threads: int | None,
    engine: str | None,
    json_path: Path | None,
    only: tuple[str, ...],
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    loaded = Engine.load(bundle, threads=threads, engine=engine)
    loaded.generate(PROMPT, max_tokens=32).text()
    of_bundle = {"model": loaded.manifest.model.name, "target": loaded.manifest.target.name}
    result: dict[str, Any] = {"environment": measured_on(threads=threads or cores(), **of_bundle), "limits": LIMITS}
    click.echo(json.dumps(result["environment"]))
    at_8_bits = replace(POLICIES["fixed"], ceiling_bits=8.0)
    names = only or tuple(LIMITS)
    good = True
    with ExitStack() as stack:
        disturbances: dict[str, Callable[[], Any]] = {
            "load": lambda: program(_BUSY),
            "part": part_of_all,
            "spikes": lambda: program(_SPIKES),
        }
        if "limit" in names:
            disturbances["limit"] = stack.enter_context(Group()).half
        for name in names:
            figures: list[dict[str, float]] = []
            result[name] = {"figures": figures, "runs": []}
            for run in range(runs):
                fixed = None
                if "speed_ratio" in LIMITS[name]:
                    lengths_s = min(seconds, FIXED_S), min(disturbed, FIXED_DISTURBED_S)
                    fixed = record(loaded, at_8_bits, disturbances[name], *lengths_s)
                auto = record(loaded, POLICIES["auto"], disturbances[name], seconds, disturbed)
                figures.append(judge(name, auto, fixed))
                made = [fixed, auto] if fixed else [auto]
                draw(f"{loaded.manifest.model.name}: {name}", made, seconds, out / f"{name}_{run}.png")
                result[name]["runs"].append([asdict(one) for one in made])
                said = f"fixed 8 {fixed.speed_disturbed:.1f} tokens/s, " if fixed else ""
                said += f"auto {auto.speed_disturbed:.1f} tokens/s, calm {auto.speed(0, auto.on_s):.1f} tokens/s"
                click.echo(f"{name} {run}: {said}")
                for at_s, bits, reason in auto.changes:
                    click.echo(f"  {at_s:6.1f} s  {bits:g} bits  {reason}")
            for figure, (way, limit) in LIMITS[name].items():
                values = [one[figure] for one in figures]
                median = statistics.median(values)
                good &= holds(name, figure, median)
                missed = "" if holds(name, figure, median) else "MISSED"
                click.echo(
                    f"  {name} {figure:12} {median:8.2f} ({min(values):.2f} to {max(values):.2f})  "
                    f"needed {way} {limit:g}  {missed}"
                )
    (out / "result.json").write_text(json.dumps(result))
    if json_path is not None:
        write_rows(json_path, result["environment"], {name: result[name]["figures"] for name in names})
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
