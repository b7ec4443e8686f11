"""The signals of the triggers over time: smoothed values, their slopes, and notices about sensors that are lost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from mbq_runtime.sensing.readings import Readings

from .triggers import TRIGGERS, Situation, Trigger

HOLD_S = 30.0
"""The last value of a sensor without new readings is used for this long, in s."""
_GRACE_S = 5.0  # sensors without any reading by then are reported as unknown
_SLOPE_S = 10.0  # time constant of a slope
_ABSURD = 1e6  # limit for values of broken sensors, so that smoothing stays finite
_UNKNOWN = "unknown"


class Track(NamedTuple):
    """One signal over time.

    value: smoothed value, in the unit of the trigger; slope: change of it per second; at_s: controller time of the last
    known value; readings: the readings that gave it; latest: the last value, without smoothing.
    """

    value: float
    slope: float
    at_s: float
    readings: Readings
    latest: float


class Seen(NamedTuple):
    """Result of ``sense``: the signals, the notices of this moment, and the sensors about which one was given."""

    tracks: Mapping[str, Track]
    notices: tuple[str, ...]
    told: frozenset[str]


def sense(before: Mapping[str, Track], told: frozenset[str], at: Situation, clock_s: float, elapsed_s: float) -> Seen:
    """Add the readings to the smoothed signals.  Give a notice for each sensor that is missing or lost.

    Args:
        before: the signals so far, by trigger name.
        told: names of the sensors about which a notice was given.
        at: the readings, and what else a trigger can use.
        clock_s: time on the controller's clock, in s.
        elapsed_s: time since the last readings, in s.
    """
    tracks, notices, known = dict(before), [], set(told)
    for name in at.policy.bands:
        trigger, track = TRIGGERS[name], tracks.get(name)
        silent_s = clock_s - track.at_s if track else 0.0
        value = trigger.value(at)
        if value is not None:
            tracks[name] = _smoothed(
                track if silent_s <= HOLD_S else None, trigger, _believable(value), at.readings, clock_s, elapsed_s
            )
        elif track and not trigger.sensor:
            del tracks[name]
        elif silent_s > HOLD_S and name not in known:
            known.add(name)
            notices.append(f"{name}: no reading for {HOLD_S:.0f} s; it is ignored")
    if clock_s >= _GRACE_S and _UNKNOWN not in known:
        known.add(_UNKNOWN)
        unknown = [name for name in at.policy.bands if TRIGGERS[name].sensor and name not in tracks]
        if unknown:
            notices.append(f"unknown on this board, and ignored: {', '.join(unknown)}")
    return Seen(tracks, tuple(notices), frozenset(known))


def _smoothed(
    track: Track | None, trigger: Trigger, value: float, readings: Readings, clock_s: float, elapsed_s: float
) -> Track:
    if track is None:
        return Track(value, 0.0, clock_s, readings, value)
    weight = 1 - math.exp(-elapsed_s / trigger.smooth_s) if trigger.smooth_s else 1.0
    change = weight * (value - track.value)
    slope = track.slope
    if elapsed_s:
        # The time between two steps can be almost 0.
        slope += (1 - math.exp(-elapsed_s / _SLOPE_S)) * (_believable(change / elapsed_s) - slope)
    return Track(track.value + change, slope, clock_s, readings, value)


def _believable(value: float) -> float:
    return min(max(value, -_ABSURD), _ABSURD)
