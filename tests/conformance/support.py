"""What the tests of the conformance suite share."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import msr
from tests.support.cli import wait_until_async

__all__ = [
    "TIMEOUT",
    "Connect",
    "Sql",
    "acquire",
    "expire",
    "lock_rows",
    "locking",
    "owner",
    "take_over",
]

Sql: TypeAlias = Callable[[str], Awaitable[list[dict[str, Any]]]]
"""Runs one statement past msr; its rows by column."""

Connect: TypeAlias = Callable[..., Awaitable[msr.Session]]
"""Opens one more connection, with the given settings of `locking`."""

TIMEOUT = 600.0
"""Seconds of the leases in this suite: none runs out by itself."""


def owner(hostname: str = "host", process_id: int = 7) -> msr.Owner:
    """Somebody new who asks for the lock."""
    return msr.Owner(f"{hostname}-{process_id}-{uuid.uuid4()}", hostname, process_id)


def locking(session: msr.Session) -> msr.LockingService:
    """The session's locking service, which a handler under test must have."""
    assert session.locking is not None
    return session.locking


async def acquire(session: msr.Session, timeout: float = TIMEOUT) -> msr.Lease:
    """Take the lock, which must be granted at the first attempt."""
    outcome = await locking(session).acquire(owner(), timeout, "a test")
    assert isinstance(outcome, msr.Lease), f"refused by {outcome}"
    return outcome


async def take_over(session: msr.Session) -> msr.Lease:
    """Try for the lock until it is granted, as a waiter does."""
    asking = owner()

    async def attempt() -> msr.Lease | None:
        outcome = await locking(session).acquire(asking, TIMEOUT, "a takeover")
        return outcome if isinstance(outcome, msr.Lease) else None

    lease = await wait_until_async(attempt)
    assert lease is not None
    return lease


async def expire(sql: Sql) -> None:
    """Let every lease have run out, by the database's clock."""
    await sql("UPDATE migration_locks SET expires_at = '2001-02-03T04:05:06.789Z'")


async def lock_rows(sql: Sql) -> list[dict[str, Any]]:
    """Every column of every lock."""
    return await sql("SELECT * FROM migration_locks ORDER BY name")
