"""`--json`: what every command prints, success and failure, is what `json_schema.json` says.

Each scenario is a function that runs commands and names the definition that a document must be.
They run twice: as the installed `msr` on both databases, and once more in this process, all of
them, to see that the schema says nothing that no document shows.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from msr_cli.app import app
from msr_cli.render import FORMAT
from tests.support.cli import PATIENCE, Result, run_msr, start_msr, wait_until, write_scripts
from tests.support.databases import on_postgres
from tests.support.holder import Gate, hold_lock
from tests.support.migrations import is_sqlite
from tests.support.queries import query

SCHEMA = json.loads(resources.files("msr_cli").joinpath("json_schema.json").read_text())
DEFINITIONS: dict[str, Any] = SCHEMA["$defs"]
DOCUMENTS = [entry["$ref"].removeprefix("#/$defs/") for entry in SCHEMA["anyOf"]]

OPTIONAL = {("PlannedScript", "text"), ("Failure", "result")}
"""The only keys that a document may lack."""

UNSEEN = {
    "Interrupted.left: string": "outside a transaction: test_migrate",
    "MigrationError.rolled_back: null": "a connection that breaks in a commit: tests/chaos",
    "Lock.obstacle: string": "a waiter that is kept from a free lock: tests/chaos",
    "Lock.holder: unknown": "a holder on another host, or behind a pooler: test_lock_status",
}
"""What the schema says, and why none of the scenarios shows it."""

Document = dict[str, Any]

USERS = {
    "V1_users.up.sql": "CREATE TABLE users (id INTEGER, name TEXT);",
    "V1_users.down.sql": "DROP TABLE users;",
}
OUTSIDE = "-- msr: no-transaction\nCREATE TABLE half (id INTEGER);\nSELECT nothing;\n"
NOWHERE = "postgresql://user@127.0.0.1:1/app"


def run_here(*arguments: str | Path) -> Result:
    """`run_msr` in this process: the same documents, without the start of an interpreter."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = app([*map(str, arguments)], standalone_mode=False)
    return Result(code or 0, out.getvalue(), err.getvalue())


@cache
def validator(definition: str | None = None) -> Draft202012Validator:
    """For documents of one definition, else for any of them."""
    if definition is None:
        return Draft202012Validator(SCHEMA)
    return Draft202012Validator({"$ref": f"#/$defs/{definition}", "$defs": DEFINITIONS})


@dataclass
class Shell:
    """Runs commands on an empty database with an empty folder, and keeps what they print."""

    url: str
    folder: Path
    run: Callable[..., Result] = run_msr
    printed: list[tuple[str, Document]] = field(default_factory=list)

    def json(self, definition: str, exit_code: int, *arguments: str) -> Document:
        """Run it with --json: the document, which must be of that definition."""
        return self.check(definition, exit_code, self.run(*arguments, "--json"), arguments[0])

    def check(self, definition: str, exit_code: int, result: Result, command: str) -> Document:
        assert result.exit_code == exit_code, result
        [line] = result.stdout.splitlines()
        document: Document = json.loads(line)
        assert validator().is_valid(document), document
        errors = validator(definition).iter_errors(document)
        assert [f"{it.json_path}: {it.message}" for it in errors] == []
        # What went wrong is told to people as well, on the other stream.
        assert ("✗ Error: " in result.stderr) == (exit_code != 0), result
        if definition != "Failure":
            assert f"`msr {command}" in DEFINITIONS[definition]["description"]
        self.printed.append((definition, document))
        return document

    def fails(self, kind: str, exit_code: int, *arguments: str) -> Document:
        """Run it with --json: the document of its failure, with an error of that class."""
        document = self.json("Failure", exit_code, *arguments)
        assert document["error"]["type"] == kind
        return document

    def write(self, scripts: dict[str, str]) -> None:
        write_scripts(self.folder, scripts)

    def query(self, *statements: str) -> None:
        query(self.url, *statements)

    def empty(self) -> None:
        """Another empty database and folder, for the next scenario (PostgreSQL)."""
        self.query("DROP SCHEMA public CASCADE", "CREATE SCHEMA public")
        shutil.rmtree(self.folder, ignore_errors=True)


# The scenarios. Each begins with nothing, and has a part for success and one for failure.


