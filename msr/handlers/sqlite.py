"""SQLite, through aiosqlite.

How the lock works here. There is one writer at a time, so whoever is inside `BEGIN IMMEDIATE` can
neither be overtaken nor renew from elsewhere: the renewal *is* the fence. The first and the last
statement of a migration's transaction update the lock's row `WHERE token AND locked_by` and must
hit it. Meanwhile the lease is `secured`, and the heartbeat leaves it alone.

Life is proved by an operating system lock (`flock`) on a small file beside the database, named on
the row and held as long as the lock. The kernel drops it when the process dies, in whatever
container; process ids would lie across namespaces. Every token has a file of its own, so a frozen
former holder never stands in its successor's way. Being able to take the file's lock proves a
death; being unable to, or finding no file, proves nothing, and the lease decides.

Each operation is one hop to aiosqlite's thread, however many statements it takes, because a hop
costs more than most statements. The thread goes on when the task that waits is cancelled, so a
cancelled hop interrupts its statement and is waited for.

The clock is SQLite's `now`, the host's clock; times are text in UTC, which sorts as it reads.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import quote

import anyio

from msr.config import Config
from msr.errors import (
    ConfigError,
    DatabaseBusyError,
    DatabaseError,
    DatabaseUnreachableError,
    LockBlockedError,
    LockLostError,
    MissingDriverError,
    MsrError,
)
from msr.handlers.base import StatementError, history_row
from msr.locking import ForcedRelease, Lease, LockStatus, Owner
from msr.plan import HistoryRow
from msr.sql import Statement, split_sqlite
from msr.urls import parse_url

if TYPE_CHECKING:
    import aiosqlite

try:
    import fcntl
except ImportError:  # Windows: no proof of death there, the lease decides
    fcntl = None  # type: ignore[assignment]  # a module, or its absence

__all__ = ["SqliteHandler"]

T = TypeVar("T")

READ_BUSY = 5.0
WRITE_BUSY = 30.0
ATTEMPT_BUSY = 0.1
"""Seconds to wait for other connections: to read, to begin a script, to try for the lock."""

LONGEST_POLL = 0.06
"""Seconds between two looks at the lock: nothing announces a release here, and a look is cheap."""

BLOCKED_AFTER = 1.0
"""Seconds that a forced release tries to pass a holder's commit before it gives up."""

# The statements. {lock}, {history} and {token} are quoted identifiers; values travel as :name.

NOW = "strftime('%Y-%m-%dT%H:%M:%fZ', 'now')"
EXPIRY = "strftime('%Y-%m-%dT%H:%M:%fZ', 'now', :timeout || ' seconds')"

CREATE_LOCK = (
    "CREATE TABLE IF NOT EXISTS {token} (value INTEGER NOT NULL)",
    "INSERT INTO {token} SELECT 0 WHERE NOT EXISTS (SELECT 1 FROM {token})",
    """
    CREATE TABLE IF NOT EXISTS {lock} (
        name TEXT PRIMARY KEY,
        token INTEGER NOT NULL DEFAULT 0,
        locked_by TEXT,
        locked_at TEXT,
        renewed_at TEXT,
        expires_at TEXT,
        process_id INTEGER,
        hostname TEXT,
        session TEXT,
        running TEXT,
        released_at TEXT,
        released_by TEXT,
        release_reason TEXT,
        released_token INTEGER,
        UNIQUE (name, token)
    )
    """,
)

CREATE_ROW = "INSERT INTO {lock} (name) VALUES (:name) ON CONFLICT DO NOTHING"

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

STATUS_COLUMNS = (
    *("name", "token", "locked_by", "locked_at", "renewed_at", "expires_at", "process_id"),
    *("hostname", "session", "running", "released_at", "released_by", "release_reason"),
    "released_token",
)
READ_STATUS = (
    f"SELECT {', '.join(STATUS_COLUMNS)}, {NOW} AS checked_at, "
    f"coalesce(expires_at <= {NOW}, 0) AS is_expired FROM {{lock}} WHERE name = :name"
)

NEXT_TOKEN = "UPDATE {token} SET value = value + 1"
LAST_TOKEN = "(SELECT value FROM {token})"

ACQUIRE = f"""
UPDATE {{lock}} SET token = {LAST_TOKEN}, locked_by = :locked_by, locked_at = {NOW},
    renewed_at = {NOW}, expires_at = {EXPIRY}, process_id = :process_id, hostname = :hostname,
    session = :session, running = :running
WHERE name = :name
"""

