"""A network that says nothing: holders and waiters behind a proxy that falls silent or cuts.

A cut-off run learns nothing from the kernel or the server before its lease is over, so whatever it
knows, it knows by its own clock. Where nobody needs the end of a lease, it is ten minutes.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import msr
from tests.support.cli import PATIENCE, Result, wait_until, write_scripts
from tests.support.figures import LONG, Figures, rounds
from tests.support.holder import Gate, hold_lock
from tests.support.migrations import (
    applied,
    finish,
    finish_in_one_line,
    is_sleeping,
    start_migrate,
    wait_for_waiting,
)
from tests.support.proxy import Direction, Proxy
from tests.support.queries import query
from tests.support.rig import Rig

pytestmark = pytest.mark.timeout(180)

LEASE = 5
"""Seconds, of which a busy machine may keep a run from its processor for three."""

TAKEOVER = 2.0
"""Seconds after the lease in which a holder that is cut off is succeeded (L3)."""

FIRST = {"V1_first.sql": "CREATE TABLE work (id INTEGER);"}
SECOND = {"V2_second.sql": "INSERT INTO work VALUES (2);"}
LOST = "the migration lock was not renewed before its lease ran out"
UNKNOWN = "whether it was committed is not known"

LOOKS = 10
"""Attempts to look up a commit that take longer than the watch needs to see a session's end."""

GOODBYES = ("ROLLBACK_TIMEOUT", "CLOSE_TIMEOUT")
BRIEF = {} if LONG else {f"msr.handlers.postgres.{name}": 0.5 for name in GOODBYES}
"""How long a silent server is asked to roll back and to close, where time is short."""

OFTEN = {**BRIEF, "msr.locking.LONGEST_HEARTBEAT": 0.5}
"""Renewed so often, a lease is never far from its full length."""


@pytest.fixture
def url(postgres_url: str, tmp_path: Path) -> str:
    """A database with the tables of msr, in which the first script has been applied."""
    asyncio.run(msr.migrate(postgres_url, folder=write_scripts(tmp_path / "first", FIRST)))
    return postgres_url


