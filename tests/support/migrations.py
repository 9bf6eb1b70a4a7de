"""Real `msr migrate` processes, and what they leave in a database: history, lock, rows."""

from __future__ import annotations

import sqlite3
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import asyncpg

from msr.urls import parse_url
from tests.support.cli import Result, own_lines, start_msr, unstamped
from tests.support.queries import exists, query
from tests.support.rig import Rig

__all__ = [
    "applied",
    "finish",
    "finish_in_one_line",
    "is_sleeping",
    "is_sqlite",
    "lock_row",
    "rows_of",
    "start_migrate",
    "wait_for_waiting",
]


def is_sqlite(url: str) -> bool:
    """Whether the database is SQLite; else it is PostgreSQL."""
    return parse_url(url).dialect == "sqlite"


def start_migrate(
    url: str,
    folder: Path,
    *,
    rig: Rig | None = None,
    prefix: Sequence[str] = (),
    **locking: object,
) -> subprocess.Popen[str]:
    """`msr migrate`, with a fault built in, and settings of `locking` as `MSR_LOCKING_*`."""
    env = {f"MSR_LOCKING_{name.upper()}": str(value) for name, value in locking.items()}
    command = ("migrate", "--url", url, "--folder", folder)
    return start_msr(*command, env=env, rig=rig, prefix=prefix)


def finish(process: subprocess.Popen[str], timeout: float = 150) -> Result:
    """Wait for the end: how it ended, and what it wrote since somebody read it."""
    stdout, stderr = process.communicate(timeout=timeout)
    return Result(process.returncode, stdout, stderr)


def finish_in_one_line(process: subprocess.Popen[str], timeout: float = 150) -> Result:
    """`finish`, for a run that says why it fails in one line, after warnings and waiting."""
    end = finish(process, timeout)
    news = ("⚠️  Warning: ", "Waiting for the migration lock")
    lines = [line for line in own_lines(unstamped(end.stderr)) if not line.startswith(news)]
    assert len(lines) == bool(end.exit_code), end
    assert all(line.startswith("✗ Error: ") for line in lines), end
    return end


def wait_for_waiting(process: subprocess.Popen[str]) -> None:
    """Return when it says that it waits for the lock, which is all that it has said."""
    assert process.stderr is not None
    line = unstamped(process.stderr.readline())
    assert line.startswith("Waiting for the migration lock"), line


def is_sleeping(url: str) -> bool:
    """Whether a session of the database is inside `SELECT pg_sleep(..)` (PostgreSQL)."""
    doing = "datname = current_database() AND query LIKE 'SELECT pg_sleep%' AND state = 'active'"
    return bool(query(url, f"SELECT FROM pg_stat_activity WHERE {doing}"))


def rows_of(url: str, statement: str) -> list[tuple[Any, ...]]:
    """The rows of a query; none where there is no table, or no database, yet."""
    try:
        return query(url, statement) if exists(url) else []
    except (sqlite3.OperationalError, asyncpg.UndefinedTableError):
        return []


def lock_row(url: str) -> tuple[int, str | None, str | None]:
    """Token, holder and note of the lock; zero where there is none yet."""
    statement = "SELECT token, locked_by, running FROM migration_locks"
    for token, locked_by, running in rows_of(url, statement):
        return token, locked_by, running
    return 0, None, None


def applied(url: str) -> list[int]:
    """The versions that the history has as applied, in order."""
    rows = rows_of(url, "SELECT version FROM schema_version WHERE status = 'applied'")
    return sorted(version for (version,) in rows)
