"""Work under the lock that blocks, swallows, branches out, or is cancelled from outside.

All of it in the test's own process, through the library: `executor.lock()` and Python scripts.
"""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import coroutine
from typing import Any

import aiosqlite
import anyio
import pytest

import msr
from tests.support.cli import wait_until_async, write_scripts
from tests.support.figures import Figures, rounds
from tests.support.mechanisms import switch_off
from tests.support.migrations import is_sqlite
from tests.support.queries import fetch, table_names
from tests.support.rig import UNAWARE

LEASE = 6
"""Seconds that a slow machine does not need for a run, and still a renewal every two seconds."""

NEVER = 50
"""Seconds that nothing takes, unless what it waits for does not happen."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "scripts"


def make_executor(url: str, folder: Path, **options: Any) -> msr.MigrationScriptExecutor:
    locking = {"timeout": LEASE, "wait": 20}
    return msr.MigrationScriptExecutor.from_url(url, folder=folder, locking=locking, **options)


# Cancelled from outside, wherever it stands


@dataclass
class Interruption:
    """Calls `interrupt` when any task of the loop comes to its `nth` wait.

    It arrives while the task waits, or, if `late`, together with what the task waited for, which
    is the moment when an answer gets lost. With `again` it comes once more at the next wait.
    """

    nth: int
    late: bool = False
    again: bool = False
    interrupt: Callable[[], object] = lambda: None
    waits: int = 0

    @property
    def has_come(self) -> bool:
        return self.waits >= self.nth

    def make_task(
        self, loop: asyncio.AbstractEventLoop, work: Any, **options: Any
    ) -> asyncio.Task[Any]:
        """The loop's task factory."""

        async def counted() -> Any:
            return await self._counted(work)

        task = asyncio.Task(counted(), loop=loop, **options)
        task.add_done_callback(lambda _: work.close())  # cancelled before its first step
        return task

    @coroutine
    def _counted(self, work: Coroutine[Any, Any, Any]) -> Generator[Any, Any, Any]:
        step: Callable[[], Any] = partial(work.send, None)
        while True:
            try:
                awaited = step()
            except StopIteration as end:
                return end.value
            self.waits += 1
            if self.waits == self.nth or (self.again and self.waits == self.nth + 1):
                if self.late and awaited is not None:
                    awaited.add_done_callback(lambda _: self.interrupt())
                else:
                    asyncio.get_running_loop().call_soon(self.interrupt)
            try:
                yield awaited
            except BaseException as error:
                step = partial(work.throw, error)
            else:
                step = partial(work.send, None)


Call = Callable[[Coroutine[Any, Any, Any], Interruption], Awaitable[bool]]
"""Runs some work under an interruption; whether the work was cancelled and its caller told so."""


async def cancel_the_task(work: Coroutine[Any, Any, Any], interruption: Interruption) -> bool:
    """`task.cancel()`, which is what a server does that shuts down."""
    task = asyncio.create_task(work)
    interruption.interrupt = task.cancel
    await asyncio.wait([task])
    if not task.cancelled():
        task.result()
    return task.cancelled()


async def time_out(work: Coroutine[Any, Any, Any], interruption: Interruption) -> bool:
    """`asyncio.timeout`: what it cancels comes out as `TimeoutError`, and nothing else does."""

    async def limited() -> bool:
        task = asyncio.current_task()
        assert task is not None
        try:
            async with asyncio.timeout(None) as limit:
                interruption.interrupt = lambda: limit.reschedule(0)
                await work
        except TimeoutError:
            timed_out = True
        else:
            timed_out = False
        interruption.interrupt = lambda: None
        assert task.cancelling() == 0, "a cancellation is left over for whoever comes next"
        await asyncio.sleep(0)
        return timed_out

    return await asyncio.create_task(limited())


async def cancel_the_scope(work: Coroutine[Any, Any, Any], interruption: Interruption) -> bool:
    """A cancel scope of anyio, which goes on cancelling whatever is awaited inside."""

    async def scoped() -> bool:
        with anyio.CancelScope() as scope:
            interruption.interrupt = scope.cancel
            await work
        return scope.cancelled_caught

    return await asyncio.create_task(scoped())


SCRIPTS = {
    "V1_inside.py": """
        async def up(db):
            await db.execute("CREATE TABLE inside (id INTEGER)")
            await db.execute("INSERT INTO inside VALUES (1)")
        """,
    # Long enough for a renewal, see `interrupt_everywhere`.
    "V2_outside.py": """
        import asyncio

        transaction = False

        async def up(db):
            await asyncio.sleep(0.05)
        """,
}


