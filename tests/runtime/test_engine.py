from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from json_fields import set_in
from numpy.typing import NDArray
from tiny_bundle import (
    CIRCLE,
    CONTEXT,
    EOS,
    REPLY,
    TEMPLATE,
    VOCAB,
    facts,
    ids,
    successors,
    write_bundle,
    write_manifest,
)

from mbq_runtime import BundleError, Engine, UsageError
from mbq_runtime.bundle.facts import Budget
from mbq_runtime.engine import Prompt, Session, genai
from mbq_runtime.engine import engine as engine_module
from mbq_runtime.engine.allowance import Allowance
from mbq_runtime.engine.score import SCORING_LOGITS_BYTES, mean_nll, scoring_chunk
from mbq_runtime.engine.threads import cores


def test_reply_to_a_chat_prompt(engine: Engine) -> None:
    generation = engine.generate("hello", max_tokens=40)
    pieces = list(generation)
    assert "".join(pieces) == REPLY
    assert "ö" in pieces  # two tokens, never half a character
    stats = generation.stats
    assert stats.tokens == tuple(ids(REPLY))
    assert stats.finish_reason == "stop"
    assert len(stats.bits) == len(stats.tokens) + 1  # the pass that gave the end token
    assert stats.ttft_s > 0
    assert stats.tokens_per_s > 0


