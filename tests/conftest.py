"""What several folders of tests share: a text to calibrate on, and the real model exported once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from finished_exports import finished

# The engine's wheels report usage unless told not to.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

REAL_TARGETS = ("host", "arm64", "rpi4", "portable", "android-adreno", "webgpu")


@pytest.fixture(scope="session")
def calibration_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few thousand words: enough for a tokenizer of bytes and small windows."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The tide turns twice a day, and twice a day the boats leave the harbour. " * 400, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def smollm2_bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """SmolLM2-135M for every kind of target, and for both engines where a target has both, from one calibration."""
    # A fortieth of the usual tuning, and a few windows of text.
    options = ["--engine", "both", "--tune-steps", "2", "--calib-tokens", "1536"]
    for target in REAL_TARGETS:
        options += ["--target", target]
    folder = finished(options, tmp_path_factory.mktemp("smollm2"))
    return {target: folder / f"smollm2-135m-{target}" for target in REAL_TARGETS}


@pytest.fixture(scope="session")
def smollm2_host_bundle(smollm2_bundles: dict[str, Path]) -> Path:
    return smollm2_bundles["host"]


@pytest.fixture(scope="session")
def smollm2_arm64_bundle(smollm2_bundles: dict[str, Path]) -> Path:
    return smollm2_bundles["arm64"]


@pytest.fixture(scope="session")
def smollm2_rpi4_bundle(smollm2_bundles: dict[str, Path]) -> Path:
    return smollm2_bundles["rpi4"]


@pytest.fixture(scope="session")
def smollm2_portable_bundle(smollm2_bundles: dict[str, Path]) -> Path:
    return smollm2_bundles["portable"]
