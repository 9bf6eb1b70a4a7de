"""The one run loop: look, lock, look again, carry out each step, and keep account of it.

Every command that changes the database is a `Goal` that `plan` turns into steps. Steps are carried
out in units, each of them all or nothing: a script and its history row or, with
`transaction="batch"`, all of them. A unit that waited too long for a lock has been rolled back, so
it may be tried again. A script outside a transaction is recorded before and after instead.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import anyio
import anyio.to_thread

from msr.config import Config
from msr.errors import (
    DatabaseBusyError,
    DatabaseError,
    LockError,
    LockLostError,
    MigrationError,
    MsrError,
    RollbackError,
    ValidationError,
)
from msr.events import (
    Event,
    LockAcquired,
    LockLost,
    LockReleased,
    RunFailed,
    RunFinished,
    RunStarted,
    ScriptFailed,
    ScriptFinished,
    ScriptProgress,
    ScriptRetried,
    ScriptStarted,
    WaitingForLock,
)
from msr.handlers.base import NO_LIMITS, DatabaseHandler, Limits, Session, StatementError
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
from msr.plan import MIGRATE, UNFINISHED, Goal, HistoryRow, Plan, RowStatus, Step, make_plan
from msr.prepare import PreparedScript, ScriptContext, prepare
from msr.results import ExecutedScript, MigrationResult, PlannedScript
from msr.scripts import Problem, Script, load_scripts

__all__ = ["Run", "load", "locking_connection", "required"]

logger = logging.getLogger("msr")

RESOLVE_BOUND = 10.0
"""Seconds for finding out whether a commit that was interrupted took effect."""

LONGEST_PAUSE = 30.0
"""Seconds between two attempts at a script that waited too long for a lock."""

LOCK_TIMEOUT = "55P03"
KEPT_TEXT = 1_000_000
"""Characters of a script that the history keeps, to show later what was edited."""


class _Numbered(NamedTuple):
    """A step and its place among the scripts that run, from 1."""

    step: Step
    label: str
    number: int
    total: int

    def __str__(self) -> str:
        what = "" if self.step.action == "apply" else f"{self.step.action} "
        return f"{what}{self.label} ({self.number} of {self.total})"


class Run:
    """One use of the lock: for a goal, or for whatever the caller does under `locked`.

    `tell` gets every event, `wait` is in seconds. `batch`: everything in one transaction.
    """

    def __init__(
        self,
        handler: DatabaseHandler,
        config: Config,
        tell: Callable[[Event], None],
        *,
        wait: float = 0.0,
        use_lock: bool = True,
        goal: Goal = MIGRATE,
        batch: bool = False,
    ) -> None:
        self.handler = handler
        self.config = config
        self.tell = tell
        self.wait = wait
        self.use_lock = use_lock
        self.goal = goal
        self.batch = batch
        self.started = time.monotonic()
        self.scripts: Sequence[Script] = ()
        self.broken: Sequence[Problem] = ()  # what is wrong with the folder, whatever is pending
        self.prepared: dict[int | str, PreparedScript] = {}
        self.executed: list[ExecutedScript] = []
        self.recorded: list[Step] = []
        self.pending_before = 0
        self.applied_before = 0
        self.waited = 0.0
        self.unlocked = Owner.new()  # who runs where there is no lock
        self.finished = False
        self.token: int | None = None

    async def execute(self) -> MigrationResult:
        """Reach the goal."""
        self.tell(RunStarted(self.goal.command))
        try:
            self.scripts, self.broken = await load(self.config)
            async with self.handler.connect(self.config) as session:
                await self._execute(session)
        except BaseException as error:
            if isinstance(error, MsrError):
                error.result = self.result()
            self.tell(RunFailed(self.goal.command, error))
            raise
        self.finished = True
        result = self.result()
        self.tell(RunFinished(self.goal.command, result))
        return result

    async def look(self) -> list[PlannedScript]:
        """What `execute` would run, without the lock and without writing anything."""
        self.scripts, self.broken = await load(self.config)
        async with self.handler.connect(self.config) as session:
            plan = await self._checked_plan(session)
            if plan.problems and not await _may_be_held(session.locking):
                raise ValidationError([await self._explained(session, it) for it in plan.problems])
        return [
            PlannedScript(
                action="apply" if step.action == "apply" else "revert",
                version=step.script.version,
                name=step.script.name,
                script=self.prepared[step.key].label,
                kind=step.script.kind,
                transaction=self.prepared[step.key].options.transaction,
                text=self.prepared[step.key].text,
            )
            for step in plan.steps
            if step.runs_script and step.script
        ]

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

    async def _execute(self, session: Session) -> None:
        plan = await self._checked_plan(session)
        if _is_done(plan):
            return

        async def done() -> bool:
            plan = await self._plan(session)
            if problems := _lasting(plan):
                raise ValidationError(problems)
            return _is_done(plan)

        async with self.locked(session, self._first(plan), done) as lease:
            if lease is not None or not self._locks(session):
                await self._carry_out(session, lease)

    async def _checked_plan(self, session: Session) -> Plan:
        """The first look; raises `ValidationError` if anything forbids to go on."""
        plan = await self._patient_plan(session)
        self.goal = plan.goal
        self.applied_before = plan.applied
        steps = [step for step in plan.steps if step.runs_script]
        self.pending_before = len(steps) + len(plan.problems) - len(_lasting(plan))
        # Going back, or settling one script, has nothing to do with the rest of the folder.
        concerned = {step.script.label for step in steps if step.script}
        everything = self.goal.command == "migrate"
        problems = [it for it in self.broken if everything or it.file in concerned]
        problems += [await self._explained(session, problem) for problem in _lasting(plan)]
        if steps:
            self.prepared = await anyio.to_thread.run_sync(self._prepare, steps)
        for ready in self.prepared.values():
            problems += ready.problems
            if self.batch and not ready.options.transaction:
                message = "opts out of the transaction, so it cannot run in one with others: "
                message += "let this run do without a single transaction"
                problems.append(Problem("no-transaction-in-batch", ready.label, message))
        if problems:
            raise ValidationError(problems)
        return plan

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
        ours: Lease | None = None
        try:
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
                    ours = lease
                    self.token = lease.token
                    self.tell(LockAcquired(lease.token, self.waited))
                yield lease
        except LockLostError as error:
            if ours is not None:
                self.tell(LockLost(ours.token, str(error)))
            raise
        finally:
            if ours is not None and ours.released:
                self.tell(LockReleased(ours.token))

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
        return make_plan(self.scripts, await session.read_history(), self.goal)

    def _prepare(self, steps: Iterable[Step]) -> dict[int | str, PreparedScript]:
        return {
            step.key: prepare(
                step.script, "up" if step.action == "apply" else "down", self.handler.dialect
            )
            for step in steps
            if step.script and step.script.checksum  # else unreadable, and reported already
        }

    async def _carry_out(self, session: Session, lease: Lease | None) -> None:
        await session.create_history()
        plan = await self._plan(session)  # another may have done some of it meanwhile
        if plan.problems:
            raise ValidationError([await self._explained(session, it) for it in plan.problems])
        running = [step for step in plan.steps if step.runs_script]
        if not all(step.key in self.prepared for step in running):
            raise DatabaseError("the history changed under us: see msr list, then try again")
        if not all(self.prepared[step.key].options.transaction for step in running):
            await session.require_outside_transaction()
        if lease is not None:
            lease.running = self._first(plan)
        for step in plan.steps:
            if step.row and step.row.status == "retry" and step.script:
                for leftover in await session.find_leftovers(step.script.text):
                    await session.drop_leftover(leftover)
        steps = self._numbered(plan)
        for unit in self._units(steps):
            if lease is not None and lease.is_due and session.locking is not None:
                await renew(session.locking, lease)  # where the heartbeat has no connection
            await self._patiently(session, unit, steps, lease)

    def _numbered(self, plan: Plan) -> list[_Numbered]:
        """The steps, the scripts among them counted."""
        total = sum(step.runs_script for step in plan.steps)
        numbered, number = [], 0
        for step in plan.steps:
            number += step.runs_script
            ready = self.prepared.get(step.key) if step.runs_script else None
            numbered.append(_Numbered(step, ready.label if ready else str(step.key), number, total))
        return numbered

    def _units(self, steps: Sequence[_Numbered]) -> list[list[_Numbered]]:
        """What is done or undone together: all, or each script with what is recorded before it."""
        units: list[list[_Numbered]] = []
        for it in steps:
            goes_along = bool(units) and not units[-1][-1].step.runs_script
            if units and (self.batch or (goes_along and self._is_undone_by_failing([it]))):
                units[-1].append(it)
            else:
                units.append([it])
        return units

    def _first(self, plan: Plan) -> str:
        """What the lock says before the first script runs."""
        for it in self._numbered(plan):
            if it.step.runs_script:
                return str(it)
        return f"{self.goal.command} {self.goal.target or self.goal.key or ''}".strip()

    async def _explained(self, session: Session, problem: Problem) -> Problem:
        """An unfinished script's problem, with what it left behind in the database."""
        if problem.rule not in (UNFINISHED, "failed"):
            return problem
        texts = [script.text for script in self.scripts if script.label == problem.file]
        leftovers = await session.find_leftovers("".join(texts))
        if not leftovers:
            return problem
        left = f"{problem.message}; it left {', '.join(leftovers)} behind, which --retry drops"
        return replace(problem, message=left)

    async def _patiently(
        self,
        session: Session,
        unit: Sequence[_Numbered],
        steps: Sequence[_Numbered],
        lease: Lease | None,
    ) -> None:
        """Try a unit again, after a pause that doubles, while all that fails is a wait for a lock.

        Whoever waits for a table keeps everybody behind it waiting too, so the waits are short and
        the pauses are not.
        """
        pause = max(self._limits(it.step).lock_timeout for it in unit)
        retries = self.config.lock_retries if pause and self._is_undone_by_failing(unit) else 0
        for attempt in range(1, retries + 2):
            try:
                return await self._apply(session, unit, steps, lease)
            except (MigrationError, DatabaseBusyError) as error:
                failed = unit[-1] if isinstance(error, DatabaseBusyError) else _named(unit, error)
                if getattr(error, "sqlstate", LOCK_TIMEOUT) != LOCK_TIMEOUT or attempt > retries:
                    if attempt > 1 and isinstance(error, MigrationError) and not error.hint:
                        error.hint = f"tried {attempt} times: find who keeps the lock"
                    self.tell(ScriptFailed(*_place(failed), error))
                    raise
                seconds = pause * random.uniform(0.8, 1.2)
                self.tell(ScriptRetried(*_place(failed), attempt, seconds, str(error)))
                await anyio.sleep(seconds)
                pause = min(pause * 2, LONGEST_PAUSE)

    def _is_undone_by_failing(self, unit: Sequence[_Numbered]) -> bool:
        return all(
            self.prepared[it.step.key].options.transaction for it in unit if it.step.runs_script
        )

    async def _apply(
        self,
        session: Session,
        unit: Sequence[_Numbered],
        steps: Sequence[_Numbered],
        lease: Lease | None,
    ) -> None:
        """One attempt at a unit."""
        durations: dict[int | str, float] = {}
        current = unit[0]
        recording = False

        async def body(it: _Numbered) -> None:
            nonlocal current
            current = it
            if it.step.runs_script:
                self.tell(ScriptStarted(*_place(it), it.step.action))
                started = time.monotonic()
                await self._run_body(session, it, lease)
                durations[it.step.key] = time.monotonic() - started

        async def record(
            it: _Numbered, row: HistoryRow | None, replaces: HistoryRow | None, last: bool
        ) -> None:
            nonlocal recording
            recording = last
            if lease is not None and last:
                following = steps[steps.index(it) + 1 :]
                lease.running = str(following[0]) if following else None  # from this commit on
            text = it.step.script.text if it.step.script and row else ""
            keep = text if 0 < len(text) <= KEPT_TEXT else None
            await session.record(row, lease, replaces=replaces, text=keep)

        failure: BaseException | None = None
        committed: bool | None = True

        async def look() -> None:
            nonlocal committed
            committed = None
            with anyio.move_on_after(RESOLVE_BOUND):
                committed = await session.resolve_commit()

        try:
            if self._is_undone_by_failing(unit):
                patience = max(self._limits(it.step).lock_timeout for it in unit)
                async with session.transaction(lease, patience):
                    for it in unit:
                        await body(it)
                        row = self._row(it.step, lease, durations.get(it.step.key))
                        await record(it, row, it.step.replaces, it is unit[-1])
            else:
                await self._outside_transaction(session, unit[0], lease, body, record, durations)
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
                        current.label,
                    )
        if committed:
            for it in unit:
                self._account(it, durations.get(it.step.key, 0.0))
        if failure is not None and _is_of_the_script(failure):
            if not committed:
                undone = [it.label for it in unit if it.step.key in durations]
                raise self._failure(current, failure, committed, undone) from failure
        elif failure is not None:
            raise failure

    async def _outside_transaction(
        self,
        session: Session,
        it: _Numbered,
        lease: Lease | None,
        body: Callable[[_Numbered], Awaitable[None]],
        record: Callable[[_Numbered, HistoryRow | None, HistoryRow | None, bool], Awaitable[None]],
        durations: dict[int | str, float],
    ) -> None:
        """Started, and finished or failed: whoever finds only the first knows that it broke off."""
        base = self._row(it.step, lease, None) or it.step.replaces
        assert base is not None, "a script has a row before it or after it"
        token = lease.token if lease is not None else None
        began: RowStatus = "started" if it.step.action == "apply" else "reverting"
        failed_as: RowStatus = "failed" if it.step.action == "apply" else "revert-failed"
        started = replace(base, status=began, token=token, note=None, noted_at=None)
        async with session.transaction(lease):
            await record(it, started, it.step.replaces, False)
        try:
            await body(it)
        except Exception as error:
            if _is_of_the_script(error):
                note = self._failure(it, error, False)
                failed = replace(started, status=failed_as, note=note.place_and_message)
                # If that is not to be, it stays as begun, which says the same with less certainty.
                with suppress(MsrError, StatementError):
                    async with session.transaction(lease):
                        await session.record(failed, lease, replaces=started)
            raise
        async with session.transaction(lease):
            row = self._row(it.step, lease, durations[it.step.key])
            await record(it, row, started, True)

    def _row(self, step: Step, lease: Lease | None, duration: float | None) -> HistoryRow | None:
        """The row to record, with who did it and for how long, where a script ran."""
        if step.row is None or step.action == "repair":
            return step.row
        by = lease.locked_by if lease is not None else self.unlocked.locked_by
        return replace(step.row, executed_by=by, duration=duration)

    def _limits(self, step: Step) -> Limits:
        if not step.runs_script:
            return NO_LIMITS
        options, config = self.prepared[step.key].options, self.config
        lock, statement = options.lock_timeout, options.statement_timeout
        return Limits(
            config.lock_timeout if lock is None else lock,
            config.statement_timeout if statement is None else statement,
        )

    def _account(self, it: _Numbered, duration: float) -> None:
        """It is committed."""
        step = it.step
        self.recorded.append(step)
        if not step.runs_script or step.script is None:
            return
        self.executed.append(
            ExecutedScript(
                version=step.script.version,
                name=step.script.name,
                script=it.label,
                duration=duration,
                action="apply" if step.action == "apply" else "revert",
            )
        )
        self.tell(ScriptFinished(*_place(it), duration, step.action))

    async def _run_body(self, session: Session, it: _Numbered, lease: Lease | None) -> None:
        async with session.limited(self._limits(it.step)):
            await self._run_script(session, it, lease)

    async def _run_script(self, session: Session, it: _Numbered, lease: Lease | None) -> None:
        prepared = self.prepared[it.step.key]
        if prepared.function is None:
            await session.execute_script(prepared.text)
            return

        def report(done: float, total: float | None, note: str) -> None:
            if lease is not None:
                lease.running = f"{it}, {_progress(done, total, note)}"
            self.tell(ScriptProgress(*_place(it), done, total, note))

        context = ScriptContext(
            script=it.label,
            config=self.config,
            token=lease.token if lease is not None else None,
            logger=logging.getLogger("msr.script"),
            report=report,
        )
        connection = await session.script_connection()
        with foreign_task_groups():
            await prepared.function(connection, context)

    def _failure(
        self,
        it: _Numbered,
        error: BaseException,
        committed: bool | None,
        undone: Sequence[str] = (),
    ) -> MigrationError:
        prepared = self.prepared[it.step.key]
        transaction = prepared.options.transaction
        if isinstance(error, StatementError):
            line = error.line or _line_in(prepared.path, error.__cause__)
            column, hint = error.column, error.hint
            message, sqlstate = error.message, error.sqlstate
            committed = committed or error.committed
        else:
            line, column, hint = _line_in(prepared.path, error), None, getattr(error, "hint", None)
            sqlstate = getattr(error, "sqlstate", None)
            message = f"{type(error).__name__}: {error}".partition("\n")[0].rstrip(".: ")
        kind = MigrationError if it.step.action == "apply" else RollbackError
        return kind(
            prepared.label,
            message,
            line=line,
            column=column,
            sqlstate=sqlstate,
            hint=hint,
            source=prepared.text.split("\n")[line - 1] if line else None,
            undone=[label for label in undone if label != prepared.label],
            rolled_back=None if committed is None else transaction and not committed,
            applied=[executed.script for executed in self.executed],
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


async def _may_be_held(locking: LockingService | None) -> bool:
    """Whether somebody may be at work now."""
    if locking is None:
        return False
    status = await locking.get_status()
    return status.is_locked and status.holder != "gone"


def _lasting(plan: Plan) -> list[Problem]:
    """The problems that stand whoever holds the lock; an unfinished script may be running now."""
    return [problem for problem in plan.problems if problem.rule != UNFINISHED]


def _is_done(plan: Plan) -> bool:
    return not plan.steps and not plan.problems


def _is_of_the_script(error: BaseException) -> bool:
    """Not ours, and not for us.

    A script's own sys.exit() must not end us with success, nor its awaiting of a task that it has
    cancelled look as if we had been cancelled.
    """
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        return task is not None and not task.cancelling()
    return isinstance(error, Exception | SystemExit) and not isinstance(error, MsrError)


def _named(unit: Sequence[_Numbered], error: MigrationError) -> _Numbered:
    return next((it for it in unit if it.label == error.script), unit[-1])


def _place(it: _Numbered) -> tuple[str, int, int]:
    return it.label, it.number, it.total


def _progress(done: float, total: float | None, note: str) -> str:
    text = f"{done:g}" if total is None else f"{done:g} of {total:g}"
    return f"{text} {' '.join(note.split())}".strip()


def _line_in(path: Path, error: BaseException | None) -> int | None:
    """The last line of the script's own file that the exception passed through."""
    frames = traceback.extract_tb(error.__traceback__ if error is not None else None)
    return next((frame.lineno for frame in reversed(frames) if frame.filename == str(path)), None)
