"""A native bundle runs while it is pulled: it speaks from its first slices, and never reads what has not come."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from file_server import serving
from tiny_models import write_checkpoint

from mbq_export.cli import command
from mbq_runtime import Engine, Generation
from mbq_runtime.bundle import manifest
from mbq_runtime.pull import Incoming, Source
from mbq_runtime.pull.incoming import runs_in_part
from mbq_runtime.trust import code

pytestmark = pytest.mark.heavy

CHUNK_BYTES = 4096
PROMPT = np.random.default_rng(5).integers(0, 256, 12).tolist()
BEFORE, AFTER = 6, 10  # tokens


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, calibration_text: Path) -> Path:
    folder = tmp_path_factory.mktemp("comes")
    arguments = ["--target", "host", "--model", write_checkpoint(folder / "llama", "llama"), "--engine", "both"]
    arguments += ["--output", folder / "bundle", "--calib-data", calibration_text, "--router", "norm", "--json"]
    arguments += ["--calib-tokens", 512, "--method", "rtn"]
    command([str(argument) for argument in arguments], standalone_mode=False)
    return folder / "bundle"


def spoken(reply: Generation, raise_budget: Callable[[], object]) -> tuple[int, ...]:
    """The tokens of a reply whose budget rises after some pieces."""
    with reply:
        for count, _ in enumerate(reply, 1):
            if count == BEFORE:
                raise_budget()
    return reply.stats.tokens


@pytest.mark.parametrize("engine", ["onnx", "tvm"])
def test_it_speaks_from_its_first_slices(
    engine: str, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Poison stands where deeper slices will be.  The reply is that of the whole bundle under the same budgets."""
    monkeypatch.setattr(manifest, "CHUNK_BYTES", CHUNK_BYTES)
    monkeypatch.setenv("MBQ_CACHE_DIR", str(tmp_path / "cache"))
    published = Path(shutil.copytree(exported, tmp_path / "served" / "bundle"))
    before = manifest.file_entries(published)
    text = (published / "manifest.json").read_bytes()
    monkeypatch.setattr(manifest, "CHUNK_BYTES", 4 << 20)
    found = manifest.parse(text, "manifest.json")
    monkeypatch.setattr(manifest, "CHUNK_BYTES", CHUNK_BYTES)
    manifest.write(replace(found, files=before), published)
    found = manifest.read(published)
    assert runs_in_part(found, engine)
    held = {name: -(-size // CHUNK_BYTES) * CHUNK_BYTES for name, size in found.needed_bytes(1).items()}
    released = threading.Event()

    def wait(path: str, begin: int, data: bytes) -> bytes:
        if begin >= held.get(path.removeprefix("/bundle/"), 1 << 60):
            released.wait(60)
        return data

    with serving(tmp_path / "served") as server:
        server.change = wait
        incoming = Incoming(Source.of(f"{server.url}/bundle"))
        try:
            folder = incoming.folder(engine)
            assert folder.name.endswith(".part")
            poisoned = 0
            for entry in found.files:
                if held[entry.name] < entry.size:
                    with (folder / entry.name).open("r+b") as file:
                        file.seek(held[entry.name])
                        poisoned += file.write(b"\xa5" * (entry.size - held[entry.name]))
            assert poisoned > found.total_bytes * 0.1
            code.trust(found)
            early = Engine.load(folder, threads=1, engine=engine)
            incoming.follow(early)
            assert early.ceiling_bits == early.avg_bits == found.profile.min_bits

            def release() -> None:
                released.set()
                incoming.wait()

            tokens = spoken(early.generate(PROMPT, max_tokens=BEFORE + AFTER, avg_bits=8.0), release)
        finally:
            released.set()
            incoming.wait()
    assert incoming.whole is not None, incoming.error
    assert early.avg_bits == 8.0
    manifest.verify(incoming.whole.folder)

    whole = Engine.load(incoming.whole.folder, threads=1, engine=engine)

    def rise() -> None:
        whole.avg_bits = 8.0

    low = float(found.profile.min_bits)
    assert tokens == spoken(whole.generate(PROMPT, max_tokens=BEFORE + AFTER, avg_bits=low), rise)
    assert len(tokens) == BEFORE + AFTER


def test_what_cannot_run_in_part(exported: Path) -> None:
    found = manifest.read(exported)
    assert not runs_in_part(replace(found, layout="nbits"), "onnx"), "ONNX Runtime copies stock operands"
    assert not runs_in_part(found, "webgpu")
    assert not runs_in_part(replace(found, parts=manifest.undivided(found.files)), "onnx")
