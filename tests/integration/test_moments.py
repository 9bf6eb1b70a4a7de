"""What happens in the moment between two steps of another one, which is made to last here."""

from __future__ import annotations

import asyncio
import gc
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import msr
from msr.handlers.postgres_lock import PostgresLocking
from msr.handlers.sqlite import SqliteSession
from msr.handlers.sqlite_lock import SqliteLocking
from tests.support.cli import wait_until_async, write_scripts
from tests.support.databases import on_postgres, on_sqlite, path_of
from tests.support.queries import fetch, table_names


def make_executor(url: str, folder: Path | None = None, **locking: Any) -> Any:
    return msr.MigrationScriptExecutor.from_url(url, folder=folder or "none", locking=locking)


# A forced release, while the lock changes hands


@pytest.mark.parametrize("by_token", [False, True])
async def test_the_holder_releases_it_first(
    database_url: str, monkeypatch: pytest.MonkeyPatch, by_token: bool
) -> None:
    """Nothing has changed hands: it is free, and nothing was there to release."""
    executor = make_executor(database_url)
    holder = executor.lock()
    lease = await holder.__aenter__()
    for service in (PostgresLocking, SqliteLocking):

        async def late(
            self: Any, token: int, *, original: Any = service.force_release, **options: Any
        ) -> bool:
            await holder.__aexit__(None, None, None)
            return bool(await original(self, token, **options))

        monkeypatch.setattr(service, "force_release", late)
    assert await executor.force_release_lock(token=lease.token if by_token else None) is None


@on_postgres
async def test_the_end_of_the_session_lets_somebody_else_have_it(
    database_url: str, tmp_path: Path
) -> None:
    """Who takes it then does not make the operator's release one that released nothing."""
    script = """
        CREATE TABLE work (id INTEGER);
        CREATE FUNCTION stall() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN PERFORM pg_sleep(600); RETURN NULL; END $$;
        CREATE CONSTRAINT TRIGGER late AFTER INSERT ON work DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW EXECUTE FUNCTION stall();
        INSERT INTO work VALUES (1);
    """
    executor = make_executor(database_url, write_scripts(tmp_path, {"V1_stall.sql": script}))
    running = asyncio.create_task(executor.migrate())
    commits = "SELECT 1 FROM pg_stat_activity WHERE query LIKE 'COMMIT%' AND wait_event = 'PgSleep'"
    await wait_until_async(lambda: fetch(database_url, commits))
    status = await executor.get_lock_status()

    async def take_it() -> int:
        async with executor.lock() as lease:
            return int(lease.token)

    waiters = [asyncio.create_task(take_it()) for _ in range(3)]
    released = await executor.force_release_lock(token=status.token, terminate=True)
    assert released.token == status.token
    with pytest.raises(msr.LockLostError):
        await running
    assert all(token > status.token for token in await asyncio.gather(*waiters))


# Who has taken the lock is writing


@on_sqlite
@pytest.mark.parametrize("kind", ["IMMEDIATE", "EXCLUSIVE"])
async def test_a_stolen_lock_is_lost_though_the_thief_writes(database_url: str, kind: str) -> None:
    """The holder cannot write its release, but it can see that the lock is not its own."""
    executor = make_executor(database_url)
    thief = sqlite3.connect(path_of(database_url), isolation_level=None)
    with closing(thief), pytest.raises(msr.LockLostError):
        async with executor.lock():
            await executor.force_release_lock()
            thief.execute(f"BEGIN {kind}")


@on_sqlite
async def test_another_one_is_quicker_to_take_it(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen as free, taken meanwhile: it is held, which is more than that the file is locked."""
    executor = make_executor(database_url, tmp_path, wait=0)
    async with executor.lock():
        pass
    with closing(
        sqlite3.connect(path_of(database_url), isolation_level=None, check_same_thread=False)
    ) as rival:

        def take_it(*_: object) -> bool:
            if not rival.in_transaction:
                rival.execute("UPDATE migration_locks SET locked_by = 'rival'")
                rival.execute("BEGIN IMMEDIATE")
            return True

        monkeypatch.setattr(SqliteLocking, "_is_free", take_it)
        with pytest.raises(msr.LockHeldError, match="rival"):
            async with executor.lock():
                pass


# Lock files


@pytest.fixture
def immovable(database_url: str) -> Callable[[int], Path]:
    """Puts something that cannot be removed in the place of a holder's lock file."""

    def replace(token: int) -> Path:
        path = path_of(database_url)
        file = path.with_name(f"{path.name}-migration_locks-{token}.lock")
        file.unlink()
        file.mkdir()
        return file

    return replace


@on_sqlite
async def test_a_lock_file_that_cannot_be_removed(
    database_url: str, immovable: Callable[[int], Path]
) -> None:
    """As that of another user in a folder like /tmp: whoever releases or takes the lock can."""
    executor = make_executor(database_url)
    with pytest.raises(msr.LockLostError):
        async with executor.lock() as lease:
            file = immovable(lease.token)
            assert (await executor.force_release_lock()).token == lease.token
    assert file.is_dir()
    with pytest.raises(msr.LockLostError):
        async with executor.lock() as lease:
            immovable(lease.token)
            await fetch(database_url, "UPDATE migration_locks SET expires_at = locked_at")
            async with executor.lock() as other:
                assert other.token > lease.token
            assert not (await executor.get_lock_status()).is_locked


@on_sqlite
async def test_no_lock_file_is_left_of_a_script_that_closes_the_connection(
    database_url: str, tmp_path: Path
) -> None:
    script = "async def up(db):\n    await db.close()\n"
    executor = make_executor(database_url, write_scripts(tmp_path / "x", {"V1_close.py": script}))
    with pytest.raises(msr.MigrationError):
        await executor.migrate()
    assert not (await executor.get_lock_status()).is_locked
    assert [path.name for path in path_of(database_url).parent.glob("*.lock")] == []


# A thread that is not done yet


@on_sqlite
async def test_a_hop_that_is_cancelled_again(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The task stays until its thread is done, or the rollback would come before the work's end."""
    complaints: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "call_exception_handler", complaints.append)
    handler = msr.SqliteHandler(database_url)
    async with handler.connect(msr.Config()) as session:
        assert isinstance(session, SqliteSession)
        await session.create_history()
        done = False

        def work(db: sqlite3.Connection) -> None:
            nonlocal done
            numbers = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n"
            try:
                db.execute(f"{numbers} LIMIT 30000000) SELECT count(*) FROM n").fetchall()
            finally:
                done = True

        hop = asyncio.create_task(session.hop(work))
        await asyncio.sleep(0)
        for _ in range(3):
            hop.cancel()
            await asyncio.sleep(0)
        await asyncio.wait([hop])
        assert hop.cancelled()
        assert done
    gc.collect()
    assert complaints == []


# A fence that says no


async def test_a_lost_lock_is_not_taken_for_the_end_of_the_transaction(
    database_url: str, tmp_path: Path
) -> None:
    """A Python script ends no transaction of its own when its row is refused; it is rolled back."""
    script = """
        async def up(db):
            await db.execute("CREATE TABLE work (id INTEGER)")
            await db.execute("DELETE FROM migration_locks")
    """
    executor = make_executor(database_url, write_scripts(tmp_path / "x", {"V1_work.py": script}))
    with pytest.raises(msr.LockLostError, match="the script was rolled back"):
        await executor.migrate()
    assert "work" not in await table_names(database_url)
