"""Selection of the router that ships, at equal bits, those of the router included."""

from __future__ import annotations

from collections.abc import Sequence
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
    return Sliced(np.zeros((n, k), np.uint8), *np.ones((2, n, 1), np.uint8), np.ones(n, np.float16))


SLICES, WEIGHTS = {"unit": zeros(N, K)}, {"unit": N * K}
BITS = (2.5, 3.0, 4.0)
TABLE = np.linspace(2, 8, 25, dtype=np.float32)
RULE = RouterParams(np.zeros(3, np.float32), np.zeros(3, np.float32), TABLE, -TABLE)
LEARNED = RouterParams(
    RULE.bias, RULE.norm_gain, TABLE, -TABLE,
    np.zeros((2, K), np.float16), np.zeros(2, np.float32), np.zeros((3, 2), np.float32),
)  # fmt: skip


def straight(better_by: Sequence[float]) -> Any:
    """A stand-in for ``quality.measure``.  Divergence falls by one nat a bit; kind i has ``better_by[i]`` less."""

    def measure(*args: Any, **kwargs: Any) -> list[quality.Measured]:
        cases = args[3]
        of_kinds = [(b, gain) for gain in (*better_by, 0.0) for b in BITS]
        ends = [(2.0, 0.0), (8.0, 0.0)]
        assert len(cases) == len(of_kinds) + len(ends)
        windows = np.array([0.0, 0.5])
        return [quality.Measured(windows, 10 - b - gain + windows, 0.5, b) for b, gain in of_kinds + ends]

    return measure


def chosen(monkeypatch: pytest.MonkeyPatch, learned_better_by: float) -> tuple[str, Comparison]:
    monkeypatch.setattr(quality, "measure", straight((0.0, learned_better_by)))
    monkeypatch.setattr(select, "fast_dtype", lambda device: None)

    class Anywhere:
        device = "cpu"

        class decoder:
            @staticmethod
            def units() -> list[Unit]:
                return [Unit("unit", ("layer",))]

    fits = {"norm": {"unit": RULE}, "mlp": {"unit": LEARNED}}
    windows: NDArray[np.int64] = np.zeros((2, 8), np.int64)
    calibration = Calibration(Anywhere(), Recipe(PROFILE, 64))  # type: ignore[arg-type]
    selected = select.select_kind(calibration, fits, SLICES, windows)
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
