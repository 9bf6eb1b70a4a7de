"""What the commands print. The texts of the lock commands are those of the specification."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msr

__all__ = [
    "FORCE_REQUIRED",
    "NOTHING_TO_RELEASE",
    "NOT_CONFIGURED",
    "PROMPT",
    "RELEASED",
    "Progress",
    "as_json",
    "error_as_json",
    "lock_status",
    "migration_result",
    "one_line",
    "release_warning",
    "script_list",
]

FORCE_REQUIRED = "--force flag is required for safety"
NOTHING_TO_RELEASE = "✓ No lock to release\nThe lock is already released or was never acquired."
RELEASED = "✓ Lock forcibly released\nYou can now run migrations again."
PROMPT = "Are you sure you want to release this lock? (y/N): "
NOT_CONFIGURED = (
    "Lock Status: NOT CONFIGURED\n"
    "Locking service is not available in your database handler.\n"
    "See documentation for implementing LockingService."
)
RULE = "─" * 54

TELL_WAITING_EVERY = 10.0
"""Seconds between two lines about the same holder."""


def lock_status(status: msr.LockStatus | None) -> str:
    """The three outcomes of `lock:status`; what we know beyond the specification comes last."""
    if status is None:
        return NOT_CONFIGURED
    if not status.is_locked:
        lines = ["Lock Status: UNLOCKED", "No migration is currently running."]
    else:
        lines = [
            "Lock Status: LOCKED",
            f"Locked by: {status.locked_by}",
            f"Locked at: {_time(status.locked_at)}",
            f"Expires at: {_time(status.expires_at)}",
            f"Process ID: {status.process_id}",
            "",
            _judgement(status),
            "If you believe this is a stale lock, use: msr lock:release --force",
        ]
    return "\n".join(lines + _details(status))


def _judgement(status: msr.LockStatus) -> str:
    if status.is_expired:
        ago = _ago(status.checked_at, status.expires_at)
        if status.holder == "alive":
            return (
                f"This lock expired {ago} ago, but its holder still lives: "
                "the next msr migrate takes it over as soon as it can."
            )
        return f"This lock expired {ago} ago: the next msr migrate takes it over."
    if status.holder == "gone":
        return "The holder of this lock is gone: the next msr migrate takes it over."
    return "Another migration is currently running."


def _details(status: msr.LockStatus) -> list[str]:
    lines = []
    if status.holder is not None:
        proof = {
            "alive": "alive",
            "gone": "gone, its session has ended",
            "unknown": "unknown, nothing proves it alive or gone",
        }
        lines.append(f"Holder: {proof[status.holder]}")
    if status.running:
        lines.append(f"Running: {_quiet(status.running)}")
    if release := status.forced_release:
        why = f": {release.reason}" if release.reason else ""
        told = _quiet(f"{release.by}{why}")
        lines.append(f"Last forced release: {_time(release.at)} by {told}")
    return ["", *lines] if lines else []


def _quiet(text: str) -> str:
    """Somebody's own words, unable to be taken for one of our lines by a script that greps."""
    return re.sub(
        "UNLOCKED|LOCKED|Locked at:", lambda found: found[0].lower(), " ".join(text.split())
    )


def release_warning(status: msr.LockStatus) -> str:
    """What `lock:release --force` shows before it asks."""
    return "\n".join(
        [
            "⚠️  WARNING: Force releasing migration lock",
            RULE,
            f"Lock held by: {status.locked_by}",
            f"Locked at: {_time(status.locked_at)}",
            f"Expires at: {_time(status.expires_at)}",
            RULE,
            "",
            "Releasing this lock while a migration is running could cause:",
            "  • Race conditions",
            "  • Corrupted migration state",
            "  • Data loss",
            "",
            "Only proceed if you are CERTAIN the migration process has crashed.",
        ]
    )


