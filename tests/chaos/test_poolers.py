"""Behind a real PgBouncer, in transaction pooling and in session pooling.

There a session lock proves nothing, and whatever is set on a session meets somebody else. msr has
to notice the pooler by itself and to keep to the lease and the fence. The control of most of these
tests is an msr that takes every connection for a direct one.
"""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, suppress
from functools import partial
from pathlib import Path

import anyio
import asyncpg
import pytest

import msr
from msr.handlers import postgres_lock
from tests.support.cli import PATIENCE, Result, run_msr, wait_until, write_scripts
from tests.support.figures import rounds
from tests.support.mechanisms import switch_off
from tests.support.migrations import (
    applied,
    finish,
    finish_in_one_line,
    lock_row,
    start_migrate,
    wait_for_waiting,
)
from tests.support.pgbouncer import PgBouncer
from tests.support.postgres import PostgresServer
from tests.support.queries import fetch, query
from tests.support.rig import UNAWARE, Rig, is_stopped

DETECTION = "pooler detection"
DIRECT = (DETECTION, "heartbeat")
"""Without these a pooler is not noticed. A heartbeat would disturb the statements of the worker, on
one session of the pool, in a control that takes longer than a second."""

SCRIPTS = {
    "V1_log.sql": "CREATE TABLE log (id INTEGER);",
    "V2_row.sql": "INSERT INTO log VALUES (2);",
    "V3_row.sql": "INSERT INTO log VALUES (3);",
}


@pytest.fixture(scope="module", params=["transaction", "session"])
def pooler(request: pytest.FixtureRequest, postgres_server: PostgresServer) -> Iterator[PgBouncer]:
    """A PgBouncer in each mode."""
    with PgBouncer(postgres_server.url(), request.param) as started:
        yield started


@pytest.fixture
def direct(postgres_url: str) -> str:
    """The URL of a fresh database, past the pooler."""
    return postgres_url


@pytest.fixture
def pooled(direct: str, pooler: PgBouncer) -> str:
    """The URL of the same database, by way of the pooler."""
    return pooler.url(direct)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three scripts, of which the last two leave a row each."""
    return write_scripts(tmp_path / "scripts", SCRIPTS)


def assert_applied_once(url: str) -> None:
    """Every script is applied, none twice, and the lock is free."""
    assert applied(url) == [1, 2, 3]
    assert query(url, "SELECT id FROM log ORDER BY id") == [(2,), (3,)]
    assert lock_row(url)[1] is None


def advisory_locks(direct: str) -> int:
    """How many session locks there are in the database, on whatever session."""
    [[number]] = query(
        direct,
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database ="
        " (SELECT oid FROM pg_database WHERE datname = current_database())",
    )
    return int(number)


def migrate(url: str, folder: Path, **locking: object) -> msr.MigrationResult:
    """What an application does when it starts."""
    return asyncio.run(msr.migrate(url, folder=folder, locking=locking))


# Noticed


@pytest.mark.parametrize("without", [(), (DETECTION,)])
async def test_a_pooler_is_noticed(
    direct: str, pooled: str, monkeypatch: pytest.MonkeyPatch, without: tuple[str, ...]
) -> None:
    """By the server's pid, with and without a history to read."""
    for mechanism in without:
        switch_off(mechanism, monkeypatch.setattr)
    for url, expected in ((pooled, not without), (direct, False)):
        for _ in ("no history", "a history"):
            async with msr.PostgresHandler(url).connect(msr.Config()) as session:
                await session.read_history()
                await session.create_history()
                assert session.pooled is expected


# Together


@pytest.mark.timeout(180)
def test_migrators_at_once(direct: str, pooled: str, folder: Path) -> None:
    """One of five comes to the scripts, the others wait; each script is applied exactly once."""
    for _ in range(rounds(1, 20)):
        crowd = start_crowd(pooled, folder, Rig(at="before body"))
        [holder] = wait_until(partial(stopped, crowd))
        for process in crowd:
            if process is not holder:
                wait_for_waiting(process)
        holder.send_signal(signal.SIGCONT)
        ends = [finish(process) for process in crowd]
        assert [end for end in ends if end.exit_code] == []
        assert_applied_once(direct)
        query(direct, "DROP TABLE log, schema_version, migration_locks")