async def start_anew(url: str) -> None:
    """Drop what a run made, so that the next one makes it again."""
    if is_sqlite(url):
        path = Path(url.removeprefix("sqlite:///"))
        path.unlink(missing_ok=True)
        return
    tables = "inside, schema_version, migration_locks"
    await fetch(
        url,
        f"DROP TABLE IF EXISTS {tables}",
        "DROP SEQUENCE IF EXISTS migration_locks_token",
    )


async def is_quiet(url: str) -> bool:
    """Whether no task, no thread and no database session is left."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    names = [thread.name for thread in threading.enumerate()]
    if others or any("_connection_worker_thread" in name for name in names):
        return False
    if is_sqlite(url):
        return True
    sessions = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database()"
    return not await fetch(url, f"{sessions} AND pid <> pg_backend_pid()")


async def left_behind(url: str, folder: Path, told: Sequence[str]) -> list[str]:
    """What an interrupted run did wrong, given the scripts that it said it had applied."""
    wrong = []
    try:  # the server notices by itself that a client has gone, so that may take a moment
        await wait_until_async(lambda: is_quiet(url), interval=0.005)
    except AssertionError:
        wrong.append("something still runs")
        for connection in gc.get_objects():
            if isinstance(connection, aiosqlite.Connection):
                connection.stop()  # its thread would keep the interpreter running
    tables = await table_names(url)
    held = "SELECT 1 FROM migration_locks WHERE locked_by IS NOT NULL"
    if "migration_locks" in tables and await fetch(url, held):
        wrong.append("the lock is held")
    history = []
    if "schema_version" in tables:
        names = "SELECT name FROM schema_version WHERE status = 'applied' ORDER BY version"
        history = [name for (name,) in await fetch(url, names)]
    if history != [script.partition("_")[2].removesuffix(".py") for script in told]:
        wrong.append(f"{history} are applied, and {told} were told")
    if ("inside" in tables) != ("inside" in history):
        wrong.append("half of a script was committed")
    if is_sqlite(url):
        files = sorted(path.name for path in folder.parent.glob("app.db?*"))
        wrong += [f"{name} is left" for name in files]
    return wrong


@dataclass
class Sweep:
    """What came of a run that was interrupted at each of its waits in turn."""

    runs: int = 0
    wrong: list[str] = field(default_factory=list)
    cancelled: int = 0


async def interrupt_everywhere(
    url: str,
    folder: Path,
    call: Call,
    *,
    late: bool = False,
    again: bool = False,
    first: int = 1,
    every: int = 1,
) -> Sweep:
    """Run `migrate` on an empty database until no wait is left to interrupt it at.

    Two wrong ends are enough to stop before.
    """
    write_scripts(folder, SCRIPTS)
    loop = asyncio.get_running_loop()
    sweep = Sweep()
    nth = first
    while True:
        await start_anew(url)
        events: list[msr.Event] = []
        executor = make_executor(url, folder, listeners=[events.append])
        interruption = Interruption(nth, late, again)
        loop.set_task_factory(interruption.make_task)
        try:
            cancelled = await call(executor.migrate(), interruption)
        finally:
            loop.set_task_factory(None)
        sweep.runs += 1
        sweep.cancelled += cancelled
        told = [event.script for event in events if isinstance(event, msr.ScriptFinished)]
        sweep.wrong += [f"at wait {nth}: {it}" for it in await left_behind(url, folder, told)]
        if not interruption.has_come or len(sweep.wrong) > 1:
            return sweep
        nth += every


@pytest.fixture
def early_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second script is long enough to be renewed in."""
    monkeypatch.setattr("msr.locking.FIRST_HEARTBEAT", 0.01)


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("early_heartbeat")
@pytest.mark.parametrize(
    ("call", "late", "again", "every"),
    [
        (cancel_the_task, False, True, rounds(2, 1)),
        (cancel_the_task, False, False, rounds(9, 1)),
        (cancel_the_task, True, False, rounds(9, 1)),
        (cancel_the_task, True, True, rounds(9, 1)),
        (time_out, False, False, rounds(9, 1)),
        (time_out, True, False, rounds(9, 1)),
        (cancel_the_scope, False, False, rounds(9, 1)),
        (cancel_the_scope, True, True, rounds(9, 1)),
    ],
)
async def test_interrupted_at_every_wait(
    database_url: str,
    folder: Path,
    figures: Figures,
    call: Call,
    late: bool,
    again: bool,
    every: int,
) -> None:
    """Wherever it is cancelled: released, rolled back or told, nothing left open, caller told.

    From the first connection on, through the attempt, the scripts, their commits and renewals, to
    the release and the closing of the last connection.
    """
    sweep = await interrupt_everywhere(
        database_url, folder, call, late=late, again=again, every=every
    )
    assert sweep.wrong == []
    # A slow machine renews less often in that time, so there are fewer waits.
    assert sweep.runs > 60 / every
    assert sweep.cancelled > 0.5 * (sweep.runs - 1)
    if again and not late:
        what = "cancelled twice at every wait of a run, wrong ends"
        figures.record(what, database_url, f"{sweep.runs - 1}, {len(sweep.wrong)}")


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("mechanism", "late", "wrong"),
    [
        ("shield", False, "the lock is held"),
        ("look before rolled back", True, "are applied, and"),  # late: the answer is lost, surely
    ],
)
async def test_control_interrupted_at_every_wait(
    database_url: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    mechanism: str,
    late: bool,
    wrong: str,
) -> None:
    """Without the shield the lock stays held; without a look, what was applied is not told.

    No heartbeat waits in between, so the waits are the same in each run, and none is missed.
    """
    switch_off(mechanism, monkeypatch.setattr)
    sweep = await interrupt_everywhere(database_url, folder, cancel_the_task, late=late, again=True)
    assert any(wrong in it for it in sweep.wrong), sweep


