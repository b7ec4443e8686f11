"""With guesses, a reply is the one without them: token for token, also where tokens are drawn."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import needs
import numpy as np
import pytest
from forked_mbq import Mbq
from numpy.typing import NDArray
from tiny_bundle import CIRCLE, CONTEXT, EOS, VOCAB, ids

from mbq_runtime import Engine, UsageError
from mbq_runtime.engine import Grammar, pass_costs
from mbq_runtime.engine.generation import GenerationStats, Sampling
from mbq_runtime.engine.pass_costs import PassCosts
from mbq_runtime.engine.sampling import Sampler
from mbq_runtime.engine.speculation import MOST_GUESSES, Acceptance, LookUp, checked

F32 = NDArray[np.float32]


@pytest.fixture
def guessing(engine: Engine) -> Iterator[Engine]:
    engine.speculate = "on"
    yield engine
    engine.speculate = "off"


def both(engine: Engine, prompt: str, **options: Any) -> tuple[GenerationStats, str, str]:
    """Figures and text of a reply with guesses, and the text without them."""
    reply = engine.generate(prompt, chat=False, **options)
    text = reply.text()
    engine.speculate = "off"
    plain = engine.generate(prompt, chat=False, **options)
    assert plain.text() == text
    engine.speculate = "on"
    assert plain.stats.tokens == reply.stats.tokens
    assert plain.stats.finish_reason == reply.stats.finish_reason
    assert plain.stats.guessed == 0
    logprobs = [[one.logprob for one in stats.likelihoods] for stats in (plain.stats, reply.stats)]
    assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-4)
    return reply.stats, text, plain.text()


def test_the_likeliest_tokens_are_the_same(guessing: Engine) -> None:
    rng = np.random.default_rng(0)
    kept = guessed = 0
    for _ in range(50):
        prompt = "".join(rng.choice([*"ABCDEFGxyz\n"], rng.integers(1, 30)))
        stats, _, _ = both(guessing, prompt + "A", max_tokens=60, logprobs=1)
        assert len(stats.bits) >= len(stats.tokens)
        kept, guessed = kept + stats.kept_guesses, guessed + stats.guessed
    assert kept > 1500
    assert guessed >= kept


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 5, "top_p": 0.9, "min_p": 0.01},
        {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.3},
        {"stop": ["FG", "C"], "temperature": 1.0},
        {"logit_bias": {EOS: 4.0}, "logprobs": 2},
    ],
    ids=str,
)
def test_drawn_tokens_are_the_same(guessing: Engine, options: dict[str, Any]) -> None:
    guessed = kept = 0
    for seed in range(12):
        stats, _, _ = both(guessing, "xA", **{"max_tokens": 40, "temperature": 1.8, "seed": seed, **options})
        guessed, kept = guessed + stats.guessed, kept + stats.kept_guesses
    assert guessed > kept > 0  # some guesses were wrong


def test_guesses_follow_a_grammar(guessing: Engine) -> None:
    needs.module("llguidance")
    wanted = Grammar.of_schema({"type": "array", "items": {"enum": ["AB", "CD"]}, "minItems": 3, "maxItems": 5})
    for seed in range(6):
        stats, text, _ = both(guessing, "A", grammar=wanted, max_tokens=60, temperature=1.0, seed=seed)
        assert set(json.loads(text)) <= {"AB", "CD"}
        assert stats.kept_guesses > 0


def test_a_session_keeps_the_tokens_of_the_reply(guessing: Engine) -> None:
    session, talk = guessing.session(), ids("xA")
    for seed in range(4):
        options: dict[str, Any] = {"max_tokens": 9, "temperature": 1.5, "seed": seed}
        reply = guessing.generate(talk, session=session, **options)
        reply.text()
        assert session.tokens == [*talk, *reply.stats.tokens][: len(session)]
        assert len(session) >= len(talk) + len(reply.stats.tokens) - 1
        guessing.speculate = "off"
        plain = guessing.generate(talk, **options)
        plain.text()
        guessing.speculate = "on"
        assert plain.stats.tokens == reply.stats.tokens
        talk = [*talk, *reply.stats.tokens, *ids("zA")]


def test_what_a_check_read_has_the_budget_that_was_asked_for(guessing: Engine) -> None:
    session = guessing.session()
    reply = guessing.generate(ids("xA"), max_tokens=30, avg_bits=8.0, session=session)
    reply.text()
    assert reply.stats.guessed > 0
    assert set(session._bits[: len(session)].tolist()) == {8.0}
    again = guessing.generate([*ids("xA"), *reply.stats.tokens], max_tokens=1, avg_bits=8.0, session=session)
    again.text()
    assert again.stats.cached_tokens == 2 + 29


def test_a_reply_to_the_end_of_the_context(guessing: Engine) -> None:
    stats, _, _ = both(guessing, "A" * 20, max_tokens=1000)
    assert len(stats.tokens) == CONTEXT - 20
    assert stats.finish_reason == "length"


def test_tokens_of_a_pass_share_its_time(guessing: Engine) -> None:
    heard: list[float] = []

    def note(seconds: float, bits: float) -> None:
        heard.append(seconds)

    guessing.add_listener(note)
    reply = guessing.generate("xA", chat=False, max_tokens=60)
    reply.text()
    guessing.remove_listener(note)
    assert len(heard) == 59
    assert reply.stats.kept_guesses > 0
    assert len(set(heard)) < 59  # those of one pass are equal
    assert sum(heard) == pytest.approx(59 / reply.stats.tokens_per_s)


def test_a_reply_can_be_stopped_within_a_pass(guessing: Engine) -> None:
    reply = guessing.generate("xA", chat=False, max_tokens=60)
    pieces = [next(reply) for _ in range(20)]
    reply.stop()
    assert [*pieces, *reply] == list((CIRCLE * 4)[1:21])
    assert reply.stats.finish_reason == "closed"
    assert guessing.generate("xA", chat=False, max_tokens=3).text() == "BCD"


def test_where_guesses_cost_more_than_they_give_auto_makes_none(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PassCosts, "note", lambda *_: None)  # the tiny model has other costs
    cheap, dear = np.array([1.0, 1.0, 1.0, 1.0]), np.array([1.0, 2.0, 4.0, 8.0])
    for seconds, fewest in ((cheap, 30), (dear, 0)):
        engine.__dict__["_pass_costs"] = PassCosts((1, 2, 4, 8), (3.0, 8.0), np.stack([seconds, seconds]))
        engine.speculate = "auto"
        reply = engine.generate("xA" + CIRCLE * 3, chat=False, max_tokens=50)
        assert reply.text() == (CIRCLE * 9)[:50]
        assert (reply.stats.guessed > 0) == (fewest > 0)
        assert reply.stats.kept_guesses >= fewest
    engine.speculate = "off"
    del engine.__dict__["_pass_costs"]


@pytest.mark.heavy
def test_the_rule_keeps_the_distribution() -> None:
    """Pairs of tokens in 20,000 replies, guessed by a model that differs, against their chances (chi-squared)."""
    rng = np.random.default_rng(0)
    true: F32 = rng.standard_normal((6, 6)).astype(np.float32) * 1.5  # [token before, token]
    other: F32 = true + rng.standard_normal((6, 6)).astype(np.float32)
    sampler, found, kept, draws = Sampler(Sampling(temperature=1.0, seed=1)), np.zeros((6, 6)), 0, 20_000
    for _ in range(draws):
        guess = sampler.fork().choose(other[0])
        first, *rest = checked(true[[0, guess]], [guess], sampler, frozenset())
        kept += len(rest)
        found[first, rest[0] if rest else sampler.choose(true[first])] += 1
    chances = np.exp(true - true.max(1, keepdims=True))
    chances /= chances.sum(1, keepdims=True)
    expected = draws * chances[0][:, None] * chances
    assert expected.min() > 5
    assert ((found - expected) ** 2 / expected).sum() < 74.9  # 35 degrees of freedom, p = 0.0001
    guesses = np.exp(other[0]) / np.exp(other[0]).sum()
    distance = np.abs(chances[0] - guesses).sum() / 2
    assert (1 - distance) / (1 + distance) - 0.02 < kept / draws < 1 - distance + 0.02


def test_a_mode_takes_effect_within_a_reply(engine: Engine) -> None:
    """Off, on and off again: the reply is the same, and tokens are guessed in between alone."""
    reply, counts = engine.generate("xA", chat=False, max_tokens=60), []
    pieces = []
    for at, piece in enumerate(reply):
        pieces.append(piece)
        if at in (10, 40):
            counts.append(reply.stats.guessed)
            engine.speculate = "on" if at == 10 else "off"
    assert "".join(pieces) == (CIRCLE * 9)[1:61]
    assert counts[0] == 0 < counts[1]
    assert reply.stats.guessed - counts[1] <= MOST_GUESSES


def test_an_end_token_ends_a_check() -> None:
    rows = np.eye(4, dtype=np.float32)[[1, 2, 3]]
    assert checked(rows, [1, 2], Sampler(None), frozenset()) == [1, 2, 3]
    assert checked(rows, [1, 2], Sampler(None), frozenset([1])) == [1]
    assert checked(rows, [0, 2], Sampler(None), frozenset()) == [1]


def test_look_up_takes_the_longest_and_last_match() -> None:
    assert LookUp([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3]).guess(3) == [4, 9, 2]
    assert LookUp([1, 2, 3, 4, 9, 2, 3]).guess(9) == [4, 9, 2, 3]
    assert LookUp([1, 2, 3]).guess(3) == LookUp([]).guess(3) == []
    matches = [LookUp([1, 2, 3, 4, 5, 9, *tail]).match() for tail in ((9, 5), (4, 5), (3, 4, 5), (1, 2, 3, 4, 5))]
    assert matches == [0, 2, 3, 5]
    found = LookUp([7, 8, 5, 7, 8])
    found.add(6)
    for token in (7, 8):
        found.add(token)
    assert found.guess(1) == [6]


def test_more_guesses_where_they_are_kept() -> None:
    costs = PassCosts((1, 8), (3.0, 8.0), np.array([[1.0, 1.35], [2.0, 2.7]]))
    assert costs.at(1, 5.5) == 1.5
    assert costs.at(8, 99.0) == 2.7
    counts = [costs.best_count(share, 0.5, 8.0, range(MOST_GUESSES + 1)) for share in (0.0, 0.5, 0.8, 1.0)]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, MOST_GUESSES)
    assert costs.best_count(0.0, 0.5, 8.0, range(1, 5)) == 1
    seen = Acceptance(0.5)
    for _ in range(60):
        seen.note(kept=1, guessed=3)  # the third was not looked at
    assert seen.share == pytest.approx(0.5, abs=0.01)
    for _ in range(60):
        seen.note(kept=3, guessed=3)
    assert seen.share > 0.9


def costs_of(one: float, more: float) -> PassCosts:
    """Costs of a model that takes ``one`` second for a token, and ``more`` for each other of a pass."""
    return PassCosts((1, 8), (3.0, 8.0), np.array([[one / 2, one / 2 + 7 * more], [one, one + 7 * more]]))


def test_costs_are_corrected_by_the_passes_of_replies() -> None:
    """The table says that a pass of many tokens costs as much as one; on this board each token costs as much."""
    costs, said = costs_of(1.0, 0.0), []
    for at in range(200):
        count = costs.best_count(0.5, 0.0, 8.0, range(8)) if at % 16 else 0
        costs.note(count + 1, 8.0, 3.0 * (count + 1))  # a board three times as slow
        said.append(count)
    assert said[1] > 0
    assert said[-20:] == [0] * 20
    assert sum(said) < 250
    assert costs.at(1, 8.0) == pytest.approx(3.0, rel=0.1)


def test_a_pass_that_takes_long_once_changes_little() -> None:
    costs = costs_of(1.0, 0.1)
    for _ in range(20):
        costs.note(1, 8.0, 1.0)
    costs.note(1, 8.0, 50.0)
    for _ in range(10):
        costs.note(1, 8.0, 1.0)
    assert costs.at(8, 8.0) / costs.at(1, 8.0) == pytest.approx(1.7, rel=0.05)
    assert costs.at(1, 8.0) == pytest.approx(1.0, rel=0.1)


def test_auto_times_passes_behind_a_reply_and_keeps_the_times(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MBQ_CACHE_DIR", str(tmp_path))
    measured: list[Any] = []
    measure = PassCosts.measure

    def counted(*arguments: Any) -> PassCosts:
        measured.append(arguments)
        return measure(*arguments)

    monkeypatch.setattr(PassCosts, "measure", counted)
    prompt = "xA" + CIRCLE * 3
    for run in range(3):
        engine = Engine.load(bundle, threads=1)
        engine.speculate = "auto"
        reply = engine.generate(prompt, chat=False, max_tokens=20)
        text = next(reply)
        assert len(measured) == (run > 0)  # not before the first token
        text += reply.text()
        assert text == (CIRCLE * 9)[:20]
        assert (reply.stats.guessed > 0) == (run > 0)
        assert len(measured) == 1
    (file,) = (tmp_path / "pass-costs").iterdir()
    assert pass_costs.place(bundle, "onnx", 2, (3.0, 8.0)) != file == pass_costs.place(bundle, "onnx", 1, (3.0, 8.0))
    engine = Engine.load(bundle, threads=2)
    engine.speculate = "auto"
    stopped = engine.generate(prompt, chat=False, max_tokens=20)
    next(stopped)
    stopped.close()
    assert len(measured) == 1  # somebody who stops a reply does not wait


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{", "x" * 5000, '{"sizes": [1, 2, 4, 8], "bits": [3, 8], "seconds": [[1, 1, 1], [1, 1, 1]]}',
        '{"sizes": [1, 2, 4, 8], "bits": [3, 8], "seconds": [[1, 1, 1, 1], [1, 1, 1, NaN]]}',
        '{"sizes": [1, 2, 4, 8], "bits": [8, 3], "seconds": [[1, 1, 1, 1], [1, 1, 1, 1]]}',
        '{"sizes": [1, 2, 4, 8], "bits": [3, 8], "seconds": [[1, 1, 1, 1], [1, 1, 0, 1]]}',
        '{"sizes": 1, "bits": [3, 8], "seconds": [[1, 1, 1, 1], [1, 1, 1, 1]]}',
    ],
)  # fmt: skip
def test_a_file_of_times_that_is_none_is_ignored(tmp_path: Path, text: str) -> None:
    file = tmp_path / "costs.json"
    assert pass_costs.load(file) is None
    file.write_text(text)
    assert pass_costs.load(file) is None
    pass_costs.save(PassCosts((1, 2, 4, 8), (3.0, 8.0), np.full((2, 4), 0.5)), file)
    found = pass_costs.load(file)
    assert found is not None
    assert (found.bits, found.seconds.tolist()) == ((3.0, 8.0), [[0.5] * 4] * 2)


def test_a_slow_board_times_each_pass_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pass_costs, "_ENOUGH_S", 0.0)
    sizes: list[int] = []
    start = engine._backend.start

    def counted(length: int, budget: F32) -> Any:
        context = start(length, budget)
        append = context.append
        monkeypatch.setattr(context, "append", lambda tokens, rows: (sizes.append(rows), append(tokens, rows)))
        return context

    monkeypatch.setattr(engine._backend, "start", counted)
    costs = PassCosts.measure(engine._backend, (engine._allowed(3.0), engine._allowed(8.0)), VOCAB)
    assert sizes == [1, 2, 4, 8] * 2
    assert np.isfinite(costs.seconds).all()


def test_another_mode_is_refused(engine: Engine) -> None:
    with pytest.raises(UsageError, match="speculate 'maybe': needed one of off, on, auto"):
        engine.speculate = "maybe"


def test_the_command_says_what_was_guessed(bundle: Path, mbq: Mbq) -> None:
    command = ["run", bundle, "xA", "--raw", "--max-tokens", 40]
    off, on = (mbq([*command, "--speculate", mode]) for mode in ("off", "on"))
    assert off.code == on.code == 0
    assert off.out == on.out
    assert "guess" not in off.err
    assert "of 2" in on.err or "of 3" in on.err
    assert "guessed tokens were right" in on.err
