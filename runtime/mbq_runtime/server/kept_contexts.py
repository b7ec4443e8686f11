"""The contexts that the server keeps, one for each of the last conversations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mbq_runtime.engine import Engine, KeptContext


@dataclass(eq=False)
class _Kept:
    """A context of an engine, the length of its last prompt, and how many tokens of prompts it lost to others."""

    engine: Engine
    context: KeptContext
    prompt_tokens: int = 0
    lost: int = 0


class KeptContexts:
    """Finds the context that has the start of a prompt, and drops the ones that were not used for the longest time.

    Args:
        most_bytes: bytes of the keys and values of all contexts together; one may have more; 0: nothing is kept.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._kept: list[_Kept] = []  # the one used last is at the end

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def kept_bytes(self) -> int:
        """Bytes of the keys and values of all contexts."""
        return sum(kept.context.kept_bytes for kept in self._kept)

    def take(self, engine: Engine, prompt: list[int]) -> KeptContext | None:
        """A context for a prompt: one that has its start, or a new one.

        Most prompts begin with the last prompt of their conversation.  Another prompt takes the context of a
        conversation only while that saves more tokens than the conversation may have to read again.  Two conversations
        with a long beginning in common thus get a context each.

        Args:
            engine: reads the prompt.
            prompt: ids.

        Returns:
            None: nothing is kept.
        """
        if not self.most_bytes:
            return None
        own = (kept for kept in self._kept if kept.engine is engine)
        best = max(own, key=lambda kept: kept.context.common(prompt), default=None)
        if best is not None:
            common = best.context.common(prompt)
            lost = max(0, best.prompt_tokens - common)
            if not common or best.lost + lost > common:
                best = None
            else:
                best.lost += lost
                self._kept.remove(best)
        if best is None:
            best = _Kept(engine, engine.session())
            # Memory for the new one goes first, so that both together stay within the bytes.
            while self._kept and self.kept_bytes + best.context.first_bytes > self.most_bytes:
                self._kept.pop(0).context.clear()
        best.prompt_tokens = len(prompt)
        self._kept.append(best)
        return best.context

    def drop(self, engine: Engine) -> None:
        """Drop the contexts of an engine.

        Args:
            engine: whose memory is to be freed.
        """
        for kept in self._kept:
            if kept.engine is engine:
                kept.context.clear()
        self._kept = [kept for kept in self._kept if kept.engine is not engine]

    def trim(self) -> None:
        """Drop contexts without tokens, then the ones used longest ago until the others are within the bytes.

        The last one stays: its memory was needed for its reply.
        """
        self._kept = [kept for kept in self._kept if len(kept.context)]
        while len(self._kept) > 1 and self.kept_bytes > self.most_bytes:
            self._kept.pop(0).context.clear()
