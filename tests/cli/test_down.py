"""`msr down`: how far it goes, what it leaves, what stops it, and whom it waits for."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import anyio
import pytest

import msr
from tests.support.cli import Result, run_msr, start_msr, write_scripts
from tests.support.databases import on_sqlite
from tests.support.dump import dump
from tests.support.holder import Gate, hold_lock
from tests.support.migrations import finish, is_sqlite, lock_row, rows_of, wait_for_waiting
from tests.support.queries import query, table_names
from tests.support.rig import Rig

SECOND = """\
async def up(db):
    await db.execute("CREATE TABLE second (id int)")

async def down(db):
    await db.execute("DROP TABLE second")
"""

# Version 10 comes after 2 as a number only.
SCRIPTS = {
    "V1_first.up.sql": "CREATE TABLE first (id int);",
    "V1_first.down.sql": "DROP TABLE first;",
    "V2_second.py": SECOND,
    "late/V10_third.up.sql": "CREATE TABLE third (id int);",
    "late/V10_third.down.sql": "DROP TABLE third;",
}

# The first statement goes through, the second fails on line 3.
BAD = """\
DROP TABLE first;

INSERT INTO nowhere VALUES (1);
"""

AT = r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ "
TOOK = r"\(\S+ m?s\)"


@pytest.fixture
def three(url: str, folder: Path) -> str:
    """A database in which three scripts are applied, each of which made a table."""
    write_scripts(folder, SCRIPTS)
    anyio.run(msr.migrate)
    return url


def tables(url: str) -> set[str]:
    """The tables of the scripts."""
    ours = {"migration_locks", "migration_locks_token", "schema_version"}
    return asyncio.run(table_names(url)) - ours


def history(url: str) -> dict[str, str]:
    """The status of each script in the history, by name."""
    return dict(rows_of(url, "SELECT name, status FROM schema_version"))


def is_free(url: str) -> bool:
    """Whether nobody is named on the lock."""
    return query(url, "SELECT locked_by FROM migration_locks") == [(None,)]


def no_table(url: str) -> str:
    """What the database says to `BAD`."""
    if is_sqlite(url):
        return "no such table: nowhere"
    return 'relation "nowhere" does not exist'


def with_way_down(body: str, up: str = "pass", options: str = "") -> str:
    """A Python script whose way down is the `up` of the given one."""
    down = body.replace("async def up", "async def down")
    return f"{options}\n{down}\nasync def up(db):\n    {up}\n"


class TestSuccess:
    """What is newer than the target is taken back."""

    def test_text(self, three: str) -> None:
        """A line for each, the newest first, SQL and Python, and their history rows are gone."""
        result = run_msr("down", "1")

        assert (result.exit_code, result.stderr) == (0, "")
        assert re.fullmatch(
            rf"{AT}Rolled back late/V10_third\.down\.sql {TOOK}\n"
            rf"{AT}Rolled back V2_second\.py {TOOK}\n"
            r"✓ 2 scripts rolled back in \S+ m?s\n",
            result.stdout,
        )
        assert tables(three) == {"first"}
        assert history(three) == {"first": "applied"}
        assert is_free(three)

    def test_all_the_way_and_back(self, three: str) -> None:
        """Target 0 takes everything back, and the next migrate applies it all anew."""
        assert run_msr("down", "0").exit_code == 0
        assert tables(three) == set()
        assert history(three) == {}

        assert run_msr("migrate").stdout.count("Applied ") == 3
        assert tables(three) == {"first", "second", "third"}

    def test_rollback_is_the_same(self, three: str) -> None:
        """`msr rollback` goes down too, and takes the same options."""
        assert run_msr("rollback", "2", "--no-wait").exit_code == 0
        assert tables(three) == {"first", "second"}

    def test_steps(self, three: str) -> None:
        """--steps takes back so many, and stops without complaint where there are fewer."""
        assert run_msr("down", "--steps", "2").exit_code == 0
        assert tables(three) == {"first"}

        result = run_msr("down", "--steps", "5")

        assert (result.exit_code, result.stdout.count("Rolled back ")) == (0, 1)
        assert tables(three) == set()

    def test_nothing_to_do(self, three: str, folder: Path) -> None:
        """At the target already, this says so and changes nothing, repeatable scripts included."""
        write_scripts(folder, {"R_view.sql": "CREATE VIEW ours AS SELECT id FROM first;"})
        anyio.run(msr.migrate)
        before = dump(three)

        result = run_msr("down", "10")

        assert result == Result(0, "✓ Nothing to do: no script is newer\n", "")
        assert dump(three) == before

    def test_nothing_initialised(self, url: str, folder: Path) -> None:
        """In a database that was never migrated nothing is to be done, nor is anything made."""
        write_scripts(folder, SCRIPTS)
        before = dump(url)

        for arguments in (["0"], ["--steps", "1"]):
            result = run_msr("down", *arguments)

            assert result == Result(0, "✓ Nothing to do: no script is newer\n", "")
        assert dump(url) == before

    def test_json(self, three: str) -> None:
        """--json prints one document, and what a script prints goes elsewhere."""
        talkative = SECOND.replace("async def down(db):", "async def down(db):\n    print('hello')")
        write_scripts(Path("migrations"), {"V2_second.py": talkative})

        result = run_msr("down", "1", "--json")

        document = json.loads(result.stdout)
        assert (result.exit_code, result.stderr) == (0, "hello\n")
        assert [
            (it["version"], it["name"], it["script"], it["action"]) for it in document["executed"]
        ] == [
            (10, "third", "late/V10_third.down.sql", "revert"),
            (2, "second", "V2_second.py", "revert"),
        ]
        assert all(0 <= it["duration"] < 30 for it in document["executed"])
        assert (document["format"], document["followed"]) == (1, False)
        assert (document["pending_before"], document["applied_before"]) == (2, 3)
        assert document["token"] == lock_row(three)[0] == 2

        nothing = json.loads(run_msr("down", "1", "--json").stdout)
        assert (nothing["executed"], nothing["pending_before"], nothing["token"]) == ([], 0, None)

    def test_other_files_are_no_obstacle(self, three: str, folder: Path) -> None:
        """An edit is often why one goes back; what else is wrong in the folder does not matter."""
        write_scripts(
            folder,
            {
                "late/V10_third.up.sql": "CREATE TABLE better (id int);",
                "V1_first.up.sql": "CREATE TABLE edited (id int);",
                "V11-bad-name.sql": "",
                "V12_broken.py": "def",
            },
        )

        result = run_msr("down", "2")

        assert (result.exit_code, result.stderr) == (0, "")
        assert history(three) == {"first": "applied", "second": "applied"}

    def test_repeatable_scripts_run_again(self, three: str, folder: Path) -> None:
        """A way down may take a view along; the next migrate makes it anew, though unchanged."""
        view = "DROP VIEW IF EXISTS ours; CREATE VIEW ours AS SELECT id FROM third;"
        down = "DROP VIEW ours; DROP TABLE third;"
        write_scripts(folder, {"R_ours.sql": view, "late/V10_third.down.sql": down})
        anyio.run(msr.migrate)
        assert history(three)["ours"] == "applied"

        assert run_msr("down", "2").exit_code == 0
        assert "ours" not in history(three)

        done = json.loads(run_msr("migrate", "--json").stdout)["executed"]
        assert [it["script"] for it in done] == ["late/V10_third.up.sql", "R_ours.sql"]
        assert query(three, "SELECT id FROM ours") == []


class TestTransaction:
    """A way down and the removal of its history row are one."""

    def test_together_or_not_at_all(self, three: str) -> None:
        """Where the history row cannot be removed, the script has done nothing either."""
        refuse = ["CREATE TRIGGER keep BEFORE DELETE ON schema_version"]
        if is_sqlite(three):
            refuse[0] += " BEGIN SELECT RAISE(ABORT, 'kept'); END"
        else:
            refuse[0] += " FOR EACH ROW EXECUTE FUNCTION keep()"
            body = "$$ BEGIN RAISE EXCEPTION 'kept'; END $$"
            function = f"CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS {body}"
            refuse.insert(0, function)
        query(three, *refuse)

        result = run_msr("down", "0")

        assert (result.exit_code, result.stdout) == (1, "")
        assert "kept" in result.stderr
        assert tables(three) == {"first", "second", "third"}
        assert set(history(three)) == {"first", "second", "third"}
        assert is_free(three)

    def test_single_transaction(self, three: str, folder: Path) -> None:
        """With --single-transaction one that fails keeps those before it from being taken back."""
        write_scripts(
            folder,
            {"V1_first.down.sql": BAD, "R_ours.sql": "CREATE VIEW ours AS SELECT id FROM first;"},
        )
        anyio.run(msr.migrate)

        result = run_msr("down", "0", "--single-transaction")

        assert (result.exit_code, result.stdout) == (4, "")
        undone = "the script was rolled back with late/V10_third.down.sql, V2_second.py; "
        assert f"; {undone}taken back before it: nothing\n" in result.stderr
        assert tables(three) >= {"first", "second", "third"}
        assert set(history(three)) == {"first", "second", "third", "ours"}

    @pytest.mark.parametrize("kind", ["sql", "python"])
    def test_outside_a_transaction(self, url: str, folder: Path, kind: str) -> None:
        """One that opts out runs outside, where the database shows it, and its row is removed."""
        # VACUUM is refused inside a transaction by both databases.
        script = "async def up(db):\n    await db.execute('VACUUM')\n"
        scripts = {
            "sql": {
                "V1_outside.up.sql": "CREATE TABLE outside (id int);",
                "V1_outside.down.sql": "-- msr: no-transaction\nVACUUM;\nDROP TABLE outside;",
            },
            "python": {"V1_outside.py": with_way_down(script, options="transaction = False")},
        }
        write_scripts(folder, scripts[kind])
        anyio.run(msr.migrate)

        result = run_msr("down", "0")

        assert (result.exit_code, result.stderr) == (0, "")
        assert tables(url) == set()
        assert history(url) == {}

    def test_fails_outside_a_transaction(self, url: str, folder: Path) -> None:
        """What it did stays, so it is recorded as failed, and no run goes on before it is seen to.

        In a transaction with others it cannot run at all.
        """
        write_scripts(
            folder,
            {
                "V1_first.up.sql": "CREATE TABLE first (id int);",
                "V1_first.down.sql": f"-- msr: no-transaction\n{BAD}",
            },
        )
        anyio.run(msr.migrate)
        before = dump(url)

        together = run_msr("down", "0", "--single-transaction")

        assert together.exit_code == 2
        assert "V1_first.down.sql: opts out of the transaction" in together.stderr
        assert dump(url) == before

        failed = run_msr("down", "0")

        assert failed.exit_code == 4
        assert "V1_first.down.sql, line 4" in failed.stderr
        assert f"{no_table(url)}; what the script had committed stays" in failed.stderr
        assert tables(url) == set()
        assert history(url) == {"first": "revert-failed"}
        [(note,)] = query(url, "SELECT note FROM schema_version")
        assert note.startswith("V1_first.down.sql, line 4")
        for arguments in (["down", "0"], ["migrate"]):
            refused = run_msr(*arguments)
            assert (refused.exit_code, refused.stdout) == (2, "")
            assert "V1_first.up.sql: failed outside a transaction" in refused.stderr
            advice = "if that is all of it run 'msr repair 1 --retry', and it is pending again"
            assert advice in refused.stderr
        assert is_free(url)

    def test_lock_lost_meanwhile(self, url: str, folder: Path, gate: Gate) -> None:
        """Whoever has lost the lock removes nothing from the history: exit 9."""
        body = with_way_down(gate.script(), options="transaction = False")
        write_scripts(folder, {"V1_slow.py": body})
        anyio.run(msr.migrate)
        down = start_msr("down", "0")
        gate.wait()

        assert run_msr("lock:release", "--force", "--yes").exit_code == 0
        gate.open()

        result = finish(down)
        assert (result.exit_code, result.stdout) == (9, "")
        assert history(url) == {"slow": "reverting"}


class TestFailure:
    """A way down fails: exit 4, and the database is as those before it left it."""

    @pytest.fixture
    def broken(self, three: str, folder: Path) -> str:
        write_scripts(folder, {"V1_first.down.sql": BAD})
        return three

    def test_text(self, broken: str, folder: Path) -> None:
        """The file, the line, the server's words and what was taken back; then the line itself."""
        result = run_msr("down", "0")

        assert result.exit_code == 4
        assert re.fullmatch(
            rf"{AT}Rolled back late/V10_third\.down\.sql {TOOK}\n"
            rf"{AT}Rolled back V2_second\.py {TOOK}\n",
            result.stdout,
        )
        error, source, *caret = result.stderr.splitlines()
        assert re.fullmatch(
            rf"✗ Error: V1_first\.down\.sql, line 3(, column 13)?: {re.escape(no_table(broken))}; "
            r"the script was rolled back; "
            r"taken back before it: late/V10_third\.down\.sql, V2_second\.py",
            error,
        )
        assert source == "  3 | INSERT INTO nowhere VALUES (1);"
        assert caret == ([] if is_sqlite(broken) else ["    |             ^"])
        assert tables(broken) == {"first"}
        assert history(broken) == {"first": "applied"}
        assert is_free(broken)

        # Once it is put right, the next run goes on from there.
        write_scripts(folder, {"V1_first.down.sql": SCRIPTS["V1_first.down.sql"]})
        assert run_msr("down", "0").exit_code == 0
        assert (tables(broken), history(broken)) == (set(), {})

    def test_json(self, broken: str) -> None:
        """--json tells the same as data, and what the run had done before it failed."""
        result = run_msr("down", "0", "--json")

        document = json.loads(result.stdout)
        error = document["error"]
        assert result.exit_code == 4
        assert result.stderr.startswith(f"✗ Error: {error['message']}\n")
        assert (error["type"], error["script"]) == ("RollbackError", "V1_first.down.sql")
        assert (error["line"], error["server_message"]) == (3, no_table(broken))
        assert error["sqlstate"] == (None if is_sqlite(broken) else "42P01")
        assert error["rolled_back"] is True
        assert error["applied"] == ["late/V10_third.down.sql", "V2_second.py"]
        done = document["result"]
        assert [it["version"] for it in done["executed"]] == [10, 2]
        assert (done["pending_before"], done["applied_before"]) == (3, 3)

    def test_python(self, three: str, folder: Path) -> None:
        """One that raises is rolled back whole, and the line is the one in its file."""
        script = f'{SECOND}    raise ValueError("no such customer")\n'
        write_scripts(folder, {"V2_second.py": script})

        result = run_msr("down", "1")

        assert result.exit_code == 4
        assert result.stderr.splitlines() == [
            (
                "✗ Error: V2_second.py, line 6: ValueError: no such customer; "
                "the script was rolled back; taken back before it: late/V10_third.down.sql"
            ),
            '  6 |     raise ValueError("no such customer")',
        ]
        assert tables(three) == {"first", "second"}
        assert history(three) == {"first": "applied", "second": "applied"}

    def test_no_way_down(self, three: str, folder: Path) -> None:
        """Everything without a way down is told at once, exit 2, before even the newest is run.

        What stays is not asked for one.
        """
        write_scripts(
            folder,
            {
                "V3_one_way.sql": "CREATE TABLE one_way (id int);",
                "V4_no_down.up.sql": "CREATE TABLE no_down (id int);",
                "V5_no_down.py": SECOND.partition("async def down")[0].replace("second", "third_"),
                "V6_gone.sql": "CREATE TABLE gone (id int);",
            },
        )
        anyio.run(lambda: msr.migrate(out_of_order="apply"))
        (folder / "V6_gone.sql").unlink()
        before = dump(three)

        result = run_msr("down", "1")
        document = json.loads(run_msr("down", "1", "--json").stdout)

        no_way = "has no way down, so nothing can be rolled back to before it:"
        renaming = "rename it to V3_one_way.up.sql, and write V3_one_way.down.sql beside it"
        assert (result.exit_code, result.stdout) == (2, "")
        assert sorted(result.stderr.splitlines()) == [
            f"  V3_one_way.sql: {no_way} {renaming}",
            f"  V4_no_down.up.sql: {no_way} write V4_no_down.down.sql",
            f"  V5_no_down.py: {no_way} define 'async def down(db)'",
            "  V6_gone: is to be rolled back, but its file is gone: restore it",
            "✗ Error: 4 problems, nothing was run:",
        ]
        assert document["error"]["type"] == "ValidationError"
        assert sorted((it["file"], it["rule"]) for it in document["error"]["problems"]) == [
            ("V3_one_way.sql", "no-way-down"),
            ("V4_no_down.up.sql", "no-way-down"),
            ("V5_no_down.py", "no-way-down"),
            ("V6_gone", "missing-file"),
        ]
        assert dump(three) == before
        assert run_msr("down", "6").exit_code == 0
        assert tables(three) == {"first", "second", "one_way", "no_down", "third_", "gone"}

    def test_only_the_way_down_is_gone(self, three: str, folder: Path) -> None:
        """A `.down.sql` that is not there any more, or cannot be read, stops the run as well."""
        down = folder / "V1_first.down.sql"
        down.write_bytes(b"DROP TABLE first; -- \xff")
        before = dump(three)

        unreadable = run_msr("down", "0")
        down.unlink()
        gone = run_msr("down", "0")

        assert unreadable == Result(
            2, "", "✗ Error: V1_first.down.sql, line 1: is not UTF-8 at byte 22: save it as UTF-8\n"
        )
        assert gone.exit_code == 2
        assert gone.stderr.startswith("✗ Error: V1_first.up.sql: has no way down, ")
        assert dump(three) == before

    def test_unreadable_script(self, three: str, folder: Path) -> None:
        """A script to be taken back that cannot be read is said to be that, and nothing is run."""
        (folder / "V2_second.py").write_bytes(b"# \xff")
        before = dump(three)

        result = run_msr("down", "1")

        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith("✗ Error: V2_second.py, line 1: is not UTF-8 at byte 3")
        assert dump(three) == before

    def test_baseline(self, url: str, folder: Path) -> None:
        """Back to a baseline there is a way, and to before it none, which is said at first."""
        write_scripts(folder, SCRIPTS)
        query(url, "CREATE TABLE first (id int)")
        assert run_msr("baseline", "1").exit_code == 0
        anyio.run(msr.migrate)
        before = dump(url)

        for arguments in (["0"], ["--steps", "3"]):
            result = run_msr("down", *arguments)

            assert (result.exit_code, result.stdout) == (2, "")
            assert result.stderr == (
                "✗ Error: V1_first.up.sql: was there before msr came, so msr has no way back to "
                "before it\n"
            )
        assert dump(url) == before

        assert run_msr("down", "1").exit_code == 0
        assert tables(url) == {"first"}
        assert history(url) == {"first": "baseline"}

    def test_unknown_target(self, three: str) -> None:
        """A version that no script has is a mistyped one: exit 2, nothing is taken back."""
        before = dump(three)

        result = run_msr("down", "3")
        error = json.loads(run_msr("down", "3", "--json").stdout)["error"]

        sentence = "target: no script has version 3: see msr list"
        assert result == Result(2, "", f"✗ Error: {sentence}\n")
        assert (error["type"], error["message"]) == ("ConfigError", sentence)
        assert dump(three) == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "✗ Error: target: say how far: a version to go back to, or a number of steps\n"),
        (["1", "--steps", "1"], "✗ Error: --steps: contradicts the target version\n"),
        (["--steps", "0"], "✗ Error: Invalid value for '--steps'"),
        (["--steps", "all"], "✗ Error: Invalid value for '--steps'"),
        (["first"], "✗ Error: Invalid value for '[TARGET]'"),
        (["--", "-1"], "✗ Error: Invalid value for '[TARGET]'"),
        (["1", "--no-lock", "--no-wait"], "✗ Error: --no-lock: takes no lock"),
        (["1", "--no-lock", "--wait", "5"], "✗ Error: --no-lock: takes no lock"),
        (["1", "--no-wait", "--wait", "5"], "✗ Error: --no-wait: contradicts --wait"),
    ],
)
@on_sqlite
def test_wrong_use(three: str, arguments: list[str], says: str) -> None:
    """Without saying how far, or in contradictions, this is exit 2 and takes nothing back."""
    before = dump(three)

    result = run_msr("down", *arguments)

    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(says)
    assert result.stderr.count("\n") == 1
    assert dump(three) == before


