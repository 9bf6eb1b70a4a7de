"""`lock_timeout`, `lock_retries` and `statement_timeout`: scripts that wait, and how long."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from msr.urls import parse_url
from tests.support.cli import Result, run_msr, start_msr, wait_until, write_scripts
from tests.support.databases import on_postgres, on_sqlite
from tests.support.holder import hold_lock
from tests.support.migrations import applied, finish, is_sqlite
from tests.support.queries import query
from tests.support.rig import Rig, is_stopped

WIDEN = "ALTER TABLE first ADD COLUMN wide int;"
SOON = "100ms"

OFTEN = 100
"""Attempts in a test that waits for some of them: more than there is time for."""

AGAIN = re.compile(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ Trying (\S+) again in ([\d.]+) (m?s): (.*)\n")

LATE = "canceling statement due to statement timeout"

ENDLESS = {
    True: "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT max(x) FROM c",
    False: "SELECT pg_sleep(60)",
}
"""A statement that ends only when it is cancelled; SQLite's first."""

SLOW = ENDLESS[True].replace("FROM c)", "FROM c WHERE x < 500000)")
"""One that takes SQLite a tenth of a second or more, but ends."""


def limit_in(url: str) -> str:
    """A `statement_timeout` that only an endless statement reaches.

    PostgreSQL looks at its clock in every statement, SQLite only in those that take a while.
    """
    return SOON if is_sqlite(url) else "2s"


@contextmanager
def kept_locked(url: str) -> Iterator[None]:
    """Another session's open transaction: it has read `first` or, in SQLite, will write."""
    address = parse_url(url)
    if address.dialect == "sqlite":
        with closing(sqlite3.connect(address.path or "", isolation_level=None)) as db:
            db.execute("BEGIN IMMEDIATE")
            yield
        return
    with asyncio.Runner() as runner:
        connection = runner.run(asyncpg.connect(address.dsn))
        runner.run(connection.execute("BEGIN; SELECT FROM first"))
        yield
        runner.run(connection.close())


@contextmanager
def blocked(
    *arguments: str,
    url: str,
    script: int = 1,
    env: Mapping[str, str] | None = None,
    bounds: Mapping[str, float] | None = None,
) -> Iterator[subprocess.Popen[str]]:
    """An `msr` whose n-th `script` finds the table locked, until the block is left.

    `bounds` are those of `Rig`.
    """
    command = arguments or ("migrate",)
    rig = Rig(at="before script", nth=script, bounds=bounds or {})
    process = start_msr(*command, env=env, rig=rig)
    wait_until(lambda: process.poll() is not None or is_stopped(process.pid))
    assert process.poll() is None, finish(process)
    with kept_locked(url):
        process.send_signal(signal.SIGCONT)
        yield process


def without_release(url: str) -> Mapping[str, float]:
    """Bounds for a run that gives up while the table is still locked.

    In SQLite whoever keeps the script waiting is in the way of the release as well.
    """
    return {"msr.locking.RELEASE_BOUND": 0.2} if is_sqlite(url) else {}


def tried_again(process: subprocess.Popen[str], script: str) -> float:
    """Wait until it says that it tries the script again; the seconds until then."""
    assert process.stderr is not None
    line = process.stderr.readline()
    while "the migration lock could not be renewed" in line:  # SQLite's heartbeat waits as well
        line = process.stderr.readline()
    again = AGAIN.fullmatch(line)
    assert again, line or finish(process)
    assert again[1] == script
    assert "\n" not in again[4]
    return float(again[2]) * {"ms": 0.001, "s": 1}[again[3]]


def is_about(pause: float, seconds: float) -> bool:
    """Whether a pause is so long, give or take the jitter and what was rounded."""
    return 0.75 * seconds <= pause <= 1.25 * seconds


def retries(end: Result) -> list[str]:
    """The scripts that were tried again."""
    return [again[1] for again in AGAIN.finditer(end.stderr)]


def columns(url: str) -> int:
    """How many columns the locked table has: one until a script could widen it."""
    if is_sqlite(url):
        return len(query(url, "PRAGMA table_info(first)"))
    of_table = "attrelid = 'first'::regclass AND attnum > 0 AND NOT attisdropped"
    return len(query(url, f"SELECT FROM pg_attribute WHERE {of_table}"))


def in_environment(**settings: object) -> dict[str, str]:
    return {f"MSR_{key.upper()}": str(value) for key, value in settings.items()}


