"""How the page fetches weights: in the order of depth, each chunk checked, from servers of every kind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import nodes
import numpy as np
import pytest
from file_server import FileServer
from sites import damaged, ends_after, serving, weight_ranges

from mbq_runtime.bundle.layout import PAGE_BYTES
from mbq_runtime.bundle.listed_files import CHUNK_BYTES

WEIGHTS = "gpu/weights.bin"
SIZE = 4 * CHUNK_BYTES + 5 * PAGE_BYTES
ENDS = (CHUNK_BYTES // 2, CHUNK_BYTES - PAGE_BYTES, 2 * CHUNK_BYTES + PAGE_BYTES, SIZE)
"""Where the four depths end: the first two in one chunk."""
READ = """
const { createHash } = await import("node:crypto");
const { Bundle } = await import("./src/bundle.js");
const { Store } = await import("./src/store.js");
const errors = [];
try {
  const bundle = await Bundle.open(given.url, await Store.open(), { depth: given.depth });
  const found = [], { startBytes, totalBytes } = await bundle.sizes();
  for (let times = 0; times < 5; times++) {
    try {
      for await (const { index, bytes, depth } of bundle.weights(found.length)) {
        found.push([index, depth, createHash("sha256").update(bytes).digest("hex")]);
      }
      break;
    } catch (error) {
      errors.push([error.kind, error.message]);
      if (error.kind !== "network") break;
    }
  }
  return { found, errors, startBytes, totalBytes };
} catch (error) {
  return { found: [], errors: [[error.kind, error.message]] };
}
"""


@pytest.fixture(scope="module")
def weights() -> bytes:
    return np.random.default_rng(1).bytes(SIZE)


@pytest.fixture
def bundle(weights: bytes, tmp_path: Path) -> Path:
    """What of a bundle a download looks at."""
    (tmp_path / "gpu").mkdir()
    (tmp_path / WEIGHTS).write_bytes(weights)
    begins = (0, *ENDS[:-1])
    manifest = {
        "format": "mbq-bundle", "format_version": 3, "engines": ["webgpu"], "slices": [3, 1, 2, 2],
        "files": [{"name": WEIGHTS, "size": SIZE, "sha256": sha256(weights).hexdigest(), "chunks": hashes(weights)}],
        "parts": [[{"name": WEIGHTS, "begin": a, "end": b}] for a, b in zip(begins, ENDS, strict=True)],
    }  # fmt: skip
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


@pytest.fixture
def site(bundle: Path) -> Iterator[FileServer]:
    with serving(bundle) as found:
        yield found


def hashes(content: bytes) -> list[str]:
    return [sha256(content[at : at + CHUNK_BYTES]).hexdigest() for at in range(0, len(content), CHUNK_BYTES)]


def read(site: FileServer, depth: int | None = None) -> Any:
    return nodes.run(READ, {"url": site.url, "depth": depth})


WHOLE = [2, 0, 3, 0, 4]
"""The depth that is whole after each chunk, 0 for none."""


def test_chunks_come_in_the_order_of_depth(site: FileServer, weights: bytes) -> None:
    done = read(site)
    assert done["errors"] == []
    assert done["found"] == [[at, WHOLE[at], digest] for at, digest in enumerate(hashes(weights))]
    # One request for each depth that has chunks of its own.
    ends = (CHUNK_BYTES, 3 * CHUNK_BYTES, SIZE)
    assert weight_ranges(site) == list(zip((0, *ends[:-1]), ends, strict=True))
    assert (done["startBytes"], done["totalBytes"]) == (CHUNK_BYTES, SIZE)


def test_a_server_without_ranges_sends_the_file_once(site: FileServer, weights: bytes) -> None:
    site.ranges = False
    done = read(site)
    assert done["errors"] == []
    assert [digest for _, _, digest in done["found"]] == hashes(weights)
    assert len(weight_ranges(site)) == 1


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_goes_on_where_it_broke_off(site: FileServer, weights: bytes, ranges: bool) -> None:
    ends = ends_after(CHUNK_BYTES + 1000)

    def change(path: str, begin: int, data: bytes) -> bytes:
        return ends(path, begin, data) if len(weight_ranges(site)) < 3 else data

    site.ranges, site.change = ranges, change
    done = read(site)
    assert {kind for kind, _ in done["errors"]} == {"network"}
    assert [digest for _, _, digest in done["found"]] == hashes(weights)
    if ranges:
        begins = [begin for begin, _ in weight_ranges(site)]
        assert begins[-1] == 3 * CHUNK_BYTES
        assert begins.count(0) == 1


def test_a_chunk_that_was_damaged_on_the_way_is_fetched_again(site: FileServer, weights: bytes) -> None:
    def damage(path: str, begin: int, data: bytes) -> bytes:
        asked = weight_ranges(site)
        return bytes([data[0] ^ 1]) + data[1:] if len(asked) == 2 and begin == asked[1][0] else data

    site.change = damage
    done = read(site)
    assert done["errors"] == []
    assert [digest for _, _, digest in done["found"]] == hashes(weights)
    assert len(weight_ranges(site)) > 3


def test_a_damaged_file_is_refused_in_one_line(site: FileServer) -> None:
    site.change = damaged
    done = read(site)
    ((kind, message),) = done["errors"]
    assert kind == "broken"
    assert "gpu/weights.bin: its SHA-256 is" in message
    assert "copy the bundle again" in message
    assert len(weight_ranges(site)) == 3


def test_a_trimmed_bundle_ends_behind_its_depth(site: FileServer, weights: bytes) -> None:
    done = read(site, depth=3)
    assert [digest for _, _, digest in done["found"]] == hashes(weights)[:3]
    assert done["found"][-1][1] == 3


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"format_version": 2}, "broken", "it is mbq-bundle 2, needed mbq-bundle 3; export the bundle again"),
        ({"engines": ["onnx"]}, "usage", "the bundle is for onnx, a browser needs webgpu; export it with --target"),
    ],
)
def test_another_bundle_is_refused(site: FileServer, change: dict[str, Any], kind: str, message: str) -> None:
    path = site.root / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    ((found, said),) = read(site)["errors"]
    assert found == kind
    assert message in said


CACHED = """
const { createHash } = await import("node:crypto");
const { Bundle } = await import("./src/bundle.js");
const { Store } = await import("./src/store.js");
// A browser's own cache, which holds what a server sent before an export.
const send = fetch, stale = new Map(Object.entries(given.stale)), asked = [];
globalThis.fetch = async (url, { cache, ...options }) => {
  const name = url.slice(given.url.length + 1);
  asked.push([name, cache]);
  return cache === "default" && stale.has(name) ? new Response(stale.get(name)) : send(url, options);
};
const bundle = await Bundle.open(given.url, await Store.open());
return { plan: await bundle.plan(), asked };
"""


def test_what_the_browser_kept_of_an_earlier_export_is_asked_for_again(site: FileServer) -> None:
    plan, manifest = b'{"new": true}', json.loads((site.root / "manifest.json").read_text())
    (site.root / "gpu/plan.json").write_bytes(plan)
    manifest["files"].append({"name": "gpu/plan.json", "size": len(plan), "sha256": sha256(plan).hexdigest()})
    (site.root / "manifest.json").write_text(json.dumps(manifest))
    stale = {"manifest.json": json.dumps(manifest | {"format_version": 1}), "gpu/plan.json": '{"new": false}'}
    done = nodes.run(CACHED, {"url": site.url, "stale": stale})
    assert done["plan"] == {"new": True}
    assert done["asked"] == [["manifest.json", "no-cache"], ["gpu/plan.json", "default"], ["gpu/plan.json", "reload"]]


KEPT = """
const { Bundle } = await import("./src/bundle.js");
const { Store } = await import("./src/store.js");
const found = new Map();
const store = new Store({
  match: async key => found.get(key)?.clone(),
  put: async (key, answer) => void found.set(key, answer),
});
const opens = async () => {
  try {
    return (await Bundle.open(given.url, store)).deepest;
  } catch (error) {
    return error.kind;
  }
};
globalThis.location = { href: given.url };
const send = fetch, results = [await opens()];
globalThis.fetch = async () => new Response("<title>Log in to the network</title>");
results.push(await opens());
globalThis.fetch = async () => { throw new TypeError("offline"); };
results.push(await opens());
return results;
"""


def test_a_page_in_place_of_the_manifest_does_not_replace_the_kept_one(site: FileServer) -> None:
    assert nodes.run(KEPT, {"url": site.url}) == [4, "broken", 4]


def test_a_server_that_is_not_there(site: FileServer) -> None:
    (site.root / "manifest.json").unlink()
    assert read(site)["errors"] == [["network", f"{site.url}/manifest.json: the server says 404"]]
