"""The contract of `LockingService`, held against every handler."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

import msr
from msr.handlers.sqlite import SqliteSession
from tests.conformance.support import (
    TIMEOUT,
    Connect,
    Sql,
    acquire,
    expire,
    lock_rows,
    locking,
    owner,
    take_over,
)
from tests.support.cli import PATIENCE, wait_until_async

TABLES = {
    "postgresql": "SELECT table_name AS name FROM information_schema.tables"
    " WHERE table_schema = 'public'",
    "sqlite": "SELECT name FROM sqlite_master WHERE type = 'table'",
}


async def refusal(session: msr.Session) -> msr.LockStatus:
    """Ask for the lock, which must be refused."""
    outcome = await locking(session).acquire(owner(), TIMEOUT, "a second one")
    assert isinstance(outcome, msr.LockStatus), f"granted: {outcome}"
    return outcome


async def force(
    session: msr.Session, token: int, by: str = "ann@desk", reason: str | None = None
) -> bool:
    """Release the lock as an operator does."""
    return await locking(session).force_release(token, by=by, reason=reason, terminate=False)


async def test_a_free_lock_is_granted(connect: Connect) -> None:
    """On an empty database the first attempt gets a lease that says for whom and for how long."""
    asking = owner()
    lease = await locking(await connect()).acquire(asking, 42.0, "V1_first.sql (1 of 2)")
    assert isinstance(lease, msr.Lease)
    assert (lease.name, lease.locked_by, lease.timeout) == ("default", asking.locked_by, 42.0)
    assert lease.running == "V1_first.sql (1 of 2)"
    assert lease.token > 0


async def test_a_held_lock_is_refused(connect: Connect, sql: Sql) -> None:
    """A second attempt gets the holder's status, at once, and leaves the row as it was."""
    held = await acquire(await connect())
    before = await lock_rows(sql)
    other = await connect()
    asked = time.monotonic()
    status = await refusal(other)
    assert time.monotonic() - asked < 20
    assert (status.is_locked, status.locked_by) == (True, held.locked_by)
    assert await lock_rows(sql) == before


async def test_a_released_lock_is_granted_again(connect: Connect) -> None:
    """After a release another connection gets the lock at its first attempt."""
    first, second = await connect(), await connect()
    lease = await acquire(first)
    assert await locking(first).release(lease)
    assert (await acquire(second)).locked_by != lease.locked_by


async def test_one_connection_can_hold_again_and_again(connect: Connect) -> None:
    """A connection that has released the lock can take it again, and then it excludes others."""
    first, second = await connect(), await connect()
    for _ in range(3):
        lease = await acquire(first)
        assert (await refusal(second)).locked_by == lease.locked_by
        assert await locking(first).release(lease)
    await acquire(second)


async def test_a_refused_connection_keeps_nothing(connect: Connect) -> None:
    """An attempt that was refused does not stand in the way of the next holder."""
    holder, refused, next_holder = await connect(), await connect(), await connect()
    lease = await acquire(holder)
    await refusal(refused)
    assert await locking(holder).release(lease)
    await acquire(next_holder)


async def test_ten_at_once_on_an_empty_database(connect: Connect) -> None:
    """Of ten first attempts on an empty database exactly one is granted, and none fails."""
    sessions = [await connect() for _ in range(10)]

    async def attempt(session: msr.Session) -> msr.Lease | msr.LockStatus:
        asking = owner()
        while True:
            try:
                return await locking(session).acquire(asking, TIMEOUT, None)
            except msr.DatabaseBusyError:  # allowed: the database could not be asked just now
                await asyncio.sleep(0.01)

    outcomes = await asyncio.gather(*map(attempt, sessions))
    [granted] = [outcome for outcome in outcomes if isinstance(outcome, msr.Lease)]
    assert (await refusal(sessions[outcomes.index(granted) - 1])).token == granted.token


async def test_ten_at_once_for_an_expired_lock(connect: Connect, sql: Sql) -> None:
    """Of ten that try to take over one expired lock, again and again, exactly one is granted."""
    await acquire(await connect())
    await expire(sql)
    sessions = [await connect() for _ in range(10)]
    granted: list[msr.Lease] = []

    async def try_for(session: msr.Session) -> None:
        asking = owner()
        while not granted:
            try:
                outcome = await locking(session).acquire(asking, TIMEOUT, None)
            except msr.DatabaseBusyError:
                continue
            if isinstance(outcome, msr.Lease):
                granted.append(outcome)
            await asyncio.sleep(0.01)

    async with asyncio.timeout(PATIENCE):
        await asyncio.gather(*map(try_for, sessions))
    [lease] = granted
    [row] = await lock_rows(sql)
    assert (row["token"], row["locked_by"]) == (lease.token, lease.locked_by)


