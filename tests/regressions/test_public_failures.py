"""What went wrong in public with the locks of other migration tools, and does not go wrong here.

Each test is named after the failure, says what happened there, and runs twice: as we are, and with
the mechanism taken out that keeps it from happening here, which must show the old failure again.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.cli import run_msr, start_msr, wait_until, write_scripts
from tests.support.holder import Gate, Holder, hold_lock
from tests.support.migrations import (
    applied,
    finish,
    is_sleeping,
    lock_row,
    rows_of,
    start_migrate,
    wait_for_waiting,
)
from tests.support.pgbouncer import PgBouncer
from tests.support.postgres import PostgresServer
from tests.support.queries import query, table_names
from tests.support.rig import UNAWARE, Rig
from tests.support.tools import find

HELD, LOST = 8, 9

pytestmark = pytest.mark.timeout(120)


def both_ways(*mechanisms: str) -> pytest.MarkDecorator:
    """Run the test as we are, and without these mechanisms: a tuple of their names, `without`."""
    return pytest.mark.parametrize("without", [(), mechanisms], ids=["as we are", "control"])


def rig(without: Sequence[str]) -> Rig | None:
    """The installed command where nothing is to be taken out."""
    return Rig(without=without) if without else None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One script, which makes the table `t`."""
    return write_scripts(tmp_path / "scripts", {"V1_t.sql": "CREATE TABLE t (id INTEGER);"})


@both_ways("proof of death")
def test_liquibase_lock_of_a_killed_pod(
    database_url: str, folder: Path, without: Sequence[str]
) -> None:
    """The holder is killed, and whoever starts next waits for somebody who is no more.

    liquibase/liquibase#1311: the lock is a row that nothing takes away when the process dies. Pods
    that Kubernetes killed during a migration kept every later pod from starting, until somebody
    released the lock by hand.
    """
    with hold_lock(database_url) as holder:
        holder.kill()
        wait = 1 if without else 30  # a server may need a moment to see that its client is gone
        end = finish(start_migrate(database_url, folder, rig=rig(without), wait=wait))
    assert end.exit_code == (HELD if without else 0)
    assert applied(database_url) == ([] if without else [1])


