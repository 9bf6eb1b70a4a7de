"""The lock on SQLite as a system of steps; see `msr.handlers.sqlite_lock` for the real one.

A step is a transaction of its own, or a part of a script's: one connection at a time is between
BEGIN IMMEDIATE and COMMIT, and nobody else writes meanwhile, the heartbeat included. A process
that dies takes its transaction and its lock on the file along at once; one that stands still keeps
both. Bounds, names and promises are those of `postgres_protocol`, with these differences:

    S5      two clients are in a script's transaction
    proof   the row was taken although the lease had not expired and its holder's process lived
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from tests.model.explorer import CLOCK, FAULT, OPERATOR, SERVER

__all__ = ["SqliteModel", "SqliteRules"]

OUT = "out"
WANT = "waiting"
TAKEN = "row, no file"  # only with a mutant
HELD = "holds"
BODY = "in a script"
FENCED = "fenced"
BETWEEN = "between two commits"  # only with a mutant
RELEASING = "releasing"
DONE = "done"

IN_SCRIPT = {BODY, FENCED}
WITH_LEASE = {TAKEN, HELD, BODY, FENCED, BETWEEN, RELEASING}

NOBODY = -1


@dataclass(frozen=True, kw_only=True)
class SqliteRules:
    """The protocol's parts, each of which a mutant can switch off."""

    first_fence: bool = True
    """The first statement of a script's transaction renews the row, and must hit it."""
    last_fence: bool = True
    """The last one too."""
    immediate: bool = True
    """A script's transaction is the only one that may write from its beginning."""
    one_transaction: bool = True
    file_before_row: bool = True
    """The file is locked before the row that names it can be seen."""
    dead_are_found: bool = True
    """A holder whose file is not locked is dead, whatever its lease says."""
    file_proves: bool = True
    """Only the file's lock proves a death; without, a process id seen from another container."""
    release_by_token: bool = True
    renew_by_token: bool = True
    token_from_counter: bool = True
    force_compares_token: bool = True


class Row(NamedTuple):
    token: int
    owner: int
    expired: bool


class Client(NamedTuple):
    phase: str
    token: int = 0
    version: int = 0


class State(NamedTuple):
    """Everything. `writer` is the client whose script's transaction may write."""

    row: Row | None
    greatest: int
    applied: int
    changed: int
    writer: int
    clients: tuple[Client, ...]
    mail: tuple[str, int, int] | None = None
    seen: int = 0


Step = tuple[int, str, State, str | None]


