"""What comes of a holder that stands still until its lease is over, is superseded, and wakes up.

Three things stand in its way: its database session is ended before anybody else runs
(PostgreSQL), its own watch finds that the lease cannot be trusted any more, and the fence refuses
the commit. Only the fence and, on PostgreSQL, the end of the session can be relied on; the watch
is late for what is on its way already.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import random
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import anyio
import anyio.to_thread
import asyncpg
import pytest

import msr
from msr.urls import parse_url
from tests.support.arena import Arena, arenas, count_violations, is_kept_out, make_places
from tests.support.cli import (
    PATIENCE,
    Result,
    wait_until,
    wait_until_async,
    write_scripts,
)
from tests.support.figures import Figures, rounds
from tests.support.mechanisms import switch_off
from tests.support.migrations import (
    applied,
    finish,
    lock_row,
    start_migrate,
    wait_for_waiting,
)
from tests.support.queries import fetch, query
from tests.support.rig import UNAWARE, Rig, is_stopped

LEASE = 1
"""Seconds, the least that can be set."""

TAKEOVER = 2.0
"""Seconds after the end of its lease in which a frozen holder must have been superseded (L3)."""

GIVES_UP = LEASE + 3.0
"""Seconds after which a holder is let go that may be impossible to supersede where it stands."""

UNBOUNDED = {"msr.locking.ATTEMPT_BOUND": 600.0, "msr.locking.RELEASE_BOUND": 600.0}
"""Who stands still in the middle of one of these does not count for how long."""

LONGEST_RUN = 0.04
"""Seconds; a random moment within them mostly finds the run under way."""


@dataclass(frozen=True)
class Step:
    """Where to freeze a migration: `Rig`'s step, or a random moment; in a `slow` script or not."""

    at: str | None = None
    nth: int = 1
    slow: bool = False


def everywhere(*names: str) -> Iterator[Step]:
    return (Step(name, nth) for nth in (1, 2) for name in names)


RANDOM = Step()

# On SQLite nobody can take the lock while a script's transaction is open, so there the steps are
# those between transactions.
STEPS: dict[str, Sequence[Step]] = {
    "postgresql": [
        *everywhere("before commit", "after record"),
        *everywhere("before begin", "before body", "after body", "before record", "after commit"),
        *(Step("after acquire"), Step("after begin"), Step("before release")),
        *(Step("before renew", slow=True), Step("after renew", slow=True)),
        *[RANDOM] * 5,
    ],
    "sqlite": [
        *everywhere("before begin", "after commit"),
        *(Step("after acquire"), Step("before release")),
        *(Step("before body", slow=True), Step("after body", slow=True)),
        *(Step("before renew", slow=True), Step("after renew", slow=True)),
        *[RANDOM] * 3,
    ],
}


@dataclass(frozen=True)
class Trial:
    """Pauses of holders that run without some mechanism, before successors without another.

    `arenas` says in how many at once, in the short and the long form; `is_control` that nothing
    is left that protects.
    """

    arenas: int
    holder: Sequence[str] = ()
    successor: Sequence[str] = ()
    is_control: bool = False

    def steps(self, url: str) -> Iterator[Step]:
        """Where to freeze, for ever; without those where such a holder cannot be superseded."""
        steps = STEPS[parse_url(url).dialect]
        if ENDING in self.successor and "fence" not in self.holder:
            steps = [step for step in steps if step.at not in ("before commit", "after record")]
        return itertools.cycle(steps)


ENDING = "session ending"
# PostgreSQL has two layers, and either is enough. Trials of the fence alone have no watch and no
# heartbeat either, nor have the controls: those two are often quicker.
TRIALS: dict[str, Sequence[Trial]] = {
    "postgresql": [
        Trial(rounds(5, 16)),
        Trial(rounds(2, 4), holder=["fence"]),
        Trial(rounds(3, 10), holder=UNAWARE, successor=[ENDING]),
        Trial(
            rounds(3, 10),
            holder=["fence", *UNAWARE],
            successor=[ENDING],
            is_control=True,
        ),
    ],
    "sqlite": [
        Trial(rounds(4, 16)),
        Trial(rounds(2, 4), holder=UNAWARE),
        Trial(rounds(2, 4), holder=["fence", *UNAWARE], is_control=True),
    ],
}

