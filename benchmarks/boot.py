"""What does `await msr.migrate(...)` cost at boot when nothing is pending?

The floor is what no migration tool can avoid: connect with the driver, read the history, close.
"Reading the scripts" is the part of msr's time that grows with the folder, not with the database.

    python -m benchmarks.boot
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiosqlite
import asyncpg

import msr
from benchmarks.support import databases, figures, header, make_scripts, measure
from msr.scripts import load_scripts

QUERY = "SELECT version, checksum, status FROM schema_version ORDER BY version"


def floor(url: str) -> Callable[[], Awaitable[object]]:
    async def sqlite() -> None:
        async with aiosqlite.connect(url.removeprefix("sqlite:///")) as connection:
            await connection.execute_fetchall(QUERY)

    async def postgres() -> None:
        connection = await asyncpg.connect(url, statement_cache_size=0)
        await connection.fetch(QUERY)
        await connection.close()

    return sqlite if url.startswith("sqlite") else postgres


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--scripts", type=int, nargs="+", default=[20, 1000])
    parser.add_argument("--databases", nargs="+", default=["sqlite", "postgresql"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, databases(options.databases) as make:
        header("database", "scripts", "floor, ms", "msr.migrate, ms", "reading the scripts, ms")
        for count in options.scripts:
            folder = make_scripts(Path(temporary, str(count)), count)
            for kind in options.databases:
                url = make(kind)
                await msr.migrate(url, folder=folder)

                async def boot(url: str = url, folder: Path = folder) -> None:
                    result = await msr.migrate(url, folder=folder)
                    assert result.pending_before == 0

                async def read(folder: Path = folder) -> None:
                    await asyncio.to_thread(load_scripts, folder)

                works = {"floor": floor(url), "msr": boot, "read": read}
                times = await measure(options.rounds, works)
                cells = [figures(times[name]) for name in works]
                print(f"| {kind} | {count} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
