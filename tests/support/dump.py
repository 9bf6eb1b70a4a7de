"""Everything that is in a database, as text, to compare before and after."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from msr.urls import parse_url
from tests.support.queries import exists, query

__all__ = ["dump"]

COLUMNS = """
SELECT table_schema, table_name, string_agg(
    concat_ws(' ', column_name, data_type, is_nullable, column_default), ', '
    ORDER BY ordinal_position)
FROM information_schema.columns
WHERE table_schema NOT IN ('pg_catalog', 'information_schema')
GROUP BY 1, 2 ORDER BY 1, 2
"""

SEQUENCES = """
SELECT schemaname || '.' || sequencename, last_value FROM pg_sequences ORDER BY 1
"""


def dump(url: str) -> str:
    """Tables, columns, sequences and rows, and for SQLite the files of the database."""
    address = parse_url(url)
    if address.dialect == "sqlite":
        path = Path(address.path or "")
        lines = sorted(file.name for file in path.parent.glob(f"{path.name}*"))
        if exists(url):
            with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
                lines += db.iterdump()
        return "\n".join(lines)
    lines = [str(row) for row in query(url, SEQUENCES)]
    for schema, table, columns in query(url, COLUMNS):
        lines.append(f"{schema}.{table}: {columns}")
        rows = query(url, f'SELECT to_jsonb(t)::text FROM "{schema}"."{table}" AS t ORDER BY 1')
        lines += [row for (row,) in rows]
    return "\n".join(lines)
