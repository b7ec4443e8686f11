"""``mbq chat``"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mbq_runtime.errors import UsageError

from .common import (
    choice_options,
    coming_bundle_argument,
    engine_option,
    prompt_cache_option,
    template_kwargs_option,
    text_stdin,
    threads_option,
)
from .steering import Steering, steered, steering_options
from .trust import note_code, trust_option

if TYPE_CHECKING:
    from mbq_runtime.chat.screen import Screen
    from mbq_runtime.engine import Engine


@click.command("chat")
@coming_bundle_argument
@click.option("--system", help="System message, before the conversation.")
@click.option("--max-tokens", type=int, default=512, help="Longest reply, in tokens.")
@click.option("--temperature", type=float, default=0.7, help="0: the likeliest token; higher: more varied.")
@click.option("--top-p", type=float, default=0.95, help="Choose among the likeliest tokens of this total probability.")
@choice_options
@template_kwargs_option
@click.option("--show-bits", is_flag=True, help="Colour each token by the bits it used (on a terminal).")
@prompt_cache_option
@steering_options
@engine_option
@trust_option
@threads_option
def command(
    bundle: Path,
    follow: Callable[[Engine], None],
    system: str | None,
    max_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float,
    repetition_penalty: float,
    seed: int | None,
    reasoning_budget: int | None,
    template_kwargs: dict[str, Any] | None,
    show_bits: bool,
    prompt_cache: Path | None,
    engine: str | None,
    trust: bool,
    threads: int | None,
    **steering: Any,
) -> None:
    """Chat with BUNDLE.

    Replies go to stdout, figures to stderr.  /help lists the commands that can be typed.  Ctrl-C stops a reply.
    """
    from mbq_runtime.chat.conversation import Conversation
    from mbq_runtime.chat.loop import Chat
    from mbq_runtime.engine import Engine

    note_code(bundle, trust=trust)
    loaded = Engine.load(bundle, threads=threads, engine=engine)
    follow(loaded)
    if not loaded.has_chat_template:
        raise UsageError(f"{bundle}: the model has no chat template; use mbq run --raw")
    budget = loaded.manifest.budget
    with steered(loaded, Steering(**steering)) as (bounded, governor):
        screen = _screen((budget.min_bits, budget.max_bits) if show_bits else None)
        if legend := screen.legend():
            screen.line(legend)
        options: dict[str, Any] = {
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "seed": seed,
            "reasoning_budget": reasoning_budget,
            "template_kwargs": template_kwargs,
        }
        conversation = Conversation(loaded, system, template_kwargs)
        session = loaded.session() if prompt_cache is None else loaded.load_session(prompt_cache)
        chat = Chat(
            loaded, bounded, governor, screen=screen, conversation=conversation, options=options, session=session
        )
        chat.run(_reader())
        if prompt_cache is not None:
            loaded.save_session(session, prompt_cache)


def _screen(bits: tuple[float, float] | None) -> Screen:
    """The terminal.  bits: the range that colours show; None: no colours of bits."""
    from mbq_runtime.chat.screen import Screen

    drawn = sys.stdout.isatty()
    plain = os.environ.get("TERM") == "dumb"
    colour = drawn and "NO_COLOR" not in os.environ and not plain
    return Screen(sys.stdout, sys.stderr, terminal=drawn and not plain, colour=colour, bits=bits)


def _reader() -> Any:
    """A function that reads a line: with editing and history from a terminal, without a prompt from a file or pipe."""
    typed = text_stdin()
    if not typed.isatty():
        return lambda prompt: line.rstrip("\n") if (line := typed.readline()) else None
    import readline  # noqa: F401  input() then has editing and history

    def read(prompt: str) -> str | None:
        try:
            return input(prompt)
        except EOFError:
            click.echo()
            return None

    return read
