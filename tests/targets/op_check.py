"""Runs prepared op cases through onnxruntime and compares: ``op_check.py FOLDER LIBRARY [FOLDER LIBRARY ...]``.

Needs numpy and onnxruntime only, so the same cases run in a board's userland.  Every sub-folder
of FOLDER is a case: ``model.onnx`` and ``runs.npz`` with, for every run r, the inputs
``r/in/NAME``, the expected outputs ``r/out/NAME`` and the largest absolute difference allowed,
``r/tol/NAME`` (an array or a number).  ``r/alone/NAME`` names the inputs that have a row for each row of the output:
each row alone must give the same bits.  Prints a line per failure and a closing line per library; exits with 1 if there
is a failure.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort


def open_session(model: Path, library: Path, threads: int = 2) -> ort.InferenceSession:
    """A session of ``model`` with the op library registered."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.register_custom_ops_library(str(library))
    return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def check_case(case: Path, library: Path, threads: int = 2) -> list[str]:
    """Run one case; a line for every output that is off."""
    session = open_session(case / "model.onnx", library, threads)
    problems = []
    with np.load(case / "runs.npz") as data:
        runs = sorted({key.split("/")[0] for key in data.files}, key=int)
        for run in runs:
            feeds = {key.split("/")[2]: data[key] for key in data.files if key.startswith(f"{run}/in/")}
            names = [key.split("/")[2] for key in data.files if key.startswith(f"{run}/out/")]
            for name, got in zip(names, session.run(names, feeds), strict=True):
                want, tolerance = data[f"{run}/out/{name}"], data[f"{run}/tol/{name}"]
                if got.shape != want.shape:
                    problems.append(f"{case.name} run {run}: {name} has shape {got.shape}, expected {want.shape}")
                    continue
                excess = np.abs(got.astype(np.float64) - want) - tolerance
                if not (excess <= 0).all():
                    at = np.unravel_index(np.argmax(np.nan_to_num(excess, nan=np.inf)), want.shape)
                    problems.append(
                        f"{case.name} run {run}: {name}{[int(i) for i in at]} is {got[at]}, expected {want[at]}; "
                        f"{int((~(excess <= 0)).sum())} of {want.size} are off"
                    )
                if f"{run}/alone/{name}" in data.files:
                    rows = [str(row) for row in data[f"{run}/alone/{name}"]]
                    off = alone(session, feeds, rows, name, got)
                    problems += [f"{case.name} run {run}: rows {off} of {name} have other bits alone"] if off else []
    return problems


def alone(
    session: ort.InferenceSession, feeds: dict[str, np.ndarray], by_row: list[str], name: str, together: np.ndarray
) -> list[int]:
    """The rows that have other bits alone than all rows together.  by_row: inputs with a row for each of the output."""
    off = []
    for row in range(together.shape[1]):
        one = {key: value[:, row : row + 1] if key in by_row else value for key, value in feeds.items()}
        if not np.array_equal(session.run([name], one)[0], together[:, row : row + 1]):
            off.append(row)
    return off


def check_library(folder: Path, library: Path) -> bool:
    """Run all cases of a folder.  Tells whether there were some, and none had a problem."""
    cases = sorted(path.parent for path in folder.glob("*/model.onnx"))
    problems = [line for case in cases for line in check_case(case, library)]
    for line in problems:
        print(line)
    print(f"{library}: {len(cases)} cases, {len(problems)} problems", flush=True)
    return bool(cases) and not problems


def main(*paths: str) -> int:
    """paths: folder and library in turn."""
    results = [check_library(Path(f), Path(b)) for f, b in zip(paths[::2], paths[1::2], strict=True)]
    return 0 if results and all(results) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
