"""Which tokens of which requests the next step computes: continuous batching, first come first served.

A request's work is its tokens that are not in the trunk's cache yet, and the drafts behind them; reading a
prompt and decoding differ only in how many those are. When pages run out the youngest running request gives
back its rows and waits; it computes them again later, with its drafts and random numbers kept, so its tokens
do not change.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from sateen.engine.cache import CacheEntry, KVCache
from sateen.engine.state import Request


@dataclass(slots=True)
class Chunk:
    """One request's part of a step.

    Attributes:
        request: whose tokens.
        entry: its rows.
        start: position of the first token.
        count: tokens, drafts included.
        drafts: the drafts at the end of the chunk.
        samples: the chunk reaches the newest token, so new tokens come out of it.
    """

    request: Request
    entry: CacheEntry
    start: int
    count: int
    drafts: list[int]
    samples: bool

    def token_ids(self) -> list[int]:
        """The chunk's input tokens."""
        return self.request.tokens[self.start : self.start + self.count - len(self.drafts)] + self.drafts


class Scheduler:
    """The queues.

    Attributes:
        waiting: in order of arrival.
        running: hold a slot, in order of arrival.
        num_preemptions: so far.
    """

    def __init__(self, cache: KVCache, *, max_num_seqs: int, max_num_batched_tokens: int):
        self.cache = cache
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.num_preemptions = 0

    def add(self, request: Request) -> None:
        """Queues a new request."""
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Takes a finished or aborted request out and frees its rows."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self._release(request)

    def restart_all(self) -> None:
        """Sends all running requests back to waiting, because their rows no longer belong to the weights."""
        for request in reversed(self.running):
            self._release(request)
            self.waiting.appendleft(request)
        self.running.clear()

    def plan(self) -> list[Chunk]:
        """The next step's chunks; empty only when no request is left.

        Requests that decode come first, so that reading a long prompt does not hold them up; the rest of the
        token budget goes to prompts. A new request starts when the pages for all of its tokens are free.
        """
        chunks: list[Chunk] = []
        budget = self.max_num_batched_tokens
        preempted = False
        missing = [(request, self._missing(request)) for request in self.running]
        decoding = [request for request, count in missing if count == 1]
        reading = [request for request, count in missing if count > 1]
        for request in decoding + reading:
            if request.entry is None:  # preempted for an older one in this very loop
                continue
            count, drafts = self._take(request, budget)
            if count == 0:
                continue
            while not self.cache.reserve(request.entry, request.entry.length + count):
                victim = self.running[-1]
                chunks = [chunk for chunk in chunks if chunk.request is not victim]
                self._preempt(victim)
                preempted = True
                if victim is request:
                    break
            if request.entry is not None:
                chunks.append(self._chunk(request, request.entry, count, drafts))
                budget -= count
        while self.waiting and budget > 0 and not preempted and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            if (
                self.cache.pages_for(len(request.tokens) + len(self._drafts(request)))
                > self.cache.num_free_pages
            ):
                break
            count, drafts = self._take(request, budget)
            if count == 0:
                break
            self.waiting.popleft()
            self.running.append(request)
            request.entry = self.cache.open(request.num_prompt)
            # All of its pages at once: a prompt that has begun is not interrupted by younger ones.
            self.cache.reserve(request.entry, len(request.tokens) + len(self._drafts(request)))
            chunks.append(self._chunk(request, request.entry, count, drafts))
            budget -= count
        assert chunks or not (self.running or self.waiting), "nothing fits: sizes were not validated"
        return chunks

    def _missing(self, request: Request) -> int:
        return len(request.tokens) - (request.entry.length if request.entry else 0)

    def _drafts(self, request: Request) -> list[int]:
        """The drafts worth verifying: one token of each pass is the target's own."""
        return request.drafts[: request.remaining - 1] if request.drafts else []

    def _take(self, request: Request, budget: int) -> tuple[int, list[int]]:
        """How many tokens of a request fit the budget, and the drafts among them."""
        missing, drafts = self._missing(request), self._drafts(request)
        if missing + len(drafts) <= budget:
            return missing + len(drafts), drafts
        # The newest token goes with all its drafts or waits with them.
        return min(budget, missing - 1), []

    def _chunk(self, request: Request, entry: CacheEntry, count: int, drafts: list[int]) -> Chunk:
        end = entry.length + count - len(drafts)
        return Chunk(request, entry, entry.length, count, drafts, samples=end == len(request.tokens))

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request)
        self.waiting.appendleft(request)
        self.num_preemptions += 1

    def _release(self, request: Request) -> None:
        if request.entry is not None:
            self.cache.free(request.entry)
            request.entry = None
