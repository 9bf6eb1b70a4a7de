"""Real processes that keep the lock: one that does nothing else, and a migration at a gate."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.cli import PATIENCE, end, start_python, wait_until
from tests.support.rig import Rig

__all__ = ["Gate", "Holder", "hold_lock"]

LOST = 9
"""How a holder ends whose lock was lost, like `msr` itself."""

_HOLDER = f"""
import asyncio, json, sys
import anyio, msr

async def main(url, running, locking):
    executor = msr.MigrationScriptExecutor.from_url(url, locking=locking)
    try:
        async with executor.lock(wait={PATIENCE}, running=running) as lease:
            print(json.dumps([lease.token, lease.locked_by]), flush=True)
            told = anyio.Event()
            asyncio.get_running_loop().add_reader(0, told.set)
            await told.wait()
    except msr.LockLostError:
        sys.exit({LOST})

anyio.run(main, *json.loads(sys.argv[1]))
"""


@dataclass(frozen=True)
class Holder:
    """A process that has the lock. `locked_by` and `token` are those on the row."""

    process: subprocess.Popen[str] = field(repr=False)
    token: int
    locked_by: str

    @property
    def pid(self) -> int:
        return self.process.pid

    def release(self) -> int:
        """Let it release the lock and end; its exit code, `LOST` if the lock was not its own."""
        self.process.communicate("\n", timeout=PATIENCE)
        return self.process.returncode

    def freeze(self) -> None:
        """Stop it without a chance to notice; its lock and its session stay."""
        self.process.send_signal(signal.SIGSTOP)

    def kill(self) -> None:
        """End it without a chance to release anything."""
        self.process.kill()
        self.process.wait()


@contextmanager
def hold_lock(
    url: str,
    *,
    running: str | None = None,
    rig: Rig | None = None,
    prefix: Sequence[str] = (),
    **locking: Any,
) -> Iterator[Holder]:
    """A process that holds the lock of `url` with the given settings of `locking`.

    `rig` and `prefix` are those of `start_msr`.
    """
    arguments = json.dumps([url, running, locking])
    process = start_python(_HOLDER, arguments, rig=rig, prefix=prefix)
    try:
        assert process.stdout is not None
        ready = process.stdout.readline()
        assert ready, f"the holder did not get the lock: {process.communicate()[1]}"
        yield Holder(process, *json.loads(ready))
    finally:
        end(process)


class Gate:
    """A script that says when it runs, and goes on only when it is let through."""

    def __init__(self, folder: Path) -> None:
        self._reached = folder / "gate-reached"
        self._opened = folder / "gate-opened"

    def script(self, before: str = "pass", after: str = "pass") -> str:
        """A Python script with the gate between two statements."""
        return (
            "import asyncio, pathlib\n\n"
            "async def up(db):\n"
            f"    {before}\n"
            f"    pathlib.Path({str(self._reached)!r}).touch()\n"
            f"    while not pathlib.Path({str(self._opened)!r}).exists():\n"
            "        await asyncio.sleep(0.01)\n"
            f"    {after}\n"
        )

    def wait(self) -> None:
        """Return when the script stands at the gate."""
        wait_until(self._reached.exists)

    def open(self) -> None:
        """Let the script through."""
        self._opened.touch()
