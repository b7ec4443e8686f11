"""What a router looks at.

A unit behind a norm is routed by what goes into the norm: the norm takes away how large a token's
residual stream is, and that tells how much an error added to it matters.  Other units are routed by
their own input.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from .blocks import watching_inputs
from .checkpoint import Checkpoint
from .families import Decoder, Unit

Depths = Callable[[torch.Tensor], torch.Tensor]
"""A unit's router input, float32 [tokens, width] -> int64 [tokens], depths from 1; both on the processor."""


def norms_before(decoder: Decoder) -> dict[str, str]:
    """The norm in front of each unit that has one, by unit name."""
    found = {decoder.head.name: decoder.final_norm}
    for layer in range(decoder.layers):
        for role in ("attn_in", "mlp_in"):
            found[decoder.layer_units(layer)[role].name] = decoder.input_norm(layer, role)
    return found


class RouterInputs:
    """Remembers, while a model runs, what last went into each norm."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._norms = norms_before(checkpoint.decoder)
        self._seen: dict[str, torch.Tensor] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Watch the norms inside this block."""
        with watching_inputs(self._checkpoint, self._norms, self._seen.__setitem__):
            yield
        self._seen.clear()

    def of(self, unit: Unit, x: torch.Tensor) -> torch.Tensor:
        """float32 [tokens, width]: the router input of a unit whose own input is ``x`` [tokens, K]."""
        return self._seen[unit.name] if unit.name in self._norms else x


class UnitDepths:
    """Depths of a unit's tokens, for all of its layers: they are asked for once for each input, whichever layer comes
    first.

    of_last: int64 [tokens], on the processor, of the last input.
    """

    of_last: torch.Tensor

    def __init__(self, unit: Unit, inputs: RouterInputs) -> None:
        self._unit, self._inputs = unit, inputs

    def use(self, depths: Depths) -> None:
        """Ask this of what comes from here on."""
        self._depths = depths
        # To know it again, not to keep it and all that it was made of.
        self._input: Callable[[], torch.Tensor | None] = lambda: None

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """int64 [tokens], on the processor, of an input [..., tokens, K], the same object for every layer."""
        if x is not self._input():
            self._input = weakref.ref(x)
            seen = self._inputs.of(self._unit, x.detach().reshape(-1, x.shape[-1]))
            self.of_last = self._depths(seen.float().cpu())
        return self.of_last