ARENAS = max(
    sum(trial.arenas for trial in trials if trial.successor == first.successor)
    for trials in TRIALS.values()
    for first in trials
)


@dataclass(frozen=True)
class Pause:
    """One that outlasted the lease, so that another took the lock; `late` is in seconds."""

    end: str
    violations: int
    late: float


@pytest.fixture
def scripts(tmp_path: Path) -> dict[bool, Path]:
    """Two folders with the same two scripts; where it is slow, the first takes half a second."""
    work = "INSERT INTO work VALUES ({});".format
    fast = {"V1_one.sql": work(1), "V2_two.sql": work(2)}
    write_scripts(tmp_path / "fast", fast)
    slow = (
        "import asyncio\n\ntransaction = False\n\nasync def up(db):\n    await asyncio.sleep(0.5)\n"
    )
    write_scripts(tmp_path / "slow", {"V1_one.py": slow, "V2_two.sql": work(2)})
    return {slow: tmp_path / ("slow" if slow else "fast") for slow in (False, True)}


async def pause(arena: Arena, step: Step, folder: Path, trial: Trial) -> Pause | None:
    """Freeze a migration, supersede it, let it go on; None if it had no lock that could be lost."""
    await arena.empty()
    frozen = arena.worker
    executor = msr.MigrationScriptExecutor.from_url(arena.url, locking={"wait": 60})
    rig = Rig(without=trial.holder, at=step.at, nth=step.nth, bounds=UNBOUNDED)
    end = frozen.migrate(folder, rig)
    if step.at is None:
        await anyio.sleep(random.uniform(0, LONGEST_RUN))
        frozen.freeze()
    if not await frozen.stands(end):
        return None
    before = None if is_kept_out(arena.url) else await executor.get_lock_status()
    if before is None or before.process_id != frozen.pid:
        frozen.resume()
        await end
        return None

    late = 0.0
    superseded, ended = anyio.Event(), anyio.Event()

    async def succeed() -> None:
        nonlocal late
        async with executor.lock():
            after = await executor.get_lock_status()
            assert after is not None
            assert after.locked_at is not None
            assert before.expires_at is not None
            late = (after.locked_at - before.expires_at).total_seconds()
            superseded.set()
            await ended.wait()

    async def look() -> None:
        """Without the end of its session, the holder keeps its successor waiting till it ends."""
        while not superseded.is_set():
            await anyio.sleep(0.1)
            status = await executor.get_lock_status()
            if status is not None and status.token != before.token:
                superseded.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(succeed)
        if ENDING in trial.successor:
            tasks.start_soon(look)
        must = step.at is not None
        with anyio.move_on_after(PATIENCE if must else GIVES_UP):
            await superseded.wait()
        counts = superseded.is_set() and late >= 0  # else its release was on its way already
        frozen.resume()
        name = await end
        ended.set()
    if not counts:
        assert not must, f"nobody took the lock of a holder frozen {step.at}"
        return None
    if not step.slow:  # whose script has no transaction
        history = "SELECT version FROM schema_version WHERE status = 'applied' ORDER BY version"
        done = await fetch(arena.url, "SELECT version FROM work ORDER BY version")
        assert done == await fetch(arena.url, history)
    return Pause(name, await count_violations(arena.url), late)


async def fight(
    ring: Sequence[Arena], turns: int, trial: Trial, scripts: dict[bool, Path]
) -> list[Pause]:
    """`turns` pauses in each arena of the ring, which take the steps one after the other."""
    steps = trial.steps(ring[0].url)
    pauses = []

    async def take_turns(arena: Arena) -> None:
        for _ in range(turns):
            result = None
            while result is None:
                step = next(steps)
                result = await pause(arena, step, scripts[step.slow], trial)
            pauses.append(result)

    async with anyio.create_task_group() as tasks:
        for arena in ring:
            tasks.start_soon(take_turns, arena)
    return pauses


