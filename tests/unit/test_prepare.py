"""What a script says about its running, and a Python script's functions and imports."""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import py_compile
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from msr.config import Config
from msr.prepare import Options, PreparedScript, ScriptContext, check_all, prepare
from msr.scripts import Script, load_scripts
from msr.urls import Dialect
from tests.support.cli import write_scripts

UP = "async def up(db): pass\n"

CONTEXT = ScriptContext("V1_x.py", Config(), 7, logging.getLogger("msr.script"), lambda *_: None)


def load_one(folder: Path) -> Script:
    scripts, problems = load_scripts(folder)
    assert problems == []
    [script] = scripts
    return script


def sql(folder: Path, text: str) -> Script:
    return load_one(write_scripts(folder, {"V1_x.sql": text}))


def python(folder: Path, text: str, beside: Mapping[str, str] | None = None) -> Script:
    return load_one(write_scripts(folder, {"V1_x.py": text, **(beside or {})}))


def run(prepared: PreparedScript, db: object = "db") -> Any:
    """What the script's function returns."""
    assert prepared.problems == ()
    assert prepared.function is not None
    return asyncio.run(prepared.function(db, CONTEXT))


def found(prepared: PreparedScript) -> list[tuple[str, int | None]]:
    return [(problem.rule, problem.line) for problem in prepared.problems]


# Directives


@pytest.mark.parametrize(
    ("header", "options"),
    [
        ("", Options()),
        ("-- msr: no-transaction", Options(transaction=False)),
        ("-- msr: lock_timeout=5s", Options(lock_timeout=5.0)),
        ("-- msr: statement_timeout=10m", Options(statement_timeout=600.0)),
        ("--MSR:  lock_timeout = 1m 30s", Options(lock_timeout=90.0)),
        ("-- msr: lock_timeout=0.5", Options(lock_timeout=0.5)),
        ("-- msr: lock_timeout=0", Options(lock_timeout=0.0)),
        (
            """-- why
            -- msr: no-transaction
            /* and */
            -- msr: lock_timeout=2s

            -- msr: statement_timeout=3s""",
            Options(False, 2.0, 3.0),
        ),
    ],
)
def test_directives(tmp_path: Path, header: str, options: Options) -> None:
    """Each directive above the first statement is obeyed, in seconds; zero is a value of its own.

    What is not given stays None, and is then a matter of the settings.
    """
    script = sql(tmp_path, f"{header}\nSELECT 1;")
    expected = PreparedScript(script.path, "V1_x.sql", script.text, options)
    assert prepare(script, "up", "postgresql") == expected
    assert prepare(script, "up", "sqlite") == expected


@pytest.mark.parametrize(
    "directive",
    [
        "notransaction",
        "no-transaction = true",
        "lock_timeout",
        "lock_timeout 5s",
        "locktimeout=5s",
        "transaction=false",
        "",
    ],
)
def test_unknown_directive(tmp_path: Path, directive: str) -> None:
    """A directive that msr does not know is named, so that a misspelt one is not passed over."""
    script = sql(tmp_path, f"-- x\n-- msr: {directive}\nSELECT 1;")
    [problem] = prepare(script, "up", "sqlite").problems
    assert (problem.rule, problem.file, problem.line) == ("unknown-directive", "V1_x.sql", 2)
    assert problem.message == (
        f"unknown directive {directive!r}: use '-- msr: no-transaction', 'lock_timeout=5s' or "
        "'statement_timeout=10m'"
    )


@pytest.mark.parametrize("name", ["lock_timeout", "statement_timeout"])
@pytest.mark.parametrize("value", ["soon", "", "-1s", "5 minutes", "8d"])
def test_bad_value_of_a_directive(tmp_path: Path, name: str, value: str) -> None:
    """A limit that is no duration, or longer than a week, is a problem that names the limit."""
    script = sql(tmp_path, f"-- msr: {name}={value}\nSELECT 1;")
    [problem] = prepare(script, "up", "sqlite").problems
    assert (problem.rule, problem.file) == ("bad-option", "V1_x.sql")
    assert problem.message.startswith(f"{name}: must be ")


def test_every_problem_of_the_directives(tmp_path: Path) -> None:
    """One bad directive does not hide the next, nor what is wrong with the statements."""
    script = sql(
        tmp_path,
        "-- msr: a\n-- msr: lock_timeout=b\n-- msr: statement_timeout=c\n-- msr: d\nCOMMIT;",
    )
    assert [problem.rule for problem in prepare(script, "up", "sqlite").problems] == [
        "unknown-directive",
        "unknown-directive",
        "bad-option",
        "bad-option",
        "transaction-control",
    ]


