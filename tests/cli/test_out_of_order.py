"""A script that is older than the newest applied one: refused with the way out, or applied."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.cli import run_msr, start_msr, write_scripts
from tests.support.databases import on_sqlite
from tests.support.dump import dump
from tests.support.holder import hold_lock
from tests.support.migrations import applied, finish, wait_for_waiting
from tests.support.queries import query


@pytest.fixture
def late_url(url: str, folder: Path) -> str:
    """Versions 1 and 3 are applied; then a branch with version 2 is merged, and one with 4."""
    write_scripts(folder, {f"V{n}_t{n}.sql": f"CREATE TABLE t{n} (id int);" for n in (1, 3)})
    assert run_msr("migrate").exit_code == 0
    write_scripts(
        folder,
        {
            "V2_late.up.sql": "CREATE TABLE late (id int);",
            "V2_late.down.sql": "DROP TABLE late;",
            "V4_t4.up.sql": "CREATE TABLE t4 (id int);",
            "V4_t4.down.sql": "DROP TABLE t4;",
        },
    )
    return url


def executed(output: str) -> list[str]:
    return [it["script"] for it in json.loads(output)["executed"]]


# Every way to ask for it, and how somebody takes it back again.
ASKED: list[tuple[Sequence[str], dict[str, str], str]] = [
    (["--out-of-order"], {}, ""),
    ([], {"MSR_OUT_OF_ORDER": "apply"}, ""),
    ([], {}, 'out_of_order = "apply"'),
    (["--out-of-order"], {"MSR_OUT_OF_ORDER": "refuse"}, ""),
    ([], {"MSR_OUT_OF_ORDER": "apply"}, 'out_of_order = "refuse"'),
]
REFUSED: list[tuple[dict[str, str], str]] = [
    ({}, ""),
    ({"MSR_OUT_OF_ORDER": "refuse"}, ""),
    ({}, 'out_of_order = "refuse"'),
    ({"MSR_OUT_OF_ORDER": "refuse"}, 'out_of_order = "apply"'),
]


@on_sqlite
@pytest.mark.parametrize(("env", "toml"), REFUSED)
def test_refused(late_url: str, env: dict[str, str], toml: str) -> None:
    """By default nothing runs, exit 2, and the message names the script and both ways out."""
    Path("msr.toml").write_text(toml)
    before = dump(late_url)

    result = run_msr("migrate", env=env)

    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        "✗ Error: V2_late.up.sql: is older than version 3, which is applied already: rename it to "
        'a newer version, or apply it all the same with --out-of-order (out_of_order = "apply")\n'
    )
    assert dump(late_url) == before


def test_refused_as_json(late_url: str) -> None:
    """The same as data, also for a dry run and for a target below which nothing else is."""
    for arguments in ([], ["--dry-run"], ["4"], ["2"], ["--steps", "1"]):
        result = run_msr("migrate", *arguments, "--json")

        error = json.loads(result.stdout)["error"]
        assert (result.exit_code, error["type"]) == (2, "ValidationError")
        assert [(it["rule"], it["file"]) for it in error["problems"]] == [
            ("out-of-order", "V2_late.up.sql")
        ]
        assert result.stderr.startswith("✗ Error: V2_late.up.sql: is older than version 3")


@on_sqlite
@pytest.mark.parametrize(("arguments", "env", "toml"), ASKED)
def test_applied(late_url: str, arguments: Sequence[str], env: dict[str, str], toml: str) -> None:
    """Asked for, it runs in order of version before what is pending; then all is well."""
    Path("msr.toml").write_text(toml)

    result = run_msr("migrate", *arguments, "--json", env=env)

    assert (result.exit_code, result.stderr) == (0, "")
    assert executed(result.stdout) == ["V2_late.up.sql", "V4_t4.up.sql"]
    assert applied(late_url) == [1, 2, 3, 4]
    assert query(late_url, "SELECT count(*) FROM late") == [(0,)]
    Path("msr.toml").unlink()
    assert run_msr("migrate").stdout == "✓ Nothing to do: 4 scripts applied already\n"


def test_a_script_to_be_tried_again_is_not_the_newest(late_url: str, folder: Path) -> None:
    """Older than what is applied, the message says; what waits for another try is not applied."""
    (folder / "V2_late.up.sql").rename(folder.parent / "V2_late.up.sql")
    (folder / "V2_late.down.sql").unlink()
    fails = "-- msr: no-transaction\nINSERT INTO nowhere VALUES (1);"
    write_scripts(folder, {"V5_fails.sql": fails})
    assert run_msr("migrate").exit_code == 3
    assert run_msr("repair", "5", "--retry").exit_code == 0
    (folder.parent / "V2_late.up.sql").rename(folder / "V2_late.up.sql")

    result = run_msr("migrate")

    assert result.exit_code == 2
    assert "V2_late.up.sql: is older than version 4, which is applied already" in result.stderr


def test_list(late_url: str) -> None:
    """`msr list` names it, and not any more once it is applied."""
    before = json.loads(run_msr("list", "--json").stdout)["scripts"]
    assert run_msr("migrate", "--out-of-order").exit_code == 0
    after = json.loads(run_msr("list", "--json").stdout)["scripts"]

    assert [it["status"] for it in before] == ["applied", "out-of-order", "applied", "pending"]
    assert [it["status"] for it in after] == ["applied"] * 4


def test_dry_run(late_url: str) -> None:
    """--dry-run with it shows the script in its place, and writes nothing."""
    before = dump(late_url)

    result = run_msr("migrate", "--dry-run", "--out-of-order", "--json")

    plan = json.loads(result.stdout)["plan"]
    assert [(it["action"], it["script"]) for it in plan] == [
        ("apply", "V2_late.up.sql"),
        ("apply", "V4_t4.up.sql"),
    ]
    assert dump(late_url) == before


def test_only_that_one(late_url: str) -> None:
    """With a target the late script runs and the pending one waits."""
    result = run_msr("migrate", "2", "--out-of-order", "--json")

    assert executed(result.stdout) == ["V2_late.up.sql"]
    assert applied(late_url) == [1, 2, 3]


def test_back_again(late_url: str) -> None:
    """Going back is by version: the late script is between its neighbours, not the newest."""
    assert run_msr("migrate", "--out-of-order").exit_code == 0

    assert executed(run_msr("down", "3", "--json").stdout) == ["V4_t4.down.sql"]
    refused = run_msr("down", "1")  # version 3 has no way down
    assert refused.exit_code == 2
    assert "V3_t3.sql: has no way down" in refused.stderr
    assert applied(late_url) == [1, 2, 3]


def test_failure(late_url: str, folder: Path) -> None:
    """A late script that fails is exit 3, and what is newer than it has not run."""
    write_scripts(folder, {"V2_late.up.sql": "INSERT INTO nowhere VALUES (1);"})

    result = run_msr("migrate", "--out-of-order")

    assert result.exit_code == 3
    assert result.stderr.startswith("✗ Error: V2_late.up.sql, line 1")
    assert applied(late_url) == [1, 3]


def test_it_is_no_pardon_for_the_rest(late_url: str, folder: Path) -> None:
    """An edited script is refused all the same."""
    write_scripts(folder, {"V1_t1.sql": "SELECT 1;"})

    result = run_msr("migrate", "--out-of-order", "--json")

    problems = json.loads(result.stdout)["error"]["problems"]
    assert [it["rule"] for it in problems] == ["changed-checksum"]
    assert applied(late_url) == [1, 3]


def test_the_lock_is_held(late_url: str) -> None:
    """Asked for, it needs the lock: exit 8; refused, it is refused without one."""
    with hold_lock(late_url):
        assert run_msr("migrate", "--out-of-order", "--no-wait").exit_code == 8
        assert run_msr("migrate", "--no-wait").exit_code == 2
    assert applied(late_url) == [1, 3]


def test_it_becomes_late_while_waiting(migrated_url: str, folder: Path) -> None:
    """Another process applies a newer one first: what was pending is refused, not slipped in."""
    other = write_scripts(
        Path("other"),
        {
            "V1_first.sql": (folder / "V1_first.sql").read_bytes(),
            "V3_newer.sql": "CREATE TABLE newer (id int);",
        },
    )
    write_scripts(
        folder,
        {
            "V2_late.sql": "CREATE TABLE late (id int);",
            "V3_newer.sql": "CREATE TABLE newer (id int);",
        },
    )
    with hold_lock(migrated_url) as holder:
        waiting = start_msr("migrate")
        wait_for_waiting(waiting)
        assert run_msr("migrate", "--no-lock", "--folder", other).exit_code == 0
        assert holder.release() == 0
        end = finish(waiting)

    assert (end.exit_code, end.stdout) == (2, "")
    assert "V2_late.sql: is older than version 3" in end.stderr
    assert applied(migrated_url) == [1, 3]


@on_sqlite
@pytest.mark.parametrize("source", ["MSR_OUT_OF_ORDER", "msr.toml"])
def test_no_such_word(late_url: str, source: str) -> None:
    """There is no silent third way: any other word is exit 2, with where it stands."""
    if source == "msr.toml":
        Path(source).write_text('out_of_order = "ignore"')

    result = run_msr("migrate", env={source: "ignore"} if source.startswith("MSR") else {})

    assert (result.exit_code, result.stdout) == (2, "")
    assert f"{source}: out_of_order: must be refuse or apply" in result.stderr
    assert applied(late_url) == [1, 3]


def test_down_has_no_such_option(late_url: str) -> None:
    """`msr down` knows no order to break."""
    assert run_msr("down", "1", "--out-of-order").exit_code == 2
