"""Finding, reading and checking the scripts in a folder."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msr.errors import ConfigError
from msr.scripts import Problem, Script, load_scripts


def write(folder: Path, *labels: str, text: str = "SELECT 1;") -> None:
    for label in labels:
        path = folder / label
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def load_one(folder: Path) -> Script:
    scripts, problems = load_scripts(folder)
    assert problems == []
    [script] = scripts
    return script


def found(folder: Path) -> list[tuple[str, str]]:
    return [(problem.rule, problem.file) for problem in load_scripts(folder)[1]]


@pytest.mark.parametrize(
    ("label", "version", "name", "kind"),
    [
        ("V1_x.sql", 1, "x", "sql"),
        ("V1__x.up.sql", 1, "x", "sql"),
        ("V007_add_users.py", 7, "add_users", "python"),
        ("V20240131120000_a-b c.sql", 20240131120000, "a-b c", "sql"),
        ("V999999999999999999_x.sql", 999999999999999999, "x", "sql"),
        ("V0_x.1.2.sql", 0, "x.1.2", "sql"),
        ("sub/deep/V1_été.sql", 1, "été", "sql"),
    ],
)
def test_good_names(tmp_path: Path, label: str, version: int, name: str, kind: str) -> None:
    """A file name gives version, name and kind; the label is its path below the folder."""
    write(tmp_path, label)
    script = load_one(tmp_path)
    assert (script.version, script.name, script.kind) == (version, name, kind)
    assert (script.label, script.path) == (label, tmp_path / label)


@pytest.mark.parametrize(
    ("label", "name", "kind"),
    [
        ("R_x.sql", "x", "sql"),
        ("R__x.py", "x", "python"),
        ("R_1_x.2.sql", "1_x.2", "sql"),
        ("sub/R_all-views été.sql", "all-views été", "sql"),
    ],
)
def test_repeatable_names(tmp_path: Path, label: str, name: str, kind: str) -> None:
    """A repeatable script has no version and no way down; the history knows it by its name."""
    write(tmp_path, label)
    script = load_one(tmp_path)
    assert (script.version, script.name, script.kind) == (None, name, kind)
    assert (script.label, script.key, script.down_path) == (label, name, None)


@pytest.mark.parametrize(
    "label",
    [
        "setup.sql",
        "V1.sql",
        "V1_.sql",
        "V1___.sql",
        "V1_.up.sql",
        "V1-x.sql",
        "V1.1_x.sql",
        "V1_x.SQL",
        "v1_x.sql",
        "v1_x.py",
        "V1.py",
        "001_x.py",
        "V1234567890123456789_x.sql",
        "V\uff11_x.sql",
        "sub/x.down.sql",
        "_x.sql",
        "R_.sql",
        "R___.sql",
        "R.sql",
        "R_.py",
        "R-x.sql",
        "r_x.sql",
        "R_x.SQL",
        "R_x.up.sql",
        "R_x.down.sql",
        "R_.x.sql",
    ],
)
def test_bad_names(tmp_path: Path, label: str) -> None:
    """A file that looks like a script and is not named like one is a problem with the rule."""
    write(tmp_path, label)
    scripts, [problem] = load_scripts(tmp_path)
    assert scripts == []
    assert (problem.rule, problem.file) == ("bad-name", label)
    assert "V<version>_<name>" in problem.message
    assert "R_<name>" in problem.message


@pytest.mark.parametrize("name", ["V1_a\nb.sql", "V1_\udcff.sql", "V1_\x1b[0m.sql"])
def test_unprintable_names(tmp_path: Path, name: str) -> None:
    """A name that no terminal or history could show is refused, and shown escaped."""
    write(tmp_path, name)
    [problem] = load_scripts(tmp_path)[1]
    assert problem.rule == "bad-name"
    assert problem.file.isprintable()


def test_what_is_passed_over(tmp_path: Path) -> None:
    """Hidden files, helpers, other kinds and private folders are not scripts."""
    write(
        tmp_path,
        "V1_x.sql",
        ".V2_x.sql",
        "._V2_x.sql",
        "helpers.py",
        "vacuum.py",
        "repeat.py",
        "r_x.py",
        "README.md",
        "V3_x.txt",
        "V1_x.sql~",
        ".git/V4_x.sql",
        "_drafts/V5_x.sql",
        "__pycache__/V6_x.py",
    )
    (tmp_path / "V7_x.sql").mkdir()
    assert load_one(tmp_path).label == "V1_x.sql"


def test_order_is_by_version(tmp_path: Path) -> None:
    """Numbers, not letters, and not folders, give the order."""
    write(tmp_path, "V10_a.sql", "V9_b.py", "z/V2_c.sql", "a/V011_d.up.sql")
    assert [s.version for s in load_scripts(tmp_path)[0]] == [2, 9, 10, 11]


def test_repeatable_scripts_come_last(tmp_path: Path) -> None:
    """After every version, by their names and not by their folders or kinds."""
    write(tmp_path, "z/R_a.sql", "R_b.py", "a/R_c.sql", "V2_z.sql", "z/V10_a.sql")
    assert [s.key for s in load_scripts(tmp_path)[0]] == [2, 10, "a", "b", "c"]


def test_down_scripts(tmp_path: Path) -> None:
    """A .down.sql belongs to the .up.sql of its name in its folder."""
    write(tmp_path, "V1_x.up.sql", "V1_x.down.sql", "V2_x.up.sql", "V3_x.sql")
    scripts, problems = load_scripts(tmp_path)
    assert [s.down_path for s in scripts] == [tmp_path / "V1_x.down.sql", None, None]
    assert problems == []


@pytest.mark.parametrize("up", ["V1_x.sql", "V1_y.up.sql", "V01_x.up.sql", "sub/V1_x.up.sql"])
def test_down_without_up(tmp_path: Path, up: str) -> None:
    """A .down.sql without its .up.sql beside it is a problem."""
    write(tmp_path, up, "V1_x.down.sql")
    assert found(tmp_path) == [("down-without-up", "V1_x.down.sql")]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("V1_a.sql", "V1_b.sql"),
        ("V01_a.sql", "V1_b.py"),
        ("V1_x.sql", "V1_x.up.sql"),
        ("V1_x.sql", "sub/V1_x.sql"),
    ],
)
def test_duplicate_versions(tmp_path: Path, first: str, second: str) -> None:
    """Two scripts of one version are a problem that names both files."""
    write(tmp_path, first, second)
    [problem] = load_scripts(tmp_path)[1]
    assert (problem.rule, problem.file) == ("duplicate-version", second)
    assert f" {first}:" in problem.message


@pytest.mark.parametrize(
    ("first", "second"),
    [("R_x.sql", "sub/R_x.sql"), ("R_x.py", "R_x.sql"), ("R__x.sql", "sub/R_x.sql")],
)
def test_duplicate_names(tmp_path: Path, first: str, second: str) -> None:
    """Two repeatable scripts of one name are a problem that names both files."""
    write(tmp_path, first, second, "V1_x.sql", "R_y.sql")
    [problem] = load_scripts(tmp_path)[1]
    assert (problem.rule, problem.file) == ("duplicate-name", second)
    assert f"the same name as {first}:" in problem.message


def test_all_problems_at_once(tmp_path: Path) -> None:
    """One bad file does not hide the next, nor the scripts that are good."""
    write(tmp_path, "V1_a.sql", "V1_b.sql", "x.sql", "V2_a.down.sql", "V4_a.sql")
    (tmp_path / "V3_a.sql").write_bytes(b"\xff")
    assert sorted(found(tmp_path)) == [
        ("bad-name", "x.sql"),
        ("down-without-up", "V2_a.down.sql"),
        ("duplicate-version", "V1_b.sql"),
        ("not-utf8", "V3_a.sql"),
    ]
    assert [s.version for s in load_scripts(tmp_path)[0]] == [1, 1, 3, 4]


@settings(max_examples=40)  # each writes a file
@given(
    lines=st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=5), max_size=5
    ),
    ending=st.sampled_from([b"\n", b"\r\n", b"\r"]),
    mark=st.sampled_from([b"", b"\xef\xbb\xbf"]),
)
def test_checksum_is_the_same_everywhere(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], ending: bytes, mark: bytes
) -> None:
    """Line ends and a byte order mark change neither the text that runs nor its checksum."""
    folder = tmp_path_factory.mktemp("folder")
    text = "x" + "\n".join(lines)
    (folder / "V1_x.sql").write_bytes(mark + text.encode().replace(b"\n", ending))
    script = load_one(folder)
    assert script.text == text
    assert script.checksum == hashlib.sha256(text.encode()).hexdigest()


def test_checksum_sees_every_other_change(tmp_path: Path) -> None:
    """A single added space changes the checksum."""
    write(tmp_path, "V1_x.sql", text="SELECT 1;")
    write(tmp_path, "V2_x.sql", text="SELECT 1; ")
    one, two = load_scripts(tmp_path)[0]
    assert one.checksum != two.checksum


def test_not_utf8(tmp_path: Path) -> None:
    """The first byte that is not UTF-8 is named, counted in the file as it is."""
    (tmp_path / "V1_x.sql").write_bytes(b"\xef\xbb\xbfa\r\n\xe9")
    [script], [problem] = load_scripts(tmp_path)
    assert (problem.rule, problem.line) == ("not-utf8", 2)
    assert "byte 7:" in problem.message
    assert (script.checksum, script.text) == ("", "")


@pytest.mark.parametrize("kind", ["dangling", "loop", "pipe"])
def test_unreadable_files(tmp_path: Path, kind: str) -> None:
    """A link to nothing or to itself, or a pipe, is a problem and not a hang."""
    path = tmp_path / "V1_x.sql"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path.name if kind == "loop" else "nothing")
    assert found(tmp_path) == [("unreadable", "V1_x.sql")]


def refuse(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Make a folder unreadable, also for root, whom permissions do not stop."""
    scandir = os.scandir

    def refusing(target: str) -> object:
        if Path(target) == path:
            raise PermissionError(13, "Permission denied", str(target))
        return scandir(target)

    monkeypatch.setattr(os, "scandir", refusing)


