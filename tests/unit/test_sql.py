"""Splitting SQL scripts, and what is found wrong with them before anything runs."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msr.sql import (
    Statement,
    check_statements,
    find_directives,
    line_and_column,
    split_postgres,
    split_sqlite,
)
from msr.urls import Dialect

ATOMIC = (
    "CREATE OR REPLACE FUNCTION f(a int) RETURNS int LANGUAGE sql BEGIN ATOMIC"
    " SELECT CASE WHEN a > 1 THEN 2 END; SELECT 3; END"
)
TRIGGER = (
    "CREATE TRIGGER t AFTER INSERT ON a BEGIN"
    " UPDATE a SET x = CASE WHEN 1 THEN 2 END; DELETE FROM b; END;"
)

POSTGRES = {
    "two statements": ("SELECT 1;\nSELECT 2", ["SELECT 1;", "SELECT 2"]),
    "nothing": ("", []),
    "only comments": ("-- a;\n/* b; */ ;; \n", []),
    "comments around a statement": ("-- a\nSELECT 1 -- b;\n;/* c */", ["SELECT 1 -- b;\n;"]),
    "comment after the last statement": ("SELECT 1 -- done\n", ["SELECT 1"]),
    "string": ("SELECT ';', 'it''s;'; SELECT 2", ["SELECT ';', 'it''s;';", "SELECT 2"]),
    "backslash in a plain string": (r"SELECT '\'; SELECT 2", [r"SELECT '\';", "SELECT 2"]),
    "escaped quote": (r"SELECT E'\';'; SELECT 2", [r"SELECT E'\';';", "SELECT 2"]),
    "E at the end of a word": (r"SELECT namE'\'; SELECT 2", [r"SELECT namE'\';", "SELECT 2"]),
    "escapes after a line break": (
        "SELECT E'a' -- x\n'\\';' ; S",
        ["SELECT E'a' -- x\n'\\';' ;", "S"],
    ),
    "identifier": ('SELECT "a;""b"; SELECT 2', ['SELECT "a;""b";', "SELECT 2"]),
    "dollar quotes": ("DO $$ a; $x$ b; $$; SELECT 2", ["DO $$ a; $x$ b; $$;", "SELECT 2"]),
    "tagged dollar quotes": ("DO $x$ a; $$ $y$ $x$; S", ["DO $x$ a; $$ $y$ $x$;", "S"]),
    "dollars in an identifier": ("SELECT a$$ ; SELECT b$$", ["SELECT a$$ ;", "SELECT b$$"]),
    "a parameter is no tag": ("SELECT $1; SELECT $1", ["SELECT $1;", "SELECT $1"]),
    "letters beyond ASCII": ("DO $é$ ; $é$; SELECT é$$;", ["DO $é$ ; $é$;", "SELECT é$$;"]),
    "nested comment": ("SELECT /* ' /* ; */ ; */ 1; S", ["SELECT /* ' /* ; */ ; */ 1;", "S"]),
    "comment behind an operator": ("SELECT 1 +/* ; */ 2; S", ["SELECT 1 +/* ; */ 2;", "S"]),
    "parentheses": (
        "CREATE RULE r AS ON INSERT TO a DO (DELETE FROM b; DELETE FROM c); S",
        ["CREATE RULE r AS ON INSERT TO a DO (DELETE FROM b; DELETE FROM c);", "S"],
    ),
    "too many closed": ("SELECT 1); SELECT (2); S", ["SELECT 1);", "SELECT (2);", "S"]),
    "standard function body": (f"{ATOMIC}; SELECT 2", [f"{ATOMIC};", "SELECT 2"]),
    "column called atomic": (
        "CREATE PROCEDURE p() AS 'x'; BEGIN; SELECT atomic;",
        ["CREATE PROCEDURE p() AS 'x';", "BEGIN;", "SELECT atomic;"],
    ),
    "type called atomic": (
        "CREATE FUNCTION f() RETURNS atomic AS 'x'; SELECT 2",
        ["CREATE FUNCTION f() RETURNS atomic AS 'x';", "SELECT 2"],
    ),
    "no function, no body": ("DO BEGIN ATOMIC; S", ["DO BEGIN ATOMIC;", "S"]),
    "case outside a body": (
        "SELECT CASE WHEN a THEN b END; S",
        ["SELECT CASE WHEN a THEN b END;", "S"],
    ),
    "trigger": (
        "CREATE TRIGGER t EXECUTE FUNCTION f(); S",
        ["CREATE TRIGGER t EXECUTE FUNCTION f();", "S"],
    ),
    "open string": ("SELECT 1; SELECT 'a;\n", ["SELECT 1;", "SELECT 'a;\n"]),
    "open comment is left for the server": (
        "SELECT 1; /* a; SELECT 2;",
        ["SELECT 1;", "/* a; SELECT 2;"],
    ),
}
SQLITE = {
    "two statements": ("SELECT 1;\nSELECT 2", ["SELECT 1;", "SELECT 2"]),
    "only comments": ("-- a;\n/* b; /* ; */ ;; \n", []),
    "trigger": (f"{TRIGGER} SELECT 2;", [TRIGGER, "SELECT 2;"]),
    "temporary trigger": (
        "create temp trigger t begin select 1; end; S",
        ["create temp trigger t begin select 1; end;", "S"],
    ),
    "column called end": (
        "CREATE TRIGGER t BEGIN UPDATE a SET b = end; END; S",
        ["CREATE TRIGGER t BEGIN UPDATE a SET b = end; END;", "S"],
    ),
    "quotes": ("SELECT ';', \";\", `;`, [;]; S", ["SELECT ';', \";\", `;`, [;];", "S"]),
    "backslash": (r"SELECT '\'; S", [r"SELECT '\';", "S"]),
    "no dollar quotes": ("SELECT $$; S", ["SELECT $$;", "S"]),
    "parentheses do not count": ("SELECT (1; S", ["SELECT (1;", "S"]),
    "comments do not nest": ("SELECT /* /* ; */ 1; S", ["SELECT /* /* ; */ 1;", "S"]),
    "incomplete": ("SELECT 1; CREATE TABLE a (", ["SELECT 1;", "CREATE TABLE a ("]),
}

FRAGMENTS = [
    "$$",
    "$a$",
    "--",
    "/*",
    "*/",
    ";\n",
    "SELECT 1",
    " BEGIN ",
    " END ",
    " END;",
    " CASE ",
]
BODIES = [" BEGIN ATOMIC ", "CREATE FUNCTION f() ", "CREATE TRIGGER t "]
PIECES = st.sampled_from([*"'\"$();-/*\\ \nxE`[]é1", *FRAGMENTS, *BODIES])
SCRIPTS = st.lists(PIECES, max_size=25).map("".join)
SPLITTERS = pytest.mark.parametrize("split", [split_postgres, split_sqlite])

Split = Callable[[str], list[Statement]]


@pytest.mark.parametrize(("script", "texts"), POSTGRES.values(), ids=POSTGRES)
def test_postgres_statements(script: str, texts: list[str]) -> None:
    """A script for PostgreSQL is cut where the server's own client cuts it."""
    assert [statement.text for statement in split_postgres(script)] == texts