def test_migrators_at_once_without_the_lock(direct: str, pooled: str, folder: Path) -> None:
    """The control: all five come to the first script at the same time."""
    crowd = start_crowd(pooled, folder, Rig(without=("lock", *UNAWARE), at="before body"))
    wait_until(lambda: stopped(crowd) == crowd)


def start_crowd(url: str, folder: Path, rig: Rig) -> list[subprocess.Popen[str]]:
    """Five at once."""
    return [start_migrate(url, folder, rig=rig) for _ in range(5)]


def stopped(crowd: Sequence[subprocess.Popen[str]]) -> list[subprocess.Popen[str]]:
    """Those that have come to the step at which they freeze."""
    return [process for process in crowd if is_stopped(process.pid)]


@pytest.mark.parametrize("without", [(), ("empty statement cache",)])
def test_prepared_statements_are_not_kept(
    direct: str, pooled: str, tmp_path: Path, without: tuple[str, ...]
) -> None:
    """A second client meets the server session of the first; its statements have the same names."""
    ends = []
    for number in (1, 3):
        folder = write_scripts(tmp_path / "scripts", dict(list(SCRIPTS.items())[:number]))
        ends.append(finish(start_migrate(pooled, folder, rig=Rig(without=without))))
    if without:
        assert 'prepared statement "__asyncpg' in "".join(end.stderr for end in ends)
    else:
        assert [end.exit_code for end in ends] == [0, 0]
        assert_applied_once(direct)


# Refused

OUTSIDE = {
    "V1_log.sql": SCRIPTS["V1_log.sql"],
    "V2_index.sql": "-- msr: no-transaction\nCREATE INDEX CONCURRENTLY log_id ON log (id);",
}


@pytest.mark.parametrize("without", [(), DIRECT])
def test_a_script_outside_a_transaction_is_refused(
    direct: str, pooled: str, tmp_path: Path, without: tuple[str, ...]
) -> None:
    """Before anything runs, with the way out; nothing keeps it from its session being changed."""
    folder = write_scripts(tmp_path / "scripts", OUTSIDE)
    end = finish(start_migrate(pooled, folder, rig=Rig(without=without)))
    if without:
        assert end.exit_code == 0
        assert applied(direct) == [1, 2]
        return
    assert end.exit_code == 2
    assert end.stderr.count("\n") == 1
    assert "give a URL that leads directly to the server" in end.stderr
    assert applied(direct) == []
    assert lock_row(direct)[1] is None
    assert finish(start_migrate(direct, folder)).exit_code == 0
    assert applied(direct) == [1, 2]


# Left behind


@pytest.mark.parametrize("without", [(), (DETECTION,)])
async def test_nothing_is_left_on_the_sessions_of_the_pool(
    direct: str, pooled: str, monkeypatch: pytest.MonkeyPatch, without: tuple[str, ...]
) -> None:
    """No setting, no LISTEN, no prepared statement, no session lock: after waiting and holding."""
    for mechanism in without:
        switch_off(mechanism, monkeypatch.setattr)
    waits = anyio.Event()

    def listen(event: msr.Event) -> None:
        if isinstance(event, msr.WaitingForLock) and event.waited > 0.1:
            waits.set()

    async def wait_and_hold() -> None:
        async with msr.MigrationScriptExecutor.from_url(pooled, listeners=[listen]).lock():
            pass

    past = f"{direct}?application_name=past"  # the pooler
    async with (
        anyio.create_task_group() as tasks,
        msr.MigrationScriptExecutor.from_url(past).lock(),
    ):
        tasks.start_soon(wait_and_hold)
        await waits.wait()
    found = await leavings(direct, pooled)
    assert found >= {"settings", "LISTEN"} if without else found == set()


