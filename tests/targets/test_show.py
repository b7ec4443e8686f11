"""``python -m mbq_targets.show``: the list of kernels, their text, and what it refuses."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from mbq_runtime.errors import UsageError
from mbq_targets.show import main


def shown(*arguments: str) -> str:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.heavy
def test_kernels_of_a_processor() -> None:
    by_depth = [f"{kind}_d{depth}" for kind in ("gemv", "few", "gemm", "gather") for depth in (1, 2, 3)]
    names = shown("rpi5", "--slices", "2,2,4").split()
    assert sorted(names) == sorted(["quantize", "router_sums", "gate_silu", "gate_gelu_tanh", *by_depth])
    assert "def mbq_gemv_d2" in shown("rpi5", "gemv_d2")
    assert 'target triple = "aarch64-linux-gnu"' in shown("rpi5", "gather_d1", "--llvm")
    assembly = shown("rpi5", "gemv_d2", "--asm")
    assert "mbq_gemv_d2" in assembly
    assert "sdot" in assembly
    assert "mbq_gemv_d3" not in assembly


@pytest.mark.parametrize(("target", "text"), [("webgpu", "@compute"), ("android-mali", "__kernel void")])
def test_kernels_of_a_gpu(target: str, text: str) -> None:
    assert shown(target).split() == ["gather", "norm", "matmul", "rotate", "attend", "gate", "argmax"]
    for name in ("matmul", "attend"):
        assert text in shown(target, name, "--asm")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rpi3",), "target 'rpi3' is not known"),
        (("portable",), "target portable: it runs stock operators and has no kernels"),
        (("rpi5", "gemv_d9"), "target rpi5: it has no kernel 'gemv_d9'; choose one of few_d1, few_d2, "),
        (("webgpu", "matmul", "--llvm"), "a kernel of a GPU has no LLVM text"),
        (("rpi5", "--slices", "3,3"), "slice widths 3,3"),
    ],
)
def test_refusals(arguments: tuple[str, ...], message: str) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == UsageError.exit_code
    assert result.output.startswith("mbq_targets.show: error: ")
    assert message in result.output
