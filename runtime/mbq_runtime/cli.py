"""The command ``mbq``.  The module of a subcommand is imported only when it is called."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import FrameType
from typing import NamedTuple

import click

from .errors import MbqError
from .printable import printable
from .streams import replace_closed

log = logging.getLogger(__name__)

_FAULT = 1
_BY_SIGNAL = 128  # as in a shell: the number of the signal is added
_INTERRUPTED = _BY_SIGNAL + signal.SIGINT


class Entry(NamedTuple):
    """A subcommand.

    module: its name in mbq_runtime.commands; the module holds ``command``.
    help: its line in ``mbq --help``.
    """

    module: str
    help: str


COMMANDS = {
    "run": Entry("run", "Answer a prompt."),
    "chat": Entry("chat", "Chat with a bundle in the terminal."),
    "serve": Entry("serve", "Serve a bundle over HTTP, with the API of OpenAI."),
    "web": Entry("web", "Write a page that runs a bundle in a browser."),
    "monitor": Entry("monitor", "Watch a running mbq serve."),
    "bench": Entry("bench", "Measure speed, heat and energy at several budgets."),
    "kit": Entry("kit", "Measure this board, and write one report to send."),
    "perplexity": Entry("perplexity", "Measure how well a bundle predicts a text, at several budgets."),
    "inspect": Entry("inspect", "Show what is in a bundle and whether it runs here."),
    "verify": Entry("verify", "Check a bundle's files against its manifest."),
    "pull": Entry("pull", "Fetch a bundle from a server, a hub or a folder."),
    "trim": Entry("trim", "Copy a bundle without its deeper slices."),
    "list": Entry("list", "Show the bundles in the cache folder."),
    "rm": Entry("rm", "Remove a bundle from the cache folder."),
    "simulate": Entry("simulate", "Compare policies on a modelled board or on recorded readings."),
    "sense": Entry("sense", "Show this machine's heat, power and load."),
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = import_module(f"mbq_runtime.commands.{COMMANDS[cmd_name].module}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in COMMANDS.items()])


def _print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if not wanted or ctx.resilient_parsing:
        return
    from .version import installed_version

    click.echo(f"mbq {installed_version()}")
    ctx.exit()


_LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def _log_to_stderr(verbosity: int) -> None:
    """Show the log of this project.  Other packages keep their own levels."""
    logging.basicConfig(format=_LOG_FORMAT, stream=sys.stderr)
    logging.getLogger("mbq_runtime").setLevel(logging.INFO if verbosity == 1 else logging.DEBUG)


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_print_version, help="Show the version."
)
@click.option("-v", "--verbose", count=True, help="Show the log on stderr; -vv shows more.")
def cli(verbose: int) -> None:
    """Run and measure language-model bundles on this machine.

    A bundle is the folder that mbq-export writes.  Where a command takes BUNDLE, it also takes a source: https://HOST/FOLDER,
    hf:OWNER/NAME or file:FOLDER.  The bundle is then pulled into the cache folder once.
    """
    if verbose:
        _log_to_stderr(verbose)


class _Ended(SystemExit):
    """A signal asks the process to end."""


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Make SIGTERM and SIGHUP end what runs as an exception does, so that files and folders are cleaned up.

    A signal that the caller ignores stays ignored, as below nohup.  Later signals of these kinds do not stop the
    clean-up.
    """
    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has no SIGHUP
    numbers = [getattr(signal, name) for name in names]
    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        numbers = []
    before = {number: signal.getsignal(number) for number in numbers}
    taken = [number for number, handler in before.items() if handler is signal.SIG_DFL]

    def end(number: int, _: FrameType | None) -> None:
        for one in taken:
            signal.signal(one, signal.SIG_IGN)
        raise _Ended(_BY_SIGNAL + number)

    for number in taken:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in taken:
            # After such a signal the process only ends: what cleans up at its exit is not stopped either.
            if signal.getsignal(number) is end:
                signal.signal(number, signal.SIG_DFL)


def main(args: Sequence[str] | None = None) -> int:
    """Run ``mbq``.  An error is printed on one line.

    Args:
        args: arguments of the command; None for those of this process.

    Returns:
        The exit code: 0, that of the error, or 128 and the number of the signal that ended the command.
    """
    replace_closed()
    try:
        with _ended_by_signals():
            return _run(args)
    except _Ended as ended:
        return int(str(ended.code))


def _run(args: Sequence[str] | None) -> int:
    try:
        result = cli.main(args=args, prog_name="mbq", standalone_mode=False)
    except MbqError as error:
        return _fail(str(error), error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "", err=True)
        return error.exit_code
    except click.UsageError as error:
        hint = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        return _fail(error.format_message() + hint, error.exit_code)
    except click.ClickException as error:
        return _fail(error.format_message(), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo(err=True)
        return _INTERRUPTED
    except OSError as error:
        # A full disk below stdout, or what the system does not take as a name.
        named = f"{error.filename}: " if error.filename is not None else ""
        return _fail(f"{named}{error.strerror or error}; use another file, disk or address", _FAULT)
    except Exception as error:
        log.info("a fault", exc_info=error)
        return _fail(f"a fault of mbq: {type(error).__name__}: {error}; report it with the trace of mbq -v", _FAULT)
    return result if isinstance(result, int) else 0


def _fail(message: str, exit_code: int) -> int:
    click.echo(f"mbq: error: {printable(message)}", err=True)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
