"""``mbq run``"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mbq_runtime.errors import UsageError
from mbq_runtime.printable import without_controls
from mbq_runtime.text_file import read_text_file

from .common import (
    choice_options,
    coming_bundle_argument,
    engine_option,
    json_option,
    prompt_cache_option,
    template_kwargs_option,
    text_stdin,
    threads_option,
)
from .steering import Steering, steered, steering_options
from .trust import note_code, trust_option

if TYPE_CHECKING:
    from mbq_runtime.control.governor import Status
    from mbq_runtime.engine import Engine, GenerationStats, Grammar

_MOST_CHARACTERS = 4 << 20
_MOST_SCHEMA_BYTES = 1 << 20


@click.command("run")
@coming_bundle_argument
@click.argument("prompt")
@click.option("--max-tokens", type=int, default=128, help="Longest reply, in tokens.")
@click.option("--raw", is_flag=True, help="Continue the prompt, without the chat template.")
@click.option("--temperature", type=float, default=0.0, help="0: the likeliest token; higher: more varied.")
@click.option("--top-p", type=float, default=1.0, help="Choose among the likeliest tokens of this total probability.")
@choice_options
@click.option(
    "--json-schema",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Answer with JSON of this schema.",
)
@template_kwargs_option
@prompt_cache_option
@steering_options
@engine_option
@trust_option
@threads_option
@json_option
def command(
    bundle: Path,
    follow: Callable[[Engine], None],
    prompt: str,
    max_tokens: int,
    raw: bool,
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float,
    repetition_penalty: float,
    seed: int | None,
    reasoning_budget: int | None,
    json_schema: Path | None,
    template_kwargs: dict[str, Any] | None,
    prompt_cache: Path | None,
    engine: str | None,
    trust: bool,
    threads: int | None,
    as_json: bool,
    **steering: Any,
) -> None:
    """Answer PROMPT with BUNDLE.

    The reply goes to stdout token by token, and a line of figures to stderr.  If PROMPT is -, it is read from stdin.
    A reply that was cut has a note on stderr; with --json-schema that is an error.
    """
    from mbq_runtime.engine import Engine
    from mbq_runtime.engine.reasoning import Thought, ThoughtReader, is_begun

    grammar = None if json_schema is None else _grammar(json_schema)
    terminal = sys.stdout.isatty()
    text = _from_stdin() if prompt == "-" else prompt
    note_code(bundle, trust=trust)
    loaded = Engine.load(bundle, threads=threads, engine=engine)
    session = None if prompt_cache is None else loaded.load_session(prompt_cache)
    follow(loaded)
    with steered(loaded, Steering(**steering)) as (_, governor):
        tokens = loaded.prompt_tokens(text, chat=not raw, template_kwargs=template_kwargs)
        marks = loaded.reasoning_marks if json_schema is not None else None
        reader = ThoughtReader(marks, begun=marks is not None and is_begun(tokens, loaded.spell, marks))
        generation = loaded.generate(
            tokens, max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
            min_p=min_p, repetition_penalty=repetition_penalty, grammar=grammar,
            reasoning_budget=reasoning_budget, session=session, continues=raw or not loaded.has_chat_template,
        )  # fmt: skip
        pieces = []
        with generation:
            for piece in chain((part for text in generation for part in reader.feed(text)), reader.feed("", last=True)):
                if isinstance(piece, Thought):  # stdout is for the JSON
                    click.echo(without_controls(piece), nl=False, err=True)
                    continue
                pieces.append(piece)
                if not as_json:
                    click.echo(without_controls(piece) if terminal else piece, nl=False)
    if session is not None and prompt_cache is not None:
        loaded.save_session(session, prompt_cache)
    stats = generation.stats
    if as_json:
        click.echo(_as_json("".join(pieces), stats, governor.status()))
    else:
        click.echo()
        _note_figures(stats, governor.status())
    if stats.finish_reason == "length":
        cut, remedy = _cut(stats, max_tokens, loaded.context_length)
        if json_schema is not None:
            raise UsageError(f"{cut}, so it is not whole JSON; {remedy}")
        if not as_json:
            click.echo(f"{cut}; {remedy}", err=True)


def _cut(stats: GenerationStats, max_tokens: int, context_length: int) -> tuple[str, str]:
    """What cut a reply, and what to do."""
    if len(stats.tokens) >= max_tokens:
        return f"the reply was cut after {max_tokens} tokens", "for a longer one give a higher --max-tokens"
    filled = f"the reply was cut: with the prompt it fills the context of {context_length} tokens"
    return filled, "a shorter prompt leaves more"


def _as_json(text: str, stats: GenerationStats, status: Status) -> str:
    figures = {
        "text": text,
        "finish_reason": stats.finish_reason,
        "tokens": list(stats.tokens),
        "tokens_per_s": stats.tokens_per_s,
        "ttft_s": stats.ttft_s,
        "avg_bits_used": stats.avg_bits_used,
        "guessed": stats.guessed,
        "kept_guesses": stats.kept_guesses,
        "energy_j_per_token": status.energy_j_per_token,
        "energy_error_j": status.energy_error_j,
        "reason": status.reason,
    }
    return json.dumps(figures, ensure_ascii=False)


def _note_figures(stats: GenerationStats, status: Status) -> None:
    from mbq_runtime.control.energy import describe
    from mbq_runtime.engine.generation import speed_text

    energy = describe(status.energy_j_per_token, status.energy_error_j)
    guesses = f", {stats.kept_guesses} of {stats.guessed} guessed tokens were right" if stats.guessed else ""
    click.echo(
        f"{len(stats.tokens)} tokens, {speed_text(stats)}, first after {stats.ttft_s:.2f} s, "
        f"{stats.avg_bits_used:.2f} bits on average, energy {energy}{guesses}",
        err=True,
    )
    if status.saving is not None:
        click.echo(f"energy: {status.saving}", err=True)


def _from_stdin() -> str:
    text = text_stdin().read(_MOST_CHARACTERS + 1)
    if len(text) > _MOST_CHARACTERS:
        raise UsageError(f"the prompt on stdin has more than {_MOST_CHARACTERS} characters; give a shorter one")
    return text


def _grammar(path: Path) -> Grammar:
    from mbq_runtime.engine import Grammar

    try:
        schema = json.loads(read_text_file(path, _MOST_SCHEMA_BYTES))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--json-schema {path}: cannot be read as JSON ({error}); give a file with a schema") from None
    if not isinstance(schema, dict):
        raise UsageError(f"--json-schema {path}: has a {type(schema).__name__}, needed an object")
    return Grammar.of_schema(schema)
