"""Bad input: one line on stderr that says what to do, the right exit code, nothing changed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import anyio
import pytest

import msr
from tests.support.cli import Result, own_lines, run_msr, write_scripts
from tests.support.databases import on_postgres, on_sqlite, path_of
from tests.support.dump import dump
from tests.support.postgres import SECRET_PASSWORD, SECRET_USER, PostgresServer
from tests.support.queries import query

FIRST = {"V1_first.sql": "CREATE TABLE first (id int);"}
SECOND = {**FIRST, "V2_second.sql": "CREATE TABLE second (id int);"}

COMMANDS = {
    "migrate": ["migrate"],
    "list": ["list"],
    "lock:status": ["lock:status"],
    "lock:release": ["lock:release", "--force", "--yes"],
}


def refused(result: Result, exit_code: int, *says: str) -> None:
    """One line on stderr that says this, this exit code, and no secret or traceback anywhere."""
    assert (result.exit_code, result.stdout) == (exit_code, ""), result
    assert result.stderr.startswith("✗ Error: ")
    assert len(own_lines(result.stderr)) == 1
    assert result.stderr.endswith("\n")
    for part in says:
        assert part in result.stderr
    assert "unexpected" not in result.stderr
    assert "Traceback" not in result.stderr
    assert SECRET_PASSWORD not in result.stderr


# --- Scripts and their folder ---------------------------------------------------------------------


@dataclass(frozen=True)
class Bad:
    """Scripts beside V1_first.sql, and what must be said about them."""

    name: str
    says: tuple[str, ...]
    scripts: dict[str, str | bytes] = field(default_factory=dict)


BAD_SCRIPTS = [
    Bad(
        "not UTF-8",
        ("V2_text.sql, line 2: is not UTF-8 at byte 15", "save it as UTF-8"),
        {"V2_text.sql": b"SELECT 1;\nSELE\xe9T 'caf\xe9';\n"},
    ),
    Bad(
        "Python syntax",
        ("V2_code.py, line 2: not valid Python: ", "'('"),
        {"V2_code.py": "async def up(db):\n    await db.execute('SELECT 1'\n"},
    ),
    Bad(
        "Python without up",
        ("V2_code.py: has no 'async def up(db)': define it so",),
        {"V2_code.py": "async def upgrade(db): ...\n"},
    ),
    Bad(
        "Python with a synchronous up",
        ("V2_code.py: its 'up' is not a plain 'async def up(db)': define it so",),
        {"V2_code.py": "def up(db): ...\n"},
    ),
    Bad(
        "Python that cannot be imported",
        ("V2_code.py, line 1: cannot be imported, ModuleNotFoundError", "'no_such_module'"),
        {"V2_code.py": "import no_such_module\n\nasync def up(db): ...\n"},
    ),
    Bad(
        "SQL that commits by itself",
        ("V2_commit.sql, line 2: COMMIT would break the transaction", "remove it, or "),
        {"V2_commit.sql": "CREATE TABLE second (id int);\nCOMMIT;\nSELECT 1;\n"},
    ),
    Bad(
        "SQL without a statement",
        ("V2_empty.sql: contains no statement", "remove the file"),
        {"V2_empty.sql": "-- later\n"},
    ),
    Bad(
        "duplicate version",
        ("sub/V1_other.sql: has the same version as V1_first.sql", "give one of them another"),
        {"sub/V1_other.sql": "SELECT 1;"},
    ),
    Bad(
        "bad name",
        ("v2-second.sql: is not named like a script", "rename it"),
        {"v2-second.sql": "SELECT 1;"},
    ),
    Bad(
        "older than the newest",
        ("V0_late.sql: is older than version 1, which is applied", "rename it to a newer version"),
        {"V0_late.sql": "SELECT 1;"},
    ),
    Bad(
        "changed after it was applied",
        ("V1_first.sql: was edited after it was applied: restore the file",),
        {"V1_first.sql": "CREATE TABLE first (id int, name text);"},
    ),
]


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def shared_url(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A migrated database that all of these leave as it is, so one is enough."""
    folder = write_scripts(tmp_path_factory.mktemp("shared") / "migrations", FIRST)
    if request.param == "sqlite":
        url = f"sqlite:///{folder.parent}/app.db"
        anyio.run(lambda: msr.migrate(url, folder=folder))
        yield url
        return
    server: PostgresServer = request.getfixturevalue("postgres_server")
    name = f"bad_input_{os.getpid()}"
    url = server.create_database(name)
    try:
        anyio.run(lambda: msr.migrate(url, folder=folder))
        yield url
    finally:
        server.drop_database(name)


