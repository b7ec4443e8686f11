"""Raspberry Pi 4 and 5, Jetson Orin Nano, AGX Orin and Nano, RK3588."""

from __future__ import annotations

from boards import (
    COOLING,
    HWMON,
    POLICY,
    ZONES,
    Board,
    Expected,
    Files,
    clocks,
    cooling,
    device_tree,
    folder,
    hwmon,
    linux,
    load_readings,
    load_signals,
    own_group,
    zone,
)  # fmt: skip
from trees import UNREADABLE, Mailbox

from mbq_runtime.sensing import Kind

_COMPATIBLE = "/sys/firmware/devicetree/base/compatible"
_DRIVER = "/sys/bus/platform/drivers/raspberrypi-firmware"

RAILS_OF_PI5 = """ 3V7_WL_SW_A current(0)=0.10247270A
   3V3_SYS_A current(1)=0.10832820A
   1V8_SYS_A current(2)=0.15712470A
  DDR_VDD2_A current(3)=0.00585558A
  DDR_VDDQ_A current(4)=0.00000000A
   1V1_SYS_A current(5)=0.24105470A
    0V8_SW_A current(6)=0.31424950A
  VDD_CORE_A current(7)=1.42880000A
   3V3_DAC_A current(17)=0.00000000A
   3V3_ADC_A current(18)=0.00006105A
   0V8_AON_A current(16)=0.00354090A
      HDMI_A current(22)=0.02002440A
 3V7_WL_SW_V volt(8)=3.71091200V
   3V3_SYS_V volt(9)=3.30910500V
   1V8_SYS_V volt(10)=1.80073100V
  DDR_VDD2_V volt(11)=1.10439400V
  DDR_VDDQ_V volt(12)=0.60439500V
   1V1_SYS_V volt(13)=1.10805800V
    0V8_SW_V volt(14)=0.80402850V
  VDD_CORE_V volt(15)=0.90659250V
   3V3_DAC_V volt(20)=3.31135200V
   3V3_ADC_V volt(21)=3.31867800V
   0V8_AON_V volt(19)=0.79882700V
      HDMI_V volt(23)=5.07860000V
     EXT5V_V volt(24)=5.05716000V
      BATT_V volt(25)=0.00000000V
"""
WATTS_OF_PI5 = 2.94797734  # of the twelve products of the table above


def _pi(device: str, word: str) -> Files:
    """The ways to the throttle bits that old kernels have."""
    return {
        "/dev/vcio": Mailbox.node,
        "/usr/bin/vcgencmd": "",
        f"/sys/devices/platform/{device}/get_throttled": word,
        f"{_DRIVER}/bind": "",
        f"{_DRIVER}/{device.rsplit('/', 1)[-1]}": f"-> /sys/devices/platform/{device}",
    }


_PI4_NOW, _PI4_LATER = linux(4, 0.25, 1.5)
PI_4 = Board(
    files={
        **_PI4_NOW, **own_group(), **device_tree("raspberrypi,4-model-b", "brcm,bcm2711"),
        **_pi("soc/soc:firmware", "50005"),
        **zone(0, "cpu-thermal", 61342, ("critical", 110000)),
        **hwmon(0, "cpu_thermal", temp1_input=61342, temp1_crit=110000),
        **hwmon(1, "rpi_volt", in0_lcrit_alarm=1),
        **clocks(0, "0 1 2 3", 1800000, 1800000, 1500398),
    },
    later=_PI4_LATER,
    commands={("/usr/bin/vcgencmd", "get_throttled"): "throttled=0x50005\n"},
    mailbox=Mailbox(0x50005),
    signals=(
        Expected(Kind.HEAT, "cpu-thermal", 61.342, "C", f"{ZONES}0/temp", None, 110.0),
        Expected(Kind.HEAT, "cpu_thermal temp1", 61.342, "C", f"{HWMON}0/temp1_input", None, 110.0),
        Expected(Kind.HEAT_LIMIT, "firmware slows from", 80.0, "C", _COMPATIBLE),
        Expected(Kind.THROTTLE_BITS, "firmware", 0x50005, "bits", "/dev/vcio"),
        Expected(Kind.SUPPLY_ALARM, "supply too weak", 1, "flag", f"{HWMON}1/in0_lcrit_alarm"),
        Expected(Kind.CLOCK_LIMIT, "CPUs 0,1,2,3", 1800, "MHz", f"{POLICY}0/scaling_max_freq", 1800),
        Expected(Kind.CLOCK, "CPUs 0,1,2,3", 1500.398, "MHz", f"{POLICY}0/scaling_cur_freq", 1800),
        *load_signals(4, 0.25),
    ),
    readings={
        "temp_c": 61.342, "throttle_temp_c": 80.0, "critical_temp_c": 110.0,
        "heat_throttled": False,  # slowed, but by the weak supply
        "undervoltage": True, "cpu_freq_fraction": 1.0, **load_readings(4, 0.25),
    },
    missing=("PMIC rails", "power supplies", "RAPL energy counters", "phone battery", "cooling devices", "GPU"),
)  # fmt: skip

