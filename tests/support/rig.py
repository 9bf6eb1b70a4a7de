"""`msr` with a fault built in: a mechanism switched off, or a signal at a chosen step.

A `Rig` is for a process (`start_msr(..., rig=...)`, `Rig.command`), `switch_off` and `act_at` are
for the test's own. The signal is a real one, sent by the process to itself, so that it arrives
exactly there: SIGSTOP freezes it until the test sends SIGCONT, SIGKILL leaves it no time at all.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.support.mechanisms import Patch, switch_off

__all__ = ["STEPS", "UNAWARE", "Rig", "act_at", "is_asleep", "is_stopped"]

ROOT = Path(__file__).parents[2]

UNAWARE = ("heartbeat", "watch")
"""Without these mechanisms nobody hears of the loss of a lock before the fence or the release."""


@dataclass(frozen=True)
class Rig:
    """What is wrong with a process: mechanisms `without` which it runs, a signal `at` a step.

    `bounds` are seconds that a test has no time for, by the name of the constant in `msr`.
    `at` is "before" or "after" and one of STEPS, for example "before commit"; `nth` counts how
    often the process came there, from one.
    """

    without: Sequence[str] = ()
    at: str | None = None
    send: signal.Signals = signal.SIGSTOP
    nth: int = 1
    bounds: Mapping[str, float] = field(default_factory=dict)

    def command(self, *arguments: str) -> list[str]:
        """The command line that runs `msr` with `arguments`, rigged."""
        return [sys.executable, "-m", "tests.support.rig", self.to_json(), *arguments]

    def to_json(self) -> str:
        """Itself, for another process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Rig:
        """What `to_json` gave."""
        faults = json.loads(text)
        return cls(**{**faults, "send": signal.Signals(faults["send"])})

    @property
    def environment(self) -> dict[str, str]:
        """What that command line needs in its environment."""
        return {"PYTHONPATH": str(ROOT)}

    def apply(self, patch: Patch = setattr) -> None:
        """Build the faults into this process."""
        for mechanism in self.without:
            switch_off(mechanism, patch)
        for name, seconds in self.bounds.items():
            module, _, constant = name.rpartition(".")
            patch(importlib.import_module(module), constant, seconds)
        if self.at is not None:
            act_at(self.at, functools.partial(_send, self.send), self.nth, patch)


def _send(number: signal.Signals) -> None:
    """Signal this process, here and now.

    The kernel may hand a process's signal to any of its threads, while this one runs on for a
    moment; a stop or a kill that is sent to a thread is the whole process's as well.
    """
    if number in (signal.SIGSTOP, signal.SIGKILL):
        signal.pthread_kill(threading.get_ident(), number)
    else:
        os.kill(os.getpid(), number)


def is_stopped(pid: int) -> bool:
    """Whether the process is frozen by SIGSTOP."""
    return _state(pid) == "T"


def is_asleep(pid: int) -> bool:
    """Whether the process waits inside the kernel, for example for a key to be pressed."""
    return _state(pid) == "S"


def _state(pid: int) -> str:
    status = Path(f"/proc/{pid}/stat").read_text()
    return status.rpartition(")")[2].split()[0]


# Steps


def act_at(at: str, act: Callable[[], None], nth: int = 1, patch: Patch = setattr) -> None:
    """Have this process call `act` at a step; SQLite's work is done, and `act` called, in a thread.

    See `Rig` for `at` and `nth`.
    """
    when, _, step = at.partition(" ")
    for owner, name in _places(step):
        patch(owner, name, _surrounded(getattr(owner, name), when, nth, act))


def _places(step: str) -> Sequence[tuple[Any, str]]:
    """Where the code of both handlers takes the step; imported here, as `msr` itself does late."""
    from asyncpg.transaction import Transaction

    from msr.handlers.postgres import PostgresSession
    from msr.handlers.postgres_lock import PostgresLocking
    from msr.handlers.sqlite import SqliteSession
    from msr.handlers.sqlite_lock import SqliteLocking
    from msr.unit import Unit

    places: dict[str, Sequence[tuple[Any, str]]] = {
        "acquire": [(PostgresLocking, "acquire"), (SqliteLocking, "acquire")],
        "script": [(Unit, "_attempt")],
        "begin": [(Transaction, "start"), (SqliteSession, "_begin")],
        "body": [(Unit, "_run_body")],
        "record": [(PostgresSession, "record"), (SqliteSession, "_record")],
        "commit": [(Transaction, "commit"), (SqliteSession, "_commit")],
        "renew": [(PostgresLocking, "renew"), (SqliteLocking, "renew")],
        "release": [(PostgresLocking, "release"), (SqliteLocking, "release")],
        "free": [(PostgresLocking, "_change"), (SqliteLocking, "_change")],
    }
    return places[step]


STEPS = ("acquire", "script", "begin", "body", "record", "commit", "renew", "release", "free")
"""In the order of a run; `renew` is the heartbeat's, from the end of the first second on.

`free` is the change of the row inside `release` (and inside `renew`): after it, the row is free
and what proves life is still ours.
"""


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

    # asyncpg hides its coroutine functions behind a check that is none.
    is_coroutine = inspect.iscoroutinefunction(inspect.unwrap(original))
    return surrounded_coroutine if is_coroutine else surrounded


def main() -> None:
    """Run `msr`, or the program after `-c`, with the rig given as JSON in the first argument."""
    Rig.from_json(sys.argv.pop(1)).apply()

    if sys.argv[1:2] == ["-c"]:
        sys.argv.pop(0)
        exec(compile(sys.argv.pop(1), "-c", "exec"), {"__name__": "__main__"})
        return
    from msr_cli.__main__ import main as run

    run()


if __name__ == "__main__":
    main()
