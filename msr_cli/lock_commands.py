"""The commands that look at the migration lock, and release it."""

from __future__ import annotations

from typing import Annotated

import typer

import msr
from msr_cli import render
from msr_cli.options import Yes
from msr_cli.running import Common, command, echo, run_async

__all__ = ["add_commands"]


def add_commands(app: typer.Typer) -> None:
    command(app, "lock:status", unreachable=1)(_status)
    command(app, "lock:release", unreachable=1)(_release)


def _status(common: Common) -> None:
    """Show who holds the migration lock."""
    status = run_async(common.open().get_lock_status)
    known = {} if status is None else render.document(status)
    document = {"configured": status is not None, **known}
    common.show(f"\n{render.lock_status(status)}", document)


def _release(
    common: Common,
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Required: releasing a lock is dangerous.")
    ] = False,
    yes: Yes = False,
    reason: Annotated[
        str | None,
        typer.Option("--reason", metavar="TEXT", help="Why; kept on the lock.", show_default=False),
    ] = None,
    terminate: Annotated[
        bool,
        typer.Option(
            "--terminate", help="Also end the holder's database session (PostgreSQL only)."
        ),
    ] = False,
) -> None:
    """Force-release a stuck migration lock."""
    if not force:
        raise msr.LockError(render.FORCE_REQUIRED)
    common.require_answer(yes)
    runner = common.open()
    status = run_async(runner.get_lock_status)
    if status is None:
        _, *sentences = render.NOT_CONFIGURED.splitlines()
        raise msr.LockError(" ".join(sentences))
    released = None
    if status.is_locked:
        if not common.json and not (common.quiet and yes):
            echo(f"\n{render.release_warning(status)}")
        if not common.agrees(render.PROMPT, "released", yes=yes):
            return
        released = run_async(
            lambda: runner.force_release_lock(
                token=status.token, reason=reason, terminate=terminate
            )
        )
    text = render.NOTHING_TO_RELEASE if released is None else render.RELEASED
    common.finish(f"\n{text}", {"released": released})
