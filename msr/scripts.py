"""A folder of migration scripts: finding, naming and reading them.

    V<version>_<name>.sql                         one way
    V<version>_<name>.up.sql  (and .down.sql)     there and back
    V<version>_<name>.py                          async def up(db), and maybe down(db)
    R_<name>.sql or .py                           repeatable: run again whenever it has changed

The version is a number of up to 18 digits and alone gives the order, whatever the sub-folder.
Repeatable scripts come after the versioned ones, in the order of their names.
What looks like a script and is not named like one is a problem, not something to pass over.
Hidden files and folders, and folders that start with an underscore, are passed over.

Everything here reads files and blocks: in an event loop, call it from a worker thread.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from msr.errors import ConfigError

__all__ = ["Problem", "Script", "load_scripts", "read_script", "walk"]

_NAME = re.compile(
    r"V(?P<version>[0-9]{1,18})_+(?P<name>[^_.].*?)(?P<suffix>\.up\.sql|\.down\.sql|\.sql|\.py)"
    r"|R_+(?P<repeatable>(?!\d+\.)[^_.].*?)(?P<ending>(?<!\.up)(?<!\.down)\.sql|\.py)"
)
_LOOKS_LIKE_SCRIPT = re.compile(r"(?i:.*\.sql|v?[0-9].*\.py)|R_.*\.py", re.DOTALL)
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
    """A migration on disk. `version` is None for a repeatable one.

    `label` is the path below the folder with forward slashes. `text` has line feeds only and no
    byte order mark, so a checkout on Windows gives the same `checksum`: the SHA-256, in hex, of
    that text. Both are empty where the file could not be read, which a `Problem` then says.
    """

    version: int | None
    name: str
    path: Path
    label: str
    kind: Literal["sql", "python"]
    checksum: str
    text: str
    down_path: Path | None = None

    @property
    def key(self) -> int | str:
        """What names it in the history: the version or, of a repeatable one, the name."""
        return self.name if self.version is None else self.version


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
    files = {path.relative_to(folder).as_posix(): path for path in walk(folder, problems)}
    for label, path in sorted(files.items()):
        match = _NAME.fullmatch(path.name)
        if match is None or not label.isprintable():
            problems.append(_bad_name(label))
        elif match["suffix"] == ".down.sql":
            if f"{label.removesuffix('.down.sql')}.up.sql" not in files:
                message = "has no .up.sql script of the same name beside it: add or rename that one"
                problems.append(Problem("down-without-up", label, message))
        else:
            checksum, text, problem = read_script(path, label)
            there_and_back = match["suffix"] == ".up.sql"
            down = f"{label.removesuffix('.up.sql')}.down.sql" if there_and_back else ""
            scripts.append(
                Script(
                    version=int(match["version"]) if match["version"] else None,
                    name=match["name"] or match["repeatable"],
                    path=path,
                    label=label,
                    kind="python" if path.suffix == ".py" else "sql",
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
    scripts.sort(key=lambda script: (script.version is None, script.version or 0, script.name))
    return scripts, problems + list(_duplicates(scripts))


def walk(folder: Path, problems: list[Problem]) -> Iterator[Path]:
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


def read_script(path: Path, label: str) -> tuple[str, str, Problem | None]:
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
        "a version of 1 to 18 digits, or R_<name>, no number, with .sql or .py: rename it, or move "
        "it into a folder that starts with '_'",
    )


def _unreadable(label: str, error: OSError) -> Problem:
    message = f"cannot be read, {error.strerror}: repair it, or remove it"
    return Problem("unreadable", label, message)


def _duplicates(scripts: list[Script]) -> Iterator[Problem]:
    first: dict[int | str, Script] = {}
    for script in scripts:
        other = first.setdefault(script.key, script)
        if other is not script:
            what = "name" if script.version is None else "version"
            message = f"has the same {what} as {other.label}: give one of them another"
            yield Problem(f"duplicate-{what}", script.label, message)
