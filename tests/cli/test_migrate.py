"""`msr migrate`: what it prints, how it ends, whom it waits for, and how it is interrupted."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sqlite3
import subprocess
import uuid
from contextlib import closing
from pathlib import Path

import pytest

from msr.urls import parse_url
from tests.support.cli import (
    MSR,
    PATIENCE,
    Result,
    own_lines,
    run_msr,
    start_msr,
    unstamped,
    unwaited,
    wait_until,
    write_scripts,
)
from tests.support.databases import on_postgres, on_sqlite
from tests.support.dump import dump
from tests.support.holder import Gate, hold_lock
from tests.support.postgres import PostgresServer
from tests.support.queries import exists, query, table_names

FIRST = {"V1_first.sql": "CREATE TABLE first (id int);"}
TOOK = r"\(\S+ m?s\)"

# The second statement fails, on line 4; what the first made must be gone afterwards.
BAD = """
CREATE TABLE half (id int);

INSERT INTO nowhere VALUES (1);
"""


def tables(url: str) -> set[str]:
    """The tables of the scripts."""
    ours = {"migration_locks", "migration_locks_token", "schema_version"}
    return asyncio.run(table_names(url)) - ours


def versions(url: str) -> list[int]:
    """The history."""
    return [version for (version,) in query(url, "SELECT version FROM schema_version ORDER BY 1")]


def is_free(url: str) -> bool:
    """Whether nobody is named on the lock."""
    return query(url, "SELECT locked_by FROM migration_locks") == [(None,)]


def server_message(url: str) -> str:
    """What the database says to `BAD`."""
    if url.startswith("sqlite"):
        return "no such table: nowhere"
    return 'relation "nowhere" does not exist'


def read_line(process: subprocess.Popen[str]) -> str:
    """The next line on stderr."""
    assert process.stderr is not None
    return process.stderr.readline()


class TestSuccess:
    """Everything that is pending is applied."""

    def test_text(self, url: str, folder: Path) -> None:
        """A line per script in order of version, sub-folders and Python included, and a total."""
        write_scripts(
            folder,
            {
                "V10_third.py": "async def up(db):\n    await db.execute('CREATE TABLE c (i int)')",
                "2024/V2_second.up.sql": "CREATE TABLE b (i int); CREATE TABLE b2 (i int);",
                "2024/V2_second.down.sql": "DROP TABLE b; DROP TABLE b2;",
                **FIRST,
            },
        )

        result = run_msr("migrate")

        assert (result.exit_code, result.stderr) == (0, "")
        assert re.fullmatch(
            rf"Applied V1_first\.sql {TOOK}\n"
            rf"Applied 2024/V2_second\.up\.sql {TOOK}\n"
            rf"Applied V10_third\.py {TOOK}\n"
            r"✓ 3 scripts applied in \S+ m?s\n",
            unstamped(result.stdout),
        )
        assert tables(url) == {"first", "b", "b2", "c"}
        assert versions(url) == [1, 2, 10]
        assert is_free(url)

    def test_nothing_to_do(self, migrated_url: str) -> None:
        """With nothing pending this says so and changes nothing, not even the lock's token."""
        before = dump(migrated_url)

        result = run_msr("migrate")

        assert result == Result(0, "✓ Nothing to do: 1 script applied already\n", "")
        assert dump(migrated_url) == before

    def test_up_is_the_same(self, url: str, folder: Path) -> None:
        """`msr up` migrates too, and takes the same options."""
        write_scripts(folder, FIRST)

        assert run_msr("up", "--no-wait").exit_code == 0

        assert tables(url) == {"first"}

    def test_json(self, url: str, folder: Path) -> None:
        """--json prints one document and nothing else."""
        write_scripts(folder, {**FIRST, "V2_second.sql": "CREATE TABLE second (id int);"})

        result = run_msr("migrate", "--json")
        again = json.loads(run_msr("migrate", "--json").stdout)

        document = json.loads(result.stdout)
        assert (result.exit_code, result.stderr) == (0, "")
        assert [(row["version"], row["name"], row["script"]) for row in document["executed"]] == [
            (1, "first", "V1_first.sql"),
            (2, "second", "V2_second.sql"),
        ]
        assert (document["pending_before"], document["applied_before"]) == (2, 0)
        assert (document["followed"], document["token"]) == (False, 1)
        assert 0 < document["duration"] < 30
        assert 0 <= document["waited"] < 30
        assert (again["executed"], again["applied_before"], again["token"]) == ([], 2, None)


