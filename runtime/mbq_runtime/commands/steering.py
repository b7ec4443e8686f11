"""The options for how the budget follows the board, and the governor that they make."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click

from mbq_runtime.errors import UsageError

if TYPE_CHECKING:
    from mbq_runtime.control.bounds import BoundedEngine
    from mbq_runtime.control.events import Event
    from mbq_runtime.control.governor import Governor
    from mbq_runtime.control.policy import Policy
    from mbq_runtime.engine import Engine

F = TypeVar("F", bound=Callable[..., Any])

_SPECULATE = "Guess tokens and check several in one pass; the reply is the same.  [default: auto under pressure]"
_POLICY = "How bits follow the board: fixed, auto, quality, battery, cool.  [default: auto, or fixed with --bits]"


@dataclass(frozen=True)
class Steering:
    """The options of a command; None for an option that is not given.

    policy: name of a policy.
    bits: fixed budget in average bits per weight.
    min_bits: lowest budget.
    max_bits: highest budget.
    min_tps: tokens per second to hold.
    last_until: when the battery must still hold, such as "18:00" or "2.5h".
    reader_tps: tokens per second that the reader of a reply needs at most.
    speculate: a value of ``Engine.speculate``; None: the policy turns it on under pressure.
    events: file that gets budget changes as JSON lines.
    """

    policy: str | None = None
    bits: float | None = None
    min_bits: float | None = None
    max_bits: float | None = None
    min_tps: float | None = None
    last_until: str | None = None
    reader_tps: float | None = None
    speculate: str | None = None
    events: Path | None = None

    @cached_property
    def applied(self) -> Policy:
        """The policy that ``make`` gave at the first look.  ``last_until`` counts from there."""
        return self.make()

    def make(self) -> Policy:
        """The policy that the options describe.

        Raises:
            UsageError: the options contradict each other.
        """
        from mbq_runtime.control.policy import find_policy, seconds_until

        policy = find_policy(self.policy or ("auto" if self.bits is None else "fixed"))
        if not policy.bands and (self.min_tps, self.last_until, self.reader_tps) != (None, None, None):
            goals = "--min-tps, --last-until or --reader-tps"
            raise UsageError(f"policy {policy.name} pursues no goal; for {goals} use --policy auto")
        if self.bits is not None:
            if policy.name != "fixed" or self.min_bits is not None or self.max_bits is not None:
                raise UsageError("--bits fixes the budget; to bound what a policy does, use --min-bits and --max-bits")
            return replace(policy, floor_bits=self.bits, ceiling_bits=self.bits)
        span_s = None if self.last_until is None else seconds_until(self.last_until, datetime.now())
        return replace(
            policy,
            floor_bits=self.min_bits,
            ceiling_bits=self.max_bits,
            min_tps=self.min_tps,
            reader_tps=self.reader_tps,
            last_until_s=None if span_s is None else time.monotonic() + span_s,
        )


class Steered(NamedTuple):
    """An engine and who steers it."""

    bounded: BoundedEngine
    governor: Governor


def steering_options(function: F) -> F:
    """Add the options.

    Args:
        function: a command; it takes them as ``**options`` and makes ``Steering(**options)``.
    """
    options = (
        click.option("--policy", metavar="NAME", help=_POLICY),
        click.option("--bits", type=float, help="Fixed budget in average bits per weight."),
        click.option("--min-bits", type=float, help="Lowest budget in average bits.  [default: the bundle's]"),
        click.option("--max-bits", type=float, help="Highest budget in average bits.  [default: the bundle's]"),
        click.option("--min-tps", type=float, help="Tokens per second to hold; the budget falls to hold them."),
        click.option("--last-until", metavar="TIME", help="Until when the battery must last: 18:00, 2.5h, 40min."),
        click.option(
            "--reader-tps", type=float, help="Tokens per second that the reader needs; heat slows replies to it."
        ),
        click.option("--speculate", type=click.Choice(["off", "on", "auto"]), help=_SPECULATE),
        click.option("--events", type=click.Path(path_type=Path), help="Append budget changes here, as JSON lines."),
    )
    for option in reversed(options):
        function = option(function)
    return function


@contextmanager
def steered(engine: Engine, steering: Steering, on_event: Callable[[Event], None] | None = None) -> Iterator[Steered]:
    """Run a governor for an engine while the block lasts.

    Args:
        engine: a loaded bundle.
        steering: the options of the command.
        on_event: called for every event of the governor.

    Yields:
        The engine behind bounds, and its governor.

    Raises:
        UsageError: the options contradict each other, or the bundle cannot hold the budget.
    """
    from mbq_runtime.cache import cache_dir
    from mbq_runtime.control import kept
    from mbq_runtime.control.bounds import BoundedEngine
    from mbq_runtime.control.events import JsonLines
    from mbq_runtime.control.governor import Governor
    from mbq_runtime.sensing.sensors import Sensors

    listeners = [] if on_event is None else [on_event]
    with ExitStack() as stack:
        if steering.events is not None:
            lines = stack.enter_context(JsonLines(steering.events))
            listeners.append(lambda event: lines.write(event.as_dict()))
        bounded = BoundedEngine(engine)

        def tell(event: Event) -> None:
            for listener in listeners:
                listener(event)

        known = cache_dir() / "learned" / kept.key(*_identity(engine))
        policy = steering.applied
        if steering.speculate is not None:
            engine.speculate = steering.speculate
        learned = kept.load(known) if policy.bands else None
        governor = stack.enter_context(
            Governor(bounded, Sensors(), policy, tell, learned=learned, speculates=steering.speculate is None)
        )
        try:
            yield Steered(bounded, governor)
        finally:
            if policy.bands:
                kept.save(governor.learned, known)


def _identity(engine: Engine) -> tuple[str, str, int]:
    """What tells bundle, board and threads from others."""
    from mbq_runtime.bundle.manifest import bundle_hash
    from mbq_runtime.machine import machine_name

    return bundle_hash(engine.path), machine_name(), engine.threads
