"""`msr repair`: what was left half done outside a transaction, and edits of applied scripts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import anyio
import pytest

import msr
from tests.support.cli import run_msr, write_scripts
from tests.support.databases import on_postgres, on_sqlite
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
    assert json.loads(result.stdout)["settled"]["recorded"] == "retry"
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
        (["2", "--json"], "say --applied or --retry"),
        ([], "left half done: V2_outside.sql; "),
        (["2", "--retry", "--yes"], "--yes: nothing is asked then"),
        (["1", "--applied"], "version 1 is applied, so there is nothing to repair"),
        (["7", "--retry"], "there is no version 7"),
        (["first", "--retry"], "there is no 'first'"),
    ],
)
@on_sqlite
def test_refused(failed: str, arguments: list[str], says: str) -> None:
    """A repair that says nothing, both, or names a version that needs none, changes nothing."""
    before = statuses(failed)
    result = run_msr("repair", *arguments)

    assert result.exit_code == 2
    assert says in result.stderr
    assert statuses(failed) == before


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


@pytest.mark.parametrize("name", ["2", "V2", "V2_outside.sql", "V2_outside"])
@on_sqlite
def test_names(failed: str, name: str) -> None:
    """A script goes by its version, or by what `msr list` calls it."""
    assert run_msr("repair", name, "--retry").exit_code == 0
    assert statuses(failed)[2] == "retry"


def test_what_was_mended_is_what_is_applied(failed: str) -> None:
    """The file is put right before it is called done: that text is recorded, no edit is left."""
    mended = SCRIPTS["V2_outside.sql"].replace("SELECT nothing;\n", "")
    write_scripts(Path("migrations"), {"V2_outside.sql": mended})

    assert run_msr("repair", "2", "--applied").exit_code == 0

    assert run_msr("validate", "--database").exit_code == 0
    assert run_msr("migrate").exit_code == 0


class TestEdits:
    """An applied script that was edited."""

    EDITED = "CREATE TABLE first (id int);\n-- nothing else\n"

    @pytest.fixture
    def edited(self, url: str) -> str:
        write_scripts(Path("migrations"), {"V1_first.sql": SCRIPTS["V1_first.sql"]})
        assert run_msr("migrate").exit_code == 0
        write_scripts(Path("migrations"), {"V1_first.sql": self.EDITED})
        return url

    def test_accepted(self, edited: str) -> None:
        """The difference is shown, the answer obeyed, and who accepted what is on record."""
        result = run_msr("repair", input="y\n")

        assert (result.exit_code, result.stderr) == (0, "")
        assert "\n+-- nothing else\n" in result.stdout
        assert result.stdout.endswith("Accepted V1_first.sql\n✓ 1 script accepted as edited\n")
        assert run_msr("migrate").exit_code == 0
        [[note]] = query(edited, "SELECT note FROM schema_version")
        assert re.fullmatch(r"checksum repaired by \S+@\S+, was [0-9a-f]{64}", note)

    def test_the_record_goes_on(self, edited: str) -> None:
        """A second edit does not erase who accepted the first."""
        assert run_msr("repair", "--yes").exit_code == 0
        write_scripts(Path("migrations"), {"V1_first.sql": f"{self.EDITED}-- nor here\n"})
        assert run_msr("repair", "--yes").exit_code == 0

        [[note]] = query(edited, "SELECT note FROM schema_version")
        assert re.fullmatch(r"checksum repaired .+; before: checksum repaired .+", note)

    def test_a_long_script(self, edited: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """A text too long to be kept takes the old one along: no difference is shown from that."""
        monkeypatch.setattr("msr.unit.KEPT_TEXT", 40)
        executor = msr.MigrationScriptExecutor.from_url()

        async def accept(text: str) -> msr.ScriptChange:
            write_scripts(Path("migrations"), {"V1_first.sql": text})
            [change] = await executor.find_changes()
            await executor.repair(1, checksum=change.checksum)
            return change

        assert anyio.run(accept, "SELECT 1;" + " " * 40).difference is not None
        assert anyio.run(accept, "SELECT 2;").difference is None
        assert anyio.run(accept, "SELECT 3;").difference is not None

    @pytest.mark.parametrize(("answer", "code"), [("n\n", 0), ("\n", 0), ("", 1)])
    def test_not_accepted(self, edited: str, answer: str, code: int) -> None:
        """Any other answer changes nothing, and none is an error."""
        before = query(edited, "SELECT * FROM schema_version")

        assert run_msr("repair", input=answer).exit_code == code

        assert query(edited, "SELECT * FROM schema_version") == before
        assert run_msr("migrate").exit_code == 2

    def test_one_of_two(self, edited: str) -> None:
        """With a version, that script's edit is accepted and no other."""
        write_scripts(Path("migrations"), {"V2_second.sql": "SELECT 1;"})
        assert run_msr("repair", "1", "--yes").exit_code == 0
        assert run_msr("migrate").exit_code == 0
        for name in ("V1_first.sql", "V2_second.sql"):
            write_scripts(Path("migrations"), {name: "SELECT 2;"})

        assert run_msr("repair", "V2_second.sql", "--yes").exit_code == 0

        again = run_msr("migrate")
        assert (again.exit_code, "V1_first.sql: was edited" in again.stderr) == (2, True)

    def test_without_the_text(self, edited: str) -> None:
        """Where the history did not keep the script, the checksums are shown."""
        query(edited, "UPDATE schema_version SET script = NULL")

        result = run_msr("repair", "--yes")

        assert result.exit_code == 0
        assert "V1_first.sql: the history did not keep its text" in result.stdout
        assert re.search(r"now: +SHA-256 [0-9a-f]{64}", result.stdout)

    def test_nothing_to_accept(self, edited: str) -> None:
        """Twice is once."""
        assert run_msr("repair", "-y").exit_code == 0
        result = run_msr("repair", "-y")
        assert (result.exit_code, result.stdout) == (
            0,
            "✓ Nothing to repair: no applied script was edited\n",
        )

    def test_the_lock_is_held(self, edited: str) -> None:
        """Only the holder of the lock changes the history."""
        with hold_lock(edited):
            assert run_msr("repair", "--yes", "--no-wait").exit_code == 8
        assert run_msr("migrate").exit_code == 2
