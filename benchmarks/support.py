"""What the benchmarks share: databases to measure on, folders of scripts, and the numbers."""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

from tests.support.postgres import LocalPostgres, PostgresServer, find_binaries

__all__ = ["databases", "figures", "header", "make_scripts", "measure"]


@contextlib.contextmanager
def databases(kinds: Sequence[str]) -> Iterator[Callable[[str], str]]:
    """A function that makes a fresh database, "sqlite" or "postgresql", and returns its URL.

    PostgreSQL is the server at `MSR_TEST_POSTGRES_URL`, else one that is started here.
    """
    given = os.environ.pop("MSR_TEST_POSTGRES_URL", "")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server: PostgresServer | None = None
        if "postgresql" in kinds:
            server = (
                PostgresServer(given)
                if given
                else stack.enter_context(LocalPostgres(find_binaries()))
            )

        def make(kind: str) -> str:
            name = f"bench_{uuid.uuid4().hex[:12]}"
            if kind == "sqlite":
                return f"sqlite:///{folder / name}.db"
            assert server is not None
            stack.callback(server.drop_database, name)
            return server.create_database(name)

        yield make


def make_scripts(folder: Path, count: int) -> Path:
    """A folder of `count` scripts, each of which makes a small table."""
    folder.mkdir()
    for version in range(1, count + 1):
        text = f"CREATE TABLE thing_{version} (id INTEGER PRIMARY KEY, name TEXT NOT NULL);\n"
        (folder / f"V{version}_create_thing_{version}.sql").write_text(text)
    return folder


async def measure(
    rounds: int, works: dict[str, Callable[[], Awaitable[object]]]
) -> dict[str, list[float]]:
    """Seconds per call. The works take turns, so that a slow moment hits all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 3):
        for name, work in works.items():
            started = time.perf_counter()
            await work()
            if number >= 3:  # the first ones import and warm up
                times[name].append(time.perf_counter() - started)
    return times


def header(*columns: str) -> None:
    """The head of a Markdown table."""
    print(f"| {' | '.join(columns)} |")
    print(f"|{'---|' * len(columns)}")


def figures(seconds: Sequence[float]) -> str:
    """Median and 95th percentile in milliseconds."""
    ordered = sorted(seconds)
    p95 = ordered[min(len(ordered) - 1, round(0.95 * len(ordered)))]
    return f"{statistics.median(ordered) * 1000:.1f} / {p95 * 1000:.1f}"
