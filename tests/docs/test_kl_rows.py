"""A comparison becomes rows of results/kl-divergence.json."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def _row(name: str, method: str, bits: float, kl: float) -> dict[str, Any]:
    return {
        "name": name,
        "method": method,
        "bits": bits,
        "bits_used": bits,
        "linear_bytes": 72_000_000,
        "over_fp": {"value": 1.08, "stderr": 0.01},
        "divergence": {"value": kl, "stderr": 0.001},
        "divergence_p99": 0.7,
        "agreement": {"value": 0.8, "stderr": 0.01},
    }


def test_new_rows_replace_those_of_the_same_file(tmp_path: Path) -> None:
    for name in ("docs", "results"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.md", "*.svg"))
    stored = tmp_path / "results" / "kl-divergence.json"
    before = json.loads(stored.read_text("utf-8"))
    fp32, ours = _row("fp32", "fp32", 32, 0.0), "bundle, 4 bits on average"
    texts = [{"name": name, "rows": [fp32, _row(ours, "bundle", 4, kl)]} for name, kl in (("code", 0.1), ("chat", 0.2))]
    comparison = tmp_path / "results.json"
    comparison.write_text(json.dumps({"texts": texts, "mean": {"rows": [fp32, _row(ours, "bundle", 4, 0.15)]}}))
    command = [sys.executable, tmp_path / "docs" / "kl_rows.py", comparison, "--commit", "abcdef1"]
    subprocess.run([*command, "--machine", "a machine", "--date", "2026-12-01"], check=True)
    after = json.loads(stored.read_text("utf-8"))
    assert (after["commit"], after["machine"], after["date"]) == ("abcdef1", "a machine", "2026-12-01")
    rows = {row["file"]: row for row in after["rows"]}
    assert rows.keys() == {row["file"] for row in before["rows"]}
    four = rows["bundle, 4 bits"]
    assert (four["mean_kl_nats"], four["kl_code"], four["kl_chat"], four["mb_per_token"]) == (0.15, 0.1, 0.2, 72.0)
    assert "commit" not in four
    assert "fp32" not in rows
    (kept,) = (row for row in before["rows"] if row["file"] == "bundle, 8 bits")
    assert rows["bundle, 8 bits"]["commit"] == kept.get("commit", before["commit"])
    assert [row["mb_per_token"] for row in after["rows"]] == sorted(
        (row["mb_per_token"] for row in after["rows"]), reverse=True
    )
