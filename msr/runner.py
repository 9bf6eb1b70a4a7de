"""The one run loop: look, lock, look again, apply each pending script, and keep account of it."""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import anyio
import anyio.to_thread

from msr.config import Config
from msr.errors import (
    ConfigError,
    DatabaseBusyError,
    DatabaseError,
    LockError,
    MigrationError,
    MsrError,
    ValidationError,
)
from msr.events import Event, LockAcquired, ScriptApplied, ScriptStarted, WaitingForLock
from msr.handlers.base import DatabaseHandler, Session, StatementError
from msr.locking import (
    Lease,
    LockingService,
    LockStatus,
    Owner,
    finish,
    foreign_task_groups,
    hold,
    renew,
)
from msr.plan import UNFINISHED, HistoryRow, Plan, make_plan
from msr.results import AppliedScript, MigrationResult
from msr.scripts import PreparedScript, Problem, Script, load_scripts, prepare_script

__all__ = ["Run", "load", "locking_connection", "required"]

logger = logging.getLogger("msr")

RESOLVE_BOUND = 10.0
"""Seconds for finding out whether a commit that was interrupted took effect."""


class Run:
    """One use of the lock: `migrate`, `repair` or `lock`, with what it has done so far.

    `tell` gets every event, `wait` is in seconds.
    """

    def __init__(
        self,
        handler: DatabaseHandler,
        config: Config,
        tell: Callable[[Event], None],
        *,
        wait: float,
        use_lock: bool,
    ) -> None:
        self.handler = handler
        self.config = config
        self.tell = tell
        self.wait = wait
        self.use_lock = use_lock
        self.started = time.monotonic()
        self.scripts: Sequence[Script] = ()
        self.broken: Sequence[Problem] = ()  # what is wrong with the folder, whatever is pending
        self.prepared: dict[int, PreparedScript] = {}
        self.executed: list[AppliedScript] = []
        self.pending_before = 0
        self.applied_before = 0
        self.waited = 0.0
        self.unlocked = Owner.new()  # who runs where there is no lock
        self.finished = False
        self.token: int | None = None

    async def migrate(self) -> MigrationResult:
        """Apply what is pending."""
        try:
            self.scripts, self.broken = await load(self.config)
            async with self.handler.connect(self.config) as session:
                await self._migrate(session)
        except MsrError as error:
            error.result = self.result()
            raise
        self.finished = True
        return self.result()

    async def repair(self, version: int, *, applied: bool) -> HistoryRow:
        """Settle a script that was started and not finished; its row as it was found."""
        self.scripts, _ = await load(self.config)
        async with (
            self.handler.connect(self.config) as session,
            self.locked(session, f"repair of version {version}") as lease,
        ):
            rows = {row.version: row for row in await session.read_history()}
            row = rows.get(version)
            if row is None or row.status != "started":
                raise ConfigError(
                    f"version {version} is not unfinished, so there is nothing to repair",
                    key="version",
                )
            if not applied:
                texts = [script.text for script in self.scripts if script.version == version]
                for leftover in await session.find_leftovers("".join(texts)):
                    await session.drop_leftover(leftover)
            async with session.transaction(lease):
                await session.repair(version, applied, lease)
            return row

    def result(self) -> MigrationResult:
        return MigrationResult(
            executed=tuple(self.executed),
            pending_before=self.pending_before,
            applied_before=self.applied_before,
            followed=self.finished and len(self.executed) < self.pending_before,
            duration=time.monotonic() - self.started,
            waited=self.waited,
            token=self.token,
        )

    async def _migrate(self, session: Session) -> None:
        plan = await self._patient_plan(session)
        self.applied_before = len(plan.applied)
        self.pending_before = len(plan.pending) + len(plan.problems) - len(_lasting(plan))
        problems = [*self.broken, *_lasting(plan)]
        if plan.pending:
            self.prepared = await anyio.to_thread.run_sync(self._prepare, plan.pending)
        problems += [problem for ready in self.prepared.values() for problem in ready.problems]
        if problems:
            raise ValidationError(problems)
        if _is_done(plan):
            return

        async def done() -> bool:
            plan = await self._plan(session)
            if problems := _lasting(plan):
                raise ValidationError(problems)
            return _is_done(plan)

        async with self.locked(session, _step(plan.pending, 0), done) as lease:
            if lease is not None or not self._locks(session):
                await self._apply_pending(session, lease)

    def _locks(self, session: Session) -> bool:
        return self.use_lock and session.locking is not None

    @asynccontextmanager
    async def locked(
        self,
        session: Session,
        running: str | None,
        done: Callable[[], Awaitable[bool]] | None = None,
    ) -> AsyncIterator[Lease | None]:
        """Under the lock; None where none is to be taken, or when it turned out to be `done`."""
        locking = session.locking
        if locking is None or not self.use_lock:
            logger.warning("working on the database without the migration lock")
            yield None
            return

        def on_wait(status: LockStatus, waited: float) -> None:
            self.tell(WaitingForLock(status, waited))

        asked = time.monotonic()
        async with hold(
            locking,
            partial(locking_connection, self.handler, self.config),
            timeout=self.config.locking.timeout,
            wait=self.wait,
            running=running,
            done=done,
            on_wait=on_wait,
        ) as lease:
            self.waited = time.monotonic() - asked
            if lease is not None:
                self.token = lease.token
                self.tell(LockAcquired(lease.token, self.waited))
            yield lease

    async def _patient_plan(self, session: Session) -> Plan:
        """The first look. A long transaction of the holder may lock out even readers (SQLite)."""
        while True:
            try:
                return await self._plan(session)
            except DatabaseBusyError:
                if time.monotonic() - self.started > self.wait:
                    raise
                await anyio.sleep(0.05)

    async def _plan(self, session: Session) -> Plan:
        return make_plan(self.scripts, await session.read_history())

    def _prepare(self, pending: Sequence[Script]) -> dict[int, PreparedScript]:
        return {
            script.version: prepare_script(script, self.handler.dialect)
            for script in pending
            if script.checksum  # else unreadable, and reported as such already
        }

    async def _apply_pending(
        self,
        session: Session,
        lease: Lease | None,
    ) -> None:
        await session.create_history()
        plan = await self._plan(session)  # another may have applied some meanwhile
        if plan.problems:
            raise ValidationError([await self._explained(session, it) for it in plan.problems])
        if not all(script.version in self.prepared for script in plan.pending):
            raise DatabaseError("the history changed under us: see msr list, then run msr migrate")
        if not all(self.prepared[script.version].transaction for script in plan.pending):
            await session.require_outside_transaction()
        if lease is not None:
            lease.running = _step(plan.pending, 0)
        for index in range(len(plan.pending)):
            if lease is not None and lease.is_due and session.locking is not None:
                await renew(session.locking, lease)  # where the heartbeat has no connection
            await self._apply(session, plan.pending, index, lease)

    async def _explained(self, session: Session, problem: Problem) -> Problem:
        """An unfinished script's problem, with what it left behind in the database."""
        if problem.rule != UNFINISHED:
            return problem
        texts = [script.text for script in self.scripts if script.label == problem.file]
        leftovers = await session.find_leftovers("".join(texts))
        if not leftovers:
            return problem
        left = f"{problem.message}; it left {', '.join(leftovers)} behind, which --retry drops"
        return replace(problem, message=left)

    async def _apply(
        self, session: Session, pending: Sequence[Script], index: int, lease: Lease | None
    ) -> None:
        script, number, total = pending[index], index + 1, len(pending)
        self.tell(ScriptStarted(script.label, number, total))
        started = time.monotonic()
        recording = False

        async def record(status: Literal["started", "applied"]) -> None:
            nonlocal recording
            recording = status == "applied"
            if lease is not None and recording:
                lease.running = _step(pending, number)  # from this commit on, it is the next one
            row = HistoryRow(
                version=script.version,
                name=script.name,
                checksum=script.checksum,
                status=status,
                duration=time.monotonic() - started if recording else None,
                executed_by=lease.locked_by if lease is not None else self.unlocked.locked_by,
            )
            await session.record(row, lease)

        failure: BaseException | None = None
        committed: bool | None = True

        async def look() -> None:
            nonlocal committed
            committed = None
            with anyio.move_on_after(RESOLVE_BOUND):
                committed = await session.resolve_commit()

        try:
            await self._run_script(session, script, lease, record)
        except BaseException as error:
            failure, committed = error, False
            if recording:
                # An interrupted commit may have taken effect; say which, if it can be found out.
                try:
                    await finish(look())
                except asyncio.CancelledError as error:
                    failure = error
                if committed is None:  # what we raise may be replaced by the loss of the lock
                    logger.warning(
                        "%s: the connection broke in its commit; whether it was committed is not "
                        "known, so look with msr list",
                        script.label,
                    )
        if committed:
            duration = time.monotonic() - started
            self.executed.append(AppliedScript(script.version, script.name, script.label, duration))
            self.tell(ScriptApplied(script.label, number, total, duration))
        if failure is not None and _is_of_the_script(failure):
            if not committed:
                raise self._failure(script, failure, committed) from failure
        elif failure is not None:
            raise failure

    async def _run_script(
        self,
        session: Session,
        script: Script,
        lease: Lease | None,
        record: Callable[[Literal["started", "applied"]], Awaitable[None]],
    ) -> None:
        if self.prepared[script.version].transaction:
            async with session.transaction(lease):
                await self._run_body(session, script)
                await record("applied")
        else:
            async with session.transaction(lease):
                await record("started")
            await self._run_body(session, script)
            async with session.transaction(lease):
                await record("applied")

    async def _run_body(self, session: Session, script: Script) -> None:
        up = self.prepared[script.version].up
        if up is None:
            await session.execute_script(script.text)
        else:
            connection = await session.script_connection()
            with foreign_task_groups():
                await up(connection)

    def _failure(
        self, script: Script, error: BaseException, committed: bool | None
    ) -> MigrationError:
        transaction = self.prepared[script.version].transaction
        if isinstance(error, StatementError):
            line = error.line or _line_in(script.path, error.__cause__)
            column, hint = error.column, error.hint
            message, sqlstate = error.message, error.sqlstate
            committed = committed or error.committed
        else:
            line, column, hint = _line_in(script.path, error), None, getattr(error, "hint", None)
            sqlstate = getattr(error, "sqlstate", None)
            message = f"{type(error).__name__}: {error}".partition("\n")[0].rstrip(".: ")
        return MigrationError(
            script.label,
            message,
            line=line,
            column=column,
            sqlstate=sqlstate,
            hint=hint,
            rolled_back=None if committed is None else transaction and not committed,
            applied=[applied.script for applied in self.executed],
        )


