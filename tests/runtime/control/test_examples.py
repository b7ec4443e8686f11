from __future__ import annotations

import configparser
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from mbq_runtime.commands.serve import command

EXAMPLES = Path(__file__).parents[3] / "examples"


def test_a_robot_gets_its_answers(bundle: Path) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / "robot_deadline.py", bundle], capture_output=True, text=True, check=True
    )
    first, second = done.stdout.splitlines()
    assert first.startswith("A person stands in the way. Hi, wörld! [stop, ")
    assert second.endswith(" bits]")


def test_the_service_starts_what_exists() -> None:
    unit = configparser.ConfigParser(delimiters="=", interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string((EXAMPLES / "mbq-serve.service").read_text())
    program, name, *args = shlex.split(unit["Service"]["ExecStart"])
    assert (Path(program).name, name) == ("mbq", "serve")
    options = command.make_context("serve", args).params
    assert options["policy"] == "auto"
    assert options["bundle"] == "/opt/mbq/bundle"
    assert str(options["events"].parent) == f"/var/log/{unit['Service']['LogsDirectory']}"


def test_the_service_can_keep_what_it_learns() -> None:
    """The user of the service has no home."""
    lines = [
        line.partition("=")[::2] for line in (EXAMPLES / "mbq-serve.service").read_text().splitlines() if "=" in line
    ]
    unit = dict(lines)
    assert unit["Environment"] == f"MBQ_CACHE_DIR=%C/{unit['CacheDirectory']}"
    assert int(unit["SuccessExitStatus"]) == 128 + signal.SIGTERM