def in_toml(**settings: object) -> dict[str, str]:
    lines = [f"{key} = {json.dumps(value)}\n" for key, value in settings.items()]
    Path("msr.toml").write_text("".join(lines))
    return {}


# Waiting for a lock


@on_sqlite
@pytest.mark.parametrize("setting", [in_environment, in_toml], ids=["MSR_*", "msr.toml"])
def test_setting(migrated_url: str, folder: Path, setting: Any) -> None:
    """A script that waits too long for a table is tried again, after pauses that double.

    It is applied as soon as the table is free.
    """
    write_scripts(folder, {"V2_widen.sql": WIDEN})

    env = setting(lock_timeout=SOON, lock_retries=OFTEN)
    with blocked(url=migrated_url, env=env) as process:
        pauses = [tried_again(process, "V2_widen.sql") for _ in range(2)]
        assert applied(migrated_url) == [1]
    end = finish(process)

    assert end.exit_code == 0
    assert is_about(pauses[0], 0.1)
    assert is_about(pauses[1], 0.2)
    assert "Applied V2_widen.sql" in end.stdout
    assert end.stdout.splitlines()[-1].startswith("✓ 1 script applied in ")
    assert columns(migrated_url) == 2
    assert applied(migrated_url) == [1, 2]


PYTHON = "async def up(db):\n    await db.execute('{}')\n"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("V2_widen.sql", f"-- msr: lock_timeout={SOON}\n{WIDEN}"),
        ("V2_widen.py", f"lock_timeout = {SOON!r}\n{PYTHON.format(WIDEN)}"),
    ],
)
@pytest.mark.parametrize("setting", [None, "30s"])
def test_own_of_a_script(
    migrated_url: str, folder: Path, name: str, text: str, setting: str | None
) -> None:
    """A directive, or a module's attribute, sets it for one script, and wins over the settings."""
    write_scripts(folder, {name: text})

    env = in_environment(lock_timeout=setting or "", lock_retries=OFTEN)
    with blocked(url=migrated_url, env=env) as process:
        pause = tried_again(process, name)
    end = finish(process)

    assert end.exit_code == 0
    assert is_about(pause, 0.1)
    assert columns(migrated_url) == 2


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("V2_widen.sql", f"-- msr: lock_timeout=0\n{WIDEN}"),
        ("V2_widen.py", f"lock_timeout = 0\n{PYTHON.format(WIDEN)}"),
        ("V2_widen.sql", WIDEN),
    ],
    ids=["directive", "attribute", "neither"],
)
def test_no_limit(migrated_url: str, folder: Path, name: str, text: str) -> None:
    """Zero is no limit, which a script may want where the settings have one; so is the default."""
    write_scripts(folder, {name: text})
    env = {"MSR_LOCK_TIMEOUT": "" if text == WIDEN else SOON}

    with blocked(url=migrated_url, env=env) as process:
        time.sleep(0.4)  # four times as long as it would wait
    end = finish(process)

    assert (end.exit_code, retries(end)) == (0, [])
    assert columns(migrated_url) == 2


def fails(url: str, end: Result) -> None:
    """A run that gave up at the second attempt: how it says so in each database."""
    if is_sqlite(url):
        assert end.exit_code == 1
        sentence = "is locked by another process; try again when that has finished"
        assert re.fullmatch(rf"✗ Error: \S+ {sentence}", end.stderr.splitlines()[-1])
    else:
        assert end.exit_code == 3
        assert (
            "✗ Error: V3_widen.sql, line 2: canceling statement due to lock timeout" in end.stderr
        )
        assert "(tried 2 times; another session keeps what it needs: end that one" in end.stderr


def test_giving_up(migrated_url: str, folder: Path) -> None:
    """After `lock_retries` more attempts the run fails, and that script has done nothing.

    What was applied before it stays.
    """
    write_scripts(
        folder,
        {
            "V2_other.sql": "CREATE TABLE other (id int);",
            "V3_widen.sql": f"INSERT INTO other VALUES (3);\n{WIDEN}",
            "V4_never.sql": "CREATE TABLE never (id int);",
        },
    )
    env = in_environment(lock_timeout=SOON, lock_retries=1)

    bounds = without_release(migrated_url)
    with blocked(url=migrated_url, script=2, env=env, bounds=bounds) as process:
        end = finish(process)

    fails(migrated_url, end)
    assert retries(end) == ["V3_widen.sql"]
    assert "Applied V2_other.sql" in end.stdout
    assert applied(migrated_url) == [1, 2]
    assert query(migrated_url, "SELECT * FROM other") == []
    assert columns(migrated_url) == 1
    assert run_msr("migrate", "--no-wait").exit_code == 0
    assert applied(migrated_url) == [1, 2, 3, 4]


