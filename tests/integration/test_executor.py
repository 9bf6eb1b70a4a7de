"""`MigrationScriptExecutor` in one process, against real databases."""

from __future__ import annotations

import asyncio
import gc
import logging
import re
import tempfile
import threading
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest

import msr
from msr.urls import parse_url
from tests.support.cli import PATIENCE, wait_until_async, write_scripts
from tests.support.databases import path_of
from tests.support.queries import exists, fetch, table_names

SCRIPTS = {
    "V1_users.sql": "CREATE TABLE users (id INTEGER PRIMARY KEY, name TEXT);",
    "deeper/V2_ann.sql": """
        INSERT INTO users VALUES (1, 'ann');
        INSERT INTO users VALUES (2, 'bob');
    """,
    "V3_python.py": """
        async def up(db):
            await db.execute("INSERT INTO users VALUES (3, 'carl')")
    """,
}

WAITING_SCRIPT = """
    import asyncio

    async def up(db):
        await db.execute("INSERT INTO users VALUES (9, 'half')")
        await asyncio.sleep(600)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with three scripts: SQL, SQL in a sub-folder, and Python."""
    return write_scripts(tmp_path / "scripts", SCRIPTS)


@pytest.fixture
def executor(database_url: str, folder: Path) -> msr.MigrationScriptExecutor:
    """An executor of that folder, on an empty database of each kind."""
    return make_executor(database_url, folder)


def make_executor(url: str, folder: Path, **locking: Any) -> msr.MigrationScriptExecutor:
    return msr.MigrationScriptExecutor.from_url(url, folder=folder, locking=locking)


def is_sqlite(url: str) -> bool:
    return parse_url(url).dialect == "sqlite"


async def is_locked(executor: msr.MigrationScriptExecutor) -> bool:
    status = await executor.get_lock_status()
    return status is not None and status.is_locked


# migrate


async def test_migrate_applies_everything(
    executor: msr.MigrationScriptExecutor, database_url: str
) -> None:
    """Every script runs once, in order of version, and the result says what was done."""
    result = await executor.migrate()
    assert await fetch(database_url, "SELECT name FROM users ORDER BY id") == [
        ("ann",),
        ("bob",),
        ("carl",),
    ]
    applied = [(script.version, script.name, script.script) for script in result.executed]
    assert applied == [
        (1, "users", "V1_users.sql"),
        (2, "ann", "deeper/V2_ann.sql"),
        (3, "python", "V3_python.py"),
    ]
    assert (result.pending_before, result.applied_before, result.followed) == (3, 0, False)
    assert result.token is not None
    assert 0 <= result.waited < result.duration < 30
    assert sum(script.duration for script in result.executed) <= result.duration
    assert all(script.duration > 0 for script in result.executed)
    assert not await is_locked(executor)


async def test_migrate_again_does_nothing(executor: msr.MigrationScriptExecutor) -> None:
    """The second run finds all of it applied, takes no lock and has no token."""
    first = await executor.migrate()
    second = await executor.migrate()
    assert replace(second, duration=0.0) == msr.MigrationResult(applied_before=3)
    status = await executor.get_lock_status()
    assert status is not None
    assert status.token == first.token


async def test_migrate_applies_what_is_new(
    executor: msr.MigrationScriptExecutor, folder: Path
) -> None:
    """A script that was added later runs alone, under a greater token."""
    first = await executor.migrate()
    write_scripts(folder, {"V4_more.sql": "INSERT INTO users VALUES (4, 'dora');"})
    second = await executor.migrate()
    assert [script.version for script in second.executed] == [4]
    assert (second.pending_before, second.applied_before) == (1, 3)
    assert first.token is not None
    assert second.token is not None
    assert second.token > first.token


async def test_the_boot_hook_in_one_line(database_url: str, folder: Path) -> None:
    """`msr.migrate(url, folder=...)` does what the executor does, listeners included."""
    events: list[msr.Event] = []
    result = await msr.migrate(
        database_url, folder=folder, listeners=[events.append], locking={"name": "boot"}
    )
    assert len(result.executed) == 3
    assert events[-1] == msr.RunFinished("migrate", result)
    assert await fetch(database_url, "SELECT name FROM migration_locks") == [("boot",)]


async def test_tables_have_the_names_that_were_given(database_url: str, folder: Path) -> None:
    """History and lock stand in the configured tables, and in no others."""
    executor = msr.MigrationScriptExecutor.from_url(
        database_url, folder=folder, table_name="My_History", locking={"table_name": "My_Locks"}
    )
    await executor.migrate()
    tables = await table_names(database_url)
    assert {"My_History", "My_Locks", "users"} <= tables
    assert not {"schema_version", "migration_locks"} & tables
    assert [row.status for row in await executor.list()] == ["applied"] * 3


