"""SIGTERM, as an orchestrator sends it, and SIGINT, as Ctrl-C does, wherever a run is.

A run sends itself the signal at the step, so that it arrives exactly there.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import pytest

from tests.support.arena import make_places
from tests.support.cli import wait_until, write_scripts
from tests.support.figures import LONG
from tests.support.holder import Gate, hold_lock
from tests.support.migrations import (
    applied,
    finish,
    finish_in_one_line,
    lock_row,
    start_migrate,
    wait_for_waiting,
)
from tests.support.queries import query
from tests.support.rig import STEPS, Rig

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}

SCRIPTS = {
    "V1_first.sql": "INSERT INTO work VALUES (1);",
    "V2_second.py": """
        import asyncio, pathlib

        async def up(db):
            await db.execute("INSERT INTO work VALUES (2)")
            while pathlib.Path("{endless}").exists():
                await asyncio.sleep(0.01)
        """,
}

ENDLESS = "endless"
"""As long as there is this file, the second script of some runs does not end."""

ONCE = ("acquire", "renew", "release", "free")
"""What a run does once; the other steps it takes for each script, and the second one counts."""

pytestmark = pytest.mark.timeout(180)


def write(folder: Path, step: str) -> Path:
    """Two scripts; where the heartbeat has to come to the step, the second does not end."""
    endless = folder / "not there"
    if step == "renew":
        endless = folder / ENDLESS
        endless.touch()
    return write_scripts(
        folder / step,
        {name: text.replace("{endless}", str(endless)) for name, text in SCRIPTS.items()},
    )


def places_and_signals() -> Sequence[tuple[str, str, signal.Signals]]:
    """Where a signal comes, and which; in the short form each step is met by one of the two."""
    everywhere = list(product(("before", "after"), STEPS))
    if LONG:
        return [(*place, number) for place in everywhere for number in CODES]
    both = list(CODES)
    return [(*place, both[index % 2]) for index, place in enumerate(everywhere)]


def test_a_signal_at_each_step(database_url: str, tmp_path: Path) -> None:
    """Undone, or kept and told; released; the right exit code, one line; the next run completes.

    After the last commit a signal comes too late to undo anything, and the run may still succeed.
    """
    cases = places_and_signals()
    urls = asyncio.run(make_places(database_url, len(cases)))
    runs = []
    for url, (when, step, number) in zip(urls, cases, strict=True):
        rig = Rig(at=f"{when} {step}", send=number, nth=1 if step in ONCE else 2)
        runs.append(start_migrate(url, write(tmp_path, step), rig=rig))
    for url, (when, step, number), run in zip(urls, cases, runs, strict=True):
        end = finish(run)
        done = applied(url)
        where = f"{when} {step}: {end}"
        told = [line.split()[2][:2] for line in end.stdout.splitlines() if "Applied" in line]
        assert told == [f"V{version}" for version in done], where
        assert query(url, "SELECT version FROM work ORDER BY 1") == [(it,) for it in done], where
        assert lock_row(url)[1] is None, where
        interrupted = (
            f"✗ Error: interrupted by {number.name}: what ran in a transaction is undone\n"
        )
        if done == [1, 2] and end.exit_code == 0:
            assert end.stderr == "", where
        else:
            assert (end.exit_code, end.stderr) == (CODES[number], interrupted), where
    (tmp_path / ENDLESS).unlink()
    runs = [
        start_migrate(url, tmp_path / step) for url, (_, step, _) in zip(urls, cases, strict=True)
    ]
    for url, run in zip(urls, runs, strict=True):
        assert finish(run).exit_code == 0
        assert query(url, "SELECT version FROM work ORDER BY 1") == [(1,), (2,)]


@pytest.mark.parametrize("number", CODES)
def test_a_signal_while_it_waits(database_url: str, tmp_path: Path, number: signal.Signals) -> None:
    """It ends at once, and leaves the lock to who has it."""
    folder = write_scripts(tmp_path / "scripts", {"V1_t.sql": "CREATE TABLE t (id INTEGER);"})
    with hold_lock(database_url) as holder:
        waiter = start_migrate(database_url, folder)
        wait_for_waiting(waiter)
        waiter.send_signal(number)
        end = finish_in_one_line(waiter)
        assert end.exit_code == CODES[number]
        assert lock_row(database_url)[1] == holder.locked_by
        assert holder.release() == 0


def interrupt_at_gate(
    url: str, tmp_path: Path, number: signal.Signals, rig: Rig | None = None
) -> subprocess.Popen[str]:
    """A migration in the middle of a script: it, and what it started, get the signal as a group."""
    gate = Gate(tmp_path)
    # asyncio would have a word to say of one that ends when the loop has.
    child = "import subprocess; subprocess.Popen(['sleep', '60'])"
    folder = write_scripts(tmp_path / "scripts", {"V1_gate.py": gate.script(before=child)})
    migration = start_migrate(url, folder, rig=rig)
    gate.wait()
    os.killpg(migration.pid, number)
    return migration


def test_ctrl_c_at_a_terminal(database_url: str, tmp_path: Path) -> None:
    """The whole process group gets it, with a program that the script has started."""
    end = finish(interrupt_at_gate(database_url, tmp_path, signal.SIGINT))
    assert (end.exit_code, end.stderr.count("\n")) == (130, 1), end
    assert lock_row(database_url)[1] is None


def test_control_a_signal_that_nobody_handles(database_url: str, tmp_path: Path) -> None:
    """Left to its default, the signal leaves the lock on the row for the next one to take over."""
    rig = Rig(without=["signal handler"])
    end = finish(interrupt_at_gate(database_url, tmp_path, signal.SIGTERM, rig))
    assert (end.exit_code, end.stderr) == (-signal.SIGTERM, "")
    wait_until(lambda: lock_row(database_url)[1] is not None)
