"""Processes whose clock is wrong, by an hour, either way.

libfaketime gives a process the wrong time. It would do so for the monotonic clock too, by which no
wrong clock ever goes: the kernel's own waits go by the real one, and a program that compares the
two waits for an hour or not at all. So that clock is left alone (`--exclude-monotonic`).
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

from tests.support.arena import count_violations, install_detector, make_places
from tests.support.cli import PATIENCE, start_msr, wait_until, write_scripts
from tests.support.holder import Gate, hold_lock
from tests.support.migrations import applied, finish, start_migrate
from tests.support.queries import query
from tests.support.rig import UNAWARE, Rig, is_stopped
from tests.support.tools import find

HOUR = 3600
RIGHT, AHEAD, BEHIND = 0, HOUR, -HOUR
"""How many seconds a process's clock is ahead."""

LEASE = 600
"""Seconds: the default. A slow machine takes some of it, no wrong clock takes less than an hour."""

UNFINISHED, HELD, LOST = 2, 8, 9
"""Exit codes."""

DATABASE_CLOCK = ["database clock"]

pytestmark = pytest.mark.timeout(120)


def by_clock(seconds: int) -> list[str]:
    """What to put before a command so that its clock is so many seconds ahead."""
    if seconds == RIGHT:
        return []
    return [find("faketime", "faketime"), "--exclude-monotonic", "-f", f"{seconds:+}s"]


def migrate(
    url: str, folder: Path, clock: int, without: Sequence[str] = (), **locking: object
) -> subprocess.Popen[str]:
    """`msr migrate` by that clock."""
    rig = Rig(without=without) if without else None
    return start_migrate(url, folder, rig=rig, prefix=by_clock(clock), **locking)


def one_script(folder: Path, text: str) -> Path:
    return write_scripts(folder, {"V1_one.py": text})


# PostgreSQL: nothing changes

PAIRS = [(AHEAD, RIGHT), (BEHIND, RIGHT), (RIGHT, AHEAD), (RIGHT, BEHIND)]
"""The clocks of a holder, and of another who wants the lock."""


@pytest.mark.parametrize(
    ("without", "pairs", "robbed"),
    [([], PAIRS, []), (DATABASE_CLOCK, PAIRS[1:3], PAIRS[1:3])],
    ids=["the database's clock", "the client's clock"],
)
def test_a_wrong_clock_robs_nobody(
    postgres_url: str,
    tmp_path: Path,
    without: Sequence[str],
    pairs: Sequence[tuple[int, int]],
    robbed: Sequence[tuple[int, int]],
) -> None:
    """S6: it takes no valid lease, keeps its own, and writes and says the right time."""
    urls = asyncio.run(make_places(postgres_url, len(pairs)))
    gates, folders, holders, others, statuses = [], [], [], [], []
    for number, (url, (clock, _)) in enumerate(zip(urls, pairs, strict=True)):
        gates.append(Gate(tmp_path / str(number)))
        folders.append(one_script(tmp_path / str(number), gates[-1].script()))
        holders.append(migrate(url, folders[-1], clock, without if clock else ()))
    for gate in gates:
        gate.wait()
    if not without:
        skew = "SELECT extract(epoch FROM locked_at - clock_timestamp()),"
        skew += " extract(epoch FROM expires_at - clock_timestamp()) FROM migration_locks"
        for url in urls:
            [(locked, expires)] = query(url, skew)
            assert -LEASE < locked <= 0
            assert 0 < expires <= LEASE
    for url, folder, (_, clock) in zip(urls, folders, pairs, strict=True):
        others.append(migrate(url, folder, clock, without if clock else (), wait=0))
    if not without:
        look = partial(start_msr, "lock:status", "--url", urls[0])
        statuses = [look(prefix=by_clock(clock)) for clock in (RIGHT, AHEAD, BEHIND)]
    assert [finish(process).exit_code for process in others] == [HELD] * len(pairs)
    renewed = re.compile("Expires at: .*")  # which may happen between two of them
    said = [renewed.sub("Expires at:", finish(process).stdout) for process in statuses]
    assert all("Another migration is currently running." in text for text in said)
    assert said[1:] == said[:-1]
    for gate in gates:
        gate.open()
    ends = {pair: finish(process).exit_code for pair, process in zip(pairs, holders, strict=True)}
    assert [pair for pair, code in ends.items() if code] == robbed
    for url, pair in zip(urls, pairs, strict=True):
        assert applied(url) == ([] if pair in robbed else [1])
        written = f"SELECT abs(extract(epoch FROM started_at - clock_timestamp())) < {LEASE}"
        assert all(right for (right,) in query(url, f"{written} FROM schema_version"))


