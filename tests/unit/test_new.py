"""`msr.new_script`: a version that nobody has yet, and a template."""

from __future__ import annotations

import asyncio
import os
import re
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import msr
from msr.prepare import prepare
from msr.scripts import Script, load_scripts
from tests.support.cli import write_scripts


def version_of(path: Path) -> int:
    return int(path.name.partition("_")[0].removeprefix("V"))


def load_one(folder: Path) -> Script:
    [script], problems = load_scripts(folder)
    assert problems == []
    return script


def seconds(moment: datetime) -> int:
    return int(moment.strftime("%Y%m%d%H%M%S"))


def test_sql(tmp_path: Path) -> None:
    """Two files of one version, the time in UTC, in a folder that is made; nothing else is left."""
    folder = tmp_path / "new" / "migrations"
    began = seconds(datetime.now(UTC))
    paths = msr.new_script(folder, "add users")
    ended = seconds(datetime.now(UTC))

    version = version_of(paths[0])
    assert began <= version <= ended
    assert paths == [
        folder / f"V{version}_add_users.up.sql",
        folder / f"V{version}_add_users.down.sql",
    ]
    assert sorted(os.listdir(folder)) == sorted(path.name for path in paths)
    assert [path.read_text() for path in paths] == [
        "-- up: add users\n\n",
        "-- down: add users\n\n",
    ]
    script = load_one(folder)
    assert (script.version, script.name, script.down_path) == (version, "add_users", paths[1])


def test_unwritten_sql_does_not_run(tmp_path: Path) -> None:
    """A template that nobody filled in is a problem, in both directions, not an empty migration."""
    msr.new_script(tmp_path, "x")
    for direction in ("up", "down"):
        [problem] = prepare(load_one(tmp_path), direction, "postgresql").problems
        assert problem.rule == "empty"


def test_python(tmp_path: Path) -> None:
    """One file with both functions, which refuse to be run before they are written."""
    [path] = msr.new_script(tmp_path, "fill in totals", "python")

    assert re.fullmatch(r"V\d{14}_fill_in_totals\.py", path.name)
    assert os.listdir(tmp_path) == [path.name]
    script = load_one(tmp_path)
    for direction in ("up", "down"):
        prepared = prepare(script, direction, "sqlite")
        assert prepared.problems == ()
        assert prepared.function is not None
        with pytest.raises(NotImplementedError, match="write the "):
            asyncio.run(prepared.function(None, None))  # type: ignore[arg-type]  # it takes none
    assert path.read_text().startswith('"""fill in totals."""\n')


def test_many_at_once(tmp_path: Path) -> None:
    """Whoever makes scripts at the same time gets another version, and the latest is the newest."""
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda n: msr.new_script(tmp_path, f"n{n}"), range(40)))

    assert len({version_of(paths[0]) for paths in made}) == 40
    assert all(version_of(up) == version_of(down) for up, down in made)
    assert len(os.listdir(tmp_path)) == 80  # no claim is left
    scripts, problems = load_scripts(tmp_path)
    assert (len(scripts), problems) == (40, [])


def test_one_after_the_other(tmp_path: Path) -> None:
    """Within one second, too, each is newer than the one before it."""
    kinds: list[Literal["sql", "python"]] = ["sql", "python"]
    versions = [version_of(msr.new_script(tmp_path, "x", kind)[0]) for kind in kinds * 3]
    assert versions == sorted(set(versions))


@pytest.mark.parametrize("label", ["V{}_x.sql", "V{}_x.py", "sub/deep/V{}_x.up.sql"])
def test_newer_than_every_other(tmp_path: Path, label: str) -> None:
    """A clock that is behind somebody else's does not make a script that comes too late."""
    ahead = seconds(datetime.now(UTC) + timedelta(days=3))
    write_scripts(tmp_path, {label.format(ahead): "SELECT 1;", "V1_x.sql": "", "R_x.sql": ""})
    assert version_of(msr.new_script(tmp_path, "x")[0]) == ahead + 1


def test_no_version_left(tmp_path: Path) -> None:
    """Above the highest version that a script may have there is none, and that is said."""
    newest = "9" * 18
    write_scripts(tmp_path, {f"V{newest}_x.sql": ""})
    with pytest.raises(msr.ConfigError, match=f"no version is left above {newest}"):
        msr.new_script(tmp_path, "x")
    assert os.listdir(tmp_path) == [f"V{newest}_x.sql"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Add-Users, quickly!", "Add_Users_quickly"),
        ("__x__", "x"),
        ("../../etc/passwd", "etc_passwd"),
        ("été 2", "été_2"),
        ("x" * 100, "x" * 100),
    ],
)
def test_names(tmp_path: Path, name: str, expected: str) -> None:
    """What cannot stand in a file's name becomes an underscore."""
    path = msr.new_script(tmp_path, name)[0]
    assert path.parent == tmp_path
    assert path.name.partition("_")[2] == f"{expected}.up.sql"


@pytest.mark.parametrize("name", ["", " ", "_", "!?", "x" * 101])
def test_bad_names(tmp_path: Path, name: str) -> None:
    """A name of which nothing is left, or too much, is refused, and nothing is made."""
    with pytest.raises(msr.ConfigError, match="must have 1 to 100 bytes of letters") as caught:
        msr.new_script(tmp_path / "new", name)
    assert caught.value.key == "name"
    assert os.listdir(tmp_path) == []


@settings(max_examples=50)  # each writes files
@example(name="\0")
@example(name="\udcff")  # what a terminal typed that was no UTF-8
@given(name=st.text(max_size=20) | st.sampled_from(['"""', "\\", '\\"', "{x}", "a\n; DROP", "${}"]))
def test_any_name(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    """Whatever the name, what is made is a good script that does nothing, or nothing is made."""
    folder = tmp_path_factory.mktemp("folder")
    for kind in ("sql", "python"):
        for path in folder.iterdir():
            path.unlink()
        try:
            msr.new_script(folder, f"x{name}", kind)
        except msr.ConfigError:
            assert os.listdir(folder) == []
            continue
        problems = prepare(load_one(folder), "up", "sqlite").problems
        assert [problem.rule for problem in problems] == (["empty"] if kind == "sql" else [])


@pytest.mark.parametrize("what", ["file", "file/below"])
def test_unusable_folder(tmp_path: Path, what: str) -> None:
    """A folder that cannot be made is a wrong setting, named with the system's reason."""
    (tmp_path / "file").write_text("")
    with pytest.raises(msr.ConfigError, match="cannot be written to: ") as caught:
        msr.new_script(tmp_path / what, "x")
    assert caught.value.key == "folder"


@pytest.mark.parametrize("ending", [".up.sql", ".down.sql"])
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    """When a file cannot be written, that is an error, and the claim on the version is dropped."""
    write = Path.write_text

    def failing(path: Path, *arguments: Any, **options: Any) -> int:
        if path.name.endswith(ending):
            raise OSError(28, "No space left on device")
        return write(path, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", failing)
    with pytest.raises(msr.ConfigError, match="No space left on device"):
        msr.new_script(tmp_path, "x")
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
