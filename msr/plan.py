"""What a run would do, decided without a database or a file: scripts + history + goal -> plan.

`_classify` is the only place that judges a script against the history. `make_plan` turns its
judgement into steps or problems, `describe` into rows to show.

A step is one change of the history, and the script that runs for it: every command that changes
the database comes down to a list of them, which the one loop in `runner` carries out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime
from typing import Literal, NamedTuple

from msr.errors import ConfigError
from msr.scripts import Problem, Script

__all__ = [
    "MIGRATE",
    "UNFINISHED",
    "Action",
    "Goal",
    "HistoryRow",
    "Plan",
    "RowStatus",
    "ScriptStatus",
    "Status",
    "Step",
    "describe",
    "make_plan",
]

UNFINISHED = "unfinished"
"""The rule of a script that was started and not finished: a problem, unless its holder lives."""

Status = Literal[
    "applied", "pending", "changed", "missing", "out-of-order", "unfinished", "failed", "baseline"
]

RowStatus = Literal[
    "applied", "started", "failed", "reverting", "revert-failed", "retry", "baseline"
]

Action = Literal["apply", "revert", "baseline", "repair", "forget"]


@dataclass(frozen=True, slots=True)
class HistoryRow:
    """One row of the history. `version` is None for a repeatable script.

    `status` is `started` for a script outside a transaction that has not been recorded as finished,
    `failed` for one that is known to have failed (`reverting` and `revert-failed` on its way down),
    `retry` for one that a repair lets run again, and `baseline` where everything up to `version`
    was there before msr came. `started_at` is the database's clock, `duration` is in seconds,
    `executed_by` the executor's id, `database_user` the role, and `token` the fencing token of the
    run that last wrote the row. `note` is what was said at `noted_at`: why it failed, who repaired
    it.
    """

    version: int | None
    name: str
    checksum: str
    status: RowStatus
    started_at: datetime | None = None
    duration: float | None = None
    executed_by: str | None = None
    database_user: str | None = None
    token: int | None = None
    note: str | None = None
    noted_at: datetime | None = None

    @property
    def key(self) -> int | str:
        """What names it: the version or, of a repeatable script, the name."""
        return self.name if self.version is None else self.version


@dataclass(frozen=True, slots=True)
class Goal:
    """What somebody wants: a command, and how far it is to go.

    `target` is the version to reach, `steps` how many scripts to run at most; for a baseline
    `target` is its version. A repair is of the script that `key` names: `applied` says whether
    what it left unfinished is now done, `checksum` which edit of it is accepted, `by` who says so.
    """

    command: Literal["migrate", "down", "baseline", "repair"] = "migrate"
    target: int | None = None
    steps: int | None = None
    out_of_order: bool = False
    key: int | str | None = None
    applied: bool | None = None
    checksum: str | None = None
    by: str | None = None


MIGRATE = Goal()
"""Everything that is pending."""


@dataclass(frozen=True, slots=True)
class Step:
    """One change: what the history then holds (`row`, None for nothing) instead of `replaces`.

    To "apply" or to "revert", the script runs in the same transaction; the others only record.
    `script` is None where there is no file.
    """

    action: Action
    script: Script | None
    row: HistoryRow | None
    replaces: HistoryRow | None = None

    @property
    def key(self) -> int | str:
        source = self.script or self.row or self.replaces
        assert source is not None, "a step is about something"
        return source.key

    @property
    def runs_script(self) -> bool:
        return self.action in ("apply", "revert")


@dataclass(frozen=True, slots=True)
class Plan:
    """The steps in their order, what forbids them, and how many scripts are applied already.

    `goal` is the one asked for, with a number of steps turned into the version that they lead to:
    who looks a second time, after waiting for the lock, then means the same.
    """

    steps: tuple[Step, ...]
    problems: tuple[Problem, ...]
    applied: int
    goal: Goal


@dataclass(frozen=True, slots=True)
class ScriptStatus:
    """A script or a history row, or both, as `list` shows it.

    `version` is None for a repeatable script, `file` is the path below the folder, None where the
    file is gone. The rest comes from the history (see `HistoryRow`) and is None for a script that
    was never started.
    """

    version: int | None
    name: str
    status: Status
    file: str | None = None
    started_at: datetime | None = None
    duration: float | None = None
    executed_by: str | None = None
    database_user: str | None = None
    token: int | None = None
    note: str | None = None
    noted_at: datetime | None = None


class _Entry(NamedTuple):
    """A script, a row, or both, and what they make together."""

    status: Status
    script: Script | None
    row: HistoryRow | None

    @property
    def version(self) -> int | None:
        source = self.script or self.row
        return source.version if source else None

    @property
    def key(self) -> int | str:
        source = self.script or self.row
        assert source is not None, "an entry is about something"
        return source.key

    @property
    def label(self) -> str:
        if self.script:
            return self.script.label
        name = self.row.name if self.row else ""
        return f"R_{name}" if self.version is None else f"V{self.version}_{name}"


def make_plan(
    scripts: Sequence[Script], history: Sequence[HistoryRow], goal: Goal = MIGRATE
) -> Plan:
    """Decide what would run, and all that is wrong.

    A file that was renamed under the same version, with the same content, is no problem. Raises
    `ConfigError` for a goal that makes no sense with these scripts and this history.
    """
    make = {"migrate": _migrate, "down": _down, "baseline": _baseline, "repair": _repair}
    entries = _classify(scripts, history)
    steps, problems, goal = make[goal.command](entries, goal)
    applied = sum(entry.status in ("applied", "changed", "missing") for entry in entries)
    return Plan(tuple(steps), tuple(problems), applied, goal)


def describe(scripts: Sequence[Script], history: Sequence[HistoryRow]) -> list[ScriptStatus]:
    """Every script and every row of the history, in order of version, with its status."""
    return [
        ScriptStatus(
            version=entry.version,
            name=entry.script.name if entry.script else entry.row.name if entry.row else "",
            status=entry.status,
            file=entry.script.label if entry.script else None,
            **{name: getattr(entry.row, name) for name in _SHOWN if entry.row},
        )
        for entry in _classify(scripts, history)
    ]


_SHOWN = [field.name for field in fields(HistoryRow)][4:]
"""What a script's status takes over from its row."""


