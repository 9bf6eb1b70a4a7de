"""What the commands print. The texts of the lock commands are those of the specification."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msr

__all__ = [
    "ACCEPT",
    "FORCE_REQUIRED",
    "FORMAT",
    "NOTHING_TO_RELEASE",
    "NOT_CONFIGURED",
    "PROMPT",
    "RELEASED",
    "Table",
    "as_json",
    "count",
    "difference",
    "document",
    "duration",
    "error_as_json",
    "excerpt",
    "finished",
    "lock_status",
    "migration_result",
    "one_line",
    "plan_table",
    "plan_text",
    "planned",
    "release_warning",
    "retried",
    "script_progress",
    "script_table",
    "settled",
    "waiting",
]

FORCE_REQUIRED = "--force flag is required for safety"
NOTHING_TO_RELEASE = "✓ No lock to release\nThe lock is already released or was never acquired."
RELEASED = "✓ Lock forcibly released\nYou can now run migrations again."
PROMPT = "Are you sure you want to release this lock? (y/N): "
ACCEPT = "Are these edits to be accepted as applied? They are recorded, not run. (y/N): "
NOT_CONFIGURED = (
    "Lock Status: NOT CONFIGURED\n"
    "Locking service is not available in your database handler.\n"
    "See documentation for implementing LockingService."
)
RULE = "─" * 54


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


Table = tuple[Sequence[str], Sequence[Sequence[str]], str]
"""Headers, rows of as many cells, and a line below."""


def script_table(
    rows: Sequence[msr.ScriptStatus], shown: Sequence[msr.ScriptStatus], verbose: bool, brief: bool
) -> Table:
    """A row for each script `shown`, and a line that counts them all; `brief`: times in seconds."""
    headers = ["Version", "Status", "Applied at", "Duration", "Script", "By"]
    if verbose:
        headers += ["Token", "Note"]
    cells = []
    for row in shown:
        line = [
            "R" if row.version is None else str(row.version),
            row.status,
            "" if row.started_at is None else _time(row.started_at)[: 19 if brief else None],
            "" if row.duration is None else duration(row.duration),
            row.file or f"({row.name})",
            _who(row),
        ]
        if verbose:
            noted = "" if row.noted_at is None else f"{_time(row.noted_at)}: "
            line += [str(row.token or ""), f"{noted}{' '.join((row.note or '').split())}"]
        cells.append(line)
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.status] = counts.get(row.status, 0) + 1
    summary = ", ".join(f"{number} {status}" for status, number in counts.items())
    hidden = len(rows) - len(shown)
    more = f" ({hidden} older not shown)" if hidden else ""
    return headers, cells, f"{count(len(rows))}: {summary}{more}"


def _who(row: msr.ScriptStatus) -> str:
    """The host, without the process and the uuid behind it, and the role."""
    host = re.sub(r"-[0-9]+-[0-9a-f-]{36}$", "", row.executed_by or "")
    return "@".join(part for part in (row.database_user, host) if part)


def plan_table(scripts: Sequence[msr.PlannedScript]) -> Table:
    """What a run would do, a row for each script."""
    rows = [
        (
            str(number),
            script.action,
            "R" if script.version is None else str(script.version),
            script.script,
            "yes" if script.transaction else "no",
        )
        for number, script in enumerate(scripts, 1)
    ]
    running = sum(script.action != "forget" for script in scripts)
    summary = f"{count(running)} would run; nothing was changed"
    return ("", "Action", "Version", "Script", "Transaction"), rows, summary


def plan_text(scripts: Sequence[msr.PlannedScript]) -> str:
    """What a run would do, as SQL; of a Python script its source, as a comment."""
    parts = []
    for script in scripts:
        outside = "" if script.transaction else ", outside a transaction"
        text = script.text.rstrip()
        if script.kind == "python":
            text = "\n".join(f"-- {line}".rstrip() for line in text.splitlines())
        parts.append(f"-- {script.action} {script.script}{outside}\n{text}".rstrip() + "\n")
    return "\n".join(parts) if parts else "-- nothing to do"


def planned(script: msr.PlannedScript, *, with_text: bool) -> dict[str, object]:
    known = document(script)
    return known if with_text else {name: known[name] for name in known if name != "text"}


def settled(row: msr.HistoryRow, applied: bool) -> dict[str, object]:
    """What a repair made of a row as it was found."""
    recorded = "applied" if applied else "retry"
    return {"version": row.version, "name": row.name, "found": row.status, "recorded": recorded}


def difference(change: msr.ScriptChange) -> str:
    """What was edited, as far as the history kept the script's text."""
    if change.difference is not None:
        return "\n".join(("", *(_visible(line) for line in change.difference)))
    return (
        f"\n{change.script}: the history did not keep its text\n"
        f"  as applied: SHA-256 {change.before}\n"
        f"  now:        SHA-256 {change.checksum}"
    )