def test_unreadable_folder_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that cannot be listed is a problem: it may hold scripts."""
    write(tmp_path, "V1_x.sql", "sub/V2_x.sql")
    refuse(monkeypatch, tmp_path / "sub")
    assert found(tmp_path) == [("unreadable", "sub")]


def test_unreadable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder itself must be readable."""
    refuse(monkeypatch, tmp_path)
    with pytest.raises(ConfigError, match="Permission denied"):
        load_scripts(tmp_path)


def test_linked_folders(tmp_path: Path) -> None:
    """A linked folder is read like any other, once, and a loop of links ends."""
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    write(outside, "V2_x.sql")
    write(folder, "V1_x.sql")
    (folder / "linked").symlink_to(outside)
    (folder / "linked-again").symlink_to(outside)
    for name in ("self", "myself"):  # two, so that following them would double at each level
        (folder / name).symlink_to(folder)
    scripts, problems = load_scripts(folder)
    assert [s.version for s in scripts] == [1, 2]
    assert problems == []


@pytest.mark.parametrize(
    ("name", "words"),
    [("nothing", "does not exist"), ("file", "is not a folder"), ("empty", "V1_")],
)
def test_unusable_folders(tmp_path: Path, name: str, words: str) -> None:
    """A folder without scripts is a wrong setting, and the message says what to do."""
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=words) as caught:
        load_scripts(tmp_path / name)
    assert caught.value.key == "folder"


def test_thousand_files(tmp_path: Path) -> None:
    """A thousand scripts are read in well under a second."""
    for version in range(1000):
        (tmp_path / f"V{version}_x.sql").write_text("SELECT 1;")
    began = time.process_time()
    scripts, _ = load_scripts(tmp_path)
    assert len(scripts) == 1000
    assert time.process_time() - began < 1


def test_problem_text() -> None:
    """A problem reads as file, line where there is one, and message."""
    assert str(Problem("r", "a.sql", "is bad", 3)) == "a.sql, line 3: is bad"
    assert str(Problem("r", "a.sql", "is bad")) == "a.sql: is bad"