def migrate(shell: Shell) -> None:
    shell.write({**USERS, "R_names.sql": "CREATE VIEW names AS SELECT name FROM users;"})

    done = shell.json("Run", 0, "migrate")
    again = shell.json("Run", 0, "migrate")

    keys = [(it["version"], it["script"], it["action"]) for it in done["executed"]]
    assert keys == [(1, "V1_users.up.sql", "apply"), (None, "R_names.sql", "apply")]
    assert (again["executed"], again["applied_before"], again["token"]) == ([], 2, None)


def migrate_fails(shell: Shell) -> None:
    shell.write({**USERS, "V2_bad.sql": "\nSELECT nam FROM users;"})
    failure = shell.fails("MigrationError", 3, "migrate")
    assert (failure["error"]["script"], failure["error"]["line"]) == ("V2_bad.sql", 2)
    assert failure["error"]["applied"] == ["V1_users.up.sql"]
    assert failure["error"]["rolled_back"] is True
    assert [it["name"] for it in failure["result"]["executed"]] == ["users"]

    (shell.folder / "V2_bad.sql").unlink()
    shell.write({"V3_bad.py": "async def up(db):\n    raise KeyError('a name')\n"})
    failure = shell.fails("MigrationError", 3, "migrate")
    assert (failure["error"]["line"], failure["error"]["sqlstate"]) == (2, None)

    (shell.folder / "V3_bad.py").unlink()
    if not is_sqlite(shell.url):  # an error of the commit belongs to no line
        unique = "CREATE TABLE once (id INTEGER UNIQUE DEFERRABLE INITIALLY DEFERRED);"
        shell.write({"V4_bad.sql": f"{unique}\nINSERT INTO once VALUES (1), (1);"})
        error = shell.fails("MigrationError", 3, "migrate")["error"]
        assert (error["line"], error["source"]) == (None, None)


def migrate_is_refused(shell: Shell) -> None:
    assert shell.fails("ConfigError", 2, "migrate")["error"]["key"] == "folder"
    shell.write(USERS)
    assert shell.fails("ConfigError", 2, "migrate", "7")["error"]["key"] == "target"
    shell.write({"V2_open.sql": "SELECT 1;\nCOMMIT;\n", "V 3.sql": ""})
    problems = shell.fails("ValidationError", 2, "migrate")["error"]["problems"]
    assert [(it["file"], it["line"]) for it in problems] == [("V 3.sql", None), ("V2_open.sql", 2)]
    shell.fails("DatabaseUnreachableError", 7, "migrate", "--url", NOWHERE)


def migrate_is_interrupted(shell: Shell) -> None:
    """In a process always, for the signal is for all of it."""
    gate = Gate(Path.cwd())
    shell.write({**USERS, "V2_slow.py": gate.script()})
    process = start_msr("migrate", "--json")
    gate.wait()
    process.terminate()
    stdout, stderr = process.communicate(timeout=PATIENCE)
    result = Result(process.returncode, stdout, stderr)

    error = shell.check("Failure", 143, result, "migrate")["error"]

    assert (error["type"], error["signum"]) == ("Interrupted", signal.SIGTERM)
    assert error["applied"] == ["V1_users.up.sql"]


def migrate_without_a_driver(shell: Shell) -> None:
    shell.write(USERS)
    driver = "aiosqlite" if is_sqlite(shell.url) else "asyncpg"
    code = f"import sys; sys.modules[{driver!r}] = None\nfrom msr_cli.__main__ import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "migrate", "--json"], capture_output=True, text=True
    )
    result = Result(done.returncode, done.stdout, done.stderr)

    error = shell.check("Failure", 1, result, "migrate")["error"]

    assert (error["type"], error["driver"]) == ("MissingDriverError", driver)


def down(shell: Shell) -> None:
    shell.write(USERS)
    shell.json("Run", 0, "migrate")
    assert shell.fails("ConfigError", 2, "down")["error"]["key"] == "target"

    done = shell.json("Run", 0, "down", "0")

    [script] = done["executed"]
    assert (script["script"], script["action"]) == ("V1_users.down.sql", "revert")
    assert shell.json("Run", 0, "down", "0")["executed"] == []

    shell.write({"R_one.sql": "CREATE VIEW one AS SELECT 1 AS one;"})
    shell.json("Run", 0, "migrate")
    plan = shell.json("Plan", 0, "down", "0", "--dry-run")["plan"]
    assert [(it["action"], it["script"]) for it in plan] == [
        ("forget", "R_one.sql"),
        ("revert", "V1_users.down.sql"),
    ]


