"""`msr new`: a script with a version that nobody else has, and both directions to fill in."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import pytest

import msr
from tests.support.cli import Result, run_msr, start_msr, write_scripts
from tests.support.migrations import applied, finish
from tests.support.queries import query


def new(*arguments: str | Path, env: Mapping[str, str] | None = None) -> list[Path]:
    """The files that a `msr new` made, which must end well."""
    result = run_msr("new", *arguments, "--json", env=env)
    assert (result.exit_code, result.stderr) == (0, "")
    document = json.loads(result.stdout)
    assert (document.keys(), document["format"]) == ({"format", "files"}, 1)
    return [Path(file) for file in document["files"]]


def version_of(path: Path) -> int:
    match = re.match(r"V([0-9]+)_", path.name)
    assert match, path
    return int(match[1])


def all_files(folder: Path) -> list[str]:
    """Everything below a folder, hidden files included."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


class TestFiles:
    """What is written, where, and what is said about it."""

    @pytest.mark.parametrize("option", [None, "--sql"])
    def test_sql(self, folder: Path, option: str | None) -> None:
        """SQL is the default: two files of one version in a folder that is made, and two lines."""
        result = run_msr("new", "add users", *([option] if option else []))

        down, up = all_files(folder)
        assert re.fullmatch(r"V\d{14}_add_users\.down\.sql", down)
        assert up == down.replace(".down.", ".up.")
        assert result == Result(0, f"Created migrations/{up}\nCreated migrations/{down}\n", "")
        assert all((folder / file).read_text().startswith("--") for file in (up, down))

    def test_python(self, folder: Path) -> None:
        """--python: one file, with `up` and `down`, that validates and refuses to run unfilled."""
        [path] = new("add users", "--python")

        assert path.is_file()
        assert re.fullmatch(r"V\d{14}_add_users\.py", path.name)
        assert all_files(folder) == [path.name]
        for direction in ("up", "down"):
            assert f"\nasync def {direction}(db):\n" in path.read_text()
        assert run_msr("validate").exit_code == 0
        result = run_msr("migrate", "--url", "sqlite:///app.db")
        assert result.exit_code == 3
        assert "NotImplementedError: write the migration" in result.stderr

    def test_an_unfilled_sql_template_is_found(self) -> None:
        """`msr validate` names both files until somebody has written a statement into them."""
        up, down = new("add users")

        result = run_msr("validate", "--json")

        problems = json.loads(result.stdout)["problems"]
        assert result.exit_code == 2
        assert {(it["rule"], it["file"]) for it in problems} == {
            ("empty", up.name),
            ("empty", down.name),
        }

    @pytest.mark.parametrize("kind", ["--sql", "--python"])
    def test_filled_it_runs_both_ways(self, url: str, kind: str) -> None:
        """Written into as it is, the template migrates and goes back."""
        files = new("add users", kind)
        statements = ("CREATE TABLE users (id int)", "DROP TABLE users")
        if kind == "--sql":
            for path, statement in zip(files, statements, strict=True):
                path.write_text(f"{path.read_text()}{statement};\n")
        else:
            text = files[0].read_text()
            for statement in statements:
                text = re.sub(r"raise .*", f"await db.execute('{statement}')", text, count=1)
            files[0].write_text(text)

        assert run_msr("migrate").exit_code == 0
        assert query(url, "SELECT count(*) FROM users") == [(0,)]
        assert applied(url) == [version_of(files[0])]
        assert run_msr("down", "0").exit_code == 0
        assert applied(url) == []

    def test_quiet(self, folder: Path) -> None:
        """--quiet leaves it to the exit code."""
        assert run_msr("new", "users", "--quiet") == Result(0, "", "")
        assert len(all_files(folder)) == 2


