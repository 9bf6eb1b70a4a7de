"""Scripts and history make a plan, or named problems."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msr.errors import ConfigError
from msr.plan import MIGRATE, Goal, HistoryRow, ScriptStatus, Status, describe, make_plan
from msr.scripts import Script


def script(version: int | None, checksum: str = "c", name: str = "x") -> Script:
    label = f"R_{name}.sql" if version is None else f"V{version}_{name}.sql"
    return Script(version, name, Path(label), label, "sql", checksum, "SELECT 1;")


def row(
    version: int | None,
    checksum: str = "c",
    status: Literal["applied", "started", "failed", "retry", "baseline"] = "applied",
    name: str = "x",
) -> HistoryRow:
    return HistoryRow(version, name, checksum, status)


def keys_of(scripts: list[Script], history: list[HistoryRow]) -> list[int | str]:
    keys = {s.key for s in scripts} | {r.key for r in history}
    return sorted(keys, key=lambda key: (isinstance(key, str), key))


def did(
    scripts: list[Script], history: list[HistoryRow], goal: Goal = MIGRATE
) -> list[tuple[str, int | str]]:
    """What a plan would do, to which script, in order."""
    return [(step.action, step.key) for step in make_plan(scripts, history, goal).steps]


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
    "failed": ([script(1)], [row(1, status="failed")], ["failed"], ["failed"]),
    "to be tried again": ([script(1)], [row(1, status="retry")], ["pending"], []),
    "to be tried again, older than another": (
        [script(1), script(2)],
        [row(1, status="retry"), row(2)],
        ["out-of-order", "applied"],
        ["out-of-order"],
    ),
    "baseline": (
        [script(1), script(2), script(3)],
        [row(2, status="baseline")],
        ["baseline", "baseline", "pending"],
        [],
    ),
    "baseline without a file": ([script(3)], [row(2, "", "baseline")], ["baseline", "pending"], []),
    "out of order above a baseline": (
        [script(1), script(3), script(4)],
        [row(2, status="baseline"), row(4)],
        ["baseline", "baseline", "out-of-order", "applied"],
        ["out-of-order"],
    ),
    "repeatable": ([script(None), script(1)], [], ["pending", "pending"], []),
    "repeatable applied": ([script(None)], [row(None)], ["applied"], []),
    "repeatable edited": ([script(None, "other")], [row(None)], ["pending"], []),
    "repeatable gone": ([script(1)], [row(None), row(1)], ["applied", "missing"], []),
    "repeatable failed": ([script(None)], [row(None, "c", "failed")], ["failed"], ["failed"]),
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
    shown_keys = [s.name if s.version is None else s.version for s in shown]
    assert shown_keys == keys_of(scripts, history)


@EACH_CASE
def test_plans(
    scripts: list[Script], history: list[HistoryRow], statuses: list[Status], rules: list[str]
) -> None:
    """A plan holds all problems and, by version, the scripts to run."""
    plan = make_plan(scripts, history)
    shown = zip(describe(scripts, history), statuses, strict=True)
    assert [problem.rule for problem in plan.problems] == rules
    assert [step.key for step in plan.steps] == [
        s.name if s.version is None else s.version
        for s, status in shown
        if status in ("pending", "out-of-order")
    ]
    assert {step.action for step in plan.steps} <= {"apply"}


@pytest.mark.parametrize(
    ("scripts", "history", "file", "words"),
    [
        (
            [script(1, "other")],
            [row(1)],
            "V1_x.sql",
            ["edited", "restore", "new script", "msr repair 1"],
        ),
        ([], [row(1)], "V1_x", ["gone", "restore"]),
        ([script(1), script(7)], [row(7)], "V1_x.sql", ["version 7", "rename", "--out-of-order"]),
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


FIVE = [script(version) for version in (1, 2, 3, 4, 5)]
VIEWS = [script(None, name="a"), script(None, name="b")]


@pytest.mark.parametrize(
    ("goal", "expected"),
    [
        (Goal(), [("apply", 3), ("apply", 4), ("apply", 5), ("apply", "a"), ("apply", "b")]),
        (Goal(target=4), [("apply", 3), ("apply", 4)]),
        (
            Goal(target=5),
            [("apply", 3), ("apply", 4), ("apply", 5), ("apply", "a"), ("apply", "b")],
        ),
        (Goal(target=1), []),
        (Goal(steps=2), [("apply", 3), ("apply", 4)]),
        (
            Goal(steps=9),
            [("apply", 3), ("apply", 4), ("apply", 5), ("apply", "a"), ("apply", "b")],
        ),
        (Goal("down", target=1), [("revert", 2)]),
        (Goal("down", target=0), [("revert", 2), ("revert", 1)]),
        (Goal("down", target=2), []),
        (Goal("down", steps=1), [("revert", 2)]),
        (Goal("down", steps=7), [("revert", 2), ("revert", 1)]),
    ],
)
def test_how_far(goal: Goal, expected: list[tuple[str, int | str]]) -> None:
    """A target and a number of steps bound a run; repeatable scripts wait for the last version."""
    assert did([*FIVE, *VIEWS], [row(1), row(2)], goal) == expected


def test_nothing_is_left_of_a_script_to_be_tried_again_whose_file_is_gone() -> None:
    """Its row alone is no reason to show it, nor to stop."""
    history = [row(1, status="retry")]
    assert describe([], history) == []
    assert make_plan([], history).problems == ()


@pytest.mark.parametrize("goal", [Goal(steps=2), Goal("down", steps=2)])
def test_a_second_look_means_the_same(goal: Goal) -> None:
    """A number of steps becomes a version: what another has done meanwhile is not done again."""
    first = make_plan(FIVE, [row(1), row(2)], goal)
    after = {"migrate": [row(version) for version in (1, 2, 3, 4)], "down": []}[goal.command]
    assert make_plan(FIVE, after, first.goal).steps == ()


def test_out_of_order() -> None:
    """Where it is allowed, an older script is applied in its place among the others."""
    scripts, history = [script(1), script(2), script(3)], [row(2)]
    assert did(scripts, history, Goal(out_of_order=True)) == [("apply", 1), ("apply", 3)]
    assert make_plan(scripts, history, Goal(out_of_order=True)).problems == ()


def test_going_back_makes_repeatable_scripts_run_again() -> None:
    """What is taken back may take a view along, so what made it is forgotten."""
    history = [row(1), row(None, name="a")]
    steps = did([script(1), *VIEWS], history, Goal("down", target=0))
    assert steps == [("forget", "a"), ("revert", 1)]
    assert did([script(1), *VIEWS], history, Goal("down", target=1)) == []


@pytest.mark.parametrize(
    ("history", "rule"),
    [
        ([row(1), row(2, status="started")], "unfinished"),
        ([row(1), row(2, status="failed")], "failed"),
        ([row(1), row(6)], "missing-file"),
        ([row(2, status="baseline")], "baseline"),
    ],
)
def test_what_cannot_be_taken_back(history: list[HistoryRow], rule: str) -> None:
    """An unfinished script, one without a file, and what was there before msr."""
    assert [it.rule for it in make_plan(FIVE, history, Goal("down", target=0)).problems] == [rule]


def test_an_edited_script_can_be_taken_back() -> None:
    """While a script is being written it is applied, mended and taken back, over and over."""
    plan = make_plan([script(1, "other")], [row(1)], Goal("down", target=0))
    assert ([step.action for step in plan.steps], plan.problems) == (["revert"], ())


@pytest.mark.parametrize(
    "goal",
    [
        Goal(target=6),
        Goal("down", target=6),
        Goal("down"),
        Goal("baseline", target=3),
        Goal("repair", key=1),
        Goal("repair", key=1, applied=True),
        Goal("repair", key=9, applied=True),
        Goal("repair", key=2, applied=None),
        Goal("repair", key=3, checksum="not the file's"),
    ],
)
def test_goals_that_make_no_sense(goal: Goal) -> None:
    """A version that nobody knows, no version at all, and a repair of what needs none."""
    history = [row(1), row(2, status="failed"), row(3, "edited since")]
    with pytest.raises(ConfigError):
        make_plan(FIVE, history, goal)


def test_baseline() -> None:
    """A baseline is one row, and twice the same is nothing to do."""
    goal = Goal("baseline", target=2, by="ann")
    [step] = make_plan(FIVE, [], goal).steps
    assert step.row is not None
    assert (step.row.version, step.row.status, step.row.checksum) == (2, "baseline", "c")
    assert did(FIVE, [step.row], goal) == []


@pytest.mark.parametrize(("applied", "status"), [(True, "applied"), (False, "retry")])
@pytest.mark.parametrize("found", ["started", "failed"])
def test_repair_of_what_was_left(
    found: Literal["started", "failed"], applied: bool, status: str
) -> None:
    """What was left unfinished is settled one way or the other, and says by whom."""
    left = row(1, status=found)
    [step] = make_plan(FIVE, [left], Goal("repair", key=1, applied=applied, by="ann")).steps
    assert step.row is not None
    assert (step.row.status, step.replaces) == (status, left)
    assert "by ann" in (step.row.note or "")


def test_repair_of_an_edit() -> None:
    """The edit that was looked at is accepted, once."""
    goal = Goal("repair", key=1, checksum="new", by="ann")
    [step] = make_plan([script(1, "new", "better")], [row(1)], goal).steps
    assert step.row is not None
    assert (step.row.checksum, step.row.name, step.row.status) == ("new", "better", "applied")
    assert "was c" in (step.row.note or "")
    assert did([script(1, "new", "better")], [step.row], goal) == []


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
        ran = [(r.version or 0, r.checksum) for r in history]
        pending = [(s.script.version or 0, s.script.checksum) for s in plan.steps if s.script]
        assert pending == sorted(pending)
        assert all(new > old for new, _ in pending for old, _ in ran)
        assert sorted(ran + pending) == sorted((s.version or 0, s.checksum) for s in scripts)
