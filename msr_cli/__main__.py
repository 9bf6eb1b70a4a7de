"""`python -m msr_cli`, and the installed command `msr`."""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Run the command, or say which package it needs."""
    try:
        from msr_cli.app import run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "typer":
            raise
        raise SystemExit(
            "✗ Error: typer is not installed: run pip install 'migration-script-runner[cli]'"
        ) from None
    run()


if __name__ == "__main__":
    main()
