"""Both handlers, driven by random steps, do what a few lines of Python say that they do.

The reference is a row, who has the session lock, and who is in a script's transaction. After each
step the answer that the handler gave and what now stands in the database are compared with it. All
sessions live in this process, one event loop drives them, and nothing runs at the same time: what
may happen between two statements is the business of `postgres_protocol`.

`MSR_TEST_EXAMPLES` is how many sequences of steps are tried, on each database.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    closing,
    contextmanager,
    nullcontext,
    suppress,
)
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import ModuleType
from typing import Any, TypeVar

import asyncpg
import pytest
from hypothesis import HealthCheck, Phase, note, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import msr
from msr.config import Config
from msr.handlers import postgres, postgres_lock, sqlite, sqlite_lock
from msr.handlers.base import StatementError
from msr.plan import HistoryRow
from msr.urls import parse_url
from tests.support.cli import PATIENCE, wait_until_async

T = TypeVar("T")

# Read once: `clean_environment` removes it.
EXAMPLES = int(os.environ.get("MSR_TEST_EXAMPLES", "30"))
STEPS = 20

TIMEOUT = 600.0
PAST = "2001-02-03T04:05:06.789Z"
SESSIONS = 3

DROP = """
DROP TABLE IF EXISTS migration_locks, schema_version;
DROP SEQUENCE IF EXISTS migration_locks_token;
"""


ANYBODY = "AND $2::bigint IS NOT NULL AND $3::text IS NOT NULL"


class Undo(Exception):
    """Raised into a transaction to roll it back."""


@dataclass(eq=False)
class Client:
    """One session, and what the reference knows of it."""

    session: Any
    context: AbstractAsyncContextManager[Any]
    pid: int | None
    lease: msr.Lease | None = None
    """What it was granted and has not released, whether or not it still has it."""
    key: bool = False
    """It has the session lock, or its file's lock."""
    suspect: Client | None = None
    transaction: AbstractAsyncContextManager[None] | None = None
    begun_with: msr.Lease | None = None
    recorded: int | None = None


@dataclass
class Row:
    """The lock's row. `holder` is whose session is named on it."""

    token: int
    locked_by: str | None = None
    holder: Client | None = None
    expired: bool = False
    forced: int | None = None


@dataclass
class Reference:
    """What should be in the database."""

    row: Row | None = None
    greatest: int = 0
    history: dict[int, int] = field(default_factory=dict)

    def is_current(self, lease: msr.Lease) -> bool:
        row = self.row
        return row is not None and (row.token, row.locked_by) == (lease.token, lease.locked_by)


