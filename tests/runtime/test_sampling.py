"""Tokens chosen from logits."""

from __future__ import annotations

import numpy as np
import pytest

from mbq_runtime.engine.generation import Sampling
from mbq_runtime.engine.sampling import Sampler

LOGITS = np.log(np.array([0.1, 0.5, 0.05, 0.3, 0.05], np.float32))


def drawn(count: int = 2000, **options: float) -> dict[int, float]:
    """Share of each token among ``count`` choices."""
    sampler = Sampler(Sampling(seed=1, **options))  # type: ignore[arg-type]
    tokens = [sampler.choose(LOGITS) for _ in range(count)]
    return {token: tokens.count(token) / count for token in sorted(set(tokens))}


def test_without_temperature_the_likeliest() -> None:
    assert Sampler(None).choose(LOGITS) == 1
    assert drawn(20, temperature=0.0) == {1: 1.0}


def test_tokens_come_as_often_as_they_are_likely() -> None:
    assert drawn(temperature=1.0) == pytest.approx({0: 0.1, 1: 0.5, 2: 0.05, 3: 0.3, 4: 0.05}, abs=0.04)


def test_temperature_flattens() -> None:
    root = np.sqrt([0.1, 0.5, 0.05, 0.3, 0.05])
    assert drawn(temperature=2.0) == pytest.approx(dict(enumerate(root / root.sum())), abs=0.04)


def test_top_k_keeps_that_many() -> None:
    assert drawn(temperature=1.0, top_k=2) == pytest.approx({1: 5 / 8, 3: 3 / 8}, abs=0.04)
    assert set(drawn(temperature=1.0, top_k=99)) == set(range(5))


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    assert set(drawn(temperature=1.0, top_p=0.45)) == {1}
    assert set(drawn(temperature=1.0, top_p=0.75)) == {1, 3}
    assert set(drawn(temperature=1.0, top_p=0.85)) == {0, 1, 3}


def test_a_seed_repeats() -> None:
    first, second = (Sampler(Sampling(temperature=1.0, seed=7)) for _ in range(2))
    assert [first.choose(LOGITS) for _ in range(50)] == [second.choose(LOGITS) for _ in range(50)]


@pytest.mark.parametrize("temperature", [1e-308, 5e-324, 1e-30, 9.9e-6])
def test_tiny_temperatures_take_the_likeliest(temperature: float) -> None:
    assert drawn(20, temperature=temperature) == {1: 1.0}


def test_the_lowest_temperature_that_draws_is_finite() -> None:
    with np.errstate(all="raise", under="ignore"):
        assert drawn(20, temperature=1e-5) == {1: 1.0}