@dataclass(frozen=True, kw_only=True)
class SqliteModel:
    """The system for a number of clients and scripts."""

    rules: SqliteRules = SqliteRules()
    clients: int = 2
    scripts: int = 2
    mail: bool = True
    looks: bool = True

    @property
    def initial(self) -> State:
        return State(None, 0, 0, 0, NOBODY, (Client(WANT),) * self.clients)

    def steps(self, state: State) -> Iterator[Step]:
        for c in range(self.clients):
            yield from self._client(state, c)
        yield from self._environment(state)

    def canonical(self, state: State) -> State:
        return _renumbered(state)

    def broken(self, state: State) -> str | None:
        phases = [client.phase for client in state.clients]
        if sum(phase in IN_SCRIPT for phase in phases) > 1:
            return "S5"
        if state.changed != state.applied + phases.count(BETWEEN):
            return "S7"
        return None

    def waits(self, state: State, c: int) -> bool:
        """Client c wants to migrate, has not got the lock yet, and nobody is in a script.

        Whoever stands still inside a script's transaction keeps everybody out, and SQLite has no
        session that could be ended: there the lease alone does not help.
        """
        if state.writer not in (c, NOBODY):
            return False
        return state.applied < self.scripts and state.clients[c].phase in {WANT, OUT}

    def deserted(self, state: State, c: int) -> bool:
        """Client c waits, and no other process has anything to do with the lock."""
        others = state.clients[:c] + state.clients[c + 1 :]
        return self.waits(state, c) and all(other.phase in (OUT, WANT, DONE) for other in others)

    def served(self, state: State, c: int) -> bool:
        """Client c has got the lock, or has no need of it any more."""
        return state.applied == self.scripts or state.clients[c].phase in {HELD, DONE}

    def _client(self, s: State, c: int) -> Iterator[Step]:
        me = s.clients[c]
        phase, token = me.phase, me.token
        quiet = s.writer == NOBODY
        if phase == OUT and s.applied < self.scripts:
            yield c, "starts", _put(s, c, Client(WANT)), None
        elif phase == WANT and s.applied == self.scripts:
            yield c, "sees the schema at head", _put(s, c, Client(DONE)), None
        elif phase == WANT and quiet:
            yield from self._acquire(s, c)
        elif phase == TAKEN:
            yield c, "locks its file", _put(s, c, Client(HELD, token)), None
        elif phase == HELD:
            if s.applied < self.scripts and (quiet or not self.rules.immediate):
                yield from self._begin(s, c)
            yield c, "has nothing more to do", _put(s, c, Client(RELEASING, token)), None
        elif phase == BODY:
            yield from self._fence(s, c)
        elif phase == FENCED:
            after = _put(s, c, Client(HELD, token))._replace(writer=NOBODY)
            if self.rules.one_transaction:
                after = after._replace(changed=s.changed + 1, applied=s.applied + 1)
                yield c, "commits", after, None if self._current(s, c, token) else "S2"
            else:
                after = _put(after, c, me._replace(phase=BETWEEN))
                after = after._replace(changed=s.changed + 1)
                yield c, "commits the script's changes", after, None
        elif phase == BETWEEN and quiet:
            after = _put(s, c, Client(HELD, token))._replace(applied=s.applied + 1)
            yield c, "commits the history", after, None if self._current(s, c, token) else "S2"
        elif phase == RELEASING and quiet:
            after, promise = self._released(s, c, token)
            end = DONE if s.applied == self.scripts else OUT
            yield c, "releases", _put(after, c, Client(end)), promise
        if phase in {TAKEN, HELD} and quiet:
            renewed, promise, ok = self._renewed(s, c, token)
            if not ok:
                yield c, "finds that the lock is lost", _put(s, c, Client(OUT)), None
            elif renewed is not s:
                yield c, "renews", renewed, promise
        if phase in WITH_LEASE:
            writer = NOBODY if s.writer == c else s.writer
            crashed = _put(s, c, Client(OUT))._replace(writer=writer)
            yield FAULT, f"client {'ABC'[c]} crashes", crashed, None
            if self.mail and s.mail is None and phase in {HELD, RELEASING}:
                # A thread of its own goes on after the task that waited for it was cancelled.
                kind = "renew" if phase == HELD else "release"
                late = _put(s, c, Client(OUT))._replace(mail=(kind, c, token))
                yield c, f"is cancelled, its thread still to {kind}", late, None

    def _acquire(self, s: State, c: int) -> Iterator[Step]:
        row = s.row or Row(0, NOBODY, False)
        if not (row.owner == NOBODY or row.expired or self._is_called_dead(s, row)):
            return
        token, promise = self._next_token(s, row)
        if row.owner != NOBODY and not row.expired and self._lives(s, row):
            promise = promise or "proof"
        s = s._replace(row=Row(token, c, False), greatest=max(s.greatest, token))
        then = HELD if self.rules.file_before_row else TAKEN
        yield c, "takes the row", _put(s, c, Client(then, token)), promise

    def _begin(self, s: State, c: int) -> Iterator[Step]:
        token = s.clients[c].token
        renewed, promise, ok = self._renewed(s, c, token)
        if not self.rules.first_fence:
            renewed, promise, ok = s, None, True
        if ok:
            writer = c if self.rules.immediate else s.writer
            begun = _put(renewed, c, Client(BODY, token, s.applied))._replace(writer=writer)
            yield c, "begins a script", begun, promise
        else:
            yield c, "is fenced off at the beginning", _put(s, c, Client(RELEASING, token)), None

    def _fence(self, s: State, c: int) -> Iterator[Step]:
        me = s.clients[c]
        writer = NOBODY if s.writer == c else s.writer
        undone = _put(s, c, Client(RELEASING, me.token))._replace(writer=writer)
        yield c, "fails and rolls back", undone, None
        if s.writer not in (c, NOBODY):
            return  # a deferred transaction has to wait here
        renewed, promise, ok = self._renewed(s, c, me.token)
        if not self.rules.last_fence:
            renewed, promise, ok = s, None, True
        if ok and me.version == s.applied:
            fenced = _put(renewed, c, me._replace(phase=FENCED))._replace(writer=c)
            yield c, "records, fenced", fenced, promise
        else:
            yield c, "cannot record and rolls back", undone, None

    def _environment(self, s: State) -> Iterator[Step]:
        row = s.row
        if row is not None and row.owner != NOBODY and not row.expired:
            yield CLOCK, "the lease runs out", s._replace(row=row._replace(expired=True)), None
        if row is not None and row.owner != NOBODY and self.looks and s.seen != row.token:
            yield OPERATOR, "looks at the lock", s._replace(seen=row.token), None
        if s.writer != NOBODY:
            return
        if s.mail is not None:
            kind, c, token = s.mail
            change = self._released if kind == "release" else self._renewed
            after, promise, *_ = change(s._replace(mail=None), c, token)
            yield SERVER, f"a late {kind} of client {'ABC'[c]} runs", after, promise
        if row is None:
            return
        yield OPERATOR, "deletes the row by hand", s._replace(row=None), None
        asked = s.seen if self.looks else row.token
        compares = self.rules.force_compares_token
        if row.owner != NOBODY and asked and (asked == row.token or not compares):
            token, promise = self._next_token(s, row)
            promise = promise or (None if asked == row.token else "asked")
            freed = s._replace(row=Row(token, NOBODY, False), seen=0)
            freed = freed._replace(greatest=max(s.greatest, token))
            yield OPERATOR, "forces a release", freed, promise

    def _current(self, s: State, c: int, token: int) -> bool:
        return s.row is not None and (s.row.token, s.row.owner) == (token, c)

    def _lives(self, s: State, row: Row) -> bool:
        client = s.clients[row.owner]
        return client.phase in WITH_LEASE and client.token == row.token

    def _is_called_dead(self, s: State, row: Row) -> bool:
        if not self.rules.file_proves:
            return True  # the process id means nobody, or somebody else, in this container
        if not self.rules.dead_are_found:
            return False
        return not self._lives(s, row) or s.clients[row.owner].phase == TAKEN

    def _next_token(self, s: State, row: Row) -> tuple[int, str | None]:
        token = s.greatest + 1 if self.rules.token_from_counter else row.token + 1
        return token, None if token > s.greatest else "S1"

    def _released(self, s: State, c: int, token: int) -> tuple[State, str | None]:
        row = s.row
        if row is None or row.owner != c or (row.token != token and self.rules.release_by_token):
            return s, None
        freed = s._replace(row=Row(row.token, NOBODY, False))
        return freed, None if row.token == token else "S4"

    def _renewed(self, s: State, c: int, token: int) -> tuple[State, str | None, bool]:
        row = s.row
        if row is None or row.owner != c or (row.token != token and self.rules.renew_by_token):
            return s, None, False
        renewed = s._replace(row=row._replace(expired=False)) if row.expired else s
        return renewed, None if row.token == token else "S4", True

    def show(self, state: State) -> str:
        """The state in one line."""
        row = state.row
        if row is None:
            lock = "no row"
        else:
            owner = "free" if row.owner == NOBODY else "ABC"[row.owner]
            lock = f"row {owner}/{row.token}{' expired' if row.expired else ''}"
        clients = ", ".join(
            f"{'ABC'[c]} {client.phase}{f'/{client.token}' if client.token else ''}"
            for c, client in enumerate(state.clients)
        )
        return f"{lock}; {state.applied} applied; {clients}"


def _put(s: State, c: int, client: Client) -> State:
    return s._replace(clients=(*s.clients[:c], client, *s.clients[c + 1 :]))


def _renumbered(s: State) -> State:
    """The same state with the tokens 1, 2, 3 .. in the same order."""
    tokens = {s.greatest, s.seen, *(client.token for client in s.clients)}
    if s.row is not None:
        tokens.add(s.row.token)
    if s.mail is not None:
        tokens.add(s.mail[2])
    tokens.discard(0)
    if max(tokens, default=0) == len(tokens):
        return s
    new = {token: index for index, token in enumerate(sorted(tokens), 1)}
    new[0] = 0
    return s._replace(
        row=s.row and s.row._replace(token=new[s.row.token]),
        greatest=new[s.greatest],
        clients=tuple(client._replace(token=new[client.token]) for client in s.clients),
        mail=s.mail and (s.mail[0], s.mail[1], new[s.mail[2]]),
        seen=new[s.seen],
    )
