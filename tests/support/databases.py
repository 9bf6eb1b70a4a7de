"""For tests of what only one of the databases has."""

from __future__ import annotations

import pytest

__all__ = ["on_postgres", "on_sqlite"]

on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
on_postgres = pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