def test_what_the_reply_continues(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only then is the text before it known to the decoder, which may remove a space before a first word."""
    seen: list[list[int]] = []
    stream = engine._tokenizer.stream

    def spied(shown: object = (), after: object = ()) -> object:
        seen.append(list(after))  # type: ignore[call-overload]
        return stream()

    monkeypatch.setattr(engine._tokenizer, "stream", spied)
    said = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "AB"}]
    for prompt, options, continues in (
        ("xA", {"chat": False}, True),
        ("xA", {}, False),
        (said, {}, True),
        (said[:1], {}, False),
        (ids("xA"), {}, False),
        (ids("xA"), {"continues": True}, True),
    ):
        engine.generate(prompt, **options).close()  # type: ignore[arg-type]
        assert bool(seen.pop()) is continues, prompt


def test_chat_prompt_is_the_template(engine: Engine) -> None:
    text = engine.chat_prompt([{"role": "user", "content": 'say "ö"'}])
    assert text == '<|im_start|>user\nsay "ö"<|im_end|>\n<|im_start|>assistant\n'
    as_text = engine.generate('say "ö"')
    as_messages = engine.generate([{"role": "user", "content": 'say "ö"'}])
    expected = len([1, *ids('user\nsay "ö"'), EOS, *ids("\n"), 1, *ids("assistant\n")])
    assert as_text.stats.prompt_tokens == as_messages.stats.prompt_tokens == expected


def test_raw_prompt_text_and_tokens(engine: Engine) -> None:
    assert engine.generate("A", chat=False, max_tokens=9).text() == "BCDEFGABC"
    generation = engine.generate(ids("A"), max_tokens=9)
    assert generation.text() == "BCDEFGABC"
    assert generation.stats.finish_reason == "length"
    assert len(generation.stats.tokens) == len(generation.stats.bits) == 9


def test_reply_ends_with_the_context(engine: Engine) -> None:
    generation = engine.generate(ids("A" * (CONTEXT - 3)), max_tokens=1000)
    assert generation.text() == "BCD"
    assert generation.stats.finish_reason == "length"


@pytest.mark.parametrize("stop", ["DE", ["xx", "E", "DE"], ["EF", "DEFG"]])
def test_stop_text_ends_the_reply_and_is_left_out(engine: Engine, stop: str | list[str]) -> None:
    generation = engine.generate("A", chat=False, max_tokens=20, stop=stop)
    text = generation.text()
    assert text == {"DE": "BC", "xx": "BC", "EF": "BCD"}[stop if isinstance(stop, str) else stop[0]]
    assert generation.stats.finish_reason == "stop"


def test_text_held_back_for_a_stop_text_comes_out_at_the_end(engine: Engine) -> None:
    assert engine.generate("A", chat=False, max_tokens=3, stop=["CDEXX", "D!"]).text() == "BCD"


def test_bits_are_reported_per_pass(engine: Engine) -> None:
    prompt = ids("xyz" * 7)  # longer than a chunk
    generation = engine.generate(prompt, max_tokens=4, avg_bits=4.0)
    list(generation)
    stats = generation.stats
    assert stats.prompt_bits == pytest.approx(4.0 + np.mean(prompt) / 1000, abs=1e-5)
    last_chunk = prompt[len(prompt) // 8 * 8 :]
    fed = [float(np.mean(last_chunk)), *stats.tokens[:-1]]
    assert stats.bits == pytest.approx([4.0 + token / 1000 for token in fed], abs=1e-5)
    assert stats.avg_bits_used == pytest.approx(np.mean(stats.bits))


def test_budget_set_between_pieces_holds_from_the_next_token(engine: Engine) -> None:
    generation = engine.generate("A", chat=False, max_tokens=12, avg_bits=8.0)
    for i, _ in enumerate(generation):
        if i == 4:
            engine.avg_bits = 3.5
    budgets = np.array(generation.stats.bits) - np.array([ids("A")[0], *generation.stats.tokens[:-1]]) / 1000
    assert budgets == pytest.approx([8.0] * 5 + [3.5] * 7, abs=1e-5)


def test_budget_set_from_another_thread_holds_from_the_next_token(engine: Engine) -> None:
    """A second thread sets a new budget after each token; each next pass uses exactly that one."""
    wanted = [8.0, 3.0, 6.5, 4.0, 5.5, 7.0, 3.25, 8.0, 4.75, 6.0]
    token_out, budget_set = threading.Semaphore(0), threading.Semaphore(0)

    def controller() -> None:
        for bits in wanted[1:]:
            token_out.acquire()
            engine.avg_bits = bits
            budget_set.release()

    thread = threading.Thread(target=controller)
    thread.start()
    generation = engine.generate("A", chat=False, max_tokens=len(wanted), avg_bits=wanted[0])
    for i, _ in enumerate(generation):
        if i < len(wanted) - 1:
            token_out.release()
            budget_set.acquire()
    thread.join()
    fed = np.array([ids("A")[0], *generation.stats.tokens[:-1]])
    assert np.array(generation.stats.bits) - fed / 1000 == pytest.approx(wanted, abs=1e-5)


def test_free_running_thread_changes_the_budget_of_a_running_reply(engine: Engine) -> None:
    """Without a hand-shake, a new budget of another thread takes effect before the reply ends."""
    done = threading.Event()
    seen = threading.Event()

    def controller() -> None:
        seen.wait()
        engine.avg_bits = 3.0
        done.set()

    thread = threading.Thread(target=controller)
    thread.start()
    generation = engine.generate("A", chat=False, max_tokens=CONTEXT, avg_bits=8.0)
    for _ in generation:
        seen.set()
        time.sleep(0.001)  # as long as a pass of a real model, in which a waiting thread asks for its turn
    thread.join()
    assert done.is_set()
    used = np.array(generation.stats.bits) - np.array([ids("A")[0], *generation.stats.tokens[:-1]]) / 1000
    assert used[0] == pytest.approx(8.0, abs=1e-5)
    assert used[-1] == pytest.approx(3.0, abs=1e-5)
    assert (np.diff(used) < -1).sum() == 1


def test_what_native_code_reads_of_a_budget() -> None:
    """At the bits of the ceiling every token gets them: the budget is then the last one of the routers' table."""
    allowance = Allowance(facts(), 5.0)
    assert allowance.numbers.tolist() == [5, 4]
    for ceiling, bits, numbers in ((4.0, 4.0, [8, 2]), (5.9, 4.0, [8, 2]), (3.0, 3.0, [8, 1]), (6.0, 5.0, [5, 3])):
        allowance.set(5.0, ceiling)
        assert (allowance.bits, allowance.numbers.tolist()) == (bits, numbers)
    allowance.set(8.0, None)
    assert (allowance.bits, allowance.numbers.tolist()) == (8, [8, 4])
    trimmed = Allowance(replace(facts(), budget=Budget(3, 4, 4)), 3.5)
    assert (trimmed.numbers.tolist(), trimmed.within(8), trimmed.numbers_at(4).tolist()) == ([3.5, 2], 4, [8, 2])


@pytest.mark.parametrize("value", [2.9, 8.01, float("nan"), float("inf"), -1, "much"])
def test_budget_out_of_range_names_the_bundle_s_range(engine: Engine, value: float) -> None:
    with pytest.raises(UsageError, match=r"average bits .*: .* takes a number from 3 to 8"):
        engine.avg_bits = value
    assert engine.avg_bits == 8.0


def test_sampling_repeats_with_its_seed_and_varies_without(engine: Engine) -> None:
    def sample(seed: int | None) -> tuple[int, ...]:
        generation = engine.generate(ids("A"), max_tokens=24, temperature=3.0, top_k=200, top_p=0.99, seed=seed)
        list(generation)
        return generation.stats.tokens

    assert sample(5) == sample(5)
    assert sample(5) != sample(6)
    assert sample(None) != sample(None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens 0: needed at least 1"),
        ({"temperature": -1.0}, "temperature -1.0: needed 0 or above"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_p": 0.0}, "top_p 0.0: needed above 0"),
        ({"top_k": -1}, "top_k -1"),
        ({"max_tokens": 1.5}, "max_tokens 1.5: needed a whole number"),
        ({"max_tokens": None}, "max_tokens None: needed a whole number"),
        ({"seed": 0.5}, "seed 0.5: needed a whole number"),
        ({"logprobs": "3"}, "logprobs '3': needed a whole number"),
        ({"logit_bias": {1 << 70: 1.0}}, "token id 1180591620717411303424: the model's ids"),
        ({"seed": 2**31}, "seed 2147483648"),
        ({"stop": ""}, "stop"),
        ({"avg_bits": 9}, "average bits 9"),
    ],
)
def test_bad_options_are_refused_at_the_call(engine: Engine, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        engine.generate("A", **options)  # type: ignore[arg-type]


def test_bad_prompts_are_refused_at_the_call(engine: Engine) -> None:
    nothing: list[Prompt] = ["", "  \n", []]
    for prompt in nothing:
        with pytest.raises(UsageError, match="the prompt is empty"):
            engine.generate(prompt)
    with pytest.raises(UsageError, match=f"the prompt is {CONTEXT} tokens long; .* at most {CONTEXT - 1}"):
        engine.generate("A" * CONTEXT, chat=False)
    with pytest.raises(UsageError, match=f"token id {VOCAB}: the model's ids go from 0 to {VOCAB - 1}"):
        engine.generate([5, VOCAB])
    conversation: Any = [{"role": "user", "content": "A"}, 5]
    with pytest.raises(UsageError, match="the conversation has 5, needed messages with role and content"):
        engine.generate(conversation)
    assert engine.generate(np.array([5, 6]), max_tokens=1).text() == engine.generate([5, 6], max_tokens=1).text()  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"text has U\+DC80, half a character, at position 1"):
        engine.generate("a\udc80b")


@pytest.mark.parametrize("odd", [1 << 70, -(1 << 70), -1, VOCAB, 68.7, "a", None, [1, 2], {}], ids=str)
def test_what_is_no_token_id(engine: Engine, bundle: Path, odd: Any) -> None:
    session = Session(bundle, threads=1)
    calls: list[Callable[[list[Any]], object]] = [
        lambda ids: engine.generate(ids),
        lambda ids: engine.decode(ids),
        lambda ids: engine.score(ids, 4.0),
        lambda ids: engine.logits(ids, 4.0),
        lambda ids: engine.likelihoods(ids, 4.0),
        lambda ids: session.run(ids, 4.0),
    ]
    for call in calls:
        with pytest.raises(UsageError, match=rf"^token id .*: the model's ids go from 0 to {VOCAB - 1}$"):
            call([5, odd])


def test_one_reply_at_a_time(engine: Engine) -> None:
    first = engine.generate("A", chat=False)
    next(first)
    with pytest.raises(UsageError, match="already generating"):
        next(engine.generate("B", chat=False))
    first.close()
    assert first.stats.finish_reason == "closed"
    assert list(first) == []
    assert engine.generate("B", chat=False, max_tokens=2).text() == "CD"


def test_a_dropped_reply_frees_the_engine(engine: Engine) -> None:
    for _ in engine.generate("A", chat=False):
        break
    with engine.generate("B", chat=False) as generation:
        next(generation)
    with pytest.raises(ZeroDivisionError):
        _ = [1 / len(piece.strip("B")) for piece in engine.generate("A", chat=False)]
    assert engine.generate("C", chat=False, max_tokens=2).text() == "DE"


def test_opening_token_goes_before_raw_text_only(tmp_path: Path) -> None:
    engine = Engine.load(write_bundle(tmp_path / "bos", bos=True))
    assert engine.opening_tokens == [1]
    assert engine.encode("AB") == ids("AB")
    assert engine.encode("AB", add_bos=True) == [1, *ids("AB")]
    assert engine.generate("AB", chat=False).stats.prompt_tokens == 3
    assert engine.generate(ids("AB")).stats.prompt_tokens == 2


def test_no_opening_token_without_the_tokenizer_saying_so(engine: Engine) -> None:
    assert engine.opening_tokens == []


def test_score_agrees_with_plain_onnxruntime_and_numpy(engine: Engine, bundle: Path) -> None:
    """Chunked scoring in the engine, one pass in plain ONNX Runtime, and float64 by hand."""
    tokens = np.random.default_rng(3).integers(0, VOCAB, 50).tolist()
    session = Session(bundle, threads=1)
    for bits in (3.0, 5.5, 8.0):
        window = session.run(tokens, bits)
        assert window.logits.shape == (50, VOCAB)
        logits = window.logits.astype(np.float64)[:-1]
        by_hand = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(49), tokens[1:]]
        found = engine.score(tokens, bits)
        assert found.nll == pytest.approx(by_hand.mean(), rel=1e-5)
        assert mean_nll(window.logits[:-1], np.array(tokens[1:])) == pytest.approx(by_hand.mean(), rel=1e-5)
        assert found.avg_bits_used == pytest.approx(bits + np.mean(tokens) / 1000, abs=1e-5)
        assert window.avg_bits_used == pytest.approx(found.avg_bits_used, abs=1e-5)
    assert engine.avg_bits == 8.0


