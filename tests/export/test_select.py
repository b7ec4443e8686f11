"""Selection of the router that ships, at equal bits, those of the router included."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_models import COMMON, MODELS
from transformers import AutoConfig

from mbq_export import quality
from mbq_export.calibrated import Comparison
from mbq_export.context import Calibration
from mbq_export.format.codes import Sliced
from mbq_export.format.router import RouterParams
from mbq_export.methods import Recipe
from mbq_export.model.describe import describe
from mbq_export.model.shape import Unit
from mbq_export.plan import Plan
from mbq_export.routing import kinds, select
from mbq_export.routing.slice_gains import UnitStatistics
from mbq_runtime.bundle.slice_profile import SliceProfile

PROFILE = SliceProfile((2, 2, 2, 2))
N, K = 1024, 64


def zeros(n: int, k: int) -> Sliced:
    return Sliced(np.zeros((n, k), np.uint8), *np.ones((2, n, 1), np.uint8), np.ones((n, 4), np.float16))


SLICES, WEIGHTS = {"unit": zeros(N, K)}, {"unit": N * K}
BITS = (2.5, 3.0, 4.0)
TABLE = np.linspace(2, 8, 25, dtype=np.float32)
RULE = RouterParams(np.zeros(3, np.float32), np.zeros(3, np.float32), TABLE, -TABLE)
LEARNED = RouterParams(
    RULE.bias, RULE.norm_gain, TABLE, -TABLE,
    np.zeros((2, K), np.float16), np.zeros(2, np.float32), np.zeros((3, 2), np.float32),
)  # fmt: skip


FITS = {"norm": {"unit": RULE}, "mlp": {"unit": LEARNED}}


class Windows:
    """A stand-in for the original's predictions: the numbers of its windows."""

    def __init__(self, numbers: Iterable[int]) -> None:
        self.windows = np.array(list(numbers))

    def of(self, rows: Sequence[int]) -> Windows:
        return Windows(self.windows[list(rows)])


class Anywhere:
    device = "cpu"

    class decoder:
        @staticmethod
        def units() -> list[Unit]:
            return [Unit("unit", ("layer",))]


@dataclass
class Selection:
    """A selection from kinds whose divergence falls by one nat a bit, and is less by ``better_by`` of each window.

    measured: by kind, the windows that it was measured on.
    """

    monkeypatch: pytest.MonkeyPatch
    better_by: dict[str, NDArray[np.float64]]
    measured: dict[str, list[int]] = field(default_factory=dict)

    def measure(self, *args: Any, **kwargs: Any) -> list[quality.Measured]:
        windows, results = args[2].windows, []
        for routers, bits in args[3]:
            name = next((name for name, routers_of in FITS.items() if routers_of is routers), None)
            gain = 0.0 if name is None else self.better_by[name][windows]
            if name is not None and bits == BITS[0]:
                self.measured.setdefault(name, []).extend(windows.tolist())
            results.append(quality.Measured(windows * 0.0, 10 - bits - gain + windows / 2, 0.5, bits))
        return results

    def run(self) -> select.Selected:
        self.monkeypatch.setattr(quality, "measure", self.measure)
        self.monkeypatch.setattr(select, "fast_dtype", lambda device: None)
        self.monkeypatch.setattr(select, "depths_at", lambda routers, bits: (routers, bits))
        self.monkeypatch.setattr(select, "_random_depths", lambda calibration, slices, bits: (None, bits))
        calibration = Calibration(Anywhere(), Recipe(PROFILE, 64))  # type: ignore[arg-type]
        count = len(self.better_by["norm"])
        return select.select_kind(calibration, FITS, SLICES, Windows(range(count)))  # type: ignore[arg-type]


def chosen(monkeypatch: pytest.MonkeyPatch, learned_better_by: float) -> tuple[str, Comparison]:
    better_by = {"norm": np.zeros(2), "mlp": np.full(2, learned_better_by)}
    selected = Selection(monkeypatch, better_by).run()
    return selected.kind, selected.comparison


def test_the_bits_of_a_router_are_those_of_all_its_parameters_per_weight() -> None:
    assert select.router_bits({"unit": RULE}, WEIGHTS) == pytest.approx(8 * 2 * 3 * 4 / (N * K))
    more = 2 * K * 2 + 2 * 4 + 3 * 2 * 4
    assert select.router_bits({"unit": LEARNED}, WEIGHTS) == pytest.approx(8 * (2 * 3 * 4 + more) / (N * K))


