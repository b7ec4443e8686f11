from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mbq_runtime import Engine, bench, cli
from mbq_runtime.bench import Workload
from mbq_runtime.sensing.readings import Readings


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = cli.main([str(arg) for arg in args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


class Paced:
    """An engine whose passes take a known time, and that records its calls."""

    def __init__(self, *seconds_per_token: float) -> None:
        self.manifest = SimpleNamespace(
            model=SimpleNamespace(name="paced", parameters=2_500_000), total_bytes=3 << 20,
        )  # fmt: skip
        self._paces = iter(seconds_per_token)
        self.asked: list[tuple[list[int], float]] = []

    def time_passes(self, sizes: list[int], avg_bits: float) -> Any:
        self.asked.append((sizes, avg_bits))
        pace = next(self._paces)
        return SimpleNamespace(seconds=tuple(pace * size for size in sizes), avg_bits_used=avg_bits + 0.01)


def looks(*readings: Readings) -> Callable[[], Readings]:
    left = iter(readings)
    return lambda: next(left)


def test_figures_by_hand() -> None:
    engine: Any = Paced(9.0, 0.10, 0.20, 0.40)  # the first run warms up and does not count
    seen = [
        Readings(0.0, temp_c=t, power_w=w, heat_throttled=h, undervoltage=False)
        for t, w, h in ((61.0, 4.0, False), (65.5, 5.0, True), (63.0, 6.0, False))
    ]
    row = bench.run(engine, 3, Workload(0, 4, 5.0), 3, looks(*seen))
    assert engine.asked == [([1, 1, 1, 1], 5.0)] * 4
    assert (row.test, row.n_prompt, row.n_gen, row.n_threads, row.bits) == ("tg4", 0, 4, 3, 5.0)
    assert row.samples_ts == pytest.approx([10.0, 5.0, 2.5])
    assert (row.avg_ts, row.stddev_ts) == pytest.approx((17.5 / 3, statistics.stdev([10.0, 5.0, 2.5])))
    assert row.samples_ns == [400_000_000, 800_000_000, 1_600_000_000]
    assert row.avg_ns == round(2.8e9 / 3)
    assert row.avg_bits_used == pytest.approx(5.01)
    assert (row.power_w, row.temp_c, row.slowed_by) == (5.0, 65.5, "heat")
    assert row.energy_j_per_token == pytest.approx(5.0 * 2.8 / 3 / 4)


def test_a_prompt_is_one_pass() -> None:
    engine: Any = Paced(1.0, 0.5)
    row = bench.run(engine, 1, Workload(128, 0, 8.0), 1, looks(Readings(0.0)))
    assert engine.asked == [([128], 8.0)] * 2
    assert (row.test, row.avg_ts, row.stddev_ts, row.stddev_ns) == ("pp128", 2.0, 0.0, 0)


def test_a_sensor_that_was_silent_once_gives_no_energy() -> None:
    engine: Any = Paced(1.0, 1.0, 1.0)
    row = bench.run(engine, 1, Workload(8, 0, 8.0), 2, looks(Readings(0.0, power_w=5.0), Readings(0.0)))
    assert (row.power_w, row.energy_j_per_token, row.temp_c) == (None, None, None)


@pytest.mark.parametrize(
    ("heat", "supply", "expected"),
    [
        (None, None, None), (False, None, ""), (False, False, ""), (True, None, "heat"), (None, True, "supply"),
        (True, True, "heat+supply"),
    ],
)  # fmt: skip
def test_what_slowed_the_board(heat: bool | None, supply: bool | None, expected: str | None) -> None:
    engine: Any = Paced(1.0, 1.0)
    reading = Readings(0.0, heat_throttled=heat, undervoltage=supply)
    assert bench.run(engine, 1, Workload(8, 0, 8.0), 1, looks(reading)).slowed_by == expected


def test_environment_is_read_from_the_board(tmp_path: Path) -> None:
    for path, text in {
        "sys/firmware/devicetree/base/model": "Raspberry Pi 5 Model B Rev 1.0\0",
        "proc/cpuinfo": "processor\t: 0\nmodel name\t: Cortex-A76\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "ondemand\n",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(text)
    found = bench.environment(lambda: Readings(0.0, temp_c=51.0, power_w=3.0), tmp_path)
    assert (found["board"], found["cpu"], found["governor"]) == (
        "Raspberry Pi 5 Model B Rev 1.0",
        "Cortex-A76",
        "ondemand",
    )
    assert (found["temp_c"], found["power_sensor"]) == (51.0, True)
    empty = bench.environment(lambda: Readings(0.0), tmp_path / "none")
    assert (empty["board"], empty["governor"], empty["temp_c"], empty["power_sensor"]) == (None, None, None, False)
    assert empty["packages"]["numpy"]


def test_json(capsys: pytest.CaptureFixture[str], bundle: Path, loaded: Engine) -> None:
    code, out, err = run(
        capsys, "bench", bundle, "-p", "16,24", "-n", 8, "-r", 2, "--bits", "4,8", "-t", 1, "-o", "json"
    )
    assert (code, err) == (0, "")
    rows = json.loads(out)
    assert [(row["bits"], row["test"]) for row in rows] == [
        (4.0, "pp16"), (4.0, "pp24"), (8.0, "pp16"), (8.0, "pp24"), (4.0, "tg8"), (8.0, "tg8"),
    ]  # fmt: skip
    for row in rows:
        tokens = row["n_prompt"] + row["n_gen"]
        assert row["samples_ts"] == pytest.approx([tokens * 1e9 / ns for ns in row["samples_ns"]], rel=1e-3)
        assert row["avg_ts"] == pytest.approx(statistics.fmean(row["samples_ts"]))
        assert row["avg_bits_used"] == pytest.approx(loaded.time_passes([tokens], row["bits"]).avg_bits_used)
        assert (row["n_threads"], row["model"], row["model_n_params"]) == (1, "tiny", 50_000)
        assert row["environment"]["cpu"]


def test_markdown_is_a_table_below_the_environment(capsys: pytest.CaptureFixture[str], bundle: Path) -> None:
    code, out, _ = run(capsys, "bench", bundle, "-p", 16, "-n", 0, "-r", 1, "-t", 1)
    assert code == 0
    above, _, table = out.partition("\n\n")
    assert "cpu: " in above
    heading, rule, row = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()]
    assert heading == [
        "model", "size", "params", "threads", "bits", "bits used", "test", "t/s", "W", "J/token", "°C", "slowed by",
    ]  # fmt: skip
    assert set("".join(rule)) == {"-", ":"}
    cells = dict(zip(heading, row, strict=True))
    assert (cells["model"], cells["params"], cells["bits"], cells["test"]) == ("tiny", "0.05 M", "8", "pp16")
    assert cells["t/s"].endswith("± 0.00")


def test_unknown_is_written_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    engine: Any = Paced(1.0, 1.0, 1.0, 1.0)
    rows = [
        bench.run(engine, 1, Workload(8, 0, 8.0), 1, looks(Readings(0.0))),
        bench.run(
            engine, 1, Workload(8, 0, 8.0), 1, looks(Readings(0.0, power_w=5.0, temp_c=60.0, heat_throttled=False))
        ),
    ]
    env = {"cpu": "a", "cpus": 2, "board": None}
    unknown, known = bench.FORMATS["md"](rows, env).splitlines()[-2:]
    assert unknown.endswith("| unknown | unknown | unknown | unknown |")
    assert known.endswith("| 5.00 | 5.000 | 60.0 | nothing |")
    assert "board: unknown" in bench.FORMATS["md"](rows, env)
    first, second = csv.DictReader(io.StringIO(bench.FORMATS["csv"](rows, env)))
    assert (first["power_w"], second["power_w"], second["test"], second["cpu"]) == ("", "5.0", "pp8", "a")
    assert "samples_ns" not in first
    assert len(astuple(rows[0])) > len(first) - 2


def test_numbers_above_the_table_stay_numbers() -> None:
    engine: Any = Paced(1.0, 1.0, 1.0, 1.0)
    rows = [bench.run(engine, 1, Workload(8, 0, 8.0), 1, looks(Readings(0.0)))]
    env = {"cpus": 1, "load": 0.0, "temp_c": 1.0, "power_sensor": False, "packages": {"numpy": None, "other": True}}
    assert bench.FORMATS["md"](rows, env).splitlines()[:5] == [
        "cpus: 1", "load: 0.0", "temp_c: 1.0", "power_sensor: no", "packages: numpy unknown, other yes",
    ]  # fmt: skip


def test_several_thread_counts(capsys: pytest.CaptureFixture[str], bundle: Path) -> None:
    code, out, _ = run(capsys, "bench", bundle, "-p", 0, "-n", 2, "-r", 1, "-t", "1,2", "-o", "csv")
    assert code == 0
    assert [row["n_threads"] for row in csv.DictReader(io.StringIO(out))] == ["1", "2"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-p", "many"], "-p 'many': expected numbers"),
        (["-n", "-3"], "-n '-3': needed numbers from 0"),
        (["-r", "0"], "-r 0: needed at least 1"),
        (["-p", "0", "-n", "0"], "nothing to measure"),
        (["--bits", "2"], "average bits 2.0"),
        (["-p", "97"], "97 tokens to time: needed 1 to 96"),
        (["-t", "0"], "threads 0"),
    ],
)
def test_refusals(capsys: pytest.CaptureFixture[str], bundle: Path, args: list[str], message: str) -> None:
    code, out, err = run(capsys, "bench", bundle, *args)
    assert (code, out) == (2, "")
    assert message in err
