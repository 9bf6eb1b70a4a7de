"""The benchmarks still run; what they measure is not judged here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cli import PATIENCE
from tests.support.postgres import PostgresServer

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "command",
    [
        ["boot", "--rounds", "1", "--scripts", "2"],
        ["wakeup", "--rounds", "1", "--hold", "0.1", "0.2"],
        ["contention", "--rounds", "1", "--scripts", "2", "--processes", "2"],
    ],
    ids=lambda command: command[0],
)
def test_benchmark_prints_its_table(postgres_server: PostgresServer, command: list[str]) -> None:
    """Each prints a line with numbers for each database."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{command[0]}", *command[1:]],
        cwd=ROOT,
        env={**os.environ, "MSR_TEST_POSTGRES_URL": postgres_server.url()},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (done.returncode, done.stderr) == (0, "")
    _, _, *rows = done.stdout.splitlines()
    assert [row.split()[1] for row in rows] == ["sqlite", "postgresql"]
