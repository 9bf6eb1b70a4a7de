"""`hold()`: taking, keeping, losing and giving back a lock, against one that lives in memory.

Nothing here waits for another process, so time need not pass either: see `clock`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from msr.errors import DatabaseBusyError, DatabaseUnreachableError, LockHeldError, LockLostError
from msr.locking import Lease, LockingService, LockStatus, Owner, hold
from tests.support.cli import wait_until_async

HELD = LockStatus(
    name="default",
    is_locked=True,
    locked_by="other-1-x",
    locked_at=datetime(2025, 12, 18, 14, 32, 10, tzinfo=UTC),
    running="V7_big.sql (1 of 2)",
)
LEASE = 1.0
"""Seconds: renewed every third of it, trusted for 0.9 s."""
NEVER = 50
"""Seconds that nothing takes, unless what it waits for does not happen."""


@dataclass
class FakeLock:
    """A lock in memory. It notes what is asked of it, and can be made to fail."""

    holder: str | None = None
    token: int = 0
    refusals: int = 0
    """How many attempts are refused before one is granted."""
    attempts: int = 0
    renewals: list[str | None] = field(default_factory=list)
    releases: list[str] = field(default_factory=list)
    connections: int = 0
    refuse: Callable[[], None] = lambda: None
    fail_renew: Callable[[], None] = lambda: None
    fail_release: Callable[[], None] = lambda: None
    slow_release: float = 0.0
    news: bool = False
    heard: bool = True
    """Whether every renewal was made by one that listened already."""

    def service(self, connection: str) -> FakeService:
        return FakeService(self, connection)

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[LockingService]:
        self.connections += 1
        yield self.service("heartbeat")

    def steal(self) -> None:
        self.holder, self.token = "thief", self.token + 1

    def hold(self, **settings: Any) -> Any:
        settings = {"timeout": LEASE, "wait": 0.0, **settings}
        return hold(self.service("worker"), self.connect, **settings)


@dataclass
class FakeService:
    """The lock through one connection."""

    lock: FakeLock
    connection: str
    listens: bool = False

    async def acquire(
        self, owner: Owner, timeout: float, running: str | None
    ) -> Lease | LockStatus:
        self.lock.attempts += 1
        await anyio.lowlevel.checkpoint()
        self.lock.refuse()
        if self.lock.refusals:
            self.lock.refusals -= 1
            return HELD
        self.lock.token += 1
        self.lock.holder = owner.locked_by
        return Lease("default", self.lock.token, owner.locked_by, timeout, running)

    def _is_current(self, lease: Lease) -> bool:
        return (self.lock.holder, self.lock.token) == (lease.locked_by, lease.token)

    async def renew(self, lease: Lease) -> bool:
        await anyio.lowlevel.checkpoint()
        if lease.secured:
            return True
        self.lock.fail_renew()
        self.lock.heard &= self.listens
        self.lock.renewals.append(lease.running)
        return self._is_current(lease)

    async def release(self, lease: Lease) -> bool:
        await anyio.sleep(self.lock.slow_release)
        if self.connection == "worker":
            self.lock.fail_release()
        self.lock.releases.append(self.connection)
        if not self._is_current(lease):
            return False
        self.lock.holder = None
        return True

    def is_alive(self) -> bool:
        return True

    async def get_status(self) -> LockStatus:
        return HELD

    async def force_release(
        self, token: int, *, by: str, reason: str | None, terminate: bool
    ) -> bool:
        return False

    async def wait(self, seconds: float) -> bool:
        self.listens = True
        await anyio.sleep(min(seconds, 0.01))
        news, self.lock.news = self.lock.news, False
        return news


@pytest.fixture(autouse=True)
async def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that stands still while anything is done, and jumps to what is waited for next.

    So no lease runs out because the machine was busy, and no test takes the time that it is about.
    """
    now = time.monotonic()
    loop: Any = asyncio.get_running_loop()
    select = loop._selector.select

    def jump(timeout: float | None = None) -> Any:
        nonlocal now
        if timeout is None or timeout <= 0:
            return select(timeout)
        now += timeout
        return select(0)

    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(loop._selector, "select", jump)


@pytest.fixture
def lock() -> FakeLock:
    return FakeLock()


@pytest.fixture
def early_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """The heartbeat begins after a tenth of a second, also of a long lease."""
    monkeypatch.setattr("msr.locking.FIRST_HEARTBEAT", 0.1)


def unreachable() -> None:
    raise DatabaseUnreachableError("no answer")


async def until(condition: Callable[[], object]) -> None:
    """Wait for a condition of this process."""

    async def holds() -> bool:
        return bool(condition())

    await wait_until_async(holds, interval=0.005)