LEAVINGS = {
    "settings": "SELECT 1 FROM pg_settings WHERE source = 'session'"
    " AND name NOT IN ('application_name', 'client_encoding')",  # which PgBouncer looks after
    "LISTEN": "SELECT 1 FROM pg_listening_channels()",
    "prepared statements": "SELECT 1 FROM pg_prepared_statements WHERE name <> ''",
    "session locks": "SELECT 1 FROM pg_locks WHERE locktype = 'advisory'"
    " AND pid = pg_backend_pid()",
}


async def leavings(direct: str, pooled: str) -> set[str]:
    """What a client finds on the server sessions that the pool has for this database."""
    sessions = {
        pid
        for (pid,) in await fetch(
            direct,
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
            " AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
            " AND application_name <> 'past'",  # which may be seen for a moment after its end
        )
    }
    assert sessions, "the pool has no session any more, so there is nothing to look at"
    found = set()
    async with AsyncExitStack() as connections:
        while sessions:  # an open transaction keeps a session, so the next client gets another
            client = await asyncpg.connect(pooled, statement_cache_size=0)
            connections.push_async_callback(client.close)
            await connections.enter_async_context(client.transaction())
            sessions.discard(await client.fetchval("SELECT pg_backend_pid()"))
            found |= {what for what, statement in LEAVINGS.items() if await client.fetch(statement)}
    return found


# Killed


@pytest.mark.parametrize("at", ["before record", "before script"])
@pytest.mark.parametrize("without", [(), DIRECT])
def test_a_killed_holder_is_succeeded_when_its_lease_is_over(
    direct: str,
    pooled: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    at: str,
    without: tuple[str, ...],
) -> None:
    """Killed in a transaction or between two scripts: not earlier, for nothing proves its death.

    The control, whose lease is far from over, takes a session lock for a proof, and one killed
    between two scripts leaves its session lock in the pool.
    """
    for mechanism in without:
        switch_off(mechanism, monkeypatch.setattr)
    # The heartbeat must not have a renewal under way when it is killed.
    rig = Rig(at=at, nth=2, send=signal.SIGKILL, without=without or ("heartbeat",))
    assert finish(start_migrate(pooled, folder, rig=rig)).exit_code == -signal.SIGKILL
    if not without:
        soon = "clock_timestamp() + interval '1 second'"
        query(direct, f"UPDATE migration_locks SET expires_at = {soon}")
    [[expires_at]] = query(direct, "SELECT expires_at FROM migration_locks")
    stays = without != () and at == "before script"
    # The pooler needs a moment to end the session of a client that is gone.
    wait_until(lambda: (advisory_locks(direct) > 0) is stays)
    result = migrate(pooled, folder)
    assert [script.version for script in result.executed] == [2, 3]
    [[started_at]] = query(direct, "SELECT started_at FROM schema_version WHERE version = 2")
    assert (started_at < expires_at) is (without != ())
    assert_applied_once(direct)


# Excluded

WAYS: dict[str, Callable[[str, str], tuple[str, str]]] = {
    "both through it": lambda direct, pooled: (pooled, pooled),
    "the first through it": lambda direct, pooled: (pooled, direct),
    "the second through it": lambda direct, pooled: (direct, pooled),
}


@pytest.mark.parametrize(
    ("way", "without"),
    [
        *((way, ()) for way in WAYS),
        ("both through it", (DETECTION,)),
        ("the first through it", (DETECTION,)),
        # Both the row and the key of a first one that is direct keep the second out.
        ("the second through it", ("lock", "respect for the key")),
    ],
)
def test_a_holder_keeps_others_out(
    direct: str,
    pooled: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
    without: tuple[str, ...],
) -> None:
    """Whichever of them goes through the pooler. The control: both are in at the same time."""
    # So long a session may have the key without the row; then it is ended, if it is judged so.
    monkeypatch.setattr(postgres_lock, "GRACE", 0.1)
    # In the control the first must not notice its loss, and end the second, before that is done.
    for mechanism in (*without, *UNAWARE) if without else ():
        switch_off(mechanism, monkeypatch.setattr)
    first, second = WAYS[way](direct, pooled)

    async def contend() -> None:
        async with msr.MigrationScriptExecutor.from_url(first).lock():
            await msr.migrate(second, folder=folder, locking={"wait": PATIENCE if without else 0.3})

    # Whether the first then hears what it has lost depends on how soon the pooler tells it.
    with suppress(msr.LockLostError) if without else pytest.raises(msr.LockHeldError):
        asyncio.run(contend())
    assert applied(direct) == ([1, 2, 3] if without else [])


