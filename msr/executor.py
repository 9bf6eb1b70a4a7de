"""The facade: one object that plans, locks, runs and looks."""

from __future__ import annotations

import getpass
import logging
import os
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from msr.config import Config, LockingConfig, load_config
from msr.errors import (
    ConfigError,
    LockChangedError,
    ValidationError,
)
from msr.events import (
    Event,
    Listener,
)
from msr.handlers.base import DatabaseHandler
from msr.locking import Lease, LockStatus, Owner
from msr.plan import HistoryRow, ScriptStatus, describe
from msr.results import MigrationResult
from msr.runner import Run, load, required
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
        `LockHeldError`, `LockLostError`, `DatabaseError`, `MissingDriverError`, and `ConfigError`
        for a folder or a connection that cannot be used. Every error that a run raises carries
        what was done until then in `.result`.
        """
        if use_lock is None:
            use_lock = self.config.locking.enabled
        run = Run(self.handler, self.config, self._tell, wait=self._wait(wait), use_lock=use_lock)
        return await run.migrate()

    async def repair(self, version: int, *, applied: bool, wait: float | None = None) -> HistoryRow:
        """Settle a script outside a transaction that was started and never finished.

        `applied=True` when all that it does has been done: it is recorded as applied. Otherwise it
        is forgotten, so that the next run tries it again; an invalid index that it left is dropped.
        Returns the row as it was found. `wait` is in seconds.

        Raises `ConfigError` if the version is not unfinished; else what `migrate` raises.
        """
        run = Run(self.handler, self.config, self._tell, wait=self._wait(wait), use_lock=True)
        return await run.repair(version, applied=applied)

    async def list(self) -> list[ScriptStatus]:
        """Every script and every history row by version, with its status. Writes nothing.

        Raises `ValidationError`, `ConfigError` (no such folder), `DatabaseError`.
        """
        scripts, problems = await load(self.config)
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
        `reason` is kept on the row. `terminate` also ends the holder's database session; on SQLite,
        which has none, it is a `ConfigError`.

        Raises `LockBlockedError` when the holder's open transaction is in the way, `LockError`
        where the handler has no locking service, `DatabaseError`.
        """
        async with self.handler.connect(self.config) as session:
            locking = required(session.locking)
            status = await locking.get_status()
            if not status.is_locked or status.token is None:
                if token is not None and status.token != token:
                    raise LockChangedError
                return None
            if token is None:
                token = status.token
            by = f"{_user()}@{Owner.new().hostname}"
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
        run = Run(self.handler, self.config, self._tell, wait=self._wait(wait), use_lock=True)
        async with self.handler.connect(self.config) as session:
            required(session.locking)
            async with run.locked(session, running) as lease:
                assert lease is not None, "only a run with done= may end without the lock"
                yield lease

    def _wait(self, wait: float | None) -> float:
        return self.config.locking.wait if wait is None else LockingConfig(wait=wait).wait

    def _tell(self, event: Event) -> None:
        for listener in self.listeners:
            try:
                listener(event)
            except Exception:
                logger.exception("a listener failed on %s", type(event).__name__)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container with a user id and no name for it
        return f"uid-{os.getuid()}" if hasattr(os, "getuid") else "unknown"


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