async def test_tokens_increase_with_every_hold(connect: Connect) -> None:
    """S1: whoever holds later has the greater token."""
    first, second = await connect(), await connect()
    tokens = []
    for session in (first, second, second, first):
        lease = await acquire(session)
        tokens.append(lease.token)
        assert await locking(session).release(lease)
    assert tokens == sorted(set(tokens))


async def test_tokens_increase_after_a_delete_by_hand(connect: Connect, sql: Sql) -> None:
    """S1: a row that was deleted does not bring an old token back."""
    session = await connect()
    lease = await acquire(session)
    assert await locking(session).release(lease)
    await sql("DELETE FROM migration_locks")
    again = await acquire(session)
    assert again.token > lease.token


async def test_tokens_increase_after_a_forced_release(connect: Connect) -> None:
    """S1: a forced release uses up a token of its own, so that the old one is not current."""
    holder, operator = await connect(), await connect()
    lease = await acquire(holder)
    assert await force(operator, lease.token)
    freed = (await locking(operator).get_status()).token
    assert freed is not None
    assert freed > lease.token
    await locking(holder).release(lease)
    assert (await acquire(operator)).token > freed


@pytest.mark.parametrize("method", ["renew", "release"])
@pytest.mark.parametrize("forgery", ["token", "owner", "both", "name"])
async def test_only_the_holder_can_renew_and_release(
    connect: Connect, sql: Sql, method: str, forgery: str
) -> None:
    """S4: with another token or another owner nothing changes, in no column of the row."""
    lease = await acquire(await connect())
    other = locking(await connect())
    before = await lock_rows(sql)
    changes: dict[str, dict[str, Any]] = {
        "token": {"token": lease.token - 1},
        "owner": {"locked_by": owner().locked_by},
        "both": {"token": lease.token + 1, "locked_by": owner().locked_by},
        "name": {"name": "another"},
    }
    forged = replace(lease, running="a forgery", **changes[forgery])
    assert await getattr(other, method)(forged) is False
    assert await lock_rows(sql) == before


@pytest.mark.parametrize("method", ["renew", "release"])
async def test_a_former_holder_cannot_touch_its_successor(
    connect: Connect, sql: Sql, method: str
) -> None:
    """S4: a lease of before does nothing to the lock of the next holder."""
    first, second, third = await connect(), await connect(), await connect()
    former = await acquire(first)
    assert await locking(first).release(former)
    await acquire(second)
    before = await lock_rows(sql)
    assert await getattr(locking(first), method)(former) is False
    assert await getattr(locking(third), method)(former) is False
    assert await lock_rows(sql) == before


async def test_nothing_can_be_renewed_or_released_twice(connect: Connect, sql: Sql) -> None:
    """A released lease is over: renew and release say so and change nothing."""
    session = await connect()
    lease = await acquire(session)
    assert await locking(session).release(lease)
    before = await lock_rows(sql)
    assert await locking(session).release(lease) is False
    assert await locking(session).renew(lease) is False
    assert await lock_rows(sql) == before


async def test_the_holder_renews_from_any_connection(connect: Connect) -> None:
    """The heartbeat has a connection of its own; the row's times move and nothing else does."""
    lease = await acquire(await connect())
    service = locking(await connect())
    before = await service.get_status()
    await asyncio.sleep(0.005)  # the resolution of some databases' clocks is a millisecond
    lease.timeout = 2 * TIMEOUT
    assert await service.renew(lease) is True
    after = await service.get_status()
    assert before.renewed_at is not None
    assert after.renewed_at is not None
    assert after.renewed_at > before.renewed_at
    assert after.expires_at == after.renewed_at + timedelta(seconds=2 * TIMEOUT)
    moved: dict[str, Any] = dict.fromkeys(("renewed_at", "expires_at", "checked_at"))
    assert replace(after, **moved) == replace(before, **moved)


