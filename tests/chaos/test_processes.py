"""What happens to real processes that start together, die, freeze and wait.

`MSR_TEST_ROUNDS` says how many times the crowd of twenty is started; one by default.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import asyncpg
import pytest

import msr
from msr.urls import parse_url
from tests.support.cli import start_msr, wait_until, write_scripts
from tests.support.holder import LOST, hold_lock
from tests.support.queries import exists, query

ROUNDS = int(os.environ.get("MSR_TEST_ROUNDS", "1"))  # read before the environment is cleaned
CROWD = 20
TAKEOVER = 2.0
"""Seconds in which a dead holder's lock must have been taken over (L2)."""

pytestmark = pytest.mark.timeout(180)


def is_sqlite(url: str) -> bool:
    return parse_url(url).dialect == "sqlite"


def start_migrate(url: str, folder: Path, **variables: str) -> subprocess.Popen[str]:
    """`msr migrate`, with settings of the lock as `MSR_LOCKING_*`."""
    env = {f"MSR_LOCKING_{name.upper()}": value for name, value in variables.items()}
    return start_msr("migrate", "--url", url, "--folder", folder, env=env)


def finish(process: subprocess.Popen[str], timeout: float = 60) -> tuple[int, str, str]:
    """Wait for the end: exit code, stdout, stderr."""
    stdout, stderr = process.communicate(timeout=timeout)
    return process.returncode, stdout, stderr


def wait_for_waiting(process: subprocess.Popen[str]) -> None:
    """Return when it says that it waits for the lock, which is all that it has said."""
    assert process.stderr is not None
    line = process.stderr.readline()
    assert line.startswith("Waiting for the migration lock"), line


def rows_of(url: str, statement: str) -> list[tuple[Any, ...]]:
    """The rows of a query; none where there is no table, or no database, yet."""
    try:
        return query(url, statement) if exists(url) else []
    except (sqlite3.OperationalError, asyncpg.UndefinedTableError):
        return []


def lock_row(url: str) -> tuple[int, str | None, str | None]:
    """Token, holder and note of the lock; zero where there is none yet."""
    for token, locked_by, running in rows_of(
        url, "SELECT token, locked_by, running FROM migration_locks"
    ):
        return token, locked_by, running
    return 0, None, None


def applied(url: str) -> list[int]:
    """The versions that the history has as applied, in order."""
    rows = rows_of(url, "SELECT version FROM schema_version WHERE status = 'applied'")
    return sorted(version for (version,) in rows)


# Together


@pytest.mark.parametrize("again", range(ROUNDS))
def test_twenty_at_once_on_an_empty_database(database_url: str, tmp_path: Path, again: int) -> None:
    """Every script is applied exactly once, and all twenty processes end well."""
    scripts = {
        f"V{number}_x.sql": (
            f"CREATE TABLE t{number} (id INTEGER);\nINSERT INTO log VALUES ({number});"
        )
        for number in range(2, CROWD + 1)
    }
    folder = write_scripts(
        tmp_path / "scripts", {"V1_log.sql": "CREATE TABLE log (id INTEGER);", **scripts}
    )
    processes = [start_migrate(database_url, folder) for _ in range(CROWD)]
    ends = [finish(process, timeout=120) for process in processes]
    assert [(code, stderr) for code, _, stderr in ends if code] == []
    assert applied(database_url) == list(range(1, CROWD + 1))
    log = query(database_url, "SELECT id FROM log ORDER BY id")
    assert log == [(number,) for number in range(2, CROWD + 1)]
    output = "\n".join(stdout for _, stdout, _ in ends)
    for name in ("V1_log.sql", *scripts):
        assert output.count(f"Applied {name} ") == 1
    assert lock_row(database_url)[1] is None


# Killed


