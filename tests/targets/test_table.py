"""The table of targets."""

from __future__ import annotations

import re

import pytest

from mbq_runtime.bundle.isa import Machine
from mbq_runtime.errors import UsageError
from mbq_targets.kernels.isa import ISAS
from mbq_targets.machines import TARGETS, best_for, resolve


def test_rows_are_complete() -> None:
    for name, target in TARGETS.items():
        assert target.name == name
        assert target.description
        if target.native:
            assert target.isa in ISAS
            assert target.layout == "mbq16"
            assert re.fullmatch(r"(aarch64|x86_64)-linux-gnu\.2\.28", target.triple)
            assert target.features
            assert target.llvm["mcpu"] == target.cpu
        elif target.gpu:
            assert (target.arch, target.layout) == ("any", "mbq16")
            assert target.engines(("onnx", "tvm")) == (target.gpu.engine,)
            assert target.gpu.dialect in ("opencl", "wgsl")
            groups = target.gpu.work_groups
            assert groups.rows in (1, 2, 4)
            assert groups.chunk % groups.tile == 0
            assert groups.matmul_threads <= 256  # what WebGPU promises everywhere
        else:
            assert (target.name, target.arch, target.layout) == ("portable", "any", "nbits")


def test_dot_product_kernels_only_where_the_board_must_have_it() -> None:
    for target in TARGETS.values():
        assert (target.isa in ("neon-dotprod", "neon-i8mm")) == ("asimddp" in target.features)
        assert (target.isa == "neon-i8mm") == ("i8mm" in target.features)
        assert (target.isa == "vnni512") == ("avx512_vnni" in target.features)
        assert (target.isa == "avx-vnni") == ("avx_vnni" in target.features)


@pytest.mark.parametrize(
    ("arch", "features", "best"),
    [
        ("aarch64", ("asimd",), "rpi4"),
        ("aarch64", ("asimd", "asimddp"), "arm64"),
        ("aarch64", ("asimd", "asimddp", "i8mm"), "arm64-i8mm"),
        ("x86_64", TARGETS["x86-64-v4"].features, "x86-64-v4"),
        ("x86_64", TARGETS["x86-64-v3-vnni"].features, "x86-64-v3-vnni"),
        ("x86_64", TARGETS["x86-64-v3"].features, "x86-64-v3"),
        ("x86_64", ("sse4_2",), "portable"),
        ("riscv64", (), "portable"),
    ],
)
def test_host_becomes_the_best_row(arch: str, features: tuple[str, ...], best: str) -> None:
    assert best_for(Machine(arch, frozenset(features))).name == best


def test_resolve() -> None:
    assert resolve("rpi5") is TARGETS["rpi5"]
    assert resolve("host") in TARGETS.values()
    with pytest.raises(
        UsageError, match=r"target 'rpi3' is not known; choose one of: host, arm64, arm64-i8mm, rpi4, rpi5"
    ):
        resolve("rpi3")