async def try_all(
    trials: Sequence[Trial], ring: Sequence[Arena], turns: int, scripts: dict[bool, Path]
) -> list[list[Pause]]:
    """The pauses of each trial; those before the same successor go on side by side."""
    found: dict[int, list[Pause]] = {}

    async def run(number: int, places: Sequence[Arena]) -> None:
        found[number] = await fight(places, turns, trials[number], scripts)

    phases = itertools.groupby(range(len(trials)), key=lambda number: trials[number].successor)
    for successor, numbers in phases:
        free = iter(ring)
        with pytest.MonkeyPatch.context() as patch:
            for mechanism in successor:
                switch_off(mechanism, patch.setattr)
            async with anyio.create_task_group() as tasks:
                for number in numbers:
                    places = list(itertools.islice(free, trials[number].arenas))
                    tasks.start_soon(run, number, places)
    return [found[number] for number in range(len(trials))]


@pytest.mark.timeout(rounds(120, 900))
async def test_nothing_commits_under_a_superseded_token(
    database_url: str, scripts: dict[bool, Path], figures: Figures
) -> None:
    """S2: wherever it stood, each layer keeps a superseded holder out by itself; without, it is in.

    Whoever was superseded hears of it, and ends with `LockLostError`.
    """
    trials = TRIALS[parse_url(database_url).dialect]
    async with arenas(database_url, scripts[False], ARENAS, timeout=LEASE) as ring:
        found = await try_all(trials, ring, rounds(1, 38), scripts)
    counts = []
    for trial, pauses in zip(trials, found, strict=True):
        violated = sum(pause.violations > 0 for pause in pauses)
        counts.append(f"{violated} of {len(pauses)}")
        if trial.is_control:
            assert violated > len(pauses) * 0.05
        else:
            assert violated == 0
    assert {pause.end for pause in found[0]} == {"LockLostError"}
    text = f"{len(found[0])}, 0 (control: {counts[-1]}; one layer alone: {', '.join(counts[1:-1])})"
    figures.record("pauses past the lease, commits under a superseded token", database_url, text)


@pytest.mark.alone
@pytest.mark.timeout(rounds(60, 300))
async def test_a_frozen_holder_is_succeeded_in_time(
    database_url: str, scripts: dict[bool, Path], figures: Figures
) -> None:
    """L3: another has the lock within two seconds of the end of the lease."""
    async with arenas(database_url, scripts[False], 2, timeout=LEASE) as ring:
        [pauses] = await try_all([Trial(2)], ring, rounds(1, 20), scripts)
    late = [pause.late for pause in pauses]
    what = "takeover from a frozen holder, after its lease ran out"
    figures.record_times(what, database_url, late)
    assert 0 < min(late) <= max(late) < TAKEOVER


# Real commands

UNFINISHED, HELD, LOST = 2, 8, 9


@dataclass(frozen=True)
class End:
    """The exit codes of the one that was frozen and of the follower, and what each applied."""

    code: int
    follower: int = 0
    applied: int = 0


ENDS: dict[str, dict[Step, End]] = {
    "postgresql": {
        Step("before body"): End(LOST),
        Step("before commit"): End(LOST),
        Step("after commit"): End(LOST, applied=1),
        Step("before renew", slow=True): End(LOST, follower=UNFINISHED),
        Step("after release"): End(0, applied=2),
    },
    "sqlite": {
        Step("before begin"): End(LOST),
        Step("before commit"): End(0, follower=HELD, applied=2),
        Step("after commit"): End(LOST, applied=1),
        Step("before renew", slow=True): End(LOST, follower=UNFINISHED),
        Step("after release"): End(0, applied=2),
    },
}


OVER = {
    "postgresql": "SELECT 1 FROM migration_locks WHERE expires_at > clock_timestamp()",
    "sqlite": "SELECT 1 FROM migration_locks"
    " WHERE expires_at > strftime('%Y-%m-%dT%H:%M:%fZ', 'now')",
}
"""Finds nothing when the lease is over, or the lock free."""


