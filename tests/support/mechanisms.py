"""The mechanisms that the lock rests on, each with what takes it out: the negative controls.

A control runs the same scenario as its test, without a mechanism, and must see the promise broken;
else the test would prove nothing. `_statement` fails when the text that it changes is not there
any more, so that no control can go blind.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sqlite3
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import anyio

__all__ = ["MECHANISMS", "Patch", "switch_off"]

Patch = Callable[[Any, str, Any], None]
"""`setattr`, or pytest's `monkeypatch.setattr`."""

MECHANISMS: dict[str, Callable[[Patch], None]] = {}


def switch_off(name: str, patch: Patch) -> None:
    """Take one of MECHANISMS out of this process."""
    MECHANISMS[name](patch)


def mechanism(name: str) -> Callable[[Callable[[Patch], None]], Callable[[Patch], None]]:
    """Add the decorated function to MECHANISMS, as the one that takes it out."""

    def add(take_out: Callable[[Patch], None]) -> Callable[[Patch], None]:
        MECHANISMS[name] = take_out
        return take_out

    return add


def _statement(patch: Patch, module: Any, name: str, old: str, new: str) -> None:
    text = getattr(module, name)
    assert old in text, f"{module.__name__}.{name} has changed: {old!r} is not in it"
    patch(module, name, text.replace(old, new))


@mechanism("fence")
def _no_fence(patch: Patch) -> None:
    """The history row is inserted whoever has the lock."""
    from msr.handlers import postgres, sqlite

    _statement(
        patch,
        postgres,
        "FENCE",
        "token FROM {lock} WHERE name = $1 AND token = $2 AND locked_by = $3 FOR KEY SHARE",
        "$2::bigint AS token WHERE ($1::text, $3::text) IS NOT NULL",
    )
    _statement(patch, sqlite, "RENEW", "AND token = :token AND locked_by = :locked_by", "")


@mechanism("session ending")
def _no_session_ending(patch: Patch) -> None:
    """The database session of a frozen holder is left alone."""
    from msr.handlers import postgres_lock

    _statement(patch, postgres_lock, "END_SESSION", "pid = $1 AND", "pid = $1 AND false AND")


@mechanism("heartbeat")
def _no_heartbeat(patch: Patch) -> None:
    """The lease is never renewed, and its loss is never heard of from the database."""
    from msr import locking

    async def nothing(*_: object) -> None:
        await anyio.sleep_forever()

    patch(locking, "_heartbeat", nothing)


@mechanism("watch")
def _no_watch(patch: Patch) -> None:
    """Nobody looks whether the lease can still be trusted, or the session still lives."""
    from msr import locking

    async def nothing(*_: object) -> None:
        await anyio.sleep_forever()

    patch(locking, "_watch", nothing)


@mechanism("shield")
def _no_shield(patch: Patch) -> None:
    """A cancellation goes on into the attempt to take the lock, and into its release."""
    from msr import locking

    async def bare(work: Awaitable[object]) -> object:
        return await work

    patch(locking, "finish", bare)


@mechanism("signal handler")
def _no_signal_handler(patch: Patch) -> None:
    """A signal is left to Python: SIGTERM ends the process at once."""
    from msr_cli import running

    class Signals:
        """The module `signal`, except that it installs nothing."""

        SIGINT, SIGTERM = signal.SIGINT, signal.SIGTERM

        @staticmethod
        def signal(*_: object) -> None:
            pass

    assert vars(running)["signal"] is signal
    patch(running, "signal", Signals)


@mechanism("lock")
def _no_lock(patch: Patch) -> None:
    """Nobody is refused the lock, and nobody loses it."""
    from msr.handlers import postgres_lock, sqlite_lock

    key = "pg_try_advisory_lock($2)"
    _statement(patch, postgres_lock, "ACQUIRE", key, "($2::bigint IS NOT NULL)")
    _statement(patch, postgres_lock, "ACQUIRE", "(l.locked_by IS NULL OR", "(true OR")
    patch(sqlite_lock.SqliteLocking, "_is_free", lambda *_: True)


