"""At a real terminal: a bar while scripts run, tables, colours; and how much `-q` and `-v` say."""

from __future__ import annotations

import re
import resource
import subprocess
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from pexpect import EOF

from tests.support.cli import MSR, PATIENCE, own_lines, run_msr, unstamped, write_scripts
from tests.support.databases import on_postgres, on_sqlite
from tests.support.holder import Gate, hold_lock
from tests.support.queries import query
from tests.support.terminal import at_a_terminal as at_any_terminal

FIRST = {"V1_first.sql": "CREATE TABLE first (id int);"}

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def at_a_terminal(
    *arguments: str, columns: int = 100, env: Mapping[str, str] | None = None
) -> AbstractContextManager[tuple[Any, subprocess.Popen[bytes]]]:
    """A command at a terminal of its own, of so many columns."""
    size = {"COLUMNS": str(columns), "LINES": "40", "TERM": "xterm-256color"}
    return at_any_terminal(*arguments, env={**size, **(env or {})})


def shown(*arguments: str, **options: Any) -> tuple[int, str]:
    """The exit code, and all that the terminal was sent."""
    with at_a_terminal(*arguments, **options) as (terminal, process):
        terminal.expect_exact(EOF)
        return process.wait(PATIENCE), terminal.before.replace("\r\n", "\n")


def plain(text: str) -> str:
    return ESCAPE.sub("", text).replace("\r", "\n")


@on_sqlite
def test_bar(url: str, folder: Path, gate: Gate) -> None:
    """The script and its number, its own progress below; what is done stays on the screen."""
    counting = "async def up(db, context):\n    context.progress(40, 100, 'rows')\n"
    script = gate.script().replace(
        "import asyncio", f"{counting}    await wait()\n\nimport asyncio"
    )
    script = script.replace("async def up(db):", "async def wait():")
    write_scripts(folder, {**FIRST, "V2_slow.py": script, "V3_more.sql": "SELECT 1;"})

    with at_a_terminal("migrate") as (terminal, process):
        terminal.expect_exact("Applied V1_first.sql")
        terminal.expect_exact("1/3")
        terminal.expect_exact("V2_slow.py")
        terminal.expect_exact("40/100")
        terminal.expect_exact("V2_slow.py: 40 of 100 rows")
        gate.open()
        terminal.expect_exact(EOF)
        text = plain(terminal.before)
        assert process.wait(PATIENCE) == 0

    lines = [line for line in text.splitlines() if line.strip()]
    assert "Applied V3_more.sql (" in text
    assert lines[-1].startswith("✓ 3 scripts applied in ")
    assert not any(re.match(r"\d{4}-", line) for line in lines), "times are for logs"


@on_sqlite
def test_waiting(url: str, folder: Path) -> None:
    """While it waits, the bar says for whom and what they do; then it goes on."""
    write_scripts(folder, FIRST)
    with (
        hold_lock(url, running="a backup") as holder,
        at_a_terminal("migrate", columns=200) as (terminal, process),
    ):
        terminal.expect_exact(f"held by {holder.locked_by}, running a backup")
        assert holder.release() == 0
        terminal.expect_exact("Applied V1_first.sql")
        terminal.expect_exact(EOF)
        assert process.wait(PATIENCE) == 0


@on_sqlite
def test_ctrl_c_leaves_a_whole_terminal(url: str, folder: Path, gate: Gate) -> None:
    """Interrupted under the bar: the cursor is back, and the last line says what happened."""
    write_scripts(folder, {"V1_slow.py": gate.script()})
    with at_a_terminal("migrate") as (terminal, process):
        gate.wait()
        terminal.send("\x03")
        terminal.expect_exact(EOF)
        assert process.wait(PATIENCE) == 130
        assert "\x1b[?25h" in terminal.before
        said = [line for line in plain(terminal.before).splitlines() if line.strip()]
        assert said[-1].startswith("✗ Error: interrupted by SIGINT")


@on_sqlite
@pytest.mark.parametrize("columns", [100, 70])
def test_table(migrated_url: str, folder: Path, columns: int) -> None:
    """The list is a table, with the status in colour, and nothing is cut off in a narrow one."""
    write_scripts(folder, {"V2_with_quite_a_long_name.sql": "SELECT 1;"})

    code, text = shown("list", columns=columns)

    assert code == 0
    assert re.search(r"\x1b\[32mapplied", text)
    assert re.search(r"\x1b\[33mpending", text)
    assert "with_quite_a_long_name" in re.sub(r"\s", "", plain(text))
    assert plain(text).endswith("2 scripts: 1 applied, 1 pending\n")


@on_postgres
@pytest.mark.parametrize(
    ("columns", "headers"),
    [
        (80, "Version Status Applied at Script"),
        (120, "Version Status Applied at Duration Script By"),
    ],
)
def test_what_a_narrow_table_spares(
    migrated_url: str, folder: Path, columns: int, headers: str
) -> None:
    """Names stay whole as long as there is something less important to leave away."""
    name = "V20261125151545_add_orders.sql"
    write_scripts(folder, {name: "CREATE TABLE orders (id int);"})
    assert run_msr("migrate").exit_code == 0

    _, text = shown("list", columns=columns)

    assert " ".join(plain(text).split("\n")[0].split()) == headers
    assert name in text


