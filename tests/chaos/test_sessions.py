"""Database sessions that end under a run: by an administrator's hand, or with their server.

Every run stands still at its step, frozen by its own signal, while its session ends.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import cast

import pytest

import msr
from tests.support.cli import wait_until, write_scripts
from tests.support.figures import rounds
from tests.support.holder import Gate
from tests.support.migrations import (
    applied,
    finish_in_one_line,
    is_sleeping,
    start_migrate,
    wait_for_waiting,
)
from tests.support.postgres import LocalPostgres
from tests.support.queries import query
from tests.support.rig import Rig, is_stopped

pytestmark = pytest.mark.timeout(180)

OFTEN = {"msr.locking.LONGEST_HEARTBEAT": 0.5}
"""A test has no time for a heartbeat each ten seconds."""

FIRST = {"V1_first.sql": "CREATE TABLE work (id INTEGER);"}
SCRIPTS = {
    **FIRST,
    "V2_second.sql": "INSERT INTO work VALUES (2);",
    "V3_third.sql": "INSERT INTO work VALUES (3);",
}

STEPS = {
    "before acquire": (7, []),
    "after acquire": (7, []),
    "before begin": (7, []),
    "before body": (3, []),  # the script's own statement finds out
    "in a statement": (3, []),
    "before record": (7, []),
    "before commit": (3, []),
    "after commit": (7, [2]),
    "before release": (0, [2, 3]),
    "after release": (0, [2, 3]),
}
"""Where the session ends: how the run ends, and what it had applied."""


def prepare(server: LocalPostgres, folder: Path) -> None:
    """The database `base`: it has the tables of msr, and the first script has been applied."""
    url = server.create_database("base")
    asyncio.run(msr.migrate(url, folder=write_scripts(folder, FIRST)))


def end_sessions(server: LocalPostgres) -> None:
    """Have an administrator end every session of a client, all at once.

    The youngest go first, so that no waiter gets the lock of a holder that is gone already.
    """
    clients = "backend_type = 'client backend' AND pid <> pg_backend_pid()"
    left = f"SELECT pid FROM pg_stat_activity WHERE {clients}"
    youngest = f"{left} ORDER BY backend_start DESC"
    server.fetch(f"SELECT pg_terminate_backend(pid) FROM ({youngest}) AS session")
    wait_until(lambda: not server.fetch(left))


def restart(server: LocalPostgres) -> None:
    """Crash the server and start it again."""
    server.stop("immediate")
    server.start()


FAULTS: dict[str, Callable[[LocalPostgres], None]] = {"ended": end_sessions, "crashed": restart}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_workers_session_that_ends_at_a_step(
    own_postgres: LocalPostgres, tmp_path: Path, fault: str
) -> None:
    """The run says so in one line, what was not committed is undone, the next run completes.

    One more run commits the work before its history row: that one leaves it half-done.
    """
    prepare(own_postgres, tmp_path / "first")
    folder = write_scripts(tmp_path / "scripts", SCRIPTS)
    slow = {**FIRST, "V2_slow.sql": "INSERT INTO work VALUES (1);\nSELECT pg_sleep(60);"}
    slow_folder = write_scripts(tmp_path / "slow", slow)
    rigs = {step: Rig(at=step) for step in STEPS if step != "in a statement"}
    rigs["control"] = Rig(at="before commit", without=["single transaction"])
    urls = {
        step: own_postgres.create_database(step, template="base") for step in (*STEPS, "control")
    }
    runs = {step: start_migrate(urls[step], folder, rig=rig) for step, rig in rigs.items()}
    for run in runs.values():
        wait_until(partial(is_stopped, run.pid))
    runs["in a statement"] = start_migrate(urls["in a statement"], slow_folder)
    wait_until(partial(is_sleeping, urls["in a statement"]))
    FAULTS[fault](own_postgres)
    for run in runs.values():
        run.send_signal(signal.SIGCONT)

    ends = {step: finish_in_one_line(run) for step, run in runs.items()}
    work = {step: query(url, "SELECT id FROM work ORDER BY id") for step, url in urls.items()}
    assert work.pop("control") == [(2,)]
    assert applied(urls["control"]) == [1]
    for step, (code, done) in STEPS.items():
        end = ends[step]
        assert end.exit_code == code, (step, end)
        assert [version for version in (2, 3) if f"Applied V{version}_" in end.stdout] == done, step
        assert work[step] == [(version,) for version in done], step
        assert applied(urls[step]) == [1, *done], step
        asyncio.run(msr.migrate(urls[step], folder=folder))
        assert query(urls[step], "SELECT id FROM work ORDER BY id") == [(2,), (3,)], step


# While the body works


@pytest.mark.may_block("the next run opens the gate with blocking calls")
@pytest.mark.parametrize(
    ("fault", "transaction", "without"),
    [("ended", True, []), ("crashed", False, []), ("crashed", True, ["watch"])],
)
def test_a_workers_session_that_ends_in_the_body(
    own_postgres: LocalPostgres, tmp_path: Path, fault: str, transaction: bool, without: list[str]
) -> None:
    """A body that asks nothing of the database is cancelled; who waits for it says why it ends.

    Without the watch the body works on, under a lock that anybody may have.
    """
    prepare(own_postgres, tmp_path / "first")
    url = own_postgres.url("base")
    gate, worked_on = Gate(tmp_path), tmp_path / "worked-on"
    body = gate.script(after=f"pathlib.Path({str(worked_on)!r}).touch()")
    second = f"transaction = {transaction}\n{body}"
    folder = write_scripts(tmp_path / "scripts", {**FIRST, "V2_second.py": second})
    run = start_migrate(url, folder, rig=Rig(without=without))
    gate.wait()
    waiter = start_migrate(url, folder)
    wait_for_waiting(waiter)
    FAULTS[fault](own_postgres)
    end = finish_in_one_line(waiter)
    assert (end.exit_code, end.stdout) == (7, "")
    if without:
        gate.open()
        wait_until(worked_on.exists)
        return

    end = finish_in_one_line(run)
    assert (end.exit_code, end.stdout) == (9, "")
    assert "the database session that held the migration lock was ended" in end.stderr
    gate.open()
    assert not worked_on.exists()
    if not transaction:
        with pytest.raises(msr.ValidationError, match="repair 2"):
            asyncio.run(msr.migrate(url, folder=folder))
        executor = msr.MigrationScriptExecutor.from_url(url, folder=folder)
        asyncio.run(executor.repair(2, applied=False))
    asyncio.run(msr.migrate(url, folder=folder))
    assert applied(url) == [1, 2]


HEARTBEATS = """
SELECT pid FROM pg_stat_activity, migration_locks
WHERE datname = current_database() AND backend_type = 'client backend'
  AND pid <> session AND application_name <> 'the test'
