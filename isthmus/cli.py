"""The command line: its group of commands, and what each way to end means to the shell."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import click

from isthmus.base.errors import DivergedError, IsthmusError, nearest

from .commands.options import debug_option

SUCCESS, FAILURE, WRONG_USE, INTERRUPTED = 0, 1, 2, 130

# With their one line of help, so that `isthmus --help` imports none of them.
COMMANDS = {
    "demo": "Train two networks on embedded digits, match and merge them, write a report.",
    "train": "Train a reference network on a data set.",
    "symmetry": "List the units of a network that can be permuted together.",
    "match": "Bring the units of network B into the order of network A.",
    "connect": "Measure loss and accuracy on the straight path between A and B.",
    "merge": "Align, average and measure two networks or more.",
    "spawn": "Find the step from which on a training is stable to its noise.",
    "compare": "Compare the representations of the layers of A and B.",
    "units": "Match, predict and cluster the units of layers of A and B, and show them.",
    "collapse": "Measure neural collapse of a network, or of its checkpoints.",
    "subclasses": "Find clusters inside the classes of a network.",
}


class LazyGroup(click.Group):
    """A group that imports the module of a command only when that command is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name the commands, in the order in which one would use them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        if cmd_name not in COMMANDS:
            return None
        return import_module(f".commands.{cmd_name}", __package__).command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list]:
        """Find the command that the arguments begin with; a misspelt one gets a suggestion."""
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            raise click.UsageError(f"no command {args[0]!r}{nearest(args[0], COMMANDS)}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _print_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        from . import __version__

        click.echo(f"isthmus {__version__}")
        ctx.exit()


@click.group(
    cls=LazyGroup, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]}, name="isthmus"
)
@click.option(
    "--version",
    is_flag=True,
    callback=_print_version,
    expose_value=False,
    is_eager=True,
    help="Show the version and exit.",
)
@debug_option
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Align the neurons of two trained networks, walk the path between them, merge them.

    Begin with `isthmus demo`. Exit code 0: done; 2: wrong use or bad input, said before work starts; 1: failure;
    130: interrupted.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: Arguments without the program's name; those of the process by default.

    Returns:
        The exit code: 0 on success, 1 on failure, 2 on wrong use or bad input, 130 when interrupted.

    >>> main(["--version"])  # doctest: +ELLIPSIS
    isthmus ...
    0
    """
    args = list(sys.argv[1:] if args is None else args)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            outcome = cli.main(args, prog_name="isthmus", standalone_mode=False)
        return outcome if isinstance(outcome, int) else SUCCESS
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return INTERRUPTED
    except Exception as error:
        # Before the context of click exists, only the arguments can say so.
        if "--debug" in args:
            traceback.print_exc()
        return _explain(error)


def _explain(error: Exception) -> int:
    if isinstance(error, click.ClickException):
        context = getattr(error, "ctx", None)
        hint = f" (see '{context.command_path} --help')" if isinstance(context, click.Context) else ""
        click.echo(f"error: {error.format_message()}{hint}", err=True)
        return WRONG_USE
    if isinstance(error, IsthmusError):
        click.echo(f"error: {error}", err=True)
        return FAILURE if isinstance(error, DivergedError) else WRONG_USE
    click.echo(f"error: {type(error).__name__}: {error} (--debug shows where)", err=True)
    return FAILURE


def _show_warning(message: Warning | str, *_: Any) -> None:
    click.echo(f"warning: {message}", err=True)