async def test_the_fake_is_a_locking_service(lock: FakeLock) -> None:
    """The protocol can be checked at run time."""
    assert isinstance(lock.service("worker"), LockingService)


async def test_it_is_taken_and_given_back(lock: FakeLock) -> None:
    """The body has the lease it was granted; afterwards the lock is free."""
    async with lock.hold(timeout=60.0, running="a note") as lease:
        assert (lock.holder, lock.token) == (lease.locked_by, lease.token)
        assert (lease.timeout, lease.running) == (60.0, "a note")
    assert (lock.holder, lock.attempts, lock.releases) == (None, 1, ["worker"])


async def test_every_hold_has_an_owner_of_its_own(lock: FakeLock) -> None:
    """`locked_by` names host and process and is never used twice."""
    owners = set()
    for _ in range(3):
        async with lock.hold() as lease:
            owners.add(lease.locked_by)
    me = Owner.new()
    assert len(owners) == 3
    assert all(one.startswith(f"{me.hostname}-{me.process_id}-") for one in owners)


async def test_a_short_body_opens_no_second_connection(lock: FakeLock) -> None:
    """What takes less than a second needs no heartbeat, whatever the lease."""
    async with lock.hold(timeout=600.0):
        await anyio.sleep(0.2)
    assert (lock.connections, lock.renewals) == (0, [])


async def test_a_longer_body_is_kept_alive(lock: FakeLock) -> None:
    """The heartbeat renews over one connection for as long as the body takes."""
    async with lock.hold():
        started = time.monotonic()
        await until(lambda: len(lock.renewals) >= 6)
        assert time.monotonic() - started > LEASE
    assert lock.connections == 1
    renewals = len(lock.renewals)
    await anyio.sleep(LEASE)
    assert len(lock.renewals) == renewals, "the heartbeat outlives the body"


async def test_what_runs_now_is_published_soon(lock: FakeLock, early_heartbeat: None) -> None:
    """A new note travels with a renewal of its own, long before the next one is due."""
    async with lock.hold(timeout=30.0, running="one") as lease:
        await until(lambda: lock.renewals)
        lease.running = "two"
        changed = time.monotonic()
        await until(lambda: "two" in lock.renewals)
        assert time.monotonic() - changed < 1
    assert lock.renewals == ["one", "two"]


async def test_news_make_the_heartbeat_look(lock: FakeLock, early_heartbeat: None) -> None:
    """Told that the lock may have changed hands, the heartbeat asks at once."""
    stolen = 0.0
    with pytest.raises(LockLostError):
        async with lock.hold(timeout=600.0):  # renewed every ten seconds
            await until(lambda: lock.renewals)
            lock.steal()
            lock.news, stolen = True, time.monotonic()
            await anyio.sleep(NEVER)
    assert time.monotonic() - stolen < 1


async def test_it_listens_before_it_looks(lock: FakeLock, early_heartbeat: None) -> None:
    """What changes between the first renewal and the next is heard of."""
    async with lock.hold():
        await until(lambda: lock.renewals)
    assert lock.heard


async def test_a_loss_cancels_the_body(lock: FakeLock) -> None:
    """The body stops where it awaits, and the loss is what comes out; nothing is released."""
    reached = cancelled = False
    with pytest.raises(LockLostError, match="taken or released by somebody else"):
        async with lock.hold():
            lock.steal()
            try:
                await anyio.sleep(NEVER)
            except anyio.get_cancelled_exc_class():
                cancelled = True
                raise
            reached = True
    assert (cancelled, reached) == (True, False)
    assert (lock.holder, lock.releases) == ("thief", [])


async def test_a_body_that_swallows_the_cancellation(lock: FakeLock) -> None:
    """Whoever ignores that the lock is lost is told so when leaving."""
    with pytest.raises(LockLostError):
        async with lock.hold():
            lock.steal()
            with suppress(BaseException):  # as badly written code does
                await anyio.sleep(NEVER)
    assert lock.holder == "thief"


async def test_a_body_that_fails_on_its_cancellation(lock: FakeLock) -> None:
    """An error on the way out does not hide the loss, and is kept as its cause."""
    with pytest.raises(LockLostError) as caught:
        async with lock.hold():
            lock.steal()
            try:
                await anyio.sleep(NEVER)
            finally:
                raise KeyError("cleaning up")
    assert isinstance(caught.value.__cause__, KeyError)


