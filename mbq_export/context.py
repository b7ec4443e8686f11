"""What every stage of a calibration needs, in one object."""

from __future__ import annotations

from dataclasses import dataclass, field

from mbq_runtime.bundle.slice_profile import SliceProfile

from .memory import give_back
from .methods import METHODS, Method, Recipe
from .model.checkpoint import Checkpoint
from .progress import Report, StageReport, no_report, staged
from .store import Store


@dataclass(frozen=True)
class Calibration:
    """One calibration, as its stages see it.

    checkpoint: the model, which stages change in place.
    recipe: what was asked for.
    store: finished steps on disk.
    report: is told how far each stage is.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    store: Store = field(default_factory=lambda: Store(None))
    report: Report = no_report

    @property
    def profile(self) -> SliceProfile:
        """The bits of each slice."""
        return self.recipe.profile

    @property
    def method(self) -> Method:
        """The settings of the recipe's method."""
        return METHODS[self.recipe.method]

    @property
    def seed(self) -> int:
        """Seed of all that is random."""
        return self.recipe.seed

    def stage(self, name: str) -> StageReport:
        """Begin a stage: free the memory of the stage before.

        Args:
            name: says what the stage does, for the user.

        Returns:
            The stage's report.
        """
        give_back()
        return staged(self.report, name)