RENEW = f"""
UPDATE {{lock}} SET renewed_at = {NOW}, expires_at = {EXPIRY}, running = :running
WHERE name = :name AND token = :token AND locked_by = :locked_by
"""

FREE = """
locked_by = NULL, locked_at = NULL, renewed_at = NULL, expires_at = NULL, process_id = NULL,
hostname = NULL, session = NULL, running = NULL
"""

RELEASE = f"""
UPDATE {{lock}} SET {FREE} WHERE name = :name AND token = :token AND locked_by = :locked_by
"""

FORCE_RELEASE = f"""
UPDATE {{lock}} SET {FREE}, token = {LAST_TOKEN}, released_at = {NOW}, released_by = :by,
    release_reason = :reason, released_token = token
WHERE name = :name AND token = :token AND locked_by IS NOT NULL
"""

RECORD = f"""
INSERT INTO {{history}} (version, name, checksum, status, started_at, duration, executed_by, token)
SELECT :version, :row_name, :checksum, :status,
       strftime('%Y-%m-%dT%H:%M:%fZ', 'now', -coalesce(:duration, 0) || ' seconds'),
       :duration, :executed_by, :token WHERE true
ON CONFLICT (version) DO UPDATE SET status = excluded.status, duration = excluded.duration
WHERE status = 'started' AND token IS excluded.token
"""


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
            self._anchor = sqlite3.connect(self._memory, uri=True)

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
            path = Path(os.path.realpath(self.url.path))
            session = SqliteSession(f"file:{quote(str(path))}", path, config)
        try:
            await session.open(create=False)
            yield session
        finally:
            with anyio.CancelScope(shield=True):  # an unclosed one keeps the interpreter running
                await session.close()


class SqliteSession:
    """One connection: the history, the scripts' transactions, and the lock through it."""

    def __init__(self, uri: str, path: Path | None, config: Config) -> None:
        self.uri = uri
        self.path = path
        self.config = config
        lock = config.locking.table_name
        self.names = {
            "lock": _quoted(lock),
            "history": _quoted(config.table_name),
            "token": _quoted(f"{lock}_token"),
        }
        self._connection: aiosqlite.Connection | None = None
        self._stopped = False
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
        with self.explained():
            self._connection = await aiosqlite.connect(
                self.uri + mode, uri=True, isolation_level=None, timeout=READ_BUSY
            )
        return True

    async def close(self) -> None:
        if self._connection is not None:
            await self.hop(self.locking.forget)
            await self._connection.close()

    async def read_history(self) -> Sequence[HistoryRow]:
        if not await self.open(create=False):
            return []
        rows = await self.hop(_read_rows, self.sql(READ_HISTORY), {})
        return [history_row(row) for row in rows]

    async def create_history(self) -> None:
        await self.open(create=True)
        await self.hop(_write, READ_BUSY, (self.sql(CREATE_HISTORY),), {})

    async def require_outside_transaction(self) -> None:
        """Always possible here."""

    @asynccontextmanager
    async def transaction(self, lease: Lease | None) -> AsyncIterator[None]:
        await self.hop(self._begin, lease)
        try:
            if lease is not None:
                lease.secured = True
            yield
            await self.hop(self._commit)
        except BaseException as error:
            with anyio.CancelScope(shield=True):
                if not isinstance(error, Exception):  # a script's own await may still be running
                    await self.connection.interrupt()
                with suppress(MsrError):
                    await self.hop(self._rollback)
            raise
        finally:
            if lease is not None:
                lease.secured = False

    async def execute_script(self, text: str) -> None:
        await self.hop(self._execute_all, split_sqlite(text))

    async def record(self, row: HistoryRow, lease: Lease | None) -> None:
        await self.hop(self._record, row, lease)

    def _begin(self, db: sqlite3.Connection, lease: Lease | None) -> None:
        db.execute(f"PRAGMA busy_timeout = {int(WRITE_BUSY * 1000)}")
        db.execute("BEGIN IMMEDIATE")
        try:
            if lease is not None:
                self._fence(db, lease)
        except BaseException:
            db.execute("ROLLBACK")
            raise
        db.set_authorizer(_forbid_transaction_control)

    def _commit(self, db: sqlite3.Connection) -> None:
        db.set_authorizer(None)
        try:
            db.execute("COMMIT")
        except sqlite3.IntegrityError as error:  # a deferred foreign key
            raise StatementError(str(error)) from error

    def _rollback(self, db: sqlite3.Connection) -> None:
        db.set_authorizer(None)
        if db.in_transaction:
            db.execute("ROLLBACK")

    def _execute_all(self, db: sqlite3.Connection, statements: Sequence[Statement]) -> None:
        for statement in statements:
            if self._stopped:
                raise sqlite3.OperationalError("interrupted")
            try:
                db.execute(statement.text).fetchall()
            except (sqlite3.Error, sqlite3.Warning) as error:
                message = str(error)
                if message == "not authorized":
                    message = (
                        f"{statement.keyword} is not allowed: msr runs the script in a transaction"
                    )
                raise StatementError(message, line=statement.line) from error

    def _record(self, db: sqlite3.Connection, row: HistoryRow, lease: Lease | None) -> None:
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

    def _fence(self, db: sqlite3.Connection, lease: Lease) -> None:
        if db.execute(self.sql(RENEW), _lease_values(lease)).rowcount != 1:
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
            await connection.interrupt()
            with anyio.CancelScope(shield=True):
                await asyncio.wait([running])
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
        if code.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            return DatabaseBusyError(
                f"{where} is locked by another process; try again when that has finished"
            )
        if code.startswith("SQLITE_READONLY"):
            return DatabaseError(f"{where} is read-only: give this user write access to it")
        if code.startswith("SQLITE_CANTOPEN"):
            return DatabaseUnreachableError(f"cannot open {where}: {text}")
        if "no such column" in text or "has no column" in text:
            return DatabaseError(
                f"a table named {self.config.locking.table_name} or {self.config.table_name} exists "
                f"but was not made by msr ({text}): set locking.table_name and table_name to names "
                "of your own"
            )
        return DatabaseError(f"{where}: {text}")


