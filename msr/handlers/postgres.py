"""PostgreSQL, through asyncpg: the connection, the history and the scripts' transactions.

The lock is next door, in `postgres_lock`. Its fence is here, because it is the history insert: the
last statement of a script's transaction inserts the history row from the lock's row, which it
reads `FOR KEY SHARE`. That lets the heartbeat's update pass but keeps a change of the token waiting
until our commit. With `UNIQUE (name, token)` that holds for a plain update by hand too, which would
otherwise take the weaker row lock that `KEY SHARE` does not stop.

The history is read with `COPY (..) TO STDOUT`, as JSON: one message and one round trip, without a
prepared statement, hence right before we know whether a pooler stands between.
"""

from __future__ import annotations

import json
import logging
import re
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from dataclasses import asdict
from functools import partial
from math import ceil
from typing import TYPE_CHECKING, Any, Literal

import anyio

from msr.config import Config
from msr.errors import (
    ConfigError,
    DatabaseError,
    DatabaseUnreachableError,
    LockLostError,
    MissingDriverError,
    MsrError,
)
from msr.handlers.base import (
    Limits,
    StatementError,
    foreign_table,
    history_row,
    quoted_names,
)
from msr.handlers.postgres_lock import PostgresLocking
from msr.locking import Lease
from msr.plan import HistoryRow
from msr.sql import Statement, line_and_column, split_postgres
from msr.urls import parse_url

if TYPE_CHECKING:
    import asyncpg

__all__ = ["PostgresHandler"]

logger = logging.getLogger("msr.script")

CONNECT_TIMEOUT = 10.0
CLOSE_TIMEOUT = 2.0
ROLLBACK_TIMEOUT = 5.0
ENDED_TRANSACTION = (
    "the script ended the transaction that msr runs it in: remove its COMMIT or ROLLBACK, or let "
    "it opt out of the transaction"
)
INVALID = "the invalid index "

# The statements. {lock}, {history} and {token} are quoted identifiers; values travel as $n.

# A statement that runs on after its client died keeps the session lock: have the server look for
# its client. And an idle holder is no idle session. Not every server knows these settings, or can
# do the first; then they are not set, or that fails.
WATCH_CLIENT = """
SELECT set_config(name, CASE name WHEN 'idle_session_timeout' THEN '0' ELSE '500' END, false)
FROM pg_settings WHERE name IN ('client_connection_check_interval', 'idle_session_timeout')
"""
WATCH_CLIENT_AGAIN = "SET client_connection_check_interval = 500; SET idle_session_timeout = 0"

RESET = "RESET ALL; RESET ROLE"

# Versions are unique, and so are the names of those without one. An index could say the second too,
# but CREATE INDEX waits for every transaction that writes, before it looks whether it is there.
CREATE_HISTORY = """
CREATE TABLE IF NOT EXISTS {history} (
    version bigint UNIQUE,
    name text NOT NULL,
    checksum text NOT NULL,
    status text NOT NULL,
    started_at timestamptz NOT NULL,
    duration double precision,
    executed_by text,
    database_user text,
    token bigint,
    note text,
    noted_at timestamptz,
    script bytea,
    EXCLUDE USING btree (name WITH =) WHERE (version IS NULL)
);
"""

READ_HISTORY = """
SELECT jsonb_build_object('pid', pg_backend_pid(), 'rows', coalesce(
    (SELECT jsonb_agg(jsonb_build_array(version, name, checksum, status, started_at, duration,
                                        executed_by, database_user, token, note, noted_at)
                      ORDER BY version, name)
     FROM {history}), '[]'))
"""

# The fence, and what a run without the lock has in its place; $1 to $3 are the lease's.
FENCE = """
WITH fence AS (
    SELECT token FROM {lock} WHERE name = $1 AND token = $2 AND locked_by = $3 FOR KEY SHARE
)
"""
LOOK = FENCE.replace("FOR KEY SHARE", "")  # where more follows in the same transaction
NO_FENCE = """
WITH fence AS (
    SELECT NULL::bigint AS token WHERE coalesce($1::text, $2::bigint::text, $3::text) IS NULL
)
"""

