"""The options that every command takes, and the executor that they describe."""

from __future__ import annotations

import importlib
import inspect
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

import msr

__all__ = [
    "ConfigFile",
    "Debug",
    "ExecutorPath",
    "Folder",
    "Json",
    "NoLock",
    "NoWait",
    "Quiet",
    "Source",
    "Url",
    "Verbose",
    "Wait",
    "Yes",
    "config_from",
    "executor_from",
    "wait_from",
]

Url = Annotated[
    str | None,
    typer.Option(
        "--url", metavar="URL", help="The database; default MSR_URL, then DATABASE_URL.",
        show_default=False,
    ),
]  # fmt: skip
Folder = Annotated[
    str | None,
    typer.Option(
        "--folder", metavar="PATH", help="The folder with the scripts; default MSR_FOLDER, then "
        "'migrations'.", show_default=False,
    ),
]  # fmt: skip
ConfigFile = Annotated[
    str | None,
    typer.Option(
        "--config", metavar="FILE", help="A TOML file; default msr.toml, then [tool.msr] in "
        "pyproject.toml.", show_default=False,
    ),
]  # fmt: skip
ExecutorPath = Annotated[
    str | None,
    typer.Option(
        "--executor", metavar="MODULE:ATTRIBUTE", help="Your application's own executor, or a "
        "function that returns one; instead of --url, --folder and --config.", show_default=False,
    ),
]  # fmt: skip
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print errors and warnings, and what was asked for.")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more of what happens.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Wait = Annotated[
    float | None,
    typer.Option(
        "--wait", metavar="SECONDS", min=0, show_default=False,
        help="How long to wait while another holds the lock; default locking.wait, 300.",
    ),
]  # fmt: skip
NoWait = Annotated[
    bool, typer.Option("--no-wait", help="Do not wait at all: exit 8 if the lock is held.")
]
NoLock = Annotated[
    bool, typer.Option("--no-lock", help="Take no lock at all. For emergencies only.")
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def wait_from(wait: float | None, no_wait: bool, no_lock: bool = False) -> float | None:
    """Seconds to wait, None for the configured ones. Raises `msr.ConfigError`."""
    if no_wait and wait is not None:
        raise msr.ConfigError("contradicts --wait", source="--no-wait")
    if no_lock and (no_wait or wait is not None):
        raise msr.ConfigError("takes no lock, so there is nothing to wait for", source="--no-lock")
    return 0 if no_wait else wait


@dataclass(frozen=True, slots=True)
class Source:
    """Where the executor comes from, as typed."""

    url: str | None
    folder: str | None
    config: str | None
    executor: str | None


def config_from(source: Source) -> tuple[msr.Config, msr.Dialect | None]:
    """The settings, where a URL is not needed, and what the URL's database speaks if there is one.

    Raises `msr.ConfigError`.
    """
    file = None if source.config is None else Path(source.config)
    config = msr.load_config(file=file, url=source.url, folder=source.folder)
    return config, None if config.url is None else msr.dialect_of(config.url)


def executor_from(source: Source, *listeners: msr.Listener) -> msr.MigrationScriptExecutor:
    """The executor that the options describe. Raises `msr.ConfigError`."""
    if source.executor is None:
        return msr.MigrationScriptExecutor.from_url(
            source.url, folder=source.folder, config_file=source.config, listeners=listeners
        )
    for option in ("url", "folder", "config"):
        if getattr(source, option) is not None:
            raise msr.ConfigError(
                "cannot be given together with --executor, which brings its own",
                source=f"--{option}",
            )
    executor = _imported(source.executor)
    executor.listeners.extend(listeners)
    return executor


def _imported(path: str) -> msr.MigrationScriptExecutor:
    module_name, colon, attribute = path.partition(":")
    if not (colon and module_name and attribute):
        raise _unusable(f"{path!r} is not of the form module:attribute")
    folder = str(Path.cwd())
    if folder not in sys.path:  # an installed command does not look where it is called
        sys.path.insert(0, folder)
    try:
        found = importlib.import_module(module_name)
        for name in attribute.split("."):
            found = getattr(found, name)
        if callable(found) and not isinstance(found, msr.MigrationScriptExecutor):
            found = found()
            if inspect.iscoroutine(found):
                found.close()
                raise _unusable(f"{path!r} is async: give a function that returns the executor")
    except msr.MsrError:
        raise
    except Exception as error:
        raise _unusable(f"{path!r} cannot be loaded, {type(error).__name__}: {error}") from error
    if not isinstance(found, msr.MigrationScriptExecutor):
        raise _unusable(f"{path!r} gives {type(found).__name__}, not a MigrationScriptExecutor")
    return found


def _unusable(message: str) -> msr.ConfigError:
    return msr.ConfigError(message, source="--executor")