_PI5_NOW, _PI5_LATER = linux(4, 0.1, 1.5)
_PI5_NEW: Files = {
    **_PI5_NOW, **own_group(), **device_tree("raspberrypi,5-model-b", "brcm,bcm2712"),
    "/dev/vcio": Mailbox.node,
    "/usr/bin/vcgencmd": "",
    **zone(0, "cpu-thermal", 82300, ("critical", 110000), ("active", 50000), ("active", 60000), ("active", 67500),
           ("active", 75000)),
    **cooling(0, "pwm-fan", 4, 4),
    **hwmon(0, "cpu_thermal", temp1_input=82300, temp1_crit=110000),
    **hwmon(1, "rp1_adc", in1_input=1466, in2_input=2530, in3_input=1412, in4_input=1404, temp1_input=61842),
    **hwmon(2, "pwmfan", fan1_input=8112, pwm1=250, pwm1_enable=1),
    **hwmon(3, "rpi_volt", in0_lcrit_alarm=0),
    **clocks(0, "0 1 2 3", 2400000, 2400000, 1800000),
}  # fmt: skip
_PI5_SIGNALS = (
    Expected(Kind.HEAT, "cpu-thermal", 82.3, "C", f"{ZONES}0/temp", None, 110.0),
    Expected(Kind.TEMPERATURE, "rp1_adc temp1", 61.842, "C", f"{HWMON}1/temp1_input"),
    Expected(Kind.HEAT_LIMIT, "firmware slows from", 80.0, "C", _COMPATIBLE),
    Expected(Kind.COOLING, "pwm-fan", 4, "steps", f"{COOLING}0/cur_state", 4),
    Expected(Kind.FAN, "pwmfan fan1", 8112, "rpm", f"{HWMON}2/fan1_input"),
    Expected(Kind.THROTTLE_BITS, "firmware", 0xE0008, "bits", "/dev/vcio"),
    Expected(Kind.SUPPLY_ALARM, "supply too weak", 0, "flag", f"{HWMON}3/in0_lcrit_alarm"),
    Expected(Kind.PROCESSOR_POWER, "PMIC rails", WATTS_OF_PI5, "W", "/dev/vcio pmic_read_adc"),
    Expected(Kind.CLOCK_LIMIT, "CPUs 0,1,2,3", 2400, "MHz", f"{POLICY}0/scaling_max_freq", 2400),
    *load_signals(4, 0.1),
)
_PI5_READINGS = {
    "temp_c": 82.3, "throttle_temp_c": 80.0, "critical_temp_c": 110.0, "heat_throttled": True, "undervoltage": False,
    "cpu_freq_fraction": 1.0, "power_w": WATTS_OF_PI5, **load_readings(4, 0.1),
}  # fmt: skip
_PI5_COMMANDS = {
    ("/usr/bin/vcgencmd", "get_throttled"): "throttled=0xe0008\n",
    ("/usr/bin/vcgencmd", "pmic_read_adc"): RAILS_OF_PI5,
}
_PI5_MAILBOX = Mailbox(0xE0008, {"pmic_read_adc": RAILS_OF_PI5})
_PI5_MISSING = ("power supplies", "RAPL energy counters", "GPU")
PI_5 = Board(_PI5_NEW, _PI5_LATER, _PI5_SIGNALS, _PI5_READINGS, missing=_PI5_MISSING, commands=_PI5_COMMANDS,
             mailbox=_PI5_MAILBOX)  # fmt: skip
