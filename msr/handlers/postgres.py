"""PostgreSQL, through asyncpg.

How the lock works here. A holder owns two things, taken in this order and given back in the
reverse order: a session-level advisory lock on `key`, and the row. The row is the authority; the
key proves life, because the server drops it with the session. So whoever has the key and finds a
row whose holder had it too knows that holder to be dead, and takes over at once.

    key free,  row free or expired               take it
    key free,  row held, its holder had the key  take it: the holder's session is gone
    key free,  row held by a pooled holder       wait for the lease
    key taken, row held                          wait
    key taken, row expired                       frozen holder: free the row under a new token (its
                                                 commit is now doomed), then end its session
    key taken, row free                          a release in progress, or a doomed holder: after
                                                 two seconds of grace end its session

The fence is the history insert. It reads the lock row `FOR KEY SHARE`, which lets the heartbeat's
update pass but keeps a token change waiting until our commit. That works only because `token` is
part of a unique index: without `UNIQUE (name, token)` a token change would take the weaker row
lock, which `KEY SHARE` does not stop.

Behind a pooler (the server's pid is not the one the connection was greeted with) a session
lock proves nothing: then there is the lease and the fence only, every statement travels in a
transaction of its own so that it meets one server session, and nothing is LISTENed to.

The history is read as one `COPY (SELECT json) TO STDOUT`: one message and one round trip, without
a prepared statement, hence safe before we know whether a pooler stands between.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

import anyio

from msr.config import Config
from msr.errors import (
    ConfigError,
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
from msr.sql import Statement, line_and_column, split_postgres
from msr.urls import parse_url

if TYPE_CHECKING:
    import asyncpg

__all__ = ["PostgresHandler"]

CONNECT_TIMEOUT = 10.0
CLOSE_TIMEOUT = 2.0
ROLLBACK_TIMEOUT = 5.0
GRACE = 2.0
"""Seconds that a session may keep the key without the row before it is taken for a doomed one."""

BLOCKED_AFTER = 1.0
"""Seconds that a forced release tries to pass a holder's commit before it gives up."""

# The statements. {lock}, {history} and {token} are quoted identifiers; values travel as $n.

IDENTIFY = """
SELECT pg_backend_pid() AS pid, hashtextextended(
    format('msr %s %s %s', coalesce(
        (SELECT relnamespace::regnamespace::text FROM pg_class WHERE oid = to_regclass($1)),
        current_schema()), $1::text, $2::text) COLLATE "C", 0) AS key
"""

# A statement that runs on after its client died keeps the key: have the server look for the client.
# Not every server knows, or can do, each of these; then set_config is not called or fails alone.
WATCH_CLIENT = """
SELECT set_config(name, '500', false) FROM pg_settings
WHERE name = 'client_connection_check_interval'
"""

CREATE_LOCK = """
CREATE SEQUENCE IF NOT EXISTS {token};
CREATE TABLE IF NOT EXISTS {lock} (
    name text PRIMARY KEY,
    token bigint NOT NULL DEFAULT 0,
    locked_by text,
    locked_at timestamptz,
    renewed_at timestamptz,
    expires_at timestamptz,
    process_id integer,
    hostname text,
    session integer,
    running text,
    released_at timestamptz,
    released_by text,
    release_reason text,
    released_token bigint,
    UNIQUE (name, token)
);
"""

CREATE_ROW = "INSERT INTO {lock} (name) VALUES ($1) ON CONFLICT DO NOTHING"

CREATE_HISTORY = """
CREATE TABLE IF NOT EXISTS {history} (
    version bigint PRIMARY KEY,
    name text NOT NULL,
    checksum text NOT NULL,
    status text NOT NULL,
    started_at timestamptz NOT NULL,
    duration double precision,
    executed_by text,
    database_user text,
    token bigint
);
"""

READ_HISTORY = """
SELECT jsonb_build_object('pid', pg_backend_pid(), 'rows', coalesce(
    (SELECT jsonb_agg(jsonb_build_array(version, name, checksum, status, started_at, duration,
                                        executed_by, database_user, token) ORDER BY version)
     FROM {history}), '[]'))
"""

