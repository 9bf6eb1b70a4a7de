"""One connection and no more: the limit of a role, of a database, of the server; a pool of one.

The run has it, so the heartbeat gets none. A migration must be right all the same.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit, urlunsplit

import anyio
import pytest

import msr
from tests.support.cli import run_msr, wait_until, write_scripts
from tests.support.figures import LONG
from tests.support.holder import Gate
from tests.support.mechanisms import switch_off
from tests.support.migrations import (
    applied,
    finish,
    finish_in_one_line,
    is_sleeping,
    start_migrate,
)
from tests.support.postgres import LocalPostgres
from tests.support.queries import fetch, query
from tests.support.rig import Rig

pytestmark = pytest.mark.timeout(180)

LEASE = 6
"""Seconds in which a slow machine finds out that there is no second connection."""

FIRST = {"V1_work.sql": "CREATE TABLE work (id INTEGER);"}
RENEWED = "CREATE TABLE renewed AS SELECT renewed_at > locked_at AS since FROM migration_locks;"
"""A script that sees whether the lock has been renewed since it was taken."""


def restrict(url: str, limit: str) -> str:
    """The URL of a role that may connect once; `limit` says whether that is its own limit."""
    parts, role = urlsplit(url), f"role_{uuid.uuid4().hex[:16]}"
    of_role = "CONNECTION LIMIT 1" if limit == "role" else ""
    query(url, f"CREATE ROLE {role} LOGIN {of_role}", f"GRANT CREATE ON SCHEMA public TO {role}")
    if limit == "database":
        query(url, f'ALTER DATABASE "{parts.path[1:]}" CONNECTION LIMIT 1')
    return urlunsplit(parts._replace(netloc=f"{role}@{parts.netloc.rpartition('@')[2]}"))


@pytest.fixture
def urls(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """A database, for its owner and for a role that may connect once; the limit is a parameter."""
    limit = getattr(request, "param", "role")
    if limit == "server":
        server: LocalPostgres = request.getfixturevalue("own_postgres")
        server.execute("ALTER SYSTEM SET superuser_reserved_connections = 199")
        server.stop()
        server.start()
        url = server.create_database("app")
        yield url, restrict(url, limit)
        return
    url = request.getfixturevalue("postgres_url")
    limited = restrict(url, limit)
    yield url, limited
    role = urlsplit(limited).username
    end = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{role}'"
    query(url, end, f"DROP OWNED BY {role}", f"DROP ROLE {role}")


@pytest.mark.parametrize(
    ("urls", "without", "seconds", "code", "renewed"),
    [
        ("role", [], LEASE + 0.2, 0, [(True,)]),
        ("role", ["patience without heartbeat"], 60, 9, []),
        ("role", ["renewal between scripts"], LEASE + 0.2, 0, [(False,)]),
        *([(limit, [], LEASE + 0.2, 0, [(True,)]) for limit in ("database", "server") if LONG]),
    ],
    indirect=["urls"],
)
def test_a_migration_has_one_connection(
    urls: tuple[str, str],
    tmp_path: Path,
    without: list[str],
    seconds: float,
    code: int,
    renewed: list[tuple[bool]],
) -> None:
    """A script longer than the lease is applied, and the lock renewed before the next one.

    Control: where no connection for the heartbeat counts as trouble, the run is given up; where
    nobody renews between the scripts, the lease has run out under the next one.
    """
    url, limited = urls
    slow = {"V2_slow.sql": f"SELECT pg_sleep({seconds});", "V3_renewed.sql": RENEWED}
    folder = write_scripts(tmp_path / "scripts", {**FIRST, **slow})
    run = start_migrate(limited, folder, rig=Rig(without=without), timeout=LEASE)
    end = finish_in_one_line(run)
    assert end.exit_code == code, end.stderr
    assert "could not be renewed" in end.stderr
    assert applied(url) == ([1, 2, 3] if renewed else [1])
    if renewed:
        assert query(url, "SELECT since FROM renewed") == renewed


@pytest.mark.parametrize("urls", ["role", *(["database", "server"] if LONG else [])], indirect=True)
def test_a_second_process_gets_no_connection(urls: tuple[str, str], tmp_path: Path) -> None:
    """It says that it cannot connect and why, with exit code 7; the first is not disturbed."""
    url, limited = urls
    gate = Gate(tmp_path)
    folder = write_scripts(tmp_path / "scripts", {**FIRST, "V2_gate.py": gate.script()})
    first = start_migrate(limited, folder)
    gate.wait()
    second = run_msr("migrate", "--url", limited, "--folder", folder)
    assert (second.exit_code, second.stdout) == (7, "")
    assert second.stderr.startswith("✗ Error: cannot connect to postgresql://role_")
    assert second.stderr.count("\n") == 1
    assert "connection" in second.stderr.rpartition(": ")[2]
    gate.open()
    assert finish(first).exit_code == 0
    assert applied(url) == [1, 2]


@pytest.mark.parametrize("without", [[], ["session ending"]])
def test_a_lease_that_ran_out_under_a_long_script(
    urls: tuple[str, str], tmp_path: Path, without: list[str]
) -> None:
    """Another may take it over, which ends the script first: the work is done once.

    Who cannot end the script's session does not get the lock. The lease is ended by hand, when the
    script runs.
    """
    url, limited = urls
    long = {"V2_work.sql": "INSERT INTO work VALUES (1);\nSELECT pg_sleep(60);"}
    quick = {"V2_work.sql": "INSERT INTO work VALUES (2);"}
    long_folder = write_scripts(tmp_path / "long", {**FIRST, **long})
    run = start_migrate(limited, long_folder)
    wait_until(lambda: is_sleeping(url))
    query(url, "UPDATE migration_locks SET expires_at = locked_at")
    folder = write_scripts(tmp_path / "quick", {**FIRST, **quick})
    successor = start_migrate(url, folder, rig=Rig(without=without), wait=1.5 if without else 60)
    if without:
        assert finish(successor).exit_code == 8
        assert is_sleeping(url)
        return
    assert finish(successor).exit_code == 0
    end = finish_in_one_line(run)
    assert end.exit_code in (3, 9)
    assert applied(url) == [1, 2]
    assert query(url, "SELECT id FROM work") == [(2,)]


# A handler of somebody's own


class PoolOfOne:
    """A handler that lends its only connection; who wants another waits until it is back."""

    dialect: Literal["postgresql"] = "postgresql"

    def __init__(self, url: str) -> None:
        self._handler = msr.PostgresHandler(url)
        self._free = anyio.Semaphore(1)

    @asynccontextmanager
    async def connect(self, config: msr.Config) -> AsyncIterator[msr.Session]:
        async with self._free, self._handler.connect(config) as session:
            yield session


class Clock:
    """The module `time` for the lock, on which each script takes forty seconds."""

    def __init__(self) -> None:
        self._ahead = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self._ahead

    def hear(self, event: msr.Event) -> None:
        if isinstance(event, msr.ScriptStarted):
            self._ahead += 40


@pytest.mark.parametrize("without", [[], ["renewal between scripts"]])
async def test_a_pool_of_one(
    postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without: list[str]
) -> None:
    """Two scripts that together are longer than the lease: the worker renews it by itself.

    Without that the second one is cancelled when the lease has run out.
    """
    for mechanism in without:
        switch_off(mechanism, monkeypatch.setattr)
    clock = Clock()
    monkeypatch.setattr("msr.locking.time", clock)
    slow = "SELECT pg_sleep(1);"  # which the watch looks at several times
    scripts = {"V1_slow.sql": slow, "V2_slow.sql": slow, "V3_renewed.sql": RENEWED}
    folder = write_scripts(tmp_path / "scripts", scripts)
    config = msr.Config(folder=folder, locking=msr.LockingConfig(timeout=60))
    pool = PoolOfOne(postgres_url)
    executor = msr.MigrationScriptExecutor(pool, config, listeners=[clock.hear])
    if without:
        with pytest.raises(msr.LockLostError, match="lease ran out"):
            await executor.migrate()
        assert await fetch(postgres_url, "SELECT version FROM schema_version") == [(1,)]
        return
    result = await executor.migrate()
    assert len(result.executed) == 3
    assert await fetch(postgres_url, "SELECT since FROM renewed") == [(True,)]


async def test_a_pool_of_one_and_a_script_longer_than_the_lease(
    postgres_url: str, tmp_path: Path
) -> None:
    """Nothing hangs: the script is cancelled and undone, the loss is told."""
    scripts = {**FIRST, "V2_long.sql": "INSERT INTO work VALUES (2);\nSELECT pg_sleep(60);"}
    folder = write_scripts(tmp_path / "scripts", scripts)
    config = msr.Config(folder=folder, locking=msr.LockingConfig(timeout=LEASE))
    executor = msr.MigrationScriptExecutor(PoolOfOne(postgres_url), config)
    with anyio.fail_after(50), pytest.raises(msr.LockLostError, match="lease ran out") as caught:
        await executor.migrate()
    assert caught.value.result is not None
    assert [script.version for script in caught.value.result.executed] == [1]
    assert await fetch(postgres_url, "SELECT id FROM work") == []