PI_5_OLD_KERNEL = Board(
    _PI5_NEW | _pi("soc@107c000000/soc@107c000000:firmware", "e0008"), _PI5_LATER, _PI5_SIGNALS, _PI5_READINGS,
    missing=_PI5_MISSING, commands=_PI5_COMMANDS, mailbox=_PI5_MAILBOX,
)  # fmt: skip

_ORIN_TRIPS = (("critical", 104500), ("passive", 99000), ("active", 70000))


def _orin_zones() -> Files:
    files: Files = {}
    temps = {"cpu": 52312, "gpu": 51125, "cv0": UNREADABLE, "cv1": UNREADABLE, "cv2": UNREADABLE, "soc0": 51000,
             "soc1": 50968, "soc2": 50531, "tj": 52312}  # fmt: skip
    for number, (part, temp) in enumerate(temps.items()):
        files |= zone(number, f"{part}-thermal", temp, *_ORIN_TRIPS)
    return files


def _rails(number: int, labels: dict[int, tuple[str, int, int]]) -> Files:
    """An INA3221: three channels in mV and mA, the voltages over their shunts, and their sum."""
    files = hwmon(
        number, "ina3221", in7_label="sum of shunt voltages", in7_input=3200, curr4_input=1600, curr4_crit=2048
    )
    chip = f"{HWMON}{number}"
    for channel, (label, millivolts, milliamps) in labels.items():
        files |= folder(chip, **{
            f"in{channel}_label": label, f"in{channel}_input": millivolts, f"curr{channel}_input": milliamps,
            f"in{channel}_enable": 1, f"curr{channel}_max": 32760, f"curr{channel}_crit": 32760,
            f"curr{channel}_max_alarm": 0, f"curr{channel}_crit_alarm": 0, f"in{channel + 3}_input": 80,
            f"shunt{channel}_resistor": 5000,
        })  # fmt: skip
    return files


