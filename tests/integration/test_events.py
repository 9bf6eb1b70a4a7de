"""`msr.events`: what listeners hear of a run, and what a Python script is told and can tell."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import json
import logging
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import asyncpg
import pytest

import msr
import msr.events
from msr.urls import parse_url
from tests.support.cli import PATIENCE, wait_until_async, write_scripts
from tests.support.holder import hold_lock
from tests.support.queries import fetch

SCRIPTS = {
    "V1_users.up.sql": "CREATE TABLE users (id int);",
    "V1_users.down.sql": "DROP TABLE users;",
    "sub/V2_rows.py": """
        async def up(db, context):
            context.progress(1)
            await db.execute("INSERT INTO users VALUES (1)")
            context.progress(5, 10, "rows")

        async def down(db, context):
            context.progress(0.5, 1)
            await db.execute("DELETE FROM users")
    """,
}

FAILING = {"V3_bad.sql": "INSERT INTO users VALUES (3);\nSELECT * FROM nothing;"}

PATIENT = """
    import anyio

    async def up(db, context):
        await db.execute("CREATE TABLE patient (id int)")
        context.progress(3, 10, "rows  of\\n users")
        while not await anyio.Path({path!r}).exists():
            await anyio.sleep(0.01)
"""
"""A script that says how far it is, and waits until there is a file."""


class Events(list[msr.Event]):
    """A listener that keeps what it heard."""

    def __call__(self, event: msr.Event) -> None:
        self.append(event)

    @property
    def names(self) -> list[str]:
        return [type(event).__name__ for event in self]

    def only(self, kind: type[msr.events.Event]) -> list[Any]:
        return [event for event in self if isinstance(event, kind)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with an SQL script and, in a sub-folder, one in Python that tells its progress."""
    return write_scripts(tmp_path / "scripts", SCRIPTS)


@pytest.fixture
def events() -> Events:
    """What a listener heard."""
    return Events()


@pytest.fixture
def executor(database_url: str, folder: Path, events: Events) -> msr.MigrationScriptExecutor:
    """An executor with that listener, on an empty database of each kind."""
    return make_executor(database_url, folder, events)


def make_executor(
    url: str, folder: Path, *listeners: msr.Listener, **settings: Any
) -> msr.MigrationScriptExecutor:
    given = msr.MigrationScriptExecutor.from_url(url, folder=folder, **settings)
    return msr.MigrationScriptExecutor(given.handler, given.config, listeners=iter(listeners))


def is_sqlite(url: str) -> bool:
    return parse_url(url).dialect == "sqlite"


def without_duration(result: msr.MigrationResult) -> msr.MigrationResult:
    return replace(result, duration=0.0)


# The order


async def test_run(executor: msr.MigrationScriptExecutor, events: Events) -> None:
    """A run tells its start, the lock, each script with its progress, the release, its end."""
    result = await executor.migrate()

    token, [first, second] = result.token, result.executed
    assert token is not None
    place = ("sub/V2_rows.py", 2, 2)
    finished = events.pop()
    assert isinstance(finished, msr.RunFinished)
    assert events == [
        msr.RunStarted("migrate"),
        msr.LockAcquired(token, result.waited),
        msr.ScriptStarted("V1_users.up.sql", 1, 2, "apply"),
        msr.ScriptFinished("V1_users.up.sql", 1, 2, first.duration, "apply"),
        msr.ScriptStarted(*place, "apply"),
        msr.ScriptProgress(*place, 1, None, ""),
        msr.ScriptProgress(*place, 5, 10, "rows"),
        msr.ScriptFinished(*place, second.duration, "apply"),
        msr.LockReleased(token),
    ]
    assert finished.command == "migrate"
    assert without_duration(finished.result) == without_duration(result)


async def test_nothing_to_do(executor: msr.MigrationScriptExecutor, events: Events) -> None:
    """With nothing pending there are a start and an end, and no lock."""
    await executor.migrate()
    events.clear()

    result = await executor.migrate()

    assert events.names == ["RunStarted", "RunFinished"]
    assert events.only(msr.RunFinished)[0].result.applied_before == 2
    assert result.executed == ()


