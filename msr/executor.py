"""The facade: one object that plans, locks, runs and looks."""

from __future__ import annotations

import getpass
import logging
import time
import traceback
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

from msr.config import Config, LockingConfig, load_config
from msr.errors import (
    ConfigError,
    DatabaseBusyError,
    LockChangedError,
    LockError,
    MigrationError,
    MsrError,
    ValidationError,
)
from msr.events import (
    Event,
    Listener,
    LockAcquired,
    ScriptApplied,
    ScriptStarted,
    WaitingForLock,
)
from msr.handlers.base import DatabaseHandler, Session, StatementError
from msr.locking import Lease, LockingService, LockStatus, Owner, hold, renew
from msr.plan import UNFINISHED, HistoryRow, Plan, ScriptStatus, describe, make_plan
from msr.results import AppliedScript, MigrationResult
from msr.scripts import PreparedScript, Problem, Script, load_scripts, prepare_script
from msr.urls import parse_url

__all__ = ["MigrationScriptExecutor", "migrate"]

logger = logging.getLogger("msr")


class MigrationScriptExecutor:
    """Migrates one database from one folder, under one lock.

    Holds no connection: every call opens its own and closes it, so one executor may live as long
    as the application and be used from several tasks. Each `listener` is called with every event
    (see `msr.events`); what it raises is logged and breaks nothing.
    """

    def __init__(
        self,
        handler: DatabaseHandler,
        config: Config | None = None,
        *,
        listeners: Iterable[Listener] = (),
    ) -> None:
        self.handler = handler
        self.config = config if config is not None else Config()
        self.listeners = list(listeners)

    @classmethod
    def from_url(
        cls,
        url: str | None = None,
        *,
        listeners: Iterable[Listener] = (),
        config_file: str | Path | None = None,
        **settings: Any,
    ) -> MigrationScriptExecutor:
        """An executor for a URL. What is not given comes from `MSR_*`, then from the config file.

        `settings` are the keys of `Config`: `folder=`, `table_name=`, `locking={"wait": 30}`.
        Raises `ConfigError`.
        """
        file = Path(config_file) if config_file is not None else None
        config = load_config(file=file, url=url, **settings)
        if config.url is None:
            raise ConfigError("no database: give a URL or set MSR_URL or DATABASE_URL", key="url")
        return cls(_handler(config.url), config, listeners=listeners)

    async def migrate(
        self, *, wait: float | None = None, use_lock: bool | None = None
    ) -> MigrationResult:
        """Apply every pending script, each in a transaction with its history row, under the lock.

        With nothing pending this costs one connection and one query. While another process holds
        the lock this waits up to `wait` seconds (default: `config.locking.wait`), and returns
        without the lock as soon as the other has applied everything. `use_lock=False` takes no
        lock at all: for emergencies.

        Raises `ValidationError` before anything runs, `MigrationError` when a script fails,
        `LockHeldError`, `LockLostError`, `DatabaseError`. Every error that a run raises carries
        what was done until then in `.result`.
        """
        if use_lock is None:
            use_lock = self.config.locking.enabled
        return await _Run(self, self._wait(wait), use_lock).migrate()

    async def list(self) -> list[ScriptStatus]:
        """Every script and every history row by version, with its status. Writes nothing."""
        scripts, problems = await self._load_scripts()
        if problems:
            raise ValidationError(problems)
        async with self.handler.connect(self.config) as session:
            return describe(scripts, await session.read_history())

    async def get_lock_status(self) -> LockStatus | None:
        """The lock as it is now; None where the handler has no locking service.

        Writes and creates nothing. Raises `DatabaseError`.
        """
        async with self.handler.connect(self.config) as session:
            return await session.locking.get_status() if session.locking is not None else None

    async def force_release_lock(
        self,
        *,
        token: int | None = None,
        reason: str | None = None,
        terminate: bool = False,
    ) -> LockStatus | None:
        """Release a lock that somebody else holds; what was released, or None if it was free.

        With `token` (of the status you decided on) nothing is released when the lock has changed
        hands since: `LockChangedError`. After the return the former holder commits nothing more.
        `reason` is kept on the row. `terminate` also ends the holder's database session.

        Raises `LockBlockedError` when the holder's open transaction is in the way, `LockError`
        where the handler has no locking service, `DatabaseError`.
        """
        async with self.handler.connect(self.config) as session:
            locking = _required(session.locking)
            status = await locking.get_status()
            if not status.is_locked or status.token is None:
                if token is not None and status.token != token:
                    raise LockChangedError
                return None
            if token is None:
                token = status.token
            by = f"{getpass.getuser()}@{Owner.new().hostname}"
            if not await locking.force_release(token, by=by, reason=reason, terminate=terminate):
                raise LockChangedError
            return status

    @asynccontextmanager
    async def lock(
        self, *, wait: float | None = None, running: str | None = None
    ) -> AsyncIterator[Lease]:
        """The migration lock around any other work: `async with executor.lock() as lease:`.

        The body is cancelled when the lock is lost. `lease.token` is the fencing token; `running`
        is what others see that you are doing.

        Raises `LockHeldError` when `wait` seconds are over, `LockLostError` on leaving if the lock
        was lost meanwhile, `LockError` where the handler has no locking service.
        """
        async with self.handler.connect(self.config) as session:
            locking = _required(session.locking)
            async with hold(
                locking,
                self._heartbeat_connection,
                timeout=self.config.locking.timeout,
                wait=self._wait(wait),
                running=running,
                on_wait=self._on_wait,
            ) as lease:
                assert lease is not None, "only a run with done= may end without the lock"
                yield lease

    @asynccontextmanager
    async def _heartbeat_connection(self) -> AsyncIterator[LockingService]:
        async with self.handler.connect(self.config) as session:
            yield _required(session.locking)

    async def _load_scripts(self) -> tuple[Sequence[Script], Sequence[Problem]]:
        return await anyio.to_thread.run_sync(load_scripts, self.config.folder)

    def _wait(self, wait: float | None) -> float:
        return self.config.locking.wait if wait is None else LockingConfig(wait=wait).wait

    def _on_wait(self, status: LockStatus, waited: float) -> None:
        self._tell(WaitingForLock(status, waited))

    def _tell(self, event: Event) -> None:
        for listener in self.listeners:
            try:
                listener(event)
            except Exception:
                logger.exception("a listener failed on %s", type(event).__name__)


