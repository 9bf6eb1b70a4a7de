"""`msr lock:release`: the five outcomes of the page, who may answer how, and what is left alone."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from pexpect import EOF

from tests.support.cli import PATIENCE, Result, run_msr, start_msr, wait_until, write_scripts
from tests.support.databases import on_postgres, on_sqlite
from tests.support.dump import dump
from tests.support.holder import LOST, Gate, hold_lock
from tests.support.queries import query
from tests.support.rig import Rig, is_asleep
from tests.support.terminal import at_a_terminal

RULE = "──────────────────────────────────────────────────────"

WARNING = f"""
⚠️  WARNING: Force releasing migration lock
{RULE}
Lock held by: macbook-pro-12345-a1b2c3d4-e5f6-7890-abcd
Locked at: 2025-12-18T14:32:10.123Z
Expires at: 2999-12-18T14:42:10.123Z
{RULE}

Releasing this lock while a migration is running could cause:
  • Race conditions
  • Corrupted migration state
  • Data loss

Only proceed if you are CERTAIN the migration process has crashed.

"""

PROMPT = "Are you sure you want to release this lock? (y/N): "
CANCELLED = "\n✓ Operation cancelled\n"
RELEASED = "\n✓ Lock forcibly released\nYou can now run migrations again.\n"
NOTHING = "\n✓ No lock to release\nThe lock is already released or was never acquired.\n"

NO_FORCE = "✗ Error: --force flag is required for safety\n"
NO_SERVICE = (
    "✗ Error: Locking service is not available in your database handler. "
    "See documentation for implementing LockingService.\n"
)
CHANGED = (
    "✗ Error: The lock changed hands meanwhile; nothing was released. "
    "Look again with: msr lock:status\n"
)


def release(*arguments: str, answer: str | None = None) -> Result:
    """`msr lock:release --force` with these arguments."""
    return run_msr("lock:release", "--force", *arguments, input=answer)


def lock_row(url: str, columns: str = "locked_by") -> Any:
    """Columns of the one lock there is."""
    [row] = query(url, f"SELECT {columns} FROM migration_locks")
    return row[0] if "," not in columns else row


@pytest.mark.parametrize(
    "nowhere", ["postgresql://user@192.0.2.1/app", "sqlite:///no/such/folder/app.db", ""]
)
def test_without_force(nowhere: str) -> None:
    """Without --force the page's error at once: no host is asked, not even a URL is needed."""
    url = ["--url", nowhere] if nowhere else []

    result = run_msr("lock:release", *url, "--yes")

    assert result == Result(1, "", NO_FORCE)


def test_released(page_url: str) -> None:
    """`echo y |` answers the question: the warning, the prompt and the result are the page's."""
    result = release(answer="y\n")

    assert result == Result(0, f"{WARNING}{PROMPT}\n{RELEASED}", "")
    assert lock_row(page_url) is None


@pytest.mark.parametrize("answer", ["n\n", "\n"])
def test_cancelled(page_url: str, answer: str) -> None:
    """Any other answer, an empty line included, cancels: exit 0 and nothing has changed."""
    before = dump(page_url)

    result = release(answer=answer)

    assert result == Result(0, f"{WARNING}{PROMPT}\n{CANCELLED}", "")
    assert dump(page_url) == before


def test_end_of_input(page_url: str) -> None:
    """No answer at all is an error, exit 1, that names --yes; nothing has changed."""
    before = dump(page_url)

    result = release()

    assert (result.exit_code, result.stdout) == (1, f"{WARNING}{PROMPT}\n")
    assert result.stderr.startswith("✗ Error: no answer, so nothing was released")
    assert "--yes" in result.stderr
    assert result.stderr.count("\n") == 1
    assert dump(page_url) == before


def test_yes(page_url: str) -> None:
    """--yes shows the warning and asks nothing."""
    result = release("--yes")

    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"{WARNING.rstrip()}\n{RELEASED}"
    assert lock_row(page_url) is None


@on_sqlite
@pytest.mark.parametrize(("flags", "answer"), [(["-f", "-y"], None), (["-f"], "YES")])
def test_other_ways_to_say_yes(page_url: str, flags: list[str], answer: str | None) -> None:
    """The short options, and the whole word in capitals."""
    assert run_msr("lock:release", *flags, input=answer).stdout.endswith(RELEASED)
    assert lock_row(page_url) is None


def test_nothing_to_release(url: str, folder: Path) -> None:
    """Nothing is held: exit 0 without a question, and where nothing was, nothing is created."""
    before = dump(url)

    assert release() == Result(0, NOTHING, "")
    assert dump(url) == before

    write_scripts(folder, {"V1_first.sql": "CREATE TABLE first (id int);"})
    assert run_msr("migrate").exit_code == 0
    before = dump(url)
    assert release("--reason", "for nothing") == Result(0, NOTHING, "")
    assert dump(url) == before


def test_not_configured(without_locking: str) -> None:
    """A handler without a locking service has nothing to release, which is an error."""
    result = release("--yes", "--executor", without_locking)

    assert result == Result(1, "", NO_SERVICE)


