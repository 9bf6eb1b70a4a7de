"""SQLite, through aiosqlite: the connection, the history and the scripts' transactions.

The lock is next door, in `sqlite_lock`. Its fence is here. There is one writer at a time, so
whoever is inside `BEGIN IMMEDIATE` can neither be overtaken nor renew from elsewhere: the renewal
*is* the fence. The first and the last statement of a script's transaction renew the lock's row
`WHERE token AND locked_by` and must hit it. Meanwhile the lease is `secured`, and the heartbeat
leaves it alone.

Each operation is one hop to aiosqlite's thread, however many statements it takes, because a hop
costs more than most statements. The thread goes on when the task that waits is cancelled, so a
cancelled hop interrupts its statement and is waited for.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
import uuid
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import quote

import anyio
import anyio.to_thread

from msr.config import Config
from msr.errors import (
    ConfigError,
    DatabaseBusyError,
    DatabaseError,
    DatabaseUnreachableError,
    LockLostError,
    MissingDriverError,
    MsrError,
)
from msr.handlers.base import StatementError, foreign_table, history_row, quoted_names
from msr.handlers.sqlite_lock import (
    RENEW,
    SqliteLocking,
    is_busy,
    lease_values,
    read_rows,
)
from msr.locking import Lease, finish
from msr.plan import HistoryRow
from msr.sql import Statement, split_sqlite
from msr.urls import parse_url

if TYPE_CHECKING:
    import aiosqlite

__all__ = ["SqliteHandler"]

T = TypeVar("T")

READ_BUSY = 5.0
WRITE_BUSY = 30.0
BUSY_PIECE = 0.2
"""Seconds to wait for other connections: to read; to begin or commit a script, in pieces of."""

NOT_AUTHORIZED = "not authorized"
ENDED_TRANSACTION = (
    "the script would end the transaction that msr runs it in: remove its BEGIN, COMMIT or "
    "ROLLBACK (executescript() and commit() are one), or let it opt out of the transaction"
)

# The statements. {lock}, {history} and {token} are quoted identifiers; values travel as :name.

CREATE_HISTORY = """
CREATE TABLE IF NOT EXISTS {history} (
    version INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    checksum TEXT NOT NULL,
    status TEXT NOT NULL,
    started_at TEXT NOT NULL,
    duration REAL,
    executed_by TEXT,
    database_user TEXT,
    token INTEGER
)
"""

READ_HISTORY = """
SELECT version, name, checksum, status, started_at, duration, executed_by, database_user, token
FROM {history} ORDER BY version
"""

RECORD = """
INSERT INTO {history} (version, name, checksum, status, started_at, duration, executed_by,
                       token)
SELECT :version, :row_name, :checksum, :status,
       strftime('%Y-%m-%dT%H:%M:%fZ', 'now', -coalesce(:duration, 0) || ' seconds'),
       :duration, :executed_by, :token WHERE true
