"""Where a lock is fought for: a database with a detector in it, and processes to freeze.

The detector is no code of msr's: a trigger on the history that compares, at each commit, the token
and the holder under which a row is written with those on the lock's row, as they stand then.
PostgreSQL runs it as the last thing before the commit, with a fresh look at the tables; SQLite
inside the transaction, beside which there is no other.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path

import anyio
import pytest

import msr
from msr.urls import parse_url
from tests.support.cli import wait_until_async
from tests.support.queries import fetch
from tests.support.rig import Rig, is_stopped

__all__ = [
    "Arena",
    "arenas",
    "count_violations",
    "install_detector",
    "is_kept_out",
    "make_places",
]

_SUPERSEDED = """
NOT EXISTS (SELECT 1 FROM migration_locks
            WHERE token = NEW.token AND locked_by = NEW.executed_by)
"""

_DETECTOR = {
    "postgresql": (
        f"""
        CREATE FUNCTION detect() RETURNS trigger LANGUAGE plpgsql VOLATILE AS $$
        BEGIN
            IF {_SUPERSEDED} THEN INSERT INTO violations VALUES (NEW.version, NEW.token); END IF;
            RETURN NULL;
        END $$
        """,
        """
        CREATE CONSTRAINT TRIGGER detector AFTER INSERT OR UPDATE ON schema_version
        DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION detect()
        """,
    ),
    "sqlite": tuple(
        f"""
        CREATE TRIGGER detector_{event} AFTER {event} ON schema_version WHEN {_SUPERSEDED}
        BEGIN INSERT INTO violations VALUES (NEW.version, NEW.token); END
        """
        for event in ("INSERT", "UPDATE")
    ),
}


async def install_detector(url: str) -> None:
    """Have the database of `url`, which has been migrated, note commits of superseded holders."""
    table = "CREATE TABLE violations (version INTEGER, token INTEGER)"
    await fetch(url, table, *_DETECTOR[parse_url(url).dialect])


async def count_violations(url: str) -> int:
    """How many history rows were committed by somebody who did not have the lock."""
    [[count]] = await fetch(url, "SELECT count(*) FROM violations")
    return int(count)


def is_kept_out(url: str) -> bool:
    """Whether an open transaction keeps everybody else from the database, as SQLite's do."""
    address = parse_url(url)
    if address.dialect != "sqlite":
        return False
    with closing(sqlite3.connect(address.path or "", timeout=0, isolation_level=None)) as db:
        try:
            db.execute("BEGIN EXCLUSIVE")  # who reads would let nobody commit
        except sqlite3.OperationalError:
            return True
        return False


async def make_places(url: str, count: int, folder: Path | None = None) -> list[str]:
    """URLs of schemas of a database, or of files beside SQLite's, with a table `work (version)`.

    With the `folder` of scripts that will run there, msr's own tables are there too, and empty.
    """
    if parse_url(url).dialect == "sqlite":
        places = [url.replace(".db", f"{number}.db") for number in range(count)]
    else:
        await fetch(url, *(f"CREATE SCHEMA place{number}" for number in range(count)))
        joint = "&" if "?" in url else "?"
        places = [f"{url}{joint}search_path=place{number}" for number in range(count)]
    for place in places:
        await fetch(place, "CREATE TABLE work (version INTEGER)")
        if folder is not None:
            await msr.migrate(place, folder=folder)
            await fetch(place, "DELETE FROM schema_version", "DELETE FROM work")
    return places


class Worker:
    """A process that migrates whenever it is told to, each time with another fault built in."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    def migrate(self, folder: Path, rig: Rig) -> asyncio.Task[str]:
        """Begin; the result is how it ends: "applied", or the name of the error."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{json.dumps([str(folder), rig.to_json()])}\n".encode())
        return asyncio.create_task(self._end())

    async def _end(self) -> str:
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        assert line, "the worker broke; why stands on stderr"
        return line.decode().strip()

    def freeze(self) -> None:
        """Stop it wherever it is."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self._process.send_signal(signal.SIGCONT)

    async def stands(self, end: asyncio.Task[str]) -> bool:
        """Wait until it is frozen; False if it came to the `end` without."""

        async def settled() -> bool:
            return end.done() or is_stopped(self.pid)

        await wait_until_async(settled, interval=0.005)
        if end.done():
            self.resume()  # a random moment after the end
        return not end.done()


@asynccontextmanager
async def _worker(url: str, **locking: object) -> AsyncIterator[Worker]:
    """A worker on the database of `url`, with the given settings of `locking`."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.support.arena", json.dumps([url, locking])),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, **Rig().environment},
        start_new_session=True,
    )
    try:
        yield Worker(process)
    finally:
        process.kill()
        await process.communicate()


@dataclass(frozen=True)
class Arena:
    """A lock and a history of their own, with a detector, and a process that uses them."""

    url: str
    worker: Worker

    async def empty(self) -> None:
        """Forget what was applied, and found."""
        tables = ("schema_version", "work", "violations")
        await fetch(self.url, *(f"DELETE FROM {table}" for table in tables))


@asynccontextmanager
async def arenas(
    url: str, folder: Path, count: int, **locking: object
) -> AsyncIterator[list[Arena]]:
    """Places with a worker and a detector each, for the scripts of `folder`."""
    async with AsyncExitStack() as stack:
        made = []
        for place in await make_places(url, count, folder):
            process = await stack.enter_async_context(_worker(place, **locking))
            await install_detector(place)
            made.append(Arena(place, process))
        yield made


def main() -> None:
    """Do what the lines on stdin say, each a folder and a rig as JSON, and write each one's end."""
    url, locking = json.loads(sys.argv[1])
    for line in sys.stdin:
        folder, rig = json.loads(line)
        executor = msr.MigrationScriptExecutor.from_url(url, folder=folder, locking=locking)
        with pytest.MonkeyPatch.context() as patch:
            Rig.from_json(rig).apply(patch.setattr)
            print(anyio.run(_migrate, executor), flush=True)


async def _migrate(executor: msr.MigrationScriptExecutor) -> str:
    try:
        await executor.migrate()
    except msr.MsrError as error:
        return type(error).__name__
    return "applied"


if __name__ == "__main__":
    main()