class TestFailure:
    """A script fails: exit 3, and the database is as the scripts before it left it."""

    @pytest.fixture
    def failed(self, url: str, folder: Path) -> Result:
        write_scripts(
            folder, {**FIRST, "V2_bad.sql": BAD, "V3_third.sql": "CREATE TABLE third (id int);"}
        )
        return run_msr("migrate")

    def test_text(self, url: str, folder: Path, failed: Result) -> None:
        """The file, the line, the server's words and what was applied before, on one line."""
        assert failed.exit_code == 3
        assert re.fullmatch(rf"Applied V1_first\.sql {TOOK}\n", unstamped(failed.stdout))
        pattern = (
            rf"✗ Error: V2_bad\.sql, line 4(, column 13)?: {re.escape(server_message(url))}; "
            r"the script was rolled back; applied before it: V1_first\.sql\n"
            r"  4 \| .*\n(    \| +\^\n)?"
        )
        assert re.fullmatch(pattern, failed.stderr)
        assert tables(url) == {"first"}
        assert versions(url) == [1]
        assert is_free(url)

        # Once it is put right, the next run goes on from there.
        write_scripts(folder, {"V2_bad.sql": BAD.replace("nowhere", "half")})
        assert run_msr("migrate").exit_code == 0
        assert tables(url) == {"first", "half", "third"}
        assert versions(url) == [1, 2, 3]

    def test_json(self, url: str, folder: Path) -> None:
        """--json tells the same as data, on stdout; stderr has the line for people."""
        write_scripts(folder, {**FIRST, "sub/V2_bad.sql": BAD})

        result = run_msr("migrate", "--json")

        document = json.loads(result.stdout)
        error = document["error"]
        assert result.exit_code == 3
        assert result.stderr == f"✗ Error: {error['message']}\n"
        assert (error["type"], error["script"]) == ("MigrationError", "sub/V2_bad.sql")
        assert (error["line"], error["server_message"]) == (4, server_message(url))
        assert (error["rolled_back"], error["applied"]) == (True, ["V1_first.sql"])
        assert error["sqlstate"] == (None if url.startswith("sqlite") else "42P01")
        [done] = document["result"]["executed"]
        assert (done["version"], document["result"]["pending_before"]) == (1, 2)

    def test_python(self, url: str, folder: Path) -> None:
        """A Python script that raises is rolled back, and the line is the one in its file."""
        script = """\
            async def up(db):
                await db.execute("CREATE TABLE half (id int)")
                raise ValueError("no such customer")
            """
        write_scripts(folder, {"V1_bad.py": script})

        result = run_msr("migrate")

        assert result == Result(
            3,
            "",
            "✗ Error: V1_bad.py, line 3: ValueError: no such customer; "
            "the script was rolled back; applied before it: nothing\n"
            '  3 |     raise ValueError("no such customer")\n',
        )
        assert tables(url) == set()
        assert versions(url) == []
        assert is_free(url)

    def test_several_problems(self, migrated_url: str, folder: Path) -> None:
        """Everything wrong with the scripts is told at once, exit 2, before anything runs."""
        write_scripts(
            folder,
            {
                "V1_first.sql": "CREATE TABLE edited (id int);",
                "V2_a.sql": "CREATE TABLE a (id int);",
                "sub/V2_b.sql": "CREATE TABLE b (id int);",
                "V3-c.sql": "CREATE TABLE c (id int);",
                "V4_d.sql": b"\xff",
            },
        )
        before = dump(migrated_url)

        result = run_msr("migrate")

        first, *problems = result.stderr.splitlines()
        assert (result.exit_code, result.stdout) == (2, "")
        assert first.startswith("✗ Error: ")
        assert first.endswith(" problems, nothing was run:")
        told = "\n".join(problems)
        for file in ("V1_first.sql", "sub/V2_b.sql", "V3-c.sql", "V4_d.sql"):
            assert f"  {file}" in told
        assert dump(migrated_url) == before


