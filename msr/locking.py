"""The migration lock: what it promises, and the one loop that takes, keeps and gives it back.

A lock has a name and one row in the database. From a client's point of view it is in one of
these states; the database's clock, never the client's, decides when a lease has expired.

    free      nobody is named on the row, or there is no row
    held      a holder is named, the lease has not expired
    expired   a holder is named, the lease has run out

Who moves it, and what happens when that fails:

*acquire* (free, expired, or held by a holder that is provably gone -> held by us). One attempt
    never waits: it either returns a `Lease` with a fencing token greater than every token before
    it, or the `LockStatus` that refused it. Between attempts a waiter sleeps outside any
    transaction; it first looks whether the work is done already, and then needs no lock at all.

*renew* (held by us -> held by us, later expiry). A heartbeat on its own connection renews by
    (token, locked_by). If that changes no row the lease is lost. If the database cannot be asked,
    the lease is trusted until a local monotonic deadline, counted from *before* the last good
    renewal was sent, and shortened by a margin. Then it is lost.

*lost* is final: the work under the lock is cancelled and `LockLostError` raised. Work that did
    not notice in time cannot commit, because the last statement of its transaction is the fence
    (see the handlers): the history row is inserted only while (token, locked_by) is current.

*release* (held by us -> free). Shielded from cancellation and bounded in time. If the row was not
    ours any more, that is `LockLostError` too: success is never reported for a stolen lock, nor
    when nobody can say and the lease has run out meanwhile.

*forced release* (held or expired -> free). By an operator, as compare-and-set on the token they
    saw. It changes the token, so that the former holder's fence fails from then on.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import anyio

from msr.errors import (
    DatabaseBusyError,
    DatabaseUnreachableError,
    LockHeldError,
    LockLostError,
)

__all__ = [
    "ForcedRelease",
    "Lease",
    "LockStatus",
    "LockingService",
    "Owner",
    "finish",
    "foreign_task_groups",
    "hold",
    "printable",
    "renew",
]

logger = logging.getLogger("msr")

T = TypeVar("T")

FIRST_POLL = 0.05
LAST_POLL = 0.5
"""Seconds between two attempts: growing, with jitter. The cap bounds how long the death of a
holder goes unnoticed (promise L2); a clean release is announced, or polled for faster."""

FIRST_HEARTBEAT = 1.0
LONGEST_HEARTBEAT = 10.0
"""A run shorter than the first never opens the heartbeat's connection at all."""

LOOK_AROUND = 0.2
"""Seconds between two looks at whether the worker's connection still stands."""

LOOKS = 5
"""Looks in a row that find it gone before the body is cancelled. By then one that asks the database
for anything has found out by itself, and says more about it."""

ATTEMPT_BOUND = 15.0
RELEASE_BOUND = 5.0
"""Seconds that one attempt, or the release, may take when the database does not answer."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Who asks for the lock. `locked_by` is unique to one hold: `<hostname>-<pid>-<uuid>`."""

    locked_by: str
    hostname: str
    process_id: int

    @classmethod
    def new(cls) -> Owner:
        """This process, with a fresh uuid."""
        hostname, process_id = socket.gethostname(), os.getpid()
        return cls(f"{hostname}-{process_id}-{uuid.uuid4()}", hostname, process_id)


@dataclass(frozen=True, slots=True)
class ForcedRelease:
    """The last forced release of a lock: when, by whom, why, and the token that it ended."""

    at: datetime
    by: str
    reason: str | None
    token: int


@dataclass(frozen=True, slots=True)
class LockStatus:
    """The lock as the database saw it at `checked_at`. All times are the database's, in UTC.

    `holder` says what is known of the holder's life: "alive" or "gone" when its database session
    or operating system lock proves it, "unknown" when nothing does (a connection pooler, another
    host), None when the lock is free. `running` is what the holder said it is doing. `obstacle`
    says what keeps a waiter from a lock that it could have had otherwise.
    """

    name: str
    is_locked: bool = False
    token: int | None = None
    locked_by: str | None = None
    locked_at: datetime | None = None
    renewed_at: datetime | None = None
    expires_at: datetime | None = None
    process_id: int | None = None
    hostname: str | None = None
    is_expired: bool = False
    holder: Literal["alive", "gone", "unknown"] | None = None
    running: str | None = None
    checked_at: datetime | None = None
    forced_release: ForcedRelease | None = None
    obstacle: str | None = None


