"""What the executor needs of a database. Implement these two protocols for one of your own."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import fields
from datetime import datetime
from typing import Any, Literal, Protocol

from msr.config import Config
from msr.errors import DatabaseError
from msr.locking import Lease, LockingService
from msr.plan import HistoryRow

__all__ = [
    "DatabaseHandler",
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
        committed: bool = False,
    ) -> None:
        self.message = message
        self.line = line
        self.column = column
        self.sqlstate = sqlstate
        self.hint = hint
        self.committed = committed
        super().__init__(message)


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

    def transaction(self, lease: Lease | None) -> AbstractAsyncContextManager[None]:
        """A transaction: commits on leaving, rolls back on any exception, within bounded time."""
        ...

    async def resolve_commit(self) -> bool | None:
        """After `transaction` raised: whether it was committed all the same.

        A commit that was interrupted may have taken effect. None if that cannot be found out.
        """
        ...

    async def execute_script(self, text: str) -> None:
        """Run every statement of an SQL script. Raises `StatementError`."""
        ...

    async def record(self, row: HistoryRow, lease: Lease | None) -> None:
        """Write the history row, inside a transaction, as its last statement.

        This is the fence: with a lease, the row is written only if the lease's (token, locked_by)
        is the current one and stays so until the commit; otherwise raises `LockLostError`. A row
        "started" by the same lease becomes "applied". `started_at` is the database's to fill in.
        """
        ...

    async def find_leftovers(self, text: str) -> Sequence[str]:
        """What a killed script may have left half-made, in words: `the invalid index "app"."i"`."""
        ...

    async def drop_leftover(self, leftover: str) -> None:
        """Remove what `find_leftovers` named."""
        ...

    async def repair(self, version: int, applied: bool, lease: Lease | None) -> None:
        """Turn a "started" row into an "applied" one, or remove it; fenced like `record`."""
        ...


class DatabaseHandler(Protocol):
    """One database. Holds no connection and no state of a run."""

    @property
    def dialect(self) -> Literal["postgresql", "sqlite"]:
        """Which SQL the scripts are written in: decides how they are split and checked."""
        ...

    def connect(self, config: Config) -> AbstractAsyncContextManager[Session]:
        """Open one connection. Raises `DatabaseUnreachableError`."""
        ...


_COLUMNS = tuple(field.name for field in fields(HistoryRow))


def history_row(values: Sequence[Any]) -> HistoryRow:
    """A row of the history from its columns, in the order of the class, the time as ISO text."""
    columns = dict(zip(_COLUMNS, values, strict=True))
    return HistoryRow(**{**columns, "started_at": datetime.fromisoformat(columns["started_at"])})


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
