"""CREATE INDEX CONCURRENTLY: beside a crowd that waits for the lock, and killed in the middle.

Such a build waits for every statement that began before it, so a waiter that waits for the lock
inside a statement keeps the build waiting, which keeps the waiter waiting.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from tests.support.cli import Result, start_msr, wait_until, write_scripts
from tests.support.figures import Figures, rounds
from tests.support.holder import Gate
from tests.support.migrations import applied, finish, start_migrate
from tests.support.queries import query
from tests.support.rig import Rig

BUILDS = rounds(2, 200)
PROCESSES = 2
WAITERS = 20

pytestmark = pytest.mark.timeout(120 + BUILDS * 3)


# Beside a crowd

CROWD = """
import json, sys
import anyio, msr
from tests.support.listeners import tell_waiting
from tests.support.rig import Rig

async def follow(url, folder):
    result = await msr.migrate(url, folder=folder, listeners=[tell_waiting()])
    assert not result.executed, result

async def main(url, folder, count, without):
    # In the control an attempt does not end, and must not give up before we have looked.
    Rig(without=without, bounds={"msr.locking.ATTEMPT_BOUND": 600}).apply()
    async with anyio.create_task_group() as tasks:
        for _ in range(count):
            tasks.start_soon(follow, url, folder)

anyio.run(main, *json.loads(sys.argv[1]))
"""


@contextmanager
def crowd(url: str, folder: Path, without: Sequence[str]) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes with twenty who wait for the lock, each on a connection of its own."""
    url = f"{url}?application_name=waiter"
    arguments = json.dumps([url, str(folder), WAITERS // PROCESSES, list(without)])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CROWD, arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **Rig().environment},
            start_new_session=True,
        )
        for _ in range(PROCESSES)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def wait_for_crowd(processes: Sequence[subprocess.Popen[str]]) -> None:
    """Return when each of the crowd has said that it waits for the lock."""
    for process in processes:
        assert process.stdout is not None
        for _ in range(WAITERS // PROCESSES):
            assert process.stdout.readline() == "waiting\n"


def blocked(url: str) -> int:
    """How many of the crowd wait inside a statement, and cannot say so."""
    statement = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'waiter'"
    [[count]] = query(url, f"{statement} AND wait_event_type = 'Lock'")
    return int(count)


def indexes(url: str, *, valid: bool) -> list[str]:
    """The names of the indexes of our own scripts that are, or are not, `valid`."""
    rows = query(
        url,
        "SELECT indexrelid::regclass::text FROM pg_index JOIN pg_class AS t ON t.oid = indrelid"
        f" WHERE t.relname = 'many' AND indisvalid = {valid} ORDER BY 1",
    )
    return [name for (name,) in rows]


BLOCKED_BUILD = """
SELECT phase FROM pg_stat_progress_create_index AS build WHERE EXISTS (
    SELECT FROM pg_stat_activity AS waiter WHERE pid = ANY (pg_blocking_pids(build.pid))
    AND application_name = 'waiter' AND build.pid = ANY (pg_blocking_pids(waiter.pid)))
"""
"""A build that waits for one of the crowd, which waits for the build's own session."""


@pytest.mark.parametrize("without", [(), ("polling",)], ids=["", "control"])
def test_a_build_does_not_wait_for_those_who_wait_for_the_lock(
    postgres_url: str, tmp_path: Path, figures: Figures, without: Sequence[str]
) -> None:
    """L4: twenty wait all the time, and every index is built; nothing hangs and nothing deadlocks.

    The control waits in a blocking statement, and the server's own detector of deadlocks is
    switched off with it, as it is of no use where lock and work have a connection each.
    """
    name = postgres_url.rpartition("/")[2]
    if without:
        query(postgres_url, f"ALTER DATABASE \"{name}\" SET deadlock_timeout = '1h'")
    gate = Gate(tmp_path)
    build = "-- msr: no-transaction\nCREATE INDEX CONCURRENTLY i{} ON many (id);"
    folder = write_scripts(
        tmp_path / "scripts",
        {
            "V1_many.sql": "CREATE TABLE many AS SELECT id FROM generate_series(1, 1000) AS id;",
            "V2_gate.py": gate.script(),
            **{f"V{number}_build.sql": build.format(number) for number in range(3, BUILDS + 3)},
        },
    )
    builder = start_migrate(postgres_url, folder)
    gate.wait()
    with crowd(postgres_url, folder, without) as waiters:
        if without:
            wait_until(lambda: blocked(postgres_url) == WAITERS)
        else:
            wait_for_crowd(waiters)
        gate.open()
        if without:
            wait_until(lambda: query(postgres_url, BLOCKED_BUILD))
            time.sleep(2)
            assert query(postgres_url, BLOCKED_BUILD), "the build went on"
            assert indexes(postgres_url, valid=True) == []
        else:
            assert finish(builder, timeout=60 + BUILDS * 2).exit_code == 0
            assert [finish(waiter).stderr for waiter in waiters] == [""] * PROCESSES
            assert [waiter.returncode for waiter in waiters] == [0] * PROCESSES
            deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
            assert query(postgres_url, deadlocks) == [(0,)]
            what = f"CREATE INDEX CONCURRENTLY builds with {WAITERS} waiters, hangs"
            figures.record(what, postgres_url, f"{BUILDS}, 0 (control: hangs)")
    if without:  # it was the crowd: without them the build goes on
        assert finish(builder).exit_code == 0
    assert len(indexes(postgres_url, valid=True)) == BUILDS
    assert indexes(postgres_url, valid=False) == []


# Killed


@contextmanager
def writer(url: str, table: str) -> Iterator[None]:
    """A transaction that has written to the table, which every build there has to wait for."""
    with asyncio.Runner() as runner:
        connection = runner.run(asyncpg.connect(url))
        try:
            runner.run(connection.execute(f"BEGIN; LOCK TABLE {table} IN ROW EXCLUSIVE MODE"))
            yield
        finally:
            runner.run(connection.close())


def kill_a_build(url: str, folder: Path, table: str, rig: Rig | None = None) -> None:
    """End migrator and database session with SIGKILL and SIGTERM, in the middle of the build."""
    with writer(url, table):
        victim = start_migrate(url, folder, rig=rig)
        # The primary keys of our tables are built there too, for a moment.
        building = "FROM pg_stat_progress_create_index WHERE command = 'CREATE INDEX CONCURRENTLY'"
        building += " AND datname = current_database()"
        # From then on there is an index to leave behind.
        begun = f"SELECT pid {building} AND phase LIKE 'waiting for writers%'"
        wait_until(lambda: query(url, begun))
        os.killpg(victim.pid, signal.SIGKILL)
        query(url, f"SELECT pg_terminate_backend(pid) {building}")
        wait_until(lambda: not query(url, f"SELECT pid {building}"))


def fail_to_build(url: str, index: str) -> None:
    """What somebody else's failed build leaves: an invalid index."""
    with suppress(asyncpg.UniqueViolationError):
        query(url, f"CREATE UNIQUE INDEX CONCURRENTLY {index}")


def msr_on(url: str, folder: Path, *arguments: str, without: Sequence[str] = ()) -> Result:
    """Run `msr` with these arguments to its end."""
    options: list[Any] = ["--url", url, "--folder", folder]
    return finish(start_msr(*arguments, *options, rig=Rig(without=without) if without else None))


@pytest.mark.parametrize(
    ("build", "table", "index"),
    [
        ("IF NOT EXISTS once ON app.many (id)", "app.many", "app.once"),
        ("ON many (id)", "many", "many_id_idx"),
        ('ON ONLY "app"."many" (lower(note)) WHERE id > 1', "app.many", "app.many_lower_idx"),
    ],
    ids=["named", "nameless", "nameless in a schema"],
)
@pytest.mark.parametrize("without", [(), ("leftovers",)], ids=["", "control"])
def test_a_killed_build_is_repaired(
    postgres_url: str, tmp_path: Path, build: str, table: str, index: str, without: Sequence[str]
) -> None:
    """The invalid index is named, `repair --retry` drops it, the next run builds it valid.

    Invalid indexes of others stay: one from before, with a name as the server gives it, and one
    that somebody made by hand after the script was killed.
    """
    folder = write_scripts(
        tmp_path / "scripts",
        {
            "V1_many.sql": f"""
                CREATE SCHEMA app;
                CREATE TABLE {table} (id int, other int, note text);
                INSERT INTO {table} VALUES (1, 1, 'a'), (1, 1, 'a');
            """
        },
    )
    assert msr_on(postgres_url, folder, "migrate").exit_code == 0
    fail_to_build(postgres_url, f"ON {table} (other)")
    text = f"-- msr: no-transaction\nCREATE INDEX CONCURRENTLY {build};"
    write_scripts(folder, {"V2_build.sql": text})
    kill_a_build(postgres_url, folder, table)
    fail_to_build(postgres_url, f"by_hand ON {table} (id)")
    others = indexes(postgres_url, valid=False)
    others.remove(index)
    assert len(others) == 2

    stopped = msr_on(postgres_url, folder, "migrate", without=without)
    assert stopped.exit_code == 2
    assert "msr repair 2 --retry" in stopped.stderr
    qualified = index if "." in index else f"public.{index}"
    assert (f"it left the invalid index {qualified} behind" in stopped.stderr) is not bool(without)

    assert msr_on(postgres_url, folder, "repair", "2", "--retry", without=without).exit_code == 0
    assert msr_on(postgres_url, folder, "migrate").exit_code == 0
    assert applied(postgres_url) == [1, 2]
    if without:  # what it left was taken for the index, or stands beside a second one
        assert index in indexes(postgres_url, valid=False)
    else:
        assert indexes(postgres_url, valid=False) == others
        assert indexes(postgres_url, valid=True) == [index]


@pytest.mark.parametrize("without", [(), ("started row",)], ids=["", "control"])
def test_a_killed_build_is_not_taken_for_a_finished_one(
    postgres_url: str, tmp_path: Path, without: Sequence[str]
) -> None:
    """The next run stops, although the index is there. Built by hand, it is recorded as applied."""
    build = "CREATE INDEX CONCURRENTLY IF NOT EXISTS once ON many (id)"
    folder = write_scripts(
        tmp_path / "scripts",
        {
            "V1_first.sql": "CREATE TABLE first (id int);",
            "V2_build.sql": f"-- msr: no-transaction\n{build};",
        },
    )
    query(postgres_url, "CREATE TABLE many (id int)")
    kill_a_build(postgres_url, folder, "many", Rig(without=without))
    stopped = msr_on(postgres_url, folder, "migrate", without=without)
    if without:
        assert (stopped.exit_code, applied(postgres_url)) == (0, [1, 2])
        assert indexes(postgres_url, valid=False) == ["once"]
        return
    assert (stopped.exit_code, applied(postgres_url)) == (2, [1])
    assert "msr repair 2 --applied" in stopped.stderr

    query(postgres_url, "DROP INDEX CONCURRENTLY once", build)
    assert msr_on(postgres_url, folder, "repair", "2", "--applied").exit_code == 0
    assert msr_on(postgres_url, folder, "migrate", "--no-wait").exit_code == 0
    assert applied(postgres_url) == [1, 2]
    assert indexes(postgres_url, valid=True) == ["once"]