def test_mean_nll_survives_large_logits() -> None:
    logits = np.array([[1e4, 0.0, 0.0], [0.0, 0.0, -1e4]], np.float32)
    assert mean_nll(logits, np.array([0, 1])) == pytest.approx(np.log(2) / 2)
    assert mean_nll(logits[:1], np.array([1])) == pytest.approx(1e4)


def test_model_says_what_it_knows(engine: Engine) -> None:
    """Every greedy step is the successor of the last token."""
    generation = engine.generate(ids("z"), max_tokens=40)
    list(generation)
    following = successors()
    before = [ids("z")[0], *generation.stats.tokens]
    assert all(b == following[a] for a, b in pairwise(before))
    assert CIRCLE not in generation.text()


def test_load_refuses_before_the_engine_sees_anything(bundle_copy: Path) -> None:
    model = bundle_copy / "model.onnx"
    model.write_bytes(model.read_bytes()[:-1])
    for opened_by in (Engine.load, Session):
        with pytest.raises(BundleError, match=r"model\.onnx: \d+ bytes long where the manifest says \d+"):
            opened_by(bundle_copy)


def test_load_with_bad_arguments(bundle: Path) -> None:
    with pytest.raises(UsageError, match="threads 0"):
        Engine.load(bundle, threads=0)
    with pytest.raises(UsageError, match="takes a number from 3 to 8"):
        Engine.load(bundle, avg_bits=2)
    assert Engine.load(bundle, avg_bits=3.25).avg_bits == 3.25


