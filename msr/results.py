"""What a run did, also when it failed half-way, or would do: data, no formatting."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

__all__ = ["ExecutedScript", "MigrationResult", "PlannedScript", "ScriptChange"]


@dataclass(frozen=True, slots=True)
class ExecutedScript:
    """One script that a run applied or, `action="revert"`, rolled back.

    `version` is None for a repeatable script. `duration` is in seconds.
    """

    version: int | None
    name: str
    script: str
    duration: float
    action: Literal["apply", "revert"] = "apply"


@dataclass(frozen=True, slots=True)
class MigrationResult:
    """What one call of `migrate` or `down` did.

    `executed` are the scripts that this run applied or rolled back, in order. `pending_before`
    counts what was to be done when it started: where another process did it meanwhile, `executed`
    is shorter and `followed` is True. `duration` and `waited` (for the lock) are in seconds.
    `token` is the fencing token, None when no lock was taken.
    """

    executed: tuple[ExecutedScript, ...] = ()
    pending_before: int = 0
    applied_before: int = 0
    followed: bool = False
    duration: float = 0.0
    waited: float = 0.0
    token: int | None = None


@dataclass(frozen=True, slots=True)
class PlannedScript:
    """One script that a run would apply or revert, or a repeatable one that it would forget.

    What is forgotten is run again by the next `migrate`. `script` is the path below the folder of
    the file that would run, `text` what is in it, empty where nothing runs. `transaction` is False
    where it opted out.
    """

    action: Literal["apply", "revert", "forget"]
    version: int | None
    name: str
    script: str
    kind: Literal["sql", "python"]
    transaction: bool
    text: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class ScriptChange:
    """A script that was edited after it was applied: its file against what the history kept.

    `before` is the SHA-256 that was recorded, `checksum` that of the file. `difference` is a
    unified diff, a line each; None where the history did not keep the script's text.
    """

    version: int
    script: str
    before: str
    checksum: str
    difference: tuple[str, ...] | None
