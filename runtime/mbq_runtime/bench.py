"""Measures a bundle's speed at several budgets, with the heat and energy of each.

Workloads have the names of llama-bench: pp128 reads a prompt of 128 tokens, tg64 writes 64 tokens from an empty
context.  Both use random tokens, without tokenizer and sampling.  Each runs once to warm up, and is then repeated.  No
repetition is left out.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from . import tables
from .engine import Engine
from .machine import cpu_name
from .sensing.readings import Readings

_PACKAGES = ("mbq-export", "onnxruntime", "onnxruntime-genai", "apache-tvm", "apache-tvm-ffi", "numpy")


@dataclass(frozen=True)
class Workload:
    """What is timed.

    prompt: tokens of a prompt to read, or 0.
    new: tokens to write, or 0; one of the two is 0.
    bits: budget in average bits per weight.

    >>> Workload(prompt=128, new=0, bits=4.0).name, Workload(prompt=0, new=2, bits=4.0).passes
    ('pp128', [1, 1])
    """

    prompt: int
    new: int
    bits: float

    @property
    def name(self) -> str:
        """Its name in llama-bench."""
        return f"pp{self.prompt}" if self.prompt else f"tg{self.new}"

    @property
    def tokens(self) -> int:
        """Tokens read or written."""
        return self.prompt or self.new

    @property
    def passes(self) -> list[int]:
        """Tokens of each pass."""
        return [self.prompt] if self.prompt else [1] * self.new


@dataclass(frozen=True)
class BenchResult:
    """The figures of a workload.  A field that llama-bench's JSON also has bears the same name.

    test_time: start, ISO 8601, UTC.
    model: name of the model.
    model_size: bytes of the bundle.
    model_n_params: number of weights.
    n_threads: processor threads.
    n_prompt: tokens read, or 0.
    n_gen: tokens written, or 0.
    test: name of the workload.
    bits: budget in average bits per weight.
    avg_bits_used: average bits per weight that the routers chose.
    avg_ns, stddev_ns: nanoseconds of a repetition: mean, and standard deviation (0 for a single one).
    avg_ts, stddev_ts: tokens/s: mean, and standard deviation (0 for a single repetition).
    samples_ns: nanoseconds of each repetition.
    samples_ts: tokens/s of each repetition.
    power_w: mean of the readings after each repetition; None without a sensor.
    energy_j_per_token: mean power times the time of a token; None without a sensor.
    temp_c: highest of the readings after each repetition; None without a sensor.
    slowed_by: "heat", "supply", "heat+supply" or "" for nothing, as the board reports; None when it does not report.
    """

    test_time: str
    model: str
    model_size: int
    model_n_params: int
    n_threads: int
    n_prompt: int
    n_gen: int
    test: str
    bits: float
    avg_bits_used: float
    avg_ns: int
    stddev_ns: int
    avg_ts: float
    stddev_ts: float
    samples_ns: list[int]
    samples_ts: list[float]
    power_w: float | None
    energy_j_per_token: float | None
    temp_c: float | None
    slowed_by: str | None


def run(engine: Engine, threads: int, test: Workload, repetitions: int, look: Callable[[], Readings]) -> BenchResult:
    """Run a workload once to warm up, and then repeatedly.

    Args:
        engine: a loaded bundle.
        threads: processor threads that the engine was loaded with.
        test: the workload.
        repetitions: measured runs, at least 1.
        look: reads the board's sensors.

    Raises:
        UsageError: the workload does not fit into the bundle's context, or the budget is out of range.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    used = engine.time_passes(test.passes, test.bits).avg_bits_used
    seconds, seen = [], []
    for _ in range(repetitions):
        seconds.append(sum(engine.time_passes(test.passes, test.bits).seconds))
        seen.append(look())
    speeds = [test.tokens / s for s in seconds]
    powers = [r.power_w for r in seen]
    power_w = statistics.fmean(p for p in powers if p is not None) if None not in powers else None
    temperatures = [r.temp_c for r in seen if r.temp_c is not None]
    model = engine.manifest.model
    return BenchResult(
        test_time=now,
        model=model.name,
        model_size=engine.manifest.total_bytes,
        model_n_params=model.parameters,
        n_threads=threads,
        n_prompt=test.prompt,
        n_gen=test.new,
        test=test.name,
        bits=test.bits,
        avg_bits_used=used,
        avg_ns=round(1e9 * statistics.fmean(seconds)),
        stddev_ns=round(1e9 * _deviation(seconds)),
        avg_ts=statistics.fmean(speeds),
        stddev_ts=_deviation(speeds),
        samples_ns=[round(1e9 * s) for s in seconds],
        samples_ts=speeds,
        power_w=power_w,
        energy_j_per_token=None if power_w is None else power_w * statistics.fmean(seconds) / test.tokens,
        temp_c=max(temperatures, default=None),
        slowed_by=_slowed(seen),
    )


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _slowed(seen: Iterable[Readings]) -> str | None:
    causes = {"heat": [r.heat_throttled for r in seen], "supply": [r.undervoltage for r in seen]}
    found = [cause for cause, flags in causes.items() if any(flags)]
    unknown = all(flag is None for flags in causes.values() for flag in flags)
    return "+".join(found) if found or not unknown else None