class _Run:
    """One call of `migrate`, with what it has done so far."""

    def __init__(self, executor: MigrationScriptExecutor, wait: float, use_lock: bool) -> None:
        self.executor = executor
        self.handler = executor.handler
        self.config = executor.config
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
        self.token: int | None = None

    async def migrate(self) -> MigrationResult:
        try:
            self.scripts, self.broken = await self.executor._load_scripts()
            async with self.handler.connect(self.config) as session:
                await self._migrate(session)
        except MsrError as error:
            error.result = self.result()
            raise
        return self.result()

    def result(self) -> MigrationResult:
        return MigrationResult(
            executed=tuple(self.executed),
            pending_before=self.pending_before,
            applied_before=self.applied_before,
            followed=len(self.executed) < self.pending_before,
            duration=time.monotonic() - self.started,
            waited=self.waited,
            token=self.token,
        )

    async def _migrate(self, session: Session) -> None:
        plan = await self._patient_plan(session)
        self.applied_before = len(plan.applied)
        self.pending_before = len(plan.pending) + len(plan.problems) - len(_lasting(plan))
        problems = [*self.broken, *_lasting(plan)]
        self.prepared = await anyio.to_thread.run_sync(self._prepare, plan.pending)
        problems += [problem for ready in self.prepared.values() for problem in ready.problems]
        if problems:
            raise ValidationError(problems)
        if _is_done(plan):
            return
        locking = session.locking
        if locking is None or not self.use_lock:
            logger.warning("running %d scripts without the migration lock", len(plan.pending))
            await self._apply_pending(session, None)
            return

        async def done() -> bool:
            plan = await self._plan(session)
            if problems := _lasting(plan):
                raise ValidationError(problems)
            return _is_done(plan)

        asked = time.monotonic()
        async with hold(
            locking,
            self.executor._heartbeat_connection,
            timeout=self.config.locking.timeout,
            wait=self.wait,
            running=_step(plan.pending, 0),
            done=done,
            on_wait=self.executor._on_wait,
        ) as lease:
            self.waited = time.monotonic() - asked
            if lease is None:
                return
            self.token = lease.token
            self.executor._tell(LockAcquired(lease.token, self.waited))
            await self._apply_pending(session, lease)

    async def _patient_plan(self, session: Session) -> Plan:
        """The first look. A long transaction of the holder may lock out even readers (SQLite)."""
        while True:
            try:
                return await self._plan(session)
            except DatabaseBusyError:
                if time.monotonic() - self.started > self.wait:
                    raise

    async def _plan(self, session: Session) -> Plan:
        return make_plan(self.scripts, await session.read_history())

    def _prepare(self, pending: Sequence[Script]) -> dict[int, PreparedScript]:
        return {script.version: prepare_script(script, self.handler.dialect) for script in pending}

    async def _apply_pending(
        self,
        session: Session,
        lease: Lease | None,
    ) -> None:
        await session.create_history()
        plan = await self._plan(session)  # another may have applied some meanwhile
        if plan.problems:
            raise ValidationError(plan.problems)
        if not all(self.prepared[script.version].transaction for script in plan.pending):
            await session.require_outside_transaction()
        for index, script in enumerate(plan.pending):
            if lease is not None and lease.is_due and session.locking is not None:
                await renew(session.locking, lease)  # where the heartbeat has no connection
            number, total = index + 1, len(plan.pending)
            self.executor._tell(ScriptStarted(script.label, number, total))
            started = time.monotonic()
            next_step = _step(plan.pending, number)
            await self._apply(session, script, lease, next_step)
            duration = time.monotonic() - started
            self.executed.append(AppliedScript(script.version, script.name, script.label, duration))
            self.executor._tell(ScriptApplied(script.label, number, total, duration))

    async def _apply(
        self,
        session: Session,
        script: Script,
        lease: Lease | None,
        next_step: str | None,
    ) -> None:
        prepared = self.prepared[script.version]
        started = time.monotonic()
        row = HistoryRow(
            version=script.version,
            name=script.name,
            checksum=script.checksum,
            status="applied",
            executed_by=lease.locked_by if lease is not None else Owner.new().locked_by,
        )

        async def record(row: HistoryRow) -> None:
            row = replace(row, duration=time.monotonic() - started)
            if lease is not None:
                # The row that others see names the next script from this commit on.
                lease.running = next_step
            await session.record(row, lease)

        try:
            if prepared.transaction:
                async with session.transaction(lease):
                    await self._run_body(session, script, prepared)
                    await record(row)
            else:
                async with session.transaction(lease):
                    await session.record(replace(row, status="started"), lease)
                await self._run_body(session, script, prepared)
                async with session.transaction(lease):
                    await record(row)
        except MsrError:
            raise
        except Exception as error:
            raise self._failure(script, prepared, error) from error

    async def _run_body(self, session: Session, script: Script, prepared: PreparedScript) -> None:
        if prepared.up is None:
            await session.execute_script(script.text)
        else:
            await prepared.up(session.connection)

    def _failure(
        self, script: Script, prepared: PreparedScript, error: Exception
    ) -> MigrationError:
        if isinstance(error, StatementError):
            line, column, hint = error.line, error.column, error.hint
            message, sqlstate, committed = error.message, error.sqlstate, error.committed
        else:
            line, column, hint = _line_in(script.path, error), None, getattr(error, "hint", None)
            sqlstate, committed = getattr(error, "sqlstate", None), False
            message = f"{type(error).__name__}: {error}".partition("\n")[0].rstrip(".: ")
        return MigrationError(
            script.label,
            message,
            line=line,
            column=column,
            sqlstate=sqlstate,
            hint=hint,
            rolled_back=prepared.transaction and not committed,
            applied=[applied.script for applied in self.executed],
        )