# {key} is whoever holds the advisory lock now; its 64 bits stand in two columns of pg_locks.
KEY_HOLDER = """
SELECT pid FROM pg_locks
WHERE locktype = 'advisory' AND granted AND objsubid = 1
  AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND classid = (($2::bigint >> 32) & 4294967295)::oid AND objid = ($2::bigint & 4294967295)::oid
"""

READ_STATUS = """
SELECT l.*, clock_timestamp() AS checked_at,
       coalesce(l.expires_at <= clock_timestamp(), false) AS is_expired,
       (KEY_HOLDER LIMIT 1) AS key_holder
FROM (SELECT) AS always LEFT JOIN {lock} AS l ON l.name = $1
""".replace("KEY_HOLDER", KEY_HOLDER)

# SKIP LOCKED: neither the fence of a frozen holder nor another acquirer makes this statement wait.
ACQUIRE = """
WITH free AS (
    SELECT name, locked_by FROM {lock} AS l
    WHERE name = $1
      AND (locked_by IS NULL OR expires_at <= clock_timestamp()
           OR (session IS NOT NULL AND $7::integer IS NOT NULL)) -- $7: we have the key
      AND NOT EXISTS (SELECT FROM (KEY_HOLDER) AS k WHERE k.pid <> pg_backend_pid())
    FOR UPDATE SKIP LOCKED
), taken AS (
    UPDATE {lock} AS l SET
        token = nextval('{token}'), locked_by = $3, locked_at = t.now, renewed_at = t.now,
        expires_at = t.now + $4 * interval '1 second', process_id = $5, hostname = $6,
        session = $7, running = $8
    FROM free, (SELECT clock_timestamp() AS now) AS t
    WHERE l.name = free.name
    RETURNING l.token
)
SELECT token, CASE WHEN free.locked_by IS NOT NULL THEN pg_notify($9, '') END FROM taken, free
""".replace("KEY_HOLDER", KEY_HOLDER)

RENEW = """
UPDATE {lock} SET renewed_at = t.now, expires_at = t.now + $4 * interval '1 second', running = $5
FROM (SELECT clock_timestamp() AS now) AS t
WHERE name = $1 AND token = $2 AND locked_by = $3
"""

FREE = """
locked_by = NULL, locked_at = NULL, renewed_at = NULL, expires_at = NULL, process_id = NULL,
hostname = NULL, session = NULL, running = NULL
"""

RELEASE = "UPDATE {lock} SET FREE WHERE name = $1 AND token = $2 AND locked_by = $3".replace(
    "FREE", FREE
)

FORCE_RELEASE = """
WITH freed AS (
    UPDATE {lock} SET FREE, token = nextval('{token}'), released_at = clock_timestamp(),
        released_by = $3, release_reason = $4, released_token = token
    WHERE name IN (
        SELECT name FROM {lock}
        WHERE name = $1 AND token = $2 AND locked_by IS NOT NULL
          AND (NOT $5 OR expires_at <= clock_timestamp())
        FOR UPDATE SKIP LOCKED)
    RETURNING name
)
SELECT name, pg_notify($6, '') FROM freed
""".replace("FREE", FREE)

RECORD = """
INSERT INTO {history} AS h (version, name, checksum, status, started_at, duration, executed_by,
                            database_user, token)
SELECT $1::bigint, $2::text, $3::text, $4::text, now(), $5::double precision, $6::text,
       current_user, FENCE
ON CONFLICT (version) DO UPDATE SET status = excluded.status, duration = excluded.duration
WHERE h.status = 'started' AND h.token IS NOT DISTINCT FROM excluded.token
"""

FENCED_RECORD = RECORD.replace(
    "FENCE", "token FROM {lock} WHERE name = $7 AND token = $8 AND locked_by = $9 FOR KEY SHARE"
)
UNFENCED_RECORD = RECORD.replace("FENCE", "NULL::bigint WHERE true")