def printable(text: str) -> str:
    """The text without what a database, or a terminal, could refuse or obey."""
    return "".join(char if char.isprintable() else "?" for char in text)


@dataclass(slots=True, eq=False)
class Lease:
    """The lock while it is ours. `token` is the fencing token: hand it to whatever you guard.

    `timeout` is in seconds. `running` may be set at any time; the next renewal publishes it.
    """

    name: str
    token: int
    locked_by: str
    timeout: float
    running: str | None = None

    trusted_until: float = field(default=0.0, repr=False)
    """Local monotonic time after which the lease counts as lost unless renewed before."""
    secured: bool = field(default=False, repr=False)
    """True while our open transaction keeps everybody else from the lock by itself (SQLite)."""
    unattended: bool = field(default=False, repr=False)
    """True while the database has no connection to spare for the heartbeat. Then the lease may run
    out under a long script; whoever takes it over ends our session first, and the fence holds."""

    settling: bool = field(default=False, repr=False)
    """True while the body, whose session has ended in a commit, looks up what became of it."""

    released: bool = field(default=False, repr=False)
    """True once it is known to have been given back."""

    @property
    def shown(self) -> str | None:
        """`running` without what a database could refuse, and so end the lease."""
        if self.running is None:
            return None
        return printable(self.running)

    def trust(self, sent: float) -> None:
        """The database confirmed the lease in answer to a request sent at monotonic `sent`."""
        self.trusted_until = sent + self.timeout - min(self.timeout / 10, 5.0)

    @property
    def interval(self) -> float:
        """Seconds between two renewals: three fit into the timeout."""
        return min(self.timeout / 3, LONGEST_HEARTBEAT)

    @property
    def is_due(self) -> bool:
        """Whether the heartbeat has fallen behind, so that the holder should renew by itself."""
        return time.monotonic() > self.trusted_until - self.timeout / 2


@runtime_checkable
class LockingService(Protocol):
    """One lock, seen through one database connection. Implement this for a database of your own.

    The contract, which `tests/conformance` checks:

    - every method returns promptly and leaves no transaction open; none waits for the lock;
    - all times and all expiry decisions are the database's;
    - tokens strictly increase, also after the row was deleted by hand;
    - `renew`, `release` and the history's fence do nothing unless both `token` and `locked_by`
      of the lease are the current ones.
    """

    async def acquire(
        self, owner: Owner, timeout: float, running: str | None
    ) -> Lease | LockStatus:
        """Try once. The lease (for `timeout` seconds), or the status that refused it.

        Raises `DatabaseBusyError` when the database could not be asked just now.
        """
        ...

    async def renew(self, lease: Lease) -> bool:
        """Move the expiry to now + timeout and publish `lease.shown`. False: not ours.

        While `lease.secured`, nobody can have taken the lock, and publishing is all there is to do.
        """
        ...

    async def release(self, lease: Lease) -> bool:
        """Free the lock and tell the waiters. False: it was not ours, and nothing changed."""
        ...

    def is_alive(self) -> bool:
        """Whether the connection that the lock was taken on still stands. Does no I/O."""
        ...

    async def get_status(self) -> LockStatus:
        """Look, without writing or creating anything. No table means: not locked."""
        ...

    async def force_release(
        self, token: int, *, by: str, reason: str | None, terminate: bool
    ) -> bool:
        """Free the lock if its token is still `token`; False if it is not.

        `terminate` also ends the holder's database session. Raises `LockBlockedError` when the
        holder's transaction is in the way, rather than wait for it.
        """
        ...

    async def wait(self, seconds: float) -> bool:
        """Sleep at most `seconds`; True at once when the lock may have changed hands.

        Where the database announces that, whatever follows the first call is heard.
        """
        ...


Connect = Callable[[], AbstractAsyncContextManager[LockingService]]


