"""Fixtures for every test: databases, a clean environment, and a watch on the event loop.

Which PostgreSQL the tests use can be chosen:

- `MSR_TEST_POSTGRES_URL`: a server that runs already, as a role that may create databases;
- `MSR_TEST_POSTGRES_BIN`: the folder of `initdb` and `postgres`, or `embedded` for the wheel's;
- `MSR_TEST_POSTGRES_FSYNC=on`: one that waits for its disk.
"""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import hypothesis
import pytest
from blockbuster import blockbuster_ctx

from tests.support.cli import end_started
from tests.support.postgres import (
    LocalPostgres,
    PostgresServer,
    PostgresUnavailableError,
    find_binaries,
)

# Read once: `clean_environment` removes these too.
POSTGRES_URL = os.environ.get("MSR_TEST_POSTGRES_URL", "")
POSTGRES_BIN = os.environ.get("MSR_TEST_POSTGRES_BIN", "")
POSTGRES_FSYNC = os.environ.get("MSR_TEST_POSTGRES_FSYNC", "off") == "on"

# What a driver or a terminal library would read behind our back.
FOREIGN_VARIABLES = {"DATABASE_URL", "NO_COLOR", "FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS"}

# A busy machine makes one example slow, or its making, and the time limit of the test stands. A
# failure prints how to repeat it, so nothing is kept on disk.
hypothesis.settings.register_profile(
    "msr",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    database=None,
    print_blob=True,
)
hypothesis.settings.load_profile("msr")


def pytest_configure() -> None:
    """Let SIGTERM end the run as an interrupt does: the fixtures then stop their servers.

    A shell starts what it runs in the background with SIGINT ignored, and so would be what we
    start: a handler of our own ends that.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)


def _start_postgres() -> LocalPostgres:
    """A server of ours; no PostgreSQL is a failure with a sentence, never a skip."""
    try:
        return LocalPostgres(find_binaries(POSTGRES_BIN), fsync=POSTGRES_FSYNC)
    except (PostgresUnavailableError, OSError) as error:
        pytest.fail(f"No PostgreSQL for the tests: {error}", pytrace=False)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """The PostgreSQL of this session (of each worker, under xdist); for tests that leave it up."""
    if not POSTGRES_URL:
        with _start_postgres() as server:
            yield server
        return
    try:
        given = PostgresServer(POSTGRES_URL)
    except (asyncpg.PostgresError, OSError) as error:
        pytest.fail(f"MSR_TEST_POSTGRES_URL names no server to test on: {error}", pytrace=False)
    yield given


@pytest.fixture
def own_postgres() -> Iterator[LocalPostgres]:
    """A server that belongs to this test alone, which may stop, freeze and start it again."""
    with _start_postgres() as server:
        yield server


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """The URL of a fresh, empty PostgreSQL database."""
    name = f"test_{uuid.uuid4().hex[:16]}"
    url = postgres_server.create_database(name)
    try:
        yield url
    finally:
        postgres_server.drop_database(name)


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """The URL of an SQLite database whose file does not exist yet."""
    return f"sqlite:///{tmp_path / 'app.db'}"


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest) -> str:
    """The URL of a fresh, empty database of each kind in turn."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture(autouse=True)
def clean_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No setting reaches a test from outside: no variables, an empty working folder.

    Afterwards, processes that `start_msr` started and the test did not end are ended.
    """
    for name in os.environ:
        if name in FOREIGN_VARIABLES or name.startswith(("MSR_", "PG")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    yield
    end_started()


@pytest.fixture(autouse=True)
def watch_the_loop(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail where msr itself, or what it calls, blocks the event loop; tests may, in their own code.

    Only stacks with a frame of `msr` or `msr_cli` are looked at, so threads (aiosqlite, anyio) and
    what a test does beside msr are left alone.
    """
    if request.node.get_closest_marker("may_block"):
        yield
        return
    with blockbuster_ctx(["msr", "msr_cli"]) as watch:
        for function in watch.functions.values():
            # A driver is imported when it is asked for, once in a process.
            function.can_block_in("<frozen importlib._bootstrap>", {"_find_and_load"})
            # asyncpg reads ~/.pgpass and certificates itself, on every connect.
            function.can_block_in("asyncpg/connect_utils.py", {"_parse_connect_arguments"})
            # Where a handler of a database in memory is collected, its one small file is removed.
            function.can_block_in("msr/handlers/sqlite.py", {"_remove"})
        yield
