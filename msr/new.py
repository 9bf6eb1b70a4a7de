"""A new script: a version that nobody has yet, and a template with both directions."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from msr.errors import ConfigError
from msr.scripts import walk

__all__ = ["new_script"]

_LONGEST_NAME = 100
_TEMPLATES = {
    ".up.sql": "-- up: {name}\n\n",
    ".down.sql": "-- down: {name}\n\n",
    ".py": (
        '"""{name}."""\n\n\n'
        "async def up(db):\n"
        '    raise NotImplementedError("write the migration: db is the driver\'s connection")\n\n\n'
        "async def down(db):\n"
        '    raise NotImplementedError("write the way back, or remove this function")\n'
    ),
}


def new_script(folder: str | Path, name: str, kind: Literal["sql", "python"] = "sql") -> list[Path]:
    """Write the files of a new script and return their paths; makes the folder if need be.

    The version is the time in UTC, to the second: the first from now on that no script has, and
    newer than every other. That holds among processes that do this at the same time, too. Blocks;
    in an event loop, call it from a worker thread.

    Raises `ConfigError` if nothing in the name can stand in a file's name, or the folder cannot be
    written to.
    """
    slug = re.sub(r"\W+", "_", name).strip("_")
    if not slug or len(slug.encode()) > _LONGEST_NAME:
        message = f"must have 1 to {_LONGEST_NAME} bytes of letters, digits and _"
        raise ConfigError(message, key="name")
    folder = Path(folder)
    paths: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        version = _claim(folder)
        try:
            endings = [".py"] if kind == "python" else [".up.sql", ".down.sql"]
            paths = [folder / f"V{version}_{slug}{ending}" for ending in endings]
            for path, ending in zip(paths, endings, strict=True):
                shown = "".join(char if char.isprintable() else " " for char in name)
                title = " ".join(shown.split()).replace("\\", "/").replace('"', "'")
                path.write_text(_TEMPLATES[ending].format(name=title), encoding="utf-8")
        finally:
            _claimed(folder, version).unlink()
    except OSError as error:
        for path in paths:
            with suppress(OSError):
                path.unlink(missing_ok=True)
        message = f"{folder} cannot be written to: {error.strerror}"
        raise ConfigError(message, key="folder") from error
    return paths


def _claim(folder: Path) -> int:
    """A version that is ours: whoever else looks for one meets our claim, or then our script."""
    version = int(datetime.now(UTC).strftime("%Y%m%d%H%M%S"))
    while True:
        newest = _newest(folder)
        version = max(version, newest + 1)
        if version >= 10**18:
            raise ConfigError(
                f"no version is left above {newest}: rename that script", key="folder"
            )
        try:
            os.close(os.open(_claimed(folder, version), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            version += 1
            continue
        if _newest(folder) < version:
            return version
        _claimed(folder, version).unlink()  # its former claim was dropped between our two looks


def _claimed(folder: Path, version: int) -> Path:
    return folder / f".V{version}.new"


def _newest(folder: Path) -> int:
    """The highest version below the folder, sub-folders included; 0 where there is none."""
    found = (re.match(r"V([0-9]{1,18})_", path.name) for path in walk(folder, []))
    return max((int(match[1]) for match in found if match), default=0)
