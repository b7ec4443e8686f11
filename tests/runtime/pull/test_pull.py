"""Pulling a bundle: from each kind of source, over a network that breaks, and after a kill at any time."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from hashlib import sha256
from http.server import BaseHTTPRequestHandler
from itertools import pairwise
from pathlib import Path

import pytest
from file_server import CHUNK_BYTES, CHUNKS, WEIGHTS, FileServer
from test_signature import write_keys
from tiny_bundle import write_bundle, write_manifest

from mbq_runtime import BundleError, Engine, UsageError
from mbq_runtime.bundle import manifest
from mbq_runtime.bundle.listed_files import FileRange
from mbq_runtime.cli import main
from mbq_runtime.locks import locked
from mbq_runtime.pull import Source, fetch, http, place_of, pull
from mbq_runtime.pull.store import old_of
from mbq_runtime.trust import signature
from mbq_runtime.trust.pulled import pulled_from

CHILD = f"""
import sys
from mbq_runtime.bundle import listed_files
from mbq_runtime.cli import main
listed_files.CHUNK_BYTES = {CHUNK_BYTES}
sys.exit(main(sys.argv[1:]))
"""

KILLED = f"""
import os, signal, sys
move, point = os.rename, sys.argv.pop(1)
def rename(old, new):
    last = str(old).endswith(".part")
    if not last or point == "after":
        move(old, new)
    if last:
        os.kill(os.getpid(), signal.SIGKILL)
os.rename = rename
{CHILD}
"""
"""Ends before or after the rename that gives the new bundle its name."""

KILLS = 20
FLIPS = 50


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def missing(path: Path, published: Path) -> list[int]:
    """Chunks of the large file that are not right on this disk."""
    (entry,) = (entry for entry in manifest.read(published).files if entry.name == WEIGHTS)
    content = path.read_bytes() if path.exists() else b""
    ranges = list(entry.ranges())
    return [i for i, (a, b, digest) in enumerate(ranges) if sha256(content[a:b]).hexdigest() != digest]


def asked(server: FileServer) -> list[int]:
    """Chunks of the large file that were asked for."""
    return [
        i
        for path, a, b in server.asked
        if path.endswith(WEIGHTS)
        for i in range(a // CHUNK_BYTES, -(-b // CHUNK_BYTES))
    ]


def dripped(handler: BaseHTTPRequestHandler) -> bool:
    """An answer of a byte now and then."""
    handler.send_response(200)
    handler.send_header("Content-Length", "4000")
    handler.end_headers()
    for _ in range(4000):
        handler.wfile.write(b" ")
        time.sleep(0.03)
    return True


# ---- Sources -----------------------------------------------------------------------------------------------------


def test_a_bundle_from_a_server(server: FileServer, published: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    done = pull(Source.of(f"{server.url}/tiny/"), tmp_path / "here", progress=lambda *step: calls.append(step))
    assert files_of(done.folder) == files_of(published)
    assert done.fetched_bytes == done.manifest.total_bytes
    assert calls[-1] == (done.manifest.total_bytes, done.manifest.total_bytes)
    assert calls == sorted(calls)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "here", "served"]
    assert Engine.load(done.folder, threads=1).generate("xA", chat=False, max_tokens=3).text() == "BCD"
    assert pulled_from(done.folder) == f"{server.url}/tiny"
    assert server.bytes_of(WEIGHTS) == (published / WEIGHTS).stat().st_size
    assert len([path for path, _, _ in server.asked if path.endswith(WEIGHTS)]) == 1, "one request for all chunks"


def test_a_server_without_ranges(server: FileServer, published: Path, tmp_path: Path) -> None:
    server.ranges = False
    assert files_of(pull(Source.of(f"{server.url}/tiny"), tmp_path / "here").folder) == files_of(published)
    content = bytearray((tmp_path / "here" / WEIGHTS).read_bytes())
    content[5 * CHUNK_BYTES + 1] ^= 1
    (tmp_path / "here" / WEIGHTS).write_bytes(content)
    assert pull(Source.of(f"{server.url}/tiny"), tmp_path / "here").fetched_bytes == CHUNK_BYTES
    assert files_of(tmp_path / "here") == files_of(published)


def test_a_bundle_from_a_folder(published: Path, tmp_path: Path) -> None:
    for text in (f"file:{published}", f"file://{published}/", f"file:{published}/manifest.json"):
        done = pull(Source.of(text), tmp_path / "here")
        assert files_of(done.folder) == files_of(published)
        assert pulled_from(done.folder) == text.removesuffix("/").removesuffix("/manifest.json")
    assert pulled_from(published) is not None, "the same manifest is the same bundle"


@pytest.mark.parametrize("name", ["a b", "a#b", "a?b", "a%20b", "100%", "ä:b", "file:x"])
def test_a_folder_of_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    write_bundle(tmp_path / "from" / name)
    monkeypatch.chdir(tmp_path / "from")
    written = name.replace("%20", "%2520")
    for at, text in enumerate((f"file:{written}", f"file:./{written}/", f"file://{tmp_path}/from/{written}")):
        assert manifest.read(pull(Source.of(text), tmp_path / f"here{at}").folder).model.name == "tiny"


def test_a_relative_folder_is_another_one_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was pulled from ./bundle here must not run where ./bundle is another one."""
    places = []
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        places.append(place_of(Source.of("file:bundle")))
    assert places[0] != places[1]
    assert place_of(Source.of(f"file:{tmp_path}/there/bundle")) == places[1]
    assert [Source.of(text).text for text in ("file:/", "file:.", "file:~/x")] == [
        "file:/", f"file:{tmp_path}/there/.", "file:~/x",
    ]  # fmt: skip