@pytest.mark.parametrize("bad", BAD_SCRIPTS, ids=lambda bad: bad.name)
def test_scripts(shared_url: str, folder: Path, bad: Bad) -> None:
    """What is wrong with a script is found before anything runs: exit 2."""
    # A good one that is pending shows that nothing was run.
    write_scripts(folder, {**FIRST, "V3_third.sql": "CREATE TABLE third (id int);", **bad.scripts})
    before = dump(shared_url)

    refused(run_msr("migrate", "--url", shared_url), 2, *bad.says)

    assert dump(shared_url) == before


@pytest.mark.parametrize("command", ["migrate", "list"])
def test_folder(shared_url: str, tmp_path: Path, command: str) -> None:
    """No such folder, one without scripts, and a file instead: each is exit 2 and named."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    cases = {
        "nowhere": "folder: nowhere does not exist: name the folder with the scripts",
        "empty": "folder: empty holds no script: name one like V1_create_users.sql",
        "file": "folder: file is not a folder: name the folder with the scripts",
    }
    before = dump(shared_url)

    for folder, says in cases.items():
        refused(run_msr(command, "--url", shared_url, "--folder", folder), 2, says)

    assert dump(shared_url) == before


@pytest.mark.parametrize("command", ["migrate", "lock:status"])
def test_folder_that_is_no_database(folder: Path, tmp_path: Path, command: str) -> None:
    """A folder cannot be opened: exit 7 or 1, in one line, and nothing of the driver's thread."""
    write_scripts(folder, FIRST)
    result = run_msr(command, "--url", f"sqlite:///{tmp_path}", "--folder", folder)

    assert result.exit_code == (1 if command == "lock:status" else 7)
    assert "name a file in a folder that this user may write to" in result.stderr
    assert result.stderr.count("\n") == 1, result.stderr


def test_missing_file(shared_url: str, folder: Path) -> None:
    """An applied script whose file is gone: exit 2, with the way out."""
    write_scripts(folder, {"V2_second.sql": "CREATE TABLE second (id int);"})
    before = dump(shared_url)

    refused(run_msr("migrate", "--url", shared_url), 2, "V1_first", "its file is gone: restore it")

    assert dump(shared_url) == before


def test_python_that_tells_the_url(migrated_url: str, folder: Path) -> None:
    """A script's own error may hold a URL, the password of which is for nobody."""
    Path("url.txt").write_text("postgresql://app:s3cret-word@db.example:5432/shop")
    script = """\
        from pathlib import Path

        async def up(db):
            raise OSError(f"no {Path('url.txt').read_text()} there")
        """
    write_scripts(folder, {"V2_told.py": script})

    for arguments in ([], ["--json"]):
        result = run_msr("migrate", *arguments)
        assert result.exit_code == 3
        assert "OSError: no postgresql://app:***@db.example:5432/shop there" in result.stderr
        assert "s3cret" not in result.stdout + result.stderr


def test_python_that_commits(migrated_url: str, folder: Path) -> None:
    """A Python script that ends the transaction: exit 3, no history row, and the lock is free."""
    script = """\
        async def up(db):
            await db.execute("COMMIT")
        """
    write_scripts(folder, {"V2_code.py": script})

    result = run_msr("migrate")

    refused(result, 3, "V2_code.py", "COMMIT", "remove")
    assert query(migrated_url, "SELECT version FROM schema_version") == [(1,)]
    assert query(migrated_url, "SELECT locked_by FROM migration_locks") == [(None,)]


