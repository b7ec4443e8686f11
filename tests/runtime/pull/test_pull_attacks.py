"""Hostile servers and manifests: each is refused with one line, and leaves no bundle and no large file."""

from __future__ import annotations

import gzip
import json
import resource
from collections.abc import Callable
from hashlib import sha256
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from file_server import CHUNK_BYTES, WEIGHTS, FileServer
from tiny_bundle import write_manifest

from mbq_runtime.cli import main

Attack = Callable[[FileServer, Path], object]
Handler = BaseHTTPRequestHandler
LARGE = 100 << 40  # bytes


def manifest_with(where: str, value: Any) -> Attack:
    """A value of manifest.json.  where: names with dots between; the entry of a file by its name."""

    def change(server: FileServer, folder: Path) -> None:
        path = folder / "manifest.json"
        document = json.loads(path.read_text())
        place: Any = document
        *parents, last = where.split("/")
        for name in parents:
            place = next(e for e in place if e["name"] == name) if isinstance(place, list) else place[name]
        place[last] = value(place[last]) if callable(value) else value
        path.write_text(json.dumps(document))

    return change


def answer(name: str, status: int, headers: dict[str, str], body: bytes = b"") -> Attack:
    """Another answer for one file."""

    def change(server: FileServer, folder: Path) -> None:
        def reply(handler: Handler, path: str) -> bool:
            if not path.endswith(f"/{name}"):
                return False
            handler.send_response(status)
            for header, text in headers.items():
                handler.send_header(header, text)
            if "Content-Length" not in headers and "Transfer-Encoding" not in headers:
                handler.send_header("Content-Length", str(len(body)))
            handler.end_headers()
            handler.wfile.write(body)
            return True

        server.answer = reply

    return change


def redirect(name: str, location: str) -> Attack:
    return answer(name, 302, {"Location": location})


def in_circles(server: FileServer, folder: Path) -> None:
    redirect("manifest.json", f"{server.url}/tiny/manifest.json")(server, folder)


def endless(name: str, status: int, content_range: str) -> Attack:
    """A body that never ends."""

    def change(server: FileServer, folder: Path) -> None:
        size = (folder / name).stat().st_size

        def reply(handler: Handler, path: str) -> bool:
            if not path.endswith(f"/{name}"):
                return False
            handler.send_response(status)
            if content_range:
                handler.send_header("Content-Range", content_range.format(last=size - 1, size=size))
            handler.send_header("Transfer-Encoding", "chunked")
            handler.end_headers()
            while True:
                handler.wfile.write(b"10000\r\n" + bytes(1 << 16) + b"\r\n")

        server.answer = reply

    return change


def other_bytes(name: str) -> Attack:
    """A file of the same size with other content, as of a library that was swapped."""

    def change(server: FileServer, folder: Path) -> None:
        (folder / name).write_bytes(bytes((folder / name).stat().st_size))

    return change


def huge_zeros(server: FileServer, folder: Path) -> None:
    """A file of 100 TB in few hashes: each chunk is zeros."""
    document = json.loads((folder / "manifest.json").read_text())
    hashes = [sha256(bytes(CHUNK_BYTES)).hexdigest()] * 1000
    document["files"].append({"name": "zeros", "size": LARGE, "sha256": "0" * 64, "chunks": hashes})
    (folder / "manifest.json").write_text(json.dumps(document))


def many_files(server: FileServer, folder: Path) -> None:
    """More bytes than the disk has, in files that are small alone."""
    document = json.loads((folder / "manifest.json").read_text())
    one = {"size": 1 << 50, "sha256": "0" * 64}
    document["files"] += [{"name": f"f{i}", **one} for i in range(8)]
    (folder / "manifest.json").write_text(json.dumps(document))


def a_gzip_bomb(server: FileServer, folder: Path) -> None:
    body = gzip.compress(bytes(50 << 20))
    answer("manifest.json", 200, {"Content-Encoding": "gzip"}, body)(server, folder)


def many_ranges(server: FileServer, folder: Path) -> None:
    """An answer of many ranges that overlap."""
    part = b"--x\r\nContent-Range: bytes 0-65535/3670793\r\n\r\n" + bytes(CHUNK_BYTES) + b"\r\n"
    answer(WEIGHTS, 206, {"Content-Type": "multipart/byteranges; boundary=x"}, part * 50)(server, folder)


def no_lengths(server: FileServer, folder: Path) -> None:
    answer("manifest.json", 200, {}, b"{" + b" " * (5 << 20))(server, folder)