def down_fails(shell: Shell) -> None:
    shell.write({**USERS, "V1_users.down.sql": "DROP TABLE people;"})
    shell.json("Run", 0, "migrate")
    error = shell.fails("RollbackError", 4, "down", "--steps", "1")["error"]
    assert (error["script"], error["applied"]) == ("V1_users.down.sql", [])

    (shell.folder / "V1_users.down.sql").unlink()
    [problem] = shell.fails("ValidationError", 2, "down", "0")["error"]["problems"]
    assert problem["rule"] == "no-way-down"


def dry_run(shell: Shell) -> None:
    shell.write(
        {
            **USERS,
            "V2_outside.py": "transaction = False\nasync def up(db): ...\n",
            "R_names.sql": "CREATE VIEW names AS SELECT name FROM users;",
        }
    )
    plan = shell.json("Plan", 0, "migrate", "--dry-run")["plan"]
    kinds = [(it["version"], it["kind"], it["transaction"], it["action"]) for it in plan]
    assert kinds == [
        (1, "sql", True, "apply"),
        (2, "python", False, "apply"),
        (None, "sql", True, "apply"),
    ]
    assert not any("text" in script for script in plan)
    plan = shell.json("Plan", 0, "migrate", "1", "--dry-run", "--sql")["plan"]
    assert [script["text"] for script in plan] == [USERS["V1_users.up.sql"]]

    shell.json("Run", 0, "migrate", "1")
    [script] = shell.json("Plan", 0, "down", "0", "--dry-run")["plan"]
    assert (script["script"], script["action"]) == ("V1_users.down.sql", "revert")
    [script] = shell.json("Plan", 0, "down", "0", "--dry-run", "--sql")["plan"]
    assert script["text"] == USERS["V1_users.down.sql"]
    assert shell.json("Plan", 0, "down", "1", "--dry-run")["plan"] == []


def dry_run_is_refused(shell: Shell) -> None:
    shell.write(USERS)
    assert shell.fails("ConfigError", 2, "migrate", "--sql")["error"]["source"] == "--sql"
    shell.fails("ConfigError", 2, "migrate", "--dry-run", "--no-wait")
    shell.fails("ConfigError", 2, "down", "7", "--dry-run")
    shell.write({"V2_outside.sql": "CREATE TABLE t (id INTEGER);\nROLLBACK;\n"})
    failure = shell.fails("ValidationError", 2, "migrate", "--dry-run")
    assert "result" not in failure


def list_(shell: Shell) -> None:
    shell.write({f"V{n}_script.sql": f"CREATE TABLE t{n} (id INTEGER);" for n in (2, 4, 5, 6, 7)})
    shell.write({"R_view.sql": "CREATE VIEW seen AS SELECT 1 AS one;"})
    shell.json("Baseline", 0, "baseline", "2")
    shell.json("Run", 0, "migrate")
    shell.query(
        "UPDATE schema_version SET status = 'started' WHERE version = 6",
        "UPDATE schema_version SET status = 'failed', note = 'why' WHERE version = 7",
    )
    (shell.folder / "V5_script.sql").unlink()
    shell.write({"V3_late.sql": "", "V4_script.sql": "-- edited", "V8_next.sql": ""})

    scripts = shell.json("List", 0, "list")["scripts"]

    assert {(it["version"], it["status"], it["file"]) for it in scripts} == {
        (2, "baseline", "V2_script.sql"),
        (3, "out-of-order", "V3_late.sql"),
        (4, "changed", "V4_script.sql"),
        (5, "missing", None),
        (6, "unfinished", "V6_script.sql"),
        (7, "failed", "V7_script.sql"),
        (8, "pending", "V8_next.sql"),
        (None, "applied", "R_view.sql"),
    }
    last = shell.json("List", 0, "list", "-n", "1")
    assert ([it["name"] for it in last["scripts"]], last["total"]) == (["view"], 8)


def list_is_refused(shell: Shell) -> None:
    shell.fails("ConfigError", 2, "list")
    shell.write({"V 1.sql": ""})
    shell.fails("ValidationError", 2, "list")
    shell.write(USERS)
    (shell.folder / "V 1.sql").unlink()
    shell.fails("DatabaseUnreachableError", 7, "list", "--url", NOWHERE)