"""
"""A session of the test's own may be seen for a moment after its end."""


def renewed_at(url: str) -> datetime:
    """When the lock was renewed last."""
    [(when,)] = query(url, "SELECT renewed_at FROM migration_locks")
    return cast("datetime", when)


def is_renewed_since(url: str, before: datetime) -> bool:
    return renewed_at(url) > before


@pytest.mark.parametrize(
    ("step", "without"),
    [
        ("before renew", []),
        ("after renew", []),
        # Nor must the worker renew in its place, which a slow one does before its script.
        ("after renew", ["second try", "renewal between scripts"]),
    ],
)
def test_a_heartbeats_session_that_ends(
    postgres_url: str, tmp_path: Path, step: str, without: list[str]
) -> None:
    """The heartbeat connects again, and the run goes on; without that it loses its lock."""
    gate = Gate(tmp_path)
    folder = write_scripts(tmp_path / "scripts", {"V1_first.py": gate.script()})
    rig = Rig(without=without, at=step, bounds=OFTEN)
    # Only the control waits for the end of its lease.
    run = start_migrate(postgres_url, folder, rig=rig, timeout=5 if without else 600)
    wait_until(lambda: is_stopped(run.pid))
    url = f"{postgres_url}?application_name=the%20test"
    assert query(url, f"SELECT pg_terminate_backend(pid, 10000) FROM ({HEARTBEATS}) AS h")
    run.send_signal(signal.SIGCONT)
    if without:
        assert finish_in_one_line(run).exit_code == 9
        return
    for _ in range(rounds(1, 20)):
        [[heartbeat]] = wait_until(lambda: query(url, HEARTBEATS))
        before = renewed_at(url)
        wait_until(partial(is_renewed_since, url, before))
        query(url, f"SELECT pg_terminate_backend({heartbeat}, 10000)")
    gate.open()
    end = finish_in_one_line(run)
    assert end.exit_code == 0, end.stderr
    assert applied(url) == [1]
