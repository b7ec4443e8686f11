"""A laptop, a phone, containers and a virtual machine."""

from __future__ import annotations

import json

from boards import (
    COOLING,
    HWMON,
    LATER_S,
    LOAD_SIGNALS,
    POLICY,
    ZONES,
    Board,
    Expected,
    Files,
    clocks,
    cooling,
    folder,
    hwmon,
    linux,
    load_readings,
    load_signals,
    own_group,
    zone,
)  # fmt: skip
from trees import UNREADABLE

from mbq_runtime.sensing import Kind

_SUPPLY, _RAPL = "/sys/class/power_supply", "/sys/class/powercap/intel-rapl"
_COUNTERS = "/sys/devices/system/cpu/cpu*/thermal_throttle/package_throttle_count"


def _counters(cpus: int, count: int) -> Files:
    return {f"/sys/devices/system/cpu/cpu{i}/thermal_throttle/package_throttle_count": str(count) for i in range(cpus)}


def _rapl(domain: str, name: str, microjoules: int) -> Files:
    return folder(f"{_RAPL}:{domain}", name=name, energy_uj=microjoules, max_energy_range_uj=262143328850)


_PAD_NOW, _PAD_LATER = linux(8, 0.3, 1.5)
THINKPAD = Board(
    files={
        **_PAD_NOW, **own_group(),
        **zone(0, "acpitz", 61000, ("critical", 128000)), **zone(1, "INT3400 Thermal", 20000),
        **zone(2, "iwlwifi_1", 45000), **zone(3, "x86_pkg_temp", 63000, ("passive", 0), ("passive", -274000)),
        **cooling(0, "Processor", 0, 3), **cooling(1, "Processor", 0, 3), **cooling(2, "intel_powerclamp", -1, 50),
        **cooling(3, "TCC Offset", 3, 63),
        **hwmon(0, "AC"), **hwmon(1, "BAT0", in0_input=11812),
        **hwmon(2, "nvme", temp1_input=38850, temp1_label="Composite", temp1_crit=84850),
        **hwmon(5, "coretemp", temp1_input=64000, temp1_label="Package id 0", temp1_max=100000, temp1_crit=100000,
                temp2_input=63000, temp2_label="Core 0", temp2_max=100000, temp2_crit=100000),
        **hwmon(6, "thinkpad", fan1_input=2934, temp1_input=61000, temp1_label="CPU", temp3_input=UNREADABLE, pwm1=128),
        **clocks(0, "0", 4600000, 4600000, 2712000), **clocks(1, "1", 4600000, 3910000, 2801000),
        **_counters(8, 12),
        **folder(f"{_SUPPLY}/AC", type="Mains", online=0),
        **folder(f"{_SUPPLY}/BAT0", type="Battery", present=1, status="Discharging", capacity=73, cycle_count=211,
                 energy_full_design=57020000, energy_full=52160000, energy_now=38220000, power_now=9412000,
                 voltage_now=11812000, capacity_level="Normal", technology="Li-poly"),
        **folder(f"{_SUPPLY}/BAT1", type="Battery", present=1, status="Not charging", capacity=100,
                 charge_full=2000000, charge_now=1900000, current_now=0, voltage_now=12000000),
        **folder(f"{_SUPPLY}/hidpp_battery_0", type="Battery", scope="Device", status="Discharging", capacity=20),
        **folder(f"{_SUPPLY}/ucsi-source-psy-USBC000:001", type="USB", online=0, scope="System"),
        **_rapl("0", "package-0", 262143000000), **_rapl("0:0", "core", 70_000_000), **_rapl("0:1", "uncore", 10_000),
        **_rapl("1", "psys", 1_000_000),
    },
    later=_PAD_LATER | _counters(8, 14) | {
        f"{_RAPL}:0/energy_uj": str(262143000000 + 900_000_000 - 262143328850),  # past the end of the counter
        f"{_RAPL}:0:0/energy_uj": str(70_000_000 + 600_000_000), f"{_RAPL}:0:1/energy_uj": str(10_000),
        f"{_RAPL}:1/energy_uj": str(1_000_000 + 1_400_000_000),
    },
    signals=(
        Expected(Kind.HEAT, "acpitz", 61.0, "C", f"{ZONES}0/temp", None, 128.0),
        Expected(Kind.HEAT, "x86_pkg_temp", 63.0, "C", f"{ZONES}3/temp"),
        Expected(Kind.TEMPERATURE, "INT3400 Thermal", 20.0, "C", f"{ZONES}1/temp"),
        Expected(Kind.HEAT, "Package id 0", 64.0, "C", f"{HWMON}5/temp1_input", 100.0),
        Expected(Kind.TEMPERATURE, "Composite", 38.85, "C", f"{HWMON}2/temp1_input", None, 84.85),
        Expected(Kind.FAN, "thinkpad fan1", 2934, "rpm", f"{HWMON}6/fan1_input"),
        Expected(Kind.SLOWED, "intel_powerclamp", -1, "steps", f"{COOLING}2/cur_state", 50),
        Expected(Kind.COOLING, "TCC Offset", 3, "steps", f"{COOLING}3/cur_state", 63),
        Expected(Kind.THROTTLE_EVENTS, "throttle counters of x86", 2, "events", _COUNTERS),
        Expected(Kind.DISCHARGING, "BAT0", 1, "flag", f"{_SUPPLY}/BAT0/status"),
        Expected(Kind.BATTERY, "BAT0", 38.22 / 52.16, "share", f"{_SUPPLY}/BAT0/energy_now"),
        Expected(Kind.BATTERY_ENERGY, "BAT0", 38.22, "Wh", f"{_SUPPLY}/BAT0/energy_now", 52.16),
        Expected(Kind.BATTERY_POWER, "BAT0", 9.412, "W", f"{_SUPPLY}/BAT0/power_now"),
        Expected(Kind.DISCHARGING, "BAT1", 0, "flag", f"{_SUPPLY}/BAT1/status"),
        Expected(Kind.BATTERY_ENERGY, "BAT1", 22.8, "Wh", f"{_SUPPLY}/BAT1/charge_now", 24.0),
        Expected(Kind.BATTERY_POWER, "BAT1", 0, "W", f"{_SUPPLY}/BAT1/current_now"),
        Expected(Kind.MAINS, "AC", 0, "flag", f"{_SUPPLY}/AC/online"),
        Expected(Kind.PROCESSOR_POWER, "package-0", 9.0, "W", f"{_RAPL}:0/energy_uj"),
        Expected(Kind.PROCESSOR_POWER, "psys", 14.0, "W", f"{_RAPL}:1/energy_uj"),
        Expected(Kind.CLOCK_LIMIT, "CPUs 1", 3910, "MHz", f"{POLICY}1/scaling_max_freq", 4600),
        *load_signals(8, 0.3),
    ),
    readings={
        "temp_c": 64.0, "throttle_temp_c": 100.0, "critical_temp_c": None, "heat_throttled": True,
        "cpu_freq_fraction": 0.85, "discharging": True, "battery_fraction": (38.22 + 22.8) / (52.16 + 24.0),
        "battery_energy_wh": 38.22 + 22.8, "power_w": 9.412, **load_readings(8, 0.3),
    },
    unknown=(f"{HWMON}6/temp3_input",),  # a place of the embedded controller without a sensor
    missing=("Raspberry Pi throttle bits", "GPU", "known limits of the board"),
)  # fmt: skip

