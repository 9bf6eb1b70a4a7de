"""Who may import whom, and what `import msr` may load: the arrows of the design, kept true."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]

HANDLER = {"config", "errors", "handlers.base", "locking", "plan", "sql", "urls"}

# module of msr -> the modules of msr that it may import when it is loaded.
ARROWS: dict[str, set[str]] = {
    "__init__": {"*"},  # it re-exports
    "errors": set(),
    "config": {"errors", "urls"},
    "urls": {"errors"},
    "sql": {"errors", "urls"},
    "scripts": {"errors"},
    "new": {"errors", "scripts"},
    "prepare": {"config", "errors", "scripts", "sql", "urls"},
    "plan": {"errors", "scripts"},
    "events": {"errors", "locking", "plan", "results"},
    "results": set(),
    "locking": {"errors"},
    "runner": {
        "config",
        "errors",
        "events",
        "handlers.base",
        "locking",
        "plan",
        "results",
        "scripts",
    },
    "unit": {"config", "errors", "events", "handlers.base", "locking", "plan", "prepare", "urls"},
    "executor": {
        "config",
        "errors",
        "events",
        "handlers.base",
        "locking",
        "plan",
        "results",
        "runner",
        "scripts",
        "urls",
    },
    "handlers.__init__": set(),
    "handlers.base": {"config", "errors", "locking", "plan", "scripts", "urls"},
    "handlers.postgres": {"handlers.postgres_lock", *HANDLER},
    "handlers.postgres_lock": {"errors", "locking"},
    "handlers.sqlite": {"handlers.sqlite_lock", *HANDLER},
    "handlers.sqlite_lock": {"errors", "locking"},
}

# What a module may import besides, inside a function that needs it.
LAZY_ARROWS: dict[str, set[str]] = {
    "executor": {"handlers.postgres", "handlers.sqlite", "prepare"},
    "runner": {"prepare", "unit"},
}

# Outside the standard library, msr needs anyio; these may be imported by the modules named.
LAZY_DRIVERS: dict[str, set[str]] = {
    "asyncpg": {"handlers.postgres", "handlers.postgres_lock"},
    "aiosqlite": {"handlers.sqlite"},
}

# Who may import sqlite3 at all; `test_import_loads_no_driver` holds when.
SQLITE3 = {"handlers.sqlite", "handlers.sqlite_lock", "sql"}

UNWANTED = {"aiosqlite", "asyncpg", "click", "pydantic", "rich", "sqlite3", "typer"}


class Import(NamedTuple):
    """One imported module, and whether it is imported when the importing module is loaded."""

    target: str
    at_load: bool
    line: int


def modules(package: str) -> dict[str, Path]:
    """The modules of a package by their name inside it, with dots."""
    root = ROOT / package
    return {
        ".".join(path.relative_to(root).with_suffix("").parts): path
        for path in sorted(root.rglob("*.py"))
    }


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(node: ast.AST, at_load: bool = True) -> Iterator[Import]:
    """Every import that runs; those under `if TYPE_CHECKING:` do not."""
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.Import():
                for alias in child.names:
                    yield Import(alias.name, at_load, child.lineno)
            case ast.ImportFrom():
                assert child.level == 0, f"line {child.lineno}: a relative import"
                base = child.module or ""
                names = {f"{base}.{alias.name}" for alias in child.names}
                found = {name for name in names if is_module(name)}
                for target in found or {base}:
                    yield Import(target, at_load, child.lineno)
            case ast.If(test=ast.Name(id="TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING")):
                for statement in child.orelse:
                    yield from imports(statement, at_load)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                yield from imports(child, False)
            case _:
                yield from imports(child, at_load)


def is_module(name: str) -> bool:
    """Whether a dotted name is a module or a package of ours, not a name in one."""
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def inner_name(target: str) -> str:
    """`msr.handlers.base` -> `handlers.base`; a package is its `__init__`."""
    name = target.removeprefix("msr").removeprefix(".")
    if not name or (ROOT / "msr").joinpath(*name.split(".")).is_dir():
        return f"{name}.__init__".removeprefix(".")
    return name


MODULES = modules("msr")


def test_every_module_has_its_arrows() -> None:
    # A new module is given its place before it is used.
    assert set(MODULES) <= set(ARROWS)


@pytest.mark.parametrize("module", MODULES)
def test_msr_imports_along_the_arrows(module: str) -> None:
    for target, at_load, line in imports(parse(MODULES[module])):
        if target.partition(".")[0] != "msr":
            continue
        allowed = ARROWS.get(module, set())
        if not at_load:
            allowed = allowed | LAZY_ARROWS.get(module, set())
        assert "*" in allowed or inner_name(target) in allowed, (
            f"msr/{module.replace('.', '/')}.py:{line} imports {target}"
        )


@pytest.mark.parametrize("module", MODULES)
def test_msr_needs_the_standard_library_and_anyio(module: str) -> None:
    # The command line and what prints stay out; a driver is loaded when a database asks for it.
    for target, at_load, line in imports(parse(MODULES[module])):
        top = target.partition(".")[0]
        place = f"msr/{module.replace('.', '/')}.py:{line} imports {target}"
        if top in LAZY_DRIVERS:
            assert module in LAZY_DRIVERS[top], place
            assert not at_load, f"{place} when it is loaded"
        elif top == "sqlite3":
            assert module in SQLITE3, place
        else:
            assert top in {*sys.stdlib_module_names, "anyio", "msr"}, place


@pytest.mark.parametrize("module", MODULES)
def test_msr_does_not_print(module: str) -> None:
    for node in ast.walk(parse(MODULES[module])):
        match node:
            case ast.Call(func=ast.Name(id="print" | "input")):
                pytest.fail(f"msr/{module.replace('.', '/')}.py:{node.lineno} prints or asks")
            case ast.Attribute(value=ast.Name(id="sys"), attr="stdout" | "stderr" | "stdin"):
                pytest.fail(f"msr/{module.replace('.', '/')}.py:{node.lineno} uses sys.{node.attr}")


@pytest.mark.parametrize("module", modules("msr_cli"))
def test_the_command_line_uses_public_names_only(module: str) -> None:
    import msr

    place = f"msr_cli/{module.replace('.', '/')}.py"
    for node in ast.walk(parse(modules("msr_cli")[module])):
        names: list[str] = []
        match node:
            case ast.Import():
                for alias in node.names:
                    assert not alias.name.startswith("msr."), f"{place}: import {alias.name}"
            case ast.ImportFrom(module="msr"):
                names = [alias.name for alias in node.names]
            case ast.ImportFrom(module=str(source)):
                assert not source.startswith("msr."), f"{place}: from {source} import"
            case ast.Attribute(value=ast.Name(id="msr"), attr=name):
                names = [name]
        for name in names:
            assert name in msr.__all__, f"{place} uses msr.{name}, which is not public"


def test_import_loads_no_driver() -> None:
    # A fresh interpreter: this one has loaded them all for the other tests.
    code = "import sys, msr; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT
    ).stdout.split()
    assert not UNWANTED & set(loaded)