async def test_only_up_scripts_run(database_url: str, tmp_path: Path) -> None:
    """The way back beside a script is not taken."""
    folder = write_scripts(
        tmp_path / "scripts",
        {
            "V1_t.up.sql": "CREATE TABLE t (id INTEGER);",
            "V1_t.down.sql": "DROP TABLE t;",
            "V2_u.py": """
                async def up(db):
                    await db.execute("CREATE TABLE u (id INTEGER)")

                async def down(db):
                    await db.execute("DROP TABLE u")
            """,
        },
    )
    await make_executor(database_url, folder).migrate()
    assert {"t", "u"} <= await table_names(database_url)


# Failures


async def test_a_failing_script_stops_the_run(
    executor: msr.MigrationScriptExecutor, database_url: str, folder: Path
) -> None:
    """It is rolled back whole; the error says where, and carries what had been done before."""
    bad = "INSERT INTO users VALUES (4, 'dora');\n\nINSERT INTO nowhere\nVALUES (1);\n"
    write_scripts(folder, {"V4_bad.sql": bad, "V5_after.sql": "DROP TABLE users;"})
    with pytest.raises(msr.MigrationError, match="nowhere") as caught:
        await executor.migrate()
    error = caught.value
    assert (error.script, error.line, error.rolled_back) == ("V4_bad.sql", 3, True)
    assert error.applied == ("V1_users.sql", "deeper/V2_ann.sql", "V3_python.py")
    assert error.result is not None
    assert [script.version for script in error.result.executed] == [1, 2, 3]
    assert (error.result.pending_before, error.result.applied_before) == (5, 0)
    assert error.result.token is not None
    assert await fetch(database_url, "SELECT count(*) FROM users") == [(3,)]
    statuses = [row.status for row in await executor.list()]
    assert statuses == ["applied"] * 3 + ["pending"] * 2
    assert not await is_locked(executor)

    write_scripts(folder, {"V4_bad.sql": "INSERT INTO users VALUES (4, 'dora');"})
    assert [script.version for script in (await executor.migrate()).executed] == [4, 5]


async def test_a_failing_python_script(
    executor: msr.MigrationScriptExecutor, database_url: str, folder: Path
) -> None:
    """What it did is rolled back; the error has the line of the script's own file."""
    script = 'async def up(db):\n    await db.execute("DELETE FROM users")\n    {}["missing"]\n'
    write_scripts(folder, {"V4_bad.py": script})
    with pytest.raises(msr.MigrationError, match="KeyError: 'missing'") as caught:
        await executor.migrate()
    assert (caught.value.script, caught.value.line) == ("V4_bad.py", 3)
    assert isinstance(caught.value.__cause__, KeyError)
    assert await fetch(database_url, "SELECT count(*) FROM users") == [(3,)]


async def test_problems_are_found_before_anything_runs(
    executor: msr.MigrationScriptExecutor, database_url: str, folder: Path
) -> None:
    """All of them are named at once, and the database stays as it was: empty."""
    write_scripts(
        folder,
        {
            "V2_again.sql": "SELECT 1;",
            "V5_no_up.py": "x = 1",
            "V6_commits.sql": "COMMIT;",
            "wrong.sql": "SELECT 1;",
        },
    )
    with pytest.raises(msr.ValidationError) as caught:
        await executor.migrate()
    rules = {problem.rule for problem in caught.value.problems}
    assert rules >= {"duplicate-version", "bad-name"}
    assert caught.value.result is not None
    assert caught.value.result.executed == ()
    assert await table_names(database_url) == set()


async def test_a_changed_script_stops_the_run(
    executor: msr.MigrationScriptExecutor, database_url: str, folder: Path
) -> None:
    """An applied script that was edited is a problem, also when something new is pending."""
    await executor.migrate()
    write_scripts(folder, {"V1_users.sql": "SELECT 2;", "V4_new.sql": "DROP TABLE users;"})
    with pytest.raises(msr.ValidationError) as caught:
        await executor.migrate()
    assert [problem.rule for problem in caught.value.problems] == ["changed-checksum"]
    assert await fetch(database_url, "SELECT count(*) FROM users") == [(3,)]


async def test_a_cancelled_run_leaves_nothing(
    executor: msr.MigrationScriptExecutor, database_url: str, folder: Path
) -> None:
    """Cancelled in mid-script, the script is rolled back and the lock released at once."""
    write_scripts(folder, {"V4_slow.py": WAITING_SCRIPT})
    started = asyncio.Event()

    def listen(event: msr.Event) -> None:
        if isinstance(event, msr.ScriptStarted) and event.number == 4:
            started.set()

    executor.listeners.append(listen)
    task = asyncio.create_task(executor.migrate())
    await started.wait()
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not await is_locked(executor)
    assert await fetch(database_url, "SELECT count(*) FROM users") == [(3,)]
    assert [row.status for row in await executor.list()][-1] == "pending"