def test_bad_value_leaves_the_other_directives(tmp_path: Path) -> None:
    """A bad limit does not take back that the script opts out of the transaction."""
    script = sql(tmp_path, "-- msr: no-transaction\n-- msr: lock_timeout=soon\nBEGIN;\nCOMMIT;")
    assert [it.rule for it in prepare(script, "up", "sqlite").problems] == ["bad-option"]


# SQL scripts


def test_opting_out_of_the_transaction(tmp_path: Path) -> None:
    """What would break the transaction is a problem only where there is one."""
    text = "BEGIN;\nCOMMIT;\n"
    assert found(prepare(sql(tmp_path, text), "up", "postgresql")) == [
        ("transaction-control", 1),
        ("transaction-control", 2),
    ]
    script = sql(tmp_path, f"-- msr: no-transaction\n{text}")
    assert found(prepare(script, "up", "postgresql")) == []


def test_sql_down(tmp_path: Path) -> None:
    """The way down is a file of its own, with its own text, directives and problems."""
    write_scripts(
        tmp_path,
        {
            "sub/V1_x.up.sql": "-- msr: lock_timeout=1s\nSELECT 1;",
            "sub/V1_x.down.sql": "-- msr: lock_timeout=2s\r\nSELECT 2;",
        },
    )
    script = load_one(tmp_path)
    prepared = prepare(script, "down", "sqlite")
    assert prepared == PreparedScript(
        tmp_path / "sub/V1_x.down.sql",
        "sub/V1_x.down.sql",
        "-- msr: lock_timeout=2s\nSELECT 2;",
        Options(lock_timeout=2.0),
    )
    assert prepare(script, "up", "sqlite").options == Options(lock_timeout=1.0)

    prepared.path.write_text("SELECT 1;\nCOMMIT;")
    [problem] = prepare(script, "down", "sqlite").problems
    assert (problem.rule, problem.line) == ("transaction-control", 2)
    assert problem.file == "sub/V1_x.down.sql"
    assert prepare(script, "up", "sqlite").problems == ()


@pytest.mark.parametrize(
    ("content", "rule"), [(None, "unreadable"), (b"\xff", "not-utf8"), (b"-- nothing", "empty")]
)
def test_unusable_way_down(tmp_path: Path, content: bytes | None, rule: str) -> None:
    """A way down that cannot be read, or is none, is a problem of the .down.sql."""
    write_scripts(tmp_path, {"V1_x.up.sql": "SELECT 1;", "V1_x.down.sql": "SELECT 1;"})
    script = load_one(tmp_path)
    assert script.down_path is not None
    script.down_path.unlink()
    if content is not None:
        script.down_path.write_bytes(content)
    [problem] = prepare(script, "down", "sqlite").problems
    assert (problem.rule, problem.file) == (rule, "V1_x.down.sql")


@pytest.mark.parametrize(
    ("label", "way_out"),
    [
        ("sub/V1_x.up.sql", "write sub/V1_x.down.sql"),
        ("V1_x.sql", "rename it to V1_x.up.sql, and write V1_x.down.sql beside it"),
        ("V1_x.py", "define 'async def down(db)'"),
    ],
)
def test_no_way_down(tmp_path: Path, label: str, way_out: str) -> None:
    """A script without a way down says so, and what to write."""
    script = load_one(write_scripts(tmp_path, {label: UP if label.endswith("py") else "SELECT 1;"}))
    [problem] = prepare(script, "down", "sqlite").problems
    assert (problem.rule, problem.file, problem.line) == ("no-way-down", label, None)
    assert problem.message.endswith(f"before it: {way_out}")
    assert prepare(script, "up", "sqlite").problems == ()


@pytest.mark.parametrize(
    ("text", "postgres", "sqlite", "neither"),
    [
        ("SELECT 1, [;\nCOMMIT;];", [("transaction-control", 2)], [], []),
        ("SELECT $$;\nCOMMIT;$$;", [], [("transaction-control", 2)], []),
        ("SELECT 1;\nCOMMIT;", *[[("transaction-control", 2)]] * 3),
        ("-- msr: nothing\n", *[[("unknown-directive", 1), ("empty", None)]] * 3),
    ],
)
def test_dialects(
    tmp_path: Path,
    text: str,
    postgres: list[tuple[str, int]],
    sqlite: list[tuple[str, int]],
    neither: list[tuple[str, int]],
) -> None:
    """SQL is read as its dialect has it; without one, only what both refuse is a problem."""
    script = sql(tmp_path, text)
    assert found(prepare(script, "up", "postgresql")) == postgres
    assert found(prepare(script, "up", "sqlite")) == sqlite
    assert found(prepare(script, "up", None)) == neither


