"""The controller on this machine: generation while another program takes a core, and under a cgroup limit.

Each disturbance is run twice, at a fixed 8 bits and under the policy ``auto``, on the same schedule: calm, disturbed,
calm again.  What must hold: the budget falls within 3 s, is back within 60 s, changes at most 6 times, and
tokens/s under the disturbance are at least 1.5 times those of 8 bits.  Prints the machine, a table and raw JSON, and
draws every run; the exit code tells whether all held.  The cgroup part needs root, and a cgroup v1 or v2 that can be
written.

    python tests/benchmarks/closed_loop.py bundles/smollm2-135m-host --out closed_loop [--seconds 300] [--disturbed 120]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
LIMITS = {"drop_s": 3.0, "back_s": 60.0, "changes": 6, "speed_ratio": 1.5}


@contextmanager
def one_busy_core() -> Iterator[None]:
    """Another program that wants a whole core."""
    load = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        load.kill()
        load.wait()


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


def judge(fixed: Recording, auto: Recording) -> dict[str, float]:
    """The figures of ``LIMITS``; infinite for what never happened."""
    never = float("inf")
    drops = [at - auto.on_s for at, _, _ in auto.changes if at >= auto.on_s]
    backs = [at - auto.off_s for at, bits, _ in auto.changes if at >= auto.off_s and bits == 8.0]
    return {
        "drop_s": min(drops, default=never),
        "back_s": min(backs, default=never),
        "changes": len(auto.changes),
        "speed_ratio": auto.speed_disturbed / fixed.speed_disturbed,
    }


def holds(name: str, value: float) -> bool:
    return value >= LIMITS[name] if name == "speed_ratio" else value <= LIMITS[name]


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
@click.option("--seconds", type=float, default=300.0, help="Length of each of the four runs.")
@click.option("--disturbed", type=float, default=120.0, help="How long the load or the limit lasts, in the middle.")
@click.option("--threads", type=int)
@click.option("--engine", help="What the bundle runs on.  [default: its own choice]")
@click.option("--only", type=click.Choice(["load", "limit"]), help="One of the two disturbances.")
def main(
    bundle: Path, out: Path, seconds: float, disturbed: float, threads: int | None, engine: str | None, only: str | None
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    loaded = Engine.load(bundle, threads=threads, engine=engine)
    loaded.generate(PROMPT, max_tokens=32).text()
    of_bundle = {"model": loaded.manifest.model.name, "target": loaded.manifest.target.name}
    result: dict[str, Any] = {"environment": measured_on(threads=threads or cores(), **of_bundle), "limits": LIMITS}
    click.echo(json.dumps(result["environment"]))
    policies = [replace(POLICIES["fixed"], ceiling_bits=8.0), POLICIES["auto"]]
    good = True
    with Group() as group:
        disturbances = {"load": one_busy_core, f"cgroup v{group.version} limit": group.half}
        for name, disturb in disturbances.items():
            if only is not None and not name.endswith(only):
                continue
            fixed, auto = (record(loaded, policy, disturb, seconds, disturbed) for policy in policies)
            figures = judge(fixed, auto)
            draw(f"{loaded.manifest.model.name}: {name}", [fixed, auto], seconds, out / f"{name.replace(' ', '_')}.png")
            result[name] = {"figures": figures, "runs": [asdict(fixed), asdict(auto)]}
            click.echo(
                f"{name}: fixed 8 {fixed.speed_disturbed:.1f} tokens/s, auto {auto.speed_disturbed:.1f} tokens/s"
            )
            for figure, value in figures.items():
                good &= holds(figure, value)
                click.echo(
                    f"  {figure:12} {value:8.2f}  needed {LIMITS[figure]:g}  {'' if holds(figure, value) else 'MISSED'}"
                )
            for at_s, bits, reason in auto.changes:
                click.echo(f"  {at_s:6.1f} s  {bits:g} bits  {reason}")
    (out / "result.json").write_text(json.dumps(result))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
