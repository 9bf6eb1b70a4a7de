"""A real PgBouncer in front of the tests' PostgreSQL, in either of its two modes.

It forgets nothing for its clients (`server_reset_query` is empty), as most poolers in transaction
mode do: what a client leaves on a server session stays there and meets the next one.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self
from urllib.parse import unquote, urlsplit

from tests.support.postgres import free_port, make_folder, unprivileged_account
from tests.support.tools import find

__all__ = ["Mode", "PgBouncer"]

Mode = Literal["transaction", "session"]


class PgBouncer:
    """A pooler on 127.0.0.1 for every database of the server at `url`, until the `with` ends."""

    def __init__(self, url: str, mode: Mode) -> None:
        program = find("pgbouncer", "pgbouncer")
        account = unprivileged_account()
        self._folder = make_folder("msr-pgbouncer-", account)
        self._log = self._folder / "log"
        self._port = free_port()
        settings = self._folder / "pgbouncer.ini"
        settings.write_text(_settings(url, mode, self._port, self._log))
        # Its messages would come twice: on stderr, and in the log.
        self._process = subprocess.Popen(
            [program, "--quiet", str(settings)],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd=self._folder,
            **account,
        )
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def url(self, direct: str) -> str:
        """The URL of the same database by way of the pooler."""
        parts = urlsplit(direct)
        return f"postgresql://{parts.username or 'postgres'}@127.0.0.1:{self._port}{parts.path}"

    def close(self) -> None:
        """End it at once, whoever is connected, and remove its folder."""
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._folder)

    def _wait(self) -> None:
        deadline = time.monotonic() + 30
        while True:
            try:
                return socket.create_connection(("127.0.0.1", self._port), timeout=5).close()
            except OSError as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    log = self._log.read_text(errors="replace") if self._log.exists() else ""
                    raise RuntimeError(f"PgBouncer did not start: {error}\n{log}") from error
                time.sleep(0.02)


def _settings(url: str, mode: Mode, port: int, log: Path) -> str:
    parts = urlsplit(url)
    server: Mapping[str, object] = {
        "host": parts.hostname,
        "port": parts.port,
        "user": unquote(parts.username or "postgres"),
        "password": unquote(parts.password or ""),
    }
    address = " ".join(f"{name}='{value}'" for name, value in server.items() if value)
    return "\n".join(
        [
            "[databases]",
            f"* = {address}",
            "[pgbouncer]",
            f"pool_mode = {mode}",
            "server_reset_query =",
            "default_pool_size = 20",
            "listen_addr = 127.0.0.1",
            f"listen_port = {port}",
            "unix_socket_dir =",
            "auth_type = any",
            f"logfile = {log}",
            "",
        ]
    )