@pytest.mark.parametrize("statement", ["COMMIT", "ROLLBACK"])
async def test_a_script_that_ends_the_transaction(
    executor: msr.MigrationScriptExecutor, database_url: str, folder: Path, statement: str
) -> None:
    """Python that commits or rolls back by itself is an error, and is not recorded as applied."""
    write_scripts(
        folder,
        {
            "V4_own.py": f"""
                async def up(db):
                    await db.execute("INSERT INTO users VALUES (4, 'dora')")
                    await db.execute("{statement}")
            """
        },
    )
    with pytest.raises(msr.MigrationError) as caught:
        await executor.migrate()
    assert caught.value.script == "V4_own.py"
    # SQLite can forbid it; PostgreSQL can only tell afterwards.
    assert caught.value.rolled_back is is_sqlite(database_url)
    kept = 4 if statement == "COMMIT" and not is_sqlite(database_url) else 3
    assert await fetch(database_url, "SELECT count(*) FROM users") == [(kept,)]
    assert [row.status for row in await executor.list()][-1] == "pending"
    assert not await is_locked(executor)


async def test_a_script_that_goes_on_after_its_commit(
    executor: msr.MigrationScriptExecutor, database_url: str, folder: Path
) -> None:
    """A transaction of the script's own in place of ours does not pass for ours."""
    write_scripts(
        folder,
        {
            "V4_own.py": """
                async def up(db):
                    await db.execute("INSERT INTO users VALUES (4, 'dora')")
                    await db.execute("COMMIT")
                    await db.execute("BEGIN")
                    await db.execute("INSERT INTO users VALUES (5, 'emil')")
            """
        },
    )
    with pytest.raises(msr.MigrationError):
        await executor.migrate()
    assert [row.status for row in await executor.list()][-1] == "pending"
    assert await fetch(database_url, "SELECT count(*) FROM users WHERE id = 5") == [(0,)]


# Python scripts


async def test_python_gets_the_drivers_connection(database_url: str, tmp_path: Path) -> None:
    """`db` is asyncpg's or aiosqlite's own connection, and nested work with it is fine."""
    body = (
        """
        import aiosqlite

        async def up(db):
            assert isinstance(db, aiosqlite.Connection)
            await db.execute("CREATE TABLE t (id INTEGER)")
            await db.execute("SAVEPOINT inner_work")
            await db.executemany("INSERT INTO t VALUES (?)", [(1,), (2,)])
            await db.execute("ROLLBACK TO inner_work")
            await db.execute("RELEASE inner_work")
            await db.executemany("INSERT INTO t VALUES (?)", [(3,), (4,)])
        """
        if is_sqlite(database_url)
        else """
        import asyncpg

        async def up(db):
            assert isinstance(db, asyncpg.Connection)
            await db.execute("CREATE TABLE t (id INTEGER)")
            try:
                async with db.transaction():
                    await db.executemany("INSERT INTO t VALUES ($1)", [(1,), (2,)])
                    raise KeyError
            except KeyError:
                pass
            async with db.transaction():
                await db.copy_records_to_table("t", records=[(3,), (4,)])
        """
    )
    folder = write_scripts(tmp_path / "scripts", {"V1_python.py": body})
    await make_executor(database_url, folder).migrate()
    assert await fetch(database_url, "SELECT id FROM t ORDER BY id") == [(3,), (4,)]


async def test_a_python_script_outside_a_transaction(database_url: str, tmp_path: Path) -> None:
    """With `transaction = False` the script may commit as it likes."""
    begin = "BEGIN"
    folder = write_scripts(
        tmp_path / "scripts",
        {
            "V1_python.py": f"""
                transaction = False

                async def up(db):
                    await db.execute("{begin}")
                    await db.execute("CREATE TABLE t (id INTEGER)")
                    await db.execute("COMMIT")
            """
        },
    )
    executor = make_executor(database_url, folder)
    await executor.migrate()
    assert "t" in await table_names(database_url)
    assert [row.status for row in await executor.list()] == ["applied"]


# list


async def test_list_on_an_empty_database(
    executor: msr.MigrationScriptExecutor, database_url: str
) -> None:
    """Every script is pending, with its file and nothing else; looking creates nothing."""
    assert await executor.list() == [
        msr.ScriptStatus(1, "users", "pending", "V1_users.sql"),
        msr.ScriptStatus(2, "ann", "pending", "deeper/V2_ann.sql"),
        msr.ScriptStatus(3, "python", "pending", "V3_python.py"),
    ]
    assert await table_names(database_url) == set()
    assert exists(database_url) is not is_sqlite(database_url)


