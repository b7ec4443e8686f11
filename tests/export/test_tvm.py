"""The compiled decoder returns the logits of the ONNX graph and of the original model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from family_exports import FamilyExport, recorded_errors
from guesses import assert_guesses_change_nothing
from safetensors.numpy import load_file

from mbq_export.cli import command
from mbq_export.model.loading import load
from mbq_export.model.source import locate
from mbq_runtime import BundleError, Engine, UsageError
from mbq_runtime.bundle import manifest
from mbq_runtime.bundle.check import check_contents
from mbq_runtime.bundle.listed_files import file_entries
from mbq_runtime.bundle.verify import verify
from mbq_runtime.cli import main
from mbq_runtime.engine import Session
from mbq_runtime.engine import tvm as tvm_engine
from mbq_runtime.trust import code
from mbq_runtime.whole_file import write_whole

pytestmark = pytest.mark.heavy

# In this order: grouped heads and a tied head; biases, and K that 128 does not divide; norms over heads;
# windows, two rotations and post norms; a table of rotations of its own.
FAMILIES = ("llama", "qwen2", "qwen3", "gemma3_text", "phi3-longrope")
PROMPT = np.random.default_rng(5).integers(0, 256, 20).tolist()
NEW_TOKENS = 20
# Both engines round activations alike.  Their float32 sums differ by a millionth, and rarely by a step of rounding.
BETWEEN_ENGINES = 1e-3
BETWEEN_ENGINES_8 = 3e-2  # a step is 256 times as large
ORIGINAL = 0.1  # eight-bit slices of random weights
TIE = 1e-3


@pytest.fixture(scope="module")
def llama(families: Callable[[str], FamilyExport]) -> Path:
    """A bundle of the plainest family."""
    return families("llama").host


def export(source: Path, output: Path, text: Path, *args: str) -> None:
    arguments = ["--target", "host", "--model", source, "--output", output, "--calib-data", text, "--router", "mlp"]
    arguments += ["--calib-tokens", 1024, "--method", "rtn", "--kv", "32", "--json", *args]
    command([str(argument) for argument in arguments], standalone_mode=False)


@pytest.mark.parametrize("name", FAMILIES)
def test_both_engines_say_what_the_model_says(name: str, families: Callable[[str], FamilyExport]) -> None:
    source, bundle = families(name).model, families(name).host
    onnx, compiled = Engine.load(bundle, engine="onnx"), Engine.load(bundle, engine="tvm")
    assert Engine.load(bundle).name == "onnx"

    # Decode step by step, past a sliding window.  One pass over all tokens must agree.
    reply = compiled.generate(PROMPT, max_tokens=NEW_TOKENS, avg_bits=8)
    reply.text()
    said = reply.stats.tokens
    assert len(said) == NEW_TOKENS
    whole = [*PROMPT, *said]
    window = compiled.logits(whole, 8.0)
    steps = window.logits[len(PROMPT) - 1 : -1]
    assert (steps.max(1) - steps[np.arange(NEW_TOKENS), said] <= TIE * np.abs(steps).max()).all()

    for bits in (3.0, 4.3, 6.0, 8.0):
        ours, theirs = compiled.logits(whole, bits), onnx.logits(whole, bits)
        assert np.abs(ours.logits - theirs.logits).max() <= BETWEEN_ENGINES * np.abs(theirs.logits).max(), bits
        assert ours.avg_bits_used == pytest.approx(theirs.avg_bits_used, abs=1e-3)
    assert compiled.score(whole, 4.0).nll == pytest.approx(onnx.score(whole, 4.0).nll, rel=1e-3)

    with torch.no_grad():
        original = load(locate(str(source))).model(torch.tensor([whole])).logits[0].numpy()
    assert np.linalg.norm(window.logits - original) < ORIGINAL * np.linalg.norm(original)


def test_a_budget_changed_in_mid_generation(llama: Path) -> None:
    engine = Engine.load(llama, engine="tvm", avg_bits=8)
    reply = engine.generate(PROMPT, max_tokens=12, chat=False)
    for i, _ in enumerate(reply):
        if i == 5:
            engine.avg_bits = 3
    bits = reply.stats.bits
    changed = bits.index(3.0)
    assert bits[:changed] == pytest.approx([8.0] * changed)
    assert bits[changed:] == pytest.approx([3.0] * (len(bits) - changed))
    assert 5 <= changed <= 8  # a piece of text may come some tokens later


def test_a_session_says_what_an_empty_context_says(llama: Path) -> None:
    engine = Engine.load(llama, engine="tvm", avg_bits=8)
    session, talk = engine.session(), list(PROMPT)
    for turn in range(3):
        replies = [engine.generate(talk, max_tokens=8, session=kept) for kept in (session, None)]
        for reply in replies:
            reply.text()
        assert replies[0].stats.tokens == replies[1].stats.tokens
        assert replies[0].stats.cached_tokens == (len(talk) - 4 if turn else 0)
        talk += [*replies[0].stats.tokens, 5, 6, 7]
    # Another end: what followed is dropped.
    talk[12:] = [9, 9, 9]
    replies = [engine.generate(talk, max_tokens=8, session=kept) for kept in (session, None)]
    for reply in replies:
        reply.text()
    assert replies[0].stats.tokens == replies[1].stats.tokens
    assert replies[0].stats.cached_tokens == 12


@pytest.mark.parametrize("engine", ["onnx", "tvm"])
def test_guesses_change_nothing(engine: str, llama: Path) -> None:
    assert_guesses_change_nothing(Engine.load(llama, engine=engine), replies=10, tokens=40)


def test_a_session_goes_on_from_its_file(llama: Path, tmp_path: Path) -> None:
    bundle, file = llama, tmp_path / "talk.session"
    engine = Engine.load(bundle, engine="tvm")
    session = engine.load_session(file)  # there is none yet
    first = engine.generate(PROMPT, max_tokens=30, session=session)
    first.text()
    engine.save_session(session, file)
    size = len(session) * engine._backend.token_bytes
    assert size < file.stat().st_size < size + 64 * 2048  # keys come in blocks

    again, talk = Engine.load(bundle, engine="tvm"), [*PROMPT, *first.stats.tokens, 7]
    found = again.load_session(file)
    assert found.tokens == session.tokens
    reply, plain = again.generate(talk, max_tokens=20, session=found), again.generate(talk, max_tokens=20)
    assert reply.text() == plain.text()
    assert reply.stats.tokens == plain.stats.tokens
    assert reply.stats.cached_tokens == len(talk) - 2  # the last token of a reply is not read

    content = file.read_bytes()
    for damaged, words in (
        (content[:-1], "damaged; remove it"),
        (content + b"x", "damaged; remove it"),
        (content[:-1] + bytes([content[-1] ^ 1]), "damaged; remove it"),
        (content.replace(b'"tokens": 49', b'"tokens": 48', 1), "damaged; remove it"),
        (content.replace(b'"tokens": 49', b'"tokens": 9999', 1), "9999 tokens; needed 0 to"),
        (content.replace(b'"tokens": 49', b'"tokens": 200', 1)[:500], "damaged; remove it"),
        (content.replace(b'"version": "', b'"version": "9', 1), "its version is '9"),
        (content.replace(b'"bundle": "', b'"bundle": "0', 1), "its bundle is '0"),
        (b"[]\n", "not the file of a session"),
        (b"{", "not the file of a session"),
    ):
        assert damaged != content
        file.write_bytes(damaged)
        with pytest.raises(UsageError, match=words):
            again.load_session(file)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="not a regular file"):
        again.load_session(tmp_path / "pipe")
    with pytest.raises(UsageError, match=r"cannot be written .*choose another place"):
        again.save_session(found, tmp_path / "none" / "file")
    other = Engine.load(bundle, engine="onnx")
    with pytest.raises(UsageError, match="engine onnx cannot load keys and values from a file"):
        other.load_session(file)
    with pytest.raises(UsageError, match="it is another engine's"):
        again.save_session(other.session(), file)


def test_the_command_keeps_a_prompt(llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompt.session"
    command = ["run", str(llama), "abc", "--raw", "--engine", "tvm", "--prompt-cache", str(file)]
    said = []
    for _ in range(2):
        assert main([*command, "--max-tokens", "8"]) == 0
        said.append(capfd.readouterr().out)
        assert file.exists()
    assert said[0] == said[1]
    assert list(tmp_path.iterdir()) == [file]


def test_the_weights_are_plain_safetensors(llama: Path) -> None:
    bundle = llama
    found = manifest.read(bundle)
    tensors = load_file(bundle / "decoder.safetensors")
    for linear in found.weights.linears:
        blocks = -(-linear.N // 16)
        for e, bits in enumerate(found.slices, 1):
            assert tensors[f"{linear.name}.planes_{e}"].shape == (blocks * 2 * linear.K * bits,)
        assert tensors[f"{linear.name}.scales"].shape == (blocks, len(found.slices) + linear.K // found.group_size, 32)
    check_contents(bundle, found)


def test_a_bundle_for_tvm_alone(
    families: Callable[[str], FamilyExport], calibration_text: Path, tmp_path: Path
) -> None:
    export(families("llama").model, tmp_path / "bundle", calibration_text, "--engine", "tvm")
    assert not (tmp_path / "bundle" / "model.onnx").exists()
    assert Engine.load(tmp_path / "bundle").name == "tvm"
    with pytest.raises(UsageError, match=r"has no engine onnx, only tvm; .*mbq-export --engine onnx"):
        Engine.load(tmp_path / "bundle", engine="onnx")
    with pytest.raises(BundleError, match="has no ONNX graph"):
        Session(tmp_path / "bundle")
    verify(tmp_path / "bundle")


def test_activations_of_8_bits(families: Callable[[str], FamilyExport], calibration_text: Path, tmp_path: Path) -> None:
    """Logits of every engine are near to those of 16 bits, but not the same."""
    source, wide = families("llama").model, families("llama").host
    with recorded_errors() as errors:
        export(source, tmp_path / "native", calibration_text, "--activations", "8", "--engine", "both")
    assert max(errors.values()) < 0.5
    export(source, tmp_path / "portable", calibration_text, "--activations", "8", "--target", "portable")
    narrow = [Engine.load(tmp_path / "native", engine=name) for name in ("onnx", "tvm")]
    narrow.append(Engine.load(tmp_path / "portable" / f"{source.name}-portable"))
    assert all(engine.manifest.activation_bits == 8 for engine in narrow)
    for bits in (3.0, 8.0):
        expected = Engine.load(wide, engine="onnx").logits(PROMPT, bits).logits
        found = [engine.logits(PROMPT, bits).logits for engine in narrow]
        for logits in found:
            assert BETWEEN_ENGINES < np.abs(logits - expected).max() / np.abs(expected).max() < 0.05
            assert np.abs(logits - found[0]).max() <= BETWEEN_ENGINES_8 * np.abs(expected).max()


def test_a_missing_library(llama: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(llama, tmp_path / "copy")
    (copy / "decoder.so").unlink()
    with pytest.raises(BundleError, match=r"decoder\.so: the file is missing"):
        Engine.load(copy, engine="tvm")
    (copy / "decoder.so").write_bytes(b"not a library")
    manifest.write(replace(manifest.read(copy), files=file_entries(copy)), copy)
    with pytest.raises(BundleError, match=r"decoder\.so: the engine cannot load it: .*mbq verify"):
        Engine.load(copy, engine="tvm")


@pytest.mark.parametrize("engine", ["onnx", "tvm"])
def test_a_pulled_bundle_runs_native_code_only_when_told_so(
    engine: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("MBQ_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(code, "known_libraries", dict)
    source = llama
    asked = ["--raw", "--max-tokens", "4", "--engine", engine, "--json"]
    capsys.readouterr()  # the exports may have been made just now
    assert main(["run", str(source), "abc", *asked]) == 0
    expected = json.loads(capsys.readouterr().out)["tokens"]
    assert main(["run", f"file:{source}", "abc", *asked]) == 4
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines()[-1].endswith("add --trust once if you trust its maker, or take a bundle for portable")
    assert main(["run", f"file:{source}", "abc", *asked, "--trust"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == expected
    assert main(["run", f"file:{source}", "abc", *asked]) == 0
    assert capsys.readouterr().err == ""
    # Another library with a manifest of its own is other code.
    folder = next((tmp_path / "cache" / "bundles").iterdir())
    library = folder / ("decoder.so" if engine == "tvm" else "lib/libmbq_ops.so")
    # The old file stays whole under this process: its threads may still run in it.
    write_whole(library, library.read_bytes() + b"\0")
    assert main(["run", f"file:{source}", "abc", *asked]) == 4
    assert "long where the manifest says" in capsys.readouterr().err
    manifest.write(replace(manifest.read(folder), files=file_entries(folder)), folder)
    assert main(["pull", f"file:{folder}", str(tmp_path / "again")]) == 0
    capsys.readouterr()
    assert main(["run", str(tmp_path / "again"), "abc", *asked]) == 4
    assert "add --trust once" in capsys.readouterr().err


def test_a_machine_without_the_runtime(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tvm_engine._tvm.cache_clear()
    monkeypatch.setattr(tvm_engine.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'mbq-export\[tvm\]'"):
        Engine.load(llama, engine="tvm")
    tvm_engine._tvm.cache_clear()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--engine", "abacus"], "'abacus' is not known; choose one of: onnx, tvm, both"),
        (["--activations", "8", "--target", "webgpu"], "--activations 8: webgpu computes with floating-point"),
        (["--engine", "tvm", "--target", "portable"], "tvm: it does not run on target portable; use --engine onnx"),
    ],
)
def test_refused_exports(
    args: list[str], message: str, families: Callable[[str], FamilyExport], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        command(["--model", str(families("llama").model), "-o", str(tmp_path / "b"), *args], standalone_mode=False)