def test_a_bundle_from_the_hub(server: FileServer, published: Path, tmp_path: Path) -> None:
    """The hub redirects to its storage, which gets no token."""
    port = server.url.rpartition(":")[2]

    def hub(handler: BaseHTTPRequestHandler, path: str) -> bool:
        start = "/some-one/mbq.tiny/resolve/v1/sub/"
        if not path.startswith(start):
            return False
        assert handler.headers["Authorization"] == "Bearer hf_secret"
        handler.send_response(302)
        handler.send_header("Location", f"http://localhost:{port}/tiny/{path.removeprefix(start)}")
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return True

    server.answer = hub
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_TOKEN": "hf_secret"}
    command = [sys.executable, "-c", CHILD, "pull", "hf:some-one/mbq.tiny@v1/sub", str(tmp_path / "here")]
    subprocess.run(command, env=environment, check=True)
    assert files_of(tmp_path / "here") == files_of(published)
    stored = [headers for headers in server.headers if headers["host"].startswith("localhost")]
    assert len(stored) > len(files_of(published)) - 1
    assert not any("authorization" in headers for headers in stored)


def test_a_private_server_gets_the_token(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def private(handler: BaseHTTPRequestHandler, path: str) -> bool:
        if handler.headers["Authorization"] == "Bearer secret":
            return False
        handler.send_error(401)
        return True

    server.answer = private
    assert main(["pull", f"{server.url}/tiny", str(tmp_path / "here")]) == 4
    assert "it is private; set MBQ_PULL_TOKEN" in capsys.readouterr().err
    monkeypatch.setenv("MBQ_PULL_TOKEN", "secret")
    assert main(["pull", f"{server.url}/tiny", str(tmp_path / "here")]) == 0
    assert "secret" not in "".join(path.read_text() for path in (tmp_path / "cache" / "pulled").iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("http://192.168.1.2/tiny", "http is not encrypted"),
        ("http://example.org/tiny", "or --allow-http on a network that you trust"),
        ("http://localhost.example.org/tiny", "http is not encrypted"),
        ("ftp://example.org/tiny", "needed a source such as"),
        ("https:///tiny", "no host"),
        ("https://[::1/tiny", "no host"),
        (f"https://{'a' * 300}.org/tiny", "no host"),
        ("https://\udcff.org/tiny", "bytes that are no UTF-8"),
        ("file:\udcff", "bytes that are no UTF-8"),
        ("https://me:secret@example.org/tiny", r"^example\.org: the address has a user name or a password"),
        ("https://example.org/tiny?key=1", r"has a \? or a #"),
        ("hf:tiny", "needed hf:OWNER/NAME"),
        ("hf:owner/name@v1@v2", "needed hf:OWNER/NAME"),
        ("hf:owner/name?x", "needed hf:OWNER/NAME"),
        ("file://server/tiny", "a folder of another machine"),
        ("file://[::1/tiny", "a folder of another machine"),
    ],
)
def test_a_source_that_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        Source.of(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["hf:../name", f"hf:{'a' * 200}/name", "hf:owner/-name"])
def test_a_name_that_the_hub_cannot_have(text: str) -> None:
    with pytest.raises(UsageError, match="no name of the hub") as caught:
        pull(Source.of(text))
    assert "\n" not in str(caught.value)