def environment(look: Callable[[], Readings], root: Path = Path("/")) -> dict[str, Any]:
    """Describe this machine: board, processor, system, versions, load, and temperature at this moment.

    Args:
        look: reads the board's sensors.
        root: folder that holds ``sys`` and ``proc``.
    """
    reading = look()
    return {
        "board": _text(root / "sys/firmware/devicetree/base/model"),
        "cpu": cpu_name(root) or platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "governor": _text(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "load": round(os.getloadavg()[0], 2),
        "temp_c": reading.temp_c,
        "power_sensor": reading.power_w is not None,
    }


def _text(path: Path) -> str | None:
    try:
        return path.read_text("utf-8", errors="replace").strip("\0\n ") or None
    except OSError:
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _markdown(rows: Sequence[BenchResult], env: dict[str, Any]) -> str:
    above = [f"{name}: {_said(value)}" for name, value in env.items()]
    cells = ([show(row) for _, show in _COLUMNS] for row in rows)
    return "\n".join([*above, "", tables.markdown([heading for heading, _ in _COLUMNS], cells, words=_WORDS)])


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_said(part)}" for name, part in value.items())
    if isinstance(value, bool):  # 1 is no yes
        return "yes" if value else "no"
    return "unknown" if value is None else str(value)


def _or_unknown(value: float | None, digits: int) -> str:
    return "unknown" if value is None else f"{value:.{digits}f}"


_WORDS = ("model", "test", "slowed by")
_COLUMNS: tuple[tuple[str, Callable[[BenchResult], str]], ...] = (
    ("model", lambda r: r.model),
    ("size", lambda r: f"{r.model_size / 2**20:.2f} MiB"),
    ("params", lambda r: f"{r.model_n_params / 1e6:.2f} M"),
    ("threads", lambda r: str(r.n_threads)),
    ("bits", lambda r: f"{r.bits:g}"),
    ("bits used", lambda r: f"{r.avg_bits_used:.2f}"),
    ("test", lambda r: r.test),
    ("t/s", lambda r: f"{r.avg_ts:.2f} ± {r.stddev_ts:.2f}"),
    ("W", lambda r: _or_unknown(r.power_w, 2)),
    ("J/token", lambda r: _or_unknown(r.energy_j_per_token, 3)),
    ("°C", lambda r: _or_unknown(r.temp_c, 1)),
    ("slowed by", lambda r: "unknown" if r.slowed_by is None else r.slowed_by or "nothing"),
)


def _json(rows: Sequence[BenchResult], env: dict[str, Any]) -> str:
    return json.dumps([{**asdict(row), "environment": env} for row in rows], indent=2, ensure_ascii=False)


def _csv(rows: Sequence[BenchResult], env: dict[str, Any]) -> str:
    """One line for each workload.  Lists, and the rest of the environment, are in JSON alone."""
    flat = [{k: v for k, v in asdict(row).items() if not isinstance(v, list)} for row in rows]
    return tables.comma_separated([*flat[0], "cpu", "cpus"], [[*row.values(), env["cpu"], env["cpus"]] for row in flat])


Format = Callable[[Sequence[BenchResult], dict[str, Any]], str]
"""(results, environment) -> text."""

FORMATS: dict[str, Format] = {"md": _markdown, "json": _json, "csv": _csv}
