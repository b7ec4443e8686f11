"""The result of a calibration: what ``lower`` and ``write`` make a bundle of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mbq_runtime.bundle.facts import QualityPoint
from mbq_runtime.bundle.slice_profile import CODE_BITS, SliceProfile

from .format.codes import Sliced
from .format.router import RouterParams
from .model.shape import Decoder, Unit

if TYPE_CHECKING:
    from .model.recording import Recording

CURVE_BITS = (2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0)
"""Budgets of the quality curve, in average bits."""

SMALLEST_DIVERGENCE = 1e-9
"""Mean KL divergences under this are equal, in nats a token."""

Comparison = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Figures of each kind of router: kind, then average bits, then the figure's name."""


@dataclass(frozen=True)
class HeadInput:
    """What the input of a tied head goes through in a rotated model: ``x @ R.T * gain @ R``, ``R = kron(left, right)``.

    left: float32 [a, a].
    right: float32 [b, b].
    gain: float32 [a * b].
    """

    left: NDArray[np.float32]
    right: NDArray[np.float32]
    gain: NDArray[np.float32]


@dataclass(frozen=True)
class RoutedLinear:
    """A unit ready to be lowered.

    unit: its name, place and source layers.
    sliced: its slices, [N, K].
    bias: float32 [N] or None.
    router: the parameters of its router.
    """

    unit: Unit
    sliced: Sliced
    bias: NDArray[np.float32] | None
    router: RouterParams

    @property
    def parameters(self) -> int:
        """Weights of the unit that a token reads."""
        return self.unit.read_of(int(self.sliced.codes.size))


@dataclass(frozen=True)
class Calibrated:
    """A calibrated model.

    profile: the bits of each slice.
    group_size: weights that share a scale.
    router_kind: a name in ``kinds.ROUTERS``.
    units: by name, in the graph's order.
    embedding: None when the head's slices serve for it.
    head_scale: float32 [hidden], what a row of the head is divided by to serve as a row of the embedding.
    head_input: what the head's input goes through, or None.
    reference_perplexity: of the original model on held-back text.
    curve: how the calibrated model predicts the same text, by rising budgets.
    routers: KL divergence from the original of each kind of router on this text, its ratio to the shipped kind's, and
        the ratio's standard error.
    recording: what the model computes at full depth, for the check of the bundle; None: the check runs it.
    per_layer: slices of the table of per-layer embeddings; None where there is none.
    """

    profile: SliceProfile
    group_size: int
    router_kind: str
    units: dict[str, RoutedLinear]
    embedding: Sliced | None
    head_scale: NDArray[np.float32]
    head_input: HeadInput | None = None
    reference_perplexity: float = 0.0
    curve: tuple[QualityPoint, ...] = ()
    routers: Comparison = field(default_factory=dict)
    recording: Recording | None = None
    per_layer: Sliced | None = None

    def embedding_factors(self, decoder: Decoder) -> NDArray[np.float32]:
        """What a row of the embedding is multiplied by when it is read, float32 [hidden].

        Args:
            decoder: the description of the model.
        """
        factors = np.full(decoder.hidden_size, decoder.embedding_scale, np.float32)
        return factors if self.embedding is not None else factors / self.head_scale


FLOOR_DIVERGENCE = 0.25
"""Highest mean KL divergence from the original at the quality floor, in nats a token."""
FLOOR_SAME_TOP = 0.75
"""Lowest share of the tokens with the original's first choice at the quality floor."""


def quality_floor(calibrated: Calibrated, ratio: float) -> float:
    """The lowest budget from which on the model is acceptable: by perplexity, KL divergence and first choices.

    Between the points of the curve, log perplexity, log divergence and the share of the same first choices are linear
    in bits.

    Args:
        calibrated: a calibrated model with its curve.
        ratio: acceptable perplexity over the original's, 1 or more.

    Returns:
        Average bits, in steps of 0.05; 8 where no budget is acceptable.
    """
    curve = calibrated.curve
    bits = [point.avg_bits_used for point in curve]
    grid = np.arange(bits[0], CODE_BITS + 0.025, 0.05)

    def at_grid(values: list[float]) -> NDArray[np.float64]:
        return np.asarray(np.interp(grid, bits, values))

    good = at_grid([np.log(point.perplexity) for point in curve]) <= np.log(ratio * calibrated.reference_perplexity)
    divergence = [np.log(max(point.kl_divergence, SMALLEST_DIVERGENCE)) for point in curve]
    good &= at_grid(divergence) <= np.log(FLOOR_DIVERGENCE)
    good &= at_grid([point.same_top for point in curve]) >= FLOOR_SAME_TOP
    # From this index on every budget is good.
    first = len(good) - int(np.argmin(good[::-1])) if not good.all() else 0
    return round(float(grid[min(first, len(grid) - 1)]), 2)


def worth(calibrated: Calibrated, floor_ratio: float) -> tuple[float, float]:
    """What slice profiles are compared by: less is better.

    Args:
        calibrated: a calibrated model with its curve.
        floor_ratio: acceptable perplexity over the original's, 1 or more.

    Returns:
        The quality floor in average bits, and the mean KL divergence at 4 to 8 bits in nats a token, which decides
        between equal floors.
    """
    bits = [point.avg_bits_used for point in calibrated.curve]
    mean = np.interp(
        [b for b in CURVE_BITS if b >= 4], bits, [point.kl_divergence for point in calibrated.curve]
    ).mean()
    return quality_floor(calibrated, floor_ratio), round(float(mean), 5)
