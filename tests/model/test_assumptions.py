"""What the models take for granted of PostgreSQL and of the handlers, asked of the real ones.

`postgres_protocol` says which statement gets past a pending fence and which does not. That is
PostgreSQL's affair and not obvious, so here each of them meets a real fence. And some steps that
the model has as one are in the code two statements with a gap; what may happen in it is staged.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import asyncpg
import pytest

import msr
from msr.handlers import postgres_lock
from msr.plan import HistoryRow
from tests.conformance.support import acquire, locking, owner
from tests.support.cli import PATIENCE, wait_until_async
from tests.support.queries import fetch

ROW = HistoryRow(1, "first", "checksum", "applied")

KEY_ROW_LOCK = "SELECT FROM migration_locks FOR UPDATE"
DELETE = "DELETE FROM migration_locks"
TOKEN = "UPDATE migration_locks SET token = token + 1, locked_by = NULL"
OWNER = "UPDATE migration_locks SET locked_by = NULL"
EXPIRY = "UPDATE migration_locks SET expires_at = now()"

UNIQUE = "ALTER TABLE migration_locks DROP CONSTRAINT migration_locks_name_token_key"


class Postgres:
    """Sessions of one database, open until the test ends."""

    def __init__(self, url: str, stack: AsyncExitStack) -> None:
        self.url = url
        self.handler = msr.PostgresHandler(url)
        self.stack = stack

    async def session(self) -> Any:
        session = await self.stack.enter_async_context(self.handler.connect(msr.Config()))
        await session.create_history()
        return session

    async def fenced(self, session: Any) -> msr.Lease:
        """Have a session stand between the fence and the commit, until the test ends."""
        lease = await acquire(session)
        await self.stack.enter_async_context(session.transaction(lease))
        await session.record(ROW, lease)
        return lease


@pytest.fixture
async def postgres(postgres_url: str) -> AsyncIterator[Postgres]:
    """A database with a history table."""
    async with AsyncExitStack() as stack:
        yield Postgres(postgres_url, stack)


async def waits(url: str, statement: str) -> bool:
    """Whether a statement has to wait for another session."""
    try:
        await fetch(url, "SET lock_timeout = '100ms'", statement)
    except asyncpg.LockNotAvailableError:
        return True
    return False


@pytest.mark.parametrize(
    ("statement", "expected"),
    [(KEY_ROW_LOCK, True), (DELETE, True), (TOKEN, True), (OWNER, False), (EXPIRY, False)],
)
async def test_what_waits_for_a_fence(postgres: Postgres, statement: str, expected: bool) -> None:
    """A fence stops FOR UPDATE, DELETE and a new token; not an expiry, and not another owner."""
    await postgres.fenced(await postgres.session())
    assert await waits(postgres.url, statement) is expected


@pytest.mark.parametrize(
    ("statement", "expected"),
    [(KEY_ROW_LOCK, True), (DELETE, True), (TOKEN, False), (OWNER, False), (EXPIRY, False)],
)
async def test_what_waits_for_a_fence_without_the_unique_index(
    postgres: Postgres, statement: str, expected: bool
) -> None:
    """The control: a plain UPDATE of the token gets past it then, and nothing else does."""
    session = await postgres.session()
    assert await locking(session).release(await acquire(session))
    await fetch(postgres.url, UNIQUE)
    await postgres.fenced(session)
    assert await waits(postgres.url, statement) is expected


async def test_a_fence_lets_the_heartbeat_pass(postgres: Postgres) -> None:
    """A renewal on another connection neither waits for the commit nor stops it."""
    session, heartbeat = await postgres.session(), await postgres.session()
    lease = await acquire(session)
    async with session.transaction(lease):
        await session.record(ROW, lease)
        async with asyncio.timeout(PATIENCE):
            assert await locking(heartbeat).renew(lease)
    assert [row.version for row in await session.read_history()] == [1]


async def test_a_release_does_not_overtake_a_fence(postgres: Postgres) -> None:
    """S2: over a new connection, while a COMMIT may be on its way on the old one.

    The lock would be seen free, and the commit come after.
    """
    session, other = await postgres.session(), await postgres.session()
    lease = await postgres.fenced(session)
    releasing = asyncio.ensure_future(locking(other).release(lease))

    async def has_come_there() -> bool:
        waiting = "datname = current_database() AND wait_event_type = 'Lock'"
        return releasing.done() or bool(
            await fetch(postgres.url, f"SELECT FROM pg_stat_activity WHERE {waiting}")
        )

    await wait_until_async(has_come_there)
    free = not (await locking(await postgres.session()).get_status()).is_locked
    await postgres.stack.aclose()
    await asyncio.wait([releasing])
    assert not free


@pytest.mark.parametrize("guarded", [True, False], ids=["as it is", "control"])
async def test_a_renewal_saves_the_session(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    """Who renews after a waiter has seen its lease expired keeps its session, and the lock."""
    holder, heartbeat, waiter = [await postgres.session() for _ in range(3)]
    lease = await acquire(holder)
    await fetch(postgres.url, "UPDATE migration_locks SET expires_at = now()")
    ask = waiter.fetch

    async def ask_slowly(query: str, *values: object) -> Any:
        answer = await ask(query, *values)
        if query == postgres_lock.READ_STATUS:
            assert await locking(heartbeat).renew(lease)
        return answer

    monkeypatch.setattr(waiter, "fetch", ask_slowly)
    if not guarded:
        careless = postgres_lock.END_SESSION.replace("NOT EXISTS", "true OR NOT EXISTS")
        monkeypatch.setattr(postgres_lock, "END_SESSION", careless)
    assert isinstance(await locking(waiter).acquire(owner(), 60, None), msr.LockStatus)
    if guarded:
        assert await locking(holder).release(lease)
    else:
        await wait_until_async(lambda: is_closed(holder))


async def is_closed(session: Any) -> bool:
    return bool(session.connection.is_closed())


async def test_somebody_else_makes_the_tables(postgres: Postgres) -> None:
    """A first attempt that meets another first attempt waits for its tables, or is refused."""
    first, second = await postgres.session(), await postgres.session()
    key = await first.locking.identify()
    await first.fetch("SELECT pg_advisory_lock($1)", key)  # .. and takes its time
    asking = asyncio.ensure_future(locking(second).acquire(owner(), 60, None))
    await asyncio.wait([asking], timeout=0.3)
    await acquire(first)
    assert isinstance(await asking, msr.LockStatus)


async def test_a_session_that_lost_the_lock_can_have_it_again(postgres: Postgres) -> None:
    """After a second hold and its release, the session lock is free for others at once."""
    session, other = await postgres.session(), await postgres.session()
    await acquire(session)
    await fetch(postgres.url, DELETE)
    assert await locking(session).release(await acquire(session))
    await acquire(other)


async def test_a_session_that_lost_the_lock_leaves_no_file(sqlite_url: str, tmp_path: Path) -> None:
    """SQLite: a second hold on one connection closes and removes the file of the first."""
    async with msr.SqliteHandler(sqlite_url).connect(msr.Config()) as session:
        await acquire(session)
        await fetch(sqlite_url, DELETE)
        assert await locking(session).release(await acquire(session))
    assert not list(tmp_path.glob("*.lock"))
