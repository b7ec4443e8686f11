"""Tokens chosen from logits."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mbq_runtime import UsageError
from mbq_runtime.engine.generation import Sampling
from mbq_runtime.engine.sampling import LEAST_LOGPROB, Sampler, candidates, likelihood

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


VOCAB = 500
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"top_k": 20},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"top_k": 50, "top_p": 0.95, "min_p": 0.02, "temperature": 1.7},
    {"top_k": 1},
    {"top_p": 1e-6},
    {"min_p": 1.0},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8, "top_k": 30, "temperature": 0.9},
    {"logit_bias": {3: 5.0, 7: -100.0, 11: 100.0}, "top_p": 0.9},
    {"logit_bias": {3: 5.0}, "repetition_penalty": 1.2},
]


def chances(logits: NDArray[np.float32], prompt: list[int], options: dict[str, Any]) -> NDArray[np.float64]:
    """float64 [vocab]: how likely each token is to be drawn."""
    sampling = Sampling(**{"temperature": 1.0, **options})
    tokens, weights = candidates(Sampler(sampling, prompt).scores(logits), sampling)
    found = np.zeros(len(logits))
    found[tokens] = weights
    return found / found.sum()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_chances_are_those_of_transformers(options: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers.generation.logits_process")
    rng = np.random.default_rng(0)
    chain = processors.LogitsProcessorList()
    if bias := options.get("logit_bias"):
        chain.append(processors.SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()]))
    if penalty := options.get("repetition_penalty"):
        chain.append(processors.RepetitionPenaltyLogitsProcessor(penalty))
    for name, kind in (
        ("temperature", processors.TemperatureLogitsWarper), ("top_k", processors.TopKLogitsWarper),
        ("top_p", processors.TopPLogitsWarper), ("min_p", processors.MinPLogitsWarper),
    ):  # fmt: skip
        if name in options:
            chain.append(kind(options[name]))
    for _ in range(20):
        logits = (rng.standard_normal(VOCAB) * 4).astype(np.float32)
        prompt = rng.integers(0, VOCAB, 40).tolist()
        wanted = torch.softmax(chain(torch.tensor([prompt]), torch.tensor(logits)[None]), -1)[0].numpy()
        np.testing.assert_allclose(chances(logits, prompt, options), wanted, rtol=1e-3, atol=1e-6)


def test_penalties_follow_their_definition() -> None:
    """OpenAI's formula, written out: c is how often the reply has the token."""
    rng = np.random.default_rng(1)
    sampling = Sampling(temperature=1.0, seed=3, presence_penalty=0.7, frequency_penalty=0.4, top_k=20)
    sampler, said = Sampler(sampling, prompt=[1, 2, 3]), Counter[int]()
    for _ in range(60):
        logits = rng.standard_normal(30).astype(np.float32)
        wanted = [value - said[i] * 0.4 - float(said[i] > 0) * 0.7 for i, value in enumerate(logits.tolist())]
        np.testing.assert_allclose(sampler.scores(logits), wanted, atol=1e-5)
        said[sampler.choose(logits)] += 1
    assert len(said) > 5


def test_a_repetition_penalty_counts_prompt_and_reply() -> None:
    sampler = Sampler(Sampling(repetition_penalty=2.0), prompt=[0])
    logits = np.array([4.0, 3.0, -1.0], np.float32)
    assert sampler.scores(logits).tolist() == [2.0, 3.0, -1.0]
    assert sampler.choose(logits) == 1
    assert sampler.scores(logits).tolist() == [2.0, 1.5, -1.0]
    assert logits.tolist() == [4.0, 3.0, -1.0]


def test_a_bias_can_force_and_forbid() -> None:
    assert Sampler(Sampling(logit_bias={2: 100.0})).choose(LOGITS) == 2
    assert Sampler(Sampling(logit_bias={1: -100.0})).choose(LOGITS) == 3


@pytest.mark.parametrize("count", [0, 1, 3, 5, 99])
def test_likelihoods_are_logarithms_of_the_models_own_chances(count: int) -> None:
    sampler = Sampler(Sampling(temperature=0.3, repetition_penalty=1.5, logprobs=count), prompt=[1])
    found = sampler.likelihood(LOGITS + 7, 3)
    assert found is not None
    assert found.token == 3
    assert found.logprob == pytest.approx(np.log(0.3), abs=1e-5)
    assert [token for token, _ in found.top[:3]] == [1, 3, 0][:count]
    assert [value for _, value in found.top] == sorted((value for _, value in found.top), reverse=True)
    assert len(found.top) == min(count, 5)
    assert Sampler(Sampling()).likelihood(LOGITS, 3) is None


def test_what_is_impossible_is_a_number_of_json() -> None:
    found = likelihood(np.array([1.0, -np.inf], np.float32), 1, 2)
    assert found.logprob == LEAST_LOGPROB
    assert found.top == ((0, 0.0), (1, LEAST_LOGPROB))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_p": 1.1}, "min_p 1.1: needed 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty 0.0: needed above 0"),
        ({"presence_penalty": 2.5}, "presence_penalty 2.5: needed -2 to 2"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty nan"),
        ({"logit_bias": {3: 101.0}}, "logit_bias 101.0: needed values from -100 to 100"),
        ({"logprobs": -1}, "logprobs -1"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Sampling(**options)