@pytest.mark.parametrize("dialect", ["sqlite", None])
def test_check_all(tmp_path: Path, dialect: Dialect | None) -> None:
    """Both directions of every script are looked at; to have no way down is no problem."""
    write_scripts(
        tmp_path,
        {
            "V1_a.up.sql": "COMMIT;",
            "V1_a.down.sql": "ROLLBACK;",
            "V2_b.sql": "SELECT 1;",
            "V3_c.py": UP,
            "V4_d.py": f"{UP}def down(db): pass\n",
            "V5_unreadable.sql": b"\xff",
            "R_e.sql": "",
        },
    )
    scripts, [unreadable] = load_scripts(tmp_path)
    assert unreadable.rule == "not-utf8"
    assert [(problem.rule, problem.file) for problem in check_all(scripts, dialect)] == [
        ("transaction-control", "V1_a.up.sql"),
        ("transaction-control", "V1_a.down.sql"),
        ("python-down", "V4_d.py"),
        ("empty", "R_e.sql"),
    ]


# Python scripts


def test_python_script(tmp_path: Path) -> None:
    """A Python script's functions come from the text that was read, not from the file."""
    script = python(
        tmp_path,
        """
        from __future__ import annotations
        import dataclasses
        @dataclasses.dataclass
        class Row:
            x: int
        transaction = False
        async def up(db): return (db, __file__, Row(1).x)
        async def down(db): return 2
        """,
    )
    script.path.write_text("broken(")
    up, down = prepare(script, "up", "sqlite"), prepare(script, "down", "sqlite")
    assert up.options == down.options == Options(transaction=False)
    assert run(up) == ("db", str(script.path), 1)
    assert run(down) == 2
    assert (up.path, up.label, up.text) == (script.path, "V1_x.py", script.text)
    assert os.listdir(tmp_path) == ["V1_x.py"]


def test_annotations_are_not_made_strings(tmp_path: Path) -> None:
    """A future import of msr's own does not reach into the script."""
    check = "def f(x: int): pass\nassert f.__annotations__ == {'x': int}\n"
    assert prepare(python(tmp_path, f"{UP}{check}"), "up", "sqlite").problems == ()


@pytest.mark.parametrize(
    ("attributes", "options"),
    [
        ("", Options()),
        ("transaction = True", Options()),
        ("transaction = False", Options(transaction=False)),
        ("lock_timeout = '5s'", Options(lock_timeout=5.0)),
        ("statement_timeout = '10m'", Options(statement_timeout=600.0)),
        ("lock_timeout = 5; statement_timeout = 0.5", Options(True, 5.0, 0.5)),
        ("lock_timeout = 0", Options(lock_timeout=0.0)),
        ("lock_timeout = None", Options()),
    ],
)
def test_attributes(tmp_path: Path, attributes: str, options: Options) -> None:
    """The module's attributes say what an SQL script's directives say, for both directions."""
    script = python(tmp_path, f"{UP}async def down(db): pass\n{attributes}\n")
    for dialect in ("postgresql", None):
        assert prepare(script, "up", dialect).options == options
        assert prepare(script, "down", dialect).options == options


@pytest.mark.parametrize(
    ("attribute", "rule", "words"),
    [
        ("transaction = 'no'", "python-transaction", "'transaction' is 'no': make it"),
        ("transaction = 0", "python-transaction", "'transaction' is 0: make it"),
        ("transaction = None", "python-transaction", "'transaction' is None: make it"),
        ("lock_timeout = 'soon'", "bad-option", "lock_timeout: must be a duration"),
        ("lock_timeout = True", "bad-option", "lock_timeout: must be a duration"),
        ("lock_timeout = -1", "bad-option", "lock_timeout: must be a duration"),
        ("statement_timeout = [5]", "bad-option", "statement_timeout: must be a duration"),
        ("statement_timeout = '8d'", "bad-option", "statement_timeout: must be from 0 seconds"),
    ],
)
def test_bad_attributes(tmp_path: Path, attribute: str, rule: str, words: str) -> None:
    """A module attribute that is not what it should be is named."""
    [problem] = prepare(python(tmp_path, f"{UP}{attribute}\n"), "up", "sqlite").problems
    assert (problem.rule, problem.file) == (rule, "V1_x.py")
    assert problem.message.startswith(words)


