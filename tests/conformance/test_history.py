"""The history table of every handler: made once, read as it was written."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

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


async def record(
    session: msr.Session,
    lease: msr.Lease | None,
    row: msr.HistoryRow | None,
    replaces: msr.HistoryRow | None = None,
    text: str | None = None,
) -> None:
    async with session.transaction(lease):
        await session.record(row, lease, replaces=replaces, text=text)


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
    """Times that are not given are the database's, with their zone; so is the user."""
    session = await connect()
    await session.create_history()
    await record(session, None, replace(ROW, note="looked at", token=3))
    [row] = await session.read_history()
    for moment in (row.started_at, row.noted_at):
        assert moment is not None
        assert abs(datetime.now(UTC) - moment) < timedelta(seconds=30)
    assert row.database_user == ("postgres" if handler.dialect == "postgresql" else None)
    assert row.token is None


async def test_what_is_known_already_is_kept(connect: Connect) -> None:
    """A row that was read and is written again keeps when it ran, and the text of its checksum."""
    session = await connect()
    await session.create_history()
    long_ago = datetime(1999, 1, 1, 12, 30, 15, 250_000, tzinfo=UTC)
    await record(session, None, replace(ROW, started_at=long_ago), text="SELECT 1;\n")
    [row] = await session.read_history()
    assert row.started_at == long_ago
    repaired = replace(row, name="better", note="repaired")
    await record(session, None, repaired, replaces=row)
    [found] = await session.read_history()
    assert found == replace(repaired, noted_at=found.noted_at)
    assert await session.read_text(found) == "SELECT 1;\n"
    assert await session.read_text(row) is None
    edited = replace(found, checksum="other")
    await record(session, None, edited, replaces=found)
    [found] = await session.read_history()
    assert await session.read_text(found) is None


async def test_repeatable_scripts_have_a_row_each(connect: Connect) -> None:
    """A row without a version goes by its name: one for each, after the versioned ones."""
    session = await connect()
    await session.create_history()
    views = [replace(ROW, version=None, name=name) for name in ("b", "a")]
    for row in (*views, ROW):
        await record(session, None, row)
    rows = await session.read_history()
    assert [row.key for row in rows] == [1, "a", "b"]
    with pytest.raises(msr.LockLostError):
        await record(session, None, views[0])
    await record(session, None, replace(views[0], checksum="new"), replaces=rows[2])
    assert [row.checksum for row in await session.read_history()] == ["c0ffee", "c0ffee", "new"]


async def test_a_row_is_removed(connect: Connect) -> None:
    """Without a new row the old one goes, under the fence like any other change."""
    session = await connect()
    await session.create_history()
    lease = await acquire(session)
    await record(session, lease, ROW)
    [row] = await session.read_history()
    assert session.locking is not None
    assert await session.locking.release(lease)
    with pytest.raises(msr.LockLostError):
        await record(session, lease, None, replaces=row)
    assert await session.read_history() == [row]
    await record(session, await acquire(session), None, replaces=row)
    assert list(await session.read_history()) == []


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
    await record(session, lease, replace(ROW, duration=2.5), replaces=started)
    [applied] = await session.read_history()
    assert applied == replace(started, status="applied", duration=2.5)


@pytest.mark.parametrize(
    "change",
    [
        {"status": "applied"},
        {"checksum": "other"},
        {"name": "other"},
        {"token": 77},
        {"version": 2},
    ],
)
async def test_only_what_was_read_is_replaced(connect: Connect, change: dict[str, Any]) -> None:
    """A row that somebody has changed since it was read stays as it is now."""
    session = await connect()
    await session.create_history()
    lease = await acquire(session)
    await record(session, lease, replace(ROW, status="started"))
    [row] = await session.read_history()
    for new in (ROW, None):
        with pytest.raises(msr.LockLostError):
            await record(session, lease, new, replaces=replace(row, **change))
    assert await session.read_history() == [row]


async def test_a_row_that_is_there_stays(connect: Connect) -> None:
    """Nobody writes over an applied row that they have not seen, not even with the same token."""
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


async def test_a_failed_script_stops_the_next_run(
    handler: msr.DatabaseHandler, connect: Connect, sql: Sql, tmp_path: Path
) -> None:
    """One that failed is named with what to do; what it did before it failed is still there."""
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
    assert (problem.rule, problem.file) == ("failed", "V1_half.sql")
    assert "msr repair 1" in problem.message
    assert await sql("SELECT * FROM schema_version") == before
    assert [row.status for row in await executor.list()] == ["failed", "pending"]
