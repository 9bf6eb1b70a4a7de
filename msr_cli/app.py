"""The commands, and the one place that turns errors into exit codes.

    0 done                  3 migration failed          9 lock lost
    1 error                 7 database unreachable      130 / 143 interrupted by a signal
    2 validation or usage   8 lock held by another

The lock commands know only 0, 1 and, for a wrong setting or option, 2.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import traceback
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from typing import Annotated, Any, NoReturn, TypeVar

import anyio
import typer

import msr
from msr_cli import render
from msr_cli.options import (
    ConfigFile,
    Debug,
    ExecutorPath,
    Folder,
    Json,
    Source,
    Url,
    executor_from,
)

__all__ = ["app", "run"]

T = TypeVar("T")

app = typer.Typer(
    name="msr",
    help="Run database migrations under a lock you can trust.",
    no_args_is_help=True,
    rich_markup_mode=None,  # and no pretty exceptions: both cost start-up time
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

EXIT_CODES: tuple[tuple[type[BaseException], int], ...] = (
    (msr.ConfigError, 2),
    (msr.ValidationError, 2),
    (msr.MigrationError, 3),
    (msr.DatabaseUnreachableError, 7),
    (msr.LockHeldError, 8),
    (msr.LockLostError, 9),
)


class Interrupted(msr.MsrError):
    """Ended by a signal, after everything was put back in order."""

    def __init__(self, signum: int) -> None:
        self.signum = signum
        self.applied: Sequence[str] = ()
        super().__init__(
            f"interrupted by {signal.Signals(signum).name}: what ran in a transaction is undone"
        )


class _Warnings(logging.Handler):
    """Warnings (a run without the lock, a renewal that failed, a lost future), a line each."""

    def emit(self, record: logging.LogRecord) -> None:
        _to_stderr(f"⚠️  Warning: {' '.join(record.getMessage().split())}")


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


@app.command()
def migrate(
    no_lock: Annotated[
        bool, typer.Option("--no-lock", help="Take no lock at all. For emergencies only.")
    ] = False,
    wait: Annotated[
        float | None,
        typer.Option(
            "--wait", metavar="SECONDS", min=0, show_default=False,
            help="How long to wait while another holds the lock; default locking.wait, 300.",
        ),
    ] = None,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="Do not wait at all: exit 8 if the lock is held.")
    ] = False,
    url: Url = None,
    folder: Folder = None,
    config: ConfigFile = None,
    executor: ExecutorPath = None,
    json: Json = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Apply every pending script, under the lock."""

    def work() -> None:
        if no_wait and wait is not None:
            raise msr.ConfigError("contradicts --wait", source="--no-wait")
        if no_lock and (no_wait or wait is not None):
            raise msr.ConfigError(
                "takes no lock, so there is nothing to wait for", source="--no-lock"
            )
        out = _say_nothing if json else typer.echo
        progress = render.Progress(out, _to_stderr)
        runner = executor_from(Source(url, folder, config, executor), progress)
        try:
            result = _await(
                lambda: runner.migrate(
                    wait=0 if no_wait else wait, use_lock=False if no_lock else None
                ),
                quiet=json,
            )
        except Interrupted as error:
            error.applied = progress.applied
            raise
        typer.echo(render.as_json(result) if json else render.migration_result(result))

    _guarded(work, json, debug)


app.command("up", hidden=True, help="The same as migrate.")(migrate)


