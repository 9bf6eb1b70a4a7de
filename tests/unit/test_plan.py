"""Scripts and history make a plan, or named problems."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msr.plan import HistoryRow, ScriptStatus, Status, describe, make_plan
from msr.scripts import Script


def script(version: int, checksum: str = "c", name: str = "x") -> Script:
    label = f"V{version}_{name}.sql"
    return Script(version, name, Path(label), label, "sql", checksum, "SELECT 1;")


def row(
    version: int, checksum: str = "c", status: Literal["applied", "started"] = "applied"
) -> HistoryRow:
    return HistoryRow(version, "x", checksum, status)


def versions_of(scripts: list[Script], history: list[HistoryRow]) -> list[int]:
    return sorted({s.version for s in scripts} | {r.version for r in history})


CASES: dict[str, tuple[list[Script], list[HistoryRow], list[Status], list[str]]] = {
    "nothing": ([], [], [], []),
    "all pending": ([script(0), script(2)], [], ["pending", "pending"], []),
    "all applied": ([script(1), script(2)], [row(2), row(1)], ["applied", "applied"], []),
    "one more": ([script(1), script(2)], [row(1)], ["applied", "pending"], []),
    "renamed": ([script(1, name="better")], [row(1)], ["applied"], []),
    "edited": ([script(1, "other")], [row(1)], ["changed"], ["changed-checksum"]),
    "edited and renamed": ([script(1, "other", "y")], [row(1)], ["changed"], ["changed-checksum"]),
    "file gone": ([script(2)], [row(1), row(2)], ["missing", "applied"], ["missing-file"]),
    "newest file gone": ([script(1)], [row(1), row(2)], ["applied", "missing"], ["missing-file"]),
    "too old": ([script(1), script(2)], [row(2)], ["out-of-order", "applied"], ["out-of-order"]),
    "older than a file that is gone": (
        [script(1)],
        [row(2)],
        ["out-of-order", "missing"],
        ["out-of-order", "missing-file"],
    ),
    "unfinished": ([script(1)], [row(1, status="started")], ["unfinished"], ["unfinished"]),
    "unfinished and edited": (
        [script(1, "other"), script(2)],
        [row(1, status="started")],
        ["unfinished", "pending"],
        ["unfinished"],
    ),
    "unfinished and gone": ([], [row(1, status="started")], ["unfinished"], ["unfinished"]),
    "applied and unreadable now": ([script(1, "")], [row(1)], ["applied"], []),
    "second file of an applied version": (
        [script(1, "other", "a"), script(1, "c", "b")],
        [row(1)],
        ["applied"],
        [],
    ),
    "everything at once": (
        [script(1, "other"), script(2), script(5), script(6)],
        [row(1), row(3), row(4, status="started")],
        ["changed", "out-of-order", "missing", "unfinished", "pending", "pending"],
        ["changed-checksum", "out-of-order", "missing-file", "unfinished"],
    ),
}
EACH_CASE = pytest.mark.parametrize(
    ("scripts", "history", "statuses", "rules"), CASES.values(), ids=CASES
)


@EACH_CASE
def test_statuses(
    scripts: list[Script], history: list[HistoryRow], statuses: list[Status], rules: list[str]
) -> None:
    """Each script and each row is listed once, by version, with its status."""
    shown = describe(scripts, history)
    assert [s.status for s in shown] == statuses
    assert [s.version for s in shown] == versions_of(scripts, history)


@EACH_CASE
def test_plans(
    scripts: list[Script], history: list[HistoryRow], statuses: list[Status], rules: list[str]
) -> None:
    """A plan holds all problems, and the scripts to run and those that have run, by version."""
    plan = make_plan(scripts, history)
    versions = dict(zip(versions_of(scripts, history), statuses, strict=True))
    assert [problem.rule for problem in plan.problems] == rules
    assert [s.version for s in plan.applied] == [v for v in versions if versions[v] == "applied"]
    assert [s.version for s in plan.pending] == [
        v for v in versions if versions[v] in ("pending", "out-of-order")
    ]


@pytest.mark.parametrize(
    ("scripts", "history", "file", "words"),
    [
        ([script(1, "other")], [row(1)], "V1_x.sql", ["edited", "restore", "new script"]),
        ([], [row(1)], "V1_x", ["gone", "restore"]),
        ([script(1), script(7)], [row(7)], "V1_x.sql", ["version 7", "rename"]),
        (
            [script(3)],
            [row(3, status="started")],
            "V3_x.sql",
            ["check by hand", "msr repair 3 --applied", "msr repair 3 --retry"],
        ),
    ],
)
def test_messages_name_the_way_out(
    scripts: list[Script], history: list[HistoryRow], file: str, words: list[str]
) -> None:
    """A problem names the file and says in one line what to do."""
    [problem] = make_plan(scripts, history).problems
    assert problem.file == file
    assert [word for word in words if word not in problem.message] == []
    assert "\n" not in problem.message


def test_listing_carries_the_history() -> None:
    """A listed script shows who ran it, when, for how long and under which token."""
    began = datetime(2025, 12, 18, tzinfo=UTC)
    history = [HistoryRow(1, "old", "c", "applied", began, 1.5, "host-1", "alice", 7)]
    assert describe([script(1, name="new"), script(2)], history) == [
        ScriptStatus(1, "new", "applied", "V1_new.sql", began, 1.5, "host-1", "alice", 7),
        ScriptStatus(2, "x", "pending", "V2_x.sql"),
    ]
    assert describe([], history) == [
        ScriptStatus(1, "old", "missing", None, began, 1.5, "host-1", "alice", 7)
    ]


ROWS = st.builds(
    row,
    st.integers(0, 9),
    st.sampled_from("cd"),
    st.sampled_from(["applied", "started"]),
)
SCRIPTS = st.builds(script, st.integers(0, 9), st.sampled_from("cd"))


@given(
    scripts=st.lists(SCRIPTS, unique_by=lambda s: s.version),
    history=st.lists(ROWS, unique_by=lambda r: r.version),
)
def test_plan_without_problems_continues_the_history(
    scripts: list[Script], history: list[HistoryRow]
) -> None:
    """Where no problem is named, the pending scripts complete the history."""
    plan = make_plan(scripts, history)
    if not plan.problems:
        ran = [(r.version, r.checksum) for r in history]
        pending = [(s.version, s.checksum) for s in plan.pending]
        assert pending == sorted(pending)
        assert all(new > old for new, _ in pending for old, _ in ran)
        assert sorted(ran + pending) == sorted((s.version, s.checksum) for s in scripts)
