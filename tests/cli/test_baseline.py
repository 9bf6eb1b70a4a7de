"""`msr baseline`: start with a database that exists already."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.support.cli import Result, run_msr, start_msr, write_scripts
from tests.support.dump import dump
from tests.support.holder import hold_lock
from tests.support.migrations import finish, rows_of, wait_for_waiting
from tests.support.queries import query

HISTORY = "SELECT version, name, status FROM schema_version ORDER BY version"


@pytest.fixture
def existing(url: str, folder: Path) -> str:
    """A database somebody made by hand, which is as scripts 1 and 2 would have made it."""
    query(url, "CREATE TABLE t1 (id int)", "CREATE TABLE t2 (id int)")
    write_scripts(
        folder,
        {
            "V1_one.sql": "CREATE TABLE t1 (id int);",
            "V2_two.up.sql": "CREATE TABLE t2 (id int);",
            "V2_two.down.sql": "DROP TABLE t2;",
            "V3_three.up.sql": "CREATE TABLE t3 (id int);",
            "V3_three.down.sql": "DROP TABLE t3;",
        },
    )
    return url


def statuses() -> list[tuple[int | None, str]]:
    """What `msr list` shows."""
    result = run_msr("list", "--json")
    return [(it["version"], it["status"]) for it in json.loads(result.stdout)["scripts"]]


def test_what_is_there_never_runs(existing: str, folder: Path) -> None:
    """Scripts up to it are not run, the later ones are, also one that turns up below it later."""
    result = run_msr("baseline", "2")

    assert result == Result(
        0, "✓ Baseline 2 recorded: scripts up to that version never run here\n", ""
    )
    assert query(existing, HISTORY) == [(2, "two", "baseline")]
    assert query(existing, "SELECT count(*) FROM migration_locks WHERE locked_by IS NOT NULL") == [
        (0,)
    ]
    assert statuses() == [(1, "baseline"), (2, "baseline"), (3, "pending")]

    # Both would fail, for their tables are there.
    (folder / "sub").mkdir()
    (folder / "V1_one.sql").rename(folder / "sub" / "V0_one.sql")
    migrated = json.loads(run_msr("migrate", "--json").stdout)

    assert [it["version"] for it in migrated["executed"]] == [3]
    assert query(existing, HISTORY) == [(2, "two", "baseline"), (3, "three", "applied")]
    assert statuses() == [(0, "baseline"), (2, "baseline"), (3, "applied")]
    assert run_msr("validate", "--database").exit_code == 0
    assert run_msr("migrate").stdout == "✓ Nothing to do: 1 script applied already\n"


def test_without_it_they_run(existing: str) -> None:
    """The control: the first script fails on what is there."""
    assert run_msr("migrate").exit_code == 3


def test_list(existing: str) -> None:
    """`msr list` shows from when on msr is responsible, and who said so."""
    assert run_msr("baseline", "2").exit_code == 0

    lines = run_msr("list").stdout.splitlines()
    noted = run_msr("list", "--verbose").stdout.splitlines()[2]
    said = json.loads(run_msr("list", "--json").stdout)["scripts"]

    assert re.fullmatch(r"1 +baseline +V1_one\.sql *", lines[1])
    assert re.match(r"2 +baseline +20\S+Z +V2_two\.up\.sql", lines[2])
    assert lines[-1] == "3 scripts: 2 baseline, 1 pending"
    assert "baseline by " in noted
    assert [it["token"] for it in said] == [None, 1, None]  # it was recorded under the lock


def test_a_version_without_a_file(existing: str, folder: Path) -> None:
    """Old scripts need not be kept: the baseline may be a version that has no file, or zero."""
    (folder / "V1_one.sql").unlink()
    for file in folder.glob("V2_*"):
        file.unlink()

    assert run_msr("baseline", "2").exit_code == 0

    assert query(existing, HISTORY) == [(2, "baseline", "baseline")]
    assert statuses() == [(2, "baseline"), (3, "pending")]
    assert run_msr("migrate").exit_code == 0
    assert run_msr("validate", "--database").exit_code == 0


def test_an_edit_below_it_is_no_problem(existing: str, folder: Path) -> None:
    """What never runs here may be put right: nobody compares its checksum."""
    assert run_msr("baseline", "2").exit_code == 0
    write_scripts(folder, {"V1_one.sql": "SELECT 1;", "V2_two.up.sql": "SELECT 2;"})

    assert run_msr("migrate").exit_code == 0


def test_everything_else_goes_on_from_there(existing: str, folder: Path) -> None:
    """A repeatable script runs, and one between the baseline and the newest is out of order."""
    (folder / "V3_three.up.sql").rename(folder / "V4_three.up.sql")
    (folder / "V3_three.down.sql").unlink()
    write_scripts(folder, {"R_view.sql": "CREATE VIEW v AS SELECT 1 AS one;"})
    assert run_msr("baseline", "2").exit_code == 0
    assert run_msr("migrate").exit_code == 0
    assert query(existing, "SELECT one FROM v") == [(1,)]

    write_scripts(folder, {"V3_late.sql": "CREATE TABLE late (id int);"})
    result = run_msr("migrate")

    assert result.exit_code == 2
    assert "V3_late.sql: is older than version 4" in result.stderr


def test_twice(existing: str) -> None:
    """The same again says so, exit 0, and changes nothing, not even the lock."""
    first = json.loads(run_msr("baseline", "2", "--json").stdout)
    before = dump(existing)

    again = run_msr("baseline", "2")
    with_json = run_msr("baseline", "2", "--json")
    quiet = run_msr("baseline", "2", "--quiet")

    assert first == {"format": 1, "baseline": 2, "recorded": True}
    assert again == Result(
        0, "✓ Baseline 2 had been recorded before: scripts up to that version never run here\n", ""
    )
    assert json.loads(with_json.stdout) == {"format": 1, "baseline": 2, "recorded": False}
    assert quiet == Result(0, "", "")
    assert dump(existing) == before


@pytest.mark.parametrize("history", ["migrated", "repeatable"])
def test_a_history_that_is_not_empty(existing: str, folder: Path, history: str) -> None:
    """Where msr has been at work the past is known, so nobody may declare it: exit 2."""
    if history == "migrated":
        assert run_msr("baseline", "2").exit_code == 0
        assert run_msr("migrate").exit_code == 0
    else:
        other = write_scripts(Path("views"), {"R_view.sql": "CREATE VIEW v AS SELECT 1 AS one;"})
        assert run_msr("migrate", "--folder", other).exit_code == 0
    before = dump(existing)

    result = run_msr("baseline", "2")
    error = json.loads(run_msr("baseline", "2", "--json").stdout)["error"]

    assert result == Result(2, "", f"✗ Error: {error['message']}\n")
    assert "the history is not empty" in result.stderr
    assert (error["type"], error["key"]) == ("ConfigError", "version")
    assert dump(existing) == before


@pytest.mark.parametrize("target", [["1"], ["0"], ["--steps", "2"]])
def test_no_way_back_below_it(existing: str, target: list[str]) -> None:
    """`msr down` past the baseline is refused as a whole, exit 2, also where scripts could go."""
    assert run_msr("baseline", "2").exit_code == 0
    assert run_msr("migrate").exit_code == 0
    before = dump(existing)

    result = run_msr("down", *target)

    assert (result.exit_code, result.stdout) == (2, "")
    assert "V2_two.up.sql: was there before msr came" in result.stderr
    assert dump(existing) == before


def test_the_way_back_to_it(existing: str) -> None:
    """`msr down` to the baseline takes back what came after it, and leaves the rest."""
    assert run_msr("baseline", "2").exit_code == 0
    assert run_msr("migrate").exit_code == 0

    result = run_msr("down", "2", "--json")

    assert [it["version"] for it in json.loads(result.stdout)["executed"]] == [3]
    assert query(existing, HISTORY) == [(2, "two", "baseline")]
    assert query(existing, "SELECT count(*) FROM t2") == [(0,)]


class TestLock:
    """A baseline is a change like any other."""

    def test_held(self, existing: str) -> None:
        """While another holds the lock: exit 8, at once or when the wait is over."""
        with hold_lock(existing) as holder:
            at_once = run_msr("baseline", "2", "--no-wait")
            later = run_msr("baseline", "2", "--wait", "0.2", "--json")
            configured = run_msr("baseline", "2", "-q", env={"MSR_LOCKING_WAIT": "0.2"})

        assert rows_of(existing, HISTORY) == []
        assert [it.exit_code for it in (at_once, later, configured)] == [8, 8, 8]
        assert at_once.stdout == ""
        assert holder.locked_by in at_once.stderr
        assert "Waiting for the migration lock" not in at_once.stderr + configured.stderr
        assert json.loads(later.stdout)["error"]["type"] == "LockHeldError"

    def test_contradiction(self, existing: str) -> None:
        """--wait and --no-wait together mean nothing."""
        result = run_msr("baseline", "2", "--no-wait", "--wait", "1")

        assert result == Result(2, "", "✗ Error: --no-wait: contradicts --wait\n")
        assert rows_of(existing, HISTORY) == []

    def test_two_at_once(self, existing: str) -> None:
        """Two that wait for the lock both end well, and one of them has recorded it."""
        with hold_lock(existing) as holder:
            processes = [start_msr("baseline", "2", "--json") for _ in range(2)]
            for process in processes:
                wait_for_waiting(process)
            assert holder.release() == 0
            ends = [finish(process) for process in processes]

        assert [end.exit_code for end in ends] == [0, 0], ends
        assert sorted(json.loads(end.stdout)["recorded"] for end in ends) == [False, True]
        assert query(existing, HISTORY) == [(2, "two", "baseline")]

    def test_recorded_already_needs_no_lock(self, existing: str) -> None:
        """With nothing to record nobody waits."""
        assert run_msr("baseline", "2").exit_code == 0

        with hold_lock(existing):
            assert run_msr("baseline", "2", "--no-wait").exit_code == 0


@pytest.mark.parametrize(
    "version", ["two", "1.5", "-1", "1000000000000000000", "99999999999999999999999"]
)
def test_no_version(existing: str, version: str) -> None:
    """A version is a number of up to 18 digits: anything else is exit 2, and records nothing."""
    result = run_msr("baseline", version)

    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("✗ Error: ")
    assert rows_of(existing, HISTORY) == []


def test_usage(folder: Path) -> None:
    """Without a version, or without a database, there is nothing to record."""
    write_scripts(folder, {"V1_one.sql": "SELECT 1;"})

    nothing, no_url = run_msr("baseline"), run_msr("baseline", "1")

    assert (nothing.exit_code, no_url.exit_code) == (2, 2)
    assert "Missing argument 'VERSION'" in nothing.stderr
    assert "no database" in no_url.stderr


def test_of_an_executor(existing: str, without_locking: str) -> None:
    """--executor: the application's database; without a locking service with a warning."""
    result = run_msr("baseline", "2", "--executor", without_locking)

    assert result.exit_code == 0
    assert "without the migration lock" in result.stderr
    assert query(existing, HISTORY) == [(2, "two", "baseline")]


def test_a_mistake_is_put_right(url: str, folder: Path) -> None:
    """A version that no script has is refused; a baseline that is all there is can be moved."""
    write_scripts(folder, {f"V{n}_x.sql": f"CREATE TABLE t{n} (id int);" for n in (1, 2, 3)})

    unknown = run_msr("baseline", "9")
    assert (unknown.exit_code, unknown.stderr) == (
        2,
        "✗ Error: version: no script has version 9: see msr list\n",
    )
    assert run_msr("baseline", "1").exit_code == 0
    assert run_msr("baseline", "2").exit_code == 0
    assert run_msr("migrate").exit_code == 0

    rows = query(url, "SELECT version, status FROM schema_version ORDER BY version")
    assert rows == [(2, "baseline"), (3, "applied")]
