"""Every option and every setting, from every source: each test fails if its one is ignored."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import Result, run_msr, write_scripts
from tests.support.databases import on_postgres, on_sqlite
from tests.support.holder import hold_lock
from tests.support.queries import exists, query, table_names

FIRST = {"V1_first.sql": "CREATE TABLE first (id int);"}


def names(url: str) -> set[str]:
    return asyncio.run(table_names(url))


def migrate(*arguments: str | Path, **options: Any) -> Result:
    """A `msr migrate` that must end well."""
    result = run_msr("migrate", *arguments, **options)
    assert result.exit_code == 0, result
    return result


# Where a setting may stand. Each writer takes settings by key, and returns the variables to set.
Writer = Callable[[dict[str, Any]], dict[str, str]]


def in_environment(settings: dict[str, Any]) -> dict[str, str]:
    variables = {f"MSR_{key.upper().replace('.', '_')}": value for key, value in settings.items()}
    return {name: json.dumps(value).strip('"') for name, value in variables.items()}


def in_toml(settings: dict[str, Any], file: str = "msr.toml", table: str = "") -> dict[str, str]:
    lines = [f"{table}{key} = {json.dumps(value)}\n" for key, value in settings.items()]
    Path(file).write_text("".join(lines))
    return {}


def in_pyproject(settings: dict[str, Any]) -> dict[str, str]:
    return in_toml(settings, "pyproject.toml", "tool.msr.")


sources = pytest.mark.parametrize("write", [in_environment, in_toml], ids=["MSR_*", "msr.toml"])


@on_sqlite
@sources
class TestKeys:
    """Every key, from every source."""

    def test_url(self, database_url: str, folder: Path, write: Writer) -> None:
        """`url` names the database."""
        write_scripts(folder, FIRST)

        migrate(env=write({"url": database_url}))

        assert "first" in names(database_url)

    def test_folder(self, url: str, tmp_path: Path, write: Writer) -> None:
        """`folder` is where the scripts stand."""
        write_scripts(tmp_path / "elsewhere", FIRST)

        migrate(env=write({"folder": "elsewhere"}))

        assert "first" in names(url)

    def test_tables(self, url: str, folder: Path, write: Writer) -> None:
        """`table_name` is the history and `locking.table_name` the lock."""
        write_scripts(folder, FIRST)
        settings = {"table_name": "app_history", "locking.table_name": "app1_migration_locks"}

        migrate(env=write(settings))

        assert names(url) == {
            *("first", "app_history", "app1_migration_locks", "app1_migration_locks_token")
        }

    def test_locking_enabled(self, url: str, folder: Path, write: Writer) -> None:
        """`locking.enabled = false` takes no lock, and warns."""
        write_scripts(folder, FIRST)

        result = migrate(env=write({"locking.enabled": False}))

        assert "without the migration lock" in result.stderr
        assert names(url) == {"first", "schema_version"}

    def test_locking_name(self, url: str, folder: Path, write: Writer) -> None:
        """`locking.name` is the lock's name: one of another name is not in the way."""
        write_scripts(folder, FIRST)
        with hold_lock(url):
            migrate("--no-wait", env=write({"locking.name": "blue team"}))

        assert query(url, "SELECT name FROM migration_locks WHERE token = 2") == [("blue team",)]

    def test_locking_timeout(self, url: str, folder: Path, write: Writer) -> None:
        """`locking.timeout` is the length of the lease."""
        seconds = "round((julianday(expires_at) - julianday(renewed_at)) * 86400)"
        script = f"CREATE TABLE seen AS SELECT {seconds} AS seconds FROM migration_locks;"
        write_scripts(folder, {"V1_look.sql": script})

        migrate(env=write({"locking.timeout": "2m"}))

        assert query(url, "SELECT seconds FROM seen") == [(120,)]

    def test_locking_wait(self, url: str, folder: Path, write: Writer) -> None:
        """`locking.wait` is how long a held lock is waited for."""
        write_scripts(folder, FIRST)
        with hold_lock(url):
            result = run_msr("migrate", env=write({"locking.wait": 0.2}))

        assert result.exit_code == 8


