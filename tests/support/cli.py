"""Run the installed `msr` command as a user does: as a process, with its real streams."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import anyio

from tests.support.forks import Fork
from tests.support.rig import Rig

__all__ = [
    "MSR",
    "PATIENCE",
    "Result",
    "end",
    "end_started",
    "own_lines",
    "run_msr",
    "start_msr",
    "start_python",
    "unstamped",
    "unwaited",
    "wait_until",
    "wait_until_async",
    "write_scripts",
]

T = TypeVar("T")

STARTS_THE_SCRIPT = os.environ.get("MSR_TEST_START") == "script"
"""Read before the environment is cleaned."""

PATIENCE = 45.0
"""Seconds to wait for what ought to happen soon; it is a few less than a test has altogether."""

MSR = Path(sys.executable).with_name("msr")
"""The script that installing the project puts beside this interpreter."""

_started: list[subprocess.Popen[str]] = []


@dataclass(frozen=True)
class Result:
    """How a command ended, and what it wrote."""

    exit_code: int
    stdout: str
    stderr: str


def run_msr(
    *arguments: str | Path,
    input: str | None = None,  # noqa: A002  # the name that subprocess.run has for it
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = PATIENCE,
) -> Result:
    """`start_msr`, to its end. Without `input`, stdin is empty.

    Raises `subprocess.TimeoutExpired` after `timeout` seconds.
    """
    process = start_msr(*arguments, env=env, cwd=cwd)
    stdout, stderr = process.communicate(input, timeout)
    return Result(process.returncode, stdout, stderr)


def start_msr(
    *arguments: str | Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    rig: Rig | None = None,
    prefix: Sequence[str] = (),
) -> subprocess.Popen[str]:
    """Start `msr` in a process group of its own, with pipes for its three streams.

    `env` adds to the test's environment. `rig` builds a fault into it; `prefix` is a command that
    runs it, for example `faketime`. What still runs when the test is over is ended then, see
    `end_started`.

    It is a fork of a process that has `msr` loaded, unless MSR_TEST_START=script asks for the
    installed script, there is a `prefix`, or `env` holds what Python itself would read when it
    starts: see `forks`.
    """
    return _start([*map(str, arguments)], rig, prefix, env, cwd)


def start_python(
    code: str, *arguments: object, rig: Rig | None = None, prefix: Sequence[str] = ()
) -> subprocess.Popen[str]:
    """Start a Python program of the test's own, with `sys.argv[1:]`; as `start_msr` does."""
    return _start(["-c", code, *map(str, arguments)], rig or Rig(), prefix)


def _start(
    words: Sequence[str],
    rig: Rig | None,
    prefix: Sequence[str],
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> subprocess.Popen[str]:
    environment = {**os.environ, **(env or {})}
    process: subprocess.Popen[str]
    if STARTS_THE_SCRIPT or prefix or any(not name.startswith("MSR_") for name in env or ()):
        process = subprocess.Popen(
            [*prefix, *(rig.command(*words) if rig else [str(MSR), *words])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env={**environment, **(rig.environment if rig else {})},
            cwd=cwd,
            start_new_session=True,
        )
    else:
        process = Fork(words, environment, cwd, rig.to_json() if rig else None)
    _started.append(process)
    return process


def end_started() -> None:
    """End what was started and the test left running, see `end`."""
    while _started:
        end(_started.pop())


def end(process: subprocess.Popen[str]) -> None:
    """End a process, if it still runs, with its children, frozen or not."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):  # just ended
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None and not stream.closed:
            with contextlib.suppress(BrokenPipeError):  # what it never read
                stream.close()


def unstamped(text: str) -> str:
    """What a command wrote, without the time at the beginning of lines about its progress."""
    return re.sub(r"^20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ ", "", text, flags=re.MULTILINE)


def unwaited(text: str) -> str:
    """What a command wrote, without time stamps and without the lines about whom it waits for.

    How many of these there are, and what they say, depends on when it looked.
    """
    lines = unstamped(text).splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("Waiting for the migration lock"))


def own_lines(text: str) -> list[str]:
    """The lines of `msr` itself: without the line of the failed script, and the caret below it."""
    return [line for line in text.splitlines() if not re.match(r" +\d* \| ", line)]


def wait_until(
    predicate: Callable[[], T], timeout: float = PATIENCE, interval: float | None = None
) -> T:
    """The first true value of `predicate`, which is asked again for up to `timeout` seconds.

    Every `interval` seconds or, unless that is given, ever less often: many predicates open a
    connection to the database, which costs the processes that they wait for.
    """
    started = time.monotonic()
    while not (value := predicate()):
        time.sleep(_pause(started, timeout, interval, value))
    return value


async def wait_until_async(
    predicate: Callable[[], Awaitable[T]], timeout: float = PATIENCE, interval: float | None = None
) -> T:
    """`wait_until` for an async predicate, without blocking the loop."""
    started = time.monotonic()
    while not (value := await predicate()):
        await anyio.sleep(_pause(started, timeout, interval, value))
    return value


def _pause(started: float, timeout: float, interval: float | None, value: object) -> float:
    waited = time.monotonic() - started
    assert waited < timeout, f"not so within {timeout} s; the last value: {value!r}"
    return interval or min(0.02 + waited / 10, 0.25)


def write_scripts(folder: Path, scripts: Mapping[str, str | bytes]) -> Path:
    """Write scripts by name, sub-folders included: text dedented, bytes as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in scripts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(textwrap.dedent(content), encoding="utf-8")
    return folder
