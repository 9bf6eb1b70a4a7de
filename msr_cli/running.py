"""How a command runs: its common options, its event loop, and how it ends.

    0 done                  4 rollback failed           9 lock lost
    1 error                 7 database unreachable      130 / 143 interrupted by a signal
    2 validation or usage   8 lock held by another
    3 migration failed

The lock commands know only 0, 1 and, for a wrong setting or option, 2.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import os
import signal
import sys
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import nullcontext, redirect_stdout, suppress
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import anyio
import typer

import msr
from msr_cli import options, render

__all__ = [
    "EXIT_CODES",
    "Common",
    "Interrupted",
    "command",
    "echo",
    "run_async",
    "to_stderr",
]

T = TypeVar("T")

EXIT_CODES: tuple[tuple[type[BaseException], int], ...] = (
    (msr.ConfigError, 2),
    (msr.ValidationError, 2),
    (msr.RollbackError, 4),
    (msr.MigrationError, 3),
    (msr.DatabaseUnreachableError, 7),
    (msr.LockHeldError, 8),
    (msr.LockLostError, 9),
)


class Interrupted(msr.MsrError):
    """Ended by a signal, after everything was put back in order.

    `applied` names what was done before, `left` a script that ran outside a transaction.
    """

    def __init__(
        self,
        signum: int,
        applied: Sequence[str] = (),
        left: str | None = None,
        undone: str = "what ran in a transaction is undone",
    ) -> None:
        self.signum = signum
        self.applied = tuple(applied)
        self.left = left
        if left is not None:
            undone = f"{left} ran outside a transaction: check by hand what it did, then msr repair"
        super().__init__(f"interrupted by {signal.Signals(signum).name}: {undone}")


@dataclass(frozen=True, slots=True)
class Common:
    """The options that every command takes, as typed."""

    url: options.Url = None
    folder: options.Folder = None
    config: options.ConfigFile = None
    executor: options.ExecutorPath = None
    json: options.Json = False
    quiet: options.Quiet = False
    verbose: options.Verbose = False
    debug: options.Debug = False

    def source(self) -> options.Source:
        return options.Source(self.url, self.folder, self.config, self.executor)

    def open(self, *listeners: msr.Listener) -> msr.MigrationScriptExecutor:
        """The executor that the options describe."""
        return options.executor_from(self.source(), *listeners)

    def finish(self, text: str, document: Mapping[str, Any]) -> None:
        """Say how it ended; `--quiet` leaves that to the exit code."""
        if self.json:
            self.show("", document)
        elif not self.quiet:
            echo(text)

    def require_answer(self, yes: bool) -> None:
        """Raise `msr.ConfigError` where the command would have to ask, and cannot."""
        if self.json and not yes:
            raise msr.ConfigError("cannot ask: add --yes", source="--json")

    def agrees(self, prompt: str, done: str, *, yes: bool) -> bool:
        """Whether the user lets it be `done`: by `yes`, or asked now."""
        agreed = yes or _confirmed(prompt, done)
        if not agreed:
            echo("\n✓ Operation cancelled")
        return agreed

    def show(self, text: str, document: Mapping[str, Any]) -> None:
        """Print what the command was called for."""
        echo(render.as_json(document) if self.json else text)


def command(
    app: typer.Typer, name: str, *aliases: str, unreachable: int = 7
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a command: it gets the common options as its first argument.

    Errors become a line on stderr and an exit code, `unreachable` where there is no database.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        _, *own = inspect.signature(function, eval_str=True).parameters.values()
        hints = inspect.get_annotations(Common, eval_str=True)
        shared = [
            inspect.Parameter(
                it.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=it.default,
                annotation=hints[it.name],
            )
            for it in fields(Common)
        ]

        @functools.wraps(function)
        def run(**given: Any) -> None:
            common = Common(**{it.name: given.pop(it.name) for it in fields(Common)})
            _guarded(lambda: function(common, **given), common, unreachable)

        run.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]  # typer reads it
        run.__annotations__ = {}
        app.command(name)(run)
        for alias in aliases:
            app.command(alias, hidden=True, help=f"The same as {name}.")(run)
        return function

    return register


def _guarded(work: Callable[[], None], common: Common, unreachable: int) -> None:
    """Do the work; an error becomes one line on stderr and an exit code."""
    if common.verbose:
        logging.getLogger("msr").setLevel(logging.DEBUG)
    try:
        if common.quiet and common.verbose:
            raise msr.ConfigError("contradicts --verbose", source="--quiet")
        work()
        return
    except Interrupted as error:
        failure: Exception = error
        code = 128 + error.signum
    except typer.Exit:
        raise
    except Exception as error:
        failure = error
        code = next((code for kind, code in EXIT_CODES if isinstance(error, kind)), 1)
        if isinstance(error, msr.DatabaseUnreachableError):
            code = unreachable
    if common.debug:
        traceback.print_exception(failure)
    if common.json:
        echo(render.error_as_json(failure))
    to_stderr(f"✗ Error: {render.one_line(failure)}")
    if isinstance(failure, msr.MigrationError) and failure.source and not common.json:
        to_stderr(render.excerpt(failure))
    raise typer.Exit(code)


def run_async(work: Callable[[], Awaitable[T]], *, quiet: bool = False) -> T:
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


def _confirmed(prompt: str, done: str) -> bool:
    """Ask, on the last line of a terminal. Raises `MsrError`, nothing `done`, without an answer."""
    echo(f"\n{prompt}", end="")
    try:
        answer = sys.stdin.readline()
    except KeyboardInterrupt:
        echo("")
        raise Interrupted(signal.SIGINT, undone=f"nothing was {done}") from None
    if not (sys.stdin.isatty() and answer.endswith("\n")):
        echo("")  # the line is still open: no Enter, or one that was not echoed
    if not answer:
        raise msr.MsrError(
            f"no answer, so nothing was {done}: answer y, or add --yes where nobody can answer"
        )
    return answer.strip().lower() in ("y", "yes")


def echo(text: str, end: str = "\n") -> None:
    """Print to standard output, as long as somebody reads it.

    Whoever stops reading (`msr list | head`) wants no more, and it is no failure of what was done.
    """
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # for what else there is to say
    except OSError as error:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # the same
        raise msr.MsrError(f"the output cannot be written: {error.strerror}") from error


def to_stderr(text: str) -> None:
    """Print to standard error; that it cannot be written is nothing that could be said."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)