# Bodies that do not cooperate

Body = Callable[[float], Awaitable[bool]]
"""Works for some seconds, if it is let; whether it was told to stop."""


async def block_the_loop(seconds: float) -> bool:
    """As a computation does, or a driver that is not async; nobody can tell it anything."""
    time.sleep(min(seconds, 0.5))
    return True


async def ignore_it(seconds: float, times: int = 1) -> bool:
    """As a bare `except:` does; and so again, until it has had enough."""
    told = 0
    for _ in range(times):
        try:
            await asyncio.sleep(seconds)
        except BaseException:
            told += 1
    return told == times


async def branch_out(seconds: float) -> bool:
    """Tasks of its own, which clean up behind themselves."""
    cleaned = 0

    async def branch() -> None:
        nonlocal cleaned
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            cleaned += 1
            raise

    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(branch())
            async with anyio.create_task_group() as more:
                more.start_soon(branch)
    finally:
        told = cleaned == 2
    return told


@pytest.mark.usefixtures("early_heartbeat")
@pytest.mark.parametrize(
    "body", [block_the_loop, ignore_it, partial(ignore_it, times=3), branch_out]
)
@pytest.mark.parametrize("without", [(), (*UNAWARE, "answer to release")])
async def test_a_lost_lock_is_told(
    database_url: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    body: Body,
    without: Sequence[str],
) -> None:
    """The body is cancelled, with all of its tasks; ignored or not, leaving is an error.

    In the control it goes on, and leaves as if it had had the lock all the time.
    """
    for mechanism in without:
        switch_off(mechanism, monkeypatch.setattr)
    executor = make_executor(database_url, folder)
    told = lost = False
    try:
        async with executor.lock():
            await executor.force_release_lock()
            told = True  # unless it comes to its end
            told = await body(0.3 if without else NEVER)
    except msr.LockLostError:
        lost = True
    assert lost == (not without)
    assert told == (not without) or body is block_the_loop
    await wait_until_async(lambda: is_quiet(database_url))


async def test_a_group_of_errors_passes_unchanged(database_url: str, folder: Path) -> None:
    """What a body's own tasks raise comes out as they raised it, and the lock is free."""
    executor = make_executor(database_url, folder)

    async def fail() -> None:
        raise KeyError("x")

    with pytest.raises(ExceptionGroup) as caught:
        async with executor.lock(), asyncio.TaskGroup() as tasks:
            tasks.create_task(fail())
    assert [repr(error) for error in caught.value.exceptions] == ["KeyError('x')"]
    status = await executor.get_lock_status()
    assert status is not None
    assert not status.is_locked


async def test_a_group_of_errors_in_a_script(database_url: str, folder: Path) -> None:
    """It is named as it is, and the script is rolled back over its own connection."""
    script = """
        import asyncio

        async def fail():
            raise KeyError("x")

        async def up(db):
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(fail())
        """
    write_scripts(folder, {"V1_group.py": script})
    with pytest.raises(msr.MigrationError, match="line 8: ExceptionGroup: unhandled") as caught:
        await make_executor(database_url, folder).migrate()
    assert caught.value.rolled_back


async def test_a_script_that_raises_a_cancellation(database_url: str, folder: Path) -> None:
    """Nobody has cancelled anything: that is a failure of the script, and not of its caller."""
    script = """
        import asyncio

        async def up(db):
            await db.execute("CREATE TABLE half (id INTEGER)")
            task = asyncio.create_task(asyncio.sleep(60))
            task.cancel()
            await task
        """
    write_scripts(folder, {"V1_cancelled.py": script})
    with pytest.raises(
        msr.MigrationError, match="V1_cancelled.py, line 8: CancelledError"
    ) as caught:
        await make_executor(database_url, folder).migrate()
    assert caught.value.rolled_back
    assert "half" not in await table_names(database_url)
