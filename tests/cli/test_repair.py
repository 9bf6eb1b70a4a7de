"""`msr repair`: what was left half done outside a transaction, and edits of applied scripts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.cli import run_msr, write_scripts
from tests.support.databases import on_postgres
from tests.support.holder import hold_lock
from tests.support.queries import query

SCRIPTS = {
    "V1_first.sql": "CREATE TABLE first (id int);",
    "V2_outside.sql": "-- msr: no-transaction\nCREATE TABLE outside (id int);\nSELECT nothing;\n",
}


@pytest.fixture
def failed(url: str) -> str:
    """A database in which version 2 made its table, and failed on the next line."""
    write_scripts(Path("migrations"), SCRIPTS)
    assert run_msr("migrate").exit_code == 3
    return url


@pytest.fixture(params=["failed", "started"])
def unfinished(request: pytest.FixtureRequest, failed: str) -> str:
    """The same, or as it is when the process was killed instead of seeing it fail."""
    query(failed, f"UPDATE schema_version SET status = '{request.param}' WHERE version = 2")
    return failed


def statuses(url: str) -> dict[int, str]:
    return dict(query(url, "SELECT version, status FROM schema_version"))


def test_the_next_run_stops_and_says_how_to_go_on(unfinished: str) -> None:
    """What it did is not known, so nobody runs it again without being told to."""
    result = run_msr("migrate")

    assert result.exit_code == 2
    assert "V2_outside.sql" in result.stderr
    assert "'msr repair 2 --applied'" in result.stderr
    assert "'msr repair 2 --retry'" in result.stderr


def test_applied(unfinished: str) -> None:
    """All that it does was done by hand: it is recorded as applied, and the lock is free again."""
    result = run_msr("repair", "2", "--applied")

    assert (result.exit_code, result.stdout) == (0, "✓ Version 2 (outside): recorded as applied\n")
    assert statuses(unfinished) == {1: "applied", 2: "applied"}
    assert run_msr("migrate", "--no-wait").exit_code == 0
    [[note, noted_at]] = query(
        unfinished, "SELECT note, noted_at FROM schema_version WHERE version = 2"
    )
    assert "repaired as applied by " in note
    assert noted_at is not None


def test_retry(unfinished: str) -> None:
    """Its part was undone by hand: it is forgotten, and the next run has it pending."""
    result = run_msr("repair", "2", "--retry", "--json")

    assert result.exit_code == 0
    assert json.loads(result.stdout)["applied"] is False
    assert statuses(unfinished) == {1: "applied", 2: "retry"}
    assert " pending " in run_msr("list").stdout
    write_scripts(Path("migrations"), {"V2_outside.sql": "SELECT 1;"})
    assert run_msr("migrate").exit_code == 0
    assert statuses(unfinished) == {1: "applied", 2: "applied"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["2"], "say --applied or --retry"),
        (["2", "--applied", "--retry"], "--applied: contradicts --retry"),
        (["--applied"], "--applied: say which script"),
        (["1", "--applied"], "version 1 is not unfinished"),
        (["7", "--retry"], "version 7 is not unfinished"),
    ],
)
def test_refused(unfinished: str, arguments: list[str], says: str) -> None:
    """A repair that says nothing, both, or names a version that needs none, changes nothing."""
    before = statuses(unfinished)
    result = run_msr("repair", *arguments)

    assert result.exit_code == 2
    assert says in result.stderr
    assert statuses(unfinished) == before


def test_it_waits_for_the_lock(unfinished: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script may be running at this moment: only the holder of the lock may judge it."""
    monkeypatch.setenv("MSR_LOCKING_WAIT", "0.3")
    with hold_lock(unfinished):
        assert run_msr("repair", "2", "--retry").exit_code == 8
        assert run_msr("repair", "2", "--retry", "--no-wait").exit_code == 8
        assert run_msr("repair", "2", "--applied", "--wait", "0.1").exit_code == 8
    assert statuses(unfinished)[2] in ("started", "failed")


@on_postgres
def test_an_invalid_index_is_named_and_dropped(url: str) -> None:
    """A failed CREATE INDEX CONCURRENTLY leaves an index that only costs; others' stay."""
    build = "CREATE UNIQUE INDEX CONCURRENTLY Once ON many (id)"
    write_scripts(
        Path("migrations"),
        {
            "V1_many.sql": "CREATE TABLE many AS SELECT 1 AS id FROM generate_series(1, 2);",
            "V2_once.sql": f"-- msr: no-transaction\n{build};\n",
        },
    )
    assert run_msr("migrate").exit_code == 3
    assert "the invalid index public.once" in run_msr("migrate").stderr

    assert run_msr("repair", "2", "--retry").exit_code == 0
    assert query(url, "SELECT to_regclass('once')") == [(None,)]