class LockMachine(RuleBasedStateMachine):
    """What both databases have in common; the subclasses say what differs."""

    url = ""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.config = Config()
        self.clients: list[Client] = []
        self.gone: list[Client] = []
        self.leases: list[msr.Lease] = []
        self.reference = Reference()
        self.version = 0

    # What differs.

    @property
    def handler(self) -> msr.DatabaseHandler:
        raise NotImplementedError

    async def prepare(self) -> None:
        """Begin with an empty database."""
        raise NotImplementedError

    async def sql(self, statement: str) -> list[tuple[Any, ...]]:
        """One statement past msr; no rows where there is no such table."""
        raise NotImplementedError

    async def cut(self, client: Client) -> None:
        """End a client without a word, and wait until the database knows."""
        raise NotImplementedError

    def predicted_grant(self, client: Client) -> bool | None:
        """Whether an attempt is granted; None when it finds the database busy."""
        raise NotImplementedError

    async def refused(self, client: Client) -> None:
        """Bring the reference up to date after a refusal."""

    def life(self, holder: Client | None) -> str:
        """What the status says of a holder's life."""
        raise NotImplementedError

    @property
    def is_fenced(self) -> bool:
        """A transaction keeps others from changing the row's token."""
        raise NotImplementedError

    @property
    def is_writing(self) -> bool:
        """A transaction keeps others from writing at all."""
        raise NotImplementedError

    # Helpers.

    def run(self, awaitable: Awaitable[T]) -> T:
        async def bounded() -> T:
            async with asyncio.timeout(PATIENCE):
                return await awaitable

        return self.runner.run(bounded())

    @property
    def idle(self) -> list[Client]:
        """The clients that are in no transaction."""
        return [client for client in self.clients if client.transaction is None]

    @property
    def asking(self) -> list[Client]:
        """Those that may ask for the lock: a session asks again only after it has released."""
        return [client for client in self.idle if client.lease is None]

    @property
    def holding(self) -> list[Client]:
        """Those that were granted the lock, and may have lost it."""
        return [client for client in self.idle if client.lease is not None]

    @property
    def busy(self) -> list[Client]:
        return [client for client in self.clients if client.transaction is not None]

    def free(self, token: int) -> None:
        assert self.reference.row is not None
        assert token > self.reference.greatest
        self.reference.row = Row(token, forced=self.reference.row.token)
        self.reference.greatest = token

    async def row(self) -> dict[str, Any] | None:
        columns = ("token", "locked_by", "expires_at", "released_token")
        rows = await self.sql(f"SELECT {', '.join(columns)} FROM migration_locks")
        return dict(zip(columns, rows[0], strict=True)) if rows else None

    async def lose(self, client: Client, *, crashed: bool = False) -> None:
        """A client's session has ended: so has its transaction, without effect."""
        self.clients.remove(client)
        self.gone.append(client)
        client.key = False
        for other in self.clients:
            if other.suspect is client:
                other.suspect = None
        if client.transaction is not None and crashed:
            with suppress(Exception):  # what a dead process would have raised is no matter
                await client.transaction.__aexit__(Undo, Undo(), None)
        elif client.transaction is not None:
            with pytest.raises((msr.MsrError, StatementError)):
                await client.transaction.__aexit__(None, None, None)
        client.transaction = client.recorded = None

    # The steps.

    @initialize()
    def begin(self) -> None:
        self.run(self.prepare())

    @rule(number=st.integers(0, 3), name=st.sampled_from([1, 1, 1, 2]))
    def ask(self, number: int, name: int) -> None:
        """Somebody tries to get the lock."""
        while len(self.clients) < SESSIONS:
            self.connect()
        if self.asking:
            self.acquire(number, name)

    @rule(what=st.integers(0, 99), number=st.integers(0, 3), which=st.integers(0, 5))
    @precondition(lambda self: self.leases)
    def work(self, what: int, number: int, which: int) -> None:
        """Somebody goes on with the lock, or with what it still takes for the lock."""
        choices: list[Callable[[int, int], object]] = []
        if self.idle:
            choices += [self.renew, self.release]
        if self.holding:
            choices += [self.begin_a_script, self.run_a_script]
        if self.busy:
            choices += [self.commit_a_script, self.end_a_script]
        if any(client.recorded is None for client in self.busy):
            choices += [self.record]
        if choices:
            self.do(pick(choices, what), number, which)

    @rule(what=st.integers(0, 99), number=st.integers(0, 3), which=st.integers(0, 5))
    @precondition(lambda self: self.leases)
    def intervene(self, what: int, number: int, which: int) -> None:
        """Something happens, or somebody looks."""
        choices: list[Callable[[int, int], object]] = []
        if self.idle:
            choices += [self.look, self.force_release, self.terminate]
        if self.reference.row is not None and self.reference.row.locked_by is not None:
            choices += [self.expire]
        if self.reference.row is not None and not (self.is_fenced or self.is_writing):
            choices += [self.delete_the_row]
        if any(client.key for client in self.clients):
            choices += [self.crash]
        if choices:
            self.do(pick(choices, what), number, which)

    def do(self, step: Callable[[int, int], object], number: int, which: int) -> None:
        note(f"that is: {step.__name__}")
        step(number, which)

    def connect(self) -> None:
        async def connect() -> Client:
            context = self.handler.connect(self.config)
            session: Any = await context.__aenter__()
            pid = getattr(session.connection, "get_server_pid", lambda: None)()
            return Client(session, context, pid)

        self.clients.append(self.run(connect()))

    def acquire(self, number: int, name: int) -> None:
        client = pick(self.asking, number)
        expected = self.predicted_grant(client)
        owner = msr.Owner(f"host-{name}", "host", name)  # only the token tells two holds apart
        before = self.reference.row
        asking = client.session.locking.acquire(owner, TIMEOUT, "a step")
        if expected is None:
            with pytest.raises(msr.DatabaseBusyError):
                self.run(asking)
            return
        outcome = self.run(asking)
        if not expected:
            assert isinstance(outcome, msr.LockStatus), f"granted: {outcome}"
            self.compare(outcome, before)
            self.run(self.refused(client))
            return
        assert isinstance(outcome, msr.Lease), f"refused: {outcome}"
        assert outcome.token > self.reference.greatest
        assert (outcome.name, outcome.locked_by) == ("default", owner.locked_by)
        forced = before.forced if before is not None else None
        self.reference.row = Row(outcome.token, owner.locked_by, client, forced=forced)
        self.reference.greatest = outcome.token
        client.lease, client.key = outcome, True
        self.leases.append(outcome)

    def renew(self, number: int, which: int) -> None:
        client, lease = pick(self.idle, number), pick(self.leases, -1 - which)
        renewing = client.session.locking.renew(lease)
        if lease.secured:  # SQLite: its own transaction is what keeps the others away
            assert self.run(renewing) is True
            return
        current = self.reference.is_current(lease)
        if self.is_writing and current:  # else it sees that it is not, and need not write
            with pytest.raises(msr.DatabaseBusyError):
                self.run(renewing)
            return
        assert self.run(renewing) is current
        if current and self.reference.row is not None:
            self.reference.row.expired = False

    def release(self, number: int, which: int) -> None:
        """One's own lease, or with nothing of one's own somebody else's, or one from before."""
        client = pick((self.holding if which < 3 else self.asking) or self.idle, number)
        lease = client.lease or pick(self.leases, 2 - which)
        if self.is_fenced and self.reference.is_current(lease):
            return  # test_assumptions looks at this
        releasing = client.session.locking.release(lease)
        current = self.reference.is_current(lease)
        if self.is_writing and current:
            with pytest.raises(msr.DatabaseBusyError):
                self.run(releasing)
            return
        assert self.run(releasing) is current
        if current and self.reference.row is not None:
            self.reference.row = Row(lease.token, forced=self.reference.row.forced)
        client.key, client.lease = False, None  # a release is the end, whatever it found

    def terminate(self, number: int, which: int) -> None:
        self.force_release(number, which, terminate=self.can_terminate)

    def force_release(self, number: int, which: int, terminate: bool = False) -> None:
        client, row = pick(self.idle, number), self.reference.row
        token = pick(self.leases, -1 - which).token
        holder = row.holder if row is not None else None
        current = row is not None and row.token == token and row.locked_by is not None
        terminate = terminate and holder is not client
        forcing = client.session.locking.force_release(
            token, by="somebody", reason="a step", terminate=terminate
        )
        if self.is_fenced and current and not terminate:
            with self.impatience(), pytest.raises(msr.LockBlockedError):
                self.run(forcing)
            return
        assert self.run(forcing) is current
        if not current:
            return
        if terminate and holder in self.clients and holder.key:
            self.run(self.end(holder))
        after = self.run(self.row())
        assert after is not None
        self.free(after["token"])

    can_terminate = False

    def impatience(self) -> AbstractContextManager[object]:
        """While somebody is in the way who will not go."""
        return nullcontext()

    async def end(self, client: Client) -> None:
        """The database ends a session: wait until it has."""
        raise NotImplementedError

    def look(self, number: int, _: int) -> None:
        client = pick(self.idle, number)
        self.compare(self.run(client.session.locking.get_status()), self.reference.row)

    def compare(self, status: msr.LockStatus, row: Row | None) -> None:
        if row is None:
            assert not status.is_locked
            assert status.locked_by is None
            return
        assert (status.token, status.locked_by) == (row.token, row.locked_by)
        assert status.is_locked is (row.locked_by is not None)
        assert status.is_expired is row.expired
        assert status.holder == (self.life(row.holder) if row.locked_by is not None else None)
        forced = status.forced_release
        assert (forced.token if forced is not None else None) == row.forced

    def delete_the_row(self, *_: int) -> None:
        self.run(self.sql("DELETE FROM migration_locks"))
        self.reference.row = None

    def expire(self, *_: int) -> None:
        if not self.is_writing and self.reference.row is not None:
            self.run(self.sql(f"UPDATE migration_locks SET expires_at = '{PAST}'"))
            self.reference.row.expired = True

    def begin_a_script(self, number: int, _: int) -> None:
        self.start(pick(self.holding, number))

    def start(self, client: Client) -> bool:
        """Begin a script's transaction; False when that was refused, as it should be."""
        assert client.lease is not None
        transaction: Any = client.session.transaction(client.lease)
        expected = self.predicted_begin(client.lease)
        if expected is not None:
            with pytest.raises(expected):
                self.run(transaction.__aenter__())
            return False
        self.run(transaction.__aenter__())
        client.transaction, client.begun_with = transaction, client.lease
        return True

    def predicted_begin(self, lease: msr.Lease) -> type[Exception] | None:
        """What a script's beginning raises."""
        return None

    def record(self, number: int, _: int) -> None:
        self.insert(pick([client for client in self.busy if client.recorded is None], number))

    def insert(self, client: Client) -> bool:
        """Write the history; False when the fence forbids it, and then the script is over."""
        lease = client.begun_with
        assert lease is not None
        self.version += 1
        row = HistoryRow(self.version, f"script_{self.version}", "checksum", "applied")
        recording = client.session.record(row, lease)
        if self.reference.is_current(lease):
            self.run(recording)
            client.recorded = self.version
            return True
        with pytest.raises(msr.LockLostError):
            self.run(recording)
        self.finish(client, commit=False)
        return False

    def commit_a_script(self, number: int, _: int) -> None:
        client = pick(self.busy, number)
        if client.recorded is not None or self.insert(client):
            self.finish(client, commit=True)

    def end_a_script(self, number: int, _: int) -> None:
        self.finish(pick(self.busy, number), commit=False)

    def run_a_script(self, number: int, _: int) -> None:
        client = pick(self.holding, number)
        if self.start(client) and self.insert(client):
            self.finish(client, commit=True)

    def finish(self, client: Client, *, commit: bool) -> None:
        assert client.transaction is not None
        lease = client.begun_with
        assert lease is not None
        if commit:
            self.run(client.transaction.__aexit__(None, None, None))
            assert client.recorded is not None
            assert self.reference.is_current(lease), "S2"
            self.reference.history[client.recorded] = lease.token
            self.committed()
        else:
            self.run(client.transaction.__aexit__(Undo, Undo(), None))
        client.transaction = client.begun_with = client.recorded = None

    def committed(self) -> None:
        """What else a commit changes."""

    def crash(self, number: int, _: int) -> None:
        client = pick([client for client in self.clients if client.key], number)
        self.run(self.cut(client))
        self.run(self.lose(client, crashed=True))

    @invariant()
    def the_database_is_as_expected(self) -> None:
        async def look() -> None:
            row, expected = await self.row(), self.reference.row
            if expected is None:
                assert row is None or (row["locked_by"] is None and row["token"] == 0)
            else:
                assert row is not None
                assert (row["token"], row["locked_by"]) == (expected.token, expected.locked_by)
                assert row["released_token"] == expected.forced
                expires = row["expires_at"]
                if isinstance(expires, str):
                    expires = datetime.fromisoformat(expires)
                assert (expires is not None and expires < datetime.now(UTC)) is expected.expired
            rows = await self.sql("SELECT version, token FROM schema_version")
            assert dict(rows) == self.reference.history

        self.run(look())

    def teardown(self) -> None:
        try:
            self.run(self.close())
        finally:
            self.runner.close()

    async def close(self) -> None:
        for client in self.clients:
            if client.transaction is not None:
                await client.transaction.__aexit__(Undo, Undo(), None)
        for client in [*self.clients, *self.gone]:
            with suppress(msr.MsrError):
                await client.context.__aexit__(None, None, None)


