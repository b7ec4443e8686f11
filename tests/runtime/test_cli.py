from __future__ import annotations

import errno
import importlib
import io
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import ModuleType

import click
import numpy as np
import pytest
from forked_mbq import Mbq
from tiny_bundle import REPLY, facts, ids, write_manifest

import mbq_runtime
from mbq_runtime import Engine, __version__, cli, perplexity
from mbq_runtime.bundle import manifest
from mbq_runtime.bundle.facts import TargetFacts
from mbq_runtime.bundle.file_names import OPS_LIBRARY
from mbq_runtime.fidelity import compare_tokens
from mbq_runtime.sensing.readings import Readings

HEAVY = ("onnxruntime", "onnxruntime_genai", "torch", "numpy", "transformers", "tvm", "onnx", "mbq_export")


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = cli.main([str(arg) for arg in args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_help_imports_nothing_heavy() -> None:
    """One process shows the help of every command, and after each what it has imported by then."""
    every = [["--help"], ["--version"], *([name, "--help"] for name in cli.COMMANDS)]
    code = (
        "import sys; from mbq_runtime.cli import main\n"
        f"for args in {every!r}:\n"
        "    code = main(args)\n"
        f"    print(args, [m for m in {HEAVY!r} if m in sys.modules], code, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == [f"{args} [] 0" for args in every]
    assert done.stdout.count("Usage: mbq") == len(every) - 1


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = f"import sys, mbq_runtime, mbq_runtime.bundle.manifest; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_command_is_listed_and_loads(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "--help")
    for name, entry in cli.COMMANDS.items():
        assert f"  {name} " in out
        assert entry.help in out
        code, text, _ = run(capsys, name, "--help")
        assert code == 0
        assert f"mbq {name}" in text


def test_run_streams_the_reply(capsys: pytest.CaptureFixture[str], bundle: Path) -> None:
    code, out, err = run(capsys, "run", bundle, "hello", "--threads", 1)
    assert code == 0
    assert out == REPLY + "\n"
    assert err.startswith("11 tokens, ")
    assert err.count("\n") == 1


def test_run_json_holds_everything_and_stdout_nothing_else(capsys: pytest.CaptureFixture[str], bundle: Path) -> None:
    code, out, err = run(capsys, "run", bundle, "A", "--raw", "--max-tokens", 5, "--bits", 4, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert set(found) == {
        "text", "tokens", "tokens_per_s", "ttft_s", "avg_bits_used", "energy_j_per_token", "energy_error_j", "reason",
        "guessed", "kept_guesses", "finish_reason",
    }  # fmt: skip
    assert found["reason"] == "fixed"
    assert found["text"] == "BCDEF"
    assert found["tokens"] == ids("BCDEF")
    assert 4.0 < found["avg_bits_used"] < 4.3


def test_run_writes_what_happens_to_the_budget(
    capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hot = Readings(0.0, temp_c=85.0, throttle_temp_c=80.0, heat_throttled=True)
    monkeypatch.setattr("mbq_runtime.sensing.sensors.Sensors.read", lambda self: hot)
    monkeypatch.setattr("mbq_runtime.control.governor.PERIOD_S", 0.01)
    monkeypatch.setattr("mbq_runtime.control.wishes._CONFIRM_S", 0.0)
    events = tmp_path / "events.jsonl"
    options = ("--policy", "cool", "--min-bits", 4, "--events", events, "--json")
    _, out, _ = run(capsys, "run", bundle, "A", "--raw", "--max-tokens", 90, *options)
    assert json.loads(out)["reason"] == "heat: 85.0 C, the limit is 80 C"
    found = [json.loads(line) for line in events.read_text().splitlines()]
    assert any(one["reason"].startswith("speculation: tokens are guessed before bits are given") for one in found)
    (event,) = [one for one in found if one["old"] != one["new"]]
    assert (event["old"], event["new"]) == (8.0, 4.0)
    assert event["readings"]["temp_c"] == 85.0


def test_events_that_cannot_be_written(capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path) -> None:
    events = tmp_path / "missing/events.jsonl"
    code, out, err = run(capsys, "run", bundle, "A", "--threads", 1, "--events", events)
    assert (code, out) == (2, "")
    assert err == f"mbq: error: {events}: the folder {events.parent} does not exist; make it, or choose another file\n"
    assert not events.parent.exists()


def test_run_reads_the_prompt_from_stdin(bundle: Path, mbq: Mbq) -> None:
    done = mbq(["run", bundle, "-", "--raw", "--max-tokens", 3], "xA")
    assert (done.code, done.out) == (0, "BCD\n")


@pytest.mark.parametrize("args", [["run", "-", "--raw"], ["chat"]])
def test_bytes_on_stdin_that_are_no_text(bundle: Path, mbq: Mbq, args: list[str]) -> None:
    command, *options = args
    done = mbq([command, bundle, *options], "x\udcff\n")
    said = [line for line in done.err.splitlines() if "half a character" in line]
    assert len(said) == 1, done.err
    assert "text has U+DCFF, half a character, at position" in said[0]
    assert "fault" not in done.err
    assert done.code == (2 if command == "run" else 0), "a chat goes on"


def test_a_prompt_without_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, bundle: Path
) -> None:
    with open("/dev/zero", encoding="utf-8") as zeros:
        monkeypatch.setattr(sys, "stdin", zeros)
        code, out, err = run(capsys, "run", bundle, "-")
    assert (code, out) == (2, "")
    assert err == "mbq: error: the prompt on stdin has more than 4194304 characters; give a shorter one\n"


def test_perplexity_json(capsys: pytest.CaptureFixture[str], bundle: Path, loaded: Engine, tmp_path: Path) -> None:
    data = tmp_path / "text.txt"
    data.write_text("ABCDEFGABCD hello\n" * 20)
    args = ("perplexity", bundle, "--data", data, "--bits", "3,4.5", "--context", 32, "--max-windows", 3, "--json")
    code, out, err = run(capsys, *args)
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert set(found) == {"context", "windows", "reference_ppl", "rows"}
    assert (found["context"], found["windows"], found["reference_ppl"]) == (32, 3, None)
    assert [row["bits"] for row in found["rows"]] == [3.0, 4.5]
    tokens = loaded.encode(data.read_text())
    for row in found["rows"]:
        assert set(row) == {"bits", "avg_bits_used", "ppl", "ppl_stderr"}
        nll = [loaded.score(tokens[i : i + 32], row["bits"]).nll for i in (0, 96, 224)]  # windows 0, 3 and 7 of 11
        assert row["ppl"] == pytest.approx(math.exp(sum(nll) / 3))
        assert row["ppl_stderr"] > 0


def test_perplexity_with_a_reference(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, bundle: Path, loaded: Engine, tmp_path: Path
) -> None:
    module = ModuleType(perplexity.REFERENCE_MODULE)
    module.load_logits = lambda model: lambda tokens: loaded.logits(tokens, 8.0).logits  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, perplexity.REFERENCE_MODULE, module)
    data = tmp_path / "text.txt"
    data.write_text("ABCDEFGABCD hello\n" * 20)
    args = ("perplexity", bundle, "--data", data, "--bits", "8,3", "--context", 32, "--reference", "some/model")
    code, out, _ = run(capsys, *args, "--json")
    assert code == 0
    found = json.loads(out)
    same, other = found["rows"]
    assert same["ppl"] == pytest.approx(found["reference_ppl"])
    assert same["ppl_ratio"] == pytest.approx(1)
    assert (same["kl"], same["kl_p99"], same["kl_p999"], same["same_top"]) == (0, 0, 0, 1), "it is its own reference"
    assert other["ppl_ratio"] == pytest.approx(other["ppl"] / found["reference_ppl"])
    tokens = loaded.encode(data.read_text())
    windows = perplexity.cut_windows(tokens, 32, loaded.opening_tokens)
    pairs = [[loaded.logits(window, bits).logits[:-1] for bits in (3, 8)] for window in windows]
    kl = [compare_tokens(*pair, window[1:]).divergence for pair, window in zip(pairs, windows, strict=True)]
    assert other["kl"] == pytest.approx(sum(map(sum, kl)) / (31 * len(windows)))
    assert 0 <= other["kl"] <= other["kl_p99"] <= other["kl_p999"]
    code, out, _ = run(capsys, *args, "--hold-bits")
    assert out.splitlines()[1].split()[-3:] == ["same", "top", "+-"]
    assert out.splitlines()[2].split()[-6:] == ["0.0000", "0.0000", "0.0000", "0.0000", "1.000", "0.000"]
    assert out.splitlines()[-1].split()[:2] == ["reference", f"{found['reference_ppl']:.3f}"]
    module.load_logits = lambda model: lambda tokens: np.zeros((len(tokens), 7), np.float32)  # type: ignore[attr-defined]
    code, _, err = run(capsys, *args)
    assert code != 0
    assert "the reference has 7 words in its vocabulary" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--bits", "2,4"], "average bits 2.0: "),
        (["--bits", "four"], "--bits 'four': expected numbers"),
        (["--context", "97"], "--context 97: .* takes at most 96 tokens"),
        (["--context", "80"], "the text has 70 tokens, one window needs 80"),
        (["--max-windows", "0", "--context", "32"], "windows 0"),
    ],
)
def test_perplexity_refuses(
    capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path, args: list[str], message: str
) -> None:
    data = tmp_path / "text.txt"
    data.write_text("A" * 70)
    code, out, err = run(capsys, "perplexity", bundle, "--data", data, *args)
    assert (code, out) == (2, "")
    assert err.startswith("mbq: error: ")
    assert err.count("\n") == 1
    import re

    assert re.search(message, err)


def test_inspect(capsys: pytest.CaptureFixture[str], bundle: Path) -> None:
    code, out, _ = run(capsys, "inspect", bundle)
    assert code == 0
    assert "3,1,2,2: 3/4/6/8 bits, groups of 64" in out
    assert out.splitlines()[-1].split() == ["runs", "here", "yes"]
    code, out, _ = run(capsys, "inspect", bundle, "--json")
    found = json.loads(out)
    assert found["runs_here"] is True
    assert found["model"]["vocab_size"] == 264
    assert found["total_bytes"] == manifest.read(bundle).total_bytes


@pytest.mark.parametrize(
    ("tools", "has_code", "said"),
    [
        ({"mbq-export": __version__}, True, f"mbq-export {__version__}"),
        ({"mbq-export": "0.0.9"}, False, "mbq-export 0.0.9"),
        (
            {"mbq-export": "0.0.9"},
            True,
            f"mbq-export 0.0.9; a new export has the kernels of {__version__}, which is installed",
        ),
        ({}, False, "mbq-export of an unknown version"),
    ],
)
def test_inspect_names_the_release_that_made_a_bundle(
    capsys: pytest.CaptureFixture[str], bundle_copy: Path, tools: dict[str, str], has_code: bool, said: str
) -> None:
    if has_code:
        (bundle_copy / OPS_LIBRARY).parent.mkdir()
        (bundle_copy / OPS_LIBRARY).write_bytes(b"code")
    write_manifest(bundle_copy, replace(facts(), tools=tools))
    code, out, _ = run(capsys, "inspect", bundle_copy)
    assert code == 0
    assert [line.split(None, 2)[2] for line in out.splitlines() if line.startswith("made with")] == [said]


def foreign(folder: Path) -> None:
    """Change a bundle's target to a machine that does not exist."""
    write_manifest(folder, replace(facts(), target=TargetFacts("t", "onnx", "aarch64", "c", ("nonesuch",))))


def test_a_bundle_for_another_machine(capsys: pytest.CaptureFixture[str], bundle_copy: Path) -> None:
    foreign(bundle_copy)
    code, out, err = run(capsys, "run", bundle_copy, "hello")
    assert (code, out) == (4, "")
    assert "the bundle is for target t (aarch64 with nonesuch)" in err
    code, out, _ = run(capsys, "inspect", bundle_copy)
    assert code == 0
    assert "runs here  no: " in out
    code, out, _ = run(capsys, "verify", bundle_copy)
    assert code == 0
    assert "note: the bundle is for target t" in out


def test_verify(capsys: pytest.CaptureFixture[str], bundle_copy: Path) -> None:
    code, out, err = run(capsys, "verify", bundle_copy)
    assert (code, err) == (0, "")
    assert "5 files" in out
    data = bytearray((bundle_copy / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 8
    (bundle_copy / "model.onnx").write_bytes(data)
    code, out, err = run(capsys, "verify", bundle_copy)
    assert (code, out) == (4, "")
    assert err.startswith("mbq: error: ")
    assert "its contents differ" in err


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["run", "/nowhere", "hi"], 4, "mbq: error: /nowhere: no such folder"),
        (["run"], 2, "mbq: error: Missing argument 'BUNDLE'. (see mbq run --help)"),
        (["rum"], 2, "mbq: error: No such command 'rum'"),
        (["run", "x", "y", "--bits", "lots"], 2, "mbq: error: Invalid value for '--bits'"),
        (["verify", "/nowhere"], 4, "mbq: error: /nowhere"),
        (["perplexity", "/nowhere"], 2, "mbq: error: Missing option '--data'."),
        (["perplexity", "/nowhere", "--data", "/dev/zero"], 2, "mbq: error: /dev/zero: larger than 16 MiB"),
        (["simulate", "n" * 3000], 2, "mbq: error: board 'nnn"),
        (["run", "x", "hi", "--json-schema", "/dev/zero"], 2, "mbq: error: /dev/zero: larger than 1 MiB"),
        (["inspect", "n" * 3000], 4, "mbq: error: nnn"),
        (["run", "a/" * 3000, "hi"], 4, "mbq: error: a/a/"),
        (["pull", "file:/nowhere", "n" * 3000], 4, "mbq: error: file:/nowhere: no manifest.json there"),
        (["run", "~nobody-here/x", "hi"], 4, "mbq: error: ~nobody-here/x: no such folder"),
        (["inspect", "file:~nobody-here/x"], 4, "mbq: error: file:~nobody-here/x: no manifest.json there"),
        (["inspect", "\udcff"], 4, "mbq: error: \\udcff: no such folder"),
        (["serve", "x", "--host", ".."], 2, "mbq: error: cannot listen on .. port 8080 (no name of a machine)"),
        (["serve", "x", "--host", "n" * 70], 2, "mbq: error: cannot listen on nnn"),
        (["serve", "x", "--sleep-idle-seconds", "1e10"], 2, "mbq: error: Invalid value for '--sleep-idle-seconds'"),
        (["web", "x", "--output", "."], 2, "mbq: error: .: it has no name; choose another --output"),
        (["kit", "x", "--output", "."], 2, "mbq: error: .: a folder, needed a file"),
        (["kit", "x", "--output", "/tmp"], 2, "mbq: error: /tmp: a folder, needed a file"),
        (["trim", "/", "--max-bits", "4"], 4, "mbq: error: /: no manifest.json"),
    ],
)
def test_errors_are_one_line_with_their_exit_code(
    capsys: pytest.CaptureFixture[str], args: list[str], code: int, message: str
) -> None:
    found, out, err = run(capsys, *args)
    assert (found, out) == (code, "")
    assert err.startswith(message)
    assert err.count("\n") == 1