# What each command makes of the judgement: the steps, the problems, and the goal to keep to.

_Outcome = tuple[list[Step], list[Problem], Goal]

_SETTLE = (
    "check by hand what it did; if all of it is done run 'msr repair {key} --applied', else undo "
    "its part and run 'msr repair {key} --retry'"
)
_SETTLE_DOWN = (
    "check by hand what it took back; if that is all of it run 'msr repair {key} --retry', and it "
    "is pending again, else put its part back and run 'msr repair {key} --applied'"
)
_RULES: dict[Status, tuple[str, str]] = {
    "changed": (
        "changed-checksum",
        (
            "was edited after it was applied: restore the file, and put the change in a new "
            "script; if the edit changes nothing in the database, accept it with 'msr repair {key}'"
        ),
    ),
    "missing": (
        "missing-file",
        "was applied, but its file is gone: restore it, or deploy the release that has it",
    ),
    "out-of-order": (
        "out-of-order",
        (
            "is older than version {newest}, which is applied already: rename it to a newer "
            'version, or apply it all the same with --out-of-order (out_of_order = "apply")'
        ),
    ),
    "unfinished": (
        UNFINISHED,
        "was started outside a transaction and never recorded as finished: {settle}",
    ),
    "failed": ("failed", "failed outside a transaction ({note}): {settle}"),
}


