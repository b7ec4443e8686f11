"""A small task that needs no download: the last word of a sentence, from the paragraph before it.

It follows LAMBADA.  A paragraph is cut after a sentence whose last word occurs earlier in the paragraph.  An answer
is right when greedy decoding gives exactly that word, token by token.  The task is this project's own: its figures
compare sides with each other, and not with published ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mbq_runtime.fidelity import Mean

from .harness import Forward

MIN_WORDS, MAX_WORDS = 30, 150
_MIN_LETTERS = 4
_SENTENCE_END = re.compile(r"(?<=[a-z])[.!?](?=\s|$)")


@dataclass(frozen=True)
class Passage:
    """A text whose last word is asked for.

    tokens: the context and the word; answer: the number of tokens of the word; word: the word.
    """

    tokens: list[int]
    answer: int
    word: str


def passages(text: str, tokenizer: Any, count: int, opening: list[int]) -> list[Passage]:
    """Passages spread evenly over a text.

    Args:
        text: paragraphs, with an empty line between them.
        tokenizer: transformers' tokenizer of the model.
        count: the most passages.
        opening: tokens that are put before each passage.
    """
    found = [cut for paragraph in re.split(r"\n\s*\n", text) if (cut := _cut(" ".join(paragraph.split())))]
    made = []
    for at in np.linspace(0, len(found) - 1, min(count, len(found))).astype(int):
        context, word = found[at]
        before = tokenizer(context, add_special_tokens=False)["input_ids"]
        answer = tokenizer(" " + word, add_special_tokens=False)["input_ids"]
        made.append(Passage([*opening, *before, *answer], len(answer), word))
    return made


def _cut(paragraph: str) -> tuple[str, str] | None:
    """(context, last word) at the first sentence end where the task is possible."""
    for end in _SENTENCE_END.finditer(paragraph):
        words = paragraph[: end.start()].split(" ")
        if len(words) > MAX_WORDS:
            return None
        word, before = words[-1], " ".join(words[:-1])
        if (
            len(words) >= MIN_WORDS
            and len(word) >= _MIN_LETTERS
            and word.isalpha()
            and re.search(rf"\b{word}\b", before)
        ):
            return before, word
    return None


def right(forward: Forward, passages: list[Passage], progress: Callable[[int, int], None]) -> list[bool]:
    """For each passage, whether greedy decoding gives the word.

    Args:
        forward: runs the model.
        passages: the task.
        progress: called with the number of passages that are done, and of all passages.
    """
    answers = []
    for done, passage in enumerate(passages, 1):
        logits = forward(passage.tokens[:-1]).logits[-passage.answer :]
        answers.append(logits.argmax(axis=1).tolist() == passage.tokens[-passage.answer :])
        progress(done, len(passages))
    return answers


def accuracy(answers: list[bool]) -> Mean:
    """The share of right answers.

    Args:
        answers: whether each answer is right.
    """
    share = sum(answers) / len(answers)
    return Mean(share, math.sqrt(share * (1 - share) / len(answers)))
