"""Every setting from every source, who wins, and how a bad one is refused."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from msr.config import Config, LockingConfig, load_config, parse_duration
from msr.errors import ConfigError

URL = "postgresql://user:hunter2@host/db"
OTHER_URL = "sqlite:///other.db"

# Key, a value that is not the default, the same as text.
KEYS: list[tuple[str, Any, str]] = [
    ("folder", Path("/scripts"), "/scripts"),
    ("table_name", "app.history", "app.history"),
    ("url", URL, URL),
    ("transaction", "batch", "batch"),
    ("out_of_order", "apply", "apply"),
    ("lock_timeout", 5.0, "5s"),
    ("lock_retries", 3, "3"),
    ("statement_timeout", 600.0, "10m"),
    ("locking.enabled", False, "off"),
    ("locking.table_name", "locks", "locks"),
    ("locking.name", "blue team", "blue team"),
    ("locking.timeout", 90.0, "1m30s"),
    ("locking.wait", 0.5, "500ms"),
]
# Key, a bad value that Python, TOML and (as text) the environment can all hold, part of the rule.
BAD: list[tuple[str, Any, str]] = [
    ("folder", " ", "a folder's path"),
    ("table_name", "a-b", "a table's name"),
    ("table_name", "", "a table's name"),
    ("table_name", "a.b.c", "a table's name"),
    ("table_name", "1a", "a table's name"),
    ("table_name", "a b", "a table's name"),
    ("table_name", 'a"', "a table's name"),
    ("table_name", "\u00e9t\u00e9", "a table's name"),
    ("table_name", "t" * 51, "50 characters"),
    ("table_name", "s" * 51 + ".t", "50 characters"),
    ("table_name", 5, "a table's name"),
    ("url", "mysql://user:hunter2@host/db", "unknown scheme 'mysql'"),
    ("url", "postgresql://user:hun/ter2@host/db", "percent-encode"),
    ("transaction", "none", "script or batch"),
    ("transaction", True, "script or batch"),
    ("out_of_order", "ignore", "refuse or apply"),
    ("lock_timeout", "soon", "a duration"),
    ("lock_timeout", -1, "a duration"),
    ("statement_timeout", "8d", "0 seconds (no limit) to 7 days"),
    ("lock_retries", -1, "whole number from 0 to 100"),
    ("lock_retries", 101, "whole number from 0 to 100"),
    ("lock_retries", 1.5, "whole number from 0 to 100"),
    ("lock_retries", "many", "whole number from 0 to 100"),
    ("locking.enabled", "maybe", "true or false"),
    ("locking.enabled", 2, "true or false"),
    ("locking.table_name", "a;b", "a table's name"),
    ("locking.name", "n" * 201, "1 to 200"),
    ("locking.name", "a\tb", "printable"),
    ("locking.timeout", 0.999, "1 second to 7 days"),
    ("locking.timeout", "999ms", "1 second to 7 days"),
    ("locking.timeout", "7d1s", "1 second to 7 days"),
    ("locking.timeout", 604800.5, "1 second to 7 days"),
    ("locking.timeout", -1, "a duration"),
    ("locking.timeout", math.nan, "a duration"),
    ("locking.timeout", math.inf, "a duration"),
    ("locking.timeout", "soon", "a duration"),
    ("locking.wait", 604801, "0 seconds to 7 days"),
    ("locking.wait", -0.1, "a duration"),
    ("locking.wait", "inf", "a duration"),
]


def nested(key: str, value: Any) -> dict[str, Any]:
    table, dot, name = key.rpartition(".")
    return {table: {name: value}} if dot else {name: value}


def toml(key: str, value: Any, table: str = "") -> str:
    section, _, name = key.rpartition(".")
    header = ".".join(part for part in (table, section) if part)
    if isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, int | float):
        text = repr(value)
    else:
        text = "'" + str(value) + "'"
    return (f"[{header}]\n" if header else "") + f"{name} = {text}\n"


def nested_default(config: Config, key: str) -> dict[str, Any]:
    """What puts this one key back to its default, so that nothing else can have changed."""
    if not key.startswith("locking."):
        return {key: read(Config(), key)}
    name = key.removeprefix("locking.")
    default = getattr(LockingConfig(), name)
    return {"locking": dataclasses.replace(config.locking, **{name: default})}


def variable(key: str) -> str:
    return "MSR_" + key.upper().replace(".", "_")


def read(config: Config, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


class Sources:
    """Gives one value by each source in turn, and loads what they come to."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environ: dict[str, str] = {}
        self.arguments: dict[str, Any] = {}

    def argument(self, key: str, value: Any) -> str:
        self.arguments.update(nested(key, value))
        return "argument"

    def environment(self, key: str, value: Any) -> str:
        self.environ[variable(key)] = str(value)
        return variable(key)

    def msr_toml(self, key: str, value: Any) -> str:
        path = self.directory / "msr.toml"
        path.write_text(toml(key, value), "utf-8")
        return str(path)

    def pyproject(self, key: str, value: Any) -> str:
        path = self.directory / "pyproject.toml"
        path.write_text(toml(key, value, "tool.msr"), "utf-8")
        return str(path)

    def load(self, **options: Any) -> Config:
        return load_config(
            environ=self.environ, directory=self.directory, **self.arguments, **options
        )