def test_http_is_allowed_when_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source.of("http://192.168.1.2/tiny", allow_http=True)
    monkeypatch.setenv("MBQ_PULL_TOKEN", "secret")
    with pytest.raises(UsageError, match="MBQ_PULL_TOKEN would be sent without encryption"), source.files():
        pass


def test_names_in_the_cache() -> None:
    names = [
        Source.of(text).name
        for text in ("https://a.org/x y", "https://b.org/x y", "hf:o/n", "hf:o/n/../..", "hf:o/n@v1")
    ]
    assert len(set(names)) == len(names)
    assert all(name.replace("-", "").replace("_", "").isalnum() for name in names), names
    assert Source.of("https://a.org/x/").name == Source.of("https://a.org/x/manifest.json").name


# ---- A network that breaks ----------------------------------------------------------------------------------------


def test_flipped_bits_are_fetched_again(server: FileServer, published: Path, tmp_path: Path) -> None:
    """Each of 50 chunks comes wrong once.  Only these are asked for again."""
    dice = random.Random(1)
    bad = {(i, dice.randrange(CHUNK_BYTES)) for i in dice.sample(range(CHUNKS - 1), FLIPS)}
    todo = {i * CHUNK_BYTES + place for i, place in bad}

    def flip(path: str, begin: int, data: bytes) -> bytes:
        changed = bytearray(data)
        for at in [at for at in todo if path.endswith(WEIGHTS) and begin <= at < begin + len(data)]:
            changed[at - begin] ^= 1 << dice.randrange(8)
            todo.discard(at)
        return bytes(changed)

    server.change = flip
    done = pull(Source.of(f"{server.url}/tiny"), tmp_path / "here")
    assert not todo
    assert files_of(done.folder) == files_of(published)
    assert sorted(asked(server)) == sorted([*range(CHUNKS), *(i for i, _ in bad)])


def test_a_connection_that_breaks(server: FileServer, published: Path, tmp_path: Path) -> None:
    breaks = iter(random.Random(2).sample(range(3_000_000), 12))
    limit = 0

    def cut(total: int) -> None:
        nonlocal limit
        if total > limit:
            limit = total + next(breaks, 1 << 60)
            raise ConnectionAbortedError

    server.sent = cut
    done = pull(Source.of(f"{server.url}/tiny"), tmp_path / "here")
    assert files_of(done.folder) == files_of(published)