# Frozen


def go_on(frozen: subprocess.Popen[str]) -> Result:
    """Let it go on, to its end."""
    frozen.send_signal(signal.SIGCONT)
    return finish_in_one_line(frozen)


def go_on_in_anothers_lease(url: str, frozen: subprocess.Popen[str]) -> Result:
    """Let it go on when another has taken the lock over."""

    async def supersede() -> Result:
        async with msr.MigrationScriptExecutor.from_url(url).lock(wait=PATIENCE):
            return await anyio.to_thread.run_sync(go_on, frozen)

    return asyncio.run(supersede())


def go_on_released(url: str, frozen: subprocess.Popen[str]) -> Result:
    """Let it go on after an operator has looked at its lock and released it."""
    status = json.loads(run_msr("lock:status", "--url", url, "--json").stdout)
    assert (status["is_locked"], status["holder"]) == (True, "unknown")
    released = run_msr("lock:release", "--force", "--yes", "--url", url)
    assert released.exit_code == 0, released.stderr
    return go_on(frozen)


SUPERSEDED = {"by another": go_on_in_anothers_lease, "by an operator": go_on_released}


@pytest.mark.parametrize("how", SUPERSEDED)
@pytest.mark.parametrize("fence", [True, False])
def test_a_superseded_holder_commits_nothing(
    direct: str, pooled: str, folder: Path, how: str, fence: bool
) -> None:
    """S2, S3: its lease is over, its work is done but for the history row, which is kept out."""
    rig = Rig(without=UNAWARE if fence else (*UNAWARE, "fence"), at="before record", nth=2)
    frozen = start_migrate(pooled, folder, rig=rig)
    wait_until(lambda: is_stopped(frozen.pid))
    query(direct, "UPDATE migration_locks SET expires_at = clock_timestamp()")
    end = SUPERSEDED[how](pooled, frozen)
    if not fence:
        assert 2 in applied(direct)
        return
    assert end.exit_code == 9
    assert applied(direct) == [1]
    migrate(pooled, folder)
    assert_applied_once(direct)


@pytest.mark.parametrize("fence", [True, False])
def test_a_commit_that_may_come_is_not_overtaken(
    direct: str, pooled: str, folder: Path, monkeypatch: pytest.MonkeyPatch, fence: bool
) -> None:
    """S3: what is frozen between fence and commit keeps its lock; the error says what to end.

    The pooler rolls back for a client that is gone. The control releases what then commits.
    """
    monkeypatch.setattr(postgres_lock, "BLOCKED_AFTER", 0.1)
    rig = Rig(without=() if fence else (*UNAWARE, "fence"), at="after record", nth=2)
    frozen = start_migrate(pooled, folder, rig=rig)
    wait_until(lambda: is_stopped(frozen.pid))
    executor = msr.MigrationScriptExecutor.from_url(pooled)
    if not fence:
        assert asyncio.run(executor.force_release_lock())
        go_on(frozen)
        assert 2 in applied(direct)
        return
    with pytest.raises(msr.LockBlockedError, match=f"end its process {frozen.pid} on "):
        asyncio.run(executor.force_release_lock())
    frozen.kill()
    frozen.wait()
    monkeypatch.setattr(postgres_lock, "BLOCKED_AFTER", PATIENCE)  # until the pooler has done so
    assert asyncio.run(executor.force_release_lock())
    migrate(pooled, folder)
    assert_applied_once(direct)