async def load(config: Config) -> tuple[Sequence[Script], Sequence[Problem]]:
    """The scripts of the configured folder and what is wrong with them, read in a thread."""
    return await anyio.to_thread.run_sync(load_scripts, config.folder)


@asynccontextmanager
async def locking_connection(
    handler: DatabaseHandler, config: Config
) -> AsyncIterator[LockingService]:
    """The lock through a connection of its own, for the heartbeat."""
    async with handler.connect(config) as session:
        yield required(session.locking)


def required(locking: LockingService | None) -> LockingService:
    if locking is None:
        raise LockError("Locking service is not available in your database handler")
    return locking


def _lasting(plan: Plan) -> list[Problem]:
    """The problems that stand whoever holds the lock; an unfinished script may be running now."""
    return [problem for problem in plan.problems if problem.rule != UNFINISHED]


def _is_done(plan: Plan) -> bool:
    return not plan.pending and not plan.problems


def _is_of_the_script(error: BaseException) -> bool:
    """Not ours, and not for us.

    A script's own sys.exit() must not end us with success, nor its awaiting of a task that it has
    cancelled look as if we had been cancelled.
    """
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        return task is not None and not task.cancelling()
    return isinstance(error, Exception | SystemExit) and not isinstance(error, MsrError)


def _step(pending: Sequence[Script], index: int) -> str | None:
    if index >= len(pending):
        return None
    return f"{pending[index].label} ({index + 1} of {len(pending)})"


def _line_in(path: Path, error: BaseException | None) -> int | None:
    """The last line of the script's own file that the exception passed through."""
    frames = traceback.extract_tb(error.__traceback__ if error is not None else None)
    return next((frame.lineno for frame in reversed(frames) if frame.filename == str(path)), None)
