"""The `msr` command: what it is made of, and how it starts."""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated, NoReturn

import typer

import msr
from msr_cli import commands, lock_commands
from msr_cli.running import to_stderr

__all__ = ["app", "run"]

app = typer.Typer(
    name="msr",
    help="Run database migrations under a lock you can trust.",
    no_args_is_help=True,
    rich_markup_mode=None,  # and no pretty exceptions: both cost start-up time
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
commands.add_commands(app)
lock_commands.add_commands(app)


class _Log(logging.Handler):
    """Warnings (a run without the lock, a renewal that failed, a lost future), a line each."""

    def emit(self, record: logging.LogRecord) -> None:
        line = " ".join(record.getMessage().split())
        to_stderr(f"⚠️  Warning: {line}" if record.levelno >= logging.WARNING else line)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"msr {msr.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def run() -> NoReturn:
    """The `msr` command: parse, run, exit."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by `msr migrate >&-`
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # always a text stream
    for name in ("msr", "asyncio"):
        logging.getLogger(name).addHandler(_Log())
    try:
        code = app(standalone_mode=False)
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer's own: usage errors
            raise
        if type(error).__name__ == "NoArgsIsHelpError":  # `msr` alone: the help, as it is
            to_stderr(error.format_message())
        elif text := error.format_message():
            context = getattr(error, "ctx", None)
            place = context.command_path if context is not None else "msr"
            to_stderr(f"✗ Error: {' '.join(text.split())} (see {place} --help)")
        code = getattr(error, "exit_code", 2)
    raise SystemExit(code if isinstance(code, int) else 0)
