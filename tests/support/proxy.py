"""A network that fails: a TCP proxy before PostgreSQL that falls silent, or cuts connections.

Silent means what a pulled cable does: nobody is told, the sockets stay open, nothing passes. What
was sent meanwhile arrives after all when the proxy resumes, as TCP would have it.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Literal, Self
from urllib.parse import urlsplit, urlunsplit

__all__ = ["Direction", "Proxy"]

Direction = Literal["to server", "to client"]

DIRECTIONS: tuple[Direction, ...] = ("to server", "to client")


class _Link:
    """One connection: two sockets, and for each direction whether data may pass."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.sockets = {"to server": (client, server), "to client": (server, client)}
        self.passes = {direction: threading.Event() for direction in DIRECTIONS}
        self.resume()

    def resume(self) -> None:
        for passes in self.passes.values():
            passes.set()

    def cut(self) -> None:
        for end in self.sockets["to server"]:
            with contextlib.suppress(OSError):  # it is closed already
                end.shutdown(socket.SHUT_RDWR)
        self.resume()


class Proxy:
    """Forwards to the server of a PostgreSQL URL, for as long as the `with` block lasts.

    `url` leads to the same database through the proxy.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        account, at, _ = parts.netloc.rpartition("@")
        self._server = (parts.hostname, parts.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.url = urlunsplit(parts._replace(netloc=f"{account}{at}{address}"))
        self._links: list[_Link] = []
        self._changing = threading.Lock()  # so that a new connection misses no change
        self._threads: list[threading.Thread] = []
        self._silent: tuple[Direction, ...] = ()  # on new connections
        self._refuses = False
        self.refused = 0
        """How many connections it did not let through."""
        self._trap: tuple[Direction, bytes, Callable[[], None]] | None = None

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # which wakes up who accepts
        self._threads[0].join()
        for link in self._links:
            link.cut()
        for thread in self._threads:
            thread.join()
        for link in self._links:
            for end in link.sockets["to server"]:
                end.close()
        self._listener.close()

    @property
    def connections(self) -> int:
        """How many there have been until now."""
        return len(self._links)

    def silence(self, *directions: Direction, new: bool = True) -> None:
        """Let nothing pass from now on, in these directions or both, nor on `new` connections."""
        directions = directions or DIRECTIONS
        with self._changing:
            if new:
                self._silent = directions
            for link in self._links:
                for direction in directions:
                    link.passes[direction].clear()

    def resume(self) -> None:
        """Let everything pass again."""
        with self._changing:
            self._silent, self._refuses = (), False
            for link in self._links:
                link.resume()

    def cut(self, *, new: bool = False) -> None:
        """End every connection, so that both sides know; `new` ones too, from now on."""
        with self._changing:
            self._refuses = new
            for link in self._links:
                link.cut()

    def when(self, direction: Direction, pattern: bytes, act: Callable[[], None]) -> None:
        """Call `act` once, before bytes with `pattern` pass on the first connection."""
        self._trap = (direction, pattern, act)

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # the end of the `with` block
                return
            with self._changing:
                link = self._link(client)
            if link is None:
                client.close()
                continue
            for direction in DIRECTIONS:
                self._start(self._forward, link, direction)

    def _link(self, client: socket.socket) -> _Link | None:
        """A new connection, as things stand now; None where there is none, which it has to hear."""
        if self._refuses:
            self.refused += 1
            return None
        try:
            server = socket.create_connection(self._server)
        except OSError:  # it is down
            return None
        link = _Link(client, server)
        for direction in self._silent:
            link.passes[direction].clear()
        self._links.append(link)
        return link

    def _forward(self, link: _Link, direction: Direction) -> None:
        source, target = link.sockets[direction]
        with contextlib.suppress(OSError):  # the connection was cut
            while data := source.recv(65536):
                self._spring_trap(link, direction, data)
                link.passes[direction].wait()
                target.sendall(data)
            link.passes[direction].wait()
            target.shutdown(socket.SHUT_WR)

    def _spring_trap(self, link: _Link, direction: Direction, data: bytes) -> None:
        if self._trap is not None and link is self._links[0]:
            where, pattern, act = self._trap
            if where == direction and pattern in data:
                self._trap = None
                act()
