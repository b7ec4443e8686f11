"""A reply says only what its grammar permits, at every budget."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
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
from mbq_runtime.engine.grammar_levels import levels_of_lark, levels_of_schema
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


def _chain(links: int, part: Callable[[dict[str, Any]], dict[str, Any]]) -> Grammar:
    """A schema whose parts refer to one another in a row."""
    parts = {str(at): part({"$ref": f"#/$defs/{at + 1}"}) for at in range(links)}
    return Grammar.of_schema({"$ref": "#/$defs/0", "$defs": {**parts, str(links): {"type": "integer"}}})


def _named(links: int, key: str, mark: str) -> Grammar:
    parts = {str(at): {key: f"n{at}", "$ref": f"{mark}n{at + 1}"} for at in range(links)}
    return Grammar.of_schema({"$ref": f"{mark}n0", "$defs": {**parts, "end": {key: f"n{links}", "type": "integer"}}})


def _rules(links: int, body: str, letter: str = "r") -> Grammar:
    rules = [f"{letter}{at}: {body.replace('@', f'{letter}{at + 1}')}" for at in range(links)]
    return Grammar("lark", "\n".join([f"start: {letter}0", *rules, f'{letter}{links}: "a"']))


def _around(before: str, inside: str, after: str) -> Callable[[int], str]:
    return lambda levels: before * levels + inside + after * levels


CHAINS: dict[str, Callable[[int], Grammar]] = {
    "refs": lambda links: _chain(links, lambda ref: ref),
    "properties": lambda links: _chain(links, lambda ref: {"type": "object", "properties": {"a": ref}}),
    "definitions": lambda links: _chain(links, lambda ref: {"type": "object", "properties": {"definitions": ref}}),
    "unions": lambda links: _chain(links, lambda ref: {"anyOf": [ref, {"type": "null"}]}),
    "lists": lambda links: _chain(links, lambda ref: {"type": "array", "items": {"type": "array", "items": ref}}),
    "circles": lambda links: _chain(links, lambda ref: {"anyOf": [ref, {"$ref": "#"}]}),
    "ids": lambda links: _named(links, "$id", ""),
    "anchors": lambda links: _named(links, "$anchor", "#"),
    "rules": lambda links: _rules(links, "@"),
    "rules in one line": lambda links: Grammar("lark", _rules(links, "(@)?").text.replace("\n", "\n  ")),
    "rules with texts": lambda links: _rules(links, r'"x: \" // " /[:"]/ @ | "y" // r9: "'),
    "terminals": lambda links: _rules(links, '"x" @ | "y"', "R"),
    "schemas in rules": lambda links: Grammar("lark", f"start: a\na: %json {_chain(links, lambda ref: ref).text}"),
    "nested schema": lambda levels: Grammar("json_schema", _around('{"items":', "{}", "}")(levels)),
    "nested union": lambda levels: Grammar("json_schema", _around('{"anyOf":[', "{}", "]}")(levels)),
    "nested value": lambda levels: Grammar("json_schema", f'{{"const":{_around("[", "1", "]")(levels)}}}'),
    "nested regex": lambda levels: Grammar("regex", _around("(", "a", ")")(levels)),
    "nested pattern": lambda levels: Grammar.of_schema({"type": "string", "pattern": _around("(a|", "b", ")")(levels)}),
    "nested rule": lambda levels: Grammar("lark", "start: " + _around("(", '"a"', ")")(levels)),
    "nested schema in a rule": lambda levels: Grammar("lark", "start: %json " + _around("[", "1", "]")(levels)),
}


@pytest.mark.parametrize("levels", [3000, 9000])
def test_no_depth_ends_the_process(bundle: Path, mbq: Mbq, levels: int) -> None:
    """The compiler calls itself for each level, and the stack of a thread has an end."""
    program = f"""
import sys, threading
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from mbq_runtime.engine.grammar import Grammars
from mbq_runtime.errors import GrammarError
from test_grammar import CHAINS
def refused():
    grammars = Grammars(Path({str(bundle)!r}), 264, [2])
    for kind, chain in CHAINS.items():
        print(kind, end=": ", flush=True)
        try:
            grammars.matcher(chain({levels}))
            print("taken")
        except GrammarError as error:
            print(error)
thread = threading.Thread(target=refused)
thread.start()
thread.join()
"""
    done = mbq([], program=program)
    assert done.code == 0, (done.out, done.err)
    lines = done.out.splitlines()
    assert len(lines) == len(CHAINS)
    for kind, line in zip(CHAINS, lines, strict=True):
        assert re.match(f"{re.escape(kind)}: (json_schema|regex|lark): .", line), line


@pytest.mark.parametrize("kind", [kind for kind in CHAINS if not kind.startswith("nested") and kind != "ids"])
def test_short_chains_are_understood(engine: Engine, kind: str) -> None:
    engine.generate("A", grammar=CHAINS[kind](100))


def test_large_schemas_are_not_deep(engine: Engine) -> None:
    """Many parts beside each other, and parts that contain their own kind."""
    leaf = {"type": "object", "properties": {"next": {"$ref": "#"}, "a": {"$ref": "#/$defs/text"}}}
    parts = {f"p{at}": {"type": "object", "properties": {"leaf": {"$ref": "#/$defs/leaf"}}} for at in range(500)}
    refs = {f"p{at}": {"$ref": f"#/$defs/p{at}"} for at in range(500)}
    text = {"type": "string"}
    wide = {"type": "object", "properties": refs, "$defs": {**parts, "leaf": {**leaf, "properties": {"a": text}}}}
    assert levels_of_schema(wide) < 12
    engine.generate("A", grammar=Grammar.of_schema(wide))
    circle = {"type": "object", "properties": {"first": leaf}, "$defs": {"text": text}}
    assert levels_of_schema(circle) < 12
    engine.generate("A", grammar=Grammar.of_schema(circle))
    rules = "\n".join(f'r{at}: "x" /a:b/ | "(" r{at // 2 + 300} ")"' for at in range(500))
    assert levels_of_lark(f"start: r0\n{rules}") < 40


@pytest.mark.parametrize(
    "part", ["a", " ", "a ", "a[", "[", '"', '\\"', "/", "\\/", "a:", "a: %json 1\n", "%json {}\n", "(", "a: b\n"]
)
def test_the_time_for_levels_grows_with_the_text_alone(part: str) -> None:
    def seconds(characters: int) -> float:
        text = f"start: x{part * (characters // len(part))}"
        begin_s = time.process_time()
        levels_of_lark(text)
        return time.process_time() - begin_s

    assert seconds(128_000) < 40 * max(seconds(16_000), 0.02)


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
