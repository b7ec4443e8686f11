"""The sensors of the machine that runs the tests."""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import asdict

import pytest

from mbq_runtime.cli import main
from mbq_runtime.sensing import Kind, Sensors, power


def test_this_machine_is_read_consistently() -> None:
    sensors = Sensors()
    sensors.read()
    spinning = threading.Event()
    spinner = threading.Thread(target=_spin, args=(spinning,), daemon=True)
    spinner.start()
    time.sleep(1)
    readings = sensors.read()
    spinning.set()
    signals = sensors.signals()

    assert readings.time_s == pytest.approx(time.monotonic(), abs=30)
    assert readings.available_cpus is not None
    assert 0 < readings.available_cpus <= len(os.sched_getaffinity(0))
    assert readings.available_memory_bytes is not None
    assert 0 < readings.available_memory_bytes <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for name in ("cpu_freq_fraction", "battery_fraction", "foreign_cpu_fraction", "cpu_pressure",
                 "cgroup_throttled_fraction"):  # fmt: skip
        value = getattr(readings, name)
        assert value is None or 0 <= value <= 1, name
    if readings.temp_c is not None:
        assert -40 < readings.temp_c < 150
    assert (readings.power_w is None) == (power(signals)[0] is None)
    (own,) = [one for one in signals if one.kind is Kind.OWN_LOAD]
    assert own.value is None or 0 < own.value <= len(os.sched_getaffinity(0)) + 0.1  # it spun

    for one in signals:
        assert (one.value is None) == (one.problem is not None), one
        assert one.age_s < 10
        if one.kind is not Kind.MISSING and one.source.startswith(("/proc", "/sys")) and "*" not in one.source:
            assert os.path.exists(one.source), one


def _spin(stop: threading.Event) -> None:
    while not stop.is_set():
        pass


def test_sense_shows_signals_reasons_and_readings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sense"]) == 0
    text = capsys.readouterr().out
    known, _, rest = text.partition("\n\n")
    assert known.splitlines()[0].split() == ["what", "name", "value", "limit", "age", "from"]
    memory = next(line for line in known.splitlines() if line.startswith("memory ") and "/proc/meminfo" in line)
    assert " MB " in memory
    assert "\nreadings\n" in rest
    assert "  available_cpus " in rest
    if not os.path.exists("/dev/vcio"):
        assert "  Raspberry Pi throttle bits  /dev/vcio: not found" in [line[:57] for line in rest.splitlines()]


def test_sense_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sense", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    by_source = {one["source"]: one for one in found["signals"]}
    memory = by_source["/proc/meminfo"]
    assert (memory["kind"], memory["unit"], memory["problem"]) == ("memory", "bytes", None)
    assert 0 < memory["value"] < memory["limit"]
    assert set(found["readings"]) == set(asdict(Sensors().read()))
    assert found["readings"]["available_cpus"] > 0


def test_sense_watches_until_interrupted(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr("mbq_runtime.commands.sense.time.sleep", sleep)
    assert main(["sense", "--json", "--watch"]) == 130
    assert len(capsys.readouterr().out.splitlines()) == 3
