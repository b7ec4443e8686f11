"""Commands that run in forks of one process do not disturb each other."""

from __future__ import annotations

import os
import signal
import time

import pytest
from warm_start import Running

pytestmark = pytest.mark.heavy


def test_a_command_that_nobody_waits_for_gives_its_exit_code_to_no_other() -> None:
    """A wrong number here would be signalled by a test: 0 is the process group of the tests."""
    forgotten = Running(["--version"])
    while os.path.exists(f"/proc/{forgotten.pid}"):
        time.sleep(0.01)
    other = Running(["--no-such-option"])
    assert other.pid not in (0, forgotten.pid)
    assert "No such option" in other.communicate()[1]
    assert other.returncode == 2
    assert forgotten.communicate()[0].startswith("mbq-export, version ")
    assert forgotten.returncode == 0


def test_each_of_two_has_its_own_text_and_no_signal_after_its_end() -> None:
    targets, version = Running(["--list-targets"]), Running(["--version"])
    assert targets.pid != version.pid
    assert version.communicate()[0].startswith("mbq-export, version ")
    assert "rpi5" in targets.communicate()[0]
    targets.send_signal(signal.SIGKILL)  # nobody gets it
    assert targets.returncode == version.returncode == 0