async def test_failing_renewals_are_tried_again(
    lock: FakeLock, caplog: pytest.LogCaptureFixture
) -> None:
    """Trouble with the connection is no loss: the heartbeat connects anew, and says so."""
    failures = 2

    def fail() -> None:
        nonlocal failures
        if failures:
            failures -= 1
            raise OSError("connection reset")

    lock.fail_renew = fail
    async with lock.hold():
        await until(lambda: len(lock.renewals) >= 3)
    assert lock.connections == 3
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1  # the second says nothing new
    assert "connection reset" in warnings[0].getMessage()


async def test_the_trust_runs_out(lock: FakeLock) -> None:
    """Without a good renewal the lease is trusted until shortly before it ends, then lost."""
    lock.fail_renew = unreachable
    with pytest.raises(LockLostError, match="renewed"):
        async with lock.hold() as lease:
            trusted_until = lease.trusted_until
            await anyio.sleep(NEVER)
    assert time.monotonic() >= trusted_until
    assert lease.trusted_until == trusted_until
    assert lock.connections > 1


async def test_the_trust_counts_from_before_the_request(lock: FakeLock) -> None:
    """An answer that took long is trusted only from the moment the question was sent."""
    asked = 0.0

    class SlowService(FakeService):
        async def acquire(
            self, owner: Owner, timeout: float, running: str | None
        ) -> Lease | LockStatus:
            nonlocal asked
            asked = time.monotonic()
            await anyio.sleep(0.2)
            return await super().acquire(owner, timeout, running)

    async with hold(SlowService(lock, "worker"), lock.connect, timeout=LEASE, wait=0) as lease:
        assert lease is not None
        assert lease.trusted_until <= asked + 0.9 * LEASE


async def test_a_heartbeat_that_hangs_is_no_renewal(lock: FakeLock) -> None:
    """A server that does not answer does not keep the body alive."""

    @asynccontextmanager
    async def connect() -> AsyncIterator[LockingService]:
        await anyio.sleep_forever()
        yield lock.service("never")

    started = time.monotonic()
    with pytest.raises(LockLostError):
        async with hold(lock.service("worker"), connect, timeout=LEASE, wait=0):
            await anyio.sleep(NEVER)
    assert time.monotonic() - started < NEVER / 2


async def test_a_secured_lease_is_left_alone(lock: FakeLock) -> None:
    """While a transaction keeps everybody out, nothing is renewed and nothing is lost."""
    async with lock.hold() as lease:
        lease.secured = True
        await anyio.sleep(2 * LEASE)
        assert lock.renewals == []
        lease.secured = False
        await until(lambda: len(lock.renewals) >= 2)
    assert lock.holder is None


async def test_a_lease_can_be_lost_after_it_was_secured(lock: FakeLock) -> None:
    """Once the transaction is over, the heartbeat is what keeps the lock again."""
    with pytest.raises(LockLostError):
        async with lock.hold() as lease:
            lease.secured = True
            await anyio.sleep(LEASE)
            lock.steal()
            lease.secured = False
            await anyio.sleep(NEVER)


async def test_the_release_finds_the_lock_stolen(lock: FakeLock) -> None:
    """A body that ended well is no success if the lock was gone before its release."""
    with pytest.raises(LockLostError, match="was taken from .* before it was released"):
        async with lock.hold(timeout=600.0):
            lock.steal()
    assert lock.holder == "thief"


async def test_the_release_finds_the_lock_stolen_after_a_failure(lock: FakeLock) -> None:
    """The loss comes out, with the body's own error as its cause."""
    with pytest.raises(LockLostError) as caught:
        async with lock.hold(timeout=600.0):
            lock.steal()
            raise ValueError("from the body")
    assert isinstance(caught.value.__cause__, ValueError)


async def test_a_loss_that_the_body_noticed_comes_out_as_it_is(lock: FakeLock) -> None:
    """The fence's own `LockLostError` is not wrapped into another one."""
    fenced = LockLostError("from the fence")
    with pytest.raises(LockLostError) as caught:
        async with lock.hold(timeout=600.0):
            lock.steal()
            raise fenced
    assert caught.value is fenced


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(3)])
async def test_what_the_body_raises_comes_out_bare(lock: FakeLock, error: BaseException) -> None:
    """No exception group, no wrapping, the same object; and the lock is free."""
    with pytest.raises(type(error)) as caught:
        async with lock.hold():
            await until(lambda: lock.renewals)
            raise error
    assert caught.value is error
    assert (lock.holder, lock.releases) == (None, ["worker"])


async def test_a_group_of_the_body_comes_out_unchanged(lock: FakeLock) -> None:
    """An exception group that the body raises is not unpacked either."""
    group = ExceptionGroup("two", [ValueError("a"), KeyError("b")])
    with pytest.raises(ExceptionGroup) as caught:
        async with lock.hold():
            raise group
    assert caught.value is group