async def test_down(executor: msr.MigrationScriptExecutor, events: Events) -> None:
    """The way back is told in the same way, as what it is."""
    await executor.migrate()
    events.clear()

    await executor.down(0)

    assert events.names == [
        "RunStarted",
        "LockAcquired",
        *("ScriptStarted", "ScriptProgress", "ScriptFinished"),
        *("ScriptStarted", "ScriptFinished"),
        "LockReleased",
        "RunFinished",
    ]
    assert events[0] == msr.RunStarted("down")
    assert events.only(msr.ScriptStarted) == [
        msr.ScriptStarted("sub/V2_rows.py", 1, 2, "revert"),
        msr.ScriptStarted("V1_users.down.sql", 2, 2, "revert"),
    ]
    assert {event.action for event in events.only(msr.ScriptFinished)} == {"revert"}
    assert events.only(msr.RunFinished)[0].command == "down"


async def test_without_scripts(executor: msr.MigrationScriptExecutor, events: Events) -> None:
    """A run that only records tells no script, but its name and the lock."""
    assert await executor.baseline(1)

    assert events.names == ["RunStarted", "LockAcquired", "LockReleased", "RunFinished"]
    assert events[0] == msr.RunStarted("baseline")


async def test_repair(
    executor: msr.MigrationScriptExecutor, folder: Path, events: Events, database_url: str
) -> None:
    """So does a repair."""
    await executor.migrate()
    await fetch(database_url, "UPDATE schema_version SET status = 'failed' WHERE version = 2")
    events.clear()

    await executor.repair(2, applied=True)

    assert events.names == ["RunStarted", "LockAcquired", "LockReleased", "RunFinished"]
    assert events[0] == msr.RunStarted("repair")


async def test_lock(executor: msr.MigrationScriptExecutor, events: Events) -> None:
    """The lock around other work is no run: only itself is told."""
    async with executor.lock() as lease:
        assert events.names == ["LockAcquired"]

    assert events.only(msr.LockAcquired)[0].token == lease.token
    assert events[1:] == [msr.LockReleased(lease.token)]


async def test_without_the_lock(executor: msr.MigrationScriptExecutor, events: Events) -> None:
    """A run without the lock tells nothing of one."""
    await executor.migrate(use_lock=False)

    assert events.names == [
        "RunStarted",
        *("ScriptStarted", "ScriptFinished"),
        *("ScriptStarted", "ScriptProgress", "ScriptProgress", "ScriptFinished"),
        "RunFinished",
    ]


async def test_single_transaction(
    executor: msr.MigrationScriptExecutor, folder: Path, events: Events
) -> None:
    """In one transaction no script has finished before all of them are committed."""
    write_scripts(folder, FAILING)
    with pytest.raises(msr.MigrationError):
        await executor.migrate(single_transaction=True)

    assert "ScriptFinished" not in events.names
    assert [event.script for event in events.only(msr.ScriptStarted)] == [
        "V1_users.up.sql",
        "sub/V2_rows.py",
        "V3_bad.sql",
    ]
    [failed] = events.only(msr.ScriptFailed)
    assert (failed.script, failed.number, failed.total) == ("V3_bad.sql", 3, 3)
    assert events.only(msr.RunFailed)[0].error.result.executed == ()
    events.clear()

    (folder / "V3_bad.sql").unlink()
    await executor.migrate(single_transaction=True)

    scripts = [name for name in events.names if name in ("ScriptStarted", "ScriptFinished")]
    assert scripts == ["ScriptStarted"] * 2 + ["ScriptFinished"] * 2


# Failing


async def test_failing_run(
    executor: msr.MigrationScriptExecutor, folder: Path, events: Events
) -> None:
    """A failing run tells which script failed, gives the lock back, and ends with what was done."""
    write_scripts(folder, {**FAILING, "V4_never.sql": "SELECT 1;"})

    with pytest.raises(msr.MigrationError) as caught:
        await executor.migrate()

    assert events.names == [
        "RunStarted",
        "LockAcquired",
        *("ScriptStarted", "ScriptFinished"),
        *("ScriptStarted", "ScriptProgress", "ScriptProgress", "ScriptFinished"),
        *("ScriptStarted", "ScriptFailed"),
        "LockReleased",
        "RunFailed",
    ]
    failed, _, ended = events[-3:]
    assert failed == msr.ScriptFailed("V3_bad.sql", 3, 4, caught.value)
    assert ended == msr.RunFailed("migrate", caught.value)
    assert caught.value.result is not None
    assert [script.version for script in caught.value.result.executed] == [1, 2]
    assert caught.value.result.token == events.only(msr.LockAcquired)[0].token


