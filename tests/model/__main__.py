"""Print what the model found: `python -m tests.model`, with `-v` also the traces of the mutants."""

from __future__ import annotations

import sys

from tests.model.mutants import MUTANTS, SYSTEMS, check, describe


def main(arguments: list[str]) -> int:
    failures = 0
    for name, system in SYSTEMS.items():
        explored = check(system)
        failures += explored.promise is not None
        print(f"{name:40} {describe(explored)}", flush=True)
    print()
    for name, mutant in MUTANTS.items():
        explored = check(mutant.system, mutant.promise)
        failures += explored.promise != mutant.promise
        story = describe(explored)
        print(f"{name:66} {explored.promise}", flush=True)
        if "-v" in arguments or explored.promise != mutant.promise:
            print(f"{story}\n", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
