"""The comparison: its formulas on numbers worked out by hand, and a whole run on a tiny model."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from tiny_models import write_checkpoint

from mbq_export.cli import command
from mbq_export.compare import last_word, report, rivals, run, weights
from mbq_export.compare.harness import Reference, Scores, Side
from mbq_export.model.checkpoint import Checkpoint
from mbq_export.model.loading import load
from mbq_export.model.source import locate
from mbq_runtime.engine import Window
from mbq_runtime.engine.session import Session
from mbq_runtime.errors import UsageError
from mbq_runtime.fidelity import Mean, compare_tokens

pytestmark = pytest.mark.heavy

WINDOWS = [[0, 1, 2], [2, 0, 1]]
SENTENCE = "The boats leave the harbour when the tide turns and the wind allows it. "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Checkpoint:
    return load(locate(str(folder)))


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    paragraph = "A lighthouse stands beside this harbour and its keeper counts what comes and goes " * 2
    file.write_text("\n\n".join(f"{i}. {paragraph}near the harbour." for i in range(30)))
    return file


def fixed(name: str, probabilities: list[float], method: str = "x", bits: float | None = 4, size: int = 100) -> Side:
    """A side that finds the same distribution everywhere."""
    logits = np.log(np.array(probabilities, np.float32))
    return Side(
        method, name, bits, lambda _: size, None, "", lambda tokens: Window(np.tile(logits, (len(tokens), 1)), 4.0)
    )


def quiet(done: int, total: int) -> None:
    pass


def test_scores_by_hand() -> None:
    p, q = [0.5, 0.25, 0.25], [0.2, 0.6, 0.2]
    with Reference(fixed("p", p), WINDOWS, quiet) as reference:
        own, other = reference.scores, reference.measure(fixed("q", q), quiet)
        again = reference.measure(fixed("p", p), quiet)
    assert (again.nll, again.agreement) == (own.nll, own.agreement)
    assert again.divergence == pytest.approx([0, 0], abs=1e-7)
    assert own.nll == pytest.approx([-math.log(0.25), -(math.log(0.5) + math.log(0.25)) / 2])
    assert own.divergence == [0, 0]
    assert own.agreement == [1, 1]
    assert other.nll == pytest.approx([-(math.log(0.6) + math.log(0.2)) / 2] * 2)
    # float16 keeps three decimal digits.  Errors of many tokens cancel; here all are the same.
    assert other.divergence == pytest.approx([sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))] * 2, 1e-3)
    assert other.agreement == [0, 0]
    assert other.bits == [4.0, 4.0]


def test_kept_logits_are_exact_enough() -> None:
    random = np.random.default_rng(0)
    original = random.normal(size=(96, 4096)) * 6
    near = original + random.normal(size=original.shape) * 0.05
    original[:, 7] = -1e6  # as good as impossible

    def side(logits: NDArray[np.float64]) -> Side:
        return Side("x", "x", 4, lambda _: 1, None, "", lambda tokens: Window(logits.astype(np.float32), 4.0))

    window = list(range(96))
    exact = compare_tokens(near[:-1].astype(np.float32), original[:-1].astype(np.float32), window[1:])
    with Reference(side(original), [window], quiet) as reference:
        found = reference.measure(side(near), quiet)
    assert exact.divergence.mean() > 1e-4
    assert abs(found.divergence[0] - exact.divergence.mean()) < 1e-5
    assert found.agreement[0] == exact.same_top.mean()


def test_ratio_has_the_error_of_paired_differences() -> None:
    a, b = Scores(nll=[1.0, 3.0, 5.0]), Scores(nll=[0.9, 2.8, 4.9])
    ratio = a.ppl_over(b)
    assert ratio.value == pytest.approx(math.exp(0.4 / 3))
    assert ratio.stderr == pytest.approx(math.exp(0.4 / 3) * np.std([0.1, 0.2, 0.1], ddof=1) / math.sqrt(3))
    assert ratio.stderr < 0.1 * a.ppl.stderr / a.ppl.value, "windows differ more than sides do"


def test_mean_over_texts() -> None:
    p, q = fixed("p", [0.5, 0.25, 0.25], "fp32", 32), fixed("q", [0.2, 0.6, 0.2])
    texts = []
    for name, windows in (("a", WINDOWS), ("b", [[1, 1, 1], [1, 2, 2]])):
        with Reference(p, windows, quiet) as reference:
            rows = [report.Row.of(s, reference.measure(s, quiet), reference.scores, None, {}) for s in (p, q)]
        texts.append(report.TextResult(name, 2, rows))
    both = report.mean_over(texts)
    assert (both.name, both.windows) == ("mean of 2 texts", 4)
    own, other = both.rows
    ratios = [text.rows[1].over_fp for text in texts]
    assert (own.over_fp.value, own.agreement.value) == (1, 1)
    assert (own.divergence.value, own.divergence_p999) == pytest.approx((0, 0), abs=1e-6)
    assert other.over_fp.value == pytest.approx(math.sqrt(ratios[0].value * ratios[1].value))
    relative = math.hypot(*(ratio.stderr / ratio.value for ratio in ratios if ratio.stderr is not None)) / 2
    assert other.over_fp.stderr == pytest.approx(other.over_fp.value * relative)
    kl = 0.5 * math.log(0.5 / 0.2) + 0.25 * math.log(0.25 / 0.6) + 0.25 * math.log(0.25 / 0.2)
    assert other.divergence.value == pytest.approx(kl, 1e-3)
    assert other.divergence_p99 == pytest.approx(kl, 1e-3)
    assert other.agreement.value == 0
    written = report.document(texts, {})
    assert [row["name"] for row in written["mean"]["rows"]] == ["p", "q"]
    assert "token_divergence" not in json.dumps(written)
    assert "### mean of 2 texts, 4 windows" in report.markdown(texts, 1, 1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_to_nearest(bits: int) -> None:
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    rounded = weights.round_to_nearest(weight, bits, 64)
    step = (weight.reshape(16, 2, 64).amax(2) - weight.reshape(16, 2, 64).amin(2)) / (2**bits - 1)
    assert ((rounded - weight).abs().reshape(16, 2, 64).amax(2) <= step * 1.02).all()
    assert max(len(group.unique()) for group in rounded.reshape(-1, 64)) <= 2**bits
    assert weights.rounded_bytes(weight.numel(), bits, 64) == 16 * 128 * bits // 8 + 32 * (16 + bits) // 8


def test_swapped_weights_come_back(checkpoint: Checkpoint) -> None:
    name = "model.layers.1.mlp.up_proj"
    before = checkpoint.linear(name).weight.clone()
    with suppress(ZeroDivisionError), weights.swapped(checkpoint, {name: torch.zeros_like(before)}):
        assert not checkpoint.linear(name).weight.any()
        raise ZeroDivisionError
    assert torch.equal(checkpoint.linear(name).weight, before)


def test_another_head_leaves_a_tied_embedding(checkpoint: Checkpoint) -> None:
    assert checkpoint.decoder.tied
    before = checkpoint.linear("lm_head").weight
    table = before.clone()
    with weights.head_swapped(checkpoint, torch.zeros_like(before)):
        assert not checkpoint.linear("lm_head").weight.any()
        assert torch.equal(checkpoint.model.get_input_embeddings().weight, table)
    assert checkpoint.linear("lm_head").weight is before


def test_duels_are_of_equal_bits_or_no_more_bytes() -> None:
    sides = [
        fixed("fp", [0.5, 0.25, 0.25], "fp32", 32, 800),
        fixed("gptq 4", [0.3, 0.3, 0.4], "gptq", 4, 110),
        fixed("gptq 3", [0.3, 0.3, 0.4], "gptq", 3, 90),
        fixed("small", [0.4, 0.4, 0.2], "llama.cpp", None, 100),
        fixed("large", [0.4, 0.3, 0.3], "llama.cpp", None, 101),
        fixed("ours", [0.4, 0.3, 0.3], "bundle", 4, 100),
    ]
    with Reference(sides[0], WINDOWS, quiet) as reference:
        rows = [report.Row.of(s, reference.measure(s, quiet), reference.scores, None, {}) for s in sides]
    duels = report.TextResult("t", 2, rows).duels
    assert [(d.bundle, d.rival) for d in duels] == [("ours", "gptq 4"), ("ours", "small")]
    assert duels[0].bytes_ratio == pytest.approx(100 / 110)
    p = np.array([0.5, 0.25, 0.25])
    kl = [float(np.sum(p * np.log(p / np.array(q)))) for q in ([0.4, 0.3, 0.3], [0.3, 0.3, 0.4])]
    assert duels[0].divergence_gap.value == pytest.approx(kl[0] - kl[1], 1e-3)
    assert duels[0].divergence_gap.stderr == pytest.approx(0, abs=1e-6)
    assert report.Duel("", "", Mean(0.98, 0.01), 1, Mean(0, None)).verdict == "better"
    assert report.Duel("", "", Mean(1.02, 0.01), 1, Mean(0, None)).verdict == "worse"
    assert report.Duel("", "", Mean(0.98, 0.03), 1, Mean(0, None)).verdict == "undecided"


def test_last_words(checkpoint: Checkpoint) -> None:
    text = SENTENCE * 3 + "They come back to the harbour. And more."
    (passage,) = last_word.passages(text + "\n\nToo short a harbour.", checkpoint.tokenizer, 5, [256])
    assert passage.word == "harbour"
    assert passage.answer == len(" harbour")
    assert passage.tokens[0] == 256
    assert checkpoint.tokenizer.decode(passage.tokens[1:]) == SENTENCE * 3 + "They come back to the harbour"

    def knows(tokens: list[int]) -> Window:
        following = [*passage.tokens[1:], 0][: len(tokens)]
        return Window(np.eye(264, dtype=np.float32)[following], 8.0)

    def misspells(tokens: list[int]) -> Window:
        logits = knows(tokens).logits
        logits[-1] = np.roll(logits[-1], 1)
        return Window(logits, 8.0)

    assert last_word.right(knows, [passage], quiet) == [True]
    assert last_word.right(misspells, [passage], quiet) == [False]
    assert last_word.accuracy([True, False, True, True]).value == 0.75


def compare(*args: str | Path) -> object:
    return CliRunner().invoke(command, ["compare", *map(str, args)], standalone_mode=False)


def test_a_whole_run(folder: Path, text_file: Path, tmp_path: Path) -> None:
    llama_cpp = rivals.METHODS["llama.cpp"].available
    names = "rtn,llama.cpp" if llama_cpp else "rtn"
    args = ("--model", folder, "--data", text_file, "--methods", names, "--bits", "2,4", "--windows", "3")
    args += ("--context", "64", "--calib-data", text_file, "--calib-windows", "4", "--last-words", "3")
    done = compare(*args, "--output", tmp_path / "out")
    assert done.exception is None, done.exception
    (result,) = json.loads((tmp_path / "out" / "results.json").read_text())["texts"]
    rows = {row["name"]: row for row in result["rows"]}
    assert rows["fp32"]["over_fp"]["value"] == 1
    assert (
        rows["round to nearest, 2 bits"]["divergence"]["value"]
        > rows["round to nearest, 4 bits"]["divergence"]["value"]
    )
    blocks = 2 * (192 * 192 * 2 + 2 * 64 * 192 + 3 * 192 * 320)
    if llama_cpp:
        assert rows["llama.cpp Q4_0"]["divergence"]["value"] > 5 * rows["llama.cpp Q8_0"]["divergence"]["value"] > 0
        assert rows["llama.cpp Q8_0"]["block_bytes"] == blocks * 34 // 32
    assert rows["round to nearest, 4 bits"]["block_bytes"] == blocks // 2 + blocks // 64 * 20 // 8
    assert (
        rows["round to nearest, 4 bits"]["linear_bytes"]
        == rows["round to nearest, 4 bits"]["block_bytes"] + 264 * 192 * 2
    )
    small = rows["round to nearest, 4 bits, and the head"]
    assert small["linear_bytes"] == small["block_bytes"] + weights.rounded_bytes(264 * 192, 4, 64)
    assert small["divergence"]["value"] > rows["round to nearest, 4 bits"]["divergence"]["value"]
    assert len(rows["fp32"]["scores"]["nll"]) == 3
    assert (tmp_path / "out" / "table.md").read_text() == done.stdout


def test_a_bundle_beside_others(folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tmp_path / "bundle"
    export = ["--model", str(folder), "--target", "portable", "--method", "rtn", "--router", "norm", "--json"]
    export += ["--calib-data", str(text_file), "--calib-tokens", "1024", "--output", str(bundle)]
    done = CliRunner().invoke(command, export, standalone_mode=False)
    assert done.exception is None, done.exception
    args = ("--model", folder, "--data", text_file, "--methods", "rtn,bundle", "--bits", "4", "--windows", "3")
    args += ("--context", "64", "--calib-data", text_file, "--calib-windows", "4", "--last-words", "0", "--json")
    done = compare(*args, "--bundle", bundle, "--avg-bits", "8,4")
    assert done.exception is None, done.exception
    (result,) = json.loads(done.stdout)["texts"]
    eight, four = (row for row in result["rows"] if row["method"] == "bundle")
    sizes = json.loads((bundle / "manifest.json").read_text())["weights"]["bytes_per_token"]
    assert eight["bits_used"] == 8
    # The budget is held: what the same window uses, again and again, has it for its mean.
    session, window = Session(bundle), list(range(200))
    forward = rivals.held(session, 4.5)
    used = [forward(window).avg_bits_used for _ in range(8)]
    assert abs(sum(used) / len(used) - 4.5) < 0.2 * abs(used[0] - 4.5)
    assert eight["linear_bytes"] == sizes["8"]
    assert sizes["3"] <= four["linear_bytes"] < sizes["6"]
    assert eight["divergence"]["value"] < four["divergence"]["value"]
    assert eight["over_fp"]["value"] == pytest.approx(1, abs=0.05)
    assert [(d["bundle"], d["rival"]) for d in result["duels"]] == [
        ("bundle, 4 bits on average", "round to nearest, 4 bits"),
        ("bundle, 4 bits on average", "round to nearest, 4 bits, and the head"),
    ]
    other = write_checkpoint(tmp_path / "other", "llama", num_hidden_layers=1)
    monkeypatch.setattr(run, "load", None)  # what does not fit is refused before the model is loaded
    refused = compare(*args, "--bundle", bundle, "--avg-bits", "8,nan")
    assert "average bits nan" in str(refused.exception)
    refused = compare(*args, "--bundle", tmp_path / "nowhere")
    assert "nowhere: no such folder" in str(refused.exception)
    refused = compare("--model", other, *args[2:], "--bundle", bundle)
    assert "a bundle of llama, not of other" in str(refused.exception)


def test_a_model_with_experts(text_file: Path, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "experts", "qwen3_moe")
    args = ("--model", folder, "--data", text_file, "--bits", "4", "--windows", "2", "--context", "64")
    args += ("--calib-data", text_file, "--calib-windows", "4", "--last-words", "0")
    done = compare(*args, "--methods", "rtn", "--json")
    assert done.exception is None, done.exception
    (result,) = json.loads(done.stdout)["texts"]
    rows = {row["name"]: row for row in result["rows"]}
    attention, mlp, head = 4 * (192 * 192 * 2 + 2 * 64 * 192), 3 * 192 * 320, 264 * 192
    of_a_token = attention + mlp + 3 * 2 * 3 * 192 * 64
    assert rows["fp32"]["linear_bytes"] == 4 * (of_a_token + head)
    assert rows["round to nearest, 4 bits"]["block_bytes"] == weights.rounded_bytes(of_a_token, 4, 64)
    assert rows["round to nearest, 4 bits"]["divergence"]["value"] > 1e-4
    done = compare(*args, "--methods", "gptq")
    assert "gptq is left out, experts has experts: methods that take them are rtn, bundle" in str(done.exception)


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["--methods", "magic"], "no such method; there are rtn, gptq"),
        (["--bits", "two"], "--bits 'two'"),
        (["--bits", "9"], "--bits 9: needed whole numbers from 2 to 8"),
        (["--group-size", "128"], "--group-size 128 does not divide K = 192"),
        (["--data", "nowhere.txt"], "nowhere.txt: cannot be read"),
        (["--windows", "9999"], "windows, 9999 are asked for"),
        (["--windows", "0"], "--windows 0: needed a whole number from 1"),
        (["--group-size", "0"], "--group-size 0: needed a whole number from 1"),
        (["--group-size", "-64"], "--group-size -64: needed a whole number from 1"),
        (["--calib-windows", "0"], "--calib-windows 0: needed a whole number from 1"),
        (["--last-words", "-1"], "--last-words -1: needed a whole number from 0"),
        (["--context", "1"], "--context 1: needed a whole number from 2"),
    ],
)
def test_refusals(folder: Path, text_file: Path, args: list[str], part: str) -> None:
    data = [] if "--data" in args else ["--data", str(text_file)]
    base = ("--model", folder, "--context", "64", "--calib-data", text_file, "--calib-windows", "4")
    done = compare(*base, *data, *(args if "--methods" in args else ["--methods", "rtn", *args]))
    assert isinstance(done.exception, UsageError)
    assert part in str(done.exception)


def test_a_method_that_is_not_installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = rivals.Method("absent", rivals.METHODS["rtn"].sides, ("no_such_module", "no-such-package"))
    monkeypatch.setitem(rivals.METHODS, "absent", absent)
    done = compare("--model", folder, "--methods", "absent")
    assert "absent is left out, it needs no-such-package: pip install no-such-package" in str(done.exception)


def test_options_of_an_export_before_the_subcommand() -> None:
    done = CliRunner().invoke(command, ["--seed", "3", "compare"], standalone_mode=False)
    assert isinstance(done.exception, UsageError)
    assert "--seed: options of compare come after its name" in str(done.exception)
