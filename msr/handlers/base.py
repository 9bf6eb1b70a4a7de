"""What the executor needs of a database. Implement these two protocols for one of your own."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any, Protocol

from msr.config import Config
from msr.errors import DatabaseError
from msr.locking import Lease, LockingService
from msr.plan import HistoryRow
from msr.urls import Dialect

__all__ = [
    "CANCELED",
    "LOCK_TIMEOUT",
    "NO_LIMITS",
    "DatabaseHandler",
    "Limits",
    "Session",
    "StatementError",
    "foreign_table",
    "history_row",
    "quoted_names",
]


class StatementError(Exception):
    """A statement of a script failed; `line` and `column` count from 1 in the script.

    `committed`: part of the script has been committed, because it ended the transaction itself.
    """

    def __init__(
        self,
        message: str,
        *,
        line: int | None = None,
        column: int | None = None,
        sqlstate: str | None = None,
        hint: str | None = None,
        detail: str | None = None,
        committed: bool = False,
    ) -> None:
        self.message = message
        self.line = line
        self.column = column
        self.sqlstate = sqlstate
        self.hint = hint
        self.detail = detail
        self.committed = committed
        super().__init__(message)


LOCK_TIMEOUT = "55P03"
CANCELED = "57014"
"""The sqlstates of a statement that waited longer than `lock_timeout`, and of one that was
cancelled, by `statement_timeout` most of all; PostgreSQL's, and here those of every handler."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a script may wait for a lock, and take for a statement: seconds, zero for ever."""

    lock_timeout: float = 0.0
    statement_timeout: float = 0.0


NO_LIMITS = Limits()


class Session(Protocol):
    """One database connection, for one run. Not for use by two tasks at once."""

    @property
    def locking(self) -> LockingService | None:
        """The lock through this connection, or None where the handler has no locking service."""
        ...

    async def script_connection(self) -> Any:
        """The driver's own connection, for a Python script to use."""
        ...

    async def read_history(self) -> Sequence[HistoryRow]:
        """Every row of the history by version, in one query. No table means: no rows."""
        ...

    async def create_history(self) -> None:
        """Create the history table if it is missing; safe when many processes do it at once."""
        ...

    async def require_outside_transaction(self) -> None:
        """Raise `ConfigError` if this connection cannot run scripts outside a transaction."""
        ...

    def transaction(
        self, lease: Lease | None, lock_timeout: float = 0.0
    ) -> AbstractAsyncContextManager[None]:
        """A transaction: commits on leaving, rolls back on any exception, within bounded time.

        Where it must wait for another session to begin at all, it does so for `lock_timeout`
        seconds, then raises `DatabaseBusyError`; zero leaves that to the handler.
        """
        ...

    def nested(self) -> AbstractAsyncContextManager[None]:
        """One script among several in a transaction: neither its savepoints nor its settings last.

        Raises `StatementError` if the script went back to before itself.
        """
        ...

    def limited(self, limits: Limits) -> AbstractAsyncContextManager[None]:
        """Bound what a script does in the body; not what comes after it in the same transaction.

        A statement that waits longer than `limits.lock_timeout` for another session fails with the
        sqlstate `LOCK_TIMEOUT`, one that takes longer than `limits.statement_timeout` with
        `CANCELED`.
        """
        ...

    async def resolve_commit(self) -> bool | None:
        """After `transaction` raised: whether it was committed all the same.

        A commit that was interrupted may have taken effect. None if that cannot be found out.
        """
        ...

    async def execute_script(self, text: str) -> None:
        """Run every statement of an SQL script. Raises `StatementError`."""
        ...

    async def record(
        self,
        row: HistoryRow | None,
        lease: Lease | None,
        *,
        replaces: HistoryRow | None = None,
        text: str | None = None,
        last: bool = True,
    ) -> None:
        """Write a row of the history, inside a transaction, as its last statement.

        `row` comes instead of `replaces`; without a row, that is removed. `text` is the script's,
        for `read_text`; None keeps what there is for an unchanged checksum. `started_at` and the
        user are the database's to fill in where they are None; the row of a script that was started
        keeps its `started_at`. `noted_at` is always the database's, and the token the lease's.

        This is the fence: with a lease, the change is made only if the lease's (token, locked_by)
        is the current one and, from the `last` row of the transaction on, stays so until the
        commit. Raises `LockLostError` if it is not, or if the history does not hold `replaces`, or
        already holds a row for the script.
        """
        ...

    async def read_text(self, row: HistoryRow) -> str | None:
        """The script's text as it was recorded with this row; None where it was not kept."""
        ...

    async def find_leftovers(self, text: str) -> Sequence[str]:
        """What a killed script may have left half-made, in words: `the invalid index "app"."i"`."""
        ...

    async def drop_leftover(self, leftover: str) -> None:
        """Remove what `find_leftovers` named."""
        ...


class DatabaseHandler(Protocol):
    """One database. Holds no connection and no state of a run."""

    @property
    def dialect(self) -> Dialect:
        """Which SQL the scripts are written in: decides how they are split and checked."""
        ...

    def connect(self, config: Config) -> AbstractAsyncContextManager[Session]:
        """Open one connection. Raises `DatabaseUnreachableError`."""
        ...


_COLUMNS = tuple(field.name for field in fields(HistoryRow))


def history_row(values: Sequence[Any]) -> HistoryRow:
    """A row of the history from its columns, in the order of the class, times as ISO text."""
    columns = dict(zip(_COLUMNS, values, strict=True))
    for name in ("started_at", "noted_at"):
        if columns[name] is not None:
            columns[name] = datetime.fromisoformat(columns[name])
    return HistoryRow(**columns)


def foreign_table(config: Config, sentence: str) -> DatabaseError:
    """The error for a table of ours that turns out to have other columns."""
    return DatabaseError(
        f"a table named {config.locking.table_name} or {config.table_name} exists but was not made "
        f"by msr ({sentence}): set locking.table_name and table_name to names of your own"
    )


def quoted_names(config: Config) -> dict[str, str]:
    """The tables of the configuration, quoted for the statements, under the names used there."""
    lock = config.locking.table_name
    names = {"lock": lock, "history": config.table_name, "token": f"{lock}_token"}
    return {key: ".".join(f'"{part}"' for part in name.split(".")) for key, name in names.items()}