async def test_failing_way_back(
    executor: msr.MigrationScriptExecutor, folder: Path, events: Events
) -> None:
    """The same on the way back, with its own error and what had been taken back."""
    await executor.migrate()
    events.clear()
    write_scripts(folder, {"V1_users.down.sql": "DROP TABLE nothing;"})

    with pytest.raises(msr.RollbackError) as caught:
        await executor.down(0)

    assert events.names[-3:] == ["ScriptFailed", "LockReleased", "RunFailed"]
    assert events[-3] == msr.ScriptFailed("V1_users.down.sql", 2, 2, caught.value)
    assert events[-1] == msr.RunFailed("down", caught.value)
    assert caught.value.result is not None
    assert [(it.version, it.action) for it in caught.value.result.executed] == [(2, "revert")]


async def test_invalid_scripts(
    executor: msr.MigrationScriptExecutor, folder: Path, events: Events
) -> None:
    """What is found before anything runs ends a run that took no lock."""
    write_scripts(folder, {"V3_bad.sql": "COMMIT;"})

    with pytest.raises(msr.ValidationError) as caught:
        await executor.migrate()

    assert events == [msr.RunStarted("migrate"), msr.RunFailed("migrate", caught.value)]
    assert caught.value.result is not None
    assert caught.value.result.pending_before == 3


async def test_lost_lock(
    executor: msr.MigrationScriptExecutor, events: Events, database_url: str, folder: Path
) -> None:
    """A lock that was taken away was lost and not released."""
    operator = make_executor(database_url, folder)

    with pytest.raises(msr.LockLostError) as caught:
        async with executor.lock() as lease:
            await operator.force_release_lock(reason="test")

    assert events.names == ["LockAcquired", "LockLost"]
    assert events[1:] == [msr.LockLost(lease.token, str(caught.value))]


# Waiting


async def test_waiting_run(database_url: str, folder: Path) -> None:
    """A waiting run tells at each poll for whom, then that it has the lock and how long it took."""
    events = Events()
    waiting = make_executor(database_url, folder, events, locking={"wait": PATIENCE})
    with hold_lock(database_url, running="something long") as holder:
        run = asyncio.ensure_future(waiting.migrate())
        await wait_until_async(lambda: told(events, msr.WaitingForLock, 3))
        assert events.names == ["RunStarted"] + ["WaitingForLock"] * (len(events) - 1)
        assert await asyncio.to_thread(holder.release) == 0
        result = await run

    polls = events.only(msr.WaitingForLock)
    assert {(it.status.locked_by, it.status.running) for it in polls} >= {
        (holder.locked_by, "something long")
    }
    waited = [poll.waited for poll in polls]
    assert waited == sorted(waited)
    [acquired] = events.only(msr.LockAcquired)
    assert acquired.token == result.token
    assert result.waited == acquired.waited >= waited[-1] > 0
    assert events.names[:1] + events.names[len(polls) + 1 :] == [
        "RunStarted",
        "LockAcquired",
        *("ScriptStarted", "ScriptFinished"),
        *("ScriptStarted", "ScriptProgress", "ScriptProgress", "ScriptFinished"),
        "LockReleased",
        "RunFinished",
    ]


async def told(events: Events, kind: type[msr.events.Event], times: int = 1) -> bool:
    return len(events.only(kind)) >= times