def test_pyproject(sqlite_url: str, tmp_path: Path) -> None:
    """`[tool.msr]` in pyproject.toml is read, among other tools' tables."""
    write_scripts(tmp_path / "elsewhere", FIRST)
    in_pyproject(
        {
            "url": sqlite_url,
            "folder": "elsewhere",
            "table_name": "app_history",
            "locking.table_name": "locks",
            "locking.name": "blue team",
        }
    )
    with Path("pyproject.toml").open("a") as file:
        file.write("[tool.other]\nmsr = 1\n")

    migrate()

    assert names(sqlite_url) == {"first", "app_history", "locks", "locks_token"}
    assert query(sqlite_url, "SELECT name FROM locks") == [("blue team",)]


class TestPrecedence:
    """Which source wins where several speak of one setting."""

    @pytest.fixture
    def urls(self, tmp_path: Path) -> list[str]:
        """Databases that do not exist yet."""
        return [f"sqlite:///{tmp_path}/{name}.db" for name in ("a", "b", "c", "d", "e")]

    def test_url(self, urls: list[str], folder: Path) -> None:
        """--url, then MSR_URL, then DATABASE_URL, then the file; the others are not touched."""
        write_scripts(folder, FIRST)
        in_toml({"url": urls[3]})
        in_pyproject({"url": urls[4]})
        env = {"DATABASE_URL": urls[2], "MSR_URL": urls[1]}

        for number, arguments in enumerate([["--url", urls[0]], [], [], []]):
            migrate(*arguments, env=env)
            assert [exists(url) for url in urls] == [i <= number for i in range(5)]
            if not arguments and env:  # the next in line takes over
                env.popitem()

    @on_sqlite
    def test_folder(self, url: str, tmp_path: Path) -> None:
        """--folder, then MSR_FOLDER, then the file's, which is relative to that file."""
        for place in ("flag", "variable", "etc/file"):
            write_scripts(tmp_path / place, {f"V1_{place[-4:]}.sql": "SELECT 1;"})
        in_toml({"folder": "file"}, "etc/msr.toml")
        arguments = ["list", "--json", "--config", "etc/msr.toml"]
        variable = {"MSR_FOLDER": "variable"}

        results = [
            run_msr(*arguments, "--folder", "flag", env=variable),
            run_msr(*arguments, env=variable),
            run_msr(*arguments),
        ]

        assert [json.loads(result.stdout)["scripts"][0]["name"] for result in results] == [
            *("flag", "able", "file")
        ]

    @on_sqlite
    def test_merged(self, url: str, folder: Path) -> None:
        """A table that is given in part, in several places, is merged key by key."""
        write_scripts(folder, FIRST)
        in_toml({"locking.table_name": "from_file", "locking.name": "from file"})

        migrate(env={"MSR_LOCKING_NAME": "from variable"})

        assert query(url, "SELECT name FROM from_file") == [("from variable",)]


@pytest.mark.parametrize(
    "command", [["baseline", "1"], ["repair", "--yes"], ["down", "0"]], ids=str
)
@on_sqlite
def test_locking_disabled(url: str, folder: Path, command: list[str]) -> None:
    """`locking.enabled` is for every command that would take the lock."""
    scripts = {"V1_first.up.sql": FIRST["V1_first.sql"], "V1_first.down.sql": "DROP TABLE first;"}
    write_scripts(folder, scripts)
    variables = {"MSR_LOCKING_ENABLED": "off"}
    if command[0] != "baseline":
        migrate(env=variables)
        write_scripts(folder, {"V1_first.up.sql": "CREATE TABLE first (id int); -- edited"})

    assert run_msr(*command, env=variables).exit_code == 0

    assert "migration_locks" not in names(url)


