"""What happens to an SQLite database as a file: containers, full disks, readers, torn commits."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from tests.support.cli import wait_until, write_scripts
from tests.support.databases import path_of
from tests.support.figures import rounds
from tests.support.holder import LOST, Gate, hold_lock
from tests.support.migrations import (
    applied,
    finish,
    finish_in_one_line,
    start_migrate,
    wait_for_waiting,
)
from tests.support.queries import query
from tests.support.rig import UNAWARE, Rig, is_stopped
from tests.support.tools import missing

OURSELVES = ("--user", "--map-root-user") if os.geteuid() else ()
"""Who is not root may make namespaces too, in a user namespace of his own."""

CONTAINER = ("unshare", *OURSELVES, "--pid", "--fork", "--kill-child", "--mount-proc")
"""Runs a command as process 1 of a pid namespace of its own, as a container does."""

TABLE = "CREATE TABLE work (id INTEGER PRIMARY KEY, done INTEGER DEFAULT 0, filler BLOB);"


def add_rows(number: int) -> str:
    """A statement that adds rows of some 4 kB each."""
    return (
        f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {number}) "
        "INSERT INTO work (filler) SELECT randomblob(4000) FROM n;"
    )


def migrate(url: str, folder: Path) -> None:
    """The next run, which must succeed without waiting for a lease."""
    end = finish(start_migrate(url, folder, wait=20))
    assert end.exit_code == 0, end


def assert_whole(url: str, versions: Sequence[int]) -> None:
    """The history says these, and the file is sound."""
    assert applied(url) == versions
    assert query(url, "PRAGMA integrity_check") == [("ok",)]


def set_journal(url: str, journal: str) -> str:
    """Make the database, in rollback-journal (DELETE) or WAL mode."""
    assert query(url, f"PRAGMA journal_mode = {journal}") == [(journal.lower(),)]
    return url


in_both_modes = pytest.mark.parametrize("journal", ["DELETE", "WAL"])


# Containers


@pytest.fixture
def container() -> Sequence[str]:
    """`CONTAINER`, where the kernel lets us make one."""
    tried = subprocess.run([*CONTAINER, "true"], capture_output=True, text=True)
    if tried.returncode:
        missing(
            f"these tests need pid namespaces ({tried.stderr.strip()}): run them as root, or "
            "let this user make namespaces (sysctl kernel.unprivileged_userns_clone)"
        )
    return CONTAINER


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """One script that makes a table."""
    return write_scripts(tmp_path / "scripts", {"V1_table.sql": TABLE})


@pytest.mark.parametrize(("without", "exit_code"), [((), 8), (("lock file",), 0)])
def test_a_live_holder_in_another_container_keeps_the_lock(
    sqlite_url: str, table: Path, container: Sequence[str], without: Sequence[str], exit_code: int
) -> None:
    """There is no such process where the question is asked; the control believes that."""
    with hold_lock(sqlite_url) as holder:
        rig, wait = Rig(without=without), 30 if without else 0
        asking = start_migrate(sqlite_url, table, prefix=container, rig=rig, wait=wait)
        assert finish_in_one_line(asking).exit_code == exit_code
        assert holder.release() == (LOST if without else 0)


@pytest.mark.parametrize(("without", "exit_code"), [((), 0), (("lock file",), 8)])
def test_a_killed_holder_in_another_container_is_succeeded(
    sqlite_url: str, table: Path, container: Sequence[str], without: Sequence[str], exit_code: int
) -> None:
    """It was process 1, which there is in every container; the control takes that for life."""
    with hold_lock(sqlite_url, prefix=container) as holder:
        assert "-1-" in holder.locked_by
        holder.kill()
        rig, wait = Rig(without=without), 1 if without else 30
        asking = start_migrate(sqlite_url, table, prefix=container, rig=rig, wait=wait)
        assert finish(asking).exit_code == exit_code


# Full disks


class Disk:
    """A file system of 6 MB and 64 files, which only commands with its `prefix` can enter."""

    _QUERY = (
        "import json, sqlite3, sys\n"
        "db = sqlite3.connect(sys.argv[1], timeout=10, isolation_level=None)\n"
        "print(json.dumps(db.execute(sys.argv[2]).fetchall()))\n"
    )

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        mount = 'mount -t tmpfs -o size=6m,nr_inodes=64 msr "$0" && echo ready && exec cat'
        self._keeper = subprocess.Popen(
            ["unshare", *OURSELVES, "--mount", "sh", "-c", mount, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self._keeper.stdout is not None
        told = self._keeper.stdout.readline()
        if told != "ready\n":
            self.close()
            missing(
                f"these tests need a small disk, and none can be mounted ({told.strip()}): run "
                "them as root, or let this user make namespaces"
            )
        pid = self._keeper.pid
        self.prefix = ["nsenter", f"--mount=/proc/{pid}/ns/mnt", f"--wd={folder.parent}"]
        if OURSELVES:
            self.prefix += [f"--user=/proc/{pid}/ns/user", "--preserve-credentials"]
        self._database = str(folder / "app.db")
        self.url = f"sqlite:///{self._database}"
        self._outside = Path(f"/proc/{pid}/root{folder}")

    def query(self, statement: str) -> list[list[object]]:
        """The rows of a statement, run in there."""
        command = [*self.prefix, sys.executable, "-c", self._QUERY, self._database, statement]
        rows: list[list[object]] = json.loads(subprocess.check_output(command))
        return rows

    def fill(self, *, leave: int) -> None:
        """Leave so many bytes."""
        state = os.statvfs(self._outside)
        (self._outside / "filler").write_bytes(b"x" * (state.f_bavail * state.f_frsize - leave))

    def fill_with_files(self, *, leave: int) -> None:
        """Leave room for so many more files, whatever there is inside of them."""
        for number in range(os.statvfs(self._outside).f_favail - leave):
            (self._outside / f"filler-{number}").touch()

    def empty(self) -> None:
        """Take away what filled it."""
        for path in self._outside.glob("filler*"):
            path.unlink()

    def close(self) -> None:
        """Nobody is in it any more, so it is gone."""
        self._keeper.communicate()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A disk that a test may fill."""
    disk = Disk(tmp_path / "disk")
    yield disk
    disk.close()


