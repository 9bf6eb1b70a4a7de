"""The one run loop: look, lock, look again, carry out each step, and keep account of it.

Every command that changes the database is a `Goal` that `plan` turns into steps. They are carried
out in units, each all or nothing: see `unit`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

from msr.config import Config
from msr.errors import (
    DatabaseBusyError,
    LockError,
    LockLostError,
    MsrError,
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
    ScriptFinished,
    WaitingForLock,
)
from msr.handlers.base import DatabaseHandler, Session
from msr.locking import (
    Lease,
    LockingService,
    LockStatus,
    Owner,
    hold,
)
from msr.plan import UNFINISHED, Goal, Plan, Step, make_plan
from msr.results import ExecutedScript, MigrationResult, PlannedScript
from msr.scripts import Problem, Script, load_scripts

if TYPE_CHECKING:
    from msr.prepare import PreparedScript
    from msr.unit import NumberedStep

__all__ = ["Run", "load", "may_be_held", "required"]

logger = logging.getLogger("msr")


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
        wait: float,
        use_lock: bool,
        goal: Goal,
        batch: bool,
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
            if not await may_be_held(session.locking):
                await self._refuse(session, plan.problems)
        return [
            PlannedScript(
                action=it.step.action,  # type: ignore[arg-type]  # of a migrate or a down
                version=it.step.script.version,
                name=it.step.script.name,
                script=it.label,
                kind=it.step.script.kind,
                transaction=it.transaction,
                text=it.prepared.text if it.prepared is not None else "",
            )
            for it in self._numbered(plan)
            if it.step.script
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
            await self._refuse(session, _lasting(plan))
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
        await self._make_ready(steps, problems)
        return plan

    async def _make_ready(self, steps: Sequence[Step], problems: Sequence[Problem] = ()) -> None:
        """Prepare the scripts that are to run; with one problem or more nothing does."""
        found = [*problems]
        if steps:
            self.prepared |= await anyio.to_thread.run_sync(self._prepare, steps)
        for ready in self.prepared.values():
            found += ready.problems
            if self.batch and not ready.options.transaction:
                message = "opts out of the transaction, so it cannot run in one with others: "
                message += "let this run do without a single transaction"
                found.append(Problem("no-transaction-in-batch", ready.label, message))
        if found:
            raise ValidationError(found)

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
                partial(_locking_connection, self.handler, self.config),
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
        """Look. A long transaction of the holder may lock out even readers (SQLite)."""
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
        from msr.prepare import prepare  # a start with nothing pending does without

        return {
            step.key: prepare(
                step.script, "up" if step.action == "apply" else "down", self.handler.dialect
            )
            for step in steps
            if step.script and step.script.checksum  # else unreadable, and reported already
        }

    async def _carry_out(self, session: Session, lease: Lease | None) -> None:
        from msr.unit import Unit, units  # a start with nothing pending does without

        await session.create_history()
        plan = await self._plan(session)  # another may have done some of it meanwhile
        await self._refuse(session, plan.problems)
        running = [step for step in plan.steps if step.runs_script]
        if unknown := [step for step in running if step.key not in self.prepared]:
            await self._make_ready(unknown)  # meanwhile another has taken something back
        if not all(self.prepared[step.key].options.transaction for step in running):
            await session.require_outside_transaction()
        if lease is not None:
            lease.running = self._first(plan)
        for step in plan.steps:
            if step.row and step.row.status == "retry" and step.script:
                for leftover in await session.find_leftovers(step.script.text):
                    # No fence can hold this back, so our session must be one that can be ended.
                    await session.require_outside_transaction()
                    await session.drop_leftover(leftover)
        executed_by = lease.locked_by if lease is not None else Owner.new().locked_by
        steps = self._numbered(plan)
        for some in units(steps, batch=self.batch):
            following = next((str(it) for it in steps[steps.index(some[-1]) + 1 :]), None)
            await Unit(
                some,
                session,
                lease,
                self.config,
                self.tell,
                self._account,
                following=following,
                before=[executed.script for executed in self.executed],
                executed_by=executed_by,
            ).carry_out()

    def _account(self, it: NumberedStep, duration: float) -> None:
        """It is committed."""
        step = it.step
        self.recorded.append(step)
        if it.prepared is not None and step.script is not None:
            self.executed.append(
                ExecutedScript(
                    version=step.script.version,
                    name=step.script.name,
                    script=it.label,
                    duration=duration,
                    action="apply" if step.action == "apply" else "revert",
                )
            )
        if it.prepared is not None or step.action == "forget":
            label, number, total = it.place
            self.tell(ScriptFinished(label, number, total, duration, step.action))

    def _numbered(self, plan: Plan) -> list[NumberedStep]:
        """The steps, the scripts among them counted."""
        from msr.unit import NumberedStep

        total = sum(step.runs_script for step in plan.steps)
        numbered, number = [], 0
        for step in plan.steps:
            number += step.runs_script
            prepared = self.prepared.get(step.key) if step.runs_script else None
            numbered.append(NumberedStep(step, prepared, number, total))
        return numbered

    def _first(self, plan: Plan) -> str:
        """What the lock says before the first script runs."""
        for it in self._numbered(plan):
            if it.prepared is not None:
                return str(it)
        return f"{self.goal.command} {self.goal.target or self.goal.key or ''}".strip()

    async def _refuse(self, session: Session, problems: Sequence[Problem]) -> None:
        """Raise `ValidationError` if there are any."""
        if problems:
            raise ValidationError([await self._explained(session, it) for it in problems])

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


async def load(config: Config) -> tuple[Sequence[Script], Sequence[Problem]]:
    """The scripts of the configured folder and what is wrong with them, read in a thread."""
    return await anyio.to_thread.run_sync(load_scripts, config.folder)


@asynccontextmanager
async def _locking_connection(
    handler: DatabaseHandler, config: Config
) -> AsyncIterator[LockingService]:
    """The lock through a connection of its own, for the heartbeat."""
    async with handler.connect(config) as session:
        yield required(session.locking)


def required(locking: LockingService | None) -> LockingService:
    if locking is None:
        raise LockError("Locking service is not available in your database handler")
    return locking


async def may_be_held(locking: LockingService | None) -> bool:
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
