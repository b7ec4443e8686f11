"""The page at /app: its files, those of its bundle, and the key."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest
from serving import Running, serve

from mbq_runtime import Engine, UsageError
from mbq_runtime.bundle import manifest as bundle_manifest
from mbq_runtime.server import app_page
from mbq_runtime.web import SITE, write_site


@pytest.fixture
def for_browsers(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny bundle, which says that it is for WebGPU.  What it lacks for that is not looked at."""
    folder = Path(shutil.copytree(bundle, tmp_path / "web"))
    found = bundle_manifest.read(folder)

    def check(asked: Path) -> bundle_manifest.Manifest:
        assert asked == folder
        return found

    monkeypatch.setattr(app_page, "check_for_browsers", check)
    return folder


@pytest.fixture
def app(engine: Engine, for_browsers: Path) -> Iterator[Running]:
    with serve(engine, app=for_browsers) as found:
        yield found


def test_the_page_and_its_bundle(app: Running, for_browsers: Path) -> None:
    with httpx2.Client(base_url=app.url) as client:
        moved = client.get("/app")
        assert moved.status_code == 307
        assert moved.headers["location"] == "app/"
        page = client.get("/app/")
        assert page.text == SITE["index.html"].read_text(encoding="utf-8")
        for name, file in SITE.items():
            assert client.get(f"/app/{name}").content == file.read_bytes()
        assert client.get("/app/mbq.js").headers["content-type"].startswith("text/javascript")
        assert client.get("/app/app.json").json() == {"bundle": "./bundle/", "depth": None}
        listed = json.loads((for_browsers / "manifest.json").read_text())["files"]
        for name in ["manifest.json", *(entry["name"] for entry in listed)]:
            assert client.get(f"/app/bundle/{name}").content == (for_browsers / name).read_bytes()
        whole = (for_browsers / "tokenizer.json").read_bytes()
        part = client.get("/app/bundle/tokenizer.json", headers={"Range": "bytes=3-9"})
        assert part.status_code == 206
        assert part.content == whole[3:10]


@pytest.mark.parametrize("name", ["nonesuch.js", "bundle/nonesuch", "bundle/../manifest.json", "bundle/%2e%2e/web/x"])
def test_nothing_else_is_served(app: Running, name: str) -> None:
    with httpx2.Client(base_url=app.url) as client:
        assert client.get(f"/app/{name}").status_code == 404


def test_the_bundle_needs_the_key(engine: Engine, for_browsers: Path) -> None:
    with serve(engine, app=for_browsers, api_key="sesame") as running, httpx2.Client(base_url=running.url) as client:
        assert client.get("/app/").status_code == 200
        assert client.get("/app/mbq.js").status_code == 200
        assert client.get("/app/bundle/manifest.json").status_code == 401
        given = {"Authorization": "Bearer sesame"}
        assert client.get("/app/bundle/manifest.json", headers=given).status_code == 200


def test_a_server_without_a_bundle_for_browsers(running: Running) -> None:
    answer = httpx2.get(f"{running.url}/app/")
    assert answer.status_code == 404
    assert "--app FOLDER" in answer.json()["error"]["message"]


def test_a_bundle_for_a_processor_is_refused(engine: Engine, bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the bundle is for onnx, a browser needs webgpu; export it with"):
        write_site(bundle, tmp_path / "site")
    assert not (tmp_path / "site").exists()


def test_a_folder_with_files_is_left_alone(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mbq_runtime.web

    found = bundle_manifest.read(bundle)
    monkeypatch.setattr(mbq_runtime.web, "check_for_browsers", lambda folder: replace(found))
    write_site(bundle, tmp_path / "site")
    assert (tmp_path / "site" / "index.html").is_file()
    assert (tmp_path / "site" / "bundle" / "manifest.json").read_bytes() == (bundle / "manifest.json").read_bytes()
    with pytest.raises(UsageError, match="not empty"):
        write_site(bundle, tmp_path / "site")
