"""Fill in the totals, slowly: so that there is time to look at the lock.

`db` is the driver's own connection (aiosqlite or asyncpg), inside the migration's transaction. Both
have an `execute` that takes one statement, so this script runs on either.
"""

from __future__ import annotations

import asyncio
from typing import Any

SECONDS = 3.0
ORDERS = (1, 2, 3, 4)


async def up(db: Any) -> None:
    for order in ORDERS:
        await db.execute(f"UPDATE orders SET total = quantity * unit_price WHERE id = {order}")
        await asyncio.sleep(SECONDS / len(ORDERS))
