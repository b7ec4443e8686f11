"""What a controller learned, kept between runs: one small file for each bundle, board and number of threads.

The file is JSON with a hash of its contents.  A file that is damaged, or that says what no board can be, is ignored.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from mbq_runtime.whole_file import write_whole

from .estimate import Estimate
from .heat import Heat
from .learned import Learned
from .token_time import TokenTime
from .watts import Watts

log = logging.getLogger(__name__)

_VERSION = 1
_MOST_BYTES = 64 << 10
_MOST_LINES = 64
_MOST_VALUE = 1e6
_DOUBT = 4.0  # variances grow by this: the board may have changed since the file was written


def key(bundle: str, board: str, threads: int) -> str:
    """Name of the file of a bundle on a board.

    Args:
        bundle: what identifies the bundle, such as the hash of its manifest.
        board: what identifies the board, such as its model and processor.
        threads: number of threads that the engine was loaded with.
    """
    return sha256(json.dumps([_VERSION, bundle, board, threads]).encode()).hexdigest()[:32] + ".json"


def save(learned: Learned, path: Path) -> None:
    """Write the file, whole or not at all.  A failure is logged, since nothing depends on the file.

    Args:
        learned: what is known.
        path: the file; its folder is created.
    """
    lines = {str(n): _line(line) for n, line in learned.token_times.items() if line.is_known and line.line is not None}
    contents: dict[str, Any] = {"version": _VERSION, "token_times": lines}
    if learned.heat.is_known:
        contents["heat"] = asdict(learned.heat.rate)
    if learned.watts.is_known:
        contents["watts"] = asdict(learned.watts.line)
    text = json.dumps(contents)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"sha256": sha256(text.encode()).hexdigest(), "contents": text}).encode())
    except OSError as error:
        log.info("%s: what was learned about the board is not kept (%s)", path, error.strerror)


def load(path: Path) -> Learned:
    """Read the file.  Nothing is known if there is none, or if it cannot be used; the log says so in one line.

    Args:
        path: the file.
    """
    try:
        if not path.is_file():
            return Learned()
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes, at most {_MOST_BYTES}")
        outer = json.loads(path.read_text(encoding="utf-8"))
        text = outer["contents"]
        if sha256(text.encode()).hexdigest() != outer["sha256"]:
            raise ValueError("the hash is another one")
        return _learned(json.loads(text))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        log.warning("%s: ignored (%s); the board is learned again", path, error)
        return Learned()


def _line(line: TokenTime) -> dict[str, Any]:
    assert line.line is not None
    return asdict(line.line)


def _learned(contents: Mapping[str, Any]) -> Learned:
    """Raises ValueError, KeyError or TypeError when a value is not one of a board."""
    if contents["version"] != _VERSION or len(contents["token_times"]) > _MOST_LINES:
        raise ValueError(f"version {contents['version']!r}, {len(contents['token_times'])} numbers of threads")
    # Each part begins as one that is just known enough to be used.
    times = {int(n): TokenTime(_estimate(line, 2), 5.0) for n, line in contents["token_times"].items()}
    if not all(n > 0 and 1e-6 <= math.fsum(line.line.mean) <= 1e3 for n, line in times.items() if line.line):
        raise ValueError("a time of a token is out of range")
    learned = Learned(times)
    if "heat" in contents:
        rate = _estimate(contents["heat"], 3)
        if not (-50 / 20 <= rate.mean[2] <= -50 / 2000 and 0 <= rate.mean[1] <= 10):
            raise ValueError("no board warms like this")
        learned = replace(learned, heat=Heat(rate, blocks=6))
    if "watts" in contents:
        line = _estimate(contents["watts"], 3)
        if not all(0 <= c <= 2000 for c in line.mean):
            raise ValueError("a power is out of range")
        learned = replace(learned, watts=Watts(line, 20.0))
    return learned


def _estimate(values: Mapping[str, Any], size: int) -> Estimate:
    mean = tuple(float(c) for c in values["mean"])
    rows = tuple(tuple(_DOUBT * float(v) for v in row) for row in values["covariance"])
    whole = len(mean) == size and len(rows) == size and all(len(row) == size for row in rows)
    if not whole or not all(math.isfinite(v) and abs(v) <= _MOST_VALUE for row in (mean, *rows) for v in row):
        raise ValueError("coefficients are not numbers of a board")
    size_range = range(size)
    for i in size_range:
        for j in size_range:
            # A covariance is symmetric, and no larger than its variances allow.
            bound = math.sqrt(max(rows[i][i], 0.0) * max(rows[j][j], 0.0))
            if rows[i][i] < 0 or abs(rows[i][j] - rows[j][i]) > 1e-9 or abs(rows[i][j]) > bound * (1 + 1e-6) + 1e-12:
                raise ValueError("a covariance is none")
    return Estimate(mean, rows)