@asynccontextmanager
async def hold(
    service: LockingService,
    connect: Connect,
    *,
    timeout: float,
    wait: float,
    running: str | None = None,
    done: Callable[[], Awaitable[bool]] | None = None,
    on_wait: Callable[[LockStatus, float], None] | None = None,
) -> AsyncIterator[Lease | None]:
    """Hold the lock for the body of an `async with`; None if `done()` came true while waiting.

    `connect` opens the heartbeat's own connection; it is used only when the body takes longer than
    a second. `timeout` and `wait` are in seconds. The body is cancelled when the lock is lost.

    Raises `LockHeldError` when the wait is over and `LockLostError` when the lock was lost.
    """
    running = None if running is None else printable(running)
    lease = await _acquire(service, timeout, wait, running, done, on_wait)
    if lease is None:
        yield None
        return

    loss: str | None = None
    failure: BaseException | None = None
    released: bool | None = None
    ours = True  # for all we know; if not, there is nothing to release
    try:
        async with anyio.create_task_group() as tasks:

            def lose(reason: str, still_ours: bool = False) -> None:
                nonlocal loss, ours
                loss, ours = loss or reason, still_ours
                tasks.cancel_scope.cancel()

            tasks.start_soon(_heartbeat, lease, connect, lose)
            tasks.start_soon(_watch, service, lease, lose)
            try:
                with foreign_task_groups():
                    yield lease
            except anyio.get_cancelled_exc_class():
                raise
            except BaseException as error:  # kept aside: a task group would wrap it in a group
                failure = error
            tasks.cancel_scope.cancel()
    finally:
        if ours:
            released = await finish(_release(service, connect, lease))
    if loss is None and released is False and not isinstance(failure, LockLostError):
        loss = f"the migration lock was taken from {lease.locked_by} before it was released"
    elif released is None and failure is None and time.monotonic() >= lease.trusted_until:
        loss = loss or "the lease of the migration lock ran out before it could be released"
    if loss is not None:
        raise LockLostError(loss) from failure
    if failure is not None:
        raise failure


async def renew(service: LockingService, lease: Lease) -> None:
    """Renew once. Raises `LockLostError` when the lease is not ours any more."""
    sent = time.monotonic()
    if not await service.renew(lease):
        raise LockLostError(
            "the migration lock was taken or released by somebody else; "
            "see who and why with: msr lock:status"
        )
    lease.trust(sent)


async def _acquire(
    service: LockingService,
    timeout: float,
    wait: float,
    running: str | None,
    done: Callable[[], Awaitable[bool]] | None,
    on_wait: Callable[[LockStatus, float], None] | None,
) -> Lease | None:
    owner = Owner.new()
    started = time.monotonic()
    pause = FIRST_POLL
    status: LockStatus | None = None
    while True:
        try:
            if status is not None and done is not None:
                with _answered_within(ATTEMPT_BOUND):
                    if await done():
                        return None
            sent = time.monotonic()
            outcome = await _attempt(service, owner, timeout, running)
        except DatabaseBusyError:
            if status is None:  # not even a look at who holds it
                if time.monotonic() - started >= wait:
                    raise
                await anyio.sleep(pause)
                continue
            outcome = status
        if isinstance(outcome, Lease):
            outcome.trust(sent)
            return outcome
        status = outcome
        waited = time.monotonic() - started
        if waited >= wait:
            raise LockHeldError(_refusal(status, waited, wait), status=status, waited=waited)
        if on_wait is not None:
            on_wait(status, waited)
        jittered = pause * random.uniform(0.8, 1.2)
        with _answered_within(ATTEMPT_BOUND):
            await service.wait(min(jittered, wait - waited))
        pause = min(pause * 1.5, LAST_POLL)


async def _attempt(
    service: LockingService, owner: Owner, timeout: float, running: str | None
) -> Lease | LockStatus:
    """One attempt, to its end: a lock that the database has granted must not be forgotten."""
    outcome: Lease | LockStatus | None = None

    async def attempt() -> None:
        nonlocal outcome
        with _answered_within(ATTEMPT_BOUND):
            outcome = await service.acquire(owner, timeout, running)

    try:
        await finish(attempt())
    except asyncio.CancelledError:
        if isinstance(outcome, Lease):
            await finish(_give_back(service, outcome))
        raise
    assert outcome is not None
    return outcome


async def _give_back(service: LockingService, lease: Lease) -> None:
    with anyio.move_on_after(RELEASE_BOUND), suppress(Exception):
        await service.release(lease)


async def finish(work: Coroutine[Any, Any, T]) -> T:
    """Await `work` to its end even when we are cancelled meanwhile; then be cancelled.

    A shielded scope keeps anyio's cancellation off, but not `task.cancel()`, which is what
    `asyncio.timeout` and most servers use.
    """
    task = asyncio.ensure_future(work)
    cancelled = False
    with anyio.CancelScope(shield=True):
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError:
                cancelled = True
    if cancelled:
        raise asyncio.CancelledError from task.exception()
    return task.result()