async def test_what_runs_now_is_published(connect: Connect) -> None:
    """What the holder says it does can be read by others, from the first moment and renewed."""
    session, other = await connect(), await connect()
    lease = await acquire(session)
    assert (await locking(other).get_status()).running == "a test"
    lease.running = "V2_größer.sql (2 of 3)"
    assert await locking(session).renew(lease)
    assert (await locking(other).get_status()).running == "V2_größer.sql (2 of 3)"
    lease.running = None
    assert await locking(session).renew(lease)
    assert (await locking(other).get_status()).running is None


async def test_the_status_of_a_held_lock(connect: Connect) -> None:
    """Every field of the status says what the holder gave, in the database's time, in UTC."""
    asking = owner("node", 4711)
    lease = await locking(await connect()).acquire(asking, 90.5, "a test")
    assert isinstance(lease, msr.Lease)
    status = await locking(await connect()).get_status()
    assert (status.name, status.is_locked, status.token) == ("default", True, lease.token)
    assert (status.locked_by, status.hostname) == (asking.locked_by, "node")
    assert (status.process_id, status.running) == (4711, "a test")
    assert (status.is_expired, status.forced_release) == (False, None)
    assert status.obstacle is None
    assert status.holder in ("alive", "unknown")
    assert status.locked_at is not None
    assert status.checked_at is not None
    assert status.renewed_at == status.locked_at
    assert status.expires_at == status.locked_at + timedelta(seconds=90.5)
    assert timedelta(0) <= status.checked_at - status.locked_at < timedelta(seconds=30)
    assert abs(datetime.now(UTC) - status.checked_at) < timedelta(seconds=30)
    assert status.checked_at.utcoffset() == timedelta(0)
    assert status.locked_at.utcoffset() == timedelta(0)


async def test_the_status_of_a_released_lock(connect: Connect) -> None:
    """Nothing of the former holder is left but the token."""
    session = await connect()
    lease = await acquire(session)
    assert await locking(session).release(lease)
    status = await locking(session).get_status()
    assert replace(status, checked_at=None) == msr.LockStatus(name="default", token=lease.token)


async def test_the_status_creates_nothing(
    handler: msr.DatabaseHandler, connect: Connect, sql: Sql
) -> None:
    """On a database where nothing was ever locked the lock is free, and no table appears."""
    session = await connect()
    assert await locking(session).get_status() == msr.LockStatus(name="default")
    if isinstance(session, SqliteSession):
        assert not session.path.exists()
    else:
        assert await sql(TABLES[handler.dialect]) == []


async def test_the_status_changes_nothing(connect: Connect, sql: Sql) -> None:
    """Looking at a held or an expired lock writes nothing."""
    await acquire(await connect())
    other = await connect()
    for prepare in (None, expire):
        if prepare is not None:
            await prepare(sql)
        before = await lock_rows(sql)
        await locking(other).get_status()
        assert await lock_rows(sql) == before


async def test_a_host_name_with_hyphens(connect: Connect) -> None:
    """Host and process are columns of their own, never cut out of the owner's name."""
    asking = owner("macbook-pro-12345-x", 99)
    await locking(await connect()).acquire(asking, TIMEOUT, None)
    status = await locking(await connect()).get_status()
    assert (status.hostname, status.process_id) == ("macbook-pro-12345-x", 99)
    assert status.locked_by == asking.locked_by


async def test_an_expired_lock_is_shown_as_held(connect: Connect, sql: Sql) -> None:
    """A lease that has run out still has its holder and its dates, and is marked."""
    lease = await acquire(await connect())
    await expire(sql)
    status = await locking(await connect()).get_status()
    assert (status.is_locked, status.is_expired) == (True, True)
    assert status.locked_by == lease.locked_by
    assert status.expires_at == datetime(2001, 2, 3, 4, 5, 6, 789000, tzinfo=UTC)


async def test_an_expired_lock_is_taken_over(connect: Connect, sql: Sql) -> None:
    """S1, S4: the next one gets it under a greater token, and the former holder is out."""
    lease = await acquire(await connect())
    other = await connect()
    await expire(sql)
    taken = await take_over(other)
    assert taken.token > lease.token
    before = await lock_rows(sql)
    assert before[0]["locked_by"] == taken.locked_by
    service = locking(await connect())
    assert await service.renew(lease) is False
    assert await service.release(lease) is False
    assert await lock_rows(sql) == before