def _limit_to(root: Path, quota_us: int) -> None:
    """Write the files of a control group (version 2) that holds this process."""
    for path, text in {
        "proc/self/cgroup": "0::/box\n",
        "proc/self/mountinfo": "30 24 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
        "sys/fs/cgroup/box/cpu.max": f"{quota_us} 100000\n",
        "sys/fs/cgroup/box/cpu.stat": "nr_periods 10\nnr_throttled 0\n",
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)


@pytest.mark.parametrize(
    ("capacities", "count"),
    [
        ([530, 530, 530, 530, 1024, 1024, 1024, 1024], 4),  # RK3588: A55 and A76
        ([290, 290, 290, 290, 760, 760, 760, 760, 1024], 5),  # a phone's small, big and largest
        ([1024, 1024, 1024, 1024], 4),
    ],
)
def test_a_thread_for_each_big_core(
    capacities: list[int], count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(len(capacities))))
    for cpu, capacity in enumerate(capacities):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{cpu}"
        folder.mkdir(parents=True)
        (folder / "cpu_capacity").write_text(f"{capacity}\n")
    assert cores(tmp_path) == count
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})  # bound to the small ones, or to two of them
    assert cores(tmp_path) == 2
    (tmp_path / "sys/devices/system/cpu/cpu0/cpu_capacity").write_text("")
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_bytes(b"processor: 0\nmodel name: \xff\xfe\n")
    assert cores(tmp_path) >= 1  # a file that says nothing counts as a whole core