def test_giving_up_as_json(migrated_url: str, folder: Path) -> None:
    """The document has the error and what was done before; retries are told on stderr."""
    write_scripts(
        folder, {"V2_other.sql": "CREATE TABLE other (id int);", "V3_widen.sql": f"\n{WIDEN}"}
    )
    Path("msr.toml").write_text("lock_retries = 1\n")

    command = ("migrate", "--json")
    env = in_environment(lock_timeout=SOON)
    bounds = without_release(migrated_url)
    with blocked(*command, url=migrated_url, script=2, env=env, bounds=bounds) as process:
        end = finish(process)

    fails(migrated_url, end)
    document = json.loads(end.stdout)
    assert retries(end) == ["V3_widen.sql"]
    assert [script["version"] for script in document["result"]["executed"]] == [2]
    if is_sqlite(migrated_url):
        assert document["error"]["type"] == "DatabaseBusyError"
    else:
        assert document["error"]["type"] == "MigrationError"
        assert document["error"]["sqlstate"] == "55P03"
        assert document["error"]["rolled_back"] is True


def test_no_retries(migrated_url: str, folder: Path) -> None:
    """With `lock_retries = 0` the first attempt is the last."""
    write_scripts(folder, {"V2_widen.sql": WIDEN})
    env = in_environment(lock_timeout=SOON, lock_retries=0)

    bounds = without_release(migrated_url)
    with blocked(url=migrated_url, env=env, bounds=bounds) as process:
        end = finish(process)

    assert end.exit_code == (1 if is_sqlite(migrated_url) else 3)
    assert "tried" not in end.stderr
    assert retries(end) == []
    assert applied(migrated_url) == [1]


def test_five_retries(migrated_url: str, folder: Path) -> None:
    """Unless told otherwise a script is tried five times again."""
    write_scripts(folder, {"V2_widen.sql": WIDEN})

    env, bounds = in_environment(lock_timeout="10ms"), without_release(migrated_url)
    with blocked(url=migrated_url, env=env, bounds=bounds) as process:
        end = finish(process)

    assert end.exit_code == (1 if is_sqlite(migrated_url) else 3)
    assert retries(end) == ["V2_widen.sql"] * 5


@on_postgres
def test_others_are_not_queued(migrated_url: str, folder: Path) -> None:
    """Between two attempts others can use the table; during one they queue behind it.

    The table is only read by whoever keeps the script waiting, so they hinder nobody themselves.
    """
    write_scripts(folder, {"V2_widen.sql": WIDEN})
    # An attempt and a pause take so long that neither is overlooked, and neither gets longer.
    env = in_environment(lock_timeout="1s", lock_retries=OFTEN)
    bounds = {"msr.unit.LONGEST_PAUSE": 1.0}

    with (
        asyncio.Runner() as runner,
        blocked(url=migrated_url, env=env, bounds=bounds) as process,
    ):
        application = runner.run(asyncpg.connect(parse_url(migrated_url).dsn))
        runner.run(application.execute("SET lock_timeout = '20ms'"))

        def can_read() -> bool:
            try:
                runner.run(application.fetch("SELECT * FROM first"))
            except asyncpg.LockNotAvailableError:
                return False
            return True

        wait_until(lambda: not can_read())  # behind the script
        wait_until(can_read)
        assert applied(migrated_url) == [1]
        wait_until(lambda: not can_read())  # at the next attempt
        wait_until(can_read)
        assert process.poll() is None
        runner.run(application.close())
    end = finish(process)

    assert end.exit_code == 0
    assert len(retries(end)) >= 1
    assert columns(migrated_url) == 2


def test_single_transaction(migrated_url: str, folder: Path) -> None:
    """With all scripts in one transaction, all of them are tried again, from the first."""
    write_scripts(
        folder,
        {
            "V2_other.sql": "CREATE TABLE other (id int); INSERT INTO other VALUES (2);",
            "V3_widen.sql": f"-- msr: lock_timeout={SOON}\n{WIDEN}",
            "V4_last.sql": "INSERT INTO other VALUES (4);",
        },
    )
    command = ("migrate", "--single-transaction")
    env = in_environment(lock_timeout="50ms", lock_retries=OFTEN)

    with blocked(*command, url=migrated_url, env=env) as process:
        # In SQLite a transaction waits where it begins, for whatever is in it.
        name = "V2_other.sql" if is_sqlite(migrated_url) else "V3_widen.sql"
        pause = tried_again(process, name)
        assert applied(migrated_url) == [1]
    end = finish(process)

    assert is_about(pause, 0.1)  # the longest of the limits
    assert end.exit_code == 0
    assert query(migrated_url, "SELECT id FROM other ORDER BY id") == [(2,), (4,)]
    assert applied(migrated_url) == [1, 2, 3, 4]