class TestFlags:
    """The options that every command has."""

    COMMANDS = (
        ["migrate"],
        ["list"],
        ["lock:status"],
        ["lock:release", "--force"],
        ["down", "0"],
        ["validate"],
        ["validate", "--database"],
        ["new", "something"],
        ["baseline", "1"],
        ["repair"],
    )

    @pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
    def test_config(self, sqlite_url: str, tmp_path: Path, command: list[str]) -> None:
        """--config names the file, in any folder and by any name; msr.toml is not read then."""
        write_scripts(tmp_path / "etc/scripts", FIRST)
        in_toml({"url": sqlite_url, "folder": "scripts"}, "etc/production.toml")
        in_toml({"no_such_key": 1})

        assert run_msr(*command, "--config", "etc/production.toml").exit_code == 0

    def test_config_by_variable(self, sqlite_url: str, tmp_path: Path) -> None:
        """MSR_CONFIG names the file too; one that is named and not there is an error."""
        write_scripts(tmp_path / "etc/scripts", FIRST)
        in_toml({"url": sqlite_url, "folder": "scripts"}, "etc/production.toml")

        migrate(env={"MSR_CONFIG": "etc/production.toml"})
        missing = run_msr("migrate", "--config", "etc/staging.toml")

        assert missing == Result(
            2, "", f"✗ Error: {tmp_path}/etc/staging.toml: no such configuration file\n"
        )

    @pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
    def test_url_and_folder(self, sqlite_url: str, tmp_path: Path, command: list[str]) -> None:
        """--url and --folder reach every command."""
        write_scripts(tmp_path / "scripts", FIRST)

        result = run_msr(*command, "--url", sqlite_url, "--folder", "scripts")

        assert result.exit_code == 0

    def test_no_url(self) -> None:
        """Where no database is named, the error says how to name one."""
        assert run_msr("migrate") == Result(
            2, "", "✗ Error: url: no database: give a URL or set MSR_URL or DATABASE_URL\n"
        )

    @pytest.mark.parametrize("command", COMMANDS[:3:2], ids=lambda command: command[0])
    def test_debug(self, tmp_path: Path, command: list[str]) -> None:
        """--debug shows where an error comes from, before the line that everybody gets."""
        arguments = [*command, "--url", "sqlite:///no/such/folder/app.db", "--folder", "s"]
        write_scripts(tmp_path / "s", FIRST)

        plain = run_msr(*arguments)
        debug = run_msr(*arguments, "--debug")

        assert plain.exit_code == debug.exit_code == (1 if "lock" in command[0] else 7)
        assert debug.stderr.startswith("Traceback (most recent call last):")
        assert debug.stderr.endswith(plain.stderr)
        assert plain.stderr.count("\n") == 1

    @pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
    def test_json_error(self, command: list[str]) -> None:
        """--json gives an error as one document on stdout; the line on stderr stays."""
        flags = ["--yes"] if command[0] in ("lock:release", "repair") else []

        result = run_msr(*command, *flags, "--json", "--url", "mysql://host/app")

        error = json.loads(result.stdout)["error"]
        assert result.exit_code == 2
        assert (error["type"], error["key"]) == ("ConfigError", "url")
        assert result.stderr == f"✗ Error: {error['message']}\n"

    def test_version_and_help(self) -> None:
        """`--version` and `--help` answer on stdout; no command at all shows the help."""
        version = run_msr("--version")
        help_text = run_msr("--help")
        release = run_msr("lock:release", "-h")
        bare = run_msr()

        assert version.exit_code == help_text.exit_code == release.exit_code == 0
        assert re.fullmatch(r"msr \d+\.\d+\.\d+\S*\n", version.stdout)
        for command in ("migrate", "list", "lock:status", "lock:release"):
            assert command in help_text.stdout
        for option in ("--force", "-f", "--yes", "-y", "--reason", "--terminate"):
            assert option in release.stdout
        assert help_text.stderr == release.stderr == ""
        assert "lock:release" in bare.stdout + bare.stderr

    def test_unknown_command(self) -> None:
        """A command that does not exist is exit 2, in one line."""
        result = run_msr("lock:steal")

        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith("✗ Error: No such command 'lock:steal'")
        assert result.stderr.count("\n") == 1


