"""A script made ready to run: checked, and loaded if it is Python, as far as that goes offline.

Only what is going to run is prepared. An applied Python script is never imported: years later its
imports may be gone, and nothing of it is needed. The text that was read is what runs, so code and
recorded checksum agree even if the file changes meanwhile.

A Python script may import modules beside it, `from .helpers import rows`. They and the script are
compiled afresh each time. Python's own cache judges a file by its size and a time in whole
seconds, which an edit may leave as they were; a migration is not the place to find that out.

Everything here reads files and blocks: in an event loop, call it from a worker thread.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import logging
import os
import re
import sys
import traceback
import types
import zlib
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from msr.config import Config, script_timeout
from msr.errors import ConfigError
from msr.scripts import Problem, Script, read_script
from msr.sql import check_statements, find_directives, line_and_column
from msr.urls import Dialect

__all__ = ["Direction", "Options", "PreparedScript", "ScriptContext", "check_all", "prepare"]

Direction = Literal["up", "down"]

Function = Callable[[Any, "ScriptContext"], Coroutine[Any, Any, object]]

_DIRECTIVES = "'-- msr: no-transaction', 'lock_timeout=5s' or 'statement_timeout=10m'"
_LIKE_A_DIRECTIVE = re.compile(
    r"--[^\S\n]*msr\b:?[^\S\n]*(?:no-transaction|(?:lock|statement)_timeout)", re.IGNORECASE
)
_OTHER_TOOLS = re.compile(
    r"^--[^\S\n]*(?:\+(?:goose|migrate)|migrate:(?:up|down))\b.*", re.MULTILINE
)
_MODULE = "msr_script_"
_NO_LINES: Mapping[str, int] = types.MappingProxyType({})


@dataclass(frozen=True, slots=True)
class ScriptContext:
    """What a Python script is told when it asks for it: `async def up(db, context)`.

    `script` is its path below the folder and `token` the fencing token it runs under, None without
    the lock. `progress(done, total, note)` shows how far it is: on the terminal, in `lock:status`
    and to whoever waits for the lock. It may be called as often as one likes.
    """

    script: str
    config: Config
    token: int | None
    logger: logging.Logger
    report: Callable[[float, float | None, str], None] = field(repr=False)

    def progress(self, done: float, total: float | None = None, note: str = "") -> None:
        """So much is `done`, of `total` where that is known; `note` says what of."""
        self.report(done, total, note)


@dataclass(frozen=True, slots=True)
class Options:
    """What a script says about its running; None leaves a limit (in seconds) to the settings."""

    transaction: bool = True
    lock_timeout: float | None = None
    statement_timeout: float | None = None


@dataclass(frozen=True, slots=True)
class PreparedScript:
    """One direction of a script, ready to run unless it has `problems`.

    `path` and `label` are those of the file that runs, which may be a `.down.sql`; `text` is what
    is in it, and `function` what runs of a Python script.
    """

    path: Path
    label: str
    text: str = field(repr=False)
    options: Options = Options()
    function: Function | None = None
    problems: tuple[Problem, ...] = ()


def prepare(script: Script, direction: Direction, dialect: Dialect | None) -> PreparedScript:
    """Check and load one direction of a script.

    Without a `dialect`, SQL is wrong where every dialect says so.
    """
    path, label, text = script.path, script.label, script.text
    if script.kind == "python":
        return _prepare_python(script, direction)
    if direction == "down":
        if script.down_path is None:
            return PreparedScript(path, label, "", problems=(_no_way_down(script),))
        path, label = script.down_path, f"{script.label.removesuffix('.up.sql')}.down.sql"
        _, text, problem = read_script(path, label)
        if problem:
            return PreparedScript(path, label, "", problems=(problem,))
    options, problems = _read_directives(text, label)
    dialects: Sequence[Dialect] = ["postgresql", "sqlite"] if dialect is None else [dialect]
    findings = [check_statements(text, it, transaction=options.transaction) for it in dialects]
    problems += [
        Problem(rule, label, message, line)
        for rule, line, message in findings[0]
        if all((rule, line) in [found[:2] for found in others] for others in findings[1:])
    ]
    return PreparedScript(path, label, text, options, problems=tuple(problems))


def check_all(scripts: Sequence[Script], dialect: Dialect | None) -> list[Problem]:
    """Everything wrong with either direction of the scripts; to have no way down is not."""
    problems: list[Problem] = []
    for script in scripts:
        if script.checksum:  # else unreadable, and reported as such already
            directions: list[Direction] = ["up", "down"] if script.down_path else ["up"]
            for direction in directions:
                problems += prepare(script, direction, dialect).problems
    return problems


def _no_way_down(script: Script) -> Problem:
    if script.kind == "python":
        way_out = "define 'async def down(db)'"
    else:
        stem = script.label.removesuffix(".sql").removesuffix(".up")
        way_out = f"write {stem}.down.sql"
        if not script.label.endswith(".up.sql"):
            way_out = f"rename it to {stem}.up.sql, and {way_out} beside it"
    message = f"has no way down, so nothing can be rolled back to before it: {way_out}"
    return Problem("no-way-down", script.label, message)


def _read_directives(text: str, label: str) -> tuple[Options, list[Problem]]:
    """What the `-- msr:` lines above an SQL script say, and what is wrong with them."""
    given: dict[str, object] = {}
    lines: dict[str, int] = {}
    problems = []
    for line, directive in find_directives(text):
        name, equals, value = (part.strip() for part in directive.partition("="))
        if directive == "no-transaction":
            given["transaction"] = False
        elif equals and name in ("lock_timeout", "statement_timeout"):
            given[name], lines[name] = value, line
        else:
            message = f"unknown directive {directive!r}: use {_DIRECTIVES}"
            problems.append(Problem("unknown-directive", label, message, line))
    options, wrong = _options(given, label, lines)
    return options, [*problems, *wrong, *_stray_directives(text, label)]


def _stray_directives(text: str, label: str) -> Iterator[Problem]:
    """What was meant to tell us, or another tool, something, and does not."""
    good = {line for line, _ in find_directives(text)}
    for match in _LIKE_A_DIRECTIVE.finditer(text):
        line, _ = line_and_column(text, match.start())
        if line not in good:
            message = f"{match[0]!r} has no effect here: write '-- msr: ...' on a line of its own, "
            message += "above the first statement"
            yield Problem("stray-directive", label, message, line)
    if found := _OTHER_TOOLS.search(text):
        line, _ = line_and_column(text, found.start())
        message = (
            f"{found[0].strip()!r} is another tool's: put each direction into a file of its own"
        )
        yield Problem("other-tools", label, f"{message}, .up.sql and .down.sql", line)


def _options(
    given: Mapping[str, Any], label: str, lines: Mapping[str, int] = _NO_LINES
) -> tuple[Options, list[Problem]]:
    transaction = given.get("transaction", True)
    values: dict[str, Any] = {"transaction": transaction is not False}
    problems = []
    if not isinstance(transaction, bool):
        message = f"'transaction' is {transaction!r}: make it True or False"
        problems.append(Problem("python-transaction", label, message))
    for name in ("lock_timeout", "statement_timeout"):
        if given.get(name) is not None:
            try:
                values[name] = script_timeout(given[name], name, "")
            except ConfigError as error:
                problems.append(Problem("bad-option", label, str(error), lines.get(name)))
    return Options(**values), problems


# Python


def _prepare_python(script: Script, direction: Direction) -> PreparedScript:
    def failed(*problems: Problem) -> PreparedScript:
        return PreparedScript(script.path, script.label, script.text, problems=problems)

    loaded = _execute(script)
    if isinstance(loaded, Problem):
        return failed(loaded)
    options, problems = _options(vars(loaded), script.label)
    functions = {name: getattr(loaded, name, None) for name in ("up", "down")}
    for name, function in functions.items():
        if function is None and name == "down":
            continue
        if not _takes(function, 1) and not _takes(function, 2):
            what = "has no" if function is None else f"its {name!r} is not a plain"
            message = f"{what} 'async def {name}(db)': define it so"
            problems.insert(0, Problem(f"python-{name}", script.label, message))
    function = functions[direction]
    if function is None and not problems:
        return failed(_no_way_down(script))
    if problems:
        return failed(*problems)
    assert function is not None
    return PreparedScript(script.path, script.label, script.text, options, _with_context(function))


def _execute(script: Script) -> types.ModuleType | Problem:
    """Run a Python script's module: the module, or what is wrong with it."""
    file = str(script.path)
    try:
        code = compile(script.text, file, "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:  # ValueError: a null byte, before Python 3.11.4
        line = error.lineno if isinstance(error, SyntaxError) else None
        what = error.msg if isinstance(error, SyntaxError) else str(error)
        return Problem("python-syntax", script.label, f"not valid Python: {what}", line)
    # Scripts of other folders may have the same file name.
    place = zlib.crc32(os.fsencode(script.path.absolute()))
    name = f"{_MODULE}{re.sub(r'[^A-Za-z0-9]', '_', script.path.stem)}_{place:08x}"
    _forget(name)
    module = types.ModuleType(name)
    module.__file__ = file
    # A package in whose folder the files beside the script are; `_Beside` finds them.
    module.__package__, module.__path__ = name, [str(script.path.parent)]
    if _BESIDE not in sys.meta_path:
        sys.meta_path.insert(0, _BESIDE)
    sys.modules[name] = module  # dataclasses and pickle look their module up there
    try:
        exec(code, module.__dict__)
    except (Exception, SystemExit) as error:
        _forget(name)
        frames = traceback.extract_tb(error.__traceback__)
        line = next((frame.lineno for frame in reversed(frames) if frame.filename == file), None)
        what = " ".join(f"{type(error).__name__}: {error}".split())
        return Problem("python-import", script.label, f"cannot be imported, {what}", line)
    return module


def _forget(name: str) -> None:
    """Drop a script's module, and those beside it, from an earlier run of this process."""
    for module in list(sys.modules):
        if module == name or module.startswith(f"{name}."):
            del sys.modules[module]


class _Afresh(importlib.machinery.SourceFileLoader):
    """Loads a module from its source, whatever bytecode there is, and leaves none behind."""

    def get_code(self, fullname: str) -> types.CodeType:
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


class _Beside(importlib.abc.MetaPathFinder):
    """Finds the modules beside a script; leaves all others to Python's own finders."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(_MODULE) or path is None:
            return None
        name = fullname.rpartition(".")[2]
        for file in (file for folder in path for file in _candidates(Path(folder), name)):
            if file.is_file():
                folders = [str(file.parent)] if file.name == "__init__.py" else None
                return importlib.util.spec_from_file_location(
                    fullname,
                    file,
                    loader=_Afresh(fullname, str(file)),
                    submodule_search_locations=folders,
                )
        return None


_BESIDE = _Beside()


def _candidates(folder: Path, name: str) -> Iterator[Path]:
    yield folder / name / "__init__.py"
    yield folder / f"{name}.py"


def _takes(function: object, count: int) -> bool:
    if not inspect.iscoroutinefunction(function):
        return False
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    return True


def _with_context(function: Callable[..., Coroutine[Any, Any, object]]) -> Function:
    """The function as one that takes a context, if only to leave it.

    A second parameter that has a default and another name is the script's own business.
    """
    if not _takes(function, 1):
        return function
    parameters = list(inspect.signature(function).parameters.values())
    if _takes(function, 2) and len(parameters) > 1 and parameters[1].name == "context":
        return function

    async def without_context(db: Any, _: ScriptContext) -> object:
        return await function(db)

    return without_context
