"""The commands that run scripts, look at them, and settle what keeps them from running."""

from __future__ import annotations

import re
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Annotated, Any, Literal

import typer

import msr
from msr_cli import render, terminal
from msr_cli.options import NoLock, NoWait, Wait, Yes, config_from, wait_from
from msr_cli.running import (
    Common,
    Interrupted,
    command,
    echo,
    run_async,
    to_stderr,
)

__all__ = ["add_commands"]

Target = Annotated[int | None, typer.Argument(metavar="[TARGET]", min=0, show_default=False)]
Steps = Annotated[
    int | None,
    typer.Option(
        "--steps", metavar="N", min=1, help="So many scripts at most.", show_default=False
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Only show what would run; take no lock, write nothing.")
]
Sql = Annotated[bool, typer.Option("--sql", help="With --dry-run: show the scripts' text.")]
SingleTransaction = Annotated[
    bool, typer.Option("--single-transaction", help="All of it in one transaction, or nothing.")
]


def add_commands(app: typer.Typer) -> None:
    command(app, "migrate", "up")(_migrate)
    command(app, "down", "rollback")(_down)
    command(app, "list")(_list)
    command(app, "validate")(_validate)
    command(app, "new")(_new)
    command(app, "baseline")(_baseline)
    command(app, "repair")(_repair)


def _migrate(
    common: Common,
    target: Target = None,
    steps: Steps = None,
    dry_run: DryRun = False,
    sql: Sql = False,
    out_of_order: Annotated[
        bool,
        typer.Option(
            "--out-of-order", help="Also apply scripts older than the newest applied one."
        ),
    ] = False,
    single_transaction: SingleTransaction = False,
    no_lock: NoLock = False,
    wait: Wait = None,
    no_wait: NoWait = False,
) -> None:
    """Apply what is pending, up to version TARGET."""
    how = {"out_of_order": out_of_order or None, "single_transaction": single_transaction or None}
    lock = {"wait": wait, "no_wait": no_wait, "no_lock": no_lock}
    _execute(common, "migrate", target, steps, how, lock, dry_run=dry_run, sql=sql)


def _down(
    common: Common,
    target: Target = None,
    steps: Steps = None,
    dry_run: DryRun = False,
    sql: Sql = False,
    single_transaction: SingleTransaction = False,
    no_lock: NoLock = False,
    wait: Wait = None,
    no_wait: NoWait = False,
) -> None:
    """Roll back what is newer than version TARGET (0: all)."""
    how = {"single_transaction": single_transaction or None}
    lock = {"wait": wait, "no_wait": no_wait, "no_lock": no_lock}
    _execute(common, "down", target, steps, how, lock, dry_run=dry_run, sql=sql)


def _execute(
    common: Common,
    what: Literal["migrate", "down"],
    target: int | None,
    steps: int | None,
    how: dict[str, Any],
    lock: dict[str, Any],
    *,
    dry_run: bool,
    sql: bool,
) -> None:
    """Do it or, in a dry run, show it; `how` and `lock` are the options of that name."""
    if target is not None and steps is not None:
        raise msr.ConfigError("contradicts the target version", source="--steps")
    if sql and not dry_run:
        raise msr.ConfigError("shows what would run: add --dry-run", source="--sql")
    if dry_run and lock != {"wait": None, "no_wait": False, "no_lock": False}:
        message = "takes no lock: leave --no-lock, --wait and --no-wait away"
        raise msr.ConfigError(message, source="--dry-run")
    if dry_run:
        runner = common.open()
        plan = {"migrate": runner.plan_migrate, "down": runner.plan_down}[what]
        _show_plan(common, sql, partial(plan, target, steps=steps, **how))
        return
    how |= {"wait": wait_from(**lock), "use_lock": False if lock["no_lock"] else None}
    with terminal.progress(
        quiet=common.quiet or common.json, waiting=not common.quiet, verbose=common.verbose
    ) as progress:
        runner = common.open(progress)
        work = {"migrate": runner.migrate, "down": runner.down}[what]
        try:
            result = run_async(partial(work, target, steps=steps, **how), quiet=common.json)
        except Interrupted as error:
            raise Interrupted(error.signum, progress.applied, progress.outside) from None
    common.finish(render.migration_result(result, what), render.document(result))


def _show_plan(
    common: Common, sql: bool, plan: Callable[[], Awaitable[list[msr.PlannedScript]]]
) -> None:
    scripts = run_async(plan, quiet=common.json)
    if common.json:
        common.show("", {"plan": [render.planned(script, with_text=sql) for script in scripts]})
    elif sql:
        echo(render.plan_text(scripts))
    else:
        terminal.show_table(*render.plan_table(scripts))


def _list(
    common: Common,
    number: Annotated[
        int | None,
        typer.Option("-n", metavar="N", min=1, help="Only the last N.", show_default=False),
    ] = None,
) -> None:
    """Show every script and what became of it."""
    rows = run_async(common.open().list)
    shown = rows if number is None else rows[-number:]
    if common.json:
        common.show("", {"scripts": shown, "total": len(rows)})
    else:
        brief = sys.stdout.isatty()
        terminal.show_table(*render.script_table(rows, shown, common.verbose, brief))


def _validate(
    common: Common,
    database: Annotated[
        bool, typer.Option("--database", help="Also compare the scripts with the history.")
    ] = False,
) -> None:
    """Find all that is wrong with the scripts."""
    if database or common.executor is not None:
        runner = common.open()
        if database:
            problems = run_async(runner.validate, quiet=common.json)
        else:
            config, dialect = runner.config, runner.handler.dialect
            problems = run_async(lambda: msr.validate(config, dialect), quiet=common.json)
    else:
        config, url_dialect = config_from(common.source())
        problems = run_async(lambda: msr.validate(config, url_dialect), quiet=common.json)
    if problems and common.json:
        common.show("", {"problems": problems})
        to_stderr(f"✗ Error: {render.one_line(msr.ValidationError(problems))}")
        raise typer.Exit(2)
    if problems:
        raise msr.ValidationError(problems)
    common.finish("✓ No problems found", {"problems": []})


def _new(
    common: Common,
    name: Annotated[str, typer.Argument(metavar="NAME", help="What it does: 'add users'.")],
    sql: Annotated[bool, typer.Option("--sql", help="In SQL (the default).")] = False,
    python: Annotated[bool, typer.Option("--python", help="In Python.")] = False,
) -> None:
    """Write a new script, both directions."""
    if sql and python:
        raise msr.ConfigError("contradicts --sql", source="--python")
    if common.executor is not None:
        folder = common.open().config.folder
    else:
        folder = config_from(common.source())[0].folder
    paths = msr.new_script(folder, name, "python" if python else "sql")
    common.finish("\n".join(f"Created {path}" for path in paths), {"files": paths})


def _baseline(
    common: Common,
    version: Annotated[
        int, typer.Argument(metavar="VERSION", min=0, help="The newest that is there already.")
    ],
    wait: Wait = None,
    no_wait: NoWait = False,
) -> None:
    """Start with a database that exists already."""
    seconds = wait_from(wait, no_wait)
    with terminal.progress(quiet=True, waiting=not common.quiet) as progress:
        runner = common.open(progress)
        recorded = run_async(lambda: runner.baseline(version, wait=seconds))
    what = "recorded" if recorded else "had been recorded before"
    text = f"✓ Baseline {version} {what}: scripts up to that version never run here"
    common.finish(text, {"baseline": version, "recorded": recorded})


def _repair(
    common: Common,
    version: Annotated[
        str | None,
        typer.Argument(metavar="[VERSION]", help="The script; default every edited one."),
    ] = None,
    applied: Annotated[
        bool, typer.Option("--applied", help="All that it does is done: record it as applied.")
    ] = False,
    retry: Annotated[
        bool, typer.Option("--retry", help="Its part is undone: let the next migrate run it again.")
    ] = False,
    yes: Yes = False,
    wait: Wait = None,
    no_wait: NoWait = False,
) -> None:
    """Settle failed scripts, or accept edits.

    A script that failed, or was never finished, outside a transaction: --applied or --retry.

    An edit of an applied script is shown, and accepted if you say so: it is recorded, not run.
    """
    seconds = wait_from(wait, no_wait)
    if applied and retry:
        raise msr.ConfigError("contradicts --retry", source="--applied")
    if yes and (applied or retry):
        raise msr.ConfigError("nothing is asked then: leave it away", source="--yes")
    with terminal.progress(quiet=True, waiting=not common.quiet) as progress:
        runner = common.open(progress)
        key = _key(version)
        if applied or retry:
            if key is None:
                raise msr.ConfigError(
                    "say which script", source="--applied" if applied else "--retry"
                )
            row = run_async(lambda: runner.repair(key, applied=applied, wait=seconds))
            outcome = "recorded as applied" if applied else "the next msr migrate runs it again"
            assert row is not None, "it raises unless there is something to settle"
            name = row.name if row.version is None else f"Version {row.version} ({row.name})"
            common.finish(f"✓ {name}: {outcome}", {"settled": render.settled(row, applied)})
            return
        _accept_edits(common, runner, key, yes, seconds)


def _key(script: str | None) -> int | str | None:
    """What names a script in the history, from that or from its file's name."""
    if script is None:
        return None
    if found := re.fullmatch(r"V?([0-9]+)(?:_.*)?", script):
        return int(found[1])
    return re.sub(r"^R_+|\.(?:sql|py)$", "", script)


def _accept_edits(
    common: Common,
    runner: msr.MigrationScriptExecutor,
    key: int | str | None,
    yes: bool,
    wait: float | None,
) -> None:
    changes = run_async(runner.find_changes)
    if key is not None:
        changes = [change for change in changes if change.version == key]
        if not changes:
            run_async(lambda: runner.repair(key, wait=wait))  # says why there is nothing to do
    common.require_answer(yes)
    if key is None and not changes:
        rows = run_async(runner.list)
        stuck = [it.file or it.name for it in rows if it.status in ("unfinished", "failed")]
        if stuck:
            way_out = "for each say 'msr repair VERSION --applied' or '--retry'"
            raise msr.ConfigError(f"left half done: {', '.join(stuck)}; {way_out}")
    if changes and not common.json:
        echo("\n".join(render.difference(change) for change in changes))
    if changes and not common.agrees(render.ACCEPT, "accepted", yes=yes):
        return
    for change in changes:
        run_async(partial(runner.repair, change.version, checksum=change.checksum, wait=wait))
        if not (common.json or common.quiet):
            echo(f"Accepted {change.script}")
    text = "✓ Nothing to repair: no applied script was edited"
    if changes:
        text = f"✓ {render.count(len(changes))} accepted as edited"
    common.finish(text, {"repaired": changes})
