"""The page's controller gives the budgets and reasons of ``mbq_runtime.control`` for the same readings."""

from __future__ import annotations

import importlib.util
import math
import random
from dataclasses import replace
from typing import Any

import nodes
import pytest

from mbq_runtime.control import POLICIES, Policy, find_policy, start, step
from mbq_runtime.control.budget_trim import BudgetTrim
from mbq_runtime.sensing.readings import Readings

STORIES, LOOKS = 60, 120
STEP = """
const { start, step } = await import("./src/control/step.js");
const { Policy } = await import("./src/control/triggers.js");
return given.map(({ policy, options, looks }) => {
  const by = new Policy(policy, options);
  let state = start(by);
  return looks.map(([now, readings]) => {
    const decision = step(state, readings, now, by);
    state = decision.state;
    return [decision.budget, decision.reason];
  });
});
"""


def test_the_numbers_are_those_of_python() -> None:
    spec = importlib.util.spec_from_file_location("tables", nodes.WEB / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kept = (nodes.WEB / "src/control/tables.json").read_text(encoding="utf-8")
    assert kept == module.tables(), "python web/tables.py > web/src/control/tables.json"


class Phone:
    """A device whose signals come, go and change at random."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.readings: dict[str, Any] = {}
        self.tokens_per_s = chance.choice((2.0, 9.0, 40.0))

    def look(self) -> dict[str, Any]:
        chance, readings = self.chance, self.readings
        if chance.random() < 0.08:
            readings["device_state"] = chance.choice((None, 0, 0, 1, 2, 3))
        if chance.random() < 0.05:
            readings["discharging"] = chance.choice((None, False, True, True))
        if chance.random() < 0.1:
            readings["battery_fraction"] = chance.choice((None, chance.random(), 0.125, 0.2, 0.05))
        if chance.random() < 0.03:
            readings["saving"] = chance.choice((None, False, True))
        if chance.random() < 0.05:
            readings["hidden"] = chance.choice((None, False, False, True))
        if chance.random() < 0.1:
            self.tokens_per_s *= math.exp(chance.gauss(0, 0.5))
        idle = chance.random() < 0.1
        readings["tokens_per_s"] = None if idle else self.tokens_per_s * chance.uniform(0.95, 1.05)
        readings["decode_bits"] = None if idle else chance.uniform(3, 8)
        return dict(readings)


def story(number: int) -> tuple[Policy, list[tuple[float, dict[str, Any]]]]:
    """A policy, and the looks at one device: (seconds, readings)."""
    chance = random.Random(number)
    policy = replace(
        find_policy(list(POLICIES)[number % len(POLICIES)]),
        floor_bits=chance.choice((3.0, 3.35, 4.0)),
        ceiling_bits=chance.choice((6.0, 7.5, 8.0)),
        min_tps=chance.choice((None, None, 5.0, 12.5)),
        bytes_at=chance.choice(((), ((3.0, 55_000_000), (4.0, 72_000_000), (6.0, 106_000_000), (8.0, 139_000_000)))),
    )
    phone, now, looks = Phone(chance), 0.0, []
    for _ in range(LOOKS):
        looks.append((now, phone.look()))
        now += chance.choice((0.4, 0.4, 0.4, 0.9, 2.0, 25.0, -3.0, 700.0 if chance.random() < 0.1 else 0.4))
    return policy, looks


def test_a_page_decides_as_a_board_does() -> None:
    stories = [story(number) for number in range(STORIES)]
    given, wanted = [], []
    for policy, looks in stories:
        options = {
            "floorBits": policy.floor_bits,
            "ceilingBits": policy.ceiling_bits,
            "minTps": policy.min_tps,
            "bytesAt": policy.bytes_at,
        }
        given.append({"policy": policy.name, "options": options, "looks": looks})
        state, decisions = start(policy), []
        for now, readings in looks:
            state, budget, reason = step(state, Readings(time_s=now, **readings), now, policy)
            decisions.append((budget, reason))
        wanted.append(decisions)
    found = nodes.run(STEP, given)
    for number, (mine, theirs) in enumerate(zip(found, wanted, strict=True)):
        for look, ((budget, reason), (want, why)) in enumerate(zip(mine, theirs, strict=True)):
            assert budget == pytest.approx(want, abs=1e-9), (number, look, reason, why)
            assert reason == why, (number, look)
    seen = {reason.partition(":")[0] for decisions in wanted for _, reason in decisions}
    assert {"device", "battery", "saver", "hidden", "latency", "pace", "no pressure"} <= seen
    assert len({budget for decisions in wanted for budget, _ in decisions}) > 12


@pytest.mark.parametrize("name", ["eco", "toString", ""])
def test_an_unknown_policy_is_one_error(name: str) -> None:
    script = """
    const { Governor, MbqError } = await import("./src/index.js");
    const manifest = { weights: { bytes_per_token: {} } };
    const engine = { minBits: 3, maxBits: 8, ceilingBits: 8, manifest, listen: () => () => {} };
    const caught = make => {
      try { make(); } catch (error) { return [error instanceof MbqError, error.kind, error.message]; }
    };
    const governor = new Governor(engine, { readings: {} });
    const found = [
      caught(() => new Governor(engine, { readings: {} }, () => {}, given)), caught(() => governor.setPolicy(given)),
    ];
    governor.look();
    governor.stop();
    return [...found, governor.policy.name];
    """
    error = [True, "usage", f"policy {name}: needed one of {', '.join(POLICIES)}"]
    assert nodes.run(script, name) == [error, error, "auto"]


def test_the_correction_of_used_bits() -> None:
    chance = random.Random(1)
    used = [(chance.choice((4.0, 5.0, 5.0, 5.0)), chance.uniform(3, 8), chance.randint(1, 300)) for _ in range(500)]
    trim, wanted = BudgetTrim(5.0), []
    for budget, bits, tokens in used:
        trim = trim.at(budget).after(bits, tokens)
        wanted.append(trim.request(3.0, 8.0))
    script = """
    const { BudgetTrim } = await import("./src/control/trim.js");
    let trim = new BudgetTrim(5);
    return given.map(([budget, bits, tokens]) => (trim = trim.at(budget).after(bits, tokens)).request(3, 8));
    """
    assert nodes.run(script, used) == pytest.approx(wanted, abs=1e-12)
