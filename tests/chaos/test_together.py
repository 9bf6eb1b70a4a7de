"""Many processes that want the lock at the same time."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from tests.support.cli import start_python, wait_until, write_scripts
from tests.support.figures import LONG, Figures, rounds
from tests.support.migrations import applied, finish, lock_row, start_migrate
from tests.support.queries import query
from tests.support.rig import UNAWARE, Rig, is_stopped

CROWD = 20
CONTENDERS = 8
NO_LOCK = Rig(without=["lock"])
AT_ONCE = Rig(without=["lock", *UNAWARE], at="before script")
"""Each stands before its first script until all do, without hearing meanwhile of what it lost."""

pytestmark = pytest.mark.timeout(1200 if LONG else 180)


# A crowd on an empty database

FIRST = """
import asyncio

transaction = False

async def up(db):
    await db.execute("CREATE TABLE log (id INTEGER)")
    await asyncio.sleep(0.5)
"""


def write(folder: Path, names: Sequence[str]) -> Path:
    """A first script that does not hide it when two run it, and others that need it."""
    scripts = {
        name: f"CREATE TABLE t{number} (id INTEGER);\nINSERT INTO log VALUES ({number});"
        for number, name in enumerate(names[1:], start=2)
    }
    return write_scripts(folder, {names[0]: FIRST, **scripts})


@pytest.mark.parametrize("again", range(rounds(1, 20)))
def test_twenty_at_once_on_an_empty_database(database_url: str, tmp_path: Path, again: int) -> None:
    """Every script is applied exactly once, and all twenty processes end well."""
    names = ["V1_log.py", *(f"V{number}_x.sql" for number in range(2, CROWD + 1))]
    folder = write(tmp_path / "scripts", names)
    crowd = [start_migrate(database_url, folder) for _ in range(CROWD)]
    ends = [finish(process) for process in crowd]
    assert [end for end in ends if end.exit_code] == []
    assert applied(database_url) == list(range(1, CROWD + 1))
    log = query(database_url, "SELECT id FROM log ORDER BY id")
    assert log == [(number,) for number in range(2, CROWD + 1)]
    output = "\n".join(end.stdout for end in ends)
    assert [name for name in names if output.count(f"Applied {name} ") != 1] == []
    assert lock_row(database_url)[1] is None


def test_control_a_crowd_without_the_lock(database_url: str, tmp_path: Path) -> None:
    """Without the lock they find each other's half-done work, and fail."""
    folder = write(tmp_path / "scripts", ["V1_log.py", "V2_x.sql"])
    crowd = [start_migrate(database_url, folder, rig=AT_ONCE) for _ in range(6)]
    wait_until(lambda: all(is_stopped(process.pid) for process in crowd))
    for process in crowd:
        process.send_signal(signal.SIGCONT)
    ends = [finish(process) for process in crowd]
    assert any(end.exit_code for end in ends)


# Contention

CONTENDER = """
import json, os, sqlite3, sys

import anyio, asyncpg

import msr
from msr.urls import parse_url

async def connect(url):
    address = parse_url(url)
    if address.dialect == "sqlite":
        db = sqlite3.connect(address.path, timeout=60, isolation_level=None)
        db.execute("PRAGMA synchronous = OFF")
        async def execute(statement):
            db.execute(statement)
        return execute, sqlite3.IntegrityError
    return (await asyncpg.connect(address.dsn)).execute, asyncpg.UniqueViolationError

async def main(url, times):
    execute, occupied = await connect(url)
    executor = msr.MigrationScriptExecutor.from_url(url)
    lost = 0
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(int(times)):
        try:
            async with executor.lock(wait=600) as lease:
                key = f"{lease.token}, {os.getpid()}"
                try:
                    await execute(f"INSERT INTO inside VALUES ({key}, 1, 0)")
                except occupied:
                    await execute(f"INSERT INTO inside VALUES ({key}, NULL, 1)")
                await anyio.sleep(0.001)
                await execute(f"UPDATE inside SET place = NULL WHERE token = {lease.token}")
        except msr.LockLostError:
            lost += 1
        await anyio.sleep(0.01)  # or it would have the lock again before the others look
    print(json.dumps(lost))

anyio.run(main, *sys.argv[1:])
"""


@dataclass(frozen=True)
class Contention:
    """How often the lock was taken; out of other hands; by two at once; and how often lost."""

    taken: int
    handed_over: int
    doubled: int
    lost: int


def contend(url: str, times: int, rig: Rig | None = None) -> Contention:
    """Take the lock `times` times, in processes that want it all the time.

    The database finds the double holds: there is one place inside, and it is unique. A holder
    takes it in a transaction of its own, and gives it up in another one before it leaves.
    """
    query(
        url,
        "DROP TABLE IF EXISTS inside",
        "CREATE TABLE inside (token BIGINT PRIMARY KEY, process INTEGER NOT NULL,"
        " place INTEGER UNIQUE, doubled INTEGER NOT NULL)",
    )
    contenders = [
        start_python(CONTENDER, url, times // CONTENDERS, rig=rig) for _ in range(CONTENDERS)
    ]
    for contender in contenders:
        assert contender.stdout is not None
        assert contender.stdout.readline() == "ready\n"
    lost = sum(json.loads(stdout) for stdout in end_together(contenders))
    rows = query(url, "SELECT process, doubled FROM inside ORDER BY token")
    handed_over = sum(one[0] != other[0] for one, other in pairwise(rows))
    return Contention(len(rows), handed_over, sum(doubled for _, doubled in rows), lost)


def end_together(contenders: Sequence[subprocess.Popen[str]]) -> list[str]:
    """Let them all begin; what they printed until they ended, which they did well."""
    for contender in contenders:
        assert contender.stdin is not None
        print(file=contender.stdin, flush=True)
    ends = [finish(contender, timeout=1000) for contender in contenders]
    assert [end for end in ends if end.exit_code] == []
    return [end.stdout for end in ends]


def test_no_two_hold_the_lock(database_url: str, figures: Figures) -> None:
    """S5: eight processes take it from each other; without the lock two are inside at once."""
    times = rounds(160, 10_240)
    found = contend(database_url, times)
    assert (found.taken, found.doubled, found.lost) == (times, 0, 0)
    assert found.handed_over > times / 4

    control = contend(database_url, rounds(80, 400), NO_LOCK)
    assert control.doubled > 0
    figures.record(
        "contended acquisitions, double holds",
        database_url,
        f"{found.taken:,}, {found.doubled} (control: {control.doubled} of {control.taken})",
    )