def script_list(rows: Sequence[msr.ScriptStatus]) -> str:
    """A line per script, and a line that counts them."""
    table = [("Version", "Status", "Applied at", "Duration", "Script")]
    for row in rows:
        duration = "" if row.duration is None else _duration(row.duration)
        at = "" if row.started_at is None else _time(row.started_at)
        table.append((str(row.version), row.status, at, duration, row.file or f"({row.name})"))
    widths = [max(len(line[column]) for line in table) for column in range(4)]
    lines = [
        "  ".join(
            [*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[4]]
        )
        for line in table
    ]
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.status] = counts.get(row.status, 0) + 1
    summary = ", ".join(f"{count} {status}" for status, count in counts.items())
    return "\n".join([*lines, "", f"{_count(len(rows))}: {summary}"])


def migration_result(result: msr.MigrationResult) -> str:
    """The last line of a successful `migrate`."""
    if result.executed:
        meanwhile = result.pending_before - len(result.executed)
        others = f", {meanwhile} applied by another process meanwhile" if meanwhile else ""
        return f"✓ {_count(len(result.executed))} applied in {_duration(result.duration)}{others}"
    if result.followed:
        return f"✓ Nothing left to do: another process applied {_count(result.pending_before)}"
    return f"✓ Nothing to do: {_count(result.applied_before)} applied already"


class Progress:
    """A listener that turns events into lines: scripts on `out`, waiting on `err`."""

    def __init__(self, out: Any, err: Any) -> None:
        self.applied: list[str] = []
        self._out = out
        self._err = err
        self._told: tuple[object, float] | None = None

    def __call__(self, event: msr.Event) -> None:
        if isinstance(event, msr.ScriptApplied):
            self.applied.append(event.script)
            self._out(f"Applied {event.script} ({_duration(event.duration)})")
        elif isinstance(event, msr.WaitingForLock):
            self._waiting(event.status)

    def _waiting(self, status: msr.LockStatus) -> None:
        news = (status.locked_by, status.running, status.obstacle)
        now = time.monotonic()
        if self._told and self._told[0] == news and now - self._told[1] < TELL_WAITING_EVERY:
            return
        self._told = (news, now)
        if status.is_locked:
            doing = f", running {status.running}" if status.running else ""
            line = f"Waiting for the migration lock, held by {status.locked_by}{doing}"
        else:
            line = "Waiting for the migration lock, which is about to be free"
        self._err(f"{line}; {status.obstacle}" if status.obstacle else line)


def one_line(error: BaseException) -> str:
    """An error for people: one line, except that several problems get a line each."""
    if isinstance(error, msr.ValidationError) and len(error.problems) > 1:
        problems = "\n".join(f"  {problem}" for problem in error.problems)
        return f"{len(error.problems)} problems, nothing was run:\n{problems}"
    if not isinstance(error, msr.MsrError):
        text = f"unexpected {type(error).__name__}: {error} (add --debug to see where)"
    else:
        text = str(error)
    return " ".join(text.split())


def as_json(value: object) -> str:
    """One JSON document; times as in the text output, durations in seconds."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    return json.dumps(value, default=_plain, ensure_ascii=False)


def error_as_json(error: BaseException) -> str:
    """The error's class, its line, and everything it knows."""
    known = {
        key: value
        for key, value in vars(error).items()
        if not key.startswith("_") and key not in ("result", "args")
    }
    document: dict[str, object] = {
        "error": {"type": type(error).__name__, "message": one_line(error), **known}
    }
    if (result := getattr(error, "result", None)) is not None:
        document["result"] = result
    return as_json(document)


def _plain(value: object) -> object:
    if isinstance(value, datetime):
        return _time(value)
    if isinstance(value, Path):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return str(value)


def _time(value: datetime | None) -> str:
    if value is None:
        return "unknown"
    return value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def _ago(now: datetime | None, then: datetime | None) -> str:
    if now is None or then is None:
        return "some time"
    return str(timedelta(seconds=max(0, round((now - then).total_seconds()))))


def _duration(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _count(scripts: int) -> str:
    return "1 script" if scripts == 1 else f"{scripts} scripts"
