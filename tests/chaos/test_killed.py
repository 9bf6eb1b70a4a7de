"""Holders that are killed, wherever they are: the next one takes over, and does the work whole."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sqlite3
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import asyncpg
import pytest

from msr.locking import LAST_POLL
from msr.urls import parse_url
from tests.support.cli import (
    PATIENCE,
    Result,
    run_msr,
    start_python,
    wait_until,
    wait_until_async,
    write_scripts,
)
from tests.support.figures import LONG, Figures, rounds
from tests.support.migrations import (
    applied,
    finish,
    is_sqlite,
    lock_row,
    start_migrate,
    wait_for_waiting,
)
from tests.support.postgres import PostgresServer
from tests.support.queries import fetch, query, table_names
from tests.support.rig import STEPS, Rig

TAKEOVER = 2.0
"""Seconds in which a dead holder's lock must have been taken over (L2)."""

pytestmark = pytest.mark.timeout(600 if LONG else 120)


def kill(process: subprocess.Popen[str]) -> None:
    """End it, and what it started, without a chance to do anything."""
    os.killpg(process.pid, signal.SIGKILL)


# While somebody waits


def interruptible(url: str, folder: Path, how: str, times: int) -> Path:
    """Three scripts; the second takes a minute under the first `times` tokens of the lock."""
    if how == "idle":
        token = "await db.fetchval('SELECT token FROM migration_locks')"
        if is_sqlite(url):
            token = "(await db.execute_fetchall('SELECT token FROM migration_locks'))[0][0]"
        name, body = (
            "V2_interrupted.py",
            f"""
            import asyncio

            async def up(db):
                await db.execute("INSERT INTO work VALUES (1)")
                if {token} <= {times}:
                    await asyncio.sleep(60)
                await db.execute("INSERT INTO work VALUES (2)")
            """,
        )
    else:
        slow = f"SELECT pg_sleep(CASE WHEN token <= {times} THEN 60 ELSE 0 END)"
        slow += " FROM migration_locks;"
        if is_sqlite(url):
            slow = f"""
            WITH RECURSIVE n(i) AS (
                SELECT 1 UNION ALL
                SELECT i + 1 FROM n, migration_locks WHERE token <= {times} AND i < 1000000000000
            ) SELECT count(*) FROM n;
            """
        name = "V2_interrupted.sql"
        body = f"INSERT INTO work VALUES (1);\n{slow}\nINSERT INTO work VALUES (2);"
    first = {"V1_first.sql": "CREATE TABLE work (id INTEGER);"}
    last = {"V3_last.sql": "CREATE TABLE last (id INTEGER);"}
    return write_scripts(folder, {**first, name: body, **last})


def is_inside(url: str) -> bool:
    """Whether the second script has begun: its first INSERT is done, and keeps others out."""
    if not (lock_row(url)[2] or "").startswith("V2_interrupted"):
        return False
    if not is_sqlite(url):
        doing = (
            "SELECT 1 FROM pg_stat_activity WHERE datname = current_database()"
            " AND (query LIKE 'SELECT pg_sleep%' AND state = 'active'"
            " OR query LIKE 'SELECT token %' AND state = 'idle in transaction')"
        )
        return bool(query(url, doing))
    with closing(sqlite3.connect(parse_url(url).path or "", timeout=0)) as db:
        try:
            db.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return True
        return False


def take_over(
    url: str,
    folder: Path,
    how: str,
    times: int,
    *,
    rig: Rig | None = None,
    within: float = PATIENCE,
) -> list[float]:
    """Kill a holder that another waits for, then that one, `times` times.

    How long it took each time until the row had a new token, which is at most `within` seconds;
    in the long form the waiter's polls have become their slowest, at no fixed time before. The last
    process ends well, and all three scripts are applied once.
    """
    interruptible(url, folder, how, times)
    holder = start_migrate(url, folder, rig=rig)
    taken = []
    for token in range(1, times + 1):
        wait_until(lambda: is_inside(url))
        follower = start_migrate(url, folder, rig=rig)
        wait_for_waiting(follower)
        time.sleep(rounds(0, 1) + random.uniform(0, LAST_POLL))
        assert lock_row(url)[0] == token
        kill(holder)
        killed = time.monotonic()
        wait_until(lambda: lock_row(url)[0] > token, timeout=within, interval=0.01)  # noqa: B023
        taken.append(time.monotonic() - killed)
        holder = follower
    end = finish(holder)
    assert end.exit_code == 0, end
    assert applied(url) == [1, 2, 3]
    assert query(url, "SELECT id FROM work ORDER BY id") == [(1,), (2,)]
    assert lock_row(url)[1] is None
    return taken