TERMUX = "/data/data/com.termux/files/usr/bin/termux-battery-status"
PHONE = {
    "present": True, "technology": "Li-ion", "health": "GOOD", "plugged": "UNPLUGGED", "status": "DISCHARGING",
    "temperature": 31.4, "voltage": 3991, "current": -412000, "percentage": 76, "level": 76, "scale": 100,
}  # fmt: skip
_PHONE_NOW, _ = linux(8, 0.0, 1.5, pressure=False)
PHONE_UNDER_TERMUX = Board(
    files={
        **_PHONE_NOW, "/proc/stat": UNREADABLE, TERMUX: "#!/data/data/com.termux/files/usr/bin/sh",
        "/proc/self/cgroup": "0::/uid_10234/pid_4711", "/proc/self/mountinfo": "24 1 0:21 / /proc rw - proc proc rw",
    },
    later={},
    commands={(TERMUX,): json.dumps(PHONE, indent=2)},
    signals=(
        Expected(Kind.BATTERY, "phone", 0.76, "share", TERMUX),
        Expected(Kind.DISCHARGING, "phone", 1, "flag", TERMUX),
        Expected(Kind.TEMPERATURE, "phone battery", 31.4, "C", TERMUX),
        Expected(Kind.PROCESSORS, "affinity", 8, "CPUs", "/proc/self/status"),
        LOAD_SIGNALS[1],
    ),
    readings={"discharging": True, "battery_fraction": 0.76},
    unknown=("/proc/stat", "/proc/self/stat", "/proc/self/cgroup"),  # all that the first of them would tell
    missing=("thermal zones", "power supplies", "processor clocks", "pressure stall information"),
)  # fmt: skip

