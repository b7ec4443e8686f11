"""A bundle runs without its deeper slices: while it is pulled, and trimmed.  It never reads what is not there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from family_exports import FamilyExport
from file_server import serving
from undivided import undivided

from mbq_runtime import BundleError, Engine, Generation, UsageError
from mbq_runtime.bundle import listed_files, manifest
from mbq_runtime.bundle.listed_files import file_entries
from mbq_runtime.bundle.verify import verify
from mbq_runtime.engine import Session
from mbq_runtime.pull import Incoming, Source, pull, trim
from mbq_runtime.pull.incoming import runs_in_part
from mbq_runtime.trust import code

pytestmark = pytest.mark.heavy

CHUNK_BYTES = 4096
PROMPT = np.random.default_rng(5).integers(0, 256, 12).tolist()
STEP = 5  # tokens between two rises of the ceiling


@pytest.fixture(scope="module")
def exported(bundles_8_bits: Callable[[str], Path]) -> Path:
    """A bundle for this machine and both of its engines."""
    return bundles_8_bits("llama")


@pytest.fixture(scope="module")
def portable(families: Callable[[str], FamilyExport]) -> Path:
    return families("llama").portable


def in_small_chunks(bundle: Path, copy: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a bundle whose files have hashes of small chunks, as those of a large model."""
    shutil.copytree(bundle, copy)
    found = manifest.read(copy)
    monkeypatch.setattr(listed_files, "CHUNK_BYTES", CHUNK_BYTES)
    manifest.write(replace(found, files=file_entries(copy)), copy)
    return copy