class TestHeldLock:
    """Another process has the lock."""

    @pytest.mark.parametrize("arguments", [["--no-wait"], ["--wait", "0"], ["--wait", "0.3"]])
    def test_the_wait_is_over(self, url: str, folder: Path, arguments: list[str]) -> None:
        """Exit 8 when the wait is over; the error says who holds the lock, and what they do."""
        write_scripts(folder, FIRST)
        with hold_lock(url, running="a backup") as holder:
            result = run_msr("migrate", *arguments)

            assert (result.exit_code, result.stdout) == (8, "")
            line = result.stderr.splitlines()[-1]
            assert line.startswith("✗ Error: another process holds the migration lock: ")
            assert f"{holder.locked_by}, running a backup, since 20" in line
            assert line.endswith("; try again, wait longer, or look with: msr lock:status")
            # And whom it waits for, unless its first look took as long as it should wait.
            before = result.stderr.count("\n") - 1
            assert before in ((0, 1) if arguments[-1] == "0.3" else (0,))
            assert tables(url) == set()
            held = query(url, "SELECT token, locked_by FROM migration_locks")
            assert held == [(holder.token, holder.locked_by)]
            assert holder.release() == 0

    def test_during_a_script(self, url: str, folder: Path, gate: Gate) -> None:
        """Exit 8 names the script that runs, also while SQLite has a transaction open."""
        write_scripts(
            folder, {"V1_slow.py": gate.script("await db.execute('CREATE TABLE t (i int)')")}
        )
        migration = start_msr("migrate")
        gate.wait()

        refused = run_msr("migrate", "--no-wait")
        document = json.loads(run_msr("migrate", "--no-wait", "--json").stdout)

        assert refused.exit_code == 8
        assert ", running V1_slow.py (1 of 1), since 20" in refused.stderr
        assert document["error"]["type"] == "LockHeldError"
        assert document["error"]["status"]["process_id"] == migration.pid
        gate.open()
        assert migration.wait(PATIENCE) == 0

    def test_progress_of_a_script(self, url: str, folder: Path, gate: Gate) -> None:
        """How far a script says it is shows in the status and to who waits, before it commits."""
        script = gate.script("context.progress(40, 100, 'rows')").replace("(db)", "(db, context)")
        write_scripts(folder, {"V1_slow.py": script})
        migration = start_msr("migrate")
        gate.wait()
        doing = "V1_slow.py (1 of 1), 40 of 100 rows"

        wait_until(lambda: f"Running: {doing}\n" in run_msr("lock:status").stdout)
        follower = start_msr("migrate")

        assert read_line(follower).endswith(f", running {doing}\n")
        gate.open()
        assert (migration.wait(PATIENCE), follower.wait(PATIENCE)) == (0, 0)

    def test_waits_and_migrates(self, url: str, folder: Path) -> None:
        """While it waits it says for whom on stderr; when the lock is free it goes on."""
        write_scripts(folder, FIRST)
        with hold_lock(url, running="a backup") as holder:
            migration = start_msr("migrate")

            assert unstamped(read_line(migration)) == (
                f"Waiting for the migration lock, held by {holder.locked_by}, running a backup\n"
            )

            assert holder.release() == 0
            stdout, stderr = migration.communicate(timeout=PATIENCE)
        assert (migration.returncode, unwaited(stderr)) == (0, "")
        assert unstamped(stdout).startswith("Applied V1_first.sql ")

    def test_follower(self, url: str, folder: Path, gate: Gate) -> None:
        """A process that waited while another applied everything ends well, and says so."""
        write_scripts(folder, {"V1_slow.py": gate.script()})
        leader = start_msr("migrate")
        gate.wait()
        follower = start_msr("migrate")
        listening = start_msr("migrate", "--json")

        for process in (follower, listening):
            assert read_line(process).endswith(", running V1_slow.py (1 of 1)\n")

        gate.open()
        assert leader.wait(PATIENCE) == 0
        stdout, stderr = follower.communicate(timeout=PATIENCE)
        assert (follower.returncode, unwaited(stderr)) == (0, "")
        assert stdout == "✓ Nothing left to do: another process applied 1 script\n"
        document = json.loads(listening.communicate(timeout=PATIENCE)[0])
        assert (document["followed"], document["executed"]) == (True, [])

    def test_expired(self, page_url: str, folder: Path) -> None:
        """A lock that has expired is taken over without waiting."""
        query(page_url, "UPDATE migration_locks SET expires_at = '2025-12-18T14:42:10.123Z'")
        write_scripts(folder, {"V2_second.sql": "CREATE TABLE second (id int);"})

        assert run_msr("migrate", "--no-wait").exit_code == 0

        assert tables(page_url) == {"first", "second"}
        assert is_free(page_url)


