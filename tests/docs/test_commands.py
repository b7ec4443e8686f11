"""Every command and every Python example of the README and of docs/ is run, or checked as far as time permits.

A command runs in a folder with a tiny bundle under every name that the pages use.  ``ROWS`` says how far each command
goes: run, dry run, or parsed by its own program.  A command that no row covers fails.
"""

from __future__ import annotations

import io
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.request import urlopen

import click
import pytest
from click.testing import CliRunner
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from pages import ROOT, Block, python_blocks, shell_commands
from test_signature import write_keys
from tiny_models import write_checkpoint

from mbq_export.cli import command as exporter
from mbq_runtime.cli import cli as runtime
from mbq_runtime.trust.signature import private_key, public_key, sign

PATIENCE_S = 60
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WHEEL = f"mbq_export-{PROJECT['version']}-py3-none-any.whl"
BUNDLES = ("bundles/smollm2-135m-host", "bundles/smollm2-135m-arm64", "bundles/MODEL-mali-rk3588", "MODEL-arm64")
TINY_EXPORT = ["--target", "portable", "--method", "rtn", "--calib-data", "notes.txt", "--calib-tokens", "1024"]
TEMPLATE = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
TRACE = '{"time_s": 0.0, "temp_c": 50.0}\n{"time_s": 1.0, "temp_c": 60.0}\n'
PROSE = "The tide turns twice a day, and twice a day the boats leave the harbour. "

Handler = Callable[[list[str]], None]


# ---- How a command is checked ----------------------------------------------------------------------------------------


def _invoke(program: click.Command, arguments: list[str], typed: str = "") -> None:
    """Run a click program in this process."""
    done = CliRunner().invoke(program, arguments, input=typed, catch_exceptions=False, standalone_mode=False)
    assert done.exit_code == 0, done.output


def _parse(program: click.Command, arguments: list[str]) -> None:
    """Let a click program, or its subcommand, read its arguments; run nothing."""
    if isinstance(program, click.Group):
        context = click.Context(program)
        if subcommand := program.get_command(context, arguments[0]):
            subcommand.make_context(arguments[0], arguments[1:], parent=context)
            return
    program.make_context(program.name, list(arguments))


def _runtime(arguments: list[str]) -> None:
    _invoke(runtime, arguments)


def _runtime_quick(*more: str) -> Handler:
    """Run ``mbq`` with arguments that make it quick."""
    return lambda arguments: _invoke(runtime, [*arguments, *more])


def _runtime_parsed(arguments: list[str]) -> None:
    _parse(runtime, arguments)


def _perplexity(arguments: list[str]) -> None:
    _invoke(runtime, [{"smollm2-135m": "path/to/model"}.get(word, word) for word in arguments] + ["--context", "32"])


def _chat(arguments: list[str]) -> None:
    _invoke(runtime, [*arguments, "--max-tokens", "4"], typed="Hello\n/exit\n")


def _serve(arguments: list[str]) -> None:
    with _serving(arguments):
        pass


def _export_planned(arguments: list[str]) -> None:
    """Plan an export: model, text, targets and options are read as for the whole export."""
    given = [word if not word.startswith("hf:") else "notes.txt" for word in arguments]
    tiny = {"--model": "path/to/model", "--calib-data": "notes.txt", "--dry-run": ""}
    for option, value in tiny.items():
        if option not in given:
            given += filter(None, (option, value))
    _invoke(exporter, given)


def _export_parsed(arguments: list[str]) -> None:
    _parse(exporter, arguments)


def _export_listed(arguments: list[str]) -> None:
    _invoke(exporter, arguments)


def _torchrun(arguments: list[str]) -> None:
    from torch.distributed.run import parse_args

    parsed = parse_args(arguments)
    assert (parsed.module, parsed.training_script) == (True, "mbq_export.cli")
    _export_planned(parsed.training_script_args)


def _make(arguments: list[str]) -> None:
    """Dry run in the repository: the target exists, and its recipe can be made out."""
    done = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr


def _pip(arguments: list[str]) -> None:
    """The wheel has the name that is built, and the extras exist."""
    assert arguments[0] == "install"
    for word in (word for word in arguments[1:] if not word.startswith("-")):
        found = re.fullmatch(r"(?:\./|dist/)?(mbq_export-[\w.*-]+\.whl)(?:\[([\w,]+)\])?", word)
        assert found, f"{word}: no package index has it; name the wheel"
        assert re.fullmatch(re.escape(found[1]).replace(r"\*", ".*"), WHEEL), f"{word}: the wheel is {WHEEL}"
        assert set((found[2] or "").split(",")) <= {"", *PROJECT["optional-dependencies"]}


