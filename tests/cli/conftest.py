"""What the tests of the command share. Their scripts stand in `migrations`, the default folder."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

import msr
from tests.support.cli import write_scripts
from tests.support.holder import Gate
from tests.support.queries import query

# An application whose handler brings no locking service, for whatever MSR_URL names.
APPLICATION_WITHOUT_LOCKING = """
from contextlib import asynccontextmanager

import msr

class Session:
    locking = None

    def __init__(self, session):
        self.session = session

    def __getattr__(self, name):
        return getattr(self.session, name)

class Handler:
    def __init__(self, handler):
        self.handler = handler
        self.dialect = handler.dialect

    @asynccontextmanager
    async def connect(self, config):
        async with self.handler.connect(config) as session:
            yield Session(session)

ours = msr.MigrationScriptExecutor.from_url()
executor = msr.MigrationScriptExecutor(Handler(ours.handler), ours.config)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder that `msr` reads when it is told no other."""
    return tmp_path / "migrations"


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    """A script that waits until the test lets it through."""
    return Gate(tmp_path)


@pytest.fixture
def url(database_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A database that every `msr` of the test uses unless told otherwise, of each kind in turn."""
    monkeypatch.setenv("MSR_URL", database_url)
    return database_url


@pytest.fixture
def migrated_url(url: str, folder: Path) -> str:
    """The same with one script applied, so that the tables are there and the lock is free."""
    write_scripts(folder, {"V1_first.sql": "CREATE TABLE first (id int);"})
    anyio.run(msr.migrate)  # through the library, for that is faster
    return url


@pytest.fixture
def page_url(migrated_url: str) -> str:
    """The same with the lock that the page shows; nothing proves its holder alive or gone."""
    query(
        migrated_url,
        """
        UPDATE migration_locks SET locked_by = 'macbook-pro-12345-a1b2c3d4-e5f6-7890-abcd',
            locked_at = '2025-12-18T14:32:10.123Z', renewed_at = '2025-12-18T14:32:10.123Z',
            expires_at = '2999-12-18T14:42:10.123Z', process_id = 12345, hostname = 'macbook-pro'
        """,
    )
    return migrated_url


@pytest.fixture
def without_locking(url: str, tmp_path: Path) -> str:
    """For `--executor`: an application's executor of `url` that has no locking service."""
    (tmp_path / "application.py").write_text(APPLICATION_WITHOUT_LOCKING)
    return "application:executor"