RANGES = [
    (name, parameter.opts[0])
    for name, entry in cli.COMMANDS.items()
    for parameter in importlib.import_module(f"mbq_runtime.commands.{entry.module}").command.params
    if isinstance(parameter.type, click.FloatRange)
]


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(("command", "option"), RANGES)
def test_a_number_that_no_range_has(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str, option: str, number: str
) -> None:
    code, out, err = run(capsys, command, tmp_path / "nowhere", option, number)
    assert (code, out) == (2, "")
    assert err.startswith(f"mbq: error: Invalid value for '{option}': {number} is not in the range")


class _Full(io.RawIOBase):
    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("args", [["inspect"], ["run", "--threads", "1", "--max-tokens", "2"]])
def test_a_full_disk_below_stdout_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, bundle: Path, args: list[str]
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", io.TextIOWrapper(_Full(), write_through=True))
        assert cli.main([args[0], str(bundle), *(["A"] if args[0] == "run" else []), *args[1:]]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "mbq: error: No space left on device; use another file, disk or address"
    ]


def test_a_fault_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    def failing(*_: object, **__: object) -> Engine:
        raise ZeroDivisionError("a\nb")

    monkeypatch.setattr(Engine, "load", failing)
    code, out, err = run(capsys, "run", bundle, "hello")
    assert (code, out) == (1, "")
    assert err == "mbq: error: a fault of mbq: ZeroDivisionError: a b; report it with the trace of mbq -v\n"


def test_interrupt_exits_130_without_a_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, bundle: Path
) -> None:
    def interrupted(*_: object, **__: object) -> Engine:
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "load", interrupted)
    code, out, err = run(capsys, "run", bundle, "hello")
    assert (code, out, err.strip()) == (130, "", "")


def test_version(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"mbq {mbq_runtime.__version__}\n"
    monkeypatch.setattr("mbq_runtime.version.version", lambda name: "1.2.3")
    assert mbq_runtime.__version__ == "1.2.3"
    monkeypatch.setattr("mbq_runtime.version.version", missing)
    assert mbq_runtime.__version__ == "0+unknown"


@pytest.mark.parametrize("verbose", [[], ["-v"], ["-vv"]])
def test_the_log_goes_to_stderr_when_asked_for(bundle: Path, mbq: Mbq, verbose: list[str]) -> None:
    done = mbq([*verbose, "run", bundle, "hello", "--bits", 8])
    assert (done.code, done.out) == (0, REPLY + "\n")
    assert ("INFO mbq_runtime.engine.engine" in done.err) is bool(verbose)
    assert (f"{bundle}: loaded in" in done.err) is bool(verbose)