@pytest.mark.parametrize("native", [False, True])
async def test_an_outside_cancellation_releases(lock: FakeLock, native: bool) -> None:
    """Cancelled by a scope or by asyncio, the lock is given back, however long that takes."""
    lock.slow_release = 0.1
    holding = anyio.Event()

    async def work() -> None:
        async with lock.hold(timeout=600.0):
            holding.set()
            await anyio.sleep_forever()

    if native:
        task = asyncio.create_task(work())
        await holding.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    else:
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(work)
                await holding.wait()
                scope.cancel()
        assert scope.cancelled_caught
    assert (lock.holder, lock.releases) == (None, ["worker"])


async def test_a_cancelled_attempt_forgets_no_lock(lock: FakeLock) -> None:
    """Cancelled while the lock is being granted, it is released nevertheless."""

    class SlowService(FakeService):
        async def acquire(
            self, owner: Owner, timeout: float, running: str | None
        ) -> Lease | LockStatus:
            outcome = await super().acquire(owner, timeout, running)
            await anyio.sleep(0.1)
            return outcome

    with anyio.move_on_after(0.05):
        async with hold(SlowService(lock, "worker"), lock.connect, timeout=LEASE, wait=0):
            await anyio.sleep(NEVER)
    assert lock.attempts == 1
    assert lock.holder is None


async def test_a_failing_release_tries_another_connection(lock: FakeLock) -> None:
    """If the worker's connection is gone, a new one gives the lock back."""
    lock.fail_release = unreachable
    async with lock.hold(timeout=600.0):
        pass
    assert (lock.holder, lock.releases, lock.connections) == (None, ["heartbeat"], 1)


async def test_a_release_that_cannot_be_made_is_logged(
    lock: FakeLock, caplog: pytest.LogCaptureFixture
) -> None:
    """The work is done, so that is no error: the log says until when the lock stays taken."""

    @asynccontextmanager
    async def connect() -> AsyncIterator[LockingService]:
        unreachable()
        yield lock.service("never")

    lock.fail_release = unreachable
    async with hold(lock.service("worker"), connect, timeout=600.0, wait=0):
        pass
    [warning] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "600 s" in warning.getMessage()


async def test_a_release_that_cannot_be_made_in_time(lock: FakeLock) -> None:
    """Somebody may have taken the lock since, so it does not end well."""

    def stand_still() -> None:
        lease.trusted_until = time.monotonic()
        raise DatabaseUnreachableError("no answer")

    @asynccontextmanager
    async def connect() -> AsyncIterator[LockingService]:
        raise DatabaseUnreachableError("no answer")
        yield

    lock.fail_release = stand_still
    with pytest.raises(LockLostError, match="ran out before it could be released"):
        async with hold(lock.service("worker"), connect, timeout=LEASE, wait=0.0) as held:
            assert held is not None
            lease = held