END_SESSION = "SELECT pg_terminate_backend(pid) FROM (KEY_HOLDER) AS k WHERE pid = $1".replace(
    "KEY_HOLDER", KEY_HOLDER
)


class PostgresHandler:
    """A PostgreSQL database, by URL.

    Accepts `postgresql://`, `postgres://` and `postgresql+asyncpg://` with the parameters of
    libpq. Raises `ConfigError` for a URL that cannot be read.
    """

    dialect: Literal["postgresql"] = "postgresql"

    def __init__(self, url: str) -> None:
        self.url = parse_url(url)
        if self.url.dialect != self.dialect:
            raise ConfigError("not a PostgreSQL URL", key="url")

    def __repr__(self) -> str:
        return f"PostgresHandler({self.url.display!r})"

    @asynccontextmanager
    async def connect(self, config: Config) -> AsyncIterator[PostgresSession]:
        """Open one connection; it is closed, or cut after two seconds, on leaving."""
        try:
            import asyncpg
        except ImportError:
            raise MissingDriverError("asyncpg", "postgres") from None
        timeout = self.url.connect_timeout or CONNECT_TIMEOUT
        with self._explained(timeout):
            connection = await asyncpg.connect(
                self.url.dsn, timeout=timeout, statement_cache_size=0
            )
        _keep_alive(connection)
        try:
            yield PostgresSession(connection, config)
        finally:
            with anyio.CancelScope(shield=True):
                try:
                    await connection.close(timeout=CLOSE_TIMEOUT)
                except Exception:  # the server is frozen or gone: nothing more to say to it
                    connection.terminate()

    @contextmanager
    def _explained(self, timeout: float) -> Iterator[None]:
        import asyncpg

        try:
            yield
        except (TimeoutError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            if isinstance(error, TimeoutError):
                reason = f"no answer within {timeout:g} s"
            raise DatabaseUnreachableError(f"cannot connect to {self.url.display}: {reason}") from (
                None if isinstance(error, ValueError) else error
            )


def _keep_alive(connection: Any) -> None:
    """Have the kernel notice a vanished server; asyncpg has no setting for it."""
    transport = getattr(connection, "_transport", None)
    sock = transport.get_extra_info("socket") if transport is not None else None
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, seconds in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), seconds)