@mechanism("polling")
def _no_polling(patch: Patch) -> None:
    """Who waits does so inside a statement that blocks, or inside a transaction (SQLite)."""
    from msr.handlers import postgres_lock, sqlite_lock

    blocking = "(pg_advisory_lock($2) IS NOT NULL)"
    _statement(patch, postgres_lock, "ACQUIRE", "pg_try_advisory_lock($2)", blocking)
    original = sqlite_lock.SqliteLocking._read

    def read(self: Any, db: Any, busy: float) -> Any:
        if not db.in_transaction:
            db.execute("BEGIN")
        return original(self, db, busy)

    patch(sqlite_lock.SqliteLocking, "_read", read)


@mechanism("client watch")
def _no_client_watch(patch: Patch) -> None:
    """The server does not look for its client during a statement (PostgreSQL)."""
    from msr.handlers.postgres import PostgresSession

    async def nothing(*_: object) -> None:
        pass

    patch(PostgresSession, "watch_client", nothing)


@mechanism("proof of death")
def _no_proof_of_death(patch: Patch) -> None:
    """A holder that is gone keeps the lock for its lease."""
    from msr.handlers import postgres_lock
    from msr.handlers.sqlite_lock import SqliteLocking

    proof = "OR (l.session IS NOT NULL AND $7 IS NOT NULL)"
    _statement(patch, postgres_lock, "ACQUIRE", proof, "")
    patch(SqliteLocking, "_holder", lambda *_: "unknown")


@mechanism("expiry")
def _no_expiry(patch: Patch) -> None:
    """Who waits does not look whether the lease has run out meanwhile."""
    from msr.handlers import postgres_lock, sqlite_lock

    expired = "l.expires_at <= clock_timestamp()"
    _statement(patch, postgres_lock, "ACQUIRE", f"OR {expired}", "")
    _statement(patch, postgres_lock, "READ_STATUS", f"coalesce({expired}, false)", "false")
    expired = f"coalesce(expires_at <= {sqlite_lock.NOW}, 0)"
    _statement(patch, sqlite_lock, "READ_STATUS", expired, "0")


@mechanism("comparison on release")
def _no_comparison_on_release(patch: Patch) -> None:
    """Whoever releases frees the lock, whose ever it is."""
    from msr.handlers import postgres_lock, sqlite_lock

    ours = "token = $2 AND locked_by = $3 FOR UPDATE"
    anybody = "($2::bigint, $3::text) IS NOT NULL FOR UPDATE"
    _statement(patch, postgres_lock, "RELEASE", ours, anybody)
    _statement(patch, sqlite_lock, "RELEASE", "AND token = :token AND locked_by = :locked_by", "")


@mechanism("answer to release")
def _no_answer_to_release(patch: Patch) -> None:
    """A release that changed nothing is taken for a good one."""
    from msr import locking

    original = locking._release

    async def release(*arguments: Any) -> bool:
        await original(*arguments)
        return True

    patch(locking, "_release", release)


@mechanism("comparison on forced release")
def _no_comparison_on_forced_release(patch: Patch) -> None:
    """A forced release takes the lock as it is now for the one that the operator saw."""
    from msr.handlers.postgres_lock import PostgresLocking
    from msr.handlers.sqlite_lock import SqliteLocking

    for service in (PostgresLocking, SqliteLocking):
        original = service.force_release

        async def release(
            self: Any, token: int, *, original: Any = original, **options: Any
        ) -> bool:
            return bool(await original(self, (await self.get_status()).token, **options))

        patch(service, "force_release", release)


@mechanism("option --no-lock")
def _no_option_no_lock(patch: Patch) -> None:
    """`--no-lock` is read, and that is all."""
    from msr import MigrationScriptExecutor

    original = MigrationScriptExecutor.migrate

    async def migrate(self: Any, *arguments: Any, **options: Any) -> Any:
        return await original(self, *arguments, **{**options, "use_lock": None})

    patch(MigrationScriptExecutor, "migrate", migrate)


@mechanism("defaults")
def _no_defaults(patch: Patch) -> None:
    """In a `locking` table that is given in part, what is not given is empty."""
    from msr import config

    original = config._values

    def values(layer: Any, prefix: str) -> dict[str, Any]:
        given = original(layer, prefix)
        return {"enabled": False, **given} if prefix and given else given

    patch(config, "_values", values)


