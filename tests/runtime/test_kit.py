"""The kit on a tiny bundle, and on a faked board whose truth is known."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from changes import mutate_json

from mbq_runtime import Engine, cli, kit
from mbq_runtime.errors import UsageError
from mbq_runtime.sensing.readings import Readings
from mbq_runtime.simulate.closed_loop import contenders
from mbq_runtime.simulate.compared import Trial
from mbq_runtime.simulate.report import is_report, read_report


def faked(engine: Engine, *, limit_c: float | None = None) -> tuple[dict[str, Any], kit.Board]:
    """A board of two cores.  A token takes 10 ms and 30 ms a whole read; a thread less 0.6, a busy core half.

    It settles at 30 C plus 40 C of load with a time constant of 60 s, and draws 2 W plus 6 W.
    """
    world = {"now": 0.0, "temp": 30.0, "load": 0.0}

    def spend(seconds: float, load: float) -> None:
        world["now"] += seconds
        world["temp"] += (30 + 40 * load - world["temp"]) * min(seconds / 60, 1.0)
        world["load"] = load

    def look() -> Readings:
        return Readings(world["now"], temp_c=world["temp"], throttle_temp_c=limit_c, power_w=2 + 6 * world["load"])

    board = kit.Board(engine, look, lambda: world["now"], lambda seconds: spend(seconds, 0.0))

    def speed(bits: float) -> float:
        token_s = (0.01 + 0.03 * bits / 8) / (1.0 if engine.threads == most else 0.6)
        spend(24 * token_s, 1.0)
        return 1 / token_s

    most = engine.threads
    board.tokens_per_s = speed  # type: ignore[method-assign]
    return kit.empty(engine, look), board


def stages(*names: str) -> list[kit.Stage]:
    return [stage for stage in kit.STAGES if stage.name in names]


def finished(report: dict[str, Any], tokens_per_s: float = 20.0) -> dict[str, Any]:
    loop = {"seconds": 60.0, "busy_from_s": 20.0, "busy_until_s": 40.0, "tokens_per_s": tokens_per_s, "mean_bits": 6.0}
    report["stages"]["closed_loop"] = loop | {"rows": []}
    return report


def quiet_report(engine: Engine) -> dict[str, Any]:
    """A whole report of a faked board.  The stage that needs other programs is made up."""
    report, board = faked(engine)
    quiet = stages("idle", "speeds", "heating", "cooling")
    kit.measure(report, board, 60, lambda _: None, lambda _: None, stages=quiet)
    return finished(report)


def test_the_speed_is_that_of_the_tokens_of_a_reply(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a program gets: sampling and text are in it, the prompt is not.  A piece may have several tokens."""
    heard: list[float] = []
    engine.add_listener(listener := lambda seconds, bits: heard.append(seconds))
    times = iter(range(10_000))
    board = kit.Board(engine, lambda: Readings(0.0), lambda: 0.5 * next(times))
    spent_s = [token_s for _, token_s in board.tokens(26, bits=8.0)]
    engine.remove_listener(listener)
    # The clock is read once a token, and once a piece besides.
    assert set(spent_s) <= {0.5, 1.0}
    assert 1 <= len(spent_s) <= len(heard) - 1
    assert 1.0 <= board.tokens_per_s(8.0) <= 2.0
    monkeypatch.setattr(kit, "_TOKENS", 0)
    with pytest.raises(kit.Limit, match="less than three tokens"):
        board.tokens_per_s(8.0)


def test_a_faked_board_is_found_again_in_its_report(engine: Engine, tmp_path: Path) -> None:
    report, board = faked(engine)
    kept: list[str] = []
    quiet = stages("idle", "speeds", "heating", "cooling")
    kit.measure(report, board, 1800, lambda now: kept.append(json.dumps(now)), lambda _: None, stages=quiet)
    assert len(kept) == 4
    path = tmp_path / "report.json"
    kit.write(finished(report), path)
    assert is_report(path)
    found = read_report(path).board
    assert (found.idle_w, found.core_w) == pytest.approx((2.0, 6.0), abs=0.2)
    assert found.ambient_c + found.k_per_w * found.idle_w == pytest.approx(30, abs=2)
    assert found.k_per_w * found.core_w == pytest.approx(40, abs=3)
    assert found.tau_s == pytest.approx(60, rel=0.15)
    trial = Trial(read_report(path).situation, read_report(path).weights, found)
    ((name, fixed),) = contenders(["fixed 8"], 3.0, 8.0)
    assert trial.run(name, trial.follow(fixed)).samples[5].tokens_per_s == pytest.approx(25.0, rel=0.03)


def test_a_stage_ends_at_the_limit(engine: Engine) -> None:
    report, board = faked(engine, limit_c=50.0)
    kit.measure(report, board, 1800, lambda _: None, lambda _: None, stages=stages("heating", "cooling"))
    heating = report["stages"]["heating"]["rows"]
    assert "48" in heating[-1]["stopped"]
    assert max(row["temp_c"] for row in heating) < 50.0
    assert report["stages"]["cooling"]["rows"][-1]["temp_c"] < 35.0


def test_speeds_are_measured_in_turns_with_pauses_on_a_hot_board(engine: Engine) -> None:
    report, board = faked(engine, limit_c=50.0)
    seen_c: list[float] = []
    look = board.look

    def watched() -> Readings:
        seen_c.append(look().temp_c or 0.0)
        return look()

    board.look = watched
    kit.measure(report, board, 1800, lambda _: None, lambda _: None, stages=stages("speeds"))
    assert not report["stages"]["speeds"].get("stopped")
    assert {row["bits"] for row in report["stages"]["speeds"]["rows"]} >= {8.0, 4.0}
    assert 48 < max(seen_c) < 50