class PostgresMachine(LockMachine):
    """The key is a session lock; a fence blocks a change of the token, an open script nothing."""

    can_terminate = True
    admin: asyncpg.Connection

    @contextmanager
    def impatience(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(postgres_lock, "BLOCKED_AFTER", 0.05)
            yield

    @property
    def handler(self) -> msr.DatabaseHandler:
        return msr.PostgresHandler(self.url)

    async def prepare(self) -> None:
        self.admin = await asyncpg.connect(self.url)
        await self.admin.execute(DROP)
        async with self.handler.connect(self.config) as session:
            await session.create_history()

    async def sql(self, statement: str) -> list[tuple[Any, ...]]:
        try:
            return [tuple(row) for row in await self.admin.fetch(statement)]
        except asyncpg.UndefinedTableError:
            return []

    async def cut(self, client: Client) -> None:
        client.session.connection.terminate()
        await self.until_gone(client)

    async def end(self, client: Client) -> None:
        await self.until_gone(client)
        await wait_until_async(closed(client))
        await self.lose(client)

    async def until_gone(self, client: Client) -> None:
        query = f"SELECT pid FROM pg_stat_activity WHERE pid = {client.pid}"

        async def gone() -> bool:
            return not await self.admin.fetch(query)

        await wait_until_async(gone)

    def keeper(self) -> Client | None:
        return next((client for client in self.clients if client.key), None)

    def predicted_grant(self, client: Client) -> bool | None:
        return self.keeper() is None

    async def refused(self, client: Client) -> None:
        keeper, row = self.keeper(), self.reference.row
        assert keeper is not None
        if row is not None and row.holder is keeper:
            client.suspect = None if not row.expired else client.suspect
            if not row.expired:
                return
            fenced = self.is_fenced
            await self.end(keeper)
            if not fenced:
                after = await self.row()
                assert after is not None
                self.free(after["token"])
        elif client.suspect is keeper:
            await self.end(keeper)
        else:
            client.suspect = keeper

    def life(self, holder: Client | None) -> str:
        return "alive" if holder is not None and holder.key else "gone"

    @property
    def is_fenced(self) -> bool:
        return any(client.recorded is not None for client in self.clients)

    @property
    def is_writing(self) -> bool:
        return False

    async def close(self) -> None:
        await super().close()
        await self.admin.close()


class SqliteMachine(LockMachine):
    """One writer: a script's transaction blocks everybody else, and its commit renews the lease."""

    @property
    def handler(self) -> msr.DatabaseHandler:
        return msr.SqliteHandler(self.url)

    @property
    def path(self) -> str:
        return parse_url(self.url).path or ""

    async def prepare(self) -> None:
        with closing(sqlite3.connect(self.path, isolation_level=None)) as db:
            for table in ("migration_locks", "migration_locks_token", "schema_version"):
                db.execute(f"DROP TABLE IF EXISTS {table}")
        async with self.handler.connect(self.config) as session:
            await session.create_history()

    async def sql(self, statement: str) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(self.path, isolation_level=None)) as db:
            try:
                return db.execute(statement).fetchall()
            except sqlite3.OperationalError as error:
                if "no such table" in str(error):
                    return []
                raise

    async def cut(self, client: Client) -> None:
        """What the kernel does when the process dies: roll back, drop the lock on the file."""
        if client.transaction is not None:
            await client.transaction.__aexit__(Undo, Undo(), None)
            client.transaction = None
        locking = client.session.locking
        if locking._file is not None:
            os.close(locking._file[0])
            locking._file = None

    def predicted_grant(self, client: Client) -> bool | None:
        row = self.reference.row
        if row is None or row.locked_by is None or row.expired:
            return None if self.is_writing and not (row and row.locked_by) else not self.is_writing
        return self.life(row.holder) == "gone" and not self.is_writing

    def predicted_begin(self, lease: msr.Lease) -> type[Exception] | None:
        if self.is_writing:
            return msr.DatabaseBusyError
        return None if self.reference.is_current(lease) else msr.LockLostError

    def committed(self) -> None:
        assert self.reference.row is not None
        self.reference.row.expired = False

    def life(self, holder: Client | None) -> str:
        return "alive" if holder is not None and holder.key else "gone"

    @property
    def is_fenced(self) -> bool:
        return self.is_writing

    @property
    def is_writing(self) -> bool:
        return any(client.transaction is not None for client in self.clients)


