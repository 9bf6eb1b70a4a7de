"""One transaction for the whole run: all of it, or nothing."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.cli import PATIENCE, Result, run_msr, start_msr, write_scripts
from tests.support.databases import on_postgres, on_sqlite
from tests.support.dump import dump
from tests.support.holder import Gate, hold_lock
from tests.support.migrations import applied, lock_row
from tests.support.queries import query, table_names

NOWHERE = "INSERT INTO nowhere VALUES (1);"
GOOD = {
    "V1_one.up.sql": "CREATE TABLE t1 (id int);",
    "V1_one.down.sql": "DROP TABLE t1;",
    "V2_two.py": """\
        async def up(db):
            await db.execute("CREATE TABLE t2 (id int)")

        async def down(db):
            await db.execute("DROP TABLE t2")
        """,
    "V3_three.up.sql": "CREATE TABLE t3 (id int);",
    "V3_three.down.sql": "DROP TABLE t3;",
}
THIRD_FAILS = {**GOOD, "V3_three.up.sql": f"CREATE TABLE t3 (id int);\n{NOWHERE}"}
FIRST_HAS_NO_WAY_BACK = {**GOOD, "V1_one.down.sql": f"DROP TABLE t1;\n{NOWHERE}"}

# Every way to ask for one transaction, and every way to have one each.
ONE: list[tuple[Sequence[str], dict[str, str], str]] = [
    (["--single-transaction"], {}, ""),
    ([], {"MSR_TRANSACTION": "batch"}, ""),
    ([], {}, 'transaction = "batch"'),
    (["--single-transaction"], {"MSR_TRANSACTION": "script"}, ""),
    ([], {"MSR_TRANSACTION": "batch"}, 'transaction = "script"'),
]
EACH: list[tuple[Sequence[str], dict[str, str], str]] = [
    ([], {}, ""),
    ([], {"MSR_TRANSACTION": "script"}, ""),
    ([], {}, 'transaction = "script"'),
    ([], {"MSR_TRANSACTION": "script"}, 'transaction = "batch"'),
]


def tables(url: str) -> set[str]:
    """The tables of the scripts."""
    ours = {"migration_locks", "migration_locks_token", "schema_version"}
    return asyncio.run(table_names(url)) - ours


def is_free(url: str) -> bool:
    return lock_row(url)[1] is None


class TestMigrate:
    """`msr migrate --single-transaction`, MSR_TRANSACTION=batch, transaction = "batch"."""

    @on_sqlite
    @pytest.mark.parametrize(("arguments", "env", "toml"), ONE)
    def test_nothing_is_left(
        self, url: str, folder: Path, arguments: Sequence[str], env: dict[str, str], toml: str
    ) -> None:
        """The third of three scripts fails: no table, no row of the history, no lock stays."""
        write_scripts(folder, THIRD_FAILS)
        Path("msr.toml").write_text(toml)

        result = run_msr("migrate", *arguments, env=env)

        assert (result.exit_code, result.stdout) == (3, "")  # what is undone was not "Applied"
        assert result.stderr.startswith("✗ Error: V3_three.up.sql, line 2")
        undone = "the script was rolled back with V1_one.up.sql, V2_two.py"
        assert f"; {undone}; applied before it: nothing\n" in result.stderr
        assert tables(url) == set()
        assert query(url, "SELECT version FROM schema_version") == []
        assert is_free(url)

    @pytest.mark.parametrize(("arguments", "env", "toml"), EACH)
    def test_by_default_the_others_stay(
        self, url: str, folder: Path, arguments: Sequence[str], env: dict[str, str], toml: str
    ) -> None:
        """The control: with a transaction each, the first two are applied and stay so."""
        write_scripts(folder, THIRD_FAILS)
        Path("msr.toml").write_text(toml)

        result = run_msr("migrate", *arguments, env=env)

        assert result.exit_code == 3
        assert re.findall(r"Applied (\S+)", result.stdout) == ["V1_one.up.sql", "V2_two.py"]
        assert "applied before it: V1_one.up.sql, V2_two.py\n" in result.stderr
        assert tables(url) == {"t1", "t2"}
        assert applied(url) == [1, 2]

    def test_json(self, url: str, folder: Path) -> None:
        """The error and the result agree that nothing was done."""
        write_scripts(folder, THIRD_FAILS)

        result = run_msr("migrate", "--single-transaction", "--json")

        document = json.loads(result.stdout)
        error = document["error"]
        assert (result.exit_code, error["type"]) == (3, "MigrationError")
        assert (error["script"], error["rolled_back"]) == ("V3_three.up.sql", True)
        assert (error["applied"], document["result"]["executed"]) == ([], [])
        assert document["result"]["pending_before"] == 3

    def test_success(self, url: str, folder: Path) -> None:
        """All of it: a line and a row for each, under one token, repeatable ones included."""
        write_scripts(folder, {**GOOD, "R_view.sql": "CREATE VIEW v AS SELECT id FROM t3;"})

        result = run_msr("migrate", "--single-transaction")

        assert (result.exit_code, result.stderr) == (0, "")
        names = ["V1_one.up.sql", "V2_two.py", "V3_three.up.sql", "R_view.sql"]
        assert re.findall(r"Applied (\S+) \(\S+ m?s\)", result.stdout) == names
        assert re.search(r"✓ 4 scripts applied in \S+ m?s\n$", result.stdout)
        assert tables(url) >= {"t1", "t2", "t3"}
        assert applied_rows(url) == [(1, "applied", 1), (2, "applied", 1), (3, "applied", 1)]
        assert query(url, "SELECT status FROM schema_version WHERE version IS NULL") == [
            ("applied",)
        ]
        assert is_free(url)
        again = run_msr("migrate", "--single-transaction")
        assert again == Result(0, "✓ Nothing to do: 4 scripts applied already\n", "")

    def test_what_was_there_stays(self, migrated_url: str, folder: Path) -> None:
        """Nothing of this run, that is: an earlier one is not touched by its failure."""
        write_scripts(
            folder, {"V2_two.sql": "INSERT INTO first VALUES (1);", "R_fails.sql": NOWHERE}
        )
        before = (tables(migrated_url), query(migrated_url, "SELECT * FROM schema_version"))

        result = run_msr("migrate", "--single-transaction")

        assert result.exit_code == 3
        assert result.stderr.startswith("✗ Error: R_fails.sql, line 1")
        assert query(migrated_url, "SELECT * FROM first") == []
        after = (tables(migrated_url), query(migrated_url, "SELECT * FROM schema_version"))
        assert after == before

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("V4_out.sql", "-- msr: no-transaction\nCREATE TABLE t4 (id int);"),
            ("V4_out.py", "transaction = False\nasync def up(db): ..."),
            ("R_out.sql", "-- msr: no-transaction\nSELECT 1;"),
        ],
    )
    def test_one_that_opts_out(self, url: str, folder: Path, name: str, text: str) -> None:
        """A script that cannot run in a transaction is found before any runs, also when trying."""
        write_scripts(folder, {**GOOD, name: text})
        before = dump(url)

        result = run_msr("migrate", "--single-transaction")
        tried = run_msr("migrate", "--dry-run", env={"MSR_TRANSACTION": "batch"})
        told = json.loads(run_msr("migrate", "--single-transaction", "--json").stdout)["error"]

        assert result == tried
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr == (
            f"✗ Error: {name}: opts out of the transaction, so it cannot run in one with others: "
            "let this run do without a single transaction\n"
        )
        assert [it["rule"] for it in told["problems"]] == ["no-transaction-in-batch"]
        assert dump(url) == before
        # Short of it the others may run so; and it runs, where each has its own.
        if name.startswith("V"):
            assert run_msr("migrate", "3", "--single-transaction").exit_code == 0
        assert run_msr("migrate").exit_code == 0

    def test_a_commit_inside_is_refused(self, url: str, folder: Path) -> None:
        """A script that would end the transaction of all is refused like everywhere."""
        write_scripts(folder, {**GOOD, "V4_commit.sql": "SELECT 1;\nCOMMIT;"})

        result = run_msr("migrate", "--single-transaction")

        assert result.exit_code == 2
        assert "V4_commit.sql, line 2: COMMIT would break the transaction" in result.stderr
        assert tables(url) == set()

    def test_the_lock_is_held(self, url: str, folder: Path) -> None:
        """It runs under the lock like any other: exit 8, nothing changed."""
        write_scripts(folder, GOOD)
        with hold_lock(url):
            result = run_msr("migrate", "--single-transaction", "--no-wait")
        assert result.exit_code == 8
        assert tables(url) == set()

    def test_interrupted(self, url: str, folder: Path, gate: Gate) -> None:
        """SIGTERM in the last script takes back the first, too, and frees the lock."""
        write_scripts(folder, {**GOOD, "V4_slow.py": gate.script()})
        migration = start_msr("migrate", "--single-transaction")
        gate.wait()

        migration.terminate()

        stdout, stderr = migration.communicate(timeout=PATIENCE)
        assert (migration.returncode, stdout) == (143, "")
        assert "interrupted by SIGTERM" in stderr
        assert tables(url) == set()
        assert applied(url) == []
        assert is_free(url)

    def test_killed(self, url: str, folder: Path, gate: Gate) -> None:
        """SIGKILL in the last script leaves nothing either, and the next run does all of it."""
        write_scripts(folder, {**GOOD, "V4_slow.py": gate.script()})
        migration = start_msr("migrate", "--single-transaction")
        gate.wait()

        migration.kill()
        migration.wait()

        assert tables(url) == set()
        assert applied(url) == []
        gate.open()
        assert run_msr("migrate", "--single-transaction").exit_code == 0
        assert applied(url) == [1, 2, 3, 4]


class TestDown:
    """`msr down --single-transaction`."""

    @pytest.fixture
    def there(self, url: str, folder: Path) -> str:
        """Three scripts are applied, and the way back of the first one fails."""
        write_scripts(folder, FIRST_HAS_NO_WAY_BACK)
        assert run_msr("migrate").exit_code == 0
        return url

    @on_sqlite
    @pytest.mark.parametrize(("arguments", "env", "toml"), ONE[:3])
    def test_nothing_is_taken_back(
        self, there: str, arguments: Sequence[str], env: dict[str, str], toml: str
    ) -> None:
        """The last of three ways back fails: exit 4, and all three are as they were."""
        Path("msr.toml").write_text(toml)
        before = query(there, "SELECT * FROM schema_version ORDER BY version")

        result = run_msr("down", "0", *arguments, env=env)

        assert (result.exit_code, result.stdout) == (4, "")
        assert result.stderr.startswith("✗ Error: V1_one.down.sql, line 2")
        assert "; taken back before it: nothing\n" in result.stderr
        assert tables(there) == {"t1", "t2", "t3"}
        assert query(there, "SELECT * FROM schema_version ORDER BY version") == before
        assert is_free(there)

    @pytest.mark.parametrize(("arguments", "env", "toml"), EACH)
    def test_by_default_the_others_are(
        self, there: str, arguments: Sequence[str], env: dict[str, str], toml: str
    ) -> None:
        """The control: with a transaction each, the newer two are gone."""
        Path("msr.toml").write_text(toml)

        result = run_msr("down", "0", *arguments, env=env)

        assert result.exit_code == 4
        assert "taken back before it: V3_three.down.sql, V2_two.py\n" in result.stderr
        assert tables(there) == {"t1"}
        assert applied(there) == [1]

    def test_json(self, there: str) -> None:
        """The error and the result agree that nothing was done."""
        result = run_msr("down", "0", "--single-transaction", "--json")

        document = json.loads(result.stdout)
        assert (result.exit_code, document["error"]["type"]) == (4, "RollbackError")
        assert (document["error"]["applied"], document["result"]["executed"]) == ([], [])

    def test_success(self, there: str) -> None:
        """As far as it goes well, all of it: here to version 1."""
        result = run_msr("down", "1", "--single-transaction")

        assert (result.exit_code, result.stderr) == (0, "")
        names = re.findall(r"Rolled back (\S+)", result.stdout)
        assert names == ["V3_three.down.sql", "V2_two.py"]
        assert tables(there) == {"t1"}
        assert applied(there) == [1]

    def test_one_that_opts_out(self, there: str, folder: Path) -> None:
        """A way back outside a transaction is found before any is taken."""
        write_scripts(folder, {"V1_one.down.sql": "-- msr: no-transaction\nDROP TABLE t1;"})

        result = run_msr("down", "0", "--single-transaction")

        assert (result.exit_code, result.stdout) == (2, "")
        assert "V1_one.down.sql: opts out of the transaction" in result.stderr
        assert tables(there) == {"t1", "t2", "t3"}
        assert run_msr("down", "0").exit_code == 0
        assert tables(there) == set()

    def test_the_lock_is_held(self, there: str) -> None:
        """It runs under the lock like any other."""
        with hold_lock(there):
            assert run_msr("down", "0", "--single-transaction", "--no-wait").exit_code == 8
        assert applied(there) == [1, 2, 3]


@pytest.mark.parametrize("source", ["MSR_TRANSACTION", "msr.toml"])
@pytest.mark.parametrize("command", [["migrate"], ["down", "0"]])
def test_no_such_word(url: str, folder: Path, source: str, command: list[str]) -> None:
    """Anything but `script` and `batch` is exit 2, with where it stands."""
    write_scripts(folder, GOOD)
    if source == "msr.toml":
        Path(source).write_text('transaction = "each"')

    result = run_msr(*command, env={source: "each"} if source.startswith("MSR") else {})

    assert (result.exit_code, result.stdout) == (2, "")
    assert f"{source}: transaction: must be script or batch" in result.stderr
    assert tables(url) == set()


def applied_rows(url: str) -> list[tuple[int, str, int]]:
    """Version, status and token of the versioned scripts."""
    rows = "SELECT version, status, token FROM schema_version WHERE version IS NOT NULL"
    return sorted(query(url, rows))


class TestScriptsDoNotMix:
    """In one transaction they are still scripts of their own."""

    def test_savepoints(self, url: str, folder: Path) -> None:
        """A script cannot go back to before itself: that would undo another's row, and not tell."""
        write_scripts(
            folder,
            {
                "V1_one.sql": "CREATE TABLE one (id int); SAVEPOINT s; CREATE TABLE two (id int);",
                "V2_two.sql": "ROLLBACK TO SAVEPOINT s; CREATE TABLE three (id int);",
            },
        )

        result = run_msr("migrate", "--single-transaction")

        assert result.exit_code == 3
        assert "V2_two.sql, line 1" in result.stderr
        assert tables(url) == set()
        assert query(url, "SELECT version FROM schema_version") == []

    @on_postgres
    def test_settings(self, url: str, folder: Path) -> None:
        """What a script SET is not for the next one, as every dump sets the search_path."""
        write_scripts(
            folder,
            {
                "V1_one.sql": "SELECT set_config('search_path', '', false);",
                "V2_two.sql": "CREATE TABLE two (id int);",
            },
        )

        assert run_msr("migrate", "--single-transaction").exit_code == 0

        assert tables(url) == {"two"}

    @on_postgres
    def test_forced_release(self, url: str, folder: Path, gate: Gate) -> None:
        """The lock can be released by force in the middle, and nothing is committed then."""
        write_scripts(
            folder, {"V1_one.sql": "CREATE TABLE one (id int);", "V2_slow.py": gate.script()}
        )
        migration = start_msr("migrate", "--single-transaction")
        gate.wait()

        assert run_msr("lock:release", "--force", "--yes").exit_code == 0

        gate.open()
        assert migration.wait(PATIENCE) == 9
        assert tables(url) == set()
