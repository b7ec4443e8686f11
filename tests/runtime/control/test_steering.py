"""The options of run, chat and serve that control the budget."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from mbq_runtime import Engine
from mbq_runtime.commands.steering import Steering, steered
from mbq_runtime.control.governor import Governor
from mbq_runtime.control.learned import Learned
from mbq_runtime.errors import UsageError


@pytest.mark.parametrize(
    ("options", "name", "bounds"),
    [
        ({}, "auto", (3.0, 8.0)),
        ({"bits": 5.0}, "fixed", (5.0, 5.0)),
        ({"bits": 5.0, "policy": "fixed"}, "fixed", (5.0, 5.0)),
        ({"policy": "fixed"}, "fixed", (3.0, 8.0)),
        ({"policy": "cool", "min_bits": 4.0, "max_bits": 6.5}, "cool", (4.0, 6.5)),
    ],
)
def test_policies(engine: Engine, options: dict[str, Any], name: str, bounds: tuple[float, float]) -> None:
    with steered(engine, Steering(**options)) as (bounded, governor):
        assert governor.policy.name == name
        assert governor.policy.bounds == bounds
        assert bounds[0] <= bounded.avg_bits <= bounds[1]
        if name == "fixed":
            assert engine.avg_bits == bounds[1]


@pytest.mark.parametrize(
    ("options", "mode", "under_pressure"),
    [
        ({}, "off", True),
        ({"speculate": "off"}, "off", False),
        ({"speculate": "auto"}, "auto", False),
        ({"speculate": "on", "bits": 5.0}, "on", False),
    ],
)
def test_speculation(engine: Engine, options: dict[str, Any], mode: str, under_pressure: bool) -> None:
    with steered(engine, Steering(**options)) as (bounded, governor):
        assert bounded.speculate == mode
        assert governor.policy.speculates is under_pressure
    engine.speculate = "off"


def test_a_time_counts_from_the_first_look() -> None:
    steering = Steering(last_until="2h")
    assert steering.applied is steering.applied


def test_goals() -> None:
    policy = Steering(min_tps=8.0, last_until="2h").make()
    assert policy.min_tps == 8.0
    assert policy.last_until_s == pytest.approx(time.monotonic() + 7200, abs=60)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "wild"}, "policy 'wild': needed one of fixed, auto"),
        ({"bits": 4.0, "policy": "auto"}, "--bits fixes the budget"),
        ({"bits": 4.0, "max_bits": 5.0}, "--bits fixes the budget"),
        ({"bits": 4.0, "min_tps": 5.0}, "policy fixed pursues no goal"),
        ({"policy": "fixed", "last_until": "18:00"}, "policy fixed pursues no goal"),
        ({"last_until": "soon"}, "'soon' is no time"),
        ({"bits": 9.0}, "takes a number from 3 to 8"),
        ({"min_bits": 6.0, "max_bits": 5.0}, "floor of 6 bits above the ceiling of 5 bits"),
    ],
)
def test_refusals(engine: Engine, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message), steered(engine, Steering(**options)):
        pass
    assert engine._listeners == ()


def test_events_go_to_the_file_and_to_the_listener(engine: Engine, tmp_path: Path) -> None:
    path, heard = tmp_path / "events.jsonl", []
    engine.avg_bits = 8.0
    with steered(engine, Steering(max_bits=4.0, events=path), heard.append) as (bounded, governor):
        assert bounded.avg_bits <= 4.0
        governor._tell(heard_of := _event())
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["reason"] for line in lines] == [event.reason for event in heard]
    assert heard_of in heard


def _event() -> Any:
    from mbq_runtime.control.events import Event
    from mbq_runtime.sensing.readings import Readings

    return Event(1.0, 8.0, 4.0, "a test", Readings(0.0))


def test_a_file_that_cannot_be_written(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="/no does not"), steered(engine, Steering(events=tmp_path / "no" / "e")):
        pass


def test_what_is_learned_is_known_to_the_next_command(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MBQ_CACHE_DIR", str(tmp_path))
    learned = Learned()
    for _ in range(20):
        learned = learned.with_token(engine.threads, 1.0, 0.01, 0.5)
    monkeypatch.setattr(Governor, "learned", learned)
    with steered(engine, Steering()):
        pass
    assert len(list((tmp_path / "learned").glob("*.json"))) == 1
    monkeypatch.undo()
    monkeypatch.setenv("MBQ_CACHE_DIR", str(tmp_path))
    with steered(engine, Steering()) as (_, governor):
        assert governor.learned.token_time(engine.threads).at(1.0) == pytest.approx(0.01)