def _script(arguments: list[str]) -> None:
    """A script of the repository knows the options; it prints its help and does no work."""
    path, options = ROOT / arguments[0], [word for word in arguments[1:] if word.startswith("--")]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(sys, "argv", [str(path), "--help"])
        patch.syspath_prepend(str(path.parent))
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(path), run_name="__main__")
    assert not left.value.code
    unknown = [option for option in options if option not in printed.getvalue()]
    assert not unknown, f"{path.name}: no options {unknown}"


def _module(arguments: list[str]) -> None:
    """A module of the project knows the options; it prints its help and does no work."""
    done = subprocess.run(
        [sys.executable, "-m", arguments[0], "--help"], capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    unknown = [word for word in arguments[1:] if word.startswith("--") and word not in done.stdout]
    assert not unknown, f"{arguments[0]}: no options {unknown}"


def _example(arguments: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")


def _tables(arguments: list[str]) -> None:
    subprocess.run([sys.executable, ROOT / arguments[0], "--check"], check=True)


def _pytest(arguments: list[str]) -> None:
    """The folders, files and markers exist."""
    for word in arguments:
        assert not word.startswith("tests") or (ROOT / word.partition("::")[0]).exists(), word
    if "-m" in arguments:
        names = re.findall(r"\w+", arguments[arguments.index("-m") + 1])
        tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
        known = {marker.partition(":")[0] for marker in tool["markers"]} | {"not", "and", "or"}
        assert set(names) <= known


def _shell(arguments: list[str]) -> None:
    subprocess.run(["bash", "-c", shlex.join(arguments)], check=True, capture_output=True)


def _venv(arguments: list[str]) -> None:
    subprocess.run([sys.executable, *arguments, "--without-pip"], check=True)


def _activate(arguments: list[str]) -> None:
    folder = Path(arguments[0]).parents[1]
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    _shell([".", *arguments])


def _ruff(arguments: list[str]) -> None:
    """Only the options are checked: the command may change files."""
    subprocess.run([str(Path(sys.executable).with_name("ruff")), *arguments, "--help"], check=True, capture_output=True)


def _sha256(arguments: list[str]) -> None:
    """The file exists; a wheel has the name that is built."""
    assert all(Path(word).is_file() or Path(word).name == WHEEL for word in arguments)


def _keys(arguments: list[str]) -> None:
    """Write keys of the kind that is signed with, in a folder of their own."""
    Path("keys").mkdir(exist_ok=True)
    if shutil.which("ssh-keygen"):
        subprocess.run(["ssh-keygen", "-q", *arguments], cwd="keys", check=True, stdin=subprocess.DEVNULL)
        private_key(Path("keys", "maker"))
        public_key(Path("keys", "maker.pub"))


def _tag(arguments: list[str]) -> None:
    assert f"v{PROJECT['version']}" in arguments


def _file_server(arguments: list[str]) -> None:
    """It never ends.  What it serves exists."""
    assert Path(arguments[arguments.index("--directory") + 1]).is_dir()


def _service(arguments: list[str]) -> None:
    """Nothing to run here: the command changes the system.  The unit that it names is in examples/."""
    assert arguments == ["daemon-reload"] or (ROOT / "examples" / f"{arguments[-1]}.service").is_file()


_BOARD_PACKAGES = {"python3-venv", "python3-pip", "proot-distro"}


def _system_package(arguments: list[str]) -> None:
    """Nothing to run here: the command changes the system.  Only known packages are installed."""
    assert arguments == ["update"] or (arguments[0] == "install" and set(arguments[1:]) <= _BOARD_PACKAGES)


def _proot(arguments: list[str]) -> None:
    """Nothing to run here: the command exists on phones only."""
    assert arguments in (["install", "debian"], ["login", "debian"])


def _pip_uv(arguments: list[str]) -> None:
    assert arguments == []


def _uv(arguments: list[str]) -> None:
    """The Python is one that the project supports, and the wheel is the one that is built."""
    if arguments[0] == "venv":
        assert arguments[1] == "--python"
        assert Version(arguments[2]) in SpecifierSet(PROJECT["requires-python"])
        return
    assert arguments[0] == "pip"
    _pip([word for word in arguments[1:] if word not in ("--python", "mbq-env")])


def _copied(arguments: list[str]) -> None:
    """Nothing to run here: the command needs a board.  What it copies is named as elsewhere on the page."""
    *_, source, destination = arguments
    assert destination.endswith(":")
    assert Path(source).name == WHEEL or Path(Path(source).name).exists()


@dataclass(frozen=True)
class Row:
    """How commands of one form are checked.

    form: regular expression that the words before the arguments match in full
    check: called with the arguments
    """

    form: str
    check: Handler


ROWS = (
    Row(r"mbq (?=run .*--engine tvm)", _runtime_parsed),  # the tiny bundle has one engine
    Row(r"mbq (?=run \w+:)", _runtime_parsed),  # no such server
    Row(r"mbq (?=run )", _runtime_quick("--max-tokens", "8")),
    Row(r"mbq (?=chat )", _chat),
    Row(r"mbq (?=bench )", _runtime_quick("-p", "8", "-n", "4", "-r", "1")),
    Row(r"mbq (?=kit )", _runtime_quick("--minutes", "0.05", "--yes")),
    Row(r"mbq (?=simulate report)", _runtime_parsed),  # the report of a board
    Row(r"mbq (?=perplexity )", _perplexity),
    Row(r"mbq (?=sense .*--watch)", _runtime_parsed),  # it never ends
    Row(r"mbq (?=(inspect|verify|sense|simulate)\b)", _runtime),
    Row(r"mbq (?=serve .*--host)", _runtime_parsed),  # it would listen to the network
    Row(r"mbq (?=serve .*--app)", _runtime_parsed),  # the tiny bundle is not for WebGPU
    Row(r"mbq (?=serve )", _serve),
    Row(r"mbq (?=monitor\b)", _runtime_parsed),  # it never ends
    Row(r"mbq (?=(pull|rm|trim|web) )", _runtime_parsed),  # no such server, and no slices in a tiny bundle
    Row(r"mbq (?=list\b)", _runtime),
    Row(r"python3 -m (?=http\.server )", _file_server),
    Row(r"mbq (?=-)", _runtime),
    Row(r"mbq-export (?=compare )", _export_parsed),  # hours
    Row(r"mbq-export (?=--(help|list-targets|version)$)", _export_listed),
    Row(r"mbq-export ", _export_planned),
    Row(r"torchrun ", _torchrun),
    Row(r"make ", _make),
    Row(r"python3 -m pip install --user uv$", _pip_uv),
    Row(r"(python3? -m )?pip ", _pip),
    Row(r"(sudo apt|apt|pkg) ", _system_package),
    Row(r"proot-distro ", _proot),
    Row(r"~/\.local/bin/uv ", _uv),
    Row(r"python3? (?=-m venv )", _venv),
    Row(r"\. ", _activate),
    Row(r"(\.venv/bin/)?python (?=docs/tables\.py)", _tables),
    Row(r"(\.venv/bin/)?python (?=(docs|tests)/[\w/]+\.py)", _script),
    Row(r"(\.venv/bin/)?python (?=examples/[\w/]+\.py)", _example),
    Row(r"((\.venv/bin/)?python -m )?pytest ", _pytest),
    Row(r"(\.venv/bin/)?python -m (?=mbq_)", _module),
    Row(r"(\.venv/bin/)?ruff ", _ruff),
    Row(r"sha256sum ", _sha256),
    Row(r"ssh-keygen ", _keys),
    Row(r"git (?=tag )", _tag),
    Row(r"(sudo )?systemctl ", _service),
    Row(r"scp ", _copied),
)


# ---- Where it runs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, its bundle, and every file that the pages name."""
    folder = tmp_path_factory.mktemp("pages")
    write_checkpoint(folder / "path" / "to" / "smollm2-135m", "llama")
    (folder / "path" / "to" / "smollm2-135m" / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    for name, times in (("notes.txt", 400), ("text.txt", 8), ("wiki.txt", 8)):
        (folder / name).write_text(PROSE * times, encoding="utf-8")
    (folder / "chats.jsonl").write_text('{"messages": [{"role": "user", "content": "Hello"}]}\n' * 400)
    (folder / "trace.jsonl").write_text(TRACE, encoding="utf-8")
    (folder / "path" / "to" / "model").symlink_to("smollm2-135m")
    write_keys(folder, "maker")
    (folder / "bundles").mkdir()
    (folder / "site").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        _invoke(exporter, ["--model", "path/to/smollm2-135m", "--output", BUNDLES[0], *TINY_EXPORT])
    sign(folder / BUNDLES[0], folder / "maker")
    for name in BUNDLES[1:]:
        (folder / name).symlink_to(folder / BUNDLES[0])
    return folder


@pytest.fixture
def inside(sandbox: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The sandbox as the working directory."""
    monkeypatch.chdir(sandbox)
    return sandbox


class _Server:
    """A running ``mbq serve``, used as a context: gives its port, and ends it."""

    def __init__(self, arguments: list[str]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        command = [sys.executable, "-m", "mbq_runtime.cli", *arguments, "--port", str(self.port)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def __enter__(self) -> int:
        end_s = time.monotonic() + PATIENCE_S
        while True:
            try:
                urlopen(f"http://127.0.0.1:{self.port}/health").close()
                return self.port
            except OSError:
                output = self._process.stdout
                assert self._process.poll() is None, output and output.read()
                assert time.monotonic() < end_s, "the server does not answer"
                time.sleep(0.05)

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.communicate(timeout=PATIENCE_S)


_serving = _Server
COMMANDS = shell_commands()


def _bare(command: str) -> str:
    """The command without variables before it and without a redirection behind it."""
    return re.sub(r"^(?:[A-Z_]+=\S+ )+|\s+>>?\s*\S+$", "", command)


def _check(command: str) -> Callable[[], None] | None:
    """What checks a command: that of the first row that covers it."""
    bare = _bare(command)
    for row in ROWS:
        if found := re.match(row.form, bare):
            return partial(row.check, shlex.split(bare[found.end() :]))
    return None


def test_every_command_has_a_row() -> None:
    missing = {command: page for command, page in COMMANDS.items() if _check(command) is None}
    assert not missing, "no row of ROWS covers them; add one that runs each"


@pytest.mark.heavy
@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_command_of_the_pages_works(command: str, inside: Path) -> None:
    check = _check(command)
    assert check is not None
    check()


# ---- Python ----------------------------------------------------------------------------------------------------------

PYTHON = python_blocks()


@pytest.fixture(scope="module")
def port(sandbox: Path) -> Iterator[int]:
    """Where a server of the tiny bundle listens.  The quality floor of a random model is high, so it has no floor."""
    with _serving(["serve", str(sandbox / BUNDLES[0]), "--min-bits", "3"]) as found:
        yield found


def _quick_export(patch: pytest.MonkeyPatch) -> None:
    """Let ``mbq_export.export`` calibrate by rounding on a short text, whatever the page asks for."""
    import mbq_export

    whole = mbq_export.export
    quick = {"method": "rtn", "calib_data": "notes.txt", "calib_tokens": 1024}
    patch.setattr(mbq_export, "export", lambda *given, **options: whole(*given, **{**options, **quick}))


@pytest.mark.heavy
@pytest.mark.parametrize("block", PYTHON, ids=lambda block: f"{block.page}:{block.line}")
def test_python_of_the_pages_runs(
    block: Block, inside: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    code = block.text
    if "127.0.0.1:8080" in code:
        code = code.replace("8080", str(request.getfixturevalue("port")))
    if "mbq_export import export" in code:
        _quick_export(monkeypatch)
    names: dict[str, object] = {"__name__": "__main__"}
    if re.search(r"\bengine\b", code) and "engine =" not in code:
        from mbq_runtime import Engine

        names["engine"] = Engine.load(BUNDLES[0], threads=1)
    exec(compile(code, f"{block.page}:{block.line}", "exec"), names)


def test_a_command_without_a_row_is_named() -> None:
    assert _check("curl https://example.org") is None


def test_a_wrong_command_fails() -> None:
    with pytest.raises(click.ClickException):
        _runtime_parsed(["run", "bundle", "prompt", "--nonesuch"])
    with pytest.raises(click.ClickException):
        _export_parsed(["compare", "--nonesuch"])
    with pytest.raises(AssertionError):
        _pip(["install", "mbq-export"])
    with pytest.raises(AssertionError):
        _make(["nonesuch"])
