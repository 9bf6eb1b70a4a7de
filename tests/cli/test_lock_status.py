"""`msr lock:status`: the three outcomes of the page, and what we know beyond it."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.support.cli import MSR, PATIENCE, Result, run_msr, start_msr, wait_until, write_scripts
from tests.support.dump import dump
from tests.support.holder import Gate, hold_lock
from tests.support.postgres import SECRET_PASSWORD, SECRET_USER, PostgresServer
from tests.support.queries import query
from tests.support.rig import Rig

UNLOCKED = """
Lock Status: UNLOCKED
No migration is currently running.
"""

LOCKED = """
Lock Status: LOCKED
Locked by: macbook-pro-12345-a1b2c3d4-e5f6-7890-abcd
Locked at: 2025-12-18T14:32:10.123Z
Expires at: 2999-12-18T14:42:10.123Z
Process ID: 12345

Another migration is currently running.
If you believe this is a stale lock, use: msr lock:release --force
"""

NOT_CONFIGURED = """
Lock Status: NOT CONFIGURED
Locking service is not available in your database handler.
See documentation for implementing LockingService.
"""

CHECK_LOCK_STATUS = """\
#!/bin/bash
# check-lock-status.sh
# Returns 0 if unlocked, 1 if locked

msr lock:status | grep -q "UNLOCKED"
exit $?
"""

ALERT_STALE_LOCK = """\
#!/bin/bash
# alert-stale-lock.sh
# Alert if lock is held longer than expected

OUTPUT=$(msr lock:status)

if echo "$OUTPUT" | grep -q "LOCKED"; then
  LOCKED_AT=$(echo "$OUTPUT" | grep "Locked at:" | cut -d: -f2-)
  # Calculate duration and alert if > threshold
  # (implementation depends on your alerting system)
fi
"""


def status() -> Result:
    """A status that could be had: exit 0, nothing on stderr."""
    result = run_msr("lock:status")
    assert result.exit_code == 0, result
    assert result.stderr == ""
    return result


def bash(script: str) -> subprocess.CompletedProcess[str]:
    """Run a script with the installed `msr` on its path."""
    path = f"{MSR.parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    return subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, env=environment, timeout=PATIENCE
    )


def test_nothing_was_ever_migrated(url: str) -> None:
    """A database without any table is unlocked, and looking at it creates nothing."""
    before = dump(url)

    assert status().stdout == UNLOCKED

    assert dump(url) == before


def test_unlocked(migrated_url: str) -> None:
    """A lock that was released is unlocked, and looking changes nothing."""
    before = dump(migrated_url)

    assert status().stdout == UNLOCKED

    assert dump(migrated_url) == before


def test_locked(page_url: str) -> None:
    """The page's text to the character; that its holder cannot be judged is said after it."""
    before = dump(page_url)

    text = status().stdout

    assert text == f"{LOCKED}\nHolder: unknown, nothing proves it alive or gone\n"
    assert dump(page_url) == before


def test_not_configured(without_locking: str) -> None:
    """A handler without a locking service is told apart, in the page's words, and is no error."""
    result = run_msr("lock:status", "--executor", without_locking)

    assert result == Result(0, NOT_CONFIGURED, "")
    result = run_msr("lock:status", "--executor", without_locking, "--json")
    assert result == Result(0, '{"format": 1, "configured": false}\n', "")


def test_real_holder(url: str) -> None:
    """A process that has the lock is shown with its id, its pid, that it lives and what it does."""
    with hold_lock(url, running="alembic upgrade head") as holder:
        lines = status().stdout.splitlines()

    assert lines[1:3] == ["Lock Status: LOCKED", f"Locked by: {holder.locked_by}"]
    moment = r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
    assert re.fullmatch(f"Locked at: {moment}", lines[3])
    assert re.fullmatch(f"Expires at: {moment}", lines[4])
    assert lines[5] == f"Process ID: {holder.pid}"
    assert lines[7] == "Another migration is currently running."
    assert lines[-2:] == ["Holder: alive", "Running: alembic upgrade head"]
    assert re.fullmatch(rf".+-{holder.pid}-[0-9a-f]{{8}}(-[0-9a-f]{{4}}){{3}}-[0-9a-f]{{12}}",
                        holder.locked_by)  # fmt: skip


