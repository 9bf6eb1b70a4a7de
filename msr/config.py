"""Settings: what they are, what they may be, and where they come from.

The fields of `Config` and `LockingConfig` are the only list of settings. A key is a field's path
(`locking.timeout`), its environment variable is that path in capitals (`MSR_LOCKING_TIMEOUT`), and
in a file it stands at the same path, in `msr.toml` or below `[tool.msr]` in `pyproject.toml`.

Precedence: arguments > `MSR_*` > file > defaults, merged key by key. `DATABASE_URL` stands in for
`MSR_URL` where that is not set, so it wins over a file's `url`: a platform that sets it means it.
Every value is checked, also one that another source overrides; only `DATABASE_URL`, which may be
meant for somebody else, is not looked at unless it is used. Messages never repeat a value, since a
misplaced one may be a password.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from msr.errors import ConfigError
from msr.urls import parse_url

__all__ = ["Config", "LockingConfig", "load_config", "parse_duration", "script_timeout"]

Check = Callable[[object, str, str], Any]
"""Takes a value, its key and its source; returns the value to keep or raises `ConfigError`."""

Layer = dict[str, tuple[Any, str]]
"""Checked values by key, each with its source."""

_WEEK = 7 * 86400.0
_UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
_WORDS = dict.fromkeys(("true", "1", "yes", "on"), True) | dict.fromkeys(
    ("false", "0", "no", "off"), False
)
_NUMBER = r"[0-9]+(?:\.[0-9]+)?"
# 50 characters leave room for suffixes (indexes, sequences) within PostgreSQL's 63.
_TABLE_RULE = (
    "must be a table's name, or schema.table: each part a letter or underscore, then letters, "
    "digits, _ or $, 50 characters at most"
)
_TABLE = re.compile(r"(?:[A-Za-z_][A-Za-z0-9_$]{0,49}\.)?[A-Za-z_][A-Za-z0-9_$]{0,49}")


def _require(condition: bool, message: str, key: str | None, source: str) -> None:
    if not condition:
        raise ConfigError(message, key=key, source=source)


def parse_duration(value: object, key: str | None = None, source: str = "argument") -> float:
    """Seconds, from a number of them or from text: `90`, `"90s"`, `"1h30m"`, `"500ms"`, `"7d"`.

    Raises `ConfigError` for anything else; negative and infinite numbers are no durations.
    """
    seconds = math.nan
    if isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(min(value, 1e300))  # an int may be too large for a float
    elif isinstance(value, str):
        text = value.strip()
        if re.fullmatch(_NUMBER, text):
            seconds = float(text)
        elif re.fullmatch(rf"(?:{_NUMBER}(?:ms|[dhms])\s*)+", text):
            parts = re.findall(rf"({_NUMBER})(ms|[dhms])", text)
            seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    good = 0 <= seconds < 1e300
    _require(good, "must be a duration: seconds, or text such as 90s or 1h30m", key, source)
    return seconds


def _between(lowest: float, highest: float, words: str) -> Check:
    def check(value: object, key: str, source: str) -> float:
        seconds = parse_duration(value, key, source)
        _require(lowest <= seconds <= highest, f"must be from {words}", key, source)
        return seconds

    return check


def _one_of(*words: str) -> Check:
    def check(value: object, key: str, source: str) -> object:
        _require(value in words, f"must be {' or '.join(words)}", key, source)
        return value

    return check


def _whole_number(lowest: int, highest: int) -> Check:
    def check(value: object, key: str, source: str) -> int:
        if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value.strip()):
            value = int(value)
        good = type(value) is int and lowest <= value <= highest
        _require(good, f"must be a whole number from {lowest} to {highest}", key, source)
        return value  # type: ignore[return-value]  # checked in the line above

    return check


def _boolean(value: object, key: str, source: str) -> object:
    _require(isinstance(value, bool), "must be true or false", key, source)
    return value


def _table(value: object, key: str, source: str) -> object:
    good = isinstance(value, str) and _TABLE.fullmatch(value) is not None
    _require(good, _TABLE_RULE, key, source)
    return value


def _lock_name(value: object, key: str, source: str) -> object:
    good = isinstance(value, str) and 1 <= len(value) <= 200 and value.isprintable()
    _require(good, "must be 1 to 200 printable characters", key, source)
    return value


def _folder(value: object, key: str, source: str) -> Path:
    text = str(value) if isinstance(value, str | Path) else ""
    _require(bool(text.strip()) and "\0" not in text, "must be a folder's path", key, source)
    return Path(text)


def _url(value: object, key: str, source: str) -> object:
    if value is not None:
        parse_url(value, source)  # type: ignore[arg-type]  # it refuses what is no text
    return value


script_timeout = _between(0, _WEEK, "0 seconds (no limit) to 7 days")
"""The check of `lock_timeout` and `statement_timeout`, which a script may set as well."""


def _validate(settings: Config | LockingConfig, prefix: str) -> None:
    for setting in fields(settings):
        value = getattr(settings, setting.name)
        checked = setting.metadata["check"](value, prefix + setting.name, "argument")
        object.__setattr__(settings, setting.name, checked)


@dataclass(frozen=True, slots=True)
class LockingConfig:
    """How migrations are kept from running twice at the same time.

    `timeout` is the lease in seconds (1 second to 7 days): how long a lock whose holder cannot be
    judged stays taken; the heartbeat renews it. `wait` is how many seconds to wait for another
    holder (0 to 7 days). Both also take text such as `"10m"`. `table_name` may have a schema before
    it. Locks of different `name`s do not exclude each other.

    Raises `ConfigError`.
    """

    enabled: bool = field(default=True, metadata={"check": _boolean})
    table_name: str = field(default="migration_locks", metadata={"check": _table})
    name: str = field(default="default", metadata={"check": _lock_name})
    timeout: float = field(
        default=600.0, metadata={"check": _between(1, _WEEK, "1 second to 7 days")}
    )
    wait: float = field(
        default=300.0, metadata={"check": _between(0, _WEEK, "0 seconds to 7 days")}
    )

    def __post_init__(self) -> None:
        _validate(self, "locking.")


def _locking(value: object, key: str, source: str) -> LockingConfig:
    if isinstance(value, LockingConfig):
        return value
    _require(isinstance(value, Mapping), "must be a table of settings", key, source)
    return LockingConfig(**_values(_layer({key: value}, source), "locking."))


_DEFAULT_LOCKING = LockingConfig()


@dataclass(frozen=True, slots=True, init=False)
class Config:
    """The settings of one executor.

    `folder` holds the scripts, `table_name` is the history table (a schema may stand before it),
    `locking` also takes a mapping, which is merged with the defaults. `url` is checked and kept as
    given; it stays out of the `repr`, for it may hold a password.

    `transaction` is "script" (one for each) or "batch" (one for the whole run). `out_of_order` says
    what becomes of a script that is older than the newest applied one: "refuse" or "apply". A
    script that waits longer than `lock_timeout` seconds for a lock is rolled back and tried again,
    up to `lock_retries` times, unless it opted out of the transaction; one of its statements that
    takes longer than `statement_timeout` seconds fails. Zero means no limit. A script's own setting
    wins over both.

    Raises `ConfigError`.
    """

    folder: Path = field(metadata={"check": _folder})
    table_name: str = field(metadata={"check": _table})
    locking: LockingConfig = field(metadata={"check": _locking})
    url: str | None = field(repr=False, metadata={"check": _url})
    transaction: Literal["script", "batch"] = field(metadata={"check": _one_of("script", "batch")})
    out_of_order: Literal["refuse", "apply"] = field(metadata={"check": _one_of("refuse", "apply")})
    lock_timeout: float = field(metadata={"check": script_timeout})
    lock_retries: int = field(metadata={"check": _whole_number(0, 100)})
    statement_timeout: float = field(metadata={"check": script_timeout})

    # By hand, so that it can take more types than the fields then have.
    def __init__(
        self,
        folder: Path | str = "migrations",
        table_name: str = "schema_version",
        locking: LockingConfig | Mapping[str, Any] = _DEFAULT_LOCKING,
        url: str | None = None,
        transaction: Literal["script", "batch"] = "script",
        out_of_order: Literal["refuse", "apply"] = "refuse",
        lock_timeout: float | str = 0.0,
        lock_retries: int = 5,
        statement_timeout: float | str = 0.0,
    ) -> None:
        given = {
            "folder": folder,
            "table_name": table_name,
            "locking": locking,
            "url": url,
            "transaction": transaction,
            "out_of_order": out_of_order,
            "lock_timeout": lock_timeout,
            "lock_retries": lock_retries,
            "statement_timeout": statement_timeout,
        }
        for name, value in given.items():
            object.__setattr__(self, name, value)
        _validate(self, "")
        _refuse_one_table_for_both(self.table_name, self.locking.table_name, "argument")


_CHECKS: dict[str, Check] = {
    prefix + setting.name: setting.metadata["check"]
    for prefix, settings in (("", Config), ("locking.", LockingConfig))
    for setting in fields(settings)
    if setting.name != "locking"
}
_VARIABLES = {f"MSR_{key.upper().replace('.', '_')}": key for key in _CHECKS}


def load_config(
    *,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    directory: Path | None = None,
    **overrides: Any,
) -> Config:
    """The settings from every source: arguments > environment > file > defaults.

    `overrides` are the fields of `Config`; for `locking` a mapping is merged, a `LockingConfig`
    replaces the whole table. None means not given. `file` (else `MSR_CONFIG`)
    names the file, from `directory` on, and must then exist; otherwise `msr.toml`, or else
    `pyproject.toml`, is read from `directory` (the current one) if it is there. `environ` is
    `os.environ` unless given. A relative `folder` in a file is relative to that file.

    Raises `ConfigError`, which names the key and the source, also for a key nobody knows.
    """
    environ = os.environ if environ is None else environ
    directory = Path() if directory is None else directory
    named = file or environ.get("MSR_CONFIG", "").strip()
    merged = {
        **_from_file(directory, named),
        **_from_environment(environ, url_given=overrides.get("url") is not None),
        **_layer(overrides, "argument"),
    }
    locking = LockingConfig(**_values(merged, "locking."))
    values = _values(merged, "")
    table_name = values.get("table_name", Config().table_name)
    for key in ("locking.table_name", "table_name"):  # blame the source of the one that was given
        if key in merged:
            _refuse_one_table_for_both(table_name, locking.table_name, merged[key][1])
    return Config(locking=locking, **values)


def _values(layer: Layer, prefix: str) -> dict[str, Any]:
    """The plain values right below `prefix`."""
    return {
        name: value
        for key, (value, _) in layer.items()
        if key.startswith(prefix) and "." not in (name := key.removeprefix(prefix))
    }


def _refuse_one_table_for_both(history: str, locks: str, source: str) -> None:
    differ = history.casefold() != locks.casefold()
    _require(differ, "must differ from table_name", "locking.table_name", source)


def _layer(table: Mapping[str, Any], source: str, prefix: str = "") -> Layer:
    """One source's tables, flattened and checked."""
    layer: Layer = {}
    for name, value in table.items():
        key = f"{prefix}{name}"
        if value is None:
            continue
        if key == "locking":
            if isinstance(value, LockingConfig):
                value = {item.name: getattr(value, item.name) for item in fields(value)}
            _require(isinstance(value, Mapping), "must be a table of settings", key, source)
            layer |= _layer(value, source, "locking.")
        elif key in _CHECKS:
            layer[key] = (_CHECKS[key](value, key, source), source)
        else:
            hint = _suggestion(key, ["locking", *_CHECKS])
            raise ConfigError(f"no such setting{hint}", key=key, source=source)
    return layer


