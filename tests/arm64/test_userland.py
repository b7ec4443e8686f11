"""The userland itself: the base install runs on an emulated board and weighs what it may weigh."""

from __future__ import annotations

import importlib.metadata
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from board_packages import REPO, SUITE, UserlandError, base_requirements, pinned, size_table
from forked_mbq import Mbq
from onnx import TensorProto, helper, numpy_helper
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from userland import Userland, hwcap_names
from userland import _build_once as build_once

pytestmark = pytest.mark.slow

# Of it, tokenizers with the packages that it asks for: 10 and 34 MB packed and unpacked.
MAX_WHEELS_MB, MAX_UNPACKED_MB = 66, 200
WORKSTATION_ONLY = {"torch", "transformers", "apache-tvm", "apache-tvm-ffi", "ziglang", "onnx", "accelerate"}

# Features that kernels choose by, per core: those it must have and those it must not.
CORE_FEATURES = {
    "cortex-a53": ({"asimd"}, {"asimddp", "i8mm", "asimdhp"}),
    "cortex-a57": ({"asimd"}, {"asimddp", "i8mm", "asimdhp"}),
    "cortex-a72": ({"asimd"}, {"asimddp", "i8mm", "asimdhp"}),
    "cortex-a76": ({"asimd", "asimddp", "asimdhp", "fphp"}, {"i8mm", "sve"}),
    "max": ({"asimd", "asimddp", "asimdhp", "i8mm", "bf16"}, set()),
}

# glibc 2.28, and the C++ library of GCC 11 or newer.  Ubuntu 22.04 has 2.35 and that of GCC 12.
OLDEST_BOARD = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 29), "CXXABI": (1, 3, 13)}

RUN_MODEL = """
import sys
import numpy, onnxruntime, onnxruntime_genai
model, inputs, outputs = sys.argv[1:]
session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
numpy.save(outputs, session.run(None, {"x": numpy.load(inputs)})[0])
print(onnxruntime.__version__, onnxruntime_genai.__version__)
"""

READ_FEATURES = """
import ctypes, os
from mbq_runtime.bundle import isa
getauxval = ctypes.CDLL(None).getauxval
getauxval.argtypes, getauxval.restype = [ctypes.c_ulong], ctypes.c_ulong
print(os.uname().machine, getauxval(16), getauxval(26))
print(next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("Features")))
print(isa.this_machine().arch, *isa.this_machine().features)
"""


