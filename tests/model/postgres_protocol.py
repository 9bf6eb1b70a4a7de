"""The lock on PostgreSQL as a system of steps; see `msr.handlers.postgres_lock` for the real one.

One step is one statement that the server runs, or one thing that happens to a process, a
connection or the clock. Between any two steps of a client everybody else may move, so what a client
has read may be out of date when it acts on it. COMMIT alone is two steps, sent and executed: after
the first one nothing that happens to the client can stop it.

What is kept of the database: the lock's row, the greatest token ever given out, the history (how
many scripts are in it), the scripts' changes (how many have committed), and each session with its
transaction. Sessions end when the server finds out, not when the client goes: until then they keep
the advisory lock, their row locks, and a statement or a COMMIT that is on its way.

Row locks. A pending fence (`FOR KEY SHARE`) stops whoever takes the row `FOR UPDATE`, as every
statement of ours that changes the token does, and stops a plain UPDATE only where it changes a
column of a unique index. A renewal and a release pass it unless they ask for more.

Bounds. Tokens are renumbered after each step, keeping their order, so that any number of runs fits
into finitely many states. One lingering session per client. A client's name stays the same for
life: the model must not lean on the uuid in `locked_by`, since one is free to hand in an `Owner`
twice. There is no pause, see `explorer`. Grace is "has seen it twice". Expiry comes whenever it
likes, to the healthy too.

What is checked, and what counts:

    S1      a new token is greater than every one before it
    S2      a history row commits: its (token, owner) is the row's at that step. Scripts and history
            end at a head, so no commit is lost in the counting.
    S3      S2, on a trace with a forced release
    S4      a renewal or release with another (token, owner) changed the row
    S5      two sessions, both direct and both not ended, are in a script's transaction: begun,
            neither committed nor rolled back, whether or not their clients still live
    S7      the changes of a script are committed, its history row is not, and nobody is about to
    proof   the row was taken, or a session ended, although the lease had not expired and its
            holder's process and session were alive
    asked   a forced release ended another token than the one that the operator had looked at
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from tests.model.explorer import CLOCK, FAULT, OPERATOR, SERVER

__all__ = ["PostgresModel", "Rules", "State"]

Step = tuple[int, str, "State", str | None]

# What a client is doing, or what it does next.
OUT = "out"
"""No process, or one whose run ended in an error. It may run again."""
WANT = "waiting"
KEYED = "key, no row"
REFUSED = "key, refused"
FREEING = "freeing an expired row"
ENDING = "ending a session"
UNKEYED = "row, no key"  # only with a mutant
HELD = "holds"
OPEN = "in a script"
FENCED = "fenced"
COMMITTING = "commit sent"
RELEASING = "releasing"
LATE = "key gone, releasing"  # only with a mutant
UNLOCKING = "unlocking"
LEAVING = "releasing elsewhere"
DONE = "done"

WITH_SESSION = {UNKEYED, HELD, OPEN, FENCED, COMMITTING, RELEASING, LATE}
"""The lease is this client's business, and it has not heard that its session ended."""
HEARTBEAT = {UNKEYED, HELD, OPEN, FENCED, COMMITTING}
WAITING = {WANT, KEYED, REFUSED, FREEING, ENDING}

# A session's transaction. BETWEEN exists only with a mutant that commits twice.
NONE, BODY, FENCE, SENT, BETWEEN = range(5)

FREE = -1
NOBODY = -1
ENDED = -2
"""A session's number on the row, when there is no such session any more."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The protocol's parts, each of which a mutant can switch off."""

    fence: bool = True
    """The history row is inserted only if the lock's row has our (token, owner)."""
    fence_locks: bool = True
    """.. and that row stays locked `FOR KEY SHARE` until the commit."""
    unique_token: bool = True
    """The token is part of a unique index."""
    one_transaction: bool = True
    """A script's changes and its history row commit together."""
    release_by_token: bool = True
    renew_by_token: bool = True
    renew_only_updates: bool = True
    """A renewal does not bring back a row that was deleted."""
    release_waits_for_fence: bool = True
    """A release takes the row `FOR UPDATE`, so it does not overtake a COMMIT that is on its way."""
    row_before_key: bool = False
    """Take the row first, the advisory lock afterwards."""
    row_released_first: bool = True
    """A release frees the row before the advisory lock."""
    key_on_worker: bool = True
    """The session that runs the scripts is the one with the advisory lock."""
    takeover_waits: bool = True
    """After ending a session, wait until its advisory lock is free."""
    key_proves_death: bool = True
    """Whoever has the key takes the row of a holder that had it before, expired or not."""
    proof_needs_session: bool = True
    """A holder that never had the advisory lock is not called dead for not having it."""
    ends_frozen: bool = True
    """End the session of a holder whose lease has expired .."""
    ends_fenced: bool = True
    """.. also when its fence kept the row from being freed."""
    ends_doomed: bool = True
    """End a session that keeps the advisory lock without the row."""
    ends_only_stale: bool = True
    """Not if its holder has renewed, or got the row, since we looked."""
    token_from_sequence: bool = True
    force_changes_token: bool = True
    force_compares_token: bool = True


