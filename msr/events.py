"""What a run tells its listeners, as frozen dataclasses. A listener is one callable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from msr.locking import LockStatus

__all__ = [
    "Event",
    "Listener",
    "LockAcquired",
    "ScriptApplied",
    "ScriptStarted",
    "WaitingForLock",
]


@dataclass(frozen=True, slots=True)
class WaitingForLock:
    """Another holds the lock; told at every poll. `waited` is in seconds."""

    status: LockStatus
    waited: float


@dataclass(frozen=True, slots=True)
class LockAcquired:
    """The lock is ours; `token` is the fencing token, `waited` the seconds it took."""

    token: int
    waited: float


@dataclass(frozen=True, slots=True)
class ScriptStarted:
    """Script `number` of `total` starts; `script` is its path below the folder."""

    script: str
    number: int
    total: int


@dataclass(frozen=True, slots=True)
class ScriptApplied:
    """Script `number` of `total` has been committed; `duration` is in seconds."""

    script: str
    number: int
    total: int
    duration: float


Event: TypeAlias = WaitingForLock | LockAcquired | ScriptStarted | ScriptApplied
Listener: TypeAlias = Callable[[Event], None]