def validate(shell: Shell) -> None:
    shell.write(USERS)
    assert shell.json("Validation", 0, "validate")["problems"] == []
    assert shell.json("Validation", 0, "validate", "--database")["problems"] == []
    shell.json("Run", 0, "migrate")

    shell.write({"V1_users.up.sql": "SELECT 2;", "V2_open.sql": "SELECT 1;\nCOMMIT;\n"})

    [found] = shell.json("Validation", 2, "validate")["problems"]
    assert (found["file"], found["line"]) == ("V2_open.sql", 2)
    both = shell.json("Validation", 2, "validate", "--database")["problems"]
    assert {it["file"] for it in both} == {"V1_users.up.sql", "V2_open.sql"}
    shell.fails("ConfigError", 2, "validate", "--folder", "nowhere")
    shell.fails("DatabaseUnreachableError", 7, "validate", "--database", "--url", NOWHERE)


def new(shell: Shell) -> None:
    files = shell.json("New", 0, "new", "Add users")["files"]
    [script] = shell.json("New", 0, "new", "Fill users", "--python")["files"]

    assert [Path(file).name.partition("_")[2] for file in files] == [
        "Add_users.up.sql",
        "Add_users.down.sql",
    ]
    assert script.endswith("_Fill_users.py")
    assert all(Path(file).is_file() for file in (*files, script))
    assert shell.fails("ConfigError", 2, "new", "!")["error"]["key"] == "name"
    shell.fails("ConfigError", 2, "new", "users", "--sql", "--python")


def baseline(shell: Shell) -> None:
    shell.write(USERS)
    for recorded in (True, False):
        document = shell.json("Baseline", 0, "baseline", "1")
        assert document == {"format": 1, "baseline": 1, "recorded": recorded}

    assert shell.fails("ConfigError", 2, "baseline", "2")["error"]["key"] == "version"
    shell.fails("DatabaseUnreachableError", 7, "baseline", "1", "--url", NOWHERE)


def repair(shell: Shell) -> None:
    """Of scripts outside a transaction: failed, without the lock, interrupted, repeatable."""
    shell.write({**USERS, "V2_outside.sql": OUTSIDE})
    shell.fails("MigrationError", 3, "migrate", "--no-lock")
    settled = shell.json("Settled", 0, "repair", "2", "--retry")["settled"]
    assert settled == {"version": 2, "name": "outside", "found": "failed", "recorded": "retry"}

    shell.query("DROP TABLE half")
    error = shell.fails("MigrationError", 3, "migrate")["error"]
    assert error["rolled_back"] is False
    shell.query(
        "UPDATE schema_version SET status = 'started', note = NULL, noted_at = NULL "
        "WHERE version = 2"
    )
    settled = shell.json("Settled", 0, "repair", "2", "--applied")["settled"]
    assert (settled["found"], settled["recorded"]) == ("started", "applied")

    shell.write({"R_outside.sql": "-- msr: no-transaction\nSELECT nothing;\n"})
    shell.fails("MigrationError", 3, "migrate")
    settled = shell.json("Settled", 0, "repair", "R_outside.sql", "--applied")["settled"]
    assert (settled["version"], settled["name"]) == (None, "outside")
    for status in ("reverting", "revert-failed"):
        shell.query(f"UPDATE schema_version SET status = '{status}' WHERE version = 2")
        assert shell.json("Settled", 0, "repair", "2", "--applied")["settled"]["found"] == status


def repair_of_edits(shell: Shell) -> None:
    shell.write({**USERS, "V2_more.sql": "CREATE TABLE more (id INTEGER);"})
    shell.json("Run", 0, "migrate")
    assert shell.json("Accepted", 0, "repair", "--yes") == {"format": 1, "repaired": []}

    shell.query("UPDATE schema_version SET script = NULL WHERE version = 2")
    for script in ("V1_users.up.sql", "V2_more.sql"):
        with (shell.folder / script).open("a") as file:
            file.write("\n-- edited\n")

    shown, not_kept = shell.json("Accepted", 0, "repair", "--yes")["repaired"]
    assert (shown["version"], shown["script"]) == (1, "V1_users.up.sql")
    assert "+-- edited" in shown["difference"]
    assert (not_kept["version"], not_kept["difference"]) == (2, None)


