"""Everything `msr` raises on purpose; only `StatementError` is between a handler and a unit.

    MsrError
    ├── ConfigError              a setting, URL or option cannot be used
    ├── MissingDriverError       the database driver is not installed
    ├── ValidationError          scripts and history disagree: `.problems`
    ├── DatabaseError            the database refused what msr needs
    │   ├── DatabaseUnreachableError
    │   └── DatabaseBusyError    the database stayed locked by somebody else
    ├── MigrationError           a script failed and was rolled back: `.script`, `.line`
    │   └── RollbackError        the way down of a script did
    └── LockError
        ├── LockHeldError        another holds the lock and the wait is over
        ├── LockLostError        the lock was ours and is not any more
        ├── LockChangedError     the lock changed hands before a forced release
        └── LockBlockedError     the holder's open transaction blocks a forced release

What an error knows is in its attributes; the message is for people, in one line, and says what
to do. The docstring of a class is its default message. No message ever holds a password.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from msr.locking import LockStatus
    from msr.results import MigrationResult
    from msr.scripts import Problem

__all__ = [
    "ConfigError",
    "DatabaseBusyError",
    "DatabaseError",
    "DatabaseUnreachableError",
    "LockBlockedError",
    "LockChangedError",
    "LockError",
    "LockHeldError",
    "LockLostError",
    "MigrationError",
    "MissingDriverError",
    "MsrError",
    "RollbackError",
    "ValidationError",
]


class MsrError(Exception):
    """Something went wrong in msr."""

    result: MigrationResult | None = None
    """What a run had done before it failed; set by every run of an executor."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (type(self).__doc__ or "").partition("\n")[0])


class ConfigError(MsrError):
    """A setting cannot be used.

    `key` is the setting's path (`locking.timeout`), `source` where the value stands (a file's
    path, an environment variable, or `argument`).
    """

    def __init__(self, message: str, *, key: str | None = None, source: str | None = None) -> None:
        self.key = key
        self.source = source
        where = ": ".join(part for part in (source, key) if part)
        super().__init__(f"{where}: {message}" if where else message)


class MissingDriverError(MsrError):
    """The database driver is not installed."""

    def __init__(self, driver: str, extra: str) -> None:
        self.driver = driver
        self.extra = extra
        super().__init__(
            f"{driver} is not installed: run pip install 'migration-script-runner[{extra}]'"
        )


class ValidationError(MsrError):
    """The scripts and the history do not fit together.

    `problems` holds every problem found, not only the first. Nothing has run.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(str(problem) for problem in self.problems))


class DatabaseError(MsrError):
    """The database refused what msr needs."""


class DatabaseUnreachableError(DatabaseError):
    """The database cannot be reached.

    `is_full`: it can, but it has no connection to spare for this role.
    """

    is_full: bool = False


class DatabaseBusyError(DatabaseError):
    """The database is locked by another process; try again when that has finished."""


class MigrationError(MsrError):
    """A script failed; its changes were rolled back.

    `script` is the path below the folder, `line` and `column` (from 1, or None where the database
    does not tell) point into that file, `source` is the line's text, `server_message` is the
    database's own sentence, `sqlstate` its code, `hint` its advice, `detail` what it says besides.
    `rolled_back` is False where part of the script may have been committed (outside a transaction,
    or by itself), and None where the connection broke in the commit and its fate is unknown.
    `applied` names the scripts that this run had applied before, `undone` those that were rolled
    back with it.
    """

    _done = "applied"

    def __init__(
        self,
        script: str,
        server_message: str,
        *,
        line: int | None = None,
        column: int | None = None,
        sqlstate: str | None = None,
        hint: str | None = None,
        detail: str | None = None,
        source: str | None = None,
        undone: Sequence[str] = (),
        rolled_back: bool | None = True,
        applied: Sequence[str] = (),
    ) -> None:
        self.script = script
        self.server_message = server_message
        self.line = line
        self.column = column
        self.sqlstate = sqlstate
        self.hint = hint
        self.detail = detail
        self.source = source
        self.undone = tuple(undone)
        self.rolled_back = rolled_back
        self.applied = tuple(applied)
        super().__init__(server_message)

    @property
    def place_and_message(self) -> str:
        """Where it failed, and the database's sentence."""
        line = f", line {self.line}" if self.line else ""
        column = f", column {self.column}" if self.column else ""
        return f"{self.script}{line}{column}: {self.server_message}"

    def __str__(self) -> str:
        advice = f" ({self.hint.strip().rstrip('.')})" if self.hint else ""
        others = ", ".join(self.undone)
        undone = {
            True: "the script was rolled back" + (f" with {others}" if others else ""),
            False: "what the script had committed stays, so check it by hand, then msr repair",
            None: "whether it was committed is not known, so look with msr list",
        }[self.rolled_back]
        before = f"{self._done} before it: {', '.join(self.applied) or 'nothing'}"
        return f"{self.place_and_message}{advice}; {undone}; {before}"


class RollbackError(MigrationError):
    """The way down of a script failed; what it had changed was rolled back.

    The attributes are those of `MigrationError`; `applied` names the scripts that this run had
    taken back before.
    """

    _done = "taken back"


class LockError(MsrError):
    """The migration lock is not as it should be."""


class LockHeldError(LockError):
    """Another process holds the migration lock.

    `status` is the lock as last seen, `waited` the seconds spent waiting for it.
    """

    def __init__(self, message: str, *, status: LockStatus, waited: float) -> None:
        self.status = status
        self.waited = waited
        super().__init__(message)


class LockLostError(LockError):
    """The migration lock was lost, so the work under it was cancelled and rolled back."""


class LockChangedError(LockError):
    """The lock changed hands meanwhile; nothing was released. Look again with: msr lock:status"""


class LockBlockedError(LockError):
    """The holder is inside a transaction that blocks the release; nothing was released."""
