"""The check of the whole: a wrong transform, model or lowering is found and named.

Right exports pass with room: ``test_every_family.py``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import write_checkpoint

from mbq_export import calibrate, export
from mbq_export.calibrated import Calibrated
from mbq_export.lower import onnx as lower_onnx
from mbq_export.write import bundle as write_bundle
from mbq_runtime.errors import ModelError

pytestmark = pytest.mark.heavy


def exported(model: Path, text: Path, output: Path) -> None:
    export(
        model, ["portable"], output=output, calib_data=str(text), calib_tokens=1024, method="rtn", router="static"
    )  # fmt: skip


def tied_without_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tied table is stored for the head; what makes an embedding of its rows is left out."""
    right = lower_onnx.lower

    def wrong(checkpoint: Any, calibrated: Calibrated, *more: Any, **options: Any) -> Any:
        return right(checkpoint, replace(calibrated, head_scale=np.ones_like(calibrated.head_scale)), *more, **options)

    monkeypatch.setattr(lower_onnx, "lower", wrong)


def test_a_broken_lowering_leaves_no_bundle(
    calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``test_check_targets.py`` has more of them."""
    model = write_checkpoint(tmp_path / "llama", "llama")
    right = write_bundle.write_bundle

    def lowered_wrongly(*args: Any, **kwargs: Any) -> Any:
        with monkeypatch.context() as broken:
            tied_without_factors(broken)
            return right(*args, **kwargs)

    # The model is calibrated as it should be, and lowered wrongly.
    monkeypatch.setattr(write_bundle, "write_bundle", lowered_wrongly)
    with pytest.raises(ModelError, match="embedding") as caught:
        exported(model, calibration_text, tmp_path / "bundle")
    assert "\n" not in str(caught.value)
    assert "no bundle was written" in str(caught.value)
    assert not (tmp_path / "bundle").exists()


def test_a_wrong_transform_is_found(calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smooth = calibrate.smooth

    def wrong(checkpoint: Any, *args: Any) -> Any:
        found = smooth(checkpoint, *args)
        with torch.no_grad():
            checkpoint.linear("model.layers.1.mlp.down_proj").weight.mul_(1.1)
        return found

    monkeypatch.setattr(calibrate, "smooth", wrong)
    model = write_checkpoint(tmp_path / "llama", "llama")
    with pytest.raises(ModelError, match=r"transformed wrongly; the first difference is in layers\.1 MLP"):
        exported(model, calibration_text, tmp_path / "bundle")


def test_another_model_is_found(calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that is not the model's own, as a merged checkpoint once brought one in."""
    slices = calibrate._slice

    def wrong(*args: Any) -> Any:
        found = slices(*args)
        found.slices["head"] = found.slices["head"].rows(np.random.default_rng(0).permutation(264))
        return found

    monkeypatch.setattr(calibrate, "_slice", wrong)
    model = write_checkpoint(tmp_path / "mistral", "mistral")
    with pytest.raises(ModelError, match=r"the sliced model is another model; the first difference is in head"):
        exported(model, calibration_text, tmp_path / "bundle")
