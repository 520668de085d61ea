"""How long requests may wait: deadlines, and when a full queue should have room again.

The clock is the engine's, so tests may bring their own.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable

from sateen.engine.scheduler import Scheduler
from sateen.engine.state import Request
from sateen.errors import QueueFull, RequestError

RECENT = 32  # ends of requests that the pace is measured over
UNMEASURED_S = 1.0  # waiting time told before anything is measured (source: ours)


class Limits:
    """How many requests an engine lets wait and how long each may take; reads the engine's clock.

    Attributes:
        max_waiting: requests that may wait beside those in work; None for any number.
    """

    def __init__(self, scheduler: Scheduler, max_waiting: int | None, clock: Callable[[], float]):
        self.max_waiting = max_waiting
        self._scheduler, self._clock = scheduler, clock
        self._deadlines, self._pace = Deadlines(), Pace()

    def check_room(self, count: int, tokens_per_s: float) -> None:
        """Nothing, when so many more requests may run or wait.

        Args:
            count: of requests.
            tokens_per_s: of the engine so far, to tell how long until there is room.

        Raises:
            RequestError: they never could.
            QueueFull: not now.
        """
        if self.max_waiting is None:
            return
        scheduler = self._scheduler
        places = self.max_waiting + scheduler.max_num_seqs
        if count > places:
            raise RequestError(f"n is {count}, but at most {places} requests can run and wait; lower n")
        if scheduler.num_unfinished + count > places:
            wait_s = self._pace.retry_after_s(self._clock(), scheduler.running, tokens_per_s)
            raise QueueFull(
                f"{len(scheduler.waiting)} requests are waiting and at most {self.max_waiting} may; "
                f"try again in {wait_s:.3g} s",
                wait_s,
            )

    def watch(self, request: Request, deadline_s: float) -> None:
        """Lets a request expire so many seconds from now."""
        request.deadline = self._clock() + deadline_s
        self._deadlines.add(request)

    def expired(self) -> list[Request]:
        """Unfinished requests whose time is over; each is returned once."""
        return self._deadlines.expired(self._clock())

    def sweep(self) -> None:
        """Lets go of finished requests; called per step."""
        self._deadlines.sweep(self._scheduler.num_unfinished)

    def ended(self, request: Request) -> None:
        """A request ended that still has its rows, if it ever had some."""
        if request.entry is not None:
            self._pace.ended(self._clock())


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