@mechanism("owner columns")
def _no_owner_columns(patch: Patch) -> None:
    """Host and process are cut out of the holder's id, at its hyphens."""
    from msr.handlers.postgres_lock import PostgresLocking
    from msr.handlers.sqlite_lock import SqliteLocking

    for service in (PostgresLocking, SqliteLocking):
        original = service._status

        def status(self: Any, row: Any, original: Any = original) -> Any:
            found = original(self, row)
            host, process, *_ = (found.locked_by or "-").split("-")
            number = int(process) if process.isdigit() else None
            return replace(found, hostname=host, process_id=number)

        patch(service, "_status", status)


@mechanism("single transaction")
def _no_single_transaction(patch: Patch) -> None:
    """What a script did is committed before its history row is written."""
    from msr.handlers.postgres import PostgresSession
    from msr.handlers.sqlite import SqliteSession

    original, original_hop = PostgresSession.record, SqliteSession._record

    async def record(self: Any, *arguments: Any, **options: Any) -> None:
        await self.connection.execute("COMMIT")
        await self.connection.execute("BEGIN")
        await original(self, *arguments, **options)

    def record_hop(self: SqliteSession, db: sqlite3.Connection, *arguments: Any) -> None:
        db.set_authorizer(None)
        db.execute("COMMIT")
        db.execute("BEGIN IMMEDIATE")
        original_hop(self, db, *arguments)

    patch(PostgresSession, "record", record)
    patch(SqliteSession, "_record", record_hop)


@mechanism("second try")
def _no_second_try(patch: Patch) -> None:
    """The heartbeat ends with the first thing that goes wrong on its connection."""
    from msr import locking

    original = locking._beat

    async def beat(*arguments: Any) -> None:
        with contextlib.suppress(Exception):
            await original(*arguments)
        await anyio.sleep_forever()

    patch(locking, "_beat", beat)


def _no_look_before(verdict: bool, patch: Patch) -> None:
    """A commit whose answer was lost is taken for done, or for undone, without a look."""
    from msr.handlers.postgres import PostgresSession
    from msr.handlers.sqlite import SqliteSession

    async def resolve_commit(self: Any) -> bool:
        return bool(verdict and self._committing)

    patch(PostgresSession, "resolve_commit", resolve_commit)
    if not verdict:
        patch(SqliteSession, "resolve_commit", resolve_commit)


mechanism("look before applied")(functools.partial(_no_look_before, True))
mechanism("look before rolled back")(functools.partial(_no_look_before, False))


@mechanism("patience without heartbeat")
def _no_patience_without_heartbeat(patch: Patch) -> None:
    """A heartbeat that gets no connection of its own is a heartbeat that failed."""
    from msr.errors import DatabaseUnreachableError

    patch(DatabaseUnreachableError, "is_full", property(lambda _: False, lambda *_: None))


@mechanism("renewal between scripts")
def _no_renewal_between_scripts(patch: Patch) -> None:
    """The worker leaves all renewing to the heartbeat."""
    from msr.locking import Lease

    patch(Lease, "is_due", False)


@mechanism("leftovers")
def _no_leftovers(patch: Patch) -> None:
    """Nobody looks for what a killed script left behind (PostgreSQL)."""
    from msr.handlers.postgres import PostgresSession

    async def nothing(*_: object) -> list[str]:
        return []

    patch(PostgresSession, "find_leftovers", nothing)


@mechanism("wake-up")
def _no_wake_up(patch: Patch) -> None:
    """A waiter sleeps from poll to poll, as long as it may, whatever happens meanwhile."""
    from msr import locking
    from msr.handlers import postgres_lock, sqlite_lock

    async def sleep(_: object, seconds: float) -> bool:
        await anyio.sleep(seconds)
        return False

    patch(locking, "FIRST_POLL", locking.LAST_POLL)
    patch(postgres_lock.PostgresLocking, "wait", sleep)
    patch(sqlite_lock.SqliteLocking, "wait", sleep)


@mechanism("look at the history")
def _no_look_at_the_history(patch: Patch) -> None:
    """A waiter does not look whether its work has been done already."""
    from msr import locking, runner

    def hold(*arguments: Any, **options: Any) -> Any:
        return locking.hold(*arguments, **{**options, "done": None})

    patch(runner, "hold", hold)


