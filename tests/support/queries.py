"""Look at a test's database past msr: with the bare driver, on a connection of its own."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from typing import Any

import asyncpg

from msr.urls import parse_url

__all__ = ["exists", "fetch", "query", "table_names"]

TABLES = {
    "postgresql": "SELECT table_name FROM information_schema.tables"
    " WHERE table_schema NOT IN ('pg_catalog', 'information_schema')",
    "sqlite": "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'",
}


async def fetch(url: str, *statements: str) -> list[tuple[Any, ...]]:
    """Run statements one by one, each committed by itself; the rows of the last one."""
    address = parse_url(url)
    if address.dialect == "sqlite":
        return await asyncio.to_thread(_fetch_sqlite, address.path or "", statements)
    connection = await asyncpg.connect(address.dsn)
    try:
        for statement in statements:
            rows = await connection.fetch(statement)
        return [tuple(row) for row in rows]
    finally:
        await connection.close()


def query(url: str, *statements: str) -> list[tuple[Any, ...]]:
    """`fetch`, for a test that is not async."""
    return asyncio.run(fetch(url, *statements))


async def table_names(url: str) -> set[str]:
    """The tables of a database; none where there is no database yet, which stays so."""
    if not exists(url):
        return set()
    return {name for (name,) in await fetch(url, TABLES[parse_url(url).dialect])}


def exists(url: str) -> bool:
    """Whether there is a database: a server's always is, SQLite's once its file is there."""
    address = parse_url(url)
    if address.dialect != "sqlite":
        return True
    try:
        sqlite3.connect(f"file:{address.path}?mode=ro", uri=True).close()
    except sqlite3.OperationalError:
        return False
    return True


def _fetch_sqlite(path: str, statements: tuple[str, ...]) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path, timeout=10, isolation_level=None)) as db:
        for statement in statements:
            rows = db.execute(statement).fetchall()
        return rows
