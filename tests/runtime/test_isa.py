from __future__ import annotations

import platform
import sysconfig
from pathlib import Path

import pytest

from mbq_runtime import BundleError
from mbq_runtime.bundle import isa
from mbq_runtime.bundle.facts import TargetFacts

AT_HWCAP, AT_HWCAP2 = 16, 26

# What the kernel hands a process on these processors.
CORTEX_A72 = {AT_HWCAP: 0x887, AT_HWCAP2: 0}
CORTEX_A76 = {AT_HWCAP: 0x119FFF, AT_HWCAP2: 0}
NEOVERSE_V2 = {AT_HWCAP: 1 << 1 | 1 << 9 | 1 << 10 | 1 << 20 | 1 << 22, AT_HWCAP2: 1 << 1 | 1 << 13 | 1 << 14}

ARM64 = TargetFacts("arm64", "onnx", "aarch64", "generic", ("asimd", "asimddp"))
RPI4 = TargetFacts("rpi4", "onnx", "aarch64", "cortex-a72", ("asimd",))
AVX2 = TargetFacts("x86-64-v3", "onnx", "x86_64", "x86-64-v3", ("avx2", "fma", "f16c"))
PORTABLE = TargetFacts("portable", "onnx", "any", "", ())


def arm(values: dict[int, int]) -> isa.Machine:
    return isa.this_machine(arch="aarch64", auxiliary_value=lambda kind: values[kind])


def x86(tmp_path: Path, *flags: str) -> isa.Machine:
    (tmp_path / "proc").mkdir()
    text = "".join(f"processor\t: {i}\nmodel name\t: CPU\nflags\t\t: {f}\n\n" for i, f in enumerate(flags))
    (tmp_path / "proc/cpuinfo").write_text(text)
    return isa.this_machine(root=tmp_path, arch="x86_64")


def test_arm64_features_by_processor() -> None:
    assert {"asimd", "crc32"} <= arm(CORTEX_A72).features
    assert not {"asimddp", "asimdhp", "i8mm", "sve"} & arm(CORTEX_A72).features
    assert {"asimd", "asimddp", "fphp", "asimdhp"} <= arm(CORTEX_A76).features
    assert "i8mm" not in arm(CORTEX_A76).features
    assert {"asimddp", "i8mm", "bf16", "sve", "sve2"} <= arm(NEOVERSE_V2).features


def test_x86_features_are_those_of_every_processor(tmp_path: Path) -> None:
    machine = x86(tmp_path, "fpu avx2 fma f16c avx512_vnni", "fpu avx2 fma f16c")
    assert machine.arch == "x86_64"
    assert machine.features == {"fpu", "avx2", "fma", "f16c"}


def test_x86_without_cpuinfo_promises_nothing(tmp_path: Path) -> None:
    machine = isa.this_machine(root=tmp_path, arch="amd64")
    assert machine == isa.Machine("x86_64", frozenset())
    with pytest.raises(BundleError, match="lacks avx2, fma, f16c"):
        isa.check(AVX2, machine)


def test_other_architectures_have_no_features() -> None:
    assert isa.this_machine(arch="riscv64") == isa.Machine("riscv64", frozenset())
    assert isa.this_machine(arch="arm64", auxiliary_value=lambda _: 0).arch == "aarch64"


def test_bundles_that_run(tmp_path: Path) -> None:
    isa.check(ARM64, arm(CORTEX_A76))
    isa.check(RPI4, arm(CORTEX_A72))
    isa.check(AVX2, x86(tmp_path, "avx2 fma f16c"))
    for machine in (arm(CORTEX_A72), isa.Machine("riscv64", frozenset())):
        isa.check(PORTABLE, machine)


def test_dot_product_bundle_on_a_processor_without() -> None:
    with pytest.raises(BundleError) as caught:
        isa.check(ARM64, arm(CORTEX_A72))
    assert str(caught.value) == (
        "the bundle is for target arm64 (aarch64 with asimd, asimddp), but this aarch64 machine lacks asimddp; "
        "export it again with mbq-export --target TARGET for this machine, or --target portable for any"
    )


def test_arm64_bundle_on_x86(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"target arm64 \(aarch64 with asimd, asimddp\), but this machine is x86_64"):
        isa.check(ARM64, x86(tmp_path, "avx2"))


def test_this_machine_is_described() -> None:
    machine = isa.this_machine()
    assert machine.arch == {"arm64": "aarch64", "AMD64": "x86_64"}.get(platform.machine(), platform.machine())
    always = {"x86_64": "sse2", "aarch64": "asimd"}
    if machine.arch in always:
        assert always[machine.arch] in machine.features


@pytest.mark.parametrize(
    ("config", "shown", "words"),
    [
        ({}, "64-bit Python with glibc", None),
        ({"SIZEOF_VOID_P": 4, "SOABI": "cpython-311-arm-linux-gnueabihf"}, "32-bit Python with glibc", "64-bit system"),
        ({"SOABI": "cpython-312-aarch64-linux-musl"}, "64-bit Python with musl", "need glibc"),
        (
            {"SOABI": "cpython-312", "HOST_GNU_TYPE": "x86_64-alpine-linux-musl"},
            "64-bit Python with musl",
            "need glibc",
        ),
    ],
)
def test_a_system_without_engines(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, object], shown: str, words: str | None
) -> None:
    real = sysconfig.get_config_var
    monkeypatch.setattr(sysconfig, "get_config_var", lambda key: config.get(key, real(key)))
    machine = arm(CORTEX_A76)
    assert shown in str(machine)
    problem = isa.problem(ARM64, machine)
    assert problem is None if words is None else words in str(problem)
    # Distributions with musl can have an engine of their own, which runs stock operators.
    assert (isa.problem(PORTABLE, machine) is None) == ("32" not in shown)
