"""An export that a signal ends, or that meets another one: nothing stays that the next run does not remove.

In CI one kill by each signal.  By hand, with more:  MBQ_KILLS=30 python -m pytest tests/export/test_killed.py
"""

from __future__ import annotations

import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from exporting import digests, export, run, start
from tiny_models import write_checkpoint

from mbq_export.cli import command
from mbq_export.write.files import reserved, writing
from mbq_runtime.errors import UsageError
from mbq_runtime.locks import locked as locked_name

KILLS = int(os.environ.get("MBQ_KILLS", "1"))
"""Kills by each signal, and pairs of exports."""
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL)
FAST = ("--method", "rtn", "--router", "static")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "model", "llama")


def bundle_at(folder: Path, content: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(content)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def ended(command: list[str], number: signal.Signals, draft: Path | None, delay_s: float) -> tuple[int, str]:
    """Exit code and stderr of a command that gets a signal ``delay_s`` after its start, or after ``draft`` exists."""
    process = start(command)
    while draft is not None and not draft.exists() and process.poll() is None:
        time.sleep(0.002)
    time.sleep(delay_s)
    process.send_signal(number)
    said = process.communicate(timeout=120)[1]
    return process.returncode, said


@pytest.mark.heavy
@pytest.mark.parametrize("number", SIGNALS)
def test_a_killed_export_leaves_nothing_that_the_next_run_keeps(
    number: signal.Signals, model: Path, calibration_text: Path, tmp_path: Path
) -> None:
    draw = random.Random(int(number))
    out = tmp_path / "out"
    command = export(model, calibration_text, out / "bundle", *FAST)
    before: dict[str, str] = {}
    for kill in range(KILLS):
        # Half of the kills come while the bundle is written.
        draft = out / ".bundle.part" if kill % 2 == 0 else None
        delay_s = draw.uniform(0, 0.3) if draft else draw.uniform(0, 12)
        code, said = ended([*command, "--force"] if before else command, number, draft, delay_s)
        assert "Traceback" not in said
        left = names(out) if out.exists() else []
        if number != signal.SIGKILL and code != 0:
            assert code in (128 + number, -number), said  # the latter before the command has begun
            assert not [name for name in left if name.endswith((".part", ".lock", ".old"))], left
        if "bundle" in left:
            assert before in ({}, digests(out / "bundle"))
            before = digests(out / "bundle")
    run([*command, "--force"] if before else command)
    assert names(out) == ["bundle"]


@pytest.mark.heavy
def test_of_two_exports_to_one_output_exactly_one_writes_it(
    model: Path, calibration_text: Path, tmp_path: Path
) -> None:
    for pair in range(KILLS):
        out = tmp_path / str(pair)
        command = export(model, calibration_text, out / "bundle", *FAST)
        both = [start(command) for _ in range(2)]
        said = [process.communicate(timeout=240)[1] for process in both]
        assert {process.returncode for process in both} == {0, 2}, said
        loser = said[[process.returncode for process in both].index(2)]
        errors = [line for line in loser.splitlines() if line.startswith("mbq-export: error: ")]
        assert len(errors) == 1
        assert "another export writes it now" in errors[0] or "it exists" in errors[0]
        assert names(out) == ["bundle"]


locked = partial(locked_name, holder="another export", choice="another --output")


def test_a_locked_name_is_refused_and_freed(tmp_path: Path) -> None:
    output = tmp_path / "bundles" / "one"
    with locked(output):
        with (
            pytest.raises(UsageError, match=rf"one: another export writes it now \(process {os.getpid()}\)"),
            locked(output),
        ):
            pass
        with locked(output.with_name("two")):
            assert names(output.parent) == [".one.lock", ".two.lock"]
    with locked(output):
        pass
    assert names(output.parent) == []


def test_two_exports_that_share_a_calibration_are_told_to_use_two_folders(
    model: Path, calibration_text: Path, tmp_path: Path
) -> None:
    """Another --output in the same folder would meet the same calibration."""
    arguments = ["--model", str(model), "--output", str(tmp_path / "two"), "--target", "portable"]
    with (
        locked(tmp_path / ".model.3122.calibration"),
        pytest.raises(UsageError, match=r"calibration: another export .* or choose an --output in another folder$"),
    ):
        command([*arguments, "--calib-data", str(calibration_text), *FAST], standalone_mode=False)


def test_a_lock_of_a_dead_process_is_taken(tmp_path: Path) -> None:
    (tmp_path / ".one.lock").write_text("123\n")
    with locked(tmp_path / "one"):
        assert (tmp_path / ".one.lock").read_text() == f"{os.getpid()}\n"
    assert names(tmp_path) == []


def test_folders_of_a_killed_export_are_removed(tmp_path: Path) -> None:
    output = bundle_at(tmp_path / "one", "mine")
    bundle_at(tmp_path / ".one.part", "half")
    bundle_at(tmp_path / ".one.old", "older")
    with reserved(output, force=True):
        assert names(tmp_path) == [".one.lock", "one"]
    assert (output / "manifest.json").read_text() == "mine"


def test_a_bundle_that_was_moved_away_comes_back(tmp_path: Path) -> None:
    """A kill between the two renames of a replacement leaves the old bundle under its second name."""
    bundle_at(tmp_path / ".one.old", "mine")
    with pytest.raises(UsageError, match="it exists"), reserved(tmp_path / "one", force=False):
        pass
    assert (tmp_path / "one" / "manifest.json").read_text() == "mine"
    assert names(tmp_path) == ["one"]


def test_an_error_while_writing_keeps_the_old_bundle(tmp_path: Path) -> None:
    output = bundle_at(tmp_path / "one", "mine")

    def interrupted() -> None:
        with reserved(output, force=True), writing(output, force=True) as draft:
            (draft / "manifest.json").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (output / "manifest.json").read_text() == "mine"
    assert names(tmp_path) == ["one"]


def linked(place: str, folder: Path) -> Path:
    """A link in ``folder``: to a bundle, to a link to one, to nothing, or out of a folder that is a link."""
    disk, link = folder / "disk", folder / "here" / "link"
    link.parent.mkdir()
    if place == "dangling":
        link.symlink_to(disk / "one")
        return link
    bundle_at(disk / "one", "older")
    if place == "parent":
        link.symlink_to(disk)
        return link / "one"
    target = disk / "one"
    if place == "link to a link":
        target = folder / "here" / "between"
        target.symlink_to(os.path.relpath(disk / "one", target.parent))
    link.symlink_to(target)
    return link


@pytest.mark.parametrize("place", ["bundle", "link to a link", "dangling", "parent"])
def test_a_link_stays_and_what_it_leads_to_is_replaced(place: str, tmp_path: Path) -> None:
    output = linked(place, tmp_path)
    before = names(tmp_path / "here")
    for content in ("new", "newer"):
        with reserved(output, force=True), writing(output, force=True) as draft:
            (draft / "manifest.json").write_text(content)
        assert (tmp_path / "here" / "link").is_symlink()
        assert names(tmp_path / "here") == before
        assert names(tmp_path / "disk") == ["one"]
        assert (tmp_path / "disk" / "one" / "manifest.json").read_text() == content


@pytest.mark.parametrize("left", [".one.old", ".one.part"])
@pytest.mark.parametrize("there", [True, False])
def test_a_link_or_a_file_with_a_name_of_ours_is_removed(left: str, there: bool, tmp_path: Path) -> None:
    """``--force`` of older versions moved a link away, and left it."""
    for at, kind in enumerate(("link", "file", "dangling")):
        folder = tmp_path / str(at)
        kept = bundle_at(folder / "disk", "kept")
        if there:
            bundle_at(folder / "one", "older")
        if kind == "file":
            (folder / left).write_text("x")
        else:
            (folder / left).symlink_to(kept if kind == "link" else folder / "nowhere")
        with reserved(folder / "one", force=True), writing(folder / "one", force=True) as draft:
            (draft / "manifest.json").write_text("new")
        assert names(folder) == ["disk", "one"]
        assert (folder / "one" / "manifest.json").read_text() == "new"
        assert (kept / "manifest.json").read_text() == "kept"


def test_links_that_lead_to_themselves_are_refused(tmp_path: Path) -> None:
    (tmp_path / "one").symlink_to(tmp_path / "two")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    with pytest.raises(UsageError, match="one: its links lead to themselves; choose"), reserved(tmp_path / "one", True):
        pass


def test_a_link_to_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    (tmp_path / "one").symlink_to(tmp_path / "thesis.txt")
    with pytest.raises(UsageError, match="one: it is not a bundle"), reserved(tmp_path / "one", force=True):
        pass
    assert names(tmp_path) == ["one", "thesis.txt"]