@on_postgres
def test_procedure_that_commits(url: str, folder: Path) -> None:
    """A COMMIT that hides in a block is refused by the server: exit 3, rolled back whole."""
    block = "CREATE TABLE half (id int);\nDO $$ BEGIN COMMIT; END $$;\n"
    write_scripts(folder, {"V1_block.sql": block})

    refused(run_msr("migrate"), 3, "V1_block.sql, line 2", "invalid transaction termination")

    assert query(url, "SELECT to_regclass('half')") == [(None,)]
    assert query(url, "SELECT locked_by FROM migration_locks") == [(None,)]


# --- Settings -------------------------------------------------------------------------------------

# Variables, contents of msr.toml, contents of pyproject.toml, and what must be said.
BAD_SETTINGS: dict[str, tuple[dict[str, str], str, str, tuple[str, ...]]] = {
    "unknown variable": (
        {"MSR_LOCKING_TIMOUT": "5"}, "", "",
        ("MSR_LOCKING_TIMOUT: no such setting; did you mean MSR_LOCKING_TIMEOUT?",),
    ),
    "unknown key in msr.toml": (
        {}, "[locking]\ntimout = 5\n", "",
        ("/msr.toml: locking.timout: no such setting; did you mean locking.timeout?",),
    ),
    "unknown key in pyproject.toml": (
        {}, "", "[tool.msr]\nfolders = 'x'\n",
        ("/pyproject.toml: folders: no such setting; did you mean folder?",),
    ),
    "variable out of range": (
        {"MSR_LOCKING_TIMEOUT": "0"}, "", "",
        ("MSR_LOCKING_TIMEOUT: locking.timeout: must be from 1 second to 7 days",),
    ),
    "file out of range": (
        {}, "locking.wait = '8d'\n", "",
        ("/msr.toml: locking.wait: must be from 0 seconds to 7 days",),
    ),
    "pyproject.toml out of range": (
        {}, "", "[tool.msr.locking]\nenabled = 'maybe'\n",
        ("/pyproject.toml: locking.enabled: must be true or false",),
    ),
    "history table that is no identifier": (
        {"MSR_TABLE_NAME": "history; DROP TABLE users"}, "", "",
        ("MSR_TABLE_NAME: table_name: must be a table's name",),
    ),
    "lock table that is no identifier": (
        {}, "locking.table_name = 'my locks'\n", "",
        ("/msr.toml: locking.table_name: must be a table's name",),
    ),
    "one table for both": (
        {"MSR_LOCKING_TABLE_NAME": "schema_version"}, "", "",
        ("MSR_LOCKING_TABLE_NAME: locking.table_name: must differ from table_name",),
    ),
    "broken TOML": (
        {}, "folder = \n", "",
        ("/msr.toml: is not valid TOML: ", "line 1"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_settings(sqlite_url: str, folder: Path, tmp_path: Path, name: str) -> None:
    """A bad setting is exit 2 in any source, and the error names the key and where it stands."""
    env, toml, pyproject, says = BAD_SETTINGS[name]
    write_scripts(folder, FIRST)
    for file, text in (("msr.toml", toml), ("pyproject.toml", pyproject)):
        if text:
            (tmp_path / file).write_text(text)

    refused(run_msr("migrate", "--url", sqlite_url, env=env), 2, *says)

    assert dump(sqlite_url) == ""


BAD_URLS = {
    "mysql://user:{}@host/app": "unknown scheme 'mysql'; the URL must start with postgresql://",
    "app.db": "this is no database URL; it must start with postgresql://",
    "postgresql://user:{}@host/app@x": "percent-encode special characters",
    "sqlite://relative.db": "takes three slashes (sqlite:///app.db)",
}


@pytest.mark.parametrize("url", BAD_URLS)
def test_url(url: str, folder: Path) -> None:
    """A URL that cannot be used is exit 2; what it holds is not repeated."""
    write_scripts(folder, FIRST)

    refused(run_msr("migrate", "--url", url.format(SECRET_PASSWORD)), 2, BAD_URLS[url])


def test_url_in_a_variable(folder: Path) -> None:
    """The error names the variable that the URL came from, for a lock command too."""
    result = run_msr("lock:status", env={"DATABASE_URL": f"oracle://u:{SECRET_PASSWORD}@host"})

    refused(result, 2, "DATABASE_URL: url: unknown scheme 'oracle'")


# --- Drivers and connections ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "url", "extra"),
    [
        ("asyncpg", "postgresql://user@127.0.0.1:1/app", "postgres"),
        ("aiosqlite", "sqlite:///app.db", "sqlite"),
        ("typer", "sqlite:///app.db", "cli"),
    ],
)
def test_missing_package(folder: Path, tmp_path: Path, module: str, url: str, extra: str) -> None:
    """A package that is not installed is exit 1, with the command that installs it."""
    write_scripts(folder, FIRST)
    code = f"import sys; sys.modules[{module!r}] = None\nfrom msr_cli.__main__ import main; main()"

    done = subprocess.run(
        [sys.executable, "-c", code, "migrate", "--url", url], capture_output=True, text=True
    )

    install = f"{module} is not installed: run pip install 'migration-script-runner[{extra}]'"
    refused(Result(done.returncode, done.stdout, done.stderr), 1, install)
    assert not (tmp_path / "app.db").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_unreachable(folder: Path, command: str) -> None:
    """A server that does not answer is exit 7, and 1 for the lock commands; the URL is named."""
    write_scripts(folder, FIRST)
    url = "postgresql://user:hunter2@127.0.0.1:1/app"

    result = run_msr(*COMMANDS[command], "--url", url)

    exit_code = 1 if command.startswith("lock") else 7
    refused(result, exit_code, "cannot connect to postgresql://user:***@127.0.0.1:1/app: ")
    assert "hunter2" not in result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_no_such_folder_of_the_database(folder: Path, tmp_path: Path, command: str) -> None:
    """An SQLite file in a folder that does not exist is as unreachable, and no folder is made."""
    write_scripts(folder, FIRST)

    result = run_msr(*COMMANDS[command], "--url", f"sqlite:///{tmp_path}/nowhere/app.db")

    exit_code = 1 if command.startswith("lock") else 7
    refused(result, exit_code, f"cannot open {tmp_path}/nowhere/app.db: there is no folder")
    assert not (tmp_path / "nowhere").exists()


class TestWrongPassword:
    """PostgreSQL: a password that is wrong is refused by the server, and shown to nobody."""

    WRONG = "wr0ng-p@ss/word"

    @pytest.fixture
    def url(self, postgres_server: PostgresServer) -> str:
        return postgres_server.url("postgres", SECRET_USER, self.WRONG)

    @pytest.mark.parametrize("command", ["migrate", "lock:status"])
    def test_refused(self, url: str, folder: Path, command: str) -> None:
        """Exit 7, and 1 for the lock commands; the URL is shown without the password."""
        write_scripts(folder, FIRST)

        result = run_msr(*COMMANDS[command], env={"MSR_URL": url})

        exit_code = 1 if command.startswith("lock") else 7
        refused(result, exit_code, "password authentication failed", f"{SECRET_USER}:***@")
        self.assert_secret(result)

    def test_with_everything_shown(self, url: str, folder: Path) -> None:
        """Neither the traceback of --debug nor the document of --json holds it."""
        write_scripts(folder, FIRST)

        result = run_msr("migrate", "--url", url, "--debug", "--json")

        assert result.exit_code == 7
        assert "Traceback" in result.stderr
        assert "DatabaseUnreachableError" in result.stdout
        self.assert_secret(result)

    def assert_secret(self, result: Result) -> None:
        for form in (self.WRONG, "wr0ng-p%40ss%2Fword", "wr0ng"):
            assert form not in result.stdout + result.stderr


@pytest.mark.parametrize("flag", ["--json", "--debug"])
def test_password_of_a_run_that_fails(
    postgres_server: PostgresServer, postgres_url: str, folder: Path, flag: str
) -> None:
    """PostgreSQL: the right password is in no output of a run that fails later either."""
    write_scripts(folder, {"V1_bad.sql": "SELECT 1/0;"})
    query(postgres_url, f"GRANT CREATE ON SCHEMA public TO {SECRET_USER}")
    database = urlsplit(postgres_url).path.lstrip("/")
    url = postgres_server.url(database, SECRET_USER, SECRET_PASSWORD)

    result = run_msr("migrate", "--url", url, flag)

    assert result.exit_code == 3
    assert "division by zero" in result.stderr
    for form in (SECRET_PASSWORD, "s3cret"):
        assert form not in result.stdout + result.stderr


# --- Databases that refuse ------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["migration_locks", "schema_version"])
def test_somebody_elses_table(url: str, folder: Path, table: str) -> None:
    """A table of ours that somebody else made: exit 1, both settings named, the table untouched."""
    query(url, f"CREATE TABLE {table} (id int, owner text)", f"INSERT INTO {table} VALUES (1, 'x')")
    write_scripts(folder, FIRST)
    before = dump(url)

    says = (table, "was not made by msr", "set locking.table_name and table_name")
    refused(run_msr("migrate"), 1, *says)
    assert dump(url) == before

    reads = ["lock:status", "lock:release"] if table == "migration_locks" else ["list"]
    for command in reads:
        refused(run_msr(*COMMANDS[command]), 1, *says)
    assert dump(url) == before


def make_read_only(url: str) -> None:
    """Let nobody write any more, not even root or a superuser."""
    if url.startswith("sqlite"):
        with path_of(url).open("r+b") as file:
            file.seek(18)  # the format's version for writers: one that SQLite does not know yet
            file.write(b"\x03")
        return
    database = urlsplit(url).path.lstrip("/")
    query(url, f'ALTER DATABASE "{database}" SET default_transaction_read_only = on')


def test_read_only_database(migrated_url: str, folder: Path) -> None:
    """A script is pending: exit 1 and the reason; what only reads goes on working."""
    make_read_only(migrated_url)
    before = dump(migrated_url)
    assert run_msr("migrate").stdout == "✓ Nothing to do: 1 script applied already\n"
    write_scripts(folder, SECOND)

    refused(run_msr("migrate"), 1, "read-only", ": give ")

    assert "UNLOCKED" in run_msr("lock:status").stdout
    assert run_msr("list").stdout.endswith("2 scripts: 1 applied, 1 pending\n")
    assert dump(migrated_url) == before


@on_postgres
def test_read_only_database_without_tables(url: str, folder: Path) -> None:
    """The same where our tables are still missing."""
    write_scripts(folder, FIRST)
    make_read_only(url)
    before = dump(url)

    refused(run_msr("migrate"), 1, "read-only", "primary server")

    assert dump(url) == before


@on_sqlite
def test_file_that_is_no_database(url: str, folder: Path) -> None:
    """A file that SQLite cannot read is exit 1 for every command, and stays as it is."""
    path = path_of(url)
    path.write_bytes(b"not a database at all, but long enough for a header " * 50)
    write_scripts(folder, FIRST)
    before = path.read_bytes()

    for command in COMMANDS.values():
        refused(run_msr(*command), 1, f"{path}: file is not a database")

    assert path.read_bytes() == before


class TestRoleWithoutPrivileges:
    """PostgreSQL: a role that may not create tables."""

    @pytest.fixture
    def their_url(self, postgres_server: PostgresServer, postgres_url: str) -> str:
        query(postgres_url, "REVOKE CREATE ON SCHEMA public FROM PUBLIC")
        database = urlsplit(postgres_url).path.lstrip("/")
        return postgres_server.url(database, SECRET_USER, SECRET_PASSWORD)

    def test_on_an_empty_database(self, postgres_url: str, their_url: str, folder: Path) -> None:
        """Exit 1, and the error names the privilege; nothing is made and no lock taken."""
        write_scripts(folder, FIRST)
        before = dump(postgres_url)

        result = run_msr("migrate", "--url", their_url)

        refused(result, 1, "permission denied for schema public", "CREATE on the schema")
        assert dump(postgres_url) == before
        locks = "SELECT 1 FROM pg_locks WHERE locktype = 'advisory'"
        assert query(postgres_url, locks) == []

    def test_on_a_migrated_database(self, postgres_url: str, their_url: str, folder: Path) -> None:
        """Tables that another role made and did not share: exit 1, nothing changed."""
        write_scripts(folder, FIRST)
        assert run_msr("migrate", "--url", postgres_url).exit_code == 0
        write_scripts(folder, SECOND)
        before = dump(postgres_url)

        for command in ("migrate", "list"):
            result = run_msr(command, "--url", their_url)
            refused(result, 1, "permission denied for table schema_version", "SELECT")

        assert dump(postgres_url) == before
