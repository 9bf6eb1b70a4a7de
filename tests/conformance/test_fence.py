"""The fence: no history row commits unless its (token, locked_by) is current at that commit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import asyncpg
import pytest

import msr
from tests.conformance.support import (
    Connect,
    Sql,
    acquire,
    expire,
    lock_rows,
    locking,
    owner,
    take_over,
)
from tests.support.cli import PATIENCE

ROW = msr.HistoryRow(1, "first", "c0ffee", "applied", duration=0.5, executed_by="somebody")


@pytest.fixture(autouse=True)
async def tables(handler: msr.DatabaseHandler, connect: Connect, sql: Sql) -> None:
    """A history without rows, a table for scripts to change, and a lock that is free."""
    session = await connect()
    await session.create_history()
    await sql("CREATE TABLE work (id INTEGER)")
    assert await locking(session).release(await acquire(session))


async def change_and_record(session: msr.Session, lease: msr.Lease | None) -> None:
    """What a run does for one script."""
    async with session.transaction(lease):
        await session.execute_script("INSERT INTO work VALUES (1);\nINSERT INTO work VALUES (2);")
        await session.record(ROW, lease)


async def assert_nothing_committed(sql: Sql) -> None:
    assert await sql("SELECT * FROM schema_version") == []
    assert await sql("SELECT * FROM work") == []


async def supersede(connect: Connect, sql: Sql, lease: msr.Lease) -> None:
    """Let another take the lock over after the lease ran out."""
    await expire(sql)
    await take_over(await connect())


async def succeed(connect: Connect, sql: Sql, lease: msr.Lease) -> None:
    """Release the lock, and let another have it."""
    assert await locking(await connect()).release(lease)
    await take_over(await connect())


async def delete(connect: Connect, sql: Sql, lease: msr.Lease) -> None:
    """Do what the emergency procedure says."""
    await sql("DELETE FROM migration_locks")


async def force(connect: Connect, sql: Sql, lease: msr.Lease) -> None:
    """Release the lock as an operator."""
    service = locking(await connect())
    assert await service.force_release(lease.token, by="ann", reason=None, terminate=False)


async def drop(connect: Connect, sql: Sql, lease: msr.Lease) -> None:
    """Drop the lock's table."""
    await sql("DROP TABLE migration_locks")


Loss = Callable[[Connect, Sql, msr.Lease], Awaitable[None]]
LOSSES = [supersede, succeed, delete, force]


async def test_a_current_lease_commits(connect: Connect, sql: Sql) -> None:
    """The changes and the history row commit together, with the token they ran under."""
    session = await connect()
    lease = await acquire(session)
    await change_and_record(session, lease)
    [row] = await sql("SELECT version, token FROM schema_version")
    assert row == {"version": 1, "token": lease.token}
    assert len(await sql("SELECT * FROM work")) == 2


@pytest.mark.parametrize("lose", LOSSES)
async def test_a_lost_lease_commits_nothing(connect: Connect, sql: Sql, lose: Loss) -> None:
    """S2, S3, S7: however the lock was lost, neither changes nor history row are left."""
    lease = await acquire(await connect())
    other = await connect()  # PostgreSQL ends the session of a holder that is superseded
    await lose(connect, sql, lease)
    with pytest.raises(msr.LockLostError):
        await change_and_record(other, lease)
    await assert_nothing_committed(sql)


@pytest.mark.parametrize("lose", [delete, force])
async def test_a_former_holders_own_connection_commits_nothing(
    connect: Connect, sql: Sql, lose: Loss
) -> None:
    """S3: the connection that the lock was taken on is fenced like any other."""
    session = await connect()
    lease = await acquire(session)
    await lose(connect, sql, lease)
    with pytest.raises(msr.LockLostError):
        await change_and_record(session, lease)
    await assert_nothing_committed(sql)


@pytest.mark.parametrize("forgery", [{"token": 1}, {"locked_by": "somebody-else"}, {"name": "no"}])
async def test_token_and_owner_and_name_must_match(
    connect: Connect, sql: Sql, forgery: dict[str, Any]
) -> None:
    """S2: each of the three alone is enough to be refused."""
    session = await connect()
    lease = await acquire(session)
    assert lease.token != 1, "the fixture has used that one"
    with pytest.raises(msr.LockLostError):
        await change_and_record(session, replace(lease, **forgery))
    await assert_nothing_committed(sql)
    await change_and_record(session, lease)


