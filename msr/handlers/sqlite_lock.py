"""The lock on SQLite: a row, and an operating system lock that proves life.

Life is proved by `flock` on a small file beside the database, named on the row and held as long as
the lock. The kernel drops it when the process dies, in whatever container; process ids would lie
across namespaces. Every token has a file of its own, so a frozen former holder never stands in its
successor's way. Being able to take the file's lock proves a death; being unable to, or finding no
file, proves nothing, and the lease decides.

    row free or expired            take it
    row held, its file unlocked    take it: the holder's process is gone
    row held                       wait

What the holder is doing is written into that file as well as on the row: while a script's own
transaction is open, nobody could read it there.

Taking means a short `BEGIN IMMEDIATE`; a waiter looks before it asks for that. While a script's
transaction is open nobody can take anything, which is what keeps its lease safe (see `sqlite`).

The clock is SQLite's `now`, the host's clock; times are text in UTC, which sorts as it reads.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import anyio
import anyio.to_thread

from msr.errors import ConfigError, DatabaseBusyError, DatabaseError, LockBlockedError
from msr.locking import ForcedRelease, Lease, LockStatus, Owner

if TYPE_CHECKING:
    from msr.handlers.sqlite import SqliteSession

try:
    import fcntl
except ImportError:  # Windows: no proof of death there, the lease decides
    fcntl = None  # type: ignore[assignment]  # a module, or its absence

__all__ = ["READ_BUSY", "RENEW", "SqliteLocking", "is_busy", "lease_values", "read_rows", "write"]

ATTEMPT_BUSY = 0.1
CHANGE_BUSY = 2.0
READ_BUSY = 5.0
"""Seconds to wait for other connections: to try for the lock, to renew or release it, to read."""

LONGEST_POLL = 0.06
"""Seconds between two looks at the lock: nothing announces a release here, and a look is cheap."""

BLOCKED_AFTER = 1.0
"""Seconds that a forced release tries to pass a holder's commit before it gives up."""

# The statements. {lock} and {token} are quoted identifiers; values travel as :name.

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


