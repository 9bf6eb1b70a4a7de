"""Database migrations under a lock you can trust."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from msr.config import Config, LockingConfig, load_config
from msr.errors import (
    ConfigError,
    DatabaseBusyError,
    DatabaseError,
    DatabaseUnreachableError,
    LockBlockedError,
    LockChangedError,
    LockError,
    LockHeldError,
    LockLostError,
    MigrationError,
    MissingDriverError,
    MsrError,
    RollbackError,
    ValidationError,
)
from msr.events import (
    Event,
    Listener,
    LockAcquired,
    LockLost,
    LockReleased,
    RunFailed,
    RunFinished,
    RunStarted,
    ScriptFailed,
    ScriptFinished,
    ScriptProgress,
    ScriptRetried,
    ScriptStarted,
    WaitingForLock,
)
from msr.executor import MigrationScriptExecutor, dialect_of, migrate, validate
from msr.handlers.base import DatabaseHandler, Limits, Session, StatementError
from msr.locking import ForcedRelease, Lease, LockingService, LockStatus, Owner
from msr.plan import HistoryRow, ScriptStatus
from msr.results import ExecutedScript, MigrationResult, PlannedScript, ScriptChange
from msr.scripts import Problem
from msr.urls import Dialect

if TYPE_CHECKING:
    from msr.handlers.postgres import PostgresHandler
    from msr.handlers.sqlite import SqliteHandler
    from msr.new import new_script
    from msr.prepare import ScriptContext

__version__ = "0.1.0"

__all__ = [
    "Config",
    "ConfigError",
    "DatabaseBusyError",
    "DatabaseError",
    "DatabaseHandler",
    "DatabaseUnreachableError",
    "Dialect",
    "Event",
    "ExecutedScript",
    "ForcedRelease",
    "HistoryRow",
    "Lease",
    "Limits",
    "Listener",
    "LockAcquired",
    "LockBlockedError",
    "LockChangedError",
    "LockError",
    "LockHeldError",
    "LockLost",
    "LockLostError",
    "LockReleased",
    "LockStatus",
    "LockingConfig",
    "LockingService",
    "MigrationError",
    "MigrationResult",
    "MigrationScriptExecutor",
    "MissingDriverError",
    "MsrError",
    "Owner",
    "PlannedScript",
    "PostgresHandler",
    "Problem",
    "RollbackError",
    "RunFailed",
    "RunFinished",
    "RunStarted",
    "ScriptChange",
    "ScriptContext",
    "ScriptFailed",
    "ScriptFinished",
    "ScriptProgress",
    "ScriptRetried",
    "ScriptStarted",
    "ScriptStatus",
    "Session",
    "SqliteHandler",
    "StatementError",
    "ValidationError",
    "WaitingForLock",
    "__version__",
    "dialect_of",
    "load_config",
    "migrate",
    "new_script",
    "validate",
]


# What is loaded when it is asked for: most starts of an application have nothing to do.
_LATER = {
    "PostgresHandler": "msr.handlers.postgres",
    "ScriptContext": "msr.prepare",
    "SqliteHandler": "msr.handlers.sqlite",
    "new_script": "msr.new",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