def repair_is_refused(shell: Shell) -> None:
    shell.write(USERS)
    shell.json("Run", 0, "migrate")
    assert shell.fails("ConfigError", 2, "repair")["error"]["source"] == "--json"
    shell.fails("ConfigError", 2, "repair", "--retry")
    shell.fails("ConfigError", 2, "repair", "1", "--applied")
    shell.fails("ConfigError", 2, "repair", "1", "--applied", "--retry")


def lock_status(shell: Shell) -> None:
    shell.write(USERS)
    assert shell.json("LockStatus", 0, "lock:status")["token"] is None
    shell.json("Run", 0, "migrate")
    lock = shell.json("LockStatus", 0, "lock:status")
    assert (lock["is_locked"], lock["token"], lock["holder"]) == (False, 1, None)

    with hold_lock(shell.url, running="alembic upgrade head") as holder:
        lock = shell.json("LockStatus", 0, "lock:status")
        assert (lock["locked_by"], lock["process_id"]) == (holder.locked_by, holder.pid)
        assert (lock["holder"], lock["running"]) == ("alive", "alembic upgrade head")
        holder.kill()  # the server may take a moment to end its session
        wait_until(lambda: shell.json("LockStatus", 0, "lock:status")["holder"] == "gone")
        assert shell.json("LockStatus", 0, "lock:status")["is_locked"] is True

    error = shell.fails("DatabaseUnreachableError", 1, "lock:status", "--url", NOWHERE)["error"]
    assert NOWHERE in error["message"]


def lock_release(shell: Shell) -> None:
    command = ("lock:release", "--force", "--yes")
    assert shell.json("Release", 0, *command) == {"format": 1, "released": None}
    for reason in (None, "stuck"):
        with hold_lock(shell.url) as holder:
            why = () if reason is None else ("--reason", reason)
            released = shell.json("Release", 0, *command, *why)["released"]
            assert (released["token"], released["is_locked"]) == (holder.token, True)
        lock = shell.json("LockStatus", 0, "lock:status")
        assert lock["forced_release"]["reason"] == reason
        assert lock["forced_release"]["token"] == holder.token

    shell.fails("LockError", 1, "lock:release")
    assert shell.fails("ConfigError", 2, "lock:release", "--force")["error"]["source"] == "--json"
    shell.fails("DatabaseUnreachableError", 1, *command, "--url", NOWHERE)


def locked_by_another(shell: Shell) -> None:
    """Who only looks does not mind; who would change anything says who has the lock."""
    shell.write(USERS)
    with hold_lock(shell.url) as holder:
        failures = [shell.fails("LockHeldError", 8, "baseline", "1", "--no-wait")]
        failures.append(shell.fails("LockHeldError", 8, "migrate", "--no-wait"))
        assert failures[-1]["result"]["pending_before"] == 1
        for failure in failures:
            assert failure["error"]["status"]["locked_by"] == holder.locked_by
            assert failure["result"]["executed"] == []
        assert len(shell.json("Plan", 0, "migrate", "--dry-run")["plan"]) == 1
        shell.json("List", 0, "list")
        shell.json("Validation", 0, "validate", "--database")
        holder.release()
    shell.json("Run", 0, "migrate")
    shell.write({"V1_users.up.sql": "-- edited\n"})
    with hold_lock(shell.url):
        shell.fails("LockHeldError", 8, "down", "0", "--no-wait")
        shell.fails("LockHeldError", 8, "repair", "--yes", "--no-wait")


SCENARIOS = (
    migrate,
    migrate_fails,
    migrate_is_refused,
    migrate_is_interrupted,
    migrate_without_a_driver,
    down,
    down_fails,
    dry_run,
    dry_run_is_refused,
    list_,
    list_is_refused,
    validate,
    new,
    baseline,
    repair,
    repair_of_edits,
    repair_is_refused,
    lock_status,
    lock_release,
    locked_by_another,
)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_documents(scenario: Callable[[Shell], None], url: str, folder: Path) -> None:
    """Every document that the installed command prints is as the schema says."""
    scenario(Shell(url, folder))


def test_not_configured(without_locking: str, url: str, folder: Path) -> None:
    """A handler without a locking service: no lock to show, and none to release."""
    shell = Shell(url, folder)
    document = shell.json("NotConfigured", 0, "lock:status", "--executor", without_locking)
    assert document == {"format": 1, "configured": False}
    shell.fails("LockError", 1, "lock:release", "--force", "--yes", "--executor", without_locking)