class PostgresSession:
    """One connection: the history, the scripts' transactions, and the lock through it."""

    def __init__(self, connection: asyncpg.Connection, config: Config) -> None:
        self.connection = connection
        self.config = config
        lock = config.locking.table_name
        self.names = {
            "lock": _quoted(lock),
            "history": _quoted(config.table_name),
            "token": _quoted(f"{lock}_token"),
        }
        self.pooled = True  # until the server's pid shows that nothing stands between
        self.locking = PostgresLocking(self)

    def sql(self, template: str) -> str:
        return template.format_map(self.names)

    async def read_history(self) -> Sequence[HistoryRow]:
        import asyncpg

        received = bytearray()

        async def receive(data: bytes) -> None:
            received.extend(data)

        with self.explained():
            try:
                await self.connection.copy_from_query(self.sql(READ_HISTORY), output=receive)
            except asyncpg.UndefinedTableError:
                return []
        # COPY doubles every backslash; JSON from jsonb has no other character that COPY escapes.
        document = json.loads(received.replace(b"\\\\", b"\\"))
        self.pooled = document["pid"] != self.connection.get_server_pid()
        return [history_row(row) for row in document["rows"]]

    async def create_history(self) -> None:
        await self.create(CREATE_HISTORY)

    async def require_outside_transaction(self) -> None:
        await self.locking.identify()
        if self.pooled:
            raise ConfigError(
                "this connection goes through a pooler, which cannot run scripts outside a "
                "transaction safely: give a URL that leads directly to the server",
                key="url",
            )

    @asynccontextmanager
    async def transaction(self, lease: Lease | None) -> AsyncIterator[None]:
        transaction = self.connection.transaction()
        with self.explained():
            await transaction.start()
        try:
            yield
            if not self.connection.is_in_transaction():
                raise StatementError(
                    "the script ended the transaction that msr runs it in: remove its COMMIT or "
                    "ROLLBACK, or let it opt out of the transaction",
                    committed=True,
                )
            with statement_errors():
                await transaction.commit()
        except BaseException:
            # A cancelled statement on a frozen server would keep ROLLBACK waiting for ever.
            with anyio.move_on_after(ROLLBACK_TIMEOUT, shield=True) as scope:
                with suppress(Exception):  # no connection: the server has rolled back by itself
                    await transaction.rollback()
            if scope.cancelled_caught:
                self.connection.terminate()
            raise

    async def execute_script(self, text: str) -> None:
        # One by one: the server tells no position for errors at run time, so this is how we know
        # the line. It costs a round trip per statement.
        for statement in split_postgres(text):
            with statement_errors(text, statement):
                await self.connection.execute(statement.text)

    async def record(self, row: HistoryRow, lease: Lease | None) -> None:
        values = [row.version, row.name, row.checksum, row.status, row.duration, row.executed_by]
        with self.explained():
            if lease is None:
                done = await self.connection.execute(self.sql(UNFENCED_RECORD), *values)
            else:
                fence = (lease.name, lease.token, lease.locked_by)
                done = await self.connection.execute(self.sql(FENCED_RECORD), *values, *fence)
        if done != "INSERT 0 1":
            raise LockLostError(
                "the migration lock was lost, or another process has applied this script: "
                "the script was rolled back; run msr migrate again"
            )

    async def fetch(self, query: str, *values: object) -> list[Any]:
        """One statement, in a transaction of its own where a pooler may stand between."""
        with self.explained():
            if not self.pooled:
                return list(await self.connection.fetch(self.sql(query), *values))
            async with self.connection.transaction():
                return list(await self.connection.fetch(self.sql(query), *values))

    async def create(self, statements: str) -> None:
        """Run `CREATE .. IF NOT EXISTS` statements, which fail when two sessions do so at once."""
        import asyncpg

        for pause in (0.01, 0.05, 0.2, None):
            try:
                with self.explained():
                    async with self.connection.transaction():
                        await self.connection.execute(self.sql(statements))
                return
            except DatabaseError as error:
                cause = error.__cause__
                if pause is None or not isinstance(
                    cause,
                    asyncpg.UniqueViolationError
                    | asyncpg.DuplicateTableError
                    | asyncpg.DuplicateObjectError
                    | asyncpg.DeadlockDetectedError,
                ):
                    raise
                await anyio.sleep(pause)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn the driver's errors into ours, with what to do about them."""
        import asyncpg

        try:
            yield
        except (asyncpg.UndefinedTableError, MsrError):
            raise
        except asyncpg.PostgresError as error:
            raise self._explain(error) from error
        except (asyncpg.InterfaceError, OSError) as error:
            raise DatabaseUnreachableError(
                f"the connection to the database was lost: {_sentence(error)}"
            ) from error

    def _explain(self, error: asyncpg.PostgresError) -> MsrError:
        import asyncpg

        sentence = _sentence(error)
        if isinstance(error, asyncpg.UndefinedColumnError):
            return DatabaseError(
                f"a table named {self.config.locking.table_name} or {self.config.table_name} exists "
                f"but was not made by msr ({sentence}): set locking.table_name and table_name to "
                "names of your own"
            )
        if isinstance(error, asyncpg.InsufficientPrivilegeError):
            return DatabaseError(
                f"{sentence}: let the tables be made by a role that may create them, or grant "
                "this role CREATE on the schema"
            )
        if isinstance(error, asyncpg.ReadOnlySQLTransactionError):
            return DatabaseError(
                f"the database is read-only ({sentence}): give the URL of the primary server"
            )
        if isinstance(error, asyncpg.PostgresConnectionError | asyncpg.OperatorInterventionError):
            return DatabaseUnreachableError(f"the connection to the database was lost: {sentence}")
        return DatabaseError(sentence)