class TestHeldLock:
    """Another process has the lock."""

    @pytest.mark.parametrize("arguments", [["--no-wait"], ["--wait", "0.3"]])
    def test_the_wait_is_over(self, three: str, arguments: list[str]) -> None:
        """Exit 8 when the wait is over; who holds the lock is said, and nothing is taken back."""
        rig = Rig(without=["heartbeat"])  # so that it does not renew its lease
        with hold_lock(three, running="a backup", rig=rig) as holder:
            before = dump(three)

            result = run_msr("down", "0", *arguments)
            document = json.loads(run_msr("down", "0", *arguments, "--json").stdout)

            assert (result.exit_code, result.stdout) == (8, "")
            line = result.stderr.splitlines()[-1]
            assert line.startswith("✗ Error: another process holds the migration lock: ")
            assert f"{holder.locked_by}, running a backup, since 20" in line
            assert document["error"]["type"] == "LockHeldError"
            assert document["error"]["status"]["process_id"] == holder.pid
            assert (document["result"]["executed"], document["result"]["pending_before"]) == ([], 3)
            assert dump(three) == before

    def test_waits_and_goes_down(self, three: str) -> None:
        """While it waits it says for whom on stderr; when the lock is free it goes on."""
        with hold_lock(three, running="a backup") as holder:
            down = start_msr("down", "2")
            wait_for_waiting(down)
            assert tables(three) == {"first", "second", "third"}

            assert holder.release() == 0
            result = finish(down)

        assert result.exit_code == 0
        assert tables(three) == {"first", "second"}

    def test_steps_are_counted_once(self, url: str, folder: Path, gate: Gate) -> None:
        """Two who ask for one step back at once go one step back, for both mean the same one."""
        body = with_way_down(gate.script(), "await db.execute('CREATE TABLE slow (id int)')")
        write_scripts(folder, {**SCRIPTS, "V11_slow.py": body})
        anyio.run(msr.migrate)
        first = start_msr("down", "--steps", "1")
        gate.wait()

        refused = run_msr("down", "--steps", "1", "--no-wait")
        second = start_msr("down", "--steps", "1")
        assert second.stderr is not None
        waiting = second.stderr.readline()
        gate.open()

        assert refused.exit_code == 8
        assert ", running revert V11_slow.py (1 of 1), since 20" in refused.stderr
        assert waiting.startswith("20")
        assert waiting.endswith(", running revert V11_slow.py (1 of 1)\n")
        assert finish(first).exit_code == 0
        result = finish(second)
        followed = "✓ Nothing left to do: another process rolled back 1 script\n"
        assert (result.exit_code, result.stdout) == (0, followed)
        assert set(history(url)) == {"first", "second", "third"}

    def test_no_lock(self, three: str) -> None:
        """--no-lock warns, neither waits for the holder nor takes anything from it."""
        rig = Rig(without=["heartbeat"])  # so that it does not renew its lease
        with hold_lock(three, rig=rig) as holder:
            before = query(three, "SELECT * FROM migration_locks")

            result = run_msr("down", "1", "--no-lock")

            assert result.exit_code == 0
            assert result.stderr == (
                "⚠️  Warning: working on the database without the migration lock\n"
            )
            assert tables(three) == {"first"}
            assert history(three) == {"first": "applied"}
            assert query(three, "SELECT * FROM migration_locks") == before
            assert holder.release() == 0

    def test_no_lock_fails(self, three: str, folder: Path) -> None:
        """Without the lock, too, one that fails leaves nothing behind."""
        write_scripts(folder, {"V1_first.down.sql": BAD})

        assert run_msr("down", "0", "--no-lock").exit_code == 4

        assert tables(three) == {"first"}
        assert history(three) == {"first": "applied"}


