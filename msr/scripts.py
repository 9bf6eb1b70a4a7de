"""A folder of migration scripts: finding, naming, reading and checking them.

    V<version>_<name>.sql                         one way
    V<version>_<name>.up.sql  (and .down.sql)     there and back
    V<version>_<name>.py                          async def up(db), and maybe down(db)

The version is a number of up to 18 digits and alone gives the order, whatever the sub-folder.
What looks like a script and is not named like one is a problem, not something to pass over.
Hidden files and folders, and folders that start with an underscore, are passed over.

Everything here reads files and blocks: in an event loop, call it from a worker thread.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import re
import stat
import sys
import traceback
import types
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from msr.errors import ConfigError
from msr.sql import Dialect, check_statements, is_transactional

__all__ = [
    "PreparedScript",
    "Problem",
    "PythonScript",
    "Script",
    "load_python",
    "load_scripts",
    "prepare_script",
]

_NAME = re.compile(
    r"V(?P<version>[0-9]{1,18})_+(?P<name>[^_.].*?)(?P<suffix>\.up\.sql|\.down\.sql|\.sql|\.py)"
)
_LOOKS_LIKE_SCRIPT = re.compile(r".*\.sql|v?[0-9].*\.py", re.IGNORECASE | re.DOTALL)
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Problem:
    """Something about one file that must be put right before anything runs.

    `rule` is a stable name for the kind of problem, `file` the path below the folder, `line`
    counts from 1, and `message` says what is wrong and the way out, without repeating the file.
    """

    rule: str
    file: str
    message: str
    line: int | None = None

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}, line {self.line}"
        return f"{place}: {self.message}"


@dataclass(frozen=True, slots=True)
class Script:
    """A migration on disk.

    `label` is the path below the folder with forward slashes. `text` has line feeds only and no
    byte order mark, so a checkout on Windows gives the same `checksum`: the SHA-256, in hex, of
    that text. Both are empty where the file could not be read, which a `Problem` then says.
    """

    version: int
    name: str
    path: Path
    label: str
    kind: Literal["sql", "python"]
    checksum: str
    text: str
    down_path: Path | None = None


@dataclass(frozen=True, slots=True)
class PythonScript:
    """What a Python script defines; `up` and `down` take the driver's own connection."""

    up: Callable[[Any], Coroutine[Any, Any, object]]
    down: Callable[[Any], Coroutine[Any, Any, object]] | None
    transaction: bool


@dataclass(frozen=True, slots=True)
class PreparedScript:
    """A pending script, ready to run unless it has `problems`.

    `transaction` is False for a script that opted out of it. `up` is the function of a Python
    script and None for SQL, whose text is what runs.
    """

    transaction: bool
    up: Callable[[Any], Coroutine[Any, Any, object]] | None = None
    problems: tuple[Problem, ...] = ()


def load_scripts(folder: Path) -> tuple[list[Script], list[Problem]]:
    """Read every script below `folder`, in order of version, and name everything wrong with it.

    A script that has a problem of its own is still in the list when its name is good.

    Raises:
        ConfigError: there is no such folder, or nothing in it looks like a script.
    """
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise ConfigError(f"{folder} {what}: name the folder with the scripts", key="folder")
    scripts: list[Script] = []
    problems: list[Problem] = []
    files = {path.relative_to(folder).as_posix(): path for path in _walk(folder, problems)}
    for label, path in sorted(files.items()):
        match = _NAME.fullmatch(path.name)
        if match is None or not label.isprintable():
            problems.append(_bad_name(label))
        elif match["suffix"] == ".down.sql":
            if f"{label.removesuffix('.down.sql')}.up.sql" not in files:
                message = "has no .up.sql script of the same name beside it: add or rename that one"
                problems.append(Problem("down-without-up", label, message))
        else:
            checksum, text, problem = _read(path, label)
            down = f"{label.removesuffix('.up.sql')}.down.sql" if ".up" in match["suffix"] else ""
            scripts.append(
                Script(
                    version=int(match["version"]),
                    name=match["name"],
                    path=path,
                    label=label,
                    kind="python" if match["suffix"] == ".py" else "sql",
                    checksum=checksum,
                    text=text,
                    down_path=files.get(down),
                )
            )
            problems += [problem] if problem else []
    if not scripts and not problems:
        raise ConfigError(
            f"{folder} holds no script: name one like V1_create_users.sql", key="folder"
        )
    scripts.sort(key=lambda script: script.version)
    return scripts, problems + list(_duplicates(scripts))


