"""Reasoning: the part of a reply that a model writes for itself, before its answer.

A new family needs a row of ``MARKS``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mbq_runtime.errors import UsageError

from .tokenizer import Tokenizer


class Marks(NamedTuple):
    """The texts around reasoning.

    title: what a model writes after the opening text, before its reasoning.
    """

    opens: str
    closes: str
    title: str = ""


MARKS = (
    Marks("<think>", "</think>"), Marks("[THINK]", "[/THINK]"), Marks("<|channel>", "<channel|>", "thought\n"),
)  # fmt: skip
"""The first row whose closing text is in a chat template counts."""

_TAIL = 16  # tokens at the end of a prompt in which an opening text lies


def find_marks(template: str) -> Marks | None:
    """How a model marks its reasoning; None where it has none.

    Args:
        template: text of its chat template.
    """
    return next((marks for marks in MARKS if marks.closes in template), None)


def is_begun(prompt: Sequence[int], spell: Callable[[int], bytes], marks: Marks) -> bool:
    """Whether a prompt ends with the opening text, so that the reply begins with reasoning.

    Args:
        prompt: ids.
        spell: returns the bytes of a token.
        marks: of the model.
    """
    tail = b"".join(spell(int(token)) for token in prompt[-_TAIL:])
    return tail.rstrip().endswith(marks.opens.encode())


def follow(
    prompt: Sequence[int], budget: int | None, marks: Marks | None, tokenizer: Tokenizer, path: Path
) -> Reasoning | None:
    """What follows the reasoning of a reply; None where the model has none, or no token ends it.

    Args:
        prompt: ids.
        budget: most tokens of reasoning; None for no limit.
        marks: of the model; None where it has none.
        tokenizer: of the model.
        path: folder of the bundle, for messages.

    Raises:
        UsageError: the budget is below 0, or the model cannot keep it.
    """
    if budget is not None and budget < 0:
        raise UsageError(f"reasoning_budget {budget}: needed 0 or above")
    if marks is None:
        return None
    closes = tokenizer.token_id(marks.closes)
    if closes is None:
        if budget is not None:
            raise UsageError(f"reasoning_budget: {path} has no token for {marks.closes}; leave it out")
        return None
    begun = is_begun(prompt, tokenizer.spell, marks)
    return Reasoning(
        tokenizer.token_id(marks.opens), closes, begun=begun, budget=budget,
        blank=lambda token: not tokenizer.spell(token).strip(),
    )  # fmt: skip


class Reasoning:
    """Follows one reply through its reasoning.  While it lasts, a grammar does not hold.

    opens: the token that begins it, where the reply itself can begin it.
    closes: the token that ends it.
    begun: whether the prompt has begun it.
    budget: most tokens of reasoning, after which it is ended; None for no limit.
    blank: whether a token is white space, which may stand before the reasoning.

    ``inside`` is whether the next token belongs to it, ``tokens`` how many it has so far.
    """

    def __init__(
        self,
        opens: int | None,
        closes: int,
        *,
        begun: bool,
        budget: int | None,
        blank: Callable[[int], bool] = lambda token: False,
    ) -> None:
        self._blank = blank
        self._opens, self._closes, self._budget = opens, closes, budget
        self.inside = begun
        self._first, self.tokens = not begun, 0

    @property
    def may_open(self) -> int | None:
        """The token that would begin it now; None where nothing does."""
        return self._opens if self._first else None

    @property
    def forced(self) -> int | None:
        """The token that must come next: the end of a reasoning that is as long as it may be."""
        return self._closes if self.inside and self._budget is not None and self.tokens >= self._budget else None

    def accept(self, token: int) -> bool:
        """Add a token to the reply.

        Args:
            token: its id.

        Returns:
            Whether it belongs to the reasoning or its marks.
        """
        if self._first and token == self._opens:
            self.inside, self._first = True, False
            return True
        self._first = self._first and self._blank(token)
        if not self.inside:
            return False
        self.tokens += 1
        self.inside = token != self._closes
        return True


class Thought(str):
    """Text of a model's reasoning."""

    __slots__ = ()


class ThoughtReader:
    """Divides the text of one reply into reasoning and answer.  What may be the start of a mark waits.

    marks: around the reasoning; None where the model has none.
    begun: whether the prompt has begun it.
    """

    def __init__(self, marks: Marks | None, *, begun: bool = False) -> None:
        self._marks = marks
        self._state = "answer" if marks is None else "title" if begun else "start"
        self._held = ""

    def feed(self, text: str, *, last: bool = False) -> Iterator[Thought | str]:
        """What a text completes: reasoning as ``Thought``, the answer as plain text.

        Args:
            text: the next text of the reply.
            last: whether the reply ends with it.
        """
        held, self._held = self._held + text, ""
        if self._state == "start":
            assert self._marks is not None
            opens, begin = self._marks.opens, held.lstrip()
            if begin.startswith(opens):
                self._state, held = "title", begin.removeprefix(opens)
            elif opens.startswith(begin) and not last:
                self._held = held
                return
            else:
                self._state = "answer"
        if self._state == "title":
            assert self._marks is not None
            title = self._marks.title
            if held != title and title.startswith(held) and not last:
                self._held = held
                return
            self._state, held = "reasoning", held.removeprefix(title)
        if self._state == "reasoning":
            assert self._marks is not None
            thought, closes, held = held.partition(self._marks.closes)
            if closes:
                self._state = "space"
            else:
                keep = 0 if last else _overlap(thought, self._marks.closes)
                thought, self._held = thought[: len(thought) - keep], thought[len(thought) - keep :]
            if thought:
                yield Thought(thought)
        if self._state == "space":  # between the reasoning and the answer
            held = held.lstrip()
            self._state = "answer" if held else "space"
        if self._state == "answer" and held:
            yield held


def _overlap(text: str, mark: str) -> int:
    """Characters at the end of a text that may be the start of a mark."""
    return next((size for size in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:size])), 0)