class Row(NamedTuple):
    """The lock's row. `session` had the advisory lock when the row was taken."""

    token: int
    owner: int = NOBODY
    session: int = NOBODY
    expired: bool = False


class Client(NamedTuple):
    """`token` of its lease, or the one to be freed. `target` is a session to be ended."""

    phase: str
    token: int = 0
    target: int = NOBODY
    suspect: int = NOBODY


class Session(NamedTuple):
    """A server's session; `version` is the script that its transaction is about."""

    tx: int = NONE
    token: int = 0
    version: int = 0
    ending: bool = False


class State(NamedTuple):
    """Everything. Client c's session has the number c, and one that outlived it n + c."""

    row: Row | None
    greatest: int
    applied: int
    changed: int
    key: int
    clients: tuple[Client, ...]
    sessions: tuple[Session | None, ...]
    mail: tuple[str, int, int] | None = None
    """A statement on another connection that the server has yet to run: what, client, token."""
    seen: int = 0
    """The token that the operator has looked at."""


@dataclass(frozen=True, kw_only=True)
class PostgresModel:
    """The system for a number of clients, some behind a pooler, and a number of scripts."""

    rules: Rules = Rules()
    clients: int = 2
    pooled: frozenset[int] = frozenset()
    scripts: int = 1
    operator: bool = True
    by_hand: bool = True
    """Somebody deletes the row, or changes its token, with plain SQL."""
    mail: bool = True
    cut: bool = True
    """A client may lose its connection, or have it ended by an administrator, and live on."""
    mortal: int = 3
    """How many of the clients, from A, may crash or be cut."""
    again: bool = True
    """A client whose run ended, or whose process died, starts anew."""
    looks: bool = False
    """The operator looks first and releases later; otherwise both at once."""

    @property
    def initial(self) -> State:
        n = self.clients
        sessions = (Session(),) * n + (None,) * n
        return State(None, 0, 0, 0, FREE, (Client(WANT),) * n, sessions)

    def steps(self, state: State) -> Iterator[Step]:
        for c in range(self.clients):
            yield from self._client(state, c)
            yield from self._heartbeat(state, c)
            yield from self._fault(state, c)
        yield from self._environment(state)

    def canonical(self, state: State) -> State:
        return _renumbered(state)

    def broken(self, state: State) -> str | None:
        bodies = between = 0
        for index, session in enumerate(state.sessions):
            if session is not None and session.tx != NONE:
                bodies += index % self.clients not in self.pooled
                between += session.tx == BETWEEN
        if bodies > 1:
            return "S5"
        if state.changed != state.applied + between:
            return "S7"
        return None

    def waits(self, state: State, c: int) -> bool:
        """Client c wants to migrate and has not got the lock yet."""
        phase = state.clients[c].phase
        if phase == OUT or state.sessions[c] is None:
            return self.again and state.applied < self.scripts
        return phase in WAITING and state.applied < self.scripts

    def deserted(self, state: State, c: int) -> bool:
        """Client c waits, and no other process has anything to do with the lock."""
        others = state.clients[:c] + state.clients[c + 1 :]
        return self.waits(state, c) and all(other.phase in (OUT, WANT, DONE) for other in others)

    def served(self, state: State, c: int) -> bool:
        """Client c has got the lock, or has no need of it any more."""
        return state.applied == self.scripts or state.clients[c].phase in {HELD, DONE}

    # What a client does.

    def _client(self, s: State, c: int) -> Iterator[Step]:
        me = s.clients[c]
        phase = me.phase
        session = s.sessions[c]
        if phase == DONE:
            return
        if phase == OUT:
            if s.applied < self.scripts and self.again:
                yield c, "starts", self._set(s, c, Client(WANT), Session()), None
            return
        if phase == LEAVING:
            yield from self._leave(s, c)
            return
        if session is None:
            lease = phase in WITH_SESSION
            then = Client(LEAVING, me.token) if lease else Client(OUT)
            yield c, "finds its connection dead", _put(s, c, then), None
            return
        if phase == WANT:
            yield from self._wait(s, c)
        elif phase == KEYED:
            yield from self._acquire(s, c)
        elif phase == REFUSED:
            yield c, "gives the key back", _put(s._replace(key=FREE), c, Client(WANT)), None
        elif phase == FREEING:
            yield from self._free_expired(s, c)
        elif phase == ENDING:
            yield from self._end(s, c)
        elif phase == UNKEYED:
            if s.key == FREE:
                yield c, "takes the key", _put(s._replace(key=c), c, Client(HELD, me.token)), None
        elif phase == HELD:
            if s.applied < self.scripts:
                opened = session._replace(tx=BODY, token=me.token, version=s.applied)
                yield c, "begins a script", self._set(s, c, Client(OPEN, me.token), opened), None
            releasing = _put(s, c, Client(RELEASING, me.token))
            yield c, "has nothing more to do", releasing, None
        elif phase == OPEN:
            yield from self._fence(s, c)
        elif phase == FENCED:
            sent = session._replace(tx=SENT)
            yield c, "sends COMMIT", self._set(s, c, Client(COMMITTING, me.token), sent), None
            idle = Session(ending=session.ending)
            undone = self._set(s, c, Client(RELEASING, me.token), idle)
            yield c, "is cancelled and rolls back", undone, None
        elif phase == COMMITTING:
            if session.tx == NONE:
                yield c, "hears that it committed", _put(s, c, Client(HELD, me.token)), None
        elif phase == RELEASING:
            if not self.rules.row_released_first:
                key = FREE if s.key == c else s.key
                unkeyed = _put(s._replace(key=key), c, Client(LATE, me.token))
                yield c, "gives the key back", unkeyed, None
                return
            released, promise = self._released(s, c, me.token)
            yield c, "releases the row", _put(released, c, Client(UNLOCKING)), promise
        elif phase == LATE:
            released, promise = self._released(s, c, me.token)
            yield c, "releases the row", self._close(released, c, OUT), promise
        elif phase == UNLOCKING:
            end = DONE if s.applied == self.scripts else OUT
            yield c, "gives the key back and closes", self._close(s, c, end), None

    def _wait(self, s: State, c: int) -> Iterator[Step]:
        me = s.clients[c]
        if s.applied == self.scripts:
            yield c, "sees the schema at head", self._close(s, c, DONE), None
            return
        if c in self.pooled:
            yield from self._acquire(s, c)
            return
        if self.rules.row_before_key and (s.row is None or s.row.owner == NOBODY or s.row.expired):
            yield from self._acquire(s, c)
        if s.key == FREE:
            keyed = _put(s._replace(key=c), c, Client(KEYED))
            if s.row is None:
                yield c, "takes the key and finds no row", keyed, None
            else:
                yield from self._acquire(keyed, c)
            return
        # The key is refused: look at the row and at whoever has the key, in one statement.
        if s.row is not None and s.row.session == s.key:
            if s.row.expired and self.rules.ends_frozen:
                then = Client(FREEING, s.row.token, target=s.key)
                yield c, "sees an expired lease, its session alive", _put(s, c, then), None
            elif me.suspect != NOBODY:
                yield c, "sees a holder", _put(s, c, Client(WANT)), None
        elif self.rules.ends_doomed and me.suspect == s.key:
            then = Client(ENDING, target=s.key)
            yield c, "still sees a session with the key, not the row", _put(s, c, then), None
        elif self.rules.ends_doomed:
            then = Client(WANT, suspect=s.key)
            yield c, "sees a session with the key, not the row", _put(s, c, then), None

    def _acquire(self, s: State, c: int) -> Iterator[Step]:
        rules, row = self.rules, s.row or Row(0)
        direct = c not in self.pooled
        has_key = s.key == c
        alone = s.key in (c, FREE) or not rules.takeover_waits
        had_key = row.session != NOBODY or not rules.proof_needs_session
        is_dead = has_key and had_key and rules.key_proves_death
        is_free = row.owner == NOBODY or row.expired or is_dead
        if not (is_free and alone) or self._row_is_locked(s):
            if s.clients[c].phase == KEYED:
                then = REFUSED if has_key else WANT
                yield c, "takes the key, not the row", _put(s, c, Client(then)), None
            return
        token, promise = self._next_token(s, row)
        if not row.expired and self._lives(s, row):
            promise = promise or "proof"
        then = HELD if has_key or not direct or not rules.takeover_waits else UNKEYED
        row = Row(token, c, c if direct else NOBODY)
        s = s._replace(row=row, greatest=max(s.greatest, token))
        what = "takes the key and the row" if has_key else "takes the row"
        yield c, what, _put(s, c, Client(then, token)), promise

    def _free_expired(self, s: State, c: int) -> Iterator[Step]:
        me, row = s.clients[c], s.row
        ending = Client(ENDING, target=me.target)
        mine = row is not None and row.token == me.token and row.owner != NOBODY and row.expired
        if row is not None and mine and not self._row_is_locked(s):
            token, promise = self._next_token(s, row)
            s = s._replace(row=Row(token), greatest=max(s.greatest, token))
            yield c, "frees the row under a new token", _put(s, c, ending), promise
        else:
            then = ending if self.rules.ends_fenced else Client(WANT)
            yield c, "cannot free the row", _put(s, c, then), None

    def _end(self, s: State, c: int) -> Iterator[Step]:
        target = s.clients[c].target
        then = Client(WANT if self.rules.takeover_waits else KEYED)
        healthy = (
            s.row is not None
            and target == s.row.session
            and not s.row.expired
            and self._lives(s, s.row)
        )
        valid = s.row is not None and s.row.session == target and not s.row.expired
        spared = valid and self.rules.ends_only_stale
        session = s.sessions[target] if target != NOBODY else None
        if target == NOBODY or s.key != target or session is None or spared:
            yield c, "ends no session", _put(s, c, then), None
            return
        ended = _session(s, target, session._replace(ending=True))
        promise = "proof" if healthy else None
        yield c, "ends the session that has the key", _put(ended, c, then), promise

    def _fence(self, s: State, c: int) -> Iterator[Step]:
        me, session = s.clients[c], s.sessions[c]
        assert session is not None
        releasing = self._set(s, c, Client(RELEASING, me.token), Session(ending=session.ending))
        yield c, "fails and rolls back", releasing, None
        if any(
            other is not None
            and index != c
            and other.tx >= FENCE
            and other.version == session.version
            for index, other in enumerate(s.sessions)
        ):
            return  # the history's primary key has it wait for the other transaction
        current = s.row is not None and (s.row.token, s.row.owner) == (me.token, c)
        if session.version == s.applied and (current or not self.rules.fence):
            fenced = session._replace(tx=FENCE)
            yield c, "records, fenced", self._set(s, c, Client(FENCED, me.token), fenced), None
        else:
            yield c, "cannot record and rolls back", releasing, None

    def _leave(self, s: State, c: int) -> Iterator[Step]:
        token = s.clients[c].token
        out = Client(OUT)
        if not (self.rules.release_waits_for_fence and self._row_is_locked(s)):
            released, promise = self._released(s, c, token)
            yield c, "releases the row over a new connection", _put(released, c, out), promise
        yield c, "cannot release in time", _put(s, c, out), None
        if self.mail and s.mail is None:
            late = s._replace(mail=("release", c, token))
            yield c, "gives up a release on its way", _put(late, c, out), None

    def _heartbeat(self, s: State, c: int) -> Iterator[Step]:
        me = s.clients[c]
        if me.phase not in HEARTBEAT:
            return
        renewed, promise, ok = self._renewed(s, c, me.token)
        if ok:
            if renewed is not s:
                yield c, "renews", renewed, promise
        elif (lost := self._drop(s, c, Client(OUT))) is not None:
            yield c, "finds that the lock is lost, cancels the script, closes", lost, promise

    # What happens.

    def _fault(self, s: State, c: int) -> Iterator[Step]:
        if c >= self.mortal:
            return
        me, name = s.clients[c], "ABC"[c]
        if me.phase in {KEYED, REFUSED, UNLOCKING} | WITH_SESSION:
            crashed = self._drop(s, c, Client(OUT))
            if crashed is not None:
                yield FAULT, f"client {name} crashes", crashed, None
                if self.mail and me.phase in HEARTBEAT and s.mail is None:
                    mailed = crashed._replace(mail=("renew", c, me.token))
                    yield FAULT, f"client {name} crashes with a renewal on its way", mailed, None
        if me.phase in WITH_SESSION and self.cut:
            cut = self._drop(s, c, Client(LEAVING, me.token))
            if cut is not None:
                yield FAULT, f"client {name} loses its connection", cut, None
        session = s.sessions[c]
        busy = session is not None and (s.key == c or session.tx != NONE)
        if self.cut and session is not None and busy and not session.ending:
            ended = _session(s, c, session._replace(ending=True))
            yield FAULT, f"an administrator ends the session of client {name}", ended, None
        if not self.rules.key_on_worker and s.key == c:
            unkeyed = s._replace(key=FREE)
            yield FAULT, f"client {name} loses the connection with the key", unkeyed, None

    def _environment(self, s: State) -> Iterator[Step]:
        n = self.clients
        for index, session in enumerate(s.sessions):
            if session is None:
                continue
            if session.ending or index >= n:
                what = f"ends the session {self._session_name(index)}"
                yield SERVER, what, self._gone(s, index), None
            if session.tx == SENT and not self.rules.one_transaction:
                between = _session(s, index, session._replace(tx=BETWEEN))
                between = between._replace(changed=s.changed + 1)
                yield SERVER, "commits the script's changes", between, None
            elif session.tx in (SENT, BETWEEN):
                changed = s.changed + (session.tx == SENT)
                idle = _session(s, index, Session(ending=session.ending))
                committed = idle._replace(applied=s.applied + 1, changed=changed)
                current = (session.token, index % n)
                ok = s.row is not None and (s.row.token, s.row.owner) == current
                what = f"executes COMMIT in the session {self._session_name(index)}"
                yield SERVER, what, committed, None if ok else "S2"
        if s.mail is not None:
            kind, c, token = s.mail
            empty = s._replace(mail=None)
            if kind == "renew":
                after, promise, _ = self._renewed(empty, c, token)
                yield SERVER, f"runs a late renewal of client {'ABC'[c]}", after, promise
            elif not (self.rules.release_waits_for_fence and self._row_is_locked(s)):
                after, promise = self._released(empty, c, token)
                yield SERVER, f"runs a late release of client {'ABC'[c]}", after, promise
        row = s.row
        if row is not None and row.owner != NOBODY and not row.expired:
            yield CLOCK, "the lease runs out", s._replace(row=row._replace(expired=True)), None
        if self.operator and row is not None:
            yield from self._operator(s, row)
        if self.by_hand and row is not None and not self._row_is_locked(s):
            yield OPERATOR, "deletes the row by hand", s._replace(row=None), None
        kept = self._row_is_locked(s) and self.rules.unique_token
        if self.by_hand and row is not None and row.owner != NOBODY and not kept:
            token = s.greatest + 1
            freed = s._replace(row=Row(token), greatest=token)
            yield OPERATOR, "frees the row and raises its token by a plain UPDATE", freed, None

    def _operator(self, s: State, row: Row) -> Iterator[Step]:
        if self.looks and row.owner != NOBODY and s.seen != row.token:
            yield OPERATOR, "looks at the lock", s._replace(seen=row.token), None
        if row.owner == NOBODY or (self.looks and s.seen == 0):
            return
        if self.looks and self.rules.force_compares_token and s.seen != row.token:
            return
        promise = "asked" if self.looks and s.seen != row.token else None
        freed = Row(row.token)
        if self.rules.force_changes_token:
            if self._row_is_locked(s):
                return
            token, wrong = self._next_token(s, row)
            freed, promise = freed._replace(token=token), promise or wrong
            s = s._replace(greatest=max(s.greatest, token))
        yield OPERATOR, "forces a release", s._replace(row=freed, seen=0), promise

    # What several steps have in common.

    def _row_is_locked(self, s: State) -> bool:
        """A fence is pending, which keeps away whoever wants the row `FOR UPDATE`."""
        return (
            self.rules.fence
            and self.rules.fence_locks
            and any(session is not None and session.tx >= FENCE for session in s.sessions)
        )

    def _next_token(self, s: State, row: Row) -> tuple[int, str | None]:
        token = s.greatest + 1 if self.rules.token_from_sequence else row.token + 1
        return token, None if token > s.greatest else "S1"

    def _lives(self, s: State, row: Row) -> bool:
        """The process that the row names lives, has this lease, and its session goes on."""
        if row.owner == NOBODY:
            return False
        client, session = s.clients[row.owner], s.sessions[row.owner]
        return (
            client.phase in WITH_SESSION
            and client.token == row.token
            and session is not None
            and not session.ending
        )

    def _released(self, s: State, c: int, token: int) -> tuple[State, str | None]:
        row = s.row
        if row is None or row.owner != c or (row.token != token and self.rules.release_by_token):
            return s, None
        return s._replace(row=Row(row.token)), None if row.token == token else "S4"

    def _renewed(self, s: State, c: int, token: int) -> tuple[State, str | None, bool]:
        row = s.row
        if row is None and not self.rules.renew_only_updates:
            return s._replace(row=Row(token, c, c)), "S4", True
        if row is None or row.owner != c or (row.token != token and self.rules.renew_by_token):
            return s, None, False
        if not row.expired:
            return s, None if row.token == token else "S4", True
        renewed = s._replace(row=row._replace(expired=False))
        return renewed, None if row.token == token else "S4", True

    def _set(self, s: State, c: int, client: Client, session: Session) -> State:
        return _session(_put(s, c, client), c, session)

    def _close(self, s: State, c: int, phase: str) -> State:
        """The client closes its session, which has no transaction, and waits for that."""
        return _put(self._gone(s, c), c, Client(phase))

    def _gone(self, s: State, index: int) -> State:
        """A session ends: its transaction is rolled back and its advisory lock is free."""
        s = _session(s, index, None)
        return _renamed(s, index, NOBODY)

    def _drop(self, s: State, c: int, client: Client) -> State | None:
        """The client is rid of its session, which lives on until the server notices.

        None where an older one of this client still does so, which is out of bounds.
        """
        session = s.sessions[c]
        s = _put(s, c, client)
        if session is None:
            return s
        if session.tx == NONE and s.key != c:
            return self._gone(s, c)
        if s.sessions[self.clients + c] is not None:
            return None
        s = _session(_session(s, c, None), self.clients + c, session._replace(ending=False))
        return _renamed(s, c, self.clients + c)

    def _session_name(self, index: int) -> str:
        name = f"of client {'ABC'[index % self.clients]}"
        return name if index < self.clients else f"{name} that has outlived it"

    def show(self, state: State) -> str:
        """The state in one line."""
        row = state.row
        if row is None:
            lock = "no row"
        else:
            owner = "free" if row.owner == NOBODY else "ABC"[row.owner]
            lock = f"row {owner}/{row.token}{' expired' if row.expired else ''}"
        key = "free" if state.key == FREE else self._session_name(state.key)
        clients = ", ".join(
            f"{'ABC'[c]} {client.phase}{f'/{client.token}' if client.token else ''}"
            for c, client in enumerate(state.clients)
        )
        return f"{lock}; key {key}; {state.applied} applied; {clients}"