def interruptible(url: str, folder: Path, how: str) -> Path:
    """Three scripts; the second takes a minute under the first token that the lock ever had."""
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
                if {token} == 1:
                    await asyncio.sleep(60)
                await db.execute("INSERT INTO work VALUES (2)")
            """,
        )
    else:
        slow = "SELECT pg_sleep(CASE token WHEN 1 THEN 60 ELSE 0 END) FROM migration_locks;"
        if is_sqlite(url):
            slow = """
            WITH RECURSIVE n(i) AS (
                SELECT 1 UNION ALL
                SELECT i + 1 FROM n, migration_locks WHERE token = 1 AND i < 1000000000000
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


@pytest.mark.parametrize("how", ["idle", "in a statement"])
@pytest.mark.parametrize("successor", ["starts later", "waits already"])
def test_a_killed_holder_is_succeeded(
    database_url: str, tmp_path: Path, how: str, successor: str
) -> None:
    """L2: within two seconds of `kill -9` the next `migrate` has the lock, and does it whole."""
    folder = interruptible(database_url, tmp_path / "scripts", how)
    victim = start_migrate(database_url, folder)
    wait_until(lambda: is_inside(database_url), timeout=20)
    token = lock_row(database_url)[0]
    assert token == 1
    if successor == "waits already":
        follower = start_migrate(database_url, folder)
        wait_for_waiting(follower)
        time.sleep(1)  # its polls are at their slowest
    os.killpg(victim.pid, signal.SIGKILL)
    killed = time.monotonic()
    if successor == "starts later":
        follower = start_migrate(database_url, folder)
    wait_until(lambda: lock_row(database_url)[0] > token, timeout=20, interval=0.01)
    taken = time.monotonic() - killed
    code, _, stderr = finish(follower)
    assert code == 0, stderr
    assert applied(database_url) == [1, 2, 3]
    assert query(database_url, "SELECT id FROM work ORDER BY id") == [(1,), (2,)]
    assert lock_row(database_url)[1] is None
    assert taken < TAKEOVER
    assert victim.wait() == -signal.SIGKILL


# Slow


def test_the_heartbeat_outlives_the_lease(database_url: str, tmp_path: Path) -> None:
    """Scripts longer than the lease keep the lock, in a transaction and outside.

    A second `migrate` waits all the time and never starts a script.
    """
    slow = """
        import asyncio, os

        transaction = {transaction}

        async def up(db):
            with open({started!r}, "a") as file:
                print(os.getpid(), file=file)
            await db.execute("CREATE TABLE slow_{transaction} (id INTEGER)")
            await asyncio.sleep(2.8)
    """
    started = tmp_path / "started"
    folder = write_scripts(
        tmp_path / "scripts",
        {
            f"V{number}_slow.py": slow.format(transaction=transaction, started=str(started))
            for number, transaction in enumerate([True, False], start=1)
        },
    )
    first = start_migrate(database_url, folder, timeout="2")
    wait_until(started.exists, timeout=20)
    second = start_migrate(database_url, folder, timeout="2")
    wait_for_waiting(second)
    code, stdout, stderr = finish(first)
    assert code == 0, stderr
    assert stdout.count("Applied ") == 2
    code, stdout, stderr = finish(second)
    assert code == 0, stderr
    assert "Applied " not in stdout
    assert started.read_text().split() == [str(first.pid)] * 2
    [one, two] = query(database_url, "SELECT token FROM schema_version")
    assert one == two == (lock_row(database_url)[0],)


# Frozen


def test_a_frozen_migration_is_superseded(postgres_url: str, tmp_path: Path) -> None:
    """L3: within lease + 2 s another does its work; awake again, it fails and commits nothing."""
    folder = write_scripts(
        tmp_path / "scripts",
        {
            "V1_table.sql": "CREATE TABLE work (pid INTEGER);",
            "V2_frozen.py": f"""
                import asyncio, os, pathlib

                async def up(db):
                    await db.execute("INSERT INTO work VALUES ($1)", os.getpid())
                    gate = pathlib.Path({str(tmp_path / "gate")!r})
                    while not gate.exists():
                        pathlib.Path({str(tmp_path / "reached")!r}).touch()
                        await asyncio.sleep(0.05)
            """,
        },
    )
    frozen = start_migrate(postgres_url, folder, timeout="2")
    wait_until((tmp_path / "reached").exists, timeout=20)
    token = lock_row(postgres_url)[0]
    successor = start_migrate(postgres_url, folder, timeout="2")
    wait_for_waiting(successor)
    os.killpg(frozen.pid, signal.SIGSTOP)
    stopped = time.monotonic()
    (tmp_path / "gate").touch()
    # Freeing the row takes a token as well, so the successor's note is what counts.
    wait_until(lambda: applied(postgres_url) == [1, 2], timeout=20, interval=0.01)
    assert time.monotonic() - stopped < 2 + TAKEOVER
    assert finish(successor)[0] == 0
    [history] = query(postgres_url, "SELECT token FROM schema_version WHERE version = 2")
    assert history[0] > token

    os.killpg(frozen.pid, signal.SIGCONT)
    code, stdout, stderr = finish(frozen)
    assert code in (3, 9), (stdout, stderr)
    assert "V2_frozen" not in stdout
    assert stderr.count("\n") == 1
    assert query(postgres_url, "SELECT pid FROM work") == [(successor.pid,)]
    assert applied(postgres_url) == [1, 2]


def test_a_frozen_holder_is_superseded(database_url: str, tmp_path: Path) -> None:
    """L3: outside a transaction too, on both databases; awake again, it learns of its loss."""
    folder = write_scripts(tmp_path / "scripts", {"V1_t.sql": "CREATE TABLE t (id INTEGER);"})
    with hold_lock(database_url, timeout=2) as holder:
        holder.freeze()
        frozen = time.monotonic()
        successor = start_migrate(database_url, folder)
        wait_until(lambda: applied(database_url) == [1], timeout=20, interval=0.01)
        assert time.monotonic() - frozen < 2 + TAKEOVER
        assert finish(successor)[0] == 0
        holder.process.send_signal(signal.SIGCONT)
        assert holder.process.wait(20) == LOST


# Waiting

WAITER = """
import asyncio, json, sys, time
import anyio, msr

async def main(url):
    told = None
    def listen(event):
        nonlocal told
        if isinstance(event, msr.WaitingForLock) and not told:
            told = True
            print("waiting", flush=True)
    executor = msr.MigrationScriptExecutor.from_url(url, listeners=[listen])
    for _ in sys.stdin:
        told = False
        async with executor.lock():
            print(time.monotonic(), flush=True)
        print("done", flush=True)

anyio.run(main, sys.argv[1])
"""


@pytest.fixture
def waiter(database_url: str) -> Iterator[subprocess.Popen[str]]:
    """A process that asks for the lock at each line it is sent, and says when it has it."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAITER, database_url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


async def test_a_release_wakes_the_waiter(database_url: str, waiter: subprocess.Popen[str]) -> None:
    """L1: from the release to the waiter's hold it takes less than 100 ms (p95, both sides)."""
    assert waiter.stdin is not None
    assert waiter.stdout is not None
    executor = msr.MigrationScriptExecutor.from_url(database_url)
    delays = []
    for _ in range(20):
        async with executor.lock():
            print("go", file=waiter.stdin, flush=True)
            assert waiter.stdout.readline() == "waiting\n"
            time.sleep(0.1)  # its polls have slowed down by now
            released = time.monotonic()
        # The clock of `time.monotonic` is the machine's: both processes read the same one.
        delays.append(float(waiter.stdout.readline()) - released)
        assert waiter.stdout.readline() == "done\n"
    assert min(delays) > 0
    assert sorted(delays)[18] < 0.1, json.dumps(delays)
