"""How long requests may wait: deadlines, and when a full queue should have room again.

Nothing here reads a clock; the engine passes the time, so tests can too.
"""

from __future__ import annotations

import heapq
import math
from collections import deque

from sateen.engine.state import Request
from sateen.errors import RequestError

RECENT = 32  # ends of requests that the pace is measured over
UNMEASURED_S = 1.0  # waiting time told before anything is measured (source: ours)


class Deadlines:
    """The unfinished requests that expire, the earliest first; O(log n) per request."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Request]] = []

    def add(self, request: Request) -> None:
        """Watches a request that has a deadline."""
        assert request.deadline is not None
        heapq.heappush(self._heap, (request.deadline, request.request_id, request))

    def expired(self, now: float) -> list[Request]:
        """Unfinished requests whose time is over; each is returned once."""
        found = []
        while self._heap and self._heap[0][0] <= now:
            request = heapq.heappop(self._heap)[2]
            if request.finish_reason is None:
                found.append(request)
        return found

    def sweep(self, num_unfinished: int) -> None:
        """Lets go of finished requests once most are; called per step, amortised O(1) per request."""
        if len(self._heap) > 2 * num_unfinished + RECENT:
            self._heap = [item for item in self._heap if item[2].finish_reason is None]
            heapq.heapify(self._heap)


class Pace:
    """How often a place becomes free, from the newest ends of requests that held one."""

    def __init__(self) -> None:
        self._ends: deque[float] = deque(maxlen=RECENT)

    def ended(self, now: float) -> None:
        """A running request ended."""
        self._ends.append(now)

    def retry_after_s(self, now: float, running: list[Request], tokens_per_s: float) -> float:
        """Seconds until the next end: the mean distance of ends; before two, from tokens per second."""
        if len(self._ends) >= 2 and now > self._ends[0]:
            return (now - self._ends[0]) / len(self._ends)
        if running and tokens_per_s > 0:
            return min(request.remaining for request in running) * len(running) / tokens_per_s
        return UNMEASURED_S


def check_deadline(deadline_s: float) -> None:
    """Nothing, when this is a time that a request can have.

    Raises:
        RequestError: it is not a finite number above 0.
    """
    is_number = isinstance(deadline_s, int | float) and not isinstance(deadline_s, bool)
    if not is_number or not math.isfinite(deadline_s) or deadline_s <= 0:
        raise RequestError(f"deadline_s is {deadline_s!r}; accepted: a finite number of seconds above 0")
