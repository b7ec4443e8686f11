"""What is learned is kept between runs, and a file that no board can have written is ignored."""

from __future__ import annotations

import json
import logging
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from mbq_runtime.control import kept
from mbq_runtime.control.heat import Heat
from mbq_runtime.control.learned import Learned
from mbq_runtime.control.watts import Watts


def learned() -> Learned:
    known, heat, watts, temp_c = Learned(), Heat(), Watts(), 30.0
    for second in range(120):
        known = known.with_token(2, 1.0 if second % 2 else 0.5, 0.02 if second % 2 else 0.013, 0.5)
        temp_c += (70 - temp_c) / 150
        heat = heat.after(temp_c, 1.0, 1.0)
        watts = watts.after(4.0 + 5.0 * (second % 2), float(second % 2), 0.0, 1.0)
    return Learned(known.token_times, heat, watts)


def write(path: Path, contents: object) -> None:
    text = json.dumps(contents)
    path.write_text(json.dumps({"sha256": sha256(text.encode()).hexdigest(), "contents": text}))


def test_what_was_learned_is_known_at_the_next_start(tmp_path: Path) -> None:
    path, before = tmp_path / "learned" / kept.key("bundle", "board", 2), learned()
    kept.save(before, path)
    after = kept.load(path)
    assert after.token_time(2).is_known
    assert after.token_time(2).at(0.75) == pytest.approx(before.token_time(2).at(0.75))
    assert after.heat.is_known
    assert after.heat.settled_c(1.0) == pytest.approx(before.heat.settled_c(1.0))
    assert after.watts.is_known
    assert after.watts.at(0.5, 0.0) == pytest.approx(before.watts.at(0.5, 0.0))
    assert path.stat().st_size < 64 << 10
    assert not list(path.parent.glob("*.json.*"))


def test_each_bundle_board_and_number_of_threads_has_its_own_file() -> None:
    names = {kept.key(*of) for of in (("a", "b", 2), ("a", "b", 4), ("a", "c", 2), ("d", "b", 2), ("ab", "", 2))}
    assert len(names) == 5


def test_no_file_is_no_fault(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert kept.load(tmp_path / "none.json") == Learned()
    assert caplog.text == ""


GOOD: dict[str, Any] = {
    "version": 1,
    "token_times": {"2": {"mean": [0.01, 0.01], "covariance": [[1e-6, 0], [0, 1e-6]]}},
}


def test_the_good_file_of_the_next_test(tmp_path: Path) -> None:
    write(tmp_path / "kept.json", GOOD)
    assert kept.load(tmp_path / "kept.json").token_time(2).at(1.0) == pytest.approx(0.02)


@pytest.mark.parametrize(
    "contents",
    [
        [],
        {"version": 2, "token_times": {}},
        {"version": 1},
        GOOD | {"token_times": {str(n): GOOD["token_times"]["2"] for n in range(1, 100)}},
        GOOD | {"token_times": {"-2": GOOD["token_times"]["2"]}},
        GOOD | {"token_times": {"2": {"mean": [1e5, 1e5], "covariance": [[1, 0], [0, 1]]}}},
        GOOD | {"token_times": {"2": {"mean": [float("nan"), 1.0], "covariance": [[1, 0], [0, 1]]}}},
        GOOD | {"token_times": {"2": {"mean": [10**400, 0.01], "covariance": [[1, 0], [0, 1]]}}},
        GOOD | {"token_times": {"2": {"mean": [0.01, 0.01], "covariance": [[1, 5], [5, 1]]}}},
        GOOD | {"token_times": {"2": {"mean": [0.01, 0.01], "covariance": [[-1, 0], [0, 1]]}}},
        GOOD | {"heat": {"mean": [1.0, 1.0, 1.0], "covariance": [[1, 0, 0], [0, 1, 0], [0, 0, 1]]}},
        GOOD | {"watts": {"mean": [1.0, -1.0, 1.0], "covariance": [[1, 0, 0], [0, 1, 0], [0, 0, 1]]}},
    ],
)
def test_an_absurd_file_is_ignored_with_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, contents: object
) -> None:
    write(tmp_path / "kept.json", contents)
    with caplog.at_level(logging.WARNING):
        assert kept.load(tmp_path / "kept.json") == Learned()
    assert len(caplog.records) == 1
    assert "ignored" in caplog.text


def test_a_damaged_or_large_file_is_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "kept.json"
    kept.save(learned(), path)
    path.write_text(path.read_text().replace("0.01", "0.02"))
    assert kept.load(path) == Learned()
    path.write_bytes(b" " * (1 << 20))
    assert kept.load(path) == Learned()
    path.write_text("[" * 100_000)
    with caplog.at_level(logging.WARNING):
        assert kept.load(path) == Learned()


def test_a_folder_that_cannot_be_written_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    kept.save(learned(), tmp_path / "file" / "kept.json")