def closed(client: Client) -> Callable[[], Awaitable[bool]]:
    async def closed() -> bool:
        return bool(client.session.connection.is_closed())

    return closed


def pick(choices: list[T], number: int) -> T:
    return choices[number % len(choices)]


def drive(machine: type[LockMachine], url: str, *, control: bool = False) -> None:
    """Run the machine against one database, which it empties before each sequence of steps.

    A control is expected to fail: then the failing steps are neither printed nor made fewer, and
    come from a seed that leads to them soon.
    """
    bound = type(machine.__name__, (machine,), {"url": url})
    chosen = settings(
        max_examples=EXAMPLES, stateful_step_count=STEPS, suppress_health_check=list(HealthCheck)
    )
    if control:
        chosen = settings(chosen, max_examples=400, phases=[Phase.generate], print_blob=False)
        bound = seed(1)(bound)
    run_state_machine_as_test(bound, settings=chosen)


@pytest.fixture
def quick_postgres(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The second look at a session with the key and without the row is one too many."""
    monkeypatch.setattr(postgres_lock, "GRACE", -1.0)
    # A session that is ended to let a forced release pass may take its time.
    monkeypatch.setattr(postgres_lock, "BLOCKED_AFTER", PATIENCE)
    return postgres_url


@pytest.fixture
def quick_sqlite(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Nobody else works on this database, so waiting for it is in vain."""
    monkeypatch.setattr(sqlite, "WRITE_BUSY", 0.02)
    monkeypatch.setattr(sqlite, "BUSY_PIECE", 0.02)
    monkeypatch.setattr(sqlite_lock, "ATTEMPT_BUSY", 0.02)
    monkeypatch.setattr(sqlite_lock, "CHANGE_BUSY", 0.02)
    monkeypatch.setattr(sqlite_lock, "BLOCKED_AFTER", 0.02)
    return sqlite_url


@pytest.mark.timeout(60 + 3 * EXAMPLES)
def test_postgres_does_as_the_reference(quick_postgres: str) -> None:
    """Random steps on PostgreSQL, by sessions that crash, are ended, and lose the lock."""
    drive(PostgresMachine, quick_postgres)


@pytest.mark.timeout(60 + 3 * EXAMPLES)
def test_sqlite_does_as_the_reference(quick_sqlite: str) -> None:
    """The same steps on SQLite."""
    drive(SqliteMachine, quick_sqlite)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("module", "statement", "old", "new"),
    [
        (postgres_lock, "RENEW", "AND token = $2", "AND $2::bigint IS NOT NULL"),
        (postgres_lock, "RELEASE", "AND token = $2", "AND $2::bigint IS NOT NULL"),
        (postgres_lock, "FORCE_RELEASE", "token = nextval('{token}'), ", ""),
        (postgres_lock, "ACQUIRE", "token = nextval('{token}')", "token = l.token + 1"),
        (postgres, "FENCE", "AND token = $2 AND locked_by = $3", ANYBODY),
    ],
)
def test_a_wrong_statement_is_found_on_postgres(
    quick_postgres: str,
    monkeypatch: pytest.MonkeyPatch,
    module: ModuleType,
    statement: str,
    old: str,
    new: str,
) -> None:
    """The control: with one condition less in one statement, the same steps end in a failure."""
    assert old in getattr(module, statement)
    monkeypatch.setattr(module, statement, getattr(module, statement).replace(old, new))
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        drive(PostgresMachine, quick_postgres, control=True)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("module", "statement", "old", "new"),
    [
        (sqlite_lock, "RENEW", "AND token = :token", ""),
        (sqlite, "RENEW", "AND token = :token", ""),
        (sqlite_lock, "RELEASE", "AND token = :token", ""),
        (sqlite_lock, "FORCE_RELEASE", f"token = {sqlite_lock.LAST_TOKEN}, ", ""),
        (sqlite_lock, "NEXT_TOKEN", "value + 1", "(SELECT 1 + ifnull(max(token), 0) FROM {lock})"),
    ],
)
def test_a_wrong_statement_is_found_on_sqlite(
    quick_sqlite: str,
    monkeypatch: pytest.MonkeyPatch,
    module: ModuleType,
    statement: str,
    old: str,
    new: str,
) -> None:
    """The control on SQLite; the fence is the statement `RENEW` of the module `sqlite`."""
    assert old in getattr(module, statement)
    monkeypatch.setattr(module, statement, getattr(module, statement).replace(old, new))
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        drive(SqliteMachine, quick_sqlite, control=True)
