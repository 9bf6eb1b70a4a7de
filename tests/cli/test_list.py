"""`msr list`: every script, applied and pending, and every row whose file is gone."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.support.cli import run_msr, write_scripts
from tests.support.dump import dump
from tests.support.holder import hold_lock
from tests.support.queries import query

WHO = r"(postgres@)?\S+"
MOMENT = r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"


def rows(text: str) -> list[str]:
    """The lines of the table, with one space between two columns."""
    return [re.sub(r" +", " ", line) for line in text.splitlines()]


def test_nothing_applied(url: str, folder: Path) -> None:
    """Before the first run everything is pending, and looking creates nothing."""
    write_scripts(
        folder, {"V1_first.sql": "SELECT 1;", "sub/V2_second.py": "async def up(db): ..."}
    )
    before = dump(url)

    result = run_msr("list")

    assert (result.exit_code, result.stderr) == (0, "")
    assert rows(result.stdout) == [
        "Version Status Applied at Duration Script By",
        "1 pending V1_first.sql",
        "2 pending sub/V2_second.py",
        "",
        "2 scripts: 2 pending",
    ]
    assert dump(url) == before


def test_every_status(migrated_url: str, folder: Path) -> None:
    """Applied scripts have their time; what is wrong with a script or a row is its status."""
    write_scripts(folder, {f"V{n}_more.sql": f"CREATE TABLE t{n} (id int);" for n in (3, 4, 5)})
    assert run_msr("migrate").exit_code == 0
    (folder / "V4_more.sql").unlink()
    write_scripts(
        folder,
        {
            "V2_late.sql": "CREATE TABLE late (id int);",
            "V3_more.sql": "CREATE TABLE edited (id int);",
            "V6_next.sql": "CREATE TABLE next (id int);",
        },
    )
    query(migrated_url, "UPDATE schema_version SET status = 'started' WHERE version = 5")

    # In a running application, so to say: the list needs no lock.
    with hold_lock(migrated_url):
        result = run_msr("list")

    assert (result.exit_code, result.stderr) == (0, "")
    expected = [
        "Version Status Applied at Duration Script By",
        rf"1 applied {MOMENT} \S+ m?s V1_first\.sql {WHO}",
        r"2 out-of-order V2_late\.sql",
        rf"3 changed {MOMENT} \S+ m?s V3_more\.sql {WHO}",
        rf"4 missing {MOMENT} \S+ m?s \(more\) {WHO}",
        rf"5 unfinished {MOMENT} \S+ m?s V5_more\.sql {WHO}",
        r"6 pending V6_next\.sql",
        "",
        "6 scripts: 1 applied, 1 out-of-order, 1 changed, 1 missing, 1 unfinished, 1 pending",
    ]
    for line, pattern in zip(rows(result.stdout), expected, strict=True):
        assert re.fullmatch(pattern, line)


def test_json(migrated_url: str, folder: Path) -> None:
    """--json prints one document with everything that the history knows of each script."""
    write_scripts(folder, {"V2_second.sql": "CREATE TABLE second (id int);"})

    result = run_msr("list", "--json")

    document = json.loads(result.stdout)
    applied, pending = document["scripts"]
    assert (document["format"], document["total"]) == (1, 2)
    assert (result.exit_code, result.stderr) == (0, "")
    assert (applied["version"], applied["name"], applied["status"]) == (1, "first", "applied")
    assert (applied["file"], applied["token"]) == ("V1_first.sql", 1)
    assert re.fullmatch(MOMENT, applied["started_at"])
    assert 0 <= applied["duration"] < 30
    assert re.fullmatch(r".+-\d+-[0-9a-f-]{36}", applied["executed_by"])
    user = None if migrated_url.startswith("sqlite") else "postgres"
    assert applied["database_user"] == user
    assert pending == {
        "version": 2,
        "name": "second",
        "status": "pending",
        "file": "V2_second.sql",
        "started_at": None,
        "duration": None,
        "executed_by": None,
        "database_user": None,
        "token": None,
        "note": None,
        "noted_at": None,
    }


def test_without_locking(without_locking: str, folder: Path) -> None:
    """A handler without a locking service lists like any other."""
    write_scripts(folder, {"V1_first.sql": "SELECT 1;"})

    result = run_msr("list", "--executor", without_locking)

    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.endswith("\n1 script: 1 pending\n")


def test_unreadable_script(migrated_url: str, folder: Path) -> None:
    """A folder that cannot be judged is exit 2, with the file and the way out."""
    write_scripts(folder, {"V2 second.sql": "SELECT 1;"})

    result = run_msr("list")

    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("✗ Error: V2 second.sql: is not named like a script")
    assert result.stderr.count("\n") == 1
