"""`msr migrate` up to a version or by steps, and `--dry-run` of it and of `msr down`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

import anyio
import pytest

import msr
from tests.support.cli import Result, run_msr, start_msr, write_scripts
from tests.support.databases import on_sqlite
from tests.support.dump import dump
from tests.support.holder import Gate, hold_lock
from tests.support.migrations import finish, rows_of
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
    "V1_first.up.sql": "CREATE TABLE first (id int);\n",
    "V1_first.down.sql": "DROP TABLE first;\n",
    "V2_second.py": SECOND,
    "late/V10_third.up.sql": "-- msr: no-transaction\nCREATE TABLE third (id int);\n",
    "late/V10_third.down.sql": "DROP VIEW ours;\nDROP TABLE third;",
    "R_ours.sql": "DROP VIEW IF EXISTS ours;\nCREATE VIEW ours AS SELECT id FROM third;\n",
}


@pytest.fixture
def three(url: str, folder: Path) -> str:
    """A database whose three versioned scripts are pending, and the repeatable one of them."""
    write_scripts(folder, SCRIPTS)
    return url


@pytest.fixture
def applied(three: str) -> str:
    """The same with all of them applied."""
    anyio.run(msr.migrate)
    return three


def history(url: str) -> set[str]:
    """The names of the scripts that the history has."""
    return {name for (name,) in rows_of(url, "SELECT name FROM schema_version")}


def ran(*arguments: str) -> list[str]:
    """The scripts that `msr` ran, which ended well, in their order."""
    result = run_msr(*arguments, "--json")
    assert result.exit_code == 0, result
    return [it["script"] for it in json.loads(result.stdout)["executed"]]


def planned(*arguments: str) -> list[str]:
    """The scripts that `msr --dry-run` shows, in their order."""
    result = run_msr(*arguments, "--dry-run", "--json")
    assert (result.exit_code, result.stderr) == (0, ""), result
    return [it["script"] for it in json.loads(result.stdout)["plan"]]


def everything(url: str, folder: Path) -> tuple[str, list[str]]:
    """The whole database and the files of the scripts."""
    return dump(url), sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


class TestTarget:
    """`msr migrate TARGET` applies what is pending up to a version."""

    def test_stops_there(self, three: str) -> None:
        """The target is applied, what is newer is not, and the view waits for the newest."""
        assert ran("migrate", "2") == ["V1_first.up.sql", "V2_second.py"]
        assert history(three) == {"first", "second"}

        assert ran("up", "10") == ["late/V10_third.up.sql", "R_ours.sql"]
        assert history(three) == {"first", "second", "third", "ours"}

    def test_repeatable_scripts_wait(self, applied: str, folder: Path) -> None:
        """A changed one, too, is left until no versioned script is pending."""
        view = "DROP VIEW IF EXISTS ours; CREATE VIEW ours AS SELECT name FROM fourth;"
        write_scripts(
            folder,
            {
                "R_ours.sql": view,
                "V11_fourth.sql": "CREATE TABLE fourth (name text);",
                "V12_fifth.sql": "CREATE TABLE fifth (id int);",
            },
        )

        assert ran("migrate", "10") == []
        assert ran("migrate", "11") == ["V11_fourth.sql"]
        assert ran("migrate") == ["V12_fifth.sql", "R_ours.sql"]
        assert query(applied, "SELECT name FROM ours") == []

    def test_reached_already(self, three: str) -> None:
        """A target that is applied leaves nothing to do; nothing is taken back."""
        run_msr("migrate", "2")
        before = dump(three)

        result = run_msr("migrate", "1")

        assert result == Result(0, "✓ Nothing to do: 2 scripts applied already\n", "")
        assert dump(three) == before

    def test_unknown(self, three: str) -> None:
        """A version that no script has is a mistyped one: exit 2, and nothing runs."""
        before = dump(three)

        result = run_msr("migrate", "3")
        error = json.loads(run_msr("migrate", "3", "--json").stdout)["error"]
        dry = run_msr("migrate", "3", "--dry-run")

        sentence = "target: no script has version 3: see msr list"
        assert result == dry == Result(2, "", f"✗ Error: {sentence}\n")
        assert (error["type"], error["message"]) == ("ConfigError", sentence)
        assert dump(three) == before

    def test_failure(self, three: str, folder: Path) -> None:
        """What fails beyond the target does not run; up to it, it is exit 3 as always."""
        write_scripts(folder, {"V2_second.py": SECOND.replace("second (", "first (")})

        assert ran("migrate", "1") == ["V1_first.up.sql"]
        result = run_msr("migrate", "2")

        assert result.exit_code == 3
        assert result.stderr.startswith("✗ Error: V2_second.py, line 2: ")
        assert history(three) == {"first"}

    def test_json(self, three: str) -> None:
        """What was to be done is counted up to the target only."""
        document = json.loads(run_msr("migrate", "2", "--json").stdout)

        assert [it["version"] for it in document["executed"]] == [1, 2]
        assert [it["action"] for it in document["executed"]] == ["apply", "apply"]
        assert (document["pending_before"], document["followed"]) == (2, False)

    def test_held_lock(self, three: str) -> None:
        """While somebody else has the lock it is exit 8; at the target, nobody is waited for."""
        with hold_lock(three) as holder:
            for arguments in (["2"], ["--steps", "1"]):
                refused = run_msr("migrate", *arguments, "--no-wait")
                assert refused.exit_code == 8
                assert f"holds the migration lock: {holder.locked_by}" in refused.stderr
            assert history(three) == set()
            assert holder.release() == 0
        run_msr("migrate", "2")
        with hold_lock(three):
            assert run_msr("migrate", "2", "--no-wait").exit_code == 0


class TestSteps:
    """`msr migrate --steps N` applies so many scripts at most."""

    def test_stops_there(self, three: str) -> None:
        """The oldest come first; with the last one comes the view, which is not counted."""
        assert ran("migrate", "--steps", "1") == ["V1_first.up.sql"]
        assert history(three) == {"first"}
        assert ran("migrate", "--steps", "2") == [
            "V2_second.py",
            "late/V10_third.up.sql",
            "R_ours.sql",
        ]
        assert ran("migrate", "--steps", "1") == []

    def test_more_than_there_are(self, three: str) -> None:
        """Where there are fewer, all of them are applied."""
        assert len(ran("migrate", "--steps", "9")) == 4

    def test_only_the_view_is_left(self, applied: str, folder: Path) -> None:
        """With no versioned script pending, a changed view is brought up to date."""
        write_scripts(folder, {"R_ours.sql": SCRIPTS["R_ours.sql"] + "-- changed\n"})

        assert ran("migrate", "--steps", "1") == ["R_ours.sql"]

    def test_steps_are_counted_once(self, three: str, folder: Path, gate: Gate) -> None:
        """Two who ask for one step at once go one step, for both mean the same one."""
        write_scripts(folder, {"V0_slow.py": gate.script()})
        first = start_msr("migrate", "--steps", "1")
        gate.wait()
        second = start_msr("migrate", "--steps", "1")
        assert second.stderr is not None
        assert second.stderr.readline().endswith(", running V0_slow.py (1 of 1)\n")

        gate.open()

        assert finish(first).exit_code == 0
        result = finish(second)
        followed = "✓ Nothing left to do: another process applied 1 script\n"
        assert (result.exit_code, result.stdout) == (0, followed)
        assert history(three) == {"slow"}


class TestPlan:
    """What --dry-run shows, and that it is what the run then does."""

    def test_migrate(self, three: str) -> None:
        """A row for each script that would run, in order, and a line that says it was not."""
        result = run_msr("migrate", "--dry-run")

        assert result == Result(
            0,
            "   Action  Version  Script                 Transaction\n"
            "1  apply   1        V1_first.up.sql        yes\n"
            "2  apply   2        V2_second.py           yes\n"
            "3  apply   10       late/V10_third.up.sql  no\n"
            "4  apply   R        R_ours.sql             yes\n"
            "\n"
            "4 scripts would run; nothing was changed\n",
            "",
        )
        assert run_msr("up", "--dry-run") == result

    def test_down(self, applied: str) -> None:
        """The files that would run, the newest first; --quiet shows what was asked for, too."""
        result = run_msr("down", "1", "--dry-run")

        assert result == Result(
            0,
            "   Action  Version  Script                   Transaction\n"
            "1  forget  R        R_ours.sql               yes\n"
            "2  revert  10       late/V10_third.down.sql  yes\n"
            "3  revert  2        V2_second.py             yes\n"
            "\n"
            "2 scripts would run; nothing was changed\n",
            "",
        )
        assert run_msr("rollback", "1", "--dry-run", "--quiet") == result

    def test_sql_of_migrate(self, three: str) -> None:
        """--sql shows the texts as one that psql could read; a Python script is a comment in it."""
        result = run_msr("migrate", "--dry-run", "--sql")

        assert result == Result(
            0,
            "-- apply V1_first.up.sql\n"
            "CREATE TABLE first (id int);\n"
            "\n"
            "-- apply V2_second.py\n"
            "-- async def up(db):\n"
            '--     await db.execute("CREATE TABLE second (id int)")\n'
            "--\n"
            "-- async def down(db):\n"
            '--     await db.execute("DROP TABLE second")\n'
            "\n"
            "-- apply late/V10_third.up.sql, outside a transaction\n"
            "-- msr: no-transaction\n"
            "CREATE TABLE third (id int);\n"
            "\n"
            "-- apply R_ours.sql\n"
            "DROP VIEW IF EXISTS ours;\n"
            "CREATE VIEW ours AS SELECT id FROM third;\n"
            "\n",
            "",
        )

    def test_sql_of_down(self, applied: str) -> None:
        """--sql shows the way down, not the way up."""
        result = run_msr("down", "2", "--dry-run", "--sql")

        assert result == Result(
            0,
            "-- forget R_ours.sql\n\n"
            "-- revert late/V10_third.down.sql\nDROP VIEW ours;\nDROP TABLE third;\n\n",
            "",
        )

    def test_json(self, three: str) -> None:
        """--json tells the same as data, the texts only with --sql."""
        document = json.loads(run_msr("migrate", "--dry-run", "--json").stdout)
        with_texts = json.loads(run_msr("migrate", "--dry-run", "--sql", "--json").stdout)

        names = ("action", "version", "name", "script", "kind", "transaction")
        rows = [
            ("apply", 1, "first", "V1_first.up.sql", "sql", True),
            ("apply", 2, "second", "V2_second.py", "python", True),
            ("apply", 10, "third", "late/V10_third.up.sql", "sql", False),
            ("apply", None, "ours", "R_ours.sql", "sql", True),
        ]
        plan = [dict(zip(names, row, strict=True)) for row in rows]
        assert document == {"format": 1, "plan": plan}
        texts = [SCRIPTS[row[3]] for row in rows]
        assert with_texts == {
            "format": 1,
            "plan": [{**it, "text": text} for it, text in zip(plan, texts, strict=True)],
        }

        anyio.run(msr.migrate)
        down = run_msr("down", "2", "--dry-run", "--sql", "--json")
        row = ("revert", 10, "third", "late/V10_third.down.sql", "sql", True)
        text = SCRIPTS["late/V10_third.down.sql"]
        forgotten, reverted = json.loads(down.stdout)["plan"]
        assert reverted == dict(zip(names, row, strict=True), text=text)
        assert (forgotten["action"], forgotten["script"]) == ("forget", "R_ours.sql")

    def test_nothing_to_do(self, applied: str) -> None:
        """An empty plan is no error, and an empty list in JSON."""
        table = run_msr("migrate", "--dry-run")

        assert (table.exit_code, table.stderr) == (0, "")
        assert table.stdout.endswith("\n\n0 scripts would run; nothing was changed\n")
        for command in (["migrate"], ["down", "10"]):
            text = run_msr(*command, "--dry-run", "--sql")
            assert text == Result(0, "-- nothing to do\n", "")
            assert planned(*command) == []

    def test_how_far(self, three: str) -> None:
        """A target and --steps are obeyed, and the run then does what was shown."""
        for command, number in (
            (["migrate", "1"], 1),
            (["migrate", "--steps", "1"], 1),
            (["down", "--steps", "1"], 1),
            (["down", "0"], 1),
        ):
            plan = planned(*command)

            assert len(plan) == number
            assert ran(*command) == plan

    def test_out_of_order(self, applied: str, folder: Path) -> None:
        """--out-of-order is obeyed; without it the plan fails as the run would."""
        write_scripts(folder, {"V5_late.sql": "CREATE TABLE late (id int);"})

        refused = run_msr("migrate", "--dry-run")

        assert (refused.exit_code, refused.stdout) == (2, "")
        assert "V5_late.sql: is older than version 10" in refused.stderr
        assert planned("migrate", "--out-of-order") == ["V5_late.sql"]

    def test_single_transaction(self, three: str) -> None:
        """--single-transaction is obeyed: what cannot run in one with others is found."""
        result = run_msr("migrate", "--dry-run", "--single-transaction")

        assert (result.exit_code, result.stdout) == (2, "")
        assert "late/V10_third.up.sql: opts out of the transaction" in result.stderr
        assert len(planned("migrate", "2", "--single-transaction")) == 2


COMMANDS = ("migrate", "migrate 1 --sql", "down 0 --sql", "down --steps 1")


def check_unchanged(url: str, folder: Path, commands: Sequence[str] = COMMANDS) -> None:
    """Each of the commands, as a dry run, ends well and leaves all as it was."""
    before = everything(url, folder)
    for command in commands:
        result = run_msr(*command.split(), "--dry-run")
        assert (result.exit_code, result.stderr) == (0, ""), command
        assert everything(url, folder) == before, command


class TestChangesNothing:
    """A dry run takes no lock and writes nothing."""

    def test_nothing_initialised(self, three: str, folder: Path) -> None:
        """Neither a table is made nor, with SQLite, the file of the database."""
        check_unchanged(three, folder)

        assert asyncio.run(table_names(three)) == set()

    def test_some_applied(self, three: str, folder: Path) -> None:
        """Neither the history changes nor the lock, whose token would tell."""
        run_msr("migrate", "2")

        check_unchanged(three, folder)

    def test_held_lock(self, three: str, folder: Path) -> None:
        """The lock of somebody else is neither waited for nor touched."""
        run_msr("migrate", "2")
        rig = Rig(without=["heartbeat"])  # so that it does not renew its lease
        with hold_lock(three, rig=rig):
            check_unchanged(three, folder, ["migrate", "down 0 --sql"])

            assert planned("migrate") == ["late/V10_third.up.sql", "R_ours.sql"]

    def test_during_a_script(self, three: str, folder: Path, gate: Gate) -> None:
        """While a script runs, also in a transaction of SQLite, the plan is what is not done."""
        slow = gate.script("await db.execute('CREATE TABLE slow (id int)')")
        write_scripts(folder, {"V5_slow.py": slow})
        migration = start_msr("migrate", "5")
        gate.wait()

        plan = planned("migrate")
        back = planned("down", "1")
        gate.open()

        assert plan == ["V5_slow.py", "late/V10_third.up.sql", "R_ours.sql"]
        assert back == ["V2_second.py"]
        assert finish(migration).exit_code == 0

    def test_during_a_script_outside_a_transaction(
        self, three: str, folder: Path, gate: Gate
    ) -> None:
        """One that is recorded as started is no problem while its holder lives: it is being run."""
        write_scripts(folder, {"V5_slow.py": f"transaction = False\n{gate.script()}"})
        migration = start_msr("migrate", "5")
        gate.wait()

        plan = planned("migrate")
        gate.open()

        assert plan == ["late/V10_third.up.sql", "R_ours.sql"]
        assert finish(migration).exit_code == 0


class TestProblems:
    """What forbids the run forbids the dry run: exit 2."""

    def test_migrate(self, applied: str, folder: Path) -> None:
        """Everything wrong is told at once, of the history and of what would run."""
        write_scripts(
            folder,
            {
                "V1_first.up.sql": "CREATE TABLE edited (id int);",
                "V11_broken.py": "def",
                "V12-bad.sql": "",
            },
        )
        before = everything(applied, folder)

        result = run_msr("migrate", "--dry-run")
        with_sql = run_msr("migrate", "--dry-run", "--sql")
        document = json.loads(run_msr("migrate", "--dry-run", "--json").stdout)

        first, *problems = result.stderr.splitlines()
        assert (result.exit_code, result.stdout) == (2, "")
        assert first == "✗ Error: 3 problems, nothing was run:"
        assert [problem.split(":")[0].strip() for problem in problems] == [
            "V12-bad.sql",
            "V1_first.up.sql",
            "V11_broken.py, line 1",
        ]
        assert with_sql == result
        assert document["error"]["type"] == "ValidationError"
        assert {it["rule"] for it in document["error"]["problems"]} == {
            "bad-name",
            "changed-checksum",
            "python-syntax",
        }
        assert everything(applied, folder) == before

    def test_down(self, applied: str, folder: Path) -> None:
        """A script without a way down is found."""
        (folder / "V1_first.down.sql").unlink()
        before = everything(applied, folder)

        result = run_msr("down", "0", "--dry-run")
        document = json.loads(run_msr("down", "0", "--dry-run", "--json").stdout)

        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith("✗ Error: V1_first.up.sql: has no way down, ")
        [problem] = document["error"]["problems"]
        assert (problem["rule"], problem["file"]) == ("no-way-down", "V1_first.up.sql")
        assert everything(applied, folder) == before

    def test_unreadable_script(self, applied: str, folder: Path) -> None:
        """A script to be taken back that cannot be read is said to be that."""
        (folder / "V2_second.py").write_bytes(b"# \xff")

        result = run_msr("down", "1", "--dry-run")

        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith("✗ Error: V2_second.py, line 1: is not UTF-8 at byte 3")

    @pytest.mark.parametrize("status", ["failed", "started"])
    @pytest.mark.parametrize("command", ["migrate", "down 1"])
    def test_unsettled_script(self, applied: str, status: str, command: str) -> None:
        """A script that failed, or that nobody finishes any more, has to be settled first."""
        query(applied, f"UPDATE schema_version SET status = '{status}' WHERE version = 10")
        words = command.split()

        run = run_msr(*words)
        result = run_msr(*words, "--dry-run")

        assert (result.exit_code, result.stdout) == (2, "")
        assert "'msr repair 10 --retry'" in result.stderr
        assert result == run

    def test_unknown_target_of_down(self, applied: str) -> None:
        """So is a version that no script has."""
        result = run_msr("down", "3", "--dry-run")

        assert result == Result(2, "", "✗ Error: target: no script has version 3: see msr list\n")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--sql"], "--sql: shows what would run: add --dry-run"),
        (["--dry-run", "--wait", "5"], "--dry-run: takes no lock: "),
        (["--dry-run", "--wait", "0"], "--dry-run: takes no lock: "),
        (["--dry-run", "--no-wait"], "--dry-run: takes no lock: "),
        (["--dry-run", "--no-lock"], "--dry-run: takes no lock: "),
        (["--steps", "1"], "--steps: contradicts the target version"),
        (["--dry-run", "--steps", "1"], "--steps: contradicts the target version"),
    ],
)
@pytest.mark.parametrize("command", [["migrate", "2"], ["down", "1"]])
@on_sqlite
def test_wrong_use(three: str, command: list[str], arguments: list[str], says: str) -> None:
    """Options that contradict each other are exit 2, and nothing runs."""
    run_msr("migrate", "1")
    before = dump(three)

    result = run_msr(*command, *arguments)
    document = json.loads(run_msr(*command, *arguments, "--json").stdout)

    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"✗ Error: {says}")
    assert document["error"]["type"] == "ConfigError"
    assert dump(three) == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--steps", "0"], "'--steps'"),
        (["--steps", "-1"], "'--steps'"),
        (["--steps", "all"], "'--steps'"),
        (["first"], "'[TARGET]'"),
        (["--", "-1"], "'[TARGET]'"),
    ],
)
@on_sqlite
def test_wrong_numbers(three: str, arguments: list[str], says: str) -> None:
    """What is no version, or no number of scripts, is exit 2, and nothing runs."""
    result = run_msr("migrate", *arguments)

    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"✗ Error: Invalid value for {says}: ")
    assert history(three) == set()