@contextmanager
def foreign_task_groups() -> Iterator[None]:
    """Around a user's code: undo what `asyncio.TaskGroup` does to the task before Python 3.13.

    When a child fails it may leave the task's count of cancellations one too high. anyio would take
    that for somebody's cancellation when our own group ends, and hide the error, or the success.
    """
    task = asyncio.current_task()
    assert task is not None, "this is called inside a task"
    before = task.cancelling()
    cancelled = False
    try:
        yield
    except asyncio.CancelledError:
        cancelled = True
        raise
    finally:
        while sys.version_info < (3, 13) and not cancelled and task.cancelling() > before:
            task.uncancel()


@contextmanager
def _answered_within(seconds: float) -> Iterator[None]:
    try:
        with anyio.fail_after(seconds):
            yield
    except TimeoutError:
        raise DatabaseUnreachableError(
            f"the database did not answer within {seconds:g} s"
        ) from None


def _refusal(status: LockStatus, waited: float, wait: float) -> str:
    if status.is_locked:
        who = f"another process holds the migration lock: {status.locked_by}"
        doing = f", running {status.running}" if status.running else ""
        since = f", since {status.locked_at:%Y-%m-%dT%H:%M:%SZ}" if status.locked_at else ""
        text = who + doing + since
    else:
        text = "the migration lock is free but its last holder's session has not ended yet"
    if status.obstacle:
        text += f"; {status.obstacle}"
    if wait and waited >= 1:  # else there was one attempt, however long that took
        text += f"; gave up after {waited:.0f} s"
    return f"{text}; try again, wait longer, or look with: msr lock:status"


async def _heartbeat(lease: Lease, connect: Connect, lose: Callable[[str], None]) -> None:
    told = ""
    await anyio.sleep(min(FIRST_HEARTBEAT, lease.interval))
    while True:
        try:
            async with connect() as service:
                lease.unattended = False
                await _beat(service, lease)
        except LockLostError as error:
            return lose(str(error))
        except Exception as error:  # whatever it is, _watch ends it when the trust has run out
            lease.unattended = getattr(error, "is_full", False)
            if told != (told := str(error)):
                logger.warning("the migration lock could not be renewed, trying again: %s", error)
            await anyio.sleep(min(FIRST_HEARTBEAT, lease.interval / 2))


async def _beat(service: LockingService, lease: Lease) -> None:
    published: str | None = None
    due = 0.0
    with _answered_within(max(lease.interval, 1)):
        await service.wait(0)  # to hear of what changes from now on: the renewal sees the rest
    while True:
        if time.monotonic() >= due or published != lease.running:
            published, due = lease.running, time.monotonic() + lease.interval
            with _answered_within(max(lease.interval, 1)):
                await renew(service, lease)
        pause = min(FIRST_HEARTBEAT, lease.interval)
        with _answered_within(pause + max(lease.interval, 1)):
            if await service.wait(pause):
                due = 0.0


async def _watch(service: LockingService, lease: Lease, lose: Callable[[str, bool], None]) -> None:
    deaths = 0
    while lease.secured or lease.unattended or time.monotonic() < lease.trusted_until:
        deaths = 0 if service.is_alive() or lease.settling else deaths + 1
        if deaths == LOOKS:
            return lose("the database session that held the migration lock was ended", True)
        remaining = lease.trusted_until - time.monotonic()
        await anyio.sleep(min(max(remaining, 0.05), LOOK_AROUND))
    lose(
        "the migration lock was not renewed before its lease ran out: the database did not answer, "
        "or this process stood still",
        False,
    )


async def _release(service: LockingService, connect: Connect, lease: Lease) -> bool | None:
    """Whether the lock was ours to release; None when that cannot be known."""
    was_alive = service.is_alive()
    with anyio.move_on_after(RELEASE_BOUND):
        try:
            with anyio.fail_after(RELEASE_BOUND / 2):
                lease.released = await service.release(lease)
                return lease.released
        except Exception as error:
            logger.debug("release over the worker's connection failed: %s", error)
        try:
            async with connect() as other:
                lease.released = await other.release(lease)
                if lease.released:
                    return True
                # What changes nothing now may have been done by the first attempt, unless the row
                # says who ended our token.
                ended = (await other.get_status()).forced_release
                taken = ended is not None and ended.token == lease.token
                return None if was_alive and not taken else False
        except Exception as error:
            logger.debug("release over a new connection failed: %s", error)
    logger.warning(
        "the migration lock could not be released: the next run takes it over once this "
        "session is gone, at the latest %.0f s after the last renewal",
        lease.timeout,
    )
    return None