class TestVersion:
    """The time in UTC, or more, if others are there already."""

    def test_is_now_in_utc(self) -> None:
        """It is the same wherever its author lives, so scripts order as they were made."""
        before = datetime.now(UTC).strftime("%Y%m%d%H%M%S")
        version = version_of(new("users", env={"TZ": "EAST-14"})[0])

        assert int(before) <= version <= int(datetime.now(UTC).strftime("%Y%m%d%H%M%S")) + 1

    def test_two_in_one_second(self) -> None:
        """One after the other, the second is newer, however quick."""
        versions = [version_of(new(name)[0]) for name in ("first", "second", "third")]

        assert versions == sorted(set(versions))

    @pytest.mark.parametrize(
        "there",
        [
            "V29990101000000_future.sql",
            "V29990101000000_future.py",
            "sub/deeper/V29990101000000_future.up.sql",
            "V029990101000000_zero.sql",
        ],
    )
    def test_is_newer_than_the_future(self, folder: Path, there: str) -> None:
        """A script with a later version, by a wrong clock or on purpose, does not overtake it."""
        write_scripts(folder, {there: "SELECT 1;", "V3_old.sql": "SELECT 1;"})

        assert version_of(new("users")[0]) == 29990101000001

    def test_is_newer_than_what_a_link_leads_to(self, folder: Path, tmp_path: Path) -> None:
        """A linked folder is migrated as well, so its scripts count."""
        write_scripts(tmp_path / "shared", {"V29990101000000_future.sql": "SELECT 1;"})
        folder.mkdir()
        (folder / "linked").symlink_to(tmp_path / "shared")

        assert version_of(new("users")[0]) == 29990101000001

    def test_no_version_is_left(self, folder: Path) -> None:
        """Above the last of 18 digits there is none: exit 2, and nothing is written."""
        write_scripts(folder, {"V999999999999999999_last.sql": "SELECT 1;"})

        result = run_msr("new", "users")

        assert (result.exit_code, result.stdout) == (2, "")
        assert "no version is left above 999999999999999999" in result.stderr
        assert all_files(folder) == ["V999999999999999999_last.sql"]

    def test_ten_processes_at_once(self, folder: Path) -> None:
        """Ten people of a script's making get ten versions, and nothing else is left behind."""
        # All of them want the version after this one, so that a collision needs no luck.
        write_scripts(folder, {"V29990101000000_future.sql": "SELECT 1;"})
        processes = [start_msr("new", f"number {n}", "--json") for n in range(10)]

        ends = [finish(process) for process in processes]

        assert [end.exit_code for end in ends] == [0] * 10, ends
        versions = {version_of(Path(json.loads(end.stdout)["files"][0])) for end in ends}
        assert len(versions) == 10
        assert min(versions) > 29990101000000
        assert len(all_files(folder)) == 21

    def test_ten_threads_at_once(self, folder: Path) -> None:
        """The same without a process' start between two of them, which is when it gets close."""
        together = threading.Barrier(10)
        made: list[Path] = []

        def make() -> None:
            together.wait()
            for _ in range(10):
                made.extend(msr.new_script(folder, "users", "python"))

        threads = [threading.Thread(target=make) for _ in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert len({version_of(path) for path in made}) == 100
        assert len(all_files(folder)) == 100

    def test_a_claim_that_was_left_behind(self, folder: Path) -> None:
        """Somebody who was killed on the way costs a version, not the command."""
        write_scripts(
            folder, {"V29990101000000_future.sql": "SELECT 1;", ".V29990101000001.new": ""}
        )

        assert version_of(new("users")[0]) == 29990101000002


ODD = [
    ("Add users!", "Add_users"),
    ("  spaces\tand\nlines  ", "spaces_and_lines"),
    ("../../etc/passwd", "etc_passwd"),
    ("users.down.sql", "users_down_sql"),
    ("__init__", "init"),
    ("Größe, naïve, 名前", "Größe_naïve_名前"),
    ('say "hi" \\ """ \\N{x}', "say_hi_N_x"),
    ("{name} %s $1", "name_s_1"),
    ("end */ DROP TABLE users; --", "end_DROP_TABLE_users"),
    ("line\u2028and\x0bfeed\rback", "line_and_feed_back"),
    ("msr: no-transaction", "msr_no_transaction"),
    ("x" * 100, "x" * 100),
]


class TestName:
    """What it may be called."""

    @pytest.mark.parametrize(("name", "slug"), ODD, ids=[slug[:20] for _, slug in ODD])
    def test_odd_names(self, folder: Path, name: str, slug: str) -> None:
        """Whatever does not fit into a file's name becomes `_`, and a title breaks no template."""
        up, down = new(name)
        [python] = new(name, "--python")

        assert [re.sub(r"^V\d{14}_", "", path.name) for path in (up, down, python)] == [
            f"{slug}.up.sql",
            f"{slug}.down.sql",
            f"{slug}.py",
        ]
        assert len(all_files(folder)) == 3
        for path in (up, down):
            path.write_text(f"{path.read_text()}SELECT 1;\n")
        plan = run_msr("migrate", "--dry-run", "--json", "--url", "sqlite:///app.db")
        assert run_msr("validate") == Result(0, "✓ No problems found\n", "")
        assert [it["transaction"] for it in json.loads(plan.stdout)["plan"]] == [True, True]
        assert "SELECT 1" in up.read_text().splitlines()[-1]

    @pytest.mark.parametrize("name", ["", "   ", "...", "___", "/", "x" * 101, "né" * 51])
    @pytest.mark.parametrize("kind", ["--sql", "--python"])
    def test_bad_names(self, folder: Path, name: str, kind: str) -> None:
        """Nothing that could stand in a name, or too much of it: exit 2, and no folder is made."""
        result = run_msr("new", name, kind)

        assert result == Result(
            2, "", "✗ Error: name: must have 1 to 100 bytes of letters, digits and _\n"
        )
        assert not folder.exists()

    def test_json(self) -> None:
        """--json tells a bad name as data too."""
        result = run_msr("new", "...", "--json")

        error = json.loads(result.stdout)["error"]
        assert (result.exit_code, error["type"], error["key"]) == (2, "ConfigError", "name")

    def test_not_utf8(self, folder: Path) -> None:
        """What is no text in a name is left out, and there is a whole script all the same."""
        assert run_msr("new", "caf\udce9 noir").exit_code == 0
        assert [path.name.partition("_")[2] for path in sorted(folder.iterdir())] == [
            "caf_noir.down.sql",
            "caf_noir.up.sql",
        ]

    def test_what_cannot_be_written_leaves_nothing(self, folder: Path) -> None:
        """Too many bytes for a file's name: exit 2 and no half of a script."""
        result = run_msr("new", "\N{MATHEMATICAL BOLD CAPITAL A}" * 58)

        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith("✗ Error: ")
        assert not folder.exists() or all_files(folder) == []

    def test_usage(self) -> None:
        """No name at all, or two kinds, is exit 2."""
        nothing = run_msr("new")
        both = run_msr("new", "users", "--sql", "--python")

        assert (nothing.exit_code, both.exit_code) == (2, 2)
        assert "Missing argument 'NAME'" in nothing.stderr
        assert both.stderr == "✗ Error: --python: contradicts --sql\n"
        assert not Path("migrations").exists()


class TestFolder:
    """Where it is written; a URL is never needed."""

    def test_which_one(self, tmp_path: Path) -> None:
        """--folder, MSR_FOLDER, the file, then `migrations`; folders above it are made as well."""
        (tmp_path / "msr.toml").write_text('folder = "from/file"')
        asked = {"MSR_FOLDER": "from/variable"}

        for path in (
            new("users", "--folder", "from/option", env=asked)[0],
            new("users", env=asked)[0],
            new("users")[0],
        ):
            assert path.is_file()
        (tmp_path / "msr.toml").unlink()
        new("users")

        made = {str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("*.up.sql")}
        assert made == {"from/option", "from/variable", "from/file", "migrations"}

    def test_the_newest_counts_in_the_same_folder(self, tmp_path: Path) -> None:
        """What another folder holds has nothing to do with it."""
        write_scripts(tmp_path / "other", {"V29990101000000_future.sql": "SELECT 1;"})

        assert version_of(new("users")[0]) < 29990101000000
        assert version_of(new("users", "--folder", "other")[0]) > 29990101000000

    def test_of_an_executor(self, tmp_path: Path) -> None:
        """--executor: the application's folder, without a connection."""
        (tmp_path / "shop.py").write_text(
            "import msr\n"
            "url = 'postgresql://somebody@localhost:1/nothing'\n"
            "executor = msr.MigrationScriptExecutor.from_url(url, folder='theirs')\n"
        )

        [path] = new("users", "--python", "--executor", "shop:executor")

        assert path.parent == Path("theirs")
        assert all_files(tmp_path / "theirs") == [path.name]

    @pytest.mark.parametrize("name", ["file", "file/below"])
    def test_a_file_in_its_place(self, tmp_path: Path, name: str) -> None:
        """A folder that cannot be written to is exit 2, and the file stays as it is."""
        (tmp_path / "file").write_text("mine")

        result = run_msr("new", "users", "--folder", name)
        told = json.loads(run_msr("new", "users", "--folder", name, "--json").stdout)

        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith(f"✗ Error: folder: {name} cannot be written to: ")
        assert told["error"]["key"] == "folder"
        assert (tmp_path / "file").read_text() == "mine"

    def test_the_database_is_left_alone(self, sqlite_url: str, tmp_path: Path) -> None:
        """A URL that is set is not used."""
        new("users", env={"MSR_URL": sqlite_url})

        assert not (tmp_path / "app.db").exists()
