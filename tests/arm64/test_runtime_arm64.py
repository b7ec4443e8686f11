"""The runtime on an emulated board, with a bundle small enough to write here: whole engine, stock operators."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from rooms import helper
from userland import Userland

pytestmark = pytest.mark.slow

ARGS = ["--json", "--bits", "4", "--max-tokens", "24"]


@pytest.fixture(scope="module")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runtime tests' own bundle, for any machine."""
    return Path(helper("runtime", "tiny_bundle").write_bundle(tmp_path_factory.mktemp("tiny") / "bundle"))


@pytest.mark.parametrize(("cpu", "prompt"), [("cortex-a76", "hello"), ("cortex-a72", "Grüße")])
def test_reply_is_the_hosts(userland: Userland, tiny_bundle: Path, cpu: str, prompt: str) -> None:
    command = ["-m", "mbq_runtime.cli", "run", str(tiny_bundle), prompt, *ARGS]
    host = subprocess.run([sys.executable, *command], capture_output=True, encoding="utf-8", check=False)
    board = userland.run(command, cpu=cpu)
    assert (host.returncode, board.returncode) == (0, 0), host.stderr + board.stderr
    assert board.stderr == ""
    expected, found = json.loads(host.stdout), json.loads(board.stdout)
    assert found["tokens"] == expected["tokens"] != []
    assert found["text"] == expected["text"] != ""
    assert found["avg_bits_used"] == pytest.approx(expected["avg_bits_used"], rel=1e-6)


def test_machine_as_the_runtime_sees_it(userland: Userland, tiny_bundle: Path) -> None:
    board = userland.run(["-m", "mbq_runtime.cli", "inspect", str(tiny_bundle), "--json"])
    assert board.returncode == 0, board.stderr
    assert json.loads(board.stdout)["runs_here"] is True


def test_a_pulled_bundle_chats(userland: Userland, tiny_bundle: Path, tmp_path: Path) -> None:
    """The commands of a board's user, with a server of plain files that knows no ranges."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(tiny_bundle.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        source, environment = f"http://127.0.0.1:{http.server_port}/bundle", {"MBQ_CACHE_DIR": str(tmp_path)}
        try:
            pulled = userland.run(["-m", "mbq_runtime.cli", "pull", source], env=environment)
        finally:
            http.shutdown()
            thread.join()
    assert pulled.returncode == 0, pulled.stderr
    folder = pulled.stdout.strip()
    assert Path(folder).parent == tmp_path / "bundles"
    options = ["--bits", "4", "--max-tokens", "8", "--temperature", "0"]
    # The server is gone: the source is the name of what was pulled.
    command = ["-m", "mbq_runtime.cli", "chat", source, *options]
    talk = userland.run(command, env=environment, input="hello\n/exit\n")
    assert talk.returncode == 0, talk.stderr
    host = subprocess.run(
        [sys.executable, "-m", "mbq_runtime.cli", "chat", folder, *options],
        input="hello\n/exit\n", capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    assert talk.stdout == host.stdout != ""