class TestExecutor:
    """--executor: an application's own."""

    APPLICATION = """\
        import msr

        executor = msr.MigrationScriptExecutor.from_url(folder="app_scripts")

        def make():
            return executor

        class Settings:
            executor = executor

        def broken():
            raise RuntimeError("no settings")

        async def later():
            return executor

        number = 3
        """

    @pytest.fixture(autouse=True)
    def application(self, tmp_path: Path) -> None:
        write_scripts(
            tmp_path,
            {
                "shop/__init__.py": "",
                "shop/db.py": self.APPLICATION,
                "shop/syntax.py": "def",
                "app_scripts/V1_first.sql": FIRST["V1_first.sql"],
            },
        )

    @pytest.mark.parametrize("attribute", ["executor", "make", "Settings.executor"])
    def test_used(self, url: str, attribute: str) -> None:
        """An object, a function that returns one, or an attribute of something; from any folder."""
        result = migrate("--executor", f"shop.db:{attribute}")

        assert " Applied V1_first.sql " in result.stdout
        assert "first" in names(url)

    @on_sqlite
    def test_every_command(self, url: str) -> None:
        """The other commands use it too, and its listeners are left as they were."""
        path = ("--executor", "shop.db:make")

        assert run_msr("list", *path).stdout.endswith("1 script: 1 pending\n")
        with hold_lock(url) as holder:
            assert holder.locked_by in run_msr("lock:status", *path).stdout
            assert run_msr("lock:release", "-f", "-y", *path).exit_code == 0
        assert "Lock Status: UNLOCKED" in run_msr("lock:status", *path).stdout

    @on_sqlite
    @pytest.mark.parametrize(
        ("path", "says"),
        [
            ("shop.db", "'shop.db' is not of the form module:attribute"),
            (":executor", "is not of the form module:attribute"),
            ("shop.db:", "is not of the form module:attribute"),
            ("no_such_module:executor", "ModuleNotFoundError: No module named 'no_such_module'"),
            ("shop.syntax:executor", "cannot be loaded, SyntaxError"),
            ("shop.db:nothing", "has no attribute 'nothing'"),
            ("shop.db:number", "gives int, not a MigrationScriptExecutor"),
            ("shop.db:broken", "cannot be loaded, RuntimeError: no settings"),
            ("shop.db:later", "is async: give a function that returns the executor"),
        ],
    )
    def test_unusable(self, url: str, path: str, says: str) -> None:
        """What cannot be used is exit 2, in one line that says what was found."""
        result = run_msr("migrate", "--executor", path)

        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith("✗ Error: --executor: ")
        assert says in result.stderr
        assert result.stderr.count("\n") == 1
        assert not exists(url)

    @on_sqlite
    @pytest.mark.parametrize("option", ["--url", "--folder", "--config"])
    def test_not_with_its_rivals(self, url: str, option: str) -> None:
        """It brings its own database, folder and settings: naming another is exit 2."""
        result = run_msr("migrate", "--executor", "shop.db:executor", option, "x")

        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr == (
            f"✗ Error: {option}: cannot be given together with --executor, which brings its own\n"
        )
        assert not exists(url)


@on_postgres
def test_tables_in_a_schema(url: str, folder: Path) -> None:
    """PostgreSQL: both tables may stand in a schema of their own."""
    query(url, "CREATE SCHEMA ops")
    write_scripts(folder, FIRST)
    env = {"MSR_TABLE_NAME": "ops.history", "MSR_LOCKING_TABLE_NAME": "ops.locks"}

    migrate(env=env)
    with hold_lock(url, table_name="ops.locks") as holder:
        assert holder.locked_by in run_msr("lock:status", env=env).stdout

    found = query(url, "SELECT schemaname || '.' || tablename FROM pg_tables ORDER BY 1")
    ours = [name for (name,) in found if name.startswith(("ops.", "public."))]
    assert ours == ["ops.history", "ops.locks", "public.first"]


@pytest.mark.parametrize("prefix", ["postgres", "postgresql+asyncpg"])
@on_postgres
def test_other_forms_of_a_postgresql_url(url: str, folder: Path, prefix: str) -> None:
    """The schemes that other tools use name the same database."""
    write_scripts(folder, FIRST)

    migrate("--url", url.replace("postgresql", prefix, 1))

    assert "first" in names(url)


@pytest.mark.parametrize("form", ["sqlite:///relative.db", "sqlite+aiosqlite:////{}/absolute.db"])
def test_other_forms_of_an_sqlite_url(tmp_path: Path, folder: Path, form: str) -> None:
    """Three slashes for a file below the working folder, four for an absolute path."""
    write_scripts(folder, FIRST)

    migrate("--url", form.format(str(tmp_path).lstrip("/")))

    assert (tmp_path / Path(form).name).exists()