def test_reason(page_url: str) -> None:
    """--reason stays on the row with the time, the operator and the token, and is shown."""
    assert release("--yes", "--reason", "host was replaced").exit_code == 0

    token, *kept = lock_row(page_url, "token, release_reason, released_by, released_token")
    assert kept[0] == "host was replaced"
    assert re.fullmatch(r".+@.+", kept[1])
    assert kept[2] == 1
    assert token > 1
    shown = run_msr("lock:status").stdout
    assert shown.startswith("\nLock Status: UNLOCKED\nNo migration is currently running.\n")
    assert re.search(
        rf"\nLast forced release: 20\S+Z by {re.escape(kept[1])}: host was replaced\n", shown
    )


def test_json(page_url: str) -> None:
    """--json prints one document: what was released, then null; no text and no prompt in it."""
    released = release("--json", "--yes", "--reason", "stuck")
    nothing = release("--json", "--yes")

    document = json.loads(released.stdout)["released"]
    assert (released.exit_code, released.stderr) == (0, "")
    assert document["locked_by"] == "macbook-pro-12345-a1b2c3d4-e5f6-7890-abcd"
    assert document["locked_at"] == "2025-12-18T14:32:10.123Z"
    assert document["token"] == 1
    assert (nothing.exit_code, json.loads(nothing.stdout)) == (0, {"format": 1, "released": None})


@on_sqlite
def test_json_cannot_ask(page_url: str) -> None:
    """--json without --yes is a wrong use, exit 2, even where an answer stands ready."""
    before = dump(page_url)

    result = release("--json", answer="y\n")

    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["type"] == "ConfigError"
    assert result.stderr == "✗ Error: --json: cannot ask: add --yes\n"
    assert dump(page_url) == before


def test_expired(page_url: str) -> None:
    """An expired lock must, and can, be released by hand."""
    query(page_url, "UPDATE migration_locks SET expires_at = '2025-12-18T14:42:10.123Z'")

    result = release("--yes")

    assert result.exit_code == 0
    assert "\nExpires at: 2025-12-18T14:42:10.123Z\n" in result.stdout
    assert result.stdout.endswith(RELEASED)
    assert lock_row(page_url) is None


def test_holder_is_gone(url: str) -> None:
    """The lock of a process that was killed can be released."""
    with hold_lock(url) as holder:
        holder.kill()
        assert release("--yes").stdout.endswith(RELEASED)

    assert lock_row(url) is None


def test_holder_is_told(url: str) -> None:
    """A living holder loses the lock: its work ends in LockLostError."""
    with hold_lock(url) as holder:
        assert release("--yes").stdout.endswith(RELEASED)

        assert holder.process.wait(PATIENCE) == LOST


@on_postgres
def test_postgres_holder_is_told_at_once(url: str) -> None:
    """PostgreSQL announces it: a holder need not wait for its next renewal, here minutes later."""
    rig = Rig(bounds={"msr.locking.LONGEST_HEARTBEAT": 600.0})
    with hold_lock(url, rig=rig) as holder:
        wait_until(lambda: lock_row(url, "renewed_at > locked_at"))  # it listens before
        assert release("--yes").stdout.endswith(RELEASED)

        assert holder.process.wait(PATIENCE) == LOST