def migration_result(result: msr.MigrationResult, command: str = "migrate") -> str:
    """The last line of a successful run."""
    done = "applied" if command == "migrate" else "rolled back"
    if result.executed:
        meanwhile = result.pending_before - len(result.executed)
        others = f", {meanwhile} {done} by another process meanwhile" if meanwhile > 0 else ""
        return f"✓ {count(len(result.executed))} {done} in {duration(result.duration)}{others}"
    if result.followed:
        return f"✓ Nothing left to do: another process {done} {count(result.pending_before)}"
    if command != "migrate":
        return "✓ Nothing to do: no script is newer"
    return f"✓ Nothing to do: {count(result.applied_before)} applied already"


def waiting(status: msr.LockStatus) -> str:
    """Whom a run waits for."""
    line = "Waiting for the migration lock, which is about to be free"
    if status.is_locked:
        doing = f", running {status.running}" if status.running else ""
        line = f"Waiting for the migration lock, held by {status.locked_by}{doing}"
    return f"{line}; {status.obstacle}" if status.obstacle else line


def finished(event: msr.ScriptFinished) -> str:
    if event.action == "forget":
        return f"{event.script} runs again at the next migrate"
    done = "Applied" if event.action == "apply" else "Rolled back"
    return f"{done} {event.script} ({duration(event.duration)})"


def retried(event: msr.ScriptRetried) -> str:
    return f"Trying {event.script} again in {duration(event.pause)}: {event.reason}"


def script_progress(event: msr.ScriptProgress) -> str:
    of = "" if event.of is None else f" of {event.of:g}"
    return f"{event.script}: {event.done:g}{of} {' '.join(event.note.split())}".rstrip()


def excerpt(error: msr.MigrationError) -> str:
    """The line of the script that failed, with a caret under the column where that is known."""
    source, column = error.source or "", error.column or 1
    gutter = f"  {error.line} | "
    start = max(0, column - 80) if len(source) > 120 else 0
    line = _visible(source[start : start + 120])
    margin = " " * (len(gutter) - 2)
    lines = [f"{gutter}{line}"]
    if error.column is not None:
        indent = re.sub(r"[^\t]", " ", line[: column - 1 - start])
        lines.append(f"{margin}| {indent}^")
    lines += [f"{margin}| {_visible(text)}" for text in (error.detail or "").splitlines()]
    return "\n".join(lines)


def _visible(text: str) -> str:
    """Somebody's text without what would move the terminal's cursor."""
    return "".join(char if char.isprintable() or char == "\t" else "?" for char in text)


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


FORMAT = 1
"""The version of the JSON documents, in each of them as `format`; their schema is beside us."""


def as_json(contents: Mapping[str, object]) -> str:
    """One JSON document; times as in the text output, durations in seconds."""
    return json.dumps({"format": FORMAT, **contents}, default=_plain, ensure_ascii=False)


def document(value: Any) -> dict[str, object]:
    """What a dataclass knows."""
    return {field.name: getattr(value, field.name) for field in fields(value)}


def error_as_json(error: BaseException) -> str:
    """The error's class, its line, and everything it knows."""
    known = {
        key: value
        for key, value in vars(error).items()
        if not key.startswith("_") and key not in ("result", "args")
    }
    contents: dict[str, object] = {
        "error": {**known, "type": type(error).__name__, "message": one_line(error)}
    }
    if (result := getattr(error, "result", None)) is not None:
        contents["result"] = result
    return as_json(contents)


def _plain(value: object) -> object:
    if isinstance(value, datetime):
        return _time(value)
    if isinstance(value, Path):
        return str(value)
    if is_dataclass(value):
        return document(value)
    return str(value)


def _time(value: datetime | None) -> str:
    if value is None:
        return "unknown"
    return value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def _ago(now: datetime | None, then: datetime | None) -> str:
    if now is None or then is None:
        return "some time"
    return str(timedelta(seconds=max(0, round((now - then).total_seconds()))))


def duration(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def count(scripts: int) -> str:
    return "1 script" if scripts == 1 else f"{scripts} scripts"