def _migrate(entries: Sequence[_Entry], goal: Goal) -> _Outcome:
    problems = [
        _problem(entry, entries)
        for entry in entries
        if entry.status in _RULES
        and not (entry.status == "out-of-order" and goal.out_of_order)
        and not (entry.status == "missing" and entry.version is None)  # not run again, that is all
    ]
    if goal.target is not None and goal.target not in {entry.version for entry in entries}:
        raise ConfigError(f"no script has version {goal.target}: see msr list", key="target")
    pending = [entry for entry in entries if entry.status in ("pending", "out-of-order")]
    wanted = versioned = [entry for entry in pending if entry.version is not None]
    if goal.steps is not None:
        wanted = versioned[: goal.steps]
        reached = [entry.version or 0 for entry in wanted or entries if entry.version is not None]
        goal = replace(goal, steps=None, target=max(reached, default=None))
    elif goal.target is not None:
        wanted = [entry for entry in versioned if (entry.version or 0) <= goal.target]
    if len(wanted) == len(versioned):  # a view may need what the newest script makes
        wanted = pending
    return [_applied(entry) for entry in wanted], problems, goal


def _applied(entry: _Entry) -> Step:
    assert entry.script is not None, "what is pending has a file"
    script = entry.script
    row = HistoryRow(script.version, script.name, script.checksum, "applied")
    return Step("apply", script, row, entry.row)


def _down(entries: Sequence[_Entry], goal: Goal) -> _Outcome:
    if goal.target is None and goal.steps is None:
        raise ConfigError(
            "say how far: a version to go back to, or a number of steps", key="target"
        )
    known = {entry.version for entry in entries}
    if goal.target is not None and goal.target > 0 and goal.target not in known:
        raise ConfigError(f"no script has version {goal.target}: see msr list", key="target")
    recorded = [
        entry
        for entry in reversed(entries)
        if entry.row and entry.row.status != "retry" and entry.version is not None
    ]
    if goal.steps is not None:
        below = [entry.version or 0 for entry in recorded[goal.steps :]]
        goal = replace(goal, steps=None, target=max(below, default=-1))
    target = -1 if goal.target is None else goal.target
    chosen = [entry for entry in recorded if (entry.version or 0) > target]
    problems = [
        _problem(entry, entries) for entry in chosen if entry.status in ("unfinished", "failed")
    ]
    for entry in chosen:
        if entry.status == "baseline":
            message = "was there before msr came, so msr has no way back to before it"
            problems.append(Problem("baseline", entry.label, message))
        elif entry.script is None:
            message = "is to be rolled back, but its file is gone: restore it"
            problems.append(Problem("missing-file", entry.label, message))
    # What is rolled back may take views and functions along: they are made anew by the next run.
    repeatable = [entry for entry in entries if entry.version is None and entry.row and chosen]
    settled = [entry for entry in repeatable if entry.status not in ("unfinished", "failed")]
    problems += [_problem(entry, entries) for entry in repeatable if entry not in settled]
    steps = [Step("forget", entry.script, None, entry.row) for entry in settled]
    return [*steps, *(Step("revert", it.script, None, it.row) for it in chosen)], problems, goal


def _baseline(entries: Sequence[_Entry], goal: Goal) -> _Outcome:
    if goal.target is None or not 0 <= goal.target < 10**18:
        raise ConfigError("must be a number of 1 to 18 digits", key="version")
    rows = [entry.row for entry in entries if entry.row]
    if [(row.version, row.status) for row in rows] == [(goal.target, "baseline")]:
        return [], [], goal
    # Old scripts need not be there any more; but among those that are, a wrong number is a mistake.
    versions = {entry.version for entry in entries if entry.script and entry.version is not None}
    if goal.target not in versions and any(version < goal.target for version in versions):
        raise ConfigError(f"no script has version {goal.target}: see msr list", key="version")
    mistaken = rows[0] if len(rows) == 1 and rows[0].status == "baseline" else None
    if rows and not mistaken:
        raise ConfigError(
            "the history is not empty: a baseline is for a database that msr has not migrated yet",
            key="version",
        )
    script = next((entry.script for entry in entries if entry.version == goal.target), None)
    name, checksum = (script.name, script.checksum) if script else ("baseline", "")
    row = HistoryRow(goal.target, name, checksum, "baseline", note=f"baseline by {goal.by}")
    return [Step("baseline", script, row, mistaken)], [], goal


