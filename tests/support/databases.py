"""For tests of what only one of the databases has."""

from __future__ import annotations

from pathlib import Path

import pytest

from msr.urls import parse_url

__all__ = ["on_postgres", "on_sqlite", "path_of"]

on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
on_postgres = pytest.mark.parametrize("database_url", ["postgres"], indirect=True)


def path_of(url: str) -> Path:
    """The file of an SQLite database."""
    return Path(parse_url(url).path or "")