@pytest.mark.parametrize(
    ("parameters", "result", "expected"),
    [
        ("db", "db", "db"),
        ("connection", "connection", "db"),
        ("db, context", "context", CONTEXT),
        ("db, context=None", "context", CONTEXT),
        ("db, other", "other", CONTEXT),
        ("db, /, context", "context", CONTEXT),
        ("db, rows=10", "rows", 10),
        ("db, rows=10, context=None", "(rows, context)", (10, None)),
        ("*arguments", "arguments", ("db",)),
        ("db, *more, **others", "(more, others)", ((), {})),
    ],
)
def test_parameters(tmp_path: Path, parameters: str, result: str, expected: object) -> None:
    """A function gets the context where it asks for it; a default of its own stays its own."""
    lines = [f"async def {name}({parameters}): return {result}\n" for name in ("up", "down")]
    script = python(tmp_path, "".join(lines))
    assert run(prepare(script, "up", "sqlite")) == expected
    assert run(prepare(script, "down", "sqlite")) == expected


@pytest.mark.parametrize("name", ["up", "down"])
@pytest.mark.parametrize(
    "definition",
    [
        "def {}(db): pass",
        "async def {}(): pass",
        "async def {}(db, context, more): pass",
        "async def {}(*, db): pass",
        "async def {}(db, *, context): pass",
        "async def {}(db): yield",
        "{} = 1",
        "class {}:\n    def __init__(self, db): pass",
    ],
)
def test_refused_functions(tmp_path: Path, name: str, definition: str) -> None:
    """What cannot be called so, or not be awaited, is refused, for whichever direction."""
    others = "" if name == "up" else UP
    script = python(tmp_path, f"{others}{definition.format(name)}\n")
    for direction in ("up", "down"):
        [problem] = prepare(script, direction, "sqlite").problems
        assert problem.rule == f"python-{name}"
        assert problem.message == (
            f"its {name!r} is not a plain 'async def {name}(db)': define it so"
        )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\nasync def up(db:\n", [("python-syntax", 2, "never closed")]),
        (f"{UP}\0", [("python-syntax", None, "null bytes")]),
        (f"{UP}import no_such_module\n", [("python-import", 2, "'no_such_module'")]),
        (f"def f():\n  int('x')\n{UP}f()\n", [("python-import", 2, "ValueError")]),
        (f"{UP}raise SystemExit(3)\n", [("python-import", 2, "SystemExit: 3")]),
        (f"{UP}raise ValueError('a\\n\\n b')", [("python-import", 2, "ValueError: a b")]),
        (f"{UP}from .nothing import x\n", [("python-import", 2, "nothing")]),
        (f"{UP}from .. import x\n", [("python-import", 2, "ImportError")]),
        ("", [("python-up", None, "has no 'async def up(db)'")]),
        ("async def down(db): pass", [("python-up", None, "has no")]),
        ("transaction = 1", [("python-up", None, ""), ("python-transaction", None, "1")]),
    ],
)
def test_python_problems(
    tmp_path: Path, text: str, expected: list[tuple[str, int | None, str]]
) -> None:
    """Everything wrong with a Python script becomes a problem with its line, not a traceback."""
    problems = prepare(python(tmp_path, text), "up", "sqlite").problems
    assert [(p.rule, p.line) for p in problems] == [(rule, line) for rule, line, _ in expected]
    for problem, (_, _, words) in zip(problems, expected, strict=True):
        assert words in problem.message
        assert "\n" not in problem.message


def test_failed_import_leaves_no_module(tmp_path: Path) -> None:
    """A script that cannot be imported is not left behind half made, nor what it had imported."""
    script = python(tmp_path, "from . import helpers\nraise ValueError", {"helpers.py": ""})
    before = set(sys.modules)
    assert found(prepare(script, "up", "sqlite")) == [("python-import", 2)]
    assert set(sys.modules) == before


def test_interrupt_is_not_swallowed(tmp_path: Path) -> None:
    """Ctrl-C while a script is imported ends the run."""
    with pytest.raises(KeyboardInterrupt):
        prepare(python(tmp_path, "raise KeyboardInterrupt"), "up", "sqlite")


# Modules beside a Python script