class SqliteLocking:
    """The lock of one session; see the top of this file."""

    def __init__(self, session: SqliteSession) -> None:
        self._session = session
        self._name = session.config.locking.name
        self._file: tuple[int, str] | None = None  # our own lock file, open and locked
        self._seen: tuple[object, object] | None = None  # what `_look` last found

    async def acquire(
        self, owner: Owner, timeout: float, running: str | None
    ) -> Lease | LockStatus:
        await self._session.open(create=True)
        return await self._session.hop(self._acquire, owner, timeout, running)

    async def renew(self, lease: Lease) -> bool:
        await anyio.to_thread.run_sync(self._tell, lease)
        if not lease.secured:
            try:
                return await self._change(RENEW, lease)
            except DatabaseBusyError:
                if not lease.secured:  # else its own transaction has begun meanwhile
                    raise
        return True

    async def release(self, lease: Lease) -> bool:
        released = await self._change(RELEASE, lease)

        def let_go() -> None:
            self._remove_file(self._file_name(lease.token))
            self.forget()

        await anyio.to_thread.run_sync(let_go)
        return released

    def is_alive(self) -> bool:
        return True  # a connection to a file does not break

    async def get_status(self) -> LockStatus:
        if not await self._session.open(create=False):
            return LockStatus(name=self._name)
        return await self._session.hop(lambda db: self._status(self._read(db, READ_BUSY)))

    async def force_release(
        self, token: int, *, by: str, reason: str | None, terminate: bool
    ) -> bool:
        if terminate:
            raise ConfigError(
                "SQLite has no sessions to end: end the holder's process instead", key="terminate"
            )
        if not await self._session.open(create=False):
            return False
        row = await self._session.hop(self._read, READ_BUSY)
        if row["locked_by"] is None or row["token"] != token:
            return False
        values = {"name": self._name, "token": token, "by": by, "reason": reason}
        statements = tuple(self._session.sql(text) for text in (NEXT_TOKEN, FORCE_RELEASE))
        try:
            released = await self._session.hop(write, BLOCKED_AFTER, statements, values) == 1
        except DatabaseBusyError as error:
            raise LockBlockedError(
                f"the database is inside a transaction, most likely that of the holder "
                f"{row['locked_by']} (running {row['running'] or 'nothing it told'}); nothing was "
                f"released: end its process {row['process_id']} on {row['hostname']}, which rolls "
                "its script back"
            ) from error
        if released:
            await anyio.to_thread.run_sync(self._remove_file, row["session"])
        return released

    async def wait(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        if self._seen is None:
            self._seen = await self._look()
        while (remaining := deadline - time.monotonic()) > 0:
            await anyio.sleep(min(remaining, LONGEST_POLL))
            before, now = self._seen, await self._look()
            self._seen = now or before
            if before and now and now != before:
                return True
        return False

    async def _look(self) -> tuple[object, object] | None:
        """The row's token and holder; None where nothing can be read, so nothing has changed."""
        if not await self._session.open(create=False):
            return None
        try:
            row = await self._session.hop(self._read, ATTEMPT_BUSY)
        except DatabaseBusyError:
            return None
        return row["token"], row["locked_by"]

    def forget(self, *, unlink: bool = False) -> None:
        """Close our lock file. A file that stays, unlocked, proves that its holder is gone."""
        if self._file is not None:
            descriptor, name = self._file
            self._file = None
            if unlink:
                self._remove_file(name)
            os.close(descriptor)

    def _remove_file(self, name: str | None) -> None:
        """Remove the lock file of a lease that is over; that of another user may have to stay."""
        if name is not None:
            with suppress(OSError):
                self._path(name).unlink(missing_ok=True)

    async def _change(self, query: str, lease: Lease) -> bool:
        if not await self._session.open(create=False):
            return False
        try:
            return await self._session.hop(self._change_row, self._session.sql(query), lease)
        except DatabaseError as error:
            if "no such table" in str(error):
                return False
            raise

    def _change_row(self, db: sqlite3.Connection, statement: str, lease: Lease) -> bool:
        values = lease_values(lease)
        try:
            return write(db, ATTEMPT_BUSY, (statement,), values) == 1
        except sqlite3.OperationalError as error:
            if not is_busy(error):
                raise
        # Whoever writes may have taken the lock from us, and may go on for long.
        try:
            row = self._read(db, ATTEMPT_BUSY)
            is_over = (row["token"], row["locked_by"]) != (lease.token, lease.locked_by)
        except sqlite3.OperationalError:  # whoever ends a lease removes its file, too
            is_over = self._file is not None and not self._path(self._file[1]).exists()
        if is_over:
            return False
        return write(db, CHANGE_BUSY, (statement,), values) == 1

    def _acquire(
        self, db: sqlite3.Connection, owner: Owner, timeout: float, running: str | None
    ) -> Lease | LockStatus:
        # Look before asking to write, so that a crowd of waiters disturbs no writer.
        row = self._read(db, ATTEMPT_BUSY)
        if not self._is_free(row):
            return self._status(row)
        try:
            db.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            if not is_busy(error):
                raise
            row = self._read(db, ATTEMPT_BUSY)  # another one may have been quicker
            if row["locked_by"] is None:
                raise
            return self._status(row)  # if expired, its holder's transaction keeps everybody out
        try:
            for statement in CREATE_LOCK:
                db.execute(self._session.sql(statement))
            db.execute(self._session.sql(CREATE_ROW), {"name": self._name})
            row = self._read(db, ATTEMPT_BUSY)
            if not self._is_free(row):
                db.execute("ROLLBACK")
                return self._status(row)
            lease = self._take(db, owner, timeout, running)
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            self.forget(unlink=True)
            raise
        self._remove_file(row["session"])
        return lease

    def _take(
        self, db: sqlite3.Connection, owner: Owner, timeout: float, running: str | None
    ) -> Lease:
        db.execute(self._session.sql(NEXT_TOKEN))
        [[token]] = db.execute(self._session.sql(f"SELECT {LAST_TOKEN}"))
        lease = Lease(self._name, token, owner.locked_by, timeout, running)
        values = {
            **lease_values(lease),
            "process_id": owner.process_id,
            "hostname": owner.hostname,
            "session": self._prove_life(token),
        }
        db.execute(self._session.sql(ACQUIRE), values)
        return lease

    def _read(self, db: sqlite3.Connection, busy: float) -> dict[str, Any]:
        db.execute(f"PRAGMA busy_timeout = {int(busy * 1000)}")
        rows = read_rows(db, self._session.sql(READ_STATUS), {"name": self._name})
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
            **{**same, "running": self._told(row) or row["running"]},
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

    def _tell(self, lease: Lease) -> None:
        """Write what runs into the lock file: the row cannot be read until the script commits."""
        with suppress(OSError):  # no file, no news
            path = self._path(self._file_name(lease.token))
            descriptor = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(lease.shown or "")

    def _told(self, row: dict[str, Any]) -> str | None:
        """What the holder wrote there."""
        if row["session"] is None:
            return None
        try:
            return self._path(row["session"]).read_text("utf-8", "replace")
        except OSError:
            return None

    def _file_name(self, token: int) -> str:
        return f"{self._session.path.name}-{self._session.config.locking.table_name}-{token}.lock"

    def _prove_life(self, token: int) -> str | None:
        """Lock a file of our own beside the database; its name, or None where that is not to be."""
        self.forget(unlink=True)  # that of a lease that we have lost since
        if fcntl is None:
            return None
        name = self._file_name(token)
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
        self._file = (descriptor, name)
        return name

    def _path(self, name: str) -> Path:
        return self._session.path.with_name(name)


def read_rows(db: sqlite3.Connection, query: str, values: dict[str, object]) -> list[Any]:
    try:
        return db.execute(query, values).fetchall()
    except sqlite3.OperationalError as error:
        if "no such table" in str(error):
            return []
        raise


def write(
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


def is_busy(error: sqlite3.Error) -> bool:
    """Whether another connection is in the way, so that trying again may help."""
    code = getattr(error, "sqlite_errorname", "")
    return code.startswith(("SQLITE_BUSY", "SQLITE_LOCKED"))


def lease_values(lease: Lease) -> dict[str, object]:
    return {
        "name": lease.name,
        "token": lease.token,
        "locked_by": lease.locked_by,
        "timeout": lease.timeout,
        "running": lease.shown,
    }


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)