_BOX_NOW, _BOX_LATER = linux(4, 0.2, 1.5)
_V2, _CPU, _MEMORY = "/sys/fs/cgroup", "/sys/fs/cgroup/cpu,cpuacct", "/sys/fs/cgroup/memory"
_THROTTLED = f"nr_periods {LATER_S * 10 + 70}\nnr_throttled {LATER_S * 4 + 7}\nthrottled_usec 20000000"
CONTAINER_V2 = Board(
    files={
        **_BOX_NOW,
        "/proc/self/cgroup": "0::/",
        "/proc/self/mountinfo": "612 600 0:24 / /proc rw - proc proc rw\n"
                                f"640 612 0:29 / {_V2} ro,nosuid,nodev,noexec,relatime - cgroup2 cgroup rw,nsdelegate",
        **folder(_V2, **{
            "cgroup.type": "domain", "cpu.max": "150000 100000", "memory.max": "2147483648", "memory.high": "max",
            "memory.current": "1200000000", "memory.stat": "anon 700000000\nfile 500000000\ninactive_file 300000000",
            "cpu.stat": "usage_usec 812\nnr_periods 70\nnr_throttled 7\nthrottled_usec 9000",
        }),
    },
    later=_BOX_LATER | {f"{_V2}/cpu.stat": _THROTTLED},
    signals=(
        Expected(Kind.PROCESSORS, "control group", 1.5, "CPUs", f"{_V2}/cpu.max"),
        Expected(Kind.GROUP_THROTTLING, "control group", 0.4, "share", f"{_V2}/cpu.stat"),
        Expected(Kind.MEMORY, "control group", 1_247_483_648, "bytes", f"{_V2}/memory.max", 2147483648),
        *load_signals(4, 0.2),
    ),
    readings=load_readings(1.5, 0.2) | {"cgroup_throttled_fraction": 0.4, "available_memory_bytes": 1_247_483_648},
    missing=("throttle counters of x86", "thermal zones", "hwmon chips", "processor clocks", "power supplies"),
)  # fmt: skip

CONTAINER_V1 = Board(
    files={
        **_BOX_NOW,
        "/proc/self/cgroup": "12:memory:/docker/ab12\n5:cpu,cpuacct:/docker/ab12\n1:name=systemd:/docker/ab12\n"
                             "0::/system.slice/containerd.service",
        "/proc/self/mountinfo": f"701 700 0:31 /docker/ab12 {_CPU} ro,nosuid - cgroup cgroup rw,cpu,cpuacct\n"
                                f"702 700 0:35 /docker/ab12 {_MEMORY} ro,nosuid - cgroup cgroup rw,memory",
        **folder(_CPU, **{
            "cpu.cfs_quota_us": "50000", "cpu.cfs_period_us": "100000", "cpu.shares": "1024",
            "cpu.stat": "nr_periods 70\nnr_throttled 7\nthrottled_time 9000000",
        }),
        **folder(_MEMORY, **{
            "memory.limit_in_bytes": "1073741824", "memory.usage_in_bytes": "900000000",
            "memory.stat": "cache 500000000\ninactive_file 1\ntotal_inactive_file 400000000",
        }),
    },
    later=_BOX_LATER | {f"{_CPU}/cpu.stat": _THROTTLED},
    signals=(
        Expected(Kind.PROCESSORS, "control group", 0.5, "CPUs", f"{_CPU}/cpu.cfs_quota_us"),
        Expected(Kind.GROUP_THROTTLING, "control group", 0.4, "share", f"{_CPU}/cpu.stat"),
        Expected(Kind.MEMORY, "control group", 573_741_824, "bytes", f"{_MEMORY}/memory.limit_in_bytes", 1073741824),
        *load_signals(4, 0.2),
    ),
    readings=load_readings(0.5, 0.2) | {"cgroup_throttled_fraction": 0.4, "available_memory_bytes": 573_741_824},
    missing=("throttle counters of x86", "thermal zones", "hwmon chips", "processor clocks", "power supplies"),
)  # fmt: skip