INSERT = """
INSERT INTO {history} (version, name, checksum, status, started_at, duration, executed_by,
                       database_user, token, note, noted_at, script)
SELECT $4::bigint, $5::text, $6::text, $7::text, coalesce($8::timestamptz, now()),
       $9::double precision, $10::text, coalesce($11::text, current_user), fence.token, $12::text,
       CASE WHEN $12::text IS NOT NULL THEN now() END, $13::bytea
FROM fence ON CONFLICT DO NOTHING
RETURNING txid_current()
"""


def _matches(first: int) -> str:
    """The row that is replaced is still as it was read; $first and the four after it are its."""
    version, name, checksum, status, token = (f"${first + i}" for i in range(5))
    return f"""h.version IS NOT DISTINCT FROM {version}::bigint AND h.name = {name}::text
    AND h.checksum = {checksum}::text AND h.status = {status}::text
    AND h.token IS NOT DISTINCT FROM {token}::bigint"""


UPDATE = f"""
UPDATE {{history}} AS h SET
    version = $4::bigint, name = $5::text, checksum = $6::text, status = $7::text,
    started_at = coalesce($8::timestamptz, CASE WHEN status = 'started' THEN started_at END, now()),
    duration = $9::double precision, executed_by = $10::text,
    database_user = coalesce($11::text, current_user), token = fence.token, note = $12::text,
    noted_at = CASE WHEN $12::text IS NOT NULL THEN now() END,
    script = coalesce($13::bytea, CASE WHEN checksum = $6::text THEN script END)
FROM fence WHERE {_matches(14)}
RETURNING txid_current()
"""

DELETE = f"""
DELETE FROM {{history}} AS h USING fence WHERE {_matches(4)} RETURNING txid_current()
"""

READ_TEXT = f"SELECT script FROM {{history}} AS h WHERE {_matches(1)}"

SAVEPOINT = "SAVEPOINT msr_script"
RELEASE = "RELEASE SAVEPOINT msr_script"

# A query would come too early for a script that begins with SET TRANSACTION; SET takes no $n.
LIMIT = "SET {scope} {name} = {milliseconds:d}"
NO_LIMIT = "SET LOCAL lock_timeout TO DEFAULT; SET LOCAL statement_timeout TO DEFAULT"

# A killed CREATE INDEX CONCURRENTLY leaves an index that is not used but slows every write. $1 are
# the tables that the script builds indexes on. On those in $2 it leaves the name to the server:
# there, what is named as the server does it is the script's if it is younger than the script's
# start or, since a row that says "failed" is younger itself, than every other row. What somebody is
# building at this moment is nobody's leftover.
INVALID_INDEXES = """
SELECT i.relname AS index, format('%I.%I', n.nspname, i.relname) AS qualified,
       x.indrelid IN (SELECT to_regclass(t) FROM unnest($2::text[]) AS t)
       AND i.relname ~ '_idx[0-9]*$'
       AND age(i.xmin) < coalesce(
           (SELECT max(age(xmin)) FROM {history} WHERE status = 'started'),
           (SELECT min(age(xmin)) FROM {history} WHERE status <> 'failed'), 2147483647) AS nameless
FROM pg_index AS x JOIN pg_class AS i ON i.oid = x.indexrelid
JOIN pg_namespace AS n ON n.oid = i.relnamespace
WHERE NOT x.indisvalid
  AND (pg_table_is_visible(i.oid)
       OR x.indrelid IN (SELECT to_regclass(t) FROM unnest($1::text[]) AS t))
  AND NOT EXISTS (SELECT FROM pg_stat_progress_create_index WHERE index_relid = i.oid)
ORDER BY 2
"""
_NAME = r'(?:"(?:[^"]|"")+"|[^\W\d][\w$]*)'
CONCURRENT_BUILD = (  # compiled when it is needed, which is hardly ever
    rf"\bINDEX\s+CONCURRENTLY\s+(?P<name>(?:IF\s+NOT\s+EXISTS\s+)?{_NAME}\s+)?"
    rf"ON\s+(?:ONLY\s+)?(?P<table>{_NAME}(?:\s*\.\s*{_NAME})?)"
)

TRANSACTION_ID = "SELECT txid_current()"

