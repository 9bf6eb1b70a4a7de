"""`msr validate`: everything that is wrong with the scripts, with or without a database."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.support.cli import PATIENCE, Result, run_msr, start_msr, write_scripts
from tests.support.dump import dump
from tests.support.holder import Gate, hold_lock
from tests.support.queries import query

GOOD = {
    "V1_users.up.sql": "CREATE TABLE users (id int);",
    "V1_users.down.sql": "DROP TABLE users;",
    "sub/V2_fill.py": "async def up(db): ...\nasync def down(db, context): ...",
    "R_names.sql": "SELECT 1;",
}
NO_PROBLEMS = Result(0, "✓ No problems found\n", "")

# A script per rule, and the line that has to be named.
WRONG: dict[str, tuple[str | bytes, list[tuple[str, int | None]]]] = {
    "V1-users.sql": ("SELECT 1;", [("bad-name", None)]),
    "V2_a.sql": ("SELECT 1;", []),
    "sub/V2_b.sql": ("SELECT 1;", [("duplicate-version", None)]),
    "V3_latin.sql": (b"SELECT 1;\nSELECT '\xe4';", [("not-utf8", 2)]),
    "V4_empty.sql": ("-- nothing yet\n", [("empty", None)]),
    "V5_commit.sql": (
        "SELECT 1;\nCOMMIT;\nBEGIN;\n",
        [("transaction-control", 2), ("transaction-control", 3)],
    ),
    "V6_directive.sql": ("-- msr: no-transactoin\nSELECT 1;", [("unknown-directive", 1)]),
    "V7_timeout.sql": ("-- msr: lock_timeout=soon\nSELECT 1;", [("bad-option", 1)]),
    "V8_shell.sql": ("SELECT 1;\n\n.read other.sql\n", [("client-command", 3)]),
    "V9_lonely.down.sql": ("SELECT 1;", [("down-without-up", None)]),
    "V10_down.up.sql": ("SELECT 1;", []),
    "V10_down.down.sql": ("SELECT 1;\nROLLBACK;\n", [("transaction-control", 2)]),
    "V11_down.up.sql": ("SELECT 1;", []),
    "V11_down.down.sql": (b"SELECT 1;\n\n-- \xff", [("not-utf8", 3)]),
    "V12_syntax.py": ("x = 1\ndef up(:\n", [("python-syntax", 2)]),
    "V13_import.py": ("import json\n\nimport gone_long_ago\n", [("python-import", 3)]),
    "V14_nothing.py": ("x = 1\n", [("python-up", None)]),
    "V15_both.py": (
        "def up(db): ...\ndef down(db): ...\n",
        [("python-up", None), ("python-down", None)],
    ),
    "V16_down.py": ("async def up(db): ...\nasync def down(): ...\n", [("python-down", None)]),
    "V17_odd.py": (
        "transaction = 'no'\nstatement_timeout = -1\nasync def up(db): ...\n",
        [("python-transaction", None), ("bad-option", None)],
    ),
    "R_names.up.sql": ("SELECT 1;", [("bad-name", None)]),
    "R_empty.sql": ("", [("empty", None)]),
    "R_view.sql": ("SELECT 1;", []),
    "sub/R_view.sql": ("SELECT 1;", [("duplicate-name", None)]),
}


def found(result: Result) -> list[tuple[str, str, int | None]]:
    """What `--json` says: rule, file and line of each problem."""
    document = json.loads(result.stdout)
    assert (document.keys(), document["format"]) == ({"format", "problems"}, 1)
    assert all(problem["message"] for problem in document["problems"])
    return [(it["rule"], it["file"], it["line"]) for it in document["problems"]]


class TestWithoutDatabase:
    """A check for CI, where there is no database and no URL."""

    def test_no_problems(self, folder: Path) -> None:
        """Good scripts end with one line, exit 0, and nothing is written beside them."""
        write_scripts(folder, GOOD)
        before = sorted(folder.rglob("*"))

        assert run_msr("validate") == NO_PROBLEMS
        assert run_msr("validate", "--quiet") == Result(0, "", "")
        assert run_msr("validate", "--json") == Result(0, '{"format": 1, "problems": []}\n', "")
        assert sorted(folder.rglob("*")) == before

    def test_everything_at_once(self, folder: Path) -> None:
        """Each problem of each script in both directions has its rule, its file and its line."""
        write_scripts(folder, {name: text for name, (text, _) in WRONG.items()})

        result = run_msr("validate", "--json")

        expected = {
            (rule, name, line) for name, (_, problems) in WRONG.items() for rule, line in problems
        }
        assert result.exit_code == 2
        assert set(found(result)) == expected
        assert len(found(result)) == len(expected)
        assert result.stderr.startswith(f"✗ Error: {len(expected)} problems, nothing was run:\n")

    def test_text(self, folder: Path) -> None:
        """For people: a line per problem on stderr with file, line, what is wrong, the way out."""
        write_scripts(folder, {"V1_a.sql": "", "V2_b.py": "async def up(db): ...\nx = 1 1\n"})

        result = run_msr("validate")

        empty = "V1_a.sql: contains no statement: write one, or remove the file"
        assert (result.exit_code, result.stdout) == (2, "")
        assert re.fullmatch(
            rf"✗ Error: 2 problems, nothing was run:\n  {re.escape(empty)}\n"
            r"  V2_b\.py, line 2: not valid Python: .+\n",
            result.stderr,
        )
        (folder / "V2_b.py").unlink()
        assert run_msr("validate") == Result(2, "", f"✗ Error: {empty}\n")
        assert run_msr("validate", "-q") == Result(2, "", f"✗ Error: {empty}\n")

    def test_what_cannot_be_read(self, folder: Path) -> None:
        """A link to nowhere is a problem with a name, not an end of the search."""
        write_scripts(folder, {"V2_empty.sql": ""})
        (folder / "V1_gone.sql").symlink_to("nowhere")

        result = run_msr("validate", "--json")

        assert set(found(result)) == {
            ("unreadable", "V1_gone.sql", None),
            ("empty", "V2_empty.sql", None),
        }

    def test_no_way_down_is_no_problem(self, folder: Path) -> None:
        """Most teams never write one; only `msr down` misses it."""
        write_scripts(
            folder, {"V1_a.up.sql": "SELECT 1;", "V2_b.py": "async def up(db, context): ..."}
        )

        assert run_msr("validate") == NO_PROBLEMS

    def test_what_scripts_print_stays_out_of_the_json(self, folder: Path) -> None:
        """A module that prints when it is loaded does not break the document."""
        write_scripts(folder, {"V1_loud.py": "print('loud')\nasync def up(db): ...\n"})

        result = run_msr("validate", "--json")

        assert (result.exit_code, found(result), result.stderr) == (0, [], "loud\n")

    @pytest.mark.parametrize(
        ("name", "says"),
        [("gone", "gone does not exist"), ("file", "file is not a folder"), ("empty", "no script")],
    )
    def test_no_folder(self, tmp_path: Path, name: str, says: str) -> None:
        """Without scripts there is nothing to praise: exit 2, also where nobody runs anything."""
        (tmp_path / "file").touch()
        (tmp_path / "empty").mkdir()

        result = run_msr("validate", "--folder", tmp_path / name, "--json")

        error = json.loads(result.stdout)["error"]
        assert (result.exit_code, error["type"], error["key"]) == (2, "ConfigError", "folder")
        assert says in error["message"]
        assert result.stderr == f"✗ Error: {error['message']}\n"

    def test_which_folder(self, folder: Path, tmp_path: Path) -> None:
        """--folder, MSR_FOLDER, msr.toml, in that order."""
        write_scripts(tmp_path / "good", GOOD)
        for name in ("migrations", "empty", "other"):
            write_scripts(tmp_path / name, {"V1_empty.sql": ""})
        (tmp_path / "theirs.toml").write_text('folder = "good"')

        assert run_msr("validate").exit_code == 2
        assert run_msr("validate", "--folder", "good", env={"MSR_FOLDER": "empty"}) == NO_PROBLEMS
        assert run_msr("validate", env={"MSR_FOLDER": "good"}) == NO_PROBLEMS
        assert run_msr("validate", "--config", "theirs.toml") == NO_PROBLEMS

    def test_database_needs_one(self, folder: Path) -> None:
        """--database without a URL says what is missing, and does not pass."""
        write_scripts(folder, GOOD)

        result = run_msr("validate", "--database")

        assert (result.exit_code, result.stdout) == (2, "")
        assert "no database: give a URL or set MSR_URL" in result.stderr


class TestDialect:
    """The URL says what the scripts are written in; nobody connects to it."""

    POSTGRES = "postgresql://somebody@localhost:1/nothing"
    SQLITE = "sqlite:///nothing.db"

    # In SQLite a dollar quote is none, so its COMMIT is a statement; in PostgreSQL a trigger's body
    # is none, so its END is one.
    DOLLARS = "SELECT $$ one;\nCOMMIT; $$;\n"
    TRIGGER = "CREATE TRIGGER t AFTER INSERT ON a BEGIN\nDELETE FROM b;\nEND;\n"

    @pytest.mark.parametrize(
        ("url", "expected"),
        [
            (POSTGRES, [("transaction-control", "V2_trigger.up.sql", 3)]),
            (SQLITE, [("transaction-control", "V1_dollars.sql", 2)]),
            (None, []),
        ],
    )
    def test_it_decides(
        self, folder: Path, url: str | None, expected: list[tuple[str, str, int | None]]
    ) -> None:
        """Each dialect has its own tokens; without a URL only what is wrong in both is wrong."""
        write_scripts(
            folder,
            {
                "V1_dollars.sql": self.DOLLARS,
                "V2_trigger.up.sql": self.TRIGGER,
                "V2_trigger.down.sql": "DROP TRIGGER t;",
            },
        )

        given = run_msr("validate", "--json", *(["--url", url] if url else []))
        set_ = run_msr("validate", "--json", env={"MSR_URL": url or ""})

        assert found(given) == found(set_) == expected
        assert given.exit_code == (2 if expected else 0)
        assert not Path("nothing.db").exists()

    def test_in_the_way_down(self, folder: Path) -> None:
        """The way down is read with the same eyes."""
        write_scripts(folder, {"V1_a.up.sql": "SELECT 1;", "V1_a.down.sql": self.TRIGGER})

        assert run_msr("validate", "--url", self.SQLITE) == NO_PROBLEMS
        assert "V1_a.down.sql, line 3: END" in run_msr("validate", "--url", self.POSTGRES).stderr

    def test_a_url_that_is_none(self, folder: Path) -> None:
        """A URL of something else is exit 2, whether it is needed or not."""
        write_scripts(folder, GOOD)

        result = run_msr("validate", "--url", "mysql://localhost/x")

        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith("✗ Error: ")

    @pytest.mark.parametrize(("url", "code"), [(POSTGRES, 2), (SQLITE, 0)])
    def test_of_an_executor(self, tmp_path: Path, url: str, code: int) -> None:
        """--executor brings the folder and the dialect of the application."""
        write_scripts(tmp_path / "theirs", {"V1_trigger.sql": self.TRIGGER})
        (tmp_path / "shop.py").write_text(
            "import msr\n"
            f"executor = msr.MigrationScriptExecutor.from_url({url!r}, folder='theirs')\n"
        )

        assert run_msr("validate", "--executor", "shop:executor").exit_code == code
        both = run_msr("validate", "--executor", "shop:executor", "--folder", "theirs")
        assert (both.exit_code, "--folder" in both.stderr) == (2, True)


class TestDatabase:
    """--database compares the scripts with the history, and changes neither."""

    @pytest.fixture
    def history(self, url: str, folder: Path) -> str:
        """A database in which everything was applied, and a folder that has been changed since."""
        scripts = {f"V{n}_step.sql": f"CREATE TABLE t{n} (id int);" for n in (1, 3, 4, 5, 6)}
        write_scripts(folder, {**scripts, "R_old.sql": "SELECT 1;", "R_names.sql": "SELECT 1;"})
        assert run_msr("migrate").exit_code == 0
        (folder / "V4_step.sql").unlink()
        (folder / "R_old.sql").unlink()  # is not run again, and that is all
        write_scripts(
            folder,
            {
                "V2_late.sql": "CREATE TABLE t2 (id int);",
                "V3_step.sql": "CREATE TABLE edited (id int);",
                "V7_empty.sql": "",
                "R_names.sql": "SELECT 2;",  # is to change
            },
        )
        for version, status in ((5, "started"), (6, "failed")):
            query(url, f"UPDATE schema_version SET status = '{status}' WHERE version = {version}")
        return url

    EXPECTED = (
        ("empty", "V7_empty.sql", None),
        ("out-of-order", "V2_late.sql", None),
        ("changed-checksum", "V3_step.sql", None),
        ("missing-file", "V4_step", None),
        ("unfinished", "V5_step.sql", None),
        ("failed", "V6_step.sql", None),
    )

    def test_compares(self, history: str) -> None:
        """What is wrong with the files and with the history comes together, and nothing changes."""
        before = dump(history)
        result = run_msr("validate", "--database", "--json")
        text = run_msr("validate", "--database")
        alone = run_msr("validate", "--json")
        assert dump(history) == before
        with hold_lock(history):  # nothing here waits; but what is begun may be under way then
            beside = run_msr("validate", "--database", "--json")
            assert found(beside) == [it for it in self.EXPECTED if it[0] != "unfinished"]

        assert (result.exit_code, text.exit_code, alone.exit_code) == (2, 2, 2)
        assert found(result) == list(self.EXPECTED)
        assert found(alone) == [self.EXPECTED[0]]  # without --database it does not look
        first, *lines = text.stderr.splitlines()
        assert first == "✗ Error: 6 problems, nothing was run:"
        for line, way_out in zip(
            lines,
            ("write one", "--out-of-order", "restore the file", "restore it", "5 --retry", "msr"),
            strict=True,
        ):
            assert way_out in line

    def test_out_of_order_is_a_setting(self, history: str) -> None:
        """Where such scripts are applied they are no problem here either."""
        result = run_msr("validate", "--database", "--json", env={"MSR_OUT_OF_ORDER": "apply"})

        assert found(result) == [it for it in self.EXPECTED if it[0] != "out-of-order"]

    def test_nothing_initialised(self, url: str, folder: Path) -> None:
        """Before the first run there is nothing to compare with, and nothing is created."""
        write_scripts(folder, GOOD)
        before = dump(url)

        assert run_msr("validate", "--database") == NO_PROBLEMS
        assert run_msr("validate") == NO_PROBLEMS
        assert dump(url) == before

    def test_all_well(self, migrated_url: str, folder: Path) -> None:
        """An applied script and a pending one are no problem; nothing is written."""
        write_scripts(folder, {"V2_next.sql": "CREATE TABLE next (id int);"})
        before = dump(migrated_url)

        result = run_msr("validate", "--database", "--json")

        assert (result.exit_code, found(result), result.stderr) == (0, [], "")
        assert dump(migrated_url) == before

    def test_of_an_executor(self, history: str, without_locking: str) -> None:
        """--executor is asked for its own database, which needs no locking service for that."""
        result = run_msr("validate", "--database", "--json", "--executor", without_locking)

        assert found(result) == list(self.EXPECTED)

    def test_of_another_table(self, history: str) -> None:
        """The history is the configured one."""
        result = run_msr("validate", "--database", "--json", env={"MSR_TABLE_NAME": "other"})

        assert found(result) == [self.EXPECTED[0]]


def test_server_that_is_away(folder: Path) -> None:
    """PostgreSQL: --database without a server is exit 7; without --database nobody asks it."""
    write_scripts(folder, GOOD)
    url = "postgresql://somebody@localhost:1/nothing"

    result = run_msr("validate", "--database", "--json", "--url", url)

    assert result.exit_code == 7
    assert json.loads(result.stdout)["error"]["type"] == "DatabaseUnreachableError"
    assert run_msr("validate", "--url", url) == NO_PROBLEMS


def test_file_that_is_no_database(tmp_path: Path, folder: Path, sqlite_url: str) -> None:
    """SQLite: a file of something else is said in one line."""
    write_scripts(folder, GOOD)
    (tmp_path / "app.db").write_text(
        "something else entirely, and long enough to be a header\n" * 9
    )

    result = run_msr("validate", "--database", "--url", sqlite_url)

    assert result.exit_code not in (0, 2)
    assert result.stderr.startswith("✗ Error: ")
    assert result.stderr.count("\n") == 1


def test_a_script_that_runs_now(url: str, folder: Path, gate: Gate) -> None:
    """A script outside a transaction is only begun while its holder lives: that is no problem."""
    script = f"transaction = False\n{gate.script()}"
    write_scripts(folder, {"V1_slow.py": script})
    migration = start_msr("migrate")
    gate.wait()

    running = run_msr("validate", "--database")
    gate.open()

    assert (running.exit_code, running.stderr) == (0, "")
    assert migration.wait(PATIENCE) == 0
