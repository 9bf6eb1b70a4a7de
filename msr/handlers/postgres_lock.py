"""The lock on PostgreSQL: a row, and a session lock that proves life.

A holder owns two things, taken in this order and given back in the reverse order: a session-level
advisory lock on a key, and the row. The row is the authority; the key proves life, because the
server drops it with the session. So whoever has the key and finds a row whose holder had it too
knows that holder to be dead, and takes over at once.

    key free,  row free or expired               take it
    key free,  row held, its holder had the key  take it: the holder's session is gone
    key free,  row held by a pooled holder       wait for the lease
    key taken, row held                          wait
    key taken, row expired                       frozen holder: free the row under a new token (its
                                                 commit is now doomed), then end its session
    key taken, row free                          a release in progress, or a doomed holder: after
                                                 two seconds of grace end its session

No attempt waits for another session: the session lock is only ever tried for, and the row is
taken with `SKIP LOCKED`. A refused attempt costs no transaction id and writes nothing. A release
may wait, within its bound, for a commit of its own that is still on its way.

Behind a pooler (the server's pid is not the one that the connection was greeted with) a session
lock proves nothing: then there is the lease and the fence only, every statement travels in a
transaction of its own so that it meets one server session, and nothing is LISTENed to.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import anyio

from msr.errors import DatabaseError, DatabaseUnreachableError, LockBlockedError
from msr.locking import LAST_POLL, ForcedRelease, Lease, LockStatus, Owner

if TYPE_CHECKING:
    from msr.handlers.postgres import PostgresSession

__all__ = ["PostgresLocking"]

GRACE = 2.0
"""Seconds that a session may keep the key without the row before it is taken for a doomed one."""

BLOCKED_AFTER = 1.0
ENDED_WITHIN = 10.0
"""Seconds that a forced release waits before it gives up: for a holder's commit, and for the end of
a session that it has ended itself."""

# The statements. {lock} and {token} are quoted identifiers; values travel as $n.

# Where the tables are, or would be made: a script may change the search_path (every pg_dump does).
# The key is made of what the names come to, so that every spelling of one table gives the same.
IDENTIFY = """
SELECT pg_backend_pid() AS pid, s.lock AS lock_schema, s.history AS history_schema,
       hashtextextended(format('msr %s %s %s', s.lock, $4::text, $5::text) COLLATE "C", 0) AS key
FROM (SELECT
    coalesce(quote_ident($3), (SELECT relnamespace::regnamespace::text FROM pg_class
             WHERE oid = to_regclass($1)), quote_ident(current_schema())) AS lock,
    coalesce((SELECT relnamespace::regnamespace::text FROM pg_class WHERE oid = to_regclass($2)),
             quote_ident(current_schema())) AS history) AS s
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

CREATE_ROW = "INSERT INTO {lock} (name) VALUES ($1) ON CONFLICT DO NOTHING RETURNING name"

# {key} is whoever holds the advisory lock now; its 64 bits stand in two columns of pg_locks.
KEY_HOLDER = """
SELECT pid FROM pg_locks
WHERE locktype = 'advisory' AND granted AND objsubid = 1
  AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND classid = (($2::bigint >> 32) & 4294967295)::oid AND objid = ($2::bigint & 4294967295)::oid
"""

READ_STATUS = """
SELECT l.name, l.token, l.locked_by, l.locked_at, l.renewed_at, l.expires_at, l.process_id,
       l.hostname, l.session, l.running, l.released_at, l.released_by, l.release_reason,
       l.released_token, clock_timestamp() AS checked_at,
       coalesce(l.expires_at <= clock_timestamp(), false) AS is_expired,
       (KEY_HOLDER LIMIT 1) AS key_holder
FROM (SELECT) AS always LEFT JOIN {lock} AS l ON l.name = $1
""".replace("KEY_HOLDER", KEY_HOLDER)

