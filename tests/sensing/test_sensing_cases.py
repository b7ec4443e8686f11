"""Boards and drivers that were once misread, each with siblings of its kind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from boards import Files, clocks, cooling, folder, linux, own_group, zone
from machines import settled
from tiny_bundle import facts
from trees import Clock, Commands, Mailbox, build, write

from mbq_runtime.control.controller import start, step
from mbq_runtime.control.policy import POLICIES
from mbq_runtime.engine.threads import cores
from mbq_runtime.sensing import Kind, Readings, Sensors, Signal, aggregate

_SUPPLY = "/sys/class/power_supply"
_MAIN = {"type": "Battery", "status": "Charging", "energy_now": 30_000_000, "energy_full": 50_000_000}


def look(root: Path) -> tuple[list[Signal], Readings]:
    signals = settled(Sensors(root, Clock(), Commands({}), Mailbox()))
    return signals, aggregate(signals, 0)


# A limit is not taken for granted.


@pytest.mark.parametrize(
    ("model", "limit_c"),
    [
        ("Raspberry Pi 5 Model B Rev 1.0", 80.0),
        ("Raspberry Pi Compute Module 5 Rev 1.0", 80.0),
        ("Raspberry Pi 4 Model B Rev 1.5", 80.0),
        ("Raspberry Pi Zero 2 W Rev 1.0", 80.0),
        ("Raspberry Pi 3 Model B Plus Rev 1.3", 60.0),
        ("Orange Pi 5", None),
        ("", None),
    ],
)
def test_the_limit_of_a_board_without_a_device_tree(tmp_path: Path, model: str, limit_c: float | None) -> None:
    build(tmp_path, zone(0, "cpu-thermal", 62000, ("critical", 110000)))
    write(tmp_path, "/proc/cpuinfo", f"processor\t: 0\n\nModel\t\t: {model}")
    assert look(tmp_path)[1].throttle_temp_c == limit_c


# The processors of this process.


@pytest.mark.parametrize(
    ("allowed", "online", "count"),
    [
        ("12-15", 4, 4),  # the numbers of an LXC host
        ("2-5", 4, 4),  # likewise, and some of them exist here too
        ("1,3,5,7", 4, 4),
        ("0-127", 4, 4),  # a virtual machine to which processors can be added
        ("2-3", 4, 2),  # taskset
    ],
)
def test_the_processors_of_containers_and_virtual_machines(
    tmp_path: Path, allowed: str, online: int, count: int
) -> None:
    build(tmp_path, linux(online, 0.5, 1.0, allowed=allowed)[0])
    assert look(tmp_path)[1].available_cpus == count


@pytest.mark.parametrize("broken", ["", "x", "4711 (mbq) S", f"1 (mbq) {'x ' * 40}"])
def test_a_reason_has_no_text_of_python(tmp_path: Path, broken: str) -> None:
    build(tmp_path, linux(4, 0.5, 1.0)[0])
    write(tmp_path, "/proc/self/stat", broken)
    (load,) = [one for one in look(tmp_path)[0] if one.kind is Kind.FOREIGN_LOAD]
    assert load.problem
    assert not any(word in load.problem for word in ("Error", "literal", "index", "range"))


# Batteries of other devices.


@pytest.mark.parametrize(
    "name",
    ["sony_controller_battery_a4:53:85:01:02:03", "nintendo_switch_controller_battery_1", "hidpp_battery_0",
     "hid-a4:53:85:01:02:03-battery", "wacom_battery_2", "xpad_battery", "device0"],
)  # fmt: skip
@pytest.mark.parametrize("online", [0, 1])
def test_the_battery_of_another_device_is_not_the_machines(tmp_path: Path, name: str, online: int) -> None:
    status = "Charging" if online else "Discharging"
    build(tmp_path, folder(f"{_SUPPLY}/BAT0", **{**_MAIN, "status": status}))
    build(tmp_path, folder(f"{_SUPPLY}/AC", type="Mains", online=online))
    build(tmp_path, folder(f"{_SUPPLY}/{name}", type="Battery", status="Discharging", capacity=12))
    readings = look(tmp_path)[1]
    assert (readings.discharging, readings.battery_fraction) == (not online, 0.6)


def test_a_gamepad_at_a_machine_without_a_battery(tmp_path: Path) -> None:
    build(tmp_path, folder(f"{_SUPPLY}/ps-controller-battery-a4:53:85:01:02:03", type="Battery", status="Discharging",
                           capacity=12))  # fmt: skip
    readings = look(tmp_path)[1]
    assert (readings.discharging, readings.battery_fraction) == (None, None)


def test_a_battery_is_known_as_another_devices_by_its_place(tmp_path: Path) -> None:
    device = "/sys/devices/pci0000:00/usb1/1-2/0003:054C:0CE6.0009/power_supply/power"
    build(tmp_path, folder(device, type="Battery", status="Discharging", capacity=12, voltage_now=3700000))
    write(tmp_path, f"{_SUPPLY}/power", f"-> {device}")
    assert look(tmp_path)[1].discharging is None


@pytest.mark.parametrize("name", ["BAT0", "BATT", "axp20x-battery", "rk-bat", "max170xx_battery", "cw2015-battery"])
def test_the_machines_own_battery_by_names_of_many_drivers(tmp_path: Path, name: str) -> None:
    build(tmp_path, folder(f"{_SUPPLY}/{name}", type="Battery", status="Discharging", capacity=40))
    readings = look(tmp_path)[1]
    assert (readings.discharging, readings.battery_fraction) == (True, 0.4)


# Charge, and whether it runs on battery.


@pytest.mark.parametrize(
    "more",
    [{}, {"charge_now": 1_000_000}, {"energy_now": 1_000_000, "energy_full": 0}, {"charge_now": 5, "charge_full": 4}],
)
def test_a_battery_without_the_size_it_has_when_full(tmp_path: Path, more: dict[str, int]) -> None:
    build(tmp_path, folder(f"{_SUPPLY}/BAT0", type="Battery", status="Discharging", capacity=25, **more))
    readings = look(tmp_path)[1]
    assert (readings.battery_fraction, readings.battery_energy_wh) == (0.25, None)


@pytest.mark.parametrize(
    ("flow", "online", "discharging", "power_w"),
    [
        ({"power_now": 0}, 0, False, None),  # the charger is not reported
        ({"power_now": 0}, None, False, None),
        ({"current_now": 0, "voltage_now": 12_000_000}, 0, False, None),
        ({"power_now": 6_000_000}, 0, True, 6.0),
        ({"power_now": 6_000_000}, 1, False, None),
        ({"power_now": 6_000_000}, None, None, None),
    ],
)
def test_a_battery_that_does_not_know_its_status(
    tmp_path: Path, flow: dict[str, int], online: int | None, discharging: bool | None, power_w: float | None
) -> None:
    build(tmp_path, folder(f"{_SUPPLY}/BAT0", type="Battery", status="Unknown", capacity=80, **flow))
    if online is not None:
        build(tmp_path, folder(f"{_SUPPLY}/AC", type="Mains", online=online))
    signals, readings = look(tmp_path)
    assert (readings.discharging, readings.power_w) == (discharging, power_w)
    (power,) = [one for one in signals if one.kind is Kind.BATTERY_POWER]
    assert power.value != 0


# A user's own limit of the clock.


def budget(*readings: Readings) -> float:
    policy = POLICIES["auto"].within(facts())
    state, now_s = start(policy), 0.0
    for one in readings:
        for _ in range(60):
            now_s += 0.5
            decision = step(state, one, now_s, policy)
            state = decision.state
    return decision.budget


def capped(root: Path, temp: int | None, *trips: tuple[str, int], fan: bool = False) -> Readings:
    files: Files = {**linux(4, 0.0, 1.0)[0], **own_group(), **clocks(0, "0 1 2 3", 2400000, 1200000, 1200000)}
    if temp is not None:
        files |= zone(0, "cpu-thermal", temp, *trips)
    if fan:
        files |= cooling(0, "pwm-fan", 1, 4)
    return look(build(root, files))[1]


@pytest.mark.parametrize(
    ("temp", "trips", "fan", "pressed"),
    [
        (45000, (("critical", 110000),), False, False),
        (45000, (("passive", 85000),), True, False),
        (45000, (), False, False),
        (None, (), False, False),
        (72000, (("passive", 85000),), False, False),  # warm, as under load
        (72000, (), False, False),
        (84000, (("passive", 85000),), False, True),
        (90000, (), False, True),
    ],
)
def test_a_limit_of_the_clock_counts_only_near_the_limit_of_heat(
    tmp_path: Path, temp: int | None, trips: tuple[tuple[str, int], ...], fan: bool, pressed: bool
) -> None:
    assert (budget(capped(tmp_path, temp, *trips, fan=fan)) < 8) == pressed


def test_a_limit_of_the_clock_that_falls_counts_without_a_temperature() -> None:
    free = Readings(0.0, cpu_freq_fraction=0.8)
    assert budget(free) == 8
    assert budget(free, Readings(0.0, cpu_freq_fraction=0.4)) < 8


# Big cores without capacities.


@pytest.mark.parametrize(
    ("clocks_khz", "parts", "count"),
    [
        ([1804800] * 6 + [2304000] * 2, (), 2),
        ([1708800] * 6 + [2016000] * 2, (), 2),
        ([2016000] * 4 + [2803200] * 3 + [3187200], (), 4),
        ([2000000] * 6 + [2200000] * 2, ["0xd05"] * 6 + ["0xd0b"] * 2, 2),
        ([1800000] * 4 + [2300000] * 4, ["0xd03"] * 8, 8),  # one kind of core at two clocks
        ([4700000] * 6 + [5000000] * 2, (), 8),  # favoured cores of a PC
        ([0] * 4, (), 4),
    ],
)
def test_big_cores_by_their_clocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clocks_khz: list[int], parts: list[str], count: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(len(clocks_khz))))
    for cpu, khz in enumerate(clocks_khz):
        write(tmp_path, f"/sys/devices/system/cpu/cpu{cpu}/cpufreq/cpuinfo_max_freq", str(khz or ""))
    rows = [f"processor\t: {cpu}\nCPU part\t: {part}\n" for cpu, part in enumerate(parts)]
    write(tmp_path, "/proc/cpuinfo", "\n".join(rows))
    assert cores(tmp_path) == count
