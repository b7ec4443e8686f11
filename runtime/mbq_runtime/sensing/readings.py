"""Readings: the state of the board at one moment, as the controller uses it.

A field is None when the board does not have the sensor, or the sensor cannot be read.  None means unknown.  It never
means cool or idle.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Readings:
    """The state of the board at one moment.  None is unknown.

    >>> Readings(time_s=0.0, temp_c=61.0).power_w is None
    True

    Args:
        time_s: time in s on a monotonic clock.
        temp_c: temperature in C of the thermal zone that is nearest to its limit.
        throttle_temp_c: temperature in C from which the board slows itself.
        critical_temp_c: temperature in C at which the board switches off.
        heat_throttled: whether heat slows the board now.
        undervoltage: whether a weak power supply slows the board now.
        cpu_freq_fraction: highest clock allowed now over the highest clock of the processor, 0 to 1.
        discharging: whether the board runs on battery.
        battery_fraction: charge of the battery, 0 to 1.
        battery_energy_wh: energy left in the battery, in Wh.
        power_w: power in W of the whole board, or of the part that its sensor measures.
        foreign_cpu_fraction: processor time that other programs used, over the time of all processors that this
            process may use, 0 to 1.
        cpu_pressure: share of time in which a task waited for a processor, 0 to 1.
        available_cpus: processors that this process may use, cgroup limits included.
        cgroup_throttled_fraction: share of scheduling periods in which the cgroup limit stopped this process, 0 to 1.
        available_memory_bytes: memory in bytes available without swapping, cgroup limits included.
        tokens_per_s: decode speed of the last tokens, pauses between them left out.
        decode_bits: average bits per weight that the last tokens used.
        decode_share: share of the time since the last readings that was spent on tokens, 0 to 1.
        decode_threads: number of threads that the engine uses.
        device_state: how hard the device is pressed, as a browser tells it: 0 nominal, 1 fair, 2 serious, 3 critical.
        saving: whether the user asked programs to save data and energy.
        hidden: whether nobody sees the reply, because its page is in the background.
    """

    time_s: float
    temp_c: float | None = None
    throttle_temp_c: float | None = None
    critical_temp_c: float | None = None
    heat_throttled: bool | None = None
    undervoltage: bool | None = None
    cpu_freq_fraction: float | None = None
    discharging: bool | None = None
    battery_fraction: float | None = None
    battery_energy_wh: float | None = None
    power_w: float | None = None
    foreign_cpu_fraction: float | None = None
    cpu_pressure: float | None = None
    available_cpus: float | None = None
    cgroup_throttled_fraction: float | None = None
    available_memory_bytes: int | None = None
    tokens_per_s: float | None = None
    decode_bits: float | None = None
    decode_share: float | None = None
    decode_threads: int | None = None
    device_state: int | None = None
    saving: bool | None = None
    hidden: bool | None = None