@both_ways("polling")
def test_golang_migrate_and_hexpm_index_build_behind_waiters(
    postgres_url: str, tmp_path: Path, without: Sequence[str]
) -> None:
    """The holder builds an index concurrently, which waits for the waiter, which waits for it.

    golang-migrate/migrate#960 and hexpm/hexpm#1835: waiters stood inside `pg_advisory_lock()`, a
    running statement whose snapshot CREATE INDEX CONCURRENTLY has to outwait. With lock and build
    on two connections the server sees no deadlock, and a deployment hung for 19 minutes.
    """
    name = postgres_url.rpartition("/")[2]
    query(postgres_url, f"ALTER DATABASE \"{name}\" SET deadlock_timeout = '1h'")
    gate = Gate(tmp_path)
    folder = write_scripts(
        tmp_path / "scripts",
        {
            "V1_t.py": gate.script(before="await db.execute('CREATE TABLE t (id INTEGER)')"),
            "V2_i.sql": "-- msr: no-transaction\nCREATE INDEX CONCURRENTLY i ON t (id);",
        },
    )
    builder = start_migrate(postgres_url, folder)
    gate.wait()
    # In the control the waiter must not give up before the builder is seen to be stuck.
    patient = Rig(without=without, bounds={"msr.locking.ATTEMPT_BOUND": 600}) if without else None
    waiter = start_migrate(postgres_url, folder, rig=patient)
    asked = "query LIKE '%pg_advisory_lock(%' AND wait_event = 'advisory'"
    if without:
        wait_until(lambda: query(postgres_url, f"SELECT 1 FROM pg_stat_activity WHERE {asked}"))
    else:
        wait_for_waiting(waiter)
    gate.open()
    if without:
        stuck = "SELECT 1 FROM pg_stat_progress_create_index WHERE phase LIKE 'waiting%'"
        wait_until(lambda: query(postgres_url, stuck))
        with pytest.raises(subprocess.TimeoutExpired):
            builder.wait(2)
        waiter.kill()
        query(postgres_url, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {asked}")
    assert finish(builder).exit_code == 0
    assert finish(waiter).exit_code == (-signal.SIGKILL if without else 0)
    assert applied(postgres_url) == [1, 2]


@both_ways("pooler detection", "heartbeat")
def test_authentik_lock_stranded_in_pgbouncer(
    postgres_server: PostgresServer, postgres_url: str, folder: Path, without: Sequence[str]
) -> None:
    """A session lock stays with a connection of the pool, and belongs to nobody.

    goauthentik/authentik#23876: behind PgBouncer, the lock was taken on one server connection and
    released on another, which does nothing. It stayed until the pool closed that connection, and
    every pod that started meanwhile waited for it.
    """
    locks = "SELECT count(*) FROM pg_locks JOIN pg_database AS d ON d.oid = database"
    locks += " WHERE locktype = 'advisory' AND datname = current_database()"
    with PgBouncer(postgres_server.url(), "transaction") as pgbouncer:
        victim = Rig(without=without, at="before release", send=signal.SIGKILL)
        end = finish(start_migrate(pgbouncer.url(postgres_url), folder, rig=victim))
        assert end.exit_code == -signal.SIGKILL
        assert query(postgres_url, locks) == [(1 if without else 0,)]


@both_ways("client watch")
def test_prisma_statement_that_outlives_its_client(
    postgres_url: str, tmp_path: Path, without: Sequence[str]
) -> None:
    """The client is gone, its statement runs on, and keeps what it has locked.

    prisma/prisma#12999: after a failed or killed run, connections of the server stayed with their
    statement and its locks for ten minutes and longer, and no migration could start.
    """
    folder = write_scripts(tmp_path / "scripts", {"V1_slow.sql": "SELECT pg_sleep(50);"})
    victim = start_migrate(postgres_url, folder, rig=rig(without))
    wait_until(lambda: is_sleeping(postgres_url))
    victim.kill()
    if without:
        with pytest.raises(AssertionError, match="not so within"):
            wait_until(lambda: not is_sleeping(postgres_url), timeout=3)
    else:
        wait_until(lambda: not is_sleeping(postgres_url))


@contextmanager
def superseded(url: str, without: Sequence[str]) -> Iterator[tuple[Holder, Holder]]:
    """A holder that has not noticed yet that its lock was released by force, and its successor."""
    blind = (*UNAWARE, *without)
    with hold_lock(url, rig=Rig(without=blind)) as first:
        released = run_msr("lock:release", "--force", "--yes", "--url", url)
        assert released.exit_code == 0, released
        with hold_lock(url) as second:
            yield first, second


@both_ways("comparison on release")
def test_hangfire_mongo_lock_deleted_by_a_stopping_pod(
    database_url: str, without: Sequence[str]
) -> None:
    """A process that shuts down takes away a lock that has become somebody else's.

    gottscj/Hangfire.Mongo#417: on its shutdown an instance deleted the migration lock, whoever had
    it, so that rolling restarts let two instances migrate.
    """
    with superseded(database_url, without) as (first, second):
        first.release()
        assert lock_row(database_url)[1] == (None if without else second.locked_by)


@both_ways("answer to release")
def test_release_that_reports_success_after_the_lock_was_stolen(
    database_url: str, without: Sequence[str]
) -> None:
    """The lock was somebody else's when the work ended, and nobody heard of it.

    Lock tables are often freed by an UPDATE or DELETE whose count of rows nobody looks at: the
    work counts as done under the lock, although another process was at it too.
    """
    with superseded(database_url, without) as (first, second):
        assert first.release() == (0 if without else LOST)
        assert lock_row(database_url)[1] == second.locked_by


@both_ways("comparison on forced release")
def test_forced_release_of_a_lock_that_changed_hands(
    database_url: str, folder: Path, without: Sequence[str]
) -> None:
    """An operator decides about one holder, and hits the next.

    While the question "are you sure?" stands on the screen the stuck process goes on and ends, a
    healthy one takes the lock, and that is the one that loses it.
    """
    with hold_lock(database_url) as seen:
        command = start_msr(*("lock:release", "--force", "--url", database_url), rig=rig(without))
        stdout = command.stdout
        assert stdout is not None
        wait_until(lambda: "Are you sure" in os.read(stdout.fileno(), 4096).decode())
        assert seen.release() == 0
        with hold_lock(database_url) as healthy:
            said, error = command.communicate("y\n", timeout=40)
            assert ("Lock forcibly released" in said) == bool(without)
            assert ("nothing was released" in error) == (not without)
            assert lock_row(database_url)[1] == (None if without else healthy.locked_by)


@both_ways("option --no-lock")
def test_no_lock_option_that_did_nothing(
    database_url: str, folder: Path, without: Sequence[str]
) -> None:
    """In an incident the way around the lock turned out to be none.

    The option was documented and read, and the lock was taken all the same: with a stuck lock,
    which is when somebody needs it, it did not help.
    """
    with hold_lock(database_url) as holder:
        command = ("migrate", "--no-lock", "--url", database_url, "--folder", folder)
        process = start_msr(*command, rig=rig(without), env={"MSR_LOCKING_WAIT": "1"})
        assert finish(process).exit_code == (HELD if without else 0)
        assert applied(database_url) == ([] if without else [1])
        assert lock_row(database_url)[1] == holder.locked_by


def test_no_lock_option_on_an_empty_database(database_url: str, folder: Path) -> None:
    """Without the lock there is not even a table for it."""
    assert run_msr("migrate", "--no-lock", "--url", database_url, "--folder", folder).exit_code == 0
    assert asyncio.run(table_names(database_url)) == {"schema_version", "t"}


@both_ways("lock")
def test_rollback_without_the_lock(
    database_url: str, tmp_path: Path, without: Sequence[str]
) -> None:
    """One way to change the schema asks for the lock, and another does not.

    Migrating was locked and rolling back was not, so the two ran at the same time.
    """
    scripts = {"V1_t.up.sql": "CREATE TABLE t (id INTEGER);", "V1_t.down.sql": "DROP TABLE t;"}
    folder = write_scripts(tmp_path / "scripts", scripts)
    assert finish(start_migrate(database_url, folder)).exit_code == 0
    with hold_lock(database_url):
        command = ("down", "0", "--url", database_url, "--folder", folder)
        process = start_msr(*command, rig=rig(without), env={"MSR_LOCKING_WAIT": "1"})
        assert finish(process).exit_code == (0 if without else HELD)
    assert bool(rows_of(database_url, "SELECT 1 FROM schema_version")) == (not without)


@both_ways("expiry")
def test_expired_lock_that_a_waiter_never_noticed(
    database_url: str, folder: Path, without: Sequence[str]
) -> None:
    """Whoever began to wait before the lease was over waits to the end of its patience.

    Expired locks were cleaned up when a process started and never again: a waiter that came a
    moment too early stood before a lock that was free for everybody else.
    """
    # Its lease is over when we say so, and no renewal is on its way then.
    with hold_lock(database_url, rig=Rig(without=["heartbeat"])) as holder:
        waiter = start_migrate(database_url, folder, rig=rig(without), wait=5 if without else 60)
        wait_for_waiting(waiter)
        holder.freeze()
        query(database_url, "UPDATE migration_locks SET expires_at = '2001-02-03T04:05:06.789Z'")
        assert finish(waiter).exit_code == (HELD if without else 0)
    assert applied(database_url) == ([] if without else [1])


@both_ways("defaults")
def test_partly_given_locking_that_replaced_the_defaults(
    sqlite_url: str, folder: Path, tmp_path: Path, without: Sequence[str]
) -> None:
    """One key of the table is given, and the others are gone with their defaults.

    A configuration that only changed the table's name also lost `enabled` and the timeout, so the
    lock was off, and nobody was told.
    """
    (tmp_path / "msr.toml").write_text('[locking]\ntable_name = "our_locks"\n', encoding="utf-8")
    end = finish(start_msr("migrate", "--url", sqlite_url, "--folder", folder, rig=rig(without)))
    assert end.exit_code == 0
    assert ("our_locks" in asyncio.run(table_names(sqlite_url))) == (not without)


@both_ways("owner columns")
def test_hyphenated_host_name_that_broke_the_process_id(
    sqlite_url: str, tmp_path: Path, without: Sequence[str]
) -> None:
    """Every pod of Kubernetes has hyphens in its name, and the process id was a part of it.

    The holder's id was host, process and a random part with hyphens between, and was split at
    them to show the process: for `web-7d4b9-x2x4q` that gave a part of the name.
    """
    rename = [
        find("unshare", "util-linux"),
        "--uts",
        "--map-root-user",
        "sh",
        "-c",
        'hostname web-7-x2; exec "$@"',
        "-",
    ]
    gate = Gate(tmp_path)
    folder = write_scripts(tmp_path / "scripts", {"V1_gate.py": gate.script()})
    holder = start_migrate(sqlite_url, folder, prefix=rename)
    gate.wait()
    status = finish(start_msr("lock:status", "--json", "--url", sqlite_url, rig=rig(without)))
    document = json.loads(status.stdout)
    assert document["locked_by"].startswith(f"web-7-x2-{holder.pid}-")
    found = (document["hostname"], document["process_id"])
    assert found == (("web", 7) if without else ("web-7-x2", holder.pid))
    gate.open()
    assert finish(holder).exit_code == 0
