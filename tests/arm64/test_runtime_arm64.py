"""The runtime on an emulated board, with a bundle small enough to write here: whole engine, stock operators."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from forked_mbq import Mbq
from rooms import helper

pytestmark = pytest.mark.slow

Board = Callable[[str], Mbq]
ARGS = ["--json", "--bits", "4", "--max-tokens", "24"]


@pytest.fixture(scope="module")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runtime tests' own bundle, for any machine."""
    return Path(helper("runtime", "tiny_bundle").write_bundle(tmp_path_factory.mktemp("tiny") / "bundle"))


@pytest.mark.parametrize(("cpu", "prompt"), [("cortex-a76", "hello"), ("cortex-a72", "Grüße")])
def test_reply_is_the_hosts(board: Board, host: Mbq, tiny_bundle: Path, cpu: str, prompt: str) -> None:
    command = ["run", tiny_bundle, prompt, *ARGS]
    here, there = host(command), board(cpu)(command)
    assert (here.code, there.code) == (0, 0), here.err + there.err
    assert there.err == ""
    expected, found = json.loads(here.out), json.loads(there.out)
    assert found["tokens"] == expected["tokens"] != []
    assert found["text"] == expected["text"] != ""
    assert found["avg_bits_used"] == pytest.approx(expected["avg_bits_used"], rel=1e-6)


def test_machine_as_the_runtime_sees_it(board: Board, tiny_bundle: Path) -> None:
    found = board("cortex-a76")(["inspect", tiny_bundle, "--json"])
    assert found.code == 0, found.err
    assert json.loads(found.out)["runs_here"] is True


def test_a_pulled_bundle_chats(board: Board, host: Mbq, tiny_bundle: Path, tmp_path: Path) -> None:
    """The commands of a board's user, with a server of plain files that knows no ranges."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(tiny_bundle.parent))
    mbq, environment = board("cortex-a76"), {"MBQ_CACHE_DIR": str(tmp_path)}
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        source = f"http://127.0.0.1:{http.server_port}/bundle"
        try:
            pulled = mbq(["pull", source], environment=environment)
        finally:
            http.shutdown()
            thread.join()
    assert pulled.code == 0, pulled.err
    folder = pulled.out.strip()
    assert Path(folder).parent == tmp_path / "bundles"
    options = ["--bits", "4", "--max-tokens", "8", "--temperature", "0"]
    # The server is gone: the source is the name of what was pulled.
    talk = mbq(["chat", source, *options], "hello\n/exit\n", environment=environment)
    assert talk.code == 0, talk.err
    assert talk.out == host(["chat", folder, *options], "hello\n/exit\n").out != "", talk.err