def test_long_stop_texts_cost_little(engine: Engine) -> None:
    """The replies are cycles of A to G, so the first stop text may begin at every seventh character."""
    whole = engine.generate("A", chat=False, max_tokens=60).text()

    def cost_s(length: int) -> float:
        stops = ["x" * length, whole[:50] + "x" * length, whole[1:] + "x" * length, "é" * length]
        begun_s = time.process_time()
        assert engine.generate("A", chat=False, max_tokens=60, stop=stops).text() == whole
        return time.process_time() - begun_s

    assert min(cost_s(10**6) for _ in range(3)) < 10 * min(cost_s(100) for _ in range(3))


def test_a_reply_is_closed_from_another_thread(engine: Engine) -> None:
    def slow(seconds: float, bits: float) -> None:
        time.sleep(0.05)

    engine.add_listener(slow)
    try:
        for _ in range(3):
            reply = engine.generate("A", chat=False, max_tokens=60)
            reader = threading.Thread(target=reply.text)
            reader.start()
            while len(reply.stats.tokens) < 2:
                time.sleep(0.001)
            reply.close()
            reader.join()
            assert reply.stats.finish_reason == "closed"
            assert len(reply.stats.tokens) < 30
            assert list(reply) == []
    finally:
        engine.remove_listener(slow)
    assert engine.generate("A", chat=False, max_tokens=3).text() == "BCD"  # the engine is free


def test_a_listener_can_close_the_reply(engine: Engine) -> None:
    reply = engine.generate("A", chat=False, max_tokens=60)
    engine.add_listener(close := lambda seconds, bits: reply.close())
    assert len(reply.text()) <= 2
    engine.remove_listener(close)
    assert reply.stats.finish_reason == "closed"
    assert engine.generate("A", chat=False, max_tokens=3).text() == "BCD"


