"""Processes that wait for the lock: woken at once, in nobody's way, and often not needing it."""

from __future__ import annotations

import signal
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from subprocess import Popen

import asyncpg
import pytest

import msr
from tests.support.cli import PATIENCE, start_python, wait_until, write_scripts
from tests.support.figures import LONG, Figures, percentile, rounds
from tests.support.holder import Gate, hold_lock
from tests.support.migrations import (
    finish,
    is_sqlite,
    lock_row,
    start_migrate,
    wait_for_waiting,
)
from tests.support.queries import query
from tests.support.rig import Rig, is_stopped

WAKE_UP = 0.1
"""Seconds after a release in which a waiter must hold the lock, in 95 of 100 cases (L1)."""
WAITERS = 3

pytestmark = pytest.mark.timeout(300 if LONG else 120)


# Woken

WAITER = """
import sys, time
import anyio, msr
from tests.support.listeners import tell_waiting

async def main(url):
    for _ in sys.stdin:
        executor = msr.MigrationScriptExecutor.from_url(url, listeners=[tell_waiting()])
        async with executor.lock():
            print(time.monotonic(), flush=True)
        print("done", flush=True)

anyio.run(main, sys.argv[1])
"""


async def wake_up(url: str, times: int, rig: Rig | None = None) -> list[float]:
    """Release the lock so often; the seconds until a process that waited for it has it."""
    waiter = start_python(WAITER, url, rig=rig)
    assert waiter.stdin is not None
    assert waiter.stdout is not None
    executor = msr.MigrationScriptExecutor.from_url(url)
    delays = []
    for _ in range(times):
        async with executor.lock():
            print("go", file=waiter.stdin, flush=True)
            assert waiter.stdout.readline() == "waiting\n"
            time.sleep(0.1)  # its polls have slowed down by now
            released = time.monotonic()
        # The clock of `time.monotonic` is the machine's: both processes read the same one.
        delays.append(float(waiter.stdout.readline()) - released)
        assert waiter.stdout.readline() == "done\n"
    return delays


@pytest.mark.alone
async def test_a_release_wakes_the_waiter(database_url: str, figures: Figures) -> None:
    """L1: from the release to the waiter's hold it takes less than 100 ms (p95, both sides)."""
    delays = await wake_up(database_url, rounds(20, 200))
    figures.record_times("wake-up of a waiter after a release", database_url, delays)
    assert min(delays) > 0
    assert percentile(delays, 95) < WAKE_UP, delays


async def test_control_a_waiter_that_nothing_wakes(database_url: str) -> None:
    """Between its slowest polls it finds the lock free too late.

    Not every time: where the release comes late, the next poll may be due.
    """
    delays = await wake_up(database_url, 6, Rig(without=["wake-up"]))
    assert max(delays) > WAKE_UP, delays


# Not needing it


def returned(url: str, folder: Path, patience: float, rig: Rig | None = None) -> int:
    """How many of those who wait return within so many seconds when the work is done.

    Meanwhile the lock cannot be had: who did the work stands still before it releases it.
    """
    gate = Gate(folder.parent)
    write_scripts(folder, {"V1_gate.py": gate.script()})
    leader = start_migrate(url, folder, rig=Rig(at="before release"))
    gate.wait()
    followers = [start_migrate(url, folder, rig=rig) for _ in range(WAITERS)]
    for follower in followers:
        wait_for_waiting(follower)
    gate.open()
    wait_until(lambda: is_stopped(leader.pid))
    with suppress(AssertionError):
        wait_until(lambda: None not in [it.poll() for it in followers], timeout=patience)
    count = WAITERS - [follower.returncode for follower in followers].count(None)
    assert lock_row(url)[0] == 1

    leader.send_signal(signal.SIGCONT)
    ends = [finish(process) for process in (leader, *followers)]
    assert [end for end in ends if end.exit_code] == []
    assert [end.stdout.count("Applied V1") for end in ends] == [1, *[0] * WAITERS]
    return count


def test_who_finds_the_schema_at_head_takes_no_lock(database_url: str, tmp_path: Path) -> None:
    """L1: the followers return when the work is done, whoever has the lock then."""
    assert returned(database_url, tmp_path / "scripts", PATIENCE) == WAITERS
    assert lock_row(database_url)[0] == 1


def test_control_followers_that_do_not_look(database_url: str, tmp_path: Path) -> None:
    """Without a look at the history each of them takes the lock, to find nothing to do."""
    rig = Rig(without=["look at the history"])
    assert returned(database_url, tmp_path / "scripts", 1, rig) == 0
    assert lock_row(database_url)[0] == 1 + WAITERS


# In nobody's way

IN_THE_WAY = """
SELECT pid, state, query FROM pg_stat_activity
WHERE datname = current_database() AND application_name = 'waiter'
  AND (state LIKE 'idle in transaction%' OR wait_event_type = 'Lock')
"""


@contextmanager
def waiting(url: str, folder: Path, rig: Rig | None = None) -> Iterator[list[Popen[str]]]:
    """Several `migrate` that wait for the lock in the body; the holder is killed after it."""
    write_scripts(folder, {"V1_mine.sql": "CREATE TABLE mine (id INTEGER);"})
    with hold_lock(url):
        if not is_sqlite(url):  # the holder's heartbeat begins with a transaction
            url += "?application_name=waiter"
        yield [start_migrate(url, folder, rig=rig) for _ in range(WAITERS)]


def hindered(url: str, patience: float) -> set[str]:
    """What cannot be done to a table of somebody else's within so many seconds, and has to."""
    if is_sqlite(url):
        try:
            query(url, f"PRAGMA busy_timeout = {patience * 1000:.0f}", "VACUUM")
        except sqlite3.OperationalError:
            return {"vacuum"}
        return set()

    found = set()
    query(url, "CREATE TABLE many AS SELECT generate_series(1, 1000) AS id", "DELETE FROM many")
    empty = partial(query, url, "VACUUM many", "SELECT 1 WHERE pg_relation_size('many') = 0")
    try:
        wait_until(empty, timeout=patience)
    except AssertionError:
        found.add("vacuum")
    try:
        limit = f"SET statement_timeout = {patience * 1000:.0f}"
        query(url, limit, "CREATE INDEX CONCURRENTLY ON many (id)")
    except asyncpg.QueryCanceledError:
        found.add("build")
    return found


def test_waiting_hinders_nobody(database_url: str, tmp_path: Path) -> None:
    """L4: no waiter is in a transaction or in a queue, so old rows go and indexes are built."""
    with waiting(database_url, tmp_path / "scripts") as waiters:
        for waiter in waiters:
            wait_for_waiting(waiter)
        if not is_sqlite(database_url):
            assert [query(database_url, IN_THE_WAY) for _ in range(20)] == [[]] * 20
        assert hindered(database_url, PATIENCE) == set()
    assert [end for end in map(finish, waiters) if end.exit_code] == []


def test_control_waiters_that_do_not_poll(database_url: str, tmp_path: Path) -> None:
    """Waiters inside a statement, or in a transaction between two, keep everybody from both."""
    rig = Rig(without=["polling"], bounds={"msr.locking.ATTEMPT_BOUND": 600.0})
    with waiting(database_url, tmp_path / "scripts", rig) as waiters:
        if is_sqlite(database_url):
            for waiter in waiters:
                wait_for_waiting(waiter)
            expected = {"vacuum"}
        else:
            wait_until(lambda: len(query(database_url, IN_THE_WAY)) == WAITERS)
            expected = {"vacuum", "build"}
        assert hindered(database_url, patience=1) == expected
