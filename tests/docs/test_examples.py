"""The examples work as they are: the boot hook on both databases, and the demonstration."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import MutableMapping
from pathlib import Path
from types import ModuleType
from typing import Any

import anyio
import httpx
import pytest

import msr
from tests.support.cli import PATIENCE, write_scripts

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = [
    "V1_create_customers.sql",
    "V2_create_orders.up.sql",
    "billing/V3_add_total.sql",
    "V4_fill_in_totals.py",
    "V5_index_orders.sql",
]


def load_boot_hook() -> ModuleType:
    """A fresh import, hence a fresh application, as another replica has it."""
    spec = importlib.util.spec_from_file_location("boot_hook", EXAMPLES / "boot_hook.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


async def boot(replies: list[list[str]]) -> None:
    """Start a replica, ask it what it has migrated, and shut it down."""
    app = load_boot_hook().app
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app=app), base_url="http://replica"
        ) as client,
    ):
        reply = await client.get("/health")
        replies.append(reply.json()["applied"])


async def test_three_replicas_at_once(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of three replicas migrates, all three start, and a fourth finds nothing to do."""
    monkeypatch.setenv("DATABASE_URL", database_url)
    replies: list[list[str]] = []
    async with anyio.create_task_group() as replicas:
        for _ in range(3):
            replicas.start_soon(boot, replies)
    assert sorted(replies) == [[], [], SCRIPTS]
    await boot(replies)
    assert replies[3] == []
    executor = msr.MigrationScriptExecutor.from_url(database_url, folder=EXAMPLES / "migrations")
    assert {row.status for row in await executor.list()} == {"applied"}


async def test_failing_script_fails_the_startup(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No replica serves a schema that is not at head: its server is told that startup failed."""
    monkeypatch.setenv("DATABASE_URL", database_url)
    hook = load_boot_hook()
    scripts = {"V1_good.sql": "CREATE TABLE good (id INTEGER);", "V2_bad.sql": "SELECT nonsense;"}
    monkeypatch.setattr(hook, "MIGRATIONS", write_scripts(tmp_path / "scripts", scripts))
    sent: list[MutableMapping[str, Any]] = []

    async def receive() -> dict[str, str]:
        return {"type": "lifespan.startup"}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    with pytest.raises(msr.MigrationError, match=r"V2_bad\.sql"):
        await hook.app({"type": "lifespan", "app": hook.app, "state": {}}, receive, send)
    assert [message["type"] for message in sent] == ["lifespan.startup.failed"]


PAUSE = "await asyncio.sleep(SECONDS / len(ORDERS))"
"""What gives a reader time to look at the lock, in the fourth script."""


@pytest.mark.timeout(180)  # a dozen commands, one after the other
def test_demonstration(tmp_path: Path) -> None:
    """`make demo` succeeds whatever the environment has set, and leaves nothing behind.

    Here its slow script waits until the lock was looked at, however long that takes.
    """
    examples, looked, temporary = tmp_path / "examples", tmp_path / "looked", tmp_path / "temporary"
    shutil.copytree(EXAMPLES, examples)
    temporary.mkdir()
    slow = examples / "migrations" / SCRIPTS[3]
    text = slow.read_text(encoding="utf-8")
    assert PAUSE in text
    wait = f"while not Path({str(looked)!r}).exists():\n            await asyncio.sleep(0.01)"
    slow.write_text(
        text.replace(PAUSE, wait).replace("from typing", "from pathlib import Path\nfrom typing")
    )

    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    foreign = {"MSR_LOCKING_ENABLED": "false", "MSR_LOCKING_NAME": "x", "DATABASE_URL": "nonsense"}
    process = subprocess.Popen(
        ["sh", examples / "demo.sh"],
        env={**os.environ, **foreign, "PATH": path, "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        start_new_session=True,
    )
    said = ""
    try:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                said += line
                if line.startswith("Running: "):
                    looked.touch()
        assert process.wait(PATIENCE) == 0, said
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    assert "Running: V4_fill_in_totals.py (4 of 5)" in said
    assert said.endswith("5 scripts: 5 applied\n")
    assert list(temporary.iterdir()) == []
