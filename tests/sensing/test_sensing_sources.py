"""Single probes, and the ways signals become readings, where a whole board does not show them."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
from boards import Board, clocks, device_tree, folder, hwmon, linux, own_group, zone
from boards_arm import PI_4, PI_5, PI_5_OLD_KERNEL, RAILS_OF_PI5
from boards_pc import TERMUX
from machines import Machine, settled
from trees import FAULTS, UNREADABLE, Clock, Commands, Mailbox, build, remove, write

from mbq_runtime.sensing import Kind, Readings, Sensors, Signal, aggregate, power
from mbq_runtime.sensing.host import Absent, Unreadable, run_command
from mbq_runtime.sensing.raspberry import describe

_DRIVER = "/sys/bus/platform/drivers/raspberrypi-firmware"


def look(root: Path) -> tuple[list[Signal], Readings]:
    signals = settled(Sensors(root, Clock(), Commands({}), Mailbox()))
    return signals, aggregate(signals, 0)


def of(signals: list[Signal], kind: Kind) -> list[Signal]:
    return [one for one in signals if one.kind is kind]


# Raspberry Pi: four ways to the same fact.


@pytest.mark.parametrize(
    ("gone", "source", "heat"),
    [
        ((), "/dev/vcio", True),
        (("/dev/vcio",), "vcgencmd get_throttled", True),
        (("/dev/vcio", "/usr/bin/vcgencmd"), _DRIVER, True),
        (("/dev/vcio", "/usr/bin/vcgencmd", _DRIVER), "", None),
    ],
)
def test_ways_to_the_throttle_bits(
    tmp_path: Path, gone: tuple[str, ...], source: str | None, heat: bool | None
) -> None:
    machine = Machine(PI_5_OLD_KERNEL, tmp_path)
    for path in gone:
        remove(machine.root, path)
    machine.start()
    signals = machine.settled()
    assert [(one.value, one.source) for one in of(signals, Kind.THROTTLE_BITS)] == (
        [(0xE0008, source)] if source else []
    )
    readings = aggregate(signals, 0)
    assert (readings.heat_throttled, readings.undervoltage) == (heat, False)  # the latter from rpi_volt if need be


def test_every_way_that_failed_is_named(tmp_path: Path) -> None:
    build(tmp_path, PI_5.files)
    FAULTS["a folder"](tmp_path, "/dev/vcio")
    (bits,) = of(look(tmp_path)[0], Kind.THROTTLE_BITS)
    absent = "no such file or directory"
    assert bits.problem == f"/dev/vcio: is a directory; vcgencmd get_throttled: {absent}; {_DRIVER}: {absent}"


@pytest.mark.parametrize(
    ("bits", "heat", "weak"),
    [
        (0x0, False, False),
        (0x50005, False, True),  # capped by a weak supply
        (0x50000, False, False),  # was once
        (0xE0008, True, False),  # soft limit
        (0xE0006, True, False),  # hard limit
        (0x5000D, True, True),  # both
    ],
)
def test_what_throttle_bits_mean(bits: int, heat: bool, weak: bool) -> None:
    readings = aggregate([Signal(Kind.THROTTLE_BITS, "firmware", bits, "/dev/vcio")], 0)
    assert (readings.heat_throttled, readings.undervoltage) == (heat, weak)


def test_throttle_bits_in_words() -> None:
    assert describe(0xE0008) == (
        "now: soft temperature limit; before: frequency capped, throttled, soft temperature limit"
    )
    assert describe(0x50005) == "now: under-voltage, throttled; before: under-voltage, throttled"
    assert describe(0) == ""


def test_old_firmware_that_does_not_know_the_question_is_not_taken_for_a_no(tmp_path: Path) -> None:
    signals = settled(Sensors(build(tmp_path, PI_4.files), Clock(), Commands({}), Mailbox(throttled=None)))
    (bits,) = of(signals, Kind.THROTTLE_BITS)
    assert bits.source == _DRIVER  # the next way that works


def test_rails_of_a_pi_5_by_its_tool(tmp_path: Path) -> None:
    machine = Machine(PI_5, tmp_path)
    remove(tmp_path, "/dev/vcio")
    machine.start()
    (rails,) = of(machine.settled(), Kind.PROCESSOR_POWER)
    assert (rails.source, rails.note) == ("vcgencmd pmic_read_adc", "12 rails, without USB and losses")
    assert rails.value == pytest.approx(2.948, abs=0.001)
    assert ("/usr/bin/vcgencmd", "pmic_read_adc") in machine.commands.asked


def test_a_rail_without_its_voltage_is_not_left_out_of_the_sum(tmp_path: Path) -> None:
    text = RAILS_OF_PI5.replace("VDD_CORE_V volt(15)=0.90659250V", "")
    signals = settled(Sensors(build(tmp_path, PI_5.files), Clock(), Commands({}), Mailbox(0, {"pmic_read_adc": text})))
    assert power(signals)[0] is None


# Heat.


@pytest.mark.parametrize(("policy", "limit"), [("step_wise", 75.0), ("power_allocator", 85.0), ("user_space", 75.0)])
def test_the_trip_that_counts_depends_on_the_governor(tmp_path: Path, policy: str, limit: float) -> None:
    trips = (("passive", 75000), ("passive", 85000), ("hot", 95000), ("critical", 115000))
    build(tmp_path, zone(0, "soc-thermal", 60000, *trips, policy=policy))
    readings = look(tmp_path)[1]
    assert (readings.temp_c, readings.throttle_temp_c, readings.critical_temp_c) == (60.0, limit, 115.0)


@pytest.mark.parametrize("trip", [0, -274000, 2**31 - 1, 1])
def test_trips_that_are_none(tmp_path: Path, trip: int) -> None:
    build(tmp_path, zone(0, "cpu-thermal", 60000, ("passive", trip), ("critical", trip)))
    readings = look(tmp_path)[1]
    assert (readings.temp_c, readings.throttle_temp_c, readings.critical_temp_c) == (60.0, None, None)


@pytest.mark.parametrize("temp", ["0", "-256000", "-274000", "45", "250000", "85000.5", "0x55f0", "85000 C"])
def test_temperatures_that_are_none_are_unknown_and_never_cool(tmp_path: Path, temp: str) -> None:
    build(tmp_path, zone(0, "cpu-thermal", temp) | zone(1, "gpu-thermal", 40000, ("passive", 90000)))
    signals, readings = look(tmp_path)
    assert of(signals, Kind.HEAT)[0].problem
    assert readings.temp_c is None  # the other zone is not the processor's


def test_the_zone_nearest_to_its_own_limit_is_the_one(tmp_path: Path) -> None:
    build(
        tmp_path, zone(0, "cpu-thermal", 70000, ("passive", 99000)) | zone(1, "gpu-thermal", 65000, ("passive", 80000))
    )
    readings = look(tmp_path)[1]
    assert (readings.temp_c, readings.throttle_temp_c) == (65.0, 80.0)


def test_zones_are_known_by_name_whatever_their_number(tmp_path: Path) -> None:
    for number, kind, temp in ((10, "cpu-thermal", 61000), (2, "PMIC-Die", 100000), (0, "iwlwifi_1", 90000)):
        build(tmp_path, zone(number, kind, temp))
    signals, readings = look(tmp_path)
    assert readings.temp_c == 61.0
    assert [one.name for one in signals if one.kind in (Kind.HEAT, Kind.TEMPERATURE)] == [
        "iwlwifi_1", "PMIC-Die", "cpu-thermal",
    ]  # fmt: skip


def test_a_zone_whose_type_is_unreadable_is_not_guessed_at(tmp_path: Path) -> None:
    build(tmp_path, zone(0, "cpu-thermal", 61000) | {"/sys/class/thermal/thermal_zone0/type": UNREADABLE})
    (unknown,) = of(look(tmp_path)[0], Kind.HEAT)
    assert unknown.problem == "what it measures is not known: type: input/output error"


def test_the_known_limit_of_a_pi_3b_plus(tmp_path: Path) -> None:
    build(tmp_path, device_tree("raspberrypi,3-model-b-plus", "brcm,bcm2837") | zone(0, "cpu-thermal", 58000))
    readings = look(tmp_path)[1]
    assert (readings.temp_c, readings.throttle_temp_c) == (58.0, 60.0)


# Power.


def test_no_part_of_a_sum_may_be_missing(tmp_path: Path) -> None:
    chip = {"in1_label": "VDD_CPU_CV", "in1_input": 19000, "curr1_input": 100, "in2_label": "VIN_SYS_5V0"}
    build(tmp_path, hwmon(0, "ina3221", **chip, in2_input=5000, curr2_input=UNREADABLE))
    signals, readings = look(tmp_path)
    assert (readings.power_w, power(signals)) == (None, (None, "VIN_SYS_5V0: input/output error"))


def test_nothing_measures_power(tmp_path: Path) -> None:
    assert power(look(tmp_path)[0]) == (None, "no power sensor")


@pytest.mark.parametrize(
    ("status", "online", "discharging"),
    [
        ("Discharging", 0, True), ("Discharging", 1, True), ("Charging", 1, False), ("Full", 1, False),
        ("Not charging", 1, False), ("Unknown", 1, False), ("Unknown", 0, True), ("Unknown", 2, False),
        ("Unknown", None, None), ("Full", 0, False),
    ],
)  # fmt: skip
def test_whether_it_runs_on_battery(tmp_path: Path, status: str, online: int | None, discharging: bool | None) -> None:
    build(tmp_path, folder("/sys/class/power_supply/BAT0", type="Battery", status=status, capacity=50))
    if online is not None:
        build(tmp_path, folder("/sys/class/power_supply/AC", type="Mains", online=online))
    readings = look(tmp_path)[1]
    assert (readings.discharging, readings.battery_fraction, readings.battery_energy_wh) == (discharging, 0.5, None)


def test_power_of_a_battery_by_current_and_voltage_whatever_the_sign(tmp_path: Path) -> None:
    battery = {
        "type": "Battery",
        "status": "Discharging",
        "capacity": 50,
        "current_now": -800000,
        "voltage_now": 11400000,
    }
    build(tmp_path, folder("/sys/class/power_supply/BAT0", **battery))
    signals, readings = look(tmp_path)
    assert readings.power_w == pytest.approx(9.12)
    assert power(signals)[1] == "BAT0"
    write(tmp_path, "/sys/class/power_supply/BAT0/current_now", "0")
    assert look(tmp_path)[1].power_w is None  # 0 W while discharging


# Load.


def test_a_quota_of_a_group_above_counts(tmp_path: Path) -> None:
    files, _ = linux(8, 0.0, 0.0)
    limits = {
        "/sys/fs/cgroup/user.slice/cpu.max": "250000 100000",
        "/sys/fs/cgroup/user.slice/memory.high": "1000000000",
    }
    build(tmp_path, files | own_group() | limits)
    signals, readings = look(tmp_path)
    assert (readings.available_cpus, readings.available_memory_bytes) == (2.5, 1_000_000_000 - (912281600 - 4096))
    assert "/sys/fs/cgroup/user.slice/memory.high" in [one.source for one in of(signals, Kind.MEMORY)]


def test_a_group_whose_limit_is_gone_while_its_counts_are_there_is_unknown(tmp_path: Path) -> None:
    files, _ = linux(8, 0.0, 0.0)
    build(tmp_path, files | own_group())
    remove(tmp_path, "/sys/fs/cgroup/user.slice/cpu.max")
    remove(tmp_path, "/sys/fs/cgroup/user.slice/memory.max")
    readings = look(tmp_path)[1]
    assert (readings.available_cpus, readings.available_memory_bytes) == (None, None)


def test_a_process_moved_to_another_group_is_followed(tmp_path: Path) -> None:
    files, _ = linux(8, 0.0, 0.0)
    limits = folder("/sys/fs/cgroup/small", **{"cpu.max": "50000 100000", "cpu.stat": "nr_periods 1\nnr_throttled 0"})
    machine = Machine(Board(files | own_group() | limits, {}, (), {}), tmp_path)
    assert aggregate(machine.settled(), 0).available_cpus == 8
    write_over(tmp_path, "/proc/self/cgroup", "0::/small")
    assert aggregate(machine.settled(), 0).available_cpus == 0.5


def test_a_controller_that_no_group_has_is_no_limit(tmp_path: Path) -> None:
    files, _ = linux(8, 0.0, 0.0)
    build(tmp_path, files | own_group() | {"/proc/self/cgroup": "3:pids:/"})
    assert look(tmp_path)[1].available_cpus is None  # groups exist, and none is where limits of processors would be


def test_processors_that_are_offline_are_not_available(tmp_path: Path) -> None:
    files, _ = linux(8, 0.0, 0.0, allowed="0-127")
    build(tmp_path, files)
    assert look(tmp_path)[1].available_cpus == 8


def test_clocks_of_a_cluster_that_is_off_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path, clocks(0, "0 1", 2000000, 1000000, 900000) | clocks(4, "4 5", 2000000, 2000000, 900000))
    real = os.open

    def busy(path: str, *args: int) -> int:
        if "policy0/" in path:
            raise OSError(16, "Device or resource busy", path)
        return real(path, *args)

    monkeypatch.setattr("mbq_runtime.sensing.host.os.open", busy)
    signals, readings = look(tmp_path)
    assert readings.cpu_freq_fraction == 1.0
    assert [one.name for one in of(signals, Kind.CLOCK_LIMIT)] == ["CPUs 4,5"]


def test_a_counter_that_starts_again_is_no_rate(tmp_path: Path) -> None:
    files, later = linux(2, 0.5, 0.5)
    machine = Machine(Board(files, later, (), {}), tmp_path)
    machine.settled()
    machine.go_on()
    assert aggregate(machine.settled(), 0).foreign_cpu_fraction == pytest.approx(0.5)
    write_over(tmp_path, "/proc/stat", files["/proc/stat"])  # as after a suspended machine was restored
    machine.clock.now_s += 1
    assert aggregate(machine.settled(), 0).foreign_cpu_fraction is None


def test_two_looks_in_a_row_do_not_make_rates_coarse(tmp_path: Path) -> None:
    files, later = linux(2, 0.5, 0.5)
    machine = Machine(Board(files, later, (), {}), tmp_path)
    machine.settled()
    machine.go_on()
    for _ in range(5):
        assert aggregate(machine.settled(), 0).foreign_cpu_fraction == pytest.approx(0.5)
        machine.clock.now_s += 0.05


# Commands.


def test_a_command_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    mark, late = tmp_path / "child", tmp_path / "late"
    script = f"(sleep 60; touch {late}) & echo $! > {mark}; wait"
    with pytest.raises(Unreadable, match=r"sh did not answer in 0.3 s"):
        run_command(["sh", "-c", script], 0.3)
    assert not late.exists(), "it waited for the child"
    child = int(mark.read_text())
    end_s = time.monotonic() + 20
    while _alive(child):
        assert time.monotonic() < end_s


def _alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_commands_answer_or_say_why() -> None:
    assert run_command([sys.executable, "-c", "print('throttled=0x0')"], 30) == "throttled=0x0\n"
    with pytest.raises(Unreadable, match="failed with code 3"):
        run_command([sys.executable, "-c", "raise SystemExit(3)"], 30)
    with pytest.raises(Absent, match="no such file"):
        run_command([TERMUX], 1)


def write_over(root: Path, path: str, content: str) -> None:
    remove(root, path)
    write(root, path, content)
