"""`msr` without the time that Python needs to start: a fork of a process that has it loaded.

It is a process of its own all the same, with its own streams, environment, folder and session, and
it ends as a process does. With `MSR_TEST_START=script` the tests start the installed script.

    python -m tests.support.forks FD     serve requests on the socket FD until that is closed
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import json
import os
import random
import select
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["Fork"]

ROOT = Path(__file__).parents[2]

NUMBER = struct.Struct("i")
"""What is told of a fork: the id of its process, and how that ended, as `os.waitpid` has it."""


class Fork(subprocess.Popen[str]):
    """A fork that tests use as they use what `subprocess.Popen` starts: the same public methods.

    It runs `msr` with `arguments`, or with a `rig`, the faults as JSON, `tests.support.rig`.
    """

    def __init__(
        self, arguments: Sequence[str], env: Mapping[str, str], cwd: Path | None, rig: str | None
    ) -> None:
        readers, writers = zip(*(os.pipe() for _ in range(4)), strict=True)
        words = ["msr", *([] if rig is None else [rig]), *arguments]
        request = {
            "words": words,
            "rigged": rig is not None,
            "env": dict(env),
            "cwd": str(cwd or Path.cwd()),
        }
        theirs = [readers[0], *writers[1:]]
        socket.send_fds(_server()[0], [json.dumps(request).encode()], theirs)
        for descriptor in theirs:
            os.close(descriptor)
        self.args = words
        self.stdin = os.fdopen(writers[0], "w", encoding="utf-8")
        self.stdout = os.fdopen(readers[1], encoding="utf-8")
        self.stderr = os.fdopen(readers[2], encoding="utf-8")
        self.returncode = None
        self._received = {stream.fileno(): bytearray() for stream in (self.stdout, self.stderr)}
        self._news = readers[3]
        self.pid = self._hear()

    def _hear(self) -> int:
        message = os.read(self._news, NUMBER.size)
        assert message, "the process that is forked has ended; why stands on stderr"
        number: int
        (number,) = NUMBER.unpack(message)
        return number

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            news = select.poll()
            news.register(self._news, select.POLLIN)
            if not news.poll(None if timeout is None else max(timeout, 0) * 1000):
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = os.waitstatus_to_exitcode(self._hear())
            os.close(self._news)
        return int(self.returncode)

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # ended meanwhile, and waited for
                os.kill(self.pid, sig)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def communicate(
        self,
        input: str | None = None,  # noqa: A002  # the name that Popen has for it
        timeout: float | None = None,
    ) -> tuple[str, str]:
        deadline = None if timeout is None else time.monotonic() + timeout
        assert self.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            if input:
                self.stdin.write(input)
            self.stdin.close()
        with selectors.DefaultSelector() as selector:
            for descriptor in self._received:
                selector.register(descriptor, selectors.EVENT_READ)
            while selector.get_map():
                ready = selector.select(_left(deadline))
                if not ready:
                    raise subprocess.TimeoutExpired(self.args, timeout or 0)
                for key, _ in ready:
                    data = os.read(key.fd, 65536)
                    self._received[key.fd] += data
                    if not data:
                        selector.unregister(key.fd)
        for stream in (self.stdout, self.stderr):
            assert stream is not None
            stream.close()
        self.wait(_left(deadline))
        stdout, stderr = (
            bytes(data).decode().replace("\r\n", "\n") for data in self._received.values()
        )
        return stdout, stderr


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())


@functools.cache
def _server() -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """The process that is forked, and its socket. It ends when our end of that is closed."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.forks", str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
    )
    theirs.close()
    return ours, process


# In the process that is forked


LOADED = (
    *("aiosqlite", "anyio._backends._asyncio", "anyio._core._fileio", "asyncpg"),
    *("importlib.metadata", "importlib.resources"),
    *("rich.progress", "rich.table", "typer._adapters"),
    *("msr.handlers.postgres", "msr.handlers.sqlite", "msr.prepare", "msr.unit", "msr_cli.app"),
    "tests.support.rig",
)
"""What a command would load by itself, sooner or later."""


def _serve(connection: socket.socket) -> None:
    for module in LOADED:
        with contextlib.suppress(ImportError):  # another release of typer may do without it
            importlib.import_module(module)
    gc.freeze()
    ended, wakeup = socket.socketpair()
    wakeup.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakeup.fileno())
    news: dict[int, int] = {}  # where to tell of the end of a process
    with selectors.DefaultSelector() as selector:
        selector.register(connection, selectors.EVENT_READ)
        selector.register(ended, selectors.EVENT_READ)
        while True:
            if ended in (ready := {key.fileobj for key, _ in selector.select()}):
                ended.recv(4096)
                _tell_ends(news)
            if connection in ready:
                message, descriptors, _, _ = socket.recv_fds(connection, 1_000_000, 4)
                if not message:
                    return
                pid = os.fork()
                if pid == 0:
                    for open_one in (connection, ended, wakeup, selector):
                        open_one.close()
                    for descriptor in (descriptors.pop(), *news.values()):
                        os.close(descriptor)
                    _run(json.loads(message), descriptors)
                news[pid] = descriptors.pop()
                for descriptor in descriptors:
                    os.close(descriptor)
                _tell(news[pid], pid)


def _tell_ends(news: dict[int, int]) -> None:
    while news:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        descriptor = news.pop(pid)
        _tell(descriptor, status)
        os.close(descriptor)


def _tell(descriptor: int, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # the test has ended without waiting for it
        os.write(descriptor, NUMBER.pack(number))


def _run(request: Mapping[str, Any], descriptors: Sequence[int]) -> NoReturn:
    """What the script `msr` does, or `tests.support.rig`, in this process; then the end of it."""
    if request["rigged"]:
        from tests.support.rig import main
    else:
        from msr_cli.__main__ import main

    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin = os.fdopen(0, "r", encoding="utf-8")
    sys.stdout = os.fdopen(1, "w", encoding="utf-8")
    sys.stderr = os.fdopen(2, "w", 1, encoding="utf-8", errors="backslashreplace")
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    random.seed()
    sys.argv = request["words"]
    sys.modules["__main__"] = types.ModuleType(
        "__main__"
    )  # typer would name the command after ours
    code = 1
    try:
        main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.flush()
            sys.stderr.flush()
        for thread in threading.enumerate():  # Python, too, waits for these
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        os._exit(code)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt of the tests is theirs
    _serve(socket.socket(fileno=int(sys.argv[1])))