def _repair(entries: Sequence[_Entry], goal: Goal) -> _Outcome:
    entry = next((entry for entry in entries if entry.key == goal.key), None)
    row = entry.row if entry else None
    before = f"; before: {row.note}" if row and row.note else ""
    if entry and row and entry.status in ("unfinished", "failed") and goal.applied is not None:
        status: RowStatus = "applied" if goal.applied else "retry"
        note = f"{entry.status}, repaired as {status} by {goal.by}{before}"
        # What is done is what the file says now, which may have been mended since.
        checksum = entry.script.checksum if entry.script and goal.applied else row.checksum
        repaired = replace(row, status=status, checksum=checksum or row.checksum, note=note)
        return [Step("repair", entry.script, repaired, row)], [], goal
    if entry and row and entry.script and goal.checksum == entry.script.checksum:
        if row.checksum == goal.checksum:
            return [], [], goal
        if entry.status == "changed":
            note = f"checksum repaired by {goal.by}, was {row.checksum}{before}"
            repaired = replace(row, checksum=goal.checksum, name=entry.script.name, note=note)
            return [Step("repair", entry.script, repaired, row)], [], goal
    what = f"{goal.key!r}" if isinstance(goal.key, str) else f"version {goal.key}"
    if entry is None:
        raise ConfigError(f"there is no {what}: see msr list")
    if entry.status == "missing":
        raise ConfigError(f"the file of {what} is gone: restore it")
    if entry.status in ("unfinished", "failed"):
        raise ConfigError(f"{what} is {entry.status}: say --applied or --retry")
    if entry.status == "changed" and goal.checksum is not None:
        raise ConfigError(f"{what} was edited again meanwhile: look at it anew")
    raise ConfigError(f"{what} is {entry.status}, so there is nothing to repair")


def _newest(rows: Sequence[HistoryRow]) -> int:
    """The newest version that was started, -1 if there is none."""
    started = (row.version for row in rows if row.status != "retry")
    return max((version for version in started if version is not None), default=-1)


def _problem(entry: _Entry, entries: Sequence[_Entry]) -> Problem:
    rule, message = _RULES[entry.status]
    newest = _newest([it.row for it in entries if it.row])
    note = entry.row.note if entry.row else None
    down = entry.row is not None and entry.row.status in ("reverting", "revert-failed")
    settle = (_SETTLE_DOWN if down else _SETTLE).format(key=entry.key)
    known = {"key": entry.key, "newest": newest, "note": note or "why is not known"}
    message = message.format(settle=settle, **known)
    return Problem(rule, entry.label, message)


def _classify(scripts: Sequence[Script], history: Sequence[HistoryRow]) -> list[_Entry]:
    """Every script and every row once, the versioned ones first, in order."""
    rows = {row.key: row for row in history}
    newest = _newest(history)
    baseline = _newest([row for row in history if row.status == "baseline"])
    files: dict[int | str, Script] = {}
    for script in scripts:
        # Two scripts of one version are reported by load_scripts; judge the one that was applied.
        row = rows.get(script.key)
        if script.key not in files or (row and row.checksum == script.checksum):
            files[script.key] = script
    entries = []
    for key in sorted(files.keys() | rows.keys(), key=lambda key: (isinstance(key, str), key)):
        file, row = files.get(key), rows.get(key)
        status: Status
        if row is not None and row.status in ("started", "reverting"):
            status = "unfinished"
        elif row is not None and row.status in ("failed", "revert-failed"):
            status = "failed"
        elif row is not None and row.status == "baseline":
            status = "baseline"
        elif row is None or row.status == "retry":
            if isinstance(key, str) or key > newest:
                status = "pending"
            else:
                status = "baseline" if key <= baseline else "out-of-order"
        elif file is None:
            status = "missing"
        elif file.checksum and file.checksum != row.checksum:  # empty: could not be read
            status = "pending" if isinstance(key, str) else "changed"
        else:
            status = "applied"
        if file is not None or status != "pending":
            entries.append(_Entry(status, file, row))
    return entries