Give = Callable[[Sources, str, Any], str]
GIVERS: dict[str, Give] = {
    "argument": Sources.argument,
    "environment": Sources.environment,
    "msr.toml": Sources.msr_toml,
    "pyproject": Sources.pyproject,
}
every_source = pytest.mark.parametrize("give", GIVERS.values(), ids=GIVERS.keys())


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    return Sources(tmp_path)


def refused(load: Callable[[], object], key: str | None, source: str) -> str:
    """What the refusal says; it names key and source, and never a password."""
    with pytest.raises(ConfigError) as caught:
        load()
    error = caught.value
    assert (error.key, error.source) == (key, source)
    lines = traceback.format_exception(error)
    shown = "".join((str(error), repr(error), repr(error.args), repr(vars(error)), *lines))
    assert "hunter2" not in shown
    assert "ter2@" not in shown
    return str(error)


def test_the_table_above_knows_every_key() -> None:
    top = [field.name for field in dataclasses.fields(Config) if field.name != "locking"]
    locking = [f"locking.{field.name}" for field in dataclasses.fields(LockingConfig)]
    assert sorted(key for key, _, _ in KEYS) == sorted(top + locking)


def test_defaults(sources: Sources) -> None:
    locking = LockingConfig(True, "migration_locks", "default", 600.0, 300.0)
    assert sources.load() == Config() == Config(Path("migrations"), "schema_version", locking, None)
    assert LockingConfig() == locking


@pytest.mark.parametrize(("key", "value", "text"), KEYS)
@every_source
def test_every_key_from_every_source(
    sources: Sources, give: Give, key: str, value: Any, text: str
) -> None:
    assert read(Config(), key) != value
    give(sources, key, text if give is Sources.environment else value)
    config = sources.load()
    assert read(config, key) == value
    assert dataclasses.replace(config, **nested_default(config, key)) == Config()


@pytest.mark.parametrize(
    ("give", "key", "bad", "words"),
    [
        (give, key, bad, words)
        for give, (key, bad, words) in itertools.product(GIVERS.values(), BAD)
        # A blank variable counts as not set.
        if give is not Sources.environment or str(bad).strip()
    ],
)
def test_a_bad_value_is_refused_in_every_source(
    sources: Sources, give: Give, key: str, bad: Any, words: str
) -> None:
    source = give(sources, key, bad)
    assert words in refused(sources.load, key, source)


