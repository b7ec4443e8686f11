"""What is missing skips a test on a person's machine and fails it under CI."""

from __future__ import annotations

from collections.abc import Callable

import needs
import pytest

LACKING: list[Callable[[], object]] = [
    lambda: needs.module("no_such_module"),
    lambda: needs.package_file("no_such_module", "*"),
    lambda: needs.package_file("json", "*.gguf"),
    lambda: needs.program("no-such-program"),
]


@pytest.mark.parametrize("lacking", LACKING)
@pytest.mark.parametrize(("ci", "outcome"), [("true", "Failed"), ("", "Skipped"), ("false", "Skipped")])
def test_missing(monkeypatch: pytest.MonkeyPatch, lacking: Callable[[], object], ci: str, outcome: str) -> None:
    monkeypatch.setenv("CI", ci)
    with pytest.raises((pytest.fail.Exception, pytest.skip.Exception)) as caught:
        lacking()
    assert type(caught.value).__name__ == outcome
    assert (
        "no-such-program" in str(caught.value) or "no_such_module" in str(caught.value) or "gguf" in str(caught.value)
    )


def test_what_is_there() -> None:
    assert needs.module("json").dumps(1) == "1"
    assert needs.package_file("json", "decoder.py").name == "decoder.py"
    assert needs.program("sh").endswith("/sh")
