"""A tiny model on OpenCL and on WebGPU returns what it returns on the processor, and fails in one line."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import needs
import numpy as np
import pytest
from family_exports import FamilyExport
from guesses import assert_guesses_change_nothing

from mbq_export.format.router import RouterParams, threshold_at
from mbq_runtime import BundleError, Engine, UsageError
from mbq_runtime.bundle import gpu_plan
from mbq_runtime.bundle import manifest as bundle_manifest
from mbq_runtime.bundle.check import check_contents
from mbq_runtime.bundle.listed_files import file_entries
from mbq_runtime.engine import opencl
from mbq_runtime.engine.gpu import DeviceBackend, Limits, thresholds
from mbq_targets.gpu.matmul import scale_words

pytestmark = pytest.mark.heavy

TARGETS = {"opencl": "android-adreno", "webgpu": "webgpu"}
PROMPT = np.random.default_rng(5).integers(0, 256, 64).tolist()  # two chunks
CONTEXT = 128


@pytest.fixture(autouse=True)
def binary_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test has a cache of its own."""
    monkeypatch.setenv("MBQ_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def bundles(families: Callable[[str], FamilyExport]) -> Path:
    """A folder of bundles of one random Llama (grouped queries, a learned router): ``llama-TARGET``."""
    return families("llama").portable.parent


@pytest.fixture(scope="module")
def on_cpu(bundles: Path) -> Engine:
    return Engine.load(bundles / "llama-portable", context=CONTEXT)


def loaded(bundles: Path, engine: str) -> Engine:
    needs.gpu(engine)
    return Engine.load(bundles / f"llama-{TARGETS[engine]}", context=CONTEXT)


@pytest.mark.parametrize("engine", TARGETS)
def test_tokens_and_logits_are_the_processors(bundles: Path, on_cpu: Engine, engine: str, tmp_path: Path) -> None:
    on_gpu = loaded(bundles, engine)
    assert on_gpu.name == engine
    for bits in (8.0, 4.5):
        replies = [e.generate(PROMPT, max_tokens=32, avg_bits=bits) for e in (on_cpu, on_gpu)]
        for reply in replies:
            reply.text()
        assert replies[0].stats.tokens == replies[1].stats.tokens
        assert replies[1].stats.avg_bits_used == pytest.approx(replies[0].stats.avg_bits_used, abs=0.05)
    want, found = (e.logits(PROMPT[:40], 6.0) for e in (on_cpu, on_gpu))
    assert np.linalg.norm(found.logits - want.logits) < 1e-3 * np.linalg.norm(want.logits)
    assert found.avg_bits_used == pytest.approx(want.avg_bits_used, abs=0.05)

    # A new budget applies from the next token.
    reply = on_gpu.generate(PROMPT, max_tokens=12, avg_bits=8)
    for i, _ in enumerate(reply):
        if i == 3:
            on_gpu.avg_bits = 3
    assert reply.stats.bits[-4:] == pytest.approx([3.0] * 4)
    assert reply.stats.bits[0] == pytest.approx(8.0)

    # A session reads what is new, and says what an empty context says.
    session, talk = on_gpu.session(), PROMPT[:40]
    for cached in (0, 40 + 5, 20):
        replies = [on_gpu.generate(talk, max_tokens=6, session=kept, avg_bits=8) for kept in (session, None)]
        for reply in replies:
            reply.text()
        assert replies[0].stats.tokens == replies[1].stats.tokens
        assert replies[0].stats.cached_tokens == cached
        talk = [*talk, *replies[0].stats.tokens, 3] if cached == 0 else [*PROMPT[:20], 1, 2]

    # A session goes on from its file.
    on_gpu.save_session(session, tmp_path / "file")
    found = on_gpu.load_session(tmp_path / "file")
    replies = [on_gpu.generate([*talk, 4, 5], max_tokens=6, session=kept, avg_bits=8) for kept in (found, None)]
    for reply in replies:
        reply.text()
    assert replies[0].stats.tokens == replies[1].stats.tokens
    assert replies[0].stats.cached_tokens == len(talk)

    assert_guesses_change_nothing(on_gpu, replies=8, tokens=24)

    # The same seed gives the same sampled reply.
    twice = [on_gpu.generate(PROMPT[:9], max_tokens=6, temperature=2.0, seed=4, avg_bits=8) for _ in range(2)]
    assert twice[0].text() == twice[1].text()


def test_the_plan_counts_what_a_depth_reads(bundles: Path) -> None:
    folder = bundles / "llama-webgpu"
    manifest, plan = bundle_manifest.read(folder), gpu_plan.read_plan(folder)
    check_contents(folder, manifest)
    planes = {
        depth: sum(size.weight_bytes[depth - 1] for size in plan.decode_launches if size.kernel.startswith("matmul"))
        for depth in range(1, 5)
    }
    scales = sum(4 * scale_words(m.N, m.K, manifest.group_size, 1) for m in manifest.weights.linears)
    padded = sum(-(-m.N // 16) * 16 * m.K for m in manifest.weights.linears)
    for depth, bits in enumerate(manifest.profile.depth_bits, 1):
        assert planes[depth] == padded * bits // 8 + scales
        assert plan.bytes_per_token(depth) > planes[depth]
    assert len(plan.programs["token"]) == 1 + 2 * 10


def test_slices_lie_in_order_of_depth(bundles: Path) -> None:
    for target in TARGETS.values():
        folder = bundles / f"llama-{target}"
        manifest, plan = bundle_manifest.read(folder), gpu_plan.read_plan(folder)
        assert len(manifest.parts) == manifest.profile.depths
        ranges = [part[0] for part in manifest.parts]
        sliced = [buffer for name, buffer in plan.buffers.items() if name.endswith(".planes")]
        assert len(sliced) == len(manifest.weights.linears)  # the table of the head is that of the embedding
        for buffer in sliced:
            bits = [piece.bytes * 8 for piece in buffer.content]
            assert [size / sum(bits) * 8 for size in bits] == list(manifest.slices)
            for found, piece in zip(ranges, buffer.content, strict=True):
                assert found.begin <= piece.offset <= piece.offset + piece.bytes <= found.end
        for name, buffer in plan.buffers.items():
            if not buffer.pieces and buffer.offset >= 0:
                assert buffer.offset + buffer.bytes <= ranges[0].end, name


def test_pieces_that_make_no_whole(bundles: Path, tmp_path: Path) -> None:
    def shorten(folder: Path) -> None:
        plan = json.loads((folder / gpu_plan.PLAN).read_text())
        plan["buffers"]["head.planes"]["pieces"].pop()
        (folder / gpu_plan.PLAN).write_text(json.dumps(plan))

    folder = broken(bundles, tmp_path, shorten)
    with pytest.raises(BundleError, match=r"the pieces of head\.planes do not make a whole"):
        check_contents(folder, bundle_manifest.read(folder))


def broken(bundles: Path, tmp_path: Path, change: Callable[[Path], object]) -> Path:
    folder = shutil.copytree(bundles / "llama-android-adreno", tmp_path / "bundle")
    change(folder)
    manifest = bundle_manifest.read(folder)
    bundle_manifest.write(replace(manifest, files=file_entries(folder)), folder)
    return folder


@pytest.mark.parametrize("depth", [1, 4])
def test_a_factor_of_a_row_that_is_no_number(bundles: Path, tmp_path: Path, depth: int) -> None:
    needs.gpu("opencl")
    name = "layers.1.mlp_in.scales"

    def harm(folder: Path) -> None:
        buffer = gpu_plan.read_plan(folder).buffers[name]
        with (folder / gpu_plan.WEIGHTS).open("r+b") as file:
            # The third row's, of 16 that lie side by side.
            file.seek(buffer.offset + 2 * (16 * (depth - 1) + 2))
            file.write(np.array([np.nan], np.float16).tobytes())

    with pytest.raises(BundleError, match=rf"{re.escape(name)} are not finite; export the bundle again"):
        Engine.load(broken(bundles, tmp_path, harm))


def test_a_compile_error_shows_the_drivers_log_and_leaves_the_bundle(bundles: Path, tmp_path: Path) -> None:
    needs.gpu("opencl")
    folder = broken(bundles, tmp_path, lambda f: (f / "gpu/argmax.cl").write_text("__kernel void argmax_kernel( {}"))
    before = file_entries(folder)
    with pytest.raises(BundleError, match=r"driver of .* does not compile the kernels: .*error") as caught:
        Engine.load(folder)
    assert "\n" not in str(caught.value)
    assert file_entries(folder) == before


def test_compiled_binaries_are_kept_for_the_next_start(bundles: Path, binary_cache: Path) -> None:
    needs.gpu("opencl")
    device = opencl.Device()
    folder = bundles / "llama-android-adreno"
    plan = gpu_plan.read_plan(folder)
    texts = {name: (folder / "gpu" / kernel.file).read_text() for name, kernel in plan.kernels.items()}
    device.compile(plan.kernels, texts, folder)
    (kept,) = binary_cache.rglob("*.clbin")
    fast = opencl.Device()
    fast.compile(plan.kernels, dict.fromkeys(texts, ""), folder)  # other texts, another binary
    assert len(list(binary_cache.rglob("*.clbin"))) == 2
    kept.write_bytes(b"what another driver left")
    device.compile(plan.kernels, texts, folder)
    assert kept.read_bytes() != b"what another driver left"


def test_a_device_with_too_little_is_named_with_what_it_has(bundles: Path) -> None:
    class SmallGpu:
        name = "a small GPU"
        limits = Limits(1000, 1024, 16384, 8)

    class Small(DeviceBackend):
        device_type = SmallGpu  # type: ignore[assignment]
        dialect = "wgsl"

    folder = bundles / "llama-webgpu"
    with pytest.raises(UsageError, match=r"needs \d+ bytes in one buffer, a small GPU has 1000"):
        Small(folder, bundle_manifest.read(folder), None)


def test_a_missing_package_names_its_extra(bundles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for engine, package in (("opencl", "pyopencl"), ("webgpu", "wgpu")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UsageError, match=rf"pip install 'mbq-export\[{engine}\]'"):
            Engine.load(bundles / f"llama-{TARGETS[engine]}")


def test_an_engine_the_bundle_has_not_got(bundles: Path) -> None:
    with pytest.raises(UsageError, match="the bundle has no engine onnx, only webgpu"):
        Engine.load(bundles / "llama-webgpu", engine="onnx")


def test_a_plan_that_does_not_fit_its_weights(bundles: Path, tmp_path: Path) -> None:
    def shorten(folder: Path) -> None:
        plan = json.loads((folder / gpu_plan.PLAN).read_text())
        planes = plan["buffers"]["head.planes"]
        for part in (planes, planes["pieces"][-1]):
            part["bytes"] -= 16
        (folder / gpu_plan.PLAN).write_text(json.dumps(plan))

    folder = broken(bundles, tmp_path, shorten)
    with pytest.raises(BundleError, match=r"head\.planes has \d+ bytes, needed \d+ \(264 x 192"):
        check_contents(folder, bundle_manifest.read(folder))


def test_thresholds_follow_the_budget_as_the_definition_does() -> None:
    budgets, levels = (3.0, 4.0, 8.0), (2.0, 0.5, -1.0)
    plan = type("P", (), {"tables": (gpu_plan.Table(budgets, levels),)})
    one = np.zeros(1, np.float32)
    params = RouterParams(one, one, np.array(budgets, np.float32), np.array(levels, np.float32))
    for bits in (3.2, 4.0, 7.5):
        assert thresholds(plan, bits)[0] == pytest.approx(threshold_at(bits, params))  # type: ignore[arg-type]
    assert thresholds(plan, 3.0)[0] > 1e38  # type: ignore[arg-type]
    assert thresholds(plan, 8.0)[0] < -1e38  # type: ignore[arg-type]