_NANO_NOW, _NANO_LATER = linux(6, 0.0, 1.5)
ORIN_NANO = Board(
    files={
        **_NANO_NOW, **own_group(), **_orin_zones(),
        **device_tree("nvidia,p3768-0000+p3767-0005", "nvidia,p3767-0005", "nvidia,tegra234"),
        **cooling(0, "cpufreq-cpu0", 0, 27), **cooling(1, "cpufreq-cpu4", 0, 27),
        **cooling(2, "devfreq-17000000.gpu", 0, 4), **cooling(3, "pwm-fan", 1, 3),
        **cooling(4, "cpu-throttle-alert", 0, 1), **cooling(5, "gpu-throttle-alert", 0, 1),
        **cooling(6, "hot-surface-alert", 1, 1),
        **_rails(1, {1: ("VDD_IN", 5072, 1488), 2: ("VDD_CPU_GPU_CV", 5064, 352), 3: ("VDD_SOC", 5064, 296)}),
        **hwmon(0, "pwmfan", pwm1=88),
        **clocks(0, "0 1 2 3", 1728000, 1510400, 1344000), **clocks(4, "4 5", 1728000, 1510400, 729600),
        **folder("/sys/class/devfreq/17000000.gpu", cur_freq=306000000, max_freq=624750000, min_freq=306000000),
        **folder("/sys/class/devfreq/17000000.gpu/device", load=237),
        "/sys/class/devfreq/17000000.gpu/device/of_node/name": "gpu\0",
    },
    later=_NANO_LATER,
    signals=(
        Expected(Kind.HEAT, "cpu-thermal", 52.312, "C", f"{ZONES}0/temp", 99.0, 104.5),
        Expected(Kind.HEAT, "tj-thermal", 52.312, "C", f"{ZONES}8/temp", 99.0, 104.5),
        Expected(Kind.SLOWED, "cpufreq-cpu4", 0, "steps", f"{COOLING}1/cur_state", 27),
        Expected(Kind.SLOWED, "cpu-throttle-alert", 0, "steps", f"{COOLING}4/cur_state", 1),
        Expected(Kind.COOLING, "hot-surface-alert", 1, "steps", f"{COOLING}6/cur_state", 1),
        Expected(Kind.POWER, "VDD_IN", 7.547136, "W", f"{HWMON}1/curr1_input"),
        Expected(Kind.POWER, "VDD_SOC", 1.498944, "W", f"{HWMON}1/curr3_input"),
        Expected(Kind.SUPPLY_ALARM, "current too high", 0, "flag", f"{HWMON}1/curr2_crit_alarm"),
        Expected(Kind.GPU_LOAD, "17000000.gpu", 0.237, "share", "/sys/class/devfreq/17000000.gpu/device/load"),
        Expected(Kind.GPU_CLOCK, "17000000.gpu", 306, "MHz", "/sys/class/devfreq/17000000.gpu/cur_freq", 624.75),
        Expected(Kind.CLOCK_LIMIT, "CPUs 4,5", 1510.4, "MHz", f"{POLICY}4/scaling_max_freq", 1728),
        *load_signals(6, 0.0),
    ),
    readings={
        "temp_c": 52.312, "throttle_temp_c": 99.0, "critical_temp_c": 104.5, "heat_throttled": False,
        "undervoltage": False, "cpu_freq_fraction": 1510.4 / 1728, "power_w": 7.547136, **load_readings(6, 0.0),
    },
    unknown=(*(f"{ZONES}{number}/temp" for number in (2, 3, 4)),),  # blocks that are switched off
    missing=("Raspberry Pi throttle bits", "RAPL energy counters", "power supplies"),
)  # fmt: skip

_AGX_NOW, _AGX_LATER = linux(12, 0.5, 1.5)
AGX_ORIN = Board(
    files={
        **_AGX_NOW, **own_group(), **_orin_zones(),
        **device_tree("nvidia,p3737-0000+p3701-0000", "nvidia,p3701-0000", "nvidia,tegra234"),
        **cooling(0, "cpufreq-cpu0", 3, 20), **cooling(1, "pwm-fan", 9, 10),
        **_rails(3, {1: ("VDD_GPU_SOC", 18792, 140), 2: ("VDD_CPU_CV", 18784, 60), 3: ("VIN_SYS_5V0", 4968, 980)}),
        **_rails(4, {1: ("NC", 0, 0), 2: ("VDDQ_VDD2_1V8AO", 4968, 404), 3: ("NC", 0, 0)}),
        **clocks(0, "0 1 2 3", 2201600, 1881600, 1881600), **clocks(4, "4 5 6 7", 2201600, 2201600, 2201600),
        **clocks(8, "8 9 10 11", 2201600, 2201600, 729600),
    },
    later=_AGX_LATER,
    signals=(
        Expected(Kind.HEAT, "tj-thermal", 52.312, "C", f"{ZONES}8/temp", 99.0, 104.5),
        Expected(Kind.SLOWED, "cpufreq-cpu0", 3, "steps", f"{COOLING}0/cur_state", 20),
        Expected(Kind.POWER, "VDD_GPU_SOC", 2.63088, "W", f"{HWMON}3/curr1_input"),
        Expected(Kind.POWER, "VDDQ_VDD2_1V8AO", 2.007072, "W", f"{HWMON}4/curr2_input"),
        *load_signals(12, 0.5),
    ),
    readings={
        "temp_c": 52.312, "throttle_temp_c": 99.0, "critical_temp_c": 104.5, "heat_throttled": True,
        "undervoltage": False, "cpu_freq_fraction": 1881.6 / 2201.6,
        "power_w": 2.63088 + 1.12704 + 4.86864 + 2.007072, **load_readings(12, 0.5),
    },
    unknown=(*(f"{ZONES}{number}/temp" for number in (2, 3, 4)),),
    missing=("GPU", "Jetson rails of JetPack 4"),
)  # fmt: skip