class SqliteLocking:
    """The lock of one session; see the top of this file."""

    def __init__(self, session: SqliteSession) -> None:
        self._session = session
        self._name = session.config.locking.name
        self._file: tuple[int, Path] | None = None  # our own lock file, open and locked

    async def acquire(
        self, owner: Owner, timeout: float, running: str | None
    ) -> Lease | LockStatus:
        await self._session.open(create=True)
        return await self._session.hop(self._acquire, owner, timeout, running)

    async def renew(self, lease: Lease) -> bool:
        return await self._change(RENEW, lease)

    async def release(self, lease: Lease) -> bool:
        released = await self._change(RELEASE, lease)
        await self._session.hop(self.forget)
        return released

    async def get_status(self) -> LockStatus:
        if not await self._session.open(create=False):
            return LockStatus(name=self._name)
        return self._status(await self._session.hop(self._read))

    async def force_release(
        self, token: int, *, by: str, reason: str | None, terminate: bool
    ) -> bool:
        if terminate:
            raise ConfigError(
                "SQLite has no sessions to end: end the holder's process instead", key="--terminate"
            )
        await self._session.open(create=True)
        values = {"name": self._name, "token": token, "by": by, "reason": reason}
        statements = tuple(self._session.sql(text) for text in (NEXT_TOKEN, FORCE_RELEASE))
        try:
            return await self._session.hop(_write, BLOCKED_AFTER, statements, values) == 1
        except DatabaseBusyError as error:
            status = await self.get_status()
            raise LockBlockedError(
                f"the database is inside a transaction, most likely that of the holder "
                f"{status.locked_by} (running {status.running or 'nothing it told'}); nothing was "
                f"released: end its process {status.process_id} on {status.hostname}, which rolls "
                "its script back"
            ) from error

    async def wait(self, seconds: float) -> bool:
        await anyio.sleep(min(seconds, LONGEST_POLL))
        return False

    def forget(self, _: sqlite3.Connection | None = None) -> None:
        """Drop our lock file, if we have one."""
        if self._file is not None:
            descriptor, path = self._file
            self._file = None
            path.unlink(missing_ok=True)
            os.close(descriptor)

    async def _change(self, query: str, lease: Lease) -> bool:
        values = _lease_values(lease)
        statements = (self._session.sql(query),)
        try:
            return await self._session.hop(_write, READ_BUSY, statements, values) == 1
        except DatabaseError as error:
            if "no such table" in str(error):
                return False
            raise

    def _acquire(
        self, db: sqlite3.Connection, owner: Owner, timeout: float, running: str | None
    ) -> Lease | LockStatus:
        # Look before asking to write, so that a crowd of waiters disturbs no writer.
        db.execute(f"PRAGMA busy_timeout = {int(ATTEMPT_BUSY * 1000)}")
        row = self._read(db)
        if not self._is_free(row):
            return self._status(row)
        try:
            db.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            if row["locked_by"] is None:
                raise
            return self._status(row)  # expired, but its holder's transaction keeps everybody out
        try:
            for statement in CREATE_LOCK:
                db.execute(self._session.sql(statement))
            db.execute(self._session.sql(CREATE_ROW), {"name": self._name})
            row = self._read(db)
            if not self._is_free(row):
                db.execute("ROLLBACK")
                return self._status(row)
            lease = self._take(db, owner, timeout, running)
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            self.forget()
            raise
        if row["session"] is not None:
            self._path(row["session"]).unlink(missing_ok=True)
        return lease

    def _take(
        self, db: sqlite3.Connection, owner: Owner, timeout: float, running: str | None
    ) -> Lease:
        db.execute(self._session.sql(NEXT_TOKEN))
        [[token]] = db.execute(self._session.sql(f"SELECT {LAST_TOKEN}"))
        lease = Lease(self._name, token, owner.locked_by, timeout, running)
        values = {
            **_lease_values(lease),
            "process_id": owner.process_id,
            "hostname": owner.hostname,
            "session": self._prove_life(token),
        }
        db.execute(self._session.sql(ACQUIRE), values)
        return lease

    def _read(self, db: sqlite3.Connection) -> dict[str, Any]:
        rows = _read_rows(db, self._session.sql(READ_STATUS), {"name": self._name})
        values = rows[0] if rows else (None,) * (len(STATUS_COLUMNS) + 2)
        return dict(zip((*STATUS_COLUMNS, "checked_at", "is_expired"), values, strict=True))

    def _is_free(self, row: dict[str, Any]) -> bool:
        return row["locked_by"] is None or row["is_expired"] or self._holder(row) == "gone"

    def _status(self, row: dict[str, Any]) -> LockStatus:
        release = None
        if row["released_at"] is not None:
            release = ForcedRelease(
                _time(row["released_at"]),
                row["released_by"],
                row["release_reason"],
                row["released_token"],
            )
        same: dict[str, Any] = {
            column: row[column]
            for column in ("token", "locked_by", "process_id", "hostname", "running")
        }
        for column in ("locked_at", "renewed_at", "expires_at", "checked_at"):
            same[column] = _time(row[column]) if row[column] else None
        return LockStatus(
            name=self._name,
            is_locked=row["locked_by"] is not None,
            holder=self._holder(row),
            is_expired=bool(row["is_expired"]),
            forced_release=release,
            **same,
        )

    def _holder(self, row: dict[str, Any]) -> Literal["alive", "gone", "unknown"] | None:
        if row["locked_by"] is None:
            return None
        if row["session"] is None or fcntl is None:
            return "unknown"
        try:  # must not create the file: a look leaves nothing behind
            descriptor = os.open(self._path(row["session"]), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return "unknown"
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return "alive"
        except OSError:
            return "unknown"
        else:
            return "gone"
        finally:
            os.close(descriptor)

    def _prove_life(self, token: int) -> str | None:
        """Lock a file of our own beside the database; its name, or None where that is not to be."""
        database = self._session.path
        if database is None or fcntl is None:
            return None
        name = f"{database.name}-{self._session.config.locking.table_name}-{token}.lock"
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            descriptor = os.open(self._path(name), flags, 0o644)
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # a file system without locks, or a leftover that somebody else has
            os.close(descriptor)
            return None
        self._file = (descriptor, self._path(name))
        return name

    def _path(self, name: str) -> Path:
        assert self._session.path is not None, "a database in memory has no lock file"
        return self._session.path.with_name(name)


def _read_rows(db: sqlite3.Connection, query: str, values: dict[str, object]) -> list[Any]:
    try:
        return db.execute(query, values).fetchall()
    except sqlite3.OperationalError as error:
        if "no such table" in str(error):
            return []
        raise


def _write(
    db: sqlite3.Connection, busy: float, statements: Sequence[str], values: dict[str, object]
) -> int:
    """The statements in a transaction of their own; how many rows the last one changed."""
    db.execute(f"PRAGMA busy_timeout = {int(busy * 1000)}")
    db.execute("BEGIN IMMEDIATE")
    try:
        for statement in statements:
            changed = db.execute(statement, values).rowcount
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
    return changed


def _forbid_transaction_control(action: int, *_: object) -> int:
    return sqlite3.SQLITE_DENY if action == sqlite3.SQLITE_TRANSACTION else sqlite3.SQLITE_OK


def _lease_values(lease: Lease) -> dict[str, object]:
    return {
        "name": lease.name,
        "token": lease.token,
        "locked_by": lease.locked_by,
        "timeout": lease.timeout,
        "running": lease.running,
    }


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)


def _quoted(name: str) -> str:
    return ".".join(f'"{part}"' for part in name.split("."))