@in_both_modes
@pytest.mark.parametrize(
    ("place", "rows"),
    [("in a statement", 800), ("in its commit", 200), ("outside a transaction", 800)],
)
def test_a_full_disk(disk: Disk, tmp_path: Path, journal: str, place: str, rows: int) -> None:
    """S7: the script is undone and its error says why; with more room the next run does it.

    What fits into the page cache is written by COMMIT. The control runs the script outside of a
    transaction, and leaves half of it.
    """
    control = place == "outside a transaction"
    disk.query(f"PRAGMA journal_mode = {journal}")
    work = f"INSERT INTO work (id) VALUES (1000);\n{add_rows(rows)}"
    scripts = {"V1_table.sql": TABLE, "V2_rows.sql": "-- msr: no-transaction\n" * control + work}
    folder = write_scripts(tmp_path / "scripts", scripts)
    disk.fill(leave=400_000)
    end = finish_in_one_line(start_migrate(disk.url, folder, prefix=disk.prefix))
    assert end.exit_code == 3
    assert end.stderr.startswith("✗ Error: V2_rows.sql")
    assert "database or disk is full" in end.stderr
    assert ("the script was rolled back" in end.stderr) is not control
    assert disk.query("SELECT version FROM schema_version WHERE status = 'applied'") == [[1]]
    assert disk.query("SELECT count(*) FROM work") == [[1 if control else 0]]
    assert disk.query("SELECT locked_by FROM migration_locks") == [[None]]
    if control:
        return
    disk.empty()
    assert finish(start_migrate(disk.url, folder, prefix=disk.prefix)).exit_code == 0
    assert disk.query("SELECT count(*) FROM work") == [[rows + 1]]
    assert disk.query("PRAGMA integrity_check") == [["ok"]]


@pytest.mark.parametrize(("without", "exit_code"), [((), 8), (("doubt without a lock file",), 0)])
def test_no_room_for_the_lock_file(
    disk: Disk, table: Path, without: Sequence[str], exit_code: int
) -> None:
    """Nothing proves the life of the holder, nor its death: its lease decides, dead or alive.

    The control takes the lock of a live one.
    """
    disk.query("PRAGMA journal_mode = WAL")
    disk.fill_with_files(leave=2)  # the log, and its index

    def ask(wait: float) -> int:
        rig = Rig(without=without)
        asking = start_migrate(disk.url, table, prefix=disk.prefix, rig=rig, wait=wait)
        return finish_in_one_line(asking).exit_code

    holder = start_migrate(disk.url, table, prefix=disk.prefix, rig=Rig(at="after acquire"))
    wait_until(lambda: is_stopped(holder.pid))
    assert disk.query("SELECT session FROM migration_locks WHERE locked_by IS NOT NULL") == [[None]]
    assert ask(wait=0) == exit_code
    if without:
        return
    holder.kill()
    holder.wait()
    assert ask(wait=0) == exit_code
    disk.query("UPDATE migration_locks SET expires_at = strftime('%Y-%m-%dT%H:%M:%fZ', 'now')")
    assert ask(wait=30) == 0
    assert disk.query("SELECT version FROM schema_version") == [[1]]


