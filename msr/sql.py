"""SQL scripts as text: splitting into statements, directives, and checks before anything runs.

Both dialects share one splitter and differ in their tokens. PostgreSQL follows psql's rules:
quotes, `E''` strings, dollar quotes, nested comments, parentheses, and `BEGIN ATOMIC` bodies;
where psql reads line by line, a string that goes on after a line break is read as the server does.
SQLite follows `sqlite3.complete_statement`: a trigger ends at `; END ;`. That function itself is
not used because it starts from the statement's beginning at each semicolon, which is quadratic
in a long trigger; the tests hold the splitter to it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain

from msr.urls import Dialect

__all__ = [
    "Finding",
    "Statement",
    "check_statements",
    "find_directives",
    "line_and_column",
    "split_postgres",
    "split_sqlite",
]

Finding = tuple[str, int | None, str]
"""What is wrong with a script: the rule's name, the line from 1, and the message."""


@dataclass(frozen=True, slots=True)
class Statement:
    """One statement of a script.

    `text` runs from its first token to its semicolon or, when it has none, to its last token.
    `offset` is where it begins in the script (characters, from 0) and `line` the line of that
    place (from 1). `keyword` holds up to four leading words in capitals, as `ROLLBACK TO A`;
    it is empty when the statement begins with something else.
    """

    text: str
    line: int
    offset: int
    keyword: str


# Both servers take every character above ASCII for a letter. Possessive quantifiers keep the
# scan linear; an unterminated quote runs to the end, where the server will say so. ASCII mode
# gives the servers' white space instead of Unicode's.
_WORD = r"(?P<word>[a-zA-Z_\x80-\U0010ffff][\w$\x80-\U0010ffff]*+)"
_REST = r"(?P<semicolon>;) | (?P<other>[\d.,=*<>+]++|\S)"
_ESCAPES = r"'(?:[^'\\]++|\\.?|'')*+'?"  # the inside of an E'' string
_GAP = r"(?:[^\S\n]|--[^\n]*+)*+\n(?:\s|--[^\n]*+)*+"  # a string goes on after a line break
_TOKENS = {
    "postgresql": rf"""(?P<comment>--[^\n]*+) | (?P<nested>/\*)
        | (?P<quoted>'[^']*+'? | "[^"]*+"? | [eE]{_ESCAPES}(?:{_GAP}{_ESCAPES})*+
        | (?P<tag>\$(?:[a-zA-Z_\x80-\U0010ffff][\w\x80-\U0010ffff]*+)?\$)(?:.*?(?P=tag)|.*))
        | {_WORD} | (?P<open>\() | (?P<close>\)) | (?P<backslash>\\) | {_REST}""",
    "sqlite": rf"""(?P<comment>--[^\n]*+ | /\*(?:.*?\*/|.*))
        | (?P<quoted>'[^']*+'? | "[^"]*+"? | `[^`]*+`? | \[[^\]]*+\]?) | {_WORD} | {_REST}""",
}


@cache
def _pattern(dialect: Dialect) -> re.Pattern[str]:
    """Compiled when first needed: a start with nothing pending reads no SQL."""
    return re.compile(_TOKENS[dialect], re.VERBOSE | re.DOTALL | re.ASCII)


_COMMENT_EDGE = re.compile(r"/\*|\*/")
_FUNCTION = re.compile(r"CREATE (?:OR REPLACE )?(?:FUNCTION|PROCEDURE)\b")
_TRIGGER = re.compile(r"CREATE (?:TEMP |TEMPORARY )?TRIGGER\b")

_HEADER = re.compile(r"(?:\s|--[^\n]*+|/\*.*?\*/)*+", re.DOTALL)
_DIRECTIVE = re.compile(r"^[^\S\n]*--[^\S\n]*msr:(.*)$", re.MULTILINE | re.IGNORECASE)
_OPT_OUT = "start the script with the line '-- msr: no-transaction'"

_CONTROL = re.compile(
    r"BEGIN\b|START TRANSACTION\b|COMMIT\b|END\b|ABORT\b|PREPARE TRANSACTION\b"
    r"|ROLLBACK\b(?! (?:WORK |TRANSACTION )?TO\b)"
)
_CLIENT_COPY = re.compile(r"\b(?:FROM STDIN|TO STDOUT)\b")


def split_postgres(script: str) -> list[Statement]:
    """Split a script where psql would; comments between statements are dropped."""
    return _split(script, "postgresql")


def split_sqlite(script: str) -> list[Statement]:
    """Split a script where the sqlite3 shell would, so that triggers stay whole."""
    return _split(script, "sqlite")


def line_and_column(script: str, offset: int) -> tuple[int, int]:
    """The line and the column, both from 1, of a character offset from 0."""
    return script.count("\n", 0, offset) + 1, offset - script.rfind("\n", 0, offset)


def find_directives(script: str) -> list[tuple[int, str]]:
    """The `-- msr: ...` lines above the first statement, as (line, what follows the colon)."""
    header = _HEADER.match(script)
    return [
        (line_and_column(script, match.start())[0], match[1].strip())
        for match in _DIRECTIVE.finditer(header[0] if header else "")
    ]