def test_a_learned_router_ships_when_it_gains_more_than_its_own_bits_would(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = select.router_bits({"unit": LEARNED}, WEIGHTS) - select.router_bits({"unit": RULE}, WEIGHTS)
    assert chosen(monkeypatch, 0.5 * cost)[0] == "norm"
    kind, compared = chosen(monkeypatch, 2 * cost)
    assert kind == "mlp"
    middle = compared["norm"]["3"]
    best = 10 - 3 + 0.25 - cost  # the mean over windows, at 3 bits of which the router takes some
    assert middle["over_shipped"] == pytest.approx((best + cost) / best, rel=1e-3)
    assert middle["stderr"] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("best", [0.0, 1e-300, -1e-12, 0.5])
@pytest.mark.parametrize("other", [0.0, 1e-12, 0.25, 3.0])
@pytest.mark.parametrize("windows", [1, 2])
def test_all_figures_of_a_comparison_are_numbers(best: float, other: float, windows: int) -> None:
    """A model that says the same at all bits has no divergence."""
    losses = {"norm": np.full((1, windows), best), "mlp": np.full((1, windows), other)}
    compared = select.comparison(losses, "norm", [4.0])
    figures = [figure for by_bits in compared.values() for of in by_bits.values() for figure in of.values()]
    assert np.isfinite(figures).all()
    assert compared["norm"]["4"]["over_shipped"] == 1
    if best > 0.1:
        assert compared["mlp"]["4"]["over_shipped"] == pytest.approx(other / best, abs=1e-4)


def test_a_kind_that_is_clearly_worse_on_the_first_windows_is_not_measured_on_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    noise = np.random.default_rng(0).normal(0, 0.02, 10)
    selection = Selection(monkeypatch, {"norm": noise, "mlp": np.full(10, 0.5)})
    selected = selection.run()
    assert selected.kind == "mlp"
    assert selection.measured == {"norm": [0, 3, 6, 9], "mlp": [0, 3, 6, 9, 1, 2, 4, 5, 7, 8]}
    # Figures of both kinds are of the windows that both have.
    assert selected.comparison["norm"]["3"]["over_shipped"] > 1
    assert selected.comparison["norm"]["3"]["stderr"] > 0


def test_kinds_that_are_close_on_the_first_windows_are_compared_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    # On the first windows the norm rule is better by chance, on all of them the learned router is.
    better_by = {"norm": np.zeros(10), "mlp": np.array([0.3, 0.2, 0.2, -0.3, 0.2, 0.2, -0.2, 0.2, 0.2, 0.1])}
    selection = Selection(monkeypatch, better_by)
    assert better_by["mlp"][::3].mean() < 0.02 < better_by["mlp"].mean()
    assert selection.run().kind == "mlp"
    assert sorted(selection.measured["norm"]) == sorted(selection.measured["mlp"]) == list(range(10))


@pytest.mark.parametrize("seed", range(20))
def test_fewer_windows_select_what_all_of_them_do_or_what_is_as_good(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    better_by = {name: rng.normal(gain, 0.05, 10) for name, gain in (("norm", 0.1), ("mlp", 0.1 * rng.normal() + 0.1))}
    means = {name: float(gains.mean()) for name, gains in better_by.items()}
    selected = Selection(monkeypatch, better_by).run().kind
    assert means[selected] > max(means.values()) - 0.05


@pytest.mark.parametrize("kind", list(kinds.ROUTERS))
def test_the_plan_knows_how_large_routers_will_be(kind: str) -> None:
    config = AutoConfig.for_model(**{"model_type": "llama", **COMMON, **MODELS["llama"]})
    decoder = describe(config, "tiny")
    rng = np.random.default_rng(0)
    stats = {}
    for name, (n, k) in decoder.unit_shapes().items():
        loss = -np.sort(-rng.uniform(size=(32, 4)).astype(np.float32), axis=1)
        x = rng.normal(size=(32, k)).astype(np.float16)
        stats[name] = UnitStatistics(n * k, loss[:, 0], loss[:, 1:], loss, x)
    routers = select.fit_routers(Calibration(None, Recipe(PROFILE, 64)), kind, stats)  # type: ignore[arg-type]
    plan = Plan(decoder, PROFILE, 64, "mbq16", kind, 2048)
    assert sum(router.bytes for router in routers.values()) == plan.router_bytes
