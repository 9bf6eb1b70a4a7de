"""How a run is shown while it goes on, and tables: on a terminal with rich, else as plain lines.

rich is loaded when there is a terminal and something to show on it, which keeps a start with
nothing to do quick.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import msr
from msr_cli import render
from msr_cli.running import echo, to_stderr

__all__ = ["Progress", "progress", "show_table"]

TELL_EVERY = 10.0
"""Seconds between two lines that say the same of a holder, or how far a script is."""

WHOLE = ("Version", "Status", "Applied at", "Duration", "Action")
"""The columns that are never broken; the others are, in a narrow terminal."""

SPARED = ("By", "Duration")
"""The columns that a narrow terminal does without, in this order, before a name is broken."""

PADDING = 3
"""Characters that rich leaves between two columns of a table."""

STYLES = {
    "applied": "green",
    "pending": "yellow",
    "changed": "red",
    "missing": "red",
    "out-of-order": "red",
    "unfinished": "red",
    "failed": "red",
    "revert": "red",
}


def show_table(headers: Sequence[str], rows: Sequence[Sequence[str]], summary: str) -> None:
    """Print a table and the line below it."""
    if sys.stdout.isatty():
        _show_rich_table(headers, rows)
    else:
        table = [headers, *rows]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for line in table:
            cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            echo("  ".join(cells).rstrip())
    echo(f"\n{summary}")


def _show_rich_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    columns = {header: [row[index] for row in rows] for index, header in enumerate(headers)}
    for header in SPARED:
        widths = [max(map(len, (name, *cells))) for name, cells in columns.items()]
        if sum(widths) + PADDING * (len(widths) - 1) > console.width:
            columns.pop(header, None)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for header in columns:
        table.add_column(header, overflow="fold", no_wrap=header in WHOLE)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*(Text(cell, style=STYLES.get(cell, "")) for cell in row))
    console.print(table)


@contextmanager
def progress(*, quiet: bool, waiting: bool = True, verbose: bool = False) -> Iterator[Progress]:
    """A listener that shows a run: `quiet` not its scripts, without `waiting` not its waiting."""
    bar = not quiet and sys.stdout.isatty()
    shown = (
        _Bar(verbose=verbose) if bar else Progress(quiet=quiet, waiting=waiting, verbose=verbose)
    )
    try:
        yield shown
    finally:
        shown.close()


class Progress:
    """Plain lines, each with its time: scripts on stdout, waiting on stderr."""

    def __init__(self, *, quiet: bool = False, waiting: bool = True, verbose: bool = False) -> None:
        self.applied: list[str] = []
        self.outside: str | None = None  # the script that runs outside a transaction
        self._quiet = quiet
        self._tells_waiting = waiting
        self._verbose = verbose
        self._told: dict[type, tuple[object, float]] = {}

    def __call__(self, event: msr.Event) -> None:
        if isinstance(event, msr.ScriptStarted):
            self.outside = None if event.transaction else event.script
        elif isinstance(event, msr.ScriptFinished | msr.ScriptFailed):
            self.outside = None
        match event:
            case msr.ScriptFinished():
                if event.action != "forget":
                    self.applied.append(event.script)
                self._say(render.finished(event))
            case msr.ScriptStarted() if self._verbose:
                self._say(f"Running {event.script} ({event.number} of {event.total})")
            case msr.ScriptProgress() if self._is_news(event, event.script):
                self._say(render.script_progress(event))
            case msr.ScriptRetried():
                self._say(render.retried(event), err=True)
            case msr.WaitingForLock(status=status) if self._tells_waiting:
                step = (status.running or "").partition("), ")[0]  # whatever its progress
                if self._is_news(event, (status.locked_by, step, status.obstacle)):
                    self._say(render.waiting(status), err=True)
            case msr.LockAcquired() if self._verbose:
                waited = render.duration(event.waited)
                self._say(f"Got the migration lock, token {event.token}, after {waited}")
            case msr.LockReleased() if self._verbose:
                self._say(f"Released the migration lock, token {event.token}")

    def close(self) -> None:
        """Nothing more will be shown."""

    def _is_news(self, event: msr.Event, news: object) -> bool:
        """Whether to tell it: what has been told is repeated only now and then."""
        before, at = self._told.get(type(event), (None, 0.0))
        if before == news and time.monotonic() - at < TELL_EVERY:
            return False
        self._told[type(event)] = (news, time.monotonic())
        return True

    def _say(self, text: str, *, err: bool = False) -> None:
        line = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {text}"
        if err:
            to_stderr(line)
        elif not self._quiet:
            try:
                echo(line)
            except msr.MsrError as error:  # what runs is worth more than the lines about it
                to_stderr(f"⚠️  Warning: {error}")


class _Bar(Progress):
    """A bar for the run and, where a script says how far it is, one for the script."""

    def __init__(self, *, verbose: bool) -> None:
        super().__init__(verbose=verbose)
        self._live: Any = None
        self._run: Any = None
        self._script: Any = None

    def __call__(self, event: msr.Event) -> None:
        match event:
            case msr.ScriptStarted():
                self._show(f"{event.script}", event.number - 1, event.total)
            case msr.ScriptProgress():
                note = render.script_progress(event)
                if self._script is None:
                    self._script = self._started().add_task(note, total=event.of)
                self._started().update(
                    self._script, description=note, completed=event.done, total=event.of
                )
                return
            case msr.ScriptFinished():
                self._show(f"{event.script}", event.number, event.total)
            case msr.WaitingForLock():
                running = event.status.running
                self._show(f"waiting, {running} runs" if running else "waiting", 0, None)
            case msr.RunFinished() | msr.RunFailed():
                self.close()
        if isinstance(event, msr.ScriptStarted | msr.ScriptFinished) and self._script is not None:
            self._started().remove_task(self._script)
            self._script = None
        super().__call__(event)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _show(self, text: str, done: int, total: int | None) -> None:
        self._started().update(self._run, description=text, completed=done, total=total)

    def _started(self) -> Any:
        if self._live is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as RichProgress
            from rich.table import Column

            whole = Column(no_wrap=True)
            text = Column(no_wrap=True, overflow="ellipsis", ratio=1)  # what room there is left
            self._live = RichProgress(
                BarColumn(20),
                MofNCompleteColumn(table_column=whole),
                TimeElapsedColumn(table_column=whole),
                TextColumn("{task.description}", markup=False, table_column=text),
                console=Console(highlight=False),
                expand=True,
                transient=True,
            )
            self._run = self._live.add_task("", total=None)
            self._script = None
            self._live.start()
        return self._live

    def _say(self, text: str, *, err: bool = False) -> None:
        if err and not sys.stderr.isatty():  # a log beside the terminal
            super()._say(text, err=True)
        elif self._live is not None:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            echo(text)