@pytest.mark.parametrize("status", ["failed", "started"])
def test_an_unsettled_repeatable_script(url: str, folder: Path, status: str) -> None:
    """What a repeatable script left half done is not forgotten on the way down."""
    write_scripts(
        folder,
        {
            "V1_first.up.sql": "CREATE TABLE first (id int);",
            "V1_first.down.sql": "DROP TABLE first;",
            "R_half.sql": "-- msr: no-transaction\nCREATE TABLE half (id int);\nSELECT nothing;",
        },
    )
    assert run_msr("migrate").exit_code == 3
    query(url, f"UPDATE schema_version SET status = '{status}' WHERE version IS NULL")

    result = run_msr("down", "0")

    assert (result.exit_code, "R_half.sql: " in result.stderr) == (2, True)
    assert "'msr repair half --retry'" in result.stderr


def test_what_runs_again_is_said(url: str, folder: Path) -> None:
    """The dry run and the run itself name the repeatable scripts that the next migrate runs."""
    write_scripts(
        folder,
        {
            "V1_first.up.sql": "CREATE TABLE first (id int);",
            "V1_first.down.sql": "DROP TABLE first;",
            "R_one.sql": "SELECT 1;",
        },
    )
    assert run_msr("migrate").exit_code == 0

    planned = run_msr("down", "0", "--dry-run").stdout
    done = run_msr("down", "0").stdout

    assert re.search(r"forget +R +R_one\.sql", planned)
    assert "R_one.sql runs again at the next migrate\n" in done
    assert "✓ 1 script rolled back in " in done