# Key and row in one statement, so that a client that stands still is never seen between the two.
# SKIP LOCKED: neither the fence of a frozen holder nor another acquirer makes it wait. $7 is our
# own session, NULL behind a pooler, where the key is not taken and must only be nobody's.
ACQUIRE = """
WITH key AS MATERIALIZED (
    SELECT CASE WHEN $7::integer IS NULL THEN true ELSE pg_try_advisory_lock($2) END AS got
), free AS (
    SELECT l.name, l.locked_by FROM {lock} AS l CROSS JOIN key
    WHERE key.got AND l.name = $1
      AND (l.locked_by IS NULL OR l.expires_at <= clock_timestamp()
           OR (l.session IS NOT NULL AND $7 IS NOT NULL))
      AND ($7 IS NOT NULL OR NOT EXISTS (KEY_HOLDER))
    FOR UPDATE OF l SKIP LOCKED
), taken AS (
    UPDATE {lock} AS l SET
        token = nextval('{token}'), locked_by = $3, locked_at = t.now, renewed_at = t.now,
        expires_at = t.now + $4 * interval '1 second', process_id = $5, hostname = $6,
        session = $7, running = $8
    FROM free, (SELECT clock_timestamp() AS now) AS t
    WHERE l.name = free.name
    RETURNING l.token, CASE WHEN free.locked_by IS NOT NULL THEN pg_notify($9, '') END
)
SELECT key.got, taken.token FROM key LEFT JOIN taken ON true
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

# FOR UPDATE waits for a commit of ours that is still on its way over a connection that has gone
# silent: a lock that is free is one under which nothing more commits.
RELEASE = """
UPDATE {lock} SET FREE WHERE name IN (
    SELECT name FROM {lock} WHERE name = $1 AND token = $2 AND locked_by = $3 FOR UPDATE)
""".replace("FREE", FREE)

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

# Looked at again here: the session may have renewed, or taken the lock, since it was judged.
END_SESSION = """
SELECT pg_terminate_backend(pid) FROM (KEY_HOLDER) AS k
WHERE pid = $1 AND ($4 OR NOT EXISTS (
    SELECT FROM {lock} WHERE name = $3 AND session = $1 AND expires_at > clock_timestamp()))