_OLD_NOW, _OLD_LATER = linux(4, 0.05, 1.5, pressure=False)
_IIO = "/sys/bus/iio/devices/iio:device0"
OLD_NANO = Board(
    files={
        **_OLD_NOW, **own_group(), **device_tree("nvidia,p3449-0000-b00+p3448-0000-b00", "nvidia,tegra210"),
        **zone(0, "AO-therm", 40500), **zone(1, "CPU-therm", 36500, ("critical", 102500), ("passive", 97000)),
        **zone(2, "GPU-therm", 35500, ("critical", 103000), ("passive", 98000)), **zone(3, "PLL-therm", 34500),
        **zone(4, "PMIC-Die", 100000, ("critical", 105000), ("passive", 103000)), **zone(5, "thermal-fan-est", 36000),
        **cooling(0, "cpu-balanced", 0, 10), **cooling(1, "gpu-balanced", 0, 10), **cooling(2, "pwm-fan", 0, 10),
        **folder(_IIO, name="ina3221x", rail_name_0="POM_5V_IN", rail_name_1="POM_5V_GPU", rail_name_2="POM_5V_CPU",
                 in_power0_input=2310, in_power1_input=40, in_power2_input=420, in_voltage0_input=5112),
        **folder("/sys/class/devfreq/57000000.gpu", cur_freq=76800000, max_freq=921600000),
        **folder("/sys/class/devfreq/57000000.gpu/device", load=15),
        **clocks(0, "0 1 2 3", 1479000, 1479000, 1479000),
    },
    later=_OLD_LATER,
    signals=(
        Expected(Kind.HEAT, "CPU-therm", 36.5, "C", f"{ZONES}1/temp", 97.0, 102.5),
        Expected(Kind.TEMPERATURE, "PMIC-Die", 100.0, "C", f"{ZONES}4/temp", 103.0, 105.0),
        Expected(Kind.SLOWED, "cpu-balanced", 0, "steps", f"{COOLING}0/cur_state", 10),
        Expected(Kind.POWER, "POM_5V_IN", 2.31, "W", f"{_IIO}/in_power0_input"),
        Expected(Kind.POWER, "POM_5V_CPU", 0.42, "W", f"{_IIO}/in_power2_input"),
        Expected(Kind.GPU_LOAD, "57000000.gpu", 0.015, "share", "/sys/class/devfreq/57000000.gpu/device/load"),
        *load_signals(4, 0.05)[:4],
    ),
    readings={
        "temp_c": 36.5, "throttle_temp_c": 97.0, "critical_temp_c": 102.5, "heat_throttled": False,
        "cpu_freq_fraction": 1.0, "power_w": 2.31, **load_readings(4, 0.05), "cpu_pressure": None,
    },
    missing=("known limit of the board", "pressure stall information", "hwmon chips"),
)  # fmt: skip