async def test_list_says_when_and_by_whom(
    executor: msr.MigrationScriptExecutor, database_url: str, folder: Path
) -> None:
    """Applied scripts have the database's time, the executor's id, the role and the token."""
    result = await executor.migrate()
    (folder / "V3_python.py").unlink()
    write_scripts(folder, {"V1_users.sql": "SELECT 1;", "V4_new.sql": "SELECT 1;"})
    rows = await executor.list()
    assert [(row.version, row.status, row.file) for row in rows] == [
        (1, "changed", "V1_users.sql"),
        (2, "applied", "deeper/V2_ann.sql"),
        (3, "missing", None),
        (4, "pending", "V4_new.sql"),
    ]
    me = msr.Owner.new()
    for row, executed in zip(rows[:3], result.executed, strict=True):
        assert row.token == result.token
        assert row.executed_by is not None
        assert row.executed_by.startswith(f"{me.hostname}-{me.process_id}-")
        assert row.database_user == (None if is_sqlite(database_url) else "postgres")
        assert row.duration is not None
        assert 0 < row.duration <= executed.duration
        assert row.started_at is not None
        assert abs(datetime.now(UTC) - row.started_at) < timedelta(seconds=60)


# The lock


async def test_the_lock_guards_other_work(executor: msr.MigrationScriptExecutor) -> None:
    """`lock()` holds it for the body, visibly, and tokens increase."""
    tokens = []
    for _ in range(2):
        async with executor.lock(running="alembic upgrade head") as lease:
            status = await executor.get_lock_status()
            assert status is not None
            assert (status.is_locked, status.token) == (True, lease.token)
            assert (status.locked_by, status.is_expired) == (lease.locked_by, False)
            assert status.running == "alembic upgrade head"
            assert (status.holder, status.process_id) == ("alive", msr.Owner.new().process_id)
            tokens.append(lease.token)
        assert not await is_locked(executor)
    assert tokens == sorted(set(tokens))


async def test_the_lease_is_as_long_as_configured(database_url: str, folder: Path) -> None:
    """`locking.timeout` is the time from the last renewal to the expiry."""
    executor = make_executor(database_url, folder, timeout=77)
    async with executor.lock():
        status = await executor.get_lock_status()
    assert status is not None
    assert status.renewed_at is not None
    assert status.expires_at == status.renewed_at + timedelta(seconds=77)


async def test_a_held_lock_keeps_others_out(
    executor: msr.MigrationScriptExecutor, database_url: str, folder: Path
) -> None:
    """Neither `lock()` nor `migrate()` gets in; the error carries holder, wait and result."""
    other = make_executor(database_url, folder, wait=0)
    async with executor.lock(running="a long one") as lease:
        with pytest.raises(msr.LockHeldError, match=lease.locked_by):
            async with other.lock():
                pytest.fail("two holders")
        with pytest.raises(msr.LockHeldError) as caught:
            await other.migrate()
        with pytest.raises(msr.LockHeldError):
            await executor.migrate(wait=0.1)
        assert "users" not in await table_names(database_url)
    assert caught.value.status.running == "a long one"
    assert caught.value.waited < 20
    assert caught.value.result is not None
    assert (caught.value.result.executed, caught.value.result.pending_before) == ((), 3)
    assert len((await other.migrate()).executed) == 3


async def test_two_names_do_not_exclude_each_other(database_url: str, folder: Path) -> None:
    """`locking.name` tells locks in one table apart."""
    one, other = (make_executor(database_url, folder, name=name, wait=0) for name in "ab")
    async with one.lock() as lease, other.lock() as second:
        assert (lease.name, second.name) == ("a", "b")


async def test_the_wait_is_measured(
    executor: msr.MigrationScriptExecutor, database_url: str, folder: Path
) -> None:
    """Who had to wait and then ran everything says how long it waited, and told at each poll."""
    events: list[msr.Event] = []
    waiting = make_executor(database_url, folder)
    waiting.listeners.append(events.append)
    async with executor.lock() as lease:
        run = asyncio.create_task(waiting.migrate())
        await wait_until_async(lambda: is_waiting(events))
        await asyncio.sleep(0.3)
    result = await run
    assert result.followed is False
    assert 0.3 <= result.waited <= result.duration
    told = [event for event in events if isinstance(event, msr.WaitingForLock)]
    assert all(event.status.locked_by == lease.locked_by for event in told[:1])
    assert [event.waited for event in told] == sorted(event.waited for event in told)