async def test_an_expired_lock_can_still_be_renewed(connect: Connect, sql: Sql) -> None:
    """As long as nobody has taken it, the holder's next renewal makes it good again."""
    session = await connect()
    lease = await acquire(session)
    await expire(sql)
    assert await locking(session).renew(lease) is True
    assert (await locking(session).get_status()).is_expired is False
    await refusal(await connect())


async def test_only_the_database_has_a_clock(
    connect: Connect, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S6: a client whose clock is decades off sees the same times and the same expiry."""
    lease = await acquire(await connect())
    other = await connect()
    for wrong in (1.0, 4e9):
        monkeypatch.setattr(time, "time", lambda wrong=wrong: wrong)
        monkeypatch.setattr(time, "time_ns", lambda wrong=wrong: int(wrong * 1e9))
        status = await refusal(other)
        assert (status.is_expired, status.locked_by) == (False, lease.locked_by)
        assert await locking(other).renew(lease)
    status = await locking(other).get_status()
    assert status.renewed_at is not None
    assert status.expires_at == status.renewed_at + timedelta(seconds=TIMEOUT)
    await sql("UPDATE migration_locks SET expires_at = '2999-12-31T23:59:59.000Z'")
    assert (await locking(other).get_status()).is_expired is False
    await expire(sql)
    assert (await locking(other).get_status()).is_expired is True


async def test_a_holder_whose_connection_ended_is_succeeded(
    handler: msr.DatabaseHandler, connect: Connect
) -> None:
    """L2: a connection that ended without a release does not keep the lock for the lease."""
    async with handler.connect(msr.Config()) as session:
        lease = await acquire(session)
    other = await connect()

    async def is_gone() -> bool:  # the server may take a moment to end the session
        return (await locking(other).get_status()).holder == "gone"

    await wait_until_async(is_gone)
    assert (await locking(other).get_status()).is_locked
    assert (await acquire(other)).token > lease.token


async def test_a_forced_release_frees_the_lock(connect: Connect) -> None:
    """It says who did it, why, when and to which token, and it leaves the lock free."""
    lease = await acquire(await connect())
    operator = await connect()
    assert await force(operator, lease.token, "ann-marie@desk-1", 'it\'s stuck; "really"') is True
    status = await locking(operator).get_status()
    assert (status.is_locked, status.locked_by, status.holder) == (False, None, None)
    assert (status.expires_at, status.running, status.process_id) == (None, None, None)
    release = status.forced_release
    assert release is not None
    assert (release.by, release.token) == ("ann-marie@desk-1", lease.token)
    assert release.reason == 'it\'s stuck; "really"'
    assert status.checked_at is not None
    assert timedelta(0) <= status.checked_at - release.at < timedelta(seconds=30)


async def test_a_forced_release_is_remembered(connect: Connect) -> None:
    """The next holders see it too; without a reason there is none."""
    holder, operator = await connect(), await connect()
    lease = await acquire(holder)
    assert await force(operator, lease.token)
    await locking(holder).release(lease)
    await acquire(operator)
    status = await locking(holder).get_status()
    assert status.forced_release is not None
    assert (status.forced_release.reason, status.forced_release.token) == (None, lease.token)


async def test_a_forced_release_compares_the_token(connect: Connect, sql: Sql) -> None:
    """With another token than the current one nothing is released and nothing is noted."""
    lease = await acquire(await connect())
    operator = await connect()
    before = await lock_rows(sql)
    for token in (lease.token - 1, lease.token + 1):
        assert await force(operator, token, reason="wrong") is False
    assert await lock_rows(sql) == before


async def test_a_forced_release_of_a_free_lock(connect: Connect, sql: Sql) -> None:
    """A lock that was released meanwhile is not released again."""
    session = await connect()
    lease = await acquire(session)
    assert await locking(session).release(lease)
    before = await lock_rows(sql)
    assert await force(session, lease.token) is False
    assert await lock_rows(sql) == before


async def test_a_forced_release_where_nothing_was_ever_locked(connect: Connect) -> None:
    """Without a lock there is nothing to release: False, not an error."""
    assert await force(await connect(), 1) is False


async def test_a_forced_release_ends_the_holder(connect: Connect, sql: Sql) -> None:
    """S4: the former holder can neither renew nor release, on whatever connection."""
    holder, operator = await connect(), await connect()
    lease = await acquire(holder)
    assert await force(operator, lease.token)
    before = await lock_rows(sql)
    for service in (locking(holder), locking(operator)):
        assert await service.renew(lease) is False
        assert await service.release(lease) is False
    assert await lock_rows(sql) == before


@pytest.mark.parametrize("by_hand", [False, True])
async def test_the_lock_can_be_had_after_a_forced_release(
    connect: Connect, sql: Sql, by_hand: bool
) -> None:
    """Released by force or deleted by hand, the lock is taken although its holder lives on."""
    lease = await acquire(await connect())
    operator = await connect()
    if by_hand:
        await sql("DELETE FROM migration_locks")
        assert (await locking(operator).get_status()).is_locked is False
    else:
        assert await force(operator, lease.token)
    taken = await take_over(operator)
    assert taken.token > lease.token
    assert await locking(await connect()).renew(lease) is False


async def test_locks_of_two_names_are_independent(connect: Connect) -> None:
    """Two locks in one table exclude nobody but those of their own name."""
    one, other = await connect(name="one"), await connect(name='other lock\'s "name"')
    lease = await acquire(one)
    second = await acquire(other)
    assert (lease.name, second.name) == ("one", 'other lock\'s "name"')
    assert (await refusal(await connect(name="one"))).locked_by == lease.locked_by
    assert await locking(one).release(lease)
    status = await locking(other).get_status()
    assert (status.is_locked, status.locked_by) == (True, second.locked_by)
    assert await locking(other).renew(second)


async def test_locks_in_two_tables_are_independent(connect: Connect, sql: Sql) -> None:
    """Another table name is another lock, with its own row."""
    one, other = await connect(), await connect(table_name="App2_Locks")
    lease, second = await acquire(one), await acquire(other)
    [row] = await sql('SELECT * FROM "App2_Locks"')
    assert row["locked_by"] == second.locked_by
    assert (await lock_rows(sql))[0]["locked_by"] == lease.locked_by
    assert (await refusal(await connect(table_name="App2_Locks"))).token == second.token
    assert await locking(other).release(second)
    assert (await locking(one).get_status()).is_locked is True


async def test_a_lock_in_a_schema_of_its_own(
    handler: msr.DatabaseHandler, connect: Connect, sql: Sql
) -> None:
    """On PostgreSQL a schema-qualified name puts the lock there, apart from the default one."""
    if handler.dialect != "postgresql":
        pytest.skip("SQLite has no schemas")
    await sql("CREATE SCHEMA ops")
    session = await connect(table_name="ops.migration_locks")
    lease = await acquire(session)
    [row] = await sql("SELECT * FROM ops.migration_locks")
    assert row["token"] == lease.token
    assert (await refusal(await connect(table_name="ops.migration_locks"))).token == lease.token
    await acquire(await connect())
    assert await locking(session).release(lease)


async def test_the_row_was_deleted(connect: Connect, sql: Sql) -> None:
    """Without a row the lock is free, and can be taken."""
    session = await connect()
    assert await locking(session).release(await acquire(session))
    await sql("DELETE FROM migration_locks")
    status = await locking(session).get_status()
    assert (status.is_locked, status.token, status.forced_release) == (False, None, None)
    await acquire(await connect())


async def test_the_table_was_dropped(connect: Connect, sql: Sql) -> None:
    """Without a table the lock is free, can be taken, and the former lease is over."""
    session = await connect()
    lease = await acquire(session)
    await sql("DROP TABLE migration_locks")
    assert (await locking(session).get_status()).is_locked is False
    assert await locking(session).renew(lease) is False
    assert await locking(session).release(lease) is False
    again = await acquire(await connect())
    assert again.locked_by != lease.locked_by


async def test_waiting_takes_no_longer_than_asked(connect: Connect) -> None:
    """`wait` comes back in time when nothing happens."""
    await acquire(await connect())
    waiting = locking(await connect())
    await waiting.get_status()
    started = time.monotonic()
    assert await waiting.wait(0.2) is False
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("running", ["a\0b", "caf\udce9", "two\nlines", ""])
async def test_any_text_may_be_running(connect: Connect, running: str) -> None:
    """What a script says of itself, however odd, does not keep the lease from being renewed."""
    session = await connect()
    lease = await acquire(session)
    lease.running = running
    assert await locking(await connect()).renew(lease)
    shown = (await locking(await connect()).get_status()).running
    assert (shown or "").isprintable()