async def test_wait_that_is_over(
    database_url: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that waited in vain tells no lock, and ends with the error."""
    events = Events()
    later = 0.0

    class Clock:
        """The module `time`, later by what has been waited."""

        @staticmethod
        def monotonic() -> float:
            return time.monotonic() + later

    def wait(event: msr.Event) -> None:
        nonlocal later
        later = 600.0 * len(events.only(msr.WaitingForLock))

    monkeypatch.setattr("msr.locking.time", Clock)
    waiting = make_executor(database_url, folder, events, wait, locking={"wait": 1000})
    with hold_lock(database_url), pytest.raises(msr.LockHeldError) as caught:
        await waiting.migrate()

    assert events.names == ["RunStarted"] + ["WaitingForLock"] * (len(events) - 2) + ["RunFailed"]
    assert len(events.only(msr.WaitingForLock)) == 2
    assert events[-1] == msr.RunFailed("migrate", caught.value)


async def test_following_run(
    database_url: str, folder: Path, tmp_path: Path, events: Events
) -> None:
    """A waiting run that finds everything done by another one never had the lock.

    Meanwhile it hears how far that one is.
    """
    path = tmp_path / "go on"
    write_scripts(folder, {"V3_patient.py": PATIENT.format(path=str(path))})
    leader_events = Events()
    leading = make_executor(database_url, folder, leader_events)
    following = make_executor(database_url, folder, events, locking={"wait": PATIENCE})

    leader = asyncio.ensure_future(leading.migrate())
    await wait_until_async(lambda: told(leader_events, msr.ScriptProgress, 3))
    follower = asyncio.ensure_future(following.migrate())

    async def knows() -> bool:
        polls = events.only(msr.WaitingForLock)
        return any(
            it.status.running == "V3_patient.py (3 of 3), 3 of 10 rows of users" for it in polls
        )

    await wait_until_async(knows)
    path.touch()
    await leader
    result = await follower

    assert result.followed
    assert events.names == ["RunStarted"] + ["WaitingForLock"] * (len(events) - 2) + ["RunFinished"]
    assert without_duration(events.only(msr.RunFinished)[0].result) == without_duration(result)


@pytest.mark.may_block("a listener of the test's own writes to SQLite")
async def test_retried_script(database_url: str, folder: Path) -> None:
    """A script that waits too long for a table tells each attempt that failed, and the pause."""
    await make_executor(database_url, folder).migrate()
    write_scripts(folder, {"V3_widen.sql": "ALTER TABLE users ADD COLUMN wide int;"})
    events = Events()
    async with blocker(database_url) as block:

        def act(event: msr.Event) -> None:
            if isinstance(event, msr.LockAcquired):
                block.begin()
            elif isinstance(event, msr.ScriptRetried) and event.attempt == 2:
                block.end()

        settings = {"lock_timeout": 0.1, "lock_retries": 100}
        executor = make_executor(database_url, folder, events, act, **settings)
        await executor.migrate()

    # In SQLite a transaction waits where it begins, before its script.
    started = [] if is_sqlite(database_url) else ["ScriptStarted"]
    first, second, *more = events.only(msr.ScriptRetried)  # the server may be slow to let it go
    assert events.names == [
        "RunStarted",
        "LockAcquired",
        *(*started, "ScriptRetried") * (2 + len(more)),
        *("ScriptStarted", "ScriptFinished"),
        "LockReleased",
        "RunFinished",
    ]
    assert (first.script, first.number, first.total) == ("V3_widen.sql", 1, 1)
    assert (first.attempt, second.attempt) == (1, 2)
    assert 0.08 <= first.pause <= 0.12
    assert 0.16 <= second.pause <= 0.24
    words = "is locked" if is_sqlite(database_url) else "lock timeout"
    assert words in first.reason


@dataclasses.dataclass
class Blocker:
    begin: Callable[[], object]
    end: Callable[[], object]


@asynccontextmanager
async def blocker(url: str) -> AsyncIterator[Blocker]:
    """Another session that keeps `users` locked: from the start, in SQLite from `begin` on."""
    address = parse_url(url)
    if address.dialect == "sqlite":
        with closing(sqlite3.connect(address.path or "", isolation_level=None)) as db:
            yield Blocker(lambda: db.execute("BEGIN IMMEDIATE"), db.rollback)
        return
    connection = await asyncpg.connect(address.dsn)
    await connection.execute("BEGIN; LOCK TABLE users")
    yield Blocker(lambda: None, connection.terminate)


# Listeners


async def test_async_listeners(executor: msr.MigrationScriptExecutor, events: Events) -> None:
    """An async listener hears the events in their order, one after the other, and all of them.

    However long it takes for each, it has heard the last when `migrate` returns.
    """
    heard, also_heard = Events(), Events()
    busy = False

    async def listen(event: msr.Event) -> None:
        nonlocal busy
        assert not busy
        busy = True
        await asyncio.sleep(0.05 if len(heard) < 2 else 0)  # the first would come last
        heard.append(event)
        busy = False

    class Listening:
        async def __call__(self, event: msr.Event) -> None:
            also_heard.append(event)

    executor.listeners += [listen, Listening()]

    await executor.migrate()

    assert len(events) == 10
    assert heard == also_heard == events


async def test_async_listeners_of_a_failing_run(
    executor: msr.MigrationScriptExecutor, folder: Path, events: Events
) -> None:
    """They have heard all of a run that fails, too, before its error is raised."""
    write_scripts(folder, FAILING)
    heard = Events()

    async def listen(event: msr.Event) -> None:
        await asyncio.sleep(0.01)
        heard.append(event)

    executor.listeners.append(listen)

    with pytest.raises(msr.MigrationError):
        await executor.migrate()
    assert heard == events
    assert heard.names[-1] == "RunFailed"
    heard.clear()

    async with executor.lock():
        pass
    assert heard.names == ["LockAcquired", "LockReleased"]


async def test_a_run_does_not_wait_for_listeners(
    executor: msr.MigrationScriptExecutor, events: Events
) -> None:
    """A slow listener does not keep the scripts from running, nor the lock from its release."""
    heard = Events()

    async def listen(event: msr.Event) -> None:
        if isinstance(event, msr.RunStarted):
            await wait_until_async(lambda: told(events, msr.LockReleased))
        heard.append(event)

    executor.listeners.append(listen)

    await executor.migrate()

    assert heard == events


class Broken(Exception):
    """What a listener raises."""


def raising(event: msr.Event) -> None:
    raise Broken(type(event).__name__)


async def raising_at_once(event: msr.Event) -> None:
    raise Broken(type(event).__name__)


async def raising_later(event: msr.Event) -> None:
    await asyncio.sleep(0)
    raise Broken(type(event).__name__)


@pytest.mark.parametrize("broken", [raising, raising_at_once, raising_later])
@pytest.mark.parametrize("fails", [False, True], ids=["run", "failing run"])
async def test_a_broken_listener(
    executor: msr.MigrationScriptExecutor,
    folder: Path,
    events: Events,
    caplog: pytest.LogCaptureFixture,
    broken: msr.Listener,
    fails: bool,
) -> None:
    """What a listener raises is logged with the event's name and its traceback.

    It breaks neither the run nor what the other listeners hear.
    """
    heard = Events()

    async def listen(event: msr.Event) -> None:
        heard.append(event)

    executor.listeners[:] = [broken, events, listen]
    if fails:
        write_scripts(folder, FAILING)
        with pytest.raises(msr.MigrationError):
            await executor.migrate()
    else:
        assert len((await executor.migrate()).executed) == 2

    assert events.names[-1] == ("RunFailed" if fails else "RunFinished")
    assert heard == events
    logged = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert [record.getMessage() for record in logged] == [
        f"a listener failed on {name}" for name in events.names
    ]
    for record, name in zip(logged, events.names, strict=True):
        assert record.name == "msr"
        assert record.exc_info is not None
        assert str(record.exc_info[1]) == name
    assert isinstance(await executor.get_lock_status(), msr.LockStatus)


async def test_a_cancelled_listener(executor: msr.MigrationScriptExecutor, events: Events) -> None:
    """A listener that awaits what was cancelled loses that event, and nobody another."""
    heard = Events()

    async def listen(event: msr.Event) -> None:
        if isinstance(event, msr.LockAcquired):
            raise asyncio.CancelledError
        heard.append(event)

    executor.listeners.append(listen)

    await executor.migrate()

    gc.collect()  # here and now: what was never awaited is a warning, and so a failure
    expected = [event for event in events if not isinstance(event, msr.LockAcquired)]
    assert heard == expected


async def test_a_listener_without_end(
    executor: msr.MigrationScriptExecutor,
    events: Events,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A listener that does not come to an end is cancelled some seconds later, and logged."""
    monkeypatch.setattr(msr.events, "LISTENERS_BOUND", 0.2)
    cancelled = asyncio.Event()

    async def listen(event: msr.Event) -> None:
        if isinstance(event, msr.LockAcquired):
            try:
                await asyncio.sleep(50)
            finally:
                cancelled.set()

    executor.listeners.append(listen)

    result = await executor.migrate()

    assert len(result.executed) == 2
    assert events.names[-1] == "RunFinished"
    assert "a listener has not finished within 0.2 s" in caplog.messages
    await asyncio.wait_for(cancelled.wait(), PATIENCE)
    await asyncio.sleep(0.05)  # for those that came behind it
    gc.collect()  # here and now: what was never awaited is a warning, and so a failure


async def test_listeners_of_migrate(database_url: str, folder: Path, events: Events) -> None:
    """The boot hook in one line takes listeners as well."""
    await msr.migrate(database_url, folder=folder, listeners=[events])

    assert events.names[0] == "RunStarted"
    assert events.names[-1] == "RunFinished"


def test_events_are_frozen() -> None:
    """Every event is a frozen dataclass, and part of `msr`."""
    for kind in get_args(msr.events.Event):
        [name] = {field.name for field in dataclasses.fields(kind)[:1]}
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(kind(*dataclasses.fields(kind)), name, None)
        assert getattr(msr, kind.__name__) is kind


# The context of a Python script


async def test_progress_in_the_lock_status(
    executor: msr.MigrationScriptExecutor, folder: Path, tmp_path: Path, database_url: str
) -> None:
    """Who looks at the lock sees how far the running script is, while it is running."""
    path = tmp_path / "go on"
    write_scripts(folder, {"V3_patient.py": PATIENT.format(path=str(path))})
    looking = make_executor(database_url, folder)

    run = asyncio.ensure_future(executor.migrate())

    async def running() -> bool:
        status = await looking.get_lock_status()
        assert status is not None
        return status.running == "V3_patient.py (3 of 3), 3 of 10 rows of users"

    await wait_until_async(running)
    assert not run.done()
    path.touch()
    await run

    status = await looking.get_lock_status()
    assert status is not None
    assert status.running is None


async def test_context(
    database_url: str, folder: Path, events: Events, caplog: pytest.LogCaptureFixture
) -> None:
    """A script knows its place in the folder, the settings and its token, and has a logger."""
    script = """
        import json

        async def up(db, context):
            known = (context.script, context.token, context.config.table_name)
            context.logger.warning(json.dumps(known))
    """
    write_scripts(folder, {"sub/V3_context.py": script})
    executor = make_executor(database_url, folder, events, table_name="our_history")

    result = await executor.migrate()

    [record] = [record for record in caplog.records if record.name == "msr.script"]
    assert json.loads(record.message) == ["sub/V3_context.py", result.token, "our_history"]
    assert result.token == events.only(msr.LockAcquired)[0].token


async def test_context_without_the_lock(
    executor: msr.MigrationScriptExecutor,
    folder: Path,
    events: Events,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Without the lock there is no token; progress is told all the same."""
    script = """
        async def up(db, context):
            context.logger.warning(repr(context.token))
            context.progress(2, note="done")
    """
    write_scripts(folder, {"V3_context.py": script})

    await executor.migrate(use_lock=False)

    assert [it.message for it in caplog.records if it.name == "msr.script"] == ["None"]
    told = events.only(msr.ScriptProgress)[-1]
    assert told == msr.ScriptProgress("V3_context.py", 3, 3, 2, None, "done")


async def test_pauses_have_a_limit(
    postgres_url: str, folder: Path, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long a script may wait, and however often it has, a pause ends at this."""
    monkeypatch.setattr("msr.unit.LONGEST_PAUSE", 0.02)
    write_scripts(folder, {"V3_busy.sql": "ALTER TABLE users ADD COLUMN busy int;"})
    executor = make_executor(postgres_url, folder, events, lock_timeout=0.1, lock_retries=3)
    await executor.migrate(2)
    connection = await asyncpg.connect(postgres_url)
    try:
        await connection.execute("BEGIN; LOCK TABLE users")
        with pytest.raises(msr.MigrationError):
            await executor.migrate()
    finally:
        await connection.close()
    pauses = [event.pause for event in events if isinstance(event, msr.ScriptRetried)]
    assert len(pauses) == 3
    assert max(pauses) <= 0.02 * 1.2