def test_down(migrated_url: str, folder: Path) -> None:
    """The way back is tried again as well, by its own directives, and fails with its own code."""
    write_scripts(
        folder,
        {
            "V2_widen.up.sql": WIDEN,
            "V2_widen.down.sql": (
                f"-- msr: lock_timeout={SOON}\nALTER TABLE first DROP COLUMN wide;"
            ),
        },
    )
    assert run_msr("migrate").exit_code == 0

    command = ("down", "1")
    env, bounds = in_environment(lock_retries=1), without_release(migrated_url)
    with blocked(*command, url=migrated_url, env=env, bounds=bounds) as process:
        end = finish(process)
    assert end.exit_code == (1 if is_sqlite(migrated_url) else 4)
    assert retries(end) == ["V2_widen.down.sql"]
    assert applied(migrated_url) == [1, 2]

    env = in_environment(lock_retries=OFTEN)
    with blocked(*command, url=migrated_url, env=env) as process:
        tried_again(process, "V2_widen.down.sql")
    end = finish(process)
    assert end.exit_code == 0
    assert applied(migrated_url) == [1]
    assert columns(migrated_url) == 1


@on_postgres
def test_outside_a_transaction(migrated_url: str, folder: Path) -> None:
    """What may have been committed in part is not tried again; the limit holds there, too."""
    write_scripts(
        folder,
        {
            "V2_widen.sql": (
                f"-- msr: no-transaction\n-- msr: lock_timeout={SOON}\n"
                f"CREATE TABLE part (id int);\n{WIDEN}"
            )
        },
    )

    with blocked(url=migrated_url) as process:
        end = finish(process)

    assert (end.exit_code, retries(end)) == (3, [])
    assert "V2_widen.sql, line 4: canceling statement due to lock timeout" in end.stderr
    assert "what the script had committed stays" in end.stderr
    rows = query(migrated_url, "SELECT version, status FROM schema_version ORDER BY version")
    assert rows == [(1, "applied"), (2, "failed")]


def test_not_for_the_migration_lock(migrated_url: str, folder: Path) -> None:
    """How long to wait for another run is `locking.wait`, whatever a script may wait."""
    write_scripts(folder, {"V2_widen.sql": WIDEN})
    env = in_environment(lock_timeout="200ms", lock_retries=0)

    with hold_lock(migrated_url) as holder:
        refused = run_msr("migrate", "--no-wait", env=env)
        process = start_msr("migrate", env=env)
        wait_for_waiting_line(process)
        time.sleep(0.8)  # four times as long
        assert holder.release() == 0
    end = finish(process)

    assert (refused.exit_code, retries(refused)) == (8, [])
    assert (end.exit_code, retries(end)) == (0, [])
    assert columns(migrated_url) == 2


def wait_for_waiting_line(process: subprocess.Popen[str]) -> None:
    assert process.stderr is not None
    line = process.stderr.readline()
    assert "Waiting for the migration lock" in line, line


# What is not a wait for a lock


def slow_script(url: str, kind: str, *, own: bool, transaction: bool) -> dict[str, str]:
    """A script whose second line, or third, does not end by itself."""
    statement = ENDLESS[is_sqlite(url)]
    if kind == "sql":
        lines = ["" if transaction else "-- msr: no-transaction"]
        lines += [f"-- msr: statement_timeout={limit_in(url)}" if own else ""]
        lines += ["INSERT INTO first VALUES (2);", f"{statement};"]
        return {"V2_slow.sql": "\n".join(lines)}
    lines = [f"transaction = {transaction}"]
    lines += [f"statement_timeout = {limit_in(url)!r}" if own else ""]
    lines += ["async def up(db):", "    await db.execute('INSERT INTO first VALUES (2)')"]
    lines += [f"    await db.execute({statement!r})"]
    return {"V2_slow.py": "\n".join(lines)}


