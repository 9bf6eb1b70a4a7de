"""The protocols as they are, and each of them with one part switched off.

A promise that no mutant can break would be one that the model does not look at. A mutant that
breaks nothing would be a part that nobody needs, or a hole in the model.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from tests.model.explorer import CLOCK, SERVER, Explored, System, explore
from tests.model.postgres_protocol import PostgresModel, Rules
from tests.model.sqlite_protocol import SqliteModel, SqliteRules
from tests.model.trust_protocol import TrustModel

__all__ = ["MUTANTS", "SYSTEMS", "Mutant", "check", "describe"]

S = TypeVar("S", bound=Hashable)

ALSO = {"S3": "S2"}

SYSTEMS: dict[str, System[Any]] = {
    "PostgreSQL, two scripts": PostgresModel(scripts=2, mail=False),
    "PostgreSQL, statements that arrive late": PostgresModel(by_hand=False, cut=False),
    "PostgreSQL, an operator who thinks": PostgresModel(
        looks=True, mail=False, by_hand=False, cut=False
    ),
    "PostgreSQL, one behind a pooler": PostgresModel(pooled=frozenset({1}), mail=False),
    "PostgreSQL, three clients": PostgresModel(
        clients=3, mail=False, by_hand=False, operator=False, cut=False, again=False, mortal=1
    ),
    "SQLite": SqliteModel(),
    "SQLite, three clients": SqliteModel(clients=3, scripts=1, mail=False, looks=False),
    "trust in a lease": TrustModel(),
}
"""What is explored to its end. What one of them leaves out for its size, another has."""


@dataclass(frozen=True)
class Mutant:
    """A protocol that breaks `promise`."""

    promise: str
    system: System[Any]


def _postgres(promise: str, *, bounds: dict[str, Any] | None = None, **rules: bool) -> Mutant:
    return Mutant(promise, PostgresModel(rules=Rules(**rules), **(bounds or {"mail": False})))


def _sqlite(promise: str, **rules: bool) -> Mutant:
    return Mutant(promise, SqliteModel(rules=SqliteRules(**rules)))


ALONE = {"mail": False, "by_hand": False, "operator": False, "cut": False}
FORCED = {"mail": False, "by_hand": False}
LATE = {"mail": True}
LOOKS = {"looks": True, "mail": False}
POOLED = {"pooled": frozenset({1}), "mail": False}

MUTANTS: dict[str, Mutant] = {
    # The fence.
    "no fence": _postgres("S2", bounds=ALONE, fence=False),
    "check, then commit": _postgres("S2", bounds=ALONE, fence_locks=False),
    "no unique index on (name, token)": _postgres("S2", unique_token=False),
    "history in a transaction of its own": _postgres("S7", one_transaction=False),
    "a release overtakes a COMMIT that is on its way": _postgres(
        "S2", release_waits_for_fence=False
    ),
    # Tokens and owners.
    "token from the row, not from the sequence": _postgres("S1", token_from_sequence=False),
    "release by owner only": _postgres("S4", bounds=LATE, release_by_token=False),
    "renew by owner only": _postgres("S4", bounds=LATE, renew_by_token=False),
    "renew brings a deleted row back": _postgres("S4", renew_only_updates=False),
    "forced release nulls the owner and keeps the token": _postgres(
        "S3", bounds=FORCED, force_changes_token=False
    ),
    "forced release of whatever is there by then": _postgres(
        "asked", bounds=LOOKS, force_compares_token=False
    ),
    # The session lock.
    "row before session lock": _postgres("proof", row_before_key=True),
    "session lock given back before the row": _postgres("proof", row_released_first=False),
    "session lock and scripts on two connections": _postgres("S5", key_on_worker=False),
    "takeover without waiting for the old session": _postgres("S5", takeover_waits=False),
    "a pooled holder is dead, for it has no session lock": _postgres(
        "proof", bounds=POOLED, proof_needs_session=False
    ),
    "session ended although its holder renewed meanwhile": _postgres(
        "proof", ends_only_stale=False
    ),
    "a dead holder is waited for": _postgres("L2", key_proves_death=False),
    "a frozen holder's session is left alone": _postgres("L3", ends_frozen=False),
    "a frozen holder's session is ended only if its row could be freed": _postgres(
        "L3", ends_fenced=False
    ),
    "a session with the key and without the row is left alone": _postgres("L3", ends_doomed=False),
    # Time.
    "trust from the answer, not from the request": Mutant("trust", TrustModel(from_request=False)),
    "trust before the answer": Mutant("trust", TrustModel(needs_answer=False)),
    "trust without a margin": Mutant("trust", TrustModel(margin=0)),
    "a failing heartbeat only warns": Mutant("trust", TrustModel(deadline=False)),
    "expiry by the client's clock": Mutant("S6", TrustModel(database_clock=False)),
    # SQLite.
    "SQLite: no fence": _sqlite("S2", first_fence=False, last_fence=False),
    "SQLite: a deferred BEGIN": _sqlite("S5", immediate=False),
    "SQLite: history in a transaction of its own": _sqlite("S7", one_transaction=False),
    "SQLite: row before file": _sqlite("proof", file_before_row=False),
    "SQLite: death by process id": _sqlite("proof", file_proves=False),
    "SQLite: a dead holder is waited for": _sqlite("L2", dead_are_found=False),
    "SQLite: token from the row": _sqlite("S1", token_from_counter=False),
    "SQLite: release by owner only": _sqlite("S4", release_by_token=False),
    "SQLite: renew by owner only": _sqlite("S4", renew_by_token=False),
    "SQLite: forced release of whatever is there by then": _sqlite(
        "asked", force_compares_token=False
    ),
}


def check(system: System[S], promise: str | None = None) -> Explored[S]:
    """Explore a system and judge it; `promise` of the result is the one that is broken, or None.

    With `promise` only that one is looked for. S3 is S2 after a forced release. Beside what the
    systems say of their states and steps, nobody may get stuck (not asked behind a pooler, where
    a frozen holder's session cannot be ended):

        L2      where all other processes are gone, a client that waits can get the lock, or see
                the schema at head, without any lease running out
        L3      .. and where the others stand still for ever, too, with the clock
    """
    explored = explore(system, None if promise is None else {ALSO.get(promise, promise)})
    if explored.promise == "S2" and "forces a release" in explored.moves:
        explored.promise = "S3"
    if explored.promise is None and isinstance(system, PostgresModel | SqliteModel):
        pooled = isinstance(system, PostgresModel) and system.pooled
        for c in range(0 if pooled else system.clients):
            served = partial(system.served, c=c)
            for liveness, actors, wants in (
                ("L2", {c, SERVER}, partial(system.deserted, c=c)),
                ("L3", {c, SERVER, CLOCK}, partial(system.waits, c=c)),
            ):
                index = explored.stuck(actors, wants, served)
                if index is not None and promise in (None, liveness):
                    explored.promise = liveness
                    explored.trace = explored.trace_to(index)
                    return explored
    return explored


def describe(explored: Explored[S]) -> str:
    """The figures, and what broke a promise, step by step."""
    figures = f"{len(explored.states):6} states {explored.edges:7} edges"
    if explored.promise is None:
        return f"{figures}  every promise holds"
    lines = [f"{figures}  {explored.promise} is broken by:"]
    width = max(len(str(move)) for move, _ in explored.trace)
    for move, state in explored.trace[1:]:
        lines.append(f"    {move!s:{width}}  {explored.system.show(state)}")
    return "\n".join(lines)
