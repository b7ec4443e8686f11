"""``mbq run``: a reply that was cut can be told from a finished one, and a speed that is not known is not 0."""

from __future__ import annotations

import json
from pathlib import Path

import needs
import pytest
from tiny_bundle import CONTEXT, REPLY

from mbq_runtime import Engine, cli


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = cli.main([str(arg) for arg in ("run", *args, "--threads", 1)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_finished_reply(capsys: pytest.CaptureFixture[str], bundle: Path) -> None:
    code, out, err = run(capsys, bundle, "hello")
    assert (code, out) == (0, REPLY + "\n")
    assert "cut" not in err
    code, out, err = run(capsys, bundle, "hello", "--json")
    assert (code, json.loads(out)["finish_reason"], err) == (0, "stop", "")


def test_a_reply_that_max_tokens_cuts(capsys: pytest.CaptureFixture[str], bundle: Path) -> None:
    code, out, err = run(capsys, bundle, "xA", "--raw", "--max-tokens", 5)
    assert (code, out) == (0, "BCDEF\n")
    assert err.splitlines()[1:] == ["the reply was cut after 5 tokens; for a longer one give a higher --max-tokens"]
    code, out, err = run(capsys, bundle, "xA", "--raw", "--max-tokens", 5, "--json")
    assert (code, json.loads(out)["finish_reason"], err) == (0, "length", "")


def test_a_reply_that_the_context_cuts(capsys: pytest.CaptureFixture[str], bundle: Path) -> None:
    code, out, err = run(capsys, bundle, "xA", "--raw", "--max-tokens", 1000)
    assert (code, len(out)) == (0, CONTEXT - 2 + 1)
    note = f"the reply was cut: with the prompt it fills the context of {CONTEXT} tokens; a shorter prompt leaves more"
    assert err.splitlines()[1:] == [note]
    _, out, _ = run(capsys, bundle, "xA", "--raw", "--max-tokens", 1000, "--json")
    assert json.loads(out)["finish_reason"] == "length"


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("most", [3, 1000])
def test_json_that_is_not_whole(
    capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path, as_json: bool, most: int
) -> None:
    needs.module("llguidance")
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"type": "string", "minLength": 200}))
    more = ["--json"] if as_json else []
    code, out, err = run(capsys, bundle, "hello", "--json-schema", schema, "--max-tokens", most, *more)
    assert code == 2
    (line,) = [line for line in err.splitlines() if "cut" in line]
    assert line.startswith("mbq: error: the reply was cut")
    assert "not whole JSON" in line
    assert ("--max-tokens" in line) == (most == 3)
    assert (json.loads(out)["text"] if as_json else out).startswith('"'), "what there is comes all the same"
    schema.write_text(json.dumps({"const": "A"}))
    code, out, err = run(capsys, bundle, "hello", "--json-schema", schema, "--max-tokens", 30, *more)
    assert (code, "cut" in err) == (0, False), err


def test_the_speed_of_one_token_is_not_known(capsys: pytest.CaptureFixture[str], bundle: Path, engine: Engine) -> None:
    _, out, _ = run(capsys, bundle, "xA", "--raw", "--max-tokens", 1, "--json")
    assert json.loads(out)["tokens_per_s"] is None
    _, _, err = run(capsys, bundle, "xA", "--raw", "--max-tokens", 1)
    assert "1 tokens, speed unknown, first after" in err
    with engine.generate("xA", chat=False, max_tokens=2) as reply:
        assert reply.stats.tokens_per_s is None, "before the first"
        assert reply.text() == "BC"
        assert (reply.stats.tokens_per_s or 0) > 0