@pytest.mark.parametrize(
    "arguments", [["list", "--bogus"], ["migrate", "--steps", "none"], ["baseline"], ["bogus"]]
)
def test_usage_errors_are_no_documents(arguments: list[str]) -> None:
    """Who calls it wrongly is told so in one line, exit 2, and stdout has nothing to be parsed."""
    result = run_msr(*arguments, "--json")

    assert (result.exit_code, result.stdout) == (2, "")
    assert re.fullmatch(r"✗ Error: .+ \(see msr.* --help\)\n", result.stderr)


# The schema itself.


def test_it_is_a_schema() -> None:
    """It is valid by its own standard, and has the version that the program prints."""
    Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == Draft202012Validator.META_SCHEMA["$id"]
    assert DEFINITIONS["Format"]["const"] == FORMAT
    assert SCHEMA["$id"].endswith(f":{FORMAT}")


def test_it_names_every_command() -> None:
    """Whoever looks for a command finds the definition of what it prints, and no other command."""
    descriptions = " ".join(DEFINITIONS[name]["description"] for name in DOCUMENTS)
    commands = {command.name for command in app.registered_commands if not command.hidden}
    assert set(re.findall(r"`msr ([a-z:]+)", descriptions)) == commands


def test_it_leaves_nothing_open() -> None:
    """Each object has the keys that are named and no others, all of them; an error may have more.

    The keys of an error are told by its class, so they are no `type: object` of their own.
    """
    for name, definition in DEFINITIONS.items():
        if definition.get("type") != "object":
            continue
        optional = {key for owner, key in OPTIONAL if owner == name}
        if name == "Error":
            assert "additionalProperties" not in definition
        else:
            assert definition["additionalProperties"] is False
            assert set(definition["required"]) == set(definition["properties"]) - optional


@pytest.mark.parametrize("name", DOCUMENTS)
def test_each_document_carries_the_version(name: str) -> None:
    """Of another format, or of none, nobody is told that this schema is theirs."""
    assert DEFINITIONS[name]["properties"]["format"] == {"$ref": "#/$defs/Format"}
    assert "format" in DEFINITIONS[name]["required"]
    assert not Draft202012Validator(DEFINITIONS["Format"]).is_valid(FORMAT + 1)


def narrowed() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every definition, key and alternative of the schema, with the schema that forbids it."""

    def without(path: list[str | int], value: object) -> dict[str, Any]:
        definitions = deepcopy(DEFINITIONS)
        target: Any = definitions
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value
        return definitions

    for name, definition in DEFINITIONS.items():
        yield name, without([name], {**definition, "not": {}})
        for key, values in definition.items():
            if key == "enum":
                for value in values:
                    left = [it for it in values if it != value]
                    yield f"{name}: {value}", without([name, key], left)
        for key, schema in definition.get("properties", {}).items():
            path: list[str | int] = [name, "properties", key]
            yield f"{name}.{key}", without(path, {**schema, "not": {}})
            for keyword in ("type", "enum", "anyOf"):
                values = schema.get(keyword)
                for value in values if isinstance(values, list) else []:
                    left = [it for it in values if it != value]
                    shown = value.get("$ref") or value.get("type") if keyword == "anyOf" else value
                    shown = "null" if shown is None else str(shown).removeprefix("#/$defs/")
                    yield f"{name}.{key}: {shown}", without([*path, keyword], left)


@on_postgres
@pytest.mark.timeout(180)  # it runs every scenario once more
def test_it_says_nothing_that_no_document_shows(url: str, folder: Path) -> None:
    """Each definition, key and alternative is that of a real document: else nothing tests it.

    On PostgreSQL, which knows of users, codes and hints.
    """
    shell = Shell(url, folder, run_here)
    for scenario in SCENARIOS:
        scenario(shell)
        shell.empty()
    # A locking service is missing in the process of an application, see test_not_configured.
    shell.printed.append(("NotConfigured", {"format": 1, "configured": False}))

    unseen = set()
    for what, definitions in narrowed():
        narrow = {
            name: Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": definitions})
            for name in DOCUMENTS
        }
        if all(narrow[name].is_valid(document) for name, document in shell.printed):
            unseen.add(what)

    assert unseen == set(UNSEEN)