_RK_NOW, _RK_LATER = linux(8, 0.125, 1.5, allowed="4-7", usable=4)
_RK_TRIPS = (("passive", 75000), ("passive", 85000), ("critical", 115000))
RK3588 = Board(
    files={
        **_RK_NOW, **own_group(), **device_tree("radxa,rock-5b", "rockchip,rk3588"),
        **zone(0, "package-thermal", 80384, ("critical", 115000)),
        **zone(1, "bigcore0-thermal", 84125, *_RK_TRIPS, policy="power_allocator"),
        **zone(2, "bigcore2-thermal", 83200, *_RK_TRIPS, policy="power_allocator"),
        **zone(3, "littlecore-thermal", 79400, *_RK_TRIPS, policy="power_allocator"),
        **zone(4, "center-thermal", 77615, ("critical", 115000)),
        **zone(5, "gpu-thermal", 76692, ("passive", 85000), ("critical", 115000)),
        **zone(6, "npu-thermal", 77615, ("critical", 115000)),
        **cooling(0, "cpufreq-cpu0", 0, 7), **cooling(1, "cpufreq-cpu4", 2, 8), **cooling(2, "cpufreq-cpu6", 2, 8),
        **cooling(3, "devfreq-fb000000.gpu", 0, 7), **cooling(4, "pwm-fan", 3, 3),
        **hwmon(0, "package_thermal", temp1_input=80384), **hwmon(7, "pwmfan", pwm1=255),
        **clocks(0, "0 1 2 3", 1800000, 1800000, 1008000), **clocks(4, "4 5", 2400000, 2016000, 2016000),
        **clocks(6, "6 7", 2400000, 2016000, 2016000),
        **folder("/sys/class/devfreq/fb000000.gpu", cur_freq=300000000, max_freq=1000000000, load="12@300000000Hz"),
        **folder("/sys/class/devfreq/dmc", cur_freq=528000000, max_freq=2112000000, load="31@528000000Hz"),
    },
    later=_RK_LATER,
    signals=(
        Expected(Kind.HEAT, "bigcore0-thermal", 84.125, "C", f"{ZONES}1/temp", 85.0, 115.0),
        Expected(Kind.HEAT, "gpu-thermal", 76.692, "C", f"{ZONES}5/temp", 85.0, 115.0),
        Expected(Kind.HEAT, "package-thermal", 80.384, "C", f"{ZONES}0/temp", None, 115.0),
        Expected(Kind.SLOWED, "cpufreq-cpu4", 2, "steps", f"{COOLING}1/cur_state", 8),
        Expected(Kind.GPU_LOAD, "fb000000.gpu", 0.12, "share", "/sys/class/devfreq/fb000000.gpu/load"),
        Expected(Kind.CLOCK_LIMIT, "CPUs 6,7", 2016, "MHz", f"{POLICY}6/scaling_max_freq", 2400),
        Expected(Kind.FOREIGN_LOAD, "other programs", 0.125, "share", "/proc/stat"),
        Expected(Kind.PROCESSORS, "affinity", 4, "CPUs", "/proc/self/status"),
    ),
    readings={
        "temp_c": 84.125, "throttle_temp_c": 85.0, "critical_temp_c": 115.0, "heat_throttled": True,
        "cpu_freq_fraction": 2016 / 2400, **load_readings(4, 0.125),
    },
    missing=("known limit of the board", "power supplies", "Raspberry Pi throttle bits"),
)  # fmt: skip

_BOXED_NOW, _BOXED_LATER = linux(4, 0.1, 1.5)
PI_5_IN_A_CONTAINER = Board(  # no device tree, no firmware; the kernel has no trip but the critical one
    files={
        **_BOXED_NOW,
        "/proc/cpuinfo": "processor\t: 3\nCPU part\t: 0xd0b\n\nRevision\t: d04170\nSerial\t\t: 0123456789abcdef\n"
                         "Model\t\t: Raspberry Pi 5 Model B Rev 1.0",
        "/proc/self/cgroup": "0::/",
        "/proc/self/mountinfo": "640 612 0:29 / /sys/fs/cgroup ro - cgroup2 cgroup rw",
        **zone(0, "cpu-thermal", 84200, ("critical", 110000)),
        **clocks(0, "0 1 2 3", 2400000, 2400000, 2400000),
    },
    later=_BOXED_LATER,
    signals=(
        Expected(Kind.HEAT, "cpu-thermal", 84.2, "C", f"{ZONES}0/temp", None, 110.0),
        Expected(Kind.HEAT_LIMIT, "firmware slows from", 80.0, "C", "/proc/cpuinfo"),
        *load_signals(4, 0.1),
    ),
    readings={
        "temp_c": 84.2, "throttle_temp_c": 80.0, "critical_temp_c": 110.0, "cpu_freq_fraction": 1.0,
        **load_readings(4, 0.1),
    },
    missing=("Raspberry Pi throttle bits", "power supplies"),
)  # fmt: skip
