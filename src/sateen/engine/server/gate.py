"""What stands before all routes: the key, the size of bodies, the refusal of work while the server ends."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import re
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sateen.engine.server.metrics import Metrics
from sateen.engine.server.problem import Problem, bad_request

OPEN = ("/", "/health")  # answered without a key
ROUTES = (
    "/",
    "/health",
    "/metrics",
    "/stats",
    "/openapi.json",
    "/v1/models",
    "/v1/completions",
    "/v1/chat/completions",
)
READ_AWAY = (
    16  # so many times the accepted size is read and dropped, so that the client gets to see the refusal
)
BODY_S = 60.0  # for a body to arrive


@dataclass
class Doors:
    """What the server lets in.

    Attributes:
        api_key: asked for when not None.
        max_body_bytes: of a request's body.
        only_local_names: `Host` must be localhost or an address. Without this a page of another site could
            read answers through a name of its own that it lets point here.
        is_draining: new work is refused.
        num_active: answers with work of the engine in them that are not complete.
    """

    api_key: str | None
    max_body_bytes: int
    only_local_names: bool = False
    is_draining: bool = False
    num_active: int = 0


class Gate:
    """The middleware."""

    def __init__(self, app: ASGIApp, doors: Doors, metrics: Metrics):
        self._app, self._doors, self._metrics = app, doors, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        is_work = scope["method"] == "POST" and scope["path"].startswith("/v1/")
        self._doors.num_active += is_work
        try:
            try:
                self._check(scope, is_work)
                body = await self._body(scope, receive)
                if _has_half_pairs(body):
                    raise bad_request("a text has half of a surrogate pair; send whole characters")
            except Problem as problem:
                await answer(problem, noted)
            else:
                await self._app(scope, _replayed(body, receive), noted)
        finally:
            self._doors.num_active -= is_work
            path = scope["path"]
            route = (
                "/v1/models/{id}" if path.startswith("/v1/models/") else path if path in ROUTES else "other"
            )
            self._metrics.requests.labels(route, str(status)).inc()

    def _check(self, scope: Scope, is_work: bool) -> None:
        headers = dict(scope["headers"])
        if self._doors.only_local_names and not _is_local(headers.get(b"host", b"")):
            raise Problem(
                403, "Host is neither localhost nor an address; serve under a name with an --api-key"
            )
        key = self._doors.api_key
        if key is not None and scope["path"] not in OPEN:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + key.encode()):
                raise Problem(
                    401, "the API key is missing or wrong; send it as `Authorization: Bearer KEY`",
                    code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
                )  # fmt: skip
        if is_work and self._doors.is_draining:
            raise Problem(
                503, "the server is shutting down", code="shutting_down",
                headers={"Retry-After": "5", "Connection": "close"},
            )  # fmt: skip
        # Pages of other origins can send forms and plain text here without asking; JSON they cannot.
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if is_work and kind != b"application/json":
            raise Problem(415, "the body must be JSON; send `Content-Type: application/json`")

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body.

        Raises:
            Problem: it is too large or too slow.
        """
        limit = self._doors.max_body_bytes
        body, size = bytearray(), 0
        try:
            async with asyncio.timeout(BODY_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        break
                    data = message.get("body", b"")
                    size += len(data)
                    if size <= limit:
                        body += data
                    if not message.get("more_body") or size > READ_AWAY * limit:
                        break
        except TimeoutError:
            raise Problem(408, f"the body did not arrive within {BODY_S:.0f} s") from None
        if size > limit:
            raise Problem(
                413, f"the body is larger than this server accepts, {limit} bytes", code="request_too_large",
                headers={"Connection": "close"},
            )  # fmt: skip
        return bytes(body)


def _is_local(host: bytes) -> bool:
    found = re.fullmatch(r"(?:\[([^]]+)\]|([^:]+))(?::\d+)?", host.decode("latin-1"))
    name = (found[1] or found[2]).lower() if found else ""
    try:
        return name == "localhost" or bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def _has_half_pairs(body: bytes) -> bool:
    """Some text of the body is no Unicode; JSON can write that, tokenizers cannot read it."""
    if not re.search(rb"\\u[dD][89a-fA-F]", body):
        return False
    try:
        json.dumps(json.loads(body), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    except (ValueError, RecursionError):
        return False  # no JSON: that is for the schema to say
    return False


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body that was read, and then what comes after it."""
    is_given = False

    async def again() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def answer(problem: Problem, send: Send) -> None:
    """Sends an error object."""
    body = problem.as_json()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **problem.headers}
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": problem.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