def test_a_thread_for_each_core(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a number, onnxruntime-genai would use fewer."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3, 9})
    for cpu, siblings in {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}.items():
        topology = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{siblings}\n")
    assert cores(tmp_path) == 3
    _limit_to(tmp_path, quota_us=150_000)
    assert cores(tmp_path) == 2  # one and a half
    _limit_to(tmp_path, quota_us=900_000)
    assert cores(tmp_path) == 3
    before = set(os.listdir("/proc/self/task"))
    monkeypatch.setattr(engine_module, "cores", lambda: 3)
    loaded = Engine.load(bundle)
    assert len(set(os.listdir("/proc/self/task")) - before) >= 2  # the caller is the third
    assert loaded.generate(CIRCLE, max_tokens=3, chat=False).text()


def test_engine_s_own_complaint_is_one_line(bundle_copy: Path) -> None:
    (bundle_copy / "model.onnx").write_bytes(b"\x08\x0a" + b"junk" * 9)
    write_manifest(bundle_copy)
    for opened_by in (Engine.load, Session):
        with pytest.raises(BundleError) as caught:
            opened_by(bundle_copy)
        assert "\n" not in str(caught.value)
        assert str(bundle_copy) in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model.decoder.session_options.custom_ops_library", "/tmp/other.so", "custom_ops_library is '/tmp/other.so'"),
        ("model.decoder.session_options.custom_ops_library", "lib/libmbq_ops.so", "which mbq-export does not write"),
        ("model.decoder.filename", "../model.onnx", "filename is '../model.onnx', needed 'model.onnx'"),
        ("model.context_length", 1000, "context_length is 1000, needed 96"),
        ("model.vocab_size", 7, "vocab_size is 7, needed 264"),
        ("model.eos_token_id", ..., "model.eos_token_id is missing"),
        ("model.eos_token_id", None, "model.eos_token_id is None, needed a list"),
        ("search.chunk_size", ..., "search.chunk_size is missing"),
        ("search.chunk_size", 0, "search.chunk_size is 0, needed 1 to"),
        ("search.chunk_size", "8", "search.chunk_size is '8', needed a whole number"),
        ("model.decoder.head_size", 32, r"past_key_values.0.key has shape \[0, 2, 0, 16\], needed 2 heads of 32"),
        ("model.draft", {"filename": "x.onnx"}, "model.draft is .* which mbq-export does not write"),
        ("model.decoder.session_options.enable_profiling", "/tmp/p", "enable_profiling is '/tmp/p'"),
        ("model.decoder.session_options.provider_options", [{"x": {}}], r"provider_options is .*, needed \[\]"),
    ],
)
def test_engine_configuration_must_fit_the_manifest(bundle_copy: Path, field: str, value: object, message: str) -> None:
    """The configuration must not name a library that the manifest does not list."""
    set_in(bundle_copy / "genai_config.json", field, value)
    write_manifest(bundle_copy)
    with pytest.raises(BundleError, match=message):
        Engine.load(bundle_copy)


def test_bundle_without_template_takes_prompts_as_they_are(bundle_copy: Path) -> None:
    assert (bundle_copy / "chat_template.jinja").read_text() == TEMPLATE
    (bundle_copy / "chat_template.jinja").unlink()
    write_manifest(bundle_copy)
    engine = Engine.load(bundle_copy)
    assert not engine.has_chat_template
    assert engine.generate("A", max_tokens=3).text() == "BCD"
    with pytest.raises(BundleError, match="no chat template"):
        engine.generate([{"role": "user", "content": "A"}])


def test_time_passes_runs_what_it_says(engine: Engine) -> None:
    found = engine.time_passes([20, 1, 1], 4.0)  # the first in chunks of 8, 8 and 4
    tokens = np.random.default_rng(0).integers(0, VOCAB, 22, np.int32)
    assert found.avg_bits_used == pytest.approx(4.0 + tokens.mean() / 1000, abs=1e-5)
    assert len(found.seconds) == 3
    assert min(found.seconds) > 0
    assert engine.avg_bits == 8.0
    assert engine.generate("hello", max_tokens=40).text() == REPLY


