"""Half a character is named with its place in the text that a person wrote, and with its cause where that is known."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mbq_runtime import Engine, UsageError
from mbq_runtime.engine.tokenizer import refuse_half_characters


@pytest.mark.parametrize("at", [0, 3])
def test_the_place_in_a_message(engine: Engine, at: int) -> None:
    text = "x" * at + "\ud83d!"
    words = f"text has U\\+D83D, half a character, at position {at}; remove it"
    with pytest.raises(UsageError, match=f"the user's {words}"):
        engine.prompt_tokens(text)
    for role in ("system", "user", "assistant"):
        messages = [{"role": "system", "content": "Be brief."}, {"role": role, "content": text}]
        with pytest.raises(UsageError, match=f"the {role}'s {words}"):
            engine.prompt_tokens([*messages, {"role": "user", "content": "x"}])
    with pytest.raises(UsageError, match=f"^{words}"):
        engine.prompt_tokens(text, chat=False)


def test_a_locale_without_the_character(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    with pytest.raises(UsageError, match="position 1; the locale has the encoding ascii: set PYTHONUTF8=1, or a UTF-8"):
        refuse_half_characters("w\udcc3\udcb6rld")
    with pytest.raises(UsageError, match="position 1; remove it"):
        refuse_half_characters("w\ud800")


def test_an_argument_in_such_a_locale(bundle: Path) -> None:
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, "-m", "mbq_runtime.cli", "run", str(bundle), "wörld", "--threads", "1"]
    for utf8, code in (("0", 2), ("1", 0)):
        done = subprocess.run(
            command, capture_output=True, timeout=60, env={**plain, "PYTHONUTF8": utf8, "HOME": str(bundle.parent)}
        )
        assert done.returncode == code, done.stderr
        assert (b"set PYTHONUTF8=1" in done.stderr) == (code == 2)
        assert done.stderr.count(b"\n") == 1