def spoken(reply: Generation, rises: Sequence[Callable[[], object]]) -> tuple[int, ...]:
    """The tokens of a reply whose ceiling rises again and again."""
    with reply:
        for count, _ in enumerate(reply, 1):
            if count % STEP == 0 and count < 3 * STEP:
                rises[count // STEP - 1]()
    return reply.stats.tokens


class Gates:
    """A server that sends the chunks of a depth when its gate is opened; those of depth 1 at once."""

    def __init__(self, found: manifest.Manifest) -> None:
        depths = range(1, found.profile.depths)
        self.held = [
            {name: -(-size // CHUNK_BYTES) * CHUNK_BYTES for name, size in found.needed_bytes(depth).items()}
            for depth in depths
        ]
        self.gates = [threading.Event() for _ in depths]

    def change(self, path: str, begin: int, data: bytes) -> bytes:
        name = path.rpartition("/bundle/")[2]
        for held, gate in zip(self.held, self.gates, strict=True):
            if begin >= held.get(name, 1 << 60):
                gate.wait(60)
        return data

    def open(self, *depths: int) -> None:
        """Let depths of at least 2 come; all without any."""
        for depth in depths or range(2, len(self.gates) + 2):
            self.gates[depth - 2].set()


@pytest.mark.parametrize("engine", ["onnx", "tvm"])
def test_it_speaks_from_its_first_slices(
    engine: str, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Poison stands where deeper slices will be.  The reply is that of the whole bundle under the same ceilings."""
    monkeypatch.setenv("MBQ_CACHE_DIR", str(tmp_path / "cache"))
    published = in_small_chunks(exported, tmp_path / "served" / "bundle", monkeypatch)
    found = manifest.read(published)
    assert runs_in_part(found, engine)
    gates = Gates(found)
    with serving(tmp_path / "served") as server:
        server.change = gates.change
        incoming = Incoming(Source.of(f"{server.url}/bundle"))
        try:
            folder = incoming.folder(engine)
            assert folder.name.endswith(".part")
            poisoned, held = 0, gates.held[0]
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
            bits = found.profile.depth_bits

            def second() -> None:
                gates.open(2)
                while early.ceiling_bits != bits[1]:
                    time.sleep(0.01)

            def rest() -> None:
                gates.open()
                incoming.wait()

            tokens = spoken(early.generate(PROMPT, max_tokens=3 * STEP, avg_bits=5.0), [second, rest])
        finally:
            gates.open()
            incoming.wait()
    assert incoming.whole is not None, incoming.error
    assert (early.ceiling_bits, early.avg_bits, early.path) == (None, 5.0, incoming.whole.folder)
    verify(incoming.whole.folder)

    early.sleep()
    assert early.generate("A", max_tokens=2).text() == early.generate("A", max_tokens=2).text()
    whole = Engine.load(incoming.whole.folder, threads=1, engine=engine)
    whole.ceiling_bits = bits[0]
    rises = [lambda ceiling=ceiling: setattr(whole, "ceiling_bits", ceiling) for ceiling in (bits[1], None)]
    assert tokens == spoken(whole.generate(PROMPT, max_tokens=3 * STEP, avg_bits=5.0), rises)
    assert len(tokens) == 3 * STEP


def test_a_server_answers_while_its_bundle_comes(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MBQ_CACHE_DIR", str(tmp_path / "cache"))
    gates = Gates(manifest.read(in_small_chunks(exported, tmp_path / "served" / "bundle", monkeypatch)))
    small = f"from mbq_runtime.bundle import listed_files; listed_files.CHUNK_BYTES = {CHUNK_BYTES}"
    program = f"{small}; from mbq_runtime.cli import main; main()"
    with serving(tmp_path / "served") as server:
        server.change = gates.change
        arguments = ["serve", f"{server.url}/bundle", "--port", "0", "--threads", "1", "--bits", "6", "--trust"]
        with subprocess.Popen(
            [sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True
        ) as process:
            try:
                assert process.stdout is not None
                address = process.stdout.readline().split()[1].removesuffix("/v1")

                def ask(path: str, body: dict[str, object] | None = None) -> Any:
                    data = None if body is None else json.dumps(body).encode()
                    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"})
                    with urllib.request.urlopen(request, timeout=60) as answer:
                        return json.load(answer)

                assert ask("/health")["ceiling_bits"] == 3
                completion = {"model": "llama", "prompt": "A", "max_tokens": 4}
                assert ask("/v1/completions", completion)["usage"]["avg_bits"] == 3
                gates.open()
                while ask("/health")["ceiling_bits"] < 8:
                    time.sleep(0.05)
                assert ask("/v1/completions", completion)["usage"]["avg_bits"] > 3
            finally:
                gates.open()
                process.terminate()
                process.wait(30)


ENGINES = ["onnx", "tvm", "portable"]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("bits", [3, 4.5, 6])
def test_a_trimmed_bundle_gives_the_tokens_of_the_whole(
    engine: str, bits: float, exported: Path, portable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the same ceiling, at each budget that is left."""
    name = None if engine == "portable" else engine
    bundle = in_small_chunks(portable if name is None else exported, tmp_path / "bundle", monkeypatch)
    found = trim(bundle, tmp_path / "small", bits).manifest
    assert found.budget.max_bits == int(bits)
    verified = verify(tmp_path / "small")
    sizes = [sum(path.stat().st_size for path in folder.iterdir()) for folder in (tmp_path / "small", bundle)]
    assert verified == found == manifest.read(tmp_path / "small")
    assert found.total_bytes < manifest.read(bundle).total_bytes - (sizes[1] - sizes[0]) / 2
    whole, small = (Engine.load(folder, threads=1, engine=name) for folder in (bundle, tmp_path / "small"))
    whole.ceiling_bits = bits
    for budget in (3.0, min(3.6, found.budget.max_bits), found.budget.max_bits):
        wanted, given = (e.generate(PROMPT, max_tokens=8, avg_bits=budget) for e in (whole, small))
        assert given.text() == wanted.text()
        assert given.stats.tokens == wanted.stats.tokens
        assert given.stats.avg_bits_used == wanted.stats.avg_bits_used <= bits
        np.testing.assert_array_equal(small.logits(PROMPT, budget).logits, whole.logits(PROMPT, budget).logits)
    assert small.avg_bits == found.budget.max_bits
    assert small.generate(PROMPT, max_tokens=2).text() is not None
    with pytest.raises(UsageError, match=f"takes a number from 3 to {found.budget.max_bits:g}"):
        small.avg_bits = 8.0
    if name == "onnx":
        session = Session(tmp_path / "small", threads=1).run(PROMPT, 3.6 if bits > 3 else 3.0)
        assert np.isfinite(session.logits).all()


def test_a_trimmed_bundle_can_be_published_and_completed(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MBQ_CACHE_DIR", str(tmp_path / "cache"))
    bundle = in_small_chunks(exported, tmp_path / "served" / "bundle", monkeypatch)
    small = trim(bundle, tmp_path / "served" / "small", 6).manifest
    with serving(tmp_path / "served") as server:
        again = pull(Source.of(f"{server.url}/small"), tmp_path / "again")
        assert again.manifest == small
        assert again.fetched_bytes == small.total_bytes
        place, less = tmp_path / "place", pull(Source.of(f"{server.url}/bundle"), tmp_path / "place", max_bits=4)
        assert less.manifest == small.limited(2)
        assert less.fetched_bytes == less.manifest.total_bytes
        more = pull(Source.of(f"{server.url}/bundle"), place)
    assert more.manifest == verify(place)
    assert not more.manifest.trimmed
    assert more.fetched_bytes == more.manifest.total_bytes - less.manifest.total_bytes
    shrunk = pull(Source.of(f"file:{bundle}"), place, max_bits=3)
    assert shrunk.fetched_bytes == 0
    assert verify(place) == shrunk.manifest == small.limited(1)


def test_a_bundle_is_trimmed_to_where_a_link_leads(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, link = in_small_chunks(exported, tmp_path / "bundle", monkeypatch), tmp_path / "link"
    link.symlink_to(tmp_path / "disk" / "small")
    trim(bundle, link, 4)
    assert link.is_symlink()
    assert verify(tmp_path / "disk" / "small").trimmed
    (tmp_path / "itself").symlink_to(tmp_path / "itself")
    with pytest.raises(UsageError, match="itself: its links lead to themselves; choose another folder"):
        trim(bundle, tmp_path / "itself", 4)


def test_what_cannot_be_trimmed(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = in_small_chunks(exported, tmp_path / "bundle", monkeypatch)
    (tmp_path / "there").mkdir()
    for bits, place, message in (
        (2.5, "new", "--max-bits 2.5: the bundle has depths of 3, 4, 6, 8 bits; give at least 3"),
        (8, "new", "--max-bits 8: the bundle has no depth of more bits, its most are 8"),
        (4, "there", "there: it exists; choose another folder"),
    ):
        with pytest.raises(UsageError, match=message):
            trim(bundle, tmp_path / place, bits)
    weights = bundle / "model.onnx.data"
    content = bytearray(weights.read_bytes())
    content[5000] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BundleError, match=r"model\.onnx\.data: bytes 4096 to 8192 came"):
        trim(bundle, tmp_path / "new", 4)
    assert not (tmp_path / "new").exists()
    found = manifest.read(bundle)
    manifest.write(replace(found, parts=undivided(found.files)), bundle)
    with pytest.raises(BundleError, match="not divided by depth, so it cannot be trimmed"):
        trim(bundle, tmp_path / "newer", 4)


@pytest.mark.parametrize("text", ["", "{}", '{"depth": 0}', '{"depth": 9}', '{"depth": "2"}', '{"depth": 2.0}', "[2]"])
def test_a_broken_trim_file_is_refused(text: str, exported: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(exported, tmp_path / "bundle"))
    (bundle / "trim.json").write_text(text)
    with pytest.raises(BundleError, match=r"trim\.json: .*pull or trim the bundle again"):
        manifest.read(bundle)


def test_a_short_file_is_no_trimmed_bundle(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = in_small_chunks(exported, tmp_path / "bundle", monkeypatch)
    trim(bundle, tmp_path / "small", 4)
    (tmp_path / "small" / "trim.json").unlink()
    with pytest.raises(BundleError, match="an incomplete copy"):
        verify(tmp_path / "small")
    (tmp_path / "small" / "trim.json").write_text('{"depth": 1}')
    with pytest.raises(BundleError, match="an incomplete copy"):
        Engine.load(tmp_path / "small")


def test_what_cannot_run_in_part(exported: Path) -> None:
    found = manifest.read(exported)
    assert not runs_in_part(replace(found, layout="nbits"), "onnx"), "ONNX Runtime copies stock operands"
    assert not runs_in_part(found, "webgpu")
    assert not runs_in_part(replace(found, parts=undivided(found.files)), "onnx")