@pytest.mark.parametrize("sizes", [[], [3, 0], [CONTEXT, 1]])
def test_time_passes_refuses(engine: Engine, sizes: list[int]) -> None:
    with pytest.raises(UsageError, match=f"{sum(sizes)} tokens to time: needed 1 to {CONTEXT}"):
        engine.time_passes(sizes, 4.0)


def test_listeners_hear_every_token_but_the_first(engine: Engine) -> None:
    heard: list[tuple[str, float]] = []

    def first(seconds: float, bits: float) -> None:
        assert seconds > 0
        heard.append(("first", bits))

    def second(seconds: float, bits: float) -> None:
        heard.append(("second", bits))
        engine.remove_listener(second)  # from within a call

    engine.add_listener(first)
    engine.add_listener(second)
    engine.add_listener(first)
    reply = engine.generate(ids("A"), max_tokens=4)
    reply.text()
    engine.remove_listener(first)
    engine.remove_listener(second)  # not there any more: nothing happens
    assert heard[:3] == [
        ("first", reply.stats.bits[1]),
        ("second", reply.stats.bits[1]),
        ("first", reply.stats.bits[1]),
    ]
    assert [who for who, _ in heard] == ["first", "second", "first"] + ["first"] * 4
    engine.generate(ids("A"), max_tokens=4).text()
    assert len(heard) == 10  # one of the two is left
    engine.remove_listener(first)


