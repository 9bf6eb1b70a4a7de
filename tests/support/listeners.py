"""Listeners for the programs that tests start, so that these say how far they are."""

from __future__ import annotations

import msr

__all__ = ["tell_waiting"]


def tell_waiting() -> msr.Listener:
    """One that prints "waiting", once: then its run has asked for the lock, and was refused."""
    told = False

    def listen(event: msr.Event) -> None:
        nonlocal told
        if isinstance(event, msr.WaitingForLock) and not told:
            told = True
            print("waiting", flush=True)

    return listen