def read_until_asked(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    text = ""
    while not text.endswith(PROMPT):
        read = process.stdout.read(1)
        assert read, f"ended without asking: {text}"
        text += read


def test_lock_changes_hands_while_the_question_stands(url: str) -> None:
    """The answer is about the lock that was shown: its successor keeps what it holds."""
    with hold_lock(url) as first:
        command = start_msr("lock:release", "--force")
        read_until_asked(command)
        assert first.release() == 0
        with hold_lock(url) as second:
            _, stderr = command.communicate("y\n", timeout=PATIENCE)

            assert (command.returncode, stderr) == (1, CHANGED)
            assert lock_row(url) == second.locked_by
            assert second.release() == 0


def test_lock_is_released_while_the_question_stands(url: str) -> None:
    """A holder that finishes before the answer leaves nothing to release."""
    with hold_lock(url) as holder:
        command = start_msr("lock:release", "--force")
        read_until_asked(command)
        assert holder.release() == 0

        stdout, stderr = command.communicate("y\n", timeout=PATIENCE)

    assert (command.returncode, stdout, stderr) == (0, f"\n{NOTHING}", "")


def press(key: str) -> tuple[int, str]:
    """Press a key at the prompt: the exit code, and what came after the prompt."""
    with at_a_terminal("lock:release", "--force") as (terminal, process):
        terminal.expect_exact(PROMPT)
        assert terminal.before.replace("\r\n", "\n") == WARNING
        assert terminal.buffer == "", "the cursor waits behind the prompt"
        # A signal between the prompt and the reading is seen only when the reading is over.
        wait_until(lambda: is_asleep(process.pid))
        terminal.send(key)
        terminal.expect_exact(EOF)
        return process.wait(PATIENCE), terminal.before.replace("\r\n", "\n")


def test_terminal(page_url: str) -> None:
    """At a terminal the prompt is on the last line, and y releases the lock."""
    assert press("y\r") == (0, f"y\n{RELEASED}")
    assert lock_row(page_url) is None


@on_sqlite
@pytest.mark.parametrize(
    ("key", "exit_code", "shown"),
    [
        ("n\r", 0, f"n\n{CANCELLED}"),
        ("\r", 0, f"\n{CANCELLED}"),
        ("\x04", 1, "\n✗ Error: no answer, so nothing was released"),
        ("\x03", 130, "^C\n✗ Error: interrupted by SIGINT: nothing was released"),
    ],
    ids=["n", "Enter", "Ctrl-D", "Ctrl-C"],
)
def test_terminal_without_yes(page_url: str, key: str, exit_code: int, shown: str) -> None:
    """Every other key changes nothing, and what follows it starts on a new line."""
    before = dump(page_url)

    ended, text = press(key)

    assert ended == exit_code
    assert text.startswith(shown)
    assert dump(page_url) == before


class TestTerminate:
    """--terminate, for a holder whose open transaction is in the way."""

    # What the fence of a commit does for a moment, this script does until it is let through.
    FENCE = "await db.execute('SELECT FROM migration_locks FOR KEY SHARE')"

    @on_postgres
    def test_postgres(self, url: str, folder: Path, gate: Gate) -> None:
        """It ends the holder's session, whose script is rolled back; without it nothing happens."""
        write_scripts(folder, {"V1_slow.py": gate.script(before=self.FENCE)})
        migration = start_msr("migrate")
        gate.wait()
        locked_by, session = lock_row(url, "locked_by, session")

        refused = release("--yes")

        assert refused.exit_code == 1
        assert refused.stderr.startswith("✗ Error: the lock's row is held by an open transaction")
        for part in (locked_by, f"session {session}", "V1_slow.py", "--terminate"):
            assert part in refused.stderr
        assert refused.stderr.count("\n") == 1
        assert lock_row(url) == locked_by

        released = release("--yes", "--terminate")

        assert (released.exit_code, released.stderr) == (0, "")
        assert released.stdout.endswith(RELEASED)
        sessions = f"SELECT pid FROM pg_stat_activity WHERE pid = {session}"
        wait_until(lambda: query(url, sessions) == [])
        assert migration.wait(PATIENCE) == 9
        assert query(url, "SELECT * FROM schema_version") == []
        assert lock_row(url) is None

    @on_sqlite
    def test_sqlite(self, url: str) -> None:
        """SQLite has no sessions: it is refused with the reason, and nothing is released."""
        with hold_lock(url) as holder:
            result = release("--yes", "--terminate")

            assert result.exit_code in (1, 2)
            assert "SQLite has no sessions to end" in result.stderr
            assert result.stderr.count("\n") == 1
            assert lock_row(url) == holder.locked_by


@on_sqlite
def test_sqlite_holder_inside_its_transaction(url: str, folder: Path, gate: Gate) -> None:
    """SQLite: a script that runs cannot be overtaken; the error names the process to end."""
    write_scripts(folder, {"V1_slow.py": gate.script()})
    migration = start_msr("migrate")
    gate.wait()

    refused = release("--yes")

    assert refused.exit_code == 1
    assert refused.stderr.startswith("✗ Error: the database is inside a transaction")
    assert f"end its process {migration.pid}" in refused.stderr
    assert "V1_slow.py (1 of 1)" in refused.stderr
    assert refused.stderr.count("\n") == 1
    gate.open()
    assert migration.wait(PATIENCE) == 0


@on_postgres
def test_postgres_holder_inside_its_transaction(url: str, folder: Path, gate: Gate) -> None:
    """PostgreSQL: a script that runs is overtaken, and what it did is rolled back, exit 9."""
    write_scripts(folder, {"V1_slow.py": gate.script("await db.execute('CREATE TABLE t ()')")})
    migration = start_msr("migrate")
    gate.wait()

    assert release("--yes").stdout.endswith(RELEASED)

    assert migration.wait(PATIENCE) == 9
    assert query(url, "SELECT to_regclass('t')") == [(None,)]


def test_row_deleted_by_hand(url: str, folder: Path, gate: Gate) -> None:
    """`DELETE FROM migration_locks`, the page's last resort: its former holder commits nothing."""
    scripts = {
        "V1_slow.py": gate.script(after="await db.execute('CREATE TABLE late (id int)')"),
    }
    if url.startswith("sqlite"):  # there nobody can write while a script runs: between two
        scripts = {"V1_slow.py": "transaction = False\n" + scripts["V1_slow.py"]}
    write_scripts(folder, scripts)
    migration = start_msr("migrate")
    gate.wait()
    query(url, "DELETE FROM migration_locks")
    gate.open()

    assert migration.wait(PATIENCE) == 9
    applied = query(url, "SELECT version FROM schema_version WHERE status = 'applied'")
    assert applied == []
    assert release() == Result(0, NOTHING, "")
