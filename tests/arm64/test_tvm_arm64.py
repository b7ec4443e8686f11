"""The decoder compiled for arm64 boards: on an emulated board it says what the host's ONNX engine says.

Of TVM the board has ``tvm_ffi`` and ``libtvm_runtime.so``, and nothing else.
"""

from __future__ import annotations

import json
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from agreement import LARGEST_DIFFERENCE, assert_agree
from board_packages import SUITE, WHEEL_PLATFORMS, call
from userland import Userland

from mbq_runtime import Engine

pytestmark = pytest.mark.slow

CORES = {"arm64": "cortex-a76", "rpi4": "cortex-a72"}
PROMPT = "The history of the lighthouse begins"
REPLY_TOKENS = 12

ON_THE_BOARD = """
import json, sys
import numpy as np
from mbq_runtime import Engine
bundle, prompt, reply_tokens, budgets, out = sys.argv[1:]
prompt = json.loads(prompt)
engine = Engine.load(bundle, engine="tvm")
reply = engine.generate(prompt, max_tokens=int(reply_tokens), avg_bits=8)
reply.text()
assert not {"tvm", "onnxruntime"} & set(sys.modules)
logits = {bits: engine.logits(prompt, float(bits)).logits for bits in json.loads(budgets)}
np.savez(out, tokens=reply.stats.tokens, **logits)
"""


@pytest.fixture(scope="session")
def tvm_overlay(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH with what the engine needs of TVM's aarch64 wheels."""
    folder = tmp_path_factory.mktemp("tvm-overlay")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "download",
        "-q",
        "--no-deps",
        "--only-binary=:all:",
    ]
    choice = ["--python-version", SUITE.python, *(f"--platform={platform}" for platform in WHEEL_PLATFORMS)]
    names = ("apache-tvm", "apache-tvm-ffi", "typing_extensions")
    wanted = [f"{name}=={version(name)}" for name in names]
    call([*pip, *choice, "-d", folder / "wheels", *wanted], "fetch TVM's aarch64 wheels")
    for wheel in (folder / "wheels").glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name == "tvm/lib/libtvm_runtime.so" or name.startswith(("tvm_ffi/", "typing_extensions")):
                    archive.extract(name, folder)
    return folder


@pytest.mark.parametrize("target", list(CORES))
def test_the_board_says_what_the_host_says(
    userland: Userland, tvm_overlay: Path, smollm2_bundles: dict[str, Path], target: str, tmp_path: Path
) -> None:
    host = Engine.load(smollm2_bundles["host"], engine="onnx")
    prompt = host.encode(PROMPT, add_bos=True)
    budgets = [f"{host.manifest.budget.min_bits:g}", "4", "8"]
    out = tmp_path / "board.npz"
    script = [
        "-c",
        ON_THE_BOARD,
        smollm2_bundles[target],
        json.dumps(prompt),
        str(REPLY_TOKENS),
        json.dumps(budgets),
    ]
    environment = {"PYTHONPATH": f"{tvm_overlay}:{userland.overlay}"}
    done = userland.run([*script, out], cpu=CORES[target], env=environment, timeout=900)
    assert done.returncode == 0, done.stderr

    reply = host.generate(prompt, max_tokens=REPLY_TOKENS, avg_bits=8)
    reply.text()
    expected = reply.stats.tokens
    with np.load(out) as board:
        said = tuple(board["tokens"].tolist())
        for bits in budgets:
            theirs = host.logits(prompt, float(bits)).logits
            assert_agree(board[bits], theirs, f"{target} on {CORES[target]} at {bits} bits")
    if said != expected:
        agreed = next(i for i, (a, b) in enumerate(zip(said, expected, strict=True)) if a != b)
        best = np.sort(host.logits([*prompt, *expected[:agreed]], 8.0).logits[-1])[-2:]
        assert best[1] - best[0] <= LARGEST_DIFFERENCE * best[1], f"they part after {agreed} tokens"