class PostgresLocking:
    """The lock of one session; see the top of this file."""

    def __init__(self, session: PostgresSession) -> None:
        self._session = session
        self._name = session.config.locking.name
        self._key: int | None = None
        self._has_key = False
        self._suspect: tuple[int, float] | None = None  # a session with the key but not the row
        self._obstacle: str | None = None
        self._news: anyio.Event | None = None

    async def acquire(
        self, owner: Owner, timeout: float, running: str | None
    ) -> Lease | LockStatus:
        key = await self.identify()
        session = self._session
        if not session.pooled:
            if not self._has_key:
                [[self._has_key]] = await session.fetch("SELECT pg_try_advisory_lock($1)", key)
            if not self._has_key:
                return await self._refused(owner)
        pid = None if session.pooled else session.connection.get_server_pid()
        for create in (self._create_row, None):
            rows = await self._fetch_lock(
                ACQUIRE,
                *(self._name, key, owner.locked_by, timeout, owner.process_id, owner.hostname),
                *(pid, running, self._channel),
            )
            if rows:
                return Lease(self._name, rows[0]["token"], owner.locked_by, timeout, running)
            if create is not None:
                await create()
        if self._has_key:
            await session.fetch("SELECT pg_advisory_unlock($1)", key)
            self._has_key = False
        return await self.get_status()

    async def renew(self, lease: Lease) -> bool:
        values = (lease.name, lease.token, lease.locked_by, lease.timeout, lease.running)
        return await self._change(RENEW, *values)

    async def release(self, lease: Lease) -> bool:
        released = await self._change(RELEASE, lease.name, lease.token, lease.locked_by)
        key = await self.identify()
        # The announcement comes after the key is free, or a waiter would wake up too early.
        if self._has_key:
            await self._session.fetch(
                "SELECT pg_advisory_unlock($1), pg_notify($2, '')", key, self._channel
            )
            self._has_key = False
        else:
            await self._session.fetch("SELECT pg_notify($1, '')", self._channel)
        return released

    async def get_status(self) -> LockStatus:
        import asyncpg

        key = await self.identify()
        try:
            [row] = await self._session.fetch(READ_STATUS, self._name, key)
        except asyncpg.UndefinedTableError:
            return LockStatus(name=self._name)
        return self._status(row)

    async def force_release(
        self, token: int, *, by: str, reason: str | None, terminate: bool
    ) -> bool:
        key = await self.identify()
        deadline = time.monotonic() + BLOCKED_AFTER
        while True:
            [row] = await self._session.fetch(READ_STATUS, self._name, key)
            if row["token"] != token or row["locked_by"] is None:
                return False
            freed = await self._free(token, by, reason, only_expired=False)
            if terminate and row["session"] is not None:
                await self._end_session(row["session"])
            if freed:
                return True
            if time.monotonic() > deadline:
                raise LockBlockedError(
                    f"the lock's row is held by an open transaction, most likely that of the "
                    f"holder {row['locked_by']} (database session {row['session'] or 'unknown'}, "
                    f"running {row['running'] or 'nothing it told'}); nothing was released: end "
                    "that session with --terminate, which rolls its script back"
                )
            await anyio.sleep(0.05)

    async def wait(self, seconds: float) -> bool:
        if self._session.pooled:
            await anyio.sleep(seconds)
            return False
        if self._news is None:
            self._news = anyio.Event()
            with self._session.explained():
                await self._session.connection.add_listener(self._channel, self._hear)
        with anyio.move_on_after(seconds) as scope:
            await self._news.wait()
        if not scope.cancelled_caught:
            self._news = anyio.Event()
        elif self._session.connection.is_closed():
            raise DatabaseUnreachableError("the connection to the database was lost")
        return not scope.cancelled_caught

    async def identify(self) -> int:
        """The advisory lock's key; learns on the way whether a pooler stands between."""
        if self._key is None:
            session = self._session
            [row] = await session.fetch(IDENTIFY, session.names["lock"], self._name)
            session.pooled = row["pid"] != session.connection.get_server_pid()
            if not session.pooled:
                with suppress(DatabaseError):
                    await session.fetch(WATCH_CLIENT)
            self._key = int(row["key"])
        return self._key

    @property
    def _channel(self) -> str:
        return f"msr_{(self._key or 0) & 0xFFFFFFFFFFFFFFFF:016x}"

    def _hear(self, *_: object) -> None:
        if self._news is not None:
            self._news.set()

    async def _fetch_lock(self, query: str, *values: object) -> list[Any]:
        """A statement on the lock table, which is made where it is missing."""
        import asyncpg

        try:
            return await self._session.fetch(query, *values)
        except asyncpg.UndefinedTableError:
            await self._session.create(CREATE_LOCK)
            return await self._session.fetch(query, *values)

    async def _create_row(self) -> None:
        await self._session.fetch(CREATE_ROW, self._name)

    async def _change(self, query: str, *values: object) -> bool:
        import asyncpg

        try:
            return bool(await self._session.fetch(query + " RETURNING 1", *values))
        except asyncpg.UndefinedTableError:
            return False

    async def _refused(self, owner: Owner) -> LockStatus:
        """Another session has the key. Judge it, and end it if it is frozen or doomed."""
        import asyncpg

        try:
            [row] = await self._session.fetch(READ_STATUS, self._name, await self.identify())
        except asyncpg.UndefinedTableError:
            return LockStatus(name=self._name)
        pid, now = row["key_holder"], time.monotonic()
        if row["locked_by"] is None and pid is not None:
            if self._suspect is None or self._suspect[0] != pid:
                self._suspect = (pid, now)
            elif now - self._suspect[1] > GRACE:
                await self._end_session(pid)
        else:
            self._suspect = None
            if row["is_expired"] and pid is not None:
                await self._free(row["token"], owner.locked_by, "the lease expired", True)
                await self._end_session(pid)
        return self._status(row)

    async def _free(self, token: int, by: str, reason: str | None, only_expired: bool) -> bool:
        values = (self._name, token, by, reason, only_expired, self._channel)
        return bool(await self._session.fetch(FORCE_RELEASE, *values))

    async def _end_session(self, pid: int) -> None:
        try:
            await self._session.fetch(END_SESSION, pid, self._key)
        except DatabaseError as error:
            self._obstacle = f"its database session {pid} still runs and cannot be ended: {error}"

    def _status(self, row: Any) -> LockStatus:
        if row["locked_by"] is None:
            holder = None
        elif row["session"] is None:
            holder = "unknown"
        else:
            holder = "alive" if row["key_holder"] == row["session"] else "gone"
        release = None
        if row["released_at"] is not None:
            release = ForcedRelease(
                row["released_at"],
                row["released_by"],
                row["release_reason"],
                row["released_token"],
            )
        same = ("token", "locked_by", "locked_at", "renewed_at", "expires_at", "process_id")
        more = ("hostname", "running", "is_expired", "checked_at")
        return LockStatus(
            name=self._name,
            is_locked=row["locked_by"] is not None,
            holder=holder,  # type: ignore[arg-type]  # one of the three words above
            forced_release=release,
            obstacle=self._obstacle,
            **{column: row[column] for column in same + more},
        )


@contextmanager
def statement_errors(text: str = "", statement: Statement | None = None) -> Iterator[None]:
    """Turn the driver's errors into `StatementError`, pointing into the script."""
    import asyncpg

    try:
        yield
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
        line, column = statement.line if statement else None, None
        if statement and (position := getattr(error, "position", None)):
            line, column = line_and_column(text, statement.offset + int(position) - 1)
        raise StatementError(
            _sentence(error),
            line=line,
            column=column,
            sqlstate=getattr(error, "sqlstate", None),
            hint=getattr(error, "hint", None),
        ) from error


def _quoted(name: str) -> str:
    return ".".join(f'"{part}"' for part in name.split("."))


def _sentence(error: BaseException) -> str:
    text = str(error).partition("\n")[0] or type(error).__name__
    return text.rstrip(".")