@pytest.mark.alone
@pytest.mark.parametrize("how", ["idle", "in a statement"])
def test_a_waiter_succeeds_a_killed_holder(
    database_url: str, tmp_path: Path, figures: Figures, how: str
) -> None:
    """L2: within two seconds of `kill -9` it has the lock, and does the work whole."""
    taken = take_over(database_url, tmp_path / "scripts", how, rounds(1, 40))
    figures.record_times(f"takeover after SIGKILL, {how}", database_url, taken)
    assert max(taken) < TAKEOVER


def test_control_a_death_that_nobody_notices(
    postgres_url: str, other_postgres_url: str, sqlite_url: str, tmp_path: Path
) -> None:
    """Without the proof that the holder is dead, or the server's look for it, they wait on."""

    def wait_in_vain(url: str, how: str, mechanism: str) -> None:
        folder = tmp_path / parse_url(url).dialect / how
        with pytest.raises(AssertionError, match="not so within 2.0 s"):
            take_over(url, folder, how, 1, rig=Rig(without=[mechanism]), within=TAKEOVER)

    with ThreadPoolExecutor() as threads:
        controls = [
            threads.submit(wait_in_vain, sqlite_url, "idle", "proof of death"),
            threads.submit(wait_in_vain, postgres_url, "idle", "proof of death"),
            threads.submit(wait_in_vain, other_postgres_url, "in a statement", "client watch"),
        ]
    for control in controls:
        control.result()


@pytest.fixture
def other_postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """A second fresh database."""
    name = f"test_{uuid.uuid4().hex[:16]}"
    try:
        yield postgres_server.create_database(name)
    finally:
        postgres_server.drop_database(name)


# At each step

HOLD = """
import sys
import anyio, msr

async def main(url):
    async with msr.MigrationScriptExecutor.from_url(url).lock():
        await anyio.sleep_forever()

anyio.run(main, sys.argv[1])
"""

ALL_STEPS = [f"{when} {step}" for step in STEPS for when in ("before", "after")]


def kill_at_each(
    url: str,
    folder: Path,
    steps: Sequence[str],
    statement: str = "INSERT INTO work VALUES ({});",
    nth: int = 1,
) -> list[int]:
    """Give each process one more script to apply, and kill it at its step; the token after each.

    What it leaves is whole: a script's work is there exactly if, and as often as, it is applied.
    """
    query(url, "CREATE TABLE work (version INTEGER)")
    tokens = []
    for version, at in enumerate(steps, start=1):
        write_scripts(folder, {f"V{version}_x.sql": statement.format(version)})
        rig = Rig(at=at, nth=nth, send=signal.SIGKILL)
        if at.endswith("renew"):
            victim = start_python(HOLD, url, rig=rig)
        else:
            victim = start_migrate(url, folder, rig=rig)
        end = finish(victim)
        assert end.exit_code == -signal.SIGKILL, (at, end)
        assert work_of(url) == applied(url), at
        tokens.append(lock_row(url)[0])
    return tokens


def work_of(url: str) -> list[int]:
    """The versions whose work is there."""
    return [version for (version,) in query(url, "SELECT version FROM work ORDER BY version")]


def finish_the_work(url: str, folder: Path) -> None:
    """Take over from the last one killed, and apply what is left."""
    end = finish(start_migrate(url, folder))
    assert end.exit_code == 0, end
    assert applied(url) == work_of(url) == [*range(1, len(list(folder.iterdir())) + 1)]
    assert lock_row(url)[1] is None