ATTACKS: dict[str, tuple[Attack, str]] = {
    "a path out of the folder": (manifest_with("files/tokenizer.json/name", "../../x"), "names relative to the bundle"),
    "an absolute path": (manifest_with("files/tokenizer.json/name", "/etc/cron.d/x"), "names relative to the bundle"),
    "a path with a backslash": (manifest_with("files/tokenizer.json/name", "..\\x"), "names relative to the bundle"),
    "a file that is a folder": (manifest_with("files/tokenizer_config.json/name", "model.onnx/x"), "model.onnx"),
    "a size below zero": (manifest_with(f"files/{WEIGHTS}/size", -1), "a size in bytes"),
    "a size of 100 TB": (manifest_with(f"files/{WEIGHTS}/size", LARGE), "chunks is"),
    "a size that is too small": (manifest_with(f"files/{WEIGHTS}/size", lambda size: size - 1), "as the manifest says"),
    "a size that is too large": (manifest_with(f"files/{WEIGHTS}/size", lambda size: size + 1), "as the manifest says"),
    "a small file that is larger": (manifest_with("files/tokenizer.json/size", 7), "as the manifest says"),
    "a small file that is smaller": (manifest_with("files/tokenizer.json/size", 60_000), "tokenizer.json"),
    "a hash for no chunk": (manifest_with(f"files/{WEIGHTS}/chunks", []), "chunks is '0 hashes'"),
    "100 TB of zeros": (huge_zeros, "chunks is"),
    "9 PB in files without chunks": (many_files, "chunks is"),
    "a manifest without an end": (endless("manifest.json", 200, ""), "larger than 4194304 bytes"),
    "a manifest of 5 MB": (no_lengths, "larger than 4194304 bytes"),
    "a trim file of 2 kB": (answer("trim.json", 200, {}, b" " * 2000), "larger than 1000 bytes"),
    "a trim file of no depth": (answer("trim.json", 200, {}, b'{"depth": 0}'), "depth 0: the bundle has depths 1 to 4"),
    "a trim file of undivided weights": (answer("trim.json", 200, {}, b'{"depth": 1}'), "not divided by depth"),
    "a compressed manifest": (a_gzip_bomb, "sent with coding 'gzip', needed none"),
    "a compressed file": (
        answer(WEIGHTS, 206, {"Content-Encoding": "gzip", "Content-Range": "bytes 0-3867400/3867401"}),
        "sent with coding 'gzip', needed none",
    ),
    "a file without an end": (endless(WEIGHTS, 206, "bytes 0-{last}/{size}"), "came 5 times with another hash"),
    "a whole file without an end": (endless(WEIGHTS, 200, ""), "came 5 times with another hash"),
    "many ranges": (many_ranges, "no Content-Range"),
    "another range": (answer(WEIGHTS, 206, {"Content-Range": "bytes 5-9/10"}, b"12345"), "as the manifest says"),
    "a range of 400 digits": (answer(WEIGHTS, 206, {"Content-Range": f"bytes 0-9/{'9' * 400}"}), "the server sends"),
    "no such range": (answer(WEIGHTS, 416, {}), "ends before byte"),
    "swapped bytes": (other_bytes("model.onnx"), "came 5 times with another hash"),
    "swapped weights": (other_bytes(WEIGHTS), "came 5 times with another hash"),
    "a redirect to a file": (redirect("manifest.json", "file:///etc/passwd"), "redirects to file://"),
    "a redirect of weights to a file": (redirect(WEIGHTS, "file:///etc/passwd"), "redirects to file://"),
    "a redirect to ftp": (redirect(WEIGHTS, "ftp://127.0.0.1/x"), "redirects to ftp://"),
    "a redirect to another scheme": (redirect(WEIGHTS, "https://127.0.0.1/x"), "redirects to https://"),
    "a redirect to a machine of the network": (redirect(WEIGHTS, "http://192.168.1.2/x"), "redirects to http://192"),
    "a redirect that is no address": (redirect(WEIGHTS, "http://[::1/x"), WEIGHTS),
    "a redirect in circles": (in_circles, "more than 5 redirects"),
    "a page": (answer("manifest.json", 200, {}, b"<html>"), "not valid JSON"),
    "an error": (answer(WEIGHTS, 404, {}), "status 404"),
    "no bundle": (answer("manifest.json", 404, {}), "no manifest.json there"),
    "a status of another kind": (answer("manifest.json", 204, {}), "status 204"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_hostile_source_is_refused(
    name: str, server: FileServer, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    attack, message = ATTACKS[name]
    weights = (published / WEIGHTS).read_bytes()
    attack(server, published)
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert main(["pull", f"{server.url}/tiny", str(tmp_path / "in" / "here")]) == 4
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("mbq: error: ")
    assert message in said.err
    assert said.err.count("\n") == 1
    assert not (tmp_path / "in" / "here").exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"cache", "in", "served"}, "a file out of the folder"
    kept = [path for path in (tmp_path / "in").rglob("*") if path.is_file()] if (tmp_path / "in").exists() else []
    assert sum(path.stat().st_blocks * 512 for path in kept) < 8 << 20
    for path in kept:
        if path.name == WEIGHTS:
            pieces = [path.read_bytes()[at : at + CHUNK_BYTES] for at in range(0, path.stat().st_size, CHUNK_BYTES)]
            assert all(not any(piece) or piece in weights for piece in pieces), "a chunk with another hash was written"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 60_000


def test_a_file_that_the_manifest_does_not_list_is_not_fetched(
    server: FileServer, published: Path, tmp_path: Path
) -> None:
    (published / "lib").mkdir()
    (published / "lib" / "libmbq_ops.so").write_bytes(b"\x7fELF")
    assert main(["pull", f"{server.url}/tiny", str(tmp_path / "here")]) == 0
    assert not (tmp_path / "here" / "lib").exists()


def test_a_bundle_that_is_broken_by_its_maker(
    server: FileServer, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (published / "genai_config.json").write_text("{}")
    write_manifest(published)
    assert main(["pull", f"{server.url}/tiny", str(tmp_path / "here")]) == 4
    assert "genai_config.json" in capsys.readouterr().err
    assert not (tmp_path / "here").exists()
    assert not (tmp_path / ".here.part").exists()
