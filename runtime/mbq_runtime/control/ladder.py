"""The ladder: what a controller does about pressure, in the order of what it costs.

Threads cost nothing, and count first.  Speculation gives the same reply sooner.  Pacing costs nothing where nobody
waits for more than reading speed.  Bits cost quality, and come last.  Each rung is a row of ``RUNGS``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from mbq_runtime.sensing.readings import Readings

from .controller import State, elapsed_s, situation, start, step
from .learned import Learned
from .policy import Policy
from .threads import Threads
from .triggers import is_too_warm
from .wishes import wishes

_ROOM_C = 5.0  # the board must be this much cooler before a reply is no longer paced
_CALM_S = 20.0  # how long there must be no cause before a reply is no longer paced, or tokens no longer guessed


@dataclass(frozen=True)
class Ladder:
    """What the rungs remember.

    Args:
        threads: the number of threads, and what decides it.
        bits: state of the controller of the budget.
        paced: whether replies are slowed to the reader's speed.
        calm_s: time in s for which there was no cause to pace.
        speculates: whether tokens are guessed.
        unpressed_s: time in s for which there was no cause to guess.
    """

    threads: Threads
    bits: State
    paced: bool = False
    calm_s: float = 0.0
    speculates: bool = False
    unpressed_s: float = 0.0

    @classmethod
    def of(cls, policy: Policy, threads: Threads, learned: Learned | None = None) -> Ladder:
        """The ladder before the first step.

        Args:
            policy: a policy that has bounds.
            threads: the threads before the first reading.
            learned: what is known about the board; None: nothing.
        """
        return cls(threads, start(policy, learned))


@dataclass(frozen=True)
class Look:
    """One look at the board, as it goes from rung to rung.

    Args:
        ladder: what the rungs remember.
        readings: what the sensors show now.
        now: seconds on the clock of ``policy.last_until_s``.
        policy: a policy that has bounds.
        elapsed_s: time in s since the last look, without jumps of the clock.
        said: what rungs did, as text for people.
        reason: the cause of the budget, as text for people.
    """

    ladder: Ladder
    readings: Readings
    now: float
    policy: Policy
    elapsed_s: float
    said: tuple[str, ...] = ()
    reason: str = ""


class Rung(NamedTuple):
    """One rung.  name: word for people; act: takes a look and gives it on with what it did."""

    name: str
    act: Callable[[Look], Look]


def _threads(look: Look) -> Look:
    """One thread for each core that other programs leave free."""
    before = look.ladder.threads
    if not look.policy.bands:
        return replace(look, ladder=replace(look.ladder, threads=Threads.of(before.most, before.cpus)))
    after = before.after(look.readings, look.elapsed_s)
    said = look.said if after.count == before.count else (*look.said, after.describe(before.count))
    return replace(look, ladder=replace(look.ladder, threads=after), said=said)


def _speculation(look: Look) -> Look:
    """Guess tokens from the first sign of pressure on.  Bits fall only for a pressure that lasts."""
    ladder, policy = look.ladder, look.policy
    if not (policy.speculates and policy.bands):
        return replace(look, ladder=replace(ladder, speculates=False))
    high = policy.bounds[1]
    found = wishes(ladder.bits.tracks, situation(ladder.bits, look.readings, policy), ladder.bits.clock_s)
    pressing = [wish.name for wish in found if wish.target < high]
    if pressing and not ladder.speculates:
        said = (*look.said, f"speculation: tokens are guessed before bits are given ({', '.join(pressing)})")
        return replace(look, ladder=replace(ladder, speculates=True, unpressed_s=0.0), said=said)
    pressed = ladder.bits.bits < high or pressing or any(wish.slows for wish in found)
    unpressed_s = 0.0 if pressed else ladder.unpressed_s + look.elapsed_s
    if ladder.speculates and unpressed_s >= _CALM_S:
        said = (*look.said, "speculation: no longer needed")
        return replace(look, ladder=replace(ladder, speculates=False, unpressed_s=0.0), said=said)
    return replace(look, ladder=replace(ladder, unpressed_s=unpressed_s))


def _pacing(look: Look) -> Look:
    """Slow a reply to its reader's speed while decoding without pause would make the board too warm."""
    ladder, reader_tps = look.ladder, look.policy.reader_tps
    if reader_tps is None or not look.policy.bands:
        return replace(look, ladder=replace(ladder, paced=False))
    room_c = _ROOM_C if ladder.paced else 0.0
    warm = is_too_warm(situation(ladder.bits, look.readings, look.policy), room_c)
    if warm and not ladder.paced:
        said = (*look.said, f"pacing: {reader_tps:g} tokens/s, without a pause the board would get too warm")
        return replace(look, ladder=_at_pace(ladder, look.policy, reader_tps), said=said)
    calm_s = 0.0 if warm else ladder.calm_s + look.elapsed_s
    if ladder.paced and calm_s >= _CALM_S:
        said = (*look.said, "pacing: no longer needed")
        return replace(look, ladder=replace(ladder, paced=False, calm_s=0.0), said=said)
    return replace(look, ladder=replace(ladder, calm_s=calm_s))


def _at_pace(ladder: Ladder, policy: Policy, reader_tps: float) -> Ladder:
    """The ladder when pacing begins.  The needs of the next rung count with the paced usage at once."""
    pace_s = ladder.bits.pace_s
    usage = ladder.bits.usage
    if pace_s is not None:
        token_s = pace_s * ladder.bits.learned.token_time(ladder.bits.paced[1]).shape(policy.part(ladder.bits.bits))
        usage = (min(reader_tps * token_s, 1.0), min(reader_tps, 1 / token_s))
    # Heat answers to the pause after a time, as it does to a change of the budget.
    bits = replace(ladder.bits, usage=usage, changed_s=ladder.bits.clock_s)
    return replace(ladder, bits=bits, paced=True, calm_s=0.0)


def _bits(look: Look) -> Look:
    """The budget."""
    before = look.ladder.bits
    # The speed of guessed tokens depends on the text, so the board's own speed cannot be learned from them.
    decision = step(before, look.readings, look.now, look.policy, learns_speed=not look.ladder.speculates)
    return replace(look, ladder=replace(look.ladder, bits=decision.state), reason=decision.reason)


RUNGS: tuple[Rung, ...] = (
    Rung("threads", _threads), Rung("speculation", _speculation), Rung("pacing", _pacing), Rung("bits", _bits),
)  # fmt: skip
"""The rungs in the order of what they cost."""


def climb(ladder: Ladder, readings: Readings, now: float, policy: Policy) -> Look:
    """Decide threads, pace and budget of the next tokens.  Call it once or twice a second.

    Args:
        ladder: result of the last call, or of ``Ladder.of``.
        readings: what the sensors show now.
        now: seconds on any clock, the same clock as ``policy.last_until_s``.
        policy: a policy that has bounds.
    """
    look = Look(ladder, readings, now, policy, elapsed_s(ladder.bits, now))
    for rung in RUNGS:
        look = rung.act(look)
    return look
