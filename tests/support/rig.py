"""`msr` with a fault built in: a mechanism switched off, or a signal at a chosen step.

A `Rig` is for a process (`start_msr(..., rig=...)`, `Rig.command`), `switch_off` for the test's
own. The signal is a real one, sent by the process to itself, so that it arrives exactly there:
SIGSTOP freezes it until the test sends SIGCONT, SIGKILL leaves it no time for anything.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import anyio

__all__ = ["MECHANISMS", "STEPS", "Rig", "is_stopped", "switch_off"]

ROOT = Path(__file__).parents[2]

Patch = Callable[[Any, str, Any], None]
"""`setattr`, or pytest's `monkeypatch.setattr`."""


@dataclass(frozen=True)
class Rig:
    """What is wrong with a process: mechanisms `without` which it runs, a signal `at` a step.

    `at` is "before" or "after" and one of STEPS, for example "before commit"; `nth` counts how
    often the process came there, from one.
    """

    without: Sequence[str] = ()
    at: str | None = None
    send: signal.Signals = signal.SIGSTOP
    nth: int = 1

    def command(self, *arguments: str) -> list[str]:
        """The command line that runs `msr` with `arguments`, rigged."""
        return [sys.executable, "-m", "tests.support.rig", json.dumps(asdict(self)), *arguments]

    @property
    def environment(self) -> dict[str, str]:
        """What that command line needs in its environment."""
        return {"PYTHONPATH": str(ROOT)}

    def apply(self, patch: Patch = setattr) -> None:
        """Build the faults into this process."""
        for mechanism in self.without:
            switch_off(mechanism, patch)
        if self.at is not None:
            when, _, step = self.at.partition(" ")
            for owner, name in _places(step):
                send = functools.partial(os.kill, os.getpid(), self.send)
                wrapped = _surrounded(getattr(owner, name), when, self.nth, send)
                patch(owner, name, wrapped)


def is_stopped(pid: int) -> bool:
    """Whether the process is frozen by SIGSTOP."""
    status = Path(f"/proc/{pid}/stat").read_text()
    return status.rpartition(")")[2].split()[0] == "T"


def switch_off(mechanism: str, patch: Patch) -> None:
    """Take one of MECHANISMS out of this process."""
    MECHANISMS[mechanism](patch)


# Steps


def _places(step: str) -> Sequence[tuple[Any, str]]:
    """Where the code of both handlers takes the step; imported here, as `msr` itself does late."""
    from asyncpg.transaction import Transaction

    from msr.handlers.postgres import PostgresSession
    from msr.handlers.postgres_lock import PostgresLocking
    from msr.handlers.sqlite import SqliteSession
    from msr.handlers.sqlite_lock import SqliteLocking
    from msr.runner import Run

    places: dict[str, Sequence[tuple[Any, str]]] = {
        "acquire": [(PostgresLocking, "acquire"), (SqliteLocking, "acquire")],
        "begin": [(Transaction, "start"), (SqliteSession, "_begin")],
        "body": [(Run, "_run_body")],
        "record": [(PostgresSession, "record"), (SqliteSession, "_record")],
        "commit": [(Transaction, "commit"), (SqliteSession, "_commit")],
        "renew": [(PostgresLocking, "renew"), (SqliteLocking, "renew")],
        "release": [(PostgresLocking, "release"), (SqliteLocking, "release")],
    }
    return places[step]


STEPS = ("acquire", "begin", "body", "record", "commit", "renew", "release")
"""In the order of a run; `renew` is the heartbeat's, from the end of the first second on."""


def _surrounded(original: Any, when: str, nth: int, act: Callable[[], None]) -> Any:
    """`original`, with `act` before or after its `nth` call; a coroutine function stays one."""
    calls = itertools.count(1)

    @functools.wraps(original)
    def surrounded(*arguments: Any, **options: Any) -> Any:
        chosen = next(calls) == nth
        if chosen and when == "before":
            act()
        result = original(*arguments, **options)
        if chosen and when == "after":
            act()
        return result

    @functools.wraps(original)
    async def surrounded_coroutine(*arguments: Any, **options: Any) -> Any:
        chosen = next(calls) == nth
        if chosen and when == "before":
            act()
        result = await original(*arguments, **options)
        if chosen and when == "after":
            act()
        return result

    return surrounded_coroutine if inspect.iscoroutinefunction(original) else surrounded


# Mechanisms


def _statement(patch: Patch, module: Any, name: str, old: str, new: str) -> None:
    text = getattr(module, name)
    assert old in text, f"{module.__name__}.{name} has changed: {old!r} is not in it"
    patch(module, name, text.replace(old, new))


def _no_fence(patch: Patch) -> None:
    """The history row is inserted whoever has the lock."""
    from msr.handlers import postgres, sqlite

    _statement(
        patch,
        postgres,
        "FENCED_RECORD",
        "token FROM {lock} WHERE name = $7 AND token = $8 AND locked_by = $9 FOR KEY SHARE",
        "$8::bigint WHERE ($7::text, $9::text) IS NOT NULL",
    )
    _statement(patch, sqlite, "RENEW", "AND token = :token AND locked_by = :locked_by", "")


def _no_session_ending(patch: Patch) -> None:
    """The database session of a frozen holder is left alone."""
    from msr.handlers import postgres_lock

    _statement(patch, postgres_lock, "END_SESSION", "pid = $1 AND", "pid = $1 AND false AND")


def _no_heartbeat(patch: Patch) -> None:
    """The lease is never renewed, and its loss is never heard of from the database."""
    from msr import locking

    async def nothing(*_: object) -> None:
        await anyio.sleep_forever()

    patch(locking, "_heartbeat", nothing)


def _no_watch(patch: Patch) -> None:
    """Nobody looks whether the lease can still be trusted, or the session still lives."""
    from msr import locking

    async def nothing(*_: object) -> None:
        await anyio.sleep_forever()

    patch(locking, "_watch", nothing)


def _no_lock(patch: Patch) -> None:
    """Nobody is refused the lock, and nobody loses it."""
    from msr.handlers import postgres_lock, sqlite_lock

    key = "pg_try_advisory_lock($2)"
    _statement(patch, postgres_lock, "ACQUIRE", key, "($2::bigint IS NOT NULL)")
    _statement(patch, postgres_lock, "ACQUIRE", "(l.locked_by IS NULL OR", "(true OR")
    patch(sqlite_lock.SqliteLocking, "_is_free", lambda *_: True)


MECHANISMS: dict[str, Callable[[Patch], None]] = {
    "fence": _no_fence,
    "session ending": _no_session_ending,
    "heartbeat": _no_heartbeat,
    "watch": _no_watch,
    "lock": _no_lock,
}


def main() -> None:
    """Run `msr` with the rig given as JSON in the first argument."""
    faults = json.loads(sys.argv.pop(1))
    Rig(**{**faults, "send": signal.Signals(faults["send"])}).apply()

    from msr_cli.__main__ import main as run

    run()


if __name__ == "__main__":
    main()
