"""What a run did, also when it failed half-way: data, no formatting."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["AppliedScript", "MigrationResult"]


@dataclass(frozen=True, slots=True)
class AppliedScript:
    """One script that a run applied. `duration` is in seconds."""

    version: int
    name: str
    script: str
    duration: float


@dataclass(frozen=True, slots=True)
class MigrationResult:
    """What one call of `migrate` did.

    `executed` are the scripts that this run applied, in order. `pending_before` counts what was
    pending when it started: where another process applied those meanwhile, `executed` is shorter
    and `followed` is True. `duration` and `waited` (for the lock) are in seconds. `token` is the
    fencing token, None when no lock was taken.
    """

    executed: tuple[AppliedScript, ...] = ()
    pending_before: int = 0
    applied_before: int = 0
    followed: bool = False
    duration: float = 0.0
    waited: float = 0.0
    token: int | None = None