def test_a_board_that_does_not_cool_ends_the_stage(engine: Engine) -> None:
    report, board = faked(engine, limit_c=30.0)
    kit.measure(report, board, 1800, lambda _: None, lambda _: None, stages=stages("speeds"))
    assert "the limit is 30 C" in report["stages"]["speeds"]["stopped"]


def test_a_second_call_goes_on_where_the_first_ended(engine: Engine, tmp_path: Path) -> None:
    report, board = faked(engine)
    kit.measure(report, board, 60, lambda _: None, lambda _: None, stages=stages("idle"))
    earlier = json.loads(json.dumps(report))
    path = tmp_path / "report.json.part"
    kit.write(earlier, path)
    assert kit.finished_stages(path, kit.empty(engine, board.look)) == earlier["stages"]
    said: list[str] = []
    kit.measure(earlier, board, 60, lambda _: None, said.append, stages=stages("idle", "cooling"))
    assert [line.split(":")[0] for line in said] == ["cooling"]
    fresh = kit.empty(engine, board.look)
    for other in (earlier | {"bundle": earlier["bundle"] | {"model": "another"}}, [], earlier | {"stages": 3}):
        path.write_text(json.dumps(other))
        assert not kit.finished_stages(path, fresh)
    for text in ("{", "[" * 100_000, "\ud800", "\x00"):
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        assert not kit.finished_stages(path, fresh)


def test_of_an_unfinished_report_only_the_stages_are_taken(engine: Engine, tmp_path: Path) -> None:
    """Another file in its place could bring its own text into the report, and to the terminal."""
    report, board = faked(engine)
    kit.measure(report, board, 60, lambda _: None, lambda _: None, stages=stages("idle"))
    path = tmp_path / "report.json.part"
    kit.write(report | {"note": "\x9b2J"} | {"stages": report["stages"] | {"\x1b[2J": {}, "speeds": 3}}, path)
    assert list(kit.finished_stages(path, kit.empty(engine, board.look))) == ["idle"]


@pytest.mark.heavy
def test_the_command_measures_a_bundle_and_shows_what_it_sends(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "report.json"
    assert cli.main(["kit", str(bundle), "--minutes", "0.1", "--output", str(path), "--yes"]) == 0
    shown = json.loads(capsys.readouterr().out)
    report = json.loads(path.read_text())
    assert {key: value for key, value in report.items() if key != "stages"} == shown
    assert list(report["stages"]) == [stage.name for stage in kit.STAGES]
    text = path.read_text()
    assert not any(word in text for word in (str(tmp_path), str(bundle), str(Path.home()), "hostname"))
    assert not path.with_name("report.json.part").exists()
    assert cli.main(["simulate", str(path)]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split("  ")[0] for row in rows] == ["fixed 8", "fixed 4", "auto", "battery", "oracle", "measured"]


@pytest.mark.parametrize(
    "change",
    [
        lambda report: report["stages"].pop("speeds"),
        lambda report: report["stages"]["closed_loop"].update(seconds=1e9),
        lambda report: report["stages"]["closed_loop"].update(seconds=float("nan")),
        lambda report: report["stages"]["speeds"]["rows"].clear(),
        lambda report: report["bundle"].update(bytes_per_token={}),
        lambda report: report["bundle"].update(threads=0),
        lambda report: report["limits"].clear(),
        lambda report: report["limits"].update(throttle_temp_c=10**9),
        lambda report: report["limits"].update(critical_temp_c="85"),
        lambda report: report["bundle"].update(max_bits=10**17),
        lambda report: report["bundle"].update(floor_bits=-3),
        lambda report: report["bundle"].update(threads=10**6),
        lambda report: report["bundle"].update(kl_divergence=[[3, -1.0], [8, 0.1]]),
        lambda report: report["bundle"].update(bytes_per_token={"3": -1, "8": 5}),
        lambda report: report["stages"]["heating"]["rows"][0].update(time_s=1e300),
        lambda report: report["stages"]["idle"]["rows"][0].update(power_w=10**400),
        lambda report: report["stages"]["speeds"]["rows"][0].update(tokens_per_s=0),
    ],
)
def test_a_file_that_is_no_whole_report_is_refused_in_one_line(
    engine: Engine, tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    report = quiet_report(engine)
    change(report)
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    with pytest.raises(UsageError, match=r"no whole report|cannot be read") as caught:
        read_report(path)
    assert "\n" not in str(caught.value)


def test_the_shortest_closed_loop_is_a_second(engine: Engine, tmp_path: Path) -> None:
    report, path = quiet_report(engine), tmp_path / "report.json"
    report["stages"]["closed_loop"]["seconds"] = 0.5
    kit.write(report, path)
    assert cli.main(["simulate", str(path), "--policy", "auto"]) == 0


def test_a_report_does_not_command_the_terminal(
    engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = quiet_report(engine)
    report["environment"]["board"] = "a\x1b]0;owned\x07\x9b2Jb"
    path = tmp_path / "report.json"
    kit.write(report, path)
    assert cli.main(["simulate", str(path), "--policy", "auto"]) == 0
    out = capsys.readouterr().out
    assert "owned" in out
    assert out.replace("\n", "").isprintable()


def test_changed_reports_are_read_or_refused(
    engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A report may come from anyone."""
    original, path, codes = tmp_path / "original.json", tmp_path / "report.json", set()
    kit.write(quiet_report(engine), original)
    for number in range(150):
        shutil.copy(original, path)
        mutate_json(path, random.Random(number))
        codes.add(code := cli.main(["simulate", str(path), "--policy", "auto", "--policy", "fixed 4"]))
        said = capsys.readouterr().err
        assert code in (0, 2), (number, said)
        assert said.count("\n") == (code == 2), (number, said)
    assert codes == {0, 2}
