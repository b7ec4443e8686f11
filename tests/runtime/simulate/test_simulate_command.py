from __future__ import annotations

import json
import random
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from changes import mutate_json
from tiny_bundle import facts, write_manifest

from mbq_runtime import cli
from mbq_runtime.control.events import Event
from mbq_runtime.errors import UsageError
from mbq_runtime.sensing.readings import Readings
from mbq_runtime.simulate.replay import read_trace


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = cli.main(["simulate", *(str(arg) for arg in args)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """A trace of four minutes: cool, hot for one minute, cool again."""
    path = tmp_path / "trace.jsonl"
    looks = (
        Readings(5000.0 + i, temp_c=79.9 if 60 <= i < 120 else 50.0, throttle_temp_c=80.0, heat_throttled=False)
        for i in range(240)
    )
    path.write_text("".join(json.dumps({"signals": [], "readings": asdict(look)}) + "\n" for look in looks))
    return path


def test_a_board_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "pi5-bare", "--hours", 0.1)
    assert code == 0
    title, header, *rows = out.splitlines()
    assert title == "pi5-bare: Raspberry Pi 5 without a cooler"
    assert header.split("  ")[0] == "policy"
    assert [row[:8].strip() for row in rows] == ["fixed 8", "fixed 4", "auto", "battery", "oracle"]
    assert len({len(row) for row in rows}) == 1


def test_a_bundle_gives_the_bounds(capsys: pytest.CaptureFixture[str], bundle: Path) -> None:
    args = ("pi5-bare", "--hours", 0.3, "--policy", "auto", "--bundle", bundle, "--json")
    _, out, _ = run(capsys, *args)
    figures = json.loads(out)["runs"]["auto"]
    assert figures["mean_bits"] < 8.0
    assert figures["tokens_per_s"] > 1e5, "the tiny model reads a few kB"


def test_a_bundle_without_a_table_of_bytes(capsys: pytest.CaptureFixture[str], bundle_copy: Path) -> None:
    known = facts()
    write_manifest(bundle_copy, replace(known, weights=replace(known.weights, bytes_per_token={})))
    code, out, err = run(capsys, "pi5-bare", "--bundle", bundle_copy)
    assert (code, out) == (4, "")
    assert err.startswith("mbq: error: tiny: its manifest does not say how many bytes a token reads")


def test_a_trace(capsys: pytest.CaptureFixture[str], trace: Path) -> None:
    _, out, _ = run(capsys, trace, "--policy", "fixed 8", "--policy", "auto", "--json")
    runs = json.loads(out)["runs"]
    assert runs["fixed 8"] == {
        "tokens_per_s": None, "mean_bits": 8.0, "joules_per_token": None, "above_throttle_share": 0.0,
        "hottest_c": 79.9, "switches": 0,
    }  # fmt: skip
    assert 5.0 < runs["auto"]["mean_bits"] < 7.5
    assert runs["auto"]["switches"] >= 3
    _, out, _ = run(capsys, trace)
    assert "unknown" in out


def test_events_are_a_trace_too(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    events = [Event(1.0 + i, 8.0, 4.0, "heat", Readings(9.0 + i, temp_c=80.0)) for i in range(2)]
    path.write_text("\n".join(json.dumps(event.as_dict()) for event in events))
    assert read_trace(path) == [event.readings for event in events]
    path.write_text('{"time_s": 1, "temp_c": 3.5}\n\n{"time_s": 2, "of_a_later_version": "x"}\n')
    assert read_trace(path) == [Readings(1, temp_c=3.5), Readings(2)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "0 readings, needed 2 or more"),
        ('{"time_s": 1}\n', "1 readings, needed 2 or more"),
        ('{"time_s": 1}\n{"time_s":', "line 2: not JSON"),
        ("[1]\n", 'line 1: no readings with a "time_s"'),
        ('{"readings": {"temp_c": 1}}\n', 'line 1: no readings with a "time_s"'),
        ('{"time_s": 1, "temp_c": "hot"}\n', "line 1: temp_c is 'hot', needed a number"),
    ],
)
def test_what_is_no_trace(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_trace(path)


@pytest.mark.heavy
@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_plots(capsys: pytest.CaptureFixture[str], tmp_path: Path, trace: Path, suffix: str, magic: bytes) -> None:
    for what in ("phone", trace):
        path = tmp_path / f"plot{suffix}"
        code, _, _ = run(capsys, what, "--hours", 0.05, "--policy", "auto", "--plot", path)
        assert code == 0
        assert path.read_bytes().startswith(magic)


def test_plots_that_cannot_be_drawn(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    args = ("phone", "--hours", 0.05, "--policy", "auto", "--plot")
    assert run(capsys, *args, tmp_path / "plot.txt")[0] == 2
    code, _, err = run(capsys, *args, tmp_path / "none" / "plot.png")
    assert code == 2
    assert "cannot be written" in err


@pytest.mark.parametrize("bits", ["nan", "inf", "-3", "0", "9", "four"])
def test_bits_that_no_policy_fixes(capsys: pytest.CaptureFixture[str], bits: str) -> None:
    code, out, err = run(capsys, "pi5-bare", "--hours", 0.01, "--policy", f"fixed {bits}")
    assert (code, out) == (2, "")
    assert f"policy 'fixed {bits}': {bits!r} is no number of bits from 1 to 8" in err


@pytest.mark.parametrize("policies", [["oracle"], ["auto", "oracle"]])
def test_no_oracle_of_a_trace(capsys: pytest.CaptureFixture[str], trace: Path, policies: list[str]) -> None:
    code, out, err = run(capsys, trace, *(word for policy in policies for word in ("--policy", policy)))
    assert (code, out) == (2, "")
    assert "--policy oracle: it must know the board" in err


def test_an_unknown_board(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "pi6")
    assert code == 2
    assert "board 'pi6': neither a file nor one of pi5-bare, pi5-fan, orin-nano-15w, phone, laptop-battery" in err


def test_changed_traces_are_replayed_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A trace may come from anyone."""
    looks = [
        Readings(5000.0 + i, temp_c=60.0 + i, throttle_temp_c=80.0, power_w=5.0, discharging=True, battery_fraction=0.5,
                 battery_energy_wh=20.0, foreign_cpu_fraction=0.2, available_cpus=4.0, tokens_per_s=9.0)
        for i in range(30)
    ]  # fmt: skip
    path, one, codes = tmp_path / "trace.jsonl", tmp_path / "one.json", set()
    for number in range(150):
        draw = random.Random(number)
        lines = [json.dumps(asdict(look)) for look in looks]
        for at in draw.sample(range(len(lines)), 3):
            one.write_text(lines[at])
            mutate_json(one, draw)
            lines[at] = one.read_text()
        path.write_text("\n".join(lines))
        code, _, said = run(capsys, path, "--policy", "auto", "--policy", "battery")
        codes.add(code)
        assert code in (0, 2), (number, said)
        assert said.count("\n") == (code == 2), (number, said)
    assert codes == {0, 2}