# Where the connection broke in the middle of COMMIT; a session may be at it still.
TRANSACTION_STATUS = "SELECT txid_status($1)"


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
            yield PostgresSession(connection, config, partial(self.connect, config))
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
        except (
            TimeoutError,
            OSError,
            UnicodeError,  # a host name that is none
            asyncpg.PostgresError,
            asyncpg.InterfaceError,
        ) as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            if isinstance(error, TimeoutError):
                reason = f"no answer within {timeout:g} s"
            failure = DatabaseUnreachableError(
                f"cannot connect to {self.url.display}: {reason}; check the URL, and whether the "
                "server is up"
            )
            failure.is_full = isinstance(error, asyncpg.TooManyConnectionsError)
            raise failure from None if isinstance(error, ValueError) else error


def _keep_alive(connection: Any) -> None:
    """Have the kernel notice a vanished server; asyncpg has no setting for it."""
    transport = getattr(connection, "_transport", None)
    sock = transport.get_extra_info("socket") if transport is not None else None
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # Keepalive does not look while something that we sent is unanswered, for example a COMMIT.
    keepalive = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))
    for option, value in (*keepalive, ("TCP_USER_TIMEOUT", 25_000)):
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


class PostgresSession:
    """One connection: the history, the scripts' transactions, and the lock through it."""

    def __init__(
        self,
        connection: asyncpg.Connection,
        config: Config,
        reconnect: Callable[[], AbstractAsyncContextManager[PostgresSession]],
    ) -> None:
        self.connection = connection
        self.config = config
        self.names = quoted_names(config)
        self.pooled = True  # until the server's pid shows that nothing stands between
        self.locking = PostgresLocking(self)
        self._used = False  # by a script, which may have changed the session's settings
        self._reset = RESET
        self._reconnect = reconnect
        self._committing = False
        self._transaction_id: int | None = None
        self._script_transaction_id: int | None = None
        self._has_history = False

    def sql(self, template: str) -> str:
        return template.format_map(self.names)

    def settle(self, pid: int, lock_schema: str | None, history_schema: str | None) -> None:
        """Keep to the schemas found now, and know whether a pooler stands between."""
        self.pooled = pid != self.connection.get_server_pid()
        for names, schema in ((("lock", "token"), lock_schema), (("history",), history_schema)):
            for name in names:
                if schema is not None and '".' not in self.names[name]:
                    self.names[name] = f"{schema}.{self.names[name]}"

    async def watch_client(self) -> None:
        """Have the server notice when we die in the middle of a statement, where it can."""
        if not self.pooled:
            with suppress(DatabaseError):
                if len(await self.fetch(WATCH_CLIENT)) == 2:
                    self._reset = f"{RESET}; {WATCH_CLIENT_AGAIN}"

    async def script_connection(self) -> asyncpg.Connection:
        if self.in_transaction:
            with self.explained():
                self._script_transaction_id = await self.connection.fetchval(TRANSACTION_ID)
        return self.connection

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
        self._has_history = True
        # COPY doubles every backslash; JSON from jsonb has no other character that COPY escapes.
        document = json.loads(received.replace(b"\\\\", b"\\"))
        self.pooled = document["pid"] != self.connection.get_server_pid()
        return [history_row(row) for row in document["rows"]]

    async def create_history(self) -> None:
        await self.locking.identify()
        if not self._has_history:  # CREATE needs a privilege even when there is nothing to create
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
    async def transaction(
        self, lease: Lease | None, lock_timeout: float = 0.0
    ) -> AsyncIterator[None]:
        if self.in_transaction:
            await self.leave_transaction()
            raise StatementError(
                "the script left a transaction open, which was rolled back: add its COMMIT"
            )
        if self._used and not self.pooled:  # what a script SET is not for the next one
            with self.explained():
                await self.connection.execute(self._reset)
        self._used = True
        self._transaction_id = self._script_transaction_id = None
        try:
            async with self._atomic(statement_errors):
                yield
                self._committing = True
        except StatementError:  # an answer, if the connection still stands: nothing to look up
            self._committing = self._committing and self.connection.is_closed()
            raise
        self._committing = False

    @asynccontextmanager
    async def nested(self) -> AsyncIterator[None]:
        with self.explained():
            await self.connection.execute(SAVEPOINT)
        yield
        with statement_errors():
            await self.connection.execute(RELEASE)
        if not self.pooled:
            with self.explained():
                await self.connection.execute(self._reset)

    @asynccontextmanager
    async def limited(self, limits: Limits) -> AsyncIterator[None]:
        chosen = {name: seconds for name, seconds in asdict(limits).items() if seconds}
        local = self.in_transaction
        scope = "LOCAL" if local else "SESSION"
        for name, seconds in chosen.items():
            statement = LIMIT.format(scope=scope, name=name, milliseconds=ceil(seconds * 1000))
            with self.explained():
                await self.connection.execute(statement)
        with self._heard():
            yield
        if chosen and local:  # outside a transaction, the next one resets everything
            with statement_errors():
                await self.connection.execute(NO_LIMIT)

    @contextmanager
    def _heard(self) -> Iterator[None]:
        """Pass on what a script has the server say: RAISE NOTICE, RAISE WARNING."""

        def hear(_: object, message: Any) -> None:
            level = logging.WARNING if message.severity_en == "WARNING" else logging.INFO
            logger.log(level, "%s", message.message)

        self.connection.add_log_listener(hear)
        try:
            yield
        finally:
            self.connection.remove_log_listener(hear)

    @asynccontextmanager
    async def _atomic(
        self, errors_of_commit: Callable[[], AbstractContextManager[None]] | None = None
    ) -> AsyncIterator[None]:
        """A transaction that is over when this is, however it ends, within bounded time."""
        errors_of_commit = errors_of_commit or self.explained
        transaction = self.connection.transaction()
        started = False
        try:
            with self.explained():
                await transaction.start()
            started = True
            yield
            with errors_of_commit():
                await transaction.commit()
        except BaseException:
            try:
                # A cancelled statement on a frozen server would keep ROLLBACK waiting for ever.
                with anyio.move_on_after(ROLLBACK_TIMEOUT, shield=True), suppress(Exception):
                    if started:
                        await transaction.rollback()
            finally:
                # Cancelled in BEGIN, or again in ROLLBACK: the server has to do it by itself.
                if not started or self.in_transaction:
                    self.connection.terminate()
            raise

    @property
    def in_transaction(self) -> bool:
        return not self.connection.is_closed() and bool(self.connection.is_in_transaction())

    async def leave_transaction(self) -> None:
        """Roll back what a script began outside our transactions and did not end."""
        if self.in_transaction:
            with self.explained():
                await self.connection.execute("ROLLBACK")

    async def resolve_commit(self) -> bool | None:
        if not self._committing or self._transaction_id is None:
            return False
        self._committing = False
        while True:  # the caller bounds it
            try:
                async with self._reconnect() as other:
                    [[status]] = await other.fetch(TRANSACTION_STATUS, self._transaction_id)
            except DatabaseError:
                status = "in progress"
            if status != "in progress":
                return None if status is None else bool(status == "committed")
            await anyio.sleep(0.1)

    async def execute_script(self, text: str) -> None:
        # One by one: the server tells no position for errors at run time, so this is how we know
        # the line. It costs a round trip per statement.
        for statement in split_postgres(text):
            with statement_errors(text, statement):
                await self.connection.execute(statement.text)

    async def record(
        self,
        row: HistoryRow | None,
        lease: Lease | None,
        *,
        replaces: HistoryRow | None = None,
        text: str | None = None,
        last: bool = True,
    ) -> None:
        import asyncpg

        if not self.in_transaction and not self.connection.is_closed():
            raise StatementError(ENDED_TRANSACTION, committed=True)
        fence = NO_FENCE if lease is None else FENCE if last else LOOK
        values: list[object] = [None] * 3
        if lease is not None:
            values = [lease.name, lease.token, lease.locked_by]
        if row is not None:
            values += [row.version, row.name, row.checksum, row.status, row.started_at]
            values += [row.duration, row.executed_by, row.database_user, row.note]
            values += [text.encode() if text is not None else None]  # whatever the encoding here
        if replaces is not None:
            values += _identity(replaces)
        query = DELETE if row is None else INSERT if replaces is None else UPDATE
        with self.explained():
            try:
                recorded = await self.connection.fetchval(self.sql(fence + query), *values)
            except asyncpg.UndefinedTableError:
                raise LockLostError("the lock's table, or the history, was dropped") from None
        self._transaction_id = current = recorded
        if self._script_transaction_id is not None:
            if recorded is None:
                with self.explained():
                    current = await self.connection.fetchval(TRANSACTION_ID)
            if current != self._script_transaction_id:
                raise StatementError(ENDED_TRANSACTION, committed=True)
        if recorded is None:
            raise LockLostError(
                "the migration lock was lost, or another process has changed this script's row: "
                "the script was rolled back; run the command again"
            )

    async def read_text(self, row: HistoryRow) -> str | None:
        [[data]] = await self.fetch(READ_TEXT, *_identity(row)) or [[None]]
        return None if data is None else bytes(data).decode()

    async def find_leftovers(self, text: str) -> Sequence[str]:
        builds = list(re.finditer(CONCURRENT_BUILD, text, re.IGNORECASE))
        tables = [build["table"] for build in builds]
        nameless = [build["table"] for build in builds if not build["name"]]
        return [
            f"{INVALID}{row['qualified']}"
            for row in await self.fetch(INVALID_INDEXES, tables, nameless)
            if row["nameless"] or _mentions(text, row["index"])
        ]

    async def drop_leftover(self, leftover: str) -> None:
        with self.explained():
            name = leftover.removeprefix(INVALID)
            await self.connection.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")

    async def fetch(self, query: str, *values: object) -> list[Any]:
        """One statement, in a transaction of its own where a pooler may stand between."""
        with self.explained():
            if not self.pooled:
                return list(await self.connection.fetch(self.sql(query), *values))
            async with self._atomic():
                return list(await self.connection.fetch(self.sql(query), *values))

    async def create(self, statements: str) -> None:
        """Run `CREATE .. IF NOT EXISTS` statements, which fail when two sessions do so at once."""
        import asyncpg

        for pause in (0.01, 0.05, 0.2, None):
            try:
                with self.explained():
                    async with self._atomic():
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
        except (asyncpg.InterfaceError, asyncpg.InternalClientError, OSError) as error:
            raise DatabaseUnreachableError(
                f"the connection to the database was lost: {_sentence(error)}"
            ) from error

    def _explain(self, error: asyncpg.PostgresError) -> MsrError:
        import asyncpg

        sentence = _sentence(error)
        if isinstance(error, asyncpg.UndefinedColumnError):
            return foreign_table(self.config, sentence)
        if isinstance(error, asyncpg.InsufficientPrivilegeError):
            if "for schema" in sentence:
                way_out = "grant this role USAGE and CREATE on the schema, or make the tables once"
            else:
                way_out = "grant this role SELECT, INSERT and UPDATE on msr's tables and USAGE on"
                way_out += " the sequence beside the lock's table, or connect"
            return DatabaseError(f"{sentence}: {way_out} with a role that may")
        if isinstance(error, asyncpg.ReadOnlySQLTransactionError):
            return DatabaseError(
                f"the database is read-only ({sentence}): give the URL of the primary server"
            )
        if isinstance(error, asyncpg.QueryCanceledError):  # a limit of the role's, say
            return DatabaseError(sentence)
        if isinstance(error, asyncpg.PostgresConnectionError | asyncpg.OperatorInterventionError):
            return DatabaseUnreachableError(f"the connection to the database was lost: {sentence}")
        return DatabaseError(sentence)


@contextmanager
def statement_errors(text: str = "", statement: Statement | None = None) -> Iterator[None]:
    """Turn the driver's errors into `StatementError`, pointing into the script."""
    import asyncpg

    try:
        yield
    except (
        asyncpg.PostgresError,
        asyncpg.InterfaceError,
        asyncpg.InternalClientError,
        OSError,
    ) as error:
        line, column = statement.line if statement else None, None
        if statement and (position := getattr(error, "position", None)):
            line, column = line_and_column(text, statement.offset + int(position) - 1)
        raise StatementError(
            _sentence(error),
            line=line,
            column=column,
            sqlstate=getattr(error, "sqlstate", None),
            hint=getattr(error, "hint", None),
            detail=getattr(error, "detail", None),
        ) from error


def _identity(row: HistoryRow) -> tuple[object, ...]:
    return row.version, row.name, row.checksum, row.status, row.token


def _mentions(text: str, name: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text, re.IGNORECASE) is not None


def _sentence(error: BaseException) -> str:
    text = str(error).partition("\n")[0] or type(error).__name__
    if text.startswith("cannot switch to state"):  # asyncpg has read the last word, not the end
        return "the server ended the session"
    return text.rstrip(".")