@pytest.mark.timeout(120)
def test_a_frozen_migration_says_how_it_ended(
    database_url: str, tmp_path: Path, scripts: dict[bool, Path]
) -> None:
    """It says that it lost the lock, and claims what it had committed before, and nothing else.

    An open transaction on SQLite keeps everybody else out: then nothing was lost. It runs without
    a watch, and mostly without a heartbeat: a lease so short can run out before it stands.
    """
    endless = (
        "import asyncio\n\ntransaction = False\n\nasync def up(db):\n    await asyncio.sleep(99)\n"
    )
    folders = {**scripts, True: write_scripts(tmp_path / "endless", {"V1_one.py": endless})}
    dialect = parse_url(database_url).dialect
    ends = ENDS[dialect]
    urls = asyncio.run(make_places(database_url, len(ends), scripts[False]))
    frozen, followers = [], []
    for url, step in zip(urls, ends, strict=True):
        without = ["watch"] if step.slow else [*UNAWARE]
        rig = Rig(without=without, at=step.at, nth=step.nth, bounds=UNBOUNDED)
        frozen.append(start_migrate(url, folders[step.slow], rig=rig, timeout=LEASE))
    for url, process in zip(urls, frozen, strict=True):
        wait_until(functools.partial(is_stopped, process.pid))
        wait_until(lambda: not query(url, OVER[dialect]))  # noqa: B023
    for url, (step, end) in zip(urls, ends.items(), strict=True):
        wait = 1 if end.follower == HELD else 60
        followers.append(start_migrate(url, folders[step.slow], wait=wait))
    codes = [finish(process).exit_code for process in followers]
    assert codes == [end.follower for end in ends.values()]
    for process in frozen:
        os.killpg(process.pid, signal.SIGCONT)
    for url, (step, end), process in zip(urls, ends.items(), frozen, strict=True):
        result = finish(process)
        assert (step, result.exit_code, result.stdout.count("Applied ")) == (
            step,
            end.code,
            end.applied,
        )
        *warnings, last = result.stderr.splitlines() or [""]
        assert last.startswith("✗ Error: " if end.code else "")
        assert all(line.startswith("⚠️  Warning: ") for line in warnings), result.stderr
        assert applied(url) == ([1, 2] if not step.slow else [])
        assert query(url, "SELECT version FROM work ORDER BY 1") == (
            [(1,), (2,)] if not step.slow else []
        )


# In the middle of a statement

TURNSTILE = 7
"""The first half of an advisory lock's key; the second one is the number of the place."""

AT_TURNSTILE = f"locktype = 'advisory' AND classid = {TURNSTILE} AND objid = {{number}}"

BEFORE_ACQUIRE = """
CREATE TRIGGER turnstile BEFORE UPDATE ON migration_locks FOR EACH ROW
WHEN (OLD.locked_by IS NULL AND NEW.locked_by IS NOT NULL) EXECUTE FUNCTION wait_in_line()
"""
BEFORE_COMMIT = """
CREATE CONSTRAINT TRIGGER turnstile AFTER INSERT ON schema_version DEFERRABLE INITIALLY DEFERRED
FOR EACH ROW WHEN (NEW.version = 1) EXECUTE FUNCTION wait_in_line()
"""


async def freeze_in_statement(
    url: str, number: int, folder: Path, trigger: str, goes_through: bool
) -> Result:
    """How a migration ends whose statement was done, or not, before its lease was over.

    The statement waits in the server until the client stands. Then it is let through, or only
    after another has the lock. That other one applies the rest. The lease is ended by hand: it
    must not run out before the client stands.
    """
    function = f"""
        CREATE FUNCTION wait_in_line() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN PERFORM pg_advisory_xact_lock_shared({TURNSTILE}, {number}); RETURN NEW; END $$
    """
    await fetch(url, function, trigger)
    keeper = await asyncpg.connect(parse_url(url).dsn)
    await keeper.execute(f"SELECT pg_advisory_lock({TURNSTILE}, {number})")
    frozen = start_migrate(url, folder, rig=Rig(bounds=UNBOUNDED))
    waits = f"SELECT 1 FROM pg_locks WHERE NOT granted AND {AT_TURNSTILE.format(number=number)}"
    await wait_until_async(functools.partial(keeper.fetch, waits))
    frozen.send_signal(signal.SIGSTOP)
    await wait_until_async(functools.partial(anyio.to_thread.run_sync, is_stopped, frozen.pid))
    if goes_through:
        await keeper.execute("SELECT pg_advisory_unlock_all()")
        done = f"SELECT 1 FROM migration_locks WHERE process_id = {frozen.pid}"
        if trigger == BEFORE_COMMIT:
            done = "SELECT 1 FROM schema_version"
        await wait_until_async(functools.partial(keeper.fetch, done))
    await keeper.execute("UPDATE migration_locks SET expires_at = locked_at")
    executor = msr.MigrationScriptExecutor.from_url(url, folder=folder, locking={"wait": 60})
    successor = asyncio.create_task(executor.migrate())
    if not goes_through:
        held = f"SELECT 1 FROM migration_locks WHERE process_id = {os.getpid()}"
        await wait_until_async(functools.partial(keeper.fetch, held))
    await keeper.close()
    await successor
    frozen.send_signal(signal.SIGCONT)
    return await anyio.to_thread.run_sync(finish, frozen)