async def is_waiting(events: list[msr.Event]) -> bool:
    return any(isinstance(event, msr.WaitingForLock) for event in events)


async def test_errors_of_the_body_come_out_bare(executor: msr.MigrationScriptExecutor) -> None:
    """What the body raises passes unchanged, and the lock is free."""
    error = KeyError("x")
    with pytest.raises(KeyError) as caught:
        async with executor.lock():
            raise error
    assert caught.value is error
    assert not await is_locked(executor)


async def test_a_lock_released_by_force_is_lost_at_once(
    postgres_url: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a lease of ten minutes the holder is told through NOTIFY, not by its next renewal."""
    monkeypatch.setattr("msr.locking.LONGEST_HEARTBEAT", 600.0)
    executor = make_executor(postgres_url, folder, timeout=600)
    with pytest.raises(msr.LockLostError):
        async with executor.lock() as lease:
            renewed = "SELECT FROM migration_locks WHERE renewed_at > locked_at"
            await wait_until_async(lambda: fetch(postgres_url, renewed))  # it listens before
            await executor.force_release_lock(token=lease.token)
            async with asyncio.timeout(PATIENCE):
                await asyncio.sleep(600)


@pytest.mark.parametrize("by_hand", [False, True])
async def test_a_lock_that_was_taken_away_is_lost(
    database_url: str, folder: Path, by_hand: bool
) -> None:
    """Released by force or deleted by hand: the body is cancelled by the next renewal."""
    executor = make_executor(database_url, folder, timeout=1)
    with pytest.raises(msr.LockLostError):
        async with executor.lock():
            if by_hand:
                await fetch(database_url, "DELETE FROM migration_locks")
            else:
                await executor.force_release_lock()
            async with asyncio.timeout(PATIENCE):
                await asyncio.sleep(600)


async def test_a_loss_at_the_very_end_is_told(executor: msr.MigrationScriptExecutor) -> None:
    """A body that never noticed still does not end as if it had had the lock."""
    with pytest.raises(msr.LockLostError):
        async with executor.lock():
            await executor.force_release_lock()


@pytest.mark.may_block("a listener of the test does other work while the run stands still")
async def test_a_run_that_lost_its_lock_commits_nothing_more(
    executor: msr.MigrationScriptExecutor, database_url: str, folder: Path
) -> None:
    """S3: released by force between two scripts, the first stays and the second never runs."""
    write_scripts(folder, {"V4_more.sql": "INSERT INTO users VALUES (4, 'dora');"})

    def listen(event: msr.Event) -> None:
        if isinstance(event, msr.ScriptFinished) and event.number == 2:
            release_in_thread(database_url, folder)

    executor.listeners.append(listen)
    with pytest.raises(msr.LockLostError) as caught:
        await executor.migrate()
    assert caught.value.result is not None
    assert [script.version for script in caught.value.result.executed] == [1, 2]
    assert await fetch(database_url, "SELECT count(*) FROM users") == [(2,)]
    executor.listeners.clear()
    assert [script.version for script in (await executor.migrate()).executed] == [3, 4]


def release_in_thread(url: str, folder: Path) -> None:
    """Release the lock by force, while the loop of the caller stands still."""
    thread = threading.Thread(
        target=lambda: asyncio.run(make_executor(url, folder).force_release_lock())
    )
    thread.start()
    thread.join()


async def test_status_and_release_where_nothing_was_ever_locked(
    executor: msr.MigrationScriptExecutor, database_url: str
) -> None:
    """The lock is free, there is nothing to release, and nothing is created by looking."""
    assert await executor.get_lock_status() == msr.LockStatus(name="default")
    assert await executor.force_release_lock() is None
    assert await table_names(database_url) == set()
    assert exists(database_url) is not is_sqlite(database_url)


async def test_a_forced_release_gives_back_what_it_released(
    executor: msr.MigrationScriptExecutor,
) -> None:
    """The status before it; afterwards the lock is free and says who did it, where and why."""
    with pytest.raises(msr.LockLostError):
        async with executor.lock() as lease:
            released = await executor.force_release_lock(token=lease.token, reason="stuck")
    assert released is not None
    assert (released.is_locked, released.locked_by) == (True, lease.locked_by)
    status = await executor.get_lock_status()
    assert status is not None
    assert status.is_locked is False
    assert status.forced_release is not None
    assert (status.forced_release.token, status.forced_release.reason) == (lease.token, "stuck")
    user, _, host = status.forced_release.by.partition("@")
    assert user
    assert host == msr.Owner.new().hostname
    assert await executor.force_release_lock() is None


async def test_a_forced_release_of_a_lock_that_changed_hands(
    executor: msr.MigrationScriptExecutor,
) -> None:
    """With the token of a former holder nothing is released, held or free."""
    async with executor.lock() as former:
        pass
    async with executor.lock() as lease:
        with pytest.raises(msr.LockChangedError):
            await executor.force_release_lock(token=former.token)
        assert await is_locked(executor)
    with pytest.raises(msr.LockChangedError):
        await executor.force_release_lock(token=former.token)
    assert await executor.force_release_lock(token=lease.token) is None


async def test_a_holder_in_a_transaction_does_not_hang_the_release(
    executor: msr.MigrationScriptExecutor, database_url: str, folder: Path
) -> None:
    """On SQLite the release is refused with a sentence; on PostgreSQL it succeeds. Both soon."""
    write_scripts(folder, {"V4_slow.py": WAITING_SCRIPT})
    run = asyncio.create_task(executor.migrate())

    async def is_in_last_script() -> bool:
        status = await executor.get_lock_status()
        return status is not None and (status.running or "").startswith("V4_slow.py")

    await wait_until_async(is_in_last_script)
    async with asyncio.timeout(PATIENCE):
        if is_sqlite(database_url):
            with pytest.raises(msr.LockBlockedError, match="V4_slow.py"):
                await executor.force_release_lock()
            run.cancel()
        else:
            await executor.force_release_lock()
    with pytest.raises((msr.LockLostError, asyncio.CancelledError)):
        await run
    assert await fetch(database_url, "SELECT count(*) FROM users") == [(3,)]


# Listeners


async def test_listeners_hear_everything_in_order(
    executor: msr.MigrationScriptExecutor,
) -> None:
    """The lock, then each script's start and end, numbered, with the results' durations."""
    events: list[msr.Event] = []
    executor.listeners.append(events.append)
    result = await executor.migrate()
    assert result.token is not None
    expected: list[msr.Event] = [
        msr.RunStarted("migrate"),
        msr.LockAcquired(result.token, result.waited),
    ]
    for number, script in enumerate(result.executed, start=1):
        expected.append(msr.ScriptStarted(script.script, number, 3))
        expected.append(msr.ScriptFinished(script.script, number, 3, script.duration))
    expected += [msr.LockReleased(result.token), msr.RunFinished("migrate", result)]
    assert events == expected
    events.clear()
    await executor.migrate()
    assert [type(event) for event in events] == [msr.RunStarted, msr.RunFinished]


async def test_a_listener_that_raises_breaks_nothing(
    executor: msr.MigrationScriptExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    """Its error is logged, the run goes on, and the next listener hears as much."""
    events: list[msr.Event] = []

    def broken(event: msr.Event) -> None:
        raise ValueError("from the listener")

    executor.listeners[:] = [broken, events.append]
    result = await executor.migrate()
    assert len(result.executed) == 3
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(events) == len(errors) == 2 + 3 * 2 + 2
    assert {record.name for record in errors} == {"msr"}


# L5: nothing pending


@asynccontextmanager
async def wire(url: str) -> AsyncIterator[tuple[str, list[str]]]:
    """A proxy before PostgreSQL: the URL through it, and every message that clients send.

    A message is its type and the start of its text, see the protocol's message formats.
    """
    address = parse_url(url).dsn
    server, port = address.partition("@")[2].partition("/")[0].split(":")
    heard: list[str] = []
    pumps: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append("connect")
        upstream_reader, upstream_writer = await asyncio.open_connection(server, int(port))

        async def backward() -> None:
            while data := await upstream_reader.read(65536):
                writer.write(data)
            writer.close()

        pump = asyncio.create_task(backward())
        pumps.add(pump)
        first = True
        while True:
            try:
                kind = b"" if first else await reader.readexactly(1)
                length = await reader.readexactly(4)
                body = await reader.readexactly(int.from_bytes(length) - 4)
            except (asyncio.IncompleteReadError, ConnectionError):
                break
            if not first:
                text = body.partition(b"\0")[0].decode()
                heard.append(f"{kind.decode()} {' '.join(text.split())}".strip())
            first = False
            upstream_writer.write(kind + length + body)
        upstream_writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as proxy:
        own = proxy.sockets[0].getsockname()[1]
        through = address.replace(f"{server}:{port}", f"127.0.0.1:{own}")
        yield f"{through}?sslmode=disable", heard
    await asyncio.gather(*pumps)


@pytest.mark.parametrize("length", [3, 3000])
async def test_nothing_pending_costs_one_query_on_postgres(
    postgres_url: str, folder: Path, length: int
) -> None:
    """L5: one connection and one query, which cannot write; not even the lock is looked at."""
    await make_executor(postgres_url, folder).migrate()
    grow(folder, length)
    await fetch(postgres_url, long_history(length, "now()"))
    tables = ("schema_version", "migration_locks")
    before = [await fetch(postgres_url, f"SELECT ctid, xmin::text, * FROM {t}") for t in tables]
    async with wire(postgres_url) as (url, heard):
        result = await make_executor(url, folder).migrate()
    assert (result.executed, result.applied_before) == ((), length)
    connect, query, *rest = heard
    assert connect == "connect"
    assert re.fullmatch(r"Q COPY \( ?SELECT .*\) TO STDOUT", query)
    assert rest == ["X"]
    after = [await fetch(postgres_url, f"SELECT ctid, xmin::text, * FROM {t}") for t in tables]
    assert after == before


@pytest.mark.parametrize("length", [3, 3000])
async def test_nothing_pending_costs_one_query_on_sqlite(
    sqlite_url: str, folder: Path, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """L5: one connection and one query; no byte of the database and no file beside it changes."""
    import aiosqlite

    await make_executor(sqlite_url, folder).migrate()
    grow(folder, length)
    await fetch(sqlite_url, long_history(length, "'2025-01-02T03:04:05.000Z'"))
    path = path_of(sqlite_url)
    before = (path.read_bytes(), path.stat().st_mtime_ns, sorted(path.parent.iterdir()))
    statements: list[list[str]] = []
    original = aiosqlite.connect

    async def connect(*args: Any, **options: Any) -> aiosqlite.Connection:
        connection = await original(*args, **options)
        heard: list[str] = []
        statements.append(heard)
        await connection.set_trace_callback(heard.append)
        return connection

    monkeypatch.setattr(aiosqlite, "connect", connect)
    result = await make_executor(sqlite_url, folder).migrate()
    assert (result.executed, result.applied_before) == ((), length)
    [[query]] = statements
    assert query.strip().startswith("SELECT")
    after = (path.read_bytes(), path.stat().st_mtime_ns, sorted(path.parent.iterdir()))
    assert after == before


def grow(folder: Path, length: int) -> None:
    """Add scripts, up to `length` of them."""
    for version in range(4, length + 1):
        (folder / f"V{version}_x.sql").write_text("SELECT 1;")


def long_history(length: int, now: str) -> str:
    """The statement that records those scripts as applied."""
    checksum = "17db4fd369edb9244b9f91d9aeed145c3d04ad8ba6e95d06247f07a63527d11a"  # SELECT 1;
    return (
        "WITH RECURSIVE n(i) AS (SELECT 4 UNION ALL SELECT i + 1 FROM n WHERE i < "
        f"{length}) INSERT INTO schema_version (version, name, checksum, status, started_at)"
        f" SELECT i, 'x', '{checksum}', 'applied', {now} FROM n WHERE i <= {length}"
    )


# Without a lock


class Unlockable:
    """A handler of somebody's own that has no locking service."""

    def __init__(self, handler: msr.DatabaseHandler) -> None:
        self._handler = handler
        self.dialect = handler.dialect

    @asynccontextmanager
    async def connect(self, config: msr.Config) -> AsyncIterator[Any]:
        async with self._handler.connect(config) as session:
            yield UnlockableSession(session)


class UnlockableSession:
    locking = None

    def __init__(self, session: msr.Session) -> None:
        self._session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


async def test_a_handler_without_a_locking_service(
    executor: msr.MigrationScriptExecutor,
    database_url: str,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It migrates, with a warning; the lock has no status, and asking for it is an error."""
    bare = msr.MigrationScriptExecutor(Unlockable(executor.handler), msr.Config(folder=folder))
    assert await bare.get_lock_status() is None
    result = await bare.migrate()
    assert (len(result.executed), result.token) == (3, None)
    assert "without the migration lock" in caplog.text
    assert "migration_locks" not in await table_names(database_url)
    with pytest.raises(msr.LockError, match="Locking service is not available"):
        await bare.force_release_lock()
    with pytest.raises(msr.LockError, match="Locking service is not available"):
        async with bare.lock():
            pass
    assert await bare.get_lock_status() is None


@pytest.mark.parametrize("by_argument", [False, True])
async def test_locking_can_be_disabled(
    executor: msr.MigrationScriptExecutor, database_url: str, folder: Path, by_argument: bool
) -> None:
    """`locking.enabled` and `use_lock=False` run while another holds the lock, with no token."""
    async with executor.lock() as lease:
        if by_argument:
            result = await executor.migrate(use_lock=False)
        else:
            result = await make_executor(database_url, folder, enabled=False).migrate()
        status = await executor.get_lock_status()
    assert (len(result.executed), result.token, result.waited) == (3, None, 0.0)
    assert status is not None
    assert status.locked_by == lease.locked_by
    assert [row.token for row in await executor.list()] == [None] * 3


async def test_the_argument_wins_over_the_configuration(database_url: str, folder: Path) -> None:
    """`use_lock=True` takes the lock although `locking.enabled` is false."""
    result = await make_executor(database_url, folder, enabled=False).migrate(use_lock=True)
    assert result.token is not None


async def test_without_the_lock_there_is_no_lock_table(database_url: str, folder: Path) -> None:
    """Where locking is disabled from the start, its table never appears."""
    await make_executor(database_url, folder, enabled=False).migrate()
    assert await table_names(database_url) == {"users", "schema_version"}


# Several at once


def versions_run(results: Iterable[msr.MigrationResult]) -> list[int]:
    """What several runs applied together."""
    scripts = [script for result in results for script in result.executed]
    return sorted(script.version for script in scripts if script.version is not None)


@pytest.mark.parametrize("again", range(3))
async def test_five_at_once(database_url: str, folder: Path, again: int) -> None:
    """In one process: every script runs once, all five return, and who ran nothing says so."""
    executors = [make_executor(database_url, folder) for _ in range(5)]
    results = await asyncio.gather(*(executor.migrate() for executor in executors))
    assert versions_run(results) == [
        1,
        2,
        3,
    ]
    assert await fetch(database_url, "SELECT count(*) FROM users") == [(3,)]
    for result in results:
        if result.pending_before:
            assert result.followed is (len(result.executed) < result.pending_before)
    assert not await is_locked(executors[0])


async def test_one_executor_used_by_five_tasks(executor: msr.MigrationScriptExecutor) -> None:
    """An executor holds no state of a run, so it may be shared."""
    results = await asyncio.gather(*(executor.migrate() for _ in range(5)))
    assert versions_run(results) == [
        1,
        2,
        3,
    ]


async def test_a_database_in_memory(folder: Path) -> None:
    """It lives as long as its executor, and five tasks share it."""
    executor = make_executor("sqlite://:memory:", folder)
    results = await asyncio.gather(*(executor.migrate() for _ in range(5)))
    assert versions_run(results) == [
        1,
        2,
        3,
    ]
    assert [row.status for row in await executor.list()] == ["applied"] * 3
    assert (await executor.migrate()).applied_before == 3


async def test_a_database_in_memory_is_read_and_written_at_once(folder: Path) -> None:
    """Who looks there stands in no script's way, not even in a statement of the script's own."""
    write_scripts(
        folder,
        {
            "V4_slow.py": """
                async def up(db):
                    for number in range(200):
                        await db.execute(f"CREATE TABLE t{number} (id INTEGER)")
            """
        },
    )
    executor = make_executor("sqlite://:memory:", folder)
    done = anyio.Event()

    async def look() -> None:
        while not done.is_set():
            await executor.get_lock_status()
            await executor.list()

    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(look)
        result = await executor.migrate()
        done.set()
    assert len(result.executed) == 4


async def test_nothing_is_left_of_a_database_in_memory(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a file that nobody else may read, for as long as the executor is there."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = set(tmp_path.iterdir())
    executor = make_executor("sqlite://:memory:", folder)
    await executor.migrate()
    [made] = set(tmp_path.iterdir()) - before
    assert made.stat().st_mode & 0o077 == 0
    del executor
    gc.collect()
    assert set(tmp_path.iterdir()) == before


async def test_a_follower_sees_the_failure_of_the_first(
    database_url: str, folder: Path, tmp_path: Path
) -> None:
    """Who waited for a run that failed tries by itself, and fails for the same reason."""
    write_scripts(folder, {"V4_bad.sql": "INSERT INTO nowhere VALUES (1);"})
    executors = [make_executor(database_url, folder) for _ in range(3)]
    results = await asyncio.gather(
        *(executor.migrate() for executor in executors), return_exceptions=True
    )
    assert [type(result) for result in results] == [msr.MigrationError] * 3
    assert await fetch(database_url, "SELECT count(*) FROM users") == [(3,)]


async def test_a_forced_release_by_a_user_without_a_name(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a container the user id may have no name: the lock is released all the same."""

    def unknown() -> str:
        raise KeyError("getpwuid(): uid not found: 54321")

    monkeypatch.setattr("getpass.getuser", unknown)
    executor = msr.MigrationScriptExecutor.from_url(database_url)
    with pytest.raises(msr.LockLostError):
        async with executor.lock():
            assert await executor.force_release_lock() is not None
    status = await executor.get_lock_status()
    assert status is not None
    assert status.forced_release is not None
    assert status.forced_release.by.startswith("uid-")
