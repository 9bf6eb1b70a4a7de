"""`msr` without the time that Python needs to start: a fork of a process that has it loaded.

It is a process of its own all the same, with its own streams, environment and folder, and it ends
as a process does. With `MSR_TEST_START=script` the tests start the installed script instead.

    python -m tests.support.forks FD     serve requests on the socket FD until that is closed
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import random
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["fork_msr"]

ROOT = Path(__file__).parents[2]

_servers = threading.local()  # one for each thread, so that none waits for another's command


class _Server:
    """The process that is forked, seen from the test."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # It ends when our end of the socket is closed, with this process at the latest.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.forks", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            cwd=ROOT,
        )
        theirs.close()

    def ask(self, request: Mapping[str, Any], descriptors: Sequence[int]) -> int:
        """Have it fork; the process id."""
        socket.send_fds(self.socket, [json.dumps(request).encode()], list(descriptors))
        return int(self.answer())

    def answer(self) -> str:
        answer = self.socket.recv(100).decode()
        assert answer, "the process that is forked has ended; why stands on stderr"
        return answer


def fork_msr(
    arguments: Sequence[str], text: str, env: Mapping[str, str], cwd: Path | None, timeout: float
) -> tuple[int, str, str]:
    """Run `msr` to its end: its exit code, its standard output, and its standard error.

    Raises `subprocess.TimeoutExpired` after `timeout` seconds, when it has been ended.
    """
    if not hasattr(_servers, "server"):
        _servers.server = _Server()
    server: _Server = _servers.server
    readers, writers = zip(*(os.pipe() for _ in range(3)), strict=True)
    request = {"arguments": list(arguments), "env": dict(env), "cwd": str(cwd or Path.cwd())}
    pid = server.ask(request, [readers[0], *writers[1:]])
    for descriptor in (readers[0], *writers[1:]):
        os.close(descriptor)
    with open(writers[0], "w", encoding="utf-8") as stdin, contextlib.suppress(BrokenPipeError):
        stdin.write(text)
    outputs = _read_all(readers[1:], time.monotonic() + timeout)
    if outputs is None:
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(int(server.answer()))
    for descriptor in readers[1:]:
        os.close(descriptor)
    if outputs is None:
        raise subprocess.TimeoutExpired(["msr", *arguments], timeout)
    return status, outputs[0], outputs[1]


def _read_all(descriptors: Sequence[int], deadline: float) -> list[str] | None:
    """Everything that comes from each until they are closed; None if that takes too long."""
    received = {descriptor: bytearray() for descriptor in descriptors}
    with selectors.DefaultSelector() as selector:
        for descriptor in descriptors:
            selector.register(descriptor, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                return None
            for key, _ in ready:
                data = os.read(key.fd, 65536)
                received[key.fd] += data
                if not data:
                    selector.unregister(key.fd)
    return [bytes(data).decode().replace("\r\n", "\n") for data in received.values()]


# In the process that is forked


LOADED = (
    *("anyio._backends._asyncio", "asyncpg", "rich.progress", "rich.table", "typer._adapters"),
    *("msr.handlers.postgres", "msr.handlers.sqlite", "msr_cli.app"),
)
"""What a command would load by itself, sooner or later."""


def _serve(connection: socket.socket) -> None:
    for module in LOADED:
        with contextlib.suppress(ImportError):  # another release of typer may do without it
            importlib.import_module(module)
    gc.freeze()
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, 1_000_000, 3)
        if not message:
            return
        pid = os.fork()
        if pid == 0:
            connection.close()
            _run(json.loads(message), descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        connection.sendall(str(pid).encode())
        _, status = os.waitpid(pid, 0)
        connection.sendall(str(status).encode())


def _run(request: Mapping[str, Any], descriptors: Sequence[int]) -> None:
    """What the script `msr` does, in this process; then the end of it."""
    from msr_cli.__main__ import main

    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin = os.fdopen(0, "r", encoding="utf-8")
    sys.stdout = os.fdopen(1, "w", encoding="utf-8")
    sys.stderr = os.fdopen(2, "w", encoding="utf-8")
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    random.seed()
    sys.argv = ["msr", *request["arguments"]]
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
        os._exit(code)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt of the tests is theirs
    _serve(socket.socket(fileno=int(sys.argv[1])))
