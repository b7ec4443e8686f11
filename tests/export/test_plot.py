"""The picture of a quality curve."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from mbq_export.write.plot import quality_curve
from mbq_runtime.bundle.facts import Quality, QualityPoint
from mbq_runtime.errors import UsageError

QUALITY = Quality(20.0, 3.5, tuple(QualityPoint(bits, bits, ppl) for bits, ppl in ((3, 30), (4, 22), (8, 20.2))))


@pytest.mark.heavy
def test_what_is_drawn(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg", "c.png", "d.pdf"):
        quality_curve(tmp_path / name, "smollm2-135m", QUALITY)
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "d.pdf").read_bytes().startswith(b"%PDF")
    drawn = (tmp_path / "a.svg").read_text()
    for label in ("bundle", "smollm2-135m", "quality floor, 3.5 bits", "original (perplexity 20.00)"):
        assert f"<!-- {label} -->" in drawn
    markers = re.findall(r"<use [^>]*style=\"fill: #1f77b4", drawn)
    assert len(markers) == len(QUALITY.curve) + 1, "one for each point and one in the legend"
    assert (tmp_path / "b.svg").read_text() == drawn


@pytest.mark.parametrize("name", ["nowhere/curve.png", "curve.doc"])
def test_a_file_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=f"{name}: cannot be written"):
        quality_curve(tmp_path / name, "", QUALITY)


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"pip install 'mbq-export\[plot\]'"):
        quality_curve(tmp_path / "curve.png", "", QUALITY)
