"""The facade: one object that plans, locks, runs and looks."""

from __future__ import annotations

import builtins
import getpass
import os
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio.to_thread

from msr.config import Config, LockingConfig, load_config
from msr.errors import (
    ConfigError,
    LockChangedError,
    ValidationError,
)
from msr.events import Announcer, Listener
from msr.handlers.base import DatabaseHandler
from msr.locking import Lease, LockStatus, Owner, finish
from msr.plan import MIGRATE, UNFINISHED, Goal, HistoryRow, ScriptStatus, describe, make_plan
from msr.results import MigrationResult, PlannedScript, ScriptChange
from msr.runner import Run, load, may_be_held, required
from msr.scripts import Problem, Script
from msr.urls import Dialect, parse_url

__all__ = ["MigrationScriptExecutor", "dialect_of", "migrate", "validate"]


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
        self,
        target: int | None = None,
        *,
        steps: int | None = None,
        out_of_order: bool | None = None,
        single_transaction: bool | None = None,
        wait: float | None = None,
        use_lock: bool | None = None,
    ) -> MigrationResult:
        """Apply every pending script, each in a transaction with its history row, under the lock.

        With nothing pending this costs one connection and one query. While another process holds
        the lock this waits up to `wait` seconds (default: `config.locking.wait`), and returns
        without the lock as soon as the other has applied everything. `target` is the last version
        to apply, `steps` the number of scripts to apply at most; repeatable scripts run when no
        other is left. `out_of_order` and `single_transaction` stand in for `config.out_of_order`
        and `config.transaction`. `use_lock=False` takes no lock at all: for emergencies.

        Raises `ValidationError` before anything runs, `MigrationError` when a script fails,
        `LockHeldError`, `LockLostError`, `DatabaseError`, `MissingDriverError`, and `ConfigError`
        for a folder, a connection or a target that cannot be used. Every error that a run raises
        carries what was done until then in `.result`.
        """
        goal = self._migrate(target, steps, out_of_order)
        async with self._run(goal, wait, use_lock, single_transaction) as run:
            return await run.execute()

    async def down(
        self,
        target: int | None = None,
        *,
        steps: int | None = None,
        single_transaction: bool | None = None,
        wait: float | None = None,
        use_lock: bool | None = None,
    ) -> MigrationResult:
        """Take back every script that is newer than version `target`, or the `steps` newest.

        The newest goes first, each with its `.down.sql` or `down`, in a transaction with the
        removal of its history row, under the lock. Version 0 takes back all of them, except a
        script of that version. The repeatable scripts run again at the next `migrate`, for what was
        taken back may have taken their views along.

        Raises `ValidationError` before anything runs if a script has no way down, `RollbackError`
        when one fails, and what `migrate` raises.
        """
        goal = Goal("down", target=target, steps=_at_least_one(steps))
        async with self._run(goal, wait, use_lock, single_transaction) as run:
            return await run.execute()

    async def plan_migrate(
        self,
        target: int | None = None,
        *,
        steps: int | None = None,
        out_of_order: bool | None = None,
        single_transaction: bool | None = None,
    ) -> list[PlannedScript]:
        """What `migrate` would run now. Takes no lock, writes and creates nothing.

        Raises what `migrate` raises before anything runs.
        """
        goal = self._migrate(target, steps, out_of_order)
        async with self._run(goal, None, single_transaction=single_transaction) as run:
            return await run.look()

    async def plan_down(
        self,
        target: int | None = None,
        *,
        steps: int | None = None,
        single_transaction: bool | None = None,
    ) -> list[PlannedScript]:
        """What `down` would run now, as `plan_migrate`."""
        goal = Goal("down", target=target, steps=_at_least_one(steps))
        async with self._run(goal, None, single_transaction=single_transaction) as run:
            return await run.look()

    async def baseline(self, version: int, *, wait: float | None = None) -> bool:
        """Record that everything up to `version` was there before msr came, under the lock.

        Scripts up to that version then never run. False if just that is recorded already. Raises
        `ConfigError` if the history holds anything else, and what `migrate` raises.
        """
        goal = Goal("baseline", target=version, by=_somebody())
        async with self._run(goal, wait) as run:
            await run.execute()
            return bool(run.recorded)

    async def find_changes(self) -> list[ScriptChange]:
        """The scripts that were edited after they were applied, and what was edited.

        Writes nothing. Raises `ConfigError`, `DatabaseError`.
        """
        scripts, _ = await load(self.config)
        async with self.handler.connect(self.config) as session:
            history = await session.read_history()
            changed = {it.version for it in describe(scripts, history) if it.status == "changed"}
            rows = {row.version: row for row in history}
            changes = []
            for script in (script for script in scripts if script.version in changed):
                row = rows[script.version]
                changes.append(_change(script, row, await session.read_text(row)))
            return changes

    async def repair(
        self,
        version: int | str,
        *,
        applied: bool | None = None,
        checksum: str | None = None,
        wait: float | None = None,
    ) -> HistoryRow | None:
        """Settle a script that keeps `migrate` from going on, under the lock, on record.

        One that was started outside a transaction and failed, or never finished: `applied=True`
        when all that it does has been done; it counts as applied. With False the next run tries it
        again, and an invalid index that it left is dropped. One that was edited after it was
        applied: `checksum`, the SHA-256 of its file as it is now (see `find_changes`), accepts
        that edit and no other.

        `version` of a repeatable script is its name. Returns the row as it was found, or None if
        there was nothing left to do. `wait` is in seconds. Raises `ConfigError` if the script needs
        no such repair; else what `migrate` raises.
        """
        goal = Goal("repair", key=version, applied=applied, checksum=checksum, by=_somebody())
        async with self._run(goal, wait) as run:
            await run.execute()
            return run.recorded[0].replaces if run.recorded else None

    async def list(self) -> list[ScriptStatus]:
        """Every script and every history row by version, with its status. Writes nothing.

        Raises `ValidationError`, `ConfigError` (no such folder), `DatabaseError`.
        """
        scripts, problems = await load(self.config)
        if problems:
            raise ValidationError(problems)
        async with self.handler.connect(self.config) as session:
            return describe(scripts, await session.read_history())

    async def validate(self) -> builtins.list[Problem]:
        """Everything wrong with the scripts, and with them and the history. Writes nothing.

        Raises `ConfigError` (no such folder), `DatabaseError`.
        """
        scripts, problems = await load(self.config)
        found = await _check(scripts, self.handler.dialect)
        goal = self._migrate(None, None, None)
        async with self.handler.connect(self.config) as session:
            plan = make_plan(scripts, await session.read_history(), goal)
            standing = plan.problems
            if any(it.rule == UNFINISHED for it in standing) and await may_be_held(session.locking):
                standing = tuple(it for it in standing if it.rule != UNFINISHED)
        return [*problems, *found, *standing]

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
        `reason` is kept on the row. `terminate` also ends the holder's database session; on SQLite,
        which has none, it is a `ConfigError`.

        Raises `LockBlockedError` when the holder's open transaction is in the way, `LockError`
        where the handler has no locking service, `DatabaseError`.
        """
        async with self.handler.connect(self.config) as session:
            locking = required(session.locking)
            status = await locking.get_status()
            if status.is_locked and status.token is not None:
                released = await locking.force_release(
                    status.token if token is None else token,
                    by=_somebody(),
                    reason=reason,
                    terminate=terminate,
                )
                if released:
                    return status
                status = await locking.get_status()  # its holder may just have released it
            if status.is_locked or token not in (None, status.token):
                raise LockChangedError
            return None

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
        async with (
            self._run(MIGRATE, wait, True) as run,
            self.handler.connect(self.config) as session,
        ):
            required(session.locking)
            async with run.locked(session, running) as lease:
                assert lease is not None, "only a run with done= may end without the lock"
                yield lease

    @asynccontextmanager
    async def _run(
        self,
        goal: Goal,
        wait: float | None,
        use_lock: bool | None = None,
        single_transaction: bool | None = None,
    ) -> AsyncIterator[Run]:
        """A run, whose listeners have heard everything when it is over."""
        announcer = Announcer(self.listeners)
        locking, batch = self.config.locking, self.config.transaction == "batch"
        try:
            yield Run(
                self.handler,
                self.config,
                announcer.tell,
                wait=locking.wait if wait is None else LockingConfig(wait=wait).wait,
                use_lock=locking.enabled if use_lock is None else use_lock,
                goal=goal,
                batch=batch if single_transaction is None else single_transaction,
            )
        finally:
            await finish(announcer.finish())

    def _migrate(self, target: int | None, steps: int | None, out_of_order: bool | None) -> Goal:
        if out_of_order is None:
            out_of_order = self.config.out_of_order == "apply"
        return Goal("migrate", target, _at_least_one(steps), out_of_order)


def _at_least_one(steps: int | None) -> int | None:
    if steps is not None and steps < 1:
        raise ConfigError("must be 1 or more", key="steps")
    return steps


def _somebody() -> str:
    return f"{_user()}@{Owner.new().hostname}"


def _change(script: Script, row: HistoryRow, before: str | None) -> ScriptChange:
    difference = None
    if before is not None:
        import difflib  # only an edited script needs it

        lines = (before.splitlines(), script.text.splitlines())
        names = (f"{script.label} (as applied)", f"{script.label} (now)")
        difference = tuple(difflib.unified_diff(*lines, *names, lineterm=""))
    assert script.version is not None, "a repeatable script is run again instead"
    return ScriptChange(script.version, script.label, row.checksum, script.checksum, difference)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container with a user id and no name for it
        return f"uid-{os.getuid()}" if hasattr(os, "getuid") else "unknown"


async def validate(config: Config, dialect: Dialect | None = None) -> list[Problem]:
    """Everything wrong with the scripts of `config.folder`, without a database.

    Without a `dialect`, SQL is wrong where every dialect says so. Raises `ConfigError`.
    """
    scripts, problems = await load(config)
    return [*problems, *await _check(scripts, dialect)]


async def _check(scripts: Sequence[Script], dialect: Dialect | None) -> list[Problem]:
    from msr.prepare import check_all  # a start of the application does without

    return await anyio.to_thread.run_sync(check_all, scripts, dialect)


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


def dialect_of(url: str) -> Dialect:
    """Which SQL the database of a URL speaks. Raises `ConfigError`."""
    return parse_url(url).dialect


def _handler(url: str) -> DatabaseHandler:
    if parse_url(url).dialect == "sqlite":
        from msr.handlers.sqlite import SqliteHandler

        return SqliteHandler(url)
    from msr.handlers.postgres import PostgresHandler

    return PostgresHandler(url)