def test_a_wrong_clock_waits_no_longer_for_an_expired_lease(
    postgres_url: str, tmp_path: Path
) -> None:
    """L3: the lease of a frozen holder is over when the database says so; by its own clock, not.

    It is ended by hand: it must not run out before the holder stands.
    """
    cases = [(AHEAD, [], 0), (BEHIND, [], 0), (BEHIND, DATABASE_CLOCK, HELD)]
    folder = one_script(tmp_path, "async def up(db):\n    pass\n")
    urls = asyncio.run(make_places(postgres_url, len(cases)))
    rig = Rig(at="before body")
    frozen = [start_migrate(url, folder, rig=rig) for url in urls]
    for url, process in zip(urls, frozen, strict=True):
        wait_until(partial(is_stopped, process.pid))
        query(url, "UPDATE migration_locks SET expires_at = clock_timestamp()")
    followers = [
        migrate(url, folder, clock, without, wait=0 if code == HELD else PATIENCE)
        for url, (clock, without, code) in zip(urls, cases, strict=True)
    ]
    assert [finish(process).exit_code for process in followers] == [code for *_, code in cases]
    for process, (*_, code) in zip(frozen, cases, strict=True):
        os.killpg(process.pid, signal.SIGCONT)
        assert finish(process).exit_code == (0 if code == HELD else LOST)


# SQLite: the host's clock is the database's, and libfaketime gives each process a host of its own


@pytest.mark.parametrize("without", [[], ["fence", *UNAWARE]], ids=["fenced", "not"])
def test_on_sqlite_the_fence_needs_no_clock(
    sqlite_url: str, tmp_path: Path, without: Sequence[str]
) -> None:
    """S2: a clock that is ahead can end a valid lease there, but nobody commits under one that is.

    A host has one clock. Only two of them on one file could disagree, which SQLite is not for.
    """
    gate = Gate(tmp_path)
    folder = one_script(tmp_path / "scripts", f"transaction = False\n{gate.script()}")
    nothing = one_script(tmp_path / "nothing", "async def up(db):\n    pass\n")
    [url] = asyncio.run(make_places(sqlite_url, 1, nothing))
    asyncio.run(install_detector(url))
    holder = migrate(url, folder, RIGHT, without)
    gate.wait()
    other = migrate(url, folder, AHEAD, wait=PATIENCE)
    assert finish(other).exit_code == UNFINISHED, "it has taken the lock, and found the script"
    gate.open()
    assert finish(holder).exit_code == LOST, "whatever it did, the release tells"
    assert asyncio.run(count_violations(url)) == (1 if without else 0)


@pytest.mark.parametrize(
    ("without", "code"), [([], 0), (["proof of death"], HELD)], ids=["proof of death", "none"]
)
def test_on_sqlite_the_proof_of_death_needs_no_clock(
    sqlite_url: str, tmp_path: Path, without: Sequence[str], code: int
) -> None:
    """L2: a clock that is behind thinks the lease has long to go, and takes it over all the same.

    What it does not do is to take over from a holder that is frozen, for an hour more.
    """
    folder = one_script(tmp_path, "async def up(db):\n    pass\n")
    with hold_lock(sqlite_url) as holder:
        holder.kill()
        other = migrate(sqlite_url, folder, BEHIND, without, wait=0 if without else PATIENCE)
        assert finish(other).exit_code == code