def test_a_source_that_always_breaks_off(
    server: FileServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def cut(path: str, begin: int, data: bytes) -> bytes:
        if path.endswith(WEIGHTS) and begin >= 3 * CHUNK_BYTES:
            raise ConnectionAbortedError
        return data

    server.change = cut
    assert main(["pull", f"{server.url}/tiny", str(tmp_path / "here")]) == 4
    message = capsys.readouterr().err.splitlines()
    assert len(message) == 1
    assert "5 tries failed; run the same command later, it goes on from here" in message[0]
    assert not (tmp_path / "here").exists()
    server.change = lambda path, begin, data: data
    server.asked.clear()
    assert main(["pull", f"{server.url}/tiny", str(tmp_path / "here")]) == 0
    assert asked(server) == list(range(3, CHUNKS))


def test_a_busy_server_is_asked_again(server: FileServer, published: Path, tmp_path: Path) -> None:
    answers = iter([503, 429] * 2)

    def busy(handler: BaseHTTPRequestHandler, path: str) -> bool:
        status = next(answers, 0) if path.endswith(WEIGHTS) else 0
        if status:
            handler.send_error(status)
        return bool(status)

    server.answer = busy
    assert files_of(pull(Source.of(f"{server.url}/tiny"), tmp_path / "here").folder) == files_of(published)


@pytest.mark.parametrize("name", ["manifest.json", WEIGHTS])
def test_a_server_that_sends_a_byte_now_and_then(
    name: str, server: FileServer, published: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """It is given up, and the next pull goes on."""
    monkeypatch.setattr(http, "_SLOW_S", 0.1)
    command = ["pull", f"{server.url}/tiny", str(tmp_path / "here")]

    def drip(path: str, begin: int, data: bytes) -> bytes:
        if path.endswith(name) and begin >= (name == WEIGHTS) * 3 * CHUNK_BYTES:
            time.sleep(0.03)
            return data[:1]
        return data

    server.change = drip
    if name != WEIGHTS:  # it is one block of bytes for the server
        server.answer = lambda handler, path: path.endswith(name) and dripped(handler)
    assert main(command) == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{name}: slower than 1000 bytes/s for 0 s" in line
    assert "check the address and the network" in line or "run the same command later, it goes on from here" in line
    server.change, server.answer = (lambda path, begin, data: data), (lambda handler, path: False)
    server.asked.clear()
    assert main(command) == 0
    assert asked(server) == list(range(3 if name == WEIGHTS else 0, CHUNKS))
    assert files_of(tmp_path / "here") == files_of(published)


def test_headers_that_come_a_byte_now_and_then(
    server: FileServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(http, "_ANSWER_S", 0.2)

    def drip(handler: BaseHTTPRequestHandler, path: str) -> bool:
        for byte in b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 1000:
            handler.wfile.write(bytes([byte]))
            time.sleep(0.02)
        return True

    server.answer = drip
    assert main(["pull", f"{server.url}/tiny"]) == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert "/tiny/manifest.json: no answer in 0 s; check the address and the network" in line


def test_a_server_that_is_slow_and_steady(
    server: FileServer, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "_SLOW_S", 0.001)
    server.sent = lambda total: time.sleep(0.002)
    assert files_of(pull(Source.of(f"{server.url}/tiny"), tmp_path / "here").folder) == files_of(published)
    assert len([path for path, _, _ in server.asked if path.endswith(WEIGHTS)]) == 1


# ---- Kills and damage ----------------------------------------------------------------------------------------------


@pytest.mark.heavy
def test_a_kill_at_20_points(server: FileServer, published: Path, tmp_path: Path) -> None:
    """Each run asks for what is not right on the disk, and for nothing else.  The folder appears at the end."""
    whole, folder = files_of(published), tmp_path / "here"
    draft, size = folder.with_name(".here.part"), (published / WEIGHTS).stat().st_size
    dice, served = random.Random(3), 0
    for kill in range(KILLS + 1):
        before = missing(draft / WEIGHTS, published)
        server.asked.clear()
        server.sent_bytes = 0
        child = subprocess.Popen([sys.executable, "-c", CHILD, "pull", f"{server.url}/tiny", str(folder)])
        # A part of what is left, so that each kill is at another place.
        point = (
            dice.randrange(1, max(2, len(before) * CHUNK_BYTES * 2 // (KILLS - kill + 2))) if kill < KILLS else 1 << 60
        )

        def end(total: int, child: subprocess.Popen[bytes] = child, point: int = point) -> None:
            if total >= point:
                child.kill()
                raise ConnectionAbortedError

        server.sent = end
        code = child.wait(60)
        served += len(asked(server))
        assert set(asked(server)) <= set(before), "a chunk that was right is asked for again"
        if kill < KILLS:
            assert code == -9
            assert not folder.exists()
        else:
            assert code == 0
            assert sorted(asked(server)) == before
    assert files_of(folder) == whole
    assert not draft.exists()
    assert size


@pytest.mark.parametrize("damage", ["bits", "end", "zeros", "links", "file"])
def test_damage_on_the_disk_is_mended(damage: str, server: FileServer, published: Path, tmp_path: Path) -> None:
    folder, source = tmp_path / "here", Source.of(f"{server.url}/tiny")
    pull(source, folder)
    server.asked.clear()
    path = folder / WEIGHTS
    content = bytearray(path.read_bytes())
    wrong = {7, 8, 30}
    if damage == "bits":
        for i in wrong:
            content[i * CHUNK_BYTES + 5] ^= 4
    elif damage == "end":
        del content[57 * CHUNK_BYTES + 3 :]
        wrong = {57, 58, 59}
    elif damage == "zeros":
        for i in wrong:
            content[i * CHUNK_BYTES : (i + 1) * CHUNK_BYTES] = bytes(CHUNK_BYTES)
    if damage == "file":
        path.unlink()
        wrong = set(range(CHUNKS))
    elif damage == "links":
        path.rename(tmp_path / "outside")
        path.symlink_to(tmp_path / "outside")
        with pytest.raises(BundleError, match=f"{WEIGHTS}: cannot be written"):
            pull(source, folder)
        return
    else:
        path.write_bytes(content)
    pull(source, folder)
    assert files_of(folder) == files_of(published)
    assert sorted(asked(server)) == sorted(wrong)


def test_a_new_version_takes_what_it_can_from_the_old_one(server: FileServer, published: Path, tmp_path: Path) -> None:
    folder, source = tmp_path / "here", Source.of(f"{server.url}/tiny")
    pull(source, folder)
    content = bytearray((published / WEIGHTS).read_bytes())
    content[11 * CHUNK_BYTES] ^= 1
    (published / WEIGHTS).write_bytes(content + b"more")
    write_manifest(published)
    server.asked.clear()
    running = (folder / WEIGHTS).open("rb")
    old = running.read()
    done = pull(source, folder)
    assert files_of(folder) == files_of(published)
    assert sorted(asked(server)) == [11, CHUNKS - 1]
    assert done.fetched_bytes == CHUNK_BYTES + 777 + 4
    running.seek(0)
    assert running.read() == old, "an engine that runs keeps the old file"
    running.close()
    assert not list(tmp_path.glob(".here*"))


@pytest.mark.parametrize("kill", ["before", "after"])
@pytest.mark.parametrize("command", ["pull", *(pytest.param(one, marks=pytest.mark.heavy) for one in ("list", "rm"))])
def test_a_kill_while_a_bundle_is_replaced(
    command: str, kill: str, server: FileServer, published: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Source.of(f"{server.url}/tiny")
    folder = pull(source).folder
    before = files_of(folder)
    (published / "tokenizer_config.json").write_text("{}")
    write_manifest(published)
    child = [sys.executable, "-c", KILLED, kill, "pull", source.text]
    assert subprocess.run(child, check=False, stderr=subprocess.DEVNULL).returncode == -9
    assert old_of(folder).is_dir()
    assert folder.exists() == (kill == "after")
    if command == "rm":
        assert main(["rm", source.text]) == 0
        assert not list(folder.parent.iterdir())
        return
    if command == "list":
        assert main(["list", "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)
        assert [row["name"] for row in rows if row["whole"]] == [folder.name]
        assert files_of(folder) == (before if kill == "before" else files_of(published))
    else:
        server.asked.clear()
        pull(source)
        assert not asked(server), "what has come is not asked for again"
        assert files_of(folder) == files_of(published)
        assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert not old_of(folder).exists()


def test_a_swap_that_goes_on_is_left_alone(server: FileServer, capsys: pytest.CaptureFixture[str]) -> None:
    folder = pull(Source.of(f"{server.url}/tiny")).folder
    folder.rename(old_of(folder))
    with locked(folder, "another mbq", "another folder"):
        assert main(["list", "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == []
        assert old_of(folder).exists()
    assert main(["list", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 1


def test_an_unfinished_pull_of_another_version(server: FileServer, published: Path, tmp_path: Path) -> None:
    def cut(path: str, begin: int, data: bytes) -> bytes:
        if begin >= 20 * CHUNK_BYTES:
            raise ConnectionAbortedError
        return data

    server.change = cut
    with pytest.raises(BundleError, match="5 tries failed"):
        pull(Source.of(f"{server.url}/tiny"), tmp_path / "here")
    (tmp_path / ".here.part" / "stray").write_text("x")
    (published / "tokenizer_config.json").write_text("{}")
    write_manifest(published)
    server.change = lambda path, begin, data: data
    server.asked.clear()
    pull(Source.of(f"{server.url}/tiny"), tmp_path / "here")
    assert files_of(tmp_path / "here") == files_of(published)
    assert asked(server) == list(range(20, CHUNKS))


def test_a_disk_that_is_too_small(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: usage._replace(free=18_000_000))
    assert main(["pull", f"{server.url}/tiny", str(tmp_path / "here")]) == 4
    message = capsys.readouterr().err
    assert "18 MB of disk are free, needed 21 MB for the bundle; free some" in message
    assert message.count("\n") == 1
    assert [path for path, _, _ in server.asked] == ["/tiny/manifest.json"]


@pytest.mark.parametrize("place", ["bundle", "dangling", "parent"])
def test_a_link_stays_and_what_it_leads_to_is_replaced(
    place: str, server: FileServer, published: Path, tmp_path: Path
) -> None:
    source, link, disk = Source.of(f"{server.url}/tiny"), tmp_path / "links" / "link", tmp_path / "disk"
    link.parent.mkdir()
    if place != "dangling":
        pull(source, disk / "one")
    link.symlink_to(disk if place == "parent" else disk / "one")
    for version in ("{}", "[]"):
        (published / "tokenizer_config.json").write_text(version)
        write_manifest(published)
        for _ in range(2):
            done = pull(source, link / "one" if place == "parent" else link)
            assert files_of(done.folder) == files_of(disk / "one") == files_of(published)
        assert link.is_symlink()
        assert [path.name for path in (*link.parent.iterdir(), *disk.iterdir())] == ["link", "one"]


def test_a_link_with_the_name_of_an_older_bundle_is_removed(
    server: FileServer, published: Path, tmp_path: Path
) -> None:
    """An update through a link left it, in older versions."""
    source, folder = Source.of(f"{server.url}/tiny"), tmp_path / "here"
    kept = files_of(pull(source, tmp_path / "kept").folder)
    pull(source, folder)
    old_of(folder).symlink_to(tmp_path / "kept")
    (published / "tokenizer_config.json").write_text("{}")
    write_manifest(published)
    pull(source, folder)
    assert not os.path.lexists(old_of(folder))
    assert files_of(folder) == files_of(published)
    assert files_of(tmp_path / "kept") == kept


def test_links_that_lead_to_themselves_are_no_folder(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "here").symlink_to(tmp_path / "here")
    with pytest.raises(UsageError, match="it exists and is not a bundle"):
        pull(Source.of(f"{server.url}/tiny"), tmp_path / "here")


def test_a_folder_that_is_no_bundle_is_left_alone(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "thesis.txt").write_text("x")
    with pytest.raises(UsageError, match="it exists and is not a bundle"):
        pull(Source.of(f"{server.url}/tiny"), tmp_path / "here")
    assert files_of(tmp_path / "here") == {"thesis.txt": b"x"}
    assert not server.asked


def test_a_folder_without_a_name(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(published)
    with pytest.raises(UsageError, match=r"^\.: it has no name; choose another folder"):
        pull(Source.of(f"file:{published}"), Path())


def test_a_bundle_that_was_made_here_is_not_replaced(server: FileServer, published: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(published, tmp_path / "own"))
    (own / "tokenizer_config.json").write_text("{}")
    write_manifest(own)
    before = files_of(own)
    with pytest.raises(UsageError, match="it has a bundle that was not pulled"):
        pull(Source.of(f"{server.url}/tiny"), own)
    assert files_of(own) == before
    (own / WEIGHTS).write_bytes(b"damaged")
    write_manifest(published)
    shutil.copyfile(published / "manifest.json", own / "manifest.json")
    pull(Source.of(f"{server.url}/tiny"), own)  # the same bundle is mended
    assert files_of(own) == files_of(published)


# ---- Commands -----------------------------------------------------------------------------------------------------


def test_a_source_where_a_bundle_is_named(
    server: FileServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first command pulls, the others use what is there without the network."""
    source = f"{server.url}/tiny"
    assert main(["run", source, "xA", "--raw", "--max-tokens", "3", "--threads", "1"]) == 0
    found = capsys.readouterr()
    assert found.out == "BCD\n"
    assert "all as the manifest says; 4.1 MB came from" in found.err
    count = len(server.headers)
    assert main(["run", source, "xA", "--raw", "--max-tokens", "3", "--threads", "1"]) == 0
    assert main(["verify", source]) == 0
    assert main(["inspect", source]) == 0
    assert len(server.headers) == count
    capsys.readouterr()

    assert main(["list", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["source"], row["model"], row["target"], row["whole"]) == (source, "tiny", "portable", True)
    assert row["folder"] == str(place_of(Source.of(source)))
    assert row["disk_bytes"] >= (Path(row["folder"]) / WEIGHTS).stat().st_size
    assert main(["list"]) == 0
    assert row["name"] in capsys.readouterr().out
    assert main(["rm", source]) == 0
    assert not Path(row["folder"]).exists()
    assert main(["rm", row["name"]]) == 2
    assert "no such bundle" in capsys.readouterr().err
    assert main(["list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_an_unfinished_bundle_is_listed_and_removed(
    server: FileServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def cut(path: str, begin: int, data: bytes) -> bytes:
        if begin >= CHUNK_BYTES:
            raise ConnectionAbortedError
        return data

    server.change = cut
    assert main(["pull", f"{server.url}/tiny"]) == 4
    capsys.readouterr()
    assert main(["list", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert not row["whole"]
    assert main(["rm", row["name"]]) == 0
    assert not list((tmp_path / "cache" / "bundles").iterdir())


def test_two_at_once(server: FileServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second is told so.  The first is not disturbed."""
    codes: list[int] = []

    def second(total: int) -> None:
        if not codes and server.asked[-1][0].endswith(WEIGHTS):
            codes.append(0)
            command = [sys.executable, "-c", CHILD, "pull", f"{server.url}/tiny", str(tmp_path / "here")]
            done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
            codes[0] = done.returncode
            assert f"another mbq writes it now (process {os.getpid()})" in done.stderr

    server.sent = second
    assert main(["pull", f"{server.url}/tiny", str(tmp_path / "here")]) == 0
    assert codes == [2]


def test_a_signed_bundle(
    server: FileServer, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --key, nothing comes of a bundle that the key has not signed."""
    key = write_keys(tmp_path, "maker")
    command = ["pull", f"{server.url}/tiny", str(tmp_path / "here"), "--key", f"{key}.pub"]
    assert main(command) == 4
    assert "it has no signature" in capsys.readouterr().err
    assert [path for path, _, _ in server.asked] == ["/tiny/manifest.json"]
    signature.sign(published, key)
    assert main(command) == 0
    assert main(["verify", str(tmp_path / "here"), "--key", f"{key}.pub"]) == 0
    assert files_of(tmp_path / "here") == files_of(published)


def test_the_lowest_depth_comes_first(server: FileServer, published: Path, tmp_path: Path) -> None:
    """When a depth has arrived, all that it needs is right, and what only deeper ones need has not been asked for."""
    whole, size = (published / WEIGHTS).read_bytes(), (published / WEIGHTS).stat().st_size
    cuts = (0, 20 * CHUNK_BYTES - 4096, 33 * CHUNK_BYTES + 8192, 33 * CHUNK_BYTES + 8192, size)
    parts = tuple((FileRange(WEIGHTS, a, b),) for a, b in pairwise(cuts))
    manifest.write(replace(manifest.read(published), parts=parts), published)
    seen: list[int] = []
    (tmp_path / "here").mkdir()

    def arrived(depth: int) -> None:
        seen.append(depth)
        content = (tmp_path / "here" / WEIGHTS).read_bytes()
        assert len(content) == size
        assert content[: cuts[depth]] == whole[: cuts[depth]]
        end = -(-cuts[depth] // CHUNK_BYTES) * CHUNK_BYTES
        assert not any(content[end:])
        assert all((tmp_path / "here" / entry.name).stat().st_size == entry.size for entry in found.files)

    found = manifest.read(published)
    with Source.of(f"{server.url}/tiny").files() as files:
        fetch.fill(files, found, tmp_path / "here", arrived=arrived)
    assert seen == [1, 2, 3, 4]
    assert sorted(asked(server)) == list(range(CHUNKS))


def test_a_source_in_python(server: FileServer) -> None:
    for _ in range(2):
        engine = Engine.load(f"{server.url}/tiny", threads=1)
        assert engine.generate("xA", chat=False, max_tokens=3).text() == "BCD"
    assert [path for path, _, _ in server.asked].count("/tiny/manifest.json") == 1
