"""How soon after a clean release does a waiter hold the lock?

The clock starts before the holder releases, so the release itself is part of the time. The waiter
has waited 0.5 to 2 seconds by then, at random, so that its polls have grown apart.

    python -m benchmarks.wakeup
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time

import msr
from benchmarks.support import databases, figures, header


async def wake_up(executor: msr.MigrationScriptExecutor, hold: float) -> float:
    """Seconds from the beginning of the release until the waiter has the lock."""
    woken = 0.0

    async def wait() -> None:
        nonlocal woken
        async with executor.lock():
            woken = time.perf_counter()

    async with executor.lock():
        waiter = asyncio.create_task(wait())
        await asyncio.sleep(hold)
        released = time.perf_counter()
    await waiter
    return woken - released


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--hold", type=float, nargs=2, default=[0.5, 2.0], help="seconds, from to")
    parser.add_argument("--databases", nargs="+", default=["sqlite", "postgresql"])
    options = parser.parse_args()
    with databases(options.databases) as make:
        header("database", "waiters", "wake-up, ms")
        for kind in options.databases:
            executor = msr.MigrationScriptExecutor.from_url(make(kind))
            times = [
                await wake_up(executor, random.uniform(*options.hold))
                for _ in range(options.rounds)
            ]
            print(f"| {kind} | 1 | {figures(times)} |", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
