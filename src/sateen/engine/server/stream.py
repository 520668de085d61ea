"""Server-sent events, and the end of a job whose client is gone."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sateen.engine.server.job import Cancelled, Job
from sateen.engine.server.loop import EngineLoop
from sateen.engine.server.problem import Problem

log = logging.getLogger("sateen.server")
DONE = b"data: [DONE]\n\n"
HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]


def event(value: object) -> bytes:
    """One event with a JSON object."""
    return f"data: {json.dumps(value)}\n\n".encode()


@asynccontextmanager
async def tied_to_client(engine: EngineLoop, job: Job, receive: Receive) -> AsyncIterator[None]:
    """Cancels the job at once when its client leaves, and at the end when it is not complete."""

    async def wait_for_the_end() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        engine.cancel(job)

    watcher = asyncio.create_task(wait_for_the_end())
    try:
        yield
    finally:
        watcher.cancel()
        engine.cancel(job)


class EventStream(Response):
    """Sends events as they come. What goes wrong on the way is told as an event, for the status is out."""

    def __init__(self, engine: EngineLoop, job: Job, events: AsyncIterator[bytes]):
        super().__init__()
        self._engine, self._job, self._events = engine, job, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        async with tied_to_client(self._engine, self._job, receive):
            try:
                async for data in self._events:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            except Cancelled:
                log.debug("a stream ended early")
            except Exception as error:
                if not isinstance(error, Problem):
                    log.exception("a stream failed")
                    error = Problem(500, "the server failed to tell this answer")
                body = event(error.body()) + DONE
                await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