@pytest.mark.timeout(120)
async def test_what_was_done_while_it_stood_is_found_out(
    postgres_url: str, scripts: dict[bool, Path]
) -> None:
    """A lock that was got without its knowing is lost; a commit is claimed if it was one.

    The two commits differ in nothing but that, so each is the other's control.
    """
    cases = [(BEFORE_ACQUIRE, True), (BEFORE_COMMIT, True), (BEFORE_COMMIT, False)]
    urls = await make_places(postgres_url, len(cases), scripts[False])
    results = await asyncio.gather(
        *(
            freeze_in_statement(url, number, scripts[False], *case)
            for number, (url, case) in enumerate(zip(urls, cases, strict=True))
        )
    )
    claims = [("V1_one" in result.stdout, "V2_two" in result.stdout) for result in results]
    assert claims == [(False, False), (True, False), (False, False)]
    for url, result, (claimed, _) in zip(urls, results, claims, strict=True):
        assert result.exit_code == LOST, result
        assert result.stderr.splitlines()[-1].startswith("✗ Error: "), result
        assert "Traceback" not in result.stderr
        history = "SELECT version, executed_by LIKE '%-{}-%' FROM schema_version ORDER BY 1"
        rows = await fetch(url, history.format(os.getpid()))
        assert rows == [(1, not claimed), (2, True)]
        assert await fetch(url, "SELECT version FROM work ORDER BY 1") == [(1,), (2,)]


# Slow, and not frozen

LONG_LEASE = 9
"""Seconds: one that is renewed in time by a process that stood still for four of them."""


def test_a_slow_migration_keeps_its_lock(database_url: str, tmp_path: Path) -> None:
    """A script that takes longer than the lease, in a transaction or outside, is nobody else's.

    A third one without a heartbeat shows what keeps it.
    """
    opened = tmp_path / "opened"
    slow = """
        import asyncio, pathlib

        transaction = {transaction}

        async def up(db):
            await db.execute("INSERT INTO work VALUES (1)")
            while not pathlib.Path({opened!r}).exists():
                await asyncio.sleep(0.02)
    """
    inside, outside = (
        write_scripts(
            tmp_path / str(transaction),
            {"V1_slow.py": slow.format(transaction=transaction, opened=str(opened))},
        )
        for transaction in (True, False)
    )
    urls = asyncio.run(make_places(database_url, 3))
    folders = [inside, outside, outside]
    first = [
        start_migrate(urls[0], inside, timeout=LONG_LEASE),
        start_migrate(urls[1], outside, timeout=LONG_LEASE),
        start_migrate(urls[2], outside, rig=Rig(without=UNAWARE), timeout=LEASE),
    ]
    for url in urls:
        wait_until(lambda: lock_row(url)[1])  # noqa: B023
    held = time.monotonic()
    second = [start_migrate(url, folder) for url, folder in zip(urls, folders, strict=True)]
    for process in second[:2]:
        wait_for_waiting(process)
    wait_until(lambda: lock_row(urls[2])[0] > 1)
    time.sleep(max(0.0, held + LONG_LEASE + 1 - time.monotonic()))  # it has polled since
    opened.touch()
    *kept, lost = [finish(process) for process in first]
    *waited, stopped = [finish(process) for process in second]
    for url, winner, other in zip(urls, kept, waited, strict=False):
        assert (winner.exit_code, winner.stdout.count("Applied ")) == (0, 1), winner
        assert (other.exit_code, other.stdout.count("Applied ")) == (0, 0), other
        assert query(url, "SELECT version FROM work") == [(1,)]
        assert query(url, "SELECT token FROM schema_version") == [(1,)]
    assert (lost.exit_code, stopped.exit_code) == (LOST, UNFINISHED), (lost, stopped)