class TestNoLock:
    """--no-lock, for emergencies."""

    def test_takes_none(self, url: str, folder: Path) -> None:
        """It makes no lock table, records no token, and warns in one line on stderr."""
        write_scripts(folder, FIRST)

        result = run_msr("migrate", "--no-lock")

        assert result.exit_code == 0
        assert re.fullmatch(r"⚠️  Warning: .*without the migration lock\n", result.stderr)
        assert query(url, "SELECT version, token FROM schema_version") == [(1, None)]
        assert asyncio.run(table_names(url)) == {"first", "schema_version"}

    def test_runs_while_the_lock_is_held(self, url: str, folder: Path) -> None:
        """It neither waits for a holder nor takes anything from it."""
        write_scripts(folder, FIRST)
        with hold_lock(url) as holder:
            row = "SELECT name, token, locked_by, locked_at, running FROM migration_locks"
            before = query(url, row)

            result = run_msr("migrate", "--no-lock")

            assert result.exit_code == 0
            assert tables(url) == {"first"}
            assert query(url, row) == before
            assert holder.release() == 0

    def test_failure_is_rolled_back(self, url: str, folder: Path) -> None:
        """Without the lock, too, a script that fails leaves nothing behind."""
        write_scripts(folder, {**FIRST, "V2_bad.sql": BAD})

        assert run_msr("migrate", "--no-lock").exit_code == 3

        assert tables(url) == {"first"}
        assert versions(url) == [1]

    def test_handler_without_locking(self, without_locking: str, url: str, folder: Path) -> None:
        """A handler without a locking service migrates, with the same warning."""
        write_scripts(folder, FIRST)

        result = run_msr("migrate", "--executor", without_locking)

        assert result.exit_code == 0
        assert re.fullmatch(r"⚠️  Warning: .*without the migration lock\n", result.stderr)
        assert tables(url) == {"first"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--no-lock", "--no-wait"], "--no-lock: takes no lock"),
        (["--no-lock", "--wait", "5"], "--no-lock: takes no lock"),
        (["--no-wait", "--wait", "5"], "--no-wait: contradicts --wait"),
        (["--wait", "-1"], "'--wait'"),
        (["--wait", "soon"], "'--wait'"),
        (["--wait", "nan"], "--wait"),
        (["--waite", "5"], "No such option: --waite"),
        (["1", "extra"], "extra"),
        (["one"], "'[TARGET]'"),
        (["--steps", "0"], "'--steps'"),
        (["1", "--steps", "1"], "--steps: contradicts the target version"),
    ],
)
@on_sqlite
def test_wrong_use(url: str, folder: Path, arguments: list[str], says: str) -> None:
    """Options that contradict each other, or are none, are exit 2 and run nothing."""
    write_scripts(folder, FIRST)

    result = run_msr("migrate", *arguments)

    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("✗ Error: ")
    assert says in result.stderr
    assert result.stderr.count("\n") == 1
    assert not exists(url)


def sleep_in_sql(url: str) -> str:
    """A statement that takes minutes."""
    if url.startswith("sqlite"):
        return (
            "CREATE TABLE t AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)"
            " SELECT max(i) FROM n LIMIT 1;"
        )
    return "SELECT pg_sleep(300);"


SLEEPING = """
SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()
"""


def is_inside_a_script(url: str) -> bool:
    """Whether `sleep_in_sql` sleeps: in SQLite nobody else can write then, after the first."""
    if not url.startswith("sqlite"):
        return bool(query(url, SLEEPING))
    path = parse_url(url).path or ""
    if not exists(url) or "first" not in tables(url):
        return False
    with closing(sqlite3.connect(path, timeout=0.1, isolation_level=None)) as db:
        try:
            db.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return True
    return False


STUBBORN = """
import pathlib, signal
import anyio

def say_when_it_is_heard():
    hear = signal.getsignal(signal.SIGINT)

    def say(*heard):
        hear(*heard)
        pathlib.Path("heard").touch()

    signal.signal(signal.SIGINT, say)

"""


def interrupted(name: str) -> str:
    return f"✗ Error: interrupted by {name}: what ran in a transaction is undone\n"