def matmul_nbits_model(path: Path, accuracy_level: int, rows: int = 64, columns: int = 256, block: int = 32) -> None:
    """Write y[m, rows] = x[m, columns] @ W^T with W stored as 4-bit blocks (zero point 8)."""
    rng = np.random.default_rng(7)
    blocks = columns // block
    codes = rng.integers(0, 256, (rows, blocks, block // 2), dtype=np.uint8)
    scales = rng.uniform(0.01, 0.1, (rows, blocks)).astype(np.float32)
    node = helper.make_node(
        "MatMulNBits",
        ["x", "codes", "scales"],
        ["y"],
        domain="com.microsoft",
        K=columns,
        N=rows,
        bits=4,
        block_size=block,
        accuracy_level=accuracy_level,
    )
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", rows])],
        [numpy_helper.from_array(codes, "codes"), numpy_helper.from_array(scales, "scales")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)


# float32 arithmetic agrees to rounding; with activations rounded to 8 bits each instruction set rounds its own way.
@pytest.mark.parametrize(("accuracy_level", "tolerance"), [(1, 1e-6), (4, 2e-2)])
def test_stock_operators_give_the_hosts_numbers(
    board: Callable[[str], Mbq], tmp_path: Path, accuracy_level: int, tolerance: float
) -> None:
    model = tmp_path / "linear.onnx"
    matmul_nbits_model(model, accuracy_level)
    x = np.random.default_rng(8).standard_normal((5, 256)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    expected = session.run(None, {"x": x})[0]

    for cpu in ("cortex-a76", "cortex-a72"):
        out = tmp_path / f"{cpu}.npy"
        done = board(cpu)([model, tmp_path / "x.npy", out], program=RUN_MODEL)
        assert done.code == 0, done.err
        assert done.out.split() == [importlib.metadata.version(name) for name in ("onnxruntime", "onnxruntime-genai")]
        error = float(np.abs(np.load(out) - expected).max() / np.abs(expected).max())
        print(f"accuracy level {accuracy_level}, {cpu}: largest difference {error:.1e} of the largest value")
        assert error <= tolerance, cpu


@pytest.mark.parametrize("cpu", CORE_FEATURES)
def test_features_of_each_core(userland: Userland, cpu: str) -> None:
    done = userland.run(["-c", READ_FEATURES], cpu=cpu)
    assert done.returncode == 0, done.stderr
    words, features, runtimes_view = done.stdout.splitlines()
    machine, hwcap, hwcap2 = words.split()
    assert machine == "aarch64"
    assert features.split() == hwcap_names(int(hwcap), int(hwcap2))
    present, absent = CORE_FEATURES[cpu]
    assert present <= set(features.split())
    assert not absent & set(features.split())
    arch, *runtime_features = runtimes_view.split()  # what a bundle's needs are checked against
    assert arch == "aarch64"
    assert present <= set(runtime_features) <= set(features.split())


def test_two_cores_at_once_see_their_own_features(userland: Userland) -> None:
    cores = ["cortex-a72", "cortex-a76"]
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda cpu: userland.run(["-c", READ_FEATURES], cpu=cpu), cores))
    assert ["asimddp" in run.stdout for run in runs] == [cpu == "cortex-a76" for cpu in cores]


def test_size_of_the_base_install(userland: Userland) -> None:
    wheels = userland.wheels
    own = [path for room in ("mbq_export", "runtime", "targets") for path in (REPO / room).rglob("*") if path.is_file()]
    own_bytes = sum(path.stat().st_size for path in own if "__pycache__" not in path.parts)
    print(f"\nbase install on linux/aarch64 (wheels, unpacked):\n{size_table(wheels)}")
    print(f"{'this project, unpacked':28} {'':10} {own_bytes / 1e6:8.1f} MB")
    assert sum(wheel.wheel_bytes for wheel in wheels) + own_bytes <= MAX_WHEELS_MB * 1e6
    assert sum(wheel.unpacked_bytes for wheel in wheels) + own_bytes <= MAX_UNPACKED_MB * 1e6
    names = {canonicalize_name(wheel.name) for wheel in wheels}
    assert {canonicalize_name(Requirement(text).name) for text in base_requirements()} <= names
    assert not names & WORKSTATION_ONLY


def test_base_install_is_complete_on_a_board(userland: Userland) -> None:
    """Every requirement whose marker holds on linux/aarch64 is there: pip judged the markers by the host."""
    versions = {canonicalize_name(wheel.name): wheel.version for wheel in userland.wheels}
    board = {"platform_machine": "aarch64", "platform_system": "Linux", "sys_platform": "linux", "os_name": "posix"}
    board |= {
        "python_version": SUITE.python,
        "python_full_version": f"{SUITE.python}.2",
        "implementation_name": "cpython",
        "extra": "",
    }
    for owner, text in [(wheel.name, text) for wheel in userland.wheels for text in wheel.requires]:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate(board):
            version = versions.get(canonicalize_name(requirement.name))
            assert version is not None, f"{owner} needs {text}, which is not installed"
            assert requirement.specifier.contains(version, prereleases=True), f"{owner} needs {text}, has {version}"


def test_base_install_asks_for_no_newer_libraries_than_the_oldest_board_has(userland: Userland) -> None:
    """Ubuntu 22.04, which JetPack 6 is made of, has newer ones; a Python of its own brings none of them."""
    newest: dict[str, tuple[tuple[int, ...], str]] = {}
    for path in (userland.root / "usr/lib/python3/dist-packages").rglob("*.so*"):
        for name, version in re.findall(rb"\0(GLIBC|GLIBCXX|CXXABI)_(\d[\d.]*\d)(?=\0)", path.read_bytes()):
            found = (tuple(map(int, version.split(b"."))), path.name)
            newest[name.decode()] = max(newest.get(name.decode(), ((), "")), found)
    assert newest.keys() == OLDEST_BOARD.keys()
    for name, (version, file) in newest.items():
        assert version <= OLDEST_BOARD[name], f"{file} needs {name} {version}"


def test_pins_follow_this_environment() -> None:
    pins = pinned(["numpy>=1.26", "no-such-distribution-here>=2"])
    assert pins == [f"numpy=={np.__version__}", "no-such-distribution-here>=2"]


def test_work_trees_runtime_is_the_one_imported(userland: Userland) -> None:
    script = "import mbq_runtime, mbq_runtime.errors as e; print(mbq_runtime.__file__, e.BundleError.exit_code)"
    done = userland.run(["-c", script])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(userland.overlay / "mbq_runtime" / "__init__.py"), "4"]
    assert (userland.overlay / "mbq_runtime" / "errors.py").read_bytes() == (
        REPO / "runtime/mbq_runtime/errors.py"
    ).read_bytes()


def test_failures_come_back_as_they_are(userland: Userland) -> None:
    assert userland.run(["-c", "raise SystemExit(4)"]).returncode == 4
    assert userland.run(["-c", "import os; os.abort()"]).returncode == -signal.SIGABRT
    assert userland.run(["-c", "print(input())"], input="Grüße\n").stdout == "Grüße\n"
    with pytest.raises(subprocess.TimeoutExpired):
        userland.run(["-c", "import time; time.sleep(60)"], timeout=1)
    with pytest.raises(UserlandError, match="no-such-core"):
        userland.run(["-c", "pass"], cpu="no-such-core")


def test_unfinished_build_leaves_nothing(tmp_path: Path) -> None:
    """A build that fails or is killed is never taken for a finished one, and its remains go with the next."""
    folder = tmp_path / "thing"

    def fail(draft: Path) -> None:
        (draft / "half").touch()
        raise UserlandError("disk full")

    with pytest.raises(UserlandError, match="disk full"):
        build_once(folder, fail)
    assert [path.name for path in tmp_path.iterdir()] == [".thing.lock"]

    script = """
import os, signal, sys; from pathlib import Path; from userland import _build_once
def build(draft):
    (draft / "half").touch()
    os.kill(os.getpid(), signal.SIGKILL)
_build_once(Path(sys.argv[1]), build)
"""
    killed = subprocess.run([sys.executable, "-c", script, folder], cwd=Path(__file__).parent, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".thing.draft-*"))) == 1
    assert not folder.exists()

    build_once(folder, lambda draft: (draft / "whole").touch())
    assert [path.name for path in folder.iterdir()] == ["whole"]
    assert not list(tmp_path.glob(".thing.draft-*"))
    build_once(folder, fail)  # it is there: nothing is built