async def migrate(
    url: str | None = None,
    *,
    listeners: Iterable[Listener] = (),
    config_file: str | Path | None = None,
    **settings: Any,
) -> MigrationResult:
    """Migrate a database: the boot hook in one line.

    Takes what `MigrationScriptExecutor.from_url` takes and raises what its `migrate` raises.
    """
    executor = MigrationScriptExecutor.from_url(
        url, listeners=listeners, config_file=config_file, **settings
    )
    return await executor.migrate()


def _handler(url: str) -> DatabaseHandler:
    if parse_url(url).dialect == "sqlite":
        from msr.handlers.sqlite import SqliteHandler

        return SqliteHandler(url)
    from msr.handlers.postgres import PostgresHandler

    return PostgresHandler(url)


def _required(locking: LockingService | None) -> LockingService:
    if locking is None:
        raise LockError("Locking service is not available in your database handler")
    return locking


def _lasting(plan: Plan) -> list[Problem]:
    """The problems that stand whoever holds the lock; an unfinished script may be running now."""
    return [problem for problem in plan.problems if problem.rule != UNFINISHED]


def _is_done(plan: Plan) -> bool:
    return not plan.pending and not plan.problems


def _step(pending: Sequence[Script], index: int) -> str | None:
    if index >= len(pending):
        return None
    return f"{pending[index].label} ({index + 1} of {len(pending)})"


def _line_in(path: Path, error: BaseException) -> int | None:
    """The last line of the script's own file that the exception passed through."""
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame.lineno for frame in reversed(frames) if frame.filename == str(path)), None)
