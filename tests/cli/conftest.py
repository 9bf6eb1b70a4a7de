"""What the tests of the command share. Their scripts stand in `migrations`, the default folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.cli import run_msr, write_scripts
from tests.support.holder import Gate
from tests.support.queries import query


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
    assert run_msr("migrate").exit_code == 0
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