HELPERS = "def rows(): return 'helped'\n"


@pytest.mark.parametrize(
    ("statement", "beside"),
    [
        ("from .helpers import rows", {"helpers.py": HELPERS}),
        ("from . import helpers; rows = helpers.rows", {"helpers.py": HELPERS}),
        ("from .package import rows", {"package/__init__.py": HELPERS}),
        (
            "from .package.deep.rows import rows",
            {
                "package/__init__.py": "",
                "package/deep/__init__.py": "",
                "package/deep/rows.py": HELPERS,
            },
        ),
        (
            "from .package import rows",
            {
                "package/__init__.py": "from ..helpers import made\nfrom .other import *",
                "package/other.py": "from . import made\nrows = made",
                "helpers.py": "def made(): return 'helped'",
            },
        ),
        ("from ._helpers import rows", {"_helpers.py": HELPERS}),
        ("from .folder.rows import rows", {"folder/rows.py": HELPERS}),
        (
            "import importlib\nrows = importlib.import_module('.h', __name__).rows",
            {"h.py": HELPERS},
        ),
    ],
)
def test_relative_imports(tmp_path: Path, statement: str, beside: dict[str, str]) -> None:
    """A script imports what stands beside it, modules and packages, and they import each other."""
    text = f"{statement}\nasync def up(db): return rows()\n"
    labels = {f"sub/{name}": content for name, content in {**beside, "V1_x.py": text}.items()}
    script = load_one(write_scripts(tmp_path, labels))
    assert run(prepare(script, "up", "sqlite")) == "helped"
    assert not list(tmp_path.rglob("__pycache__"))


def test_relative_import_in_a_function(tmp_path: Path) -> None:
    """An import that waits until the function runs finds the same modules."""
    text = "async def up(db):\n    from .helpers import rows\n    return rows()\n"
    script = python(tmp_path, text, {"helpers.py": HELPERS})
    assert run(prepare(script, "up", "sqlite")) == "helped"


def test_relative_imports_of_two_scripts(tmp_path: Path) -> None:
    """Each script has the modules of its own folder, whatever they are called elsewhere."""
    text = "from .helpers import name\nasync def up(db): return name\n"
    write_scripts(
        tmp_path,
        {
            "a/V1_x.py": text,
            "a/helpers.py": "name = 'a'",
            "b/V2_x.py": text,
            "b/helpers.py": "name = 'b'",
        },
    )
    scripts, _ = load_scripts(tmp_path)
    prepared = [prepare(script, "up", "sqlite") for script in scripts]
    assert [run(it) for it in prepared] == ["a", "b"]


def test_relative_imports_of_two_folders(tmp_path: Path) -> None:
    """Nor do two folders of one process, for two databases, come in each other's way."""
    text = "async def up(db):\n    from .helpers import name\n    return name\n"
    folders = [
        write_scripts(tmp_path / name, {"V1_x.py": text, "helpers.py": f"name = {name!r}"})
        for name in ("a", "b")
    ]
    prepared = [prepare(load_one(folder), "up", "sqlite") for folder in folders]
    assert [run(it) for it in prepared] == ["a", "b"]


def test_files_beside_are_not_importable_by_name(tmp_path: Path) -> None:
    """Only relative imports look there: a helper called json.py hides nothing from anybody."""
    script = python(
        tmp_path,
        "import json\nasync def up(db): return json.dumps([1])\n",
        {"json.py": "raise ValueError", "helpers.py": HELPERS},
    )
    assert run(prepare(script, "up", "sqlite")) == "[1]"
    script = python(tmp_path, f"import helpers\n{UP}")
    [problem] = prepare(script, "up", "sqlite").problems
    assert "No module named 'helpers'" in problem.message


def test_problem_in_a_module_beside(tmp_path: Path) -> None:
    """What is wrong with the module is said, at the line of the script that imports it."""
    script = python(tmp_path, f"{UP}\nfrom . import helpers\n", {"helpers.py": "\n1 / 0\n"})
    [problem] = prepare(script, "up", "sqlite").problems
    assert (problem.rule, problem.file, problem.line) == ("python-import", "V1_x.py", 3)
    assert "ZeroDivisionError" in problem.message

    (tmp_path / "helpers.py").write_text("def (:\n")
    [problem] = prepare(script, "up", "sqlite").problems
    assert "SyntaxError: invalid syntax (helpers.py, line 1)" in problem.message


