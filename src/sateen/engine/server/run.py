"""Runs a service on a socket until it is told to end, and lets answers in work finish first."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from sateen.engine.server.app import Service

log = logging.getLogger("sateen.server")


class Server(uvicorn.Server):
    """Uvicorn with a drain before its own shutdown, which would close the port at once."""

    def __init__(self, service: Service, *, drain_s: float, on_ready: Callable[[], None]):
        """
        Args:
            service: what to run.
            drain_s: seconds that answers in work may take after the first signal.
            on_ready: called when the port answers.
        """
        config = uvicorn.Config(
            service.app,
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            ws="none",
            lifespan="on",
            timeout_keep_alive=30,
            timeout_graceful_shutdown=5,
        )
        super().__init__(config)
        self._service, self._drain_s, self._on_ready = service, drain_s, on_ready
        self._ends_at: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Opens the port."""
        await super().startup(sockets)
        self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drains; uvicorn would raise the signal again afterwards, and the process would not end with 0."""
        self.drain()

    def drain(self) -> None:
        """Refuses new work and ends when the work at hand is done; called again, ends that work as well."""
        wait_s = 0.0 if self._service.doors.is_draining else self._drain_s
        self._service.doors.is_draining = True
        log.info("no new requests; waiting up to %.0f s for answers in work", wait_s)
        self._ends_at = time.monotonic() + wait_s

    async def on_tick(self, counter: int) -> bool:
        """Whether to end now; called ten times a second."""
        if self._ends_at is not None:
            is_late = time.monotonic() >= self._ends_at
            if is_late:
                self._service.engine.end_all()
            if is_late or self._service.doors.num_active == 0:
                self.should_exit = True
        return await super().on_tick(counter)


def bind(host: str, port: int) -> socket.socket:
    """A socket at this address, which does not listen yet.

    Raises:
        OSError: no such address, or one that is taken.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


def url(listener: socket.socket) -> str:
    """Where browsers find the page."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