@pytest.mark.parametrize(
    ("key", "bad"),
    [
        ("folder", None),
        ("folder", 5),
        ("folder", "a\0b"),
        ("table_name", None),
        ("table_name", b"t"),
        ("url", 5),
        ("locking", None),
        ("locking", 5),
        ("locking", "on"),
        ("locking", [("timeout", 30)]),
        ("locking.enabled", 1),
        ("locking.enabled", "true"),
        ("locking.name", ""),
        ("locking.name", 5),
        ("locking.timeout", True),
        ("locking.timeout", [600]),
        ("locking.timeout", 10**400),
    ],
)
def test_wrong_types_are_refused(key: str, bad: Any) -> None:
    refused(lambda: Config(**nested(key, bad)), key, "argument")
    if key.startswith("locking."):
        name = key.removeprefix("locking.")
        refused(lambda: LockingConfig(**{name: bad}), key, "argument")


def test_a_bad_value_is_refused_even_where_another_source_wins(sources: Sources) -> None:
    sources.argument("locking.timeout", 30)
    source = sources.environment("locking.timeout", "soon")
    refused(sources.load, "locking.timeout", source)


WEAKEST_FIRST: list[Give] = [Sources.msr_toml, Sources.environment, Sources.argument]


@pytest.mark.parametrize(("weak", "strong"), [*itertools.combinations(WEAKEST_FIRST, 2)])
@pytest.mark.parametrize(
    ("key", "first", "second"),
    [
        ("folder", "/a", "/b"),
        ("table_name", "a", "b"),
        ("url", URL, OTHER_URL),
        ("locking.name", "a", "b"),
        ("locking.timeout", 5, 6),
    ],
)
def test_precedence(
    sources: Sources, weak: Give, strong: Give, key: str, first: Any, second: Any
) -> None:
    weak(sources, key, first)
    strong(sources, key, second)
    assert read(sources.load(), key) == type(read(sources.load(), key))(second)


def test_sources_are_merged_key_by_key(sources: Sources) -> None:
    sources.msr_toml("locking.name", "from file")
    sources.environment("locking.wait", "5")
    sources.argument("locking.timeout", 30)
    assert sources.load().locking == LockingConfig(name="from file", wait=5, timeout=30)


def test_a_locking_config_replaces_the_whole_table(sources: Sources) -> None:
    sources.msr_toml("locking.name", "from file")
    sources.environment("locking.wait", "5")
    sources.arguments["locking"] = LockingConfig(timeout=30)
    assert sources.load().locking == LockingConfig(timeout=30)


def test_a_partial_table_is_merged_with_the_defaults() -> None:
    assert Config(locking={"timeout": 30}).locking == LockingConfig(timeout=30)


def test_none_means_not_given(sources: Sources) -> None:
    sources.environment("locking.wait", "5")
    sources.environment("url", URL)
    sources.arguments = {
        "url": None, "folder": None, "table_name": None, "locking": {"wait": None}
    }  # fmt: skip
    assert sources.load() == Config(url=URL, locking={"wait": 5})
    sources.arguments = {"locking": None}
    assert sources.load() == Config(url=URL, locking={"wait": 5})


# --- DATABASE_URL -------------------------------------------------------------------------------


@pytest.mark.parametrize(("give", "wins"), [
    (Sources.argument, False),
    (Sources.environment, False),
    (Sources.msr_toml, True),
])  # fmt: skip
def test_database_url_stands_in_for_msr_url(sources: Sources, give: Give, wins: bool) -> None:
    give(sources, "url", OTHER_URL)
    sources.environ["DATABASE_URL"] = URL
    assert sources.load().url == (URL if wins else OTHER_URL)


def test_database_url_is_checked_only_where_it_is_used(sources: Sources) -> None:
    sources.environ["DATABASE_URL"] = "mysql://user:hunter2@host/db"
    refused(sources.load, "url", "DATABASE_URL")
    sources.argument("url", URL)
    assert sources.load().url == URL


def test_an_empty_msr_url_leaves_room_for_database_url(sources: Sources) -> None:
    sources.environ = {"MSR_URL": "", "DATABASE_URL": URL}
    assert sources.load().url == URL


