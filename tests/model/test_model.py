"""The protocols keep every promise in every state, and each part of them is needed for that."""

from __future__ import annotations

import pytest

from tests.model.mutants import MUTANTS, SYSTEMS, check, describe
from tests.model.postgres_protocol import PostgresModel

PROMISES = {"S1", "S2", "S3", "S4", "S5", "S6", "S7", "L2", "L3", "proof", "asked", "trust"}


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_promise_holds(name: str) -> None:
    """No reachable state breaks a promise, and whoever waits can get on whatever others do."""
    explored = check(SYSTEMS[name])
    print(f"\n{name}: {describe(explored)}")
    assert explored.promise is None, describe(explored)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(name: str) -> None:
    """With one part of the protocol switched off, the promise that it is there for is broken."""
    mutant = MUTANTS[name]
    explored = check(mutant.system, mutant.promise)
    print(f"\n{name}: {describe(explored)}")
    assert explored.promise == mutant.promise, describe(explored)


def test_every_promise_has_a_mutant() -> None:
    """A promise that nothing can break would be one that the model does not look at."""
    assert {mutant.promise for mutant in MUTANTS.values()} == PROMISES


def test_the_model_can_do_what_it_is_about() -> None:
    """The promises do not hold for want of trouble: everything that can happen does happen."""
    system = PostgresModel(mail=False)
    happened = {what for state in check(system).states for _, what, _, _ in system.steps(state)}
    assert happened >= {
        "client A crashes",
        "client A loses its connection",
        "an administrator ends the session of client A",
        "the lease runs out",
        "forces a release",
        "deletes the row by hand",
        "still sees a session with the key, not the row",
        "frees the row under a new token",
        "cannot free the row",
        "ends the session that has the key",
        "ends no session",
        "is cancelled and rolls back",
        "finds that the lock is lost, cancels the script, closes",
        "executes COMMIT in the session of client A that has outlived it",
        "releases the row over a new connection",
        "cannot release in time",
        "finds its connection dead",
    }
