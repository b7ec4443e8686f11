"""Exports of tiny models of every family, and how near their checks come to their limits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from short_export import engines_there_are
from tiny_models import EVERY_PART, EXPERTS, write_checkpoint

from mbq_export import check
from mbq_export.cli import command
from mbq_export.model import recording
from mbq_export.write import check as written_check
from mbq_targets.machines import Target

COMPILED = {*EVERY_PART, "lfm2"} - {*EXPERTS}
"""Models that are also exported for TVM, which compiles each of them for seconds.  It lowers by parts of a block."""


@dataclass(frozen=True)
class FamilyExport:
    """A tiny model and its bundles, from one calibration.  No test may change them.

    model: folder of the checkpoint
    portable: bundle for any machine
    host: bundle for this machine, for each of ``engines``
    engines: "onnx", and for models in ``COMPILED`` also "tvm"
    check_errors: largest errors that the checks of the export found, as ``recorded_errors`` gives them
    """

    model: Path
    portable: Path
    host: Path
    engines: tuple[str, ...]
    check_errors: dict[str, float]


@contextmanager
def recorded_errors() -> Iterator[dict[str, float]]:
    """While the block runs, record what the checks of exports compare.

    Yields:
        By the limit of a check, the largest error that it found, as a share of the limit.
    """
    errors: dict[str, float] = {}
    compare = recording.difference

    def see(expected: Any, logits: Any, streams: Any, *, limit: float, rotated: bool = False) -> Any:
        name, error = f"limit {limit:g}", recording.logits_difference(expected.logits, logits) / limit
        errors[name] = max(errors.get(name, 0.0), error)
        return compare(expected, logits, streams, limit=limit, rotated=rotated)

    with pytest.MonkeyPatch.context() as patch:
        for of in (check, written_check):
            patch.setattr(of, "difference", see)
        yield errors


def export_family(name: str, folder: Path, text: Path) -> FamilyExport:
    """Write a checkpoint and export it by rounding, with a learned router.

    Args:
        name: a key of ``MODELS``.
        folder: an empty folder.
        text: to calibrate on.
    """
    model, bundles = write_checkpoint(folder / name, name), folder / "bundles"
    engines = ("onnx", "tvm") if name in COMPILED else ("onnx",)
    options = ["--model", model, "--target", "portable", "--target", "host", "--output", bundles]
    options += ["--engine", "both" if "tvm" in engines else "onnx", "--calib-data", text, "--calib-tokens", 1024]
    options += ["--method", "rtn", "--router", "mlp", "--json"]
    with recorded_errors() as errors, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Target, "engines", engines_there_are)
        command([str(option) for option in options], standalone_mode=False)
    return FamilyExport(model, bundles / f"{name}-portable", bundles / f"{name}-host", engines, errors)