# --- the environment ----------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "value"), [
    ("true", True), ("1", True), ("yes", True), ("on", True), ("TRUE", True), (" on ", True),
    ("false", False), ("0", False), ("no", False), ("off", False), ("False", False),
])  # fmt: skip
def test_booleans_as_text(sources: Sources, text: str, value: bool) -> None:
    sources.msr_toml("locking.enabled", not value)
    sources.environment("locking.enabled", text)
    assert sources.load().locking.enabled is value


@pytest.mark.parametrize("key", [key for key, _, _ in KEYS])
def test_an_empty_variable_counts_as_not_set(sources: Sources, key: str) -> None:
    sources.environment(key, "")
    sources.environ["DATABASE_URL"] = ""
    sources.environ["MSR_CONFIG"] = ""
    sources.environ["MSR_NOTHING"] = ""
    assert sources.load() == Config()


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("MSR_LOCKING_TIMOUT", "did you mean MSR_LOCKING_TIMEOUT?"),
        ("MSR_TABLENAME", "did you mean MSR_TABLE_NAME?"),
        ("MSR_CONFG", "did you mean MSR_CONFIG?"),
        ("MSR_QQQQQQQQ", "known are MSR_FOLDER, MSR_TABLE_NAME"),
    ],
)
def test_an_unknown_variable_is_named(sources: Sources, name: str, hint: str) -> None:
    sources.environ[name] = URL
    message = refused(sources.load, None, name)
    assert message.startswith(f"{name}: no such setting; {hint}")


def test_variables_of_others_are_left_alone(sources: Sources) -> None:
    sources.environ = {"MSR_TEST_POSTGRES_URL": "x", "MSRX": "y", "_MSR_COMPLETE": "z", "msr_a": ""}
    assert sources.load() == Config()


def test_the_process_environment_and_folder_are_the_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("MSR_") or name == "DATABASE_URL"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MSR_LOCKING_NAME", "mine")
    Path("msr.toml").write_text("table_name = 'here'")
    assert load_config() == Config(table_name="here", locking={"name": "mine"})


# --- files --------------------------------------------------------------------------------------


def test_msr_toml_hides_pyproject(sources: Sources) -> None:
    sources.pyproject("locking.name", "pyproject")
    assert sources.load().locking.name == "pyproject"
    sources.msr_toml("table_name", "here")
    assert sources.load() == Config(table_name="here")


def test_only_the_folder_itself_is_searched(sources: Sources) -> None:
    sources.msr_toml("table_name", "above")
    sources.directory /= "below"
    sources.directory.mkdir()
    assert sources.load() == Config()


def test_a_pyproject_of_others_is_left_alone(sources: Sources) -> None:
    path = sources.directory / "pyproject.toml"
    for text in ("this is no TOML", "[tool.other]\nuses = 'msr'\n", "tool = 'msr'\n"):
        path.write_text(text)
        assert sources.load() == Config()


@pytest.mark.parametrize("by", ["argument", "variable"])
def test_a_named_file_is_read_instead(sources: Sources, tmp_path: Path, by: str) -> None:
    sources.msr_toml("table_name", "found")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name, text in (
        ("other.toml", "table_name = 'named'\nfolder = 'sql'"),
        ("pyproject.toml", "[tool.msr]\ntable_name = 'named'\nfolder = 'sql'"),
    ):
        path = elsewhere / name
        path.write_text(text)
        for form in (path, path.relative_to(tmp_path)):
            sources.environ = {"MSR_CONFIG": str(form)} if by == "variable" else {}
            config = sources.load(**({"file": form} if by == "argument" else {}))
            assert config == Config(table_name="named", folder=elsewhere / "sql")


def test_the_argument_wins_over_msr_config(sources: Sources) -> None:
    sources.environ["MSR_CONFIG"] = "missing.toml"
    (sources.directory / "other.toml").write_text("table_name = 'named'")
    assert sources.load(file=Path("other.toml")).table_name == "named"


