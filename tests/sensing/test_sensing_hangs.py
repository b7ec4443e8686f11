"""A sensor that never answers, answers late, or comes and goes: the caller does not wait; other sensors are read."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from boards import Board
from boards_arm import ORIN_NANO, PI_5
from boards_pc import PHONE_UNDER_TERMUX, TERMUX, THINKPAD
from machines import Machine, settled, until, waits
from test_sensing_faults import batches, check, concerned, healthy, measured
from trees import Clock, Commands, Mailbox, answer, build, hang, remove

from mbq_runtime.sensing import Kind, Sensors, Signal, aggregate
from mbq_runtime.sensing.sensors import _PATIENCE_S

ZONE = "/sys/class/thermal/thermal_zone"
TEMP = f"{ZONE}0/temp"


def of(signals: list[Signal], path: str) -> list[Signal]:
    return [one for one in signals if one.source == path or path.startswith(one.source + "/")]


def test_hanging_from_the_start(machine: Machine) -> None:
    """Files of a few devices hang: the call returns, other devices are read, and these are read later."""
    before = healthy(machine)
    for files in batches(machine.board, before, "hanging"):
        for file in files:
            machine.smash(file, hang)
        machine.start()
        others_answer(machine, *files)
        machine.go_on()
        check(others_answer(machine, *files), before, files)
        machine.mend()


def others_answer(machine: Machine, *files: str) -> list[Signal]:
    """The signals after all sensors answered that do not need the files."""

    def hung(one: Signal) -> bool:
        return any(concerned(one.source, file) for file in files)

    return machine.until(lambda signals: not any(waits(one) and not hung(one) for one in signals))


@pytest.mark.parametrize("board", [PI_5, ORIN_NANO, THINKPAD], ids=["pi-5", "orin-nano", "thinkpad"])
def test_read_returns_in_time_although_sensors_never_do(board: Board, tmp_path: Path) -> None:
    machine = Machine(board, tmp_path)
    files = measured(board, healthy(machine))
    hung = [file for file in files if "/thermal_zone" in file or "/proc/pressure" in file]
    assert len(hung) >= 4
    for file in hung:
        machine.smash(file, hang)
    machine.start()
    # A busy machine needs longer for both.
    times_s: dict[Callable[[], object], list[float]] = {
        machine.sensors.read: [],
        lambda: threading.Event().wait(_PATIENCE_S): [],
    }
    for _ in range(25):
        for call, taken_s in times_s.items():
            started_s = time.monotonic()
            call()
            taken_s.append(time.monotonic() - started_s)
    read_s, patience_s = (statistics.median(taken_s) for taken_s in times_s.values())
    assert read_s < 2 * patience_s
    machine.mend()


def test_the_value_of_before_stands_for_three_seconds(tmp_path: Path) -> None:
    machine = Machine(PI_5, tmp_path)
    machine.settled()
    machine.smash(TEMP, hang)
    machine.clock.now_s += 2
    (zone,) = of(machine.sensors.signals(), TEMP)
    assert (zone.value, zone.problem, zone.age_s) == (82.3, None, 2)
    machine.clock.now_s += 2
    (zone,) = of(machine.sensors.signals(), TEMP)
    assert (zone.name, zone.value, zone.problem, zone.age_s) == ("cpu-thermal", None, "no answer for 4 s", 4)
    machine.mend()


def test_a_late_answer_counts(tmp_path: Path) -> None:
    machine = Machine(PI_5, tmp_path)
    machine.smash(TEMP, hang)
    machine.start()
    others_answer(machine, TEMP)
    machine.clock.now_s += 1.5
    signals = others_answer(machine, TEMP)
    (zone,) = [one for one in signals if one.name == "cpu-thermal"]
    assert (zone.value, zone.problem) == (None, "no answer for 1.5 s")
    assert aggregate(signals, 0).temp_c == 82.3  # the chip's mirror of the same sensor
    answer(tmp_path, TEMP, "71500\n")
    machine.until(lambda signals: any(one.name == "cpu-thermal" and one.value == 71.5 for one in signals))
    machine.mend()


def test_threads_are_no_more_than_hung_sensors(tmp_path: Path) -> None:
    machine = Machine(ORIN_NANO, tmp_path)
    before = threading.active_count()
    for number in (0, 1, 8):
        machine.smash(f"{ZONE}{number}/temp", hang)
    for _ in range(30):
        machine.sensors.read()
    machine.until(lambda signals: sum(waits(one) for one in signals) == 3)
    assert threading.active_count() <= before + 3 + 1  # and the one that reads the rest
    machine.mend()
    machine.until(lambda _: threading.active_count() <= before)


def battery_signals(machine: Machine, known: bool) -> list[Signal]:
    """The signals of BAT0 once all of them have a value, or once none has."""

    def of_battery(signals: Sequence[Signal]) -> list[Signal]:
        return [one for one in signals if one.name == "BAT0"]

    return of_battery(machine.until(lambda now: all((one.value is not None) is known for one in of_battery(now))))


def test_a_device_that_goes_and_comes_back(tmp_path: Path) -> None:
    machine = Machine(THINKPAD, tmp_path)
    machine.settled()
    battery = "/sys/devices/virtual/power_supply/BAT0"
    remove(machine.root, battery)
    gone = battery_signals(machine, known=False)
    assert {one.kind for one in gone} == {Kind.DISCHARGING, Kind.BATTERY, Kind.BATTERY_ENERGY, Kind.BATTERY_POWER}
    assert {one.problem for one in gone} == {"no such file or directory"}
    readings = aggregate(gone, 0)
    assert (readings.discharging, readings.battery_fraction, readings.power_w) == (None, None, None)
    build(machine.root, {path: text for path, text in THINKPAD.files.items() if "/BAT0/" in path})
    (share,) = [one for one in battery_signals(machine, known=True) if one.kind is Kind.BATTERY]
    assert share.value == pytest.approx(38.22 / 52.16)


def test_a_device_plugged_in_later_is_found(tmp_path: Path) -> None:
    machine = Machine(PI_5, tmp_path)
    machine.settled()
    build(tmp_path, {"/sys/class/hwmon/hwmon9/name": "ina219", "/sys/class/hwmon/hwmon9/power1_input": "6400000"})
    assert machine.sensors.read().power_w == pytest.approx(2.948, abs=0.001)
    machine.clock.now_s += 10
    (hat,) = [one for one in machine.settled() if one.kind is Kind.POWER]
    assert (hat.name, hat.source) == ("ina219 power1", "/sys/class/hwmon/hwmon9/power1_input")
    assert machine.sensors.read().power_w == pytest.approx(6.4)  # the whole board before a part of it


def test_a_phone_that_answers_after_seconds_is_asked_once(tmp_path: Path) -> None:
    asked, may_answer = [], threading.Event()
    answers = Commands(PHONE_UNDER_TERMUX.commands)

    def slow(command: list[str], timeout_s: float) -> str:
        asked.append(timeout_s)
        assert may_answer.wait(20)
        return answers(command, timeout_s)

    clock = Clock()
    sensors = Sensors(build(tmp_path, PHONE_UNDER_TERMUX.files), clock, slow)
    for _ in range(5):
        assert sensors.read().battery_fraction is None
        clock.now_s += 1
    may_answer.set()
    until(sensors, lambda signals: aggregate(signals, 0).battery_fraction == 0.76)
    clock.now_s += 29
    assert sensors.read().battery_fraction == 0.76
    assert asked == [10.0]
    clock.now_s += 2
    until(sensors, lambda _: len(asked) == 2)


def test_a_phone_that_fails_is_given_up(tmp_path: Path) -> None:
    commands = Commands({(TERMUX,): "Timeout!"})
    clock = Clock()
    sensors = Sensors(build(tmp_path, PHONE_UNDER_TERMUX.files), clock, commands)
    problems = []
    for _ in range(6):
        problems += [one.problem for one in settled(sensors) if one.source == TERMUX]
        clock.now_s += 31
    assert problems == ["its answer is not a battery status"] * 3 + ["not called again after 3 failures"] * 3
    assert len(commands.asked) == 3


def test_a_mailbox_that_hangs_leaves_the_rest(tmp_path: Path) -> None:
    held = threading.Event()

    def never(device: int, request: int, message: bytearray) -> None:
        held.wait(60)

    sensors = Sensors(build(tmp_path, PI_5.files), Clock(), Commands({}), never)
    signals = until(sensors, lambda signals: sum(waits(one) for one in signals) == 2)  # both that ask the mailbox
    readings = aggregate(signals, 0)
    assert (readings.temp_c, readings.heat_throttled, readings.undervoltage) == (82.3, None, False)
    held.set()


def test_many_callers_at_once(tmp_path: Path) -> None:
    """Each thread gets complete readings, and no sensor is read by two threads at the same time."""
    inside, most = 0, 0
    mailbox, lock = Mailbox(0), threading.Lock()

    def counting(device: int, request: int, message: bytearray) -> None:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        mailbox(device, request, message)
        with lock:
            inside -= 1

    machine = Machine(PI_5, tmp_path)
    machine.sensors = Sensors(tmp_path, machine.clock, machine.commands, counting)
    machine.settled()
    wrong: list[object] = []

    def caller() -> None:
        for _ in range(20):
            readings = machine.sensors.read()
            if (readings.temp_c, readings.heat_throttled) != (82.3, False):
                wrong.append(readings)

    callers = [threading.Thread(target=caller) for _ in range(8)]
    for one in callers:
        one.start()
    for one in callers:
        one.join()
    assert not wrong
    assert most <= 2  # throttle bits and power chip are two sensors


def test_a_reader_that_breaks_is_one_unknown_signal(tmp_path: Path) -> None:
    def broken(device: int, request: int, message: bytearray) -> None:
        raise ZeroDivisionError("nobody has thought of this")

    sensors = Sensors(build(tmp_path, PI_5.files), Clock(), Commands({}), broken)
    signals = settled(sensors)
    (bits,) = [one for one in signals if one.kind is Kind.THROTTLE_BITS]
    assert bits.problem == "it has a form that is not known; mbq -v shows more"
    assert aggregate(signals, 0).temp_c == 82.3