@pytest.fixture
def proxy(url: str) -> Iterator[Proxy]:
    """A way to that database which may fail."""
    with Proxy(url) as proxy:
        yield proxy


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The first script, and a second one that is quick."""
    return write_scripts(tmp_path / "scripts", {**FIRST, **SECOND})


# The holder is cut off


@pytest.mark.parametrize(
    ("doing", "without"),
    [
        pytest.param("idle", [], marks=pytest.mark.alone),
        pytest.param("in a statement", [], marks=pytest.mark.alone),
        ("idle", ["watch"]),
    ],
    ids=["idle", "in a statement", "idle, without the watch"],
)
def test_a_holder_that_is_cut_off(
    url: str,
    proxy: Proxy,
    folder: Path,
    tmp_path: Path,
    doing: str,
    without: list[str],
    figures: Figures,
) -> None:
    """L3: it ends by itself, and another has done its work within lease + 2 s, exactly once.

    Without the watch it works on, beside its successor.
    """
    gate, worked_on = Gate(tmp_path), tmp_path / "worked-on"
    body = gate.script(
        before="await db.execute('INSERT INTO work VALUES (1)')",
        after=f"pathlib.Path({str(worked_on)!r}).touch()",
    )
    slow = {"V2_second.py": body}
    if doing == "in a statement":
        slow = {"V2_second.sql": "INSERT INTO work VALUES (1);\nSELECT pg_sleep(60);"}
    slow_folder = write_scripts(tmp_path / "slow", {**FIRST, **slow})
    rig = Rig(without=without, bounds=OFTEN)
    holder = start_migrate(proxy.url, slow_folder, rig=rig, timeout=LEASE)
    if doing == "idle":
        gate.wait()
    else:
        wait_until(partial(is_sleeping, url))
    successor = start_migrate(url, folder)
    wait_for_waiting(successor)
    proxy.silence()
    silent = time.monotonic()
    wait_until(lambda: applied(url) == [1, 2], interval=0.01)
    took = time.monotonic() - silent
    assert finish(successor).exit_code == 0
    gate.open()
    if without:
        wait_until(worked_on.exists)
        assert holder.poll() is None
    else:
        end = finish_in_one_line(holder)
        assert (end.exit_code, end.stdout) == (9, "")
        assert LOST in end.stderr
        assert not worked_on.exists()
        assert took < LEASE + TAKEOVER
        figures.record(f"takeover, holder cut off while {doing}", url, f"{took * 1000:.0f} ms")
    assert query(url, "SELECT id FROM work") == [(2,)]


@pytest.mark.parametrize("without", [[], ["heartbeat"]][: rounds(1, 2)])
def test_an_outage_shorter_than_the_lease(
    url: str, proxy: Proxy, tmp_path: Path, without: list[str]
) -> None:
    """A long script outside a transaction goes on, and its lock is renewed when it is over.

    Without the heartbeat the lock is lost.
    """
    lease = 15 if without else 60
    gate = Gate(tmp_path)
    body = f"transaction = False\n{gate.script()}"
    folder = write_scripts(tmp_path / "scripts", {**FIRST, "V2_second.py": body})
    run = start_migrate(proxy.url, folder, rig=Rig(without=without, bounds=OFTEN), timeout=lease)
    gate.wait()
    if without:
        proxy.silence()
        assert finish_in_one_line(run).exit_code == 9
        return
    renewed = "SELECT FROM migration_locks WHERE renewed_at > {}"
    wait_until(lambda: query(url, renewed.format("locked_at")))
    before = proxy.connections
    proxy.silence()
    wait_until(lambda: proxy.connections > before)  # it has given up on the one that it had
    proxy.resume()
    [[now]] = query(url, "SELECT clock_timestamp()")
    wait_until(lambda: query(url, renewed.format(f"'{now}'")))
    gate.open()
    end = finish_in_one_line(run)
    assert end.exit_code == 0, end.stderr
    assert applied(url) == [1, 2]


# A waiter is cut off


BOUND = 4
"""Seconds, which are enough for an answer on a busy machine."""


@pytest.mark.parametrize("bound", [BOUND, 600])
def test_a_waiter_that_is_cut_off(url: str, proxy: Proxy, folder: Path, bound: float) -> None:
    """It gives up when one attempt has not been answered for fifteen seconds, here for four.

    Without that bound it waits for the network, however long, and then for the lock.
    """
    rig = Rig(bounds={**BRIEF, "msr.locking.ATTEMPT_BOUND": bound})
    with hold_lock(url) as holder:
        waiter = start_migrate(proxy.url, folder, rig=rig)
        wait_for_waiting(waiter)
        proxy.silence()
        if bound == BOUND:
            end = finish_in_one_line(waiter)
            assert (end.exit_code, end.stdout) == (7, "")
            assert "did not answer within 4 s" in end.stderr
            return
        with pytest.raises(subprocess.TimeoutExpired):
            finish(waiter, timeout=BOUND + 2)
        holder.release()
    proxy.resume()
    assert finish(waiter).exit_code == 0
    assert applied(url) == [1, 2]


# In the middle of COMMIT

COMMIT = b"COMMIT;"
COMMITTED = b"COMMIT\0"
"""What the client sends, and what the server answers."""


def lose_commit(proxy: Proxy, what: str, how: str, new: bool) -> threading.Event:
    """Arm the proxy to lose the COMMIT or its answer; what it returns is set when it has."""
    lost = threading.Event()
    way: Direction = "to server" if what == "the COMMIT" else "to client"

    def lose() -> None:
        if how == "silent":
            proxy.silence(way, new=True)
        else:
            proxy.cut(new=new)
        lost.set()

    answered = how == "cut" and what == "the answer"
    proxy.when("to client" if answered else "to server", COMMITTED if answered else COMMIT, lose)
    return lost


def is_expired(url: str) -> bool:
    """Whether nobody has the lock, or only in name."""
    held = "SELECT FROM migration_locks WHERE expires_at > clock_timestamp()"
    return not query(url, held)


def claim(end: Result) -> str:
    """What a run says of the second script."""
    if "Applied V2_second.sql" in end.stdout:
        return "applied"
    return "unknown" if UNKNOWN in end.stderr else "undone"


@pytest.mark.parametrize(
    ("how", "what", "lookup", "without"),
    [
        ("cut", "the COMMIT", True, []),
        ("cut", "the answer", True, []),
        ("silent", "the COMMIT", True, []),
        ("silent", "the answer", True, []),
        ("cut", "the COMMIT", False, []),
        ("silent", "the answer", False, []),
        *([("cut", "the answer", False, []), ("silent", "the COMMIT", False, [])] if LONG else []),
        ("cut", "the COMMIT", True, ["look before applied"]),
        ("cut", "the answer", True, ["look before rolled back"]),
    ],
)
def test_a_commit_that_is_lost(
    url: str, proxy: Proxy, folder: Path, how: str, what: str, lookup: bool, without: list[str]
) -> None:
    """It is reported as what it was, or as unknown; and when another has run, it is done once.

    `lookup`: the network is there again in time to look. Without a look the report is a guess.
    """
    lost = lose_commit(proxy, what, how, new=not lookup)
    # As long as the network is to come back, it has to look.
    rig = Rig(
        without=without, bounds={**OFTEN, "msr.unit.RESOLVE_BOUND": PATIENCE if lookup else 0.6}
    )
    # Nobody but the end of its lease tells it of a silent network.
    holder = start_migrate(proxy.url, folder, rig=rig, timeout=LEASE if how == "silent" else 600)
    assert lost.wait(PATIENCE)
    truth = "undone"
    if what == "the answer":
        truth = "applied"
        wait_until(lambda: applied(url) == [1, 2])
    assert finish(start_migrate(url, folder)).exit_code == 0
    if how == "silent" and lookup:
        wait_until(partial(is_expired, url))
        proxy.resume()  # with it come the lost messages after all, late
    end = finish_in_one_line(holder)
    if without:
        assert claim(end) != truth
    else:
        assert claim(end) == (truth if lookup else "unknown")
        assert end.exit_code in ({0, 9} if claim(end) == "applied" else {3, 9})
    assert applied(url) == [1, 2]
    assert query(url, "SELECT id FROM work") == [(2,)]


def test_a_server_that_is_away_after_a_commit(url: str, proxy: Proxy, folder: Path) -> None:
    """The run ends with what became of its script, not with the loss of the session it noticed."""
    lost = lose_commit(proxy, "the COMMIT", "cut", new=True)
    run = start_migrate(proxy.url, folder, rig=Rig(bounds={"msr.unit.RESOLVE_BOUND": PATIENCE}))
    assert lost.wait(PATIENCE)
    wait_until(lambda: proxy.refused >= LOOKS)
    proxy.resume()
    end = finish_in_one_line(run)
    assert end.exit_code == 3, end
    assert "the script was rolled back" in end.stderr
    assert applied(url) == [1]


def test_a_commit_that_the_server_refuses(url: str, proxy: Proxy, tmp_path: Path) -> None:
    """Then nothing is unknown, so nothing is looked up: the run had one connection."""
    refused = """
        CREATE TABLE late (id INTEGER UNIQUE DEFERRABLE INITIALLY DEFERRED);
        INSERT INTO late VALUES (1), (1);
    """
    folder = write_scripts(tmp_path / "scripts", {**FIRST, "V2_refused.sql": refused})
    # After a second the heartbeat would connect, too.
    run = start_migrate(proxy.url, folder, rig=Rig(without=["heartbeat"]))
    end = finish_in_one_line(run)
    assert end.exit_code == 3
    assert "the script was rolled back" in end.stderr
    assert proxy.connections == 1


# Without anybody's FIN


async def test_the_kernel_looks_for_the_server(postgres_url: str) -> None:
    """A server that vanished is noticed by the kernel: while idle, and with our words unanswered.

    Neither asyncpg nor Linux does that by itself before hours are over.
    """
    handler = msr.PostgresHandler(postgres_url)
    async with handler.connect(msr.Config()) as session:
        transport: Any = session.connection._transport
        sock = transport.get_extra_info("socket")
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        idle, interval, count = (
            sock.getsockopt(socket.IPPROTO_TCP, option)
            for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        )
        assert idle + interval * count <= 30
        assert 0 < sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) <= 30_000