@pytest.mark.parametrize(("script", "texts"), SQLITE.values(), ids=SQLITE)
def test_sqlite_statements(script: str, texts: list[str]) -> None:
    """A script for SQLite is cut where SQLite's own shell cuts it."""
    assert [statement.text for statement in split_sqlite(script)] == texts


@SPLITTERS
def test_line_offset_and_keyword(split: Split) -> None:
    """A statement knows where its first token stands and how it begins."""
    script = "-- head\n\n  rollback /* x */ to a;;\n\nINSERT INTO t (x) VALUES (1);(SELECT 1)"
    assert [(s.line, s.offset, s.keyword) for s in split(script)] == [
        (3, script.index("rollback"), "ROLLBACK TO A"),
        (5, script.index("INSERT"), "INSERT INTO T"),
        (5, script.index("(SELECT"), ""),
    ]


@SPLITTERS
@given(script=SCRIPTS)
def test_offsets_point_at_the_text(split: Split, script: str) -> None:
    """Every statement is found in the script at its offset, in order and without overlap."""
    end = 0
    for statement in split(script):
        assert statement.offset >= end
        end = statement.offset + len(statement.text)
        assert script[statement.offset : end] == statement.text
        assert statement.line == script.count("\n", 0, statement.offset) + 1


@SPLITTERS
@given(script=SCRIPTS)
def test_nothing_but_comments_is_lost(split: Split, script: str) -> None:
    """What lies between two statements holds no statement itself."""
    end = 0
    for statement in split(script):
        assert split(script[end : statement.offset]) == []
        end = statement.offset + len(statement.text)
    assert split(script[end:]) == []


