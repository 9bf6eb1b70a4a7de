"""The history table of every handler: made once, read as it was written."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import msr
from tests.conformance.support import Connect, Sql, acquire
from tests.support.cli import write_scripts

ROW = msr.HistoryRow(1, "first", "c0ffee", "applied", duration=0.5, executed_by="somebody")

NAMES = [
    "plain",
    "größer_ünï_日本_🙂",
    'quo\'te and "double"',
    "back\\slash \\n \\\\ \\N",
    "tab\tand\nline",
]


async def record(session: msr.Session, lease: msr.Lease | None, row: msr.HistoryRow) -> None:
    async with session.transaction(lease):
        await session.record(row, lease)


async def test_no_table_means_no_rows(connect: Connect, sql: Sql) -> None:
    """Reading where nothing was ever migrated gives nothing, and leaves it to be created."""
    session = await connect()
    assert list(await session.read_history()) == []
    await session.create_history()
    assert list(await session.read_history()) == []


async def test_ten_at_once_create_it(connect: Connect) -> None:
    """Ten connections that create the table at the same moment all succeed."""
    sessions = [await connect() for _ in range(10)]
    await asyncio.gather(*(session.create_history() for session in sessions))
    await record(sessions[0], None, ROW)
    for session in sessions:
        assert [row.version for row in await session.read_history()] == [1]


async def test_rows_come_back_as_written(connect: Connect) -> None:
    """Every column survives, whatever the text holds, and another connection sees the same."""
    session = await connect()
    await session.create_history()
    lease = await acquire(session)
    written = [
        msr.HistoryRow(10**number, name, f"{number:064}", "applied", None, number / 8, name)
        for number, name in enumerate(NAMES)
    ]
    for row in reversed(written):
        await record(session, lease, row)
    read = list(await (await connect()).read_history())
    assert [row.version for row in read] == [row.version for row in written]
    for row, original in zip(read, written, strict=True):
        assert row.started_at is not None
        expected = replace(
            original,
            started_at=row.started_at,
            database_user=row.database_user,
            token=lease.token,
        )
        assert row == expected


async def test_the_database_says_when_and_who(
    handler: msr.DatabaseHandler, connect: Connect
) -> None:
    """`started_at` is the database's, with its zone; the user is the role, where there are any."""
    session = await connect()
    await session.create_history()
    long_ago = datetime(1999, 1, 1, tzinfo=UTC)
    await record(session, None, replace(ROW, started_at=long_ago, database_user="nobody", token=3))
    [row] = await session.read_history()
    assert row.started_at is not None
    assert abs(datetime.now(UTC) - row.started_at) < timedelta(seconds=30)
    assert row.database_user == ("postgres" if handler.dialect == "postgresql" else None)
    assert row.token is None


async def test_the_largest_version(connect: Connect) -> None:
    """A version of eighteen digits is kept to the last of them."""
    session = await connect()
    await session.create_history()
    await record(session, None, replace(ROW, version=999_999_999_999_999_999))
    [row] = await session.read_history()
    assert row.version == 999_999_999_999_999_999


async def test_a_long_history(connect: Connect, sql: Sql) -> None:
    """Thousands of rows are read whole and in order."""
    session = await connect()
    await session.create_history()
    await sql(
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 5000)"
        " INSERT INTO schema_version (version, name, checksum, status, started_at)"
        " SELECT 5001 - i, 'x', 'c', 'applied', '2025-01-02T03:04:05Z' FROM n"
    )
    rows = await session.read_history()
    assert [row.version for row in rows] == list(range(1, 5001))
    assert rows[0].started_at == datetime(2025, 1, 2, 3, 4, 5, tzinfo=UTC)


async def test_started_becomes_applied(connect: Connect) -> None:
    """A script outside a transaction is first started, then applied, in one and the same row."""
    session = await connect()
    await session.create_history()
    lease = await acquire(session)
    await record(session, lease, replace(ROW, status="started", duration=None))
    [started] = await session.read_history()
    assert (started.status, started.duration, started.token) == ("started", None, lease.token)
    await record(session, lease, replace(ROW, duration=2.5))
    [applied] = await session.read_history()
    assert applied == replace(started, status="applied", duration=2.5)


async def test_only_who_started_it_can_finish_it(connect: Connect) -> None:
    """A later holder does not mark what a former one left unfinished as applied."""
    session = await connect()
    await session.create_history()
    lease = await acquire(session)
    await record(session, lease, replace(ROW, status="started"))
    assert session.locking is not None
    assert await session.locking.release(lease)
    later = await acquire(session)
    for stranger in (later, None):
        with pytest.raises(msr.LockLostError):
            await record(session, stranger, ROW)
    [row] = await session.read_history()
    assert (row.status, row.token) == ("started", lease.token)


async def test_an_applied_row_stays(connect: Connect) -> None:
    """Nobody overwrites an applied row, not even with the same token."""
    session = await connect()
    await session.create_history()
    lease = await acquire(session)
    await record(session, lease, ROW)
    before = await session.read_history()
    for status in ("started", "applied"):
        with pytest.raises(msr.LockLostError):
            await record(session, lease, replace(ROW, status=status, name="other"))
    assert await session.read_history() == before


@pytest.mark.parametrize("use_lock", [True, False])
async def test_a_script_outside_a_transaction(
    handler: msr.DatabaseHandler, tmp_path: Path, use_lock: bool
) -> None:
    """SQL and Python that opt out end up applied like any other, with and without the lock."""
    folder = write_scripts(
        tmp_path / "scripts",
        {
            "V1_sql.sql": "-- msr: no-transaction\nCREATE TABLE work (id INTEGER);",
            "V2_python.py": """
                transaction = False

                async def up(db):
                    await db.execute("INSERT INTO work VALUES (1)")
            """,
        },
    )
    executor = msr.MigrationScriptExecutor(handler, msr.Config(folder=folder))
    result = await executor.migrate(use_lock=use_lock)
    assert [script.version for script in result.executed] == [1, 2]
    rows = await executor.list()
    assert [(row.status, row.token) for row in rows] == [("applied", result.token)] * 2


async def test_an_unfinished_script_stops_the_next_run(
    handler: msr.DatabaseHandler, connect: Connect, sql: Sql, tmp_path: Path
) -> None:
    """One found started is named with what to do; what it did before it failed is still there."""
    folder = write_scripts(
        tmp_path / "scripts",
        {
            "V1_half.sql": """
                -- msr: no-transaction
                CREATE TABLE half (id INTEGER);
                INSERT INTO nowhere VALUES (1);
            """,
            "V2_next.sql": "CREATE TABLE next (id INTEGER);",
        },
    )
    executor = msr.MigrationScriptExecutor(handler, msr.Config(folder=folder))
    with pytest.raises(msr.MigrationError) as failed:
        await executor.migrate()
    assert (failed.value.line, failed.value.rolled_back) == (4, False)
    assert await sql("SELECT * FROM half") == []
    before = await sql("SELECT * FROM schema_version")
    with pytest.raises(msr.ValidationError) as stopped:
        await executor.migrate()
    [problem] = stopped.value.problems
    assert (problem.rule, problem.file) == ("unfinished", "V1_half.sql")
    assert "msr repair 1" in problem.message
    assert await sql("SELECT * FROM schema_version") == before
    assert [row.status for row in await executor.list()] == ["unfinished", "pending"]