@on_sqlite
def test_no_color(migrated_url: str) -> None:
    """NO_COLOR is obeyed."""
    _, text = shown("list", env={"NO_COLOR": "1"})
    assert "\x1b[3" not in text
    assert "V1_first.sql" in text


@on_sqlite
def test_nothing_to_do_shows_no_bar(migrated_url: str) -> None:
    """Then there is nothing to draw."""
    assert shown("migrate") == (0, "✓ Nothing to do: 1 script applied already\n")


@on_sqlite
def test_json_at_a_terminal(url: str, folder: Path) -> None:
    """The document stands alone there as well."""
    write_scripts(folder, FIRST)
    code, text = shown("migrate", "--json")
    assert (code, text[:12], text.count("\n")) == (0, '{"format": 1', 1)


def test_quiet(url: str, folder: Path) -> None:
    """-q leaves success to the exit code, and keeps errors and what was asked for."""
    write_scripts(folder, FIRST)

    migrated = run_msr("migrate", "-q")
    listed = run_msr("list", "--quiet")
    refused = run_msr("down", "0", "-q")

    assert (migrated.exit_code, migrated.stdout, migrated.stderr) == (0, "", "")
    assert "V1_first.sql" in listed.stdout
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "has no way down" in refused.stderr


def test_quiet_while_it_waits(url: str, folder: Path) -> None:
    """-q does not say for whom it waits, only that the wait is over."""
    write_scripts(folder, FIRST)
    with hold_lock(url):
        result = run_msr("migrate", "-q", "--wait", "0.3")
    assert result.exit_code == 8
    assert own_lines(result.stderr)[0].startswith("✗ Error: another process holds")


def test_verbose(url: str, folder: Path) -> None:
    """-v tells of the lock and of each script's start; the list has the token and notes."""
    write_scripts(folder, FIRST)

    result = run_msr("migrate", "-v")
    query(url, "UPDATE schema_version SET note = 'looked at'")
    listed = run_msr("list", "--verbose").stdout
    brief = run_msr("list").stdout

    lines = unstamped(result.stdout).splitlines()
    assert re.fullmatch(r"Got the migration lock, token 1, after \S+ m?s", lines[0])
    assert lines[1] == "Running V1_first.sql (1 of 1)"
    assert lines[2].startswith("Applied V1_first.sql")
    assert lines[3] == "Released the migration lock, token 1"
    assert "looked at" in listed
    assert "Note" in listed
    assert "looked at" not in brief


@on_sqlite
def test_quiet_and_verbose(url: str, folder: Path) -> None:
    """Both is a contradiction."""
    result = run_msr("list", "-q", "-v")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "✗ Error: --quiet: contradicts --verbose\n"


def test_progress_in_a_log(url: str, folder: Path) -> None:
    """Elsewhere a script's progress is a line with its time, now and then."""
    script = (
        "async def up(db, context):\n    for n in range(500): context.progress(n, 500, 'rows')\n"
    )
    write_scripts(folder, {"V1_fill.py": script})

    result = run_msr("migrate")

    assert "Z V1_fill.py: 0 of 500 rows\n" in result.stdout
    assert result.stdout.count(" of 500 rows") < 5


def test_last_ones(url: str, folder: Path) -> None:
    """-n shows the newest so many and counts all."""
    write_scripts(folder, {f"V{n}_x.sql": "SELECT 1;" for n in range(1, 30)})

    result = run_msr("list", "-n", "3")

    assert [line.split()[0] for line in result.stdout.splitlines()[1:4]] == ["27", "28", "29"]
    assert result.stdout.endswith("29 scripts: 29 pending (26 older not shown)\n")
    assert run_msr("list", "-n", "0").exit_code == 2


@pytest.mark.alone
def test_a_long_list_is_quick(url: str, folder: Path) -> None:
    """A thousand rows take little more than what it takes to start, also as a table.

    What counts is the work of the processor: how long the machine keeps a process waiting for it
    says nothing, and neither does how fast it is.
    """
    write_scripts(folder, {f"V{n}_x.sql": "SELECT 1;" for n in range(1, 1001)})
    assert run_msr("migrate", "1").exit_code == 0
    row = "'x', 'c', 'applied', '2025-01-02T03:04:05Z'"
    rows = ", ".join(f"({version}, {row})" for version in range(2, 1001))
    columns = "(version, name, checksum, status, started_at)"
    query(url, f"INSERT INTO schema_version {columns} VALUES {rows}")

    def work(run: Any, *arguments: str) -> float:
        """Of the processes that are children of this one, unlike those of `run_msr`."""
        took = []
        for _ in range(3):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            run(*arguments)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        return min(took)

    def piped(*arguments: str) -> None:
        subprocess.run([MSR, *arguments], stdout=subprocess.PIPE, check=True)

    start = work(piped, "--version")
    assert work(piped, "list") < 5 * start
    assert work(shown, "list") < 10 * start
