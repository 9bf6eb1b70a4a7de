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
import os
import shutil
import sqlite3
import tempfile
import time
import uuid
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
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
from msr.handlers.base import (
    CANCELED,
    Limits,
    StatementError,
    foreign_table,
    history_row,
    quoted_names,
)
from msr.handlers.sqlite_lock import (
    NOW,
    READ_BUSY,
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

WRITE_BUSY = 30.0
BUSY_PIECE = 0.2
"""Seconds to wait for other connections: to begin or commit a script, in pieces of."""

ASK_EVERY = 10_000
"""Instructions of SQLite's machine between two looks at a statement's timeout."""

NOT_AUTHORIZED = "not authorized"
ENDED_TRANSACTION = (
    "the script would end the transaction that msr runs it in: remove its BEGIN, COMMIT or "
    "ROLLBACK (executescript() and commit() are one), or let it opt out of the transaction"
)

TIMED_OUT = "canceling statement due to statement timeout"  # in PostgreSQL's words

# The statements. {lock}, {history} and {token} are quoted identifiers; values travel as :name.

CREATE_HISTORY = """
CREATE TABLE IF NOT EXISTS {history} (
    version INTEGER UNIQUE,
    name TEXT NOT NULL,
    checksum TEXT NOT NULL,
    status TEXT NOT NULL,
    started_at TEXT NOT NULL,
    duration REAL,
    executed_by TEXT,
    database_user TEXT,
    token INTEGER,
    note TEXT,
    noted_at TEXT,
    script TEXT
)
"""

READ_HISTORY = """
SELECT version, name, checksum, status, started_at, duration, executed_by, database_user, token,
       note, noted_at
FROM {history} ORDER BY version IS NULL, version, name
"""

STARTED_AT = "strftime('%Y-%m-%dT%H:%M:%fZ', 'now', -coalesce(:duration, 0) || ' seconds')"

NOTED_AT = f"CASE WHEN :note IS NOT NULL THEN {NOW} END"

INSERT = f"""
INSERT INTO {{history}} (version, name, checksum, status, started_at, duration, executed_by,
                         database_user, token, note, noted_at, script)
SELECT :version, :name, :checksum, :status, coalesce(:started_at, {STARTED_AT}),
       :duration, :executed_by, :database_user, :token, :note, {NOTED_AT}, :script
WHERE :version IS NOT NULL
      OR NOT EXISTS (SELECT 1 FROM {{history}} WHERE version IS NULL AND name = :name)
ON CONFLICT DO NOTHING
"""

# The row that is replaced is still as it was read.
MATCHES = """
version IS :old_version AND name = :old_name AND checksum = :old_checksum
AND status = :old_status AND token IS :old_token
"""

UPDATE = f"""
UPDATE {{history}} SET
    version = :version, name = :name, checksum = :checksum, status = :status,
    started_at =
        coalesce(:started_at, CASE WHEN status = 'started' THEN started_at END, {STARTED_AT}),
    duration = :duration, executed_by = :executed_by, database_user = :database_user,
    token = :token, note = :note, noted_at = {NOTED_AT},
    script = coalesce(:script, CASE WHEN checksum = :checksum THEN script END)
WHERE {MATCHES}
"""

DELETE = f"DELETE FROM {{history}} WHERE {MATCHES}"

READ_TEXT = f"SELECT script FROM {{history}} WHERE {MATCHES}"

SAVEPOINT = "SAVEPOINT msr_script"
RELEASE = "RELEASE SAVEPOINT msr_script"


class SqliteHandler:
    """An SQLite database, by URL: `sqlite:///relative.db`, `sqlite:////absolute.db`.

    `sqlite://:memory:` is a database that lives as long as this handler, in the folder for
    temporary files. Raises `ConfigError` for a URL that cannot be read.
    """

    dialect: Literal["sqlite"] = "sqlite"

    def __init__(self, url: str) -> None:
        self.url = parse_url(url)
        if self.url.dialect != self.dialect:
            raise ConfigError("not an SQLite URL", key="url")
        if self.url.path is not None:
            self._path = Path(self.url.path)
        else:
            # SQLite's own memory, when connections share it, lets nobody read while one writes, and
            # a waiter has to read. In a file they go by the rules that everybody else goes by.
            folder = Path(tempfile.gettempdir(), f"msr-{uuid.uuid4()}")
            self._path = folder / "memory.db"
            weakref.finalize(self, _remove, folder, os.getpid())

    def __repr__(self) -> str:
        return f"SqliteHandler({self.url.display!r})"

    @asynccontextmanager
    async def connect(self, config: Config) -> AsyncIterator[SqliteSession]:
        """Open one connection. A database file is made only when something is written."""
        try:
            import aiosqlite  # noqa: F401  # found missing here, not in the middle of a run
        except ImportError:
            raise MissingDriverError("aiosqlite", "sqlite") from None
        path = anyio.Path(self._path)
        durable = self.url.path is not None
        if not durable:
            await path.parent.mkdir(mode=0o700, exist_ok=True)
        session = SqliteSession(Path(await path.resolve()), config, durable=durable)
        try:
            await session.open(create=False)
            yield session
        finally:
            await session.close()


class SqliteSession:
    """One connection: the history, the scripts' transactions, and the lock through it."""

    def __init__(self, path: Path, config: Config, *, durable: bool) -> None:
        self.path = path
        self.config = config
        self._durable = durable
        self.names = quoted_names(config)
        self._connection: aiosqlite.Connection | None = None
        self._stopped = False
        self._committed = False
        self._timed_out = False
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
        if not await anyio.Path(self.path).exists():
            if not await anyio.Path(self.path.parent).is_dir():
                raise DatabaseUnreachableError(
                    f"cannot open {self.path}: there is no folder {self.path.parent}"
                )
            if not create:
                return False
        import aiosqlite

        uri = f"file:{quote(str(self.path))}?mode={'rwc' if create else 'rw'}"

        async def connect() -> None:
            connection = aiosqlite.connect(uri, uri=True, isolation_level=None, timeout=READ_BUSY)
            try:
                self._connection = await connection
            except sqlite3.Error:  # its thread would speak of a closed loop, were that to end first
                await anyio.to_thread.run_sync(connection._thread.join)
                raise

        with self.explained():
            await finish(connect())  # once its thread runs, somebody has to know it to close it
        if not self._durable:
            await self.hop(self._execute, "PRAGMA synchronous = OFF")
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
            await self.hop(self._patiently, self.sql(CREATE_HISTORY), WRITE_BUSY)

    async def require_outside_transaction(self) -> None:
        """Always possible here."""

    @asynccontextmanager
    async def transaction(
        self, lease: Lease | None, lock_timeout: float = 0.0
    ) -> AsyncIterator[None]:
        self._committed = False
        try:
            await self.hop(self._begin, lease, lock_timeout or WRITE_BUSY)
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

    @asynccontextmanager
    async def nested(self) -> AsyncIterator[None]:
        await self.hop(self._execute, SAVEPOINT)
        yield
        try:
            await self.hop(self._execute, RELEASE)
        except DatabaseError as error:
            raise StatementError(str(error.__cause__)) from error

    def _execute(self, db: sqlite3.Connection, statement: str) -> None:
        db.execute(statement)

    @asynccontextmanager
    async def limited(self, limits: Limits) -> AsyncIterator[None]:
        """One waits for others in BEGIN only, so what is left to bound is a statement."""
        if not limits.statement_timeout:
            yield
            return
        await self.hop(self._watch_statements, limits.statement_timeout)
        try:
            yield
        except sqlite3.OperationalError as error:  # out of a Python script's own statement
            if self._timed_out:
                raise StatementError(TIMED_OUT, sqlstate=CANCELED) from error
            raise
        finally:
            with suppress(MsrError):  # the script may have closed the connection
                await self.hop(self._watch_statements, 0.0)

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

    async def record(
        self,
        row: HistoryRow | None,
        lease: Lease | None,
        *,
        replaces: HistoryRow | None = None,
        text: str | None = None,
        last: bool = True,
    ) -> None:
        await self.hop(self._record, row, lease, replaces, text)

    async def read_text(self, row: HistoryRow) -> str | None:
        if not await self.open(create=False):
            return None
        [[text]] = await self.hop(read_rows, self.sql(READ_TEXT), _identity(row)) or [[None]]
        return None if text is None else str(text)

    async def find_leftovers(self, text: str) -> Sequence[str]:
        return ()  # SQLite has nothing that a killed statement leaves behind

    async def drop_leftover(self, leftover: str) -> None:
        """Never called: there are none."""

    def _read_history(self, db: sqlite3.Connection) -> Sequence[Sequence[Any]]:
        if self._has_read:  # others have set it since; the connection began with it
            db.execute(f"PRAGMA busy_timeout = {int(READ_BUSY * 1000)}")
        self._has_read = True
        return read_rows(db, self.sql(READ_HISTORY), {})

    def _begin(self, db: sqlite3.Connection, lease: Lease | None, lock_timeout: float) -> None:
        if db.in_transaction:
            db.execute("ROLLBACK")
            raise StatementError(
                "the script left a transaction open, which was rolled back: add its COMMIT"
            )
        # This is where one waits for others here: inside the transaction there are none.
        self._patiently(db, "BEGIN IMMEDIATE", lock_timeout)
        if lease is not None:
            self._fence(db, lease)
        db.set_authorizer(_forbid_transaction_control)

    def _watch_statements(self, db: sqlite3.Connection, seconds: float) -> None:
        """Have SQLite ask us, while it works, whether a statement takes more than `seconds`."""
        deadline = time.monotonic() + seconds

        def begin(_: str) -> None:
            """A statement begins, which may be one of a trigger's: nothing tells them apart."""
            nonlocal deadline
            deadline, self._timed_out = time.monotonic() + seconds, False

        if seconds:
            self._timed_out = False

        def is_late() -> bool:
            self._timed_out = self._timed_out or time.monotonic() > deadline
            return self._timed_out

        db.set_trace_callback(begin if seconds else None)
        db.set_progress_handler(is_late if seconds else None, ASK_EVERY)

    def _commit(self, db: sqlite3.Connection) -> None:
        db.set_authorizer(None)
        try:
            self._patiently(db, "COMMIT", WRITE_BUSY)
        except sqlite3.Error as error:  # a deferred foreign key, a full disk
            if is_busy(error):
                raise
            raise StatementError(str(error)) from error
        self._committed = True

    def _rollback(self, db: sqlite3.Connection) -> None:
        db.set_authorizer(None)
        if db.in_transaction:
            db.execute("ROLLBACK")

    def _patiently(self, db: sqlite3.Connection, statement: str, seconds: float) -> None:
        """Wait for other connections in short pieces, because no interrupt ends such a wait."""
        db.execute(f"PRAGMA busy_timeout = {int(min(seconds, BUSY_PIECE) * 1000)}")
        deadline = time.monotonic() + seconds
        while True:
            try:
                db.execute(statement)
                return
            except sqlite3.OperationalError as error:
                if not is_busy(error) or self._stopped or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)  # SQLite does not wait at all for who might wait for us

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
                elif self._timed_out:
                    message = TIMED_OUT
                sqlstate = CANCELED if message == TIMED_OUT else None
                raise StatementError(message, line=statement.line, sqlstate=sqlstate) from error

    def _record(
        self,
        db: sqlite3.Connection,
        row: HistoryRow | None,
        lease: Lease | None,
        replaces: HistoryRow | None,
        text: str | None,
    ) -> None:
        if not db.in_transaction:  # INSERT OR ROLLBACK, say
            raise StatementError(ENDED_TRANSACTION, committed=True)
        values: dict[str, object] = {}
        if row is not None:
            values = {**asdict(row), "started_at": _iso(row.started_at), "script": text}
            values["token"] = lease.token if lease is not None else None
        if replaces is not None:
            values |= _identity(replaces)
        query = DELETE if row is None else INSERT if replaces is None else UPDATE
        changed = db.execute(self.sql(query), values).rowcount
        if lease is not None:
            self._fence(db, lease)
        if changed != 1:
            raise LockLostError(
                "another process has changed this script's row in the history: the script was "
                "rolled back; run the command again"
            )

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
                    with suppress(asyncio.CancelledError):  # once more; the thread still works
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
        if is_busy(error):
            return DatabaseBusyError(
                f"{self.path} is locked by another process; try again when that has finished"
            )
        if code.startswith("SQLITE_READONLY"):
            return DatabaseError(f"{self.path} is read-only: give this user write access to it")
        if code.startswith("SQLITE_CANTOPEN"):
            way_out = "name a file in a folder that this user may write to"
            return DatabaseUnreachableError(f"cannot open {self.path}: {text}; {way_out}")
        if code == "SQLITE_NOTADB":
            return DatabaseError(f"{self.path}: {text}; name an SQLite database, or a new file")
        if "no such column" in text or "has no column" in text:
            return foreign_table(self.config, text)
        return DatabaseError(f"{self.path}: {text}")


def _remove(folder: Path, process_id: int) -> None:
    if os.getpid() == process_id:  # the end of a fork is not that of its parent's database
        shutil.rmtree(folder, ignore_errors=True)


def _iso(moment: datetime | None) -> str | None:
    """As SQLite's own `strftime` writes it here."""
    if moment is None:
        return None
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _identity(row: HistoryRow) -> dict[str, object]:
    values = asdict(row)
    same = ("version", "name", "checksum", "status", "token")
    return {f"old_{name}": values[name] for name in same}


def _forbid_transaction_control(action: int, *_: object) -> int:
    return sqlite3.SQLITE_DENY if action == sqlite3.SQLITE_TRANSACTION else sqlite3.SQLITE_OK