# Readers and writers


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A table of a hundred rows, and a script that changes each of them and adds others."""
    change = f"UPDATE work SET done = done + 1, filler = randomblob(4000);\n{add_rows(300)}"
    scripts = {"V1_table.sql": f"{TABLE}\n{add_rows(100)}", "V2_change.sql": change}
    return write_scripts(tmp_path / "scripts", scripts)


BEFORE, AFTER = (0, 100), (100, 400)
"""Rows done and rows in all, before the second script and after it."""


def work_in(url: str) -> tuple[int, int]:
    [row] = query(url, "SELECT coalesce(sum(done), 0), count(*) FROM work")
    return row[0], row[1]


@contextlib.contextmanager
def reader(url: str) -> Iterator[sqlite3.Connection]:
    """Another connection inside a long transaction, in which it has read the table."""
    with closing(sqlite3.connect(path_of(url), isolation_level=None)) as db:
        db.execute("BEGIN")
        db.execute("SELECT count(*) FROM work").fetchall()
        yield db


PENDING_BYTE = 0x40000000
"""What SQLite locks of the file before it waits for the readers to leave."""


def is_committing(process: subprocess.Popen[str]) -> bool:
    """Whether it waits for readers; a connection of ours would not see it beside our own reader."""
    locks = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    pending = ["WRITE", str(process.pid), str(PENDING_BYTE)]
    return any([lock[-5], lock[-4], lock[-2]] == pending for lock in locks)


def start_before_commit(
    url: str, folder: Path, without: Sequence[str] = ()
) -> subprocess.Popen[str]:
    """A `migrate` that stands before the commit of the second script."""
    process = start_migrate(url, folder, rig=Rig(at="before commit", nth=2, without=without))
    wait_until(lambda: is_stopped(process.pid))
    return process


@pytest.mark.parametrize(("without", "exit_code"), [((), 0), (("patient commit",), 1)])
def test_a_reader_delays_a_commit(
    sqlite_url: str, work: Path, without: Sequence[str], exit_code: int
) -> None:
    """With a rollback journal the commit waits for it; the control soon gives up, in one line.

    Then nothing is lost either: the script is rolled back, and the next run does it.
    """
    url = set_journal(sqlite_url, "DELETE")
    process = start_before_commit(url, work, without)
    with reader(url):
        process.send_signal(signal.SIGCONT)
        wait_until(partial(is_committing, process))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1)
    end = finish_in_one_line(process)
    assert end.exit_code == exit_code
    if without:
        assert "is locked by another process; try again" in end.stderr
        assert work_in(url) == BEFORE
        assert_whole(url, [1])
        migrate(url, work)
    assert work_in(url) == AFTER
    assert_whole(url, [1, 2])


def test_a_reader_does_not_delay_a_commit_in_wal_mode(sqlite_url: str, work: Path) -> None:
    """It goes on seeing what it saw."""
    url = set_journal(sqlite_url, "WAL")
    process = start_before_commit(url, work)
    with reader(url) as db:
        process.send_signal(signal.SIGCONT)
        assert finish(process).exit_code == 0
        assert work_in(url) == AFTER
        assert db.execute("SELECT count(*) FROM work").fetchone() == (100,)
    assert_whole(url, [1, 2])


@pytest.mark.parametrize(
    ("journal", "without"), [("DELETE", ()), ("WAL", ()), ("WAL", ("immediate begin",))]
)
def test_a_script_keeps_other_writers_out_from_its_start(
    sqlite_url: str, tmp_path: Path, journal: str, without: Sequence[str]
) -> None:
    """Else it fails as soon as it writes, because what it has read is out of date (the control)."""
    url = set_journal(sqlite_url, journal)
    gate = Gate(tmp_path)
    script = gate.script(
        before="await db.execute_fetchall('SELECT * FROM work')",
        after="await db.execute('UPDATE work SET done = done + 1')",
    )
    scripts = {"V1_table.sql": f"{TABLE}\n{add_rows(1)}", "V2_change.py": script}
    folder = write_scripts(tmp_path / "scripts", scripts)
    process = start_migrate(url, folder, rig=Rig(without=without))
    gate.wait()
    with closing(sqlite3.connect(path_of(url), timeout=0, isolation_level=None)) as other:
        refused = None if without else pytest.raises(sqlite3.OperationalError, match="locked")
        with refused or contextlib.nullcontext():
            other.execute("UPDATE work SET done = done + 1")
    gate.open()
    assert finish_in_one_line(process).exit_code == (3 if without else 0)
    assert work_in(url) == (1, 1)


@in_both_modes
@pytest.mark.parametrize("without", [(), ("lock",)])
def test_migrators_at_once(
    sqlite_url: str, work: Path, journal: str, without: Sequence[str]
) -> None:
    """One of four comes to the scripts, the others wait. In the control all four come there."""
    url = set_journal(sqlite_url, journal)
    # In the control none may hear, before all are there, that another has its lock.
    rig = Rig(at="before script", without=(*without, *UNAWARE) if without else ())
    crowd = [start_migrate(url, work, rig=rig) for _ in range(4)]

    def standing() -> list[subprocess.Popen[str]]:
        return [process for process in crowd if is_stopped(process.pid)]

    if without:
        wait_until(lambda: standing() == crowd)
        return
    [holder] = wait_until(standing)
    for process in crowd:
        if process is not holder:
            wait_for_waiting(process)
    holder.send_signal(signal.SIGCONT)
    ends = [finish(process) for process in crowd]
    assert [end for end in ends if end.exit_code] == []
    assert work_in(url) == AFTER
    assert_whole(url, [1, 2])


# Killed in the middle of COMMIT


def kill_before_commit(url: str, work: Path, without: Sequence[str] = ()) -> None:
    rig = Rig(at="before commit", nth=2, send=signal.SIGKILL, without=without)
    assert finish(start_migrate(url, work, rig=rig)).exit_code == -signal.SIGKILL


def kill_after_commit(url: str, work: Path) -> None:
    rig = Rig(at="after commit", nth=2, send=signal.SIGKILL)
    assert finish(start_migrate(url, work, rig=rig)).exit_code == -signal.SIGKILL


def kill_waiting(url: str, work: Path) -> None:
    """While COMMIT waits for a reader."""
    process = start_before_commit(url, work)
    with reader(url):
        process.send_signal(signal.SIGCONT)
        wait_until(partial(is_committing, process))
        process.kill()
        process.wait()
        assert path_of(f"{url}-journal").stat().st_size > 0


def kill_writing(url: str, work: Path) -> None:
    """By the kernel, when COMMIT has written one megabyte of its file, of nearly two."""
    sql = (work / "V2_change.sql").read_text()
    (work / "V2_change.sql").unlink()
    dying = """
        import pathlib, resource, signal

        async def up(db):
            for statement in {statements!r}:
                await db.execute(statement)
            if not pathlib.Path({died!r}).exists():
                pathlib.Path({died!r}).touch()
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
    """
    text = textwrap.dedent(dying).format(statements=sql.splitlines(), died=str(work / "../died"))
    (work / "V2_change.py").write_text(text)
    assert finish(start_migrate(url, work)).exit_code == -signal.SIGXFSZ
    path = path_of(url)
    wal = path_of(f"{url}-wal")
    if wal.exists():
        assert wal.stat().st_size == 2**20
        return
    assert path.stat().st_size == 2**20
    torn = shutil.copy(path, path.with_name("torn.db"))  # without its journal
    with closing(sqlite3.connect(torn)) as db, contextlib.suppress(sqlite3.DatabaseError):
        assert db.execute("PRAGMA integrity_check").fetchall() != [("ok",)]


KILLS = {
    "before": kill_before_commit,
    "waiting": kill_waiting,
    "writing": kill_writing,
    "after": kill_after_commit,
}


@pytest.mark.parametrize("again", range(rounds(1, 20)))
@pytest.mark.parametrize(
    ("journal", "when"),
    [
        (journal, when)
        for journal in ("DELETE", "WAL")
        for when in KILLS
        if (journal, when) != ("WAL", "waiting")
    ],
)
def test_a_migration_killed_in_its_commit(
    sqlite_url: str, work: Path, journal: str, when: str, again: int
) -> None:
    """All of it is there or nothing is, with its history row; the next run makes it exactly one."""
    url = set_journal(sqlite_url, journal)
    KILLS[when](url, work)
    migrate(url, work)
    assert work_in(url) == AFTER
    assert_whole(url, [1, 2])


def test_a_script_killed_before_its_history_row(sqlite_url: str, work: Path) -> None:
    """The control: committed apart from its history row, the script runs twice."""
    kill_before_commit(sqlite_url, work, without=["single transaction"])
    migrate(sqlite_url, work)
    assert work_in(sqlite_url) == (500, 700)
