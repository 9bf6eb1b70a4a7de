"""A web application that migrates its database when it starts.

With FastAPI it is the same, `FastAPI(lifespan=lifespan)`: FastAPI hands the lifespan to Starlette.

Start as many replicas as you like at once. One of them migrates; the others wait until the schema
is at head and go on without ever having held the lock. When nothing is pending, the hook costs one
connection and one query. When a script fails, startup fails: no replica serves a half-made schema.

    pip install 'migration-script-runner[sqlite]' starlette uvicorn
    DATABASE_URL=sqlite:///app.db uvicorn --app-dir examples boot_hook:app
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

import msr

MIGRATIONS = Path(__file__).with_name("migrations")


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    app.state.migrated = await msr.migrate(os.environ["DATABASE_URL"], folder=MIGRATIONS)
    yield


async def health(request: Request) -> JSONResponse:
    result: msr.MigrationResult = request.app.state.migrated
    return JSONResponse({"applied": [script.script for script in result.executed]})


app = Starlette(lifespan=lifespan, routes=[Route("/health", health)])
