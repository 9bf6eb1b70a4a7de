"""A command at a real terminal of its own."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pexpect.fdpexpect import fdspawn

from tests.support.cli import MSR, PATIENCE

__all__ = ["at_a_terminal"]


@contextmanager
def at_a_terminal(
    *arguments: str, env: Mapping[str, str] | None = None, timeout: float = PATIENCE
) -> Iterator[tuple[Any, subprocess.Popen[bytes]]]:
    """Run `msr`: what reads its terminal, each time for `timeout` seconds, and the process."""
    ours, theirs = pty.openpty()
    # The shell through setsid: Ctrl-C reaches a process only at its controlling terminal.
    process = subprocess.Popen(
        ["setsid", "--ctty", "--wait", str(MSR), *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, **(env or {})},
    )
    os.close(theirs)
    try:
        yield fdspawn(ours, encoding="utf-8", timeout=timeout), process
    finally:
        process.kill()
        process.wait()
        with contextlib.suppress(OSError):
            os.close(ours)
