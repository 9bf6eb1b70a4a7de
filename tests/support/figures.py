"""What the chaos tests measured, as the table that `make chaos` ends with."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence

from msr.urls import parse_url

__all__ = ["LONG", "Figures", "percentile", "rounds"]

LONG = os.environ.get("MSR_TEST_CHAOS") == "long"
"""Whether this is `make chaos`; read before the environment is cleaned."""


def rounds(short: int, long: int) -> int:
    """How often to repeat something: `short` in `make test`, `long` in `make chaos`."""
    return long if LONG else short


def percentile(values: Sequence[float], percent: int) -> float:
    """The value that `percent` % of the values do not exceed."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


class Figures:
    """One line for each thing measured, one column for each database."""

    def __init__(self) -> None:
        self._cells: dict[str, dict[str, str]] = {}

    def record(self, what: str, url: str, value: str) -> None:
        """Note the result for the database of `url`."""
        self._cells.setdefault(what, {})[parse_url(url).dialect] = value

    def record_times(self, what: str, url: str, seconds: Sequence[float]) -> None:
        """Note how long it took each time."""
        p50, p95 = (percentile(seconds, percent) * 1000 for percent in (50, 95))
        self.record(what, url, f"p50 {p50:.0f} ms, p95 {p95:.0f} ms ({len(seconds)} times)")

    def table(self) -> list[str]:
        """The lines of the table; none if nothing was recorded."""
        if not self._cells:
            return []
        rows = [("", "PostgreSQL", "SQLite")]
        for what, cells in self._cells.items():
            rows.append((what, cells.get("postgresql", "-"), cells.get("sqlite", "-")))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [
            f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |"
            for row in rows
        ]
        lines.insert(1, f"|{'|'.join('-' * (width + 2) for width in widths)}|")
        return lines
