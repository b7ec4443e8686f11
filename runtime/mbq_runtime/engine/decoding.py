"""The decode loop of a reply: passes over its prompt, then a pass for each token, or for a token and guesses."""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from .generation import Record, Step
from .kept_context import KeptContext
from .sampling import Sampler
from .speculation import Guesser, checked
from .tokenizer import TextStream

UNSURE_TOKENS = 16
"""Tokens at the end of a prompt that the next prompt of a conversation may not have: they only open the reply.

A model with states can go back to one place alone, so that place is before them."""


@dataclass(frozen=True)
class Decoding:
    """What a reply is made of.

    prompt: int32 [n], ids.
    length: most tokens of prompt and reply together.
    chunk: most tokens of a pass over the prompt.
    end_tokens: ids that end the reply.
    sampler: chooses the tokens.
    stream: turns them into text.
    """

    prompt: NDArray[np.int32]
    length: int
    chunk: int
    end_tokens: frozenset[int]
    sampler: Sampler
    stream: TextStream

    def steps(self, context: KeptContext, guesser: Guesser, record: Record) -> Generator[Step, None, None]:
        """Make the reply.  It ends at its length, after an end token, or where ``record`` asks for it.

        Args:
            context: what is kept of earlier replies; it reads the tokens.
            guesser: guesses tokens that are checked in one pass.
            record: its figures of the prompt, of guesses and of reasoning are filled.
        """
        left, guesses = self.length - len(self.prompt), list[int]()
        self._read_prompt(context, left, record)
        start_s = 0.0
        while left and not record.stopping:
            rows, bits = context.logits(), context.bits_used()
            if start_s:
                guesser.time(1 + len(guesses), context.avg_bits, time.perf_counter() - start_s)
            tokens = checked(rows, guesses, self.sampler, self.end_tokens)
            record.reasoning_tokens = self.sampler.reasoning_tokens
            if guesses:
                context.rewind(len(context) - len(guesses) + len(tokens) - 1)
                guesser.note(tokens, len(guesses))
                record.guessed += len(guesses)
                record.kept_guesses += len(tokens) - 1
            for at, (token, logits) in enumerate(zip(tokens, rows, strict=False)):
                left -= 1
                ends = token in self.end_tokens
                text = "" if ends else self.stream.add(token)
                text = text if left and not ends else text + self.stream.rest()
                of_pass = 0 if at else len(tokens)
                yield Step(token, bits, text, ends, self.sampler.likelihood(logits, token), of_pass)
                if record.stopping:
                    return
            if left:
                guesses = guesser.guess(context, tokens[-1], self.sampler, left - 1)
                start_s = time.perf_counter()
                context.append([tokens[-1], *guesses], 1 + len(guesses))

    def _read_prompt(self, context: KeptContext, max_tokens: int, record: Record) -> None:
        """Read what the context does not keep of the prompt, or as much as is wanted before ``record.stopping``."""
        record.cached_tokens = context.rewind_for(self.prompt, max_tokens)
        new = self.prompt[record.cached_tokens :]
        sure = max(0, len(new) - UNSURE_TOKENS) if context.marks else 0
        starts = [*range(0, sure, self.chunk), *range(sure, len(new), self.chunk)]
        # Native calls hold Python's lock.  Other threads and Ctrl-C come in between two chunks.
        for start, stop in pairwise([*starts, len(new)]):
            if record.stopping:
                return
            if context.marks and start == sure and len(context):
                context.mark()
            chunk = new[start:stop]
            context.append(chunk)
            record.prompt_bits += context.bits_used() * len(chunk) / len(new)