async def test_a_release_does_not_hang(lock: FakeLock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that never answers keeps nobody longer than the bound."""
    monkeypatch.setattr("msr.locking.RELEASE_BOUND", 0.1)
    lock.slow_release = 60
    started = time.monotonic()
    async with lock.hold(timeout=600.0):
        pass
    assert time.monotonic() - started < NEVER / 2


async def test_an_attempt_does_not_hang(lock: FakeLock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that never answers an attempt is an error, not a wait without end."""
    monkeypatch.setattr("msr.locking.ATTEMPT_BOUND", 0.1)

    class HangingService(FakeService):
        async def acquire(
            self, owner: Owner, timeout: float, running: str | None
        ) -> Lease | LockStatus:
            await anyio.sleep_forever()
            raise AssertionError

    with pytest.raises((TimeoutError, DatabaseUnreachableError)):
        async with hold(HangingService(lock, "worker"), lock.connect, timeout=60, wait=0):
            pass


async def test_it_waits_for_the_holder(lock: FakeLock) -> None:
    """Refused a few times, it is granted in the end; every refusal was told."""
    lock.refusals = 3
    told: list[tuple[LockStatus, float]] = []
    async with lock.hold(wait=5.0, on_wait=lambda *news: told.append(news)) as lease:
        assert lease.token == 1
    assert [status for status, _ in told] == [HELD] * 3
    waits = [waited for _, waited in told]
    assert waits == sorted(waits)
    assert lock.attempts == 4


async def test_the_wait_ends(lock: FakeLock) -> None:
    """At its end the error says who holds the lock, since when, doing what, and how long it was."""
    lock.refusals = 10**6
    started = time.monotonic()
    with pytest.raises(LockHeldError, match="other-1-x, running V7_big.sql") as caught:
        async with lock.hold(wait=0.2):
            pass
    assert 0.2 <= time.monotonic() - started < NEVER / 2
    assert caught.value.waited >= 0.2
    assert caught.value.status == HELD
    assert "2025-12-18T14:32:10" in str(caught.value)
    assert lock.attempts > 1
    assert lock.releases == []


async def test_no_wait_is_one_attempt(lock: FakeLock) -> None:
    """With `wait=0` the first refusal is the answer, and nothing is said about waiting."""
    lock.refusals = 10
    told: list[object] = []
    with pytest.raises(LockHeldError):
        async with lock.hold(wait=0.0, on_wait=lambda *news: told.append(news)):
            pass
    assert (lock.attempts, told) == (1, [])


async def test_a_lock_that_is_about_to_be_free(lock: FakeLock) -> None:
    """Refused without a holder, the error says so, with what stands in the way."""

    class ObstructedService(FakeService):
        async def acquire(
            self, owner: Owner, timeout: float, running: str | None
        ) -> Lease | LockStatus:
            return LockStatus(name="default", obstacle="session 42 cannot be ended")

    with pytest.raises(LockHeldError, match="has not ended yet; session 42 cannot be ended"):
        async with hold(ObstructedService(lock, "worker"), lock.connect, timeout=60, wait=0):
            pass


async def test_a_follower_needs_no_lock(lock: FakeLock) -> None:
    """As soon as the work is done by another, the body runs without a lease."""
    lock.refusals = 10**6
    looks = 0

    async def done() -> bool:
        nonlocal looks
        looks += 1
        return looks == 3

    async with lock.hold(wait=5.0, done=done) as lease:
        assert lease is None
    assert (looks, lock.releases) == (3, [])


async def test_a_follower_looks_before_it_asks_again(lock: FakeLock) -> None:
    """After the first refusal the work is looked at first, so a free lock is not taken for it."""
    lock.refusals = 1

    async def done() -> bool:
        return True

    async with lock.hold(wait=5.0, done=done) as lease:
        assert lease is None
    assert (lock.attempts, lock.holder) == (1, None)


async def test_the_trust_begins_with_the_attempt(lock: FakeLock) -> None:
    """A look that took longer than the lease takes nothing from a lock granted after it."""
    lock.refusals = 1

    async def done() -> bool:
        await anyio.sleep(10)
        return False

    async with lock.hold(timeout=5.0, wait=20.0, done=done) as lease:
        await anyio.sleep(1)
    assert lease.released


async def test_an_error_of_the_look_comes_out(lock: FakeLock) -> None:
    """If the work cannot go on, whoever waits for it stops waiting."""
    lock.refusals = 10**6

    async def done() -> bool:
        raise ValueError("the scripts do not fit")

    with pytest.raises(ValueError, match="do not fit"):
        async with lock.hold(wait=5.0, done=done):
            pass


async def test_an_error_of_the_body_without_a_lease(lock: FakeLock) -> None:
    """Without a lease the body's errors come out bare as well."""
    lock.refusals = 10**6

    async def done() -> bool:
        return True

    error = ValueError("from the body")
    with pytest.raises(ValueError, match="from the body") as caught:
        async with lock.hold(wait=5.0, done=done):
            raise error
    assert caught.value is error


async def test_a_busy_database_is_asked_again(lock: FakeLock) -> None:
    """`DatabaseBusyError` of an attempt is a refusal like another, told as such."""
    busy = 2

    def refuse() -> None:
        nonlocal busy
        if busy:
            busy -= 1
            raise DatabaseBusyError

    lock.refuse = refuse
    async with lock.hold(wait=5.0) as lease:
        assert lease.token == 1
    assert lock.attempts == 3


async def test_a_database_that_stays_busy(lock: FakeLock) -> None:
    """When the wait is over that is the error, for nobody is known to hold the lock."""

    def refuse() -> None:
        raise DatabaseBusyError

    lock.refuse = refuse
    with pytest.raises(DatabaseBusyError):
        async with lock.hold(wait=0.1):
            pass
    assert lock.attempts > 1


async def test_a_listener_that_fails_keeps_no_lock(lock: FakeLock) -> None:
    """What `on_wait` raises comes out, and nothing was taken."""
    lock.refusals = 5

    def on_wait(status: LockStatus, waited: float) -> None:
        raise ValueError("from the listener")

    with pytest.raises(ValueError, match="from the listener"):
        async with lock.hold(wait=5.0, on_wait=on_wait):
            pass
    assert lock.holder is None