def test_during_a_migration(url: str, folder: Path, gate: Gate) -> None:
    """While scripts run, the status names the script and which of how many it is."""
    write_scripts(folder, {"V1_first.sql": "CREATE TABLE first (id int);",
                           "V2_slow.py": gate.script()})  # fmt: skip
    migration = start_msr("migrate")
    gate.wait()

    # The heartbeat tells others which script it is, and its first beat comes after a second.
    wait_until(lambda: "\nHolder: alive\nRunning: V2_slow.py (2 of 2)\n" in status().stdout)

    gate.open()
    assert migration.wait(PATIENCE) == 0
    assert status().stdout == UNLOCKED


def test_json(page_url: str) -> None:
    """One document with every field, times as in the text, null for what is not so."""
    result = run_msr("lock:status", "--json")

    document = json.loads(result.stdout)
    assert document.pop("checked_at").endswith("Z")
    assert (result.exit_code, result.stderr) == (0, "")
    assert document == {
        "format": 1,
        "configured": True,
        "name": "default",
        "is_locked": True,
        "token": 1,
        "locked_by": "macbook-pro-12345-a1b2c3d4-e5f6-7890-abcd",
        "locked_at": "2025-12-18T14:32:10.123Z",
        "renewed_at": "2025-12-18T14:32:10.123Z",
        "expires_at": "2999-12-18T14:42:10.123Z",
        "process_id": 12345,
        "hostname": "macbook-pro",
        "is_expired": False,
        "holder": "unknown",
        "running": None,
        "forced_release": None,
        "obstacle": None,
    }


def test_expired(page_url: str) -> None:
    """An expired lock is still locked, with its dates; nothing is said to be running."""
    query(page_url, "UPDATE migration_locks SET expires_at = '2025-12-18T14:42:10.123Z'")

    text = status().stdout

    assert "\nLock Status: LOCKED\n" in text
    assert "\nExpires at: 2025-12-18T14:42:10.123Z\n" in text
    assert re.search(r"\nThis lock expired .+ ago: the next msr migrate takes it over\.\n", text)
    assert "Another migration is currently running" not in text
    assert "\nIf you believe this is a stale lock, use: msr lock:release --force\n" in text


def test_expired_while_the_holder_is_frozen(url: str) -> None:
    """An expired lock whose holder lives says both, and for how long it has been expired."""
    # A renewal that is on its way arrives, also when who sent it stands still.
    with hold_lock(url, rig=Rig(without=["heartbeat"])) as holder:
        holder.freeze()
        an_hour_ago = query(url, one_hour_ago(url))[0][0]
        query(url, f"UPDATE migration_locks SET expires_at = '{an_hour_ago}'")

        text = status().stdout

    assert re.search(r"\nThis lock expired 1:0\d:\d\d ago, but its holder still lives: ", text)
    assert "\nHolder: alive\n" in text
    assert "Another migration is currently running" not in text


def one_hour_ago(url: str) -> str:
    """A query for that time, as both databases take it."""
    if url.startswith("sqlite"):
        return "SELECT strftime('%Y-%m-%dT%H:%M:%fZ', 'now', '-1 hour')"
    return "SELECT (clock_timestamp() - interval '1 hour')::text"


def test_holder_is_gone(url: str, folder: Path) -> None:
    """After kill -9 the status says that the holder is gone, and the next migrate takes over."""
    write_scripts(folder, {"V1_first.sql": "CREATE TABLE first (id int);"})
    with hold_lock(url) as holder:
        holder.kill()

    wait_until(lambda: "\nHolder: gone, its session has ended\n" in status().stdout)
    text = status().stdout
    assert f"\nLocked by: {holder.locked_by}\n" in text
    assert "\nThe holder of this lock is gone: the next msr migrate takes it over.\n" in text
    assert "Another migration is currently running" not in text

    assert run_msr("migrate", "--no-wait").exit_code == 0
    assert status().stdout == UNLOCKED


