"""All sensors of this machine.  One call reads them; it never raises and never waits for a slow sensor."""

from __future__ import annotations

import fcntl
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from .aggregate import aggregate
from .discovery import SENSOR_KINDS, SensorKind, discover
from .host import Host, Ioctl, NotFitted, RunCommand, Unreadable, run_command
from .probe import Probe
from .readings import Readings
from .signal import Kind, Signal

log = logging.getLogger(__name__)

# A call returns after at most _PATIENCE_S.  A sensor that takes longer than _SLOW_S continues in its own thread, and
# another thread reads the rest.
_PATIENCE_S, _SLOW_S = 0.03, 0.01
# A value without an update is used for this long after the next look was due.
_STALE_S = 3.0
_DISCOVERY_S = 10.0


class Sensors:
    """Reads heat, clocks, power, battery, load and memory of this machine.

    Nothing runs between two calls, except a sensor that is slow to answer.  It is safe to use from any thread.

    >>> Sensors(root="/nowhere").read().temp_c is None
    True

    Args:
        root: the folder that has /proc and /sys.
        clock: returns seconds that never go back; for tests.
        run: runs the commands that some boards need; for tests.
        ioctl: sends a request to a device; for tests.
    """

    def __init__(
        self,
        root: str | Path = "/",
        clock: Callable[[], float] = time.monotonic,
        run: RunCommand = run_command,
        ioctl: Ioctl = fcntl.ioctl,
    ) -> None:
        self._host = Host(str(root).rstrip("/"), clock, run, ioctl)
        self._state = threading.Condition()
        # Everything below is changed only while _state is locked.
        self._finders = [_Finder(self._host, sensor) for sensor in SENSOR_KINDS]
        self._queue: deque[Probe] = deque()
        self._started_s: dict[Probe, float] = {}  # the probes that are being read
        self._heard: dict[Probe, tuple[float, list[Signal]]] = {}
        self._lane = 0  # number of the thread that reads the queue; earlier threads end after their slow sensor
        self._lane_alive = False
        self._lane_moved_s = 0.0  # of time.monotonic

    def read(self) -> Readings:
        """The readings of now.  It takes at most about 30 ms, whatever the sensors do."""
        return aggregate(self.signals(), self._host.clock())

    def signals(self) -> list[Signal]:
        """Every signal with its age, and one signal of Kind.MISSING for each kind of sensor that is not present."""
        with self._state:
            self._look()
            now_s = self._host.clock()
            return [one for finder in self._finders for probe in (finder, *finder.found.values())
                    for one in self._told(probe, now_s)]  # fmt: skip

    def _look(self) -> None:
        """Read everything that is due, for at most _PATIENCE_S."""
        deadline_s = time.monotonic() + _PATIENCE_S
        if not self._queue and not self._lane_alive:
            self._queue.extend(probe for finder in self._finders for probe in (finder, *finder.found.values())
                               if self._is_due(probe))  # fmt: skip
        while self._queue or self._lane_alive:
            now_s = time.monotonic()
            if not self._lane_alive or now_s - self._lane_moved_s >= _SLOW_S:
                self._start_lane(now_s)
            if now_s >= deadline_s:
                return
            self._state.wait(min(deadline_s, self._lane_moved_s + _SLOW_S) - now_s)

    def _is_due(self, probe: Probe) -> bool:
        heard = self._heard.get(probe)
        waited = heard is None or self._host.clock() - heard[0] >= probe.every_s
        return waited and probe not in self._started_s

    def _start_lane(self, now_s: float) -> None:
        self._lane += 1
        self._lane_moved_s = now_s
        try:
            threading.Thread(target=self._read_queue, args=(self._lane,), name="mbq-sensing", daemon=True).start()
            self._lane_alive = True
        except RuntimeError:  # no thread can be started: the next call reads the queue
            self._lane_alive = False

    def _read_queue(self, lane: int) -> None:
        probe: Probe | None = None
        found: list[Signal] = []
        while True:
            with self._state:
                if probe is not None:
                    self._take(probe, found)
                if lane != self._lane:
                    return
                self._lane_moved_s = time.monotonic()
                if not self._queue:
                    self._lane_alive = False
                    self._state.notify_all()
                    return
                probe = self._queue.popleft()
                self._started_s[probe] = self._host.clock()
            found = self._ask(probe)

    def _ask(self, probe: Probe) -> list[Signal]:
        try:
            return probe.look()
        except NotFitted as error:
            problem = str(error)
            blank = [Signal(Kind.MISSING, probe.name, None, probe.path, problem=problem)]
        except Unreadable as error:
            problem = str(error)
            blank = probe.unknown(problem)
        except Exception:  # an unexpected sensor must not end a conversation
            log.info("%s could not be read", probe.path, exc_info=True)
            problem = "it has a form that is not known; mbq -v shows more"
            blank = probe.unknown(problem)
        _, before = self._heard.get(probe, (0.0, []))
        return [replace(one, value=None, problem=problem) for one in before] or blank

    def _take(self, probe: Probe, found: list[Signal]) -> None:
        del self._started_s[probe]
        self._heard[probe] = (self._host.clock(), found)
        if isinstance(probe, _Finder):
            self._queue.extend(one for one in probe.found.values() if one not in self._heard and self._is_due(one)
                               and one not in self._queue)  # fmt: skip

    def _told(self, probe: Probe, now_s: float) -> list[Signal]:
        heard = self._heard.get(probe)
        if heard is None:
            started_s = self._started_s.get(probe)
            return probe.unknown("not read yet" if started_s is None else f"no answer for {now_s - started_s:.1f} s")
        age_s = max(0.0, now_s - heard[0])
        if age_s <= probe.every_s + _STALE_S:
            return [replace(one, age_s=age_s) for one in heard[1]]
        problem = f"no answer for {age_s:.0f} s"
        return [replace(one, value=None, problem=problem, age_s=age_s) for one in heard[1]]


class _Finder(Probe):
    """Finds the devices of one row of SENSOR_KINDS.  It repeats this, because batteries and drivers come and go."""

    kind = Kind.MISSING
    every_s = _DISCOVERY_S

    def __init__(self, host: Host, sensor: SensorKind) -> None:
        super().__init__(host, sensor.places[0])
        self.name = sensor.name
        self.found: dict[str, Probe] = {}
        self._sensor = sensor

    def look(self) -> list[Signal]:
        # A removed device stays in the list, without a value.
        self.found = {**{probe.path: probe for probe in discover(self.host, self._sensor)}, **self.found}
        return []