@app.command()
def repair(
    version: Annotated[int, typer.Argument(metavar="VERSION", help="The unfinished script.")],
    applied: Annotated[
        bool, typer.Option("--applied", help="All that it does is done: record it as applied.")
    ] = False,
    retry: Annotated[
        bool, typer.Option("--retry", help="Its part is undone: let the next migrate run it again.")
    ] = False,
    url: Url = None,
    folder: Folder = None,
    config: ConfigFile = None,
    executor: ExecutorPath = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Settle a script that was started outside a transaction and never finished."""

    def work() -> None:
        if applied == retry:
            raise msr.ConfigError(
                "say what to record: either --applied or --retry", source="repair"
            )
        progress = render.Progress(_say_nothing, _to_stderr)
        runner = executor_from(Source(url, folder, config, executor), progress)
        row = _await(lambda: runner.repair(version, applied=applied))
        outcome = "recorded as applied" if applied else "the next msr migrate runs it again"
        text = f"✓ Version {row.version} ({row.name}): {outcome}"
        typer.echo(render.as_json({"repaired": row, "applied": applied}) if json else text)

    _guarded(work, json, debug)


@app.command("list")
def list_scripts(
    url: Url = None,
    folder: Folder = None,
    config: ConfigFile = None,
    executor: ExecutorPath = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show every script, applied and pending."""

    def work() -> None:
        runner = executor_from(Source(url, folder, config, executor))
        rows = _await(runner.list)
        typer.echo(render.as_json(rows) if json else render.script_list(rows))

    _guarded(work, json, debug)


@app.command("lock:status")
def lock_status(
    url: Url = None,
    folder: Folder = None,
    config: ConfigFile = None,
    executor: ExecutorPath = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show who holds the migration lock."""

    def work() -> None:
        runner = executor_from(Source(url, folder, config, executor))
        status = _await(runner.get_lock_status)
        typer.echo(render.as_json(status) if json else f"\n{render.lock_status(status)}")

    _guarded(work, json, debug, unreachable=1)


@app.command("lock:release")
def lock_release(
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Required: releasing a lock is dangerous.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    reason: Annotated[
        str | None,
        typer.Option("--reason", metavar="TEXT", help="Why; kept on the lock.", show_default=False),
    ] = None,
    terminate: Annotated[
        bool,
        typer.Option(
            "--terminate", help="Also end the holder's database session (PostgreSQL only)."
        ),
    ] = False,
    url: Url = None,
    folder: Folder = None,
    config: ConfigFile = None,
    executor: ExecutorPath = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Force-release a stuck migration lock."""

    def work() -> None:
        if not force:
            raise msr.LockError(render.FORCE_REQUIRED)
        if json and not yes:
            raise msr.ConfigError("cannot ask: add --yes", source="--json")
        runner = executor_from(Source(url, folder, config, executor))
        status = _await(runner.get_lock_status)
        if status is None:
            _, *sentences = render.NOT_CONFIGURED.splitlines()
            raise msr.LockError(" ".join(sentences))
        released = None
        if status.is_locked:
            if not json:
                typer.echo(f"\n{render.release_warning(status)}")
            if not yes and not _confirmed():
                typer.echo("\n✓ Operation cancelled")
                return
            released = _await(
                lambda: runner.force_release_lock(
                    token=status.token, reason=reason, terminate=terminate
                )
            )
        if json:
            typer.echo(render.as_json({"released": released}))
        else:
            text = render.NOTHING_TO_RELEASE if released is None else render.RELEASED
            typer.echo(f"\n{text}")

    _guarded(work, json, debug, unreachable=1)


def run() -> NoReturn:
    """The `msr` command: parse, run, exit."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # always a text stream
    for name in ("msr", "asyncio"):
        logging.getLogger(name).addHandler(_Warnings(logging.WARNING))
    try:
        code = app(standalone_mode=False)
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer's own: usage errors
            raise
        if type(error).__name__ == "NoArgsIsHelpError":  # `msr` alone: the help, as it is
            _to_stderr(error.format_message())
        elif text := error.format_message():
            context = getattr(error, "ctx", None)
            place = context.command_path if context is not None else "msr"
            _to_stderr(f"✗ Error: {' '.join(text.split())} (see {place} --help)")
        code = getattr(error, "exit_code", 2)
    raise SystemExit(code if isinstance(code, int) else 0)


def _guarded(work: Callable[[], None], json: bool, debug: bool, unreachable: int = 7) -> None:
    """Do the work; an error becomes one line on stderr and an exit code."""
    try:
        work()
        return
    except Interrupted as error:
        failure: Exception = error
        code = 128 + error.signum
    except Exception as error:
        failure = error
        code = next((code for kind, code in EXIT_CODES if isinstance(error, kind)), 1)
        if isinstance(error, msr.DatabaseUnreachableError):
            code = unreachable
    if debug:
        traceback.print_exception(failure)
    if json:
        typer.echo(render.error_as_json(failure))
    _to_stderr(f"✗ Error: {render.one_line(failure)}")
    raise typer.Exit(code)


def _await(work: Callable[[], Awaitable[T]], *, quiet: bool = False) -> T:
    """Run the work in an event loop; the first signal cancels it, the second ends the process.

    `quiet` keeps what a script prints out of the JSON on stdout: it goes to stderr.
    """
    received: list[int] = []

    async def interruptible() -> T:
        with anyio.CancelScope() as scope:
            loop = asyncio.get_running_loop()

            def on_signal(signum: int, _: Any) -> None:
                if received:
                    os._exit(128 + signum)
                received.append(signum)
                loop.call_soon_threadsafe(scope.cancel)

            previous = {
                signum: signal.signal(signum, on_signal)
                for signum in (signal.SIGINT, signal.SIGTERM)
            }
            try:
                return await work()
            finally:
                for signum, handler in previous.items():
                    signal.signal(signum, handler)
        raise Interrupted(received[0])

    with redirect_stdout(sys.stderr) if quiet else nullcontext():
        return anyio.run(interruptible)


def _confirmed() -> bool:
    typer.echo(f"\n{render.PROMPT}", nl=False)
    answer = sys.stdin.readline()
    if not (sys.stdin.isatty() and answer.endswith("\n")):
        typer.echo()  # the line is still open: no Enter, or one that was not echoed
    if not answer:
        raise msr.LockError(
            "no answer, so nothing was released: answer y, or add --yes where nobody can answer"
        )
    return answer.strip().lower() in ("y", "yes")


def _to_stderr(text: str) -> None:
    typer.echo(text, err=True)


def _say_nothing(text: str) -> None:
    pass
