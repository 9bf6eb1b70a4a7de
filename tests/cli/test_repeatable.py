"""Repeatable scripts, `R_<name>`: run after the others, and again whenever they have changed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.support.cli import run_msr, write_scripts
from tests.support.dump import dump
from tests.support.holder import hold_lock
from tests.support.queries import query


def log(text: str) -> str:
    """A statement that keeps account of what ran, in which order."""
    return f"INSERT INTO log SELECT count(*) + 1, '{text}' FROM log;"


LOG = {"V1_log.sql": "CREATE TABLE log (number int, text text);"}
SCRIPTS = {
    **LOG,
    "R_b_view.sql": log("b"),
    "sub/R_a_function.py": f"async def up(db):\n    await db.execute({log('a')!r})\n",
    "R_c.sql": log("c"),
    "V2_more.sql": log("V2"),
}


def ran(url: str) -> list[str]:
    return [text for (text,) in query(url, "SELECT text FROM log ORDER BY number")]


def executed(*arguments: str) -> list[str]:
    """What a `msr migrate` runs, which must end well."""
    result = run_msr("migrate", *arguments, "--json")
    assert result.exit_code == 0, result
    return [it["script"] for it in json.loads(result.stdout)["executed"]]


@pytest.fixture
def repeated_url(url: str, folder: Path) -> str:
    """A database with every script applied."""
    write_scripts(folder, SCRIPTS)
    assert run_msr("migrate").exit_code == 0
    return url


def test_after_the_versioned_ones_by_name(url: str, folder: Path) -> None:
    """The newest version first, then every repeatable script, whatever folder it is in."""
    write_scripts(folder, SCRIPTS)

    plan = json.loads(run_msr("migrate", "--dry-run", "--json").stdout)["plan"]
    result = run_msr("migrate")

    order = ["V1_log.sql", "V2_more.sql", "sub/R_a_function.py", "R_b_view.sql", "R_c.sql"]
    assert [it["script"] for it in plan] == order
    assert [it["version"] for it in plan] == [1, 2, None, None, None]
    assert result.exit_code == 0
    assert re.findall(r"Applied (\S+) ", result.stdout) == order
    assert ran(url) == ["V2", "a", "b", "c"]
    assert query(
        url, "SELECT name, status FROM schema_version WHERE version IS NULL ORDER BY name"
    ) == [("a_function", "applied"), ("b_view", "applied"), ("c", "applied")]


def test_again_only_when_it_has_changed(repeated_url: str, folder: Path) -> None:
    """An edit runs that script once more, in place of its former row; another line end is none."""
    assert executed() == []
    write_scripts(folder, {"R_c.sql": SCRIPTS["R_c.sql"].encode() + b"\n"})
    assert executed() == ["R_c.sql"]
    write_scripts(folder, {"R_c.sql": SCRIPTS["R_c.sql"].encode() + b"\r\n"})
    assert executed() == []
    changed = f"async def up(db):\n    await db.execute({log('a2')!r})\n"
    write_scripts(folder, {"sub/R_a_function.py": changed})
    # The versioned ones come first, for a view may need what they make.
    write_scripts(folder, {"V3_later.sql": log("V3")})
    assert executed() == ["V3_later.sql", "sub/R_a_function.py"]

    assert ran(repeated_url) == ["V2", "a", "b", "c", "c", "V3", "a2"]
    rows = query(repeated_url, "SELECT name, count(*) FROM schema_version GROUP BY 1 ORDER BY 1")
    assert rows == [(name, 1) for name in ("a_function", "b_view", "c", "later", "log", "more")]
    assert run_msr("validate", "--database").exit_code == 0


def test_moved_is_not_changed(repeated_url: str, folder: Path) -> None:
    """Its name is what counts: the folder may be another."""
    (folder / "R_c.sql").rename(folder / "sub" / "R_c.sql")

    assert executed() == []


def test_list(repeated_url: str, folder: Path) -> None:
    """`msr list` shows them last, by name: applied, pending once edited, missing when gone."""
    write_scripts(folder, {"R_b_view.sql": log("b2"), "R_d.sql": log("d")})
    (folder / "R_c.sql").unlink()

    lines = run_msr("list").stdout.splitlines()
    said = json.loads(run_msr("list", "--json").stdout)["scripts"]

    assert [re.sub(r"20\S+Z +\S+ m?s", "AT", line).split()[:4] for line in lines[3:7]] == [
        ["R", "applied", "AT", "sub/R_a_function.py"],
        ["R", "pending", "AT", "R_b_view.sql"],
        ["R", "missing", "AT", "(c)"],
        ["R", "pending", "R_d.sql", *lines[6].split()[3:4]],
    ]
    assert lines[-1] == "6 scripts: 3 applied, 2 pending, 1 missing"
    assert [(it["version"], it["name"], it["status"]) for it in said[2:]] == [
        (None, "a_function", "applied"),
        (None, "b_view", "pending"),
        (None, "c", "missing"),
        (None, "d", "pending"),
    ]
    assert [it["started_at"] is None for it in said[2:]] == [False, False, False, True]


def test_removed_is_no_problem(repeated_url: str, folder: Path) -> None:
    """A view that nobody needs any more: its file may go, and come back."""
    (folder / "R_c.sql").unlink()

    assert run_msr("validate", "--database").exit_code == 0
    write_scripts(folder, {"V3_drop.sql": log("V3")})
    assert executed() == ["V3_drop.sql"]
    assert executed() == []
    write_scripts(folder, {"R_c.sql": log("c2")})
    assert executed() == ["R_c.sql"]


def test_none_but_repeatable(url: str, folder: Path) -> None:
    """A folder may hold nothing else."""
    write_scripts(folder, {"R_view.sql": "CREATE VIEW v AS SELECT 1 AS one;"})

    assert executed() == ["R_view.sql"]
    assert query(url, "SELECT one FROM v") == [(1,)]


def test_with_a_target(url: str, folder: Path) -> None:
    """Short of the newest version they wait, for they may need what is yet to come."""
    write_scripts(folder, SCRIPTS)

    assert executed("1") == ["V1_log.sql"]
    assert executed("2") == ["V2_more.sql", "sub/R_a_function.py", "R_b_view.sql", "R_c.sql"]


def test_with_steps(url: str, folder: Path) -> None:
    """The same with a number of steps, which counts the versioned ones."""
    write_scripts(folder, SCRIPTS)

    assert executed("--steps", "1") == ["V1_log.sql"]
    assert executed("--steps", "1")[0] == "V2_more.sql"
    assert ran(url) == ["V2", "a", "b", "c"]


def test_again_after_going_back(url: str, folder: Path) -> None:
    """What is rolled back may take a view along, so they run again with the next `migrate`."""
    write_scripts(
        folder,
        {
            **LOG,
            "V2_users.up.sql": "CREATE TABLE users (id int);",
            "V2_users.down.sql": "DROP VIEW names; DROP TABLE users;",
            "R_names.sql": f"CREATE VIEW names AS SELECT id FROM users;{log('R')}",
        },
    )
    assert run_msr("migrate").exit_code == 0

    down = json.loads(run_msr("down", "1", "--json").stdout)

    assert [it["script"] for it in down["executed"]] == ["V2_users.down.sql"]
    assert query(url, "SELECT version FROM schema_version") == [(1,)]
    assert executed() == ["V2_users.up.sql", "R_names.sql"]
    assert ran(url) == ["R", "R"]
    assert query(url, "SELECT id FROM names") == []


def test_failure(repeated_url: str, folder: Path) -> None:
    """One that fails is exit 3 and leaves nothing, and its former row stays until it succeeds."""
    write_scripts(folder, {"R_b_view.sql": f"{log('half')}\nINSERT INTO nowhere VALUES (1);"})
    write_scripts(folder, {"R_c.sql": log("c2")})
    before = query(repeated_url, "SELECT checksum FROM schema_version WHERE name = 'b_view'")

    result = run_msr("migrate", "--json")

    error = json.loads(result.stdout)["error"]
    assert (result.exit_code, error["type"]) == (3, "MigrationError")
    assert (error["script"], error["line"], error["rolled_back"]) == ("R_b_view.sql", 2, True)
    assert result.stderr.startswith("✗ Error: R_b_view.sql, line 2")
    assert ran(repeated_url) == ["V2", "a", "b", "c"]
    after = query(repeated_url, "SELECT checksum FROM schema_version WHERE name = 'b_view'")
    assert after == before
    write_scripts(folder, {"R_b_view.sql": log("b2")})
    assert executed() == ["R_b_view.sql", "R_c.sql"]


def test_outside_a_transaction(repeated_url: str, folder: Path) -> None:
    """One that failed outside a transaction holds up the next run until it is repaired by name."""
    broken = "-- msr: no-transaction\nINSERT INTO nowhere VALUES (1);"
    write_scripts(folder, {"R_c.sql": broken})
    assert run_msr("migrate").exit_code == 3

    stopped = run_msr("migrate")
    assert stopped.exit_code == 2
    assert "R_c.sql: failed outside a transaction" in stopped.stderr
    assert "'msr repair c --retry'" in stopped.stderr

    write_scripts(folder, {"R_c.sql": f"-- msr: no-transaction\n{log('c2')}"})
    assert run_msr("repair", "c", "--retry").exit_code == 0
    assert executed() == ["R_c.sql"]
    assert ran(repeated_url)[-1] == "c2"


def test_the_lock_is_held(repeated_url: str, folder: Path) -> None:
    """One that has changed needs the lock; with none changed nobody asks for it."""
    with hold_lock(repeated_url):
        assert run_msr("migrate", "--no-wait").exit_code == 0
        write_scripts(folder, {"R_c.sql": log("c2")})
        assert run_msr("migrate", "--no-wait").exit_code == 8
    assert ran(repeated_url) == ["V2", "a", "b", "c"]
    assert executed() == ["R_c.sql"]


@pytest.mark.parametrize(
    ("scripts", "problem"),
    [
        (["R_view.sql", "sub/R_view.sql"], ("duplicate-name", "sub/R_view.sql")),
        (["R_view.py", "R_view.sql"], ("duplicate-name", "R_view.sql")),
        (["R_view.up.sql"], ("bad-name", "R_view.up.sql")),
        (["R_view.down.sql"], ("bad-name", "R_view.down.sql")),
        (["R_.sql"], ("bad-name", "R_.sql")),
        (["R_.py"], ("bad-name", "R_.py")),
        (["r_view.sql"], ("bad-name", "r_view.sql")),
        (["R-view.sql"], ("bad-name", "R-view.sql")),
    ],
)
def test_names(url: str, folder: Path, scripts: list[str], problem: tuple[str, str]) -> None:
    """Two of one name, a way down, or a name that nearly is one: exit 2 before anything runs."""
    texts = {".sql": "SELECT 1;", ".py": "async def up(db): ..."}
    write_scripts(folder, {**LOG, **{name: texts[Path(name).suffix] for name in scripts}})
    before = dump(url)

    result = run_msr("migrate", "--json")

    error = json.loads(result.stdout)["error"]
    assert (result.exit_code, error["type"]) == (2, "ValidationError")
    assert [(it["rule"], it["file"]) for it in error["problems"]] == [problem]
    assert result.stderr.startswith(f"✗ Error: {problem[1]}: ")
    assert dump(url) == before


def test_the_name_of_another(url: str, folder: Path) -> None:
    """`R_log` and `V1_log` are two scripts, in the history as well."""
    write_scripts(folder, {**LOG, "R_log.sql": log("R")})

    assert executed() == ["V1_log.sql", "R_log.sql"]
    assert executed() == []
    write_scripts(folder, {"R_log.sql": log("R2")})
    assert executed() == ["R_log.sql"]
    assert ran(url) == ["R", "R2"]