def check_statements(script: str, dialect: Dialect, *, transaction: bool = True) -> list[Finding]:
    """What can be known to be wrong with an SQL script without a database, in its order.

    `transaction`: whether it is to run inside one.
    """
    found: list[Finding] = []
    statements = _split(script, dialect)
    if not statements:
        found.append(("empty", None, "contains no statement: write one, or remove the file"))
    for statement in statements:
        if transaction:
            found += _check_transaction(statement)
        client = list(_check_client(statement, dialect))
        found += client
        if any(message.startswith("COPY FROM STDIN") for _, _, message in client):
            break  # what follows is data
    return found


def _check_transaction(statement: Statement) -> Iterator[Finding]:
    """What does not fit into the transaction around the script."""
    if control := _CONTROL.match(statement.keyword):
        message = f"{control[0]} would break the transaction that the script runs in: remove it"
        yield "transaction-control", statement.line, f"{message}, or {_OPT_OUT}"
    # SQLite ignores these there without a word. With foreign keys still on, a table that is rebuilt
    # loses its child rows.
    ignored = statement.keyword in ("PRAGMA FOREIGN_KEYS", "PRAGMA JOURNAL_MODE")
    if ignored and re.search(r"[=(]", statement.text):
        name = statement.keyword.removeprefix("PRAGMA ").lower()
        message = f"PRAGMA {name} changes nothing inside a transaction: {_OPT_OUT}"
        yield "pragma-without-effect", statement.line, message


def _check_client(statement: Statement, dialect: Dialect) -> Iterator[Finding]:
    """What no driver can run, because it speaks to the database's own shell."""
    text, is_copy = statement.text, statement.keyword.startswith("COPY")
    dotted = text.startswith(".")  # `.read` of sqlite3: no SQL begins like that
    if not (is_copy or dotted or "\\" in text):
        return  # spares nearly every statement a second reading
    words: list[str] = []
    lines: set[int] = set()
    for kind, start, end in _tokens(text, dialect):
        line = statement.line + text.count("\n", 0, start)
        if kind == "word":
            words.append(text[start:end].upper())
        elif (kind == "backslash" or (dotted and start == 0)) and line not in lines:
            lines.add(line)
            command = text[start:].split(None, 1)[0]
            message = f"{command} is a command of the database's shell, not SQL: write it as SQL"
            yield "client-command", line, f"{message}, or remove the line"
    if is_copy and (copy := _CLIENT_COPY.search(" ".join(words))):
        message = f"COPY {copy[0]} needs a client to talk to: use INSERT, or a Python script"
        yield "client-copy", statement.line, f"{message} with the connection's own copy functions"


def _split(script: str, dialect: Dialect) -> list[Statement]:
    statements: list[Statement] = []
    line, counted = 1, 0
    tokens = _tokens(script, dialect)
    for first in tokens:
        kind, start, _ = first
        if kind == "semicolon":
            continue  # an empty statement
        end, keyword = _read_statement(script, chain([first], tokens), dialect)
        line += script.count("\n", counted, start)
        counted = start
        statements.append(Statement(script[start:end], line, start, keyword))
    return statements


def _read_statement(
    script: str, tokens: Iterable[tuple[str, int, int]], dialect: Dialect
) -> tuple[int, str]:
    """Take the tokens of one statement: where it ends, and its leading words."""
    head: list[str] = []
    parentheses = blocks = end = 0
    before = previous = ""
    for position, (kind, start, end) in enumerate(tokens):
        token = kind
        if kind == "word":
            token = script[start:end].upper()
            if len(head) == position < 4:
                head.append(token)
            if token == "ATOMIC" and previous == "BEGIN" and _FUNCTION.match(" ".join(head)):
                blocks += 1
            elif blocks and token in ("CASE", "END"):
                blocks += 1 if token == "CASE" else -1
        elif kind == "open":
            parentheses += 1
        elif kind == "close":
            parentheses = max(0, parentheses - 1)
        elif kind == "semicolon" and not parentheses and not blocks:
            trigger = dialect == "sqlite" and _TRIGGER.match(" ".join(head))
            if not trigger or (before, previous) == ("semicolon", "END"):
                break
        before, previous = previous, token
    return end, " ".join(head)


def _tokens(script: str, dialect: Dialect) -> Iterator[tuple[str, int, int]]:
    """The tokens as (kind, start, end), without comments and white space."""
    search = _pattern(dialect).search
    position = 0
    while match := search(script, position):
        kind, start, position = match.lastgroup or "", match.start(), match.end()
        if kind == "nested":
            depth = 1
            while depth and (edge := _COMMENT_EDGE.search(script, position)):
                depth += 1 if edge[0] == "/*" else -1
                position = edge.end()
            if depth:  # kept, for the server to refuse: dropping it would hide what follows
                yield "other", start, len(script)
                return
        elif kind != "comment":
            yield kind, start, position