class TestSignals:
    """SIGINT and SIGTERM: the script is rolled back, the lock released, then the process ends."""

    @pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
    def test_in_a_python_script(
        self, url: str, folder: Path, gate: Gate, name: str, code: int
    ) -> None:
        """What was applied before stays, the script that ran leaves nothing, the lock is free."""
        write_scripts(
            folder,
            {**FIRST, "V2_slow.py": gate.script("await db.execute('CREATE TABLE half (id int)')")},
        )
        migration = start_msr("migrate")
        gate.wait()

        migration.send_signal(signal.Signals[name])

        stdout, stderr = migration.communicate(timeout=PATIENCE)
        assert (migration.returncode, stderr) == (code, interrupted(name))
        assert re.fullmatch(rf"Applied V1_first\.sql {TOOK}\n", unstamped(stdout))
        assert tables(url) == {"first"}
        assert versions(url) == [1]
        assert is_free(url)

    def test_json(self, url: str, folder: Path, gate: Gate) -> None:
        """The document says what had been applied before."""
        write_scripts(folder, {**FIRST, "V2_slow.py": gate.script()})
        migration = start_msr("migrate", "--json")
        gate.wait()

        migration.terminate()

        document = json.loads(migration.communicate(timeout=PATIENCE)[0])
        assert migration.returncode == 143
        assert document["error"]["type"] == "Interrupted"
        assert document["error"]["applied"] == ["V1_first.sql"]

    def test_in_a_statement(self, url: str, folder: Path) -> None:
        """A statement that runs in the database is cancelled there."""
        write_scripts(folder, {**FIRST, "V2_slow.sql": sleep_in_sql(url)})
        migration = start_msr("migrate")
        wait_until(lambda: is_inside_a_script(url))

        migration.terminate()

        stdout, stderr = migration.communicate(timeout=PATIENCE)
        assert (migration.returncode, stderr) == (143, interrupted("SIGTERM"))
        assert re.fullmatch(rf"Applied V1_first\.sql {TOOK}\n", unstamped(stdout))
        assert versions(url) == [1]
        assert is_free(url)

    def test_between_two_scripts(self, url: str, folder: Path) -> None:
        """A signal at the beginning of a transaction leaves neither that nor the lock behind."""
        write_scripts(folder, {**FIRST, "V2_slow.sql": sleep_in_sql(url)})
        migration = start_msr("migrate")
        assert migration.stdout is not None
        assert " Applied V1_first.sql" in migration.stdout.readline()

        migration.terminate()

        _, stderr = migration.communicate(timeout=PATIENCE)
        assert (migration.returncode, stderr) == (143, interrupted("SIGTERM"))
        assert versions(url) == [1]
        assert is_free(url)

    def test_while_waiting(self, url: str, folder: Path) -> None:
        """A process that waits for the lock ends at once; the holder keeps it."""
        write_scripts(folder, FIRST)
        with hold_lock(url) as holder:
            migration = start_msr("migrate", "--json")
            other = start_msr("migrate")
            for process in (migration, other):
                assert holder.locked_by in read_line(process)

            other.terminate()
            migration.send_signal(signal.SIGINT)

            assert other.wait(PATIENCE) == 143
            document = json.loads(migration.communicate(timeout=PATIENCE)[0])
            assert (migration.returncode, document["error"]["type"]) == (130, "Interrupted")
            assert holder.release() == 0
        assert tables(url) == set()

    def test_second_signal(self, url: str, folder: Path, gate: Gate) -> None:
        """A script that shields itself holds up the first signal; a second one ends the process."""
        script = STUBBORN + gate.script("say_when_it_is_heard()").replace(
            "    while", "    with anyio.CancelScope(shield=True):\n     while", 1
        )
        write_scripts(folder, {"V1_stubborn.py": script})
        migration = start_msr("migrate")
        gate.wait()

        migration.send_signal(signal.SIGINT)
        wait_until(Path("heard").exists)  # before that, two signals may be one
        with pytest.raises(subprocess.TimeoutExpired):
            migration.wait(0.5)
        migration.send_signal(signal.SIGINT)

        assert migration.wait(PATIENCE) == 130
        assert run_msr("lock:release", "--force", "--yes").exit_code == 0
        assert versions(url) == []


def test_piped_output_is_plain(migrated_url: str, folder: Path) -> None:
    """Away from a terminal nothing is coloured, whatever the environment asks for."""
    write_scripts(folder, {"V2_bad.sql": BAD})

    result = run_msr("migrate", env={"NO_COLOR": "1"})

    assert "\x1b" not in result.stdout + result.stderr