@SPLITTERS
@given(script=SCRIPTS)
def test_joined_statements_split_again(split: Split, script: str) -> None:
    """Splitting what was split and joined gives the same statements."""
    texts = [statement.text for statement in split(script)]
    assert [statement.text for statement in split("\n".join(texts))] == texts


@given(script=SCRIPTS)
def test_sqlite_agrees_with_complete_statement(script: str) -> None:
    """The splitter cuts exactly where sqlite3 calls a statement complete."""
    cuts, start = set(), 0
    for position, character in enumerate(script, 1):
        if character == ";" and sqlite3.complete_statement(script[start:position]):
            cuts.add(position)
            start = position
    *complete, last = split_sqlite(script) or [Statement("", 1, 0, "")]
    assert {s.offset + len(s.text) for s in complete} <= cuts
    for statement in (*complete, last):
        inside = range(statement.offset + 1, statement.offset + len(statement.text))
        assert cuts.isdisjoint(inside)


@SPLITTERS
@pytest.mark.parametrize(
    "script",
    [
        "INSERT INTO users (id, name) VALUES (1, 'a;b'); -- c\n" * 6_000,
        "SELECT '" + ";" * 300_000,
        "$a$" * 60_000 + "".join(f" $t{number}$" for number in range(20_000)),
        "/* " * 100_000,
        "CREATE TRIGGER t BEGIN " + "SELECT CASE WHEN 1 THEN 2 END; " * 10_000 + "END;",
        "SELECT E'a'\n-- " * 20_000,
    ],
    ids=["inserts", "string", "dollars", "comments", "trigger", "continued"],
)
def test_time_is_linear(split: Split, script: str) -> None:
    """A third of a megabyte takes a fraction of a second, whatever is in it."""
    began = time.process_time()
    split(script)
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    ("offset", "place"), [(0, (1, 1)), (2, (1, 3)), (3, (2, 1)), (4, (3, 1)), (6, (3, 3))]
)
def test_line_and_column(offset: int, place: tuple[int, int]) -> None:
    """An offset becomes the line and column that an editor shows."""
    assert line_and_column("ab\n\ncd", offset) == place


CONTROL: list[tuple[str, str | None]] = [
    ("BEGIN", "BEGIN"),
    ("begin isolation level serializable", "BEGIN"),
    ("START TRANSACTION", "START TRANSACTION"),
    ("COMMIT AND CHAIN", "COMMIT"),
    ("COMMIT PREPARED 'a'", "COMMIT"),
    ("END", "END"),
    ("ABORT", "ABORT"),
    ("ROLLBACK", "ROLLBACK"),
    ("ROLLBACK /* all */ WORK", "ROLLBACK"),
    ("PREPARE TRANSACTION 'a'", "PREPARE TRANSACTION"),
    ("ROLLBACK TO a", None),
    ("ROLLBACK WORK TO SAVEPOINT a", None),
    ("SAVEPOINT commit", None),
    ("RELEASE a", None),
    ("PREPARE p AS SELECT 1", None),
    ("SELECT 'COMMIT;'", None),
    ("INSERT INTO commit VALUES (1)", None),
    ("BEGINNING", None),
]


@pytest.mark.parametrize("dialect", ["postgresql", "sqlite"])
@pytest.mark.parametrize(("statement", "named"), CONTROL)
def test_transaction_control(statement: str, named: str | None, dialect: Dialect) -> None:
    """A statement that ends or begins the script's transaction is named, a savepoint is not."""
    found = check_statements(f"SELECT 1;\n{statement};\nSELECT 2;", dialect)
    assert [(rule, line) for rule, line, _ in found] == (
        [("transaction-control", 2)] if named else []
    )
    assert all(message.startswith(f"{named} ") for _, _, message in found)
    assert check_statements(f"{statement};", dialect, transaction=False) == []


