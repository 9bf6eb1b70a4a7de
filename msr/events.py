"""What a run tells its listeners, as frozen dataclasses. A listener is one callable.

It may be `async def`; then events reach it one after the other, in their order, while the run goes
on. What a listener raises is logged and breaks nothing.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from msr.locking import LockStatus
from msr.plan import Action
from msr.results import MigrationResult

__all__ = [
    "Event",
    "Listener",
    "LockAcquired",
    "LockLost",
    "LockReleased",
    "RunFailed",
    "RunFinished",
    "RunStarted",
    "ScriptFailed",
    "ScriptFinished",
    "ScriptProgress",
    "ScriptRetried",
    "ScriptStarted",
    "WaitingForLock",
]

logger = logging.getLogger("msr")

FAILED = "a listener failed on %s"

LISTENERS_BOUND = 5.0
"""Seconds that a run waits at its end for listeners that have not come to an end."""


@dataclass(frozen=True, slots=True)
class RunStarted:
    """A run of `command` ("migrate", "down", "baseline", "repair") begins."""

    command: str


@dataclass(frozen=True, slots=True)
class RunFinished:
    """It has done what it was asked for."""

    command: str
    result: MigrationResult


@dataclass(frozen=True, slots=True)
class RunFailed:
    """It has not; the `result` of an `MsrError` is what it had done before."""

    command: str
    error: BaseException


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
class LockReleased:
    """The lock was ours to the end, and is given back."""

    token: int


@dataclass(frozen=True, slots=True)
class LockLost:
    """The lock was ours and is not any more; what ran under it was cancelled."""

    token: int
    reason: str


@dataclass(frozen=True, slots=True)
class ScriptStarted:
    """Script `number` of `total` starts; `script` is its path below the folder.

    `transaction` is False where it opted out, so that what it does stays if it is interrupted.
    """

    script: str
    number: int
    total: int
    action: Action = "apply"
    transaction: bool = True


@dataclass(frozen=True, slots=True)
class ScriptProgress:
    """The running script says how far it is: `done` of `of`, None where it knows no end."""

    script: str
    number: int
    total: int
    done: float
    of: float | None
    note: str


@dataclass(frozen=True, slots=True)
class ScriptRetried:
    """It waited too long for a lock, was rolled back, and is tried again in `pause` seconds.

    `attempt` counts from 1: the one that failed.
    """

    script: str
    number: int
    total: int
    attempt: int
    pause: float
    reason: str


@dataclass(frozen=True, slots=True)
class ScriptFinished:
    """What script `number` of `total` did has been committed; `duration` is in seconds.

    With the `action` "forget" nothing ran, and `number` may be 0: a repeatable script will be run
    again.
    """

    script: str
    number: int
    total: int
    duration: float
    action: Action = "apply"


@dataclass(frozen=True, slots=True)
class ScriptFailed:
    """Script `number` of `total` failed, and the run with it."""

    script: str
    number: int
    total: int
    error: BaseException


Event: TypeAlias = (
    RunStarted
    | RunFinished
    | RunFailed
    | WaitingForLock
    | LockAcquired
    | LockReleased
    | LockLost
    | ScriptStarted
    | ScriptProgress
    | ScriptRetried
    | ScriptFinished
    | ScriptFailed
)
Listener: TypeAlias = Callable[[Event], Awaitable[None] | None]


class Announcer:
    """Tells the listeners of one run. What is async has a task, and a queue, for each listener."""

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self._listeners = listeners
        self._queues: dict[int, asyncio.Queue[tuple[Event, Awaitable[None]] | None]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    def tell(self, event: Event) -> None:
        """Call every listener; what is async is awaited in the background, in order."""
        for number, listener in enumerate(self._listeners):
            try:
                answer = listener(event)
            except Exception:
                logger.exception(FAILED, type(event).__name__)
                continue
            if inspect.isawaitable(answer):
                if number not in self._queues:
                    self._queues[number] = asyncio.Queue()
                    self._tasks.append(asyncio.create_task(_deliver(self._queues[number])))
                self._queues[number].put_nowait((event, answer))

    async def finish(self) -> None:
        """Wait until every listener has heard everything, within `LISTENERS_BOUND`."""
        for queue in self._queues.values():
            queue.put_nowait(None)
        if not self._tasks:
            return
        _, late = await asyncio.wait(self._tasks, timeout=LISTENERS_BOUND)
        for task in late:
            task.cancel()
            logger.warning("a listener has not finished within %g s", LISTENERS_BOUND)
        await asyncio.gather(*late, return_exceptions=True)
        for queue in self._queues.values():
            while not queue.empty():
                if (told := queue.get_nowait()) and inspect.iscoroutine(told[1]):
                    told[1].close()  # or Python complains that nobody awaited it


async def _deliver(queue: asyncio.Queue[tuple[Event, Awaitable[None]] | None]) -> None:
    task = asyncio.current_task()
    while told := await queue.get():
        event, answer = told
        try:
            await answer
        except (Exception, asyncio.CancelledError):
            if task is not None and task.cancelling():
                raise
            logger.exception(FAILED, type(event).__name__)