@pytest.mark.parametrize("by", ["argument", "variable"])
def test_a_named_file_must_exist(sources: Sources, by: str) -> None:
    sources.msr_toml("table_name", "found")
    sources.environ = {"MSR_CONFIG": "missing.toml"} if by == "variable" else {}
    options: dict[str, Any] = {"file": Path("missing.toml")} if by == "argument" else {}
    source = str(sources.directory / "missing.toml")
    assert "no such configuration file" in refused(lambda: sources.load(**options), None, source)


@pytest.mark.parametrize("give", [Sources.msr_toml, Sources.pyproject])
def test_a_relative_folder_is_relative_to_its_file(sources: Sources, give: Give) -> None:
    give(sources, "folder", "db/scripts")
    assert sources.load().folder == sources.directory / "db" / "scripts"


@pytest.mark.parametrize("give", [Sources.argument, Sources.environment])
def test_a_relative_folder_elsewhere_stays_as_it_is(sources: Sources, give: Give) -> None:
    give(sources, "folder", "db/scripts")
    assert sources.load().folder == Path("db/scripts")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"# msr\nurl = 'postgresql://u:hunter2@h/db\n", "is not valid TOML: "),
        (b"# msr\n\n[locking\n", "line 3"),
        (b"# msr\n\nurl = '''hunter2", "line 3, the end"),
        (b"# msr\nurl = 'hunter2\xff'\n", "is not UTF-8 (line 2)"),
    ],
)
@pytest.mark.parametrize("name", ["msr.toml", "pyproject.toml"])
def test_a_broken_file_is_named_with_its_line(
    sources: Sources, name: str, text: bytes, words: str
) -> None:
    path = sources.directory / name
    path.write_bytes(text)
    message = refused(sources.load, None, str(path))
    assert words in message
    assert "line" in message


def test_a_byte_order_mark_does_no_harm(sources: Sources) -> None:
    (sources.directory / "msr.toml").write_bytes(b"\xef\xbb\xbftable_name = 'here'")
    assert sources.load().table_name == "here"


def test_an_unreadable_file_is_an_error(sources: Sources) -> None:
    path = sources.directory / "msr.toml"
    path.mkdir()
    assert "cannot be read: Is a directory" in refused(sources.load, None, str(path))


@pytest.mark.parametrize(
    ("text", "key", "hint"),
    [
        ("locking.timout = 5", "locking.timout", "did you mean locking.timeout?"),
        ("timeout = 5", "timeout", "did you mean lock_timeout?"),
        ("lockin.wait = 5", "lockin", "did you mean locking?"),
        ("tablename = 'a'", "tablename", "did you mean table_name?"),
        ("qqqqqq = 1", "qqqqqq", "known are locking, folder, table_name, url, "),
        ("locking = 5", "locking", "must be a table"),
        ("locking.locking = {}", "locking.locking", "no such setting"),
    ],
)
@pytest.mark.parametrize("name", ["msr.toml", "pyproject.toml"])
def test_an_unknown_key_is_named(
    sources: Sources, name: str, text: str, key: str, hint: str
) -> None:
    path = sources.directory / name
    path.write_text(text if name == "msr.toml" else f"[tool.msr]\n{text}")
    message = refused(sources.load, key, str(path))
    assert message.startswith(f"{path}: {key}: ")
    assert hint in message


def test_the_table_in_pyproject_must_be_one(sources: Sources) -> None:
    path = sources.directory / "pyproject.toml"
    path.write_text("[tool]\nmsr = 5\n")
    assert "must be a table" in refused(sources.load, "tool.msr", str(path))


def test_an_unknown_argument_is_named(sources: Sources) -> None:
    message = refused(lambda: sources.load(foldr="x"), "foldr", "argument")
    assert "did you mean folder?" in message
    message = refused(lambda: Config(locking={"timout": 5}), "locking.timout", "argument")
    assert "did you mean locking.timeout?" in message
    refused(lambda: sources.load(locking={5: 5}), "locking.5", "argument")


