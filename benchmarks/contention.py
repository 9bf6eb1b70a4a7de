"""How long until N processes, started at once on an empty database, have all returned?

Each is a whole `msr migrate`, interpreter start included; it fails unless all exit 0. The floor is
the same number of processes that only start: `msr --version`.

    python -m benchmarks.contention
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.support import databases, figures, header, make_scripts


def run(processes: int, *arguments: str) -> float:
    """Wall time in seconds of `msr` in so many processes. Raises `SystemExit` if one fails."""
    command = [sys.executable, "-m", "msr_cli", *arguments]
    started = time.perf_counter()
    running = [
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    errors = [process.communicate()[1] for process in running]
    elapsed = time.perf_counter() - started
    for process, text in zip(running, errors, strict=True):
        if process.returncode:
            raise SystemExit(f"exit code {process.returncode}: {text}")
    return elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 5, 20])
    parser.add_argument("--scripts", type=int, default=20)
    parser.add_argument("--databases", nargs="+", default=["sqlite", "postgresql"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, databases(options.databases) as make:
        folder = str(make_scripts(Path(temporary, "scripts"), options.scripts))
        header("database", "processes", "floor, ms", "all have returned, ms")
        for kind in options.databases:
            for processes in options.processes:
                floor, times = [], []
                for _ in range(options.rounds):
                    floor.append(run(processes, "--version"))
                    arguments = ("migrate", "--url", make(kind), "--folder", folder)
                    times.append(run(processes, *arguments))
                print(f"| {kind} | {processes} | {figures(floor)} | {figures(times)} |", flush=True)


if __name__ == "__main__":
    main()