@mechanism("pooler detection")
def _no_pooler_detection(patch: Patch) -> None:
    """Every connection is taken for a direct one (PostgreSQL)."""
    from msr.handlers.postgres import PostgresSession

    settle, read_history = PostgresSession.settle, PostgresSession.read_history

    def settle_as_direct(self: PostgresSession, *arguments: Any) -> None:
        settle(self, *arguments)
        self.pooled = False

    async def read_history_as_direct(self: PostgresSession) -> Any:
        rows = await read_history(self)
        self.pooled = False
        return rows

    patch(PostgresSession, "settle", settle_as_direct)
    patch(PostgresSession, "read_history", read_history_as_direct)


@mechanism("respect for the key")
def _no_respect_for_the_key(patch: Patch) -> None:
    """Behind a pooler nobody looks whether a direct session has the key (PostgreSQL)."""
    from msr.handlers import postgres_lock

    asked = "AND ($7 IS NOT NULL OR NOT EXISTS ("
    _statement(patch, postgres_lock, "ACQUIRE", asked, "AND (true OR NOT EXISTS (")


@mechanism("empty statement cache")
def _statement_cache(patch: Patch) -> None:
    """asyncpg keeps prepared statements, as it does unless it is told not to (PostgreSQL)."""
    import asyncpg

    connect = asyncpg.connect

    def connect_with_cache(*arguments: Any, **options: Any) -> Any:
        assert options.pop("statement_cache_size") == 0
        return connect(*arguments, **options)

    patch(asyncpg, "connect", connect_with_cache)


@mechanism("started row")
def _no_started_row(patch: Patch) -> None:
    """A script outside a transaction is recorded when it is finished, and not before."""
    from msr.handlers.postgres import PostgresSession
    from msr.handlers.sqlite import SqliteSession

    for session in (PostgresSession, SqliteSession):
        original = session.record

        async def record(
            self: Any, row: Any, lease: Any, *, original: Any = original, **options: Any
        ) -> None:
            if row.status == "applied":
                await original(self, row, lease, **{**options, "replaces": None})

        patch(session, "record", record)


@mechanism("lock file")
def _no_lock_file(patch: Patch) -> None:
    """A holder is judged by its process id, as most pid files are (SQLite)."""
    from msr.handlers.sqlite_lock import SqliteLocking

    def judge(_: Any, row: dict[str, Any]) -> str | None:
        if row["locked_by"] is None:
            return None
        try:
            os.kill(row["process_id"], 0)
        except ProcessLookupError:
            return "gone"
        return "alive"

    patch(SqliteLocking, "_holder", judge)


@mechanism("doubt without a lock file")
def _no_doubt_without_lock_file(patch: Patch) -> None:
    """A holder that has no lock file is taken for dead (SQLite)."""
    from msr.handlers.sqlite_lock import SqliteLocking

    judge = SqliteLocking._holder

    def judge_boldly(self: SqliteLocking, row: dict[str, Any]) -> str | None:
        verdict = judge(self, row)
        return "gone" if verdict == "unknown" else verdict

    patch(SqliteLocking, "_holder", judge_boldly)


@mechanism("patient commit")
def _no_patient_commit(patch: Patch) -> None:
    """Who is in the way of BEGIN or COMMIT is waited for a moment only (SQLite)."""
    from msr.handlers import sqlite

    assert sqlite.WRITE_BUSY > sqlite.BUSY_PIECE
    patch(sqlite, "WRITE_BUSY", 0.0)


@mechanism("immediate begin")
def _no_immediate_begin(patch: Patch) -> None:
    """A script's transaction begins to write with its first own change (SQLite)."""
    from msr.handlers import sqlite
    from msr.handlers.sqlite import SqliteSession

    def begin(self: SqliteSession, db: sqlite3.Connection, *_: Any) -> None:
        self._patiently(db, "BEGIN", sqlite.WRITE_BUSY)

    patch(SqliteSession, "_begin", begin)


@mechanism("database clock")
def _no_database_clock(patch: Patch) -> None:
    """The time in the lock's statements is the client's (PostgreSQL)."""
    from msr.handlers import postgres_lock
    from msr.handlers.postgres import PostgresSession

    clock = "clock_timestamp()"
    for name in ("ACQUIRE", "RENEW", "READ_STATUS", "FORCE_RELEASE", "END_SESSION"):
        assert clock in getattr(postgres_lock, name), f"{name} has changed: no {clock} in it"
    original = PostgresSession.sql

    def sql(self: Any, template: str) -> str:
        return original(self, template).replace(clock, f"to_timestamp({time.time()!r})")

    patch(PostgresSession, "sql", sql)