def _put(s: State, c: int, client: Client) -> State:
    return s._replace(clients=(*s.clients[:c], client, *s.clients[c + 1 :]))


def _session(s: State, index: int, session: Session | None) -> State:
    return s._replace(sessions=(*s.sessions[:index], session, *s.sessions[index + 1 :]))


def _renamed(s: State, old: int, new: int) -> State:
    """Whoever means session `old` means `new` from now on. (No process id is used twice.)"""
    clients = tuple(
        client._replace(
            target=new if client.target == old else client.target,
            suspect=new if client.suspect == old else client.suspect,
        )
        if old in (client.target, client.suspect)
        else client
        for client in s.clients
    )
    row = s.row
    if row is not None and row.session == old:
        row = row._replace(session=ENDED if new == NOBODY else new)
    return s._replace(row=row, clients=clients, key=new if s.key == old else s.key)


def _renumbered(s: State) -> State:
    """The same state with the tokens 1, 2, 3 .. in the same order."""
    tokens = {s.greatest, s.seen}
    if s.row is not None:
        tokens.add(s.row.token)
    tokens.update(client.token for client in s.clients)
    tokens.update(session.token for session in s.sessions if session is not None)
    if s.mail is not None:
        tokens.add(s.mail[2])
    tokens.discard(0)
    if max(tokens, default=0) == len(tokens):
        return s
    new = {token: index for index, token in enumerate(sorted(tokens), 1)}
    new[0] = 0
    return State(
        s.row and s.row._replace(token=new[s.row.token]),
        new[s.greatest],
        s.applied,
        s.changed,
        s.key,
        tuple(client._replace(token=new[client.token]) for client in s.clients),
        tuple(session and session._replace(token=new[session.token]) for session in s.sessions),
        s.mail and (s.mail[0], s.mail[1], new[s.mail[2]]),
        new[s.seen],
    )
