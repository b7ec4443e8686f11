"""What a router looks at.

A unit behind a norm is routed by what goes into the norm: the norm takes away how large a token's
residual stream is, and that tells how much an error added to it matters.  Other units are routed by
their own input.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..blocks import watching_inputs
from ..checkpoint import Checkpoint
from ..families import Decoder, Unit


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
