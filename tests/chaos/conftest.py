"""The table of figures at the end of `make chaos`."""

from __future__ import annotations

import pytest

from tests.support.figures import LONG, Figures

FIGURES = Figures()


@pytest.fixture
def figures() -> Figures:
    """Where a test notes what it measured."""
    return FIGURES


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table; the short form measures too little to be quoted."""
    if LONG and (lines := FIGURES.table()):
        terminalreporter.section("figures")
        for line in lines:
            terminalreporter.line(line)
