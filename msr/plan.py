"""What a run would do, decided without a database or a file: scripts + history -> plan.

`_classify` is the only place that judges a script against the history; `make_plan` turns its
judgement into work or problems, `describe` into rows to show.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from msr.scripts import Problem, Script

__all__ = ["UNFINISHED", "HistoryRow", "Plan", "ScriptStatus", "Status", "describe", "make_plan"]

UNFINISHED = "unfinished"
"""The rule of a script that was started and not finished: a problem, unless its holder lives."""

Status = Literal["applied", "pending", "changed", "missing", "out-of-order", "unfinished"]


@dataclass(frozen=True, slots=True)
class HistoryRow:
    """One row of the history.

    `status` is `started` for a script outside a transaction that has not been recorded as
    finished. `started_at` is the database's clock, `duration` is in seconds, `executed_by` the
    executor's id, `database_user` the role, and `token` the fencing token it ran under.
    """

    version: int
    name: str
    checksum: str
    status: Literal["applied", "started"]
    started_at: datetime | None = None
    duration: float | None = None
    executed_by: str | None = None
    database_user: str | None = None
    token: int | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """The scripts that are applied, those to run, and what forbids running; by version."""

    applied: tuple[Script, ...]
    pending: tuple[Script, ...]
    problems: tuple[Problem, ...]


@dataclass(frozen=True, slots=True)
class ScriptStatus:
    """A script or a history row, or both, as `list` shows it.

    `file` is the path below the folder, None where the file is gone. The rest comes from the
    history (see `HistoryRow`) and is None for a script that was never started.
    """

    version: int
    name: str
    status: Status
    file: str | None = None
    started_at: datetime | None = None
    duration: float | None = None
    executed_by: str | None = None
    database_user: str | None = None
    token: int | None = None


def make_plan(scripts: Sequence[Script], history: Sequence[HistoryRow]) -> Plan:
    """Decide what is applied, what would run, in order of version, and all that is wrong.

    A file that was renamed under the same version, with the same content, is no problem.
    """
    applied: list[Script] = []
    pending: list[Script] = []
    problems: list[Problem] = []
    newest = max((row.version for row in history), default=0)
    for version, status, script, row in _classify(scripts, history):
        if script and status == "applied":
            applied.append(script)
        elif script and status in ("pending", "out-of-order"):
            pending.append(script)
        if rule := _RULES.get(status):
            file = script.label if script else f"V{version}_{row.name if row else ''}"
            name, message = rule
            problems.append(Problem(name, file, message.format(version=version, newest=newest)))
    return Plan(tuple(applied), tuple(pending), tuple(problems))


def describe(scripts: Sequence[Script], history: Sequence[HistoryRow]) -> list[ScriptStatus]:
    """Every script and every row of the history, in order of version, with its status."""
    return [
        ScriptStatus(
            version=version,
            name=script.name if script else row.name if row else "",
            status=status,
            file=script.label if script else None,
            started_at=row.started_at if row else None,
            duration=row.duration if row else None,
            executed_by=row.executed_by if row else None,
            database_user=row.database_user if row else None,
            token=row.token if row else None,
        )
        for version, status, script, row in _classify(scripts, history)
    ]


_RULES: dict[Status, tuple[str, str]] = {
    "changed": (
        "changed-checksum",
        "was edited after it was applied: restore the file, and put the change in a new script",
    ),
    "missing": (
        "missing-file",
        "was applied, but its file is gone: restore it, or deploy the release that has it",
    ),
    "out-of-order": (
        "out-of-order",
        "is older than version {newest}, which is applied already: rename it to a newer version",
    ),
    "unfinished": (
        UNFINISHED,
        (
            "was started outside a transaction and never recorded as finished: check by hand what "
            "it did; if all of it is done run 'msr repair {version} --applied', else undo its "
            "part and run 'msr repair {version} --retry'"
        ),
    ),
}


def _classify(
    scripts: Sequence[Script], history: Sequence[HistoryRow]
) -> Iterator[tuple[int, Status, Script | None, HistoryRow | None]]:
    rows = {row.version: row for row in history}
    newest = max(rows, default=-1)
    files: dict[int, Script] = {}
    for script in scripts:
        # Two scripts of one version are reported by load_scripts; judge the one that was applied.
        row = rows.get(script.version)
        if script.version not in files or (row and row.checksum == script.checksum):
            files[script.version] = script
    for version in sorted(files.keys() | rows.keys()):
        file, row = files.get(version), rows.get(version)
        status: Status
        if row is None:
            status = "pending" if version > newest else "out-of-order"
        elif row.status == "started":
            status = "unfinished"
        elif file is None:
            status = "missing"
        elif file.checksum and file.checksum != row.checksum:  # empty: could not be read
            status = "changed"
        else:
            status = "applied"
        yield version, status, file, row