# --- rules over two values, and the values themselves -------------------------------------------


@pytest.mark.parametrize(
    ("history", "locks"), [("t", "t"), ("T", "t"), ("schema_version", "schema_version")]
)
@every_source
def test_the_two_tables_differ(sources: Sources, give: Give, history: str, locks: str) -> None:
    if history != "schema_version":
        sources.argument("table_name", history)
    if give is Sources.argument:
        sources.arguments["locking"] = {"table_name": locks}
        refused(lambda: Config(**sources.arguments), "locking.table_name", "argument")
    source = give(sources, "locking.table_name", locks)
    assert "must differ" in refused(sources.load, "locking.table_name", source)


@every_source
def test_the_history_table_differs_from_the_default_lock_table(
    sources: Sources, give: Give
) -> None:
    source = give(sources, "table_name", "migration_locks")
    assert "must differ" in refused(sources.load, "locking.table_name", source)


@pytest.mark.parametrize("name", ["t", "_t", "T1$", "t" * 50, "s.t", "s" * 50 + "." + "t" * 50])
def test_table_names(name: str) -> None:
    assert Config(table_name=name).table_name == name
    assert LockingConfig(table_name=name).table_name == name


@pytest.mark.parametrize("bad", ["t\n", ".t", "t.", "s..t", "t-1", "t;", "t'", "$t", "\u0661t"])
def test_what_is_no_table_name(bad: str) -> None:
    refused(lambda: Config(table_name=bad), "table_name", "argument")


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (0, 0), (90, 90), (1.5, 1.5), ("90", 90), ("1.5", 1.5), ("90s", 90), ("10m", 600),
        ("1h30m", 5400), ("1h 30m", 5400), (" 1m ", 60), ("500ms", 0.5), ("1s500ms", 1.5),
        ("7d", 604800), ("0.5h", 1800), ("5m30", None), ("m", None), ("", None), ("-5", None),
        ("1e3", None), ("1_000", None), ("nan", None), ("inf", None), ("10 minutes", None),
        ("\u0665", None), ("9" * 400, None), (math.nan, None), (-math.inf, None), (10**400, None),
        (True, None), (None, None), (b"5", None), (-1, None),
    ],
)  # fmt: skip
def test_durations(value: object, seconds: float | None) -> None:
    if seconds is not None:
        assert parse_duration(value) == pytest.approx(seconds)
    else:
        assert "must be a duration" in refused(
            lambda: parse_duration(value, "wait", "--wait"), "wait", "--wait"
        )


def test_the_edges_of_a_range_are_inside() -> None:
    assert LockingConfig(timeout=1, wait=0) == LockingConfig(timeout=1.0, wait=0.0)
    week = 604800.0
    assert LockingConfig(timeout=week, wait=week).timeout == week


def test_settings_are_frozen_and_hashable() -> None:
    config = Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.table_name = "x"  # type: ignore[misc]  # what is under test
    assert hash(config) == hash(Config())


def test_the_repr_hides_the_url() -> None:
    assert "hunter2" not in repr(Config(url=URL))
    assert "url" not in repr(Config(url=URL))


def test_the_folder_need_not_exist() -> None:
    assert Config(folder="/no/such/folder").folder == Path("/no/such/folder")


def test_toml_is_loaded_only_for_a_file(tmp_path: Path) -> None:
    """Most applications give arguments or variables, and start faster without the parser."""
    code = (
        "import sys, msr.config; from pathlib import Path;"
        "msr.config.load_config(environ={}, directory=Path(sys.argv[1]));"
        "sys.exit(int('tomllib' in sys.modules or 'difflib' in sys.modules))"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path)]
    root = Path(__file__).parents[2]
    assert subprocess.run(arguments, cwd=root, check=False).returncode == 0
