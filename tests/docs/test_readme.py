"""The README does what it says: its blocks are run, its tables are compared with the program.

Every ```console block is run, in order, in one folder. A line `$ command` is a command, a comment
`# exit 8` at its end is the exit code that it must have (else 0), and the lines below are what it
must print; names, times and durations may differ. A comment `<!-- ... -->` before a block names
the state that it is shown in, one of `STATES`.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import pytest

import msr
from msr_cli.running import EXIT_CODES
from tests.support.cli import PATIENCE, run_msr, start_msr, wait_until, write_scripts
from tests.support.queries import query

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")

PAGES = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    "tests/README.md",
)

BLOCK = re.compile(
    r"(?:^<!-- (?P<state>[^\n]*) -->\n)?^```(?P<language>\w+)\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
COMMAND = re.compile(r"^\$ (?P<command>.*?)(?:  # exit (?P<exit_code>\d+))?$", re.MULTILINE)

SLOW = {"V3_fill_in_totals.py": "import asyncio\nasync def up(db):\n    await asyncio.sleep(600)\n"}

VOLATILE = (
    (rf"\b{re.escape(socket.gethostname())}$", "web-1"),  # who applied it, in the last column
    (r"V20\d{12}_", "V<now>_"),
    (r"\d{4}-\d\d-\d\dT[\d:.]+Z", "<time>"),
    (r"\S+-\d+-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", "<holder>"),
    (r"Process ID: \d+", "Process ID: <pid>"),
    (r"by \S+@\S+:", "by <user>:"),
    (r"\d+(?:\.\d)? m?s\b", "<duration>"),
    (r"[ \t]+", " "),  # a column is as wide as its widest cell
    (r" $", ""),
)


class Command(NamedTuple):
    """A command of the README, with what it must print and how it must end."""

    line: str
    exit_code: int
    output: str


def blocks(language: str) -> Iterator[re.Match[str]]:
    return (block for block in BLOCK.finditer(README) if block["language"] == language)


def commands(body: str) -> list[Command]:
    found = list(COMMAND.finditer(body))
    ends = [match.start() for match in found[1:]] + [len(body)]
    return [
        Command(match["command"], int(match["exit_code"] or 0), body[match.end() + 1 : end])
        for match, end in zip(found, ends, strict=True)
    ]


def plain(output: str) -> str:
    for pattern, placeholder in VOLATILE:
        output = re.sub(pattern, placeholder, output, flags=re.MULTILINE)
    return output.strip("\n")


@contextmanager
def migration_running(folder: Path, *, killed: bool = False) -> Iterator[None]:
    """Another process is in the middle of a script, or has been killed there."""
    (script,) = SLOW
    write_scripts(folder / "migrations", SLOW)
    process = start_msr("migrate", cwd=folder)
    wait_until(lambda: f"Running: {script}" in run_msr("lock:status", cwd=folder).stdout)
    try:
        if killed:
            process.send_signal(signal.SIGKILL)
            process.wait()
        yield
    finally:
        process.kill()
        process.wait()
        (folder / "migrations" / script).unlink()


STATES: dict[str | None, Callable[[Path], AbstractContextManager[None]]] = {
    None: lambda folder: nullcontext(),
    "while a migration runs": migration_running,
    "after a migration was killed": lambda folder: migration_running(folder, killed=True),
}


def run_block(block: re.Match[str], folder: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for line, exit_code, output in commands(block["body"]):
        done = subprocess.run(
            line,
            shell=True,
            cwd=folder,
            env={**os.environ, "PATH": path, "PYTHONIOENCODING": "utf-8"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            timeout=PATIENCE,
        )
        assert (line, done.returncode) == (line, exit_code), done.stdout
        assert plain(done.stdout) == plain(output), line


@pytest.mark.timeout(180)  # some forty commands, one after the other
def test_console_blocks(tmp_path: Path) -> None:
    """Who follows the README sees what it shows."""
    found = list(blocks("console"))
    assert {block["state"] for block in found} == set(STATES), "a state that nothing is shown in"
    for block in found:
        with STATES[block["state"]](tmp_path):
            run_block(block, tmp_path)


def test_python_example(tmp_path: Path) -> None:
    """The example of the API runs as printed, on a database that has to be made first."""
    [example] = [block["body"] for block in blocks("python") if "asyncio.run" in block["body"]]
    write_scripts(tmp_path / "migrations", {"V1_users.sql": "CREATE TABLE users (id INTEGER);"})
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", example],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (done.returncode, done.stderr) == (0, "")
    told, first, *rest = done.stdout.splitlines()
    assert told == "1 of 1: V1_users.sql"
    assert first.startswith("1 1 ")
    assert rest == ["1 users applied", "None", "2", "[]"]


def test_python_script(tmp_path: Path) -> None:
    """The script in the README runs as printed, with the helper that it imports."""
    [script] = [block["body"] for block in blocks("python") if "context.progress" in block["body"]]
    write_scripts(
        tmp_path / "migrations",
        {
            "V1_users.sql": "CREATE TABLE users (id INTEGER, total INTEGER);"
            "INSERT INTO users (id) VALUES (1), (2);",
            "V2_totals.py": script,
            "helpers.py": "async def new_total(db, user):\n    return user * 10\n",
        },
    )
    url = f"sqlite:///{tmp_path}/app.db"
    done = run_msr("migrate", "--url", url, "--json", cwd=tmp_path)
    assert (done.exit_code, done.stderr) == (0, "")
    assert query(url, "SELECT total FROM users") == [(10,), (20,)]


def test_boot_hook_is_the_tested_one() -> None:
    """The boot hook in the README is part of the example file, word for word."""
    example = (ROOT / "examples/boot_hook.py").read_text(encoding="utf-8")
    [hook] = [block["body"] for block in blocks("python") if "lifespan" in block["body"]]
    assert hook in example


def test_configuration_file_is_valid(tmp_path: Path) -> None:
    """The TOML example is accepted, every key of it."""
    [example] = [block["body"] for block in blocks("toml")]
    (tmp_path / "msr.toml").write_text(example, encoding="utf-8")
    config = msr.load_config(directory=tmp_path, environ={})
    assert (config.url, config.locking.wait) == ("postgresql://app@db.example.com/app", 120)


def test_configuration_table() -> None:
    """Every setting is in the table, with its variable and default, and nothing else is."""
    rows = re.findall(r"^\| `([a-z_.]+)` \| `(MSR_[A-Z_]+)`[^|]*\| (?:`(.*?)`)? *\|", README, re.M)
    expected = []
    for prefix, settings in (("", msr.Config()), ("locking.", msr.LockingConfig())):
        for setting in fields(settings):
            value = getattr(settings, setting.name)
            if setting.name == "locking":
                continue
            key = prefix + setting.name
            default = "" if value is None else f"{value:g}" if type(value) is float else str(value)
            variable = f"MSR_{key.upper().replace('.', '_')}"
            expected.append((key, variable, default.lower()))
    assert sorted(rows) == sorted(expected)


def test_exit_codes() -> None:
    """The table has every exit code of the command, and no other."""
    section = README.partition("## Waiting and exit codes")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([\d, ]+) \|", section, re.MULTILINE)
    documented = {int(code) for row in rows for code in row.split(",")}
    assert documented == {0, 1, 130, 143} | {code for _, code in EXIT_CODES}


def test_every_test_file_is_explained() -> None:
    """The page of the tests names each of them."""
    folder = ROOT / "tests"
    page = (folder / "README.md").read_text(encoding="utf-8")
    files = {str(path.relative_to(folder)) for path in folder.glob("*/test_*.py")}
    assert files - set(re.findall(r"\]\(([^)#\s]+)\)", page)) == set()


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    """No page points to a file that is not there."""
    page = ROOT / name
    for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target