CLIENT: list[tuple[Dialect, str, list[tuple[str, int]]]] = [
    ("postgresql", "SELECT 1;\nCOPY a (b) FROM stdin;\n1\\x\n;2\n\\.\n", [("client-copy", 2)]),
    (
        "postgresql",
        "copy (select 1) to\n stdout;\nCOPY b FROM STDIN",
        [("client-copy", 1), ("client-copy", 3)],
    ),
    ("postgresql", "COPY a FROM '/STDIN'; COPY \"FROM STDIN\" TO '/x'", []),
    ("postgresql", "SELECT 'COPY a FROM STDIN', 'a\\b', E'\\\\'; -- \\x", []),
    ("postgresql", "INSERT INTO a SELECT b FROM stdin", []),
    (
        "postgresql",
        "\n\\i a\\b.sql\n\\copy a from 'x'\nSELECT 1;",
        [("client-command", 2), ("client-command", 3)],
    ),
    ("sqlite", "SELECT 1;\n.read x.sql\nSELECT 2;", [("client-command", 2)]),
    ("sqlite", "SELECT '.read', a.b, .5;", []),
]


@pytest.mark.parametrize(("dialect", "script", "expected"), CLIENT)
def test_client_commands(dialect: Dialect, script: str, expected: list[tuple[str, int]]) -> None:
    """What only the database's own shell can run is named with its line, quoted text is not."""
    found = check_statements(script, dialect)
    assert [(rule, line) for rule, line, _ in found] == expected


def test_client_commands_outside_a_transaction() -> None:
    """No driver can run them there either."""
    found = check_statements("VACUUM;\n\\timing\n", "postgresql", transaction=False)
    assert [(rule, line) for rule, line, _ in found] == [("client-command", 2)]


def test_client_command_is_named() -> None:
    """The message says which command it is."""
    assert "\\connect is a command" in check_statements("\\connect db\n", "postgresql")[0][2]


@pytest.mark.parametrize(
    ("script", "transaction", "rules"),
    [
        ("PRAGMA foreign_keys = OFF;", True, ["pragma-without-effect"]),
        ("PRAGMA foreign_keys(0);", True, ["pragma-without-effect"]),
        ("PRAGMA foreign_keys;", True, []),
        ("PRAGMA journal_mode = WAL;", True, ["pragma-without-effect"]),
        ("PRAGMA journal_mode;", True, []),
        ("PRAGMA journal_mode = WAL;", False, []),
        ("PRAGMA user_version = 1;", True, []),
        ("PRAGMA foreign_keys = OFF;", False, []),
    ],
)
def test_pragma_without_effect(script: str, transaction: bool, rules: list[str]) -> None:
    """What SQLite ignores silently inside a transaction is named."""
    found = check_statements(script, "sqlite", transaction=transaction)
    assert [rule for rule, _, _ in found] == rules


@pytest.mark.parametrize(
    ("script", "directives"),
    [
        ("-- msr: no-transaction\nSELECT 1;", [(1, "no-transaction")]),
        ("\n-- a\n/* b\n */\n--MSR:no-transaction \nSELECT 1;", [(5, "no-transaction")]),
        ("-- msr: a\n-- msr: b", [(1, "a"), (2, "b")]),
        ("SELECT 1;\n-- msr: no-transaction", []),
        ("-- about msr: no-transaction\nSELECT 1;", []),
    ],
)
def test_directives(script: str, directives: list[tuple[int, str]]) -> None:
    """Directives are comment lines above the first statement, and only there."""
    assert find_directives(script) == directives


@pytest.mark.parametrize("script", ["", "-- SELECT 1;\n", " ;; "])
def test_script_without_a_statement(script: str) -> None:
    """A script that would do nothing is named."""
    assert [rule for rule, _, _ in check_statements(script, "postgresql")] == ["empty"]