@on_postgres
def test_server_ends_the_session(url: str, folder: Path) -> None:
    """PostgreSQL: a session that an administrator ends in mid-script is no crash, and no trace."""
    write_scripts(folder, {"V1_slow.sql": "CREATE TABLE t ();\n" + sleep_in_sql(url)})
    migration = start_msr("migrate")
    wait_until(lambda: is_inside_a_script(url))
    query(url, "SELECT pg_terminate_backend(session) FROM migration_locks")

    _, stderr = migration.communicate(timeout=PATIENCE)

    assert migration.returncode in (3, 7)
    assert stderr.startswith("✗ Error: ")
    assert "terminating connection due to administrator command" in stderr
    assert len(own_lines(stderr)) == 1
    assert tables(url) == set()
    assert is_free(url)


def test_a_script_that_exits_has_failed(url: str) -> None:
    """`sys.exit(0)` in a script is no success: a deployment must not go on unmigrated."""
    folder = write_scripts(Path("migrations"), {"V1_exit.py": EXITING})
    result = run_msr("migrate", "--json", "--folder", str(folder))

    assert result.exit_code == 3
    assert "V1_exit.py, line 6: SystemExit: 0" in result.stderr
    assert json.loads(result.stdout)["error"]["type"] == "MigrationError"
    assert "from the script" in result.stderr  # and what it prints stays out of the JSON


EXITING = """
import sys

async def up(db):
    print("from the script")
    sys.exit(0)
"""


def test_alone_it_shows_the_help() -> None:
    """`msr` without a command shows its commands, a line each."""
    result = run_msr()

    assert result.exit_code == 2
    assert "\n  migrate " in result.stderr
    assert "✗" not in result.stderr


class TestOutput:
    """What becomes of what it says."""

    @pytest.mark.parametrize("redirection", ["| true", ">&-", "2>&-", "> /dev/full"])
    def test_nobody_reads(self, url: str, folder: Path, redirection: str) -> None:
        """Whoever does not want to hear of it does not keep it from being done."""
        write_scripts(folder, FIRST)
        command = f"set -o pipefail; {MSR} migrate {redirection}"

        done = subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, timeout=PATIENCE
        )

        full = "⚠️  Warning: the output cannot be written: No space left on device\n"
        assert (done.returncode, done.stderr) == (0, full if "full" in redirection else "")
        assert versions(url) == [1]

    @on_postgres
    def test_detail(self, url: str, folder: Path) -> None:
        """What the server says besides stands below the line, and in the document."""
        script = "CREATE TABLE t (id int PRIMARY KEY);\nINSERT INTO t VALUES (7), (7);"
        write_scripts(folder, {"V1_t.sql": script})

        result = run_msr("migrate")
        document = json.loads(run_msr("migrate", "--json").stdout)

        assert result.stderr.endswith("    | Key (id)=(7) already exists.\n")
        assert document["error"]["detail"] == "Key (id)=(7) already exists."

    @on_postgres
    def test_what_a_script_raises(self, url: str, folder: Path) -> None:
        """A warning of the server's is one of ours, a notice is for those who want to know more."""
        script = "DO $$ BEGIN RAISE WARNING 'mind the gap'; RAISE NOTICE 'by the way'; END $$;"
        write_scripts(folder, {"V1_first.sql": script, "V2_second.sql": script})

        brief, more = run_msr("migrate", "1"), run_msr("migrate", "-v")

        assert brief.stderr == "⚠️  Warning: mind the gap\n"
        assert more.stderr == "⚠️  Warning: mind the gap\nby the way\n"

    def test_any_encoding(self, postgres_server: PostgresServer, folder: Path) -> None:
        """A comment that the database could not hold is no reason not to run the script."""
        name = f"latin_{uuid.uuid4().hex[:16]}"
        how = "TEMPLATE template0 ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C'"
        postgres_server.execute(f"CREATE DATABASE {name} {how}")
        try:
            write_scripts(folder, {"V1_t.sql": "-- ids → names\nCREATE TABLE t (id int);"})
            assert run_msr("migrate", "--url", postgres_server.url(name)).exit_code == 0
        finally:
            postgres_server.drop_database(name)

    def test_interrupted_outside_a_transaction(self, url: str, folder: Path, gate: Gate) -> None:
        """Then what it did stays, and the message names it and says how to go on."""
        write_scripts(folder, {"V1_slow.py": f"transaction = False\n{gate.script()}"})
        migration = start_msr("migrate")
        gate.wait()

        migration.terminate()

        _, stderr = migration.communicate(timeout=PATIENCE)
        said = "V1_slow.py ran outside a transaction: check by hand what it did, then msr repair"
        assert (migration.returncode, said in stderr) == (143, True)