def test_listeners_may_come_and_go_while_a_reply_runs(engine: Engine) -> None:
    def nothing(seconds: float, bits: float) -> None: ...

    done = threading.Event()

    def come_and_go() -> None:
        while not done.is_set():
            engine.add_listener(nothing)
            engine.remove_listener(nothing)

    threads = [threading.Thread(target=come_and_go) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        assert len(engine.generate(ids("A"), max_tokens=60).text()) == 60
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert engine._listeners == ()


@pytest.mark.parametrize("after_s", [0.0, 0.2])
def test_stop_from_another_thread_ends_the_reply(engine: Engine, after_s: float) -> None:
    def wait(seconds: float, bits: float) -> None:
        time.sleep(0.02)

    engine.add_listener(wait)
    reply = engine.generate("xA", max_tokens=90, chat=False)
    stopper = threading.Timer(after_s, reply.stop)
    stopper.start()
    text = reply.text()
    stopper.join()
    engine.remove_listener(wait)
    assert len(text) < 60
    assert (CIRCLE * 13)[1:].startswith(text)
    assert reply.stats.finish_reason == "closed"
    assert engine.generate("hello", max_tokens=40).text() == REPLY


def test_stop_ends_a_long_prompt_between_its_chunks(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from mbq_runtime.engine import genai

    reply = engine.generate("x" * 90, max_tokens=5, chat=False)  # twelve chunks of 8
    passes = []

    def bits_used(run: object) -> float:
        passes.append(run)
        if len(passes) == 3:
            reply.stop()
        return 8.0

    monkeypatch.setattr(genai._Context, "bits_used", bits_used)
    assert reply.text() == ""
    assert len(passes) == 3
    assert reply.stats.tokens == ()
    assert reply.stats.finish_reason == "closed"


def test_logits_are_those_of_the_plain_session(engine: Engine, bundle: Path) -> None:
    tokens = ids("The boats leave")  # two chunks of 8
    window = engine.logits(tokens, 4.0)
    expected = Session(bundle).run(tokens, 4.0)
    np.testing.assert_allclose(window.logits, expected.logits, rtol=1e-4, atol=1e-4)
    assert window.avg_bits_used == pytest.approx(expected.avg_bits_used, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "message"),
    [("abacus", "engine 'abacus' is not known; choose one of: onnx"), ("", "engine '' is not known")],
)
def test_an_unknown_engine(bundle: Path, name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Engine.load(bundle, engine=name)
    assert Engine.load(bundle, engine="onnx").name == "onnx"


def test_context_may_be_made_smaller(bundle: Path) -> None:
    small = Engine.load(bundle, threads=1, context=20)
    assert small.context_length == 20
    reply = small.generate("xA", max_tokens=90, chat=False)
    assert len(reply.text()) == 18
    assert reply.stats.finish_reason == "length"
    with pytest.raises(UsageError, match="the bundle takes at most 19"):
        small.generate("x" * 20, chat=False)
    for bad in (1, CONTEXT + 1):
        with pytest.raises(UsageError, match=f"context {bad}: .* takes 2 to {CONTEXT} tokens"):
            Engine.load(bundle, context=bad)


@pytest.mark.parametrize(("vocab", "chunk"), [(49152, 128), (151936, 32), (32000, 256), (264, 512), (10**7, 16)])
def test_scoring_bounds_the_logits_of_a_pass(vocab: int, chunk: int) -> None:
    assert scoring_chunk(vocab, 512) == chunk
    assert chunk == 16 or 4 * vocab * chunk <= SCORING_LOGITS_BYTES
    assert scoring_chunk(vocab, 8) == 8


def test_only_scoring_runs_in_the_smaller_chunks(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from mbq_runtime.engine import genai

    sizes: list[int] = []
    append = genai._Context.append

    def counted(run: genai._Context, tokens: NDArray[np.int32], rows: int) -> None:
        sizes.append(len(tokens))
        append(run, tokens, rows)

    monkeypatch.setattr(genai._Context, "append", counted)
    before = engine.score(ids("A" * 16), 4.0)
    monkeypatch.setattr(engine, "_scoring_chunk", 4)
    after = engine.score(ids("A" * 16), 4.0)
    assert sizes == [8, 8, 4, 4, 4, 4]
    assert after.nll == pytest.approx(before.nll, rel=1e-5)
    sizes.clear()
    engine.generate(ids("A" * 16), max_tokens=1).text()
    assert sizes == [8, 8]


@pytest.mark.parametrize("shape", [(), (0,), (1, 1)])
def test_an_output_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    class Generator:
        def get_output(self, _: str) -> NDArray[np.float32]:
            return np.ones(shape, np.float32)

    context = genai._Context(Generator(), np.zeros(1, np.int64), np.zeros(2, np.float32))
    with pytest.raises(BundleError, match="the graph gives avg_bits_used the shape"):
        context.bits_used()


@pytest.mark.parametrize("kept", ["original", "passes"])
def test_an_error_of_a_score_that_is_kept_leaves_the_engine_free(engine: Engine, kept: str) -> None:
    """A notebook keeps the last error, with the frames that it went through."""
    text, errors = ids("ABCDEFGABCDEFG"), list[BaseException]()

    with pytest.MonkeyPatch.context() as patch:
        if kept == "passes":
            for name in ("rate", "rate_tokens", "compare", "join_logits"):
                patch.setattr(engine_module, name, _behind_a_pass)
        scores: list[Callable[[], object]] = [lambda: engine.score_against(text, 8.0, np.zeros((14, 3), np.float32))]
        if kept == "passes":
            scores += [lambda: engine.score(text, 8.0), lambda: engine.logits(text, 8.0)]
            scores += [lambda: engine.likelihoods(text, 8.0)]
        for score in scores:
            with pytest.raises((UsageError, KeyboardInterrupt)) as caught:
                score()
            errors.append(caught.value)
            assert engine.generate(ids("A"), max_tokens=2).text()
    assert all(error.__traceback__ for error in errors)


def _behind_a_pass(*given: Any) -> None:
    next(next(one for one in given if isinstance(one, Generator)))
    raise KeyboardInterrupt


def test_a_reply_that_is_dropped_times_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = list[int]()
    monkeypatch.setattr(Engine, "_time_guesses", lambda _: timed.append(1))
    monkeypatch.setattr(engine, "_speculate", "auto")
    reply = engine.generate(ids("ABCDEFGABCDEFG"), max_tokens=20)
    next(reply)
    del reply
    gc.collect()
    assert not timed
    assert engine.generate(ids("A"), max_tokens=5).text()
    assert timed
