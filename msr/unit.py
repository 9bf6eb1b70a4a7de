"""One unit of a run: steps that are done together or not at all.

A unit is a transaction with a script, its history row, and what is only recorded before it; in a
batch it is all of the run. One that waited too long for a lock has been rolled back, so it may be
tried again. A script that opted out of the transaction is a unit of its own, recorded before and
after: whoever finds only the first row knows that it broke off.

An interrupted commit may have taken effect all the same. That is looked up, and the unit is counted
as what it was.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import anyio

from msr.config import Config
from msr.errors import (
    DatabaseBusyError,
    DatabaseError,
    MigrationError,
    MsrError,
    RollbackError,
)
from msr.events import Event, ScriptFailed, ScriptProgress, ScriptRetried, ScriptStarted
from msr.handlers.base import (
    CANCELED,
    LOCK_TIMEOUT,
    NO_LIMITS,
    Limits,
    Session,
    StatementError,
)
from msr.locking import Lease, finish, foreign_task_groups, printable, renew
from msr.plan import HistoryRow, RowStatus, Step
from msr.prepare import PreparedScript, ScriptContext
from msr.urls import hide_passwords

__all__ = ["NumberedStep", "Unit", "units"]

logger = logging.getLogger("msr")

RESOLVE_BOUND = 10.0
"""Seconds for finding out whether a commit that was interrupted took effect."""

LONGEST_PAUSE = 30.0
"""Seconds between two attempts at a script that waited too long for a lock."""

IN_TRANSACTION = "25001"
"""The sqlstate of a statement that must not be inside a transaction."""

KEPT_TEXT = 1_000_000
"""Characters of a script that the history keeps, to show later what was edited."""


@dataclass(frozen=True, slots=True)
class NumberedStep:
    """A step and its place among the scripts that run, from 1; `prepared` is what runs, if any.

    What is recorded before the first script has the number 0.
    """

    step: Step
    prepared: PreparedScript | None
    number: int
    total: int

    @property
    def label(self) -> str:
        if self.prepared is not None:
            return self.prepared.label
        return self.step.script.label if self.step.script else str(self.step.key)

    @property
    def place(self) -> tuple[str, int, int]:
        return self.label, self.number, self.total

    @property
    def transaction(self) -> bool:
        return self.prepared is None or self.prepared.options.transaction

    def __str__(self) -> str:
        what = "" if self.step.action == "apply" else f"{self.step.action} "
        return f"{what}{self.label} ({self.number} of {self.total})"


def units(steps: Sequence[NumberedStep], *, batch: bool) -> list[list[NumberedStep]]:
    """What is done together: all of it, or each script with what is recorded before it."""
    found: list[list[NumberedStep]] = []
    for it in steps:
        goes_along = bool(found) and found[-1][-1].prepared is None and it.transaction
        if found and (batch or goes_along):
            found[-1].append(it)
        else:
            found.append([it])
    return found


class Unit:
    """Some steps of a run, to be carried out under its lease.

    `done` is called with each step that is committed and the seconds that its script took;
    `following` is what the lock says from that commit on, `before` the scripts that the run has
    executed, and `executed_by` who does all this.
    """

    def __init__(
        self,
        steps: Sequence[NumberedStep],
        session: Session,
        lease: Lease | None,
        config: Config,
        tell: Callable[[Event], None],
        done: Callable[[NumberedStep, float], None],
        *,
        following: str | None,
        before: Sequence[str],
        executed_by: str,
    ) -> None:
        self.steps = steps
        self.session = session
        self.lease = lease
        self.config = config
        self.tell = tell
        self.done = done
        self.following = following
        self.before = before
        self.executed_by = executed_by
        # Of the attempt that is under way:
        self._current = steps[0]
        self._durations: dict[int | str, float] = {}
        self._recording = False  # the last row: from then on all of it may be committed
        self._committed: bool | None = False

    async def carry_out(self) -> None:
        """Try, again and again while all that fails is a wait for a lock.

        Whoever waits for a table keeps everybody behind it waiting too, so the waits are short,
        and the pauses double.
        """
        longest = LONGEST_PAUSE
        if self.lease is not None:  # which may be renewed between two attempts only
            longest = min(longest, self.lease.timeout / 3)
        pause = min(self._patience, longest)
        retries = self.config.lock_retries if pause else 0
        for attempt in range(1, retries + 2):
            try:
                return await self._attempt()
            except (MigrationError, DatabaseBusyError) as error:
                busy = isinstance(error, DatabaseBusyError)
                waited = busy or getattr(error, "sqlstate", None) == LOCK_TIMEOUT
                if not waited or attempt > retries:
                    if waited and retries and isinstance(error, MigrationError):
                        error.hint = (
                            f"tried {attempt} times; another session keeps what it needs: end that "
                            "one, raise lock_timeout, or try again later"
                        )
                    self.tell(ScriptFailed(*self._current.place, error))
                    raise
                seconds = pause * random.uniform(0.8, 1.2)
                reason = getattr(error, "server_message", str(error))
                self.tell(ScriptRetried(*self._current.place, attempt, seconds, reason))
            await anyio.sleep(seconds)
            pause = min(pause * 2, longest)

    @property
    def _token(self) -> int | None:
        return self.lease.token if self.lease is not None else None

    @property
    def _patience(self) -> float:
        """The longest wait for a lock, zero if there is no limit or nothing to be rolled back."""
        if not all(it.transaction for it in self.steps):
            return 0.0
        return max(self._limits(it).lock_timeout for it in self.steps)

    async def _attempt(self) -> None:
        if self.lease is not None and self.lease.is_due and self.session.locking is not None:
            await renew(self.session.locking, self.lease)  # where the heartbeat has no connection
        self._current, self._durations, self._recording = self.steps[0], {}, False
        failure: BaseException | None = None
        try:
            if all(it.transaction for it in self.steps):
                await self._in_transaction()
            else:
                await self._outside_transaction(self.steps[0])
            self._committed = True
        except BaseException as error:
            failure, self._committed = error, False
            if self._recording:
                try:
                    await finish(self._look())
                except asyncio.CancelledError as cancelled:
                    failure = cancelled
        if self._committed:
            for it in self.steps:
                self.done(it, self._durations.get(it.step.key, 0.0))
        if failure is None:
            return
        if not _is_of_the_script(failure):
            raise failure
        if not self._committed:
            if self._current.prepared is None:
                raise DatabaseError(
                    f"the history could not be changed: {failure}; run the command again"
                ) from failure
            raise self._failure(self._current.prepared, failure, self._committed) from failure

    async def _in_transaction(self) -> None:
        async with self.session.transaction(self.lease, self._patience):
            for it in self.steps:
                async with self.session.nested() if len(self.steps) > 1 else nullcontext():
                    await self._run(it)
                    self._recording = it is self.steps[-1]
                    await self._record(it, self._row(it.step), it.step.replaces)

    async def _outside_transaction(self, it: NumberedStep) -> None:
        up = it.step.action == "apply"
        row = self._row(it.step) or it.step.replaces
        assert row is not None, "a script has a row before it or after it"
        begun: RowStatus = "started" if up else "reverting"
        begun_row = replace(
            row,
            status=begun,
            token=self._token,
            started_at=None,
            duration=None,
            executed_by=self.executed_by,
            database_user=None,
            note=None,
            noted_at=None,
        )
        async with self.session.transaction(self.lease):
            await self._record(it, begun_row, it.step.replaces)
        try:
            await self._run(it)
        except BaseException as error:
            if it.prepared is not None and _is_of_the_script(error):
                failed: RowStatus = "failed" if up else "revert-failed"
                note = self._failure(it.prepared, error, False).place_and_message
                # If that is not to be, it stays as begun, which says the same with less certainty.
                with suppress(MsrError, StatementError):
                    async with self.session.transaction(self.lease):
                        failed_row = replace(begun_row, status=failed, note=printable(note))
                        await self.session.record(failed_row, self.lease, replaces=begun_row)
            raise
        async with self.session.transaction(self.lease):
            self._recording = True
            await self._record(it, self._row(it.step), begun_row)

    async def _record(
        self, it: NumberedStep, row: HistoryRow | None, replaces: HistoryRow | None
    ) -> None:
        if self.lease is not None and self._recording:
            self.lease.running = self.following  # from this commit on
        script, text = it.step.script, None
        if script and row and row.checksum == script.checksum and len(script.text) <= KEPT_TEXT:
            text = script.text
        last = self._recording or not it.transaction
        await self.session.record(row, self.lease, replaces=replaces, text=text or None, last=last)

    def _row(self, step: Step) -> HistoryRow | None:
        """The row to record, with who did it and how long its script took."""
        if step.row is None or step.action == "repair":
            return step.row
        took = self._durations.get(step.key)
        return replace(step.row, executed_by=self.executed_by, duration=took)

    async def _look(self) -> None:
        """Find out whether an interrupted commit took effect; None if that is not to be known."""
        self._committed = None
        with self._settling(), anyio.move_on_after(RESOLVE_BOUND):
            self._committed = await self.session.resolve_commit()
        if self._committed is None:  # what is raised may be replaced by the loss of the lock
            logger.warning(
                "%s: the connection broke in its commit; whether it was committed is not known, so "
                "look with msr list",
                self._current.label,
            )

    @contextmanager
    def _settling(self) -> Iterator[None]:
        if self.lease is not None:
            self.lease.settling = True
        try:
            yield
        finally:
            if self.lease is not None:
                self.lease.settling = False

    async def _run(self, it: NumberedStep) -> None:
        self._current = it
        if it.prepared is None:
            return
        if self.lease is not None:
            self.lease.running = str(it)
        self.tell(ScriptStarted(*it.place, it.step.action, it.transaction))
        started = time.monotonic()
        async with self.session.limited(self._limits(it)):
            await self._run_body(it, it.prepared)
        self._durations[it.step.key] = time.monotonic() - started

    async def _run_body(self, it: NumberedStep, prepared: PreparedScript) -> None:
        if prepared.function is None:
            await self.session.execute_script(prepared.text)
            return

        def report(done: float, total: float | None, note: str) -> None:
            if self.lease is not None:
                self.lease.running = f"{it}, {_progress(done, total, note)}"
            self.tell(ScriptProgress(*it.place, done, total, note))

        context = ScriptContext(
            script=it.label,
            config=self.config,
            token=self._token,
            logger=logging.getLogger("msr.script"),
            report=report,
        )
        connection = await self.session.script_connection()
        with foreign_task_groups():
            await prepared.function(connection, context)

    def _limits(self, it: NumberedStep) -> Limits:
        if it.prepared is None:
            return NO_LIMITS
        options, config = it.prepared.options, self.config
        lock, statement = options.lock_timeout, options.statement_timeout
        return Limits(
            config.lock_timeout if lock is None else lock,
            config.statement_timeout if statement is None else statement,
        )

    def _failure(
        self, prepared: PreparedScript, error: BaseException, committed: bool | None
    ) -> MigrationError:
        """The failure of the current script, with all that is known of it."""
        it = self._current
        if isinstance(error, StatementError):
            line = error.line or _line_in(prepared.path, error.__cause__)
            column, hint, detail = error.column, error.hint, error.detail
            message, sqlstate = error.message, error.sqlstate
            committed = committed or error.committed
        else:
            line, column = _line_in(prepared.path, error), None
            hint, detail = getattr(error, "hint", None), getattr(error, "detail", None)
            sqlstate = getattr(error, "sqlstate", None)
            message = f"{type(error).__name__}: {error}".partition("\n")[0].rstrip(".: ")
            message = hide_passwords(message)
        if sqlstate == CANCELED and (limit := self._limits(it).statement_timeout):
            hint = f"its statement_timeout is {limit:g} s"
        elif sqlstate == IN_TRANSACTION:
            hint = "start the script with '-- msr: no-transaction'"
        rolled_back = None if committed is None else it.transaction and not committed
        kind = MigrationError if it.step.action == "apply" else RollbackError
        return kind(
            it.label,
            message,
            line=line,
            column=column,
            sqlstate=sqlstate,
            hint=hint,
            detail=detail,
            source=prepared.text.split("\n")[line - 1] if line else None,
            undone=[
                other.label
                for other in self.steps
                if other is not it and other.step.key in self._durations and rolled_back
            ],
            rolled_back=rolled_back,
            applied=self.before,
        )


def _is_of_the_script(error: BaseException) -> bool:
    """Not ours, and not for us.

    A script's own sys.exit() must not end us with success, nor its awaiting of a task that it has
    cancelled look as if we had been cancelled.
    """
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        return task is not None and not task.cancelling()
    return isinstance(error, Exception | SystemExit) and not isinstance(error, MsrError)


def _progress(done: float, total: float | None, note: str) -> str:
    text = f"{done:g}" if total is None else f"{done:g} of {total:g}"
    return f"{text} {printable(' '.join(note.split()))}".strip()


def _line_in(path: Path, error: BaseException | None) -> int | None:
    """The last line of the script's own file that the exception passed through."""
    frames = traceback.extract_tb(error.__traceback__ if error is not None else None)
    return next((frame.lineno for frame in reversed(frames) if frame.filename == str(path)), None)