def prepare_script(script: Script, dialect: Dialect) -> PreparedScript:
    """Check and load a pending script, as far as that goes without a database."""
    if script.kind == "python":
        loaded = load_python(script)
        if isinstance(loaded, PythonScript):
            return PreparedScript(loaded.transaction, loaded.up)
        return PreparedScript(transaction=True, problems=tuple(loaded))
    problems = (
        Problem(rule, script.label, message, line)
        for rule, line, message in check_statements(script.text, dialect)
    )
    return PreparedScript(is_transactional(script.text), problems=tuple(problems))


def load_python(script: Script) -> PythonScript | list[Problem]:
    """Execute a Python script's module: what it defines, or what is wrong with it.

    Only for scripts that are pending. An applied one is never imported: years later its imports
    may be gone, and nothing of it is needed. The text that was read is what runs, so the code
    and the recorded checksum agree even if the file changes meanwhile.
    """
    file = str(script.path)
    try:
        code = compile(script.text, file, "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:  # ValueError: a null byte, before Python 3.11.4
        line = error.lineno if isinstance(error, SyntaxError) else None
        what = error.msg if isinstance(error, SyntaxError) else str(error)
        return [Problem("python-syntax", script.label, f"not valid Python: {what}", line)]
    module = types.ModuleType(f"msr_script_{script.path.stem}")
    module.__file__ = file
    sys.modules[module.__name__] = module  # dataclasses and pickle look their module up there
    try:
        exec(code, module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[module.__name__]
        frames = traceback.extract_tb(error.__traceback__)
        line = next((frame.lineno for frame in reversed(frames) if frame.filename == file), None)
        what = " ".join(f"{type(error).__name__}: {error}".split())
        message = f"cannot be imported, {what}"
        return [Problem("python-import", script.label, message, line)]
    return _inspect(module, script.label)


def _inspect(module: types.ModuleType, label: str) -> PythonScript | list[Problem]:
    up, down = (getattr(module, name, None) for name in ("up", "down"))
    transaction = getattr(module, "transaction", True)
    problems = []
    if not _takes_connection(up):
        what = "has no" if up is None else "its 'up' is not a plain"
        problems.append(Problem("python-up", label, f"{what} 'async def up(db)': define it so"))
    if down is not None and not _takes_connection(down):
        message = "its 'down' is not a plain 'async def down(db)': define it so"
        problems.append(Problem("python-down", label, message))
    if not isinstance(transaction, bool):
        message = f"'transaction' is {transaction!r}: make it True or False"
        problems.append(Problem("python-transaction", label, message))
    if problems or up is None:
        return problems
    return PythonScript(up, down, transaction)


def _takes_connection(function: object) -> bool:
    if not inspect.iscoroutinefunction(function):
        return False
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        return False
    return True


def _walk(folder: Path, problems: list[Problem]) -> Iterator[Path]:
    """Every file that looks like a script; linked folders are followed, each folder once."""

    def unreadable(error: OSError) -> None:
        path = Path(error.filename)
        if path == folder:
            raise ConfigError(f"{folder} cannot be read: {error.strerror}", key="folder")
        problems.append(_unreadable(path.relative_to(folder).as_posix(), error))

    visited = set()
    for root, folders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        if (place := os.path.realpath(root)) in visited:
            folders.clear()  # a link that leads back
            continue
        visited.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "_")))
        for name in names:
            if not name.startswith(".") and _LOOKS_LIKE_SCRIPT.fullmatch(name):
                yield Path(root, name)


def _read(path: Path, label: str) -> tuple[str, str, Problem | None]:
    """Checksum, text and, with both empty, what kept the file from being read."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a named pipe would wait for ever
            raise OSError(None, "not a regular file")
        data = path.read_bytes()
        data.decode()  # before anything is cut away, for the position in the file
    except OSError as error:
        return "", "", _unreadable(label, error)
    except UnicodeDecodeError as error:
        message = f"is not UTF-8 at byte {error.start + 1}: save it as UTF-8"
        line = data.count(b"\n", 0, error.start) + 1
        return "", "", Problem("not-utf8", label, message, line)
    data = data.removeprefix(_BYTE_ORDER_MARK).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return hashlib.sha256(data).hexdigest(), data.decode(), None


def _bad_name(label: str) -> Problem:
    return Problem(
        "bad-name",
        label if label.isprintable() else ascii(label)[1:-1],
        "is not named like a script, V<version>_<name> with .sql, .up.sql, .down.sql or .py and "
        "a version of 1 to 18 digits: rename it, or move it into a folder that starts with '_'",
    )


def _unreadable(label: str, error: OSError) -> Problem:
    message = f"cannot be read, {error.strerror}: repair it, or remove it"
    return Problem("unreadable", label, message)


def _duplicates(scripts: list[Script]) -> Iterator[Problem]:
    first: dict[int, Script] = {}
    for script in scripts:
        other = first.setdefault(script.version, script)
        if other is not script:
            message = f"has the same version as {other.label}: give one of them another"
            yield Problem("duplicate-version", script.label, message)
