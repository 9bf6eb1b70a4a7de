"""What a handler is tested with. The suite runs once for each handler.

To run it on a handler of your own, give the fixture `handler` in a `conftest.py` of yours, and if
the handler's driver is neither asyncpg nor aiosqlite also `sql`, which runs one statement past msr.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

import msr
from tests.conformance.support import Connect, Sql


@pytest.fixture(params=["sqlite", "sqlite in memory", "postgres"])
def handler(request: pytest.FixtureRequest) -> msr.DatabaseHandler:
    """A handler of an empty database."""
    if request.param == "postgres":
        return msr.PostgresHandler(request.getfixturevalue("postgres_url"))
    in_memory = request.param == "sqlite in memory"
    return msr.SqliteHandler(
        "sqlite://:memory:" if in_memory else request.getfixturevalue("sqlite_url")
    )


@pytest.fixture
async def connect(handler: msr.DatabaseHandler) -> AsyncIterator[Connect]:
    """Opens a connection for the test's lifetime: `session = await connect(name="other")`."""
    async with AsyncExitStack() as stack:

        async def connect(**locking: Any) -> msr.Session:
            config = msr.Config(locking=msr.LockingConfig(**locking))
            return await stack.enter_async_context(handler.connect(config))

        yield connect


@pytest.fixture
def sql(handler: msr.DatabaseHandler) -> Sql:
    """Runs one statement past msr, committed by itself: what somebody with a shell could do."""

    async def sql(statement: str) -> list[dict[str, Any]]:
        async with handler.connect(msr.Config()) as session:
            connection = await session.script_connection()
            if handler.dialect == "postgresql":
                return [dict(row) for row in await connection.fetch(statement)]
            async with connection.execute(statement) as cursor:
                names = [column[0] for column in cursor.description or ()]
                return [dict(zip(names, row, strict=True)) for row in await cursor.fetchall()]

    return sql
