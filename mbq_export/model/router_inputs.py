"""Router inputs: what the router of each unit looks at, and the depths that it chooses.

The router of a unit behind a norm looks at the norm's input.  So do both routers of experts.  The norm removes the size
of a token's residual stream, and this size tells how much an error added to the stream matters.  Every other router
looks at its unit's own input.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from .blocks import watching_inputs
from .checkpoint import Checkpoint
from .shape import Decoder, Unit

Depths = Callable[[torch.Tensor], torch.Tensor]
"""A unit's router input, float32 [tokens, width] -> depths, int64 [tokens], 1-based; both on the processor."""

ModelDepths = Mapping[str, Depths]
"""``Depths`` by unit name: one way to route a model."""

Routing = Callable[[float], ModelDepths]
"""From a budget in average bits to the way to route a model."""


def norms_before(decoder: Decoder) -> dict[str, str]:
    """The norm before each unit that has one, by unit name.

    Args:
        decoder: the description of the model.
    """
    found = {decoder.head.name: decoder.final_norm}
    for layer in range(decoder.layers):
        found |= {unit.name: norm for norm, unit in decoder.normed_units(layer).values()}
        units = decoder.layer_units(layer)
        if "experts_out" in units and (norm := decoder.input_norm(layer, "experts_in")) is not None:
            found[units["experts_out"].name] = norm
    return found


class RouterInputs:
    """Keeps the last input of each norm while a model runs.

    Args:
        checkpoint: the model.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._norms = norms_before(checkpoint.decoder)
        self._seen: dict[str, torch.Tensor] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Watch the norms while the block runs."""
        with watching_inputs(self._checkpoint, self._norms, self._seen.__setitem__):
            yield
        self._seen.clear()

    def of(self, unit: Unit, x: torch.Tensor) -> torch.Tensor:
        """The router input of a unit.

        Args:
            unit: the unit.
            x: float32 [tokens, K], the unit's own input.

        Returns:
            float32 [tokens, width].
        """
        return self._seen[unit.name] if unit.name in self._norms else x


class UnitDepths:
    """The depths of a unit's tokens, for all of its layers.  They are computed once for each input.

    of_last: int64 [tokens], on the processor: depths of the last input.

    Args:
        unit: the unit.
        inputs: the router inputs of the model.
        checkpoint: the model.
    """

    of_last: torch.Tensor

    def __init__(self, unit: Unit, inputs: RouterInputs, checkpoint: Checkpoint) -> None:
        self._unit, self._inputs, self._checkpoint = unit, inputs, checkpoint

    def use(self, depths: Depths) -> None:
        """Set what chooses the depths from now on.

        Args:
            depths: the unit's router at some budget.
        """
        self._depths = depths
        # Weak reference: recognises the tensor without keeping its autograd graph alive.
        self._input: Callable[[], torch.Tensor | None] = lambda: None

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """The depths of an input.

        Args:
            x: [..., tokens, K], the same object for every layer of the unit.

        Returns:
            int64 [tokens], on the processor.
        """
        if x is not self._input():
            self._input = weakref.ref(x)
            seen = self._inputs.of(self._unit, x.detach().reshape(-1, x.shape[-1]))
            self.of_last = self._depths(seen.float().cpu())
        return self.of_last

    def of_layer(self, name: str) -> Depths:
        """What gives the depths of the tokens in an input of one layer.

        Args:
            name: of the layer in the checkpoint.
        """
        if self._unit.experts is None:
            return self.of

        def of_expert(x: torch.Tensor) -> torch.Tensor:
            tokens = self._checkpoint.tokens_of(name)
            assert tokens is not None
            # An expert's input has some tokens, the norm's input has all.
            return self.of(self._inputs.of(self._unit, x))[tokens.cpu()]

        return of_expert
