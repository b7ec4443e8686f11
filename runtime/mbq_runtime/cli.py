"""``mbq``: one line per command; a command's module is imported when it is called, not before."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

import click

from .errors import MbqError

_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class Entry(NamedTuple):
    """module: below mbq_runtime.commands, holding ``command``; help: the line in ``mbq --help``."""

    module: str
    help: str


COMMANDS = {
    "run": Entry("run", "Answer a prompt."),
    "chat": Entry("chat", "Talk with a bundle in the terminal."),
    "serve": Entry("serve", "Offer a bundle over HTTP, as OpenAI's API does."),
    "monitor": Entry("monitor", "Watch a running mbq serve."),
    "bench": Entry("bench", "Measure speed, heat and energy at several budgets."),
    "perplexity": Entry("perplexity", "Measure how well a bundle predicts a text, at several budgets."),
    "inspect": Entry("inspect", "Show what is in a bundle and whether it runs here."),
    "verify": Entry("verify", "Check a bundle's files against its manifest."),
    "simulate": Entry("simulate", "Compare policies on a modelled board or on recorded readings."),
    "sense": Entry("sense", "Show what this machine tells of its heat, power and load."),
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
    from importlib.metadata import PackageNotFoundError, version

    try:
        click.echo(f"mbq {version('mbq-export')}")
    except PackageNotFoundError:  # run from a source tree
        click.echo("mbq, not installed")
    ctx.exit()


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_print_version, help="Show the version."
)
def cli() -> None:
    """Run and measure language-model bundles on this machine.

    A bundle is the folder that mbq-export writes.
    """


def main(args: Sequence[str] | None = None) -> int:
    """Run ``mbq`` and return its exit code: 0, or that of the error, which is printed on one line."""
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
    return result if isinstance(result, int) else 0


def _fail(message: str, exit_code: int) -> int:
    click.echo(f"mbq: error: {' '.join(message.split())}", err=True)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