@pytest.mark.parametrize("kind", ["sql", "py"])
@pytest.mark.parametrize("own", [False, True], ids=["setting", "own"])
def test_statement_timeout(migrated_url: str, folder: Path, kind: str, own: bool) -> None:
    """A statement that takes too long fails its script at once: to try again would not help."""
    write_scripts(folder, slow_script(migrated_url, kind, own=own, transaction=True))
    limit = "1h" if own else limit_in(migrated_url)

    end = run_msr("migrate", env=in_environment(lock_timeout="5s", statement_timeout=limit))

    assert end.exit_code == 3
    assert retries(end) == []
    line = 4 if kind == "sql" else 5
    assert f"✗ Error: V2_slow.{kind}, line {line}: " in end.stderr
    assert LATE in end.stderr
    assert "; the script was rolled back; applied before it: nothing" in end.stderr
    assert query(migrated_url, "SELECT * FROM first") == []
    assert applied(migrated_url) == [1]


@pytest.mark.parametrize("kind", ["sql", "py"])
def test_statement_timeout_outside_a_transaction(
    migrated_url: str, folder: Path, kind: str
) -> None:
    """The limit holds there as well; what was done before stays, and the history says so."""
    write_scripts(folder, slow_script(migrated_url, kind, own=True, transaction=False))

    end = run_msr("migrate", "--json", env=in_environment(lock_timeout="5s"))

    assert end.exit_code == 3
    assert retries(end) == []
    error = json.loads(end.stdout)["error"]
    assert error["type"] == "MigrationError"
    assert LATE in error["message"]
    assert error["line"] == (4 if kind == "sql" else 5)
    assert error["rolled_back"] is False
    assert query(migrated_url, "SELECT * FROM first") == [(2,)]
    [(status, note)] = query(
        migrated_url, "SELECT status, note FROM schema_version WHERE version = 2"
    )
    assert status == "failed"
    assert LATE in note


def test_setting_of_statement_timeout_in_a_file(migrated_url: str, folder: Path) -> None:
    """`statement_timeout` in msr.toml is obeyed."""
    write_scripts(folder, slow_script(migrated_url, "sql", own=False, transaction=True))
    in_toml(statement_timeout=limit_in(migrated_url))

    end = run_msr("migrate")

    assert end.exit_code == 3
    assert LATE in end.stderr


def one_of_twelve(url: str) -> tuple[str, float]:
    """A statement, and a limit in seconds that twelve of them exceed together, and one never."""
    if not is_sqlite(url):
        return "SELECT pg_sleep(0.2)", 2
    began = time.monotonic()
    query(url, SLOW)
    return SLOW, 10 * (time.monotonic() - began)


def test_statement_timeout_is_for_each_statement(migrated_url: str, folder: Path) -> None:
    """Many statements may take longer together than one of them may."""
    statement, limit = one_of_twelve(migrated_url)
    write_scripts(folder, {"V2_slow.sql": f"{statement};\n" * 12})

    end = run_msr("migrate", env=in_environment(statement_timeout=limit))

    assert (end.exit_code, end.stderr) == (0, "")


def test_statement_timeout_in_a_single_transaction(migrated_url: str, folder: Path) -> None:
    """The limit is there for every script of the transaction, not only for the first."""
    slow = slow_script(migrated_url, "sql", own=False, transaction=True)
    write_scripts(folder, {"V2_a.sql": "SELECT 1;", "V3_slow.sql": slow["V2_slow.sql"]})

    env = in_environment(statement_timeout=limit_in(migrated_url))
    end = run_msr("migrate", "--single-transaction", env=env)

    assert end.exit_code == 3
    assert LATE in end.stderr
    assert applied(migrated_url) == [1]


def test_other_errors_are_not_retried(migrated_url: str, folder: Path) -> None:
    """Only a wait for a lock is worth trying again."""
    write_scripts(folder, {"V2_bad.sql": "SELECT * FROM nothing;"})

    end = run_msr("migrate", env=in_environment(lock_timeout=SOON))

    assert (end.exit_code, retries(end)) == (3, [])


# Whom the limits are for

SHOW = "current_setting('lock_timeout') || ' ' || current_setting('statement_timeout')"