def _suggestion(name: str, known: Iterable[str]) -> str:
    import difflib  # only a mistake needs it

    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"


def _from_environment(environ: Mapping[str, str], *, url_given: bool) -> Layer:
    """An empty variable counts as not set."""
    layer: Layer = {}
    for variable, text in environ.items():
        if not variable.startswith("MSR_") or not text.strip():
            continue
        if variable in _VARIABLES:
            key = _VARIABLES[variable]
            value = _WORDS.get(text.strip().lower(), text) if _CHECKS[key] is _boolean else text
            layer[key] = (_CHECKS[key](value, key, variable), variable)
        elif variable != "MSR_CONFIG" and not variable.startswith("MSR_TEST_"):
            hint = _suggestion(variable, [*_VARIABLES, "MSR_CONFIG"])
            raise ConfigError(f"no such setting{hint}", source=variable)
    fallback = environ.get("DATABASE_URL", "")
    if fallback.strip() and "url" not in layer and not url_given:
        layer["url"] = (_url(fallback, "url", "DATABASE_URL"), "DATABASE_URL")
    return layer


def _from_file(directory: Path, named: Path | str) -> Layer:
    for name in [named] if named else ["msr.toml", "pyproject.toml"]:
        path = directory / name
        problem = ""
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            if not named:
                continue
            problem = "no such configuration file"
        except (OSError, ValueError) as error:
            problem = f"cannot be read: {getattr(error, 'strerror', None) or 'not a path'}"
        path = path.absolute()  # only now: with no file this asks the system nothing more
        _require(not problem, problem, None, str(path))
        layer = _layer(_read_toml(data, path), str(path))
        if "folder" in layer:
            layer["folder"] = (path.parent / layer["folder"][0], str(path))
        return layer
    return {}


def _read_toml(data: bytes, path: Path) -> Mapping[str, Any]:
    ours = path.name != "pyproject.toml"
    if not ours and b"msr" not in data:
        return {}  # most projects' file; saves parsing it at every start of the application
    import tomllib  # here, because most processes have no file

    problem = ""
    document: Mapping[str, Any] = {}
    try:
        document = tomllib.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        problem = f"is not UTF-8 (line {line})"
    except tomllib.TOMLDecodeError as error:
        lines = data.count(b"\n") + 1
        problem = f"is not valid TOML: {error}"
        problem = problem.replace("at end of document", f"at line {lines}, the end of the file")
    # Out here, so that no context leads to the file's text.
    _require(not problem, problem, None, str(path))
    if ours:
        return document
    tool = document.get("tool")
    table = tool.get("msr", {}) if isinstance(tool, dict) else {}
    _require(isinstance(table, dict), "must be a table of settings", "tool.msr", str(path))
    return dict(table)