def test_check_lock_status_script(page_url: str, tmp_path: Path) -> None:
    """The page's check-lock-status.sh, as printed, tells a held lock from a free one."""
    script = tmp_path / "check-lock-status.sh"
    script.write_text(CHECK_LOCK_STATUS)

    locked = bash("bash check-lock-status.sh")
    query(page_url, "DELETE FROM migration_locks")
    unlocked = bash("bash check-lock-status.sh")

    assert (locked.returncode, locked.stdout, locked.stderr) == (1, "", "")
    assert (unlocked.returncode, unlocked.stdout, unlocked.stderr) == (0, "", "")


def test_alert_stale_lock_script(page_url: str, tmp_path: Path) -> None:
    """The page's alert-stale-lock.sh, as printed, finds when the lock was taken."""
    (tmp_path / "alert-stale-lock.sh").write_text(ALERT_STALE_LOCK)

    done = bash('source alert-stale-lock.sh; echo "$LOCKED_AT"')

    assert (done.returncode, done.stdout, done.stderr) == (0, " 2025-12-18T14:32:10.123Z\n", "")


@pytest.mark.parametrize(
    ("nowhere", "reason"),
    [
        ("sqlite:///no/such/folder/app.db", "there is no folder"),
        ("postgresql://user@127.0.0.1:1/app", "Connect call failed"),
    ],
)
def test_unreachable(nowhere: str, reason: str) -> None:
    """A database that cannot be reached is exit 1 for this command, and stderr says why."""
    result = run_msr("lock:status", "--url", nowhere)

    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("✗ Error: cannot ")
    assert reason in result.stderr
    assert result.stderr.count("\n") == 1


class TestAnotherRole:
    """PostgreSQL: a role that has no more than a login."""

    @pytest.fixture
    def their_url(self, postgres_server: PostgresServer, postgres_url: str) -> str:
        query(postgres_url, "REVOKE CREATE ON SCHEMA public FROM PUBLIC")
        database = urlsplit(postgres_url).path.lstrip("/")
        return postgres_server.url(database, SECRET_USER, SECRET_PASSWORD)

    def test_without_any_privilege(self, their_url: str) -> None:
        """Where nothing was ever migrated, a role that may do nothing is told UNLOCKED."""
        assert run_msr("lock:status", "--url", their_url) == Result(0, UNLOCKED, "")

    def test_with_select_only(self, postgres_url: str, their_url: str) -> None:
        """SELECT on the lock's table is enough to see who holds it and that the holder lives."""
        with hold_lock(postgres_url) as holder:
            query(postgres_url, f"GRANT SELECT ON migration_locks TO {SECRET_USER}")
            result = run_msr("lock:status", "--url", their_url)

        assert (result.exit_code, result.stderr) == (0, "")
        assert f"\nLocked by: {holder.locked_by}\n" in result.stdout
        assert "\nHolder: alive\n" in result.stdout

    def test_without_select(self, postgres_url: str, their_url: str) -> None:
        """Where the lock's table cannot be read, the error names the missing privilege."""
        with hold_lock(postgres_url):
            result = run_msr("lock:status", "--url", their_url)

        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.startswith("✗ Error: permission denied for table migration_locks")
        assert "SELECT" in result.stderr
        assert result.stderr.count("\n") == 1


def test_words_of_a_holder_are_not_taken_for_ours(url: str) -> None:
    """The page's greps still work when somebody's own text looks like a line of ours."""
    with hold_lock(url, running="V9_mark_UNLOCKED_rows.sql\nLocked at: never"):
        status = run_msr("lock:status")

        assert "UNLOCKED" not in status.stdout
        assert status.stdout.count("Locked at:") == 1
        assert "V9_mark_unlocked_rows.sql" in status.stdout