@pytest.mark.parametrize("arguments", [(), ("--single-transaction",), ("outside",)], ids=str)
def test_limits_do_not_leak(migrated_url: str, folder: Path, arguments: tuple[str, ...]) -> None:
    """The limits of a script end with it, also where it runs outside a transaction."""
    sqlite, outside = is_sqlite(migrated_url), arguments == ("outside",)
    opting_out = "-- msr: no-transaction\n" if outside else ""
    soon = "10ms" if sqlite else "5s"  # SQLite's never ends a statement as small as these
    free = SLOW if sqlite else "SELECT 1"  # what shows it where a session has no settings
    limits = f"-- msr: lock_timeout=7s\n-- msr: statement_timeout={soon}\n"
    show = "'seen'" if sqlite else SHOW
    write_scripts(
        folder,
        {
            "V2_seen.sql": "CREATE TABLE seen (id int, said text);",
            "V3_limited.sql": f"{opting_out}{limits}INSERT INTO seen SELECT 3, {show};",
            "V4_free.sql": f"{free};\nINSERT INTO seen SELECT 4, {show};",
            "V5_limited.py": (
                f"lock_timeout = '8s'\nstatement_timeout = {soon!r}\ntransaction = {not outside}\n"
                f'async def up(db): await db.execute("INSERT INTO seen SELECT 5, {show}")\n'
            ),
            "V6_free.py": (
                f"async def up(db):\n    await db.execute({free!r})\n"
                f'    await db.execute("INSERT INTO seen SELECT 6, {show}")\n'
            ),
        },
    )

    end = run_msr("migrate", *(() if outside else arguments))

    assert (end.exit_code, end.stderr) == (0, "")
    seen = query(migrated_url, "SELECT id, said FROM seen ORDER BY id")
    said = ["7s 5s", "0 0", "8s 5s", "0 0"]
    assert seen == [(n, "seen" if sqlite else said[n - 3]) for n in (3, 4, 5, 6)]


@on_postgres
@pytest.mark.parametrize("limit", ["lock_timeout", "statement_timeout"])
def test_limits_are_not_for_the_history(migrated_url: str, folder: Path, limit: str) -> None:
    """They are for what the script does: the row about it may take longer, as it does in SQLite."""
    write_scripts(folder, {"V2_limited.sql": f"-- msr: {limit}=1s\nSELECT 1;"})
    with asyncio.Runner() as runner:
        session = runner.run(asyncpg.connect(parse_url(migrated_url).dsn))
        runner.run(session.execute("BEGIN; LOCK TABLE schema_version IN SHARE MODE"))
        process = start_msr("migrate", "--verbose")
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        assert any("Running V2_limited.sql" in line for line in lines)
        time.sleep(1.5)  # half as long again
        runner.run(session.close())
    end = finish(process)

    assert end.exit_code == 0, end
    assert applied(migrated_url) == [1, 2]


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("V2_x.sql", "-- msr: lock_timeout=soon\nSELECT 1;", "V2_x.sql, line 1: lock_timeout: "),
        ("V2_x.sql", "-- msr: lock_timout=5s\nSELECT 1;", "V2_x.sql, line 1: unknown directive"),
        ("V2_x.py", "statement_timeout = []\nasync def up(db): ...", "V2_x.py: statement_timeout:"),
    ],
)
def test_bad_limit(migrated_url: str, folder: Path, name: str, text: str, problem: str) -> None:
    """A limit that cannot be read is found before anything runs."""
    write_scripts(folder, {name: text})

    end = run_msr("migrate")

    assert end.exit_code == 2
    assert end.stderr.startswith(f"✗ Error: {problem}")
    assert applied(migrated_url) == [1]


COUNTING = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n"


@on_postgres
def test_set_transaction_comes_first(url: str, folder: Path) -> None:
    """Limits leave a script that begins with SET TRANSACTION in peace: no query comes before it."""
    script = "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE;\nCREATE TABLE t (id int);"
    write_scripts(folder, {"V1_t.sql": script})

    assert (
        run_msr("migrate", env=in_environment(lock_timeout=5, statement_timeout=5)).exit_code == 0
    )


def test_each_statement_has_its_own_time(url: str, folder: Path) -> None:
    """Many short ones may take longer than the limit together, also with a comment in front."""
    statement, limit = one_of_twelve(url)
    step = f"-- a step\n{statement}"
    script = f"async def up(db):\n    for _ in range(12):\n        await db.execute({step!r})\n"
    write_scripts(folder, {"V1_t.py": script})

    result = run_msr("migrate", env=in_environment(statement_timeout=limit))

    assert result.exit_code == 0, result


def test_a_timeout_says_which(url: str, folder: Path) -> None:
    """The limit that was over is named, with its length."""
    write_scripts(folder, {"V1_t.sql": f"{COUNTING}) SELECT max(i) FROM n;"})

    result = run_msr("migrate", env=in_environment(statement_timeout=0.2))

    assert result.exit_code == 3
    assert "statement timeout (its statement_timeout is 0.2 s)" in result.stderr