def test_killed_at_each_step(database_url: str, tmp_path: Path) -> None:
    """Each takes over from the one before it, whose lease still stands, for ten minutes."""
    steps = [at for at in ALL_STEPS if LONG or at.startswith("after")]
    folder = tmp_path / "scripts"
    tokens = kill_at_each(database_url, folder, steps)
    assert tokens == sorted(tokens)
    same = [
        at for at, (one, other) in zip(steps, pairwise([0, *tokens]), strict=True) if one == other
    ]
    assert same == [at for at in steps if at == "before acquire"]
    finish_the_work(database_url, folder)


def test_killed_while_it_makes_the_tables(postgres_url: str, tmp_path: Path) -> None:
    """On an empty database the second transaction is the one that makes the lock's table.

    The first one is a look at the session, before it is known that nothing stands between.
    """
    *before, after = ["before begin", "after begin", "before commit", "after commit"]
    assert kill_at_each(postgres_url, tmp_path, before, nth=2) == [0, 0, 0]
    assert asyncio.run(table_names(postgres_url)) == {"work"}
    query(postgres_url, "DROP TABLE work")
    assert kill_at_each(postgres_url, tmp_path, [after], nth=2) == [0]
    assert asyncio.run(table_names(postgres_url)) == {"work", "migration_locks"}
    finish_the_work(postgres_url, tmp_path)


def test_control_killed_outside_a_transaction(database_url: str, tmp_path: Path) -> None:
    """Without the transaction around script and history, work is left that nobody recorded."""
    outside = "-- msr: no-transaction\nINSERT INTO work VALUES ({});"
    with pytest.raises(AssertionError, match="after body"):
        kill_at_each(database_url, tmp_path, ["after body"], outside)


# In a build

BUILDING = """
SELECT 1 FROM pg_stat_activity WHERE datname = current_database()
AND query LIKE 'CREATE INDEX CONCURRENTLY%' AND wait_event_type = 'Lock'
"""


async def kill_in_a_build(url: str, folder: Path, *, wait: float, rig: Rig | None = None) -> Result:
    """Kill a CREATE INDEX CONCURRENTLY that waits for a transaction, which outlasts it.

    How the next `migrate` ends, which waits so many seconds for the lock.
    """
    build = "-- msr: no-transaction\nCREATE INDEX CONCURRENTLY by_id ON many (id);"
    last = "CREATE TABLE last (id integer);"
    write_scripts(folder, {"V1_build.sql": build, "V2_last.sql": last})
    writer = await asyncpg.connect(parse_url(url).dsn)
    try:
        await writer.execute("CREATE TABLE many (id integer)")
        async with writer.transaction():
            await writer.execute("INSERT INTO many VALUES (1)")
            victim = start_migrate(url, folder, rig=rig)
            await wait_until_async(lambda: fetch(url, BUILDING))
            kill(victim)
            return finish(start_migrate(url, folder, rig=rig, wait=wait))
    finally:
        await writer.close()


async def test_killed_in_a_build(postgres_url: str, tmp_path: Path) -> None:
    """The next one takes over though the build still waits, and says how to go on."""
    folder = tmp_path / "scripts"
    stopped = await kill_in_a_build(postgres_url, folder, wait=PATIENCE)
    assert stopped.exit_code == 2, stopped
    assert "'msr repair 1 --retry'" in stopped.stderr

    options = ["--url", postgres_url, "--folder", str(folder)]
    assert run_msr("repair", "1", "--retry", *options).exit_code == 0
    assert run_msr("migrate", *options).exit_code == 0
    assert await asyncio.to_thread(applied, postgres_url) == [1, 2]
    valid = "SELECT indisvalid FROM pg_index WHERE indrelid = 'many'::regclass"
    assert await fetch(postgres_url, valid) == [(True,)]


async def test_control_killed_in_a_build(postgres_url: str, tmp_path: Path) -> None:
    """Without the server's look for its client, the build waits on, and with it the next one."""
    rig = Rig(without=["client watch"])
    end = await kill_in_a_build(postgres_url, tmp_path / "scripts", wait=TAKEOVER, rig=rig)
    assert end.exit_code == 8
