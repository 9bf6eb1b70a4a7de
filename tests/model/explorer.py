"""Look at every state that a small system can reach, nearest first.

A system is an initial state and a function from a state to the steps that are possible in it. Some
steps break a promise by themselves (a commit that should not have been), and some states do (two
bodies run). Because the nearest states come first, the trace to a broken promise is a shortest one.

Nothing forces anybody to move: whoever takes no step while others do is paused, so a pause needs
no step of its own, and every trace is also one with pauses anywhere in it.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Container, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, Protocol, TypeVar

__all__ = ["CLOCK", "FAULT", "OPERATOR", "SERVER", "Explored", "Move", "System", "explore"]

SERVER, CLOCK, OPERATOR, FAULT = -1, -2, -3, -4
"""Who moves, when it is not a client: those have the numbers from 0."""

ACTORS = {SERVER: "server", CLOCK: "clock", OPERATOR: "operator", FAULT: "fault"}

S = TypeVar("S", bound=Hashable)


class Move(NamedTuple):
    """Somebody did something."""

    actor: int
    what: str

    def __str__(self) -> str:
        who = ACTORS[self.actor] if self.actor < 0 else f"client {'ABC'[self.actor]}"
        return f"{who:9} {self.what}"


class System(Protocol[S]):
    """What can be explored."""

    @property
    def initial(self) -> S:
        """Where everything begins."""
        ...

    def steps(self, state: S) -> Iterator[tuple[int, str, S, str | None]]:
        """Actor, what it does, the state after it, and the promise that this step breaks."""
        ...

    def canonical(self, state: S) -> S:
        """The one that stands for all states from which the same can happen."""
        ...

    def broken(self, state: S) -> str | None:
        """The promise that does not hold in a state."""
        ...

    def show(self, state: S) -> str:
        """A state in one line."""
        ...


@dataclass
class Explored(Generic[S]):
    """Every state, and every step from one to another, by the states' numbers.

    `promise` is the one that was found broken, if any, and `trace` a shortest way to it; then the
    exploration ended there.
    """

    system: System[S]
    states: list[S]
    sources: array[int] = field(default_factory=lambda: array("l"))
    targets: array[int] = field(default_factory=lambda: array("l"))
    actors: array[int] = field(default_factory=lambda: array("b"))
    promise: str | None = None
    trace: list[tuple[Move | None, S]] = field(default_factory=list)
    came: list[tuple[int, int, str]] = field(default_factory=lambda: [(-1, 0, "")])
    """From which state each was reached first, and how."""

    @property
    def edges(self) -> int:
        return len(self.sources)

    @property
    def moves(self) -> list[str]:
        """The trace as what was done, without the states."""
        return [move.what for move, _ in self.trace if move is not None]

    def stuck(
        self,
        actors: Container[int],
        wants: Callable[[S], bool],
        arrived: Callable[[S], bool],
    ) -> int | None:
        """The first state in which somebody wants to arrive and cannot by moves of `actors`."""
        before: list[list[int]] = [[] for _ in self.states]
        for source, target, actor in zip(self.sources, self.targets, self.actors, strict=True):
            if actor in actors:
                before[target].append(source)
        good = [arrived(state) for state in self.states]
        queue = deque(index for index, is_good in enumerate(good) if is_good)
        while queue:
            for source in before[queue.popleft()]:
                if not good[source]:
                    good[source] = True
                    queue.append(source)
        for index, is_good in enumerate(good):
            if not is_good and wants(self.states[index]):
                return index
        return None

    def trace_to(self, index: int, *last: tuple[Move, S]) -> list[tuple[Move | None, S]]:
        """A shortest way to a state, and from there; as it came, not in what stands for it."""
        path = list(last)
        while index > 0:
            source, actor, what = self.came[index]
            path.insert(0, (Move(actor, what), self.states[index]))
            index = source
        state = self.system.initial
        trace: list[tuple[Move | None, S]] = [(None, state)]
        for move, expected in path:
            state = next(
                after
                for actor, what, after, _ in self.system.steps(state)
                if (actor, what) == move and self.system.canonical(after) == expected
            )
            trace.append((move, state))
        return trace


def explore(
    system: System[S], promises: Container[str] | None = None, limit: int = 200_000
) -> Explored[S]:
    """Every reachable state, up to the first that breaks a promise, or one of `promises`.

    Raises `RuntimeError` beyond `limit` states: a system that has grown is to be cut, not awaited.
    """
    canonical = system.canonical
    states = [canonical(system.initial)]
    found = Explored(system, states)
    sources, targets, actors, came = found.sources, found.targets, found.actors, found.came
    number = {states[0]: 0}
    here = 0
    while here < len(states):
        for actor, what, after, promise in system.steps(states[here]):
            state = canonical(after)
            there = number.get(state)
            if there is None:
                there = number[state] = len(states)
                states.append(state)
                came.append((here, actor, what))
                promise = promise or system.broken(state)
            sources.append(here)
            targets.append(there)
            actors.append(actor)
            if promise is not None and (promises is None or promise in promises):
                found.promise = promise
                found.trace = found.trace_to(here, (Move(actor, what), state))
                return found
        if len(states) > limit:
            raise RuntimeError(f"more than {limit} states")
        here += 1
    return found
