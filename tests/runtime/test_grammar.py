"""A reply says only what its grammar permits, at every budget."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import needs
import pytest
from forked_mbq import Mbq
from schemas import schema
from tiny_bundle import CIRCLE, ids, write_bundle

from mbq_runtime import Engine, UsageError
from mbq_runtime.engine import Grammar
from mbq_runtime.engine import grammar as grammar_module
from mbq_runtime.errors import GrammarError

DEPTHS = (3.0, 4.0, 6.0, 8.0)
pytestmark = pytest.mark.usefixtures("llguidance")


@pytest.fixture(scope="module")
def llguidance() -> None:
    needs.module("llguidance")


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """An engine whose context cuts no reply off."""
    return Engine.load(write_bundle(tmp_path_factory.mktemp("patient") / "bundle", context=400), threads=1)


@pytest.mark.heavy
@pytest.mark.parametrize("bits", DEPTHS)
def test_replies_validate_at_every_depth(patient: Engine, bits: float) -> None:
    """Two hundred schemas at each depth.  Braces are unlikely, so that what contains its own kind ends."""
    jsonschema = needs.module("jsonschema")
    recursions = 0
    for seed in range(200):
        wanted = schema(seed)
        reply = patient.generate(
            "A", chat=False, max_tokens=398, temperature=1.5, seed=seed, avg_bits=bits, logit_bias={ids("{")[0]: -3},
            grammar=Grammar.of_schema(wanted),
        )  # fmt: skip
        text = reply.text()
        assert reply.stats.finish_reason == "stop", (seed, text)
        jsonschema.validate(json.loads(text), wanted)
        recursions += '"next": {' in text
    assert recursions > 5


def test_greedy_choices_are_the_likeliest_that_fit(engine: Engine) -> None:
    reply = engine.generate("A", chat=False, max_tokens=20, grammar=Grammar("regex", "[A-D]{3}x[E-G]+y"))
    assert re.fullmatch("BCDx[E-G]+", reply.text())
    assert engine.generate("A", chat=False, grammar=Grammar.of_choices(["xyz", "BCE", "BA"])).text() == "BCE"


def test_a_reply_ends_where_the_grammar_ends(engine: Engine) -> None:
    reply = engine.generate("A", chat=False, max_tokens=50, grammar=Grammar("lark", 'start: /[A-G]{9}/ "!"'))
    assert reply.text() == (CIRCLE * 2)[1:10] + "!"
    assert reply.stats.finish_reason == "stop"


def test_a_session_and_likelihoods_go_with_a_grammar(engine: Engine) -> None:
    session = engine.session()
    for _ in range(2):
        reply = engine.generate(
            "xA", chat=False, session=session, logprobs=1, grammar=Grammar("regex", "C+D"), max_tokens=9
        )
        text = reply.text()
        assert re.fullmatch("C+D", text)
    assert reply.stats.cached_tokens == 1
    assert reply.stats.likelihoods[0].top[0][0] == ord("B") + 3  # the model's own choice is reported


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        (Grammar.of_schema({"type": "objet"}), "json_schema: at type: Invalid type: objet"),
        (Grammar.of_schema({"properties": {"a": {"$ref": "#/x"}}}), r"at properties.a.\$ref: .*'/x' does not exist"),
        (Grammar.of_schema({"not": {"type": "string"}}), "json_schema: at not: Unimplemented keys"),
        (
            Grammar.of_schema({"type": "object", "properties": {"a": {"anyOf": [{}, {"items": {"type": 5}}]}}}),
            "json_schema: at properties.a.anyOf.1.items.type: ",
        ),
        (Grammar("json_schema", "{"), "json_schema: "),
        (Grammar("regex", "(a"), "regex: .*unclosed group"),
        (Grammar("lark", "start: x"), "lark: "),
    ],
)
def test_a_bad_grammar_is_one_line(engine: Engine, grammar: Grammar, words: str) -> None:
    with pytest.raises(GrammarError, match=words) as caught:
        engine.generate("A", grammar=grammar)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


def test_without_the_package(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UsageError, match=r"grammars need llguidance .*pip install 'mbq-export\[grammar\]'"):
        grammar_module.Grammars(bundle, 264, [2])


def command(bundle: Path, schema: Path) -> list[object]:
    return ["run", bundle, "A", "--raw", "--json-schema", schema]


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "cannot be read as JSON"), ("[]", "has a list, needed an object"), ('{"type": 5}', "json_schema: ")],
)
def test_the_command_refuses_a_bad_schema(bundle: Path, tmp_path: Path, mbq: Mbq, content: str, words: str) -> None:
    (tmp_path / "schema.json").write_text(content)
    done = mbq(command(bundle, tmp_path / "schema.json"))
    assert done.code == 2
    assert words in done.err


def test_the_command_answers_with_json(bundle: Path, tmp_path: Path, mbq: Mbq) -> None:
    wanted: dict[str, Any] = {"type": "object", "properties": {"a": {"enum": ["B", "C"]}}, "required": ["a"]}
    (tmp_path / "schema.json").write_text(json.dumps({**wanted, "additionalProperties": False}))
    done = mbq(command(bundle, tmp_path / "schema.json"))
    assert done.code == 0, done.err
    assert json.loads(done.out)["a"] in ("B", "C")