""".replace("KEY_HOLDER", KEY_HOLDER)


class PostgresLocking:
    """The lock of one session; see the top of this file."""

    def __init__(self, session: PostgresSession) -> None:
        self._session = session
        self._name = session.config.locking.name
        self._key: int | None = None
        self._channel = ""
        self._has_key = False
        # A session with the key but not the row: since when, and when it was looked at last.
        self._suspect: tuple[int, float, float] | None = None
        self._obstacle: str | None = None
        self._news: anyio.Event | None = None

    async def acquire(
        self, owner: Owner, timeout: float, running: str | None
    ) -> Lease | LockStatus:
        import asyncpg

        key = await self.identify()
        session = self._session
        pid = None if session.pooled else session.connection.get_server_pid()
        values = (
            *(self._name, key, owner.locked_by, timeout, owner.process_id, owner.hostname),
            *(pid, running, self._channel),
        )
        try:
            [(got, token)] = await session.fetch(ACQUIRE, *values)
        except asyncpg.UndefinedTableError:
            await self._create_table(key)
            [(got, token)] = await session.fetch(ACQUIRE, *values)
        if got and token is None and await session.fetch(CREATE_ROW, self._name):
            [(_, token)] = await session.fetch(ACQUIRE, *values)
            await self._unlock(key)  # it was taken twice, and session locks count
        if got and self._has_key:
            await self._unlock(key)  # we had it already, from a lease that we have lost since
        self._has_key = got and pid is not None
        if token is not None:
            return Lease(self._name, token, owner.locked_by, timeout, running)
        if self._has_key:
            self._suspect = None
            await self._unlock(key)
            self._has_key = False
            return await self.get_status()
        return await self._refused(owner)

    async def renew(self, lease: Lease) -> bool:
        await self.identify()  # a direct connection needs no transaction around one statement
        values = (lease.name, lease.token, lease.locked_by, lease.timeout, lease.shown)
        return await self._change(RENEW, *values)

    async def release(self, lease: Lease) -> bool:
        await self._session.leave_transaction()
        released = await self._change(RELEASE, lease.name, lease.token, lease.locked_by)
        key = await self.identify()
        # The announcement comes after the key is free, or a waiter would wake up too early.
        if self._has_key:
            await self._unlock(key)
            self._has_key = False
        await self._session.fetch("SELECT pg_notify($1, '')", self._channel)
        return released

    def is_alive(self) -> bool:
        return not self._session.connection.is_closed()

    async def get_status(self) -> LockStatus:
        [row] = await self._fetch_status(await self.identify())
        return self._status(row)

    async def force_release(
        self, token: int, *, by: str, reason: str | None, terminate: bool
    ) -> bool:
        key = await self.identify()
        deadline = time.monotonic() + BLOCKED_AFTER
        ended = False
        while True:
            [row] = await self._fetch_status(key)
            if row is None or row["token"] != token or row["locked_by"] is None:
                return ended  # then its process, or a waiter, has been quicker to free the row
            freed = await self._free(token, by, reason, only_expired=False)
            if terminate and row["session"] is not None:
                await self._end_session(row["session"], whatever=True)
                if not (ended or self._obstacle):
                    ended, deadline = True, time.monotonic() + ENDED_WITHIN
                freed = freed or await self._free(token, by, reason, only_expired=False)
            if freed:
                if terminate and self._obstacle:
                    raise DatabaseError(f"the lock was released, but {self._obstacle}")
                return True
            if time.monotonic() > deadline:
                way_out = "that session with --terminate"
                if row["session"] is None:  # behind a pooler: nobody knows which it is
                    way_out = f"its process {row['process_id']} on {row['hostname']}"
                raise LockBlockedError(
                    f"the lock's row is held by an open transaction, most likely that of the "
                    f"holder {row['locked_by']} (database session {row['session'] or 'unknown'}, "
                    f"running {row['running'] or 'nothing it told'}); nothing was released: end "
                    f"{way_out}, which rolls its script back"
                    + (f"; {self._obstacle}" if self._obstacle else "")
                )
            await anyio.sleep(0.05)

    async def wait(self, seconds: float) -> bool:
        await self.identify()
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
        """The advisory lock's key; learns on the way what else must be known of this session."""
        if self._key is None:
            session = self._session
            schema, _, table = session.config.locking.table_name.rpartition(".")
            names = (session.names["lock"], session.names["history"], schema or None, table)
            [row] = await session.fetch(IDENTIFY, *names, self._name)
            session.settle(row["pid"], row["lock_schema"], row["history_schema"])
            await session.watch_client()
            self._key = int(row["key"])
            self._channel = f"msr_{self._key & 0xFFFFFFFFFFFFFFFF:016x}"
        return self._key

    def _hear(self, *_: object) -> None:
        if self._news is not None:
            self._news.set()

    async def _create_table(self, key: int) -> None:
        """Make the table; under the key where there is one, so that a crowd does not collide."""
        if self._session.pooled:
            await self._session.create(CREATE_LOCK)
            return
        deadline = time.monotonic() + GRACE
        while not (await self._session.fetch("SELECT pg_try_advisory_lock($1)", key))[0][0]:
            await anyio.sleep(0.02)
            names = (self._session.names["lock"], self._session.names["token"])
            made = "SELECT to_regclass($1) IS NOT NULL AND to_regclass($2) IS NOT NULL"
            if (await self._session.fetch(made, *names))[0][0]:
                return
            if time.monotonic() > deadline:  # whoever has the key stands still
                return await self._session.create(CREATE_LOCK)
        await self._session.create(CREATE_LOCK)
        await self._unlock(key)

    async def _unlock(self, key: int) -> None:
        await self._session.fetch("SELECT pg_advisory_unlock($1)", key)

    async def _fetch_status(self, key: int) -> list[Any]:
        import asyncpg

        try:
            return await self._session.fetch(READ_STATUS, self._name, key)
        except asyncpg.UndefinedTableError:
            return [None]

    async def _change(self, query: str, *values: object) -> bool:
        import asyncpg

        try:
            return bool(await self._session.fetch(query + " RETURNING 1", *values))
        except asyncpg.UndefinedTableError:
            return False

    async def _refused(self, owner: Owner) -> LockStatus:
        """Another session has the key. Judge it, and end it if it is frozen or doomed."""
        [row] = await self._fetch_status(await self.identify())
        if row is None:
            return self._status(row)
        pid, now = row["key_holder"], time.monotonic()
        if pid is not None and row["is_expired"] and row["session"] == pid:
            await self._free(row["token"], owner.locked_by, "the lease expired", True)
            await self._end_session(pid)
        elif pid is None or row["session"] == pid:
            self._suspect = self._obstacle = None
        elif self._suspect is None or self._suspect[0] != pid:
            self._suspect = (pid, now, now)
        else:
            # A machine that stood still kept that session from going on as much as us from looking.
            _, since, looked = self._suspect
            since += max(0.0, now - looked - 2 * LAST_POLL)
            self._suspect = (pid, since, now)
            if now - since > GRACE:
                await self._end_session(pid)
        return self._status(row)

    async def _free(self, token: int, by: str, reason: str | None, only_expired: bool) -> bool:
        values = (self._name, token, by, reason, only_expired, self._channel)
        return bool(await self._session.fetch(FORCE_RELEASE, *values))

    async def _end_session(self, pid: int, *, whatever: bool = False) -> None:
        """End the session if it has the key and no valid lease, or `whatever` it has."""
        self._obstacle = None
        try:
            await self._session.fetch(END_SESSION, pid, self._key, self._name, whatever)
        except DatabaseError as error:
            self._obstacle = f"its database session {pid} still runs and cannot be ended: {error}"

    def _status(self, row: Any) -> LockStatus:
        if row is None:  # no table
            return LockStatus(name=self._name)
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
