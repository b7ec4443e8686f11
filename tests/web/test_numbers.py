"""Thresholds, texts of numbers and drawn tokens of the page are those of Python, by the thousand."""

from __future__ import annotations

import math
import random
from typing import Any

import nodes
import numpy as np
import pytest

from mbq_runtime.bundle.gpu_plan import Table
from mbq_runtime.engine.gpu import thresholds


def test_thresholds() -> None:
    chance, given, wanted = random.Random(3), [], []
    for _ in range(2000):
        budgets = sorted(chance.uniform(3, 8) for _ in range(chance.randint(1, 6)))
        table = {"budgets": budgets, "thresholds": [chance.gauss(0, 3) for _ in budgets]}
        bits = chance.choice((chance.uniform(2.9, 8.1), chance.choice(budgets)))
        plan: Any = type("Plan", (), {"tables": (Table(**{name: tuple(row) for name, row in table.items()}),)})
        given.append({"plan": {"tables": [table]}, "bits": bits})
        wanted.append(float(thresholds(plan, np.float32(bits))[0]))  # type: ignore[arg-type]
    script = """
    const { thresholds } = await import("./src/context.js");
    return given.map(({ plan, bits }) => thresholds(plan, bits)[0]);
    """
    assert nodes.run(script, given) == wanted


def test_numbers_as_text() -> None:
    chance = random.Random(4)
    values = [chance.uniform(0, 100) for _ in range(2000)]
    values += [n / 8 for n in range(400)] + [n / 200 for n in range(200)] + [0.05, 2.5, 0.125, 8.0, 4.35]
    wanted = [[f"{value:.1f}", f"{value:.0f}", f"{value:.0%}", f"{value:g}"] for value in values]
    script = """
    const { fixed, general, percent } = await import("./src/control/numbers.js");
    return given.map(value => [fixed(value, 1), fixed(value, 0), percent(value), general(value)]);
    """
    assert nodes.run(script, values) == wanted


FAULTS = """
const { checkOptions, choose } = await import("./src/sampling.js");
const message = act => { try { act(); return null; } catch (error) { return `${error.kind}: ${error.message}`; } };
"""


def test_options_that_no_reply_can_have() -> None:
    good = "{}, { maxTokens: Infinity, temperature: 0, topK: 0, topP: 1, minP: 0 }, { temperature: undefined, minP: 1 }"
    bad = "{ maxTokens: 0 }, { maxTokens: 1.5 }, { maxTokens: NaN }, { temperature: NaN }, { temperature: -1 },"
    bad += "{ temperature: '1' }, { temperature: null }, { topK: -1 }, { topK: 0.5 }, { topP: 0 }, { minP: 1.1 }"
    script = (
        FAULTS + f"return [[{good}], [{bad}]].map(list => list.map(options => message(() => checkOptions(options))));"
    )
    fine, faults = nodes.run(script, None)
    assert fine == [None] * len(fine)
    assert all(fault.startswith("usage: ") for fault in faults)
    assert faults[0] == "usage: maxTokens 0: needed a whole number from 1 on, or Infinity"


@pytest.mark.parametrize("logits", ["[NaN, 1, 2]", "[1, 2, NaN]", "[Infinity, 1]", "[-Infinity, -Infinity]"])
def test_logits_that_are_not_finite(logits: str) -> None:
    script = FAULTS + f"return message(() => choose(new Float32Array({logits}), {{ temperature: 1 }}, () => 0.5));"
    assert "broken: the model's logits are not finite" in nodes.run(script, None)


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"temperature": 1.0}, {0, 1, 2, 3}),
        ({"temperature": 1.0, "topK": 2}, {2, 3}),
        ({"temperature": 1.0, "topP": 0.6}, {3}),
        ({"temperature": 1.0, "topP": 0.7}, {2, 3}),
        ({"temperature": 1.0, "minP": 0.1}, {1, 2, 3}),
        ({"temperature": 1e-3}, {3}),
    ],
)
def test_drawn_tokens(options: dict[str, float], allowed: set[int]) -> None:
    weights = [0.03, 0.1, 0.23, 0.64]  # of the tokens 0 to 3, which add up to 1
    script = """
    const { choose, random } = await import("./src/sampling.js");
    const draw = random(7), logits = new Float32Array(given.logits), counts = [0, 0, 0, 0];
    for (let i = 0; i < 4000; i++) counts[choose(logits, given.options, draw)]++;
    return counts;
    """
    counts = nodes.run(script, {"logits": [math.log(weight) for weight in weights], "options": options})
    assert {token for token, count in enumerate(counts) if count} == allowed
    total = sum(weights[token] for token in allowed)
    if options["temperature"] == 1:
        for token in allowed:
            assert counts[token] / 4000 == pytest.approx(weights[token] / total, abs=0.03)