async def test_an_expired_lease_that_nobody_took_commits(connect: Connect, sql: Sql) -> None:
    """The token decides, not the time: who is late and was not superseded may still commit."""
    session = await connect()
    lease = await acquire(session)
    await expire(sql)
    await change_and_record(session, lease)
    assert len(await sql("SELECT * FROM schema_version")) == 1


async def test_a_failing_script_leaves_nothing(connect: Connect, sql: Sql) -> None:
    """S7: the statements before the one that failed are undone, and the lock is still ours."""
    session = await connect()
    lease = await acquire(session)
    with pytest.raises(msr.StatementError) as caught:
        async with session.transaction(lease):
            await session.execute_script(
                "INSERT INTO work VALUES (1);\n\nINSERT INTO nowhere VALUES (1);"
            )
    assert caught.value.line == 3
    await assert_nothing_committed(sql)
    await change_and_record(session, lease)


async def test_a_cancelled_transaction_leaves_nothing(connect: Connect, sql: Sql) -> None:
    """S7: cancelled between two statements, the transaction is rolled back."""
    session = await connect()
    lease = await acquire(session)
    begun = asyncio.Event()

    async def script() -> None:
        async with session.transaction(lease):
            await session.execute_script("INSERT INTO work VALUES (1)")
            await session.record(ROW, lease)
            begun.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(script())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await assert_nothing_committed(sql)
    assert await locking(session).release(lease)


async def test_without_a_lease_there_is_no_fence(connect: Connect, sql: Sql) -> None:
    """`migrate --no-lock` commits while somebody else holds the lock, and records no token."""
    await acquire(await connect())
    await change_and_record(await connect(), None)
    [row] = await sql("SELECT version, token FROM schema_version")
    assert row == {"version": 1, "token": None}


@pytest.mark.parametrize("with_lease", [True, False])
async def test_what_another_has_applied_is_not_applied_again(
    connect: Connect, sql: Sql, with_lease: bool
) -> None:
    """A row that is there already rolls the script back, lock or no lock."""
    session = await connect()
    lease = await acquire(session) if with_lease else None
    await change_and_record(session, lease)
    with pytest.raises(msr.LockLostError):
        await change_and_record(session, lease)
    assert len(await sql("SELECT * FROM work")) == 2


class TestSqlite:
    """One writer at a time: inside the transaction nobody else can touch the lock."""

    @pytest.fixture
    def handler(self, sqlite_url: str) -> msr.DatabaseHandler:
        return msr.SqliteHandler(sqlite_url)

    async def test_nobody_can_move_the_lock_meanwhile(self, connect: Connect, sql: Sql) -> None:
        """S3: a forced release says who is in the way, and the script commits."""
        session, operator = await connect(), await connect()
        lease = await acquire(session)
        async with session.transaction(lease):
            await session.execute_script("INSERT INTO work VALUES (1)")
            with pytest.raises(msr.LockBlockedError, match=lease.locked_by):
                await locking(operator).force_release(
                    lease.token, by="ann", reason=None, terminate=False
                )
            await session.record(ROW, lease)
        assert len(await sql("SELECT * FROM schema_version")) == 1
        assert await locking(session).release(lease)

    async def test_an_expired_lease_is_safe_inside(self, connect: Connect, sql: Sql) -> None:
        """A lease that runs out in the transaction cannot be taken, and the fence renews it."""
        session, waiter = await connect(), await connect()
        lease = await acquire(session)
        await expire(sql)
        async with session.transaction(lease):
            assert lease.secured
            outcome = await locking(waiter).acquire(owner(), 600, None)
            assert isinstance(outcome, msr.LockStatus)
            await session.record(ROW, lease)
        assert not lease.secured
        status = await locking(waiter).get_status()
        assert (status.locked_by, status.is_expired) == (lease.locked_by, False)