_VM_NOW, _VM_LATER = linux(2, 0.4, 0.8)
_V1 = "/sys/fs/cgroup/cpu"
BARE_VM = Board(
    files={
        **_VM_NOW,
        "/proc/self/cgroup": "4:memory:/jobs/7\n1:cpu:/\n0::/",
        "/proc/self/mountinfo": f"32 31 0:29 / {_V1} rw,relatime - cgroup cgroup rw,cpu\n"
                                f"35 31 0:32 / {_MEMORY} rw,relatime - cgroup cgroup rw,memory\n"
                                f"41 31 0:38 / {_V2}/unified rw,relatime - cgroup2 cgroup2 rw",
        **folder(_V1, **{"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000",
                         "cpu.stat": "nr_periods 0\nnr_throttled 0\nthrottled_time 0"}),
        **{f"{_MEMORY}{group}/{name}": content for group in ("", "/jobs", "/jobs/7") for name, content in (
            ("memory.limit_in_bytes", "9223372036854771712"), ("memory.usage_in_bytes", "900000000"),
            ("memory.stat", "total_inactive_file 400000000"),
        )},
        "/sys/class/thermal": "", "/sys/class/power_supply": "",
    },
    later=_VM_LATER,
    signals=(
        Expected(Kind.GROUP_THROTTLING, "control group", 0, "share", "/proc/self/cgroup"),
        Expected(Kind.FOREIGN_LOAD, "other programs", 0.4, "share", "/proc/stat"),
        Expected(Kind.OWN_LOAD, "this program", 0.8, "CPUs", "/proc/self/stat"),
        Expected(Kind.PROCESSORS, "affinity", 2, "CPUs", "/proc/self/status"),
    ),
    readings=load_readings(2, 0.4),
    missing=("throttle counters of x86", "thermal zones", "cooling devices", "hwmon chips", "power supplies"),
)  # fmt: skip

_LXC_NOW, _LXC_LATER = linux(4, 0.25, 1.5, allowed="12-15")
PROXMOX_LXC = Board(  # the mask has the numbers of the host; lxcfs numbers the processors from 0
    files={
        **_LXC_NOW,
        "/proc/self/cgroup": "0::/", "/proc/self/mountinfo": f"640 612 0:29 / {_V2} rw - cgroup2 cgroup2 rw",
    },
    later=_LXC_LATER,
    signals=load_signals(4, 0.25),
    readings=load_readings(4, 0.25),
    missing=("thermal zones", "power supplies"),
)  # fmt: skip

_GAME_NOW, _GAME_LATER = linux(8, 0.3, 1.5)
LAPTOP_ON_MAINS_WITH_A_GAMEPAD = Board(  # old drivers give a gamepad's battery no scope
    files={
        **_GAME_NOW, **own_group(),
        **folder(f"{_SUPPLY}/AC", type="Mains", online=1),
        **folder(f"{_SUPPLY}/BAT0", type="Battery", present=1, status="Full", capacity=100,
                 energy_full=50000000, energy_now=50000000, power_now=0, voltage_now=12600000),
        **folder(f"{_SUPPLY}/sony_controller_battery_a4:53:85:01:02:03", type="Battery", present=1,
                 status="Discharging", capacity=12),
    },
    later=_GAME_LATER,
    signals=(
        Expected(Kind.DISCHARGING, "BAT0", 0, "flag", f"{_SUPPLY}/BAT0/status"),
        Expected(Kind.BATTERY, "BAT0", 1, "share", f"{_SUPPLY}/BAT0/energy_now"),
        *load_signals(8, 0.3),
    ),
    readings={
        "discharging": False, "battery_fraction": 1.0, "battery_energy_wh": 50.0, **load_readings(8, 0.3),
    },
)  # fmt: skip