@pytest.mark.parametrize("helper", ["helpers.py", "helpers/__init__.py", "helpers/deep.py"])
def test_modules_are_never_stale(tmp_path: Path, helper: str) -> None:
    """An edit that leaves a module's size and time as they were runs all the same.

    That is how Python tells whether the bytecode that it keeps is of this source.
    """
    module = helper.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    text = f"from .{module} import rows\nasync def up(db): return rows()\n"
    beside = {"helpers/__init__.py": ""} if "/" in helper else {}
    script = python(tmp_path, text, {**beside, helper: "def rows(): return 1"})
    path = tmp_path / helper
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    assert run(prepare(script, "up", "sqlite")) == 1

    for expected in (2, 3):
        path.write_text(f"def rows(): return {expected}")
        os.utime(path, ns=times)
        assert run(prepare(script, "up", "sqlite")) == expected
    assert not list(tmp_path.rglob("__pycache__"))


def test_foreign_bytecode_is_not_used(tmp_path: Path) -> None:
    """Nor is a cache that somebody else left: a checkout, an editor, Python's own import."""
    script = python(
        tmp_path,
        "from .helpers import rows\nasync def up(db): return rows()\n",
        {"helpers.py": "def rows(): return 1"},
    )
    path = tmp_path / "helpers.py"
    stat = path.stat()
    py_compile.compile(str(path), doraise=True)
    assert list(tmp_path.rglob("*.pyc"))
    path.write_text("def rows(): return 2")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    assert run(prepare(script, "up", "sqlite")) == 2


def test_a_removed_module_is_missing(tmp_path: Path) -> None:
    """What is gone from the folder is gone from the next run of the same process."""
    text = "from .helpers import rows\nasync def up(db): return rows()\n"
    script = python(tmp_path, text, {"helpers.py": HELPERS})
    assert run(prepare(script, "up", "sqlite")) == "helped"
    (tmp_path / "helpers.py").unlink()
    [problem] = prepare(script, "up", "sqlite").problems
    assert "helpers" in problem.message


def test_the_script_is_never_stale(tmp_path: Path) -> None:
    """The script itself is compiled from its text each time, and leaves no bytecode behind."""
    for expected in (1, 2):
        script = python(tmp_path, f"async def up(db): return {expected}\n")
        assert run(prepare(script, "up", "sqlite")) == expected
    assert os.listdir(tmp_path) == ["V1_x.py"]


def test_source_in_tracebacks(tmp_path: Path) -> None:
    """A module beside the script has its file and its source, for tracebacks and debuggers."""
    text = "from .helpers import rows\nasync def up(db): return rows\n"
    script = python(tmp_path, text, {"helpers.py": textwrap.dedent(HELPERS)})
    rows = run(prepare(script, "up", "sqlite"))
    assert rows.__code__.co_filename == str(tmp_path / "helpers.py")
    assert inspect.getsource(rows) == HELPERS


# The context


def test_progress_of_the_context() -> None:
    """`progress` hands on what it was told, whether or not an end is known."""
    told: list[tuple[float, float | None, str]] = []
    context = ScriptContext(
        "V1_x.py", Config(), None, logging.getLogger(), lambda *news: told.append(news)
    )
    context.progress(1)
    context.progress(2.5, 10, "rows")
    context.progress(3, note="more")
    assert told == [(1, None, ""), (2.5, 10, "rows"), (3, None, "more")]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("SELECT 1;\n-- msr: no-transaction\n", 2),
        ("/* x */ -- msr: no-transaction\nSELECT 1;", 1),
        ("-- msr no-transaction\nSELECT 1;", 1),
        ("--msr:lock_timeout=5s\nSELECT 1; --msr: statement_timeout=5s", 2),
    ],
)
def test_stray_directives(tmp_path: Path, text: str, line: int) -> None:
    """A directive that would not be obeyed where it stands is named: a lost limit hurts."""
    assert ("stray-directive", line) in found(prepare(sql(tmp_path, text), "up", "sqlite"))


@pytest.mark.parametrize("marker", ["-- +goose Down", "-- +migrate Up", "-- migrate:down"])
def test_other_tools(tmp_path: Path, marker: str) -> None:
    """A file with both directions in it, as other tools have them, would be run to its end."""
    [problem] = prepare(sql(tmp_path, f"SELECT 1;\n{marker}\nSELECT 2;"), "up", "sqlite").problems
    assert (problem.rule, problem.line) == ("other-tools", 2)
    assert ".down.sql" in problem.message