ON CONFLICT (version) DO UPDATE SET status = excluded.status, duration = excluded.duration
WHERE status = 'started' AND token IS excluded.token
"""

FINISH = "UPDATE {history} SET status = 'applied' WHERE version = :version AND status = 'started'"
FORGET = "DELETE FROM {history} WHERE version = :version AND status = 'started'"


class SqliteHandler:
    """An SQLite database, by URL: `sqlite:///relative.db`, `sqlite:////absolute.db`.

    `sqlite://:memory:` is a database that lives as long as this handler. Raises `ConfigError` for
    a URL that cannot be read.
    """

    dialect: Literal["sqlite"] = "sqlite"

    def __init__(self, url: str) -> None:
        self.url = parse_url(url)
        if self.url.dialect != self.dialect:
            raise ConfigError("not an SQLite URL", key="url")
        self._anchor: sqlite3.Connection | None = None
        if self.url.path is None:
            # A shared cache is dropped with its last connection, so this one stays open.
            self._memory = f"file:msr-{uuid.uuid4()}?mode=memory&cache=shared"
            self._anchor = sqlite3.connect(self._memory, uri=True, check_same_thread=False)
            weakref.finalize(self, self._anchor.close)

    def __repr__(self) -> str:
        return f"SqliteHandler({self.url.display!r})"

    @asynccontextmanager
    async def connect(self, config: Config) -> AsyncIterator[SqliteSession]:
        """Open one connection. A database file is made only when something is written."""
        try:
            import aiosqlite  # noqa: F401  # found missing here, not in the middle of a run
        except ImportError:
            raise MissingDriverError("aiosqlite", "sqlite") from None
        if self.url.path is None:
            session = SqliteSession(self._memory, None, config)
        else:
            path = Path(await anyio.Path(self.url.path).resolve())
            session = SqliteSession(f"file:{quote(str(path))}", path, config)
        try:
            await session.open(create=False)
            yield session
        finally:
            await session.close()


class SqliteSession:
    """One connection: the history, the scripts' transactions, and the lock through it."""

    def __init__(self, uri: str, path: Path | None, config: Config) -> None:
        self.uri = uri
        self.path = path
        self.config = config
        self.names = quoted_names(config)
        self._connection: aiosqlite.Connection | None = None
        self._stopped = False
        self._committed = False
        self._has_history = False
        self._has_read = False
        self.locking = SqliteLocking(self)

    def sql(self, template: str) -> str:
        return template.format_map(self.names)

    @property
    def connection(self) -> aiosqlite.Connection:
        assert self._connection is not None, "opened by create_history at the latest"
        return self._connection

    async def open(self, *, create: bool) -> bool:
        """Connect unless connected; False if there is no database and none is to be made."""
        if self._connection is not None:
            return True
        if self.path is not None and not await anyio.Path(self.path).exists():
            if not await anyio.Path(self.path.parent).is_dir():
                raise DatabaseUnreachableError(
                    f"cannot open {self.path}: there is no folder {self.path.parent}"
                )
            if not create:
                return False
        import aiosqlite

        mode = "" if self.path is None else "?mode=rwc" if create else "?mode=rw"

        async def connect() -> None:
            self._connection = await aiosqlite.connect(
                self.uri + mode, uri=True, isolation_level=None, timeout=READ_BUSY
            )

        with self.explained():
            await finish(connect())  # once its thread runs, somebody has to know it to close it
        return True

    async def script_connection(self) -> aiosqlite.Connection:
        return self.connection

    async def close(self) -> None:
        async def close() -> None:
            if self._connection is not None:
                connection, self._connection = self._connection, None
                await anyio.to_thread.run_sync(self.locking.forget)
                await connection.close()

        await finish(close())  # an unclosed one keeps the interpreter running

    async def read_history(self) -> Sequence[HistoryRow]:
        if not await self.open(create=False):
            return []
        rows = await self.hop(self._read_history)
        self._has_history = bool(rows)
        return [history_row(row) for row in rows]

    async def create_history(self) -> None:
        await self.open(create=True)
        if not self._has_history:
            await self.hop(self._patiently, self.sql(CREATE_HISTORY))

    async def require_outside_transaction(self) -> None:
        """Always possible here."""

    @asynccontextmanager
    async def transaction(self, lease: Lease | None) -> AsyncIterator[None]:
        self._committed = False
        try:
            await self.hop(self._begin, lease)
            if lease is not None:
                lease.secured = True
            yield
            await self.hop(self._commit)
        except sqlite3.DatabaseError as error:  # out of a Python script's own statement
            await self._undo(cancelled=False)
            if str(error) == NOT_AUTHORIZED:
                raise StatementError(ENDED_TRANSACTION) from error
            raise
        except BaseException as error:
            await self._undo(cancelled=not isinstance(error, Exception))
            raise
        finally:
            if lease is not None and lease.secured:
                lease.secured = False
                # However long it took, until now nobody could have taken the lock. Whether it still
                # is ours shows at the next renewal or fence.
                lease.trust(time.monotonic())

    async def _undo(self, *, cancelled: bool) -> None:
        """Leave no transaction open, if need be by closing the connection."""
        with anyio.CancelScope(shield=True):
            if cancelled:  # a script's own statement may still be running
                await self.connection.interrupt()
            with suppress(MsrError):
                await self.hop(self._rollback)
            if self.connection.in_transaction:
                await self.close()

    async def resolve_commit(self) -> bool | None:
        return self._committed

    async def execute_script(self, text: str) -> None:
        await self.hop(self._execute_all, split_sqlite(text))

    async def record(self, row: HistoryRow, lease: Lease | None) -> None:
        await self.hop(self._record, row, lease)

    async def find_leftovers(self, text: str) -> Sequence[str]:
        return ()  # SQLite has nothing that a killed statement leaves behind

    async def drop_leftover(self, leftover: str) -> None:
        """Never called: there are none."""

    async def repair(self, version: int, applied: bool, lease: Lease | None) -> None:
        await self.hop(self._repair, version, applied, lease)

    def _read_history(self, db: sqlite3.Connection) -> Sequence[Sequence[Any]]:
        if self._has_read:  # others have set it since; the connection began with it
            db.execute(f"PRAGMA busy_timeout = {int(READ_BUSY * 1000)}")
        self._has_read = True
        return read_rows(db, self.sql(READ_HISTORY), {})

    def _begin(self, db: sqlite3.Connection, lease: Lease | None) -> None:
        if db.in_transaction:
            db.execute("ROLLBACK")
            raise StatementError(
                "the script left a transaction open, which was rolled back: add its COMMIT"
            )
        self._patiently(db, "BEGIN IMMEDIATE")
        if lease is not None:
            self._fence(db, lease)
        db.set_authorizer(_forbid_transaction_control)

    def _commit(self, db: sqlite3.Connection) -> None:
        db.set_authorizer(None)
        try:
            self._patiently(db, "COMMIT")
        except sqlite3.Error as error:  # a deferred foreign key, a full disk
            if is_busy(error):
                raise
            raise StatementError(str(error)) from error
        self._committed = True

    def _rollback(self, db: sqlite3.Connection) -> None:
        db.set_authorizer(None)
        if db.in_transaction:
            db.execute("ROLLBACK")

    def _patiently(self, db: sqlite3.Connection, statement: str) -> None:
        """Wait for other connections in short pieces, because no interrupt ends such a wait."""
        db.execute(f"PRAGMA busy_timeout = {int(BUSY_PIECE * 1000)}")
        deadline = time.monotonic() + WRITE_BUSY
        while True:
            try:
                db.execute(statement)
                return
            except sqlite3.OperationalError as error:
                if not is_busy(error) or self._stopped or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)  # a shared cache does not wait at all

    def _execute_all(self, db: sqlite3.Connection, statements: Sequence[Statement]) -> None:
        for statement in statements:
            if self._stopped:
                raise sqlite3.OperationalError("interrupted")
            try:
                db.execute(statement.text).fetchall()
            except (sqlite3.Error, sqlite3.Warning) as error:
                message = str(error)
                if message == NOT_AUTHORIZED:
                    message = ENDED_TRANSACTION
                raise StatementError(message, line=statement.line) from error

    def _record(self, db: sqlite3.Connection, row: HistoryRow, lease: Lease | None) -> None:
        if not db.in_transaction:  # INSERT OR ROLLBACK, say
            raise StatementError(ENDED_TRANSACTION, committed=True)
        values = {
            "version": row.version,
            "row_name": row.name,
            "checksum": row.checksum,
            "status": row.status,
            "duration": row.duration,
            "executed_by": row.executed_by,
            "token": lease.token if lease is not None else None,
        }
        changed = db.execute(self.sql(RECORD), values).rowcount
        if lease is not None:
            self._fence(db, lease)
        if changed != 1:
            raise LockLostError(
                "another process has applied this script: it was rolled back; run msr migrate again"
            )

    def _repair(
        self, db: sqlite3.Connection, version: int, applied: bool, lease: Lease | None
    ) -> None:
        db.execute(self.sql(FINISH if applied else FORGET), {"version": version})
        if lease is not None:
            self._fence(db, lease)

    def _fence(self, db: sqlite3.Connection, lease: Lease) -> None:
        if db.execute(self.sql(RENEW), lease_values(lease)).rowcount != 1:
            raise LockLostError(
                "the migration lock was lost, so the script was rolled back; "
                "see who took it and why with: msr lock:status"
            )

    async def hop(self, function: Callable[..., T], *args: object) -> T:
        """Run `function(sqlite3_connection, *args)` in the connection's thread, as one hop."""
        connection = self.connection
        self._stopped = False
        # aiosqlite has no public way to run a function there; this one has been stable for years.
        call = connection._execute(function, connection._conn, *args)  # type: ignore[no-untyped-call]  # private
        running = asyncio.ensure_future(call)
        try:
            with self.explained():
                return await asyncio.shield(running)
        except asyncio.CancelledError:
            self._stopped = True
            with anyio.CancelScope(shield=True):
                while not running.done():  # between two statements there is nothing to interrupt
                    await connection.interrupt()
                    await asyncio.wait([running], timeout=0.05)
            if not running.cancelled():
                running.exception()  # seen, so that asyncio does not complain about it
            raise

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn the driver's errors into ours, with what to do about them."""
        try:
            yield
        except sqlite3.Error as error:
            raise self._explain(error) from error

    def _explain(self, error: sqlite3.Error) -> MsrError:
        text, code = str(error), getattr(error, "sqlite_errorname", "")
        where = self.path or ":memory:"
        if is_busy(error):
            return DatabaseBusyError(
                f"{where} is locked by another process; try again when that has finished"
            )
        if code.startswith("SQLITE_READONLY"):
            return DatabaseError(f"{where} is read-only: give this user write access to it")
        if code.startswith("SQLITE_CANTOPEN"):
            return DatabaseUnreachableError(f"cannot open {where}: {text}")
        if "no such column" in text or "has no column" in text:
            return foreign_table(self.config, text)
        return DatabaseError(f"{where}: {text}")


def _forbid_transaction_control(action: int, *_: object) -> int:
    return sqlite3.SQLITE_DENY if action == sqlite3.SQLITE_TRANSACTION else sqlite3.SQLITE_OK
