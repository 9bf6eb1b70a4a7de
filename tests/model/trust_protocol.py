"""How long a holder may trust its lease, as a system of steps in discrete time.

One holder renews one lease; a renewal is sent, executed and answered, and each of the three may
take any number of ticks. Another client takes the lock when the database finds the lease expired.
The holder counts by its own monotonic clock, which may miss a tick now and then: at most one in the
time of a lease, and the margin is there for that. What its wall clock shows plays no part. A lease
that is `secured` or `unattended` is kept by something else than time, and is not in here.

    trust   the holder still trusts a lease that the database has let run out
    S6      the lock was taken before the database let the lease run out
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from tests.model.explorer import CLOCK, FAULT, SERVER

__all__ = ["TrustModel"]

NOTHING, ASKED, ANSWERED = "nothing", "a request", "an answer"


class State(NamedTuple):
    """Ticks from now, none below 0."""

    lease: int = 0
    """Until the database lets the lease run out."""
    trust: int = 0
    """Until the holder stops trusting it, by its own clock."""
    flight: str = NOTHING
    age: int = 0
    """Since the request was sent, by the holder's clock."""
    steady: int = 0
    """Until the holder's clock may miss a tick again."""
    ahead: int = 0
    """How far ahead the other client's wall clock is."""
    taken: bool = False


@dataclass(frozen=True, kw_only=True)
class TrustModel:
    """The system for a lease's timeout and margin, in ticks; the flags switch off its parts."""

    timeout: int = 5
    margin: int = 1
    from_request: bool = True
    """Trust counts from when the renewal was sent, not from when the answer came."""
    needs_answer: bool = True
    """Sending a renewal proves nothing yet."""
    deadline: bool = True
    """Trust ends by itself, when renewals fail."""
    database_clock: bool = True
    """Expiry is judged by the database's clock, not by the client's."""

    @property
    def initial(self) -> State:
        return State()

    def steps(self, state: State) -> Iterator[tuple[int, str, State, str | None]]:
        s = state
        aged = min(s.age + 1, self.timeout) if s.flight != NOTHING else 0
        lease, steady = max(s.lease - 1, 0), max(s.steady - 1, 0)
        trust = max(s.trust - 1, 0) if self.deadline else s.trust
        passed = s._replace(lease=lease, steady=steady)
        yield CLOCK, "a tick", passed._replace(trust=trust, age=aged), None
        if s.steady == 0:
            missed = passed._replace(steady=self.timeout)
            yield CLOCK, "a tick that the holder's clock misses", missed, None
        if s.ahead == 0:
            yield FAULT, "the other's wall clock is set ahead", s._replace(ahead=2), None
        if s.flight == NOTHING and not s.taken:
            trust = s.trust if self.needs_answer else self.timeout - self.margin
            yield 0, "sends a renewal", s._replace(flight=ASKED, age=0, trust=trust), None
        if s.flight == ASKED:
            if s.taken:
                yield SERVER, "refuses the renewal", s._replace(flight=NOTHING, trust=0), None
            else:
                renewed = s._replace(flight=ANSWERED, lease=self.timeout)
                yield SERVER, "executes the renewal", renewed, None
            if s.trust:
                yield FAULT, "the request is lost", s._replace(flight=NOTHING, age=0), None
        if s.flight == ANSWERED:
            age = s.age if self.from_request else 0
            trust = max(s.trust, self.timeout - self.margin - age)
            heard = s._replace(flight=NOTHING, age=0, trust=trust)
            yield 0, "hears that it was renewed", heard, None
        sight = s.lease if self.database_clock else s.lease - s.ahead
        if sight <= 0 and not s.taken:
            promise = None if s.lease == 0 else "S6"
            yield 1, "takes the lock", s._replace(taken=True), promise

    def canonical(self, state: State) -> State:
        return state

    def broken(self, state: State) -> str | None:
        return "trust" if state.trust > 0 and state.lease == 0 else None

    def show(self, state: State) -> str:
        """The state in one line."""
        return (
            f"lease {state.lease}, trusted {state.trust}; {state.flight} under way"
            f"{f' for {state.age}' if state.flight != NOTHING else ''}"
        )
