"""``mbq-export --sign``."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_signature import write_keys
from tiny_models import write_checkpoint

from mbq_export import export
from mbq_runtime import BundleError
from mbq_runtime.bundle import verify_bundle
from mbq_runtime.trust import signature

pytestmark = pytest.mark.heavy


def test_an_export_that_is_signed(tmp_path: Path, calibration_text: Path) -> None:
    """The signature is there when the folder appears.  Nothing else differs from an export without one."""
    model, key = write_checkpoint(tmp_path / "model", "llama"), write_keys(tmp_path, "maker")
    options = {"method": "rtn", "router": "static", "calib_data": str(calibration_text), "calib_tokens": 512}
    plain, signed = tmp_path / "plain", tmp_path / "signed"
    export(model, ["portable"], output=plain, **options)  # type: ignore[arg-type]
    export(model, ["portable"], output=signed, sign=key, **options)  # type: ignore[arg-type]
    assert (plain / "manifest.json").read_bytes() == (signed / "manifest.json").read_bytes()
    verify_bundle(signed)
    signature.verify(signed, key.with_suffix(".pub"))
    with pytest.raises(BundleError, match="it has no signature"):
        signature.verify(plain, key.with_suffix(".pub"))