class TestPostgres:
    """Row locks: `KEY SHARE` on the lock's row, kept from the history insert to the commit."""

    @pytest.fixture
    def handler(self, postgres_url: str) -> msr.DatabaseHandler:
        return msr.PostgresHandler(postgres_url)

    @pytest.fixture
    async def shell(self, postgres_url: str) -> AsyncIterator[Any]:
        """A connection of somebody with psql, who waits for no row lock longer than 300 ms."""
        connection = await asyncpg.connect(postgres_url, server_settings={"lock_timeout": "300ms"})
        yield connection
        await connection.close()

    @asynccontextmanager
    async def pending_fence(self, session: msr.Session, lease: msr.Lease) -> AsyncIterator[None]:
        """A transaction that has recorded its row and commits on leaving."""
        async with session.transaction(lease):
            await session.execute_script("INSERT INTO work VALUES (1)")
            await session.record(ROW, lease)
            yield

    @staticmethod
    async def pid_of(session: msr.Session) -> int:
        """The process on the server that serves this connection."""
        pid: int = await (await session.script_connection()).fetchval("SELECT pg_backend_pid()")
        return pid

    @pytest.mark.parametrize("lose", [delete, force])
    async def test_a_lock_lost_in_mid_transaction(
        self, connect: Connect, sql: Sql, lose: Loss
    ) -> None:
        """S2, S3, S7: what was done before the loss is rolled back with what came after."""
        session = await connect()
        lease = await acquire(session)
        with pytest.raises(msr.LockLostError):
            async with session.transaction(lease):
                await session.execute_script("INSERT INTO work VALUES (1)")
                await lose(connect, sql, lease)
                await session.execute_script("INSERT INTO work VALUES (2)")
                await session.record(ROW, lease)
        await assert_nothing_committed(sql)

    async def test_a_takeover_in_mid_transaction(self, connect: Connect, sql: Sql) -> None:
        """S5: whoever takes an expired lock over ends the old session before it has the lock."""
        session = await connect()
        pid = await self.pid_of(session)
        lease = await acquire(session)
        with pytest.raises(msr.MsrError):
            async with session.transaction(lease):
                await session.execute_script("INSERT INTO work VALUES (1)")
                await supersede(connect, sql, lease)
                assert await sql(f"SELECT FROM pg_stat_activity WHERE pid = {pid}") == []
                await session.record(ROW, lease)
        await assert_nothing_committed(sql)

    @pytest.mark.parametrize(
        "statement",
        [
            "UPDATE migration_locks SET token = token + 1",
            "UPDATE migration_locks SET token = token + 1, locked_by = 'x' WHERE locked_by <> 'x'",
            "DELETE FROM migration_locks",
        ],
    )
    async def test_a_token_change_waits_for_the_commit(
        self, connect: Connect, sql: Sql, shell: Any, statement: str
    ) -> None:
        """S2: between the history insert and the commit nobody can make the token an old one."""
        session = await connect()
        lease = await acquire(session)
        async with self.pending_fence(session, lease):
            with pytest.raises(asyncpg.LockNotAvailableError):
                await shell.execute(statement)
        assert len(await sql("SELECT * FROM schema_version")) == 1
        assert await shell.execute(statement) in ("UPDATE 1", "DELETE 1")

    async def test_it_waits_only_because_of_the_unique_index(
        self, connect: Connect, sql: Sql, shell: Any
    ) -> None:
        """The control: without UNIQUE (name, token) a token change slips past a pending fence."""
        [constraint] = await sql(
            "SELECT conname FROM pg_constraint"
            " WHERE conrelid = 'migration_locks'::regclass AND contype = 'u'"
        )
        await sql(f'ALTER TABLE migration_locks DROP CONSTRAINT "{constraint["conname"]}"')
        session = await connect()
        lease = await acquire(session)
        async with self.pending_fence(session, lease):
            await shell.execute("UPDATE migration_locks SET token = token + 1")

    async def test_the_heartbeat_passes_a_pending_fence(self, connect: Connect, sql: Sql) -> None:
        """A renewal does not wait for the holder's own commit."""
        session, heartbeat = await connect(), await connect()
        lease = await acquire(session)
        await locking(heartbeat).get_status()  # so that nothing but the renewal is timed
        before = await lock_rows(sql)
        async with self.pending_fence(session, lease):
            async with asyncio.timeout(PATIENCE):
                assert await locking(heartbeat).renew(lease)
        [after] = await lock_rows(sql)
        assert after["expires_at"] > before[0]["expires_at"]
        assert len(await sql("SELECT * FROM schema_version")) == 1

    async def test_a_forced_release_waits_for_a_pending_commit(
        self, connect: Connect, sql: Sql, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """S3: it returns after the commit, never before it."""
        monkeypatch.setattr("msr.handlers.postgres_lock.BLOCKED_AFTER", PATIENCE)
        session, operator = await connect(), await connect()
        lease = await acquire(session)
        async with self.pending_fence(session, lease):
            release = asyncio.create_task(force(connect, sql, lease))
            await asyncio.sleep(0.3)
            assert not release.done()
        await release
        assert len(await sql("SELECT * FROM schema_version")) == 1
        assert (await locking(operator).get_status()).is_locked is False

    async def test_a_forced_release_does_not_wait_for_ever(
        self, connect: Connect, sql: Sql
    ) -> None:
        """It names the holder and its session, and releases nothing; `terminate` ends it."""
        session, operator = await connect(), await connect()
        lease = await acquire(session)
        pid = await self.pid_of(session)
        with pytest.raises((msr.MsrError, msr.StatementError)):  # at the commit
            async with self.pending_fence(session, lease):
                async with asyncio.timeout(PATIENCE):
                    with pytest.raises(msr.LockBlockedError, match=f"{lease.locked_by}.*{pid}"):
                        await force(connect, sql, lease)
                assert (await locking(operator).get_status()).token == lease.token
                assert await locking(operator).force_release(
                    lease.token, by="ann", reason=None, terminate=True
                )
        await assert_nothing_committed(sql)
        assert (await locking(operator).get_status()).is_locked is False

    async def test_a_fence_waits_for_an_open_delete(
        self, connect: Connect, sql: Sql, shell: Any
    ) -> None:
        """S2: a DELETE that is not committed yet decides the fence when it commits."""
        session = await connect()
        lease = await acquire(session)
        transaction = shell.transaction()
        await transaction.start()
        await shell.execute("DELETE FROM migration_locks")
        run = asyncio.create_task(change_and_record(session, lease))
        await asyncio.sleep(0.2)
        assert not run.done()
        await transaction.commit()
        with pytest.raises(msr.LockLostError):
            await run
        await assert_nothing_committed(sql)

    async def test_an_attempt_never_waits_for_a_fence(self, connect: Connect, sql: Sql) -> None:
        """L4: against a holder with a pending commit an attempt still returns at once."""
        session, other = await connect(), await connect()
        lease = await acquire(session)
        await locking(other).get_status()
        async with self.pending_fence(session, lease), asyncio.timeout(PATIENCE):
            outcome = await locking(other).acquire(owner(), 600, None)
        assert isinstance(outcome, msr.LockStatus)
        assert len(await sql("SELECT * FROM schema_version")) == 1

    async def test_an_attempt_never_waits_for_a_row_lock(
        self, connect: Connect, shell: Any
    ) -> None:
        """L4: somebody who looks at the row FOR UPDATE keeps the lock, but hangs nobody."""
        other = await connect()
        async with shell.transaction():
            await shell.fetch("SELECT * FROM migration_locks FOR UPDATE")
            async with asyncio.timeout(PATIENCE):
                outcome = await locking(other).acquire(owner(), 600, None)
            assert isinstance(outcome, msr.LockStatus)
        await acquire(other)

    async def test_a_frozen_holder_with_a_pending_commit(self, connect: Connect, sql: Sql) -> None:
        """S2, L3: once its lease has run out it is superseded, and what was pending is undone."""
        session = await connect()
        lease = await acquire(session)
        with pytest.raises((msr.MsrError, msr.StatementError)):  # at the commit
            async with self.pending_fence(session, lease):
                async with asyncio.timeout(PATIENCE):
                    await supersede(connect, sql, lease)
        await assert_nothing_committed(sql)
