"""One look at the board: what the controller decides on.

A field is None when the board has no such sensor or it could not be read: unknown, never a guess,
and never taken for "cool" or "idle".
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Readings:
    """All signals at one moment.

    time_s: monotonic clock.
    temp_c, throttle_temp_c, critical_temp_c: of the thermal zone that is nearest to its limit; the
    temperature from which the board slows itself, and the one at which it switches off.
    heat_throttled, undervoltage: whether the board is being slowed now by heat, or by a weak supply.
    cpu_freq_fraction: the highest clock allowed now over the highest the processor has.
    discharging: whether it runs on battery; battery_fraction: 0 to 1; battery_energy_wh: what is left.
    power_w: drawn by the whole board, or by the part its sensor measures.
    foreign_cpu_fraction: processor time that other programs took, over that of all processors
    available to this one; cpu_pressure: share of time in which somebody waited for a processor.
    available_cpus: processors this process may use, cgroup limits counted;
    cgroup_throttled_fraction: share of scheduling periods in which that limit stopped it.
    available_memory_bytes: what can be had without swapping, cgroup limits counted.
    tokens_per_s: decode speed of late.
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
